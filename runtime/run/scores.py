"""Scores of models side by side: perplexity on held-out text, answers to lm-eval tasks. Every model is an engine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moedge import MoEdgeError
from moedge._progress import Progress
from moedge.convert.tasks import Questions, TaskScore, data_files
from moedge.export import manifest as manifests
from moedge.runtime.engines import Engine, check_model, open_engine
from moedge.runtime.engines.given import local
from moedge.runtime.engines.protocol import Opening
from moedge.runtime.run import held_out, run_folder
from moedge.runtime.text.tokenizer import Tokenizer, open_tokenizer

if TYPE_CHECKING:
    from moedge.convert.calibration import TextSet
    from moedge.convert.plan import MoEPlan
    from moedge.convert.reads import Reads
    from moedge.runtime.parity.results import PairedFacts

SCHEMA = "moedge.scores/1"


@dataclass(frozen=True)
class Evaluation:
    """What is measured of every model.

    Raises:
        MoEdgeError: windows in which nothing is scored, or a number that is none.
    """

    texts: Sequence[str] = ("asset:wiki",)
    """``asset:NAME`` or files."""
    questions: Questions = field(default_factory=Questions)
    tokens: int = 8192
    """Of each text."""
    window: int = 512
    """Tokens scored together; windows do not overlap."""
    bos: bool | None = None
    """Start each window with the BOS token."""
    holdout_every: int = 10
    """Of a text that a model has seen, the documents with id modulo this = 0 are scored."""
    batch_size: int = 4
    """Windows or questions in a forward pass."""
    device: str = "cpu"
    """Where PyTorch computes."""
    threads: int | None = None
    """On the CPU; physical cores by default."""

    def __post_init__(self) -> None:
        """Refuse what measures nothing."""
        for name, least in (("tokens", 2), ("window", 2), ("holdout_every", 2), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise MoEdgeError(f"{name} is {getattr(self, name)}; it must be {least} or more.")


@dataclass(frozen=True)
class _Model:
    """A model of the table, not open yet."""

    label: str
    folder: Path
    plan: MoEPlan | None
    """Of what was converted, where it is known."""

    @property
    def exported(self) -> bool:
        """Whether it is a bundle or an engine, which a checkpoint was exported to."""
        return manifests.read(self.folder) is not None


def scores(
    paths: Sequence[str | Path],
    evaluation: Evaluation,
    *,
    progress: Progress | None = None,
    note: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Score each model on each text and task; the models are loaded one after the other.

    Args:
        paths: checkpoints, dense models, bundles, engines and run folders.
        evaluation: what is measured.
        progress: called with (windows done, windows in all) of each text, (answers weighed, answers in all) of the
            tasks; ``note`` with what is measured.

    Returns:
        JSON of schema ``moedge.scores/1``: ``protocol``; ``rows``, one a model: ``{"model", "engine", "bos",
        "perplexity": {text: {"ppl", "nll", "tokens", "ffn_read_share"}}, "tasks": [...]}``: whether its windows
        start with the BOS token, nll in nats a token; ``ffn_read_share`` is the share of the dense parent's FFN
        weights that a token reads, None for experts inside experts and for what is no checkpoint; and
        ``paired``, answers of two models to the same questions: ``{"reference", "test", "tasks": {task: ...},
        "overall"}``, each :class:`moedge.runtime.parity.results.PairedFacts`.

    Raises:
        MoEdgeError: a model, text or task that cannot be had, or windows beyond what a model was made for.
    """
    models = _models(paths)
    data_files(evaluation.questions)
    for model in models:  # before minutes of scoring the others
        check_model(model.folder)
    read = _texts(models, evaluation)
    rows, answers = [], dict[str, list[TaskScore]]()
    for model in models:
        opening: Opening = {"threads": evaluation.threads, "pytorch": {"device": evaluation.device}}
        with closing(open_engine(model.folder, **opening)) as engine:
            measure = _Measure(model, engine, open_tokenizer(model.folder), evaluation, progress)
            row: dict[str, Any] = {"model": model.label, "engine": _facts(engine), "bos": measure.bos}
            row |= {"perplexity": {}, "tasks": []}
            for text, _ in read:
                if note:
                    note(f"{model.label}: perplexity on {text.name}")
                row["perplexity"][text.name] = measure.perplexity(text)
            if evaluation.questions.tasks:
                if note:
                    note(f"{model.label}: {', '.join(evaluation.questions.tasks)}")
                answers[model.label] = measure.answers()
                row["tasks"] = [score.as_json() for score in answers[model.label]]
            rows.append(row)
    protocol: dict[str, Any] = {"window": evaluation.window, "bos": evaluation.bos, "device": evaluation.device}
    protocol |= {"documents": {text.name: how for text, how in read}}
    protocol |= {"shots": evaluation.questions.shots, "limit": evaluation.questions.limit}
    return {"schema": SCHEMA, "protocol": protocol, "rows": rows, "paired": list(_paired(models, answers))}


