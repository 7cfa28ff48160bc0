"""Rules and targets of ONNX Runtime."""
