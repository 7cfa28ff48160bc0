"""The residual stream of a graph: where it passes from one layer to the next, how it is shown and how it is replaced.

Every layer of a decoder reads one value, the stream, and adds to it. With the stream of a reference in its place each
layer computes from right inputs, whatever the layers before it did: an error stays in its layer, and a decision that
rounding turns (which experts, which small values) changes one layer's output and nothing after it.

The stream has no name of its own in a graph, so it is found by its shape: walking from the embedding to the logits, it
is where the whole path hangs by one value. ONNX Runtime's SkipSimplifiedLayerNormalization adds to the stream and
normalises the sum in one node: there the path hangs by the node, and the sum is its fourth output.

Needs the ``onnx`` package; weights are not read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from moedge import MoEdgeError

if TYPE_CHECKING:
    import onnx

Streams = Literal["show", "replace"]
_LOOKUPS = ("Gather", "GatherBlockQuantized")
_SAME_IDS = ("Cast", "Identity", "Reshape", "Flatten")
_SIZES = ("Shape", "Size")
_SKIP = "SkipSimplifiedLayerNormalization"
_SUM = 3
"""The output of that node which holds the sum."""
_INSIDE = 2
"""Places in a layer where the path hangs by one value: what it reads, and what its FFN reads."""


@dataclass(frozen=True)
class _Place:
    """The stream at one place: its name, and the node that makes its sum and norm at once, if one does."""

    value: str
    fused: onnx.NodeProto | None


def stream_input(layer: int) -> str:
    """Name of the graph input that takes the place of what ``layer`` reads; the last is what the final norm reads."""
    return f"stream.{layer}"


def edited(graph: bytes, how: Streams, layers: int, where: str) -> tuple[bytes, list[str]]:
    """Return a graph whose stream is shown or replaced, and the names of the outputs that show it.

    Args:
        graph: an ONNX model. how: ``show`` (:func:`show`) or ``replace`` (:func:`replace`).
        layers: how many the model has. where: names the graph in errors.

    Raises:
        MoEdgeError: the stream cannot be found.
    """
    import onnx

    model = onnx.ModelProto.FromString(graph)
    names = (show if how == "show" else replace)(model, layers, where)
    return bytes(model.SerializeToString()), names


def show(model: onnx.ModelProto, layers: int, where: str) -> list[str]:
    """Make the stream an output of the graph before each of ``layers`` layers and behind the last; return the names.

    Raises:
        MoEdgeError: the stream of ``where`` cannot be found.
    """
    import onnx

    places = _stream(model.graph, layers, where)
    for place in places:
        if place.fused is not None:
            place.fused.output.extend([""] * (_SUM + 1 - len(place.fused.output)))
            place.fused.output[_SUM] = place.value
    shown = {value.name for value in model.graph.output}
    names = [place.value for place in places]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in shown)
    return names


def replace(model: onnx.ModelProto, layers: int, where: str) -> list[str]:
    """As :func:`show`, and let every layer read a graph input [B, S, H] (:func:`stream_input`) instead of the stream.

    Raises:
        MoEdgeError: the stream of ``where`` cannot be found.
    """
    from onnx import TensorProto, helper

    graph = model.graph
    places = _stream(graph, layers, where)
    names = show(model, layers, where)
    kinds = {value.name: value.type.tensor_type.elem_type for value in graph.value_info}  # of every bundle's values
    fed: dict[str, str] = {}
    for layer, place in enumerate(places):
        name, like = stream_input(layer), place.value if place.fused is None else place.fused.input[0]
        kind = kinds.get(like, TensorProto.FLOAT)
        graph.input.append(helper.make_tensor_value_info(name, kind, [None] * 3))
        fed[place.value] = name
        if place.fused is not None:
            fed[place.fused.output[0]] = f"{name}.normed"
    for node in graph.node:
        for index, source in enumerate(node.input):
            node.input[index] = fed.get(source, source)
    # A norm of a graph input depends on nothing else, so it may stand first.
    for layer, place in enumerate(places):
        if place.fused is not None:
            graph.node.insert(0, _norm_of(place.fused, stream_input(layer)))
    return names


def _norm_of(fused: onnx.NodeProto, name: str) -> onnx.NodeProto:
    """The norm alone of a node that adds and normalises, of the value ``name``."""
    from onnx import helper

    epsilon = {item.name: item.f for item in fused.attribute}.get("epsilon", 1e-5)
    return helper.make_node(
        "SimplifiedLayerNormalization", [name, fused.input[2]], [f"{name}.normed"], name=f"{name}.norm",
        axis=-1, epsilon=epsilon, stash_type=1,
    )  # fmt: skip


def _stream(graph: onnx.GraphProto, layers: int, where: str) -> list[_Place]:
    """The stream before each layer and behind the last one."""
    places = _places(_path(graph))
    makers = {output: node for node in graph.node for output in node.output if output}
    starts = []
    for layer in range(layers):
        found = _before(makers, f"present.{layer}.key")
        known = [i for i, place in enumerate(places) if place.value in found]
        if not known:
            raise MoEdgeError(
                f"{where}: the value that layer {layer} reads cannot be found in the graph, so its layers cannot be "
                "looked at one by one; export it again."
            )
        starts.append(known[-1])
    starts.append(starts[-1] + (starts[-1] - starts[-2] if layers > 1 else _INSIDE))
    if starts != sorted(set(starts)) or starts[-1] >= len(places):
        raise MoEdgeError(f"{where}: its layers do not follow each other by one value each; they cannot be told apart.")
    return [places[i] for i in starts]


def _path(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """The nodes from the embedding to the logits, in the graph's order; sizes and masks are beside it."""
    ids, hidden = {"input_ids"}, set[str]()
    forward = []
    for node in graph.node:
        if node.op_type in _SAME_IDS and node.input[0] in ids:
            ids.update(node.output)
        looks_up = node.op_type in _LOOKUPS and len(node.input) > 1 and node.input[1] in ids
        if looks_up or (node.op_type not in _SIZES and hidden.intersection(node.input)):
            hidden.update(filter(None, node.output))
            forward.append(node)
    needed, path = {"logits"}, []
    for node in reversed(forward):
        if needed.intersection(node.output):
            needed.update(hidden.intersection(node.input))
            path.append(node)
    return path[::-1]


