"""An engine reads a text alike in every shape, or the check of that shape fails and no other one has to be looked at.

Each planted fault is one that engines have: padding that attention sees, positions that count it, a cache that is
appended one place off, a rotary table that ends too early, kernels that add in another order each time.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from moedge import MoEdgeError
from moedge.configs import tolerances
from moedge.export import bundle
from moedge.runtime.engines import Step, open_engine, ort
from moedge.runtime.engines.info import EngineInfo, EngineModel
from moedge.runtime.engines.ort_session import ort_value
from moedge.runtime.parity import readings, shapes
from moedge.runtime.parity.shape_cases import Between, Case
from moedge.runtime.parity.suite import verify_run
from moedge.runtime.parity.verdict import Outcome, entry_outcome, part_outcome, run_outcome
from moedge.runtime.run.refs import TORCH_DENSE, TORCH_MOE, EngineRef

KINDS = ["concat", "shared_buffer"]
WINDOWS = np.random.default_rng(2).integers(0, 256, (4, 50))
LONG = np.random.default_rng(3).integers(0, 256, 64)
LIMITS = tolerances.load().profile("float32", "ort-cpu")
SHORT = {
    "determinism",
    *("batch.equal", "batch.padding.prefill", "batch.padding.decode", "batch.chunked", "prefill.chunked"),
}
OF_LENGTH = {"length.64.decode", "length.64.chunked", "length.64.reference"}


@pytest.fixture(autouse=True)
def _short_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "LONG_PIECE", 17)


def found(engine: Any, reference: Any = None, **options: Any) -> dict[str, Any]:
    rules = shapes.Rules(LIMITS, LIMITS, reference, **options)
    asked = shapes.Asked(long=None if reference is None else LONG)
    entry: Any = shapes.check(engine, WINDOWS, asked, rules)
    json.dumps(entry, allow_nan=False)
    return entry


def parts(entry: dict[str, Any], outcome: Outcome) -> set[str]:
    return {name for name in entry["verdict"]["parts"] if part_outcome(entry, name) is outcome}


def failed(entry: dict[str, Any]) -> set[str]:
    return parts(entry, Outcome.FAILED)


class Wrapped:
    """An engine whose calls pass through functions that may spoil them."""

    def __init__(
        self,
        engine: Any,
        *,
        logits: Callable[[np.ndarray], np.ndarray] | None = None,
        appended: Callable[[list[np.ndarray], int], list[np.ndarray]] | None = None,
        **facts: Any,
    ) -> None:
        self._engine, self._logits, self._appended = engine, logits, appended
        self.info = replace(engine.info, **facts)
        self.calls: list[tuple[int, ...]] = []

    def _spoiled(self, step: Step) -> Step:
        self.calls.append(step.logits.shape[:2])
        return replace(step, logits=self._logits(step.logits)) if self._logits else step

    def prefill(self, ids: np.ndarray, attention_mask: np.ndarray | None = None) -> Step:
        return self._spoiled(self._engine.prefill(ids, attention_mask))

    def decode(self, ids: np.ndarray, cache: Any) -> Step:
        step = self._engine.decode(ids, cache)
        if self._appended:
            arrays = self._appended([value.numpy().copy() for value in step.cache.values], ids.shape[1])
            step.cache.values = [ort_value(array) for array in arrays]
        return self._spoiled(step)

    def close(self) -> None:
        self._engine.close()


def edited(folder: Path, out: Path, edit: Callable[[onnx.GraphProto], None]) -> Any:
    """Open the bundle with another graph."""
    shutil.copytree(folder, out)
    manifest = bundle.open_bundle(out).manifest
    model = onnx.load(out / "model.onnx")
    before = model.SerializeToString()
    edit(model.graph)
    assert model.SerializeToString() != before
    for name in ("model.onnx.data", bundle.MANIFEST):
        (out / name).unlink()
    onnx.save(model, out / "model.onnx")
    bundle.seal(out, manifest)
    return open_engine(out, threads=1)


def reading(graph: onnx.GraphProto, old: str, new: str, nodes: list[onnx.NodeProto]) -> None:
    """Let every node read ``new`` instead of ``old``; ``nodes`` make it."""
    for node in graph.node:
        for index, name in enumerate(node.input):
            if name == old:
                node.input[index] = new
    for node in reversed(nodes):
        graph.node.insert(0, node)


def ignoring_the_mask(graph: onnx.GraphProto) -> None:
    one = numpy_helper.from_array(np.ones(1, np.int64))
    made = [
        helper.make_node("Shape", ["attention_mask"], ["mask_shape"]),
        helper.make_node("ConstantOfShape", ["mask_shape"], ["all_seen"], value=one),
    ]
    reading(graph, "attention_mask", "all_seen", made)


def ending_at(position: int) -> Callable[[onnx.GraphProto], None]:
    def edit(graph: onnx.GraphProto) -> None:
        last = helper.make_node("Constant", [], ["last_place"], value_int=position - 1)
        reading(
            graph, "position_ids", "places", [last, helper.make_node("Min", ["position_ids", "last_place"], ["places"])]
        )

    return edit


# --- engines that are right ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_right_engine_passes_every_check(kind: str, toy_bundles: dict[str, Path]) -> None:
    engine = open_engine(toy_bundles[kind], threads=1, taps=True)
    entry = found(engine, open_engine(toy_bundles["concat"], threads=1, taps=True))
    assert set(entry["verdict"]["parts"]) == SHORT | OF_LENGTH | {"alone.reference"}
    assert entry_outcome(entry) is Outcome.PASSED
    assert not entry["not_run"]
    assert not entry["verdict"]["notes"]
    tokens = {name: case["tokens"] for name, case in entry["cases"].items()}
    (one, two, three), after = entry["prompts"], sum(readings.AFTER)
    assert (two, three) == (12, 1)
    assert tokens["batch.equal"] == 2 * (two + 2)
    assert tokens["batch.padding.prefill"] == one + two + three
    assert (tokens["batch.padding.decode"], tokens["batch.chunked"]) == (6, 9)
    assert tokens["prefill.chunked"] == one + after
    assert (tokens["length.64.decode"], tokens["length.64.chunked"]) == (shapes.LONG_STEPS, 64)
    assert all(case["excused"] == case["replayed"] == 0 for case in entry["cases"].values())


def test_the_thorough_plan_reads_larger_batches(toy_bundles: dict[str, Path]) -> None:
    engine = Wrapped(open_engine(toy_bundles["concat"], threads=1))
    entry: Any = shapes.check(engine, WINDOWS, shapes.Asked(thorough=True), shapes.Rules(LIMITS, LIMITS))
    assert entry_outcome(entry) is Outcome.PASSED
    assert len(entry["prompts"]) == 5
    assert (5, entry["prompts"][0]) in engine.calls


@pytest.mark.parametrize("longest", [readings.SHORTEST, 13, 26, 100, 1000])
@pytest.mark.parametrize("thorough", [False, True])
def test_every_plan_fits_and_reads_whole_texts(longest: int, thorough: bool) -> None:
    plan = readings.Plan.of(longest, thorough=thorough)
    assert plan.length <= longest
    assert sum(plan.pieces) == plan.length
    assert min(plan.pieces) >= 1
    assert list(plan.prompts) == sorted(plan.prompts, reverse=True)
    assert plan.prompts[-1] == 1
    assert len(set(plan.pieces)) > 1


def test_a_row_is_itself_and_not_another_text(toy_bundles: dict[str, Path], reference: Any) -> None:
    """What counts as right is right: a text read at once, by the toy in float64; and padding is no token of a row."""
    engine = open_engine(toy_bundles["concat"], threads=1, taps=True)
    rows = readings.texts(WINDOWS, 3, 20)
    assert len({row.tobytes() for row in rows}) == 3
    calls = readings.in_calls(engine, rows, (12, 5, 1), (1, 3))
    for row, prompt in enumerate((12, 5, 1)):
        step = readings.of_row(calls, row)
        logits, routes = reference(rows[row][: prompt + 4])
        np.testing.assert_allclose(step.logits[0], logits, atol=2e-5)
        np.testing.assert_array_equal(step.routes[0], routes)


# --- planted faults --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_attention_that_sees_padding_is_found(kind: str, toy_bundles: dict[str, Path], tmp_path: Path) -> None:
    entry = found(edited(toy_bundles[kind], tmp_path / "x", ignoring_the_mask))
    assert failed(entry) == {"batch.padding.prefill", "batch.padding.decode", "batch.chunked"}
    (first, *_) = entry["verdict"]["notes"]
    assert first.startswith("batch.padding.prefill: padding is seen")
    assert "of row 2" in first or "of row 3" in first  # the longest row has none
    assert entry["cases"]["batch.padding.prefill"]["worst"]["row"] in (1, 2)


@pytest.mark.parametrize(
    ("wrong", "want"),
    [
        ("prefill", {"batch.padding.prefill", "batch.padding.decode", "batch.chunked"}),
        ("decode", {"batch.padding.decode", "batch.chunked"}),
    ],
)
def test_positions_that_count_padding_are_found(
    wrong: str, want: set[str], toy_bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = ort.position_ids

    def counted(mask: np.ndarray, last: int) -> np.ndarray:
        in_prefill = last == mask.shape[1]
        return right(np.ones_like(mask) if in_prefill == (wrong == "prefill") else mask, last)

    monkeypatch.setattr(ort, "position_ids", counted)
    assert failed(found(open_engine(toy_bundles["concat"], threads=1))) == want


def test_a_cache_that_is_appended_one_place_off_is_found(toy_bundles: dict[str, Path]) -> None:
    """Only where several tokens come at once on a cache, as in the second piece of a prompt."""

    def off(arrays: list[np.ndarray], new: int) -> list[np.ndarray]:
        if new > 1:
            for array in arrays:  # over the last token of the cache; what is at the end then stands there twice
                array[:, :, -new - 1 : -1] = array[:, :, -new:].copy()
        return arrays

    entry = found(Wrapped(open_engine(toy_bundles["concat"], threads=1), appended=off))
    assert failed(entry) == {"prefill.chunked"}
    assert "several calls" in entry["verdict"]["notes"][0]
    # The wrong keys are read from the third piece on.
    first, second = readings.Plan.of(26, thorough=False).pieces[:2]
    assert entry["cases"]["prefill.chunked"]["worst"]["position"] >= first + second


def test_pieces_that_see_their_own_future_are_found(toy_bundles: dict[str, Path], tmp_path: Path) -> None:
    def edit(graph: onnx.GraphProto) -> None:
        """Count rows from the last token of a call: right where a call has one."""
        made = [
            helper.make_node("Constant", [], ["one_more"], value_int=1),
            helper.make_node("Sub", ["total", "one_more"], ["from_the_end"]),
        ]
        (at,) = (index for index, node in enumerate(graph.node) if "total" in node.output)
        (rows,) = (node for node in graph.node if "rows" in node.output)
        for offset, node in enumerate(made):
            graph.node.insert(at + 1 + offset, node)
        add = helper.make_node("Add", ["from_the_end", "new"], ["end_of_rows"])
        (at,) = (index for index, node in enumerate(graph.node) if node.output == rows.output)
        graph.node.insert(at, add)
        rows.input[0], rows.input[1] = "from_the_end", "end_of_rows"

    engine = edited(toy_bundles["concat"], tmp_path / "x", edit)
    assert "prefill.chunked" in failed(found(engine))


def test_a_table_of_positions_that_ends_too_early_is_found(toy_bundles: dict[str, Path], tmp_path: Path) -> None:
    """It is wrong in every shape alike, so only the reference shows it, and only in a long text."""
    engine = edited(toy_bundles["concat"], tmp_path / "x", ending_at(40))
    entry = found(engine, open_engine(toy_bundles["concat"], threads=1))
    assert failed(entry) == {"length.64.reference"}
    assert "rotary" in entry["verdict"]["notes"][0]
    assert entry["cases"]["length.64.reference"]["worst"]["position"] >= 40


def test_a_long_text_is_judged_by_its_worst_block_and_not_by_one_odd_token() -> None:
    """A fault that begins at some length fills a block; a single token may hang on a far one, which rounding turned."""
    limits = tolerances.load().profile("dequantized", "ort-cpu-int8")
    right = np.random.default_rng(4).normal(0, 4, (2048, 50)).astype(np.float32)

    def judged(wrong: int, off: float, *, long: bool = True) -> dict[str, Any]:
        case, spoiled = Case("length.2048.reference", Between.reference(limits), long=long), right.copy()
        best = right[-wrong:].argmax(1)
        np.put_along_axis(spoiled[-wrong:], best[:, None], right[-wrong:].max(1)[:, None] - off, 1)
        case.add(case.alone, right, spoiled, 0, 0)
        return {check.name.rpartition("reference.")[2]: check for check in case.checks(limits, unsure=False)}

    one, tail = judged(1, 3.0), judged(40, 3.0)
    assert judged(1, 3.0, long=False)["kl.max"].outcome is Outcome.FAILED  # a short text has no such tokens
    assert all(check.passed for check in one.values())
    assert tail["rel_error.mean_of_64"].outcome is Outcome.FAILED
    assert judged(40, 3.0, long=False)["rel_error.mean"].passed, "the whole text's mean would not show it"
    assert judged(2048, 1.0)["kl.mean"].outcome is Outcome.FAILED


def test_a_rotary_table_that_ends_too_early_is_found(
    bundles: dict[str, Path], checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """The same in a real model: 40 of 64 positions have a rotation of their own."""
    engine = edited(bundles["dense/portable"], tmp_path / "x", ending_at(40))
    assert failed(found(engine, open_engine(checkpoints["dense"], threads=1))) == {"length.64.reference"}


def test_an_engine_that_answers_otherwise_each_time_is_found(toy_bundles: dict[str, Path]) -> None:
    generator = np.random.default_rng(0)

    def last_bits(logits: np.ndarray) -> np.ndarray:
        return logits + generator.choice([0, 1], logits.shape).astype(np.float32) * np.spacing(logits)

    right = open_engine(toy_bundles["concat"], threads=1)
    entry = found(Wrapped(right, logits=last_bits))
    assert failed(entry) == {"determinism"}
    (check,) = (check for check in entry["verdict"]["checks"] if check["name"] == "determinism")
    assert 0 < check["value"] < 1e-6
    assert check["limit"] == 0
    # Kernels of a GPU may add in another order each time, and then that is said.
    entry = found(Wrapped(right, logits=last_bits, device="GPU SM90"))
    assert not failed(entry)
    assert entry["verdict"]["notes"] == [
        "determinism: equal calls differ in bits, as kernels of a GPU may that add in no fixed order."
    ]
    noise = Wrapped(right, logits=lambda x: x + generator.normal(0, 0.1, x.shape).astype(np.float32), device="GPU SM90")
    assert "determinism" in failed(found(noise))


def test_rows_that_disturb_each_other_are_found(toy_bundles: dict[str, Path]) -> None:
    def mixed(logits: np.ndarray) -> np.ndarray:
        return logits + np.float32(0.01) * logits[::-1] if len(logits) > 1 else logits

    entry = found(Wrapped(open_engine(toy_bundles["concat"], threads=1), logits=mixed))
    assert failed(entry) == {"batch.equal", "batch.padding.prefill", "batch.padding.decode", "batch.chunked"}
    first, *others = entry["verdict"]["notes"]
    assert first.startswith("batch.equal: rows of one batch disturb each other; the worst token")
    assert all(": the worst token" in note for note in others)  # they follow from the first


def test_one_wrong_token_of_many_is_found(toy_bundles: dict[str, Path]) -> None:
    """The last token of the longest row, in a batch: what a kernel's last block gets wrong."""

    def last(logits: np.ndarray) -> np.ndarray:
        if logits.shape[0] > 1 and logits.shape[1] > 12:
            logits = logits.copy()
            logits[0, -1, 7] += 0.03 * np.abs(logits[0, -1]).max()
        return logits

    entry = found(Wrapped(open_engine(toy_bundles["concat"], threads=1), logits=last))
    assert failed(entry) == {"batch.padding.prefill"}
    worst = entry["cases"]["batch.padding.prefill"]["worst"]
    assert (worst["row"], worst["position"]) == (0, entry["prompts"][0] - 1)
    assert worst["rel_error"] == pytest.approx(0.03, rel=1e-2)


