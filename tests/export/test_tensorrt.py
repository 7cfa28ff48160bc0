"""The half-precision graph for TensorRT: what it computes, what stays float32, and what its self-test catches."""

from importlib.util import find_spec

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from moedge import MoEdgeError
from moedge._files import atomic_dir
from moedge.configs import devices
from moedge.export import bundle
from moedge.export.functions import DOMAIN
from moedge.export.graph import half, nodes
from moedge.export.graph.build import Builder
from moedge.export.lowering.check import selftest
from moedge.export.lowering.trt import attention as trt_attention
from moedge.export.lowering.trt import engine as tensorrt
from moedge.export.lowering.trt import experts as trt_experts
from moedge.export.lowering.trt import native as trt_native
from moedge.export.lowering.trt import router as trt_router
from moedge.export.pipeline import lower
from moedge.runtime.engines import open_engine
from moedge.runtime.engines.pytorch import TorchEngine

# A 2-layer model: four blocks, each within tensorrt.HALF_LIMIT of its own output, added to one residual stream.
MODEL_LIMIT = 4 * tensorrt.HALF_LIMIT
BF16 = "bfloat16"


@pytest.fixture(scope="module")
def typed(bundles, tmp_path_factory):
    """``{kind}/{target}`` bundles of both TensorRT targets; ``plugins`` is target tensorrt for a newer TensorRT."""
    root = tmp_path_factory.mktemp("typed")
    made = {}
    for kind in ("dense", "moe"):
        for target, version in (("tensorrt", "10.3"), ("tensorrt-rtx", None), ("plugins", "10.13")):
            name = "tensorrt" if target == "plugins" else target
            with atomic_dir(root / kind / target) as partial:
                lower(name, bundles[f"{kind}/portable"], partial, tensorrt=version)
            made[f"{kind}/{target}"] = root / kind / target
    for target, version in (("tensorrt-rtx", None), ("plugins", "10.13")):
        folder = root / "bfloat16" / target
        with atomic_dir(folder) as partial:
            lower(target.replace("plugins", "tensorrt"), bundles["moe/portable"], partial, tensorrt=version, dtype=BF16)
        made[f"bfloat16/{target}"] = folder
    return made


def portable(bundles, kind="moe"):
    return ir.load(bundles[f"{kind}/portable"] / "model.onnx")


def relative(actual, expected):
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize(
    "name", ["dense/tensorrt", "moe/tensorrt", "dense/tensorrt-rtx", "moe/tensorrt-rtx", "moe/plugins"]
)
def test_the_typed_graph_computes_what_pytorch_computes(typed, checkpoints, name):
    ids = np.random.default_rng(1).integers(0, 256, (1, 24))
    reference = TorchEngine(checkpoints[name.split("/")[0]], taps=True)
    engine = open_engine(typed[name], taps=True)
    assert engine.info.dtype == "float16"
    want, got = reference.prefill(ids[:, :20]), engine.prefill(ids[:, :20])
    agree = []
    for position in range(20, 24):
        assert 0 < relative(got.logits, want.logits) < MODEL_LIMIT
        for layer, experts in (want.routes or {}).items():
            agree.append((np.sort(got.routes[layer]) == np.sort(experts)).all(axis=1).mean())
        token = ids[:, position : position + 1]
        want, got = reference.decode(token, want.cache), engine.decode(token, got.cache)
    assert relative(got.logits, want.logits) < MODEL_LIMIT
    # The router itself is float32; only the half-precision input of the second layer's can turn a near-tie.
    assert not agree or np.mean(agree) > 0.95


@pytest.mark.parametrize(
    "name", ["dense/tensorrt", "moe/tensorrt", "dense/tensorrt-rtx", "moe/tensorrt-rtx", "moe/plugins"]
)
def test_every_value_has_its_type_and_shape(typed, values_match_their_shapes, name):
    assert values_match_their_shapes(typed[name]) > 100


@pytest.mark.parametrize("target", ["tensorrt-rtx", "plugins"])
def test_the_graph_in_bfloat16_computes_what_pytorch_computes(typed, checkpoints, target):
    """Eight times float16's limits, and not less than float16 could do: the numbers are bfloat16's."""
    ids = np.random.default_rng(1).integers(0, 256, (1, 24))
    reference, engine = TorchEngine(checkpoints["moe"], taps=True), open_engine(typed[f"bfloat16/{target}"], taps=True)
    assert engine.info.dtype == BF16
    want, got = reference.prefill(ids[:, :23]), engine.prefill(ids[:, :23])
    for _ in range(2):
        assert 2**-9 < relative(got.logits, want.logits) < 8 * MODEL_LIMIT
        want, got = reference.decode(ids[:, 23:], want.cache), engine.decode(ids[:, 23:], got.cache)


