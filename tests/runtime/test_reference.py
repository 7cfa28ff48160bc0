"""A kept reference judges bundles without torch: right ones pass, a planted fault fails in its own layer."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import jsonschema
import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from moedge import MoEdgeError
from moedge._files import write_json
from moedge.configs import tolerances
from moedge.convert import modeling
from moedge.export import bundle
from moedge.export.pipeline import export
from moedge.runtime import report
from moedge.runtime.cli import app
from moedge.runtime.engines import Step, open_engine, ort
from moedge.runtime.parity import against
from moedge.runtime.parity import reference as references
from moedge.runtime.parity.compare import compare
from moedge.runtime.parity.given import against_kept
from moedge.runtime.parity.metrics import TokenErrors
from moedge.runtime.parity.sample import Sample
from moedge.runtime.parity.verdict import Check, Outcome, Verdict
from moedge.runtime.report import schema
from moedge.runtime.report.checks import junit_xml, markdown

LAYERS, BROKEN = 3, 1
WINDOWS = np.random.default_rng(1).integers(0, 256, (3, 120))
PREFILL = 100
KINDS = ["dense", "routed", "gathered"]
"""The last leaves small inputs out of every linear layer, the output projection too."""
TARGETS = ["ort-cpu", "ort-cpu-int8", "tensorrt-rtx"]
FLOAT32 = ["portable", "ort-cpu"]


@pytest.fixture(scope="module")
def folders(
    tmp_path_factory: Any, tiny_model: Any, tiny_tokenizer: Any, gather_only: Any, convert_tiny: Any
) -> Callable[[str, str], Path]:
    """Return a function (kind of model, ``checkpoint``, ``reference`` or a target) -> where it is."""
    root = tmp_path_factory.mktemp("reference")

    def made(kind: str, name: str) -> Path:
        checkpoint, kept = root / kind / "checkpoint", root / kind / "ref.safetensors"
        if not checkpoint.exists():
            model = tiny_model("llama", layers=LAYERS, hidden=64, width=128)
            model.model.norm.weight.data *= 2
            if kind == "dense":
                model.save_pretrained(checkpoint)
                tiny_tokenizer.save_pretrained(checkpoint)
            else:
                plan = convert_tiny(model, "cmoe") if kind == "routed" else gather_only(model, linears="all")
                modeling.save(modeling.apply(plan, model), plan, tiny_tokenizer, checkpoint)
            export(checkpoint, root / kind / "bundles", TARGETS, label="tiny")
        if name == "reference" and not kept.exists():
            keep(checkpoint, kept)
        return {"checkpoint": checkpoint, "reference": kept}.get(name, root / kind / "bundles" / name)

    return made


def keep(folder: Path, path: Path) -> references.Reference:
    engine = open_engine(folder, threads=1, **references.how_to_open(folder))
    identity = references.identity_of(folder)
    kept = references.keep(engine, WINDOWS, path, text="random", prefill=PREFILL, identity=identity)
    engine.close()
    return kept


def judged(test: Path, reference: Path) -> dict[str, Any]:
    result = against_kept(test, reference, threads=1)
    json.dumps(result, allow_nan=False)
    jsonschema.validate(result, json.loads(report.VERIFY_SCHEMA_FILE.read_text(encoding="utf-8")))
    (entry,) = result["parity"]
    return {**entry, "shaped": dict(result["shapes"][0])}


def missed(entry: dict[str, Any]) -> list[str]:
    return [check["name"] for check in entry["verdict"]["checks"] if not check["passed"]]


PARTS = {
    "dense": ["text", "layers", "head"],
    "routed": ["text", "layers", "router", "head", "free"],
    "gathered": ["layers", "head", "free"],
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("target", ["portable", *TARGETS])
def test_a_right_bundle_passes_part_by_part(folders: Any, kind: str, target: str) -> None:
    entry = judged(folders(kind, target), folders(kind, "reference"))
    parts = [part for part in PARTS[kind] if part != "text" or kind == "dense" or target in FLOAT32]
    assert list(entry["verdict"]["parts"]) == parts
    assert missed(entry["shaped"]) == []
    if (kind, target) != ("dense", "ort-cpu-int8"):
        assert missed(entry) == []
    else:  # what 8 bits cost random weights over all layers is beyond the limits; alone each layer is within them
        assert all(name.startswith("text.") for name in missed(entry))
    layers = entry["by_layer"]
    assert len(layers["layers"]) == LAYERS
    assert layers["tokens"] == references.PROBE
    assert entry["kept_reference"]["sha256"] == references.load(folders(kind, "reference")).sha256
    assert entry["tokens"] == {"windows": 3, "window": 120, "prefill": PREFILL, **{
        "prefill": 3 * PREFILL, "decode": 3 * (120 - PREFILL)}}  # fmt: skip
    if target in FLOAT32:
        assert layers["worst_rel_error"] < 1e-5
        assert entry["kept_reference"]["judged_tokens"] == WINDOWS.size or kind == "gathered"


def test_free_running_figures_are_those_of_a_running_reference(folders: Any) -> None:
    """The vocabulary of these models has 259 tokens, of which 256 are kept."""
    limits = tolerances.load().profile("float32", "ort-cpu-int8")
    one, two = (open_engine(folders("dense", name), threads=1) for name in ("checkpoint", "ort-cpu-int8"))
    whole = compare(one, two, WINDOWS, prefill=PREFILL, tolerances=limits)
    part = judged(folders("dense", "ort-cpu-int8"), folders("dense", "reference"))
    for phase in ("prefill", "decode"):
        a, b = whole["phases"][phase], part["phases"][phase]
        assert b["top1"] == pytest.approx(a["top1"])
        assert b["perplexity"]["ratio"] == pytest.approx(a["perplexity"]["ratio"], rel=1e-9)
        assert a["kl_ref_test"]["mean"] <= b["kl_ref_test"]["mean"] < 1.1 * a["kl_ref_test"]["mean"] + 1e-4
        assert b["rel_error"]["mean"] == pytest.approx(a["rel_error"]["mean"], rel=0.1)


@pytest.mark.parametrize(
    ("hidden", "outcome"), [(1.5e-6, Outcome.NOT_DECIDED), (0.5e-6, Outcome.FAILED), (0.0, Outcome.FAILED)]
)
def test_a_kl_that_only_the_hidden_logits_put_beyond_its_limit_is_not_decided(hidden: float, outcome: Outcome) -> None:
    limits = tolerances.load().profile("float32", "ort-cpu")
    phases = TokenErrors.by_phase(limits)
    for column in ("kl", "kl_back"):
        phases["prefill"].columns[column].append(np.array([2e-6, 2e-6]))
    check = Check("text.prefill.kl_ref_test.mean", 2e-6, "<=", limits.mean_kl)
    tails = {"prefill": [np.array([[0.1, hidden], [0.1, hidden]])]}
    assert against._undecided(Verdict({"text": (check,)}), phases, tails, limits).outcome is outcome


Change = Callable[[onnx.GraphProto], None]


def weight(pattern: str, change: Callable[[np.ndarray], np.ndarray]) -> Change:
    def apply(graph: onnx.GraphProto) -> None:
        found = [tensor for tensor in graph.initializer if re.search(pattern, tensor.name)]
        assert found, [tensor.name for tensor in graph.initializer]
        for tensor in found:
            array = np.ascontiguousarray(change(numpy_helper.to_array(tensor)))
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))

    return apply


def exchanged(rows: np.ndarray) -> np.ndarray:
    changed = rows.copy()
    changed[[0, 1]] = changed[[1, 0]]
    return changed


def attention(graph: onnx.GraphProto) -> tuple[int, onnx.NodeProto]:
    """Where the attention of one layer stands, and its node."""
    return next((at, node) for at, node in enumerate(graph.node) if f"present.{BROKEN}.key" in node.output)


def queries_doubled(graph: onnx.GraphProto) -> None:
    at, node = attention(graph)
    graph.node.insert(at, onnx.helper.make_node("Add", [node.input[0], node.input[0]], ["doubled"]))
    node.input[0] = "doubled"


def cache_off_by_one(graph: onnx.GraphProto) -> None:
    """Attention of one layer sees one past token less."""
    at, node = attention(graph)
    graph.initializer.append(numpy_helper.from_array(np.array(1, np.int32), "off.one"))
    graph.node.insert(at, onnx.helper.make_node("Sub", [node.input[5], "off.one"], ["off.lengths"]))
    node.input[5] = "off.lengths"


L = rf"layers\.{BROKEN}\."
FAULTS: dict[str, tuple[str, str, Change, str]] = {
    "queries doubled": (
        "dense", "ort-cpu", queries_doubled, "layers"),
    "thresholds of one layer 1 % higher": (
        "gathered", "ort-cpu", weight(L + ".*x_threshold", lambda t: t * 1.01), "layers"),
    "thresholds of hidden values of a neighbour": (
        "gathered", "ort-cpu", weight(L + ".*shared_h_threshold", lambda t: np.roll(t, 1)), "layers"),
    "scales of one layer halved": (
        "routed", "ort-cpu-int8", weight(f"experts.*{L}.*scales", lambda s: s / 2), "layers"),
    "two experts exchanged": (
        "routed", "ort-cpu", weight(f"experts.*{L}.*rows", exchanged), "layers"),
    "a head's rows exchanged": (
        "dense", "ort-cpu", weight("lm_head", exchanged), "head"),
}  # fmt: skip


def broken_copy(source: Path, target: Path, change: Change) -> Path:
    shutil.copytree(source, target)
    manifest = bundle.open_bundle(target).manifest.document()
    model = onnx.load(target / "model.onnx")
    before = model.SerializeToString()
    change(model.graph)
    assert model.SerializeToString() != before
    for name in ("model.onnx.data", bundle.MANIFEST):
        (target / name).unlink()
    onnx.save(model, target / "model.onnx")
    bundle.seal(target, bundle.Manifest.model_validate(manifest))
    return target


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found_in_its_own_layer(folders: Any, tmp_path: Path, name: str) -> None:
    kind, target, change, part = FAULTS[name]
    broken = broken_copy(folders(kind, target), tmp_path / "broken", change)
    entry = judged(broken, folders(kind, "reference"))
    assert not entry["verdict"]["parts"][part]
    limit = entry["tolerances"]["layer_rel_error"]
    beyond = {int(layer) for layer, each in entry["by_layer"]["layers"].items() if not each["prefill"] <= limit}
    assert beyond == ({BROKEN} if part == "layers" else set())
    if beyond:
        assert any(f": {BROKEN}." in note for note in entry["verdict"]["notes"])


def test_a_fault_of_the_cache_is_found_in_decoding_alone(folders: Any, tmp_path: Path) -> None:
    broken = broken_copy(folders("dense", "ort-cpu"), tmp_path / "broken", cache_off_by_one)
    entry = judged(broken, folders("dense", "reference"))
    limit = entry["tolerances"]["layer_rel_error"]
    errors = entry["by_layer"]["layers"]
    assert {int(layer) for layer, each in errors.items() if not each["decode"] <= limit} == {BROKEN}
    assert "layers.decode.rel_error" in missed(entry)


Spoil = Callable[[Step, np.ndarray, np.ndarray], Step]


def spoiled(monkeypatch: pytest.MonkeyPatch, change: Spoil) -> None:
    """Pass every step of ONNX Runtime with its ids and mask through ``change``."""
    run = ort.OrtEngine._run
    monkeypatch.setattr(
        ort.OrtEngine,
        "_run",
        lambda self, ids, mask, *more, **given: change(run(self, ids, mask, *more, **given), ids, mask),
    )


def wrong_from_the_first_decoded_token_on(step: Step, ids: np.ndarray, mask: np.ndarray) -> Step:
    if mask.shape[1] <= PREFILL:
        return step
    routes = {layer: (chosen + 1) % 6 for layer, chosen in (step.routes or {}).items()}
    return replace(step, logits=np.roll(step.logits, 1, axis=-1), routes=routes)


def test_a_changed_choice_that_is_no_near_tie_excuses_nothing(
    folders: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every decoded token is wrong, in its experts too: none is left that could be held to the limits of arithmetic."""
    older = tmp_path / "older.safetensors"
    arrays, facts = load_file(folders("routed", "reference")), references.load(folders("routed", "reference")).facts
    arrays = {name: array for name, array in arrays.items() if not name.startswith("leads.")}
    facts = facts.model_copy(update={"sha256": references._digest(arrays)})
    save_file(arrays, older, metadata={"moedge": facts.model_dump_json(by_alias=True)})
    spoiled(monkeypatch, wrong_from_the_first_decoded_token_on)
    entry = judged(folders("routed", "ort-cpu"), folders("routed", "reference"))
    assert entry["verdict"]["outcome"] == "failed"
    assert missed(entry) == ["text.decode.judged_tokens", "text.first_changes.no_ties"]
    assert "In 3 of 3 windows with another choice the first one is no near tie" in entry["verdict"]["notes"][2]
    # Nobody can tell it by a file of a version that kept no lead of the routers' choices.
    entry = judged(folders("routed", "ort-cpu"), older)
    assert entry["verdict"]["outcome"] == "not decided"
    assert missed(entry) == ["text.decode.judged_tokens", "text.first_changes.no_ties"]


