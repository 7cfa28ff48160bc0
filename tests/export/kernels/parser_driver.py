"""Ask NVIDIA's ONNX parser (TensorRT for RTX, no GPU) what it makes of each plugin node of a file; prints JSON lines.

A stand-in creator is registered for every plugin. When the parser asks it for a plugin, the fields that it was given
are printed and the process ends, because this Python package cannot add plugins to a network; each node is therefore
parsed in a process of its own, with and without its attribute ``plugin_namespace``.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import tensorrt_rtx as trt

from moedge.runtime.device.moedge_plugins import PLUGINS

TAKEN, BODY = 40, 41


class Creator(trt.IPluginCreatorV3One):
    """Says what it was asked for."""

    def __init__(self, rule: Any, namespace: bool) -> None:
        trt.IPluginCreatorV3One.__init__(self)
        self.rule, self.with_namespace = rule, namespace
        self.name, self.plugin_namespace, self.plugin_version = rule.name, "moedge", "1"
        text, number = trt.PluginFieldType.CHAR, trt.PluginFieldType.INT64
        fields = [
            trt.PluginField(name, b"", text) if kind is str else trt.PluginField(name, np.array([]), number)
            for name, kind in rule.attributes.items()
        ]
        self.field_names = trt.PluginFieldCollection(fields)

    def create_plugin(self, name: str, fields: Any, phase: Any) -> Any:
        found: dict[str, Any] = {}
        for field in fields:
            text = self.rule.attributes[field.name] is str
            found[field.name] = field.data.tobytes().decode() if text else int(field.data[0])
        # The order matters: NVIDIA's layer for plugins in Python passes attributes by position.
        assert list(found) == list(self.rule.attributes)
        assert all(value.endswith("\0") for value in found.values() if isinstance(value, str))
        found = {key: value.rstrip("\0") if isinstance(value, str) else value for key, value in found.items()}
        case = {"op_type": self.rule.name, "namespace": self.with_namespace, "taken": "plugin", "fields": found}
        print(json.dumps(case), flush=True)
        os._exit(TAKEN)


def alone(model: onnx.ModelProto, node: onnx.NodeProto, namespace: bool) -> bytes:
    """One node as a model of its own, every function body inside."""
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    if not namespace:
        kept = [item for item in node.attribute if item.name != "plugin_namespace"]
        del copy.attribute[:]
        copy.attribute.extend(kept)
    values = {value.name: value for value in (*model.graph.value_info, *model.graph.input, *model.graph.output)}
    for tensor in model.graph.initializer:
        values[tensor.name] = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
    graph = onnx.helper.make_graph([copy], "one", [values[n] for n in node.input], [values[n] for n in node.output])
    made = onnx.helper.make_model(graph, functions=model.functions, opset_imports=model.opset_import, ir_version=10)
    return bytes(made.SerializeToString())


def parse(content: bytes, namespace: bool, op_type: str) -> None:
    keep = [Creator(rule, namespace) for rule in PLUGINS.values()]
    for creator in keep:
        assert trt.get_plugin_registry().register_creator(creator, "moedge")
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    assert parser.parse(content), parser.get_error(0)
    print(json.dumps({"op_type": op_type, "namespace": namespace, "taken": "body", "fields": {}}), flush=True)
    os._exit(BODY)


def main() -> None:
    model = onnx.load(Path(sys.argv[1]), load_external_data=False)
    seen = set()
    for node in model.graph.node:
        if node.domain != "moedge" or node.op_type in seen:
            continue
        seen.add(node.op_type)
        for namespace in (True, False):
            content = alone(model, node, namespace)
            sys.stdout.flush()
            child = os.fork()
            if not child:
                parse(content, namespace, node.op_type)
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            assert code == (TAKEN if namespace else BODY), f"{node.op_type}: exit code {code}"


main()
