"""MoEdge: dense GLU language model -> one that reads fewer weights for a token -> verified ONNX / TensorRT engine.

The functions that :data:`__all__` names are the whole public API (``docs/python.md``); each is loaded when it is first
asked for (PEP 562), so that ``import moedge`` imports nothing heavy. Three stages are behind them, each a sub-package
whose output the next one reads:

* :mod:`moedge.convert`  dense checkpoint -> MoE checkpoint        (torch, transformers)
* :mod:`moedge.export`   MoE checkpoint -> ONNX bundle per target  (torch to trace, onnx to lower)
* :mod:`moedge.runtime`  bundle -> generate, verify, bench, report (numpy and the target's runtime)
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moedge.runtime.api import (
        MoEPlan,
        bench,
        convert_model,
        evaluate,
        export_model,
        generate,
        load,
        open_engine,
        verify,
    )

__version__ = "0.1.0"

__all__ = [
    "MoEPlan",
    "MoEdgeError",
    "__version__",
    "bench",
    "convert_model",
    "evaluate",
    "export_model",
    "generate",
    "load",
    "open_engine",
    "verify",
]


class MoEdgeError(Exception):
    """A problem the user can act on.

    The message is one or two plain sentences: what is wrong, where, and what to do. The command line prints it
    without a traceback and exits with :attr:`exit_code`.
    """

    exit_code = 2


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'moedge' has no attribute {name!r}")
    from importlib import import_module

    found = getattr(import_module("moedge.runtime.api"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
