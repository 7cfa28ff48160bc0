from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moedge import MoEdgeError
from moedge.convert import calibration, domains, partition
from moedge.convert.domains import DomainText, Moments

NAMES = ["a", "b", "c", "d", "e", "f", "g", "h", "i"]


def block_matrix(labels: list[int], seed: int, *, noise: float) -> np.ndarray:
    """Perplexities 20 within a group and 40 across, columns scaled (texts differ in difficulty), noise on each."""
    generator = np.random.default_rng(seed)
    same = np.equal.outer(labels, labels)
    matrix = np.where(same, 20.0, 40.0) * generator.uniform(0.2, 5, len(labels))
    matrix *= np.exp(noise * generator.standard_normal(matrix.shape))
    return matrix * np.where(np.eye(len(labels), dtype=bool), 0.95, 1)


@pytest.mark.parametrize("method", ["average", "complete", "single"])
@pytest.mark.parametrize("seed", range(5))
def test_a_block_structured_matrix_gives_back_its_groups(method: Any, seed: int) -> None:
    labels = [0, 1, 0, 2, 1, 2, 2, 0, 1]
    found = domains.affinity(NAMES, block_matrix(labels, seed, noise=0.1), 3, method=method)
    assert found.groups == [["a", "c", "h"], ["b", "e", "i"], ["d", "f", "g"]]
    same = np.equal.outer(labels, labels)
    assert found.correlation[same].min() > found.correlation[~same].max()


def test_columns_are_divided_into_their_best_and_rows_correlated() -> None:
    matrix = np.array([[10.0, 30.0, 40.0], [20.0, 15.0, 80.0], [12.0, 60.0, 20.0]])
    found = domains.affinity(["x", "y", "z"], matrix, 2)
    expected = np.array([[1, 0.5, 0.5], [0.5, 1, 0.25], [10 / 12, 0.25, 1]])
    assert found.normalised == pytest.approx(expected)
    assert found.correlation == pytest.approx(np.corrcoef(expected))
    assert found.groups == [["x", "z"], ["y"]]  # r = 0.31 is the highest off the diagonal


def test_a_row_that_is_best_everywhere_correlates_with_nothing() -> None:
    found = domains.affinity(["x", "y", "z"], np.array([[1.0, 1, 1], [2, 1, 3], [2, 1, 4]]), 2)
    assert np.isfinite(found.correlation).all()
    assert found.correlation[0, 1:].tolist() == [0, 0]
    assert found.groups == [["x"], ["y", "z"]]


@pytest.mark.parametrize("value", [0.0, -1.0, np.inf, np.nan])
def test_a_matrix_that_is_none_is_refused(value: float) -> None:
    with pytest.raises(MoEdgeError, match="square, finite and positive"):
        domains.affinity(["x", "y"], np.array([[1, 2], [2, value]]), 2)
    with pytest.raises(MoEdgeError, match="2 domains cannot be put into 3 groups"):
        domains.affinity(["x", "y"], np.ones((2, 2)), 3)


def test_json_is_plain_and_draws(tmp_path: Path) -> None:
    from moedge.runtime.report import affinity as drawing

    found = domains.affinity(NAMES, block_matrix([0, 1, 0, 2, 1, 2, 2, 0, 1], 0, noise=0.1), 3)
    value = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert value["groups"] == found.groups
    assert np.array(value["perplexity"]) == pytest.approx(found.perplexity, rel=1e-5)
    assert sorted(value["dendrogram"]["order"]) == list(range(9))
    figure = drawing.draw(value)
    left, right = figure.axes
    assert len(left.lines) == 8  # a fork joins two; 9 leaves
    cells = {text.get_text() for text in right.texts}
    assert cells == {f"{p:.3g}" for p in found.perplexity.ravel()}
    assert sum(text.get_fontweight() == "bold" for text in right.texts) == 9
    # Leaves of one group stand side by side.
    order = [NAMES[i] for i in value["dendrogram"]["order"]]
    assert [label.get_text() for label in right.get_yticklabels()] == order
    blocks = [next(number for number, group in enumerate(found.groups) if name in group) for name in order]
    assert sum(a != b for a, b in itertools.pairwise(blocks)) == 2
    page = drawing.page(value, "a <title>")
    assert "a &lt;title&gt;" in page
    assert page.count("<svg") == 1
    assert "<script" not in page


def test_a_random_grouping_uses_every_domain_once_and_hangs_on_the_seed() -> None:
    found = domains.affinity(NAMES, block_matrix([0, 1, 0, 2, 1, 2, 2, 0, 1], 0, noise=0.1), 3)
    dealt = [domains.regrouped(found, 4, seed).groups for seed in range(4)]
    for groups in dealt:
        assert sorted(itertools.chain(*groups)) == NAMES
        assert sorted(map(len, groups)) == [2, 2, 2, 3]
    assert dealt[0] == domains.regrouped(found, 4, 0).groups
    assert any(dealt[0] != other for other in dealt[1:])


# --- FLAP -----------------------------------------------------------------------------------------------------------


def test_flap_is_exact_on_constant_activations_and_keeps_the_widest_score() -> None:
    generator = np.random.default_rng(0)
    down = generator.standard_normal((8, 24)).astype(np.float32)
    h = np.repeat(generator.standard_normal((1, 24)), 16, axis=0)
    h[:, [3, 5, 20]] += generator.standard_normal((16, 3))
    kept, bias = partition.flap(down, h.mean(axis=0), h.var(axis=0), 3)
    assert kept.tolist() == [3, 5, 20]
    assert h[:, kept] @ down[:, kept].T + bias == pytest.approx(h @ down.T, rel=1e-4, abs=1e-5)
    kept, bias = partition.flap(down, h.mean(axis=0), np.zeros(24), 3)
    assert kept.tolist() == [0, 1, 2]  # ties: exactly this many, the lower index first
    everything, bias = partition.flap(down, h.mean(axis=0), h.var(axis=0), 24)
    assert everything.tolist() == list(range(24))
    assert not bias.any()


