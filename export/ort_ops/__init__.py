"""Operators of our own for ONNX Runtime on CPUs: products that read only the weights of inputs that are not zero.

``library.py`` compiles them, ``pack.py`` stores weights as they read them, docs/kernels-cpu.md explains them.
"""