def rows_exchanged(step: Step, ids: np.ndarray, mask: np.ndarray) -> Step:
    return replace(step, logits=step.logits[::-1].copy())


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_a_batch_that_are_exchanged_are_found(folders: Any, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spoiled(monkeypatch, rows_exchanged)
    result = against_kept(folders(kind, "ort-cpu"), folders(kind, "reference"), threads=1)
    assert result["outcome"] == "failed"
    assert missed(dict(result["parity"][0])) == []
    (shaped,) = result["shapes"]
    failed = missed(dict(shaped))
    assert failed
    assert all(name.startswith("batch.") for name in failed)


def test_padding_that_attention_sees_is_found_layer_by_layer(folders: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run = ort.OrtEngine._run
    monkeypatch.setattr(
        ort.OrtEngine,
        "_run",
        lambda self, ids, mask, *more, **given: run(self, ids, np.ones_like(mask), *more, **given),
    )
    (shaped,) = against_kept(folders("gathered", "ort-cpu"), folders("gathered", "reference"), threads=1)["shapes"]
    assert {f"batch.padding.{phase}.layer_rel_error" for phase in ("prefill", "decode")} <= set(missed(dict(shaped)))
    assert shaped["verdict"]["notes"][0].startswith("batch.padding: padding is seen")


def test_an_engine_that_shows_no_choices_is_judged_or_not_decided_in_a_sentence(folders: Any) -> None:
    """As an engine folder that was built without ``--taps``, beyond a limit that one token can fail."""
    kept = references.load(folders("routed", "reference"))
    limits = tolerances.load().profile("float32", "tensorrt-rtx").model_copy(update={"max_kl": 1e-12})
    engine = open_engine(folders("routed", "tensorrt-rtx"), threads=1)
    run = against._Run.of(kept, engine, limits, lambda done, total: None)
    entry = against._entry(kept, engine, run, None, limits, "engine folders run as a whole")
    engine.close()
    assert entry["verdict"]["outcome"] == "not decided"
    assert entry["verdict"]["notes"][1].endswith("build it with --taps.")


def test_what_hidden_logits_excuse_is_measured_on_the_tokens_that_are_judged(folders: Any) -> None:
    """Of each window the first token alone comes before a changed choice, so no other one's tail may excuse it."""
    kept = references.load(folders("routed", "reference"))
    other = {layer: np.where(np.arange(len(c))[:, None] % 120, (c + 1) % 6, c) for layer, c in kept.routes.items()}
    kept = replace(kept, routes={layer: chosen.astype(np.int32) for layer, chosen in other.items()})
    engine = open_engine(folders("routed", "ort-cpu"), threads=1, taps=True)
    limits = tolerances.load().profile("float32", "ort-cpu")
    run = against._Run.of(kept, engine, limits, lambda done, total: None)
    engine.close()
    assert {phase: tokens.tokens for phase, tokens in run.steady.items()} == {"prefill": 3, "decode": 0}
    assert {phase: sum(map(len, tails)) for phase, tails in run.steady_tail.items()} == {"prefill": 3}
    assert sum(map(len, run.tail["prefill"])) == 3 * PREFILL


def test_a_reference_of_another_model_is_refused(folders: Any, tmp_path: Path) -> None:
    with pytest.raises(MoEdgeError, match="is the reference of another model than"):
        against_kept(folders("dense", "ort-cpu"), folders("routed", "reference"))
    with pytest.raises(MoEdgeError, match="of another model"):
        against_kept(folders("gathered", "ort-cpu"), folders("routed", "reference"))


def test_the_portable_bundle_and_the_checkpoint_keep_the_same_model(folders: Any, tmp_path: Path) -> None:
    kept = keep(folders("routed", "portable"), tmp_path / "ref.safetensors")
    assert kept.facts.identity.same(references.load(folders("routed", "reference")).facts.identity)
    assert missed(judged(folders("routed", "ort-cpu"), tmp_path / "ref.safetensors")) == []
    sample = Sample("asset:wiki", tokens=64, window=32, prefill=16)
    with pytest.raises(MoEdgeError, match=r"of a checkpoint or of a portable bundle; .* is of target ort-cpu"):
        references.keep_given(folders("routed", "ort-cpu"), tmp_path / "x.safetensors", sample=sample, opening={})


def test_bundles_of_older_versions_are_known_by_what_they_state(folders: Any, tmp_path: Path) -> None:
    """Without the checkpoint's hash: by the portable bundle, or by the plan; by nothing: refused."""
    old = tmp_path / "old"
    shutil.copytree(folders("routed", "ort-cpu"), old)
    document = json.loads((old / "manifest.json").read_text())
    del document["checkpoint"]
    write_json(old / "manifest.json", document)
    assert missed(judged(old, folders("routed", "reference"))) == []
    document["moe"]["plan_sha256"] = None
    write_json(old / "manifest.json", document)
    with pytest.raises(MoEdgeError, match="share no hash"):
        against_kept(old, folders("routed", "reference"))
    kept = keep(folders("routed", "portable"), tmp_path / "ref.safetensors")
    assert kept.facts.identity.bundle == document["parent"]
    assert missed(judged(old, tmp_path / "ref.safetensors")) == []


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda content: content[:-100], "cannot be read as a kept reference"),
        (lambda content: content[:-9] + bytes([content[-9] ^ 1]) + content[-8:], "was changed or damaged"),
        (lambda content: b"no safetensors at all", "cannot be read as a kept reference"),
    ],
)
def test_a_damaged_file_is_refused_in_a_sentence(folders: Any, tmp_path: Path, damage: Any, match: str) -> None:
    file = tmp_path / "ref.safetensors"
    file.write_bytes(damage(folders("dense", "reference").read_bytes()))
    with pytest.raises(MoEdgeError, match=match):
        references.load(file)
    with pytest.raises(MoEdgeError, match="No kept reference at"):
        references.load(tmp_path / "none.safetensors")


