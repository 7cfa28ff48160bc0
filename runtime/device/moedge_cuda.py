"""The few calls of the CUDA runtime that an engine needs, by ctypes: memory, copies, one stream."""

from __future__ import annotations

import contextlib
import ctypes
import glob
import os
import sys
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING or __package__:
    from moedge.runtime.device.moedge_trt import DeviceError
else:  # in an archive the files lie side by side
    from moedge_trt import DeviceError


DRIVER_TOO_OLD = 35
"""cudaErrorInsufficientDriver: the runtime library is newer than the driver takes; an older one may work."""


class Cuda:
    """The few calls of the CUDA runtime that an engine needs, on one stream of device 0.

    Raises:
        DeviceError: there is no CUDA runtime library, or no usable NVIDIA GPU.
    """

    def __init__(self) -> None:
        self._lib = _cudart()
        self._lib.cudaGetErrorString.restype = ctypes.c_char_p
        count = ctypes.c_int()
        status = self._lib.cudaGetDeviceCount(ctypes.byref(count))
        if status or not count.value:
            reason = self._lib.cudaGetErrorString(status).decode() if status else "none found"
            raise DeviceError(f"No NVIDIA GPU can be used here ({reason}).")
        self.stream = ctypes.c_void_p()
        self._call("cudaStreamCreate", ctypes.byref(self.stream))

    def _call(self, name: str, *args: Any) -> None:
        status = getattr(self._lib, name)(*args)
        if status:
            raise DeviceError(f"{name} failed: {self._lib.cudaGetErrorString(status).decode()}.")

    def capability(self) -> str:
        """Compute capability of device 0, e.g. ``"8.7"``."""
        values = []
        for attribute in (75, 76):  # cudaDevAttrComputeCapabilityMajor, ...Minor
            value = ctypes.c_int()
            self._call("cudaDeviceGetAttribute", ctypes.byref(value), attribute, 0)
            values.append(value.value)
        return f"{values[0]}.{values[1]}"

    def name(self) -> str:
        """Name of device 0 as the driver gives it, e.g. ``"NVIDIA H100 80GB HBM3"``; empty where it gives none."""
        try:
            driver = ctypes.CDLL("libcuda.so.1")
        except OSError:
            return ""
        device, text = ctypes.c_int(), ctypes.create_string_buffer(256)
        failed = driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), 0)
        failed = failed or driver.cuDeviceGetName(text, len(text), device)
        return "" if failed else text.value.decode(errors="replace")

    def memory(self) -> tuple[int, int]:
        """Free and total bytes of the device."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self._call("cudaMemGetInfo", ctypes.byref(free), ctypes.byref(total))
        return free.value, total.value

    def allocate(self, size: int) -> Buffer:
        """Allocate ``size`` bytes on the device."""
        pointer = ctypes.c_void_p()
        self._call("cudaMalloc", ctypes.byref(pointer), ctypes.c_size_t(max(size, 1)))
        return Buffer(self, int(pointer.value or 0), size)

    def free(self, address: int) -> None:
        """Free what :meth:`allocate` gave."""
        self._call("cudaFree", ctypes.c_void_p(address))

    def upload(self, address: int, array: np.ndarray) -> None:
        """Copy a C-ordered array to the device."""
        size = ctypes.c_size_t(array.nbytes)
        self._call(
            "cudaMemcpyAsync", ctypes.c_void_p(address), ctypes.c_void_p(array.ctypes.data), size, 1, self.stream
        )

    def download(self, array: np.ndarray, address: int) -> None:
        """Copy device memory into a C-ordered array, and wait for it."""
        size = ctypes.c_size_t(array.nbytes)
        self._call(
            "cudaMemcpyAsync", ctypes.c_void_p(array.ctypes.data), ctypes.c_void_p(address), size, 2, self.stream
        )
        self.synchronize()

    def synchronize(self) -> None:
        """Wait until the stream is idle."""
        self._call("cudaStreamSynchronize", self.stream)

    def close(self) -> None:
        """Destroy the stream."""
        if self.stream:
            self._call("cudaStreamDestroy", self.stream)
            self.stream = ctypes.c_void_p()


class Buffer:
    """Device memory that is freed with its last reference."""

    def __init__(self, cuda: Cuda, address: int, size: int) -> None:
        self.cuda, self.address, self.size = cuda, address, size

    def __del__(self) -> None:
        address, self.address = self.address, 0
        if address:
            # When the interpreter or the driver is shutting down, they free it themselves.
            with contextlib.suppress(DeviceError, AttributeError, TypeError):
                self.cuda.free(address)


def _cudart() -> Any:
    """Load libcudart: the system's (Jetson, CUDA toolkit), or the wheel nvidia-cuda-runtime.

    The first that the driver is new enough for; if it is for none, the first, whose error then says so.
    """
    names = ["libcudart.so", "libcudart.so.13", "libcudart.so.12", "libcudart.so.11.0"]
    for folder in sys.path:
        for pattern in ("nvidia/cu1*/lib/libcudart.so.*", "nvidia/cuda_runtime/lib/libcudart.so.*"):
            names += sorted(glob.glob(os.path.join(folder, pattern)))  # noqa: PTH118, PTH207
    names += sorted(glob.glob("/usr/local/cuda*/lib64/libcudart.so*"))  # noqa: PTH207
    found = []
    for name in names:
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        if library.cudaGetDeviceCount(ctypes.byref(ctypes.c_int())) != DRIVER_TOO_OLD:
            return library
        found.append(library)
    if found:
        return found[0]
    raise DeviceError("No CUDA runtime (libcudart) is here; this needs a machine with an NVIDIA GPU and its driver.")
