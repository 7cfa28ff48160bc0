"""The ONNX side of the ``moedge::`` operators: schema and function body in standard operators.

A traced file holds a node per operator and, as model-local functions, these bodies. Any ONNX runtime and
``onnx.reference`` can therefore run the file; a lowering replaces nodes that its target has a kernel for.

Bodies are ONNX text (opset 18), read as code. A body cannot branch on an attribute, so :func:`bodies` writes the ones
for a model's activation and weight rule; a model that mixes rules has none and is refused by ``trace``.

Shapes: T tokens, H hidden, I expert width, E experts, k active, R = T*k rows; attention: B batch, S new tokens, L past
and new, N heads, G key/value heads, D head size.
"""

from __future__ import annotations

from functools import cache

import onnx
import onnx.defs
import onnx.parser

DOMAIN = "moedge"
VERSION = 1
OPSET = 18

_FLOATS = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]
# operator: (inputs, outputs, required attributes). "name:type"; "?" marks an optional input.
_SIGNATURES: dict[str, tuple[str, str, dict[str, str]]] = {
    "Route": (
        "scores:tensor(float) selection_bias:tensor(float) scale:tensor(float)?",
        "indices:tensor(int32) weights:tensor(float)",
        {"top_k": "INT", "rule": "STRING"},
    ),
    "SparseGLU": (
        "x:T indices:tensor(int32) weights:tensor(float) gate:T up:T down:T compensation:T? h_threshold:tensor(float)?",
        "y:T",
        {"activation": "STRING", "num_experts": "INT"},
    ),
    "Dispatch": (
        "x:T indices:tensor(int32)",
        "rows:T offsets:tensor(int32) inverse:tensor(int32)",
        {"num_experts": "INT"},
    ),
    "GroupedGLU": (
        "rows:T offsets:tensor(int32) gate:T up:T h_threshold:tensor(float)?",
        "y:T",
        {"activation": "STRING"},
    ),
    "GroupedLinear": ("rows:T offsets:tensor(int32) weight:T", "y:T", {}),
    "Combine": (
        "rows:T inverse:tensor(int32) indices:tensor(int32) weights:tensor(float) compensation:T?",
        "y:T",
        {},
    ),
    "KeepLarge": ("x:T threshold:tensor(float)", "y:T", {"ramp": "FLOAT"}),
    "GatheredGLU": ("x:T gate:T up:T h_limits:tensor(float)", "y:T", {"activation": "STRING"}),
    "GatheredLinear": ("x:T weight:T", "y:T", {}),
    # Not "Attention": TensorRT's importer takes that name in any domain (docs/node-forms.md 2).
    "CausalAttention": (
        "query:T key:T value:T attention_mask:tensor(bool)",
        "y:T",
        {"scale": "FLOAT", "window": "INT", "softcap": "FLOAT"},
    ),
}


_OPTIONAL = {"SparseGLU": {"ramp": "FLOAT"}, "GroupedGLU": {"ramp": "FLOAT"}}
"""Attributes of nodes with ``h_threshold`` alone."""

_PLUGIN_ATTRIBUTES = ("plugin_namespace", "plugin_version")
"""What a parser of TensorRT reads to find a node's plugin (``lowering/trt/plugins.py``); nobody else looks."""


@cache
def register_schemas() -> None:
    """Register an ``OpSchema`` for each operator in this process (exporters and shape inference look there)."""
    for name, (inputs, outputs, attributes) in _SIGNATURES.items():
        schema = onnx.defs.OpSchema(
            name,
            DOMAIN,
            VERSION,
            inputs=[_parameter(text) for text in inputs.split()],
            outputs=[_parameter(text) for text in outputs.split()],
            type_constraints=[("T", _FLOATS, "float")] if ":T" in inputs else [],
            attributes=[
                onnx.defs.OpSchema.Attribute(key, getattr(onnx.defs.OpSchema.AttrType, kind), required=True)
                for key, kind in attributes.items()
            ]
            + [
                onnx.defs.OpSchema.Attribute(key, onnx.defs.OpSchema.AttrType.STRING, required=False)
                for key in _PLUGIN_ATTRIBUTES
            ]
            + [
                onnx.defs.OpSchema.Attribute(key, getattr(onnx.defs.OpSchema.AttrType, kind), required=False)
                for key, kind in _OPTIONAL.get(name, {}).items()
            ],
        )
        onnx.defs.register_schema(schema)


