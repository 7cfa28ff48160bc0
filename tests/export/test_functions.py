"""Each operator's ONNX body means what its torch implementation does, in ONNX Runtime and in onnx.reference."""

import numpy as np
import onnx
import onnx.inliner
import onnxruntime
import pytest
import torch
from onnx import helper
from onnx.reference import ReferenceEvaluator

from moedge.convert import ops
from moedge.convert.ops import sparse
from moedge.export import attention  # noqa: F401  attention registers its operator
from moedge.export.functions import DOMAIN, OPSET, bodies

# fp32 sums of up to ~100 terms of order 1, in another order: 100 * 2^-24 = 6e-6 of the largest value.
RELATIVE = 6e-6


def run(name, arrays, outputs, attributes, functions):
    """Run one moedge node with all function bodies attached; return ORT's and onnx.reference's outputs.

    An array that is None is an input left out; there is one more result, of the node with its body in its place.
    """
    names = ["" if a is None else f"i{n}" for n, a in enumerate(arrays)], [f"o{n}" for n in range(outputs)]
    node = helper.make_node(name, *names, domain=DOMAIN)
    node.attribute.extend(helper.make_attribute(key, value) for key, value in attributes.items())
    inputs = [
        helper.make_tensor_value_info(f"i{n}", helper.np_dtype_to_tensor_dtype(a.dtype), [None] * a.ndim)
        for n, a in enumerate(arrays)
        if a is not None
    ]
    graph = helper.make_graph([node], "g", inputs, [helper.make_empty_tensor_value_info(n) for n in names[1]])
    model = helper.make_model(
        graph,
        functions=list(functions.values()),
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)],
        ir_version=10,
    )
    # Types of the outputs come from the inlined bodies: once an export has registered the operators' schemas in this
    # process, inference stops at those and knows none.
    typed = onnx.shape_inference.infer_shapes(onnx.inliner.inline_local_functions(model))
    del model.graph.output[:]
    model.graph.output.extend(typed.graph.output)
    onnx.checker.check_model(model, full_check=True)
    feeds = {f"i{n}": a for n, a in enumerate(arrays) if a is not None}
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    inlined = ReferenceEvaluator(onnx.inliner.inline_local_functions(model))
    return session.run(None, feeds), ReferenceEvaluator(model).run(None, feeds), inlined.run(None, feeds)


def close(actual, expected, factor=1):
    if expected.dtype.kind in "iu":
        np.testing.assert_array_equal(actual, expected)
    else:
        assert np.abs(actual - expected).max() <= factor * RELATIVE * max(np.abs(expected).max(), 1e-30)


def check(name, op, tensors, attributes, functions, factor=1):
    """``factor``: how often a rounding counts."""
    expected = op(*tensors, *attributes.values())
    expected = expected if isinstance(expected, tuple) else (expected,)
    arrays = [None if t is None else t.numpy() for t in tensors]
    while arrays[-1] is None:  # only an input before another has to be left empty
        arrays.pop()
    for results in run(name, arrays, len(expected), attributes, functions):
        for actual, want in zip(results, expected, strict=True):
            assert actual.dtype == want.numpy().dtype
            close(actual, want.numpy(), factor)


def sparse_glu(*arguments):
    """The torch operator reads the number of experts, last here, from the shape of gate."""
    return torch.ops.moedge.sparse_glu(*arguments[:-1])


def gathered_glu(*arguments):
    """The same with thresholds: they are the last tensor, and in torch stand behind the activation."""
    *tensors, h_threshold, activation, _, ramp = arguments
    return torch.ops.moedge.sparse_glu(*tensors, activation, h_threshold, ramp)


def problem(tokens, experts, top_k, hidden=24, width=10, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    scores = draw(tokens, experts)
    indices, weights = torch.ops.moedge.route(scores, None, None, top_k, "softmax")
    x, down = draw(tokens, hidden), draw(experts, hidden, width)
    return x, indices, weights, draw(experts, width, hidden), draw(experts, width, hidden), down, draw(experts, hidden)


@pytest.mark.parametrize("rule", ops.RULES)
@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(1, 4, 1), (7, 6, 3), (5, 3, 3)])
def test_route(rule, tokens, experts, top_k):
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(tokens, experts, generator=generator)
    scores = torch.sigmoid(scores) if rule == "normalised" else scores
    bias = torch.randn(experts, generator=generator)
    scale = torch.randn(experts, generator=generator) if rule == "scaled" else None
    check("Route", torch.ops.moedge.route, [scores, bias, scale], {"top_k": top_k, "rule": rule}, bodies(rule=rule))


def test_route_gives_ties_to_the_lower_expert_everywhere():
    scores = torch.tensor([[1.0, 3.0, 3.0, 1.0], [2.0, 2.0, 2.0, 2.0]])
    check("Route", torch.ops.moedge.route, [scores, torch.zeros(4), None], {"top_k": 3, "rule": "unit"}, bodies())


