"""Other programs beside our engines: a peer is one row; the same tokens, or a sentence that they differ."""

from __future__ import annotations

import json
import re
import shutil
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import TypeAdapter
from typer.testing import CliRunner, Result

import moedge
from moedge import MoEdgeError
from moedge.configs.tolerances import load
from moedge.runtime import doctor, peers
from moedge.runtime.bench import latency
from moedge.runtime.bench.peers import sentence
from moedge.runtime.bench.results import Bench
from moedge.runtime.cli import app
from moedge.runtime.commands import _peers
from moedge.runtime.engines import open_engine
from moedge.runtime.engines.pytorch import TorchEngine

ROOT = Path(moedge.__file__).parent
QUICK = ("--prompt", "8", "--decode", "7", "--repeats", "3", "--threads", "1", "--text", "text.txt")


def said(found: Result) -> str:
    return " ".join(found.output.split())


# --- the registry


def test_a_peer_is_given_by_its_name_and_a_path() -> None:
    assert peers.parse("genai:build/g") == peers.Given("genai:build/g", peers.find("genai"), Path("build/g"))
    named = peers.parse("q4=llama.cpp:C:/models/x=1.gguf")
    assert (named.label, named.peer.name, named.path) == ("q4", "llama.cpp", Path("C:/models/x=1.gguf"))
    assert peers.parse("genai:a=b").path == Path("a=b")


@pytest.mark.parametrize("wrong", ["genai", "genai:", "=genai:x", "vllm:x"])
def test_what_is_no_peer_is_refused(wrong: str) -> None:
    with pytest.raises(MoEdgeError, match=r"is not NAME:PATH|Unknown peer 'vllm'; known: genai, llama.cpp, "):
        peers.parse(wrong)


def test_only_some_peers_are_built_in_some_precisions() -> None:
    assert peers.buildable("genai")[1] == "int4"
    assert peers.buildable("llama.cpp:Q8_0")[1] == "Q8_0"
    with pytest.raises(MoEdgeError, match="is made in int4, int8, fp32, not in 'q4'"):
        peers.buildable("genai:q4")
    with pytest.raises(MoEdgeError, match=r"--peer openvino is for genai or llama.cpp; openvino takes a folder with"):
        peers.buildable("openvino")


def test_a_missing_package_is_one_sentence_with_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(peers, "installed", lambda name: False)
    for row in peers.every():
        with pytest.raises(MoEdgeError, match=rf"needs .*{row.packages[0]}.*: pip install 'moedge\[{row.extra}\]'"):
            row.check(tmp_path)


def test_every_extra_is_one_of_the_package() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for row in peers.every():
        (line,) = re.findall(rf"^{re.escape(row.extra)} = \[(.*)\]$", text, re.MULTILINE)
        assert row.packages[0] in line or row.pytorch


def test_a_path_that_a_peer_does_not_take_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(peers, "installed", lambda name: True)
    for row in peers.every():
        with pytest.raises(MoEdgeError, match="that is not "):
            row.check(tmp_path)
        with pytest.raises(MoEdgeError, match=r"nothing is there; give "):
            row.check(tmp_path / "none")


def test_the_table_in_the_docs_is_that_of_the_rows() -> None:
    text = (ROOT / "docs" / "bench.md").read_text(encoding="utf-8")
    found = re.search(r"\| peer \| .*?\n\n", text, re.DOTALL)
    assert found, "docs/bench.md has no table of peers"
    rows = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in found[0].strip().splitlines()[2:]]
    assert [[row[0], row[-1]] for row in rows] == [[row.name, f"moedge[{row.extra}]"] for row in peers.every()]


def test_doctor_lists_every_peer() -> None:
    assert [entry["peer"] for entry in doctor.examine()["peers"]] == list(peers.names())


# --- a peer of a test, through bench


class FakePeer:
    """The engine of a bundle, which chooses another token at every ``wrong``-th step."""

    def __init__(self, path: Path, *, threads: int | None, max_length: int, wrong: int = 0) -> None:
        self._engine, self._wrong, self._step = open_engine(path, threads=threads, last_logits=True), wrong, 0
        self.info, self.bits, self.asked = self._engine.info, 4, (threads, max_length)
        OPENED.append(self)

    def prefill(self, ids: np.ndarray, attention_mask: np.ndarray | None = None) -> Any:
        if len(ids) > 1:
            raise MoEdgeError("the fake takes 1 row at a time here.")
        self._step = 0
        return self._changed(self._engine.prefill(ids))

    def decode(self, ids: np.ndarray, cache: Any) -> Any:
        return self._changed(self._engine.decode(ids, cache))

    def close(self) -> None:
        self._engine.close()

    def _changed(self, step: Any) -> Any:
        self._step += 1
        if self._wrong and self._step % self._wrong == 0:
            step.logits = -step.logits
        return step


