"""Rules and targets of TensorRT and TensorRT for RTX."""
