"""``moedge costs``: its file, what the products compute, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from moedge import MoEdgeError
from moedge.convert.plan import MoEPlan
from moedge.export.ort_ops import library
from moedge.runtime.bench import products
from moedge.runtime.cli import app


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Callable[..., Any], tiny_tokenizer: Any) -> Path:
    home = tmp_path_factory.mktemp("costs")
    tiny_llama(layers=2).save_pretrained(home / "model")
    tiny_tokenizer.save_pretrained(home / "model")
    (home / "text.txt").write_text("\n".join("the cat sat on the mat" for _ in range(200)), encoding="utf-8")
    return home


def moedge(*arguments: str) -> Any:
    result = CliRunner().invoke(app, list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_products_are_timed_and_a_conversion_takes_them(home: Path) -> None:
    file = home / "costs.json"
    arguments = ["costs", str(home / "model"), str(file), "--target", "ort-cpu-int8", "--threads", "1", "--rounds", "3"]
    result = moedge(*arguments)
    assert result.exit_code == 0, result.output
    assert "ort-cpu-int8, 1 threads" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80
    found = json.loads(file.read_text(encoding="utf-8"))
    config = json.loads((home / "model/config.json").read_text(encoding="utf-8"))
    hidden, width, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    shared = config["num_key_value_heads"] * (hidden // heads)
    wanted = [(hidden, hidden + 2 * shared), (hidden, hidden), (hidden, 2 * width), (width, hidden)]
    wanted.append((hidden, config["vocab_size"]))
    assert [(one["inputs"], one["outputs"]) for one in found["products"]] == list(dict.fromkeys(wanted))
    assert all(one["kept"] == list(products.KEPT) and min(one["ms"]) > 0 for one in found["products"])
    assert (found["schema"], found["target"], found["threads"]) == ("moedge.costs/1", "ort-cpu-int8", 1)

    options = ["--method", "gather", "--text", str(home / "text.txt"), "--windows", "4", "--length", "64"]
    done = moedge("convert", str(home / "model"), str(home / "moe"), *options, "--set", f"costs={file}")
    assert done.exit_code == 0, done.output
    assert MoEPlan.load(home / "moe").params["costs"] == found["products"]

    again = moedge(*arguments)
    assert again.exit_code == 2
    assert "costs.json exists; give another name, or --force." in again.output
    assert moedge(*arguments, "--force").exit_code == 0


@pytest.mark.parametrize("bits", [32, 8, 4])
def test_each_product_multiplies_what_is_kept(bits: int) -> None:
    """The graph that is timed, against its own weights read back: half of the inputs, then all."""
    timed = products._Products(64, 96, bits, 1, library.compiled(), 1 << 16)
    x = np.random.default_rng(1).standard_normal((1, 64), dtype=np.float32)
    for number, share in ((3, 0.5), (len(products.KEPT) - 1, 1.0)):
        threshold = timed._thresholds[number]
        kept = np.abs(x) >= threshold
        assert abs(kept.mean() - share) < 0.2
        y = timed._session.run(None, {"x": x, "threshold": threshold})
        weight = np.roll(timed.one.dequantized(), 1, axis=1)  # of the second product: its inputs go round by one
        if bits == 32:
            np.testing.assert_allclose(y[1], (x * kept) @ weight.T, rtol=1e-4, atol=1e-4)
        # Integers round the input too: by at most half a level of 127 of the largest one.
        error = np.abs(y[0] - (x * kept) @ timed.one.dequantized().T).max()
        assert error <= np.abs(x).max() / 254 * np.abs(timed.one.dequantized()).sum(axis=1).max() + 1e-3


def test_a_target_without_operators_of_ours_is_refused(home: Path) -> None:
    result = moedge("costs", str(home / "model"), str(home / "no.json"), "--target", "openvino")
    assert result.exit_code == 2
    assert "Products of target openvino cannot be timed here; take one of ort-cpu, ort-cpu-int8" in result.output
    assert not (home / "no.json").exists()


def test_shares_take_turns_forwards_and_backwards() -> None:
    forwards, backwards, again = products._orders(3)
    assert forwards == again == list(range(len(products.KEPT)))
    assert backwards == forwards[::-1]


def test_normal_values_exceed_the_threshold_as_often_as_is_said() -> None:
    values = np.abs(np.random.default_rng(0).standard_normal(200_000))
    for share in products.KEPT:
        assert np.mean(values >= products._above(share)) == pytest.approx(share, abs=0.005)


def test_no_compiler_is_said(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> Path:
        raise MoEdgeError("compiled with g++, which is not here")

    monkeypatch.setattr(library, "compiled", missing)
    result = moedge("costs", str(home / "model"), str(home / "none.json"))
    assert result.exit_code == 2
    assert "g++, which is not here" in result.output
