"""Work on ONNX graphs that belongs to no target: build, find, cut, type, emulate."""
