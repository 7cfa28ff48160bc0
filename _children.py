"""Python programs that we start: none of them imports a file of the working folder.

``python -c`` and ``python -m`` put that folder first on the import path, so a ``json.py`` in a folder of downloaded
files would run as soon as we start one there. ``PYTHONSAFEPATH`` leaves it out from Python 3.11 on, in the programs
that the child starts too, whose scripts would then miss the files beside them; so it is taken off here.
"""

from __future__ import annotations

import sys

_START = "import sys; sys.path[:] = [place for place in sys.path if place]; "
"""The working folder is the empty name; ``sys`` is built in, so no file can take its place."""
_RUN = "import runpy; runpy.run_module(sys.argv.pop(1), run_name='__main__', alter_sys=True)"


def python(code: str, *arguments: str) -> list[str]:
    """Return the command that runs ``code`` in this Python, with ``arguments`` in ``sys.argv[1:]``."""
    return [sys.executable, "-c", _START + code, *arguments]


def module(name: str, *arguments: str) -> list[str]:
    """Return the command that runs a module as ``python -m`` does."""
    return python(_RUN, name, *arguments)
