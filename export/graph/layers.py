"""Where the values between the parts of a decoder can be read in its graph, and where they can be given.

A decoder adds to one stream, twice a layer: what attention makes of the stream, and what the FFN does. These additions
are found by following the stream from the embedding to the logits, so no bundle has to name anything: it works on
graphs of every target and of older versions. Between two additions a part ends where a single value holds all that it
passes on (an articulation of the graph): the norm before the products, the products before a norm.

What is read between the parts can also be given. A part then computes from right inputs, whatever the parts before it
did: an error stays where it is made, and a decision that rounding turns (which experts, which small values) changes
what that part makes and nothing after it. Given are all values, so that every part is alone, or the stream that layers
read (:data:`STREAM`), so that every layer is.

Needs the ``onnx`` package; a graph of another structure shows nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from moedge import MoEdgeError

Spot = Literal[
    "stream",
    "attention_input",
    "attention",
    "attention_normed",
    "middle",
    "ffn_input",
    "ffn",
    "ffn_normed",
    "head_input",
]
"""A value of one layer, in the order in which a layer computes them, each [T, H]: what the layer reads; what attention
reads (normed); what its output projection gives; that after a norm, in families that have one there; the stream between
attention and FFN; what the FFN reads (normed); what it gives; that after a norm. ``head_input``, the last norm, and the
``stream`` that it reads have the number of layers as their layer."""
SPOTS: tuple[Spot, ...] = (
    "stream",
    "attention_input",
    "attention",
    "attention_normed",
    "middle",
    "ffn_input",
    "ffn",
    "ffn_normed",
    "head_input",
)
STREAM: tuple[Spot, ...] = ("stream",)
"""What each layer reads, and behind the last one what the last norm reads."""
LayerPoint = tuple[int, Spot]
"""A layer and a value of it."""

_SKIP = "SkipSimplifiedLayerNormalization"
_SUM = 3
"""The output of that node which holds the sum."""
_NORMS = {"ReduceMean", "SimplifiedLayerNormalization", _SKIP, "RMSNormalization", "LayerNormalization"}
_PRODUCTS = {
    *("MatMul", "Gemm", "FusedMatMul", "MatMulNBits", "MoE", "QMoE", "RoutedGLU", "GatherGLU", "GatherLinear"),
    *("SparseGLU", "KeepLarge", "CausalAttention", "GroupQueryAttention", "Attention"),
    *("GatheredGLU", "GatheredLinear", "GroupedGLU", "GroupedLinear"),
}
"""Operators of which none belongs to a norm."""
_THIN = {"Mul", "Add", "Cast", "Reshape", "Identity", "Transpose", "Squeeze", "Unsqueeze"}
"""What may follow the sum of a norm and still be the norm, where weights are all that it adds: its weight, a type."""
_SIZES = {"Shape", "Size"}


def place(point: LayerPoint) -> tuple[int, int]:
    """Key that sorts points in the order in which a model computes them."""
    return point[0], SPOTS.index(point[1])


@dataclass
class Points:
    """Names of values by point; ``unnamed``: values that the graph computes and gives no name yet, and where."""

    names: dict[LayerPoint, str] = field(default_factory=dict)
    unnamed: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Name that it gets -> number of its node, of its output."""


@dataclass(frozen=True)
class _Addition:
    """One addition to the stream: what is added, the sum, and the sum's norm where one node makes both."""

    branch: str
    sum: str
    normed: str | None = None


