"""``optimum-cli export moedge``: our export as a command of optimum's.

Installed as a module of the namespace package ``optimum.commands.register`` (PEP 420), where optimum-cli looks for the
commands of other distributions. It reads this file at every start, so nothing heavy is imported here.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from pathlib import Path

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand


class MoEdgeExportCommand(BaseOptimumCLICommand):
    """The arguments of ``moedge export`` in optimum's manner: ``--model`` and an output folder."""

    COMMAND = CommandInfo(name="moedge", help="Export a dense or MoE checkpoint to MoEdge's ONNX bundles.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Declare the arguments."""
        parser.add_argument("-m", "--model", type=Path, required=True, help="Checkpoint folder, MoE or dense.")
        parser.add_argument("output", type=Path, help="Folder for the bundles, one sub-folder per target.")
        parser.add_argument("--target", action="append", help="As of `moedge export` (may be repeated).")
        parser.add_argument("--label", help="Name of the model in reports; the folder's name by default.")
        parser.add_argument("--max-length", type=int, help="Longest prompt + answer in tokens.")
        parser.add_argument("--tensorrt", metavar="VERSION", help="Of TensorRT on the device; the newest by default.")
        parser.add_argument("--experts", metavar="FORM", help="Of TensorRT targets: plugins, merged or native.")
        parser.add_argument("--dtype", help="Of TensorRT targets: float16 or bfloat16.")
        parser.add_argument(
            "--gptq", help="Text by which the weights of int4 targets are chosen: asset:NAME or a file."
        )
        parser.add_argument("--gptq-tokens", type=int, help="Tokens of that text.")
        parser.add_argument("--force", action="store_true", help="Replace existing output.")

    def run(self) -> None:
        """Do what ``moedge export`` does, errors and exit codes included."""
        from moedge.runtime.cli import main

        given = self.args
        assert given is not None
        options = [f"--target={target}" for target in given.target or ()]
        for name in ("label", "max_length", "tensorrt", "experts", "dtype", "gptq", "gptq_tokens"):
            if (value := getattr(given, name)) is not None:
                options.append(f"--{name.replace('_', '-')}={value}")
        options += ["--force"] * given.force
        sys.argv = ["moedge", "export", *options, "--", str(given.model), str(given.output)]
        main()


REGISTER_COMMANDS = [(MoEdgeExportCommand, ExportCommand)]
