"""The ``moedge::`` operators as Triton kernels: one file an operator, each with its launch rule and its cost.

``route``, ``dispatch``, ``grouped_glu``, ``grouped_linear`` and ``combine`` need Triton; ``cuda`` runs them on tensors,
``compile`` turns them into PTX ahead of time, ``table`` reports registers, shared memory and spills. Nothing is
imported here: a CPU-only installation has no Triton.
"""
