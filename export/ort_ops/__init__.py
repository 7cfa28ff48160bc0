"""Operators of our own for ONNX Runtime on CPUs: products that read only the weights of inputs that are not zero.

:mod:`library` compiles them, :mod:`pack` stores weights as they read them, docs/kernels-cpu.md explains them.
"""