OPENED: list[FakePeer] = []


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Registers peer ``fake``, whose argument is how often it differs."""
    wrong = {"every": 0}
    module = types.SimpleNamespace(FakePeer=lambda path, **options: FakePeer(path, wrong=wrong["every"], **options))
    monkeypatch.setitem(sys.modules, "fake_peer", module)  # type: ignore[arg-type]
    row = peers.Peer(
        "fake", "a peer of a test", "a bundle", ("manifest.json",), "fake_peer:FakePeer", ("numpy",), "cpu"
    )
    peers.register(row)
    OPENED.clear()
    yield lambda every: wrong.update(every=every)
    peers.unregister("fake")


@pytest.fixture
def home(toy_bundles: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """``dense`` and ``moe``, bundles of one toy; a text. Memory is measured in processes that do not know the fake."""
    for name in ("dense", "moe"):
        shutil.copytree(toy_bundles["concat"], tmp_path / name)
    manifest = tmp_path / "dense" / "manifest.json"
    facts = json.loads(manifest.read_text(encoding="utf-8"))
    manifest.write_text(json.dumps({**facts, "kind": "dense", "taps": {}}), encoding="utf-8")
    (tmp_path / "text.txt").write_text("some words " * 100, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    unknown = {"peak_rss_mib": None, "load_s": None, "reason": "a test"}
    monkeypatch.setattr(latency, "footprint", lambda *_: unknown)
    return tmp_path


def bench(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["bench", *arguments, *QUICK])


def test_a_peer_is_timed_in_the_same_rounds_and_asked_for_tokens(home: Path, fake: Callable[[int], None]) -> None:
    found = bench("moe", "dense", "--peer", "other=fake:dense", "--save", "b.json", "--csv", "b.csv")
    assert found.exit_code == 0, found.output
    result = json.loads((home / "b.json").read_text(encoding="utf-8"))
    TypeAdapter(Bench).validate_python(result)
    assert [row["label"] for row in result["points"][0]["rows"]] == ["moe", "dense", "other"]
    assert {(one["label"], one["baseline"]) for one in result["points"][0]["ratios"]} >= {("moe", "other")}
    # 8 = the first token and the 7 decoded after it
    agreement = {"parent": "dense", "tokens": 8, "same": 8, "first_other": None}
    assert result["engines"]["other"]["peer"] == {"peer": "fake", "bits": 4, "agreement": agreement}
    assert "peer" not in result["engines"]["dense"]
    assert result["engines"]["other"]["sha256"] == result["engines"]["dense"]["sha256"]
    assert result["not_batched"] == {"other": "the fake takes 1 row at a time here."}
    assert "other (float32) chooses dense's 8 greedy tokens." in said(found)
    assert {peer.asked for peer in OPENED} == {(1, 15)}, "as many threads as ours, room for the longest text"
    header, *lines = (home / "b.csv").read_text(encoding="utf-8").splitlines()
    assert [line.split(",")[header.split(",").index("peer")] for line in lines[:3]] == ["", "", "fake"]


@pytest.mark.parametrize(
    ("every", "words"),
    [
        (5, "chooses 7 of dense's 8 greedy tokens, another one first at token 4: weights of 4 bits may do that."),
        (1, "NOT THE SAME MODEL? other (float32) chooses 0 of dense's 8 greedy tokens, another one first at token 0"),
    ],
)
def test_another_model_is_said_aloud(home: Path, fake: Callable[[int], None], every: int, words: str) -> None:
    fake(every)
    found = bench("dense", "--peer", "other=fake:dense", "--markdown", "b.md")
    assert words in said(found)
    assert words.split("(")[0] in (home / "b.md").read_text(encoding="utf-8").replace("\\", "")


def test_without_rounded_weights_a_difference_is_no_rounding() -> None:
    agreement: Any = {"parent": "dense", "tokens": 32, "same": 31, "first_other": 3}
    facts: Any = {"peer": "genai", "bits": None, "agreement": agreement}
    assert "only a tie explains that" in sentence("x", facts, "float32", "float32")
    rounded = sentence("x", facts, "float32", "int4 weights")
    assert rounded.endswith("at token 3: dense's int4 weights may do that.")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("moe", "--peer", "fake:dense"), "the dense parent, which is not among moe; give its bundle or checkpoint"),
        (("dense", "--peer", "dense=fake:dense"), "dense is given twice; name each engine once."),
        (("dense", "--peer", "fake:none"), "--peer fake:none: nothing is there; give a bundle."),
    ],
)
def test_bad_input_is_one_sentence(
    home: Path, fake: Callable[[int], None], arguments: tuple[str, ...], words: str
) -> None:
    found = bench(*arguments)
    assert found.exit_code == 2
    assert words in said(found)


# --- what export --peer makes


def test_options_of_bundles_and_converted_models_are_refused(home: Path) -> None:
    (home / "moe" / "config.json").write_text("{}", encoding="utf-8")
    runs = {
        ("--target", "ort-cpu"): "--target is for bundles; export them in a call without --peer.",
        (): "moe is converted, and --peer is for the dense parent",
    }
    for more, words in runs.items():
        found = CliRunner().invoke(app, ["export", "moe", "out", "--peer", "genai", *more])
        assert found.exit_code == 2
        assert words in said(found)
        assert not (home / "out").exists()


def test_a_failed_builder_leaves_nothing(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "installed", lambda name: True)
    (home / "dense" / "config.json").write_text('{"model_type": "gpt2"}', encoding="utf-8")
    with pytest.raises(MoEdgeError, match="a gpt2 model is not written as GGUF here"):
        _peers.export(["llama.cpp"], home / "dense", home / "out", force=False)
    assert list((home / "out").iterdir()) == []


# --- the real ones, on a tiny model


@pytest.fixture(scope="module")
def checkpoint(tiny_llama: Callable[..., Any], tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wide enough for blocks of 32 and the heads of genai's kernels."""
    folder = tmp_path_factory.mktemp("peers") / "dense"
    tiny_llama(hidden=64, width=128, head_dim=16).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


