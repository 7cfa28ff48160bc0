"""``moedge bundle``: one file with everything a device needs."""

from __future__ import annotations

import shlex
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from moedge._files import sha256_file
from moedge.configs import devices
from moedge.runtime.commands import models
from moedge.runtime.progress import single


def bundle(
    source: Path,
    out: Path,
    *,
    target: str,
    label: str | None,
    max_length: int | None,
    max_prompt: int | None,
    batch: int,
    tensorrt: str | None,
    experts: str | None,
    dtype: str | None,
    force: bool,
) -> None:
    """Write the archive and say what to do with it."""
    from moedge.export.device import archive as device_archive

    device = devices.load(target)
    with single("bundle", f"{source} -> {out}") as reporter:

        def step(what: str, done: int, total: int) -> None:
            reporter.progress(done, total)
            if done < total:
                reporter.note(what)

        folder = models.local(source)
        manifest = device_archive.write(
            folder,
            out,
            device,
            label=label or (None if folder == source else str(source)),
            max_length=max_length,
            max_prompt=max_prompt,
            batch=batch,
            tensorrt=tensorrt,
            experts=experts,
            dtype=dtype,
            force=force,
            progress=step,
        )
    console = Console()
    size = out.stat().st_size / 2**20
    console.print(
        escape(f"{out}: {size:.0f} MiB, {len(manifest['files'])} files, sha256 {sha256_file(out)}"), soft_wrap=True
    )
    forms = {"plugins": "plugins", "native": "TensorRT's own MoE layer"}
    form = forms.get(manifest["experts"], "standard operators")
    made = f"For TensorRT {manifest['tensorrt']}, {manifest['dtype']}: experts as {form}"
    console.print(escape(made), soft_wrap=True)
    unpack = f"tar xf {shlex.quote(out.name)} && cd moedge-{device.name}"
    said = f"On the device: {unpack} && python3 build_engine.py && python3 verify.py"
    console.print(escape(said), soft_wrap=True)