def attributes_of(operator: str) -> tuple[str, ...]:
    """Names of the attributes that every node of an operator of ours has; none for an operator that is not ours."""
    return tuple(_SIGNATURES[operator][2]) if operator in _SIGNATURES else ()


def _parameter(text: str) -> onnx.defs.OpSchema.FormalParameter:
    name, kind = text.split(":", 1)
    options = onnx.defs.OpSchema.FormalParameterOption
    option = options.Optional if kind.endswith("?") else options.Single
    return onnx.defs.OpSchema.FormalParameter(name, kind.rstrip("?"), param_option=option)


_ACTIVATE = {
    # name -> statements that turn g into a
    "silu": "s = Sigmoid (g)  a = Mul (g, s)",
    "gelu_tanh": """
        c3 = CastLike (k_cubic, g)  c1 = CastLike (k_scale, g)  half = CastLike (k_half, g)  a_one = CastLike (k_one, g)
        g2 = Mul (g, g)  g3 = Mul (g2, g)  gc = Mul (g3, c3)  gs = Add (g, gc)  gt = Mul (gs, c1)
        th = Tanh (gt)  tp = Add (th, a_one)  gh = Mul (g, half)  a = Mul (gh, tp)""",
    "gelu": """
        r2 = CastLike (k_rsqrt2, g)  half = CastLike (k_half, g)  a_one = CastLike (k_one, g)
        ge = Mul (g, r2)  er = Erf (ge)  ep = Add (er, a_one)  gh = Mul (g, half)  a = Mul (gh, ep)""",
}
_CONSTANTS = {
    "silu": "",
    "gelu_tanh": """
        k_cubic = Constant <value_float = 0.044715> ()  k_scale = Constant <value_float = 0.7978845608028654> ()
        k_half = Constant <value_float = 0.5> ()  k_one = Constant <value_float = 1.0> ()""",
    "gelu": """
        k_rsqrt2 = Constant <value_float = 0.7071067811865476> ()
        k_half = Constant <value_float = 0.5> ()  k_one = Constant <value_float = 1.0> ()""",
}
_WEIGHTS = {
    # name -> statements that turn scores, chosen [T, k] int64 (and scale) into weights [T, k]
    "unit": """
        as_float = Cast <to = 1> (chosen)  zeros = Sub (as_float, as_float)
        one = Constant <value_float = 1.0> ()  weights = Add (zeros, one)""",
    "scaled": """
        p = Softmax <axis = -1> (scores)  ps = Mul (p, scale)  pc = GatherElements <axis = 1> (ps, chosen)
        one = Constant <value_float = 1.0> ()  weights = Add (pc, one)""",
    "softmax": "sc = GatherElements <axis = 1> (scores, chosen)  weights = Softmax <axis = -1> (sc)",
    "probability": "p = Softmax <axis = -1> (scores)  weights = GatherElements <axis = 1> (p, chosen)",
    "normalised": """
        sc = GatherElements <axis = 1> (scores, chosen)  last = Constant <value_ints = [-1]> ()
        total = ReduceSum <keepdims = 1> (sc, last)  weights = Div (sc, total)""",
}

