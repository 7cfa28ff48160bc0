"""One FFN on ONNX Runtime's CPU kernels: a dense GLU against its MoE, float32, int8 and int4.

    python tests/benchmarks/ort_moe_block.py --hidden 2048 --width 8192 --experts 8 --shared 2 --tokens 1,8,128,512

Random weights, the router of CMoE (one gate and one up vector an expert). Each form runs as a chain of ``--layers``
such blocks joined by residual norms, all with their own weights, so that no layer finds them in a cache. Forms take
turns; the table gives medians, and the speed-up of the MoE as a share of the ideal one, width / active width.

Times are wall-clock, or with ``--cpu-time`` the process's CPU time: the only fair choice on a busy machine, and only
with one thread.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from moedge.export.lowering.ort.moe import interleave as interleave_floats
from moedge.export.lowering.ort.qmoe import interleave
from moedge.export.quantize import format as quantize


class Chain:
    """Builds a chain of FFN blocks as one ONNX graph."""

    def __init__(self, hidden: int, layers: int, bits: int | None, method: str = "rtn", seed: int = 0) -> None:
        self.hidden, self.layers, self.bits, self.method = hidden, layers, bits, method
        self.generator = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: dict[str, np.ndarray] = {"norm": np.ones(hidden, np.float32)}

    def add(self, kind: str, inputs: list[str], outputs: list[str], domain: str = "", **attributes: Any) -> str:
        self.nodes.append(helper.make_node(kind, inputs, outputs, domain=domain, **attributes))
        return outputs[0]

    def random(self, *shape: int) -> np.ndarray:
        return self.generator.standard_normal(shape, dtype=np.float32) / np.float32(np.sqrt(shape[-1]))

    def product(self, name: str, x: str, rows: int, columns: int, kept: bool = False) -> str:
        """x [T, columns] times a random [rows, columns]; ``kept`` in float32 whatever the bits."""
        matrix = self.random(rows, columns)
        if self.bits is None or kept:
            self.weights[name] = np.ascontiguousarray(matrix.T)
            return self.add("MatMul", [x, name], [f"{name}.y"])
        value = quantize.quantize(matrix, self.bits, self.method)
        self.weights[f"{name}.q"], self.weights[f"{name}.s"] = value.packed, value.scales
        inputs = [x, f"{name}.q", f"{name}.s"]
        if value.zero_points is not None:
            self.weights[f"{name}.z"] = value.zero_points
            inputs.append(f"{name}.z")
        sizes = {"K": columns, "N": rows, "bits": self.bits, "block_size": quantize.BLOCK, "accuracy_level": 4}
        return self.add("MatMulNBits", inputs, [f"{name}.y"], "com.microsoft", **sizes)

    def glu(self, name: str, x: str, width: int) -> str:
        """A GLU of ``width`` as the lowering writes it: one product for gate and up."""
        both = self.product(f"{name}.gate_up", x, 2 * width, self.hidden)
        self.add("Split", [both], [f"{name}.g", f"{name}.u"], axis=-1, num_outputs=2)
        self.add("Sigmoid", [f"{name}.g"], [f"{name}.s"])
        self.add("Mul", [f"{name}.g", f"{name}.s"], [f"{name}.a"])
        self.add("Mul", [f"{name}.a", f"{name}.u"], [f"{name}.h"])
        return self.product(f"{name}.down", f"{name}.h", self.hidden, width)

    def experts(self, name: str, x: str, scores: str, count: int, width: int, active: int) -> str:
        """Routed experts with unit weights, as the lowerings write them."""
        gate, up = (self.random(count, width, self.hidden) for _ in range(2))
        down = self.random(count, self.hidden, width)
        common: dict[str, Any] = {
            "k": active,
            "activation_type": "swiglu",
            "swiglu_fusion": 1,
            "activation_alpha": 1.0,
            "activation_beta": 0.0,
        }
        if self.bits is None:
            self.weights[f"{name}.1"], self.weights[f"{name}.2"] = interleave_floats(gate, up), down
            self.weights["k"] = np.array([active])
            self.add("TopK", [scores, "k"], [f"{name}.best", f"{name}.chosen"], axis=-1)
            self.add("Sub", [f"{name}.best", f"{name}.best"], [f"{name}.zeros"])
            inputs = ["floor", f"{name}.chosen", f"{name}.zeros"]
            logits = self.add("ScatterElements", inputs, [f"{name}.logits"], axis=1)
            inputs = [x, logits, f"{name}.1", "", f"{name}.2"]
            y = self.add("MoE", inputs, [f"{name}.raw"], "com.microsoft", normalize_routing_weights=1, **common)
            self.weights["sum"] = np.array(active, np.float32)
            return self.add("Mul", [y, "sum"], [f"{name}.y"])
        one = interleave(*(quantize.quantize(matrix, self.bits, self.method) for matrix in (gate, up)))
        two = quantize.quantize(down, self.bits, self.method)
        zeros = ["", ""]
        for number, value in (("1", one), ("2", two)):
            self.weights[f"{name}.q{number}"] = value.packed.reshape(*value.packed.shape[:2], -1)
            self.weights[f"{name}.s{number}"] = value.scales
            if value.zero_points is not None:
                self.weights[f"{name}.z{number}"] = value.zero_points
                zeros[int(number) - 1] = f"{name}.z{number}"
        inputs = [x, scores, f"{name}.q1", f"{name}.s1", "", f"{name}.q2", f"{name}.s2", *[""] * 4, *zeros, "", "ones"]
        sizes = {"expert_weight_bits": self.bits, "block_size": quantize.BLOCK, "accuracy_level": 4}
        return self.add("QMoE", inputs, [f"{name}.y"], "com.microsoft", normalize_routing_weights=0, **sizes, **common)

    def router(self, name: str, x: str, count: int) -> str:
        both = self.product(f"{name}.router", x, 2 * count, self.hidden, kept=True)
        self.add("Split", [both], [f"{name}.rg", f"{name}.ru"], axis=-1, num_outputs=2)
        self.add("Sigmoid", [f"{name}.rg"], [f"{name}.rs"])
        self.add("Mul", [f"{name}.rg", f"{name}.rs"], [f"{name}.ra"])
        return self.add("Mul", [f"{name}.ra", f"{name}.ru"], [f"{name}.scores"])

    def by_token(self, name: str, count: int, fill: float) -> None:
        self.weights |= {"from": np.array([0]), "to": np.array([1]), f"{name}.count": np.array([count])}
        self.add("Shape", ["x"], [f"{name}.xs"])
        self.add("Slice", [f"{name}.xs", "from", "to"], [f"{name}.t"])
        self.add("Concat", [f"{name}.t", f"{name}.count"], [f"{name}.shape"], axis=0)
        self.add(
            "ConstantOfShape", [f"{name}.shape"], [name], value=numpy_helper.from_array(np.array([fill], np.float32))
        )

    def session(self, block: Any, threads: int) -> onnxruntime.InferenceSession:
        x = "x"
        for layer in range(self.layers):
            y = block(self, f"l{layer}", x)
            domain = "com.microsoft"
            x = self.add("SkipSimplifiedLayerNormalization", [y, x, "norm"], [f"n{layer}"], domain, epsilon=1e-5)
        graph = helper.make_graph(
            self.nodes,
            "chain",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, self.hidden])],
            [helper.make_empty_tensor_value_info(x)],
        )
        opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.add_session_config_entry("session.force_spinning_stop", "1")
        small = {name: array for name, array in self.weights.items() if array.nbytes <= 1024}  # sizes: shape inference
        model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in small.items())
        large = {name: array for name, array in self.weights.items() if name not in small}
        for name, array in large.items():  # as values of their own: a model in one message ends at 2 GiB
            tensor = onnx.TensorProto(name=name, dims=array.shape)
            tensor.data_type = helper.np_dtype_to_tensor_dtype(array.dtype)
            tensor.data_location = TensorProto.EXTERNAL
            tensor.external_data.add(key="location", value="memory")
            model.graph.initializer.append(tensor)
        self.values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in large.items()}
        options.add_external_initializers(list(self.values), list(self.values.values()))
        return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def dense(width: int) -> Any:
    """A dense GLU."""
    return lambda chain, name, x: chain.glu(name, x, width)


def moe(width: int, experts: int, shared: int, active: int) -> Any:
    """``shared`` always-on experts as one GLU, ``active`` of the others by a router."""
    size, routed = width // experts, experts - shared

    def block(chain: Chain, name: str, x: str) -> str:
        y = chain.experts(name, x, chain.router(name, x, routed), routed, size, active)
        return chain.add("Add", [chain.glu(f"{name}.sh", x, shared * size), y], [f"{name}.sum"]) if shared else y

    return block


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--width", type=int, default=8192)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--shared", type=int, default=2, help="always-on experts")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", default="1,8,128,512")
    parser.add_argument("--bits", default="4,8,32")
    parser.add_argument("--method", default="rtn", choices=quantize.METHODS, help="how blocks are quantised")
    parser.add_argument("--skipped", default="0.25,0.5", help="shares of the width that a token skips")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    clock = time.process_time if options.cpu_time else time.perf_counter
    rows = []
    for bits in (int(value) for value in options.bits.split(",")):
        forms = {"dense": dense(options.width)}
        for share in (float(value) for value in options.skipped.split(",")):
            active = round(options.experts * (1 - share)) - options.shared
            forms[f"{share:.0%} skipped"] = moe(options.width, options.experts, options.shared, active)
        chains = {
            name: Chain(options.hidden, options.layers, None if bits == 32 else bits, options.method) for name in forms
        }
        for chain in chains.values():
            chain.by_token("ones", options.experts - options.shared, 1.0)
            chain.by_token("floor", options.experts - options.shared, -1e4)
        sessions = {name: chains[name].session(form, options.threads) for name, form in forms.items()}
        for tokens in (int(value) for value in options.tokens.split(",")):
            x = np.random.default_rng(1).standard_normal((tokens, options.hidden)).astype(np.float32)
            times: dict[str, list[float]] = {name: [] for name in sessions}
            for number in range(options.repeats + 1):
                for name, session in sessions.items():
                    start = clock()
                    session.run(None, {"x": x})
                    if number:
                        times[name].append(1e3 * (clock() - start) / options.layers)
            medians = {name: float(np.median(values)) for name, values in times.items()}
            for name, value in medians.items():
                ideal = 1.0 if name == "dense" else 1 / (1 - float(name.split("%")[0]) / 100)
                gain = medians["dense"] / value
                rows.append(
                    {
                        "bits": bits,
                        "tokens": tokens,
                        "form": name,
                        "ms": value,
                        "speedup": gain,
                        "of ideal": gain / ideal,
                    }
                )
                if not options.json:
                    print(
                        f"{bits:2d} bits  T {tokens:4d}  {name:12s} {value:9.3f} ms  x{gain:.2f}  "
                        f"{gain / ideal:.0%} of ideal",
                        flush=True,
                    )
    if options.json:
        print(json.dumps({"options": vars(options), "onnxruntime": onnxruntime.__version__, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
