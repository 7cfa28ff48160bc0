"""Joules belong to the engine that took them, counters that wrap lose nothing, and "not told" has a reason."""

from __future__ import annotations

import io
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import scipy.stats
from rich.console import Console

from moedge.runtime.bench.energy import energy
from moedge.runtime.bench.guard import Observer
from moedge.runtime.device import moedge_power as power
from moedge.runtime.device.moedge_guard import Watch
from moedge.runtime.device.moedge_nvml import NoNvml
from moedge.runtime.device.moedge_power import (
    Board,
    Meter,
    NotTold,
    Rapl,
    Sensor,
    grown,
    jetson,
    open_source,
    whole_board,
)
from moedge.runtime.device.moedge_watch import Recorder
from moedge.runtime.engines.info import EngineInfo, EngineModel
from moedge.runtime.report.headroom import show
from moedge.runtime.report.watched import lines, sentences

SPAN = 262_143_328_850
"""max_energy_range_uj of an Intel server."""


def zone(root: Path, name: str, what: str, value: int) -> Path:
    folder = root / "sys/class/powercap" / name
    folder.mkdir(parents=True)
    (folder / "name").write_text(f"{what}\n")
    (folder / "energy_uj").write_text(f"{value}\n")
    (folder / "max_energy_range_uj").write_text(f"{SPAN}\n")
    return folder


def test_rapl_counts_packages_and_memory_once(tmp_path: Path) -> None:
    package = zone(tmp_path, "intel-rapl:0", "package-0", 1_000_000)
    memory = zone(tmp_path, "intel-rapl:0:1", "dram", 0)
    cores = zone(tmp_path, "intel-rapl:0:0", "core", 0)
    whole = zone(tmp_path, "intel-rapl:1", "psys", 0)
    source = Rapl(tmp_path)
    assert source.name == "RAPL (dram, package-0)"
    for folder, value in ((package, 3_500_000), (memory, 500_000), (cores, 2_000_000), (whole, 9_000_000)):
        (folder / "energy_uj").write_text(str(value))
    assert source.joules() == pytest.approx(2.5 + 0.5)
    assert source.joules() == pytest.approx(3.0), "read twice, counted once"


def test_a_counter_that_begins_again_loses_nothing(tmp_path: Path) -> None:
    package = zone(tmp_path, "intel-rapl:0", "package-0", SPAN - 999_999)
    source = Rapl(tmp_path)
    (package / "energy_uj").write_text("1000000")
    assert source.joules() == pytest.approx(2.0)
    (package / "energy_uj").write_text("1500000")
    assert source.joules() == pytest.approx(2.5)
    assert grown(SPAN, 0, SPAN) == 1


def test_a_counter_for_root_only_says_how_to_allow_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = zone(tmp_path, "intel-rapl:0", "package-0", 0)
    read = Path.read_text

    def locked(path: Path, *args: str, **options: str) -> str:
        if path.name == "energy_uj":
            raise PermissionError(path)
        return read(path, *args, **options)

    monkeypatch.setattr(Path, "read_text", locked)
    with pytest.raises(NotTold, match=rf"for root only; allow it with: sudo chmod a\+r {package}/energy_uj"):
        Rapl(tmp_path)


def test_a_machine_without_counters_says_so(tmp_path: Path) -> None:
    with pytest.raises(NotTold, match=r"no RAPL counters .*no INA power sensors"):
        open_source(gpu=False, root=tmp_path)


def rail(root: Path, number: int, label: str, millivolts: int, milliamperes: int | None) -> None:
    folder = root / "sys/class/hwmon/hwmon1"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"in{number}_label").write_text(f"{label}\n")
    (folder / f"in{number}_input").write_text(f"{millivolts}\n")
    if milliamperes is not None:
        (folder / f"curr{number}_input").write_text(f"{milliamperes}\n")


def test_a_jetsons_board_is_measured_once(tmp_path: Path) -> None:
    """Orin Nano: VDD_IN is the board, the others are parts of it, channel 7 is a sum of shunt voltages."""
    rail(tmp_path, 1, "VDD_IN", 5000, 2000)
    rail(tmp_path, 2, "VDD_CPU_GPU_CV", 5000, 1000)
    rail(tmp_path, 7, "sum of shunt voltages", 30, None)
    source = jetson(tmp_path)
    try:
        start = time.monotonic()
        before = source.joules()
        time.sleep(0.25)
        took, seconds = source.joules() - before, time.monotonic() - start
    finally:
        source.close()
    assert source.name == "INA (VDD_IN)"
    assert took == pytest.approx(10.0 * seconds, rel=0.05)  # 10 W; the clocks are read some microseconds apart
    again = open_source(gpu=False, root=tmp_path)
    again.close()  # its thread would read the clock that a later test gives
    assert again.name == "INA (VDD_IN)", "before RAPL, which no Jetson has"


