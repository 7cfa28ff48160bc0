"""Whether an engine leaves out what it should, judged by the reference's thresholds on the values that it shows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from moedge import MoEdgeError
from moedge.export.manifest import GatherPlace
from moedge.runtime.parity.figures import KeptFacts
from moedge.runtime.parity.metrics import distance

_ROUNDING = 8 * 2.0**-24
"""A value times its factor is rounded four times (difference, width of the ramp, quotient, product) on either side."""


@dataclass
class KeptChoices:
    """What an engine left out, token by token and place by place."""

    counts: dict[GatherPlace, np.ndarray] = field(default_factory=dict)
    """int64 [4]: values; of them kept; those that are not what the reference's thresholds leave of them; those that are
    kept in one of both alone when the reference decides for its own values."""
    errors: dict[GatherPlace, list[np.ndarray]] = field(default_factory=dict)
    """float64 [T]: |a - b| / |a| of the values, a in the reference under the engine's choices, b in the engine."""

    def add(
        self,
        values: Mapping[GatherPlace, np.ndarray],
        kept: Mapping[GatherPlace, np.ndarray],
        factors: Mapping[GatherPlace, np.ndarray],
        reference: Mapping[GatherPlace, np.ndarray],
        own: Mapping[GatherPlace, np.ndarray],
    ) -> None:
        """Count one step; everything is float32 [T, K] by place.

        Args:
            values: of which the engine left small ones out. kept: what was left. factors: of the reference's thresholds
                for ``values``. reference: its own values, under the engine's choices. own: its factors for these.

        Raises:
            MoEdgeError: the two do not leave out at the same places, or of as many values.
        """
        if values.keys() != kept.keys() or not reference.keys() >= values.keys():
            raise MoEdgeError("The engines leave small values out in different layers: these are not the same model.")
        for place, shown in values.items():
            left, factor, a = kept[place], factors[place], reference[place]
            if not shown.shape == left.shape == factor.shape == a.shape:
                raise MoEdgeError(
                    f"What the engine shows of layer {place[0]} has shapes {shown.shape} and {left.shape}, the "
                    f"reference's {a.shape}; export it again."
                )
            with np.errstate(invalid="ignore"):
                right = shown * factor
                wrong = ~(np.abs(left - right) <= _ROUNDING * np.abs(right)) | ((left == 0) != (right == 0))
            wrong &= ~(np.isnan(left) & np.isnan(right)) & (left != right)  # equal infinities have no difference
            changed = (factor > 0) != (own[place] > 0)
            counted = [shown.size, (factor > 0).sum(), wrong.sum(), changed.sum()]
            self.counts[place] = self.counts.get(place, np.zeros(4, dtype=np.int64)) + np.array(counted)
            self.errors.setdefault(place, []).append(distance(a, shown))

    def summary(self) -> KeptFacts:
        """How many values were rightly kept or left out, and how near the values are to the reference's."""
        if not self.counts:
            return {"compared": False, "reason": "nothing was run"}
        total, held, wrong, flips = np.sum(list(self.counts.values()), axis=0).tolist()
        by_place = {place: 1 - count[2] / count[0] for place, count in sorted(self.counts.items())}
        worst = min(by_place, key=lambda place: by_place[place])
        errors = {place: float(np.concatenate(parts).mean()) for place, parts in self.errors.items()}
        return {
            "compared": True,
            "decisions": total,
            "kept": held / total,
            "wrong": wrong,
            "flips": flips,
            "agreement": 1 - wrong / total,
            "worst_layer": worst[0],
            "worst_agreement": float(by_place[worst]),
            "input_rel_error": float(np.max(list(errors.values()))),
            "layers": {
                f"{layer}.{which}": {
                    "agreement": float(by_place[layer, which]),
                    "kept": float(count[1] / count[0]),
                    "flips": int(count[3]),
                    "input_rel_error": errors[layer, which],
                }
                for (layer, which), count in sorted(self.counts.items())
            },
        }
