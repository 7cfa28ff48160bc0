"""What a conversion method returns, and what those that read statistics start from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from moedge import MoEdgeError
from moedge.convert import adapters
from moedge.convert.plan import LayerPlan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from moedge.convert.calibration import LayerStatistics


@dataclass(frozen=True)
class Layers:
    """The layers of a plan, one for each FFN of the model, and what else the method has to say (JSON).

    ``provenance`` is what it measured on the way, by its own key; ``params`` are remarks that belong beside its
    parameters. Both go into the plan.
    """

    layers: list[LayerPlan]
    provenance: dict[str, Any] = field(default_factory=dict)
    params: dict[str, Any] = field(default_factory=dict)


def measured(model: PreTrainedModel, statistics: list[LayerStatistics]) -> list[tuple[adapters.FFN, LayerStatistics]]:
    """Return each FFN of the model with the statistics of it.

    Raises:
        MoEdgeError: the statistics are of another model.
    """
    blocks = adapters.ffns(model)
    if len(blocks) != len(statistics):
        raise MoEdgeError(f"Statistics have {len(statistics)} layers, the model {len(blocks)}; calibrate this model.")
    for block, facts in zip(blocks, statistics, strict=True):
        if facts.width != block.width:
            raise MoEdgeError(
                f"Statistics of {block.name} have {facts.width} neurons, the model {block.width}; calibrate this model."
            )
    return list(zip(blocks, statistics, strict=True))