_ROUTE = """
<domain: "moedge", opset_import: ["" : 18]>
Route <top_k, rule> (scores, selection_bias{scale}) => (indices, weights) {{
    k = Constant <value_int: int = @top_k> ()
    axis = Constant <value_ints = [0]> ()
    k1 = Unsqueeze (k, axis)
    biased = Add (scores, selection_bias)
    best, chosen = TopK <axis = -1, largest = 1, sorted = 1> (biased, k1)
    indices = Cast <to = 6> (chosen)
    {weights}
}}"""

_DISPATCH = """
<domain: "moedge", opset_import: ["" : 18]>
Dispatch <num_experts> (x, indices) => (rows, offsets, inverse) {
    zero = Constant <value_int = 0> ()  one = Constant <value_int = 1> ()
    first = Constant <value_ints = [0]> ()  minus1 = Constant <value_ints = [-1]> ()
    e = Constant <value_int: int = @num_experts> ()
    idx = Cast <to = 7> (indices)
    flat = Reshape (idx, minus1)
    n1 = Shape (flat)
    n = Squeeze (n1)
    position = Range (zero, n, one)
    scaled = Mul (flat, n)
    key = Add (scaled, position)
    sorted, order = TopK <axis = 0, largest = 0, sorted = 1> (key, n1)
    unused, inverse64 = TopK <axis = 0, largest = 0, sorted = 1> (order, n1)
    inverse = Cast <to = 6> (inverse64)
    k1 = Shape <start = 1, end = 2> (indices)
    token = Div (order, k1)
    rows = Gather <axis = 0> (x, token)
    experts = Range (zero, e, one)
    column = Unsqueeze (experts, minus1)
    hit = Equal (column, flat)
    hits = Cast <to = 7> (hit)
    counts = ReduceSum <keepdims = 0> (hits, minus1)
    ends = CumSum (counts, zero)
    zero1 = Unsqueeze (zero, first)
    offsets64 = Concat <axis = 0> (zero1, ends)
    offsets = Cast <to = 6> (offsets64)
}"""

# The expert that owns row r is the number of experts that end at or before r.
_OWNER = """
    zero = Constant <value_int = 0> ()  one = Constant <value_int = 1> ()
    first = Constant <value_ints = [0]> ()  minus1 = Constant <value_ints = [-1]> ()
    big = Constant <value_ints = [2147483647]> ()  from1 = Constant <value_ints = [1]> ()
    r1 = Shape <start = 0, end = 1> (rows)
    r = Squeeze (r1)
    number = Range (zero, r, one)
    ends32 = Slice (offsets, from1, big, first)
    ends = Cast <to = 7> (ends32)
    column = Unsqueeze (ends, minus1)
    past = LessOrEqual (column, number)
    past64 = Cast <to = 7> (past)
    owner = ReduceSum <keepdims = 0> (past64, first)
    rowv = Unsqueeze (rows, minus1)"""

# What is left of a value: 0 below its threshold, growing to all of it at (1 + ramp) times the threshold.
_KEEP = """
    size = Abs ({x})  over = Sub (size, {threshold})
    ramp = Constant <value_float: float = @ramp> ()  ramp_end = Mul ({threshold}, ramp)  part = Div (over, ramp_end)
    nothing = Constant <value_float = 0.0> ()  everything = Constant <value_float = 1.0> ()
    factor_kept = Clip (part, nothing, everything)  {y} = Mul ({x}, factor_kept)"""

_KEEP_LARGE = """
<domain: "moedge", opset_import: ["" : 18]>
KeepLarge <ramp> (x, threshold) => (y) {{
    x32 = Cast <to = 1> (x)
    {keep}
    y = CastLike (y32, x)
}}"""

