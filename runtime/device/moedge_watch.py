"""What ``bench.py`` records of a device beside its clock: settings, clocks, heat, energy, and the guard's verdict.

On a Jetson the power mode comes from ``nvpmodel``, locked clocks from ``jetson_clocks`` (root only) or ``/sys``, rails
and clocks from ``tegrastats``; on other GPUs everything comes from NVML.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING or __package__:
    from moedge.runtime.device import moedge_jetson, moedge_nvml
    from moedge.runtime.device.moedge_guard import Watch
    from moedge.runtime.device.moedge_power import Meter
else:  # in an archive the files lie side by side
    import moedge_jetson
    import moedge_nvml
    from moedge_guard import Watch
    from moedge_power import Meter

RELEASE = Path("/etc/nv_tegra_release")


class Recorder:
    """Watches a device while engines take turns on its GPU."""

    def __init__(self, labels: Sequence[str]) -> None:
        self._nvml = moedge_nvml.found()
        self._meter = Meter(gpu=True)
        mode = moedge_jetson.power_mode(moedge_jetson.said_by("nvpmodel", "-q"))
        self._watch = Watch(gpu=self._nvml.read if self._nvml else None, power_mode=mode)
        locked = moedge_jetson.clocks_locked(moedge_jetson.said_by("jetson_clocks", "--show"))
        if locked is not None:
            self._watch.settings = replace(self._watch.settings, clocks_locked=locked)
        self._tegrastats = moedge_jetson.Tegrastats()
        self._joules: dict[str, list[float | None]] = {label: [] for label in labels}

    def __enter__(self) -> Recorder:
        self._tegrastats.__enter__()
        self._watch.read()
        return self

    def __exit__(self, *_: object) -> None:
        self._tegrastats.__exit__()
        self._meter.close()
        if self._nvml is not None:
            self._nvml.close()

    def mark(self, label: str, _: str) -> None:
        """Note the joules at the beginning of a turn, between its prompt and decoding, and at its end."""
        self._joules[label].append(self._meter.joules())

    def after(self) -> None:
        """Take a reading after a turn."""
        self._watch.read()

    def environment(self, rounds: Mapping[str, Mapping[str, Sequence[float]]], warmup: int) -> dict[str, Any]:
        """Return what was seen while the rounds ran that count, and what the guard says of them."""
        found = self._watch.judge(rounds, None, since=warmup * len(self._joules))
        seen = self._tegrastats.summary
        try:
            release = RELEASE.read_text(encoding="utf-8", errors="replace")
        except OSError:
            release = ""
        return {
            "guard": found.document(),
            "l4t": moedge_jetson.l4t(release),
            "tegrastats": None if seen is None or not seen.lines else asdict(seen),
        }

    def energy(self, label: str, repeats: int, decode: int) -> dict[str, Any]:
        """Return joules of a prompt and of a token, means over the last ``repeats`` rounds, or why none are told."""
        marks = [joules for joules in self._joules[label][-3 * repeats :] if joules is not None]
        if self._meter.reason is not None or len(marks) < 3 * repeats:
            return {"source": None, "reason": self._meter.reason, "joules_per_prompt": None, "joules_per_token": None}
        prompts = sum(marks[1::3]) - sum(marks[::3])
        tokens = sum(marks[2::3]) - sum(marks[1::3])
        return {
            **{"source": self._meter.name, "reason": None},
            **{"joules_per_prompt": prompts / repeats, "joules_per_token": tokens / (repeats * decode)},
        }