@pytest.mark.parametrize("target", ["tensorrt-rtx", "plugins"])
def test_a_graph_in_bfloat16_states_its_types(typed, target):
    """Weights and cache bfloat16, routers float32, and float32 logits: numpy, which reads them, has no bfloat16."""
    path = typed[f"bfloat16/{target}"] / "model.onnx"
    onnx.checker.check_model(path, full_check=True)
    model = onnx.load(path, load_external_data=False)
    name_of = onnx.TensorProto.DataType.Name
    kinds = {tensor.name: name_of(tensor.data_type) for tensor in model.graph.initializer}
    assert {kind for name, kind in kinds.items() if ".router." in name} == {"FLOAT"}
    matrices = [tensor for tensor in model.graph.initializer if len(tensor.dims) >= 2 and ".router." not in tensor.name]
    assert {name_of(tensor.data_type) for tensor in matrices} - {"INT32", "INT64"} == {"BFLOAT16"}
    types = {v.name: name_of(v.type.tensor_type.elem_type) for v in (*model.graph.input, *model.graph.output)}
    assert types["past_key_values.0.key"] == types["present.1.value"] == "BFLOAT16"
    assert types["logits"] == "FLOAT"
    manifest = bundle.open_bundle(typed[f"bfloat16/{target}"]).manifest
    assert manifest["cache"]["dtype"] == BF16
    tests = [entry["self_test"] for entry in manifest["lowering"] if entry["self_test"]]
    assert len(tests) == 3
    assert all(tensorrt.HALF_LIMIT / 16 < t["max_rel_error"] < t["limit"] == 8 * tensorrt.HALF_LIMIT for t in tests)


def test_soft_caps_and_what_follows_the_projection_stay_float32(tiny_model, tmp_path):
    """Gemma 2: a tanh rounded to 8 bits would move scores of 50 by 0.1."""
    from moedge.export.trace import trace

    graph = trace(tiny_model("gemma2"))
    tensorrt.lower(graph, max_length=64, tensorrt="10.3", dtype=BF16)
    kinds = {node.inputs[0].dtype for node in graph.graph if node.op_type == "Tanh" and "mlp" not in str(node.name)}
    gates = [node for node in graph.graph if node.op_type == "Tanh" and node.inputs[0].dtype == ir.DataType.BFLOAT16]
    assert ir.DataType.FLOAT in kinds
    assert len(gates) <= 2, "the gates of two layers"
    logits = next(value for value in graph.graph.outputs if value.name == "logits")
    assert logits.dtype == ir.DataType.FLOAT
    assert logits.producer().op_type == "Mul"


@pytest.mark.parametrize(("dtype", "fits"), [("float16", False), (BF16, True)])
def test_activations_beyond_float16s_range_need_bfloat16(bundles, dtype, fits):
    """Up times 30,000, down over it: every weight fits float16, what up makes of an input does not."""
    graph = portable(bundles)
    for node in nodes.nodes_of(graph, "SparseGLU"):
        for index, factor in ((4, 3e4), (5, 1 / 3e4)):
            value = node.inputs[index]
            value.const_value = ir.tensor(value.const_value.numpy() * np.float32(factor), name=value.name)
    if fits:
        assert tensorrt.lower(graph, max_length=64, tensorrt="10.3", dtype=dtype).cache["dtype"] == BF16
    else:
        with pytest.raises(MoEdgeError, match=r"left float16's range \(65,504\): take --half bfloat16"):
            tensorrt.lower(graph, max_length=64, tensorrt="10.3", dtype=dtype)


def test_another_type_is_refused(bundles):
    with pytest.raises(MoEdgeError, match="float16 or bfloat16, not 'float32'"):
        tensorrt.lower(portable(bundles), max_length=64, dtype="float32")


@pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx-cu13 has no package for this platform")
def test_an_engine_in_bfloat16_is_built_where_there_is_bfloat16(typed, tmp_path):
    from moedge.runtime.device import moedge_trt
    from moedge.runtime.engines import build

    folder = typed["bfloat16/tensorrt-rtx"]
    made = build.build(folder, tmp_path / "engine", ["rtx-3090"], max_length=64, max_prompt=32, taps=True)
    assert (made["dtype"], made["compute_capabilities"]) == (BF16, ["8.6"])
    # A tied embedding may lie in the engine twice; float32 weights would be twice all of this.
    assert made["build"]["engine_bytes"] > made["weight_bytes"]
    with pytest.raises(MoEdgeError, match=r"2080 Ti \(SM75\) has no bfloat16, .* export with --half float16"):
        build.build(folder, tmp_path / "old", ["rtx-2080-ti"], max_length=64)
    assert not (tmp_path / "old").exists()
    # The refusal is NVIDIA's own.
    opened = bundle.open_bundle(folder)
    shapes = moedge_trt.profile_shapes(opened.manifest["model"], max_length=64, max_prompt=32)
    with pytest.raises(moedge_trt.DeviceError, match="HW-specific datatypes: b16"):
        moedge_trt.build(
            moedge_trt.load_tensorrt("tensorrt-rtx"), opened.model_path, shapes, compute_capabilities=["7.5"]
        )


@pytest.mark.parametrize("target", ["tensorrt", "tensorrt-rtx", "plugins"])
def test_left_padding_changes_nothing(typed, target):
    rng = np.random.default_rng(2)
    short, long = rng.integers(0, 256, (1, 6)), rng.integers(0, 256, (1, 9))
    ids = np.concatenate([np.concatenate([np.full((1, 3), 258), short], axis=1), long])
    mask = np.ones_like(ids)
    mask[0, :3] = 0
    engine = open_engine(typed[f"moe/{target}"])
    step = engine.prefill(ids[:, :8], mask[:, :8])
    step = engine.decode(ids[:, 8:], step.cache)
    for row, alone in enumerate((short, long)):
        single = engine.decode(alone[:, -1:], engine.prefill(alone[:, :-1]).cache)
        assert relative(step.logits[row, -1], single.logits[0, -1]) < MODEL_LIMIT


@pytest.mark.parametrize("target", ["tensorrt", "tensorrt-rtx"])
def test_the_graph_is_standard_onnx_with_half_weights_and_float32_routers(typed, target):
    path = typed[f"moe/{target}"] / "model.onnx"
    onnx.checker.check_model(path, full_check=True)
    model = onnx.load(path, load_external_data=False)
    assert not model.functions
    assert {node.domain for node in model.graph.node} == {""}
    kinds = {tensor.name: onnx.TensorProto.DataType.Name(tensor.data_type) for tensor in model.graph.initializer}
    routers = {name: kind for name, kind in kinds.items() if ".router." in name}
    assert routers
    assert set(routers.values()) == {"FLOAT"}
    matrices = [tensor for tensor in model.graph.initializer if len(tensor.dims) == 2 and ".router." not in tensor.name]
    assert {onnx.TensorProto.DataType.Name(tensor.data_type) for tensor in matrices} == {"FLOAT16"}
    types = {value.name: value.type.tensor_type.elem_type for value in [*model.graph.input, *model.graph.output]}
    assert types["past_key_values.0.key"] == types["present.1.value"] == types["logits"] == onnx.TensorProto.FLOAT16


def test_the_manifest_records_executed_tests_and_says_what_the_engine_will_not_be(typed):
    manifest = bundle.open_bundle(typed["moe/tensorrt-rtx"]).manifest
    applied = {entry["rewrite"]: entry for entry in manifest["lowering"] if entry["status"] == "applied"}
    tests = [entry["self_test"] for entry in applied.values() if entry["self_test"]]
    assert len(tests) == 3
    assert all(test["passed"] and 0 < test["max_rel_error"] < tensorrt.HALF_LIMIT for test in tests)
    assert manifest["cache"]["dtype"] == "float16"
    assert "no faster than its dense parent" in manifest["limits"][0]
    # Heads of 8 have no kernel, so the operator was refused and plain products took its place.
    assert any("heads of 8" in entry["reason"] for entry in manifest["lowering"] if entry["status"] == "refused")


