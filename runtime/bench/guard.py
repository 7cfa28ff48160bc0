"""What a benchmark watches beside its clock: the machine, and the energy, between the timed parts.

:class:`Observer` is told before an engine's prompt, between its prompt and its decoding, and after it. What it finds
stands in the result as ``guard`` and in each row as ``energy``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import cast

from moedge.runtime.bench.energy import Turn, energy
from moedge.runtime.bench.watched import Energy, Guard
from moedge.runtime.device import moedge_jetson, moedge_nvml
from moedge.runtime.device.moedge_guard import Watch
from moedge.runtime.device.moedge_power import Meter, Source, open_source
from moedge.runtime.device.moedge_sensors import Gpu
from moedge.runtime.engines.info import EngineInfo

CPU = "CPU"
"""What an engine on the processor says its device is."""


class Observer:
    """Watches the rounds of one benchmark. Nothing here may be called inside a timed part.

    Args:
        infos: label -> what its engine is, of engines that are open.
        watch: takes readings; of this machine by default.
        opener: opens a counter of energy.
    """

    def __init__(
        self,
        infos: Mapping[str, EngineInfo],
        watch: Watch | None = None,
        opener: Callable[..., Source] = open_source,
    ) -> None:
        self._infos = infos
        self._nvml = moedge_nvml.found() if any(info.device != CPU for info in infos.values()) else None
        self._watch = watch or _watch(self._nvml.read if self._nvml else None)
        kinds = {info.device != CPU for info in infos.values()}
        self._meters = {gpu: Meter(gpu=gpu, opener=opener) for gpu in sorted(kinds)}
        self._turns: dict[str, list[Turn]] = {label: [] for label in infos}
        self._marks: list[float | None] = []

    def mark(self, label: str) -> None:
        """Note the energy: before an engine's prompt, between its prompt and its decoding, and after it."""
        if not self._watch.readings:
            self._watch.read()
        self._marks.append(self._meter(label).joules())

    def end(self, label: str) -> None:
        """Its turn, with three marks, has ended: take a reading of the machine."""
        before, between, after = self._marks
        self._turns[label].append((before, between, after))
        self._marks = []
        self._watch.read()

    def guard(self, rounds: Mapping[str, Mapping[str, Sequence[float]]], dropped: int = 0) -> Guard:
        """Judge the rounds that count, which came after ``dropped`` others.

        Args:
            rounds: label -> metric -> milliseconds of each round that counts.
            dropped: rounds of the warm-up.
        """
        threads = [info.threads for info in self._infos.values() if info.device == CPU]
        turns = dropped * len(self._infos)
        found = self._watch.judge(rounds, max(threads) if threads else None, since=turns)
        return cast("Guard", found.document())

    def energy(self, label: str, seconds: Sequence[float], *, tokens: int, batch: int) -> Energy:
        """Sum up what an engine took in the last rounds; see :func:`moedge.runtime.bench.energy.energy`.

        Args:
            label: of the engine.
            seconds: that the decoding of each round that counts took.
            tokens: decoded in a round, by each row.
            batch: rows.
        """
        turns = self._turns[label][-len(seconds) :]
        meter = self._meter(label)
        return energy(turns, seconds, source=meter.name, reason=meter.reason, tokens=tokens, batch=batch)

    def close(self) -> None:
        """Stop counting."""
        for meter in self._meters.values():
            meter.close()
        if self._nvml is not None:
            self._nvml.close()

    def _meter(self, label: str) -> Meter:
        return self._meters[self._infos[label].device != CPU]


def _watch(gpu: Callable[[], Gpu] | None) -> Watch:
    return Watch(gpu=gpu, power_mode=moedge_jetson.power_mode(moedge_jetson.said_by("nvpmodel", "-q")))