# Values that were left out are zeros here; the kernels do not read the weights of them.
_GATHERED_GLU = """
<domain: "moedge", opset_import: ["" : 18]>
GatheredGLU <activation> (x, gate, up, h_limits) => (y) {{
    {constants}
    g = MatMul (x, gate)
    u = MatMul (x, up)
    {activate}
    all = Mul (a, u)  all32 = Cast <to = 1> (all)
    threshold, width = Split <axis = 0, num_outputs = 2> (h_limits)
    size = Abs (all32)  over = Sub (size, threshold)  part = Div (over, width)
    nothing = Constant <value_float = 0.0> ()  everything = Constant <value_float = 1.0> ()
    factor = Clip (part, nothing, everything)  y32 = Mul (all32, factor)
    y = CastLike (y32, x)
}}"""

_GATHERED_LINEAR = """
<domain: "moedge", opset_import: ["" : 18]>
GatheredLinear (x, weight) => (y) {
    y = MatMul (x, weight)
}"""

_GROUPED_GLU = """
<domain: "moedge", opset_import: ["" : 18]>
GroupedGLU <activation{ramp}> (rows, offsets, gate, up{h_threshold}) => (y) {{
    {owner}
    {constants}
    gate_r = Gather <axis = 0> (gate, owner)
    up_r = Gather <axis = 0> (up, owner)
    gv = MatMul (gate_r, rowv)
    uv = MatMul (up_r, rowv)
    g = Squeeze (gv, minus1)
    u = Squeeze (uv, minus1)
    {activate}
    {chain_h}
}}"""

_GROUPED_LINEAR = """
<domain: "moedge", opset_import: ["" : 18]>
GroupedLinear (rows, offsets, weight) => (y) {{
    {owner}
    weight_r = Gather <axis = 0> (weight, owner)
    yv = MatMul (weight_r, rowv)
    y = Squeeze (yv, minus1)
}}"""

_OMITTED = """
    es = Shape <start = 0, end = 1> (compensation)
    ts = Shape <start = 0, end = 1> (indices)
    te = Concat <axis = 0> (ts, es)
    all_ones = ConstantOfShape <value = float[1] {{1.0}}> (te)
    zeros_k = Sub (weights, weights)
    omitted32 = ScatterElements <axis = 1> (all_ones, idx, zeros_k)
    omitted = CastLike (omitted32, compensation)
    extra = MatMul (omitted, compensation)
    y = Add (summed, extra)"""

_COMBINE = """
<domain: "moedge", opset_import: ["" : 18]>
Combine (rows, inverse, indices, weights{compensation}) => (y) {{
    minus1 = Constant <value_ints = [-1]> ()  axis1 = Constant <value_ints = [1]> ()
    idx = Cast <to = 7> (indices)
    picked = Gather <axis = 0> (rows, inverse)
    ws = Shape (weights)
    full = Concat <axis = 0> (ws, minus1)
    by_choice = Reshape (picked, full)
    w = CastLike (weights, rows)
    w1 = Unsqueeze (w, axis1)
    mixed = MatMul (w1, by_choice)
    summed = Squeeze (mixed, axis1)
    {finish}
}}"""

_SPARSE_GLU_CHAIN = """
<domain: "moedge", opset_import: ["" : 18, "moedge" : 1]>
SparseGLU <activation, num_experts{ramp}> (x, indices, weights, gate, up, down{sparse_inputs}) => (y) {{
    rows, offsets, inverse = moedge.Dispatch <num_experts: int = @num_experts> (x, indices)
    hidden = moedge.GroupedGLU <activation: string = @activation{ramp_of}> (rows, offsets, gate, up{h_threshold})
    out = moedge.GroupedLinear (hidden, offsets, down)
    y = moedge.Combine (out, inverse, indices, weights{compensation})
}}"""

