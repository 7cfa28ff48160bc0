"""What follows a measurement must not cost it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from moedge import MoEdgeError


@contextmanager
def said_last(late: list[MoEdgeError]) -> Iterator[None]:
    """Keep the error of a block in ``late``; the command raises it once what was measured is written and printed."""
    try:
        yield
    except MoEdgeError as error:
        late.append(error)


@contextmanager
def shown(result: Any, show: Callable[[Any], None], *, as_json: bool) -> Iterator[None]:
    """Print ``result`` as JSON or by ``show`` when a block that writes files ends, also where one cannot be written."""
    try:
        yield
    finally:
        if as_json:
            print(json.dumps(result, indent=2, allow_nan=False))
        else:
            show(result)
