"""``optimum-cli export moedge``: found through optimum's registry, and the same command as ``moedge export``."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moedge.export.bundle import open_bundle

ROOT = Path(__file__).parents[2]


def optimum_cli(site: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run optimum-cli with one more path entry that holds ``optimum/commands/register``."""
    path = os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "optimum.commands.optimum_cli", *arguments]
    environment = {**os.environ, "PYTHONPATH": path, "COLUMNS": "200"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=600)


def test_the_command_is_found_and_answers_as_moedge_export_does(tmp_path: Path) -> None:
    register = tmp_path / "site/optimum/commands/register"
    register.parent.mkdir(parents=True)
    register.symlink_to(ROOT / "runtime/optimum_register", target_is_directory=True)
    shown = optimum_cli(tmp_path / "site", "export", "moedge", "--help")
    assert shown.returncode == 0, shown.stderr
    for option in ("--model", "output", "--target", "--label", "--max-length", "--tensorrt", "--force"):
        assert option in shown.stdout
    request = ("export", "moedge", "--model", str(tmp_path), str(tmp_path / "out"), "--target", "portable")
    refused = optimum_cli(tmp_path / "site", *request)
    assert refused.returncode == 2
    assert f"{tmp_path} is not a checkpoint folder" in " ".join(refused.stderr.split())
    assert "Traceback" not in refused.stderr


@pytest.mark.slow
def test_an_installed_wheel_adds_the_command_and_it_exports(
    tiny_llama: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    tiny_llama().save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    # Without dependencies and beside the environment's optimum: nothing of optimum's own is touched.
    install = ["install", "-q", "--no-deps", "--no-build-isolation", "--target", str(tmp_path / "site"), str(ROOT)]
    subprocess.run([sys.executable, "-m", "pip", *install], check=True, timeout=600)
    made = optimum_cli(
        tmp_path / "site", "export", "moedge", "-m", str(tmp_path / "model"), str(tmp_path / "out"),
        "--target", "portable", "--max-length", "64", "--label", "by optimum",
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    manifest = open_bundle(tmp_path / "out/portable").manifest
    assert (manifest["label"], manifest["model"]["max_position_embeddings"]) == ("by optimum", 64)
