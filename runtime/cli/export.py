"""Checkpoint to ONNX bundle, engine, device archive or stock checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moedge import MoEdgeError
from moedge.export import targets
from moedge.runtime.cli._app import Experts, Force, HalfDtype, Json, TensorRT, Text, command

PANEL = "Export"


@command("export", PANEL)
def export(
    checkpoint: Annotated[
        Path,
        typer.Argument(help="MoE checkpoint from `moedge convert`, or a dense model: folder, .gguf file or hub id."),
    ],
    out: Annotated[Path, typer.Argument(help="Folder for the bundles, one sub-folder per target.")],
    target: Annotated[
        list[str] | None,
        typer.Option(
            "--target",
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
    experts: Experts = None,
    dtype: HalfDtype = None,
    gptq: Annotated[
        str | None,
        typer.Option(help="asset:NAME or a text file: choose the weights of the int4 targets by GPTQ on this text."),
    ] = None,
    gptq_tokens: Annotated[int, typer.Option(min=32, help="Tokens of that text.")] = 4096,
    force: Force = False,
) -> None:
    """Write an ONNX bundle with KV cache for each target.

    \b
    Examples:
      moedge export build/moe build/bundles
      moedge export ./my-llama build/dense --target ort-cpu
      moedge export build/moe build/bundles --target ort-cpu-int4 --gptq my.txt
      moedge export build/moe build/bundles --target tensorrt-rtx --dtype bfloat16
    """
    from moedge.runtime.commands.export import export as body

    body(
        checkpoint,
        out,
        targets=target,
        label=label,
        max_length=max_length,
        tensorrt=tensorrt,
        experts=experts,
        dtype=dtype,
        force=force,
        gptq_text=gptq,
        gptq_tokens=gptq_tokens,
    )


@command("export-hf", PANEL)
def export_hf(
    checkpoint: Annotated[Path, typer.Argument(help="MoE checkpoint from `moedge convert`.")],
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
    from moedge.runtime.commands.export_hf import export_hf as body

    body(checkpoint, out, text=text, tokens=tokens, window=window, dry_run=dry_run, force=force, as_json=as_json)


@command("build", PANEL)
def build(
    bundle: Annotated[
        Path | None, typer.Argument(help="Bundle of target tensorrt-rtx (also -int8, -int4) or tensorrt.")
    ] = None,
    out: Annotated[Path | None, typer.Argument(help="Folder for the engine.")] = None,
    device: Annotated[
        list[str] | None, typer.Option(help="Device profile: a name or a .yaml file (may be repeated).")
    ] = None,
    max_length: Annotated[int | None, typer.Option(min=2, help="Longest sequence; at most 2048 by default.")] = None,
    max_prompt: Annotated[
        int | None, typer.Option(min=2, help="Most prompt tokens in one call; half of --max-length by default.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Most rows of a call.")] = 1,
    taps: Annotated[bool, typer.Option("--taps", help="Also output the selected experts, to verify routing.")] = False,
    timing_cache: Annotated[Path | None, typer.Option(help="TensorRT: timing cache to read and update.")] = None,
    list_devices: Annotated[bool, typer.Option("--list", help="Print the device profiles and exit.")] = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Build a TensorRT engine. For TensorRT for RTX this needs no GPU; TensorRT builds on the device itself.

    \b
    Examples:
      moedge build --list
      moedge export build/moe build/bundles --target tensorrt-rtx
      moedge build build/bundles/tensorrt-rtx build/engine --device rtx-4090 --device rtx-3090
      moedge build build/bundles/tensorrt-rtx-int4 build/engine4 --device rtx-4090
    """
    from moedge.runtime.commands import build as commands

    if list_devices:
        commands.list_devices()
        return
    if bundle is None or out is None or not device:
        raise MoEdgeError("Give a bundle, an output folder and --device NAME; `moedge build --list` shows the names.")
    commands.build(
        bundle,
        out,
        device=device,
        max_length=max_length,
        max_prompt=max_prompt,
        batch=batch,
        taps=taps,
        timing_cache=timing_cache,
        force=force,
        as_json=as_json,
    )


@command("bundle", PANEL)
def bundle(
    source: Annotated[Path, typer.Argument(help="Checkpoint, or a folder with the bundle portable.")],
    out: Annotated[Path, typer.Argument(help="The archive (.tar).")],
    target: Annotated[str, typer.Option(help="Device profile: a name (`moedge build --list`) or a .yaml file.")],
    label: Annotated[str | None, typer.Option(help="Name of the model in results.")] = None,
    max_length: Annotated[int | None, typer.Option(min=2, help="Longest sequence; at most 2048 by default.")] = None,
    max_prompt: Annotated[int | None, typer.Option(min=2, help="Most prompt tokens in one call.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Most rows of a call.")] = 1,
    tensorrt: TensorRT = None,
    experts: Experts = None,
    dtype: HalfDtype = None,
    force: Force = False,
) -> None:
    """Pack one archive for a device: graph, tokenizer, recorded answers, and scripts that build, verify and time there.

    The scripts need numpy and TensorRT's Python package only. The same input gives the same bytes.

    \b
    Example:
      moedge bundle build/moe moe-orin.tar --target jetson-agx-orin
    """
    from moedge.runtime.commands.bundle import bundle as body

    body(
        source,
        out,
        target=target,
        label=label,
        max_length=max_length,
        max_prompt=max_prompt,
        batch=batch,
        tensorrt=tensorrt,
        experts=experts,
        dtype=dtype,
        force=force,
    )
