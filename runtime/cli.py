"""The ``moedge`` program: a table of its commands, and how their errors reach the user.

A command is a function of its name in a file of its name in :mod:`moedge.runtime.commands`: its signature declares the
options, its docstring is the help, its body does the work. The file is imported when the command is called, so
``moedge --help`` reads this table only.
"""

from __future__ import annotations

import errno
import functools
import importlib
import os
import re
import signal
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import FrameType
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from moedge import MoEdgeError, __version__


@dataclass(frozen=True)
class Command:
    """One line of ``moedge --help``."""

    panel: str
    summary: str
    """The first paragraph of the function's docstring."""
    renamed: Mapping[str, str] = field(default_factory=dict)
    """Former names of options and today's, without dashes; the former ones are accepted until the next release."""
    resumes: bool = False
    """Whether the same command goes on where an interrupted one stopped."""


COMMANDS = {
    "run": Command(
        "Run",
        "Do everything: open, calibrate, convert, export, evaluate, verify, bench, report.",
        {"force": "redo"},
        resumes=True,
    ),
    "generate": Command("Run", "Generate text and print it as it comes.", {"target": "engine"}),
    "inspect": Command("Run", "Print what a run, a plan, a checkpoint or a bundle holds."),
    "doctor": Command(
        "Run", "Say which runtimes, versions and devices are here, and which lowerings are therefore possible."
    ),
    "convert": Command("Convert", "Convert a dense model: leave out small values, or cut its FFNs into experts."),
    "tune": Command(
        "Convert",
        "Find how much of the FFN weights to read for a wanted speed or loss; convert, export, verify and time it.",
        resumes=True,
    ),
    "costs": Command(
        "Convert",
        "Time a model's products on this machine by how many inputs they read: what a gather may save, and where.",
    ),
    "methods": Command(
        "Convert",
        "List the conversion methods: where each comes from, what it needs, its parameters and their defaults.",
    ),
    "domains": Command(
        "Convert",
        "Find out which named texts are so alike that one pruned expert serves them (DIVE's first step).",
    ),
    "retrain": Command(
        "Convert",
        "Retrain a DIVE checkpoint on its domains: the router alone, then router, norms and low-rank expert updates.",
        resumes=True,
    ),
    "finetune": Command(
        "Convert",
        "Train a converted checkpoint to get quality back; the result is a checkpoint again, with its curve.",
        {"batch": "batch-size", "parent": "dense"},
        resumes=True,
    ),
    "export": Command(
        "Export",
        "Write an ONNX bundle with KV cache for each target.",
        {"experts": "expert-form", "dtype": "half"},
    ),
    "export-hf": Command(
        "Export", "Write a checkpoint that stock transformers, vLLM and SGLang load, without code of ours."
    ),
    "estimate": Command(
        "Export",
        "Say whether a model fits on a device and what its bandwidth and arithmetic allow, before anything is built.",
        {"device": "for"},
    ),
    "build": Command(
        "Export",
        "Build a TensorRT engine. For TensorRT for RTX this needs no GPU; TensorRT builds on the device itself.",
        {"device": "for"},
    ),
    "pack": Command(
        "Export",
        "Pack one archive for a device: graph, tokenizer, recorded answers, and scripts that build, verify and time "
        "there.",
        {"target": "for", "experts": "expert-form", "dtype": "half"},
    ),
    "verify": Command(
        "Measure",
        "Compare two engines on real text: logits, KL, top-1 and top-5, expert sets; and the tested one with itself in "
        "batches, with padding, in pieces and twice. Exits with 1 when a check fails.",
    ),
    "bench": Command(
        "Measure",
        "Time engines side by side: time to first token, time per token, memory, load time. Judges them when asked to.",
    ),
    "evaluate": Command(
        "Measure",
        "Measure perplexity on held-out text and accuracy on lm-eval tasks (needs moedge\\[eval]), all from local "
        "data.",
        {"out": "save"},
    ),
    "diagnose": Command(
        "Measure",
        "Show what the routers do: agreement with the best choice, load, dead neurons, errors, partition stability.",
        {"out": "save"},
    ),
    "ablate": Command(
        "Measure",
        "Compare conversion methods, switches of a method, and controls on one held-out protocol; training-free.",
        resumes=True,
    ),
    "frontier": Command(
        "Measure",
        "Compare conversions on several targets: perplexity and KL beside measured speed and size, and who wins.",
        resumes=True,
    ),
    "history": Command(
        "Measure",
        "Show how KL, accuracy and times changed over stored results, and where they stepped.",
    ),
    "device-report": Command(
        "Measure",
        "Print what verify.py and bench.py of a device archive wrote. Exits with 1 when a verification failed.",
    ),
}
"""In the order of ``moedge --help``."""