def test_pooled_moments_are_those_of_all_tokens() -> None:
    generator = np.random.default_rng(0)
    sets = [generator.normal(mean, 1 + mean, (50, 6)) for mean in range(3)]
    pool = domains.pooled([Moments(h.mean(axis=0), h.var(axis=0)) for h in sets])
    whole = np.concatenate(sets)
    assert pool.mean == pytest.approx(whole.mean(axis=0))
    assert pool.variance == pytest.approx(whole.var(axis=0))


# --- texts ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def letters(tmp_path: Path) -> Callable[[str, int], Path]:
    """Return a function that writes a text of so many lines, each with its number."""

    def write(name: str, lines: int) -> Path:
        source = random.Random(0)
        rows = [f"{i:04d} " + "".join(source.choices("abcdef ", k=40)) for i in range(lines)]
        path = tmp_path / f"{name}.txt"
        path.write_text("\n".join(rows), encoding="utf-8")
        return path

    return write


def test_held_out_documents_stay_out_and_parts_do_not_meet(letters: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    path = letters("one", 200)
    entries = [{"name": "one.x", "spec": str(path), "every": 10}, {"name": "two", "spec": str(path), "every": 10}]
    options: dict[str, Any] = {"length": 46, "samples": 100, "score_samples": 30, "bos": False, "seed": 3}
    texts, facts = domains.read(tiny_tokenizer, entries, **options)
    held = {int(document.id) for document in calibration.split(calibration.read_text(str(path)), 10)[1].documents}
    found = {}
    for part in ("prune", "score"):
        rows = tiny_tokenizer.batch_decode(getattr(texts["one.x"], part))
        found[part] = {int(row[:4]) for row in rows}  # a line is exactly a window
        assert len(found[part]) == options["samples" if part == "prune" else "score_samples"]
    assert not found["prune"] & found["score"]
    assert not (found["prune"] | found["score"]) & held
    assert [fact["name"] for fact in facts] == ["one.x", "two"]
    assert facts[0]["tokens"] == 46 * 100
    again, _ = domains.read(tiny_tokenizer, entries, **options)
    np.testing.assert_array_equal(again["one.x"].prune, texts["one.x"].prune)
    domains.save(texts, tmp_path / "domains.safetensors")
    loaded = domains.load(tmp_path / "domains.safetensors")
    assert list(loaded) == ["one.x", "two"]
    np.testing.assert_array_equal(loaded["two"].score, texts["two"].score)
    with pytest.raises(MoEdgeError, match="missing or damaged"):
        domains.load(tmp_path / "nothing")


def test_a_short_domain_is_named(letters: Any, tiny_tokenizer: Any) -> None:
    entries = [{"name": "poems", "spec": str(letters("one", 20)), "every": 10}]
    with pytest.raises(MoEdgeError, match="domain text 'poems' has"):
        domains.read(tiny_tokenizer, entries, length=64, samples=100, score_samples=1, bos=False, seed=0)


def test_training_and_held_out_windows_are_of_different_documents(tiny_tokenizer: Any, tmp_path: Path) -> None:
    for name in ("one", "two"):
        lines = [f"{i:04d} {name} " + "x" * 38 for i in range(40 if name == "one" else 400)]
        (tmp_path / f"{name}.txt").write_text("\n".join(lines), encoding="utf-8")
    entries = [{"name": name, "spec": str(tmp_path / f"{name}.txt"), "every": 10} for name in ("one", "two")]
    train, held = domains.training_windows(tiny_tokenizer, entries, length=48, count=200, seed=0)
    texts = tiny_tokenizer.batch_decode(train)
    assert sum(" one " in text for text in texts) == 36  # all it has
    assert sum(" two " in text for text in texts) == 100
    numbers = {name: {int(t[:4]) for t in tiny_tokenizer.batch_decode(held[name])} for name in held}
    assert {name: len(found) for name, found in numbers.items()} == {"one": 4, "two": 8}
    assert all(number % 10 == 0 for found in numbers.values() for number in found)
    assert not any(int(text[:4]) % 10 == 0 for text in texts)
    with pytest.raises(MoEdgeError, match="'one' is shorter than one window"):
        domains.training_windows(tiny_tokenizer, entries, length=400, count=2, seed=0)


# --- mining ---------------------------------------------------------------------------------------------------------


def test_perplexities_are_those_of_the_pruned_models(tiny_llama: Callable[..., Any]) -> None:
    from moedge.convert import modeling, scoring

    generator = np.random.default_rng(0)
    texts = {name: DomainText(*generator.integers(low, low + 60, (2, 3, 20))) for name, low in (("x", 0), ("y", 100))}
    model = tiny_llama()
    plans = [domains.pruned(model, domains.moments(model, text.prune), 32) for text in texts.values()]
    steps: list[tuple[int, int]] = []
    matrix, dense = domains.perplexities(model, plans, texts, progress=lambda *step: steps.append(step))
    assert steps[-1] == (18, 18)
    for j, text in enumerate(texts.values()):
        assert dense[j] == pytest.approx(scoring.perplexity(tiny_llama(), text.score)["ppl"], rel=1e-5)
        for i, plan in enumerate(plans):
            moe = modeling.apply(plan, tiny_llama())
            assert matrix[i, j] == pytest.approx(scoring.perplexity(moe, text.score)["ppl"], rel=1e-5)
    assert len({plan.sha256 for plan in plans}) == 2
