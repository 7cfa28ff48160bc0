"""lm-eval tasks on local data: the tasks' own prompts, targets and metrics, with the data set read from a file.

lm-eval takes its data from a hub. Here each task's own YAML is included by a small one that names a local file
instead, so nothing is fetched but the packaged assets ``task-NAME``, and nothing else of the task changes.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moedge import MoEdgeError
from moedge.convert.errors import errors_alone, first_sentence
from moedge.convert.sources import assets

if TYPE_CHECKING:
    from lm_eval.api.model import LM

KNOWN = {
    "arc_challenge": "arc/arc_challenge.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "boolq": "super_glue/boolq/default.yaml",
    "commonsense_qa": "commonsense_qa/default.yaml",
    "copa": "super_glue/copa/default.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml",
    "piqa": "piqa/piqa.yaml",
    "sciq": "sciq/sciq.yaml",
    "social_iqa": "siqa/siqa.yaml",
    "winogrande": "winogrande/default.yaml",
}
"""Task -> its YAML in ``lm_eval/tasks``. The asset ``task-NAME`` holds the validation split of each."""

_CHANGES = {"boolq": {"doc_to_target": "{{ answer | int }}"}}
"""Columns that the packaged file names differently from the hub's."""
NEEDS = "Tasks need lm-eval ({error}); install moedge[eval]."
_FORMATS = {".arrow": "arrow", ".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


@dataclass(frozen=True)
class Questions:
    """What is asked.

    Raises:
        MoEdgeError: data of a task that is not asked, or a number of questions or shots that cannot be.
    """

    tasks: tuple[str, ...] = ()
    """Names in :data:`KNOWN`, or any lm-eval task that ``data`` has a file for."""
    data: Mapping[str, Path] = field(default_factory=dict)
    """Task -> local file (.arrow, .jsonl, .json, .parquet or .csv) with the columns of the task's data set; it is used
    as the validation split. Few-shot examples come from the same file, never the question itself."""
    shots: int = 0
    """Solved examples in front of a question."""
    limit: int | None = None
    """The first so many questions of each task; all by default."""

    def __post_init__(self) -> None:
        if unused := set(self.data) - set(self.tasks):
            raise MoEdgeError(f"--task-data names {', '.join(sorted(unused))}, which --tasks does not.")
        if self.shots < 0 or (self.limit is not None and self.limit < 1):
            raise MoEdgeError(
                f"{self.shots} shots and a limit of {self.limit} questions: shots are 0 or more, a limit is 1 or more."
            )


@dataclass(frozen=True)
class Answers:
    """What a model answered to each question of a task, in the order of the data."""

    metric: str
    """By which an answer is right: ``acc``, where a task has that."""
    chosen: tuple[int | str, ...]
    """Number of the likeliest choice, or the text that was generated."""
    right: np.ndarray
    """bool [questions]."""
    asked: str
    """Hash of the questions and their prompts: equal where two models were asked the same."""


@dataclass(frozen=True)
class TaskScore:
    """What a model scored in one task."""

    task: str
    version: str
    """Of the task in lm-eval."""
    questions: int
    available: int
    """Questions that the data holds."""
    shots: int
    data: str
    metrics: dict[str, dict[str, float | None]]
    """Name -> ``{"value", "stderr"}``, e.g. ``acc`` and ``acc_norm`` (log-likelihood over bytes)."""
    answers: Answers | None
    """None for a task whose answers are not right or wrong."""

    def as_json(self) -> dict[str, Any]:
        """The row of results: all but the single answers."""
        names = ("task", "version", "questions", "shots", "data", "metrics")
        return {name: getattr(self, name) for name in names}


def run(model: LM, questions: Questions) -> list[TaskScore]:
    """Ask a model of lm-eval's interface, such as :class:`moedge.runtime.accuracy.lm.EngineLM`, every question.

    Returns:
        One score a task, in the order of ``questions.tasks``.

    Raises:
        MoEdgeError: lm-eval is not installed, an unknown task, or a file that is missing or does not fit the task.
    """
    files = data_files(questions)
    os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    try:
        import lm_eval
        from jinja2 import TemplateError
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise MoEdgeError(NEEDS.format(error=error)) from error
    # lm-eval warns that the shots are given, which is what was asked.
    with tempfile.TemporaryDirectory(prefix="moedge-tasks-") as folder, errors_alone("lm_eval"):
        for task, file in files.items():
            _check_rows(task, file, questions.shots)
        specs = [str(_write(task, file, Path(folder))) for task, file in files.items()]
        try:
            found = lm_eval.simple_evaluate(
                model=model,
                tasks=specs,
                num_fewshot=questions.shots,
                limit=questions.limit,
                bootstrap_iters=1000,
                log_samples=True,
                task_manager=TaskManager(include_defaults=False),
                fewshot_random_seed=1234,
            )
        except (LookupError, ValueError, OSError, TypeError, SyntaxError, TemplateError) as error:
            names = ", ".join(f"{task} ({file.name})" for task, file in files.items())
            raise MoEdgeError(
                f"lm-eval cannot run {names}: {first_sentence(error)} Does each file have its task's columns?"
            ) from error
    return [_score(task, file, found) for task, file in files.items()]


def data_files(questions: Questions) -> dict[str, Path]:
    """Return the data of each task; what is packaged is fetched if it is not here yet.

    Raises:
        MoEdgeError: a task without data, or a file that is missing or of another kind.
    """
    return {task: _file(task, questions.data) for task in questions.tasks}


def _file(task: str, data: Mapping[str, Path]) -> Path:
    if task in data:
        path = data[task]
        if not path.is_file() or path.suffix not in _FORMATS:
            raise MoEdgeError(f"The data of task {task}, {path}, must be an existing {', '.join(_FORMATS)} file.")
        return path.resolve()
    if task not in KNOWN:
        raise MoEdgeError(
            f"Task {task!r} has no packaged data; give a file with --task-data {task}=FILE, or choose "
            f"{', '.join(KNOWN)}."
        )
    return assets.fetch(f"task-{task}")


def _check_rows(task: str, file: Path, shots: int) -> None:
    """Read the data as lm-eval will (which finds it in the cache then), and count the questions."""
    import datasets

    level = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it logs what it raises
    try:
        rows = len(datasets.load_dataset(_FORMATS[file.suffix], split="validation", **_kwargs(file)))
    except StopIteration:  # what an empty file ends in
        rows = 0
    except Exception as error:  # of pyarrow, pandas and the reader of each format; its own says only that it failed
        reason = first_sentence(error.__cause__ or error)
        raise MoEdgeError(f"The data of task {task}, {file}, cannot be read: {reason}") from error
    finally:
        datasets.logging.set_verbosity(level)
    if rows <= shots:
        few = f"which is too few for {shots} shots in front of each" if rows else "so there is nothing to ask"
        raise MoEdgeError(f"The data of task {task}, {file}, holds {rows} questions, {few}.")


def _kwargs(file: Path) -> dict[str, Any]:
    return {"data_files": {"validation": str(file)}, "cache_dir": str(assets.cache_dir() / "datasets")}


def _write(task: str, file: Path, folder: Path) -> Path:
    """Write the YAML that includes the task's own and replaces its data."""
    import yaml
    from lm_eval import tasks as package

    if task in KNOWN:
        base = Path(package.__file__).parent / KNOWN[task]
    else:
        entry = package.TaskManager().task_index.get(task)
        if entry is None or entry.yaml_path is None:
            raise MoEdgeError(f"lm-eval has no task {task!r}; `lm-eval ls tasks` lists them.")
        base = Path(entry.yaml_path)
    changes = {} if file.suffix != ".arrow" else _CHANGES.get(task, {})
    config = {
        "include": str(base),
        "task": task,
        "dataset_path": _FORMATS[file.suffix],
        "dataset_name": None,
        "dataset_kwargs": _kwargs(file),
        "training_split": None,
        "validation_split": "validation",
        "test_split": None,
        "fewshot_split": None,
        **changes,
    }
    path = folder / f"{task}.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def _score(task: str, file: Path, found: dict[str, Any]) -> TaskScore:
    values = found["results"][task]
    metrics: dict[str, dict[str, float | None]] = {}
    for key, value in values.items():
        name, comma, _ = key.partition(",")
        if not comma or name.endswith("_stderr"):
            continue
        error = values.get(key.replace(name, f"{name}_stderr", 1))
        metrics[name] = {"value": float(value), "stderr": error if isinstance(error, float) else None}
    return TaskScore(
        task=task,
        version=str(found["versions"][task]),
        questions=int(found["n-samples"][task]["effective"]),
        available=int(found["n-samples"][task]["original"]),
        shots=int(found["n-shot"][task]),
        data=file.name if file.name != "data-00000-of-00001.arrow" else f"asset:task-{task}, validation",
        metrics=metrics,
        answers=_answers(found["samples"][task]),
    )


def _answers(samples: Sequence[dict[str, Any]]) -> Answers | None:
    """Return the answers by the first of a task's filters, or None where they are not simply right or wrong."""
    first = [sample for sample in samples if sample["filter"] == samples[0]["filter"]]
    first.sort(key=lambda sample: sample["doc_id"])
    metric = next((name for name in ("acc", *first[0]["metrics"]) if name in first[0]["metrics"]), None)
    values = [sample[metric] for sample in first] if metric else []
    if not metric or any(isinstance(value, str) or value not in (0, 1) for value in values):
        return None
    asked = hashlib.sha256("".join(sample["doc_hash"] + sample["prompt_hash"] for sample in first).encode())
    chosen = tuple(map(_chosen, first))
    return Answers(metric, chosen, np.array(values, dtype=bool), asked.hexdigest())


def _chosen(sample: dict[str, Any]) -> int | str:
    """Return which choice is the likeliest, whether the one continuation is, or the text that was generated."""
    given = sample["filtered_resps"]
    if not isinstance(given[0], list | tuple):
        return str(given[0])
    if len(given) == 1:
        return int(given[0][1])
    # With this metric the choices are asked a second time, without the question.
    count = len(given) // 2 if "acc_mutual_info" in sample["metrics"] else len(given)
    return int(np.argmax([likelihood for likelihood, _ in given[:count]]))
