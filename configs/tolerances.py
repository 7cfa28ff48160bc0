"""Typed reading of ``tolerances.yaml``: unknown keys, wrong types and impossible limits are refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from moedge import MoEdgeError
from moedge.configs.files import first_problem
from moedge.export import targets

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]

DEFAULT = Path(__file__).with_name("tolerances.yaml")


class Profile(BaseModel):
    """Limits for one weight dtype and target; the YAML file says what each is derived from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    near_tie_margin: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    near_tie_scale: Positive
    """Largest logit of a token that ``near_tie_margin`` was derived for. Every error here is relative to a token's
    largest logit, so the margin of a token whose largest logit is smaller shrinks with it; it never grows."""
    max_near_tie_share: Share
    identity_rel_error: Positive
    median_rel_error: Positive
    mean_rel_error: Positive
    mean_kl: Positive
    max_kl: Positive
    min_cosine: Share | None
    """None where the cosine is reported and not judged."""
    top1_agreement: Share
    top5_agreement: Share
    perplexity_drift: Positive
    expert_set_agreement: Share | None = None
    """Limit for the free-running comparison. None where ``router_set_agreement`` takes its place."""
    router_set_agreement: Share | None = None
    """A routed model is judged by route replay (:mod:`moedge.runtime.parity.replay`): the engine must select what the
    reference's router selects for the engine's own input to it. Beside ``expert_set_agreement`` (float32 targets) only
    the windows of text in which a choice differs are replayed; bundles that cannot be replayed are judged free-running.
    """
    router_tie_margin: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Scores of a router tie that are closer than this times the layer's largest score."""
    router_input_rel_error: Positive | None = None
    """For what the routers read: |a - b| / |a| on average over the tokens of a layer, under the engine's choices."""
    kl_ratio_to_dense: Positive | None = None
    """Quantised targets: mean KL of the MoE's bundle over that of its dense parent's bundle of the same target."""

    @model_validator(mode="after")
    def _routing_is_judged(self) -> Profile:
        if self.expert_set_agreement is None and self.router_set_agreement is None:
            raise ValueError("give expert_set_agreement, router_set_agreement or both")
        return self

    @classmethod
    def of(cls, limits: Profile | Mapping[str, Any]) -> Profile:
        """Return ``limits`` as a checked profile.

        Raises:
            MoEdgeError: a key is unknown, missing, of a wrong type or impossible.
        """
        if isinstance(limits, Profile):
            return limits
        try:
            return cls.model_validate(dict(limits))
        except ValidationError as error:
            raise MoEdgeError(f"Tolerances: {first_problem(error)}.") from error


class Tolerances(BaseModel):
    """The whole file: profiles by ``"dtype/target"``."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    schema_: Literal["moedge.tolerances/1"] = Field(alias="schema")
    profiles: dict[str, Profile]

    def profile(self, dtype: str, target: str, graph: str = "") -> Profile:
        """Return the limits for weights of ``dtype`` on ``target``.

        Args:
            dtype: of the checkpoint's weights: the first half of a profile's name.
            target: of the bundle: the second half.
            graph: type that the bundle's graph states: in bfloat16 a target's profile ends in ``-bf16``.

        Raises:
            MoEdgeError: the file has no such profile.
        """
        row = targets.known(target)
        target = row.limits or target if row else target
        key = f"{dtype}/{target}{'-bf16' if graph == 'bfloat16' else ''}"
        if key not in self.profiles:
            raise MoEdgeError(f"No tolerance profile {key!r}; known: {', '.join(sorted(self.profiles))}.")
        return self.profiles[key]


def load(path: str | Path | None = None) -> Tolerances:
    """Read a tolerances file (the packaged one by default).

    Raises:
        MoEdgeError: missing or not YAML, or a key is unknown, missing, of a wrong type or impossible.
    """
    file = Path(path) if path is not None else DEFAULT
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise MoEdgeError(f"Cannot read the tolerances file {file}: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise MoEdgeError(f"{file} is not valid YAML: {' '.join(str(error).split())}") from error
    try:
        return Tolerances.model_validate(content)
    except ValidationError as error:
        raise MoEdgeError(f"{file}: {first_problem(error)}.") from error
