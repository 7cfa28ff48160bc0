"""What ``moedge run`` does, stage by stage: their order, parameters and what makes a kept result stale.

The work of a stage is in :mod:`moedge.runtime.run.bodies`; how stages are keyed, reused and written is in
:mod:`moedge.runtime.run.engine`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from moedge.configs import devices, tolerances
from moedge.configs.recipe import CONVERT_SECTIONS, Conversion, ModelSection, Recipe
from moedge.export import targets
from moedge.runtime.run import bodies, run_folder
from moedge.runtime.run.engine import Stage
from moedge.runtime.run.fingerprint import fingerprint

# What a body runs of this package; tests/runtime/test_recipe_stages.py follows the imports and finds what is missing.
ALWAYS_CODE = (
    *(
        "_children.py",
        "_files.py",
        "_progress.py",
        "_registry.py",
        "_versions.py",
        "runtime/run/__init__.py",
        "runtime/run/refs.py",
        "runtime/run/run_folder.py",
    ),
    *("export/__init__.py", "export/targets.py"),
)
SOURCE_CODE = (
    *ALWAYS_CODE,
    *("convert/__init__.py", "convert/adapters.py", "convert/errors.py", "convert/moe_adapters.py", "convert/sources"),
    "convert/offload.py",
    "runtime/run/fingerprint.py",
)
CONVERT_CODE = (
    *ALWAYS_CODE,
    *("configs/__init__.py", "configs/errors.py", "convert", "runtime/run/held_out.py"),
)
_GENERATION = ("configs/generation_config.py", "runtime/text")
_EXPORT_CODE = (
    *CONVERT_CODE,
    "export",
    *(f"runtime/engines/{name}.py" for name in ("__init__", "calls", "info", "longrope", "protocol")),
    *_GENERATION,
)
_CONFIGS = (
    *("configs/__init__.py", "configs/devices.py", "configs/errors.py", "configs/files.py"),
    *("configs/tolerances.py", "configs/tolerances.yaml"),
)
_JUDGE = ("runtime/device/__init__.py", "runtime/device/moedge_compare.py")
_STATS = (
    *("runtime/bench/__init__.py", "runtime/bench/stats.py"),
    *("runtime/device/__init__.py", "runtime/device/moedge_stats.py"),
)
_ENGINE_CODE = (*CONVERT_CODE, "export", "runtime/engines", *_GENERATION, *_STATS)
_WATCH = ("__init__", "moedge_guard", "moedge_jetson", "moedge_nvml", "moedge_power", "moedge_sensors")
BENCH_CODE = (
    *(*_ENGINE_CODE, "runtime/bench", "runtime/run/fingerprint.py"),
    *("runtime/parity/__init__.py", "runtime/parity/figures.py", "runtime/parity/results.py"),
    *(f"runtime/device/{name}.py" for name in _WATCH),
)
_TORCH = ("torch", "transformers")
RUNS = ("onnx", *targets.ONNXRUNTIME)
_ONNX = (*RUNS, "onnx-ir", "onnxscript")


@dataclass(frozen=True)
class Facts:
    """What several stages of one recipe put into their keys; each fact is found out when a stage first asks for it.

    Args:
        recipe: the sections of a recipe that the stages read.
        machine: facts about this machine; part of the key of what is measured on it.
    """

    recipe: Conversion
    machine: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def convert(self) -> dict[str, Any]:
        """The section ``convert`` as JSON."""
        return self.recipe.convert.model_dump(mode="json")

    @cached_property
    def needs(self) -> tuple[str, ...]:
        """What the method reads besides the model."""
        return method_needs(self.convert)

    @cached_property
    def calibrated(self) -> bool:
        """Whether the conversion reads anything of the calibration: its method does, or a gather on top of it."""
        return bool(self.needs or self.convert["gather"])

    @cached_property
    def device(self) -> dict[str, str]:
        """Where PyTorch computes.

        Raises:
            MoEdgeError: that device is not here.
        """
        from moedge.convert.sources import check_device

        check_device(self.recipe.model.device)
        return {"device": self.recipe.model.device}

    @cached_property
    def calibration(self) -> dict[str, Any]:
        """The texts to calibrate on, and which of their documents are held out."""
        found = [{"spec": spec, "is": fingerprint(spec, text=True)} for spec in self.recipe.text.calibration]
        return {"texts": found, "every": self.recipe.text.holdout_every}

    @cached_property
    def held_out(self) -> list[dict[str, Any]]:
        """The texts to measure on."""
        return [{"spec": spec, "is": fingerprint(spec, text=True)} for spec in self.recipe.text.held_out]

    @cached_property
    def domains(self) -> dict[str, Any]:
        """What the windows of the method's domains are made from; empty for a method without domains."""
        return _domains(self.convert, self.recipe.text.holdout_every) if "domains" in self.needs else {}

    @cached_property
    def texts(self) -> dict[str, Any]:
        """Every text of the recipe; see :func:`moedge.runtime.run.held_out.texts`."""
        known: dict[str, Any] = {"calibration": self.calibration, "held_out": self.held_out}
        return known | ({"domains": self.domains["texts"]} if self.domains else {})


