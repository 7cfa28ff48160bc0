"""Bundles in other programs: optimum, onnxruntime-genai and OpenVINO compute what ``moedge generate`` does.

``make interop`` runs this. The first run makes an environment for those programs (``requirements.txt``; some minutes
and 1.5 GiB) at ``$MOEDGE_INTEROP_VENV`` or ``.venv-interop``. ``$MOEDGE_INTEROP_BUNDLES`` names bundles, separated by
spaces, that are opened instead of the tiny ones made here. The table that is printed at the end is also written to
``build/interop.json``.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moedge.configs.tolerances import load
from moedge.convert import adapters
from moedge.export.bundle import open_bundle
from moedge.runtime.engines import ort as engines
from moedge.runtime.engines.calls import position_ids
from moedge.runtime.engines.ort import OrtEngine
from moedge.runtime.text.generate import generate
from moedge.runtime.text.tokenizer import Tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.network]

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
TARGETS = ("portable", "openvino", "ort-cpu", "ort-cpu-int8", "ort-cpu-int4")
FAMILIES = tuple(family for family in adapters.FAMILIES if family != "llama")
FAMILY_TARGETS = ("portable", "openvino", "ort-cpu")
OWN = ("own/ort-cpu", "own/ort-cpu-int8", "own/ort-cpu-int4")
"""The MoE with operators of ours, whose library optimum is not told of."""
TINY = (
    *OWN,
    *(f"{kind}/{target}" for kind in ("dense", "moe") for target in TARGETS),
    *(f"{family}/{target}" for family in FAMILIES for target in FAMILY_TARGETS),
)
MISSIZED = ("phi3", "gemma2", "olmo2", "qwen3")
"""optimum-onnx 0.1.0 allocates a cache of another size: of as many heads as there are query heads for the first three,
of heads of hidden size / number of query heads for all but Gemma 3."""
GIVEN = tuple(os.environ.get("MOEDGE_INTEROP_BUNDLES", "").split())
NAMES = GIVEN or TINY
NEW_TOKENS = 24
FOR_OPENVINO = (
    *(name for name in NAMES if name in TINY and name.endswith("/openvino")),
    *(name for name in GIVEN if json.loads((Path(name) / "manifest.json").read_text())["target"] == "openvino"),
)
PROMPTS = ("The capital of France is", "def fibonacci(n):\n    ", "Rain is water that")


@pytest.fixture(scope="session")
def python() -> Path:
    """The interpreter of the environment, made when it is not there or its requirements changed."""
    venv = Path(os.environ.get("MOEDGE_INTEROP_VENV", ROOT / ".venv-interop"))
    wanted, stamp = (HERE / "requirements.txt").read_text(encoding="utf-8"), venv / "moedge-interop.txt"
    if not stamp.is_file() or stamp.read_text(encoding="utf-8") != wanted:
        subprocess.run([sys.executable, "-m", "venv", venv], check=True)
        install = [venv / "bin/python", "-m", "pip", "install", "-q", "-r", HERE / "requirements.txt"]
        subprocess.run(install, check=True, timeout=3600)
        stamp.write_text(wanted, encoding="utf-8")
    return venv / "bin/python"


@pytest.fixture(scope="session")
def bundles(
    tiny_llama: Any, tiny_model: Any, tiny_tokenizer: Any, convert_tiny: Any, tmp_path_factory: Any
) -> dict[str, Path]:
    """A tiny dense Llama and a CMoE conversion of every family, of a shape that the quantised kernels hold."""
    if GIVEN:
        return {name: Path(name) for name in GIVEN}
    from moedge.convert import modeling
    from moedge.export.pipeline import export

    root, made = tmp_path_factory.mktemp("interop"), {}
    model = tiny_llama(hidden=64, width=256)
    model.save_pretrained(root / "checkpoints/dense")
    tiny_tokenizer.save_pretrained(root / "checkpoints/dense")
    models = {"moe": model}
    for family in FAMILIES:
        # As in Qwen3 0.6B and 4B, whose heads are wider than hidden size / number of heads.
        more = {"head_dim": 32} if family == "qwen3" else {}
        models[family] = tiny_model(family, hidden=64, width=256, **more)
    for kind, dense in models.items():
        plan = convert_tiny(dense, "cmoe", k_a=8)
        modeling.save(modeling.apply(plan, dense), plan, tiny_tokenizer, root / "checkpoints" / kind)
    for kind in ("dense", *models):
        targets = FAMILY_TARGETS if kind in FAMILIES else TARGETS
        folder = root / "checkpoints" / kind
        for target, path in export(folder, root / kind, targets, label=kind, stock_operators=True).items():
            made[f"{kind}/{target}"] = path
    targets = [name.partition("/")[2] for name in OWN]
    portable = made["moe/portable"]
    own = export(root / "checkpoints/moe", root / "own", targets, label="moe", portable=portable)
    return made | {name: own[target] for name, target in zip(OWN, targets, strict=True)}


@pytest.fixture(scope="session")
def references(bundles: dict[str, Path], tmp_path_factory: Any) -> dict[str, dict[str, Any]]:
    """What ``moedge generate`` makes of each prompt, and the logits of the first prompt and its continuation."""
    folder, made = tmp_path_factory.mktemp("logits"), {}
    for number, (name, path) in enumerate(bundles.items()):
        manifest, tokenizer = open_bundle(path).manifest.document(), Tokenizer(path)
        ends = list(manifest["model"]["eos_token_ids"])
        engine = OrtEngine(path, threads=1)
        texts = [generate(engine, tokenizer, prompt, max_new_tokens=NEW_TOKENS).ids for prompt in PROMPTS]
        prompts = [{"text": prompt, "ids": tokenizer.encode(prompt)} for prompt in PROMPTS]
        steps = [prompts[0]["ids"], *([token] for token in texts[0][:8])]
        step, logits = engine.prefill(np.array([steps[0]])), []
        for ids in steps[1:]:
            logits.append(step.logits[0])
            step = engine.decode(np.array([ids]), step.cache)
        logits.append(step.logits[0])
        batch = greedy_batch(engine, [prompt["ids"] for prompt in prompts], ends, tokenizer.eos_token_id)
        engine.close()
        made[name] = {
            "name": name,
            "quantised": "quantization" in manifest,
            "family": manifest["model"]["model_type"],
            "path": str(path),
            "loaders": [loader for case, loader in CASES if case == name],
            "prompts": prompts,
            "new_tokens": NEW_TOKENS,
            "steps": steps,
            "ends": ends,
            "pad": tokenizer.eos_token_id,
            "cache": [manifest["model"]["num_kv_heads"], manifest["model"]["head_dim"]],
            "logits": str(folder / f"{number}.npy"),
            "expected": [[token for token in ids if token not in ends] for ids in texts],
            "expected_batch": batch,
            "expected_logits": np.concatenate(logits),
        }
    return made


def greedy_batch(engine: OrtEngine, rows: list[list[int]], ends: list[int], pad: int) -> list[list[int]]:
    """Continue all rows in one left-padded batch as transformers does; each row up to what ends its text."""
    width = max(map(len, rows))
    ids = np.array([[pad] * (width - len(row)) + row for row in rows])
    mask = np.array([[0] * (width - len(row)) + [1] * len(row) for row in rows])

    def their_positions(mask: np.ndarray, last: int) -> np.ndarray:
        """transformers gives padding position 1. Its experts then count as theirs in the kernels' sums."""
        return np.where(mask[:, -last:] == 0, 1, position_ids(mask, last))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engines, "position_ids", their_positions)
        step, made = engine.prefill(ids, mask), np.zeros((len(rows), 0), np.int64)
        while True:
            token = step.logits[:, -1].argmax(-1)
            over = np.isin(made, ends).any(axis=1)
            made = np.concatenate([made, np.where(over, pad, token)[:, None]], axis=1)
            if made.shape[1] == NEW_TOKENS or np.isin(made, ends).any(axis=1).all():
                break
            step = engine.decode(made[:, -1:], step.cache)
    return [list(itertools.takewhile(lambda token: token not in ends, row)) for row in made.tolist()]


