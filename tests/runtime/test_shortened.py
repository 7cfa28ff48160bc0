"""Kept logits tell what all logits tell, up to what they say they hide."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from moedge.runtime.parity import shortened
from moedge.runtime.parity.metrics import TokenErrors

TOKENS, VOCAB = 40, 3000
GENERATOR = np.random.default_rng(0)
LOGITS = GENERATOR.normal(0, 3, (TOKENS, VOCAB)).astype(np.float32)
TARGETS = np.append(GENERATOR.integers(0, VOCAB, TOKENS - 1), -1)


def both(test: np.ndarray, largest: int, reference: np.ndarray = LOGITS) -> tuple[dict[str, Any], dict[str, Any], Any]:
    """The summary from all logits, that from the kept ones, and what may be hidden."""
    whole, part = TokenErrors(0.01, 50), TokenErrors(0.01, 50)
    whole.add(reference, test, TARGETS, at=(3, 5))
    hidden = shortened.add(part, shortened.shortened(reference, TARGETS, largest), test, TARGETS, at=(3, 5))
    assert whole.tokens == part.tokens
    assert whole.broken == part.broken
    for name in ("window", "position"):
        np.testing.assert_array_equal(np.concatenate(whole.columns[name]), np.concatenate(part.columns[name]))
    return dict(whole.summary()), dict(part.summary()), (hidden, whole.columns, part.columns)


def noisy(size: float) -> np.ndarray:
    return (LOGITS + np.random.default_rng(1).normal(0, size, LOGITS.shape)).astype(np.float32)


@pytest.mark.parametrize("size", [1e-5, 1e-2, 0.5])
@pytest.mark.parametrize("largest", [16, 256, VOCAB])
def test_kl_lies_between_what_is_known_and_what_may_be_hidden(size: float, largest: int) -> None:
    whole, part, (hidden, true, kept) = both(noisy(size), largest)
    for column in ("kl", "kl_back"):
        a, b = np.concatenate(true[column]), np.concatenate(kept[column])
        assert (b >= a * (1 - 1e-6) - 1e-14).all(), "it must not flatter"
    a, b = np.concatenate(true["kl"]), np.concatenate(kept["kl"])
    assert (b - hidden[:, 1] <= a * (1 + 1e-6) + 1e-14).all(), "what is known is a lower bound"
    assert (hidden[:, 0] > 0).all() == (largest < VOCAB)
    if largest == VOCAB:
        assert part["kl_ref_test"]["mean"] == pytest.approx(whole["kl_ref_test"]["mean"], rel=1e-5, abs=1e-15)
        assert hidden[:, 1].max() == 0


@pytest.mark.parametrize("size", [0.0, 1e-3, 1.0])
def test_best_tokens_gaps_and_perplexity_are_exact(size: float) -> None:
    whole, part, _ = both(noisy(size), 64)
    for figure in ("top1", "top5", "non_finite", "constant"):
        assert part[figure] == whole[figure]
    for name, value in whole["perplexity"].items():
        assert part["perplexity"][name] == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize("size", [1e-5, 1e-2, 0.5])
def test_errors_of_the_whole_vocabulary_are_estimated(size: float) -> None:
    whole, part, _ = both(noisy(size), 64)
    # The largest of 3,000 normal numbers from the largest of 256 sums of some 12 of them; over 40 tokens within 5 %.
    assert part["rel_error"]["mean"] == pytest.approx(whole["rel_error"]["mean"], rel=0.05)
    # A sum of 256 squares has a relative deviation of sqrt(2 / 256) = 9 %; the worst of 40 tokens within 4 of them.
    assert 1 - part["cosine"]["min"] == pytest.approx(1 - whole["cosine"]["min"], rel=0.36)


def test_two_exchanged_rows_of_a_head_stand_out_though_no_kept_logit_is_off() -> None:
    rare = np.argsort(LOGITS.max(0))[:200]  # among the largest 16 of no token
    kept = shortened.shortened(LOGITS, TARGETS, 16)
    one, two = [token for token in rare if token not in kept.tokens][:2]
    swapped = LOGITS.copy()
    swapped[:, [one, two]] = swapped[:, [two, one]]
    whole, part, _ = both(swapped, 16)
    assert whole["kl_ref_test"]["mean"] < 1e-3  # nobody would see it in the probabilities
    clean = both(noisy(1e-5), 16)[1]
    assert part["rel_error"]["p50"] > 1000 * clean["rel_error"]["p50"]


def test_rows_that_are_no_numbers_or_flat_are_counted() -> None:
    test = LOGITS.copy()
    test[3, 5], test[7] = np.nan, 0.0
    broken = LOGITS.copy()
    broken[11, 2] = np.inf
    whole, part, (hidden, _, _) = both(test, 64, broken)
    assert (part["non_finite"], part["constant"]) == (whole["non_finite"], whole["constant"]) == (2, 1)
    assert len(hidden) == TOKENS - 2


def test_a_sketch_is_the_same_on_every_machine() -> None:
    values = np.arange(600, dtype=np.float64)[None]
    found = shortened.sketch(values)
    assert found.shape == (1, shortened.BUCKETS)
    np.testing.assert_array_equal(found[0, :3], FIRST_SUMS)
    np.testing.assert_allclose(shortened.sketch(2 * values), 2 * found)


FIRST_SUMS = [87.0, 514.0, -520.0]
