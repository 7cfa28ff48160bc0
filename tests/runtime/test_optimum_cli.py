"""``optimum-cli export moedge``: found through optimum's registry, and the same command as ``moedge export``."""

from __future__ import annotations

import os
import subprocess
import sys
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

import pytest

from moedge.export.bundle import open_bundle
from moedge.runtime.cli import load


def optimum_cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the environment's optimum-cli, which finds the command by MoEdge being installed."""
    command = [sys.executable, "-m", "optimum.commands.optimum_cli", *arguments]
    environment = {**os.environ, "COLUMNS": "200"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=600)


def test_the_command_is_found_and_answers_as_moedge_export_does(tmp_path: Path) -> None:
    shown = optimum_cli("export", "moedge", "--help")
    assert shown.returncode == 0, shown.stderr
    for option in ("--model", "output", *own_options()):
        assert option in shown.stdout
    request = ("export", "moedge", "--model", str(tmp_path), str(tmp_path / "out"), "--target", "portable")
    refused = optimum_cli(*request)
    assert refused.returncode == 2
    assert f"{tmp_path} is not a checkpoint folder" in " ".join(refused.stderr.split())
    assert "Traceback" not in refused.stderr
    too_short = optimum_cli(*request, "--max-length", "4")
    assert too_short.returncode == 2
    assert "--max-length" in too_short.stderr
    assert "16" in too_short.stderr


def test_former_names_of_options_are_accepted() -> None:
    from optimum.commands.register.register_moedge import MoEdgeExportCommand

    parser = ArgumentParser()
    MoEdgeExportCommand.parse_args(parser)
    given = parser.parse_args(
        ["-m", "model", "out", "--experts", "merged", "--dtype", "bfloat16", "--target", "tensorrt"]
    )
    assert (given.expert_form, given.half, given.target, given.force) == ("merged", "bfloat16", ["tensorrt"], False)
    assert "--experts" not in parser.format_help()


def own_options() -> list[str]:
    """The options of ``moedge export``."""
    return [parameter.opts[0] for parameter in load("export").params if parameter.param_type_name == "option"]


@pytest.mark.slow
def test_it_exports(tiny_llama: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    request = ("-m", str(tmp_path / "model"), str(tmp_path / "out"), "--target", "portable")
    made = optimum_cli("export", "moedge", *request, "--max-length", "64", "--label=-by optimum")
    assert made.returncode == 0, made.stderr
    manifest = open_bundle(tmp_path / "out/portable").manifest
    assert (manifest["label"], manifest["model"]["max_position_embeddings"]) == ("-by optimum", 64)
