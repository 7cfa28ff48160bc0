"""Log-likelihoods by engines are those of a plain forward pass, however texts are batched, shared and cut."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import special

from moedge import MoEdgeError
from moedge.runtime.accuracy import likelihood
from moedge.runtime.engines import BranchingEngine, Engine, Step, open_engine

# Logits agree to 2e-5 (tests/runtime/test_engines.py); a sum over 6 tokens of a log-probability has that 12 times.
ATOL = 2.5e-4
KINDS = ["concat", "shared_buffer"]
GENERATOR = np.random.default_rng(7)


def ids(length: int) -> tuple[int, ...]:
    return tuple(int(token) for token in GENERATOR.integers(0, 256, length))


CONTEXTS = [ids(length) for length in (9, 9, 12, 3, 1, 7, 30, 49, 50, 49)]
SHARED = ids(4)
PAIRS = [(context, ids(length)) for context in CONTEXTS for length in (1, 3, 6)]
PAIRS += [(CONTEXTS[0], (*SHARED, 5)), (CONTEXTS[0], (*SHARED, 6)), (CONTEXTS[2], ids(2))]


def by_hand(reference: Any, pairs: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> list[tuple[float, bool]]:
    found = []
    for context, continuation in pairs:
        logits = reference([*context, *continuation])[0]
        places = range(len(context) - 1, len(context) + len(continuation) - 1)
        logp = special.log_softmax(logits, axis=-1)
        total = sum(logp[at, token] for at, token in zip(places, continuation, strict=True))
        found.append((float(total), all(logits[at].argmax() == t for at, t in zip(places, continuation, strict=True))))
    return found


def check(found: list[tuple[float, bool]], want: list[tuple[float, bool]]) -> None:
    np.testing.assert_allclose([value for value, _ in found], [value for value, _ in want], atol=ATOL)
    assert [best for _, best in found] == [best for _, best in want]


class Plain:
    """An engine that cannot branch, and counts what it is fed."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.info, self.calls = engine, engine.info, list[tuple[int, ...]]()

    def prefill(self, ids: np.ndarray, attention_mask: np.ndarray | None = None) -> Step:
        assert attention_mask is None
        self.calls.append(ids.shape)
        return self.engine.prefill(ids)

    def decode(self, ids: np.ndarray, cache: Any) -> Step:
        raise AssertionError("nothing is decoded")

    def close(self) -> None:
        self.engine.close()


class Counting(Plain):
    """The same of one that can branch."""

    branch_rows: int | None = None

    def read(self, ids: np.ndarray) -> Any:
        self.calls.append(ids.shape)
        return self.engine.read(ids)  # type: ignore[attr-defined]

    def branch(self, ids: np.ndarray, cache: Any) -> Step:
        self.calls.append(ids.shape)
        step: Step = self.engine.branch(ids, cache)  # type: ignore[attr-defined]
        return step


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_equal_to_the_definition(kind: str, batch_size: int, toy_bundles: dict[str, Path], reference: Any) -> None:
    engine, seen = open_engine(toy_bundles[kind], threads=1), list[tuple[int, int]]()
    assert isinstance(engine, BranchingEngine)
    found = likelihood.log_likelihoods(
        engine, PAIRS, batch_size=batch_size, progress=lambda done, total: seen.append((done, total))
    )
    check(found, by_hand(reference, PAIRS))
    assert seen[-1] == (len(PAIRS), len(PAIRS))
    assert seen == sorted(seen)


def test_greedy_continuations_are_known(toy_bundles: dict[str, Path], reference: Any) -> None:
    greedy = list(CONTEXTS[0])
    for _ in range(3):
        greedy.append(int(reference(greedy)[0][-1].argmax()))
    made = tuple(greedy[len(CONTEXTS[0]) :])
    pairs = [(CONTEXTS[0], made), (CONTEXTS[0], (*made[:-1], (made[-1] + 1) % 256))]
    found = likelihood.log_likelihoods(open_engine(toy_bundles["concat"], threads=1), pairs)
    assert [best for _, best in found] == [True, False]


