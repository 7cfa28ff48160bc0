"""What every loader does with the libraries underneath: their bars and notes off, their errors one sentence."""

from __future__ import annotations

import logging as standard
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from moedge import MoEdgeError


@contextmanager
def quiet() -> Iterator[None]:
    """Switch transformers' and accelerate's own progress bars and warnings off.

    The caller shows progress and checks what it loads.
    """
    from transformers.utils import logging

    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity(max(level, logging.ERROR))
    try:
        with errors_alone("accelerate"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()


@contextmanager
def errors_alone(library: str) -> Iterator[None]:
    """Let a library's logger pass errors on, and nothing below."""
    logger = standard.getLogger(library)
    level = logger.level
    logger.setLevel(standard.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def translated(task: str, advice: str = "") -> Iterator[None]:
    """Turn whatever a library raises in the block into one sentence.

    For blocks that only call libraries on a user's files. They raise almost anything on a damaged one: tokenizers a
    bare ``Exception`` or a Rust panic, huggingface_hub's strict configs their own classes, transformers ``KeyError``,
    ``TypeError``, ``ImportError``, ``RuntimeError``.

    Args:
        task: start of the sentence, with the file's or folder's path: ``Cannot load the model in FOLDER``.
        advice: a second sentence, what to do.

    Raises:
        MoEdgeError: ``TASK: what the library said. ADVICE``; our own classes, which a library calls, know no path and
            bring their advice with them.
    """
    try:
        yield
    except MoEdgeError as error:
        raise MoEdgeError(f"{task}: {error}") from error
    except BaseException as error:
        # Rust's panics are no Exception; KeyboardInterrupt, SystemExit and GeneratorExit are none of ours.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise MoEdgeError(f"{task}: {first_sentence(error)} {advice}".rstrip()) from error


def first_sentence(error: BaseException) -> str:
    """Return what an error says first, ended by a full stop."""
    lines = [line for line in (line.strip() for line in str(error).splitlines()) if line]
    text = lines[0] if lines else type(error).__name__
    if isinstance(error, KeyError):
        text = f"{text} is missing"
    elif text.startswith("Couldn't instantiate the backend tokenizer"):
        text = "no file there makes a tokenizer"  # the other lines list which files could
    elif text.endswith(":") and len(lines) > 1:  # strict configs: the field, and below it what is wrong
        text = f"{text} {lines[1]}"
    elif type(error) in (TypeError, AttributeError, IndexError, RuntimeError, ValueError) and " " not in text:
        text = f"{type(error).__name__}: {text}"
    return text if text.endswith((".", "!", "?")) else f"{text}."