class _Wiring:
    """Who makes and who reads every value of a graph (``onnx.GraphProto``); nodes are numbers, in topological order."""

    def __init__(self, graph: Any) -> None:
        self.nodes = list(graph.node)
        self.maker = {name: number for number, node in enumerate(self.nodes) for name in node.output if name}
        self.readers: dict[str, list[int]] = defaultdict(list)
        for number, node in enumerate(self.nodes):
            if node.op_type not in _SIZES:
                for name in dict.fromkeys(node.input):
                    self.readers[name].append(number)
        self.points = Points()

    def embedding(self) -> str | None:
        """The stream before the first layer: what was looked up, scaled where the family does that.

        The last single value that holds all that is known of the ids before a norm or a product reads it: a lookup may
        be many nodes (levels and scales of integers, columns of a tied table).
        """
        region = self.region({"input_ids"}, "logits")
        first = next((number for number in region if self.nodes[number].op_type in _NORMS | _PRODUCTS), -1)
        found = [name for number, name in self.cuts(region, {"input_ids"}, "logits").items() if number < first]
        return found[-1] if found else None

    def addition(self, stream: str, number: int) -> _Addition | None:
        """The addition number ``number`` of the model: the one whose summand ``stream`` is."""
        for reader in self.readers[stream]:
            node = self.nodes[reader]
            others = [name for name in node.input[:2] if name != stream]
            if len(others) != 1 or others[0] not in self.maker:
                continue
            if node.op_type == "Add":
                return _Addition(others[0], node.output[0])
            if node.op_type == _SKIP:
                total = (node.output[_SUM] if len(node.output) > _SUM else "") or f"stream.{number}"
                if total not in self.maker:
                    self.points.unnamed[total] = (reader, _SUM)
                return _Addition(others[0], total, node.output[0])
        return None

    def region(self, sources: set[str], end: str) -> list[int]:
        """Nodes on the ways from ``sources`` to ``end``, in order."""
        before: set[int] = set()
        waiting = [end]
        while waiting:
            name = waiting.pop()
            number = self.maker.get(name)
            if name not in sources and number is not None and number not in before:
                before.add(number)
                waiting.extend(self.nodes[number].input)
        reached, found = set(sources), []
        for number in sorted(before):
            node = self.nodes[number]
            if node.op_type not in _SIZES and reached.intersection(node.input):
                reached.update(filter(None, node.output))
                found.append(number)
        return found

    def cuts(self, region: list[int], sources: set[str], end: str) -> dict[int, str]:
        """Node -> its output, where that alone holds all that ``region`` has computed so far."""
        inside = set(region)
        left = {name: len(inside.intersection(readers)) for name, readers in self.readers.items()}
        alive = {name for name in sources if left.get(name)}
        found = {}
        for number in region:
            node = self.nodes[number]
            for name in dict.fromkeys(node.input):
                if name in left:
                    left[name] -= 1
                    if not left[name]:
                        alive.discard(name)
            alive.update(name for name in node.output if name and (left.get(name) or name == end))
            if len(alive) == 1 and alive & set(node.output):
                found[number] = next(iter(alive))
        return found

    def normed(self, region: list[int], cuts: Mapping[int, str], reached: set[str]) -> str | None:
        """What the products of a region read, where that is a norm of its source; None: they read the source."""
        first = next((number for number in region if self.nodes[number].op_type in _PRODUCTS), len(self.nodes))
        sums = [number for number in region if number < first and self.nodes[number].op_type in _NORMS]
        if not sums:
            return None
        found: str | None = None
        for number, name in cuts.items():
            if not sums[-1] <= number < first:
                continue
            node = self.nodes[number]
            computed = [value for value in node.input if value in reached]
            if found is not None and (node.op_type not in _THIN or len(set(computed)) != 1):
                break
            found = name
        return found

    def before_norm(self, region: list[int], cuts: Mapping[int, str]) -> str | None:
        """What the products of a region give, where a norm follows them; None: nothing does."""
        products = [number for number in region if self.nodes[number].op_type in _PRODUCTS]
        last = products[-1] if products else -1
        norm = next((number for number in region if number > last and self.nodes[number].op_type in _NORMS), None)
        found = [name for number, name in cuts.items() if norm is not None and last <= number < norm]
        return found[-1] if found else None


def find(graph: Any, num_layers: int) -> Points:
    """Find every point of the main graph (``onnx.GraphProto``) of a decoder with ``num_layers`` layers.

    Without names where the graph is no chain of ``2 * num_layers`` additions to one stream.
    """
    wiring = _Wiring(graph)
    stream = wiring.embedding()
    additions: list[_Addition] = []
    streams = [] if stream is None else [stream]
    while streams and (found := wiring.addition(streams[-1], len(streams))):
        additions.append(found)
        streams.append(found.sum)
    if len(additions) != 2 * num_layers or "logits" not in wiring.maker:
        return Points()
    points, names = wiring.points, wiring.points.names
    siblings = [None, *(addition.normed for addition in additions)]
    for number, end in enumerate([*(addition.branch for addition in additions), "logits"]):
        layer, second = divmod(number, 2)
        source, sibling = streams[number], siblings[number]
        names[layer, "middle" if second else "stream"] = source
        sources = {source} | ({sibling} if sibling else set())
        region = wiring.region(sources, end)
        cuts = wiring.cuts(region, sources, end)
        reached = sources.union(*(wiring.nodes[number].output for number in region))
        normed = sibling or wiring.normed(region, cuts, reached)
        read: Spot = "head_input" if end == "logits" else "ffn_input" if second else "attention_input"
        if normed is not None:
            names[layer, read] = normed
        if end == "logits":
            continue
        given = wiring.before_norm(region, cuts)
        names[layer, "ffn" if second else "attention"] = given or end
        if given is not None:
            names[layer, "ffn_normed" if second else "attention_normed"] = end
    return points


