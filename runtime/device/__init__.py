"""What runs on the device itself: plain Python with numpy and TensorRT only, shipped inside a device archive."""
