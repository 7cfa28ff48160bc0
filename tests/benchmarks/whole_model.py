"""Whole models of a large shape: a random Llama, dense, routed, gathered and both, timed by `moedge bench`.

    python tests/benchmarks/whole_model.py WORK                                   # Llama-3.2-1B, every layer
    python tests/benchmarks/whole_model.py WORK --layers 4 --vocab 4096           # a quarter of it: the same ratios
    python tests/benchmarks/whole_model.py WORK --targets ort-cpu-int4 --threads 1,2 --repeats 9

Random weights and a random linear router; the FFN is cut into equal experts in the order of its neurons, and thresholds
leave out what random values make small. So speeds mean something and answers nothing. `moedge bench` says beside each
speed which part of the ideal ratio it is: the bytes that a token reads, and the multiplications of a prompt.

The dense checkpoint stays in ``WORK/dense``: `moedge export --peer genai:int4` makes other programs' files of it, and
`moedge bench --peer` times them.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

LAYOUTS: dict[str, tuple[tuple[int, int, int] | None, float | None]] = {
    "dense": (None, None),
    "moe-25": ((2, 4, 8), None),
    "moe-50": ((2, 2, 8), None),
    "gather-60": (None, 0.6),
    "moe-25-gather-60": ((2, 4, 8), 0.6),
}
"""(Shared, active and all experts: a quarter or half of the FFN is skipped; share that a gather reads on top)."""


def checkpoint(folder: Path, name: str, options: argparse.Namespace) -> None:
    """Write a random model, converted as its layout says; equal weights for equal options."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from moedge.convert import adapters, modeling
    from moedge.convert.methods.gather import GatherParams, on_top
    from moedge.convert.plan import LayerPlan, MoEPlan

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
    words = Tokenizer(WordLevel({f"w{number}": number for number in range(options.vocab)}, unk_token="w0"))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    layout, share = LAYOUTS[name]
    if layout is None and share is None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)  # genai's builder wants one
        return
    every = [LayerPlan(np.arange(options.width, dtype=np.int32), [], 0)] * options.layers
    layers: list[Any] = routed(layout, options) if layout else every
    measured: dict[str, Any] = {}
    if share is not None:
        tokens = np.random.default_rng(1).integers(0, options.vocab, (2, 64))
        made = on_top(layers, tokens, model, GatherParams(share=share, scores="magnitude"))
        layers, measured = made.layers, made.provenance
    plan = MoEPlan("benchmark", {}, adapters.describe(model), layers, measured)
    modeling.save(modeling.apply(plan, model), plan, tokenizer, folder)


def routed(layout: tuple[int, int, int], options: argparse.Namespace) -> list[Any]:
    """Return layers of equal experts and a random router."""
    from moedge.convert.plan import LayerPlan, RouterPlan

    shared, active, experts = layout
    generator = np.random.default_rng(0)
    parts = np.split(np.arange(options.width, dtype=np.int32), experts)
    layers = []
    for _ in range(options.layers):
        weight = generator.standard_normal((experts - shared, options.hidden), dtype=np.float32)
        router = RouterPlan("random", {"weight": weight / np.float32(options.hidden**0.5)}, {"seed": 0})
        layers.append(LayerPlan(np.concatenate(parts[:shared]), parts[shared:], active, router))
    return layers


def main() -> None:
    """Make what is missing in the folder, and time it target by target."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder for checkpoints and bundles; kept, and used again")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--width", type=int, default=8192)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--vocab", type=int, default=16384)
    parser.add_argument("--targets", default="ort-cpu-int4,ort-cpu-int8")
    parser.add_argument("--export-only", action="store_true")
    options, more = parser.parse_known_args()  # the rest goes to `moedge bench`
    targets = options.targets.split(",")
    make(options, targets)
    (options.work / "text.txt").write_text(" ".join(f"w{number % options.vocab}" for number in range(4096)))
    for target in () if options.export_only else targets:
        engines = [f"{name}={options.work / name / 'bundles' / target}" for name in LAYOUTS]
        text = ["--text", str(options.work / "text.txt")]
        subprocess.run([sys.executable, "-m", "moedge", "bench", *engines, *text, *more], check=True)


def make(options: argparse.Namespace, targets: list[str]) -> None:
    """Make the bundles that the folder lacks."""
    from moedge.export.pipeline import export

    for name in LAYOUTS:
        folder = options.work / name
        lacking = [target for target in targets if not (folder / "bundles" / target).is_dir()]
        if not lacking:
            continue
        if not (folder / "checkpoint").is_dir():
            checkpoint(folder / "checkpoint", name, options)
        export(folder / "checkpoint", folder / "bundles", lacking, label=name)
        print("made", *(folder / "bundles" / target for target in lacking), flush=True)


if __name__ == "__main__":
    main()
