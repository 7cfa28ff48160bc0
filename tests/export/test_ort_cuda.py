"""Target ort-cuda: the file in float16 on the CPU provider, what it refuses without CUDA; ``-m gpu`` runs it there."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from moedge import MoEdgeError
from moedge._files import atomic_dir
from moedge.configs.recipe import recipe_from
from moedge.export import bundle
from moedge.export.lowering.ort import moe as ort_moe
from moedge.export.lowering.trt import engine as tensorrt
from moedge.export.pipeline import lower
from moedge.runtime.engines import open_engine
from moedge.runtime.engines.ort_session import not_on
from moedge.runtime.run import stages

# A 2-layer model: four blocks, each within HALF_LIMIT of its own output, added to one residual stream.
MODEL_LIMIT = 4 * tensorrt.HALF_LIMIT
IDS = np.random.default_rng(1).integers(0, 256, (2, 24))


@pytest.fixture(scope="module")
def made(bundles: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("cuda")
    for kind in ("dense", "moe"):
        with atomic_dir(root / kind) as partial:
            lower("ort-cuda", bundles[f"{kind}/portable"], partial)
    return {kind: root / kind for kind in ("dense", "moe")}


def relative(actual: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(actual.astype(np.float32) - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_the_file_computes_what_the_portable_one_computes(made, bundles, kind) -> None:
    """Prefill and decode, past and present one buffer, with the CPU provider's own float16 kernels."""
    session = onnxruntime.InferenceSession(made[kind] / "model.onnx", providers=["CPUExecutionProvider"])
    reference = open_engine(bundles[f"{kind}/portable"])
    want = reference.prefill(IDS[:, :20])
    length = bundle.open_bundle(made[kind]).manifest.document()["cache"]["max_length"]
    caches = {i.name: np.zeros((2, i.shape[1], length, i.shape[3]), np.float16) for i in session.get_inputs()[3:]}
    assert len(caches) == 4
    for start, end in ((0, 20), (20, 21), (21, 22)):
        feeds = {"input_ids": IDS[:, start:end], "attention_mask": np.ones((2, end), np.int64)}
        feeds["position_ids"] = np.repeat(np.arange(start, end)[None], 2, axis=0)
        logits, *presents = session.run(None, {**feeds, **caches})
        caches = dict(zip(caches, presents, strict=True))
        if start:
            want = reference.decode(IDS[:, start:end], want.cache)
        assert 0 < relative(logits, want.logits) < MODEL_LIMIT


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_every_value_has_its_type_and_shape(made, values_match_their_shapes, kind) -> None:
    assert values_match_their_shapes(made[kind]) > 40


def test_experts_and_cache_are_half_and_routers_are_not(made) -> None:
    model = onnx.load(made["moe"] / "model.onnx", load_external_data=False)
    kinds = {t.name: onnx.TensorProto.DataType.Name(t.data_type) for t in model.graph.initializer}
    assert {kind for name, kind in kinds.items() if ".mlp.router." in name} == {"FLOAT"}
    assert {kind for name, kind in kinds.items() if ".experts." in name} == {"FLOAT16"}
    types = {v.name: v.type.tensor_type.elem_type for v in [*model.graph.input, *model.graph.output]}
    assert types["past_key_values.0.key"] == types["present.1.value"] == types["logits"] == onnx.TensorProto.FLOAT16
    operators = [node.op_type for node in model.graph.node if node.domain == "com.microsoft"]
    assert {name: operators.count(name) for name in ("MoE", "GroupQueryAttention")} == {
        "MoE": 2,
        "GroupQueryAttention": 2,
    }
    # The CUDA kernel refused a bias until 1.28 and takes its slowest path with one since.
    attention = [node for node in model.graph.node if node.op_type == "GroupQueryAttention"]
    assert all(len(node.input) <= 7 for node in attention)
    moe = next(node for node in model.graph.node if node.op_type == "MoE")
    attributes = {item.name: onnx.helper.get_attribute_value(item) for item in moe.attribute}
    assert attributes["normalize_routing_weights"] == 1


