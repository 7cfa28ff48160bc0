"""Whole models on ONNX Runtime's quantised kernels: a random Llama, dense and converted, against the ideal ratio.

    python tests/benchmarks/whole_model.py WORK                                   # Llama-3.2-1B, every layer
    python tests/benchmarks/whole_model.py WORK --layers 4 --vocab 4096           # a quarter of it: the same ratios

Random weights and a random linear router; the FFN is cut into equal experts in the order of its neurons. Models go
through ``moedge``'s own export. All bundles take turns in one process. The ideal speed-up of a MoE over its dense
parent at the same bits is the ratio of the stored bytes that one token reads (decode) and of the multiplications that
it needs (prefill); attention over the past is in neither and costs both the same.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np

LAYOUTS = {"dense": None, "moe-25": (2, 4, 8), "moe-50": (2, 2, 8)}
"""Shared, active and all experts: a quarter or half of the FFN is skipped."""


def checkpoint(folder: Path, layout: tuple[int, int, int] | None, options: argparse.Namespace) -> None:
    """Write a random model, converted if ``layout`` says how; equal weights for equal options."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from moedge.convert import adapters, modeling
    from moedge.convert.plan import LayerPlan, MoEPlan, RouterPlan

    torch.manual_seed(0)
    heads = options.hidden // 64
    config = LlamaConfig(
        vocab_size=options.vocab,
        hidden_size=options.hidden,
        intermediate_size=options.width,
        num_hidden_layers=options.layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4),
        head_dim=64,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    if layout is None:
        model.save_pretrained(folder)
        return
    shared, active, experts = layout
    generator = np.random.default_rng(0)
    parts = np.split(np.arange(options.width, dtype=np.int32), experts)
    layers = []
    for _ in range(options.layers):
        weight = generator.standard_normal((experts - shared, options.hidden), dtype=np.float32)
        router = RouterPlan("random", {"weight": weight / np.float32(options.hidden**0.5)}, {"seed": 0})
        layers.append(LayerPlan(np.concatenate(parts[:shared]), parts[shared:], active, router))
    plan = MoEPlan("benchmark", {}, adapters.describe(model), layers)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"<unk>": 0}, unk_token="<unk>")))
    modeling.save(modeling.apply(plan, model), plan, tokenizer, folder)


def costs(manifest: dict[str, Any]) -> tuple[float, float]:
    """(stored bytes read, multiplications) for one token, from a quantised bundle's manifest."""
    read = products = 0.0
    layers = (manifest["moe"] or {"layers": {}})["layers"].values()
    share = [layer["top_k"] / layer["num_experts"] for layer in layers if layer["num_experts"]]
    for entry in manifest["quantization"]["classes"]:
        active = float(np.mean(share)) if entry["tensor_class"] == "experts" else 1.0
        read += active * entry["bytes"]  # the tied embedding is read whole, as the output projection
        if entry["tensor_class"] not in ("norms", "other"):
            products += active * entry["parameters"]
    return read, products


def measure(bundles: dict[str, Path], options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Median milliseconds of a prefill and of a decode step of each bundle, which take turns."""
    from moedge.runtime.engines import open_engine

    clock = time.process_time if options.cpu_time else time.perf_counter
    ids = np.random.default_rng(0).integers(0, options.vocab, (1, options.prompt))
    engines = {label: open_engine(path, threads=options.threads) for label, path in bundles.items()}
    times: dict[str, tuple[list[float], list[float]]] = {label: ([], []) for label in engines}
    for number in range(options.repeats + 1):
        for label, engine in engines.items():
            start = clock()
            step = engine.prefill(ids)
            if number:
                times[label][0].append(1e3 * (clock() - start))
            for _ in range(options.decode):
                start = clock()
                step = engine.decode(ids[:, :1], step.cache)
                if number:
                    times[label][1].append(1e3 * (clock() - start))
    return {
        label: {"ttft_ms": float(np.median(one)), "tpot_ms": float(np.median(two))}
        for label, (one, two) in times.items()
    }


def main() -> None:
    """Make what is missing in the folder, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder for checkpoints and bundles; kept, and used again")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--width", type=int, default=8192)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--vocab", type=int, default=16384)
    parser.add_argument("--bits", default="4,8")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--decode", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cpu-time", action="store_true", help="CPU time, the fair clock of a busy machine (1 thread)")
    parser.add_argument("--export-only", action="store_true")
    parser.add_argument("--json", type=Path, help="also write the whole result here")
    options = parser.parse_args()
    bits = [int(value) for value in options.bits.split(",")]
    bundles: dict[str, Path] = {}
    for name, layout in LAYOUTS.items():
        wanted = {f"{name} int{width}": options.work / name / f"ort-cpu-int{width}" for width in bits}
        bundles |= wanted
        if all(path.is_dir() for path in wanted.values()):
            continue
        from moedge.export.pipeline import export

        source = options.work / f"{name}.checkpoint"
        checkpoint(source, layout, options)
        export(source, options.work / name, [path.name for path in wanted.values()], label=name)
        shutil.rmtree(source)
        shutil.rmtree(options.work / name / "portable")
        print("made", *wanted, flush=True)
    if options.export_only:
        return
    rows = measure(bundles, options)
    cost = {label: costs(json.loads((path / "manifest.json").read_text("utf-8"))) for label, path in bundles.items()}
    print(f"{'model':14s} {'prefill ms':>10s} {'decode ms':>10s} {'speed-up, of ideal: prefill':>28s} {'decode':>16s}")
    for label, row in rows.items():
        dense = f"dense {label.split()[1]}"
        said = []
        for metric, part in (("ttft_ms", 1), ("tpot_ms", 0)):
            gain = rows[dense][metric] / row[metric]
            said.append(f"x{gain:.2f} {gain / (cost[dense][part] / cost[label][part]):6.0%}")
        print(f"{label:14s} {row['ttft_ms']:10.1f} {row['tpot_ms']:10.2f} {said[0]:>28s} {said[1]:>16s}")
    if options.json:
        options.json.write_text(json.dumps({"rows": rows, "costs": cost}, indent=2, allow_nan=False), encoding="utf-8")


if __name__ == "__main__":
    main()