def test_the_device_decides_the_form_and_the_manifest_says_so(typed, bundles):
    graph = portable(bundles)
    for name in devices.names():
        device = devices.load(name)
        if "tensorrt" in device.targets:
            form, why = trt_experts.choose(graph, device.tensorrt)
            assert form == ("merged" if device.tensorrt == "10.3" else "plugins")
            assert device.tensorrt in why
    assert trt_experts.choose(graph, None)[0] == "merged"
    with pytest.raises(MoEdgeError, match="no version of TensorRT"):
        trt_experts.choose(graph, "new")
    old, new = (bundle.open_bundle(typed[f"moe/{name}"]).manifest for name in ("tensorrt", "plugins"))
    assert "plugins" not in old
    assert len(new["plugins"]["kernels"]) == 5
    reasons = [next(e["reason"] for e in m["lowering"] if e["rewrite"].startswith("SparseGLU")) for m in (old, new)]
    assert "TensorRT 10.3 cannot bake kernels" in reasons[0]
    assert "TensorRT 10.13 takes kernels" in reasons[1]
    assert "no faster than its dense parent" in old["limits"][0]
    assert "TensorRT 10.9 or newer" in new["limits"][0]
    assert "plugins" not in bundle.open_bundle(typed["dense/plugins"]).manifest


def test_kernels_refuse_what_they_cannot_compute(bundles):
    graph = portable(bundles)
    gate = next(node for node in graph.graph if node.op_type == "SparseGLU").inputs[3]
    gate.shape = ir.Shape([513, *gate.shape[1:]])
    assert trt_experts.choose(graph, "11.0")[0] == "merged"
    assert "513 experts" in trt_experts.choose(graph, "11.0")[1]


def _experts_test(bundles, **options):
    before = portable(bundles)
    after = before.clone()
    edges = [str(node.outputs[0].name) for node in before.graph if node.op_type == "SparseGLU"]
    trt_experts.RewriteExperts("merged").apply(after)
    if options.get("half", True):
        half.convert(after)
    limit = tensorrt.HALF_LIMIT if options.get("half", True) else 2e-6
    return selftest.compare("experts", before, after, edges, limit, **options.get("cases", {}))


def test_merged_experts_are_exact_in_float32(bundles):
    test = _experts_test(bundles, half=False)
    assert test.passed, test
    assert test.max_rel_error > 0


@pytest.mark.parametrize("form", ["operator", "products"])
def test_both_forms_of_attention_are_exact_in_float32(bundles, form):
    before = portable(bundles)
    after = before.clone()
    turned = trt_attention.TurnRotary(form).apply(after)
    attention = trt_attention.RewriteAttention(form).apply(after)
    assert (turned.count, attention.count) == (4, 2)
    assert not [node for node in after.graph if node.op_type == "Slice"]
    for block in (*turned.blocks, *attention.blocks):
        test = selftest.compare("attention", before, after, block.outputs, 2e-6, inside=turned.inside)
        assert test.passed, test


@pytest.mark.parametrize("version", ["10.3", "10.13"])
def test_other_activations_rules_and_compensation_lower(bundles, version):
    """The traced graph with another weight rule, gate activation, selection bias and a compensation input."""
    graph = portable(bundles)
    rng = np.random.default_rng(5)
    for node in graph.graph:
        builder = Builder(graph, before=node)
        if node.op_type == "Route":
            node.attributes["rule"] = ir.AttrString("rule", "softmax")
            bias = builder.initializer(f"{node.outputs[0].name}.bias", 0.01 * rng.standard_normal(6, np.float32))
            node.replace_input_with(1, bias)
        if node.op_type == "SparseGLU":
            node.attributes["activation"] = ir.AttrString("activation", "gelu_tanh")
            extra = builder.initializer(f"{node.name}.c", 0.1 * rng.standard_normal((6, 32), np.float32))
            node.resize_inputs(7)
            node.replace_input_with(6, extra)
    nodes.attach(graph, form="dense")
    lowered = tensorrt.lower(graph, max_length=64, tensorrt=version)
    assert [entry.self_test["passed"] for entry in lowered.rewrites if entry.self_test] == [True, True, True]
    names = {node.op_type for node in graph.graph if node.domain == DOMAIN}
    assert ("CombineCompensated" in names) == (version == "10.13")


MISTAKES = {
    "no known mistake": ("_rows", lambda self: _rows(self, turn=False)),  # H != I: no transposition, but other rows
    "gate and up are swapped": ("_rows", lambda self: _rows(self)[1::-1] + _rows(self)[2:]),
    "every expert runs": ("_selected", lambda self, weights: _selected(self, weights, every=True)),
    "the activation is dropped": ("_activate", lambda self, g: g),
}
_real_rows, _real_selected = trt_experts._Layer._rows, trt_experts._Layer._selected


