"""``torchrun ... convert``: two CPU processes (gloo) make the plan that one makes, one of them writes, errors end all.

The slow part starts real processes; what they do to single sums is tested in one process by splitting by hand.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moedge import MoEdgeError
from moedge.convert import methods, modeling, processes
from moedge.convert.plan import MoEPlan
from moedge.convert.train import training
from moedge.convert.train.settings import TrainSettings
from moedge.runtime.run import conversion


def test_one_process_gets_back_what_it_gives() -> None:
    torch = pytest.importorskip("torch")
    rows = torch.arange(6.0).reshape(3, 2)
    assert processes.total(rows) is rows
    assert processes.joined(rows) is rows
    assert processes.span(5) == slice(0, 5)
    assert (processes.count(), processes.rank(), processes.added(0.1)) == (1, 0, 0.1)


@pytest.mark.parametrize(("windows", "count"), [(2, 2), (5, 2), (7, 3), (16, 5)])
def test_every_window_belongs_to_one_process(windows: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "count", lambda: count)
    found: list[int] = []
    for rank in range(count):
        monkeypatch.setattr(processes, "rank", lambda rank=rank: rank)
        own = list(range(windows))[processes.span(windows)]
        assert own, "no process is idle"
        found += own
    assert found == list(range(windows))
    with pytest.raises(MoEdgeError, match=f"1 windows cannot be shared by {count} processes"):
        processes.span(1)


@pytest.mark.parametrize(("tokens", "count", "found"), [(96, 1, 3), (96, 5, 5), (10, 1, 1), (96, 9, 6), (10**6, 2, 6)])
def test_every_process_has_a_window_of_what_is_measured(
    tokens: int, count: int, found: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "count", lambda: count)
    windows = np.arange(6 * 32).reshape(6, 32)
    np.testing.assert_array_equal(processes.of_tokens(windows, tokens), windows[:found])


def test_long_windows_are_measured_in_pieces_of_each_in_turn() -> None:
    """Of eight windows of 2048 tokens 4096 tokens are not the first two windows, which are of the first two texts."""
    windows = np.arange(8 * 2048).reshape(8, 2048)
    np.testing.assert_array_equal(processes.of_tokens(windows, 4096), windows[:, :512])
    more = processes.of_tokens(windows, 6000)
    np.testing.assert_array_equal(more, [*windows[:, :512], *windows[:3, 512:1024]])
    odd = np.arange(2 * 700).reshape(2, 700)
    np.testing.assert_array_equal(processes.of_tokens(odd, 10**6), odd[:, :512])


def test_processes_wait_for_days(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one downloads and hashes while the others wait."""
    import accelerate

    given: dict[str, Any] = {}
    monkeypatch.setattr(accelerate, "PartialState", lambda **more: given.update(more))
    monkeypatch.setattr(processes, "_state", None)
    with monkeypatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        processes.start("cpu")
    assert given == {"cpu": True, "timeout": timedelta(days=7)}
    accelerator: Any = training.make(TrainSettings(tokens=1))
    assert accelerator.init_handler.timeout == timedelta(days=7)


def test_methods_that_need_all_tokens_at_once_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "count", lambda: 2)
    refused = {name for name, method in methods.METHODS.items() if method.one_process}
    assert refused == {"cmoe-hierarchical", "dive", "moefication"}
    with pytest.raises(MoEdgeError, match="moefication runs in one process; start it without torchrun"):
        methods.convert("moefication", None, None)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What torchrun joins its processes by; of two, and nobody waits."""
    dist = pytest.importorskip("torch.distributed")
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    monkeypatch.setattr(processes, "count", lambda: 2)
    monkeypatch.setattr(conversion, "_PATIENCE", 0.0)
    return store


def said(rank: int, monkeypatch: pytest.MonkeyPatch) -> str | None:
    """What a process says that sees an error; None: it ends in silence."""
    monkeypatch.setattr(processes, "rank", lambda: rank)
    try:
        with conversion.one_message():
            raise MoEdgeError("wrong")
    except MoEdgeError as error:
        return str(error)
    except SystemExit as end:
        return None if end.code == MoEdgeError.exit_code else f"exit {end.code}"


@pytest.mark.parametrize(("order", "sentences"), [([0, 1], ["wrong", None]), ([1, 0], ["process 1: wrong", None])])
def test_what_all_processes_see_is_said_once(
    order: list[int], sentences: list[str | None], store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long it takes until the others are ended, and whichever comes first."""
    assert [said(rank, monkeypatch) for rank in order] == sentences
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert said(0, monkeypatch) == "wrong", "torchrun has started them again"


