"""The archive for a device: deterministic, whole, and its scripts work on their own (numpy and a runtime, no MoEdge).

There is no GPU here, so the scripts run the archive's half-precision graph through a session that stands in for
TensorRT's: ONNX Runtime on the very file that TensorRT would build, its half precision emulated. What is tested is
everything but the engine.
"""

import json
import os
import shutil
import subprocess
import sys
import tarfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import pytest

from moedge import MoEdgeError
from moedge._files import partial_of
from moedge.configs import devices
from moedge.configs.tolerances import Given
from moedge.export.bundle import open_bundle
from moedge.export.device import archive as device_archive
from moedge.export.graph import emulation
from moedge.export.manifest import ArchiveManifest
from moedge.runtime.commands import device_report
from moedge.runtime.commands import pack as pack_command
from moedge.runtime.device import moedge_compare
from moedge.runtime.parity import metrics as reduction
from moedge.runtime.parity.given import answers_of_device
from moedge.runtime.parity.recorded import Recorded
from moedge.runtime.report import device_result
from moedge.tests.export.archives import extract

STAND_IN = '''
import os
import sys
import numpy as np
import onnxruntime
import moedge_session


class Cuda:
    def capability(self):
        return "8.7"

    def memory(self):
        return 1000, 2000

    def name(self):
        return "stand-in"


class Session:
    """ONNX Runtime on the archived graph, with the methods of moedge_session.Session. BREAK scales the logits."""

    def __init__(self, plan, facts):
        with open(facts["emulated"], "rb") as file:
            model = file.read()
        self.dtype = facts["dtype"]
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", facts["weights"])
        self.session = onnxruntime.InferenceSession(model, options, ["CPUExecutionProvider"])
        self.facts, self.limits, self.cuda, self.version = facts, facts["profiles"], Cuda(), "stand-in"

    def start(self, ids, mask, last=False, reads=None):
        return self.step(ids, None, last=last, reads=reads)

    def step(self, ids, cache, mask=None, last=False, reads=None):
        past = cache[0].shape[2] if cache else 0
        feeds = {"input_ids": ids, "attention_mask": np.ones((1, past + ids.shape[1]), np.int64)}
        feeds["position_ids"] = np.arange(past, past + ids.shape[1])[None]
        names = [i.name for i in self.session.get_inputs() if i.name.startswith("past")]
        m = self.facts["model"]
        empty = np.zeros((1, m["num_kv_heads"], 0, m["head_dim"]), np.float32)
        feeds.update(zip(names, cache or [empty] * len(names)))
        taps = self.facts["archive_taps"]
        wanted = ["logits", *[n.replace("past_key_values", "present") for n in names]]
        wanted += [tap["output"] for tap in taps.values()] + [tap["reads"] for tap in taps.values()]
        logits, *rest = self.session.run(wanted, feeds)
        cache, routes, read = rest[: len(names)], rest[len(names) :][: len(taps)], rest[len(names) + len(taps) :]
        if FLIP:  # the order of experts in the file is another one
            routes = [(r + 1) % 6 for r in routes]
        if reads is not None:
            reads.append({int(k): r for k, r in zip(taps, read)})
        logits = logits[:, -1:] if last else logits
        return logits.astype(np.float32) * BREAK, {int(k): r for k, r in zip(taps, routes)}, cache

    def close(self):
        pass


moedge_session.Session = Session
script, BREAK, *sys.argv[1:] = sys.argv[1], float(sys.argv[2]), *sys.argv[3:]
FLIP = os.environ.get("FLIP") == "1"
sys.argv[0] = script
path = os.path.abspath(script)
exec(compile(open(script).read(), script, "exec"), {"__name__": "__main__", "__file__": path})
'''


