"""Tracing once for all models of one form: ``torch.onnx.export`` takes seconds, and most tiny models differ in weights.

The exporter never sees the value of a weight: it traces with fake tensors of the weights' shapes, and puts the weights
in at the end by their names. So for a module of a form that was traced before in this session, by any worker, the graph
is read back and the module's own weights are put in. All that follows (:mod:`moedge.export.trace` simplifies, every
lowering) runs as always.

A form is everything but the weights: classes, settings, configs, shapes, dtypes, which weights are shared. A module
that holds something this file does not know is traced as always, and so is one whose initializers are not simply its
weights. Code that is traced is not part of a form: a test that changes such code asks for the fixture
``traced_anew``.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest
import torch
from filelock import FileLock
from onnx_ir.tensor_adapters import TorchTensor
from torch import nn
from torch.onnx._internal.exporter._registration import ONNXRegistry
from transformers import GenerationConfig, PreTrainedConfig

_OF_EVERY_MODULE = {name for name, value in vars(nn.Module()).items() if name != "training" and not value}
"""Attributes of the base class: parameters, buffers and modules are looked at by name, and hooks must be empty."""
_SAYS_NOTHING = {"plan_sha256", "_name_or_path", "name_or_path", "generation_config", "transformers_version"}
"""Where a model comes from, which no ``forward`` reads."""
_LARGEST = 1 << 26
"""Bytes of the weights of a model whose trace is kept."""


class _UnknownError(Exception):
    """A module holds what may change its trace in a way that this file does not know."""


@contextmanager
def reused(folder: Path) -> Iterator[None]:
    """Keep traces in ``folder``, which all workers of the session share, and reuse them while the block runs."""
    exporter = torch.onnx.export

    @functools.wraps(exporter)
    def export(module: Any, args: tuple[Any, ...], **options: Any) -> Any:
        try:
            asked = {name: value for name, value in options.items() if name != "custom_translation_table"}
            name = _digest([form(module), _shapes(args), _plain(asked)])
        except _UnknownError:
            return exporter(module, args, **options)
        path = folder / f"{name}.onnx"
        with FileLock(path.with_suffix(".lock")):
            if path.exists():
                return types.SimpleNamespace(model=_with_weights(path, weights(module)))
            # Fake tensors of one layer's shapes are made once or twice: keeping them takes a fifth of the trace.
            with torch._dynamo.config.patch(fake_tensor_cache_enabled=False):
                program = exporter(module, args, **options)
            _keep(program.model, weights(module), path)
        return program

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.onnx, "export", export)
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(_registry))
        yield


_torchlib = functools.cache(ONNXRegistry.from_torchlib)


def _registry(opset_version: int) -> ONNXRegistry:
    """Return what the exporter asks for at each trace: reading the signatures of all operators takes a sixth of it."""
    known = _torchlib(opset_version)
    registry = copy.copy(known)
    registry.functions = {target: list(overloads) for target, overloads in known.functions.items()}
    return registry


def weights(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers by every name that they have."""
    named = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    return {name: tensor.detach() for name, tensor in named}


def form(module: nn.Module) -> str:
    """Return the hash of all that the trace of ``module`` depends on, but for code.

    Raises:
        _UnknownError: that cannot be told.
    """
    first: dict[int, str] = {}
    tensors = [
        (name, _kind(tensor), first.setdefault(tensor.data_ptr(), name) if tensor.numel() else "")
        for name, tensor in weights(module).items()
    ]
    if sum(tensor.nbytes for tensor in weights(module).values()) > _LARGEST:
        raise _UnknownError("too large to be kept")
    settings = [
        (
            name,
            _name(type(part)),
            {key: _plain(value) for key, value in vars(part).items() if key not in _SAYS_NOTHING and _told(key, value)},
        )
        for name, part in module.named_modules()
    ]
    return _digest([tensors, settings])


def _told(key: str, value: Any) -> bool:
    """Whether an attribute is more than what every module has, which holds modules and weights."""
    if key not in _OF_EVERY_MODULE:
        return not isinstance(value, nn.Module)
    if value and key not in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
        raise _UnknownError(key)
    return False


def _plain(value: Any) -> Any:
    """Return a value as JSON holds it."""
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, torch.Tensor):
        return ["tensor", *_kind(value), hashlib.sha256(TorchTensor(value.detach()).tobytes()).hexdigest()]
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items() if key not in _SAYS_NOTHING}
    if isinstance(value, list | tuple):
        return [type(value).__name__, *map(_plain, value)]
    if isinstance(value, set | frozenset):
        return ["set", *sorted(json.dumps(_plain(each)) for each in value)]
    if isinstance(value, PreTrainedConfig | GenerationConfig):
        return [_name(type(value)), _plain(vars(value))]
    if isinstance(value, type | types.FunctionType | types.BuiltinFunctionType):
        return _name(value)
    if isinstance(value, types.MethodType):
        return [_name(value.__func__), _name(type(value.__self__))]
    if isinstance(value, torch.dtype | torch.device | torch.export.Dim):
        return repr(value)
    raise _UnknownError(type(value))


def _shapes(example: Any) -> Any:
    """Return what an exporter reads of example inputs."""
    return _kind(example) if isinstance(example, torch.Tensor) else [_shapes(each) for each in example]


def _name(value: Any) -> str:
    if "<locals>" in value.__qualname__ and not isinstance(value, type):
        raise _UnknownError(value)  # what it was made with is not known
    return f"{value.__module__}.{value.__qualname__}"


def _kind(tensor: torch.Tensor) -> list[str]:
    return [str(tensor.dtype), str(list(tensor.shape)), str(tensor.device)]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _keep(model: ir.Model, own: dict[str, torch.Tensor], path: Path) -> None:
    """Write a traced model, unless an initializer that is named like a weight is not that weight."""
    for name, value in model.graph.initializers.items():
        assert value.const_value is not None
        if name in own and value.const_value.tobytes() != TorchTensor(own[name]).tobytes():
            return
    onnx.save(ir.to_proto(model), path)


def _with_weights(path: Path, own: dict[str, torch.Tensor]) -> ir.Model:
    model = ir.from_proto(onnx.load(path))
    for name, value in model.graph.initializers.items():
        if name in own:
            value.const_value = TorchTensor(own[name], name=name)
    return model