@pytest.mark.parametrize("value", [np.nan, 0.0])
def test_rows_without_numbers_are_within_no_limit(value: float, toy_bundles: dict[str, Path]) -> None:
    def emptied(logits: np.ndarray) -> np.ndarray:
        return np.full_like(logits, value) if len(logits) == 3 and logits.shape[1] == 1 else logits

    entry = found(Wrapped(open_engine(toy_bundles["concat"], threads=1), logits=emptied))
    assert failed(entry) == {"batch.padding.decode"}
    assert entry["cases"]["batch.padding.decode"]["rel_error"]["mean"] is None


def test_an_engine_that_fails_in_a_shape_fails_its_check(toy_bundles: dict[str, Path]) -> None:
    class Refusing(Wrapped):
        def prefill(self, ids: np.ndarray, attention_mask: np.ndarray | None = None) -> Step:
            if attention_mask is not None:
                raise MoEdgeError("no kernel for a mask")
            return super().prefill(ids, attention_mask)

    entry = found(Refusing(open_engine(toy_bundles["concat"], threads=1)))
    assert failed(entry) == {"batch.padding.prefill", "batch.padding.decode", "batch.chunked"}
    assert entry["verdict"]["notes"][0] == "batch.padding.prefill: no kernel for a mask"


# --- what is not run -------------------------------------------------------------------------------------------------


