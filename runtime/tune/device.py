"""Tuning for a device that is not here: what a token takes is predicted, the loss is measured, nothing is timed.

A token of the dense parent takes at least as long as its bytes take at the device's bandwidth
(:mod:`moedge.export.device.outlook`), and a share of the FFN weights left out saves its bytes' part of that. Where the
parent was timed on the device, that time less the saved bytes is the prediction; real kernels read slower than the
bandwidth allows, so bytes saved there save no less, but for what the choice itself costs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moedge import MoEdgeError
from moedge._files import read_json, write_json
from moedge.configs import devices
from moedge.configs.devices import Device
from moedge.export import needs, targets
from moedge.export.device import outlook
from moedge.export.device.outlook import Bound, Work
from moedge.export.manifest import LayerFacts, ModelFacts, MoEFacts
from moedge.runtime.device.moedge_archive import RESULT_SCHEMA, other_model
from moedge.runtime.frontier import stages as frontier
from moedge.runtime.frontier.join import variant_facts
from moedge.runtime.frontier.variants import Variant, variants
from moedge.runtime.run import run_folder
from moedge.runtime.tune.search import LEAST, MOST, Goal, Try, best, search
from moedge.runtime.tune.work import (
    FIRST_SHARE,
    TRIES,
    Tuning,
    chosen_facts,
    folder_of,
    quality_of,
    what_was_done,
)

_STEP = 0.001


def target_for(device: Device, wanted: str | None) -> str:
    """Return the target to tune for: the wanted one, or the first of the device's whose engines leave weights out.

    Raises:
        MoEdgeError: no engine of it does, or the target is none of the device's.
    """
    names = [wanted] if wanted else sorted(device.targets)  # tensorrt first, whose archives are built on the device
    reasons = [(name, refusal(name, device)) for name in names]
    found = next((name for name, reason in reasons if reason is None), None)
    if found is None:
        raise MoEdgeError(str(reasons[0][1]))
    return found


def refusal(target: str, device: Device) -> str | None:
    """Return why leaving values out saves no time with a target on a device, or None."""
    if reason := devices.refusal(target, device):
        return reason
    if outlook.selects(targets.find(target), device) is not None:
        return None
    return (
        f"An engine of target {target} reads all weights on {device.label}"
        + (f", whose profile says TensorRT {device.tensorrt}" if device.tensorrt else "")
        + ": nothing is faster there for leaving values out (docs/gather.md says which engines skip weights; after an "
        "upgrade of the device give a profile of your own)."
    )


@dataclass(frozen=True)
class Costs:
    """Milliseconds of a decode step by the share of the FFN weights that it reads."""

    bounds: Mapping[float, Bound]
    """Share -> the least time; 1 is the dense parent."""
    dense_ms: float | None = None
    """Of the dense parent, where it was timed on the device."""

    @classmethod
    def of(cls, checkpoint: Path, device: Device, target: str, work: Work, timed: ParentTime | None) -> Costs:
        """Return the costs of a dense checkpoint.

        Raises:
            MoEdgeError: its files do not say enough, or what was timed is another model or impossibly fast.
        """
        model, _, _ = needs.facts(checkpoint)
        if timed is not None:
            timed.check_model(model)
        width = int(read_json(checkpoint / "config.json", "save the model again")["intermediate_size"])
        layer = LayerFacts(num_experts=0, top_k=0, shared_width=width, expert_width=0)
        whole = MoEFacts(plan_sha256="0" * 64, layers=dict.fromkeys(range(model.num_layers), layer))
        bits = targets.find(target).bits
        size = next(one.bytes for one in outlook.PRECISIONS if one.bits == bits)

        def bound(share: float) -> Bound:
            need = needs.of_model(model, whole, weight=size, cached=2.0, share=share)
            read = need.decode_bytes(work.context, work.batch)
            return outlook.step_bound(read, need.decode_products(work.context, work.batch), device)

        shares = [round(MOST - _STEP * step, 3) for step in range(round((MOST - LEAST) / _STEP) + 1)]
        found = cls({share: bound(share) for share in (1.0, *shares)}, timed.ms if timed else None)
        if timed is not None and found.ms(LEAST) <= 0:
            raise MoEdgeError(
                f"{timed.path} says {timed.ms:.3g} ms a token of the dense parent, less than {device.label} needs for "
                f"the weights that would be left out alone; is it of that device, and of {checkpoint}?"
            )
        return found

    def ms(self, share: float) -> float:
        """Return the predicted milliseconds."""
        saved = self.bounds[1.0].ms - self.bounds[share].ms
        return (self.dense_ms or self.bounds[1.0].ms) - saved

    def value(self, goal: Goal, share: float) -> float:
        """Return what is predicted of a goal of speed."""
        return self.ms(share) if goal.kind == "ms" else self.ms(1.0) / self.ms(share)

    def share_for(self, goal: Goal) -> float:
        """Return the largest share that is predicted to reach a goal of speed.

        Raises:
            MoEdgeError: the dense parent reaches it, or no share does.
        """
        if goal.reached(self.value(goal, 1.0)):
            raise MoEdgeError(f"{goal} asks for nothing: the dense parent is predicted to take {self.ms(1.0):.3g} ms.")
        found = next((share for share in self.bounds if goal.reached(self.value(goal, share))), None)
        if found is None:
            raise MoEdgeError(
                f"{goal} is out of reach: a token is predicted to take {self.ms(1.0):.3g} ms of the dense parent, and "
                f"{self.ms(LEAST):.3g} ms where {LEAST:.0%} of the FFN weights are read; ask for less."
            )
        return found


@dataclass(frozen=True)
class ParentTime:
    """What a token of the dense parent took on a device, the model that was timed, and the file that says so."""

    ms: float
    model: Mapping[str, Any]
    path: Path

    def check_model(self, model: ModelFacts) -> None:
        """Refuse the times of another model.

        Raises:
            MoEdgeError: it has other sizes.
        """
        facts, dense = model.document(), dict(self.model)
        differs = other_model(dense, facts)
        known = (dense.get("parameters"), facts.get("parameters"))
        if differs is None and None not in known and known[0] != known[1]:
            differs = f"parameters {known[0]} against {known[1]}"
        if differs:
            raise MoEdgeError(
                f"{self.path} holds times of another dense model than the one to tune ({differs}); time its archive."
            )


def parent_time(path: Path, device: Device) -> ParentTime:
    """Return the time a token of the dense parent in a device's ``bench-result.json``.

    Raises:
        MoEdgeError: it is no such result, of another device, or holds no time of the parent.
    """
    found = read_json(path, "copy the device's result again", missing=f"{path} does not exist.")
    if found.get("schema") != RESULT_SCHEMA or found.get("kind") != "bench":
        raise MoEdgeError(f"{path} is no bench-result.json of a device archive (schema {RESULT_SCHEMA}).")
    value = _below(found, "dense", "tpot_ms", "p50")
    if not isinstance(value, float | int) or not (math.isfinite(value) and value > 0):
        raise MoEdgeError(
            f"{path} holds no time of the dense parent; unpack the archive of the parent beside the other one on the "
            "device, build its engine, and run bench.py again."
        )
    capability = _below(found, "device", "compute_capability")
    if capability != device.compute_capability:
        raise MoEdgeError(
            f"{path} was measured on compute capability {capability}, and profile {device.name} has "
            f"{device.compute_capability}; name that device's profile with --for."
        )
    model = found["dense"].get("model")
    if not isinstance(model, dict):
        raise MoEdgeError(f"{path} does not say of which model its times are; make both archives and bench again.")
    return ParentTime(float(value), model, path)


def _below(value: Any, *keys: str) -> Any:
    """The value below a path of keys; None where a damaged or an older file has something else there."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


