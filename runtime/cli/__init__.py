"""The ``moedge`` command. Each command imports its stage when called, so ``--help`` is quick and needs no torch.

One file per heading of ``moedge --help`` declares the options; :mod:`moedge.runtime.commands` holds what they do.
"""

from __future__ import annotations

import signal
import sys
from types import FrameType

# Importing a file registers its commands, in this order.
from moedge.runtime.cli import use  # noqa: F401  # isort: skip
from moedge.runtime.cli import convert, export, measure  # noqa: F401
from moedge.runtime.cli._app import INTERRUPTED, app

__all__ = ["INTERRUPTED", "app", "main"]


def main() -> None:
    """Entry point of the console script."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a model's text must never crash a terminal that is not UTF-8
            stream.reconfigure(errors="replace")
    signal.signal(signal.SIGTERM, _terminated)
    app()


def _terminated(number: int, _: FrameType | None) -> None:
    """End by unwinding, as Ctrl-C does, so that a stopped container or CI job leaves no partial folder either."""
    raise SystemExit(128 + number)
