"""Layers: configs <- convert <- export <- runtime, with ``runtime/device`` a leaf that everybody may import.

An arrow that points the other way is named here with its reason, and one that is no longer there must go from the list.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

import moedge

ROOT = Path(moedge.__file__).parent
LAYERS = ("configs", "convert", "export", "runtime")
LEAF = "moedge.runtime.device"

ALLOWED = {
    # Registries that import neither torch nor onnx: recipes and profiles are checked against them.
    ("moedge.configs.devices", "moedge.export.targets"),
    ("moedge.configs.recipe", "moedge.export.targets"),
    ("moedge.configs.tolerances", "moedge.export.targets"),
    ("moedge.configs.recipe", "moedge.convert.methods"),
    ("moedge.configs.recipe", "moedge.convert.moe_adapters"),
    ("moedge.configs.recipe", "moedge.convert.tasks"),
    ("moedge.configs.study", "moedge.convert.methods"),
    ("moedge.configs.study", "moedge.convert.methods.baselines"),
    # An archive holds the answers of the float32 graph, which an engine has to give.
    ("moedge.export.device.archive", "moedge.runtime.engines"),
    ("moedge.export.device.archive", "moedge.runtime.text.tokenizer"),
}
"""Arrows against the order: (file, what it imports)."""


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(["moedge", *(parts[:-1] if parts[-1] == "__init__" else parts)])


FILES = {name_of(path): path for layer in LAYERS for path in (ROOT / layer).rglob("*.py")}


def imported(node: ast.AST, *, lazy: bool) -> Iterator[str]:
    """Names of the modules of moedge that code imports when it is loaded, with ``lazy`` also inside functions."""
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        return
    if isinstance(node, ast.FunctionDef) and not lazy:
        return
    if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "moedge":
        for alias in node.names:
            full = f"{node.module}.{alias.name}"
            yield full if full in FILES else str(node.module)
    elif isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names if alias.name in FILES)
    for child in ast.iter_child_nodes(node):
        yield from imported(child, lazy=lazy)


def arrows(*, lazy: bool) -> dict[str, set[str]]:
    trees = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}
    return {name: set(imported(tree, lazy=lazy)) & set(FILES) for name, tree in trees.items()}


def layer(name: str) -> int:
    return LAYERS.index(name.split(".")[1])


def test_imports_point_down() -> None:
    up = {
        (name, target)
        for name, targets in arrows(lazy=True).items()
        for target in targets
        if layer(target) > layer(name) and not target.startswith(LEAF)
    }
    assert up - ALLOWED == set(), "an import against the order of layers"
    assert ALLOWED - up == set(), "an exception that is needed no more"


@pytest.mark.parametrize("lazy", [False, True], ids=["when they are loaded", "inside functions too"])
def test_no_files_import_each_other_in_a_circle(lazy: bool) -> None:
    graph = arrows(lazy=lazy)
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for target in sorted(graph[name]):
                visit(target, (*path, name))
            done.add(name)

    for name in sorted(graph):
        visit(name, ())


def test_the_device_leaf_imports_nothing_of_ours_but_itself() -> None:
    graph = arrows(lazy=True)
    outside = {
        (name, target)
        for name, targets in graph.items()
        if name.startswith(LEAF)
        for target in targets
        if not target.startswith(LEAF)
    }
    assert outside == set()
    for name, path in FILES.items():
        if not name.startswith(LEAF):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            heavy = {"torch", "transformers", "onnx", "onnx_ir", "onnxruntime", "pydantic", "rich", "typer"}
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not heavy & {each.split(".")[0] for each in names}, f"{path} imports {names}"


# Files of other projects that comments name.
OTHERS = {"tensor_mapping.py", "transformers/generation/logits_process.py"}
SOURCES = [*FILES.values(), *(path for ending in ("cpp", "cc", "h") for path in (ROOT / "export").rglob(f"*.{ending}"))]


def prose(source: str) -> str:
    """The comments and docstrings of Python code."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = [token.string for token in tokens if token.type == tokenize.COMMENT]
    values = [node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Expr)]
    texts = [value.value for value in values if isinstance(value, ast.Constant) and isinstance(value.value, str)]
    return "\n".join([*comments, *texts])


PATHS = [f"/{path.relative_to(ROOT)}" for path in (*FILES.values(), *(ROOT / "tests").rglob("*.py"))]


def missing(text: str) -> list[str]:
    """Files and modules that a text names and the package lacks."""
    paths = {name for name in re.findall(r"[\w./-]*\w\.py\b", text) if not any(p.endswith(f"/{name}") for p in PATHS)}
    modules = set(re.findall(r":mod:`~?\.?([\w.]+)`", text))
    return sorted(paths - OTHERS | {name for name in modules if not any(f".{m}".endswith(f".{name}") for m in FILES)})


def test_the_modules_that_comments_name_exist() -> None:
    found = {}
    for path in SOURCES:
        source = path.read_text(encoding="utf-8")
        if missing(source) and (names := missing(prose(source) if path.suffix == ".py" else source)):
            found[str(path.relative_to(ROOT))] = names
    assert found == {}
    text = "``lowering/trt/experts.py``, :mod:`moedge.export.targets`, lowering/trt_experts.py, :mod:`ort_moe`"
    assert missing(text) == ["lowering/trt_experts.py", "ort_moe"]