def test_what_an_engine_does_not_take_is_not_run_and_said(toy_bundles: dict[str, Path]) -> None:
    right = open_engine(toy_bundles["concat"], threads=1)
    entry = found(Wrapped(right, padding=False))
    assert set(entry["not_run"]) == {"batch.padding", "batch.chunked"}
    assert entry["verdict"]["parts"].keys() == {"determinism", "prefill.chunked", "batch.equal"}
    entry = found(engine := Wrapped(right, max_batch=1))
    assert set(entry["not_run"]) == {"batch.equal", "batch.padding", "batch.chunked"}
    assert "--batch" in entry["not_run"]["batch.equal"]
    assert {rows for rows, _ in engine.calls} == {1}
    entry = found(engine := Wrapped(right, max_batch=2))
    assert not entry["not_run"]
    assert {rows for rows, _ in engine.calls} == {1, 2}
    for entry in (found(Wrapped(right, padding=False)), found(right)):
        assert entry_outcome(entry) is Outcome.PASSED


@pytest.mark.parametrize("tokens", [3, readings.SHORTEST - 1, readings.SHORTEST])
def test_a_short_text_leaves_only_what_it_can_show(tokens: int, toy_bundles: dict[str, Path]) -> None:
    engine = open_engine(toy_bundles["concat"], threads=1)
    entry: Any = shapes.check(engine, WINDOWS[:1, :tokens], shapes.Asked(long=LONG[:10]), shapes.Rules(LIMITS, LIMITS))
    enough = tokens == readings.SHORTEST
    assert set(entry["verdict"]["parts"]) == (SHORT if enough else {"determinism"})
    assert set(entry["not_run"]) == ({"length"} if enough else {"batch", "prefill.chunked", "length"})
    assert entry_outcome(entry) is Outcome.PASSED