def test_where_nobody_knows_it_is_said(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASTER_PORT")
    assert [said(rank, monkeypatch) for rank in (0, 1)] == ["wrong", "process 1: wrong"]
    monkeypatch.setattr(processes, "count", lambda: 1)
    assert said(0, monkeypatch) == "wrong"


# --- real processes --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Callable[..., Any], tiny_tokenizer: Any) -> Path:
    home = tmp_path_factory.mktemp("processes")
    tiny_llama(layers=2).save_pretrained(home / "model")
    tiny_tokenizer.save_pretrained(home / "model")
    words = np.random.default_rng(0).choice(["the", "cat", "sat", "on", "a", "mat"], (300, 12))
    (home / "text.txt").write_text("\n".join(map(" ".join, words)), encoding="utf-8")
    return home


def convert(home: Path, out: str, *options: str, count: int) -> subprocess.CompletedProcess[str]:
    head = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"] if count > 1 else []
    command = [sys.executable, *head, "-m", "moedge", "convert", str(home / "model"), str(home / out)]
    command += ["--text", str(home / "text.txt"), "--windows=5", "--length=32", *options]
    variables = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=900, check=False)


LAYOUT = ("--shared=2", "--active=3", "--experts=8")
SETTINGS = {
    "cmoe": ("--method=cmoe", *LAYOUT, "--set", "k_a=6"),
    "moedge": ("--method=moedge", *LAYOUT, "--set", "budget=measured", "--set", "gather.share=.5"),
    "flap": ("--method=flap", "--set", "keep=.5", "--set", "refit=true", "--set", "budget=measured"),
    "gather": ("--method=gather", "--set", "share=.5", "--set", "scores=norms"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_two_processes_make_the_plan_that_one_makes(name: str, home: Path) -> None:
    for count in (1, 2):
        done = convert(home, f"{name}-{count}", *SETTINGS[name], count=count)
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.count("plan ") == 1, "one process speaks"
    one, two = (MoEPlan.load(home / f"{name}-{count}") for count in (1, 2))
    for a, b in zip(one.layers, two.layers, strict=True):
        np.testing.assert_array_equal(a.shared, b.shared)
        assert [list(expert) for expert in a.experts] == [list(expert) for expert in b.experts]
        assert a.top_k == b.top_k
        for key in ("down", "compensation", "output_bias", *a.thresholds):
            first, second = (getattr(layer, key, None) for layer in (a, b))
            assert (first is None) == (second is None)
            if first is not None:
                # float32 sums of 160 tokens in another order, through a solve with a ridge of 1e-5 at least.
                np.testing.assert_allclose(second, first, rtol=2e-3, atol=2e-3 * np.abs(first).max())
    states = [modeling.load(home / f"{name}-{count}")[0].state_dict() for count in (1, 2)]
    assert states[0].keys() == states[1].keys()
    assert not [path for path in home.iterdir() if path.name.startswith(".")], "nothing half-written"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--method=moefication",), "moefication runs in one process"),
        (("--method=cmoe", *LAYOUT, "--windows=1"), "1 windows cannot be shared by 2 processes"),
        (("--method=cmoe", "--shared=9", "--active=9"), "--active"),
    ],
)
def test_an_error_is_one_sentence_and_ends_all(options: tuple[str, ...], said: str, home: Path) -> None:
    done = convert(home, "failed", *options, count=2)
    assert done.returncode != 0
    ours = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(ours) == 1, done.stderr
    assert said in ours[0]
    assert not (home / "failed").exists()


@pytest.mark.slow
def test_what_one_process_alone_sees_is_said_and_ends_all(home: Path, tmp_path: Path) -> None:
    """The second process finds no memory; the first waits in a sum that never comes."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os\n"
        "if os.environ.get('RANK') == '1':\n"
        "    import moedge.convert.calibration as c\n"
        "    from moedge import MoEdgeError\n"
        "    def collect(*a, **k): raise MoEdgeError('this process is broken')\n"
        "    c.collect = collect\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "moedge"]
    command += ["convert", str(home / "model"), str(home / "broken"), "--text", str(home / "text.txt")]
    command += ["--windows=5", "--length=32", "--method=cmoe", *LAYOUT]
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode != 0
    assert "error: process 1: this process is broken" in done.stderr
    assert [line for line in done.stderr.splitlines() if line.startswith("error:")] == [
        "error: process 1: this process is broken"
    ]
    assert not [path for path in home.iterdir() if "broken" in path.name], "nothing half-written"