# Every expert on every token, the unselected ones times zero: T*E*I*H work but no gathered weights.
_SPARSE_GLU_DENSE = """
<domain: "moedge", opset_import: ["" : 18]>
SparseGLU <activation, num_experts{ramp}> (x, indices, weights, gate, up, down{sparse_inputs}) => (y) {{
    {constants}
    first = Constant <value_ints = [0]> ()  minus1 = Constant <value_ints = [-1]> ()
    idx = Cast <to = 7> (indices)
    t1 = Shape <start = 0, end = 1> (x)
    e1 = Shape <start = 0, end = 1> (gate)
    shape = Concat <axis = 0> (t1, e1)
    none = ConstantOfShape <value = float[1] {{0.0}}> (shape)
    mask32 = ScatterElements <axis = 1{scatter}> (none, idx, weights)
    mask = CastLike (mask32, x)
    by_expert = Transpose <perm = [1, 0]> (mask)
    factor = Unsqueeze (by_expert, minus1)
    {by_expert}
    gate_t = Transpose <perm = [0, 2, 1]> (gate)
    up_t = Transpose <perm = [0, 2, 1]> (up)
    down_t = Transpose <perm = [0, 2, 1]> (down)
    g = MatMul (xe, gate_t)
    u = MatMul (xe, up_t)
    {activate}
    {dense_h}
    hw = Mul (h, factor)
    each = MatMul (hw, down_t)
    summed = ReduceSum <keepdims = 0> (each, first)
    {finish}
}}"""

_TILED = """
    x1 = Unsqueeze (x, first)  ones = Constant <value_ints = [1, 1]> ()
    copies = Concat <axis = 0> (e1, ones)  xe = Tile (x1, copies)"""

_CAUSAL_ATTENTION = """
<domain: "moedge", opset_import: ["" : 18]>
CausalAttention <scale, window, softcap> (query, key, value, attention_mask) => (y) {{
    zero = Constant <value_int = 0> ()  one = Constant <value_int = 1> ()
    minus1 = Constant <value_ints = [-1]> ()  two = Constant <value_ints = [2]> ()
    head_axes = Constant <value_ints = [1, 2, 3]> ()
    factor = Constant <value_float: float = @scale> ()
    hidden = Constant <value_float = -3.4028234663852886e38> ()  shown = Constant <value_float = 0.0> ()
    b1 = Shape <start = 0, end = 1> (query)
    sd = Shape <start = 2, end = 4> (query)
    s1 = Shape <start = 2, end = 3> (query)
    g1 = Shape <start = 1, end = 2> (key)
    l1 = Shape <start = 2, end = 3> (key)
    q_shape = Concat <axis = 0> (b1, g1, minus1, sd)
    q5 = Reshape (query, q_shape)
    k5 = Unsqueeze (key, two)
    v5 = Unsqueeze (value, two)
    kt = Transpose <perm = [0, 1, 2, 4, 3]> (k5)
    qk = MatMul (q5, kt)
    qk32 = Cast <to = 1> (qk)
    scaled = Mul (qk32, factor)
    {cap}
    l = Squeeze (l1)  s = Squeeze (s1)
    past = Sub (l, s)
    position = Range (zero, l, one)
    new_position = Range (past, l, one)
    new_column = Unsqueeze (new_position, minus1)
    until_own = LessOrEqual (position, new_column)
    {local}
    key_mask = Unsqueeze (attention_mask, head_axes)
    visible = And (causal, key_mask)
    bias = Where (visible, shown, hidden)
    masked = Add (scores, bias)
    p32 = Softmax <axis = -1> (masked)
    p = CastLike (p32, value)
    y5 = MatMul (p, v5)
    shape = Shape (query)
    y4 = Reshape (y5, shape)
    y = Transpose <perm = [0, 2, 1, 3]> (y4)
}}"""

_CAP = """
    cap = Constant <value_float: float = @softcap> ()
    relative = Div (scaled, cap)  bounded = Tanh (relative)  scores = Mul (bounded, cap)"""

# Layers with and without a window share one body: window 0 reaches past the first position.
_LOCAL = """
    width = Constant <value_int: int = @window> ()
    no_window = Equal (width, zero)  anything = Constant <value_int = 2147483647> ()
    reach = Where (no_window, anything, width)
    behind = Sub (new_column, reach)  near = Greater (position, behind)
    causal = And (until_own, near)"""


