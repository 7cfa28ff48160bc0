"""The CPU operators of domain moedge.cpu against ONNX Runtime's own dense FFN in the same precision.

    python tests/benchmarks/cpu_ops.py --hidden 576 --width 1536 --bits 32,8,4 --keep 1,.75,.6,.5 --tokens 1,2,4,8,512
    python tests/benchmarks/cpu_ops.py --hidden 576 --width 1536 --bits 8 --experts 48 --keep 1,.75,.5

Random weights; FFNs form a chain with a norm before each, long enough that no cache holds it, and the forms take turns.
A gathered FFN keeps the given share of the inputs of both of its products by a threshold; with ``--experts``, a
routed one selects that share of its experts. The dense form has one product for gate and up, as the lowerings write it.
The table has the median of dense and, for each share, dense / ours: above 1 ours takes less time. ``bytes`` is what the
share would give if time were bytes (scales are read for every block).

Times are the process's CPU time with one thread, the only fair choice on a busy machine, and wall-clock with more,
without the runs in which the process was preempted (where any are left).
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import onnxruntime
import psutil
from onnx import helper, numpy_helper

from moedge.convert.sources import assets
from moedge.export.ort_ops import library, pack
from moedge.export.quantize import format as quantize

CHAIN_BYTES = 24e6
"""Of weights in a chain: with the others in turn, more than the caches of a desktop processor."""


class Chain:
    """FFNs of one form, each with a norm behind it."""

    def __init__(self, hidden: int, name: str) -> None:
        self.hidden, self.name = hidden, name
        self.nodes: list[Any] = []
        self.weights: dict[str, np.ndarray] = {"one": np.ones(hidden, np.float32)}
        self.inputs = ["x"]

    def add(self, kind: str, inputs: list[str], output: str, domain: str = "", **attributes: Any) -> str:
        self.nodes.append(helper.make_node(kind, inputs, [output], domain=domain, **attributes))
        return output

    def put(self, name: str, value: np.ndarray | None) -> str:
        if value is None:
            return ""
        self.weights[name] = value
        return name

    def norm(self, layer: int, y: str) -> str:
        return self.add("SimplifiedLayerNormalization", [y, "one"], f"x{layer + 1}", axis=-1, epsilon=1e-6)

    def session(self, layers: int, threads: int, path: Path) -> onnxruntime.InferenceSession:
        kinds = {"x": (1, self.hidden), "indices": (6, "k"), "weights": (1, "k")}
        graph = helper.make_graph(
            self.nodes,
            "chain",
            [helper.make_tensor_value_info(name, kinds[name][0], ["T", kinds[name][1]]) for name in self.inputs],
            [helper.make_tensor_value_info(f"x{layers}", 1, ["T", self.hidden])],
            [numpy_helper.from_array(value, name) for name, value in self.weights.items()],
        )
        opsets = [helper.make_opsetid(*pair) for pair in (("", 21), (library.DOMAIN, 1), ("com.microsoft", 1))]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        options.add_session_config_entry("session.force_spinning_stop", "1")
        options.register_custom_ops_library(str(path))
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        return onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])


GENERATOR = np.random.default_rng(0)
"""One for all weights: ONNX Runtime packs equal ones once, and the chain would then lie in a cache."""


def random(*shape: int) -> np.ndarray:
    return GENERATOR.standard_normal(shape, dtype=np.float32) / np.float32(shape[-1] ** 0.5)


def hidden_threshold(keep: float) -> float:
    """What a share ``keep`` of silu(g) * u exceeds, g and u normal."""
    gate, up = np.random.default_rng(5).standard_normal((2, 400_000))
    return float(np.quantile(np.abs(gate / (1 + np.exp(-gate)) * up), 1 - keep))


class Forms:
    """The same weights as a dense, a gathered and a routed FFN."""

    def __init__(self, options: argparse.Namespace, bits: int) -> None:
        self.options, self.bits = options, bits
        self.half = options.half_scales and bits != 32
        hidden, width, experts = options.hidden, options.width, options.experts
        size = 3 * hidden * width * (4 if bits == 32 else bits / 8 + (2 if self.half else 4) / quantize.BLOCK)
        self.layers = max(1, round(CHAIN_BYTES / size + 0.5))
        shapes = ((2 * width, hidden), (hidden, width))
        if experts:
            shapes = ((experts, 2 * (width // experts), hidden), (experts, hidden, width // experts))
        self.weights = [[self.stored(random(*shape)) for shape in shapes] for _ in range(self.layers)]
        flat = [(2 * width, hidden), (hidden, width)]
        self.dense_weights = (
            self.weights if not experts else [[self.stored(random(*s)) for s in flat] for _ in range(self.layers)]
        )

    def stored(self, weight: np.ndarray) -> Any:
        if self.bits == 32:
            return weight
        value = quantize.quantize(weight, self.bits)
        return pack.round_scales(value) if self.half else value

    def packed(self, value: Any, interleaved: bool = False) -> pack.Packed:
        return pack.pack_floats(value) if self.bits == 32 else pack.pack(value, self.half, interleaved)

    def dense(self) -> Chain:
        chain, x = Chain(self.options.hidden, "dense"), "x"
        for layer, (gate_up, down) in enumerate(self.dense_weights):
            both = self.product(chain, f"a{layer}", x, gate_up)
            chain.nodes.append(helper.make_node("Split", [both], [f"g{layer}", f"u{layer}"], axis=-1, num_outputs=2))
            sigmoid = chain.add("Sigmoid", [f"g{layer}"], f"s{layer}")
            act = chain.add("Mul", [f"g{layer}", sigmoid], f"m{layer}")
            h = chain.add("Mul", [act, f"u{layer}"], f"h{layer}")
            x = chain.norm(layer, self.product(chain, f"b{layer}", h, down))
        return chain

    def product(self, chain: Chain, name: str, x: str, value: Any) -> str:
        if self.bits == 32:
            return chain.add("MatMul", [x, chain.put(name, np.ascontiguousarray(value.T))], f"{name}.y")
        sizes = {"K": value.columns, "N": len(value.packed), "bits": self.bits, "block_size": quantize.BLOCK}
        inputs = [x, chain.put(f"{name}.q", value.packed), chain.put(f"{name}.s", value.scales)]
        return chain.add("MatMulNBits", inputs, f"{name}.y", "com.microsoft", accuracy_level=4, **sizes)

    def gathered(self, keep: float) -> Chain:
        options, chain, x = self.options, Chain(self.options.hidden, f"{keep:g}"), "x"
        limits: tuple[np.ndarray | None, ...] = (None, None)
        if keep < 1:
            share = NormalDist().inv_cdf(1 - keep / 2)
            limits = (
                np.full(options.hidden, share, np.float32),
                np.full(options.width, hidden_threshold(keep), np.float32),
            )
        for layer, pair in enumerate(self.weights):
            a, b = (self.packed(value) for value in pair)
            inputs = [
                x,
                chain.put("xt", limits[0]),
                chain.put(f"a{layer}", a.weights),
                chain.put(f"as{layer}", a.scales),
            ]
            inputs += [chain.put("ht", limits[1]), chain.put(f"b{layer}", b.weights), chain.put(f"bs{layer}", b.scales)]
            sizes = {"hidden": options.hidden, "inner": options.width, "bits": self.bits}
            x = chain.norm(
                layer, chain.add("GatherGLU", inputs, f"y{layer}", library.DOMAIN, activation="silu", **sizes)
            )
        return chain

    def routed(self, keep: float) -> Chain:
        options, chain, x = self.options, Chain(self.options.hidden, f"{keep:g}"), "x"
        chain.inputs = ["x", "indices", "weights"]
        width = options.width // options.experts
        narrow = pack.narrow(2 * width, self.bits)
        sizes = {"hidden": options.hidden, "width": width, "num_experts": options.experts, "bits": self.bits}
        sizes["interleaved"] = int(narrow)
        for layer, pair in enumerate(self.weights):
            a, b = (self.packed(value, narrow and not number) for number, value in enumerate(pair))
            inputs = ["x" if x == "x" else x, "indices", "weights", "", chain.put(f"a{layer}", a.weights)]
            inputs += [chain.put(f"as{layer}", a.scales), "", chain.put(f"b{layer}", b.weights)]
            inputs += [chain.put(f"bs{layer}", b.scales)]
            y = chain.add("RoutedGLU", inputs, f"y{layer}", library.DOMAIN, activation="silu", **sizes)
            x = chain.norm(layer, y)
        return chain

    def feeds(self, chain: Chain, tokens: int) -> dict[str, np.ndarray]:
        generator = np.random.default_rng(tokens)
        feeds = {"x": generator.standard_normal((tokens, self.options.hidden), dtype=np.float32)}
        if len(chain.inputs) > 1:
            active = round(float(chain.name) * self.options.experts)
            chosen = [generator.permutation(self.options.experts)[:active] for _ in range(tokens)]
            feeds |= {"indices": np.stack(chosen).astype(np.int32), "weights": np.ones((tokens, active), np.float32)}
        return feeds


def measure(sessions: dict[str, Any], feeds: dict[str, Any], repeats: int, threads: int) -> dict[str, float]:
    """Median seconds of each session."""
    clock = time.process_time if threads == 1 else time.perf_counter
    times: dict[str, list[tuple[bool, float]]] = {name: [] for name in sessions}
    for number in range(repeats + 1):
        for name, session in sessions.items():
            before, start = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw, clock()
            session.run(None, feeds[name])
            took = clock() - start
            preempted = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw != before
            if number:
                times[name].append((preempted and threads > 1, took))
    medians = {}
    for name, values in times.items():
        calm = [took for preempted, took in values if not preempted]
        medians[name] = float(np.median(calm or [took for _, took in values]))
    return medians


def ideal(keep: float, bits: int, half: bool) -> float:
    scales = 0.0 if bits == 32 else (16 if half else 32) / quantize.BLOCK
    return (bits + scales) / (bits * keep + scales)


def numbers(text: str) -> list[float]:
    return [float(value) for value in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--width", type=int, default=1536)
    parser.add_argument("--experts", type=int, default=0, help="measure RoutedGLU with so many; 0: GatherGLU")
    parser.add_argument("--bits", default="32,8,4")
    parser.add_argument("--half-scales", action="store_true", help="float16 scales")
    parser.add_argument("--keep", default="1,.75,.6,.5")
    parser.add_argument("--tokens", default="1,2,4,8,512")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=60, help="of one token; fewer of more")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    path = library.cached_library(assets.cache_dir() / "ort-ops")
    rows = []
    for bits in (int(value) for value in numbers(options.bits)):
        forms = Forms(options, bits)
        shares = [(forms.routed if options.experts else forms.gathered)(keep) for keep in numbers(options.keep)]
        chains = {chain.name: chain for chain in (forms.dense(), *shares)}
        sessions = {name: chain.session(forms.layers, options.threads, path) for name, chain in chains.items()}
        for tokens in (int(value) for value in numbers(options.tokens)):
            feeds = {name: forms.feeds(chain, tokens) for name, chain in chains.items()}
            medians = measure(sessions, feeds, max(5, options.repeats // max(1, tokens // 4)), options.threads)
            dense = medians.pop("dense")
            row = {"bits": bits, "tokens": tokens, "dense_us": 1e6 * dense / forms.layers}
            row |= {name: dense / value for name, value in medians.items()}
            rows.append(row)
            if options.json:
                continue
            cells = "  ".join(f"{name} x{dense / value:.2f}" for name, value in medians.items())
            best = ideal(min(numbers(options.keep)), bits, forms.half)
            load = psutil.getloadavg()[0]
            print(
                f"{options.hidden}/{options.width} {bits:2d} bits  T {tokens:3d}  {options.threads} thr  "
                f"dense {row['dense_us']:8.0f} us  {cells}  bytes x{best:.2f}  load {load:.1f}",
                flush=True,
            )
    if options.json:
        print(json.dumps({"options": vars(options), "onnxruntime": onnxruntime.__version__, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