@pytest.fixture(scope="module")
def archive(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("archive") / "moe.tar"
    device_archive.write(source, out, devices.load("jetson-agx-orin"), max_length=64, max_prompt=48)
    return out


@pytest.fixture(scope="module")
def in_bfloat16(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("archive") / "moe.tar"
    orin = devices.load("jetson-agx-orin")
    device_archive.write(source, out, orin, max_length=64, max_prompt=48, dtype="bfloat16")
    return out


@pytest.fixture(scope="module")
def dense_archive(checkpoints, tmp_path_factory):
    out = tmp_path_factory.mktemp("archive") / "dense.tar"
    orin = devices.load("jetson-agx-orin")
    device_archive.write(checkpoints["dense"], out, orin, label="parent", max_length=64, max_prompt=48)
    return out


@pytest.fixture
def unpacked(archive, tmp_path):
    return unpack(archive, tmp_path)


def unpack(archive: Path, tmp_path: Path) -> Path:
    """The archive's folder, with a file in place of the engine (nothing here can deserialize one)."""
    with tarfile.open(archive) as tar:
        folder = tmp_path / Path(tar.getnames()[0]).parts[0]
    extract(archive, tmp_path)
    emulated = tmp_path / f"{folder.name}.onnx"
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "engine.plan").write_bytes(b"stand-in")
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    for tap in manifest["taps"].values():
        model.graph.output.extend(onnx.ValueInfoProto(name=tap[key]) for key in ("output", "reads"))
    emulated.write_bytes(emulation.emulated(model).SerializeToString())
    facts = {
        **{
            "target": "tensorrt",
            "dtype": manifest["dtype"],
            "model": manifest["model"],
            "profiles": manifest["profiles"],
            "taps": manifest["taps"],
        },
        "archive_taps": manifest["taps"],
        **{"emulated": str(emulated), "weights": str(folder)},
        "graph_sha256": manifest["files"]["model.onnx"]["sha256"],
        "sha256": "04bd79e8d6a6b2bba9d3ba97e5eaa72ae1dd3d7d9a3ee58a9a7d9a3e2d8b1b4f",
    }
    import hashlib

    facts["sha256"] = hashlib.sha256(b"stand-in").hexdigest()
    (folder / "engine.json").write_text(json.dumps(facts))
    return folder


def run(folder: Path, script: str, *more: str, scale: float = 1.0, flip: bool = False) -> subprocess.CompletedProcess:
    (folder.parent / "stand_in.py").write_text(STAND_IN)
    code = f"import sys; sys.path.insert(0, '.'); exec(open({str(folder.parent / 'stand_in.py')!r}).read())"
    # -I: without this checkout on the path, as on a device.
    command = [sys.executable, "-I", "-c", code, script, str(scale), *more]
    environment = {**os.environ, "FLIP": str(int(flip))}
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=120, check=False, env=environment
    )


def test_the_same_input_gives_the_same_bytes(source, archive, tmp_path):
    again = tmp_path / "again.tar"
    device_archive.write(source, again, devices.load("jetson-agx-orin"), max_length=64, max_prompt=48)
    assert again.read_bytes() == archive.read_bytes()
    assert not list(tmp_path.glob(".*"))


def test_the_manifest_lists_every_file_and_nothing_is_a_path_outside(archive):
    with tarfile.open(archive) as tar:
        names = sorted(member.name for member in tar)
        assert all(member.isfile() and member.mtime == 0 and member.uid == 0 for member in tar)
        manifest = json.loads(tar.extractfile("moedge-jetson-agx-orin-moe/manifest.json").read())
    assert names == sorted(f"moedge-jetson-agx-orin-moe/{name}" for name in [*manifest["files"], "manifest.json"])
    assert manifest["tensorrt"] == "10.3", "JetPack 6.2 ships it, so there is no kernel in the archive"
    assert "plugins" not in manifest
    assert not [name for name in names if "plugins/" in name]
    assert {"model.onnx", "model.onnx.data", "tokenizer.json", "golden.json", *device_archive.SCRIPTS} <= set(
        manifest["files"]
    )


def test_what_pack_says_to_do_keeps_a_model_and_its_dense_parent_apart(archive, dense_archive, tmp_path, capsys):
    """Both lines are run in one folder, the parent's after the model's engine was built."""
    said = {}
    for kind, made in (("moe", archive), ("dense", dense_archive)):
        shutil.copy(made, tmp_path)
        with tarfile.open(made) as tar:
            name = next(one for one in tar.getnames() if one.endswith("/manifest.json"))
            manifest = ArchiveManifest.model_validate(json.loads(tar.extractfile(name).read()))
        pack_command._print(made, manifest)
        said[kind] = capsys.readouterr().out
        unpacking = said[kind].partition("On the device: ")[2].partition(" && python3 build_engine.py")[0]
        subprocess.run(["bash", "-c", f"{unpacking} && echo {kind} > engine.plan"], cwd=tmp_path, check=True)
    folders = {"moe": tmp_path / "moedge-jetson-agx-orin-moe", "dense": tmp_path / "moedge-jetson-agx-orin-dense"}
    for kind, folder in folders.items():
        assert (folder / "engine.plan").read_text() == f"{kind}\n"
        assert json.loads((folder / "manifest.json").read_text())["kind"] == kind
    assert (
        f"beside its dense parent: unpack the parent's archive in the same place ({folders['dense'].name})"
        in said["moe"]
    )
    assert f"unpack that model's archive in the same place ({folders['moe'].name})" in said["dense"]
    assert all(folder.name in (folders["moe"] / "README.md").read_text() for folder in folders.values())


