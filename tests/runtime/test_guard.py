"""The guard trusts a quiet measurement, and says of a disturbed one what disturbed it and what to do."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from moedge.runtime.device import moedge_guard as guard
from moedge.runtime.device.moedge_guard import WANTED, Verdict, Watch, drift, judge, resolution, rounds_needed, spreads
from moedge.runtime.device.moedge_nvml import reasons
from moedge.runtime.device.moedge_sensors import Gpu, Reading, Settings
from moedge.runtime.report.watched import lines

QUIET = Settings(cores=2, physical_cores=2, governors=("performance",), max_mhz=3000, virtual=False)
STEADY = {"moe": {"ttft_ms": [100.0, 100.4, 99.8, 100.1], "tpot_ms": [10.0, 10.02, 9.99, 10.01]}}
START = Reading(at=0.0, own_s=0.0, busy_s=100.0, stolen_s=3.0, mhz=(800.0, 800.0), throttled=5, held_back_s=1.0)
END = replace(START, at=10.0, own_s=19.0, busy_s=119.2, mhz=(2950.0, 3000.0))
"""After ten seconds on two cores: 0.02 cores' worth of other programs."""


def verdict(
    *,
    settings: Settings = QUIET,
    rounds: Any = STEADY,
    threads: int | None = 2,
    start: Reading = START,
    jetson: bool = False,
    **end: Any,
) -> Verdict:
    return judge([start, replace(END, **end)], settings, rounds, threads=threads, jetson=jetson)


def kinds(found: Verdict) -> list[str]:
    return [concern.kind for concern in found.concerns]


def test_a_quiet_measurement_is_trusted() -> None:
    found = verdict()
    assert found.trusted
    assert found.concerns == []
    assert found.others_cores == pytest.approx(0.02)
    assert found.own_cores == pytest.approx(1.9)
    assert found.mhz == (3000, 3000), "what cores do before the first round says nothing"
    assert (found.stolen_cores, found.throttled, found.held_back_s) == (0, 0, 0)
    json.dumps(found.document(), allow_nan=False)


@pytest.mark.parametrize(
    ("changed", "kind", "says"),
    [
        # 19.2 of 20 core-seconds were busy; with 17 of our own, others took 0.22 of a core.
        ({"own_s": 17.0}, "others", "Other programs took 0.22 cores' worth"),
        ({"stolen_s": 3.0 + 0.6}, "stolen", "The host of this virtual machine took 0.06 cores' worth"),
        ({"throttled": 7}, "throttled", "slowed itself down 2 times"),
        ({"held_back_s": 1.6}, "quota", "held back for 0.6 of 10 s"),
        ({"slowed": ("tj-thermal at 99 C",)}, "heat", "tj-thermal at 99 C"),
        ({"settings": replace(QUIET, quota_cores=1.5)}, "threads", "2 threads share 1.5 cores.*--threads 1"),
        ({"threads": 4}, "threads", "4 threads share 2 cores"),
    ],
)
def test_what_disturbs_is_named_with_a_remedy(changed: dict[str, Any], kind: str, says: str) -> None:
    found = verdict(**changed)
    assert kinds(found) == [kind]
    assert not found.trusted
    assert found.concerns[0].says.endswith(".")
    assert __import__("re").search(says, found.concerns[0].says), found.concerns[0].says


@pytest.mark.parametrize(
    "changed",
    [
        {"own_s": 18.8},  # 0.04 cores of others
        {"stolen_s": 3.0 + 0.4},
        {"held_back_s": 1.4},
        # Others on cores that nobody needs: one thread on eight cores.
        {"own_s": 10.0, "threads": 1, "settings": replace(QUIET, cores=8)},
        {"settings": replace(QUIET, quota_cores=2.0)},
    ],
)
def test_what_cannot_move_a_time_by_what_is_wanted_is_no_concern(changed: dict[str, Any]) -> None:
    assert verdict(**changed).trusted


def test_a_clock_that_moves_between_turns_is_a_concern_and_a_low_one_is_not() -> None:
    middle = replace(END, at=5.0, mhz=(2000.0, 2200.0))
    found = judge([START, middle, END], replace(QUIET, governors=("schedutil",)), STEADY, threads=2)
    assert kinds(found) == ["clock"]
    assert "between 2200 and 3000 MHz (governor schedutil)" in found.concerns[0].says
    low = replace(middle, at=10.0, own_s=19.0)
    assert judge([START, middle, low], QUIET, STEADY, threads=2).trusted


def test_on_a_gpu_its_clocks_count_and_the_cores_do_not() -> None:
    busy = {"own_s": 2.0, "mhz": (1000.0,)}  # others take both cores
    cool = verdict(threads=None, gpu=Gpu(mhz=1900, celsius=60), **busy)
    assert cool.trusted
    assert cool.gpu_mhz == (1900, 1900)
    assert cool.hottest_c == 60
    assert "GPU clock 1900 to 1900 MHz, clock 1000 to 1000 MHz, at most 60 C" in lines(cool.document())[0]
    hot = Gpu(mhz=1900, reasons=reasons(0x4 | 0x20 | 0x1))
    found = verdict(threads=None, gpu=hot, **busy)
    assert kinds(found) == ["gpu-slowdown"]
    assert "heat (software)" in found.concerns[0].says
    turns = [START, replace(END, at=5.0, gpu=Gpu(mhz=1500, reasons=("power limit",))), replace(END, gpu=Gpu(mhz=1900))]
    found = judge(turns, QUIET, STEADY, threads=None)
    assert kinds(found) == ["gpu-clock"]
    assert "between 1500 and 1900 MHz (power limit)" in found.concerns[0].says


