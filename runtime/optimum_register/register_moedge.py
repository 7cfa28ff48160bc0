"""``optimum-cli export moedge``: our export as a command of optimum's.

Installed as a module of the namespace package ``optimum.commands.register`` (PEP 420), where optimum-cli looks for the
commands of other distributions. It reads this file at every start, so nothing heavy is imported here.
"""

from __future__ import annotations

import sys
from argparse import SUPPRESS, ArgumentParser
from pathlib import Path
from typing import Any

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand


class MoEdgeExportCommand(BaseOptimumCLICommand):
    """``moedge export`` in optimum's manner: ``--model`` and an output folder, and the options of ``moedge export``."""

    COMMAND = CommandInfo(name="moedge", help="Export a dense or MoE checkpoint to MoEdge's ONNX bundles.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Declare the arguments."""
        from moedge.runtime.cli import COMMANDS

        parser.add_argument("-m", "--model", type=Path, required=True, help="Checkpoint folder, MoE or dense.")
        parser.add_argument("output", type=Path, help="Folder for the bundles, one sub-folder per target.")
        for option in _options():
            kind: dict[str, Any] = {"action": "append" if option.multiple else "store", "metavar": option.metavar}
            if option.is_flag:
                kind = {"action": "store_true"}
            parser.add_argument(*option.opts, dest=option.name, help=option.help.replace("%", "%%"), **kind)
            for former, name in COMMANDS["export"].renamed.items():
                if f"--{name}" in option.opts:
                    parser.add_argument(f"--{former}", dest=option.name, help=SUPPRESS, **kind)

    def run(self) -> None:
        """Do what ``moedge export`` does, errors and exit codes included."""
        from moedge.runtime.cli import main

        given = self.args
        assert given is not None
        words: list[str] = []
        for option in _options():
            value = getattr(given, option.name)
            if option.is_flag:
                words += option.opts * bool(value)
            elif value is not None:
                words += [f"{option.opts[0]}={one}" for one in (value if option.multiple else [value])]
        sys.argv = ["moedge", "export", *words, "--", str(given.model), str(given.output)]
        main()


def _options() -> list[Any]:
    """The options of ``moedge export``, as click keeps them; their values stay text, which that command checks."""
    from moedge.runtime.cli import load

    return [option for option in load("export").params if option.param_type_name == "option"]


REGISTER_COMMANDS = [(MoEdgeExportCommand, ExportCommand)]
