"""MoE checkpoint -> portable ONNX graph -> a bundle for each target."""
