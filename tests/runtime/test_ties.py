"""Experts whose scores tie: a right engine passes whatever it chose, and every planted fault still fails.

A GELU gate is exactly 0, or a last bit away from it, for every strongly negative input. Two representative neurons with
closed gates score the same up to rounding, so two right engines choose differently in one decision in a hundred here.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from moedge import MoEdgeError
from moedge._files import atomic_dir
from moedge.configs import tolerances
from moedge.export import bundle
from moedge.export.pipeline import export, lower
from moedge.runtime.engines import open_engine
from moedge.runtime.parity import compare as parity
from moedge.runtime.parity import reference as references
from moedge.runtime.parity.given import against_kept, pair
from moedge.runtime.parity.suite import Judging

LAYERS, HIDDEN, EXPERTS, TOP_K = 3, 128, 6, 3
WINDOWS = np.random.default_rng(5).integers(0, 256, (6, 250))
TARGETS = ("portable", "ort-cpu")


def make(root: Path, tiny_model: Any, convert_tiny: Any, tokenizer: Any, seed: int, method: str) -> dict[str, Path]:
    """A Gemma 3 whose gates are closed or open by several standard deviations, converted and exported."""
    from moedge.convert import modeling

    model = tiny_model("gemma3_text", layers=LAYERS, hidden=HIDDEN, width=128, seed=seed)
    for layer in model.model.layers:
        layer.mlp.gate_proj.weight.data *= 2
    model.model.norm.weight.data -= 0.9  # logits of tens instead of hundreds
    plan = convert_tiny(model, method)
    if method == "cmoe":  # experts 0 to 3 still tie with each other
        plan.layers[1].selection_bias = np.array([0, 0, 0, 0, 4, -4], np.float32)
    modeling.save(modeling.apply(plan, model), plan, tokenizer, root / "checkpoint")
    made = export(root / "checkpoint", root / "bundles", list(TARGETS), label="tied")
    return {"checkpoint": root / "checkpoint", **made}


@pytest.fixture(scope="module")
def folders(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Any, convert_tiny: Any, tiny_tokenizer: Any
) -> dict[str, Path]:
    return make(tmp_path_factory.mktemp("tied"), tiny_model, convert_tiny, tiny_tokenizer, 0, "cmoe")


@pytest.fixture(scope="module")
def reference(folders: dict[str, Path]) -> Iterator[Any]:
    engine = open_engine(folders["checkpoint"], threads=1, taps=True, replay=True)
    yield engine
    engine.close()


def verified(reference: Any, folder: Path, target: str = "") -> dict[str, Any]:
    how = Judging.of(folder, tolerances.load(), "float32", target or folder.name)
    test = open_engine(folder, threads=1, **how.options(moe=True))
    try:
        return parity.compare(reference, test, WINDOWS, prefill=246, tolerances=how.limits)
    finally:
        test.close()


def missed(entry: dict[str, Any]) -> set[str]:
    return {check["name"] for check in entry["verdict"]["checks"] if not check["passed"]}


@pytest.mark.parametrize("target", TARGETS)
def test_a_right_engine_passes_though_it_chose_otherwise(folders: dict[str, Path], reference: Any, target: str) -> None:
    entry = verified(reference, folders[target])
    assert entry["routing"]["flips"] > 0  # else nothing is shown
    assert entry["verdict"]["outcome"] == "passed", missed(entry)
    assert list(entry["verdict"]["parts"]) == ["arithmetic", "router", "free"]
    router = entry["replay"]["router"]
    assert router["flips"] == router["ties"]
    assert router["own_order"] == 1.0
    assert entry["replay"]["overall"]["tokens"] == WINDOWS.size
    assert 0 < entry["replay"]["tokens"] <= WINDOWS.size
    (note,) = entry["verdict"]["notes"]
    assert "choices of experts differ from the reference's: experts tie where their scores are equal" in note


def test_a_kept_reference_passes_a_right_engine_whose_first_other_choice_ties(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    engine = open_engine(folders["checkpoint"], threads=1, **references.how_to_open(folders["checkpoint"]))
    identity, file = references.identity_of(folders["checkpoint"]), tmp_path / "ref.safetensors"
    references.keep(engine, WINDOWS[:2, :150], file, text="random", prefill=140, identity=identity)
    engine.close()
    result = against_kept(folders["ort-cpu"], file, threads=1)
    (entry,) = result["parity"]
    assert entry["routing"]["flips"] > 0  # else nothing is shown
    (check,) = (check for check in entry["verdict"]["checks"] if check["name"] == "text.first_changes.no_ties")
    assert check["value"] == 0
    assert not [check["name"] for check in entry["verdict"]["checks"] if not check["passed"] and check["decided"]]


def test_a_second_run_of_changed_windows_alone_gives_what_replaying_everything_gives(
    folders: dict[str, Path], reference: Any, tmp_path: Path, without_compiler: Any
) -> None:
    with without_compiler():  # in ONNX Runtime's own operators a window is left without a changed choice
        lower("ort-cpu", folders["portable"], tmp_path)
    cheap = verified(reference, tmp_path, "ort-cpu")
    limits = tolerances.load().profile("float32", "ort-cpu").model_copy(update={"expert_set_agreement": None})
    test = open_engine(tmp_path, threads=1, taps=True, router_inputs=True)
    whole = parity.compare(reference, test, WINDOWS, prefill=246, tolerances=limits)
    assert cheap["replay"]["tokens"] < whole["replay"]["tokens"] == WINDOWS.size
    one, two = (sorted_values(entry["replay"]["phases"]) for entry in (cheap, whole))
    assert one == pytest.approx(two, rel=1e-5, abs=3e-6)  # forced experts are summed in another order
    names = [[check["name"] for check in entry["verdict"]["checks"]] for entry in (cheap, whole)]
    assert names[0] == names[1]


def sorted_values(tree: Any, path: str = "") -> dict[str, float]:
    if isinstance(tree, dict):
        found: dict[str, float] = {}
        for key, value in tree.items():
            if key != "same_choices":  # tells free-running tokens from others
                found |= sorted_values(value, f"{path}.{key}")
        return found
    return {path: tree}


def test_windows_without_a_changed_choice_are_run_once(
    folders: dict[str, Path], reference: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = tolerances.load().profile("float32", "torch")
    monkeypatch.setattr(parity, "Replay", lambda *_: pytest.fail("nothing differs, so nothing is run again"))
    same = open_engine(folders["checkpoint"], threads=1, taps=True, replay=True)
    entry = parity.compare(reference, same, WINDOWS[:1], prefill=246, tolerances=limits)
    assert entry["verdict"]["passed"]
    assert entry["replay"] is None


def test_a_bundle_of_an_older_version_is_judged_free_running(
    folders: dict[str, Path], reference: Any, tmp_path: Path
) -> None:
    def forget(graph: onnx.GraphProto, taps: dict[str, Any]) -> None:
        for tap in taps.values():
            del tap["reads"], tap["reads_dtype"]

    entry = verified(reference, broken(folders["ort-cpu"], tmp_path / "old", forget), "ort-cpu")
    assert entry["replay"] is None
    assert {"routing.expert_set_agreement"} <= missed(entry)
    assert "choices of experts differ" in entry["verdict"]["notes"][0]


# Planted faults. Each changes one bundle; what its manifest says of the graph is changed with it.

Fault = Callable[[onnx.GraphProto, dict[str, Any]], None]


def broken(folder: Path, out: Path, fault: Fault) -> Path:
    shutil.copytree(folder, out)
    manifest = bundle.open_bundle(out).manifest.document()
    model = onnx.load(out / "model.onnx")
    before = (model.SerializeToString(), str(manifest["taps"]))
    fault(model.graph, manifest["taps"])
    assert (model.SerializeToString(), str(manifest["taps"])) != before
    for name in ("model.onnx.data", bundle.MANIFEST):
        (out / name).unlink(missing_ok=True)
    onnx.save(model, out / "model.onnx")
    bundle.seal(out, bundle.Manifest.model_validate(manifest))
    return out


def weights(pattern: str, change: Callable[[np.ndarray], np.ndarray]) -> Fault:
    def apply(graph: onnx.GraphProto, taps: dict[str, Any]) -> None:
        for tensor in graph.initializer:
            if pattern in tensor.name:
                array = numpy_helper.to_array(tensor)
                tensor.CopyFrom(numpy_helper.from_array(change(array.copy()).astype(array.dtype), tensor.name))

    return apply


def routes(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    return [node for node in graph.node if node.op_type == "Route"]


def scaled(row: int, factor: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(array: np.ndarray) -> np.ndarray:
        array[row] *= factor
        return array

    return change


def exchanged(array: np.ndarray) -> np.ndarray:
    return array[[1, 0, *range(2, EXPERTS)]]


def fewer_experts(graph: onnx.GraphProto, taps: dict[str, Any]) -> None:
    for node in routes(graph):
        next(attribute for attribute in node.attribute if attribute.name == "top_k").i = TOP_K - 1


def off_by_one(shown: bool) -> Fault:
    """Every expert's number is one too large; ``shown``: the tap says what runs, else what was selected."""

    def apply(graph: onnx.GraphProto, taps: dict[str, Any]) -> None:
        graph.initializer.append(numpy_helper.from_array(np.array(1, np.int32), "one"))
        graph.initializer.append(numpy_helper.from_array(np.array(EXPERTS, np.int32), "all"))
        for layer, node in enumerate(routes(graph)):
            name = node.output[0]
            for user in graph.node:
                if user.op_type == "SparseGLU" and user.input[1] == name:
                    user.input[1] = f"{name}.wrong"
            new = [
                helper.make_node("Add", [name, "one"], [f"{name}.next"]),
                helper.make_node("Mod", [f"{name}.next", "all"], [f"{name}.wrong"]),
            ]
            place = list(graph.node).index(node) + 1
            for made in reversed(new):
                graph.node.insert(place, made)
            if shown:
                taps[str(layer)]["output"] = f"{name}.wrong"

    return apply