def test_an_engine_that_cannot_branch_gives_the_same(toy_bundles: dict[str, Path], reference: Any) -> None:
    plain = Plain(open_engine(toy_bundles["concat"], threads=1))
    check(likelihood.log_likelihoods(plain, PAIRS, batch_size=4), by_hand(reference, PAIRS))


def test_a_context_is_read_once_for_its_continuations(toy_bundles: dict[str, Path]) -> None:
    engine = Counting(open_engine(toy_bundles["shared_buffer"], threads=1))
    context = ids(30)
    likelihood.log_likelihoods(engine, [(context, ids(3)) for _ in range(4)])
    assert engine.calls == [(1, 29), *[(1, 3)] * 4]
    engine.calls.clear()
    likelihood.log_likelihoods(engine, [(context, (token,)) for token in range(5)])
    assert engine.calls == [(1, 30)], "continuations of one token need no pass of their own"


@pytest.mark.parametrize("kind", KINDS)
def test_a_branch_leaves_its_cache_as_it_was(kind: str, toy_bundles: dict[str, Path], reference: Any) -> None:
    engine = open_engine(toy_bundles[kind], threads=1)
    assert isinstance(engine, BranchingEngine)
    rows = 2 if engine.branch_rows is None else engine.branch_rows
    text = np.array([CONTEXTS[0], CONTEXTS[1]][-rows:])
    for cache in (engine.read(text), engine.prefill(text).cache):
        # The long one first, so that its keys lie behind those of the short one.
        for length in (6, 2, 4):
            more = GENERATOR.integers(0, 256, (rows, length))
            step = engine.branch(more, cache)
            assert step.cache is None
            for row in range(rows):
                want = reference([*text[row], *more[row]])[0][9:]
                np.testing.assert_allclose(step.logits[row], want, atol=2e-5)
        step = engine.decode(np.array([[1], [2]][-rows:]), cache)  # type: ignore[attr-defined]
        np.testing.assert_allclose(step.logits[-1, -1], reference([*text[-1], 2])[0][-1], atol=2e-5)
        with pytest.raises(MoEdgeError, match="used before"):
            engine.branch(np.array([[1], [2]][-rows:]), cache)


def test_pytorch_branches_and_scores_alike(checkpoints: dict[str, Path]) -> None:
    engine = open_engine(checkpoints["moe"])
    found = likelihood.log_likelihoods(engine, PAIRS, batch_size=4)
    check(found, likelihood.log_likelihoods(Plain(engine), PAIRS, batch_size=1))
    cache = engine.read(np.array([CONTEXTS[0]]))  # type: ignore[attr-defined]
    for token in (1, 2):
        step = engine.branch(np.array([[token]]), cache)  # type: ignore[attr-defined]
        want = engine.prefill(np.array([[*CONTEXTS[0], token]])).logits[:, -1:]
        np.testing.assert_allclose(step.logits, want, atol=2e-5)
    engine.decode(np.array([[3]]), cache)
    with pytest.raises(MoEdgeError, match="used before"):
        engine.branch(np.array([[1]]), cache)


def test_a_text_that_does_not_fit_is_cut_on_the_left(toy_bundles: dict[str, Path], reference: Any) -> None:
    engine = open_engine(toy_bundles["concat"], threads=1, max_length=16)
    context, ends = ids(20), [ids(4), ids(9)]
    found = likelihood.log_likelihoods(engine, [(context, end) for end in ends])
    # The last token is not fed: 16 of 17 tokens are.
    want = by_hand(reference, [((*context, *end)[-17 : -len(end)], end) for end in ends])
    check(found, want)
    with pytest.raises(MoEdgeError, match="17 tokens, more than the 16"):
        likelihood.log_likelihoods(engine, [(context, ids(17))])