def test_a_long_text_is_cut_to_what_both_engines_hold(toy_bundles: dict[str, Path]) -> None:
    one, two = (open_engine(toy_bundles["concat"], threads=1) for _ in range(2))
    shorter = one.info.model.model_copy(update={"max_length": 50})
    entry = found(two, Wrapped(one, model=shorter))
    assert {name for name in entry["cases"] if name.startswith("length")} == {
        "length.50.decode",
        "length.50.chunked",
        "length.50.reference",
    }


def test_every_engine_of_a_run_is_read_in_other_shapes_once(
    bundles: dict[str, Path], checkpoints: dict[str, Path]
) -> None:
    engines = {TORCH_MOE: checkpoints["moe"], TORCH_DENSE: checkpoints["dense"]}
    engines |= {EngineRef(name.split("/")[1], name.split("/")[0]): path for name, path in bundles.items()}
    notes: list[str] = []
    result = verify_run(
        engines, WINDOWS, prefill=40, tolerances="float32", text="random", threads=1, note=notes.append,
        asked=shapes.Asked(long=LONG),
    )  # fmt: skip
    found = {entry["name"]: entry_outcome(entry) for entry in result["shapes"]}
    assert found == {f"{name.split('/')[1]} {name.split('/')[0]} in other shapes": Outcome.PASSED for name in bundles}
    assert "ort-cpu moe in other shapes: passed, every check passed" in notes
    assert "shapes" not in verify_run(engines, WINDOWS[:1], prefill=40, tolerances="float32", text="random", threads=1)
    result["shapes"][0]["verdict"]["checks"][0]["passed"] = False
    assert run_outcome({**result, "identity": [], "parity": []}) is Outcome.FAILED


