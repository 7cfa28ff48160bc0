"""Scores of models side by side: perplexity on held-out text, accuracy on lm-eval tasks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from moedge import MoEdgeError
from moedge._progress import Progress
from moedge.runtime.run import held_out, run_folder

SCHEMA = "moedge.scores/1"


def scores(
    paths: Sequence[str | Path],
    *,
    texts: Sequence[str],
    tasks: Sequence[str] = (),
    task_data: Mapping[str, Path] | None = None,
    shots: int = 0,
    limit: int | None = None,
    tokens: int = 8192,
    window: int = 512,
    bos: bool = False,
    every: int = 10,
    batch_size: int = 4,
    device: str = "cpu",
    progress: Progress | None = None,
    note: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Score each model on each text and task; the models are loaded one after the other.

    Args:
        paths: MoE checkpoints, dense models, or run folders, which stand for their dense parent and their checkpoint.
        texts: ``asset:NAME`` or files; of a text that a model has seen the held-out documents are taken.
        tasks: of lm-eval; ``task_data`` is the local data of some of them.
        shots: solved examples in front of a question; ``limit``: only the first so many questions of each task.
        tokens: of each text, in windows of ``window`` tokens, which ``bos`` starts with the BOS token.
        every: of a text that a model has seen, the documents with id modulo this = 0.
        batch_size: windows or questions in a forward pass.
        device: where PyTorch computes.
        progress: called with (windows done, windows in all) of each text; ``note`` with what is measured.

    Returns:
        JSON of schema ``moedge.scores/1``: ``protocol`` and ``rows``, one a model: ``{"model", "perplexity": {text:
        {"ppl", "nll", "tokens", "ffn_read_share"}}, "tasks": [...]}``, nll in nats a token; the last one is the share
        of the dense parent's FFN weights that a token reads, None for experts inside experts.

    Raises:
        MoEdgeError: a model, text or task that cannot be had, or windows beyond what a model was made for.
    """
    models = _models(paths)
    if not models:
        raise MoEdgeError("evaluate needs at least one model.")
    from moedge.convert import reads, scoring
    from moedge.convert.plan import MoEPlan
    from moedge.convert.tasks import run

    data, say = dict(task_data or {}), note or (lambda _: None)
    if unused := set(data) - set(tasks):
        raise MoEdgeError(f"--task-data names {', '.join(sorted(unused))}, which --tasks does not.")
    plans = {label: MoEPlan.load(folder) for label, folder in models.items() if (folder / "plan.json").is_file()}
    chosen = {}
    for spec in texts:
        text, how = held_out.beside(plans.values(), spec, every)
        chosen[text.name] = (text, how)
    rows: list[dict[str, Any]] = []
    count = -(-tokens // window)
    for label, folder in models.items():
        model, tokenizer = _open(folder, converted=label in plans, device=device)
        if chosen:
            held_out.check_window(model, window, "--window")
        row: dict[str, Any] = {"model": label, "perplexity": {}, "tasks": []}
        for name, (text, _) in chosen.items():
            say(f"{label}: perplexity on {name}")
            windows = held_out.windows(tokenizer, text, window, count, bos=bos, name="evaluation")
            with reads.counted(model) as counts:
                found = scoring.perplexity(model, windows, batch_size=batch_size, progress=progress)
            row["perplexity"][name] = {**found, "ffn_read_share": _read_share(counts, plans.get(label))}
        if tasks:
            say(f"{label}: {', '.join(tasks)}")
            row["tasks"] = run(
                model, tokenizer, list(tasks), data=data, shots=shots, limit=limit, batch_size=batch_size
            )
        dtype = str(model.dtype).removeprefix("torch.")
        rows.append(row)
        del model
    protocol = {
        "window": window,
        "bos": bos,
        "dtype": dtype,
        "device": device,
        "documents": {name: how for name, (_, how) in chosen.items()},
        "shots": shots,
        "limit": limit,
    }
    return {"schema": SCHEMA, "protocol": protocol, "rows": rows}


def _read_share(counts: Any, plan: Any) -> float | None:
    """Return what ``reads.counted`` found of a model with this plan; None: it has none, so it is dense."""
    if plan is None:
        return 1.0
    if any(layer.children is not None for layer in plan.layers):
        return None
    return float(counts.share(int(plan.model["intermediate_size"])))


def _open(folder: Path, *, converted: bool, device: str) -> tuple[Any, Any]:
    """A model and its tokenizer."""
    from moedge.convert import modeling, sources

    if converted:
        model, _, tokenizer = modeling.load(folder, device=device)
        return model, tokenizer
    found = sources.resolve(str(folder)).folder
    return sources.load_model(found, device=device), sources.load_tokenizer(found)


def _models(paths: Sequence[str | Path]) -> dict[str, Path]:
    """Label -> folder; a run folder stands for its dense parent and its checkpoint."""
    found: dict[str, Path] = {}
    for given in paths:
        path = Path(given)
        if run_folder.is_run(path):
            found |= {f"{path} dense": run_folder.dense(path), f"{path} moe": run_folder.checkpoint(path)}
        else:
            found[str(given)] = path
    return found
