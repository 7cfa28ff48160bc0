"""``moedge pack``: one file with everything a device needs."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from moedge._files import sha256_file
from moedge._progress import named
from moedge.configs import devices
from moedge.configs.tolerances import given_as
from moedge.export.manifest import ArchiveManifest
from moedge.runtime.commands._options import Batch, ExpertForm, Force, Half, MaxLength, TensorRT, Tolerances
from moedge.runtime.engines.given import existing, local
from moedge.runtime.progress import single


def pack(
    source: Annotated[Path, typer.Argument(help="Checkpoint, or a folder with the bundle portable.")],
    out: Annotated[Path, typer.Argument(help="The archive (.tar).")],
    profile: Annotated[
        str,
        typer.Option(
            "--for", metavar="PROFILE", help="Device profile: a name (`moedge build --list`) or a .yaml file."
        ),
    ],
    label: Annotated[str | None, typer.Option(help="Name of the model in results.")] = None,
    max_length: MaxLength = None,
    max_prompt: Annotated[int | None, typer.Option(min=2, help="Most prompt tokens in one call.")] = None,
    batch: Batch = 1,
    tensorrt: TensorRT = None,
    expert_form: ExpertForm = None,
    half: Half = None,
    tolerances: Tolerances = "float32",
    force: Force = False,
) -> None:
    """Pack one archive for a device: graph, tokenizer, recorded answers, and scripts that build, verify and time there.

    The scripts need numpy and TensorRT's Python package only. The same input gives the same bytes.

    \b
    Example:
      moedge pack build/moe moe-thor.tar --for jetson-agx-thor
    """
    from moedge.export.device import archive as device_archive

    device = devices.load(profile)
    with single("pack", f"{source} -> {out}") as reporter:
        folder = existing(local(source))
        manifest = device_archive.write(
            folder,
            out,
            device,
            label=label or (None if folder == source else str(source)),
            max_length=max_length,
            max_prompt=max_prompt,
            batch=batch,
            tensorrt=tensorrt,
            experts=expert_form,
            dtype=half,
            given=given_as(tolerances),
            force=force,
            progress=named(reporter.progress, reporter.note),
        )
    _print(out, manifest)


def _print(out: Path, manifest: ArchiveManifest) -> None:
    """Say what the archive holds, what to do with it, and how it is timed beside its parent, or what was made of it."""
    from moedge.export.device.archive import folder_name

    name, kind = manifest.device["name"], manifest.kind
    console = Console()
    size = out.stat().st_size / 2**20
    console.print(
        escape(f"{out}: {size:.0f} MiB, {len(manifest.files)} files, sha256 {sha256_file(out)}"), soft_wrap=True
    )
    console.print(escape(f"For TensorRT {manifest.tensorrt}, {manifest.dtype}: {_form(manifest)}"), soft_wrap=True)
    unpack = f"tar xf {shlex.quote(out.name)} && cd {shlex.quote(folder_name(name, kind))}"
    said = f"On the device: {unpack} && python3 build_engine.py && python3 verify.py"
    console.print(escape(said), soft_wrap=True)
    other = folder_name(name, "dense" if kind == "moe" else "moe")
    console.print(escape(_beside(kind, other)), highlight=False, soft_wrap=True)


def _beside(kind: str, folder: str) -> str:
    """How a model and its dense parent are timed together; ``folder`` is what the other archive unpacks to."""
    what, whose, where = "its dense parent", "the parent's", "here"
    if kind == "dense":
        what, whose, where = "a model made of it", "that model's", "there"
    return (
        f"To time it beside {what}: unpack {whose} archive in the same place ({folder}), build its engine, and run "
        f"bench.py {where}."
    )


def _form(manifest: ArchiveManifest) -> str:
    """What kernels the archive's FFNs run in."""
    forms = {"plugins": "plugins", "native": "TensorRT's own MoE layer"}
    if manifest.experts is None:
        return "plugins" if manifest.plugins else "standard operators"
    return f"experts as {forms.get(manifest.experts, 'standard operators')}"
