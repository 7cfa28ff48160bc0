"""What ``moedge frontier`` does, stage by stage.

The stages that open, calibrate, convert and export are those of ``moedge run`` under names of their own
(``frontier/<variant>/convert``); what the recipe itself converts and exports is shared with ``moedge run`` in the same
folder. An interrupted frontier goes on where it stopped, and a new variant alone is converted and exported; times are
taken again then, because all engines of a target are timed in one run.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from moedge._files import digest
from moedge.configs.recipe import Recipe
from moedge.export import targets
from moedge.runtime.frontier import bodies
from moedge.runtime.frontier.variants import Variant, chosen_targets, variants
from moedge.runtime.run import run_folder, stages
from moedge.runtime.run.engine import Stage
from moedge.runtime.run.stages import BENCH_CODE, CONVERT_CODE, RUNS, Facts

ROOM = "frontier"
TABLE = f"{ROOM}/table"
_TORCH = ("torch", "transformers")
_DENSE = f"{ROOM}/dense"


def build(recipe: Recipe, machine: dict[str, Any]) -> list[Stage]:
    """Return the stages of a recipe's frontier, in order.

    Args:
        machine: facts about this machine; part of the key of what is timed on it.

    Raises:
        MoEdgeError: a variant, target or text that cannot be had.
    """
    return _Frontier(recipe, machine).all()


def with_run(recipe: Recipe, machine: dict[str, Any]) -> list[Stage]:
    """Return the stages of ``moedge run``, and before its report those of the frontier where the recipe asks for it."""
    todo = stages.build(recipe, machine)
    if not recipe.frontier.run:
        return todo
    more = {stage.name: stage for stage in build(recipe, machine)}
    shared = [more.pop(stage.name, stage) for stage in todo[:-1]]
    return [*shared, *more.values(), replace(todo[-1], reads=(*todo[-1].reads, TABLE))]


@dataclass
class _Frontier:
    """Collects the stages; those that several variants share exist once."""

    recipe: Recipe
    machine: dict[str, Any]
    found: dict[str, Stage] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.facts = Facts(self.recipe, self.machine)
        self.variants = variants(self.recipe)
        self.targets = chosen_targets(self.recipe)

    def all(self) -> list[Stage]:
        """Every stage in order."""
        self._add(self._source())
        converted = {variant.label: self._converted(variant) for variant in self.variants}
        measured = {_DENSE: self._add(self._dense_quality())}
        measured |= {label: self._add(self._quality(label, stage)) for label, stage in converted.items()}
        engines = {f"dense {target}": place for target, place in self._dense_bundles().items()}
        of_target: dict[str, dict[str, str]] = {target: {} for target in self.targets}
        for variant in self.variants:
            for target, place in self._bundles(variant, converted[variant.label]).items():
                of_target[target][variant.label] = place
        times = {target: self._add(self._bench(target, {**made, **engines})) for target, made in of_target.items()}
        self._add(self._table(measured, times))
        return list(self.found.values())

    def _add(self, stage: Stage) -> str:
        return self.found.setdefault(stage.name, stage).name

    def _source(self) -> Stage:
        """Open the dense model, and see that the recipe and every variant fit it."""
        called = {self.recipe.name: self.recipe}
        called |= {f"{self.recipe.name}: frontier: {one.label}": one.recipe for one in self.variants}

        def check(folder: Path) -> None:
            config = run_folder.read_json(folder / "source.json")["config"]
            for where, recipe in called.items():
                recipe.check_model(config, where)

        return replace(stages.source(self.recipe, self.facts), check=check)

    def _calibrated(self, facts: Facts) -> str | None:
        """Name of the stage that holds what a conversion reads: that of the recipe wherever it holds this."""
        if not facts.calibrated:
            return None
        own, stage = stages.calibrate(self.recipe, self.facts), stages.calibrate(self.recipe, facts)
        windows_alone = set(facts.needs) <= {"tokens"}  # every calibration keeps them
        if windows_alone:
            wanted = stage.params["values"] or own.params["values"]
            if wanted == own.params["values"]:
                return self._add(own)
            stage = replace(own, params={**own.params, "values": wanted, "statistics": False})
        elif stage.params == own.params:
            return self._add(own)
        return self._add(replace(stage, name=f"{ROOM}/calibrate-{digest(stage.params)[:6]}"))

    def _converted(self, variant: Variant) -> str:
        """Name of the stage that holds a variant's checkpoint."""
        if variant.recipe.convert == self.recipe.convert:
            if self.facts.calibrated:
                self._add(stages.calibrate(self.recipe, self.facts))
            return self._add(stages.convert(self.recipe, self.facts))
        facts = Facts(variant.recipe, self.machine)
        called = {"source": "source"}
        if calibrated := self._calibrated(facts):
            called["calibrate"] = calibrated
        stage = stages.convert(variant.recipe, facts)
        what = f"convert: {variant.label}"
        return self._add(self._renamed(stage, f"{ROOM}/{variant.folder}/convert", called, what))

    def _bundles(self, variant: Variant, converted: str) -> dict[str, str]:
        """Target -> the bundle of a variant, relative to the run folder."""
        facts = Facts(variant.recipe, self.machine)
        if converted == "convert":
            shared = stages.export(self.recipe, self.facts)
            return self._exported(shared, f"{ROOM}/{variant.folder}", variant.label)
        stage = stages.export(self._on(variant.recipe, self.targets), facts)
        called = {"source": "source", "convert": converted}
        name = self._add(
            self._renamed(stage, f"{ROOM}/{variant.folder}/export", called, f"write bundles: {variant.label}")
        )
        return {target: f"{name}/{target}" for target in self.targets}

    def _dense_bundles(self) -> dict[str, str]:
        wanted = self._on(self.recipe, self.recipe.export.targets)
        shared = stages.export_dense(wanted, self.facts)
        assert shared is not None, "the dense parent is always measured"
        return self._exported(shared, _DENSE, "the dense parent")

    def _exported(self, shared: Stage, folder: str, label: str) -> dict[str, str]:
        """Target -> bundle of what ``moedge run`` exports too: its own stage, and one more for further targets."""
        places: dict[str, str] = {}
        if here := [target for target in self.targets if target in self.recipe.export.targets]:
            name = self._add(shared)
            places |= {target: f"{name}/{target}" for target in here}
        if more := [target for target in self.targets if target not in here]:
            params = {**stages.exported(self._on(self.recipe, more)), **_kind(shared)}
            reads = shared.reads
            if here:  # its portable bundle is taken: the model is not traced again
                params["portable"], reads = f"{shared.name}/{targets.PORTABLE}", (*reads, shared.name)
            what = f"write more bundles: {label}"
            name = self._add(replace(shared, name=f"{folder}/export", params=params, reads=reads, what=what))
            places |= {target: f"{name}/{target}" for target in more}
        return {target: places[target] for target in self.targets}

    def _on(self, recipe: Recipe, wanted: list[str]) -> Recipe:
        export = recipe.export.model_copy(update={"targets": wanted, "build": [], "dense_parent": True})
        return recipe.model_copy(update={"export": export})

    @staticmethod
    def _renamed(stage: Stage, name: str, called: dict[str, str], what: str) -> Stage:
        return replace(stage, name=name, called=called, reads=tuple(called.values()), what=what)

    def _texts(self) -> dict[str, Any]:
        """The held-out texts: none of them was seen by any variant."""
        domains = [text for one in self.variants for text in Facts(one.recipe).domains.get("texts", [])]
        return {**self.facts.texts, **({"domains": domains} if domains else {})}

    def _protocol(self) -> dict[str, Any]:
        evaluate, tokens = self.recipe.evaluate, self.recipe.frontier.tokens or self.recipe.evaluate.tokens
        return {
            **{name: getattr(evaluate, name) for name in ("window", "bos", "batch_size")},
            **{"tokens": tokens, "texts": self._texts(), **self.facts.device},
        }

    def _dense_quality(self) -> Stage:
        return Stage(
            f"{_DENSE}/quality",
            "measure the dense parent on the held-out texts",
            bodies.dense_quality,
            self._protocol(),
            reads=("source",),
            sources=(*CONVERT_CODE, *CODE),
            libraries=_TORCH,
        )

    def _quality(self, label: str, converted: str) -> Stage:
        folder = next(variant.folder for variant in self.variants if variant.label == label)
        called = {"source": "source", "convert": converted, "dense": f"{_DENSE}/quality"}
        return Stage(
            f"{ROOM}/{folder}/quality",
            f"measure quality: {label}",
            bodies.quality,
            {"label": label, "batch_size": self.recipe.evaluate.batch_size, **self.facts.device},
            reads=tuple(called.values()),
            sources=(*CONVERT_CODE, *CODE),
            libraries=_TORCH,
            called=called,
        )

    def _bench(self, target: str, places: dict[str, str]) -> Stage:
        prompt, decode = self.recipe.frontier_lengths()
        settings, bench = self.recipe.frontier, self.recipe.bench
        params = {
            **{"prompt": prompt, "decode": decode, "repeats": settings.repeats or bench.repeats},
            **{"warmup": bench.warmup, "threads": bench.threads, "batches": settings.batches},
            "texts": {**self._texts(), "held_out": self.facts.held_out[:1]},
            **{"engines": places, "machine": self.machine},
        }
        held = dict.fromkeys(place.rpartition("/")[0] for place in places.values())
        return Stage(
            f"{ROOM}/bench-{target}",
            f"time {len(places)} engines side by side: {target}",
            bodies.bench,
            params,
            reads=("source", *held),
            sources=(*BENCH_CODE, *CODE),
            libraries=(*_TORCH, *RUNS),
        )

    def _table(self, measured: dict[str, str], times: dict[str, str]) -> Stage:
        of = [{"label": one.label, "convert": one.convert, "quality": measured[one.label]} for one in self.variants]
        params = {
            **{"name": self.recipe.name, "variants": of, "dense": measured[_DENSE], "bench": times},
            **{"speedup": self.recipe.frontier.speedup, "bits": {name: targets.find(name).bits for name in times}},
            "window": self.recipe.evaluate.window,
        }
        return Stage(
            TABLE,
            "put quality beside speed",
            bodies.table,
            params,
            reads=("source", *measured.values(), *times.values()),
            sources=(*stages.ALWAYS_CODE, *CODE, *_TABLE_CODE),
            libraries=("jinja2", "matplotlib"),
        )


CODE = ("runtime/frontier/__init__.py", "runtime/run/held_out.py", "configs/__init__.py", "configs/errors.py")
"""What every body of the frontier runs besides the packages."""
_TABLE_CODE = (
    *("runtime/frontier", "runtime/report", "runtime/bench", "runtime/parity", "convert", "configs"),
    *("export/manifest.py", "runtime/engines/info.py", "runtime/device/__init__.py", "runtime/device/moedge_stats.py"),
)


def _kind(stage: Stage) -> dict[str, Any]:
    return {name: stage.params[name] for name in ("kind", "notation") if name in stage.params}