def test_verify_passes_the_half_precision_graph_and_report_reads_the_result(unpacked, capsys):
    child = run(unpacked, "verify.py")
    assert child.returncode == 0, child.stdout + child.stderr
    result = json.loads((unpacked / "verify-result.json").read_text())
    assert result["passed"]
    assert result["routing"]["compared"]
    assert result["logits"]["tokens"] == len(device_archive.PROMPTS) * (device_archive.NEW_TOKENS + 1)
    assert 0 < result["logits"]["median_rel_error"] <= device_archive.limits()["median_rel_error"]
    assert device_report.device_report([unpacked / "verify-result.json"], as_json=False) == 0
    assert "median_rel_error" in capsys.readouterr().out


def test_limits_of_ones_own_go_to_the_device(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("schema: moedge.tolerances/1\nprofiles: {float32/tensorrt: {mean_kl: 1.0e-9}}\n")
    mine, packaged = device_archive.limits(given=Given(file=str(file))), device_archive.limits()
    assert {name for name in packaged if mine[name] != packaged[name]} == {"mean_kl"}
    assert mine["mean_kl"] == 1e-9


def test_an_archive_in_bfloat16_is_verified_by_its_own_limits(in_bfloat16, source, tmp_path):
    """The same scripts, which know numpy and no bfloat16: float32 logits, a cache they never see."""
    folder = unpack(in_bfloat16, tmp_path)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["dtype"] == "bfloat16"
    assert manifest["limits"]["median_rel_error"] == 8 * device_archive.limits()["median_rel_error"]
    child = run(folder, "verify.py")  # too many choices change for a verdict there
    assert "FAIL" not in child.stdout, child.stdout + child.stderr
    found = json.loads((folder / "verify-result.json").read_text())["logits"]
    # Far beyond what float16 may do, so the graph is no float16 one; its own limit holds.
    assert device_archive.limits()["median_rel_error"] < found["median_rel_error"] < 0.0625
    whole = {"arithmetic": True, "router": True, "free": True}
    assert at_the_desk(source / "portable", folder / "verify-answers.npz") == whole
    child = run(folder, "bench.py", "--prompt", "20", "--decode", "3", "--repeats", "3")
    assert child.returncode == 0, child.stdout + child.stderr
    child = run(folder, "verify.py", scale=0.8)
    assert child.returncode == 1, child.stdout + child.stderr
    assert at_the_desk(source / "portable", folder / "verify-answers.npz") == {**whole, "arithmetic": False}


def test_verify_tells_of_bfloat16_when_float16_overflows(unpacked, in_bfloat16, tmp_path):
    assert "again with --half bfloat16" in run(unpacked, "verify.py", scale=float("inf")).stdout
    (tmp_path / "b").mkdir()
    assert "--half" not in run(unpack(in_bfloat16, tmp_path / "b"), "verify.py", scale=float("inf")).stdout


def at_the_desk(reference: Path, answers: Path) -> dict[str, bool]:
    """Parts of the verdict of ``moedge verify`` over what a device recorded."""
    result = answers_of_device(reference, answers, "float32", {"threads": 1}, lambda *_: None)
    (entry,) = result["parity"]
    assert entry["replay"]["router"]["decisions"] == 2 * sum(entry["tokens"][phase] for phase in ("prefill", "decode"))
    return entry["verdict"]["parts"]


def test_the_desk_judges_every_token_that_a_device_recorded(unpacked, checkpoints, source):
    """Arithmetic under the engine's own choices, routers on what they read; what is wrong fails its part."""
    answers = unpacked / "verify-answers.npz"
    whole = {"arithmetic": True, "router": True, "free": True}
    assert run(unpacked, "verify.py").returncode == 0
    for reference in (checkpoints["moe"], source / "portable"):
        assert at_the_desk(reference, answers) == whole
    assert run(unpacked, "verify.py", scale=0.97).returncode == 1
    assert at_the_desk(source / "portable", answers) == {**whole, "arithmetic": False}

    child = run(unpacked, "verify.py", flip=True)
    assert child.returncode == 1
    assert "----  median_rel_error" in child.stdout
    assert "68 of 68 tokens follow a changed choice" in child.stdout
    assert "the arithmetic is not decided" in child.stdout
    assert "FAIL" not in child.stdout
    assert not at_the_desk(source / "portable", answers)["router"]


def test_answers_that_cannot_be_judged_are_refused(unpacked, tmp_path, source):
    np.savez(tmp_path / "other.npz", about=np.array('{"schema": "x"}'))
    with pytest.raises(MoEdgeError, match="cannot be read as the answers of a device"):
        Recorded(tmp_path / "other.npz")
    facts = json.loads((unpacked / "engine.json").read_text())
    (unpacked / "engine.json").write_text(json.dumps({**facts, "archive_taps": {}}))  # built with --no-taps
    child = run(unpacked, "verify.py")
    assert child.returncode == 1, child.stderr
    assert "the arithmetic is not decided" in child.stdout
    with pytest.raises(MoEdgeError, match="does not say which experts the engine chose"):
        Recorded(unpacked / "verify-answers.npz")


def test_tokens_are_judged_until_the_first_changed_choice():
    one = {0: np.array([[1, 2], [3, 4], [1, 2], [5, 6]]), 1: np.array([[1, 2]] * 4)}
    two = {0: np.array([[2, 1], [3, 4], [1, 2], [5, 6]]), 1: np.array([[1, 2], [1, 2], [1, 3], [1, 2]])}
    np.testing.assert_array_equal(moedge_compare.unchanged(one, two), [True, True, False, False])


@pytest.mark.parametrize(
    ("scale", "failed"), [(0.9, "median_rel_error"), (0.0, "constant"), (float("nan"), "non_finite")]
)
def test_verify_fails_an_engine_that_computes_something_else(unpacked, scale, failed):
    child = run(unpacked, "verify.py", scale=scale)
    assert child.returncode == 1, child.stdout + child.stderr
    assert f"FAIL  {failed}" in child.stdout
    assert device_report.device_report([unpacked / "verify-result.json"], as_json=True) == 1


def test_bench_times_and_report_reads_the_result(unpacked, capsys):
    child = run(unpacked, "bench.py", "--prompt", "20", "--decode", "3", "--repeats", "3", "--note", "test")
    assert child.returncode == 0, child.stdout + child.stderr
    result = json.loads((unpacked / "bench-result.json").read_text())
    assert result["protocol"] == {"batch": 1, "prompt": 20, "decode": 3, "repeats": 3, "warmup": 2, "note": "test"}
    assert (result["tpot_ms"]["samples"], result["tpot_ms"]["rounds"]) == (9, 3)
    assert [len(values) for values in result["rounds"].values()] == [3, 3, 3]
    guard = result["environment"]["guard"]
    assert guard["readings"] == 1 + 3
    assert guard["seconds"] > 0
    assert result["energy"]["joules_per_token"] is not None or "NVML" in result["energy"]["reason"]
    assert "dense" not in result
    assert 0 < result["tpot_ms"]["p50"] <= result["tpot_ms"]["p99"]
    assert result["tpot_ms"]["ci95_low"] is result["tpot_ms"]["ci95_high"] is None, "three rounds tell no interval"
    assert device_report.device_report([unpacked / "bench-result.json"], as_json=False) == 0
    shown = capsys.readouterr().out
    assert "per token" in shown
    assert "Energy " in shown
    assert "Power mode" in shown


def test_the_dense_parent_is_timed_in_the_same_rounds_where_its_archive_lies_beside(
    unpacked, dense_archive, tmp_path, capsys
):
    dense = unpack(dense_archive, tmp_path)
    sizes = ("--prompt", "20", "--decode", "3", "--repeats", "3")
    child = run(unpacked, "bench.py", *sizes)
    assert child.returncode == 0, child.stdout + child.stderr
    assert f"beside: parent in {dense}" in child.stderr
    result = json.loads((unpacked / "bench-result.json").read_text())
    assert result["dense"]["label"] == "parent"
    assert result["dense"]["archive_sha256"] != result["archive_sha256"]
    assert result["environment"]["guard"]["readings"] == 1 + 2 * 3, "two engines took turns"
    assert {spread["label"] for spread in result["environment"]["guard"]["spread"]} == {"this archive", "dense parent"}
    gain = result["dense"]["speedup"]["tpot_ms"]
    rounds = [np.array(one["rounds"]["tpot_ms"]) for one in (result["dense"], result)]
    assert gain["speedup"] == pytest.approx(np.exp(np.log(rounds[0] / rounds[1]).mean()))
    assert result["dense"]["model"] == json.loads((dense / "manifest.json").read_text())["model"]
    assert gain["ci95_low"] <= gain["speedup"] <= gain["ci95_high"]
    assert device_report.device_report([unpacked / "bench-result.json"], as_json=False) == 0
    assert "Against parent, per token: " in capsys.readouterr().out

    manifest = json.loads((dense / "manifest.json").read_text())
    other = {**manifest, "model": {**manifest["model"], "num_layers": 99}}
    (dense / "manifest.json").write_text(json.dumps(other))
    child = run(unpacked, "bench.py", *sizes)
    assert child.returncode == 0, child.stderr
    assert f"not beside: {dense} is of another model (num_layers 99 against" in child.stderr
    assert "dense" not in json.loads((unpacked / "bench-result.json").read_text())
    child = run(unpacked, "bench.py", *sizes, "--dense", str(dense))
    assert (child.returncode, child.stderr.count("Traceback")) == (2, 0)
    assert "is of another model than this archive (num_layers 99 against" in child.stderr
    (dense / "manifest.json").write_text(json.dumps(manifest))
    child = run(dense, "bench.py", *sizes, "--dense", str(unpacked))
    assert child.returncode == 2
    assert "is no archive of a dense model" in child.stderr

    assert run(unpacked, "bench.py", *sizes, "--alone").returncode == 0
    assert "dense" not in json.loads((unpacked / "bench-result.json").read_text())
    dense.joinpath("engine.json").unlink()
    assert run(unpacked, "bench.py", *sizes).returncode == 0, "an archive without an engine is not timed"
    assert "dense" not in json.loads((unpacked / "bench-result.json").read_text())
    child = run(unpacked, "bench.py", *sizes, "--dense", str(dense))
    assert child.returncode == 2
    assert "has no engine yet" in child.stderr


def test_a_dense_parent_of_another_type_is_said_and_of_two_archives_of_it_none_is_taken(
    unpacked, dense_archive, tmp_path, capsys
):
    dense = unpack(dense_archive, tmp_path)
    sizes = ("--prompt", "8", "--decode", "2", "--repeats", "1", "--warmup", "0")
    child = run(unpacked, "bench.py", *sizes)
    assert "the dense parent is in" not in child.stderr, "both are float16"
    manifest = json.loads((dense / "manifest.json").read_text())
    (dense / "manifest.json").write_text(json.dumps({**manifest, "dtype": "bfloat16"}))
    child = run(unpacked, "bench.py", *sizes)
    assert child.returncode == 0, child.stderr
    assert "note: the dense parent is in bfloat16 and this archive in float16" in child.stderr
    device_report.device_report([unpacked / "bench-result.json"], as_json=False)
    assert "Against parent in bfloat16, per token: " in capsys.readouterr().out

    second = shutil.copytree(dense, tmp_path / "second")
    (second / "manifest.json").write_text(json.dumps(manifest))
    child = run(unpacked, "bench.py", *sizes)
    assert child.returncode == 0, child.stderr
    several = f"not beside: several archives of the dense parent ({dense} (bfloat16), {second} (float16))"
    assert f"{several}; name one with --dense" in child.stderr
    assert "dense" not in json.loads((unpacked / "bench-result.json").read_text())
    assert f"beside: parent in {second}" in run(unpacked, "bench.py", *sizes, "--dense", str(second)).stderr


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "model.onnx.data").write_bytes(b"x"), "model.onnx.data is missing, a link or damaged"),
        (lambda f: (f / "engine.plan").write_bytes(b"other"), "engine.plan was changed or damaged"),
        (lambda f: (f / "engine.json").unlink(), "has no engine yet; run: python3 build_engine.py"),
        (lambda f: (f / "moedge_compare.py").write_text("#"), "moedge_compare.py is missing, a link or damaged"),
    ],
)
def test_nothing_damaged_is_run(unpacked, damage, message):
    damage(unpacked)
    child = run(unpacked, "verify.py")
    assert child.returncode != 0
    if "compare" not in message:  # a damaged module fails when it is imported, before anything is checked
        assert message in child.stderr


