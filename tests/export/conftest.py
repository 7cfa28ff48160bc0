"""Tiny exported models: tracing takes seconds, so each is made once a session and only read by tests."""

import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moedge.export.bundle import open_bundle
from moedge.export.ort_ops import library


@pytest.fixture(scope="session")
def source(bundles: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the bundle ``portable`` of the MoE, as ``moedge pack`` takes it."""
    root = tmp_path_factory.mktemp("source")
    shutil.copytree(bundles["moe/portable"], root / "portable")
    return root


@pytest.fixture(scope="session")
def gathered_portable(
    tiny_model: Any, tiny_tokenizer: Any, gather_only: Any, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Bundle ``portable`` of a tiny model that leaves out small values and has no experts."""
    from moedge.convert import modeling
    from moedge.export.pipeline import export

    root, model = tmp_path_factory.mktemp("gathered"), tiny_model("llama")
    plan = gather_only(model)
    modeling.save(modeling.apply(plan, model), plan, tiny_tokenizer, root / "model")
    return export(root / "model", root / "bundles", [], label="gather")["portable"]


@pytest.fixture(scope="session")
def cpu_library() -> Path:
    """The library of CPU operators, compiled once for this machine."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    return library.compiled()


@pytest.fixture(scope="session")
def folders(
    session_folder: Path, tiny_model: Any, tiny_tokenizer: Any, convert_tiny: Any, gathered: Any, gather_only: Any
) -> Any:
    """:class:`moedge.tests.export.gathered_models.Folders`: each is made once for all workers and test files."""
    from moedge.tests.export.gathered_models import Folders, maker

    make = maker(tiny_model, tiny_tokenizer, convert_tiny, gathered, gather_only)
    return Folders(session_folder / "gathered", make)


@pytest.fixture(scope="session")
def values_match_their_shapes() -> Callable[[Path], int]:
    """Return a function of a bundle: every value of its file has a type and a shape, and ONNX Runtime finds no other.

    A dimension is a number or a name. All values are computed, of 2 texts of 3 tokens and of 3 tokens behind 5 in the
    cache; a name has to stand for one number throughout. The function returns how many values there were.
    """
    import onnx
    import onnxruntime

    def check(folder: Path) -> int:
        model = onnx.load(folder / "model.onnx")
        graph = model.graph
        described = {value.name: value for value in (*graph.value_info, *graph.output)}
        names = [name for node in graph.node for name in node.output if name]
        assert [name for name in names if name not in described] == []
        want = {name: described[name].type.tensor_type for name in names}
        assert [name for name, kind in want.items() if not (kind.elem_type and kind.HasField("shape"))] == []
        dims = {name: [dim.dim_param or dim.dim_value for dim in kind.shape.dim] for name, kind in want.items()}
        assert [name for name, shape in dims.items() if not all(shape)] == [], "dimensions without number and name"

        graph.output.extend(described[name] for name in set(names) - {value.name for value in graph.output})
        options = onnxruntime.SessionOptions()
        # The file as it is: optimisation would remove values.
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.log_severity_level = 3
        if operators := open_bundle(folder).manifest.operators:
            options.register_custom_ops_library(str(library.of_bundle(folder, operators)))
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
        outputs = [value.name for value in session.get_outputs()]
        for batch, past in ((2, 0), (1, 5)):
            known = {"batch_size": batch, "sequence_length": 3, "past_sequence_length": past}
            known["total_sequence_length"] = past + 3
            feeds: dict[str, np.ndarray] = {}
            for value in graph.input:
                kind = value.type.tensor_type
                shape = [known.get(dim.dim_param, dim.dim_value) for dim in kind.shape.dim]
                feeds[value.name] = np.ones(shape, onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type))
            feeds["position_ids"][:] = np.arange(past, past + 3)
            for name, array in zip(outputs, session.run(outputs, feeds), strict=True):
                assert onnx.helper.np_dtype_to_tensor_dtype(array.dtype) == want[name].elem_type, name
                numbers = [_number(dim, actual, known) for dim, actual in zip(dims[name], array.shape, strict=True)]
                assert numbers == list(array.shape), f"{name}: {dims[name]} is {array.shape}"
        return len(names)

    return check


def _number(dim: int | str, actual: int, known: dict[str, int]) -> int:
    """What a dimension says: a number, or sums of products of names; a name that is new stands for ``actual``."""
    if isinstance(dim, int):
        return dim
    if re.fullmatch(r"\w+", dim):
        return known.setdefault(dim, actual)
    terms = [[known[name] if name in known else int(name) for name in term.split("*")] for term in dim.split(" + ")]
    return sum(math.prod(term) for term in terms)