def _places(path: list[onnx.NodeProto]) -> list[_Place]:
    """Where the path hangs by one value, or by one fused node, in order."""
    last = {name: index for index, node in enumerate(path) for name in node.input if name}
    makers: dict[str, int] = {}
    live: set[str] = set()
    found: dict[str, _Place] = {}
    for index, node in enumerate(path):
        makers.update(dict.fromkeys(node.output, index))
        live = {name for name in (*live, *node.output) if last.get(name, -1) > index}
        if len({makers[name] for name in live}) != 1:
            continue
        maker = path[makers[next(iter(live))]]
        if maker.op_type == _SKIP:
            total = _sum_of(maker)
            found.setdefault(total, _Place(total, maker))
        elif len(live) == 1:
            (name,) = live
            found.setdefault(name, _Place(name, None))
    return list(found.values())


def _sum_of(fused: onnx.NodeProto) -> str:
    """Name of the sum that a node adds up and normalises; it need not be an output of the node yet."""
    return (fused.output[_SUM] if len(fused.output) > _SUM else "") or f"{fused.output[0]}.sum"


def _before(makers: dict[str, onnx.NodeProto], name: str) -> set[str]:
    """The names of the values that one depends on, and of all that the nodes on the way make."""
    seen: set[str] = set()
    names = [name]
    while names:
        node = makers.get(names.pop())
        if node is not None and node.output[0] not in seen:
            seen.update(node.output)
            if node.op_type == _SKIP:
                seen.add(_sum_of(node))
            names.extend(node.input)
    return seen
