"""Agreement and drop of accuracy with their intervals: definitions, known cases, and how many questions decide."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import optimize, stats

from moedge import MoEdgeError
from moedge.convert.tasks import Answers
from moedge.runtime.accuracy.paired import Paired, Z, enough


def answers(chosen: list[int], right: list[int], asked: str = "q") -> Answers:
    return Answers("acc", tuple(chosen), np.array(right, dtype=bool), asked)


def table(questions: int, only_reference: int, only_test: int, same: int | None = None) -> Paired:
    both = (questions - only_reference - only_test) // 2
    return Paired(questions, questions - only_reference - only_test if same is None else same, only_reference,
                  only_test, both)  # fmt: skip


def test_answers_are_counted_question_by_question() -> None:
    # Two wrong answers that differ agree in nothing, though accuracy does not see it (fourth question).
    one, two = answers([0, 1, 2, 3, 0], [1, 1, 0, 0, 0]), answers([0, 2, 1, 2, 0], [1, 0, 1, 0, 0])
    found = Paired.of(one, two)
    assert found == Paired(questions=5, same=2, only_reference=1, only_test=1, both=1)
    facts = found.as_json()
    assert facts["agreement"] == pytest.approx(2 / 5)
    assert facts["reference_accuracy"] == facts["test_accuracy"] == pytest.approx(2 / 5)
    assert facts["drop"] == 0


def test_answers_to_other_questions_are_not_compared() -> None:
    with pytest.raises(MoEdgeError, match="different questions"):
        Paired.of(answers([0], [1]), answers([0], [1], asked="other"))


def test_tasks_add_up() -> None:
    parts = [table(10, 2, 1), table(30, 0, 4)]
    assert Paired.over(parts) == Paired(40, 33, 2, 5, parts[0].both + parts[1].both)


def test_without_a_difference_the_interval_is_as_wide_as_the_questions_are_few() -> None:
    # Tango's interval of b = c = 0 is +-z^2 / (n + z^2); a bootstrap of the questions would say [0, 0].
    for n in (8, 380, 2000):
        low, high = table(n, 0, 0).drop_interval
        assert high == pytest.approx(Z * Z / (n + Z * Z), rel=1e-6)
        assert low == pytest.approx(-high, rel=1e-6)


@pytest.mark.parametrize(("b", "c"), [(12, 5), (3, 0), (0, 3), (40, 41)])
def test_at_a_drop_of_zero_the_statistic_is_mcnemars(b: int, c: int) -> None:
    assert table(100, b, c).drop_statistic(0.0) == pytest.approx((b - c) / math.sqrt(b + c))
    assert table(100, b, c).mcnemar_p == pytest.approx(stats.binomtest(b, b + c).pvalue)


@pytest.mark.parametrize(("b", "c"), [(12, 5), (3, 0), (0, 7), (1, 1)])
@pytest.mark.parametrize("drop", [-0.2, -0.03, 0.05, 0.3])
def test_the_statistic_has_the_likeliest_share_under_the_hypothesis(b: int, c: int, drop: float) -> None:
    """The closed form beside a numerical search of the multinomial likelihood."""
    n, found = 100, table(100, b, c)

    def unlikely(share: float) -> float:  # share: only the test has it right
        counts = ((b, share + drop), (c, share), (n - b - c, 1 - 2 * share - drop))
        return -sum(count * math.log(max(value, 1e-300)) for count, value in counts if count)

    low, high = max(0.0, -drop), (1 - drop) / 2
    share = optimize.minimize_scalar(unlikely, bounds=(low, high), method="bounded", options={"xatol": 1e-12}).x
    want = (b - c - n * drop) / math.sqrt(n * (2 * share + drop - drop * drop))
    assert found.drop_statistic(drop) == pytest.approx(want, rel=1e-3)


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    """Questions drawn with known shares: 95 % of the intervals hold the drop, within what 2,000 drawings can show."""
    generator, n, shares = np.random.default_rng(0), 200, (0.06, 0.03, 0.91)
    held = 0
    for b, c, _ in generator.multinomial(n, shares, 2000):
        one = table(n, int(b), int(c))
        held += abs(one.drop_statistic(shares[0] - shares[1])) <= Z
    # Standard error of a share of 0.95 in 2,000 drawings: 0.005; three of them.
    assert abs(held / 2000 - 0.95) < 0.015


@pytest.mark.parametrize(("b", "c"), [(0, 0), (5, 2), (0, 9), (100, 0), (0, 100)])
def test_the_intervals_hold_what_was_found_and_end_where_the_statistic_says(b: int, c: int) -> None:
    found = table(100, b, c)
    low, high = found.drop_interval
    assert -1 <= low <= found.drop <= high <= 1
    for end, z in ((low, Z), (high, -Z)):
        if abs(end) < 1:
            assert found.drop_statistic(end) == pytest.approx(z, abs=1e-6)
    low, high = found.agreement_interval
    assert 0 <= low <= found.agreement <= high <= 1


@pytest.mark.parametrize("limit", [0.01, 0.05])
@pytest.mark.parametrize(("b", "c"), [(0, 0), (4, 1), (9, 4)])
def test_as_many_questions_as_are_said_decide_and_no_fewer(b: int, c: int, limit: float) -> None:
    n = 200
    count = enough(n, table(n, b, c).drop_statistic(limit))
    assert count is not None

    def statistic(questions: int) -> float:
        scale = questions / n
        whole = Paired(questions, 0, b * scale, c * scale, 0)  # type: ignore[arg-type]  # the same shares
        return abs(whole.drop_statistic(limit))

    assert statistic(count) >= Z > statistic(count - 1)


def test_a_figure_at_its_limit_is_never_decided() -> None:
    assert enough(200, table(200, 4, 2).drop_statistic(0.01)) is None


def test_agreement_is_decided_by_wilsons_interval() -> None:
    found = Paired(questions=400, same=398, only_reference=1, only_test=0, both=300)
    low, high = found.agreement_interval
    for end, z in ((low, Z), (high, -Z)):
        assert found.agreement_statistic(end) == pytest.approx(z, abs=1e-6)
    # All of 188 questions alike do not show a share of 0.98 yet, 189 do: z^2 * 0.98 / 0.02.
    assert enough(100, table(100, 0, 0).agreement_statistic(0.98)) == math.ceil(Z * Z * 0.98 / 0.02) == 189
