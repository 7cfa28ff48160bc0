"""What an export is asked for, checked before anything is traced: the same for the command and for Python."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from moedge import MoEdgeError
from moedge.export import targets
from moedge.runtime.device.moedge_plugins import refusal
from moedge.runtime.device.moedge_trt import DeviceError
from moedge.runtime.run import held_out, run_folder


@dataclass(frozen=True)
class Asked:
    """The options that only some targets take."""

    tensorrt: str | None = None
    expert_form: str | None = None
    half: str | None = None
    calibrated: bool = False
    """Whether 4-bit weights are chosen on a text."""
    zero_points: bool = False
    stock_operators: bool = False

    def in_command(self) -> dict[str, str]:
        """Return field -> how it is written on the command line."""
        named = {name: f"--{name.replace('_', '-')}" for name in ("tensorrt", "half", "zero_points", "stock_operators")}
        return named | {"expert_form": f"--expert-form {self.expert_form}", "calibrated": "--gptq"}

    def in_python(self) -> dict[str, str]:
        """Return field -> how it is written as an argument of ``moedge.export_model``."""
        named = {name: f"{name}={getattr(self, name)!r}" for name in ("tensorrt", "expert_form", "half")}
        return named | {"calibrated": "calibration"} | {name: name for name in ("zero_points", "stock_operators")}


def check(wanted: Sequence[str] | None, asked: Asked, called: Mapping[str, str]) -> list[str]:
    """Refuse unknown targets, options that none of them takes, and versions of TensorRT that are none.

    Args:
        wanted: names of targets; the default ones where there are none.
        asked: the options.
        called: field of :class:`Asked` -> what the user wrote, for the sentence.

    Returns:
        The names of the targets.

    Raises:
        MoEdgeError: what is wrong.
    """
    wanted = list(wanted or targets.default())
    targets.check(wanted)
    targets.check_form(asked.expert_form)
    if asked.tensorrt is not None:
        try:
            refusal(asked.tensorrt)
        except DeviceError as error:
            raise MoEdgeError(str(error)) from None
        targets.check_taken(called["tensorrt"], lambda row: row.versioned, wanted)
    if asked.expert_form:
        targets.check_taken(called["expert_form"], lambda row: asked.expert_form in row.expert_forms, wanted)
    if asked.half:
        targets.check_taken(called["half"], targets.has_dtypes, wanted)
    if asked.calibrated:
        targets.check_taken(called["calibrated"], lambda row: row.calibrated, wanted)
    if asked.zero_points:
        targets.check_taken(called["zero_points"], lambda row: row.zero_points, wanted)
    if asked.stock_operators:
        targets.check_taken(called["stock_operators"], lambda row: row.own_operators, wanted)
    return wanted


def check_checkpoint(checkpoint: Path, max_length: int | None, called: str) -> None:
    """Refuse what is no checkpoint, and a length, which the user ``called`` so, beyond its positions.

    Raises:
        MoEdgeError: what is wrong.
    """
    if not checkpoint.exists():
        raise MoEdgeError(f"Model {checkpoint} does not exist; give a folder, a .gguf file or a hub id org/name.")
    if not (checkpoint / "config.json").is_file():
        raise MoEdgeError(f"{checkpoint} is not a checkpoint folder: it has no config.json.")
    if max_length is not None:
        config = run_folder.read_json(checkpoint / "config.json", "download or save the model again")
        held_out.check_positions(config.get("max_position_embeddings"), max_length, called)


def label(given: Path, checkpoint: Path) -> str:
    """Return the folder's name (of the working folder for a path without one), or the hub id, asset or GGUF given."""
    return str(given) if checkpoint != given else given.name or given.resolve().name
