"""What is found of one shape of reading (:mod:`.shapes`): figures, limits, and what a failure means."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import cast

import numpy as np

from moedge.configs.tolerances import Profile
from moedge.runtime.parity.metrics import TokenErrors
from moedge.runtime.parity.results import ShapeCase
from moedge.runtime.parity.verdict import Check

BLOCK = 64
"""Tokens of a long text over which a mean is taken."""
HINTS = {
    "determinism": (
        "equal calls give other bits on this CPU: a kernel adds in an order that changes, or reads memory that nobody "
        "wrote."
    ),
    "alone.reference": "short texts are read wrongly in the plainest shape, too",
    "batch.equal": "rows of one batch disturb each other",
    "batch.padding.prefill": "padding is seen, or it counts in the positions of the row",
    "batch.padding.decode": "on the cache of a padded row, padding is seen or the positions are others",
    "batch.chunked": "several tokens at once are read wrongly on the cache of a padded batch",
    "prefill.chunked": (
        "a text that is read in several calls becomes another one: where keys and values are appended, or what a token "
        "sees of its own call"
    ),
    "decode": "the cache is wrong after a long prompt",
    "chunked": "a long prompt that is read in several calls becomes another one",
    "reference": (
        "so long a prompt is read wrongly in every shape: rotary tables, their scaling, or the length that the graph "
        "is made for"
    ),
}
"""What a failure of each shape most often is, by the whole name or its last part."""
UNSURE = (
    "Not decided: this model leaves small values out and does not show all of them, so what rounding changes of them "
    "is in these figures."
)
ON_GPU = "equal calls differ in bits, as kernels of a GPU may that add in no fixed order."


@dataclass(frozen=True)
class Between:
    """Limits of one comparison: the mean over tokens of max|a-b| / max|a|, and the KL, in nats."""

    mean_rel_error: float
    mean_kl: float
    max_kl: float

    @classmethod
    def readings(cls, limits: Profile) -> Between:
        """Limits between two readings of one engine; see the module."""
        return cls(math.sqrt(2) * limits.mean_rel_error, 2 * limits.mean_kl, 2 * limits.max_kl)

    @classmethod
    def reference(cls, limits: Profile) -> Between:
        """Limits between an engine and its reference."""
        return cls(limits.mean_rel_error, limits.mean_kl, limits.max_kl)


@dataclass
class Errors:
    """The errors of tokens, first ones of a row apart where they count apart."""

    others: TokenErrors = field(default_factory=lambda: TokenErrors(0.0))
    first: TokenErrors = field(default_factory=lambda: TokenErrors(0.0))

    @property
    def tokens(self) -> int:
        """How many were compared."""
        return self.others.tokens + self.first.tokens

    def block(self) -> float:
        """Largest mean of the relative error over :data:`BLOCK` tokens in a row, or over all where there are fewer."""
        errors = np.concatenate(self.others.columns["rel"])
        size = min(BLOCK, len(errors))
        sums = np.concatenate([[0.0], errors.cumsum()])
        return float((sums[size:] - sums[:-size]).max() / size)

    def figures(self) -> tuple[dict[str, float | None], dict[str, float | None]]:
        """Mean and maximum of the relative error and of the KL.

        None where a row is not finite or is constant; and the mean of the relative error of first tokens alone.
        """
        every = TokenErrors.merged([self.first, self.others]).summary()
        if every["non_finite"] or every["constant"]:
            return {"mean": None, "max": None}, {"mean": None, "max": None}
        mean = self.others.summary()["rel_error"]["mean"]
        rel, kl = every["rel_error"], every["kl_ref_test"]
        return {"mean": number(mean), "max": number(rel["max"])}, {"mean": number(kl["mean"]), "max": number(kl["max"])}


@dataclass
class Case:
    """What was found of one shape."""

    name: str
    limits: Between
    long: bool = False
    """A long text is judged by means: over the worst block of tokens, which a fault that begins at some length fills.
    A single token may hang on one that is a thousand tokens away (a name that is said again), and then a rounding that
    turns this attention moves it by far more than its neighbours (docs/shapes.md has a measured one)."""
    heavy_first: bool = False
    """Whether the first token of a row is left out of means: it carries a massive activation, whose error in half
    precision is many times that of others, and the limits of means are derived for one such token in 224."""
    tokens: int = 0
    identical: int = 0
    excused: int = 0
    alone: Errors = field(default_factory=lambda: Errors())
    replayed: Errors = field(default_factory=lambda: Errors())
    worst: tuple[float, int, int] = (-1.0, 0, 0)
    error: str = ""

    def add(self, errors: Errors, one: np.ndarray, two: np.ndarray, row: int, start: int) -> None:
        """Compare logits [n, V] of positions ``start`` and on of a row, what counts as right first."""
        if not len(one):
            return
        first = 1 if self.heavy_first and start == 0 else 0
        for tokens, rows in ((errors.first, slice(first)), (errors.others, slice(first, None))):
            tokens.add(one[rows], two[rows], np.full(len(one[rows]), -1))
        self.identical += int((one == two).all(1).sum())
        distance = apart(one, two)
        at = int(distance.argmax())
        self.worst = max(self.worst, (float(distance[at]), row, start + at), key=lambda each: each[0])

    def checks(self, against: Profile, *, unsure: bool) -> list[Check]:
        """The figures beside their limits; a reading that failed has none, one that was not compared is not decided."""
        found: list[Check] = []
        for errors, name, limits in (
            (self.alone, self.name, self.limits),
            (self.replayed, f"{self.name}.replayed", Between.reference(against)),
        ):
            if errors.tokens:
                found += self._judged(name, errors, limits, decided=not unsure)
        if self.error or (not found and not self.excused):
            return [Check(f"{self.name}.rel_error.mean", None, "<=", self.limits.mean_rel_error)]
        if self.excused:  # a rounding turned the choice, or a fault did: nobody can tell
            found.append(Check(f"{self.name}.not_compared", self.excused, "<=", 0, decided=False))
        return found

    def _judged(self, name: str, errors: Errors, limits: Between, *, decided: bool) -> list[Check]:
        rel, kl = errors.figures()
        if not errors.others.tokens:  # first tokens alone, which are in no mean
            rows = [("kl.max", kl["max"], limits.max_kl)]
        elif self.long:
            rows = [
                (f"rel_error.mean_of_{BLOCK}", None if rel["mean"] is None else errors.block(), limits.mean_rel_error),
                ("kl.mean", kl["mean"], limits.mean_kl),
            ]
        else:
            rows = [("rel_error.mean", rel["mean"], limits.mean_rel_error), ("kl.max", kl["max"], limits.max_kl)]
        return [Check(f"{name}.{figure}", value, "<=", limit, decided) for figure, value, limit in rows]

    def said(self, hint: str) -> str:
        """One sentence about a figure beyond its limit, beginning with ``hint``."""
        if self.error:
            return self.error
        worst, row, position = self.worst
        off = f"a relative error of {worst:.2g}" if math.isfinite(worst) else "a logit that is no number"
        return f"{hint}the worst token is number {position + 1} of row {row + 1}, with {off}."

    def facts(self) -> ShapeCase:
        """The case as results hold it."""
        rel, kl = (self.alone if self.alone.tokens else self.replayed).figures()
        facts: ShapeCase = {
            "tokens": self.tokens,
            "identical": self.identical,
            "replayed": self.replayed.tokens,
            "excused": self.excused,
            "rel_error": cast("dict[str, float]", rel),
            "kl": cast("dict[str, float]", kl),
        }
        worst, row, position = self.worst
        if worst >= 0:
            facts["worst"] = {"row": row, "position": position, "rel_error": cast("float", number(worst))}
        return facts


def apart(one: np.ndarray, two: np.ndarray) -> np.ndarray:
    """Float32 [n] of logits [n, V]: max|a-b| / max|a|, infinite where one of both is not finite."""
    with np.errstate(invalid="ignore", over="ignore"):
        found = np.abs(one - two).max(1) / np.maximum(np.abs(one).max(1), np.finfo(np.float32).tiny)
    found[~np.isfinite(found)] = np.inf
    return np.asarray(found)


def number(value: float) -> float | None:
    """Return a number as JSON holds it: None for what is not finite."""
    return value if math.isfinite(value) else None
