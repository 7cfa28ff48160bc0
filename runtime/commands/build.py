"""``moedge build``: a TensorRT bundle becomes an engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from moedge import MoEdgeError
from moedge.configs import devices
from moedge.export.manifest import EngineManifest
from moedge.runtime.commands._options import Batch, Force, Json, MaxLength
from moedge.runtime.engines import build as builder
from moedge.runtime.engines.given import existing
from moedge.runtime.progress import single
from moedge.runtime.tables import Sheet


def build(
    bundle: Annotated[
        Path | None, typer.Argument(help="Bundle of target tensorrt-rtx (also -int8, -int4) or tensorrt.")
    ] = None,
    out: Annotated[Path | None, typer.Argument(help="Folder for the engine.")] = None,
    profiles: Annotated[
        list[str] | None,
        typer.Option("--for", metavar="PROFILE", help="Device profile: a name or a .yaml file (may be repeated)."),
    ] = None,
    max_length: MaxLength = None,
    max_prompt: Annotated[
        int | None, typer.Option(min=2, help="Most prompt tokens in one call; half of --max-length by default.")
    ] = None,
    batch: Batch = 1,
    taps: Annotated[bool, typer.Option("--taps", help="Also output the selected experts, to verify routing.")] = False,
    timing_cache: Annotated[Path | None, typer.Option(help="TensorRT: timing cache to read and update.")] = None,
    listing: Annotated[bool, typer.Option("--list", help="Print the device profiles and exit.")] = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Build a TensorRT engine. For TensorRT for RTX this needs no GPU; TensorRT builds on the device itself.

    \b
    Examples:
      moedge build --list
      moedge export build/moe build/bundles --target tensorrt-rtx
      moedge build build/bundles/tensorrt-rtx build/engine --for rtx-4090 --for rtx-3090
      moedge build build/bundles/tensorrt-rtx-int4 build/engine4 --for rtx-4090
    """
    if listing:
        list_devices(as_json=as_json)
        return
    if bundle is None or out is None or not profiles:
        raise MoEdgeError("Give a bundle, an output folder and --for PROFILE; `moedge build --list` shows the names.")
    with single("build", f"{bundle} -> {out} for {', '.join(profiles)}"):
        manifest = builder.build(
            existing(bundle),
            out,
            profiles,
            max_length=max_length,
            max_prompt=max_prompt,
            batch=batch,
            taps=taps,
            timing_cache=timing_cache,
            force=force,
        )
    if as_json:
        print(json.dumps(manifest.document(), indent=2, allow_nan=False))
    else:
        _print(manifest, out)


def _print(manifest: EngineManifest, out: Path) -> None:
    facts, limits = manifest.build, manifest.profiles
    assert facts is not None, "an engine that was just built says how"
    console = Console()
    table = Sheet(show_header=False)
    runtime = next(f"{name} {version}" for name, version in manifest.versions.items() if name != "moedge")
    table.add_row("engine", escape(str(out / builder.PLAN)))
    table.add_row(
        "built by",
        f"{runtime} in {facts.build_s:.1f} s ({facts.build_cpu_s:.1f} s of CPU), {facts.layers} layers"
        + (f", {facts.plugins} of them plugins" if facts.plugins else ""),
    )
    table.add_row("for", ", ".join("SM" + c.replace(".", "") for c in manifest.compute_capabilities))
    table.add_row("size", f"{facts.engine_bytes / 2**20:.0f} MiB (weights {(manifest.weight_bytes or 0) / 2**20:.0f})")
    table.add_row(
        "profiles",
        f"prefill to {limits.max_prompt} tokens, to {limits.max_length} in all, batch {limits.batch}",
    )
    for name, fit in manifest.estimate.items():
        text = f"needs {fit.needed / 2**30:.2f} of {fit.memory / 2**30:.0f} GiB"
        if fit.bound_tokens_per_s is not None:
            text += f"; bandwidth allows {fit.bound_tokens_per_s:.0f} tokens/s at most (not measured)"
        table.add_row(name, text)
    table.add_row("sha256", manifest.files[builder.PLAN].sha256)
    console.print(table)


def list_devices(*, as_json: bool = False) -> None:
    """Print the packaged device profiles."""
    if as_json:
        rows = [devices.load(name).model_dump(mode="json", by_alias=True) for name in devices.names()]
        print(json.dumps(rows, indent=2, allow_nan=False))
        return
    table = Sheet()
    for column in ("device", "", "SM", "memory", "GB/s", "engines"):
        table.add_column(column)
    for name in devices.names():
        d = devices.load(name)
        table.add_row(name, d.label, d.sm, f"{d.memory_gib:g} GiB", f"{d.bandwidth_gb_s:g}", ", ".join(d.targets))
    Console().print(table)