def test_rails_of_every_board() -> None:
    assert whole_board(dict.fromkeys(["VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0", "VDDQ_VDD2_1V8AO"])) == (
        "VDD_GPU_SOC",
        "VDD_CPU_CV",
        "VIN_SYS_5V0",
    )
    assert whole_board(dict.fromkeys(["VDD_GPU", "VDD_CPU_SOC_MSS", "VIN_SYS_5V0", "VIN"])) == ("VIN",)
    assert whole_board(dict.fromkeys(["VDD_GPU", "VDD_CPU_SOC_MSS", "VIN_SYS_5V0"])) == (
        "VDD_GPU",
        "VDD_CPU_SOC_MSS",
        "VIN_SYS_5V0",
    )
    assert whole_board({"temp": None}) == ()


def test_a_sensor_is_summed_up_while_nobody_asks() -> None:
    """A sensor of 1 W that jumps to 3 W: without the thread, the whole time would count as their mean."""
    values = [1.0]
    sensor = Sensor("test", lambda: values[0], interval=0.01)
    try:
        time.sleep(0.3)
        values[0] = 3.0
        time.sleep(0.1)
        total = sensor.joules()
    finally:
        sensor.close()
    assert total == pytest.approx(0.3 * 1 + 0.1 * 3, rel=0.2)  # a mean of both would be 0.8


def test_between_two_readings_lies_a_trapezium(monkeypatch: pytest.MonkeyPatch) -> None:
    times, watts = iter([0.0, 2.0, 3.0]), iter([1.0, 3.0, 5.0])
    monkeypatch.setattr(power, "time", SimpleNamespace(monotonic=lambda: next(times)))
    sensor = Sensor("test", lambda: next(watts), interval=1000)
    try:
        assert sensor.joules() == 2 * (1 + 3) / 2
        assert sensor.joules() == 4 + 1 * (3 + 5) / 2
    finally:
        sensor.close()


class FakeNvml:
    def __init__(self, joules: float | None) -> None:
        self.value = joules

    def joules(self) -> float | None:
        return self.value

    def close(self) -> None:
        pass


def test_a_gpu_board_counts_from_when_it_was_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = FakeNvml(1000.0)
    board = Board(nvml)  # type: ignore[arg-type]
    nvml.value = 1012.5
    assert board.joules() == 12.5
    nvml.value = None
    with pytest.raises(NotTold, match="any more"):  # no zero, which would be 12.5 J less than before
        board.joules()
    with pytest.raises(NotTold, match="Volta and newer"):
        Board(FakeNvml(None))  # type: ignore[arg-type]

    def none() -> None:
        raise NoNvml("this machine has no NVML")

    monkeypatch.setattr(power, "Nvml", none)
    with pytest.raises(NotTold, match="no NVML"):
        Board()


def test_joules_a_token_and_their_interval() -> None:
    turns = [(0.0, 2.0, 10.0), (20.0, 24.0, 34.0)]  # prompts 2 and 4 J, decoding 8 and 10 J
    found = energy(turns, [0.5, 0.5], source="test", reason=None, tokens=4, batch=2)
    assert found["joules_per_prompt"] == pytest.approx(3.0 / 2)
    assert found["joules_per_token"] == pytest.approx(9.0 / 8)
    assert found["watts"] == pytest.approx(18.0)
    known = scipy.stats.ttest_1samp([8 / 8, 10 / 8], 0).confidence_interval(0.95)
    assert found["ci95"] == pytest.approx([known.low, known.high], rel=1e-4)
    assert found["reason"] is None
    assert energy(turns[:1], [0.5], source="test", reason=None, tokens=4, batch=2)["ci95"] is None, "of one round"


def test_what_is_not_told_is_none_with_its_reason() -> None:
    found = energy([(None, None, None)], [1.0], source=None, reason="no counter", tokens=1, batch=1)
    assert found["reason"] == "no counter"
    assert {found[name] for name in ("joules_per_prompt", "joules_per_token", "ci95", "watts")} == {None}  # type: ignore[literal-required]
    stopped = energy([(0.0, 1.0, None)], [1.0], source="test", reason=None, tokens=1, batch=1)
    assert (stopped["joules_per_token"], stopped["reason"]) == (None, "the counter stopped")


def test_a_counter_that_breaks_off_is_told_and_breaks_nothing() -> None:
    class Breaking:
        name, closed = "test", False

        def joules(self) -> float:
            raise NotTold("the sensor is gone")

        def close(self) -> None:
            self.closed = True

    source = Breaking()
    meter = Meter(gpu=False, opener=lambda *, gpu: source)
    assert meter.joules() is None
    assert (meter.reason, source.closed) == ("the sensor is gone", True)
    assert meter.joules() is None


