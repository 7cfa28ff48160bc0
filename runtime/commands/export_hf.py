"""``moedge export-hf``: a converted model as a plain Hugging Face checkpoint."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from moedge import MoEdgeError
from moedge._progress import named
from moedge.runtime.commands._options import Converted, Force, Json, Text
from moedge.runtime.engines.given import existing
from moedge.runtime.progress import single
from moedge.runtime.tables import Sheet
from moedge.runtime.text.windows import token_windows


def export_hf(
    checkpoint: Converted,
    out: Annotated[Path, typer.Argument(help="Folder for the Hugging Face checkpoint.")],
    text: Text = "asset:wiki",
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to measure router scores and logits on.")] = 2048,
    window: Annotated[int, typer.Option(min=2, help="Tokens per window.")] = 128,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Measure and print; write nothing.")] = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write a checkpoint that stock transformers, vLLM and SGLang load, without code of ours.

    Models with a linear router and unit weights become Glm4MoeForCausalLM, pruned models without experts a narrower
    model of their own family. What cannot be represented is refused with the reason.

    \b
    Examples:
      moedge export-hf build/moe build/stock
      moedge export-hf build/moe build/stock --text my.txt --dry-run
    """
    if not (existing(checkpoint) / "plan.json").is_file():
        raise MoEdgeError(f"{checkpoint} is not a checkpoint that `moedge convert` wrote: it has no plan.json.")
    _, windows = token_windows(checkpoint, text, window, -(-tokens // window))
    with single("export-hf", f"{checkpoint} -> {out}") as reporter:
        from moedge.export.stock.glm import export_hf as run

        record = run(
            checkpoint, out, windows, force=force, keep=not dry_run, progress=named(reporter.progress, reporter.note)
        )
    if as_json:
        print(json.dumps(record, indent=2, allow_nan=False))
        return
    console = Console()
    _print(console, record)
    said = (
        "nothing written (--dry-run)" if dry_run else f"{out}: {record['architecture']}, plan {record['plan_sha256']}"
    )
    console.print(escape(said), highlight=False, soft_wrap=True)


def _print(console: Console, record: dict[str, Any]) -> None:
    measured = record["measured"]
    if measured["layers"]:
        table = Sheet(title="router of each layer")
        for name in ("layer", "eps", "std", "bound on |w - 1|", "largest |w - 1|", "ties below", "sets changed"):
            table.add_column(name, justify="right")
        for layer in measured["layers"]:
            table.add_row(
                str(layer["layer"]),
                f"2^{math.frexp(layer['eps'])[1] - 1}",
                f"{layer['std']:.4f}",
                f"{layer['weight_bound']:.2e}",
                f"{layer['max_weight_error']:.2e}",
                f"{layer['resolution']:.2e}",
                str(layer["changed"]),
            )
        console.print(table)
    logits, changed = measured["logits"], measured["changed"]
    console.print(
        f"logits: largest difference {logits['max_difference']:.3g} before any set of the window changes "
        f"({logits['covered']:.1%} of tokens; derived bound {logits['bound']:.3g}, predicted from the weights "
        f"{abs(logits['prediction']):.3g}), {logits['max_difference_all']:.3g} in all; largest logit "
        f"{logits['max_logit']:.3g}",
        highlight=False,
    )
    console.print(
        f"mean KL {logits['mean_kl']:.3g}, best token equal {logits['top1_agreement']:.2%}; expert sets changed: "
        f"{changed['pairs']:.4%} of (token, layer) pairs, {changed['tokens']:.3%} of {measured['tokens']:,} tokens",
        highlight=False,
    )
    if record["zero_share_of_ffn_weights"]:
        console.print(f"padding: {record['zero_share_of_ffn_weights']:.1%} of the FFN weights are zeros")
    for note in record["notes"]:
        console.print(escape(f"note: {note}"), highlight=False)