@pytest.mark.parametrize("script", ["build_engine.py", "verify.py", "bench.py"])
def test_without_numpy_the_last_line_names_numpy(unpacked, script):
    # -S: no site-packages.
    command = [sys.executable, "-E", "-S", script]
    child = subprocess.run(command, cwd=unpacked, capture_output=True, text=True, timeout=60, check=False)
    assert child.returncode != 0
    assert child.stderr.splitlines()[-1] == "ModuleNotFoundError: No module named 'numpy'"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--repeats", "0"], "must be at least 1"),
        (["--decode", "0"], "must be at least 1"),
        (["--out", "."], "--out . cannot be written: it is a folder"),
        (["--decode", "64"], "--decode 64 leaves no room for a prompt: this engine holds 64 tokens"),
    ],
)
def test_bench_refuses_what_it_cannot_time(unpacked, options, message):
    child = run(unpacked, "bench.py", *options)
    assert child.returncode == 2, child.stderr
    assert message in child.stderr
    assert "Traceback" not in child.stderr


def test_bench_says_that_it_shortened_the_prompt(unpacked):
    child = run(unpacked, "bench.py", "--prompt", "500", "--decode", "2", "--repeats", "1", "--warmup", "0")
    assert child.returncode == 0, child.stderr
    assert "takes 48 of 500 prompt tokens" in child.stderr
    result = json.loads((unpacked / "bench-result.json").read_text())
    assert result["protocol"]["prompt"] == 48