def test_the_manifest_says_what_was_executed_and_what_not(made) -> None:
    manifest = bundle.open_bundle(made["moe"]).manifest.document()
    tests = {entry["rewrite"]: entry["self_test"] for entry in manifest["lowering"] if entry["status"] == "applied"}
    assert all(test["passed"] for test in tests.values())
    halves = [name for name, test in tests.items() if test["limit"] == tensorrt.HALF_LIMIT]
    assert halves == ["float32 -> float16; the router stays float32"]
    assert {"Route + SparseGLU -> MoE", "CausalAttention -> GroupQueryAttention"} < set(tests)
    assert any("no CUDA device was used" in limit for limit in manifest["limits"])
    assert any("equally long" in limit for limit in manifest["limits"])


def test_legality() -> None:
    assert ort_moe.cuda_refusal(activations={"silu"}, smallest_weight=1.0) is None
    assert "SiLU only" in str(ort_moe.cuda_refusal(activations={"gelu"}, smallest_weight=1.0))
    assert "zero or negative" in str(ort_moe.cuda_refusal(activations={"silu"}, smallest_weight=0.0))


def test_without_cuda_everything_that_would_run_it_refuses_in_one_sentence(made, monkeypatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(MoEdgeError, match=r"CUDA provider, which onnxruntime [\d.]+ here does not have; run it on"):
        open_engine(made["moe"])
    value = {"name": "x", "model": {"source": "asset:wiki"}, "export": {"targets": ["portable", "ort-cuda"]}}
    with pytest.raises(MoEdgeError, match=r"x: export\.targets: ort-cuda is for ONNX Runtime's CUDA provider"):
        stages.build(recipe_from(value, where="test"), {})


def test_a_runtime_whose_cuda_kernel_is_silently_wrong_is_refused(made, monkeypatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "__version__", "1.27.1")
    with pytest.raises(MoEdgeError, match=r"needs onnxruntime-gpu 1\.28 or newer, this is 1\.27\.1"):
        open_engine(made["moe"])


def test_nodes_that_fell_to_another_provider_are_counted(made) -> None:
    """ONNX Runtime says where it put each node; here it is all on the CPU, so nothing is where CUDA is asked for."""
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    path = str(made["moe"] / "model.onnx")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    assert not_on(session, "CPUExecutionProvider") == {}
    fallen = not_on(session, "CUDAExecutionProvider")
    assert fallen["MoE"] == fallen["GroupQueryAttention"] == 2
    assert "Shape" not in fallen


def test_an_engine_refuses_a_session_with_work_on_the_cpu(made, monkeypatch) -> None:
    opened = onnxruntime.InferenceSession

    def session(*given, **options):
        """All on the CPU, but says that CUDA was started: what ONNX Runtime does with a node that has no kernel."""
        options = {name: value for name, value in options.items() if name != "provider_options"}
        session = opened(*given, **{**options, "providers": ["CPUExecutionProvider"]})
        session.get_providers = lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
        return session

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None)
    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    with pytest.raises(MoEdgeError, match=r"on the CPU \(.*2 GroupQueryAttention, .*2 MoE.*\).* take --target ort-cpu"):
        open_engine(made["moe"])


def test_libraries_from_pip_are_loaded_before_the_cuda_session(made, monkeypatch, capsys) -> None:
    """Without torch in the process nothing else finds them; where there are none, the refusal is one sentence."""
    called = []
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: print("not found") or called.append("preload"))
    opened = onnxruntime.InferenceSession

    def session(*given, **options):
        called.append(options["providers"][0])
        return opened(*given, **{**options, "providers": ["CPUExecutionProvider"]})

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    with pytest.raises(MoEdgeError, match=r"could not start CUDAExecutionProvider .*; check the driver and cuDNN"):
        open_engine(made["moe"])
    assert called == ["preload", "CUDAExecutionProvider"]
    assert capsys.readouterr().out == ""


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_cuda_computes_what_the_cpu_computes(made, bundles, kind) -> None:
    reference, engine = open_engine(bundles[f"{kind}/portable"]), open_engine(made[kind])
    want, got = reference.prefill(IDS[:, :20]), engine.prefill(IDS[:, :20])
    for position in range(20, 24):
        assert 0 < relative(got.logits, want.logits) < MODEL_LIMIT
        token = IDS[:, position : position + 1]
        want, got = reference.decode(token, want.cache), engine.decode(token, got.cache)
    mask = np.ones_like(IDS[:, :6])
    mask[0, 0] = 0
    with pytest.raises(MoEdgeError, match="takes no padding"):
        engine.prefill(IDS[:, :6], mask)
