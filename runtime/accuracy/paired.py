"""Two models' answers to the same questions: agreement, drop of accuracy, and how sure that is.

Symbols: n questions, a that both models answer alike, b that only the reference has right, c that only the test has
right. Questions that both have right, or both wrong, say nothing of the difference: this is McNemar's table.

* **agreement** a / n, with Wilson's score interval (J. Am. Stat. Assoc. 22, 1927).
* **drop** (b - c) / n, the accuracy of the reference less that of the test, with Tango's score interval (Stat. Med. 17,
  1998, p. 891), which turns McNemar's test around: the values that it does not reject. At a drop of 0 its statistic is
  McNemar's (b - c) / sqrt(b + c). A bootstrap of the questions would say [0, 0] wherever b = c = 0, however few there
  were; this one says 3.84 / (n + 3.84), about 1 % after 380 questions.

Both statistics grow with the root of n when the shares stay, so how many questions would decide is known.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from moedge import MoEdgeError
from moedge.convert.tasks import Answers
from moedge.runtime.parity.results import PairedFacts

Z = 1.959963984540054
"""The normal distribution's 97.5 % quantile: intervals hold 95 %."""
_CERTAIN = 1e9
"""A z that no test accepts."""


@dataclass(frozen=True)
class Paired:
    """Counts over questions."""

    questions: int
    same: int
    """a."""
    only_reference: int
    """b."""
    only_test: int
    """c."""
    both: int
    """That both models have right."""

    @classmethod
    def of(cls, reference: Answers, test: Answers) -> Paired:
        """Count the answers of two models.

        Raises:
            MoEdgeError: they were asked different questions.
        """
        if reference.asked != test.asked:
            raise MoEdgeError("These answers are to different questions, so they cannot be compared.")
        same = sum(one == two for one, two in zip(reference.chosen, test.chosen, strict=True))
        one, two = reference.right, test.right
        counts = (int(np.count_nonzero(found)) for found in (one & ~two, two & ~one, one & two))
        return cls(len(one), same, *counts)

    @classmethod
    def over(cls, found: Iterable[Paired]) -> Paired:
        """Return the counts of several tasks together: every question counts once."""
        rows = [(one.questions, one.same, one.only_reference, one.only_test, one.both) for one in found]
        return cls(*(sum(column) for column in zip(*rows, strict=True)))

    @property
    def agreement(self) -> float:
        """a / n."""
        return self.same / self.questions

    @property
    def drop(self) -> float:
        """(b - c) / n."""
        return (self.only_reference - self.only_test) / self.questions

    @property
    def agreement_interval(self) -> tuple[float, float]:
        """95 %, Wilson's."""
        from scipy.stats import binomtest

        low, high = binomtest(self.same, self.questions).proportion_ci(0.95, method="wilson")
        return float(low), float(high)

    @property
    def drop_interval(self) -> tuple[float, float]:
        """95 %, Tango's."""
        from scipy.optimize import brentq

        def end(z: float, beyond: float) -> float:
            if self.drop == beyond:
                return beyond
            return float(brentq(lambda drop: self.drop_statistic(drop) - z, self.drop, beyond, xtol=1e-12))

        return end(Z, -1.0), end(-Z, 1.0)

    @property
    def mcnemar_p(self) -> float:
        """p-value of McNemar's exact test that neither model is better (two-sided); 1 where b = c = 0."""
        from scipy.stats import binomtest

        differ = self.only_reference + self.only_test
        return float(binomtest(self.only_reference, differ).pvalue) if differ else 1.0

    def agreement_statistic(self, share: float) -> float:
        """Wilson's z of the hypothesis that the share of equal answers is ``share``."""
        return _over_root(self.same - self.questions * share, self.questions * share * (1 - share))

    def drop_statistic(self, drop: float) -> float:
        """Tango's z of the hypothesis that the true drop is ``drop``: 0 at the one that was found, falling with it."""
        n, b, c = self.questions, self.only_reference, self.only_test
        # The likeliest share of questions that only the test has right, under the hypothesis (Tango 1998, eq. 8).
        linear, constant = (2 * n - b + c) * drop - b - c, -c * drop * (1 - drop)
        share = (math.sqrt(max(0.0, linear * linear - 8 * n * constant)) - linear) / (4 * n)
        return _over_root(b - c - n * drop, n * (2 * share + drop * (1 - drop)))

    def as_json(self) -> PairedFacts:
        """The figures as results hold them."""
        return {
            "questions": self.questions,
            "agreement": self.agreement,
            "agreement_interval": list(self.agreement_interval),
            "reference_accuracy": (self.both + self.only_reference) / self.questions,
            "test_accuracy": (self.both + self.only_test) / self.questions,
            "drop": self.drop,
            "drop_interval": list(self.drop_interval),
            "only_reference": self.only_reference,
            "only_test": self.only_test,
            "mcnemar_p": self.mcnemar_p,
        }


def enough(questions: int, statistic: float) -> int | None:
    """Return how many questions would decide if all shares stayed; None where the figure lies at its limit."""
    return math.ceil(questions * (Z / statistic) ** 2) if statistic else None


def _over_root(difference: float, variance: float) -> float:
    """Return ``difference`` in standard deviations; without variance the hypothesis is certain, or impossible."""
    if variance > 1e-15:
        return difference / math.sqrt(variance)
    return 0.0 if difference == 0 else math.copysign(_CERTAIN, difference)