_CHAIN_KEPT = f"""
    all = Mul (a, u)  all32 = Cast <to = 1> (all)  limit = Gather <axis = 0> (h_threshold, owner)
    {_KEEP.format(x="all32", threshold="limit", y="kept32")}
    y = CastLike (kept32, all)"""
_DENSE_KEPT = f"""
    all = Mul (a, u)  all32 = Cast <to = 1> (all)
    second = Constant <value_ints = [1]> ()  limit = Unsqueeze (h_threshold, second)
    {_KEEP.format(x="all32", threshold="limit", y="kept32")}
    h = CastLike (kept32, all)"""


def bodies(
    *,
    activation: str = "silu",
    rule: str = "unit",
    compensation: bool = False,
    window: bool = False,
    softcap: bool = False,
    form: str = "chain",
    repeats: bool = False,
    gather: bool = False,
) -> dict[str, onnx.FunctionProto]:
    """Return the function body of every operator for one model, by operator name.

    Args:
        activation: gate activation, a name in ``ops.ACTIVATIONS``.
        rule: weight rule, a name in ``ops.RULES``.
        compensation: whether SparseGLU nodes carry that input.
        window: whether some CausalAttention nodes have a sliding window.
        softcap: whether CausalAttention nodes cap their scores.
        form: body of SparseGLU: ``chain`` (Dispatch, GroupedGLU, GroupedLinear, Combine: the reference meaning),
            ``dense`` (every expert on every token) or ``tiled`` (the same, with the tokens copied for each expert:
            OpenVINO 2026.4 loads the other and refuses to run it, "Can not clone with new dims").
        repeats: whether a token's indices may name an expert twice (hierarchical layers; their weights then add up).
            Not always on: not every runtime knows the attribute that it needs.
        gather: whether SparseGLU nodes have ``h_threshold`` and leave out small hidden values.
    """
    # Without compensation that input is left empty before the one that follows it; a body then has a name for it.
    inputs = (", compensation" if compensation else ", _" if gather else "") + (", h_threshold" if gather else "")
    fill = {
        "scatter": ', reduction = "add"' if repeats else "",
        "owner": _OWNER,
        "activate": _ACTIVATE[activation],
        "constants": _CONSTANTS[activation],
        "weights": _WEIGHTS[rule],
        "scale": ", scale" if rule == "scaled" else "",
        "compensation": ", compensation" if compensation else "",
        "cap": _CAP if softcap else "scores = Identity (scaled)",
        "local": _LOCAL if window else "causal = Identity (until_own)",
        "by_expert": _TILED if form == "tiled" else "xe = Unsqueeze (x, first)",
        "keep": _KEEP.format(x="x32", threshold="threshold", y="y32"),
        "ramp": ", ramp" if gather else "",
        "ramp_of": ", ramp: float = @ramp" if gather else "",
        "h_threshold": ", h_threshold" if gather else "",
        "sparse_inputs": inputs,
        "chain_h": _CHAIN_KEPT if gather else "y = Mul (a, u)",
        "dense_h": _DENSE_KEPT if gather else "h = Mul (a, u)",
        "finish": _OMITTED.format() if compensation else "y = Identity (summed)",
    }
    texts = [_ROUTE.format(**fill), _CAUSAL_ATTENTION.format(**fill), _KEEP_LARGE.format(**fill)]
    texts += [_GATHERED_GLU.format(**fill), _GATHERED_LINEAR]
    if form == "chain":
        texts += [_DISPATCH, _GROUPED_LINEAR.format(**fill), _GROUPED_GLU.format(**fill), _COMBINE.format(**fill)]
        texts.append(_SPARSE_GLU_CHAIN.format(**fill))
    else:
        texts.append(_SPARSE_GLU_DENSE.format(**fill))
    functions = [onnx.parser.parse_function(text) for text in texts]
    return {function.name: function for function in functions}