def _rows(layer, turn=True):
    gate, up, down = _real_rows(layer)
    if not turn:
        shape = (layer.experts * layer.width, layer.hidden)
        down = layer.builder.initializer(f"{layer.down.name}.wrong", layer.down.const_value.numpy().reshape(shape))
    return gate, up, down


def _selected(layer, weights, every):
    selected = _real_selected(layer, weights)
    return layer.float("Add", [layer.float("Sub", [selected, selected]), layer.float("Exp", [
        layer.float("Sub", [selected, selected])
    ])]) if every else selected  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_self_test_catches_and_names(bundles, monkeypatch, mistake):
    name, wrong = MISTAKES[mistake]
    monkeypatch.setattr(trt_experts._Layer, name, wrong)
    assert not _experts_test(bundles).passed
    graph = portable(bundles)
    with pytest.raises(MoEdgeError, match=f"Self-test of 'SparseGLU.* It looks like: {mistake}"):
        tensorrt.lower(graph, max_length=64, tensorrt="10.3")


def test_a_weight_beyond_half_precision_is_refused(bundles, tmp_path):
    graph = portable(bundles)
    name = next(name for name in graph.graph.initializers if name.endswith("mlp.down"))
    value = graph.graph.initializers[name]
    array = value.const_value.numpy().copy()
    array.flat[0] = 1e5
    value.const_value = ir.tensor(array, name=name)
    with pytest.raises(MoEdgeError, match=r"does not fit float16 .*; take --half bfloat16"):
        tensorrt.lower(graph, max_length=64, tensorrt="10.3")


def test_a_half_precision_source_is_refused(bundles):
    graph = portable(bundles)
    half.convert(graph)
    with pytest.raises(MoEdgeError, match="must be float32"):
        tensorrt.lower(graph, max_length=64, tensorrt="10.3")


def test_every_moedge_node_is_gone_after_lowering(bundles):
    graph = portable(bundles)
    tensorrt.lower(graph, max_length=64, tensorrt="10.3")
    assert not [node for node in graph.graph if node.domain == DOMAIN]


@pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx-cu13 has no package for this platform")
@pytest.mark.parametrize("target", ["tensorrt", "tensorrt-rtx", "plugins"])
def test_tensorrt_rtx_builds_the_exported_moe_without_a_gpu(typed, target):
    """The graphs of ``tensorrt`` too: its own runtime cannot be installed here, and the parsers are kin.

    With plugins none is registered, so the function bodies are built: the rest of the graph is what TensorRT gets.
    """
    from moedge.runtime.device import moedge_trt

    opened = bundle.open_bundle(typed[f"moe/{target}"])
    shapes = moedge_trt.profile_shapes(opened.manifest["model"], max_length=64, max_prompt=32)
    taps = {tap["output"]: f"routes.{layer}" for layer, tap in opened.manifest["taps"].items()}
    trt = moedge_trt.load_tensorrt("tensorrt-rtx")
    plan, facts = moedge_trt.build(trt, opened.model_path, shapes, compute_capabilities=["8.6"], taps=taps)
    assert len(plan) > opened.manifest["files"]["model.onnx.data"]["size"]
    assert facts["layers"] < (1000 if target == "plugins" else 500), "dynamic Slices would bring some 25 layers each"


def test_routers_without_matrix_products_choose_the_same_experts(typed, tmp_path):
    """CMoE's experts have unit weights, so a sum in another order changes nothing unless it changes a choice."""
    import onnxruntime

    opened = bundle.open_bundle(typed["moe/tensorrt-rtx"])
    path, count = trt_router.write_without_products(opened, tmp_path)
    graphs = [onnx.load(file, load_external_data=False).graph for file in (opened.model_path, path)]
    floats = [{i.name for i in graph.initializer if i.data_type == onnx.TensorProto.FLOAT} for graph in graphs]
    before, after = (
        [node for node in graph.node if node.op_type in ("MatMul", "Gemm") and node.input[1] in names]
        for graph, names in zip(graphs, floats, strict=True)
    )
    assert count == len(before) >= opened.manifest["model"]["num_layers"]
    assert not after
    tokens = np.random.default_rng(0).integers(0, 256, (1, 40))
    feeds = {"input_ids": tokens, "attention_mask": np.ones_like(tokens), "position_ids": np.arange(40)[None]}
    results = []
    for file in (opened.model_path, path):
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        past = [value for value in session.get_inputs() if value.name.startswith("past")]
        feeds |= {v.name: np.zeros((1, v.shape[1], 0, v.shape[3]), np.float16) for v in past}
        results.append(session.run(["logits"], feeds)[0])
    np.testing.assert_array_equal(*results)


@pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx-cu13 has no package for this platform")
def test_a_moe_builds_for_turing_which_has_no_float32_products(typed, tmp_path):
    from moedge.runtime.engines import build

    engine = build.build(typed["moe/tensorrt-rtx"], tmp_path / "engine", ["rtx-2080-ti"], max_length=64)
    assert engine["compute_capabilities"] == ["7.5"]
    assert engine["build"]["products_as_sums"] >= engine["model"]["num_layers"]
    assert {path.name for path in (tmp_path / "engine").iterdir()} >= {"engine.plan", "manifest.json"}
    assert not list((tmp_path / "engine").glob("tmp*"))


@pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx-cu13 has no package for this platform")
def test_a_moe_engine_is_built_for_every_gpu_that_tensorrt_rtx_knows(typed, tmp_path):
    from moedge.runtime.engines import build

    names = {devices.load(name).compute_capability: name for name in devices.names()}
    rtx = [names[capability] for capability in devices.RTX_CAPABILITIES]
    made = build.build(typed["moe/tensorrt-rtx"], tmp_path / "engine", rtx, max_length=64, max_prompt=32)
    assert made["compute_capabilities"] == list(devices.RTX_CAPABILITIES)


@pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx-cu13 has no package for this platform")
def test_a_tap_that_the_graph_lacks_stops_the_build(typed):
    from moedge.runtime.device import moedge_trt

    opened = bundle.open_bundle(typed["moe/tensorrt"])
    shapes = moedge_trt.profile_shapes(opened.manifest["model"], max_length=64, max_prompt=32)
    with pytest.raises(moedge_trt.DeviceError, match="'nowhere' is not in the parsed network"):
        moedge_trt.build(
            moedge_trt.load_tensorrt("tensorrt-rtx"), opened.model_path, shapes, taps={"nowhere": "routes.0"}
        )


@pytest.mark.gpu
@pytest.mark.parametrize("target", ["tensorrt", "plugins", "tensorrt-rtx"])
def test_an_engine_computes_what_its_graph_computes(typed, tmp_path, target):
    """On a GPU: built for it, run by it, prefill in two pieces and decode, beside ONNX Runtime on the same file."""
    from moedge.runtime.device.moedge_cuda import Cuda
    from moedge.runtime.engines import build

    runtime = "tensorrt-rtx" if target == "tensorrt-rtx" else "tensorrt"
    pytest.importorskip(runtime.replace("-", "_"))
    cuda = Cuda()
    here = cuda.capability()
    cuda.close()
    fitting = [name for name in devices.names() if devices.load(name).compute_capability == here]
    fitting = [name for name in fitting if runtime in devices.load(name).targets]
    if not fitting:
        pytest.skip(f"{runtime} has no engines for compute capability {here}, or no profile has it")
    build.build(typed[f"moe/{target}"], tmp_path / "engine", fitting[:1], max_length=64, max_prompt=12, taps=True)
    ids = np.random.default_rng(3).integers(0, 256, (1, 24))
    reference, engine = open_engine(typed[f"moe/{target}"], taps=True), open_engine(tmp_path / "engine", taps=True)
    want, got = reference.prefill(ids[:, :20]), engine.prefill(ids[:, :20])
    agree = []
    for position in range(20, 24):
        assert relative(got.logits, want.logits) < MODEL_LIMIT
        for layer, experts in want.routes.items():
            agree.append((np.sort(got.routes[layer]) == np.sort(experts)).all(axis=1).mean())
        token = ids[:, position : position + 1]
        want, got = reference.decode(token, want.cache), engine.decode(token, got.cache)
    assert np.mean(agree) > 0.95
    engine.close()


def _native(bundles, monkeypatch=None, attributes=None):
    graph = portable(bundles)
    if attributes is not None:
        monkeypatch.setattr(trt_native, "node_attributes", lambda: attributes)
    return graph, tensorrt.lower(graph, max_length=64, tensorrt="11.0", experts="native")