@pytest.fixture(scope="session")
def results(python: Path, references: dict[str, Any], tmp_path_factory: Any) -> Iterator[dict[str, Any]]:
    """What the other programs computed, all in one process of their environment."""
    folder = tmp_path_factory.mktemp("work")
    work = [{key: value for key, value in entry.items() if "expected" not in key} for entry in references.values()]
    (folder / "work.json").write_text(json.dumps({"bundles": work}), encoding="utf-8")
    command = [python, HERE / "check.py", folder / "work.json", folder / "result.json"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run(command, check=True, timeout=1800, env=environment)
    found = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    found["seen"] = {}
    yield found
    (ROOT / "build").mkdir(exist_ok=True)
    (ROOT / "build/interop.json").write_text(json.dumps({**found["seen"], "versions": found["versions"]}, indent=1))
    print(f"\n{found['versions']}")
    for name, seen in found["seen"].items():
        print(f"{name}: {seen}")


CASES = [
    *((name, loader) for name in NAMES for loader in ("optimum", "genai") if loader == "genai" or name not in OWN),
    *((name, "openvino") for name in FOR_OPENVINO),
]


@pytest.mark.parametrize(("name", "loader"), CASES)
def test_the_same_tokens(name: str, loader: str, references: dict[str, Any], results: dict[str, Any]) -> None:
    reference, found = references[name], results["bundles"][name][loader]
    assert "error" not in found, found["error"]
    assert found["alone"] == reference["expected"]
    assert sum(map(len, found["alone"])) > 2 * len(PROMPTS), "the texts end too early to show anything"
    if loader != "openvino":  # it has no tokenizer
        assert found["encoded"] == [prompt["ids"] for prompt in reference["prompts"]]
    if loader == "optimum":
        assert found["batch"] == reference["expected_batch"]
        if not reference["quantised"]:  # 8-bit activations turn the last bit of a float32 sum into a step of their own
            assert found["batch"] == reference["expected"]
        if name in TINY:  # the page says for which families a user has to set the two sizes
            assert (found["cache"] == reference["cache"]) == (reference["family"] not in MISSIZED)
    results["seen"].setdefault(name, {})[loader] = f"{sum(map(len, found['alone']))} tokens equal"


@pytest.mark.parametrize("name", FOR_OPENVINO)
def test_the_same_logits_in_openvino(name: str, references: dict[str, Any], results: dict[str, Any]) -> None:
    """Both compute in float32, so the limits are those of another float32 runtime (configs/tolerances.yaml)."""
    limits, found = load().profile("float32", "portable"), results["bundles"][name]["openvino"]
    assert "error" not in found, found["error"]
    want, got = references[name]["expected_logits"].astype(np.float64), np.load(found["logits"]).astype(np.float64)
    assert got.shape == want.shape
    errors = np.abs(got - want).max(axis=1) / np.abs(want).max(axis=1)
    log_p, log_q = (x - x.max(1, keepdims=True) for x in (want, got))
    log_p, log_q = (x - np.log(np.exp(x).sum(1, keepdims=True)) for x in (log_p, log_q))
    kl = (np.exp(log_p) * (log_p - log_q)).sum(1)
    assert np.median(errors) <= limits.median_rel_error
    assert errors.mean() <= limits.mean_rel_error
    assert kl.mean() <= limits.mean_kl
    results["seen"].setdefault(name, {})["openvino logits"] = (
        f"{len(want)} tokens: relative error median {np.median(errors):.1e}, largest {errors.max():.1e}; "
        f"mean KL {kl.mean():.1e}"
    )
