"""Weight-only int8 and int4 for TensorRT for RTX: what is stored, what it computes, what builds, and named mistakes."""

import re
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from moedge import MoEdgeError
from moedge.configs import devices, tolerances
from moedge.export import bundle
from moedge.export.graph import weights
from moedge.export.graph.build import array_of
from moedge.export.lowering import capabilities
from moedge.export.lowering.check import mistakes
from moedge.export.lowering.trt import engine as tensorrt
from moedge.export.lowering.trt import quantized as trt_quantized
from moedge.export.lowering.trt import weights as trt_weights
from moedge.export.pipeline import export
from moedge.export.quantize import format as quantize
from moedge.export.quantize import moments as calibrate
from moedge.export.quantize.stored import dequantized_weights
from moedge.runtime.engines import build
from moedge.runtime.engines.ort import OrtEngine
from moedge.runtime.parity.given import pair

# Rows of 128 inputs are one block of 128, of 320 (merged down) and 192 (shared) blocks of 64, of 512 (dense) of 128.
HIDDEN, WIDTH, EXPERTS, TOP_K = 128, 512, 5, 2
TARGETS = {8: "tensorrt-rtx-int8", 4: "tensorrt-rtx-int4"}
ALL = [f"{kind}/{target}" for kind in ("dense", "moe") for target in TARGETS.values()]
IDS = np.random.default_rng(1).integers(0, 256, (1, 24))
WINDOWS = np.random.default_rng(0).integers(0, 256, (4, 64))
rtx = pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx-cu13 has no package for this platform")


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Any, tiny_tokenizer: Any) -> dict[str, Path]:
    """Bundles of a dense tiny Llama and of its CMoE conversion, ``kind/target``."""
    from moedge.convert import calibration, methods, modeling

    root = tmp_path_factory.mktemp("bundles")
    model = tiny_llama(hidden=HIDDEN, width=WIDTH, layers=1)
    model.model.norm.weight.data *= 1.5  # logits with a standard deviation of 3, which the limits are derived for
    for layer in model.model.layers:  # random weights of 0.2 make attention sharper than training does
        layer.self_attn.q_proj.weight.data *= 0.25
    model.save_pretrained(root / "checkpoints" / "dense")
    tiny_tokenizer.save_pretrained(root / "checkpoints" / "dense")
    statistics = calibration.collect(model, WINDOWS, k_a=8)
    plan = methods.convert("cmoe", statistics, model, shared=3, active=TOP_K, experts=8, k_a=8)
    modeling.save(modeling.apply(plan, model), plan, tiny_tokenizer, root / "checkpoints" / "moe")
    made = {}
    for kind in ("dense", "moe"):
        for target, path in export(root / "checkpoints" / kind, root / kind, [*TARGETS.values()], label=kind).items():
            made[f"{kind}/{target}"] = path
    return made


