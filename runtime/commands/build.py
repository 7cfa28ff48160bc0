"""``moedge build``: a TensorRT bundle becomes an engine."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from moedge.configs import devices
from moedge.export.manifest import EngineManifest
from moedge.runtime.engines import build as builder
from moedge.runtime.progress import single
from moedge.runtime.tables import Sheet


def build(
    bundle: Path,
    out: Path,
    *,
    device: list[str],
    max_length: int | None,
    max_prompt: int | None,
    batch: int,
    taps: bool,
    timing_cache: Path | None,
    force: bool,
    as_json: bool,
) -> None:
    """Build, and print what was built."""
    with single("build", f"{bundle} -> {out} for {', '.join(device)}"):
        manifest = builder.build(
            bundle,
            out,
            device,
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
        text = f"needs {fit.needed / 2**30:.2f} of {fit.memory / 2**30:.0f} GiB; bandwidth allows"
        table.add_row(name, f"{text} {fit.bound_tokens_per_s:.0f} tokens/s at most (not measured)")
    table.add_row("sha256", manifest.files[builder.PLAN].sha256)
    console.print(table)


def list_devices() -> None:
    """Print the packaged device profiles."""
    table = Sheet()
    for column in ("device", "", "SM", "memory", "GB/s", "engines"):
        table.add_column(column)
    for name in devices.names():
        d = devices.load(name)
        table.add_row(name, d.label, d.sm, f"{d.memory_gib:g} GiB", f"{d.bandwidth_gb_s:g}", ", ".join(d.targets))
    Console().print(table)
