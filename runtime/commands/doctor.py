"""``moedge doctor``: what is installed here and what it makes possible."""

from __future__ import annotations

import json

from rich.console import Console

from moedge.runtime import doctor as examination
from moedge.runtime.commands._options import Json


def doctor(as_json: Json = False) -> None:
    """Say which runtimes, versions and devices are here, and which lowerings are therefore possible.

    \b
    Example:
      moedge doctor
    """
    result = examination.examine()
    if as_json:
        print(json.dumps(result, indent=2, allow_nan=False))
    else:
        Console().print(examination.render(result))