# --- one function a stage -------------------------------------------------------------------------------------------


def open_dense(model: ModelSection, check: Callable[[Path], None] | None = None) -> Stage:
    """The stage ``source`` of a recipe or a study; ``check`` gets the stage's folder."""
    return Stage(
        "source",
        "open the dense model",
        bodies.source,
        {**model.model_dump(exclude={"device"}), "is": fingerprint(model.source)},
        sources=SOURCE_CODE,
        libraries=(*_TORCH, "gguf"),
        identity=bodies.source_identity,
        check=check,
    )


def source(recipe: Conversion, facts: Facts) -> Stage:
    """Open the dense model, and see that the recipe fits it."""

    def check(folder: Path) -> None:
        recipe.check_model(run_folder.read_json(folder / "source.json")["config"], recipe.name)

    return open_dense(recipe.model, check)


def calibrate(recipe: Conversion, facts: Facts) -> Stage:
    """Measure what the method and the controls read."""
    measured = {entry["is"] for entry in facts.held_out}
    texts = [{**entry, "alone": entry["is"] not in measured} for entry in facts.calibration["texts"]]
    wanted = _measured(facts.convert, _controls(recipe))
    done = "measure activations on" if wanted["statistics"] or wanted["values"] else "cut windows from"
    return Stage(
        "calibrate",
        f"{done} {recipe.calibration.windows * recipe.calibration.length:,} tokens",
        bodies.calibrate,
        {
            **recipe.calibration.model_dump(),
            "text": {**facts.calibration, "texts": texts},
            **wanted,
            "domains": facts.domains,
            **facts.device,
        },
        reads=("source",),
        sources=CONVERT_CODE,
        libraries=_TORCH,
    )


def convert(recipe: Conversion, facts: Facts) -> Stage:
    """Make the Mixture-of-Experts; a method that needs no data reads no calibration."""
    return Stage(
        "convert",
        f"convert every FFN: {notation(facts.convert)}",
        bodies.convert_stage,
        {"convert": facts.convert, **facts.device},
        reads=("source", "calibrate") if facts.calibrated else ("source",),
        sources=CONVERT_CODE,
        libraries=(*_TORCH, "scipy", "safetensors"),
    )


def export(recipe: Recipe, facts: Facts) -> Stage:
    """Write the bundles of the Mixture-of-Experts."""
    return Stage(
        "export",
        f"write ONNX bundles: {', '.join(recipe.export.targets)}",
        bodies.export,
        {**exported(recipe), "kind": "moe", "notation": notation(facts.convert)},
        reads=("source", "convert"),
        sources=_EXPORT_CODE,
        libraries=(*_TORCH, *_ONNX),
    )


def build_engine(recipe: Recipe, facts: Facts) -> Stage | None:
    """Make one engine for the devices of the recipe, if it names any."""
    if not recipe.export.build:
        return None
    profiles = [devices.load(name).model_dump(mode="json", by_alias=True) for name in recipe.export.build]
    return Stage(
        "build",
        f"build the engine for {', '.join(recipe.export.build)}",
        bodies.build_engine,
        {"devices": recipe.export.build, "profiles": profiles},
        reads=("export",),
        sources=(*_EXPORT_CODE, "runtime/engines", "runtime/device", *_CONFIGS, *_STATS),
        libraries=targets.RTX,
    )


def export_dense(recipe: Recipe, facts: Facts) -> Stage | None:
    """Write the bundles of the dense parent, if the recipe wants them."""
    if not recipe.export.dense_parent:
        return None
    return Stage(
        "export-dense",
        "the same for the dense parent",
        bodies.export,
        {**exported(recipe), "kind": "dense"},
        reads=("source",),
        sources=_EXPORT_CODE,
        libraries=(*_TORCH, *_ONNX),
    )


def evaluate(recipe: Recipe, facts: Facts) -> Stage:
    """Measure the quality of the Mixture-of-Experts and of its controls."""
    return Stage(
        "evaluate",
        "measure quality against the controls",
        bodies.evaluate,
        {**recipe.evaluate.model_dump(), "texts": facts.texts, **facts.device},
        reads=("source", "calibrate", "convert"),
        sources=CONVERT_CODE,
        libraries=_TORCH,
    )


def verify(recipe: Recipe, facts: Facts) -> Stage:
    """Compare the engines with PyTorch."""
    return Stage(
        "verify",
        "compare the ONNX engines with PyTorch",
        bodies.verify,
        {**recipe.verify.model_dump(), **_limits(recipe), **_on_this_machine(recipe, facts)},
        reads=("source", "convert", "export", *_dense(recipe)),
        sources=(*_ENGINE_CODE, "runtime/parity", "runtime/accuracy", *_CONFIGS, *_JUDGE),
        libraries=(*_TORCH, *RUNS),
    )


