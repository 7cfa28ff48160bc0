"""Route replay of half-precision bundles: flipped near-ties pass, a wrong router, tap or product does not."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

from moedge import MoEdgeError
from moedge._files import atomic_dir
from moedge.configs import tolerances
from moedge.export import bundle, targets
from moedge.export.pipeline import export, lower
from moedge.runtime.engines import open_engine, ort_loader
from moedge.runtime.engines import ort as ort_engine
from moedge.runtime.engines import ort_session as _session
from moedge.runtime.parity.given import pair
from moedge.runtime.parity.shapes import Asked
from moedge.runtime.parity.suite import Judging

HIDDEN, EXPERTS, TOP_K, LAYERS = 64, 30, 15, 2
WINDOWS = np.random.default_rng(1).integers(0, 256, (2, 64))
FORMS: dict[str, tuple[str, dict[str, str]]] = {
    "tensorrt-rtx": ("tensorrt-rtx", {}),
    "plugins": ("tensorrt", {"tensorrt": "10.13"}),
    "native": ("tensorrt", {"tensorrt": "11.0", "experts": "native"}),
    "ort-cuda": ("ort-cuda", {}),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Any, tiny_tokenizer: Any) -> dict[str, Path]:
    """A converted checkpoint with so many experts that some always nearly tie, and its bundles."""
    from moedge.convert import calibration, methods, modeling

    root = tmp_path_factory.mktemp("half")
    model = tiny_llama(layers=LAYERS, hidden=HIDDEN, width=256)
    model.model.norm.weight.data *= 2  # logits with a standard deviation of 3, which the limits are derived for
    for layer in model.model.layers:  # random weights of 0.2 make attention sharper than training does
        layer.self_attn.q_proj.weight.data *= 0.25
    tokens = np.random.default_rng(0).integers(0, 256, (4, 64))
    plan = methods.convert(
        "cmoe", calibration.collect(model, tokens, k_a=8), model, shared=2, active=TOP_K, experts=EXPERTS + 2, k_a=8
    )
    generator = np.random.default_rng(2)
    for entry in plan.layers:
        entry.selection_bias = generator.normal(0, 0.3, EXPERTS).astype(np.float32)
    modeling.save(modeling.apply(plan, model), plan, tiny_tokenizer, root / "checkpoint")
    made = export(root / "checkpoint", root / "bundles", ["portable"], label="tiny")
    for name, (target, options) in FORMS.items():
        with atomic_dir(root / name) as partial:
            lower(target, made["portable"], partial, **options)
    return {"checkpoint": root / "checkpoint", **made, **{name: root / name for name in FORMS}}


@pytest.fixture(autouse=True)
def cuda_graphs_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """An ort-cuda bundle runs on the CPU provider: the same file, other kernels."""
    place = onnxruntime.OrtValue.ortvalue_from_numpy
    monkeypatch.setattr(ort_loader, "check_cuda", lambda what: None)
    rows = SimpleNamespace(find=lambda name: SimpleNamespace(provider=targets.CPU), CUDA=targets.CUDA)
    monkeypatch.setattr(_session, "targets", rows)
    monkeypatch.setattr(ort_engine, "ort_value", lambda array, device="cpu": place(array))


def verified(reference: Path, test: Path) -> dict[str, Any]:
    result = pair(reference, test, "random", WINDOWS, 24, "float32", {"threads": 1}, lambda *_: None)
    (entry,) = result["parity"]  # no comparison with de-quantised weights
    return entry


def parts(entry: dict[str, Any]) -> set[str]:
    return {name for name, passed in entry["verdict"]["parts"].items() if not passed}


@pytest.mark.parametrize("form", FORMS)
def test_flipped_near_ties_pass_and_what_the_router_read_gives_its_choices(folders, form):
    entry = verified(folders["portable"], folders[form])
    assert entry["verdict"]["passed"], [check for check in entry["verdict"]["checks"] if not check["passed"]]
    assert list(entry["verdict"]["parts"]) == ["arithmetic", "router", "free"]
    assert entry["routing"]["flips"] > 0  # else replay would prove nothing here
    assert entry["replay"]["router"]["flips"] == 0
    assert entry["replay"]["router"]["decisions"] == LAYERS * WINDOWS.size
    free, forced = (found["overall"]["kl_ref_test"]["mean"] for found in (entry, entry["replay"]))
    assert 0 < forced < free / 3


@pytest.mark.parametrize("form", FORMS)
def test_a_healthy_engine_is_itself_in_every_shape(folders, form):
    """Its choices flip between shapes, too; then the reference replays them. What takes no padding says so."""
    asked = Asked(long=WINDOWS.reshape(-1)[:64])
    quiet: Any = lambda *_: None  # noqa: E731
    result = pair(
        folders["portable"], folders[form], "random", WINDOWS, 24, "float32", {"threads": 1}, quiet, asked=asked
    )
    (entry,) = result["shapes"]
    assert entry["verdict"]["passed"], [check for check in entry["verdict"]["checks"] if not check["passed"]]
    assert set(entry["not_run"]) == ({"batch.padding", "batch.chunked"} if form == "ort-cuda" else set())
    assert entry["cases"]["length.64.reference"]["replayed"] == 64
    assert "router" in entry["verdict"]["parts"]
    assert not sum(case["excused"] for case in entry["cases"].values())


def test_routers_of_tensorrt_graphs_read_float32_and_those_of_onnx_runtime_what_the_norm_left(folders):
    kinds = {}
    for form in FORMS:
        engine: Any = open_engine(folders[form], taps=True, router_inputs=True, threads=1)
        read = engine.prefill(WINDOWS[:1, :8]).router_inputs
        assert sorted(read) == list(range(LAYERS))
        assert {(value.shape, value.dtype.name) for value in read.values()} == {((8, HIDDEN), "float32")}
        halves = [np.array_equal(value, value.astype(np.float16)) for value in read.values()]
        assert len(set(halves)) == 1
        kinds[form] = "float16" if halves[0] else "float32"
    assert kinds == {**dict.fromkeys(FORMS, "float32"), "ort-cuda": "float16"}


def test_pytorch_and_the_portable_graph_judge_the_same(folders):
    one, two = (verified(folders[name], folders["tensorrt-rtx"]) for name in ("checkpoint", "portable"))
    assert one["verdict"]["passed"]
    values = [entry["replay"]["overall"]["kl_ref_test"]["mean"] for entry in (one, two)]
    assert values[0] == pytest.approx(values[1], rel=1e-2)
    with pytest.raises(MoEdgeError, match="compare it with the portable bundle or the checkpoint"):
        verified(folders["plugins"], folders["tensorrt-rtx"])


def changed(pattern: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[onnx.GraphProto], None]:
    def apply(graph: onnx.GraphProto) -> None:
        for tensor in graph.initializer:
            if pattern in tensor.name:
                array = numpy_helper.to_array(tensor)
                tensor.CopyFrom(numpy_helper.from_array(change(array).astype(array.dtype), tensor.name))

    return apply


MISTAKES = {
    "no selection bias": (changed("selection_bias", np.zeros_like), {"router"}),
    "routers of other experts": (changed(".router.", lambda rows: rows[::-1].copy()), {"router"}),
    "a router in half precision": (
        changed(".router.", lambda rows: rows.astype(np.float16).astype(np.float32)),
        {"router"},
    ),
    "experts 2 % too large": (changed("mlp.down", lambda rows: rows * 1.02), {"arithmetic"}),
    "experts in another order": (
        changed("mlp.down", lambda rows: rows.reshape(EXPERTS, -1)[::-1].reshape(rows.shape)),
        {"arithmetic"},
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_fails_the_part_that_it_is_in(folders, tmp_path, broken_copy, mistake):
    mutation, failed = MISTAKES[mistake]
    broken = broken_copy(folders["tensorrt-rtx"], tmp_path / "broken", mutation)
    assert parts(verified(folders["portable"], broken)) - {"free"} == failed


def with_taps(folder: Path, out: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A bundle with other taps in its manifest."""
    shutil.copytree(folder, out)
    manifest = bundle.open_bundle(out).manifest.document()
    change(manifest["taps"])
    (out / bundle.MANIFEST).unlink()
    bundle.seal(out, bundle.Manifest.model_validate(manifest))
    return out


