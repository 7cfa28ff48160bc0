"""MoEdge: dense GLU language model -> Mixture-of-Experts -> verified ONNX / TensorRT engine.

Three stages, each a sub-package whose output the next one reads:

* :mod:`moedge.convert`  dense checkpoint -> MoE checkpoint        (torch, transformers)
* :mod:`moedge.export`   MoE checkpoint -> ONNX bundle per target  (torch to trace, onnx to lower)
* :mod:`moedge.runtime`  bundle -> generate, verify, bench, report (numpy and the target's runtime)

Importing this package imports nothing heavy.
"""

__version__ = "0.1.0"


class MoEdgeError(Exception):
    """A problem the user can act on.

    The message is one or two plain sentences: what is wrong, where, and what to do. The command line prints it
    without a traceback and exits with :attr:`exit_code`.
    """

    exit_code = 2
