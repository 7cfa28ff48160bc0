"""``moedge export``: a checkpoint becomes ONNX bundles."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from moedge import MoEdgeError
from moedge._files import spare
from moedge._progress import named
from moedge.export import manifest as manifests
from moedge.export import targets
from moedge.export.manifest import Manifest
from moedge.export.ort_ops import library
from moedge.runtime.commands import _peers
from moedge.runtime.commands._options import ExpertForm, Force, Half, TensorRT
from moedge.runtime.engines.given import local
from moedge.runtime.progress import single
from moedge.runtime.report.sizes import size_table
from moedge.runtime.run import exporting
from moedge.runtime.text.windows import token_windows

GPTQ_TOKENS = 4096


def export(
    checkpoint: Annotated[
        Path,
        typer.Argument(help="MoE checkpoint from `moedge convert`, or a dense model: folder, .gguf file or hub id."),
    ],
    out: Annotated[Path, typer.Argument(help="Folder for the bundles, one sub-folder per target.")],
    target: Annotated[
        list[str] | None,
        typer.Option(
            help=f"{', '.join(targets.names())} (may be repeated); by default {' and '.join(targets.default())}.",
        ),
    ] = None,
    label: Annotated[
        str | None, typer.Option(help="Name of the model in reports; the folder's name by default.")
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(min=16, help="Longest prompt + answer in tokens; the model's own limit by default.")
    ] = None,
    tensorrt: TensorRT = None,
    expert_form: ExpertForm = None,
    half: Half = None,
    gptq: Annotated[
        str | None,
        typer.Option(help="asset:NAME or a text file: choose the weights of the int4 targets by GPTQ on this text."),
    ] = None,
    gptq_tokens: Annotated[
        int | None, typer.Option(min=32, help=f"Tokens of that text; {GPTQ_TOKENS} by default.")
    ] = None,
    zero_points: Annotated[
        bool,
        typer.Option("--zero-points", help="Fit the levels of ort-cpu-int4 to the range of each block (2.5 % larger)."),
    ] = False,
    stock_operators: Annotated[
        bool,
        typer.Option("--stock-operators", help="ort-cpu: ONNX Runtime's own operators alone, for other programs."),
    ] = False,
    peer: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PEER[:PRECISION]",
            help="Instead of bundles: what another program opens of a dense model, for `moedge bench --peer` "
            f"({_peers.MADE}; may be repeated).",
        ),
    ] = None,
    force: Force = False,
) -> None:
    """Write an ONNX bundle with KV cache for each target.

    All targets are written or none. What OUT holds of the same graph stays; --force drops other bundles, never files.

    \b
    Examples:
      moedge export build/moe build/bundles
      moedge export ./my-llama build/dense --target ort-cpu
      moedge export build/moe build/bundles --target ort-cpu-int4 --gptq my.txt
      moedge export build/moe build/bundles --target tensorrt-rtx --half bfloat16
      moedge export ./my-llama build/peers --peer genai --peer llama.cpp:Q8_0
    """
    if peer:
        _peers.alone(
            target=target,
            gptq=gptq,
            gptq_tokens=gptq_tokens,
            max_length=max_length,
            label=label,
            half=half,
            tensorrt=tensorrt,
            expert_form=expert_form,
            zero_points=zero_points,
            stock_operators=stock_operators,
        )
        dense = local(checkpoint)
        exporting.check_checkpoint(dense, None, "--max-length")
        _peers.export(peer, dense, out, force=force)
        return
    asked = exporting.Asked(tensorrt, expert_form, half, gptq is not None, zero_points, stock_operators)
    wanted = exporting.check(target, asked, asked.in_command())
    if zero_points and gptq is not None:
        raise MoEdgeError("--gptq has no zero points; give either --gptq TEXT or --zero-points.")
    if gptq is None and gptq_tokens is not None:
        raise MoEdgeError("--gptq-tokens counts the tokens of a text; name it with --gptq TEXT.")
    folder = local(checkpoint)
    exporting.check_checkpoint(folder, max_length, "--max-length")
    name = label or exporting.label(checkpoint, folder)
    _export(folder, out, wanted, asked, name, max_length, (gptq, gptq_tokens or GPTQ_TOKENS), force=force)


def _export(
    checkpoint: Path,
    out: Path,
    wanted: list[str],
    asked: exporting.Asked,
    label: str,
    max_length: int | None,
    gptq: tuple[str | None, int],
    *,
    force: bool,
) -> None:
    """Write the bundles; ``gptq`` is a text and how many of its tokens are read."""
    from moedge.export.pipeline import export as run

    text, tokens = gptq
    calibration = None
    if text is not None:
        spare(out, [text])
        window = min(256, tokens)
        calibration = token_windows(checkpoint, text, window, -(-tokens // window))[1]
    with single("export", f"{checkpoint} -> {out}") as reporter:
        run(
            checkpoint,
            out,
            wanted,
            label=label,
            max_length=max_length,
            tensorrt=asked.tensorrt,
            experts=asked.expert_form,
            dtype=asked.half,
            force=force,
            progress=named(reporter.progress, reporter.note),
            calibration=calibration,
            zero_points=asked.zero_points,
            stock_operators=asked.stock_operators,
        )
    _print(out)


def _print(out: Path) -> None:
    """Say which bundles ``out`` holds, what quantised ones weigh, and which lack our operators for want of g++."""
    for folder in sorted(path.parent for path in out.glob("*/manifest.json")):
        console = Console()
        console.print(escape(f"{folder.name}: {folder}"), highlight=False, soft_wrap=True)
        facts = manifests.read(folder)
        if not isinstance(facts, Manifest):
            continue
        if facts.quantization:
            console.print(size_table(facts.quantization))
        if lacking := next((entry.reason for entry in facts.lowering if library.NAME in entry.reason), None):
            said = f"{folder.name} has none of MoEdge's operators: a gather skips no weights, experts are slower."
            console.print(escape(f"{said} {lacking}"), highlight=False, soft_wrap=True)