def recorded(joules: list[float]) -> Recorder:
    """What a device's benchmark of two engines records: a warm-up and two rounds, with a counter that then ends."""
    left = iter(joules)

    def tell() -> float:
        if (now := next(left, None)) is None:
            raise NotTold("the sensor is gone")
        return now

    recorder = Recorder(["a", "b"])
    counter = SimpleNamespace(name="test", joules=tell, close=lambda: None)
    recorder._meter = Meter(gpu=True, opener=lambda *, gpu: counter)
    with recorder:
        for _ in range(3):
            for label in ("a", "b"):
                for moment in ("begin", "between", "end"):
                    recorder.mark(label, moment)
                recorder.after()
    return recorder


def test_a_device_records_the_joules_of_each_engine_or_why_there_are_none() -> None:
    a, b = [0.0, 100.0, 200.0], [200.0, 210.0, 250.0]  # the warm-up
    a1, b1 = [300.0, 301.0, 303.0], [400.0, 410.0, 430.0]
    a2, b2 = [500.0, 503.0, 509.0], [600.0, 630.0, 690.0]
    told = recorded([*a, *b, *a1, *b1, *a2, *b2])
    assert told.energy("a", 2, decode=4) == {
        **{"source": "test", "reason": None},
        **{"joules_per_prompt": (1 + 3) / 2, "joules_per_token": (2 + 6) / 8},
    }
    assert told.energy("b", 2, decode=4)["joules_per_token"] == (20 + 60) / 8
    ended = recorded([*a, *b, *a1, *b1, *a2, *b2[:2]])
    nothing = {"source": None, "reason": "the sensor is gone", "joules_per_prompt": None, "joules_per_token": None}
    assert ended.energy("b", 2, decode=4) == nothing
    assert ended.energy("a", 2, decode=4) == nothing, "two engines are compared by the same counter, or not at all"


def info(name: str, device: str = "CPU") -> EngineInfo:
    return EngineInfo(name, "script", device, "float32", 1, EngineModel(vocab_size=7))


def test_an_observer_gives_each_engine_its_own_joules_and_judges_the_rounds_that_count(
    tmp_path: Path,
) -> None:
    """A counter that the engines drive: a takes 1 J for its prompt and 2 to decode, b ten times that."""
    package = zone(tmp_path, "intel-rapl:0", "package-0", 0)
    total = 0

    def spend(joules: int) -> None:
        nonlocal total
        total += joules
        (package / "energy_uj").write_text(str(total * 1_000_000))

    opened = Rapl(tmp_path)
    observer = Observer({"a": info("a"), "b": info("b")}, Watch(), opener=lambda *, gpu: opened)
    for number in range(4):
        for label, scale in (("a", 1), ("b", 10)):
            observer.mark(label)
            spend(scale * (100 if number == 0 else 1))  # the first round is a warm-up
            observer.mark(label)
            spend(scale * 2)
            observer.mark(label)
            observer.end(label)
            spend(50)  # between turns: nobody's
    a, b = (observer.energy(label, [1.0] * 3, tokens=2, batch=1) for label in "ab")
    assert (a["joules_per_prompt"], a["joules_per_token"]) == (pytest.approx(1), pytest.approx(1))
    assert (b["joules_per_prompt"], b["joules_per_token"]) == (pytest.approx(10), pytest.approx(10))
    assert a["source"] == "RAPL (package-0)"
    rounds = {label: {"tpot_ms": [1.0, 1.0, 1.0]} for label in "ab"}
    found = observer.guard(rounds, dropped=1)
    assert found["readings"] == 1 + 3 * 2, "one before the rounds that count, one after each turn"
    observer.close()
    assert lines(found)[0].startswith(("The measurement can be trusted: ", "NOT TO BE TRUSTED: "))


def test_sentences_name_what_is_not_told() -> None:
    found = {
        "trusted": True,
        "concerns": [],
        "notes": ["The power mode is 15W."],
        "spread": [{"cv": 0.012}, {"cv": 0.004}],
        "others_cores": None,
        "stolen_cores": None,
        "mhz": None,
        "gpu_mhz": None,
        "hottest_c": None,
    }
    said = lines(found)
    assert said == [
        "The measurement can be trusted: rounds vary by at most 1.2%, other programs not told, clock not told, heat "
        "not told.",
        "The power mode is 15W.",
    ]
    bad = {**found, "trusted": False, "concerns": [{"says": "One."}, {"says": "Two."}], "others_cores": 0.5}
    assert lines(bad)[:2] == ["NOT TO BE TRUSTED: One.", "Two."]
    assert "other programs took 0.50 cores" in lines(bad)[2]
    point: Any = {"rows": [], "rounds": 400, "guard": {**bad, "notes": ["NOT TO BE TRUSTED: so begins a note."]}}
    assert [said.concern for said in sentences(point)] == [True, True, False, False]
    shown = io.StringIO()
    result: Any = {"points": [point]}
    show(result, Console(file=shown, width=120, force_terminal=True, color_system="standard"))
    yellow = [line for line in shown.getvalue().splitlines() if line.startswith("\x1b[33m")]
    assert len(yellow) == 2, "the reasons, and not what reads like one"
