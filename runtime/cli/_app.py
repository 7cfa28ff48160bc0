"""The typer application: options that commands share, and how an error of a command reaches the user."""

from __future__ import annotations

import errno
import functools
import os
import re
from collections.abc import Callable
from typing import Annotated, Any

import typer

from moedge import MoEdgeError, __version__

app = typer.Typer(
    name="moedge",
    help="Turn a dense GLU language model into a Mixture-of-Experts, prove that nothing broke, ship it as ONNX.",
    epilog="Start with: moedge run smollm2-135m",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)

_OUTSIDE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS)
"""Causes of an error that lie with the machine, not with this program: they get a sentence, not a traceback."""

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""

TensorRT = Annotated[
    str | None,
    typer.Option(
        "--tensorrt",
        metavar="VERSION",
        help="TensorRT on the device, such as 10.13, where it is not its profile's: from 10.9 on experts are plugins.",
    ),
]
Experts = Annotated[
    str | None,
    typer.Option(
        metavar="FORM",
        help="Target tensorrt: plugins, merged (standard operators) or native (TensorRT's own MoE layer: SM100, 103 or "
        "110, TensorRT 11); by default what the device's TensorRT can. Target tensorrt-rtx: merged, or plugins "
        "(from a library that `moedge build` compiles with g++).",
    ),
]
HalfDtype = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        help="Targets tensorrt and tensorrt-rtx: float16 (default), or bfloat16 for models whose activations leave "
        "float16's range, such as Gemma.",
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Replace the output if it exists.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; all physical cores by default.")]
Device = Annotated[
    str, typer.Option(help="Where PyTorch computes: cpu, cuda or cuda:N. Bundles run where their target says.")
]
Dtype = Annotated[str, typer.Option(help="Of checkpoints in PyTorch: float32, bfloat16 or float16.")]
Json = Annotated[bool, typer.Option("--json", help="Print the whole result as JSON on stdout.")]
Text = Annotated[str, typer.Option(help="asset:NAME or a path to a .txt, .utf8 or .jsonl file (UTF-8).")]


def command(name: str, panel: str) -> Callable[[Callable[..., int | None]], Callable[..., None]]:
    """Register a command under a heading of ``--help``; a :class:`MoEdgeError` becomes one red line, what the function
    returns becomes the exit code.
    """

    def register(function: Callable[..., int | None]) -> Callable[..., None]:
        @functools.wraps(function)
        def guarded(*args: Any, **options: Any) -> None:
            try:
                code = function(*args, **options)
            except MoEdgeError as error:
                _say_error(str(error))
                raise typer.Exit(error.exit_code) from None
            except KeyboardInterrupt:
                _say_error("Interrupted; nothing half-written is left. Resume with the same command.")
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

        app.command(name, rich_help_panel=panel)(guarded)
        return guarded

    return register


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