# --- changed choices -------------------------------------------------------------------------------------------------


class Choosing:
    """Logits depend on the token, its position and an expert; in a batch, the choice at ``turned`` is another one."""

    def __init__(self, turned: dict[int, int] | None = None, off: float = 0.0) -> None:
        generator = np.random.default_rng(0)
        self.table = generator.normal(0, 4, (2, 256, 60, 40)).astype(np.float32)
        self.turned, self.off = turned or {}, off
        self.info = EngineInfo("choosing", "numpy", "CPU", "float32", 1, EngineModel(vocab_size=256, routed=True))

    def _step(self, ids: np.ndarray, places: np.ndarray, lengths: np.ndarray) -> Step:
        expert = np.zeros(ids.shape, np.int32)
        for row, first in self.turned.items():
            if len(ids) > 1 and row < len(ids):
                expert[row] = places[row] >= first  # what follows a changed choice is another composition
        logits = self.table[expert, ids, places] + np.float32(self.off * (len(ids) > 1))
        return Step(logits, (places[:, -1] + 1, lengths), {0: expert.reshape(-1, 1)})

    def prefill(self, ids: np.ndarray, attention_mask: np.ndarray | None = None) -> Step:
        mask = np.ones_like(ids) if attention_mask is None else attention_mask
        return self._step(ids, np.clip(mask.cumsum(1) - 1, 0, None), mask.sum(1))

    def decode(self, ids: np.ndarray, cache: Any) -> Step:
        return self._step(ids, cache[0][:, None] + np.arange(ids.shape[1])[None], cache[1])

    def close(self) -> None:
        pass


