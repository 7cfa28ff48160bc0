"""Typed reading of ``tolerances.yaml``: unknown keys, wrong types and impossible limits are refused by name.

A user's file of the same form is laid over the packaged one: a limit that it does not name stays as it is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, model_validator

from moedge import MoEdgeError
from moedge.configs import files
from moedge.configs.errors import checked, nearest
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
    kept_input_rel_error: Positive | None = None
    """For the values of which a gathered model leaves small ones out: |a - b| / |a| on average over the tokens of a
    place, under the engine's choices."""
    layer_rel_error: Positive | None = None
    """For each layer alone under the stream of a kept reference (:mod:`moedge.runtime.parity.against`): |a - b| over
    what the reference's layer adds to the stream, on average over tokens. None where it is reported and not judged."""
    kl_ratio_to_dense: Positive | None = None
    """Quantised targets: mean KL of the MoE's bundle over that of its dense parent's bundle of the same target."""
    task_agreement: Share | None = None
    """Least share of questions that the engine must answer as its reference does (:mod:`.runtime.parity.accuracy`);
    None: answers to tasks are not judged."""
    task_accuracy_drop: Share | None = None
    """Most that the accuracy over these questions may fall, in absolute terms."""

    @model_validator(mode="after")
    def _routing_is_judged(self) -> Profile:
        if (self.task_agreement is None) != (self.task_accuracy_drop is None):
            raise ValueError("give task_agreement and task_accuracy_drop together")
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
        return checked(cls, dict(limits), where="Tolerances")


class Given(BaseModel):
    """A user's choice: ``verify.tolerances`` of a recipe where it is more than a profile's name."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    profile: Annotated[str, Field(min_length=1)] = "float32"
    """The weight dtype, first half of a profile's name."""
    file: Annotated[str, Field(min_length=1)]
    """The path of a file that is laid over the packaged one."""
    sha256: str | None = None
    """Of that file, where another one shall be refused."""


class Origin(BaseModel):
    """What was laid over the packaged limits: it stands in the results that were judged by it."""

    model_config = ConfigDict(frozen=True)

    file: str
    sha256: str
    profiles: dict[str, dict[str, Any]]
    """The limits that the file names."""


class Tolerances(BaseModel):
    """The whole file: profiles by ``"dtype/target"``."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    schema_: Literal["moedge.tolerances/1"] = Field(alias="schema")
    profiles: dict[str, Profile]
    _origin: Origin | None = PrivateAttr(default=None)

    @property
    def origin(self) -> Origin | None:
        """The user's file, or None: these are the packaged limits."""
        return self._origin

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
    """Read the packaged tolerances, with those of a user's file over them.

    A profile of the file that is packaged too keeps the limits that the file does not name; any other one must name
    all that have no default.

    Raises:
        MoEdgeError: missing or not YAML, or a key is unknown, missing, of a wrong type or impossible.
    """
    packaged, _ = _read(DEFAULT)
    if path is None:
        return checked(Tolerances, packaged, where=str(DEFAULT))
    file = Path(path).expanduser()
    given, sha256 = _read(file)
    profiles = given.get("profiles")
    if not isinstance(profiles, dict) or not all(isinstance(limits, dict) for limits in profiles.values()):
        return checked(Tolerances, given, where=str(file))  # says what is wrong
    known = packaged["profiles"]
    for name, limits in profiles.items():
        if name not in known:
            _check_whole(f"{file}: profiles.{name}", name, limits, list(known))
    merged = {name: {**known.get(name, {}), **limits} for name, limits in profiles.items()}
    found = checked(Tolerances, {**given, "profiles": {**known, **merged}}, where=str(file))
    found._origin = Origin(file=str(path), sha256=sha256, profiles=profiles)
    return found


def chosen(given: str | Given = "float32") -> tuple[str, Tolerances]:
    """Return the first half of a profile's name, and the tolerances that hold it.

    Args:
        given: a profile's first half, or that and a file; see :func:`given_as` for what a command takes.

    Raises:
        MoEdgeError: see :func:`load`; or the file is not the one whose hash is given.
    """
    if isinstance(given, str):
        return given, load()
    found = load(given.file)
    if given.sha256 and found.origin and found.origin.sha256 != given.sha256:
        raise MoEdgeError(
            f"The tolerances file {given.file} has sha256 {found.origin.sha256}, not {given.sha256}: it was changed. "
            "Bring the other one back, or run again without the hash."
        )
    return given.profile, found


def given_as(text: str | Path) -> str | Given:
    """Return what ``--tolerances`` means: the first half of a packaged profile's name, or else a file.

    Raises:
        MoEdgeError: it is neither.
    """
    halves = dict.fromkeys(name.split("/")[0] for name in load().profiles)
    if str(text) in halves:
        return str(text)
    if not Path(text).expanduser().is_file():
        raise MoEdgeError(f"No tolerances file {str(text)!r}; give the path of one, or {' or '.join(halves)}.")
    return Given(file=str(text))


def _read(file: Path) -> tuple[dict[str, Any], str]:
    """Return the content of a file and its sha256."""
    try:
        content = file.read_bytes()
        text = content.decode("utf-8")
    except OSError as error:
        raise MoEdgeError(f"Cannot read the tolerances file {file}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise MoEdgeError(f"{file} is not UTF-8 text ({error.reason} at byte {error.start}).") from error
    return files.parse(text, str(file), "tolerances file"), hashlib.sha256(content).hexdigest()


def _check_whole(where: str, name: str, limits: dict[str, Any], known: list[str]) -> None:
    """Refuse a profile that has nothing packaged below it and leaves a limit out; most often a misspelt name."""
    missing = [key for key, field in Profile.model_fields.items() if field.is_required() and key not in limits]
    if missing:
        raise MoEdgeError(
            f"{where}: no packaged profile has that name{nearest(str(name), known)}, so every limit must be given; "
            f"missing: {', '.join(missing)}."
        )