def relative(actual: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("name", ALL)
def test_every_class_is_quantised_and_every_byte_is_accounted_for(bundles, name):
    opened = bundle.open_bundle(bundles[name])
    section = opened.manifest.document()["quantization"]
    bits, classes = section["bits"], {entry["tensor_class"]: entry for entry in section["classes"]}
    ffn = ["shared", "experts"] if name.startswith("moe") else ["ffn"]
    assert [c for c in classes if c in quantize.QUANTISED] == ["embedding", "attention", *ffn]  # the head is tied
    # A float16 scale for 128 inputs; the down projection of experts has 320 inputs, blocks of 64, and one row a scale.
    for tensor_class in ("embedding", "attention"):
        assert classes[tensor_class]["bits_per_weight"] == bits + 16 / HIDDEN
    wanted = {
        "ffn": (3 * bits + 16 / 128 * (3 if bits == 4 else 2) + (16 / WIDTH if bits == 8 else 0)) / 3,
        "experts": (3 * bits + 2 * 16 / 128 + 16 / (64 if bits == 4 else 320)) / 3,
        "shared": (3 * bits + 2 * 16 / 128 + 16 / (64 if bits == 4 else 192)) / 3,
    }
    for tensor_class in ffn:
        assert classes[tensor_class]["bits_per_weight"] == pytest.approx(wanted[tensor_class])
    model = onnx.load(opened.model_path, load_external_data=False)
    kinds = {TensorProto.INT4: 4, TensorProto.INT8: 8, TensorProto.FLOAT16: 16, TensorProto.FLOAT: 32}
    stored = sum(
        int(np.prod(t.dims)) * kinds[t.data_type] // 8 for t in model.graph.initializer if t.data_type in kinds
    )
    assert abs(stored - sum(entry["bytes"] for entry in classes.values())) < 400  # integers: shapes, axes, k
    matrices = [t for t in model.graph.initializer if len(t.dims) == 2 and kinds.get(t.data_type, 0) > 8]
    kept = [t.name for t in matrices if not t.name.endswith(".scales")]
    assert all(".router." in found or found.startswith(("rotary", "model.model.rotary")) for found in kept), kept


@pytest.mark.parametrize("name", ALL)
def test_the_graph_is_standard_onnx_and_every_value_has_its_type(bundles, values_match_their_shapes, name):
    path = bundles[name] / "model.onnx"
    onnx.checker.check_model(path, full_check=True)
    model = onnx.load(path, load_external_data=False)
    assert {node.domain for node in model.graph.node} == {""}
    assert sum(node.op_type == "DequantizeLinear" for node in model.graph.node) > 8
    assert values_match_their_shapes(bundles[name]) > 60


@pytest.mark.parametrize("name", ALL)
def test_stored_weights_are_the_originals_to_one_step(bundles, name):
    portable = ir.load(bundles[f"{name.split('/')[0]}/portable"] / "model.onnx")
    opened = bundle.open_bundle(bundles[name])
    bits, seen = opened.manifest.document()["quantization"]["bits"], 0
    for weight, values in dequantized_weights(opened):
        want = array_of(portable.graph.initializers[weight])
        assert values.shape == want.shape
        assert 0 < np.abs(values - want).max() <= np.abs(want).max() / 2 ** (bits - 1) * 1.002
        seen += 1
    router = 2 if name.startswith("moe") else 0  # its gate and up
    assert seen == len(weights.collect(portable)) - router


@pytest.mark.parametrize("name", ALL)
def test_prefill_and_decode_compute_what_the_stored_weights_say(bundles, name):
    reference = OrtEngine(bundles[f"{name.split('/')[0]}/portable"], taps=True, weights_of=bundles[name])
    engine = OrtEngine(bundles[name], taps=True)
    assert engine.info.dtype.startswith("int")
    want, got = reference.prefill(IDS[:, :20]), engine.prefill(IDS[:, :20])
    for position in range(20, 24):
        # Two blocks, each within the half-precision limit of its own output, added to one residual stream.
        assert 0 < relative(got.logits, want.logits) < 2 * tensorrt.HALF_LIMIT
        for layer, experts in (want.routes or {}).items():
            assert (np.sort(got.routes[layer]) == np.sort(experts)).mean() > 0.95
        token = IDS[:, position : position + 1]
        want, got = (each.decode(token, step.cache) for each, step in ((reference, want), (engine, got)))


@pytest.mark.parametrize("name", ALL)
def test_verify_judges_the_graph_and_the_rounding_of_its_weights_apart(bundles, name):
    windows = np.random.default_rng(5).integers(0, 256, (2, 48))
    kind = name.split("/")[0]
    quiet: Any = lambda *_: None  # noqa: E731
    found = pair(bundles[f"{kind}/portable"], bundles[name], "random", windows, 40, "float32", {"threads": 1}, quiet)
    against, kernels = found["parity"]
    missed = [check for check in kernels["verdict"]["checks"] if not check["passed"]]
    assert kernels["verdict"]["passed"], missed
    if kind == "moe":
        assert list(kernels["verdict"]["parts"]) == ["arithmetic", "router", "free"]
        assert kernels["replay"]["router"]["decisions"] == windows.size
    one, two = ((entry["replay"] or entry)["overall"]["kl_ref_test"]["mean"] for entry in (against, kernels))
    assert one > 10 * two, "rounding the weights costs far more than float16"


def test_the_manifest_records_executed_tests_of_every_class(bundles):
    manifest = bundle.open_bundle(bundles["moe/tensorrt-rtx-int4"]).manifest.document()
    found = {entry["rewrite"]: entry for entry in manifest["lowering"] if "int4" in entry["rewrite"]}
    assert {name.partition(":")[0]: entry["nodes"] for name, entry in found.items() if "shared" not in name} == {
        "experts": 3,
        "attention": 4,
        "embedding, lookup": 1,
        "embedding, tied output projection": 1,
    }
    assert sum(entry["nodes"] for name, entry in found.items() if "shared" in name) == 3
    for entry in found.values():
        test = entry["self_test"]
        assert test["passed"]
        assert 0 < test["max_rel_error"] <= tensorrt.HALF_LIMIT
        assert test["quantisation_error"] > 10 * test["max_rel_error"], "4 bits cost far more than float16"
    assert any("SM80 and newer" in limit for limit in manifest["limits"])


def test_profiles_are_those_of_the_same_arithmetic_and_the_same_rounding():
    known = tolerances.load()
    for bits, target in TARGETS.items():
        assert known.profile("dequantized", target).mean_kl == known.profile("float32", "tensorrt-rtx").mean_kl
        assert known.profile("float32", target) == known.profile("float32", f"ort-cpu-int{bits}")


@pytest.mark.parametrize(("columns", "block"), [(576, 64), (1536, 128), (960, 64), (96, 32), (80, 16), (100, 0)])
def test_the_largest_whole_block_is_taken(columns, block):
    assert capabilities.weight_block(columns) == block
    assert (capabilities.weights_rtx(columns=columns) is None) == bool(block)


def test_rows_without_a_whole_block_are_refused_with_what_takes_them():
    weight, array = weights.Weight("w", "attention", "NK", (3, 100)), np.ones((3, 100), np.float32)
    with pytest.raises(MoEdgeError, match=r"Cannot quantise w: its rows of 100 inputs .* take tensorrt-rtx-int8"):
        trt_weights.quantized(weight, array, 4, "rtn", None, False)
    assert trt_weights.quantized(weight, array, 8, "rtn", None, False).block == 100


def test_weights_that_float16_or_no_number_holds_are_refused():
    weight = weights.Weight("w", "attention", "NK", (2, 16))
    for value, message in ((1e7, "does not fit float16"), (np.nan, "NaN or infinite")):
        for bits in (4, 8):
            with pytest.raises(MoEdgeError, match=message):
                trt_weights.quantized(weight, np.full((2, 16), value, np.float32), bits, "rtn", None, False)
    zero = trt_weights.quantized(weight, np.zeros((2, 16), np.float32), 8, "rtn", None, False)
    assert (zero.scales() > 0).all(), "TensorRT refuses scales that are not positive"
    assert not zero.rows.dequantized().any()


# --- mistakes ---------------------------------------------------------------------------------------------------------


class Lowered:
    """A lowered model that was not tested yet, with a place to put a mistake."""

    def __init__(self, before: ir.Model, reference: ir.Model, model: ir.Model, matrices: dict[str, Any]) -> None:
        self.before, self.reference, self.model, self.matrices = before, reference, model.clone(), dict(matrices)

    def change(self, tensor_class: str, part: str, change: Any) -> None:
        """Replace ``part`` (``q`` or ``scales``) of every weight of a class by ``change(array, axis of K)``."""
        for name, matrix in self.matrices.items():
            if matrix.weight.tensor_class == tensor_class:
                value = self.model.graph.initializers[f"{tensor_class}.{name}.{part}"]
                array = change(value.const_value.numpy(), matrix.axis)
                value.const_value = ir.tensor(np.ascontiguousarray(array), name=value.name)
                value.shape = ir.Shape(array.shape)

    def attribute(self, tensor_class: str, name: str, change: Any) -> None:
        for node in self.model.graph:
            if node.op_type == "DequantizeLinear" and node.inputs[0].name.startswith(f"{tensor_class}."):
                node.attributes[name] = ir.AttrInt64(name, change(node.attributes[name].as_int()))

    def failure(self) -> str:
        with pytest.raises(MoEdgeError) as caught:
            trt_quantized._tested(self.before, self.reference, self.model, self.matrices)
        return str(caught.value)


@pytest.fixture(scope="module")
def lowered(bundles: dict[str, Path]) -> Callable[[str, int], Lowered]:
    """Return a function (kind, bits) -> a lowered model of its own."""
    caught: dict[tuple[str, int], Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        for kind, bits in (("dense", 4), ("dense", 8), ("moe", 4)):
            patch.setattr(trt_quantized, "_tested", lambda *args, key=(kind, bits): caught.update({key: args}) or [])
            trt_quantized.lower(ir.load(bundles[f"{kind}/portable"] / "model.onnx"), max_length=64, bits=bits)
    return lambda kind, bits: Lowered(*caught[kind, bits])


def swapped_nibbles(q: np.ndarray, _: int) -> np.ndarray:
    return q.reshape(-1, 2)[:, ::-1].reshape(q.shape)


MISTAKES = {
    "abs": ("scales", lambda s, _: np.abs(s), "the sign of the block scales is lost (abs)"),
    "dropped": ("scales", lambda s, _: np.ones_like(s), "the block scales are dropped"),
    "transposed": ("scales", lambda s, _: s.T.reshape(s.shape), "the block scales are transposed"),
    "row": ("scales", lambda s, axis: np.roll(s, 1, 1 - axis), "each row has the scales of the row before it"),
    "block": ("scales", lambda s, axis: np.roll(s, 1, axis), "each block has the scale of the one before it"),
}


@pytest.mark.parametrize(
    ("kind", "tensor_class", "mistake"),
    [
        *(("moe", "experts", mistake) for mistake in ("abs", "dropped")),
        *(("dense", "attention", mistake) for mistake in ("abs", "dropped", "row")),
        *(("dense", "embedding", mistake) for mistake in ("abs", "dropped")),
        *(("moe", "shared", mistake) for mistake in ("transposed", "block")),
    ],
)
def test_a_mistake_with_four_bit_blocks_is_caught_and_named(lowered, kind, tensor_class, mistake):
    part, change, name = MISTAKES[mistake]
    broken = lowered(kind, 4)
    if mistake in ("transposed", "block"):  # only rows of several blocks show these: down of the shared expert
        broken.matrices = {
            key: value
            for key, value in broken.matrices.items()
            if value.weight.tensor_class != "shared" or value.blocks > 1
        }
    broken.change(tensor_class, part, change)
    said = broken.failure()
    assert name in said, said
    assert tensor_class in said or "experts" in said


@pytest.mark.parametrize(
    ("tensor_class", "name"), [("attention", "values of neighbouring outputs"), ("ffn", "nibbles")]
)
def test_swapped_nibbles_are_named(lowered, tensor_class, name):
    broken = lowered("dense", 4)
    broken.change(tensor_class, "q", swapped_nibbles)
    assert name in broken.failure()


def test_a_wrong_block_size_is_named_or_does_not_run(lowered):
    broken = lowered("dense", 4)
    broken.attribute("ffn", "block_size", lambda block: block // 2)
    assert "could not run" in broken.failure(), "as many scales as blocks are needed"
    broken.change("ffn", "scales", lambda s, axis: np.concatenate([s, s], axis))
    broken.matrices = {
        k: v for k, v in broken.matrices.items() if v.weight.tensor_class != "ffn" or v.blocks > 1
    }  # of one block both halves have the right scale
    assert "the block size is wrong (half of it, the scales of a row repeated)" in broken.failure()


@pytest.mark.parametrize(
    ("tensor_class", "change", "name"),
    [
        ("attention", lambda s, _: np.ones_like(s), "the block scales are dropped"),
        ("ffn", lambda s, _: np.roll(s, 1), "each row has the scales of the row before it"),
    ],
)
def test_a_mistake_with_scales_of_a_row_is_caught_and_named(lowered, tensor_class, change, name):
    broken = lowered("dense", 8)
    broken.change(tensor_class, "scales", change)
    assert name in broken.failure()


def test_signed_values_read_as_unsigned_are_named():
    rng = np.random.default_rng(3)
    weight = weights.Weight("w", "attention", "NK", (8, 64))
    made = trt_weights.quantized(weight, rng.standard_normal((8, 64)).astype(np.float32), 4, "rtn", None, False)
    unsigned = (made.integers() & 15) * np.repeat(made.scales().astype(np.float32), made.block, axis=1)
    x = rng.standard_normal((5, 64)).astype(np.float32)
    found = mistakes.explain_product(x, x @ made.rows.dequantized().T, x @ unsigned.T, made.rows)
    assert found == ["signed values are read as unsigned"]


def test_scales_on_the_wrong_axis_are_named(lowered):
    broken = lowered("dense", 8)
    square = {k: v for k, v in broken.matrices.items() if v.weight.shape == (HIDDEN, HIDDEN)}  # q and o projections
    assert len(square) == 2
    for node in broken.model.graph:
        if node.op_type == "DequantizeLinear" and node.inputs[0].name.removesuffix(".q").split(".", 1)[1] in square:
            node.attributes["axis"] = ir.AttrInt64("axis", 1 - node.attributes["axis"].as_int())
    assert "the scales run along the inputs instead of the outputs" in broken.failure()


def test_a_matrix_that_is_left_in_float_stops_the_export(bundles, monkeypatch):
    write = trt_weights.write

    def forgetful(model: ir.Model, matrices: dict[str, Any]) -> Any:
        return write(model, dict(list(matrices.items())[:-1]))

    monkeypatch.setattr(trt_weights, "write", forgetful)
    with pytest.raises(MoEdgeError, match=r"Quantisation to 4 bits is incomplete: ffn takes [\d,]+ bytes instead of"):
        trt_quantized.lower(ir.load(bundles["dense/portable"] / "model.onnx"), max_length=64, bits=4)


# --- GPTQ -------------------------------------------------------------------------------------------------------------


def test_integers_chosen_on_a_text_lose_less_where_it_counts(bundles):
    portable = bundle.open_bundle(bundles["moe/portable"])
    graph, moments = ir.load(portable.model_path), calibrate.moments(portable, WINDOWS)
    for name, weight in weights.collect(graph).items():
        if name not in moments:
            continue
        original, down = weights.array(graph.graph.initializers[name], weight), name.endswith("mlp.down")
        inputs = moments[name]
        nearest, chosen = (
            trt_weights.quantized(weight, original, 4, method, inputs, down) for method in ("rtn", "gptq")
        )
        assert chosen.rows.nbytes == nearest.rows.nbytes
        lost = []
        for made in (nearest, chosen):
            error = (made.rows.dequantized() - original).reshape(-1, *original.shape[-2:])
            each = inputs if inputs.ndim == 3 else np.broadcast_to(inputs, (len(error), *inputs.shape))
            lost.append(sum(float(np.einsum("nk,kl,nl->", e, m, e)) for e, m in zip(error, each, strict=True)))
        assert lost[1] < 0.9 * lost[0], name


# --- engines ----------------------------------------------------------------------------------------------------------


@rtx
@pytest.mark.parametrize(
    ("bits", "names"), [(4, ["rtx-3090", "rtx-4090", "rtx-5090"]), (8, ["rtx-2080-ti", "rtx-4090"])]
)
def test_engines_are_built_without_a_gpu(bundles, tmp_path, bits, names):
    made = build.build(bundles[f"moe/{TARGETS[bits]}"], tmp_path / "engine", names, max_length=64, max_prompt=32)
    manifest = made.document()
    assert manifest["target"] == TARGETS[bits]
    assert manifest["build"]["products_as_sums"] == (2 if bits == 8 else 0), "float32 routers for SM75"
    assert build.open_file(tmp_path / "engine").plan()


@pytest.mark.parametrize("family", ["tensorrt-rtx-int4", "tensorrt-rtx-int8"])
def test_devices_are_refused_with_what_they_take(bundles, tmp_path, family):
    with pytest.raises(MoEdgeError, match="make an archive with"):
        build.build(bundles[f"dense/{family}"], tmp_path / "engine", ["jetson-agx-orin"])
    reason = devices.refusal(family, devices.load("rtx-2080-ti"))
    assert (reason is None) == family.endswith("int8")
    assert reason is None or "begin with SM80; export the target tensorrt-rtx-int8" in reason


@rtx
@pytest.mark.parametrize(("bits", "message"), [(4, "must divide into whole blocks"), (8, "must all be positive")])
def test_a_broken_graph_is_no_engine(bundles, tmp_path, bits, message):
    """Blocks that are not whole; a negative scale of 8-bit weights."""
    folder = tmp_path / "bundle"
    shutil.copytree(bundles[f"dense/{TARGETS[bits]}"], folder)
    model = onnx.load(folder / "model.onnx")
    scales = next(t for t in model.graph.initializer if t.name.startswith("ffn.") and t.name.endswith(".scales"))
    array = numpy_helper.to_array(scales)
    axis = int(np.argmin(array.shape))
    changed = np.concatenate([array] * 3, axis) if bits == 4 else -array
    scales.CopyFrom(numpy_helper.from_array(changed, scales.name))
    manifest = bundle.open_bundle(folder).manifest.document()
    for name in ("model.onnx", "model.onnx.data", "manifest.json"):
        (folder / name).unlink()
    onnx.save(model, folder / "model.onnx", save_as_external_data=True, location="model.onnx.data", size_threshold=0)
    bundle.seal(folder, bundle.Manifest.model_validate(manifest))
    with pytest.raises(MoEdgeError, match=message):
        build.build(folder, tmp_path / "engine", ["rtx-4090"], max_length=64, max_prompt=32)
    assert not (tmp_path / "engine").exists()


def product(bits: int, block: int | None, *, columns: int = 256, unsigned: bool = False) -> bytes:
    """x [t, K] times a weight [N, K] behind DequantizeLinear; ``block`` None: one scale a row."""
    rng, rows = np.random.default_rng(0), 256
    kind = {(4, False): TensorProto.INT4, (8, False): TensorProto.INT8, (4, True): TensorProto.UINT4}[bits, unsigned]
    q = rng.integers(0, 256, rows * columns * bits // 8).astype(np.uint8).tobytes()
    scales = rng.uniform(0.001, 0.01, (rows, -(-columns // block)) if block else rows).astype(np.float16)
    how = {"axis": 1, "block_size": block} if block else {"axis": 0}
    nodes = [
        helper.make_node("DequantizeLinear", ["q", "s"], ["w"], **how),
        helper.make_node("Gemm", ["x", "w"], ["y"], transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT16, ["t", columns])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT16, ["t", rows])],
        [helper.make_tensor("q", kind, (rows, columns), q, raw=True), numpy_helper.from_array(scales, "s")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11).SerializeToString()


def built(graph: bytes, capability: str, columns: int = 256) -> str:
    """Readable text of the engine, or the reason why there is none."""
    import tensorrt_rtx as trt

    from moedge.runtime.device.moedge_trt import logger_class

    log = logger_class(trt)()
    builder = trt.Builder(log)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log)
    if not parser.parse(graph):
        return "parser: " + str(parser.get_error(0))
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, capability), 0)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    profile = builder.create_optimization_profile()
    profile.set_shape("x", (1, columns), (16, columns), (64, columns))
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        return "builder: " + "; ".join(log.errors)
    return b"\n".join(re.findall(rb"[ -~]{8,}", bytes(memoryview(plan)))).decode()


@rtx
@pytest.mark.parametrize(
    ("bits", "block", "fused"), [(4, 128, True), (4, 64, True), (8, None, True), (8, 128, False), (4, None, False)]
)
def test_which_forms_are_unpacked_inside_the_product(bits, block, fused):
    """Measured on TensorRT-RTX 1.7.1. What is not fused writes the float16 matrix to memory in each call."""
    text = built(product(bits, block), "SM89")
    assert ("backbone=gemm" in text) == fused, text[:400]
    assert ("function={ name=__myl_" in text) != fused


@rtx
def test_what_tensorrt_rtx_refuses_is_what_legality_says():
    assert "HW-specific datatypes: int4" in built(product(4, 128), "SM75")
    assert "backbone=gemm" in built(product(8, None), "SM75")
    assert "must divide into whole blocks" in built(product(4, 128, columns=576), "SM89", 576)
    # No refusal, and no block of 128: the parser divides 192 inputs by 2 scales. ONNX reads 128 and 64.
    assert "backbone=gemm" in built(product(4, 128, columns=192), "SM89", 192)
    assert built(product(4, 128, unsigned=True), "SM89").startswith("parser: ")