def test_the_native_layer_computes_what_it_replaces(bundles, tmp_path):
    """``TRT_MoE`` by its function body: whole blocks at export, and the node's layout beside the float32 experts."""
    graph, lowered = _native(bundles)
    ir.save(graph, tmp_path / "model.onnx", external_data="model.onnx.data")
    onnx.checker.check_model(tmp_path / "model.onnx", full_check=True)
    tests = [entry.self_test for entry in lowered.rewrites if entry.rewrite == "SparseGLU -> TRT_MoE"]
    assert [test["passed"] for test in tests] == [True]
    assert tests[0]["max_rel_error"] > 0
    assert lowered.experts == "native"
    made = [node for node in graph.graph if node.domain == DOMAIN]
    assert [node.op_type for node in made] == ["TRT_MoE"] * 2
    _, width, hidden = nodes.nodes_of(portable(bundles), "SparseGLU")[0].inputs[3].shape
    for node in made:
        assert node.attributes["activation_type"].type == ir.AttributeType.INT
        assert [list(value.shape)[1:] for value in node.inputs[3:]] == [[hidden, width]] * 2 + [[width, hidden]]
        assert {str(value.dtype) for value in (node.inputs[0], *node.inputs[2:])} == {"FLOAT16"}


def test_transposed_native_weights_are_caught(bundles, monkeypatch):
    monkeypatch.setattr(trt_experts, "_turned", lambda builder, value: builder.initializer(
        f"{value.name}.wrong", value.const_value.numpy().reshape(len(value.const_value.numpy()), value.shape[2], -1)
    ))  # fmt: skip
    with pytest.raises(MoEdgeError, match="Self-test of 'SparseGLU -> TRT_MoE' failed"):
        _native(bundles)


@pytest.mark.parametrize(
    ("attributes", "right"), [(None, True), ({}, False), ({"activation_type": "silu"}, False)], ids=["1", "none", "str"]
)
@pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx-cu13 has no package for this platform")
def test_nvidias_parser_gives_the_native_layer_its_silu(bundles, tmp_path, monkeypatch, attributes, right):
    """The same parser takes a wrong attribute without a word; the build looks at the parsed layer."""
    from moedge.runtime.device import moedge_trt

    graph, _ = _native(bundles, monkeypatch, attributes)
    trt = moedge_trt.load_tensorrt("tensorrt-rtx")
    log = moedge_trt.logger_class(trt)()
    network = trt.Builder(log).create_network(0)
    parser = trt.OnnxParser(network, log)
    ir.save(graph, tmp_path / "model.onnx", external_data="model.onnx.data")
    assert parser.parse_from_file(str(tmp_path / "model.onnx")), parser.get_error(0)
    if right:
        assert moedge_trt.check_moe_layers(trt, network, "model.onnx") == 2
    else:
        with pytest.raises(moedge_trt.DeviceError, match="without its activation"):
            moedge_trt.check_moe_layers(trt, network, "model.onnx")


def test_the_native_layer_is_refused_with_what_can_be_instead(bundles, monkeypatch):
    graph = portable(bundles)
    for version, message in (
        ("10.13", r"TensorRT 10\.13 does not read TRT_MoE, 11\.0 is the first that does; take --expert-form plugins"),
        ("10.3", r"does not read TRT_MoE.*take --expert-form merged"),
        (None, r"TensorRT for RTX cannot build .* \(SM100, SM103, SM110 only\); take --expert-form merged"),
    ):
        with pytest.raises(MoEdgeError, match=message):
            trt_experts.choose(graph, version, "native")
    with pytest.raises(MoEdgeError, match=r"10\.3 cannot bake kernels .*; take --expert-form merged"):
        trt_experts.choose(graph, "10.3", "plugins")
    with pytest.raises(MoEdgeError, match="'gathered'; known: plugins, native, merged"):
        trt_experts.choose(graph, "11.0", "gathered")
    assert trt_experts.choose(graph, "11.0", "merged")[0] == "merged"
    for node in nodes.nodes_of(graph, "SparseGLU"):
        node.attributes["activation"] = ir.AttrString("activation", "gelu")
    with pytest.raises(MoEdgeError, match="SiLU only, the model uses gelu; take --expert-form plugins"):
        trt_experts.choose(graph, "11.0", "native")