@dataclass
class DeviceTuning(Tuning):
    """A tuning for a device profile. The bundle ``portable`` is written and verified: archives are made of it."""

    device: Device
    timed: ParentTime | None = None

    @property
    def bundle(self) -> str:
        """Target of the bundle that is written."""
        return "portable"

    def _run(self) -> dict[str, Any]:
        """Find a share by predicted times or measured losses; convert, export and verify it.

        Returns:
            JSON of schema ``moedge.tune/1``, without times but those of ``device``, which are predicted.

        Raises:
            MoEdgeError: the goal is out of reach, or what a stage refuses.
        """
        costs = self._costs()
        if self.goal.of_speed:
            share = costs.share_for(self.goal)
            predicted: float | None = costs.value(self.goal, share)
            done: list[Try] = []
        else:
            done = search(self.goal, (FIRST_SHARE, None), self._measured, None, TRIES)
            chosen = best(self.goal, done)
            share, predicted = chosen.share, chosen.predicted
        recipe = self._at(share)
        (variant,) = variants(recipe)
        untimed = {frontier.TABLE, f"{frontier.ROOM}/bench-{self.bundle}", "export-dense"}
        todo = [stage for stage in frontier.build(recipe, self.machine) if stage.name not in untimed]
        self._do(recipe, [*todo, self._verify(recipe)])
        result = self._found(variant, costs, share, predicted, done)
        self._keep(variant)
        write_json(self.root / "tune.json", result)
        return result

    def _costs(self) -> Costs:
        recipe = self._at(FIRST_SHARE)
        self._do(recipe, self._only(recipe, "source"))
        work = Work(context=sum(recipe.frontier_lengths()), prompt=recipe.frontier_lengths()[0])
        return Costs.of(run_folder.dense(self.root), self.device, self.target, work, self.timed)

    def _found(
        self, variant: Variant, costs: Costs, share: float, predicted: float | None, done: list[Try]
    ) -> dict[str, Any]:
        quality, stage = quality_of(self.root, variant)
        facts = variant_facts({"label": variant.label, "convert": variant.convert}, stage, quality)
        losses = {"kl": facts["kl"]["value"], "ratio": facts["ppl_ratio"]["value"]}
        value = costs.value(self.goal, share) if self.goal.of_speed else losses[self.goal.kind]
        verified = run_folder.read_json(self.root / folder_of(variant) / "verify" / "verify.json")["outcome"]
        model = run_folder.source(self.root)["label"]
        return {
            **what_was_done(model, self.target, self.goal, value, done, verified),
            **chosen_facts(share, predicted, facts),
            "device": {
                "profile": self.device.name,
                "label": self.device.label,
                "context": sum(self.recipe.frontier_lengths()),
                "dense_timed": self.timed is not None,
                "dense_ms": costs.ms(1.0),
                "ms": costs.ms(share),
                "bound_by": costs.bounds[share].by,
            },
            "machine": self.machine,
        }


def next_step(device: Device, target: str, root: Path) -> str:
    """Return the command that makes of the tuned model what is built on the device."""
    if target == "tensorrt":
        return f"moedge pack {root / 'tuned'} {root / 'device.tar'} --for {device.name}"
    asked = (outlook.selects(targets.find(target), device) or "").strip(" ()")
    return " ".join(f"moedge export {root / 'tuned/checkpoint'} {root / 'device'} --target {target} {asked}".split())