def test_the_build_script_says_what_is_missing(unpacked):
    command = [sys.executable, "build_engine.py"]
    child = subprocess.run(command, cwd=unpacked, capture_output=True, text=True, timeout=60, check=False)
    if find_spec("tensorrt") is None:
        assert child.returncode == 2
        assert "The Python package tensorrt of target tensorrt cannot be imported" in child.stderr


@pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx-cu13 has no package for this platform")
def test_the_build_script_builds_with_tensorrt_rtx_without_a_gpu(unpacked):
    command = [sys.executable, "build_engine.py", "--target", "tensorrt-rtx", "--compute-capability", "8.6"]
    child = subprocess.run(command, cwd=unpacked, capture_output=True, text=True, timeout=300, check=False)
    assert child.returncode == 0, child.stderr
    facts = json.loads((unpacked / "engine.json").read_text())
    assert facts["build"]["engine_bytes"] == (unpacked / "engine.plan").stat().st_size > 10_000
    assert facts["taps"]["1"]["output"] == "routes.1"


def test_what_cannot_be_packed_is_refused(source, tmp_path):
    with pytest.raises(MoEdgeError, match="export tensorrt-rtx and use `moedge build`"):
        device_archive.write(source, tmp_path / "x.tar", devices.load("rtx-2080-ti"))
    (tmp_path / "mine.tar").write_text("keep")
    with pytest.raises(MoEdgeError, match="--force"):
        device_archive.write(source, tmp_path / "mine.tar", devices.load("jetson-agx-orin"))
    assert (tmp_path / "mine.tar").read_text() == "keep"
    part = next(path for path in source.rglob("*") if path.is_file())
    for out, says in ((tmp_path, "not a plain file"), (part, "is a file of .*, which would be lost")):
        with pytest.raises(MoEdgeError, match=says):
            device_archive.write(source, out, devices.load("jetson-agx-orin"), force=True)
    with pytest.raises(MoEdgeError, match="no version of TensorRT"):
        device_archive.write(source, tmp_path / "y.tar", devices.load("jetson-agx-orin"), tensorrt="new")
    old = devices.load("jetson-agx-orin").model_copy(update={"compute_capability": "7.2", "label": "Xavier"})
    with pytest.raises(MoEdgeError, match=r"Xavier \(SM72\) has no bfloat16, .* --half float16"):
        device_archive.write(source, tmp_path / "z.tar", old, dtype="bfloat16")
    assert not list(tmp_path.glob(".*"))


