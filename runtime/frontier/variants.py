"""Which conversions and targets a recipe's frontier compares; what it leaves open is chosen here."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from moedge import MoEdgeError
from moedge._files import digest
from moedge.configs.recipe import Recipe, recipe_from
from moedge.convert.plan import SMALLEST_RAMP
from moedge.export import targets

SHARES = (0.85, 0.75, 0.65, 0.5)
"""Shares of the FFN weights that the variants of our gather read, with the recipe's other settings where it gathers."""
_FLAP = {"method": "flap", "keep": 0.75, "refit": True, "token_weight": "residual", "sequential": True}
_TEAL = {"method": "gather", "share": 0.75, "scores": "magnitude", "ramp": SMALLEST_RAMP}
"""As published: nearly a step, as the control has it."""


@dataclass(frozen=True)
class Variant:
    """One conversion; ``recipe`` is the whole recipe with this conversion in it."""

    label: str
    recipe: Recipe

    @property
    def folder(self) -> str:
        """Name of its folder: readable, and unique because labels are."""
        slug = re.sub(r"[^a-z0-9]+", "-", self.label.lower()).strip("-")
        return f"{slug}-{digest(self.label)[:4]}"

    @property
    def convert(self) -> dict[str, Any]:
        """The section ``convert`` as JSON."""
        return self.recipe.convert.model_dump(mode="json")


def variants(recipe: Recipe) -> list[Variant]:
    """Return the conversions to compare.

    Raises:
        MoEdgeError: one of them does not fit the rest of the recipe.
    """
    given = recipe.frontier.variants
    if given is not None:
        return [_variant(recipe, one.label, one.convert.model_dump(mode="json")) for one in given]
    own = recipe.convert.model_dump(mode="json")
    gather = own if own["method"] == "gather" else {"method": "gather"}
    shares = sorted({*SHARES, *([own["share"]] if gather is own else [])}, reverse=True)
    chosen = [(f"gather {share:.4g}", {**gather, "share": share}) for share in shares]
    others = [("FLAP refit 0.75", _FLAP), ("TEAL 0.75", _TEAL)]
    found = [_variant(recipe, label, convert) for label, convert in (*chosen, *others)]
    if all(one.recipe.convert != recipe.convert for one in found):
        found.insert(len(chosen), Variant(_own_label(recipe), recipe))
    return found


def _own_label(recipe: Recipe) -> str:
    from moedge.convert.methods import METHODS

    method = recipe.convert.method
    label = f"{method} {METHODS[method].layout(recipe.convert.model_dump(mode='json'))}"
    return label if len(label) <= 24 else f"{method}, the recipe's"


def _variant(recipe: Recipe, label: str, convert: dict[str, Any]) -> Variant:
    where = f"{recipe.name}: frontier.variants: {label}"
    return Variant(label, recipe_from({**recipe.model_dump(mode="json"), "convert": convert}, where=where))


def chosen_targets(recipe: Recipe) -> list[str]:
    """Return the targets to measure on, all of which this machine executes.

    Raises:
        MoEdgeError: the recipe names none.
    """
    if recipe.frontier.targets is not None:
        return list(recipe.frontier.targets)
    named = [name for name in recipe.export.targets if targets.find(name).engine is None]
    found = [name for name in named if name != targets.PORTABLE] or named  # a lowered graph is what one runs
    quantised = [row.name for row in targets.every() if row.unquantised in found and row.engine is None]
    found += [name for name in quantised if name not in found]
    if not found:
        raise MoEdgeError(
            f"{recipe.name}: frontier: none of {', '.join(recipe.export.targets)} is executed here; name targets that "
            "are, e.g. frontier.targets: [ort-cpu]."
        )
    return found
