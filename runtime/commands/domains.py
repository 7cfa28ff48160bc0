"""``moedge domains``: which named texts are alike, without converting anything."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from moedge._files import atomic_dir, write_json, write_text
from moedge.configs.errors import checked
from moedge.runtime.commands._options import Device, Force, Model
from moedge.runtime.commands._settings import parse_settings
from moedge.runtime.progress import single

HOLDOUT_EVERY = 10
"""One document in so many is held out, as in recipes."""


def domains(
    model: Model,
    out: Annotated[Path, typer.Argument(help="Folder for affinity.json, affinity.html and affinity.png.")],
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A parameter of the method dive (may be repeated)."),
    ] = None,
    device: Device = "cpu",
    force: Force = False,
) -> None:
    """Find out which named texts are so alike that one pruned expert serves them (DIVE's first step).

    \b
    Examples:
      moedge domains asset:smollm2-135m-instruct build/domains
      moedge domains ./my-llama build/domains --set 'domains={"mail": "mail.txt", "code": "code.txt"}' --set experts=2
    """
    from moedge.convert import domains as mining
    from moedge.convert import sources
    from moedge.convert.methods import dive

    params = checked(dive.DiveParams, parse_settings(settings or [], {}))
    found = sources.resolve(model)
    entries = [{"name": name, "spec": spec, "every": HOLDOUT_EVERY} for name, spec in params.domains.items()]
    inputs = (model, *params.domains.values())
    opened = atomic_dir(out, force=force, inputs=inputs)
    with opened as partial, single("domains", f"{found.label} -> {out}") as reporter:
        options = {name: getattr(params, name) for name in ("length", "samples", "score_samples", "seed")}
        texts, facts = mining.read(sources.load_tokenizer(found.folder), entries, bos=None, **options)
        mined, _ = dive.mine(texts, sources.load_model(found.folder, device=device), params, progress=reporter.progress)
        result = {**mined.to_json(), "domains": facts, "model": {"label": found.label, "sha256": found.sha256}}
        write_json(partial / "affinity.json", {**result, "params": params.model_dump()})
        _draw(result, partial, f"Domains of {found.label}")
    for number, group in enumerate(mined.groups, start=1):
        Console().print(escape(f"group {number}: {', '.join(group)}"), highlight=False, soft_wrap=True)


def _draw(affinity: dict[str, Any], folder: Path, title: str) -> None:
    import matplotlib

    from moedge.runtime.report.affinity import draw, page
    from moedge.runtime.report.palette import STYLE

    write_text(folder / "affinity.html", page(affinity, title))
    with matplotlib.rc_context(STYLE):
        draw(affinity).savefig(folder / "affinity.png", dpi=150)
