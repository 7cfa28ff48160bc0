"""``moedge tune``: the search on models of speed and loss, and the whole command on a tiny model."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from moedge import MoEdgeError
from moedge.convert.plan import MoEPlan
from moedge.runtime.cli import app
from moedge.runtime.engines import open_engine
from moedge.runtime.tune.search import LEAST, Goal, Try, best, first_speed_share, next_share, search

# --- the search -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [0.6, 0.85, 1.0, 1.2])
def test_a_speed_is_found_in_a_few_tries_where_not_all_saved_bytes_save_time(kept: float) -> None:
    goal, part = Goal("speedup", 1.25), 0.6

    def measure(share: float) -> float:
        return 1 / (1 - part * kept * (1 - share)) - 0.01 * (1 - share)  # an overhead that the model does not know

    first = first_speed_share(goal, part)
    assert 1 / (1 - part * (1 - first)) == pytest.approx(1.25, rel=2e-3)
    done = search(goal, (first, 1.25), measure, part, 5)
    found = best(goal, done)
    assert 1.25 <= found.value <= 1.25 * 1.05
    assert len(done) <= 4


@pytest.mark.parametrize("power", [1.5, 2.5, 4.0])
@pytest.mark.parametrize(("kind", "limit"), [("kl", 0.05), ("ratio", 1.05)])
def test_a_loss_is_found_in_a_few_tries_whatever_its_power(kind: Any, limit: float, power: float) -> None:
    goal = Goal(kind, limit)

    def measure(share: float) -> float:
        loss = 0.6 * (1 - share) ** power
        return loss if kind == "kl" else 2.718281828**loss

    done = search(goal, (0.75, None), measure, 1.0, 5)
    found = best(goal, done)
    assert goal.close(found.value)
    assert done[0].predicted is None
    assert done[-1].predicted == pytest.approx(done[-1].value, rel=0.15)


def test_a_speed_beyond_the_ffns_part_is_refused_before_anything_is_converted() -> None:
    with pytest.raises(MoEdgeError, match=r"--speedup 1.5 is out of reach: the FFNs take 30% of a decode step"):
        first_speed_share(Goal("speedup", 1.5), 0.3)


def test_what_reaches_the_goal_at_the_least_cost_is_kept_and_else_the_nearest() -> None:
    speed, loss = Goal("speedup", 1.2), Goal("kl", 0.1)
    tries = [Try(0.5, None, 1.4), Try(0.6, None, 1.25), Try(0.8, None, 1.1)]
    assert best(speed, tries).share == 0.6
    assert best(speed, tries[2:]).share == 0.8
    tries = [Try(0.5, None, 0.2), Try(0.6, None, 0.09), Try(0.8, None, 0.01)]
    assert best(loss, tries).share == 0.6
    assert best(loss, tries[:1]).share == 0.5


def test_a_share_stays_within_what_is_tried() -> None:
    share, _ = next_share(Goal("speedup", 3.0), [Try(0.5, None, 1.01)], 0.5)
    assert share == LEAST


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "Give one of --speedup, --max-kl and --max-ratio"),
        (["--speedup", "1.2", "--max-kl", "0.1"], "Give one of"),
        (["--speedup", "0.9"], "--speedup 0.9 asks for nothing"),
        (["--max-ratio", "1"], "--max-ratio 1 asks for nothing"),
        (["--max-kl", "0.1", "--target", "tensorrt"], "tensorrt runs on a device only"),
        (["--max-kl", "0.1", "--target", "nope"], "Unknown target 'nope'"),
    ],
)
def test_what_cannot_be_asked_for_is_refused(options: list[str], said: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["tune", str(tmp_path), "--out", str(tmp_path / "run"), *options])
    assert result.exit_code == 2
    assert said in " ".join(result.stderr.split())
    assert not (tmp_path / "run").exists()


# --- the command ----------------------------------------------------------------------------------------------------

RECIPE = """
model: {{source: x}}
text: {{calibration: {home}/text.txt, held_out: [{home}/text.txt]}}
calibration: {{windows: 4, length: 128}}
export: {{max_length: 256}}
evaluate: {{window: 64, tokens: 512}}
verify: {{tokens: 2048, window: 256, prefill: 250, threads: 1}}
bench: {{prompt: 32, decode: 4, repeats: 3, threads: 1}}
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Callable[..., Any], tiny_tokenizer: Any) -> Path:
    home = tmp_path_factory.mktemp("tune")
    tiny_llama(layers=2).save_pretrained(home / "model")
    tiny_tokenizer.save_pretrained(home / "model")
    letters = random.Random(0)
    lines = ["".join(letters.choices("abcdefgh ", k=120)) for _ in range(400)]
    (home / "text.txt").write_text("\n".join(lines), encoding="utf-8")
    (home / "tiny.yaml").write_text(RECIPE.format(home=home), encoding="utf-8")
    return home


def tune(home: Path, *options: str) -> Any:
    arguments = ["tune", str(home / "model"), "--recipe", str(home / "tiny.yaml"), *options]
    result = CliRunner().invoke(app, arguments)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_a_wanted_loss_becomes_a_checked_bundle_in_one_command(home: Path) -> None:
    run = home / "run"
    result = tune(home, "--max-kl", "0.02", "--out", str(run))
    assert result.exit_code == 0, result.output
    found = json.loads((run / "tune.json").read_text(encoding="utf-8"))
    assert found["reached"]
    assert found["kl"]["value"] <= 0.02
    assert found["verified"] == "passed"
    assert found["tries"][0]["share"] == 0.75
    plan = MoEPlan.load(run / "tuned/checkpoint")
    assert (plan.sha256, plan.params["share"]) == (found["plan_sha256"], found["share"])
    engine = open_engine(run / "tuned/ort-cpu", threads=1)
    engine.close()
    assert max(map(len, result.stdout.splitlines()[:-2])) <= 80, "all but the paths"
    assert all(word in result.stdout for word in ("predicted", "measured", "reached", "KL", "passed"))
    made = {path: path.stat().st_ino for path in run.rglob("convert/stage.json")}
    assert tune(home, "--max-kl", "0.02", "--out", str(run)).exit_code == 0
    assert {path: path.stat().st_ino for path in run.rglob("convert/stage.json")} == made, "nothing is converted again"


def test_a_speed_is_predicted_from_the_profile_and_what_came_out_is_said(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tiny model is not faster for reading less: the command says so and exits with 1."""
    monkeypatch.setattr("moedge.runtime.tune.work.TRIES", 1)
    result = tune(home, "--speedup", "1.01", "--out", str(home / "speed"), "--json")
    found = json.loads(result.stdout)
    assert found["dense_decode"]["ffn_ms"] > 0
    assert found["tries"][0]["predicted"] == 1.01
    assert result.exit_code == (0 if found["reached"] else 1)
    assert found["reached"] == (found["decode_speedup"]["value"] >= 1.01)