def test_what_a_killed_process_left_is_deleted(source, tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left = partial_of(tmp_path / "x.tar")
    left = left.with_name(left.name.replace(f".{os.getpid()}.", f".{dead.pid}."))
    (left / "content").mkdir(parents=True)
    with pytest.raises(MoEdgeError, match="no version of TensorRT"):
        device_archive.write(source, tmp_path / "x.tar", devices.load("jetson-agx-orin"), tensorrt="new")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("profiles", "memory", "message"),
    [
        ({"max_length": 5000, "max_prompt": 48, "batch": 1}, 64, "--max-length 5000 is beyond the model's 256"),
        ({"max_length": 16, "max_prompt": 8, "batch": 1}, 64, "--max-length must be above 16"),
        ({"max_length": 64, "max_prompt": 48, "batch": 1}, 1e-6, "GiB .* lower --max-length"),
    ],
)
def test_what_the_device_would_refuse_is_refused_here(bundles, profiles, memory, message):
    device = devices.load("jetson-agx-orin").model_copy(update={"memory_gib": memory})
    with pytest.raises(MoEdgeError, match=message):
        device_archive._profiles(open_bundle(bundles["moe/portable"]), device, **profiles)


def test_impossible_lengths_are_refused_before_the_model_is_traced(checkpoints, tmp_path, monkeypatch):
    monkeypatch.setattr(device_archive, "_bundles", lambda *_: pytest.fail("traced"))
    orin = devices.load("jetson-agx-orin")
    with pytest.raises(MoEdgeError, match="--max-length 5000 is beyond the model's 256 positions"):
        device_archive.write(checkpoints["dense"], tmp_path / "x.tar", orin, max_length=5000)
    with pytest.raises(MoEdgeError, match="--max-prompt 65 is more than the longest sequence, --max-length 64"):
        device_archive.write(checkpoints["dense"], tmp_path / "x.tar", orin, max_length=64, max_prompt=65)


