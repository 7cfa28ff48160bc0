"""Arguments and options that several commands take: a word is declared once, with one type and one meaning."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

Model = Annotated[str, typer.Argument(help="Hugging Face folder, .gguf file, hub id org/name, or asset:NAME.")]
Converted = Annotated[Path, typer.Argument(help="MoE checkpoint from `moedge convert`.")]
TensorRT = Annotated[
    str | None,
    typer.Option(
        "--tensorrt",
        metavar="VERSION",
        help="TensorRT on the device, such as 10.13, where it is not its profile's: from 10.9 on experts and gathered "
        "FFNs are plugins.",
    ),
]
ExpertForm = Annotated[
    str | None,
    typer.Option(
        metavar="FORM",
        help="Of experts and gathered FFNs. Target tensorrt: plugins, merged (standard operators) or native "
        "(TensorRT's own MoE layer: SM100, 103 or 110, TensorRT 11); by default what the device's TensorRT can. "
        "Target tensorrt-rtx: merged, or plugins (from a library that `moedge build` compiles with g++).",
    ),
]
Half = Annotated[
    str | None,
    typer.Option(
        metavar="TYPE",
        help="Targets tensorrt and tensorrt-rtx: float16 (default), or bfloat16 for models whose activations leave "
        "float16's range, such as Gemma.",
    ),
]
MaxLength = Annotated[int | None, typer.Option(min=2, help="Longest sequence; at most 2048 by default.")]
Batch = Annotated[int, typer.Option(min=1, help="Most rows of a call; an engine is tuned for that many.")]
Force = Annotated[bool, typer.Option("--force", help="Replace the output if it exists.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; all physical cores by default.")]
Device = Annotated[
    str, typer.Option(help="Where PyTorch computes: cpu, cuda or cuda:N. Bundles run where their target says.")
]
Dtype = Annotated[str, typer.Option(help="Of checkpoints in PyTorch: float32, bfloat16 or float16.")]
Json = Annotated[bool, typer.Option("--json", help="Print the whole result as JSON on stdout.")]
Save = Annotated[Path | None, typer.Option(metavar="FILE", help="Also write the whole result to this JSON file.")]
Text = Annotated[str, typer.Option(help="asset:NAME or a text file in UTF-8: .jsonl, or a document a line.")]
HoldoutEvery = Annotated[
    int, typer.Option(min=2, help="Of the calibration text only every Nth document is used, the held-out ones.")
]
Tolerances = Annotated[
    str, typer.Option(metavar="FILE", help="YAML file of limits that take the place of the packaged ones.")
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="A parameter of the method (may be repeated)."),
]


@dataclass(frozen=True)
class Numbers:
    """What an option of several whole numbers holds; written ``1,2,4``."""

    values: tuple[int, ...]

    def __str__(self) -> str:
        """As it is written on the command line."""
        return ",".join(map(str, self.values))


def numbers(help_: str, *, least: int) -> Any:
    """Return an option of several numbers, none below ``least``."""

    def parse(given: str | Numbers) -> Numbers:
        words = str(given).split(",")
        if not all(re.fullmatch(r"\s*\d+\s*", word) and int(word) >= least for word in words):
            raise typer.BadParameter(f"{given!r} is not a list of numbers of at least {least}, such as 1,2,4.")
        return Numbers(tuple(map(int, words)))

    return typer.Option(parser=parse, metavar="N,N,...", help=help_)