@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(1, 4, 2), (9, 5, 2), (6, 8, 8), (5, 1, 1)])
def test_chain_links(tokens, experts, top_k):
    x, indices, weights, gate, up, down, compensation = problem(tokens, experts, top_k)
    functions = bodies()
    rows, offsets, inverse = torch.ops.moedge.dispatch(x, indices, experts)
    check("Dispatch", torch.ops.moedge.dispatch, [x, indices], {"num_experts": experts}, functions)
    hidden = torch.ops.moedge.grouped_glu(rows, offsets, gate, up, "silu")
    check("GroupedGLU", torch.ops.moedge.grouped_glu, [rows, offsets, gate, up], {"activation": "silu"}, functions)
    out = torch.ops.moedge.grouped_linear(hidden, offsets, down)
    check("GroupedLinear", torch.ops.moedge.grouped_linear, [hidden, offsets, down], {}, functions)
    with_compensation = bodies(compensation=True)
    check("Combine", torch.ops.moedge.combine, [out, inverse, indices, weights, compensation], {}, with_compensation)


@pytest.mark.parametrize("form", ["chain", "dense", "tiled"])
@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
@pytest.mark.parametrize("compensated", [False, True])
def test_sparse_glu(form, activation, compensated):
    *tensors, compensation = problem(tokens=11, experts=5, top_k=2)
    tensors.append(compensation if compensated else None)
    functions = bodies(activation=activation, compensation=compensated, form=form)
    check("SparseGLU", sparse_glu, tensors, {"activation": activation, "num_experts": 5}, functions)


def limits(*shape):
    return 0.2 + torch.rand(*shape, generator=torch.Generator().manual_seed(8))


STEEP = 2 + 1 / 0.1  # with a ramp of 0.1 a rounding of a value that is masked counts so often


@pytest.mark.parametrize("kind", [torch.float32, torch.float16])
def test_keep_large(kind):
    x = torch.randn(9, 24, generator=torch.Generator().manual_seed(1))
    x[0], x[1, :4] = 0.0, torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0])
    threshold = limits(24)
    x[2], x[3] = threshold, threshold * 1.1
    results = run("KeepLarge", [x.to(kind).numpy(), threshold.numpy()], 1, {"ramp": 0.1}, bodies())
    want = torch.ops.moedge.keep_large(x.to(kind), threshold, 0.1).numpy()
    for (got,) in results:
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
        np.testing.assert_array_equal(got == 0, want == 0)
        np.testing.assert_array_equal(np.isinf(got), np.isinf(want))
        # One more rounding than torch, if at all: threshold * ramp, in float32.
        unit = np.finfo(want.dtype).eps
        np.testing.assert_allclose(got, want, rtol=2 * unit, atol=STEEP * 2.0**-24)


@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(1, 4, 2), (9, 5, 2), (5, 1, 1)])
def test_grouped_glu_with_thresholds(tokens, experts, top_k):
    x, indices, _, gate, up, *_ = problem(tokens, experts, top_k)
    rows, offsets, _ = torch.ops.moedge.dispatch(x, indices, experts)
    tensors = [rows, offsets, gate, up, limits(experts, 10)]

    def op(rows, offsets, gate, up, h_threshold, activation, ramp):
        return torch.ops.moedge.grouped_glu(rows, offsets, gate, up, activation, h_threshold, ramp)

    check("GroupedGLU", op, tensors, {"activation": "silu", "ramp": 0.1}, bodies(gather=True), STEEP)


@pytest.mark.parametrize("form", ["chain", "dense", "tiled"])
@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
@pytest.mark.parametrize("compensated", [False, True])
def test_sparse_glu_with_thresholds(form, activation, compensated):
    """Without compensation its input is left empty before the thresholds: every runtime has to take that."""
    *tensors, compensation = problem(tokens=11, experts=5, top_k=2)
    tensors += [compensation if compensated else None, limits(5, 10)]
    functions = bodies(activation=activation, compensation=compensated, form=form, gather=True)
    attributes = {"activation": activation, "num_experts": 5, "ramp": 0.1}
    check("SparseGLU", gathered_glu, tensors, attributes, functions, STEEP)


@pytest.mark.parametrize(
    "mistake",
    [lambda t: t.flip(1), lambda t: t.roll(1, 1), lambda t: t.roll(1, 0), lambda t: torch.full_like(t, 1e-30)],
    ids=["wrong channel order", "threshold of the neighbour", "threshold of another expert", "thresholds ignored"],
)
def test_mutation_of_thresholds_is_seen(mistake):
    *tensors, _ = problem(tokens=11, experts=5, top_k=2)
    limit, functions = limits(5, 10), bodies(gather=True)
    attributes = {"activation": "silu", "num_experts": 5, "ramp": 0.1}
    expected = gathered_glu(*tensors, None, limit, *attributes.values()).numpy()
    arrays = [*(t.numpy() for t in tensors), None, mistake(limit).numpy()]
    for (got,) in run("SparseGLU", arrays, 1, attributes, functions):
        with pytest.raises(AssertionError):
            close(got, expected, STEEP)


