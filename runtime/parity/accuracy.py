"""The gate on answers: an engine must answer lm-eval's questions as its reference does, and not worse.

Every engine is asked once, in the same order, and pairs of answers are counted (:mod:`moedge.runtime.accuracy.paired`).
Of all tasks together the whole 95 % interval must keep to the limit; where it crosses, that is not decided, and a
note says how many questions would do. A single task fails where its whole interval is beyond the limit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from moedge import MoEdgeError
from moedge._progress import Progress
from moedge.configs import tolerances as tolerance_files
from moedge.configs.tolerances import Profile
from moedge.convert.tasks import Answers, Questions, TaskScore, data_files
from moedge.export import manifest as manifests
from moedge.runtime.accuracy.ask import ask
from moedge.runtime.accuracy.paired import Paired, enough
from moedge.runtime.engines import open_engine
from moedge.runtime.engines.given import local
from moedge.runtime.engines.info import EngineInfo
from moedge.runtime.parity.comparisons import comparisons
from moedge.runtime.parity.results import AccuracyEntry, Compared, PairedTask, Verification
from moedge.runtime.parity.suite import NOTHING, finished, graph_dtype
from moedge.runtime.parity.suite import SCHEMA as SUITE
from moedge.runtime.parity.verdict import Check, Verdict
from moedge.runtime.run import run_folder
from moedge.runtime.run.refs import EngineRef
from moedge.runtime.text.tokenizer import open_tokenizer

SCHEMA: Literal["moedge.accuracy/1"] = "moedge.accuracy/1"


@dataclass(frozen=True)
class Pair:
    """An engine beside its reference."""

    name: str
    reference: Path
    test: Path
    limits: Profile


@dataclass(frozen=True)
class Asked:
    """What one engine answered."""

    info: EngineInfo
    scores: Sequence[TaskScore]


@dataclass(frozen=True)
class Gate:
    """Who is asked what, and judged by which limits."""

    pairs: Sequence[Pair]
    questions: Questions
    limits: tolerance_files.Tolerances

    @classmethod
    def of(
        cls, reference: Path, test: Path | None, questions: Questions, tolerances: str | Path = "float32"
    ) -> Gate | None:
        """Return the gate of what :func:`moedge.runtime.parity.given.verify_given` takes, None where nothing is asked.

        Everything that can be refused is refused here, before an engine is opened.

        Raises:
            MoEdgeError: a task that cannot be had, models that cannot be asked, or limits that do not judge answers.
        """
        if not questions.tasks:
            return None
        if test is not None and test.suffix == ".npz":
            raise MoEdgeError(f"{test} holds what a device said to its prompts, not to tasks; leave --tasks out.")
        given = tolerance_files.given_as(tolerances)
        if test is not None:
            one, two = local(reference), local(test)
            named = [(f"{test} vs {reference}", one, two, getattr(manifests.read(two), "target", "torch"))]
            return cls._over(named, questions, given)
        if run_folder.is_run(reference):
            return cls.of_run(run_folder.engines(reference), questions, given)
        raise MoEdgeError(f"{reference} is not a run folder; give a run folder, or two engines to compare.")

    @classmethod
    def of_run(
        cls, engines: Mapping[EngineRef, Path], questions: Questions, tolerances: str | tolerance_files.Given
    ) -> Gate:
        """Return the gate of a run's engines (:func:`run_folder.engines`), each beside what it is compared with.

        Raises:
            MoEdgeError: as :meth:`of`.
        """
        compared = [one for one in comparisons(engines, None) if one.kind == "parity"]
        named = [(one.name, engines[one.reference], engines[one.test], one.test.target) for one in compared]
        return cls._over(named, questions, tolerances)

    @classmethod
    def _over(
        cls, named: Iterable[tuple[str, Path, Path, str]], questions: Questions, given: str | tolerance_files.Given
    ) -> Gate:
        """Find the questions and the limits of (name, reference, test, target of the test)."""
        profile, limits = tolerance_files.chosen(given)
        data_files(questions)
        named = list(named)
        if not named:
            raise MoEdgeError(NOTHING)
        pairs = [
            Pair(f"{name}, answers", one, two, limits.profile(profile, target, graph_dtype(two)))
            for name, one, two, target in named
        ]
        if dumb := [pair.name for pair in pairs if pair.limits.task_agreement is None]:
            raise MoEdgeError(
                f"The limits for {dumb[0]} name neither task_agreement nor task_accuracy_drop; give both, or leave "
                "--tasks out."
            )
        return cls(pairs, questions, limits)

    def added(
        self,
        result: Verification | None,
        *,
        threads: int | None = None,
        device: str = "cpu",
        progress: Progress | None = None,
        note: Callable[[str], None] | None = None,
    ) -> Verification:
        """Ask every engine once, one after the other; return ``result`` with what that shows and its outcome.

        Args:
            result: what the comparison on text found; None where there was none.
            threads: of the engines on the CPU. device: where PyTorch computes.
            progress: called with (answers weighed, answers in all) of each engine.
            note: called with a sentence about each engine and each finished pair.

        Raises:
            MoEdgeError: lm-eval is not installed, or a task that does not fit its data or has no right answers.
        """
        say, answered = note or (lambda _: None), dict[Path, Asked]()
        for folder in dict.fromkeys(path for pair in self.pairs for path in (pair.reference, pair.test)):
            say(f"{folder}: {', '.join(self.questions.tasks)}")
            with closing(open_engine(folder, threads=threads, pytorch={"device": device})) as engine:
                scores = ask(engine, open_tokenizer(folder), self.questions, progress=progress)
            for score in scores:
                _answers(score)  # before the next engine is asked
            answered[folder] = Asked(engine.info, scores)
        found = [_entry(pair, answered[pair.reference], answered[pair.test], self.questions) for pair in self.pairs]
        for entry in found:
            say(f"{entry['name']}: {entry['verdict']['notes'][0]}")
        before: Compared = {"schema": SUITE, "text": "no text", "identity": [], "parity": []}
        return finished({**(result or before), "accuracy": found}, self.limits)


def texts(result: Verification) -> dict[str, str]:
    """Return on what each comparison of answers was made, by its name."""
    return {
        entry["name"]: f"{entry['overall']['questions']:,} questions of {', '.join(t['task'] for t in entry['tasks'])}"
        for entry in result.get("accuracy", [])
    }


def _entry(pair: Pair, reference: Asked, test: Asked, questions: Questions) -> AccuracyEntry:
    found = {
        one.task: Paired.of(_answers(one), _answers(two))
        for one, two in zip(reference.scores, test.scores, strict=True)
    }
    overall = Paired.over(found.values())
    verdict = judge(found, pair.limits)
    return {
        "schema": SCHEMA,
        "name": pair.name,
        "reference": reference.info.as_json(),
        "test": test.info.as_json(),
        "shots": questions.shots,
        "limit": questions.limit,
        "tasks": [_task(score, found[score.task]) for score in reference.scores],
        "overall": overall.as_json(),
        "tolerances": {name: getattr(pair.limits, name) for name in ("task_agreement", "task_accuracy_drop")},
        "verdict": verdict.as_json([summary(overall), *undecided(overall, pair.limits, reference.scores)]),
    }


def _answers(score: TaskScore) -> Answers:
    if score.answers is None:
        raise MoEdgeError(f"The answers to task {score.task} are not simply right or wrong, so none can be compared.")
    return score.answers


def _task(score: TaskScore, found: Paired) -> PairedTask:
    return {
        **found.as_json(),
        "task": score.task,
        "version": score.version,
        "data": score.data,
        "metric": _answers(score).metric,
        "available": score.available,
    }


def judge(found: Mapping[str, Paired], limits: Profile) -> Verdict:
    """Hold answers by task to limits that judge them: all together both ways, each task where it is surely beyond."""
    agreement, drop = _limits(limits)
    overall = Paired.over(found.values())
    (same, most), (least, worst) = overall.agreement_interval, overall.drop_interval
    together = (
        Check("agreement.low_95", same, ">=", agreement, decided=most < agreement),
        Check("accuracy_drop.high_95", worst, "<=", drop, decided=least > drop),
    )
    single: list[Check] = []
    for task, one in found.items() if len(found) > 1 else ():
        single.append(Check(f"{task}.agreement.high_95", one.agreement_interval[1], ">=", agreement))
        single.append(Check(f"{task}.accuracy_drop.low_95", one.drop_interval[0], "<=", drop))
    return Verdict({"answers": together, **({"tasks": tuple(single)} if single else {})})


def summary(found: Paired) -> str:
    """What was found, in a sentence; all ranges are 95 % intervals."""
    facts = found.as_json()
    (same, most), (least, worst) = facts["agreement_interval"], facts["drop_interval"]
    return (
        f"{facts['agreement']:.1%} of {facts['questions']:,} answers are the same ({same:.1%} to {most:.1%}); accuracy "
        f"{facts['test_accuracy']:.1%} against {facts['reference_accuracy']:.1%}, a drop of {facts['drop']:.2%} "
        f"({least:.2%} to {worst:.2%}; McNemar's p = {facts['mcnemar_p']:.2g})"
    )


def undecided(found: Paired, limits: Profile, scores: Sequence[TaskScore]) -> list[str]:
    """Say of each limit within the interval how many questions would decide, if all shares stayed as they are."""
    agreement, drop = _limits(limits)
    said = []
    for what, limit, (low, high), statistic in (
        ("share of equal answers", agreement, found.agreement_interval, found.agreement_statistic(agreement)),
        ("drop of accuracy", drop, found.drop_interval, found.drop_statistic(drop)),
    ):
        if low <= limit <= high:
            said.append(
                f"The {what} is not decided: {low:.2%} to {high:.2%} holds the limit, {limit:.2%}, after "
                f"{found.questions:,} questions; {_enough_said(enough(found.questions, statistic), scores)}."
            )
    return said


def _enough_said(count: int | None, scores: Sequence[TaskScore]) -> str:
    held = [score.available for score in scores]
    if count is None:
        return "no number of questions decides a figure that lies at its limit"
    if count > sum(held):
        return f"about {count:,} would decide if the shares stay, more than the {sum(held):,} of these tasks: name more"
    limit = next(most for most in range(1, max(held) + 1) if sum(min(most, one) for one in held) >= count)
    return f"about {count:,} would decide if the shares stay: --limit {limit}"


def _limits(limits: Profile) -> tuple[float, float]:
    assert limits.task_agreement is not None
    assert limits.task_accuracy_drop is not None
    return limits.task_agreement, limits.task_accuracy_drop