def bench(recipe: Recipe, facts: Facts) -> Stage:
    """Time the engines."""
    return Stage(
        "bench",
        "time the engines side by side",
        bodies.bench,
        {**recipe.bench.model_dump(), **_on_this_machine(recipe, facts)},
        reads=("source", "convert", "export", *_dense(recipe)),
        sources=BENCH_CODE,
        libraries=(*_TORCH, *RUNS),
    )


def report(recipe: Recipe, facts: Facts) -> Stage:
    """Write the report."""
    return Stage(
        "report",
        "write the report",
        bodies.report,
        {"recipe": recipe.model_dump()},
        reads=("source", "calibrate", "convert", "export", *_dense(recipe), "evaluate", "verify", "bench"),
        sources=(
            *ALWAYS_CODE,
            *("export/manifest.py", "configs/generation_config.py", "runtime/engines/info.py"),
            "runtime/report",
            "runtime/frontier",
            "runtime/parity",
            "convert",
            *_CONFIGS,
            *_JUDGE,
            *_STATS,
        ),
        libraries=("jinja2", "matplotlib"),
    )


CONVERT_STAGES: dict[str, Callable[[Conversion, Facts], Stage]] = {
    "source": source,
    "calibrate": calibrate,
    "convert": convert,
}
"""What ``moedge convert`` is made of; these read no section of a recipe but those of :class:`Conversion`."""

STAGES: dict[str, Callable[[Recipe, Facts], Stage | None]] = {
    **CONVERT_STAGES,
    "export": export,
    "build": build_engine,
    "export-dense": export_dense,
    "evaluate": evaluate,
    "verify": verify,
    "bench": bench,
    "report": report,
}
"""Every stage in order. A function returns None where its recipe does not ask for the stage."""


def build(recipe: Recipe, machine: dict[str, Any]) -> list[Stage]:
    """Return the stages of a recipe, in order.

    Args:
        machine: facts about this machine; part of the key of what is measured on it.

    Raises:
        MoEdgeError: a model or text file that the recipe names does not exist, or a device is not here.
    """
    facts = Facts(recipe, machine)
    return [stage for make in STAGES.values() if (stage := make(recipe, facts))]


def to_convert(recipe: Conversion) -> list[Stage]:
    """Return the stage ``convert`` and before it those that it reads; nothing else is built.

    Raises:
        MoEdgeError: a model or text file that the recipe names does not exist, or a device is not here.
    """
    facts = Facts(recipe)
    last = convert(recipe, facts)
    return [*(CONVERT_STAGES[name](recipe, facts) for name in last.reads), last]


# --- what they share ------------------------------------------------------------------------------------------------


def _dense(recipe: Recipe) -> tuple[str, ...]:
    return ("export-dense",) if recipe.export.dense_parent else ()


def exported(recipe: Recipe) -> dict[str, Any]:
    """Parameters of both exports.

    Raises:
        MoEdgeError: a target wants a GPU that is not here.
    """
    rows = [targets.find(name) for name in recipe.export.targets]
    for row in rows:
        if row.provider == targets.CUDA:
            from moedge.runtime.engines.ort_session import check_cuda

            check_cuda(f"{recipe.name}: export.targets: {row.name}")
    unread = set() if any(map(targets.has_dtypes, rows)) else {"dtype"}
    return recipe.export.model_dump(exclude={"dense_parent", "build", *unread})


def _on_this_machine(recipe: Recipe, facts: Facts) -> dict[str, Any]:
    """What is measured here, on the first held-out text."""
    return {
        "texts": {**facts.texts, "held_out": facts.held_out[:1]},
        "machine": facts.machine,
        "dense_parent": recipe.export.dense_parent,
        **facts.device,
    }


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


def _controls(recipe: Conversion) -> list[str]:
    """The controls that are made of what calibration keeps; a conversion by itself has none."""
    return list(recipe.evaluate.controls) if isinstance(recipe, Recipe) else []


def _measured(convert: dict[str, Any], controls: Sequence[str]) -> dict[str, Any]:
    """What calibration measures: statistics where the method or a control reads them.

    The windows are kept whoever reads them (methods, a gather, controls): they are small.
    """
    from moedge.convert.methods import METHODS
    from moedge.convert.methods.baselines import READ_STATISTICS

    needs, marks = method_needs(convert), CONVERT_SECTIONS["cmoe"]().model_dump()
    dense = METHODS[convert["method"]].parents == "dense"  # a Mixture-of-Experts has them for each expert
    return {
        **{name: convert.get(name, marks[name]) for name in ("k_a", "profile")},
        "gate_signal": convert["signal"] if "gate_profile" in needs else None,
        "statistics": dense and ("statistics" in needs or any(name in READ_STATISTICS for name in controls)),
        "values": values(convert),
    }


def values(convert: dict[str, Any]) -> dict[str, Any] | None:
    """What calibration measures for a gather: gradients, which take a minute and are the same for every share."""
    from moedge.convert.methods import gather_settings

    settings = gather_settings(convert)
    return settings.measured() if settings and settings.scores == "fisher" else None


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