RENAMED = {"bundle": "pack", "report": "device-report"}
"""Former names of commands and today's; the former ones are accepted until the next release."""

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""

_OUTSIDE = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP),
)
"""Causes of an error that lie with the machine or a given path, not with this program: a sentence, no traceback."""


class _Group(TyperGroup):
    """Lists the table; imports a command's file when the command is called."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        for name, row in COMMANDS.items():
            self.add_command(TyperCommand(name, callback=None, help=row.summary, rich_help_panel=row.panel))

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, _, rest = super().resolve_command(ctx, args)
        return name, name and load(name), rest


def load(name: str) -> TyperCommand:
    """Import a command's file and return the command, with today's names of its options and the former ones."""
    function = name.replace("-", "_")
    body = getattr(importlib.import_module(f"moedge.runtime.commands.{function}"), function)
    single = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)
    settings = {"token_normalize_func": _today("--", COMMANDS[name].renamed)}
    single.command(name, context_settings=settings)(_guarded(body, resumes=COMMANDS[name].resumes))
    command = typer.main.get_command(single)
    assert isinstance(command, TyperCommand)
    return command


def _today(prefix: str, renamed: Mapping[str, str]) -> Callable[[str], str]:
    """Return what gives today's name for a former one, and says so once."""
    said: set[str] = set()

    def normalize(token: str) -> str:
        if (name := renamed.get(token, token)) != token and token not in said:
            said.add(token)
            typer.echo(f"note: {prefix}{token} is now {prefix}{name}; the next release knows that name only.", err=True)
        return name

    return normalize


app = typer.Typer(
    cls=_Group,
    name="moedge",
    help="Make a dense language model read fewer of its weights for a token, by leaving out small values (gather) or "
    "by experts; prove that nothing broke on the way; ship it as ONNX or as a TensorRT engine.",
    epilog="Start with: moedge run smollm2-135m",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"token_normalize_func": _today("moedge ", RENAMED)},
)


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


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"moedge {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def _guarded(function: Callable[..., int | None], *, resumes: bool) -> Callable[..., None]:
    """A :class:`MoEdgeError` becomes one red line, what the function returns becomes the exit code."""

    @functools.wraps(function)
    def guarded(*args: Any, **options: Any) -> None:
        try:
            code = function(*args, **options)
        except MoEdgeError as error:
            _say_error(str(error))
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            more = " Resume with the same command." if resumes else ""
            _say_error(f"Interrupted; nothing half-written is left.{more}")
            raise typer.Exit(INTERRUPTED) from None
        except MemoryError:
            _say_error("Out of memory; close other programs, or lower the batch sizes and windows.")
            raise typer.Exit(MoEdgeError.exit_code) from None
        except Exception as error:
            number = _system_error(error)
            if number not in _OUTSIDE:
                raise
            where = f" ({name})" if (name := getattr(error, "filename", None)) else ""
            said = os.strerror(number)
            _say_error(f"{said}{where}; nothing half-written is left. Make room or choose another folder.")
            raise typer.Exit(MoEdgeError.exit_code) from None
        if code:
            raise typer.Exit(code)

    return guarded


def _system_error(error: Exception) -> int:
    """The system's number of an error, 0 where it has none.

    Libraries in Rust (safetensors) put it into the text; numpy's ``tofile`` says only that the file ended early.
    """
    if isinstance(error, OSError) and error.errno:
        return error.errno
    if isinstance(error, OSError) and re.fullmatch(r"\d+ requested and \d+ written", str(error)):
        return errno.ENOSPC
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else 0


def _say_error(message: str) -> None:
    from rich.console import Console
    from rich.text import Text

    Console(stderr=True, soft_wrap=True).print(Text(f"error: {message}", style="red"))


if __name__ == "__main__":
    main()