def norms(folder: Path) -> tuple[str, str]:
    """What layer 1's experts read in half precision, and the normalised stream before the norm's weight."""
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    maker = {output: node for node in graph.node for output in node.output}
    read = bundle.open_bundle(folder).manifest.document()["taps"]["1"]["reads"]
    scaled = maker[maker[read].input[0]]
    assert (maker[read].op_type, scaled.op_type) == ("Reshape", "Mul")
    return f"{read}.float16", next(name for name in scaled.input if name in maker)


@pytest.mark.parametrize("wrong", ["another layer", "the experts' input", "no value", "before the norm's weight"])
def test_a_wrong_tap_is_caught(folders, tmp_path, wrong):
    rounded, unscaled = norms(folders["tensorrt-rtx"])

    def change(taps: dict[str, Any]) -> None:
        names = {"another layer": taps["0"]["reads"], "the experts' input": rounded, "no value": "nothing"}
        taps["1"]["reads"] = names.get(wrong, unscaled)

    broken = with_taps(folders["tensorrt-rtx"], tmp_path / "broken", change)
    said = {
        "no value": "a tap of layer 1 is not in the graph",
        "before the norm's weight": "not one row for each of 24 tokens",  # the choice does depend on it alone
    }.get(wrong, "layer 1 does not choose its experts by")
    with pytest.raises(MoEdgeError, match=said):
        verified(folders["portable"], broken)


