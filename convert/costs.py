"""What products of a gather cost by how many inputs are kept, where that was measured and is not in step with bytes.

A row of weights that is read alone costs what it takes to begin, too. So of short rows some must be left out before any
time is saved, and it may be best to read all of them. Then one price, KL for each *millisecond*, decides instead of KL
for each weight: every place keeps the share of its values at which the KL that is lost and the time's worth are least
together. Values are then left out by their size as ever.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from moedge import MoEdgeError
from moedge._files import read_json

if TYPE_CHECKING:
    from moedge.convert.gather import Ladder
    from moedge.convert.kept_inputs import Reader

SCHEMA = "moedge.costs/1"


class Product(BaseModel):
    """Milliseconds of one token in products of one size."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    inputs: int = Field(ge=1)
    """K: one row of weights each."""
    outputs: int = Field(ge=1)
    """Weights a row, of all products that read the same inputs."""
    kept: list[float] = Field(min_length=2)
    """Shares of the inputs that are kept, rising, the last of them 1."""
    ms: list[float]
    """Milliseconds at each of them."""

    @model_validator(mode="after")
    def _is_a_curve(self) -> Product:
        rising = all(low < high for low, high in zip(self.kept, self.kept[1:], strict=False))
        if not (rising and self.kept[0] > 0 and self.kept[-1] == 1):
            raise ValueError("kept must rise from above 0 to 1")
        if len(self.ms) != len(self.kept) or min(self.ms) <= 0:
            raise ValueError("ms must have one positive number for each share in kept")
        return self

    def at(self, kept: np.ndarray) -> np.ndarray:
        """Return milliseconds at shares that are kept; nothing kept takes none."""
        found: np.ndarray = np.interp(kept, (0, *self.kept), (0, *self.ms))
        return found


def sizes(places: Sequence[Reader]) -> list[tuple[int, int]]:
    """Return (inputs, outputs) of the products that read some places, each size once."""
    return list(dict.fromkeys((place.inputs, place.weights) for place in places))


def read(path: Path) -> list[dict[str, Any]]:
    """Return the products in a file of ``moedge costs``, not yet checked.

    Raises:
        MoEdgeError: it is not there, or none of its schema.
    """
    mend = "measure them again with moedge costs"
    found = read_json(path, mend, missing=f"costs: {path} does not exist; measure them with moedge costs.")
    if found.get("schema") != SCHEMA or not isinstance(found.get("products"), list):
        raise MoEdgeError(f"costs: {path} is not of schema {SCHEMA}; {mend}.")
    return list(found["products"])


def cuts(steps: list[Ladder], products: Sequence[Product], level: float) -> list[float]:
    """Return below which score * |value| each place leaves values out, at one level of what a millisecond is worth.

    The level is the root of twice that, as :func:`moedge.convert.gather.cuts` has it for weights: where milliseconds
    are in step with weights, both give the same.

    Raises:
        MoEdgeError: a place has a product of a size that was not measured.
    """
    kept = 1 - np.linspace(0, 1, len(steps[0].steps))
    times = {(one.inputs, one.outputs): one.at(kept) for one in products}
    found = []
    for one in steps:
        place = one.place
        ms = times.get((place.inputs, place.weights))
        if ms is None:
            raise MoEdgeError(
                f"costs: no product of {place.inputs} inputs and {place.weights} outputs was measured, which layer "
                f"{place.layer} has ({place.place}); measure this model's with moedge costs."
            )
        found.append(float(one.steps[np.argmin(one.lost + level**2 / 2 * ms)]))
    return found