def test_rows_beyond_longropes_boundary_are_read_alone(toy_bundles: dict[str, Path]) -> None:
    engine = Counting(open_engine(toy_bundles["concat"], threads=1))
    engine.info = replace(engine.info, model=engine.info.model.model_copy(update={"rope_boundary": 10}))
    likelihood.log_likelihoods(engine, [(ids(4), ids(2)), (ids(4), ids(2)), (ids(12), ids(2)), (ids(13), ids(2))])
    assert [shape[0] for shape in engine.calls] == [1, 1, 2]
    engine.calls.clear()
    context = ids(40)  # would be shared
    likelihood.log_likelihoods(engine, [(context, ids(3)) for _ in range(3)])
    assert engine.calls == [(1, 42)] * 3


def test_contexts_of_other_lengths_are_not_read_together(toy_bundles: dict[str, Path]) -> None:
    engine = Counting(open_engine(toy_bundles["concat"], threads=1))
    pairs = [(context, ids(3)) for context in (ids(50), ids(49), ids(44)) for _ in range(2)]
    likelihood.log_likelihoods(engine, pairs)
    assert engine.calls == [(2, 48), (2, 4), (2, 4), (1, 43), (1, 3), (1, 3)]


def test_a_short_context_is_read_again_with_each_of_its_continuations(toy_bundles: dict[str, Path]) -> None:
    """One pass of more tokens costs less than several of few."""
    engine = Counting(open_engine(toy_bundles["concat"], threads=1))
    context = ids(8)
    likelihood.log_likelihoods(engine, [(context, ids(length)) for length in (3, 5)])
    assert engine.calls == [(2, 12)]


def test_no_more_rows_than_the_engine_takes(toy_bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Plain(open_engine(toy_bundles["concat"], threads=1))
    pairs = [(ids(4), ids(2)) for _ in range(6)]
    engine.info = replace(engine.info, max_batch=2)
    likelihood.log_likelihoods(engine, pairs)
    assert {shape[0] for shape in engine.calls} == {2}
    engine.info = replace(engine.info, max_batch=None)
    engine.calls.clear()
    monkeypatch.setattr(likelihood, "CPU_LOGITS_BYTES", 3 * 5 * engine.info.model.vocab_size * 4)
    likelihood.log_likelihoods(engine, pairs)
    assert {shape[0] for shape in engine.calls} == {3}


@pytest.mark.parametrize("pair", [((), (1,)), ((1,), ())])
def test_nothing_is_predicted_of_nothing(pair: Any, toy_bundles: dict[str, Path]) -> None:
    with pytest.raises(MoEdgeError, match="must have a token"):
        likelihood.log_likelihoods(open_engine(toy_bundles["concat"], threads=1), [pair])


def test_logits_that_are_no_numbers_are_refused(toy_bundles: dict[str, Path]) -> None:
    class Broken(Plain):
        def prefill(self, ids: np.ndarray, attention_mask: np.ndarray | None = None) -> Step:
            step = super().prefill(ids)
            step.logits[0, 0, 0] = np.nan
            return step

    engine = Broken(open_engine(toy_bundles["concat"], threads=1))
    with pytest.raises(MoEdgeError, match="NaN or infinite"):
        likelihood.log_likelihoods(engine, [((3,), (4, 5))])
    with pytest.raises(MoEdgeError, match="NaN or infinite"):
        likelihood.perplexity(engine, np.array([[1, 2, 3]]))


@pytest.mark.parametrize("target", ["ort-cpu", "portable"])
def test_perplexity_is_that_of_the_checkpoint(
    target: str, bundles: dict[str, Path], checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from moedge.convert import scoring

    windows = np.random.default_rng(5).integers(0, 256, (5, 24))
    want = scoring.perplexity(open_engine(checkpoints["moe"]).module, windows)  # type: ignore[attr-defined]
    engine = open_engine(bundles[f"moe/{target}"])
    for size in (1, 2, 8):
        found = likelihood.perplexity(engine, windows, batch_size=size)
        assert found["tokens"] == want["tokens"]
        # Float32 in another order of summation, see configs/tolerances.yaml: a token's log-likelihood moves by 1.4e-3.
        assert found["nll"] == pytest.approx(want["nll"], abs=1e-4)
    monkeypatch.setattr(likelihood, "CPU_LOGITS_BYTES", 1)
    assert likelihood.perplexity(engine, windows)["nll"] == pytest.approx(want["nll"], abs=1e-4)
