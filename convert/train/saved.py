"""A saved training run: tensors in safetensors, counters in JSON, never pickle; all of it or nothing is there."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moedge import MoEdgeError
from moedge._files import atomic_dir, write_json

SCHEMA = "moedge.training/1"


@dataclass
class State:
    """What a run needs to go on as if it had never stopped.

    ``model``: trained tensors by name. ``moments``: Adam's, by parameter and name. ``loads``: tokens that each expert
    got since the last entry of the curve, [E] a layer. ``counters``: numbers and lists that JSON holds. ``scaler``: the
    state of float16's gradient scaler, empty in other precisions.
    """

    model: dict[str, torch.Tensor]
    moments: dict[str, dict[str, torch.Tensor]]
    loads: list[torch.Tensor]
    counters: dict[str, Any]
    scaler: dict[str, Any]


def write(folder: Path, key: str, state: State) -> None:
    """Write a state in place of the one before; ``key`` tells its run from others."""
    from safetensors.torch import save_file

    kept = {f"model.{name}": value for name, value in state.model.items()}
    for name, values in state.moments.items():
        kept |= {f"optimizer.{name}/{part}": torch.as_tensor(value) for part, value in values.items()}
    kept |= {f"load.{index}": counts for index, counts in enumerate(state.loads)}
    head = {"schema": SCHEMA, "key": key, **state.counters, "scaler": state.scaler}
    with atomic_dir(folder, force=True) as partial:
        save_file(
            {name: value.detach().cpu().contiguous().clone() for name, value in kept.items()},
            partial / "state.safetensors",
        )
        write_json(partial / "state.json", head)


def read(folder: Path, key: str) -> State | None:
    """Read the state of a run; None when there is none.

    Raises:
        MoEdgeError: it belongs to another run, or is damaged.
    """
    if not (folder / "state.json").is_file():
        return None
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        head = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        kept = load_file(folder / "state.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise MoEdgeError(f"The saved training in {folder} is damaged ({error}); remove it.") from error
    if head.pop("schema", None) != SCHEMA or head.pop("key", None) != key:
        raise MoEdgeError(
            f"{folder} holds a run of another model, or with other settings, texts or number of processes; "
            "finish it with its own, or remove it to start again."
        )
    state = State({}, {}, [], counters=head, scaler=head.pop("scaler", {}))
    for name, value in kept.items():
        kind, _, rest = name.partition(".")
        if kind == "model":
            state.model[rest] = value
        elif kind == "optimizer":
            parameter, _, part = rest.rpartition("/")
            state.moments.setdefault(parameter, {})[part] = value
    state.loads = [kept[f"load.{index}"] for index in range(sum(name.startswith("load.") for name in kept))]
    return state
