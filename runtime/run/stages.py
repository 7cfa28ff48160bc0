"""What ``moedge run`` does, stage by stage: their order, parameters and what makes a kept result stale.

The work of a stage is in :mod:`moedge.runtime.run.bodies`; how stages are keyed, reused and written is in
:mod:`moedge.runtime.run.engine`.
"""

from __future__ import annotations

from typing import Any

from moedge.configs import devices, tolerances
from moedge.configs.recipe import CONVERT_SECTIONS, Recipe
from moedge.export import targets
from moedge.runtime.run import bodies, run_folder
from moedge.runtime.run.engine import Stage
from moedge.runtime.run.fingerprint import fingerprint

# What a body runs of this package; tests/runtime/test_recipe_stages.py follows the imports and finds what is missing.
_ALWAYS_CODE = (
    *("_files.py", "_progress.py", "runtime/run/__init__.py", "runtime/run/run_folder.py"),
    *("export/__init__.py", "export/targets.py"),
)
SOURCE_CODE = (
    *_ALWAYS_CODE,
    *("convert/__init__.py", "convert/adapters.py", "convert/errors.py", "convert/moe_adapters.py", "convert/sources"),
    "runtime/run/fingerprint.py",
)
CONVERT_CODE = (
    *_ALWAYS_CODE,
    *("configs/__init__.py", "configs/errors.py", "convert", "runtime/run/held_out.py"),
)
_EXPORT_CODE = (*CONVERT_CODE, "export", "runtime/engines/__init__.py", "runtime/engines/longrope.py", "runtime/text")
_CONFIGS = (
    *("configs/__init__.py", "configs/devices.py", "configs/errors.py", "configs/files.py"),
    *("configs/tolerances.py", "configs/tolerances.yaml"),
)
_STATS = ("runtime/bench/__init__.py", "runtime/bench/stats.py")
_ENGINE_CODE = (*CONVERT_CODE, "export", "runtime/engines", "runtime/text", *_STATS)
_TORCH = ("torch", "transformers")
_ONNX = ("onnx", "onnx-ir", "onnxscript", "onnxruntime")