def test_what_is_kept_fits_the_promise(folders: Any) -> None:
    kept = references.load(folders("routed", "reference"))
    assert kept.windows.tolist() == WINDOWS.tolist()
    assert {layer: found.shape for layer, found in kept.routes.items()} == dict.fromkeys(
        range(LAYERS), (WINDOWS.size, 3)
    )
    assert [stream.shape for stream in kept.probe.streams.values()] == [(references.PROBE, 64)] * (LAYERS + 1)
    assert kept.as_json()["bytes"] == folders("routed", "reference").stat().st_size
    assert "torch moe" in kept.told()
    assert f"{WINDOWS.size:,} tokens of random" in kept.told()


def test_equal_runs_keep_equal_files(folders: Any, tmp_path: Path) -> None:
    keep(folders("routed", "portable"), tmp_path / "one.safetensors")
    keep(folders("routed", "portable"), tmp_path / "two.safetensors")
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()


def test_an_engine_whose_layers_cannot_be_run_alone_is_judged_as_a_whole(folders: Any) -> None:
    entry = judged(folders("routed", "checkpoint"), folders("routed", "reference"))
    assert entry["by_layer"] is None
    assert entry["verdict"]["outcome"] == "passed"
    assert entry["verdict"]["notes"][0].startswith("No layer was looked at by itself")
    entry = judged(folders("gathered", "checkpoint"), folders("gathered", "reference"))
    assert entry["verdict"]["outcome"] == "not decided"
    assert missed(entry) == ["layers.rel_error"]


