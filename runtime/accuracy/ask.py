"""Ask an engine the questions of lm-eval tasks."""

from __future__ import annotations

from moedge import MoEdgeError
from moedge._progress import Progress
from moedge.convert import tasks
from moedge.convert.tasks import Questions, TaskScore
from moedge.runtime.engines import Engine
from moedge.runtime.text.tokenizer import Tokenizer

BATCH_SIZE = 8
"""Questions in a forward pass, where their logits are not too large (:mod:`.likelihood`)."""


def ask(
    engine: Engine,
    tokenizer: Tokenizer,
    questions: Questions,
    *,
    batch_size: int = BATCH_SIZE,
    progress: Progress | None = None,
) -> list[TaskScore]:
    """Return one score a task.

    Args:
        engine: opened without ``last_logits``.
        tokenizer: of the same model.
        questions: what is asked.
        batch_size: questions in a forward pass.
        progress: called with (answers weighed, answers in all).

    Raises:
        MoEdgeError: lm-eval is not installed, or see :func:`moedge.convert.tasks.run`.
    """
    try:
        from moedge.runtime.accuracy.lm import EngineLM
    except ImportError as error:
        raise MoEdgeError(tasks.NEEDS.format(error=error)) from error
    return tasks.run(EngineLM(engine, tokenizer, batch_size=batch_size, progress=progress), questions)
