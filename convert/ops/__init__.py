"""The ``moedge::`` operators in PyTorch: what a converted FFN runs, and what the exporter sees.

``moedge::route`` and ``moedge::sparse_glu`` appear in a traced graph. ``sparse_glu`` is the chain ``dispatch`` ->
``grouped_glu`` -> ``grouped_linear`` -> ``combine``; the links are operators too because a TensorRT plugin is built
for each of them. Every operator has a fake (shapes for ``torch.export``) and an implementation in plain torch calls
that runs on any device: tokens are sorted by expert once, and each expert is one matrix product.

All of them have gradients, by the same sorted products. The gradient reaches the scores through the weights: rules
all but ``unit`` pass it on, ``unit`` has none, and the choice of experts has none.
``sparse_glu`` keeps its inputs only and computes the hidden activations again in the backward pass.

Shapes: T tokens, H hidden, I expert width, E experts, k active experts for a token. Importing this module registers
the operators; it needs torch only.
"""

from __future__ import annotations

from typing import Any

from moedge.convert.ops.activations import ACTIVATIONS, activate
from moedge.convert.ops.gather import keep_large
from moedge.convert.ops.gathered import gathered_glu, gathered_linear
from moedge.convert.ops.grouped import combine, grouped_glu, grouped_linear
from moedge.convert.ops.routing import RULES, dispatch, route
from moedge.convert.ops.sparse import sparse_glu

__all__ = ["ACTIVATIONS", "RULES", "activate", "combine", "dispatch", "gathered_glu", "gathered_linear", "grouped_glu",
           "grouped_linear", "keep_large", "route", "sparse_glu"]  # fmt: skip


def _on_cuda(operator: Any) -> None:
    """Give an operator its Triton kernel on CUDA devices; Triton is imported at the first call there.

    Without Triton, and for what the kernels do not take (float64, over 512 experts, GPUs before SM80), the one above
    runs there too.
    """

    def run(*arguments: Any) -> Any:
        try:
            from moedge.convert.ops.kernels import cuda
        except ModuleNotFoundError as error:
            if error.name != "triton":
                raise
            return operator._init_fn(*arguments)
        if not cuda.supports(operator._name, arguments):
            return operator._init_fn(*arguments)
        return getattr(cuda, operator._name)(*arguments)

    operator.register_kernel("cuda", run)


for _operator in (route, dispatch, grouped_glu, grouped_linear, combine, sparse_glu, gathered_glu, gathered_linear):
    _on_cuda(_operator)