def ties_to_the_higher(graph: onnx.GraphProto, taps: dict[str, Any]) -> None:
    """Experts are ranked from the last to the first."""
    graph.initializer.append(numpy_helper.from_array(np.arange(EXPERTS)[::-1].copy(), "reversed"))
    graph.initializer.append(numpy_helper.from_array(np.array(EXPERTS - 1, np.int32), "last"))
    for node in routes(graph):
        name, bias = node.output[0], node.input[1]
        before = [
            helper.make_node("Gather", [node.input[0], "reversed"], [f"{name}.scores"], axis=1),
            helper.make_node("Gather", [bias, "reversed"], [f"{name}.bias"], axis=0),
        ]
        node.input[0], node.input[1], node.output[0] = f"{name}.scores", f"{name}.bias", f"{name}.reversed"
        place = list(graph.node).index(node)
        graph.node.insert(place + 1, helper.make_node("Sub", ["last", f"{name}.reversed"], [name]))
        for made in reversed(before):
            graph.node.insert(place, made)


def another_layers_input(graph: onnx.GraphProto, taps: dict[str, Any]) -> None:
    """The router of the last layer reads what that of the layer before read, and the tap says so."""
    wrong, right = taps[str(LAYERS - 2)]["reads"], taps[str(LAYERS - 1)]["reads"]
    for node in graph.node:
        if any(f"layers.{LAYERS - 1}.mlp.router" in name for name in node.input):
            node.input[0] = wrong
    assert wrong != right
    taps[str(LAYERS - 1)]["reads"] = wrong