def build(recipe: Recipe, machine: dict[str, Any]) -> list[Stage]:
    """Return the stages of a recipe, in order.

    Args:
        machine: facts about this machine; part of the key of what is measured on it.

    Raises:
        MoEdgeError: a model or text file that the recipe names does not exist.
    """
    from moedge.convert.sources import check_device

    model, text = recipe.model, recipe.text
    calibration_text = {
        "spec": text.calibration,
        "is": fingerprint(text.calibration, text=True),
        "every": text.holdout_every,
    }
    held_out = [{"spec": spec, "is": fingerprint(spec, text=True)} for spec in text.held_out]
    texts = {"calibration": calibration_text, "held_out": held_out}
    convert = recipe.convert.model_dump(mode="json")
    needs = method_needs(convert)
    domains = _domains(convert, text.holdout_every) if "domains" in needs else {}
    texts |= {"domains": domains["texts"]} if domains else {}
    first_text = {**texts, "held_out": held_out[:1]}
    exported = recipe.export.model_dump(exclude={"dense_parent", "build"})
    rows = [targets.find(name) for name in recipe.export.targets]
    if not any(map(targets.has_dtypes, rows)):
        del exported["dtype"]
    for row in rows:
        if row.provider == targets.CUDA:
            from moedge.runtime.engines.ort_session import check_cuda

            check_cuda(f"{recipe.name}: export.targets: {row.name}")
    device = {"device": model.device}
    check_device(model.device)
    measured = {"texts": first_text, "machine": machine, "dense_parent": recipe.export.dense_parent, **device}
    dense = ("export-dense",) if recipe.export.dense_parent else ()
    stages = [
        Stage(
            "source",
            "open the dense model",
            bodies.source,
            {**model.model_dump(exclude={"device"}), "is": fingerprint(model.source)},
            sources=SOURCE_CODE,
            libraries=(*_TORCH, "gguf"),
            identity=bodies.source_identity,
            check=lambda folder: recipe.check_model(
                run_folder.read_json(folder / "source.json")["config"], recipe.name
            ),
        ),
        Stage(
            "calibrate",
            f"measure activations on {recipe.calibration.windows * recipe.calibration.length:,} tokens",
            bodies.calibrate,
            {
                **recipe.calibration.model_dump(),
                "text": {
                    **calibration_text,
                    "alone": all(entry["is"] != calibration_text["is"] for entry in held_out),
                },
                **_measured(convert),
                "domains": domains,
                **device,
            },
            reads=("source",),
            sources=CONVERT_CODE,
            libraries=_TORCH,
        ),
        Stage(
            "convert",
            f"convert every FFN: {notation(convert)}",
            bodies.convert_stage,
            {"convert": convert, **device},
            reads=("source", "calibrate") if needs else ("source",),
            sources=CONVERT_CODE,
            libraries=(*_TORCH, "scipy", "safetensors"),
        ),
        Stage(
            "export",
            f"write ONNX bundles: {', '.join(recipe.export.targets)}",
            bodies.export,
            {**exported, "kind": "moe", "notation": notation(convert)},
            reads=("source", "convert"),
            sources=_EXPORT_CODE,
            libraries=(*_TORCH, *_ONNX),
        ),
    ]
    if recipe.export.build:
        profiles = [devices.load(name).model_dump(mode="json", by_alias=True) for name in recipe.export.build]
        stages.append(
            Stage(
                "build",
                f"build the engine for {', '.join(recipe.export.build)}",
                bodies.build_engine,
                {"devices": recipe.export.build, "profiles": profiles},
                reads=("export",),
                sources=(*_EXPORT_CODE, "runtime/engines", "runtime/device", *_CONFIGS, *_STATS),
                libraries=("tensorrt-rtx-cu13",),
            )
        )
    if dense:
        stages.append(
            Stage(
                "export-dense",
                "the same for the dense parent",
                bodies.export,
                {**exported, "kind": "dense"},
                reads=("source",),
                sources=_EXPORT_CODE,
                libraries=(*_TORCH, *_ONNX),
            )
        )
    stages += [
        Stage(
            "evaluate",
            "measure quality against the controls",
            bodies.evaluate,
            {**recipe.evaluate.model_dump(), "texts": texts, **device},
            reads=("source", "calibrate", "convert"),
            sources=CONVERT_CODE,
            libraries=_TORCH,
        ),
        Stage(
            "verify",
            "compare the ONNX engines with PyTorch",
            bodies.verify,
            {**recipe.verify.model_dump(), **_limits(recipe), **measured},
            reads=("source", "convert", "export", *dense),
            sources=(*_ENGINE_CODE, "runtime/parity", *_CONFIGS),
            libraries=(*_TORCH, "onnx", "onnxruntime"),
        ),
        Stage(
            "bench",
            "time the engines side by side",
            bodies.bench,
            {**recipe.bench.model_dump(), **measured},
            reads=("source", "convert", "export", *dense),
            sources=(*_ENGINE_CODE, "runtime/bench"),
            libraries=(*_TORCH, "onnx", "onnxruntime"),
        ),
        Stage(
            "report",
            "write the report",
            bodies.report,
            {"recipe": recipe.model_dump()},
            reads=("source", "calibrate", "convert", "export", *dense, "evaluate", "verify", "bench"),
            sources=(*_ALWAYS_CODE, "runtime/report", "runtime/parity", "convert", *_CONFIGS),
            libraries=("jinja2", "matplotlib"),
        ),
    ]
    return stages


def _limits(recipe: Recipe) -> dict[str, Any]:
    """``verify.tolerances`` with the hash of a user's file, whose content belongs to the stage's key."""
    given = recipe.verify.tolerances
    if isinstance(given, str):
        return {}
    origin = tolerances.chosen(given)[1].origin
    return {"tolerances": {**given.model_dump(), "sha256": origin.sha256 if origin else None}}


def method_needs(convert: dict[str, Any]) -> tuple[str, ...]:
    """What the method of a ``convert`` section reads besides the model; see ``convert.methods.Method.needs``."""
    from moedge.convert.methods import METHODS

    return METHODS[convert["method"]].needs


def _measured(convert: dict[str, Any]) -> dict[str, Any]:
    """What calibration keeps. The ATopK marks are always made: the controls of ``evaluate`` read them."""
    from moedge.convert.methods import METHODS

    needs, marks = method_needs(convert), CONVERT_SECTIONS["cmoe"]().model_dump()
    parents = METHODS[convert["method"]].parents
    return {
        **{name: convert.get(name, marks[name]) for name in ("k_a", "profile")},
        "gate_signal": convert["signal"] if "gate_profile" in needs else None,
        "keep_windows": "tokens" in needs,
        **({"statistics": False} if parents == "moe" else {}),
    }


def _domains(convert: dict[str, Any], every: int) -> dict[str, Any]:
    """What the windows of a method's domains are made from; the keys but ``texts`` are those of ``domains.read``."""
    texts = [
        {"name": name, "spec": spec, "is": fingerprint(spec, text=True), "every": every}
        for name, spec in convert["domains"].items()
    ]
    return {"texts": texts, **{name: convert[name] for name in ("length", "samples", "score_samples", "seed")}}


def notation(convert: dict[str, Any]) -> str:
    """The method and its layout for people, e.g. ``cmoe S6A6E16``."""
    from moedge.convert.methods import METHODS

    return f"{convert['method']} {METHODS[convert['method']].layout(convert)}"
