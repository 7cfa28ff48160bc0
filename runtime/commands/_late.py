"""What follows a measurement must not cost it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from moedge import MoEdgeError


@contextmanager
def said_last(late: list[MoEdgeError]) -> Iterator[None]:
    """Keep the error of a block in ``late``; the command raises it once what was measured is written and printed."""
    try:
        yield
    except MoEdgeError as error:
        late.append(error)