def test_the_reference_router_is_asked_with_what_the_engine_read(folders, monkeypatch):
    """Rows of another token: the arithmetic is right, no choice of a router could be."""
    real = ort_engine.OrtEngine._run

    def shifted(self: Any, *given: Any) -> Any:
        step = real(self, *given)
        if step.router_inputs:
            step.router_inputs = {layer: np.roll(read, 1, axis=0) for layer, read in step.router_inputs.items()}
        return step

    monkeypatch.setattr(ort_engine.OrtEngine, "_run", shifted)
    assert parts(verified(folders["portable"], folders["tensorrt-rtx"])) == {"router"}


def test_an_older_bundle_is_judged_free_running_and_says_so(folders, tmp_path):
    def change(taps: dict[str, Any]) -> None:
        for tap in taps.values():
            del tap["reads"], tap["reads_dtype"]

    entry = verified(folders["portable"], with_taps(folders["tensorrt-rtx"], tmp_path / "old", change))
    assert list(entry["verdict"]["parts"]) == ["whole"]
    assert entry["replay"] is None
    names = [check["name"] for check in entry["verdict"]["checks"]]
    assert "routing.expert_set_agreement" in names
    (said,) = (note for note in entry["verdict"]["notes"] if "does not say what its routers read" in note)
    assert "export again" in said


def one_layer(num_experts: int, **reads: str) -> dict[str, Any]:
    """What the manifest of a MoE of one layer says about it."""
    layer = {"num_experts": num_experts, "top_k": 2, "shared_width": 8, "expert_width": 8}
    taps = {"0": {"output": "experts", "kind": "indices", "top_k": 2, **reads}} if num_experts else {}
    return {"kind": "moe", "moe": {"layers": {"0": layer}}, "taps": taps}


@pytest.mark.parametrize(
    ("facts", "profile", "replayed"),
    [
        (None, "float32/ort-cuda", False),  # a checkpoint
        ({"kind": "dense", "moe": None, "taps": {}}, "float32/ort-cuda", False),
        (one_layer(0), "float32/ort-cuda", False),
        (one_layer(4), "free/ort-cuda", False),
        (one_layer(4, reads="x"), "float32/ort-cuda", True),
    ],
)
def test_every_kind_of_model_gets_limits(folders, tmp_path, facts, profile, replayed):
    if facts is not None:
        manifest = bundle.open_bundle(folders["portable"]).manifest.document()
        (tmp_path / "manifest.json").write_text(json.dumps(manifest | facts))
    limits = tolerances.load()
    found = Judging.of(tmp_path, limits, "float32", "ort-cuda")
    assert (found.limits, found.replayed) == (limits.profiles[profile], replayed)
    assert (found.reason is None) == (profile != "free/ort-cuda")