@dataclass(frozen=True)
class _Measure:
    """One open model, and what is measured of it."""

    model: _Model
    engine: Engine
    tokenizer: Tokenizer
    evaluation: Evaluation
    progress: Progress | None

    @property
    def bos(self) -> bool:
        """Whether windows start with the BOS token."""
        from moedge.convert import calibration
        from moedge.runtime.text.windows import as_transformers

        return calibration.starts_with_bos(as_transformers(self.tokenizer), self.evaluation.bos)

    def perplexity(self, text: TextSet) -> dict[str, Any]:
        """Score windows of a text, and count what a checkpoint reads there."""
        from moedge.runtime.accuracy import likelihood
        from moedge.runtime.engines.pytorch import TorchEngine
        from moedge.runtime.text.windows import as_transformers

        asked = self.evaluation
        held_out.check_positions(self.engine.info.model.longest, asked.window, "--window")
        count = -(-asked.tokens // asked.window)
        windows = held_out.windows(
            as_transformers(self.tokenizer), text, asked.window, count, bos=self.bos, name="evaluation"
        )
        how: dict[str, Any] = {"batch_size": asked.batch_size, "progress": self.progress}
        if not isinstance(self.engine, TorchEngine):
            return {**likelihood.perplexity(self.engine, windows, **how), "ffn_read_share": None}
        from moedge.convert import reads, scoring

        with reads.counted(self.engine.module) as counts:
            scored = scoring.perplexity(self.engine.module, windows, **how)
        return {**scored, "ffn_read_share": _read_share(counts, self.model.plan)}

    def answers(self) -> list[TaskScore]:
        """Ask the questions."""
        from moedge.runtime.accuracy.ask import ask

        asked = self.evaluation
        return ask(self.engine, self.tokenizer, asked.questions, batch_size=asked.batch_size, progress=self.progress)


def _facts(engine: Engine) -> dict[str, Any]:
    """What a row was measured on."""
    return {name: value for name, value in engine.info.as_json().items() if name != "model"}


def _read_share(counts: Reads, plan: MoEPlan | None) -> float | None:
    """Return what was counted of a model with this plan, or None for experts inside experts."""
    if plan is None:
        return 1.0
    if any(layer.children is not None for layer in plan.layers):
        return None
    return counts.share(int(plan.model["intermediate_size"]))


def _paired(models: Sequence[_Model], answers: Mapping[str, list[TaskScore]]) -> Iterator[dict[str, Any]]:
    """Compare the answers of each model with the first one's; of a bundle also with the checkpoint before it."""
    from moedge.runtime.accuracy.paired import Paired

    for number, test in enumerate(models if answers else ()):
        before = list(models[:number])
        references = before[:1]
        if test.exported:
            references += [one for one in before[1:] if not one.exported][-1:]
        for reference in references:
            found = {
                one.task: Paired.of(one.answers, two.answers)
                for one, two in zip(answers[reference.label], answers[test.label], strict=True)
                if one.answers is not None and two.answers is not None
            }
            if found:
                tasks: dict[str, PairedFacts] = {task: one.as_json() for task, one in found.items()}
                overall = Paired.over(found.values()).as_json()
                yield {"reference": reference.label, "test": test.label, "tasks": tasks, "overall": overall}


def _models(paths: Sequence[str | Path]) -> list[_Model]:
    """Name and find every model; a run folder stands for its dense parent and its checkpoint."""
    from moedge.convert.plan import MoEPlan

    found: dict[str, Path] = {}
    for given in paths:
        path = Path(given)
        if run_folder.is_run(path):
            found |= {f"{path} dense": run_folder.dense(path), f"{path} moe": run_folder.converted(path)}
        else:
            found[str(given)] = local(path)
    if not found:
        raise MoEdgeError("evaluate needs at least one model.")
    plans = {folder: MoEPlan.load(folder) for folder in found.values() if (folder / "plan.json").is_file()}
    return [_Model(label, folder, plans.get(folder)) for label, folder in found.items()]


def _texts(models: Sequence[_Model], evaluation: Evaluation) -> list[tuple[TextSet, str]]:
    """Return the texts, without the documents that a model of the table has seen, and in words what they are."""
    if not evaluation.texts:
        return []
    plans = [model.plan for model in models if model.plan is not None]
    plans += [plan for model in models if (plan := _plan_of_bundle(model, plans)) is not None]
    found: dict[str, tuple[TextSet, str]] = {}
    for spec in evaluation.texts:
        text, how = held_out.beside(plans, spec, evaluation.holdout_every)
        name = held_out.own_name(text.name, found)
        found[name] = replace(text, name=name), how
    return list(found.values())


def _plan_of_bundle(model: _Model, known: Iterable[MoEPlan]) -> MoEPlan | None:
    """Return the plan that a converted bundle was made by, where it is not among those ``known``; None for others.

    Raises:
        MoEdgeError: it cannot be found, so nobody can tell which documents the model has seen.
    """
    from moedge.convert.plan import MoEPlan

    manifest = manifests.read(model.folder)
    if manifest is None or manifest.kind != "moe":
        return None
    sha256 = manifest.moe.plan_sha256 if manifest.moe else None
    if any(plan.sha256 == sha256 for plan in known):
        return None
    run = model.folder.absolute().parent.parent
    if run_folder.is_run(run) and (run_folder.checkpoint(run) / "plan.json").is_file():
        plan = MoEPlan.load(run_folder.checkpoint(run))
        if plan.sha256 == sha256:
            return plan
    raise MoEdgeError(
        f"{model.label} does not say on which documents its model was calibrated, so a perplexity might be measured on "
        "text that it has seen; name its checkpoint as well, before it."
    )