def given_input(name: str) -> str:
    """Name of the graph input that takes the place of the value ``name``."""
    return f"{name}.given"


_OWN = ".own"
"""Ends the name of what a part made, where another value takes its place."""


def given_names(shown: Mapping[LayerPoint, str]) -> dict[LayerPoint, str]:
    """Return what :func:`show` with ``given`` shows, by the names that inputs are called after."""
    return {point: name.removesuffix(_OWN) for point, name in shown.items()}


def show(
    model: Any, path: Path, num_layers: int, *, spots: Collection[Spot] = SPOTS, given: bool = False
) -> dict[LayerPoint, str]:
    """Make the values between the parts outputs of a graph (``onnx.ModelProto``), in place; return their names.

    Args:
        model: of the bundle at ``path``, which errors name.
        spots: which of the values.
        given: each of them also gets an input [T, H] (:func:`given_input`) of the value's type, which what follows
            reads in its place: every part then computes alone, from what it is given. The output is what the part
            before made.

    Raises:
        MoEdgeError: the graph is no such chain of additions.
    """
    import onnx

    points = find(model.graph, num_layers)
    if not points.names:
        raise MoEdgeError(
            f"{path} does not show its layers: its graph is no chain of {num_layers} layers that each add twice to one "
            "stream."
        )
    names = {point: name for point, name in points.names.items() if point[1] in spots}
    for name, (number, output) in points.unnamed.items():
        made = model.graph.node[number].output
        made.extend([""] * (output + 1 - len(made)))
        made[output] = name
    shown = dict(names)
    if given:
        _give(model.graph, set(names.values()))
        shown = {point: f"{name}{_OWN}" for point, name in shown.items()}
    there = {value.name for value in model.graph.output}
    # Without a type: the runtime infers it.
    added = [onnx.ValueInfoProto(name=name) for name in dict.fromkeys(shown.values()) if name not in there]
    model.graph.output.extend(added)
    return shown


def _give(graph: Any, wanted: set[str]) -> None:
    """Let an input take the place of each value; what made it keeps it under another name."""
    from onnx import TensorProto, helper

    kinds = {value.name: value.type.tensor_type.elem_type for value in graph.value_info}  # of every bundle's values
    nodes = []
    for node in _unfused(graph.node, wanted):
        nodes.append(node)
        for index, name in enumerate(node.output):
            if name not in wanted:
                continue
            kind = kinds.get(name) or kinds.get(node.input[0], TensorProto.FLOAT)  # a sum has its summands' type
            node.output[index] = f"{name}{_OWN}"
            given = given_input(name)
            graph.input.append(helper.make_tensor_value_info(given, kind, [None, None]))
            nodes.append(helper.make_node("Shape", [f"{name}{_OWN}"], [f"{name}.shape"]))
            nodes.append(helper.make_node("Reshape", [given, f"{name}.shape"], [name]))
    copies = [type(node).FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)


def _unfused(nodes: Iterable[Any], wanted: set[str]) -> Iterator[Any]:
    """The nodes, those that add and normalise at once apart where another value takes the place of their sum."""
    from onnx import helper

    for node in nodes:
        total = node.output[_SUM] if node.op_type == _SKIP and len(node.output) > _SUM else ""
        if total not in wanted:
            yield node
            continue
        normed = node.output[0]
        node.output[0] = f"{normed}.unread"
        yield node  # whose reader gives its outputs other names
        epsilon = {item.name: item.f for item in node.attribute}.get("epsilon", 1e-5)
        yield helper.make_node(
            "SimplifiedLayerNormalization", [total, node.input[2]], [normed], name=f"{normed}.norm",
            axis=-1, epsilon=epsilon, stash_type=1,
        )  # fmt: skip