def test_tokens_after_a_changed_choice_are_not_compared_where_nothing_replays_it() -> None:
    entry = found(Choosing({0: 8}))
    assert entry_outcome(entry) is Outcome.NOT_DECIDED
    one, two, _ = entry["prompts"]
    cases = entry["cases"]
    assert cases["batch.equal"]["excused"] == two + 2 - 8
    assert cases["batch.padding.prefill"]["excused"] == one - 8
    assert (cases["batch.padding.decode"]["excused"], cases["batch.chunked"]["excused"]) == (2, 3)
    assert cases["prefill.chunked"]["excused"] == 0
    (note,) = entry["verdict"]["notes"]
    assert "nothing could replay it" in note
    # What can be compared is held to the limits all the same.
    assert "batch.equal" in failed(found(Choosing({0: 8}, off=0.01)))


def test_nothing_is_decided_where_every_row_begins_with_a_changed_choice() -> None:
    entry = found(Choosing({0: 0, 1: 0, 2: 0}))
    assert entry_outcome(entry) is Outcome.NOT_DECIDED
    assert parts(entry, Outcome.NOT_DECIDED) == SHORT - {"determinism", "prefill.chunked"}


def test_the_first_token_of_a_row_is_in_no_mean_of_half_precision(toy_bundles: dict[str, Path]) -> None:
    """It carries a massive activation there; its KL is judged all the same."""

    def first(logits: np.ndarray) -> np.ndarray:
        if len(logits) == 3 and logits.shape[1] > 3:
            logits = logits.copy()
            logits[0, 0, 7] += 0.03 * np.abs(logits[0, 0]).max()
        return logits

    engine = Wrapped(open_engine(toy_bundles["concat"], threads=1), logits=first)
    assert failed(found(engine)) == {"batch.padding.prefill"}
    entry = found(engine, half=True)
    assert not failed(entry)
    assert entry["cases"]["batch.padding.prefill"]["rel_error"]["max"] == pytest.approx(0.03, rel=1e-2)


@pytest.mark.parametrize("long", [False, True])
def test_first_tokens_alone_are_judged_by_their_kl(long: bool) -> None:
    """In half precision a row of one token may be all that one side of a case holds, while the other is replayed."""
    case, right = Case("x", Between.reference(LIMITS), long=long, heavy_first=True), np.eye(1, 8, dtype=np.float32)
    case.add(case.alone, right, right, row=2, start=0)
    (check,) = case.checks(LIMITS, unsure=False)
    assert (check.name, check.outcome) == ("x.kl.max", Outcome.PASSED)
    case.add(case.alone, right, right * np.nan, row=2, start=0)
    (check,) = case.checks(LIMITS, unsure=False)
    assert check.outcome is Outcome.FAILED


def test_limits_that_allow_for_changed_choices_judge_every_token() -> None:
    free = tolerances.load().profile("free", "ort-cuda")
    asked, rules = shapes.Asked(), shapes.Rules(LIMITS, free)
    entry: Any = shapes.check(Choosing({0: 8}), WINDOWS, asked, rules)
    assert all(case["excused"] == 0 for case in entry["cases"].values())
    assert "batch.equal" in failed(entry)  # its choices have nothing to do with each other
    (limit,) = (check["limit"] for check in entry["verdict"]["checks"] if check["name"] == "batch.equal.kl.max")
    assert limit == 2 * free.max_kl


def test_limits_between_two_readings_follow_from_those_of_one() -> None:
    between = Between.readings(LIMITS)
    assert between.mean_rel_error == pytest.approx(2**0.5 * LIMITS.mean_rel_error)
    assert (between.mean_kl, between.max_kl) == (2 * LIMITS.mean_kl, 2 * LIMITS.max_kl)