@pytest.mark.parametrize("compensated", [False, True])
@pytest.mark.parametrize("tokens", [13, 40], ids=["grouped", "all at once"])
def test_sparse_glu_matches_the_definition_in_float64(compensated, tokens):
    x, indices, weights, gate, up, down, compensation = problem(tokens=tokens, experts=6, top_k=2)
    assert sparse.all_at_once(x, gate, 2) == (tokens == 40)
    assert not sparse.all_at_once(x.half(), gate, 2)
    extra = compensation if compensated else None
    got = torch.ops.moedge.sparse_glu(x, indices, weights, gate, up, down, extra, "silu")
    x, gate, up, down = (t.double() for t in (x, gate, up, down))
    hidden = torch.nn.functional.silu(torch.einsum("th,eih->tei", x, gate)) * torch.einsum("th,eih->tei", x, up)
    each = torch.einsum("tei,ehi->teh", hidden, down)
    mix = torch.zeros(tokens, 6, dtype=torch.double).scatter(1, indices.long(), weights.double())
    want = torch.einsum("te,teh->th", mix, each)
    if compensated:
        want += (mix == 0).double() @ compensation.double()
    close(got.double().numpy(), want.numpy())


def test_every_torch_operator_passes_opcheck():
    x, indices, weights, gate, up, down, compensation = problem(tokens=6, experts=4, top_k=2)
    calls = {
        torch.ops.moedge.route.default: (torch.randn(6, 4), torch.zeros(4), None, 2, "unit"),
        torch.ops.moedge.dispatch.default: (x, indices, 4),
        torch.ops.moedge.sparse_glu.default: (x, indices, weights, gate, up, down, compensation, "silu"),
        torch.ops.moedge.attention.default: (
            torch.randn(2, 4, 3, 8),
            torch.randn(2, 2, 5, 8),
            torch.randn(2, 2, 5, 8),
            torch.ones(2, 5, dtype=torch.bool),
            0.3,
            2,
            1.5,
        ),
    }
    for op, arguments in calls.items():
        torch.library.opcheck(op, arguments)


@pytest.mark.parametrize("softcap", [0.0, 0.7])
@pytest.mark.parametrize("window", [0, 1, 3])
@pytest.mark.parametrize(("new", "total"), [(5, 5), (1, 6), (3, 8)])
def test_causal_attention_with_cache_and_left_padding(new, total, window, softcap):
    generator = torch.Generator().manual_seed(2)
    query = torch.randn(2, 6, new, 8, generator=generator)
    key, value = torch.randn(2, 2, 2, total, 8, generator=generator)
    mask = torch.ones(2, total, dtype=torch.bool)
    mask[0, :2] = False
    if new == total:
        mask[0, :2] = True  # a query row that sees nothing is undefined, and masked by every caller
        mask[0, 3] = False
    attributes = {"scale": 8**-0.5, "window": window, "softcap": softcap}
    functions = bodies(window=True, softcap=softcap > 0)
    check("CausalAttention", torch.ops.moedge.attention, [query, key, value, mask], attributes, functions)


def test_windowed_attention_is_the_definition():
    generator = torch.Generator().manual_seed(3)
    query, key, value = (torch.randn(1, 1, 6, 4, generator=generator, dtype=torch.double) for _ in range(3))
    mask = torch.ones(1, 6, dtype=torch.bool)
    got = torch.ops.moedge.attention(query, key, value, mask, 0.5, 2, 1.5)
    for s in range(6):
        seen = [s] if s == 0 else [s - 1, s]
        scores = torch.stack([1.5 * torch.tanh(0.5 * (query[0, 0, s] @ key[0, 0, i]) / 1.5) for i in seen])
        want = torch.softmax(scores, 0) @ value[0, 0, seen]
        torch.testing.assert_close(got[0, s, 0], want)


def test_mutation_swapped_gate_and_up_is_seen():
    *tensors, _ = problem(tokens=4, experts=3, top_k=2)
    swapped = [*tensors[:3], tensors[4], tensors[3], tensors[5], None]
    expected = torch.ops.moedge.sparse_glu(*tensors, None, "silu").numpy()
    arrays = [t.numpy() for t in swapped if t is not None]
    got = run("SparseGLU", arrays, 1, {"activation": "silu", "num_experts": 3}, bodies())[0][0]
    with pytest.raises(AssertionError):
        close(got, expected)


def test_bodies_hold_no_data_dependent_control_flow():
    for form in ("chain", "dense", "tiled"):
        for function in bodies(form=form).values():
            assert not {node.op_type for node in function.node} & {"Loop", "If", "Scan", "NonZero"}
