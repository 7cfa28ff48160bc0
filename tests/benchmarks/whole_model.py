"""Whole models on ONNX Runtime's quantised kernels: a random Llama, dense and converted, against the ideal ratio.

    python tests/benchmarks/whole_model.py WORK                                   # Llama-3.2-1B, every layer
    python tests/benchmarks/whole_model.py WORK --layers 4 --vocab 4096           # a quarter of it: the same ratios

Random weights and a random linear router; the FFN is cut into equal experts in the order of its neurons. Models go
through ``moedge``'s own export and take turns with whatever else ``--engine`` names (side_by_side.py says how). The
ideal speed-up of a MoE over its dense parent at the same bits is the ratio of the bytes that one token reads (decode:
stored weights, float32 keys and values) and of the multiplications that the prompt needs (prefill: every token of it,
attention included, the head for the last one only).

The dense model for other programs is written by ``--export-only --keep-dense``, to ``WORK/dense.checkpoint``;
to_gguf.py makes llama.cpp's file of it, ``python -m onnxruntime_genai.models.builder`` genai's folder.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import numpy as np
import side_by_side

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
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"<unk>": 0}, unk_token="<unk>")))
    if layout is None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)  # genai's builder wants one
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
    modeling.save(modeling.apply(plan, model), plan, tokenizer, folder)


def costs(folder: Path, prompt: int) -> tuple[float, float]:
    """(multiplications of the prompt, bytes read for one token after it) of a bundle."""
    from moedge.export.needs import of_folder

    needs = of_folder(folder)
    return needs.prompt_products(prompt), needs.decode_bytes(prompt)


def main() -> None:
    """Make what is missing in the folder, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder for checkpoints and bundles; kept, and used again")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--width", type=int, default=8192)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--vocab", type=int, default=16384)
    parser.add_argument("--bits", default="4,8")
    parser.add_argument("--export-only", action="store_true")
    parser.add_argument("--keep-dense", action="store_true", help="leave the dense checkpoint, for other programs")
    side_by_side.add_options(parser)
    options = parser.parse_args()
    bundles = make(options)
    if options.export_only:
        return
    near = sorted(bundles, key=lambda label: label.split()[1])  # a model's turn comes next to its parent's
    engines = [f"{label}=moedge:{bundles[label]}" for label in near] + options.engine
    pairs = [(label, f"dense {label.split()[1]}") for label in bundles if not label.startswith("dense")]
    ids = np.random.default_rng(0).integers(0, options.vocab, options.prompt).tolist()
    result = side_by_side.compare(engines, [*map("/".join, pairs), *options.ratio], ids, options)
    side_by_side.print_tables(result, options)
    cost = {label: costs(path, options.prompt) for label, path in bundles.items()}
    print(
        "\nspeed-up over the dense parent in the same precision, and its share of the ideal one (wall time, cpu time)"
    )
    for label, dense in pairs:
        said = []
        for part, ideal in zip(("prefill", "decode"), np.divide(cost[dense], cost[label]), strict=True):
            gains = [
                result[clock]["rows"][dense][f"{part}_ms"] / result[clock]["rows"][label][f"{part}_ms"]
                for clock in ("wall", "cpu")
            ]
            said.append(
                f"{part} ideal x{ideal:.2f}: " + ", ".join(f"x{gain:.2f} {gain / ideal:4.0%}" for gain in gains)
            )
        print(f"{label:14s} {'; '.join(said)}")


def make(options: argparse.Namespace) -> dict[str, Path]:
    """Label -> bundle; those that the folder lacks are made."""
    bits = [int(value) for value in options.bits.split(",")]
    bundles: dict[str, Path] = {}
    for name, layout in LAYOUTS.items():
        wanted = {f"{name} int{width}": options.work / name / f"ort-cpu-int{width}" for width in bits}
        bundles |= wanted
        source = options.work / f"{name}.checkpoint"
        keep = options.keep_dense and layout is None
        there = all(path.is_dir() for path in wanted.values())
        if not there or (keep and not source.is_dir()):
            checkpoint(source, layout, options)
        if not there:
            from moedge.export.pipeline import export

            export(source, options.work / name, [path.name for path in wanted.values()], label=name)
            shutil.rmtree(options.work / name / "portable")
            print("made", *wanted, flush=True)
        if not keep:
            shutil.rmtree(source, ignore_errors=True)
    return bundles


if __name__ == "__main__":
    main()