def test_what_is_not_told_is_no_concern() -> None:
    nothing = Settings(cores=2)
    found = judge([Reading(at=0.0, own_s=0.0), Reading(at=1.0, own_s=2.0)], nothing, STEADY, threads=2)
    assert found.trusted
    assert (found.others_cores, found.stolen_cores, found.mhz, found.throttled, found.hottest_c) == (None,) * 5


def test_settings_that_make_machines_differ_are_notes() -> None:
    found = verdict(settings=replace(QUIET, power_mode="15W", clocks_locked=False, physical_cores=1), jetson=True)
    assert found.trusted
    said = " ".join(found.notes)
    assert "15W" in said
    assert "jetson_clocks" in said
    assert "1 physical core" in said
    assert verdict(settings=replace(QUIET, power_mode="MAXN_SUPER", clocks_locked=True), jetson=True).notes == []


def test_only_a_jetson_is_told_of_its_tools() -> None:
    moved = [START, replace(END, at=5.0, mhz=(2000.0,), gpu=Gpu(mhz=1500)), replace(END, gpu=Gpu(mhz=1900))]
    for threads, elsewhere in ((2, "sudo cpupower frequency-set -g performance."), (None, "--lock-gpu-clocks=MHZ.")):
        for jetson, remedy in ((False, elsewhere), (True, "sudo jetson_clocks.")):
            (concern,) = judge(moved, QUIET, STEADY, threads=threads, jetson=jetson).concerns
            assert concern.says.endswith(remedy)


def test_rounds_that_vary_say_how_many_are_needed() -> None:
    """The resolution is the half width of the interval of a difference of two medians: checked by simulation."""
    cv, count = 0.06, 12
    draws = np.random.default_rng(0).normal(1, cv, (20000, 2, count))
    differences = np.diff(np.median(draws, axis=2), axis=1)
    # A median of 12 is 4 % more exact than of infinitely many, relative to the mean (order statistics); 20,000 draws
    # tell a quantile of 97.5 % within 2 %.
    assert np.quantile(np.abs(differences), 0.95) == pytest.approx(resolution(cv, count), rel=0.08)
    assert resolution(cv, rounds_needed(cv)) <= WANTED < resolution(cv, rounds_needed(cv) - 1)

    values = np.random.default_rng(1).normal(10, 1.5, count).tolist()
    found = verdict(rounds={"moe": {"tpot_ms": values}})
    assert kinds(found) == ["spread"]
    (spread,) = found.spread
    assert spread.cv == pytest.approx(np.std(values, ddof=1) / np.mean(values))
    assert f"Take {rounds_needed(spread.cv)} rounds" in found.concerns[0].says
    assert f"below {spread.resolution:.0%} cannot be told" in found.concerns[0].says


def test_the_least_certain_engine_speaks() -> None:
    rounds = {"good": {"tpot_ms": [1.0, 1.01, 0.99]}, "bad": {"tpot_ms": [1.0, 1.6, 0.9]}}
    (concern,) = verdict(rounds=rounds).concerns
    assert "The rounds of bad vary" in concern.says
    assert spreads({"one": {"tpot_ms": [1.0]}}) == [], "one round has no spread"


def test_a_trend_that_all_engines_share_is_drift() -> None:
    noise = np.random.default_rng(2).normal(1, 0.01, (2, 12))
    warming = np.linspace(1, 1.2, 12)
    rounds = {name: {"tpot_ms": (10 * noise[i] * warming).tolist()} for i, name in enumerate("ab")}
    assert drift(rounds) == pytest.approx(0.18, abs=0.03)  # of the median round, which is at 1.1
    found = verdict(rounds=rounds)
    assert "drift" in kinds(found)
    assert any("get slower, by 1" in concern.says for concern in found.concerns)
    faster = {name: {"tpot_ms": found["tpot_ms"][::-1]} for name, found in rounds.items()}
    assert any("was not warm yet" in concern.says for concern in verdict(rounds=faster).concerns)
    assert drift({"a": {"tpot_ms": [1.0] * 7}}) is None, "too few rounds for a trend"


def test_chance_shows_a_trend_about_once_in_a_hundred_runs() -> None:
    """With 10 rounds of noise; four standard deviations of a binomial(2000, 0.01) around 20."""
    draw = np.random.default_rng(3)
    seen = sum(drift({"a": {"t": draw.normal(10, 1, 10).tolist()}}) != 0 for _ in range(2000))
    assert seen <= 20 + 4 * 20**0.5


def test_a_watch_reads_when_it_is_told_and_counts_its_cost() -> None:
    class Scripted:
        """Gives START, and then END of later times."""

        def __init__(self) -> None:
            self.now = 0.0

        def settings(self, power_mode: str | None = None) -> Settings:
            return replace(QUIET, power_mode=power_mode)

        def read(self, gpu: Gpu | None = None) -> Reading:
            self.now += 10.0
            return replace(START, at=self.now, own_s=1.9 * self.now, busy_s=1.9 * self.now, gpu=gpu)

    watch = Watch(Scripted(), gpu=lambda: Gpu(mhz=1000), power_mode="MAXN")  # type: ignore[arg-type]
    for _ in range(5):
        watch.read()
    whole, late = watch.judge(STEADY, 2), watch.judge(STEADY, 2, since=2)
    assert (whole.seconds, late.seconds, late.readings) == (40, 20, 3)
    assert whole.gpu_mhz == (1000, 1000)
    assert 0 < whole.reading_ms < 50
    assert whole.settings.power_mode == "MAXN"


def test_reasons_of_a_gpu_that_is_idle_or_set_by_its_user_are_none() -> None:
    assert reasons(0x1 | 0x2 | 0x10 | 0x100) == ()
    assert reasons(0x8 | 0x40 | 0x80) == ("hardware slowdown", "heat (hardware)", "power brake")
    assert guard.WANTED == 0.05