def needs(name: str) -> Any:
    missing = peers.find(name).missing()
    return pytest.mark.skipif(bool(missing), reason=f"{' and '.join(missing)} is not installed")


def opens(name: str, checkpoint: Path, folder: Path) -> Path:
    """What the peer opens of the checkpoint, in float32."""
    row = peers.find(name)
    if row.builds:
        precision = {"genai": "fp32", "llama.cpp": "F32"}[name]
        _peers.export([f"{name}:{precision}"], checkpoint, folder, force=False)
        return folder / f"{name}-{precision}" / row.built
    if name == "openvino":
        from moedge.export.pipeline import export

        return export(checkpoint, folder, [name], label="dense")[name]
    return checkpoint


REAL = [
    pytest.param("genai", marks=needs("genai")),
    pytest.param("llama.cpp", marks=needs("llama.cpp")),
    pytest.param("openvino", marks=needs("openvino")),
    pytest.param("torch.compile", marks=pytest.mark.slow),  # minutes of g++
]


@pytest.mark.parametrize("name", REAL)
def test_a_peer_computes_what_the_checkpoint_does(name: str, checkpoint: Path, tmp_path: Path) -> None:
    """Prompt, several tokens at once after it (a later turn), single tokens; then another text from the beginning."""
    engine = open_engine(opens(name, checkpoint, tmp_path / "out"), peer=name, threads=1, max_length=40)
    reference = TorchEngine(checkpoint, threads=1, last_logits=True)
    generator, errors = np.random.default_rng(0), []
    for _ in range(2):
        ids = generator.integers(0, 256, (1, 16))
        got, want = engine.prefill(ids), reference.prefill(ids)
        for count in (5, 1, 1, 1):
            assert got.logits.shape == want.logits.shape
            assert got.logits.dtype == np.float32
            errors.append(np.abs(got.logits - want.logits).max() / np.abs(want.logits).max())
            ids, used = generator.integers(0, 256, (1, count)), got.cache
            got, want = engine.decode(ids, got.cache), reference.decode(ids, want.cache)
        with pytest.raises(MoEdgeError, match="prefill again"):
            engine.decode(ids, used)
    # All compute in float32, so the limits are those of another float32 runtime (configs/tolerances.yaml); but
    # llama.cpp keeps keys and values in float16: 2^-11 of each, in two layers, both for the scores and the sums.
    limits, half = load().profile("float32", "portable"), 4 * 2.0**-11 if name == "llama.cpp" else 0.0
    assert np.median(errors) <= limits.median_rel_error + half
    assert np.mean(errors) <= limits.mean_rel_error + half
    assert engine.info.threads == 1
    assert getattr(engine, "bits", None) is None
    with pytest.raises(MoEdgeError, match=r"\d+ tokens do not fit"):
        engine.prefill(generator.integers(0, 256, (1, 4096)))
    engine.close()


@pytest.mark.parametrize("name", REAL[:1])
def test_a_quantised_peer_says_its_bits(name: str, checkpoint: Path, tmp_path: Path) -> None:
    row, precision = peers.buildable(name)
    _peers.export([name], checkpoint, tmp_path / "out", force=False)
    engine: Any = open_engine(tmp_path / "out" / f"{name}-{precision}", peer=name, threads=1, max_length=40)
    assert (engine.bits, engine.info.dtype) == (4, "int4 weights")
    assert engine.info.max_batch == 1
    with pytest.raises(MoEdgeError, match="genai dense takes 1 row at a time here, not 2"):
        engine.prefill(np.zeros((2, 4), dtype=np.int64))
    with pytest.raises(MoEdgeError, match="already exists"):
        _peers.export([name], checkpoint, tmp_path / "out", force=False)
    engine.close()
    assert row.check(tmp_path / "out" / f"{name}-{precision}") is None