NO_TORCH = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers", "optimum", "accelerate", "onnx_ir", "onnxscript", "scipy"):
            raise ImportError(f"blocked by the test: {name}")

sys.meta_path.insert(0, Block())
from moedge.runtime.cli import main
sys.argv[0] = "moedge"
main()
"""


def test_no_torch_is_needed_and_every_surface_tells_the_same(folders: Any, tmp_path: Path) -> None:
    names = {name: tmp_path / name for name in ("verify.xml", "verify.md", "summary.md")}
    command = [
        sys.executable, "-c", NO_TORCH, "verify", str(folders("gathered", "ort-cpu")), "--json", "--threads", "1",
        "--reference", str(folders("gathered", "reference")), "--junit", str(names["verify.xml"]), "--markdown",
        str(names["verify.md"]),
    ]  # fmt: skip
    environment = {
        "PATH": "/usr/bin:/bin",
        "PYTHONPATH": ":".join(sys.path),
        "GITHUB_STEP_SUMMARY": str(names["summary.md"]),
    }
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["outcome"] == "passed"
    suite = ElementTree.fromstring(names["verify.xml"].read_text(encoding="utf-8"))
    entries = [*result["parity"], *result["shapes"]]
    assert int(suite.get("tests", 0)) == sum(
        len(one["verdict"]["checks"]) + len(one.get("not_run", {})) for one in entries
    )
    shown = names["verify.md"].read_text(encoding="utf-8")
    assert shown.startswith("### moedge verify: passed\n")
    assert names["summary.md"].read_text(encoding="utf-8") == shown + "\n"


def moedge(*arguments: Any) -> Any:
    found = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if found.exception is not None and not isinstance(found.exception, SystemExit):
        raise found.exception
    return found


def test_the_command_keeps_judges_and_compares_with_last_time(folders: Any, tmp_path: Path) -> None:
    file, old = tmp_path / "ref.safetensors", tmp_path / "old.json"
    text = tmp_path / "text.txt"
    text.write_text("All that is gold does not glitter, not all those who wander are lost. " * 40)
    saving = ("verify", folders("dense", "checkpoint"), "--save-reference", file, "--text", text, "--tokens", 512)
    said = moedge(*saving, "--window", 128, "--prefill", 96, "--threads", 1)
    assert said.exit_code == 0
    assert "512 tokens of" in said.output
    again = moedge(*saving, "--window", 128, "--prefill", 96)
    assert again.exit_code != 0
    assert "exists already; pass --force" in again.output
    judging = ("verify", folders("dense", "ort-cpu"), "--reference", file, "--threads", 1)
    first = moedge(*judging, "--json")
    assert first.exit_code == 0
    old.write_text(first.stdout[first.stdout.index("{") :])
    same = moedge(*judging, "--baseline", old, "--fail-on-worse")
    assert same.exit_code == 0
    assert f"beside {old}: not worse" in same.output.replace("\n", "")
    document = json.loads(old.read_text())
    (entry,) = document["parity"]
    for check in entry["verdict"]["checks"]:
        if check["name"].startswith("layers.") and check["value"]:
            check["value"] /= 100
    write_json(old, document)
    worse = moedge(*judging, "--baseline", old)
    assert worse.exit_code == 0, "within the limits: said, and no failure unless one asks for it"
    assert "more than 2 times as large" in " ".join(worse.output.split())
    assert moedge(*judging, "--baseline", old, "--fail-on-worse").exit_code == 1


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (["TEST", "--reference", "r"], "takes the reference's place"),
        (["--save-reference", "r", "--reference", "r"], "compares nothing"),
        (["TEST", "--save-reference", "r"], "compares nothing"),
        (["--save-reference", "r", "--junit", "j", "--html", "h"], "nothing to write for --junit and --html"),
        (["TEST", "--fail-on-worse"], "needs an older result"),
        (["--reference", "r", "--text", "asset:c4"], "r holds the text that it judges on"),
        (["--reference", "r", "--window", "300"], "r holds the text that it judges on"),
        (["verify-answers.npz", "--thorough"], "holds a device's answers to its own prompts"),
        (["verify-answers.npz", "--max-length", "64"], "holds a device's answers to its own prompts"),
        (["verify-answers.npz", "--text", "asset:c4"], "holds a device's answers to its own prompts"),
        (["--reference", "none.safetensors"], "No kept reference at none.safetensors"),
    ],
)
def test_options_that_do_not_go_together_are_refused(folders: Any, options: list[str], match: str) -> None:
    given = [str(folders("dense", "ort-cpu")) if option == "TEST" else option for option in options]
    found = moedge("verify", folders("dense", "portable"), *given)
    assert found.exit_code != 0
    assert match in " ".join(found.output.split())


def test_surfaces_show_what_is_worse(folders: Any) -> None:
    result: Any = against_kept(folders("dense", "ort-cpu"), folders("dense", "reference"), threads=1)
    result["baseline"] = {
        "file": "old|.json", "sha256": "0" * 64, "outcome": "worse", "sentences": ["a <b> is worse"], "checks": [],
    }  # fmt: skip
    shown = markdown(result)
    assert "**Beside old\\|.json: worse.**" in shown
    assert "- a &lt;b&gt; is worse" in shown
    for gate, tag in ((False, "skipped"), (True, "failure")):
        suite = ElementTree.fromstring(junit_xml(result, gate=gate))
        (found,) = suite.iter(tag)
        assert found.get("message") == "worse; a <b> is worse"
        assert suite.get("failures") == str(int(gate))
    result["outcome"] = "failed"
    assert markdown(result).startswith("### moedge verify: FAILED\n")


def test_the_published_schema_is_made_from_the_types() -> None:
    kept = json.loads(report.VERIFY_SCHEMA_FILE.read_text(encoding="utf-8"))
    assert kept == schema.verification(), "write it again: python -m moedge.runtime.report.schema"
    published = Path(report.__file__).parents[2] / "docs" / "verify.schema.json"
    assert json.loads(published.read_text(encoding="utf-8")) == kept
