"""Scores of models side by side: perplexity on held-out text, accuracy on lm-eval tasks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moedge import MoEdgeError
from moedge._progress import Progress
from moedge.runtime.run import held_out, run_folder

if TYPE_CHECKING:
    from moedge.convert.calibration import TextSet
    from moedge.convert.plan import MoEPlan
    from moedge.convert.reads import Reads

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
        paths: and all that is not named here: see :func:`moedge.runtime.measures.evaluate`.
        every: of a text that a model has seen, the documents with id modulo this = 0.
        progress: called with (windows done, windows in all) of each text; ``note`` with what is measured.

    Returns:
        JSON of schema ``moedge.scores/1``: ``protocol`` and ``rows``, one a model: ``{"model", "perplexity": {text:
        {"ppl", "nll", "tokens", "ffn_read_share"}}, "tasks": [...]}``, nll in nats a token; the last one is the share
        of the dense parent's FFN weights that a token reads, None for experts inside experts.

    Raises:
        MoEdgeError: a model, text or task that cannot be had, or windows beyond what a model was made for.
    """
    models = _models(paths)
    from moedge.convert.plan import MoEPlan

    if unused := set(task_data or {}) - set(tasks):
        raise MoEdgeError(f"--task-data names {', '.join(sorted(unused))}, which --tasks does not.")
    plans = {label: MoEPlan.load(folder) for label, folder in models.items() if (folder / "plan.json").is_file()}
    read = [held_out.beside(plans.values(), spec, every) for spec in texts]
    measure = _Measure(
        texts=list({text.name: text for text, _ in read}.values()),
        tasks=list(tasks),
        task_data=dict(task_data or {}),
        shots=shots,
        limit=limit,
        windows=-(-tokens // window),
        window=window,
        bos=bos,
        batch_size=batch_size,
        progress=progress,
        note=note or (lambda _: None),
    )
    rows = []
    for label, folder in models.items():
        model, tokenizer = _open(folder, converted=label in plans, device=device)
        rows.append(measure.row(label, model, tokenizer, plans.get(label)))
        dtype = str(model.dtype).removeprefix("torch.")
        del model
    protocol = {"window": window, "bos": bos, "dtype": dtype, "device": device}
    protocol |= {"documents": {text.name: how for text, how in read}, "shots": shots, "limit": limit}
    return {"schema": SCHEMA, "protocol": protocol, "rows": rows}


@dataclass(frozen=True)
class _Measure:
    """What is measured of every model; see :func:`scores`."""

    texts: list[TextSet]
    tasks: list[str]
    task_data: dict[str, Path]
    shots: int
    limit: int | None
    windows: int
    window: int
    bos: bool
    batch_size: int
    progress: Progress | None
    note: Callable[[str], None]

    def row(self, label: str, model: Any, tokenizer: Any, plan: MoEPlan | None) -> dict[str, Any]:
        """Score one model; without a plan it is dense."""
        from moedge.convert import reads, scoring, tasks

        found: dict[str, Any] = {"model": label, "perplexity": {}, "tasks": []}
        if self.texts:
            held_out.check_window(model, self.window, "--window")
        for text in self.texts:
            self.note(f"{label}: perplexity on {text.name}")
            windows = held_out.windows(tokenizer, text, self.window, self.windows, bos=self.bos, name="evaluation")
            with reads.counted(model) as counts:
                scored = scoring.perplexity(model, windows, batch_size=self.batch_size, progress=self.progress)
            found["perplexity"][text.name] = {**scored, "ffn_read_share": _read_share(counts, plan)}
        if self.tasks:
            self.note(f"{label}: {', '.join(self.tasks)}")
            found["tasks"] = tasks.run(
                model,
                tokenizer,
                self.tasks,
                data=self.task_data,
                shots=self.shots,
                limit=self.limit,
                batch_size=self.batch_size,
            )
        return found


def _read_share(counts: Reads, plan: MoEPlan | None) -> float | None:
    """Return what was counted of a model with this plan, or None for experts inside experts."""
    if plan is None:
        return 1.0
    if any(layer.children is not None for layer in plan.layers):
        return None
    return counts.share(int(plan.model["intermediate_size"]))


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
    if not found:
        raise MoEdgeError("evaluate needs at least one model.")
    return found
