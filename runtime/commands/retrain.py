"""``moedge retrain``: DIVE's two stages on the text of a checkpoint's own domains."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from moedge import MoEdgeError
from moedge._files import atomic_dir, spare, write_json
from moedge.configs.errors import checked
from moedge.runtime.commands._options import Force
from moedge.runtime.commands._settings import parse_settings
from moedge.runtime.engines.given import existing
from moedge.runtime.progress import single
from moedge.runtime.run import held_out


def retrain(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint that `moedge convert --method dive` wrote.")],
    out: Annotated[Path, typer.Argument(help="Folder for the retrained checkpoint.")],
    tokens: Annotated[
        int | None, typer.Option(min=1, help="Budget in tokens of both stages together; 100,000 by default.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Another setting, e.g. lr=1e-3 (may be repeated)."),
    ] = None,
    force: Force = False,
) -> None:
    """Retrain a DIVE checkpoint on its domains: the router alone, then router, norms and low-rank expert updates.

    Held-out perplexity of every domain is measured before, between and after, and kept in retrain.json. The same
    command goes on after an interruption.

    \b
    Examples:
      moedge retrain build/dive build/dive-trained --tokens 50000 --set router_lr=1e-3 --set lr=1e-3
    """
    import torch

    from moedge.convert import domains as mining
    from moedge.convert import modeling, offload, sources
    from moedge.convert.train import retrain as training

    wanted = checked(training.RetrainSettings, parse_settings(settings or [], {"tokens": tokens}))
    model, plan, tokenizer = modeling.load(existing(checkpoint))
    held_out.check_window(model, wanted.length, "--set length")
    facts = plan.provenance.get("domains")
    if plan.method != "dive" or not facts:
        raise MoEdgeError(f"{checkpoint} was made by {plan.method}, not by dive; retraining in stages is DIVE's.")
    if wanted.temperature is None and training.folded(plan):
        wanted = wanted.model_copy(update={"temperature": 1.0})  # the routers have the paper's temperature in them
    entries = [
        {"name": fact["name"], "spec": fact["text"], "every": fact["every"], "text_sha256": fact["text_sha256"]}
        for fact in facts
    ]
    # An interrupted run leaves its state beside the output, and goes on from there.
    state = out.with_name(f".{out.name}.training")
    inputs = [checkpoint, *(entry["spec"] for entry in entries)]
    spare(state, inputs)  # it is deleted in the end
    with single("retrain", f"{checkpoint} -> {out}") as reporter:
        train, held = mining.training_windows(
            tokenizer, entries, length=wanted.length, count=-(-wanted.tokens // wanted.length), seed=wanted.seed
        )
        reporter.note(f"{wanted.tokens:,} tokens from {train.size:,} of {len(entries)} domains; state in {state}")
        with atomic_dir(out, force=force, inputs=inputs) as partial:
            result = training.retrain(
                model,
                train,
                wanted,
                held_out=held,
                state=state,
                progress=reporter.progress,
                note=reporter.note,
            )
            offload.cast(model, getattr(torch, sources.own_dtype(checkpoint)))
            updated = result.plan(model, plan, wanted, train)  # of weights as they are saved
            modeling.save(model, updated, tokenizer, partial, force=True)
            write_json(partial / "retrain.json", result.to_json(wanted))
    shutil.rmtree(state, ignore_errors=True)
    said = f"{out}: {result.tokens:,} tokens, plan {updated.sha256}; retrain.json is in it"
    Console().print(escape(said), highlight=False, soft_wrap=True)
