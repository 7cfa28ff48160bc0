"""``moedge doctor``: what is installed here and what it makes possible."""

from __future__ import annotations

import json

from rich.console import Console

from moedge.runtime import doctor as examination


def doctor(*, as_json: bool) -> None:
    """Print the answer of :func:`moedge.runtime.doctor.examine`."""
    result = examination.examine()
    if as_json:
        print(json.dumps(result, indent=2, allow_nan=False))
    else:
        Console().print(examination.render(result))
