"""``moedge tune``: the search on models of speed and loss, and the whole command on a tiny model."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from moedge import MoEdgeError
from moedge._files import write_json
from moedge.configs import devices
from moedge.configs.recipe import recipe_from
from moedge.convert.plan import MoEPlan
from moedge.export import needs
from moedge.export.device.outlook import Work
from moedge.runtime.cli import app
from moedge.runtime.commands import tune as command
from moedge.runtime.commands._settings import positions
from moedge.runtime.engines import open_engine
from moedge.runtime.run.engine import lock
from moedge.runtime.tune.device import Costs, ParentTime, parent_time
from moedge.runtime.tune.search import LEAST, Decode, Goal, Try, best, first_speed_share, next_share, search
from moedge.runtime.tune.work import Tuning

# --- the search -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [0.6, 0.85, 1.0, 1.2])
def test_a_speed_is_found_in_a_few_tries_where_not_all_saved_bytes_save_time(kept: float) -> None:
    goal, decode = Goal("speedup", 1.25), Decode(20.0, 0.6)

    def speed(share: float) -> float:
        return 1 / (1 - 0.6 * kept * (1 - share)) - 0.01 * (1 - share)  # an overhead that the model does not know

    first = first_speed_share(goal, decode)
    assert 1 / (1 - 0.6 * (1 - first[0])) == pytest.approx(1.25, rel=2e-3)
    done = search(goal, first, lambda share: (speed(share), None), decode, 5)
    found = best(goal, done)
    assert 1.25 <= found.value <= 1.25 * 1.05
    assert len(done) <= 4
    # The same wish as a time: the parent takes 22 ms beside the tries, 20 in the profile.
    wish = Goal("ms", 22 / 1.25)
    times = search(wish, first_speed_share(wish, decode), lambda share: (22 / speed(share), 22.0), decode, 5)
    assert wish.limit / 1.05 <= best(wish, times).value <= wish.limit
    assert len(times) <= 5
    assert times[-1].predicted == pytest.approx(times[-1].value, rel=0.03)


@pytest.mark.parametrize("cost", [0.06, 0.09])
def test_a_cost_that_every_share_has_is_not_taken_for_bytes(cost: float) -> None:
    """What saves .4 (1 - s) - cost of a step: from the third try on the line is known."""
    goal, decode = Goal("speedup", 1.2), Decode(10.0, 0.4)
    done = search(
        goal, first_speed_share(goal, decode), lambda share: (1 / (1 - 0.4 * (1 - share) + cost), None), decode, 5
    )
    assert len(done) <= 4
    assert goal.close(done[-1].value)
    third = done[2]
    assert third.predicted == pytest.approx(third.value, rel=1e-3)
    assert done[0].share > third.share > done[1].share, "the line through the origin went too far"


def test_two_tries_that_noise_turned_round_are_no_line() -> None:
    goal, decode = Goal("speedup", 1.2), Decode(10.0, 0.4)
    tries = [Try(0.6, 1.2, 1.10), Try(0.5, 1.2, 1.09)]
    share, predicted = next_share(goal, tries, decode)
    assert share < 0.5
    assert predicted == pytest.approx(1.2 * 1.015, rel=1e-2)


@pytest.mark.parametrize("power", [1.5, 2.5, 4.0])
@pytest.mark.parametrize(("kind", "limit"), [("kl", 0.05), ("ratio", 1.05)])
def test_a_loss_is_found_in_a_few_tries_whatever_its_power(kind: Any, limit: float, power: float) -> None:
    goal = Goal(kind, limit)

    def measure(share: float) -> tuple[float, None]:
        loss = 0.6 * (1 - share) ** power
        return loss if kind == "kl" else 2.718281828**loss, None

    done = search(goal, (0.75, None), measure, None, 5)
    found = best(goal, done)
    assert goal.close(found.value)
    assert done[0].predicted is None
    assert done[-1].predicted == pytest.approx(done[-1].value, rel=0.15)


def test_a_speed_beyond_the_ffns_part_is_refused_before_anything_is_converted() -> None:
    with pytest.raises(MoEdgeError, match=r"--speedup 1.5 is out of reach: the FFNs take 30% of a decode step"):
        first_speed_share(Goal("speedup", 1.5), Decode(20, 0.3))
    with pytest.raises(MoEdgeError, match=r"--max-ms 12 is out of reach: .* gives 15.2 ms at best"):
        first_speed_share(Goal("ms", 12), Decode(20, 0.3))
    with pytest.raises(MoEdgeError, match=r"--max-ms 20 asks for nothing: the dense parent takes 20 ms a token"):
        first_speed_share(Goal("ms", 20), Decode(20, 0.3))


def test_what_reaches_the_goal_at_the_least_cost_is_kept_and_else_the_nearest() -> None:
    speed, loss, time = Goal("speedup", 1.2), Goal("kl", 0.1), Goal("ms", 15)
    tries = [Try(0.5, None, 12), Try(0.6, None, 14.9), Try(0.8, None, 17)]
    assert best(time, tries).share == 0.6
    assert best(time, tries[2:]).share == 0.8
    tries = [Try(0.5, None, 1.4), Try(0.6, None, 1.25), Try(0.8, None, 1.1)]
    assert best(speed, tries).share == 0.6
    assert best(speed, tries[2:]).share == 0.8
    tries = [Try(0.5, None, 0.2), Try(0.6, None, 0.09), Try(0.8, None, 0.01)]
    assert best(loss, tries).share == 0.6
    assert best(loss, tries[:1]).share == 0.5


def test_a_share_stays_within_what_is_tried() -> None:
    share, _ = next_share(Goal("speedup", 3.0), [Try(0.5, None, 1.01)], Decode(20, 0.5))
    assert share == LEAST


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "Give one of --speedup, --max-ms, --max-kl and --max-ratio"),
        (["--max-ms", "0"], "--max-ms 0 asks for nothing"),
        (["--max-ms", "15", "--speedup", "1.2"], "Give one of"),
        (["--max-ms", "15", "--for", "nope"], "nope"),
        (["--max-ms", "15", "--device-result", "x.json"], "name its profile with --for"),
        (["--max-ms", "15", "--for", "jetson-agx-orin"], "reads all weights on NVIDIA Jetson AGX Orin"),
        (["--max-ms", "15", "--for", "jetson-agx-thor", "--target", "ort-cpu"], "needs no engine"),
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


@pytest.mark.parametrize("limit", [64, 512, 1024, 2048, None])
def test_lengths_that_nobody_asked_for_fit_the_model(limit: int | None, tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", {} if limit is None else {"max_position_embeddings": limit})
    assert positions(str(tmp_path)) == limit
    found = recipe_from({"name": "x", "model": {"source": "x"}, **command._sections(None, limit)}, where="test")
    assert found.export.max_length == min(limit or 2048, 2048)
    assert found.evaluate.window == min(limit or 512, 512)
    found.check_model({"max_position_embeddings": limit, "model_type": "llama", "intermediate_size": 64}, "test")


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (["--speedup", "1.3"], "tune-my-llama-ort-cpu-speedup-1.3"),
        (["--max-kl", "0.1"], "tune-my-llama-ort-cpu-kl-0.1"),
        (["--max-ms", "15", "--for", "jetson-agx-thor"], "tune-my-llama-tensorrt-jetson-agx-thor-ms-15"),
    ],
)
def test_every_goal_has_a_folder_of_its_own(
    options: list[str], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def told(self: Tuning) -> None:
        raise MoEdgeError(f"root {self.root}, recipe {self.recipe.name}")

    monkeypatch.setattr(Tuning, "run", told)
    result = CliRunner().invoke(app, ["tune", str(tmp_path / "my llama"), *options])
    assert f"root runs/{name}, recipe {name}" in " ".join(result.stderr.split())


def test_nobody_else_works_in_the_folder_of_a_tuning(tmp_path: Path) -> None:
    """Its stages are run one after the other, and what it found is copied after them."""

    class Held(Tuning):
        def _run(self) -> dict[str, Any]:
            def other() -> None:
                with lock(tmp_path):
                    pass

            with ThreadPoolExecutor(1) as pool:
                return {"error": pool.submit(other).exception()}

    found = Held(*[None] * 3, tmp_path, {}, None).run()  # type: ignore[arg-type]
    assert "is working in" in str(found["error"])


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
    assert result.stdout, result.output
    found = json.loads(result.stdout)
    assert found["dense_decode"]["ffn_ms"] > 0
    assert found["tries"][0]["predicted"] == 1.01
    assert result.exit_code == (0 if found["reached"] else 1)
    assert found["reached"] == (found["decode_speedup"]["value"] >= 1.01)
    assert found["weighed"] == "weights"
    assert not (home / "speed/tune/costs").exists()


def test_milliseconds_are_timed_and_weighed_where_that_is_asked_for(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moedge.runtime.tune.work.TRIES", 1)
    result = tune(home, "--max-kl", "1", "--weigh", "milliseconds", "--out", str(home / "timed"))
    assert result.exit_code in (0, 1), result.output
    assert "KL was weighed against milliseconds" in result.stdout
    found = json.loads((home / "timed/tune.json").read_text(encoding="utf-8"))
    assert found["weighed"] == "milliseconds"
    timed = json.loads((home / "timed/tune/costs/costs.json").read_text(encoding="utf-8"))
    assert (timed["schema"], timed["target"], timed["threads"]) == ("moedge.costs/1", "ort-cpu", 1)
    assert MoEPlan.load(home / "timed/tuned/checkpoint").params["costs"] == timed["products"]


def test_milliseconds_of_a_target_without_operators_of_ours_are_refused(home: Path) -> None:
    options = ("--target", "openvino", "--speedup", "1.1", "--weigh", "milliseconds", "--out", str(home / "o"))
    refused = tune(home, *options)
    assert refused.exit_code == 2
    assert "--weigh milliseconds times products on this machine, in ort-cpu, ort-cpu-int8" in refused.output


# --- a device that is not here ---------------------------------------------------------------------------------------


def test_a_time_on_a_device_is_predicted_from_its_bandwidth_and_said_to_be(home: Path) -> None:
    """The tiny model takes some microseconds there; the bound of its bytes is computed here a second time."""
    thor = devices.load("jetson-agx-thor")
    config = json.loads((home / "model/config.json").read_text())
    hidden, width, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    ffns = 2.0 * 3 * hidden * width * layers / (thor.bandwidth_gb_s * 1e6)  # ms of their bytes in half precision
    costs = device_costs(home / "model", "jetson-agx-thor")
    dense = costs.ms(1.0)
    limit = dense - 0.3 * ffns
    result = tune(home, "--max-ms", str(limit), "--for", "jetson-agx-thor", "--out", str(home / "thor"))
    assert result.exit_code == 0, result.output
    found = json.loads((home / "thor/tune.json").read_text(encoding="utf-8"))
    assert found["share"] == pytest.approx(0.7, abs=0.0011)
    assert found["device"]["ms"] <= limit
    assert found["predicted"] == found["device"]["ms"]
    assert (found["target"], found["tries"], found["device"]["dense_timed"]) == ("tensorrt", [], False)
    assert "tpot_ms" not in found
    assert "PREDICTED, nothing was timed: tensorrt on NVIDIA Jetson AGX Thor" in result.stdout
    assert f"next: moedge pack {home / 'thor/tuned'}" in result.stdout
    plan = MoEPlan.load(home / "thor/tuned/checkpoint")
    assert (plan.sha256, plan.params["share"]) == (found["plan_sha256"], found["share"])
    assert (home / "thor/tuned/portable/manifest.json").is_file()
    assert not list((home / "thor").glob("frontier/bench-*"))
    packed = CliRunner().invoke(app, result.stdout.rsplit("next: moedge ", 1)[1].split())
    assert packed.exit_code == 0, packed.output


def test_a_measured_parent_takes_the_place_of_the_bound(home: Path, tmp_path: Path) -> None:
    bound = device_costs(home / "model", "jetson-agx-thor")
    costs = device_costs(home / "model", "jetson-agx-thor", parent(tmp_path, home))
    assert costs.ms(1.0) == 3.0
    assert costs.ms(0.5) == pytest.approx(3.0 - (bound.ms(1.0) - bound.ms(0.5)))
    with pytest.raises(MoEdgeError, match=r"--speedup 1.5 is out of reach: a token is predicted to take 3 ms"):
        costs.share_for(Goal("speedup", 1.5))
    with pytest.raises(MoEdgeError, match="--max-ms 3 asks for nothing"):
        costs.share_for(Goal("ms", 3.0))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"schema": "x"}, "is no bench-result.json"),
        ({"dense": {}}, "no time of the dense parent"),
        ({"dense": None}, "no time of the dense parent"),
        ({"dense": {"tpot_ms": [3.0]}}, "no time of the dense parent"),
        ({"device": "Thor"}, "on compute capability None, and profile jetson-agx-thor has"),
        ({"dense": {"tpot_ms": {"p50": 3.0}}}, "does not say of which model"),
        (
            {"device": {"compute_capability": "8.7"}},
            "on compute capability 8.7, and profile jetson-agx-thor has",
        ),
    ],
)
def test_a_result_that_says_too_little_or_is_of_another_device_is_refused(
    home: Path, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    with pytest.raises(MoEdgeError, match=said):
        parent(tmp_path, home, **change)


@pytest.mark.parametrize(
    ("fact", "value"),
    [("num_layers", 24), ("hidden_size", 4096), ("vocab_size", 128256), ("num_kv_heads", 9), ("parameters", 7)],
)
def test_the_times_of_another_model_are_refused(home: Path, tmp_path: Path, fact: str, value: int) -> None:
    timed = parent(tmp_path, home)
    other = replace(timed, model={**timed.model, fact: value})
    with pytest.raises(MoEdgeError, match=rf"times of another dense model than .* \({fact} {value} against"):
        device_costs(home / "model", "jetson-agx-thor", other)


def test_a_parent_that_is_faster_than_its_saved_bytes_is_refused(home: Path, tmp_path: Path) -> None:
    bound = device_costs(home / "model", "jetson-agx-thor")
    saved = bound.ms(1.0) - bound.ms(LEAST)
    timed = parent(tmp_path, home)
    assert device_costs(home / "model", "jetson-agx-thor", replace(timed, ms=1.01 * saved)).ms(LEAST) > 0
    with pytest.raises(MoEdgeError, match="less than NVIDIA Jetson AGX Thor needs for the weights"):
        device_costs(home / "model", "jetson-agx-thor", replace(timed, ms=0.99 * saved))


def test_a_loss_for_a_device_is_measured_and_its_time_predicted(home: Path) -> None:
    result = tune(home, "--max-kl", "0.02", "--for", "rtx-4090", "--target", "tensorrt-rtx", "--out", str(home / "rtx"))
    assert result.exit_code == 0, result.output
    found = json.loads((home / "rtx/tune.json").read_text(encoding="utf-8"))
    assert found["kl"]["value"] <= 0.02
    assert found["tries"][0]["share"] == 0.75
    assert found["device"]["ms"] < found["device"]["dense_ms"]
    assert "--target tensorrt-rtx --expert-form plugins" in result.stdout


def parent(folder: Path, home: Path, **change: Any) -> ParentTime:
    """What a bench-result.json with 3 ms of the tiny model says, read for its device."""
    thor = devices.load("jetson-agx-thor")
    dense = {"tpot_ms": {"p50": 3.0}, "model": needs.facts(home / "model")[0].document()}
    found = {"schema": "moedge.device-result/1", "kind": "bench", "dense": dense}
    found |= {"device": {"compute_capability": thor.compute_capability}}
    (folder / "bench-result.json").write_text(json.dumps({**found, **change}))
    return parent_time(folder / "bench-result.json", thor)


def device_costs(model: Path, profile: str, measured: ParentTime | None = None) -> Costs:
    return Costs.of(model, devices.load(profile), "tensorrt", Work(context=36, prompt=32), measured)
