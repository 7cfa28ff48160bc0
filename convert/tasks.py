"""lm-eval tasks on local data: the tasks' own prompts, targets and metrics, with the data set read from a file.

lm-eval takes its data from a hub. Here each task's own YAML is included by a small one that names a local file
instead, so nothing is fetched but the packaged assets ``task-NAME``, and nothing else of the task changes.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moedge import MoEdgeError
from moedge.convert.sources import assets

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

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
_FORMATS = {".arrow": "arrow", ".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


def run(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    data: Mapping[str, Path] | None = None,
    shots: int = 0,
    limit: int | None = None,
    batch_size: int = 8,
) -> list[dict[str, Any]]:
    """Score a model, dense or converted, on lm-eval tasks.

    Args:
        tasks: names in :data:`KNOWN`, or any lm-eval task that ``data`` has a file for.
        data: task -> local file (.arrow, .jsonl, .json, .parquet or .csv) with the columns of the task's data set; it
            is used as the validation split. Few-shot examples come from the same file, never the question itself.
        limit: the first so many questions of each task; all by default.

    Returns:
        One row a task: ``task``, ``version`` (of the task in lm-eval), ``questions``, ``shots``, ``data``, and
        ``metrics``: name -> ``{"value", "stderr"}``, e.g. ``acc`` and ``acc_norm`` (log-likelihood over bytes).

    Raises:
        MoEdgeError: lm-eval is not installed, an unknown task, or a file that is missing or does not fit the task.
    """
    files = {task: _file(task, data or {}) for task in tasks}
    os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise MoEdgeError(f"Tasks need lm-eval ({error}); install moedge[eval].") from error
    with tempfile.TemporaryDirectory(prefix="moedge-tasks-") as folder:
        specs = [str(_write(task, file, Path(folder))) for task, file in files.items()]
        try:
            found = lm_eval.simple_evaluate(
                model=HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size),
                tasks=specs,
                num_fewshot=shots,
                limit=limit,
                bootstrap_iters=1000,
                log_samples=False,
                task_manager=TaskManager(include_defaults=False),
                fewshot_random_seed=1234,
            )
        except (KeyError, ValueError, OSError) as error:
            names = ", ".join(f"{task} ({file.name})" for task, file in files.items())
            raise MoEdgeError(
                f"lm-eval cannot run {names}: {error}. Does each file have its task's columns?"
            ) from error
    return [_row(task, file, found) for task, file in files.items()]


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
        "dataset_kwargs": {
            "data_files": {"validation": str(file)},
            "cache_dir": str(assets.cache_dir() / "datasets"),
        },
        "training_split": None,
        "validation_split": "validation",
        "test_split": None,
        "fewshot_split": None,
        **changes,
    }
    path = folder / f"{task}.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def _row(task: str, file: Path, found: dict[str, Any]) -> dict[str, Any]:
    values = found["results"][task]
    metrics: dict[str, dict[str, float | None]] = {}
    for key, value in values.items():
        name, comma, _ = key.partition(",")
        if not comma or name.endswith("_stderr"):
            continue
        error = values.get(key.replace(name, f"{name}_stderr", 1))
        metrics[name] = {"value": float(value), "stderr": error if isinstance(error, float) else None}
    return {
        "task": task,
        "version": str(found["versions"][task]),
        "questions": int(found["n-samples"][task]["effective"]),
        "shots": int(found["n-shot"][task]),
        "data": file.name if file.name != "data-00000-of-00001.arrow" else f"asset:task-{task}, validation",
        "metrics": metrics,
    }