def test_weights_of_more_than_8_gib_fit_into_an_archive():
    entry = tarfile.TarInfo("moedge-jetson-agx-thor-moe/model.onnx.data")
    entry.size = 14 * 2**30
    assert tarfile.TarInfo.frombuf(entry.tobuf(device_archive.FORMAT), "utf-8", "strict").size == entry.size


def test_the_device_metrics_are_those_of_parity():
    rng = np.random.default_rng(0)
    a = rng.standard_normal((40, 300)).astype(np.float32)
    b = (a + 0.05 * rng.standard_normal(a.shape)).astype(np.float32)
    found = moedge_compare.logits(a, b, 0.0)
    tokens = reduction.TokenErrors(0.0)
    tokens.add(a, b, np.full(40, -1))
    want = tokens.summary()
    assert found["median_rel_error"] == pytest.approx(want["rel_error"]["p50"])
    assert found["mean_kl"] == pytest.approx(want["kl_ref_test"]["mean"])
    assert found["max_kl"] == pytest.approx(want["kl_ref_test"]["max"])
    assert found["top1_agreement"] == want["top1"]["agreement_with_near_ties"]


def test_routes_are_compared_as_sets_by_layer():
    one = {0: np.array([[1, 2], [3, 4]], np.int32), 3: np.array([[0, 1], [0, 1]], np.int32)}
    two = {0: np.array([[2, 1], [3, 5]], np.int32), 3: one[3]}
    found = moedge_compare.routes(one, two)
    assert (found["agreement"], found["worst_layer"], found["worst_agreement"]) == (0.75, 0, 0.5)
    assert moedge_compare.routes(one, {}) == {"compared": False}


@pytest.mark.parametrize("content", ["{", "[]", '{"schema": "moedge.device-result/1", "kind": "verify"}'])
def test_report_refuses_what_is_no_result(tmp_path, content):
    (tmp_path / "r.json").write_text(content)
    with pytest.raises(MoEdgeError, match=r"r\.json"):
        device_result.read(tmp_path / "r.json")


def test_report_names_a_result_that_is_not_there(tmp_path):
    with pytest.raises(MoEdgeError, match=r"r\.json does not exist; verify\.py and bench\.py of an archive write"):
        device_result.read(tmp_path / "r.json")


def test_a_device_without_tensorrts_moe_layer_gets_none(source, tmp_path):
    orin = devices.load("jetson-agx-orin")
    with pytest.raises(MoEdgeError, match=r"\(SM87\) does not have TensorRT's own MoE layer, .* leave --expert-form"):
        device_archive.write(source, tmp_path / "moe.tar", orin, tensorrt="11.0", experts="native")
    assert not list(tmp_path.iterdir())