def unsigned(graph: onnx.GraphProto, taps: dict[str, Any]) -> None:
    for node in routes(graph):
        name = node.input[0]
        graph.node.insert(list(graph.node).index(node), helper.make_node("Abs", [name], [f"{name}.abs"]))
        node.input[0] = f"{name}.abs"


LAYER = "layers.1.mlp."
FAULTS: dict[str, tuple[Fault, str]] = {
    "a router's weight": (weights(f"{LAYER}router.up", scaled(2, 1.05)), "router.expert_set_agreement"),
    "a router in half precision": (
        weights(".router.", lambda rows: rows.astype(np.float16)),
        "router.expert_set_agreement",
    ),
    "routers of other experts": (weights(f"{LAYER}router.", exchanged), "router.expert_set_agreement"),
    "two experts exchanged": (weights(f"{LAYER}down", exchanged), "arithmetic.prefill.rel_error.median"),
    "an expert 0.5 % too large": (weights(f"{LAYER}down", scaled(0, 1.005)), "arithmetic.prefill.rel_error.median"),
    "no selection bias": (weights(f"{LAYER}selection_bias", np.zeros_like), "router.expert_set_agreement"),
    "the next expert, as the tap says": (off_by_one(shown=True), "router.expert_set_agreement"),
    "the next expert, unseen by the tap": (off_by_one(shown=False), "arithmetic.prefill.rel_error.median"),
    "ties to the higher index": (ties_to_the_higher, "router.own_order"),
    "a router of another layer's input": (another_layers_input, "router.input_rel_error"),
    "scores without their sign": (unsigned, "router.expert_set_agreement"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_still_fails(folders: dict[str, Path], reference: Any, tmp_path: Path, fault: str) -> None:
    apply, check = FAULTS[fault]
    entry = verified(reference, broken(folders["portable"], tmp_path / "broken", apply), "portable")
    assert entry["verdict"]["outcome"] == "failed"
    assert check in missed(entry)
    if fault == "ties to the higher index":  # rounding excuses each of these choices, the order of exact ties does not
        assert entry["replay"]["router"]["agreement"] == 1.0
        assert missed(entry) == {"router.own_order"}
        assert (
            "does not choose the best of its own scores, with ties to the lower index" in entry["verdict"]["notes"][-1]
        )


def test_another_number_of_experts_is_refused(folders: dict[str, Path], reference: Any, tmp_path: Path) -> None:
    with pytest.raises(MoEdgeError, match="selects 3 experts in the reference, 2"):
        verified(reference, broken(folders["portable"], tmp_path / "broken", fewer_experts), "portable")


def test_a_tap_that_hides_another_layers_input_is_refused(
    folders: dict[str, Path], reference: Any, tmp_path: Path
) -> None:
    def hidden(graph: onnx.GraphProto, taps: dict[str, Any]) -> None:
        another_layers_input(graph, {layer: dict(tap) for layer, tap in taps.items()})

    with pytest.raises(MoEdgeError, match="does not choose its experts by"):
        verified(reference, broken(folders["portable"], tmp_path / "broken", hidden), "portable")


@pytest.mark.parametrize("target", ["tensorrt-rtx", "ort-cpu-int8"])
def test_ties_fail_no_engine_of_half_precision_or_integers_either(
    folders: dict[str, Path], reference: Any, tmp_path: Path, target: str
) -> None:
    with atomic_dir(tmp_path / target) as partial:
        lower(target, folders["portable"], partial)
    entry = verified(reference, tmp_path / target)
    router = entry["replay"]["router"]
    assert router["ties"] == router["flips"] > 0  # else nothing is shown
    assert router["agreement"] == 1.0
    assert "router.expert_set_agreement" not in missed(entry)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["cmoe", "moedge"])
@pytest.mark.parametrize("seed", range(1, 11))
def test_random_conversions_pass(
    tmp_path: Path, tiny_model: Any, convert_tiny: Any, tiny_tokenizer: Any, seed: int, method: str
) -> None:
    """Twenty conversions, each on both float32 targets, as ``moedge verify`` judges them."""
    made = make(tmp_path, tiny_model, convert_tiny, tiny_tokenizer, seed, method)
    windows = np.random.default_rng(seed).integers(0, 256, (4, 128))
    for target in TARGETS:
        result = pair(made["checkpoint"], made[target], "random", windows, 64, "float32", {"threads": 1}, lambda *_: 0)
        (entry,) = result["parity"]
        assert result["outcome"] == "passed", (target, entry["routing"]["flips"], missed(entry))
