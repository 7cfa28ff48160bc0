"""The few calls of NVML that a measurement needs, by ctypes: clocks, why they are low, heat, energy.

Constants are those of ``nvml.h``.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING or __package__:
    from moedge.runtime.device.moedge_sensors import Gpu
else:  # in an archive the files lie side by side
    from moedge_sensors import Gpu

REASONS = {
    0x4: "power limit",
    0x8: "hardware slowdown",
    0x20: "heat (software)",
    0x40: "heat (hardware)",
    0x80: "power brake",
}
"""nvmlClocksEventReasons: why clocks are lower than asked for. Idle (1) and settings of a user (2) are no slowdown."""
_SM, _MEMORY = 1, 2  # nvmlClockType_t
_TEMPERATURE = 0  # NVML_TEMPERATURE_GPU


class NoNvml(Exception):
    """NVML, or the GPU, is not there; says why."""


def reasons(mask: int) -> tuple[str, ...]:
    """Name the bits of nvmlDeviceGetCurrentClocksEventReasons that mean a slowdown."""
    return tuple(name for bit, name in REASONS.items() if mask & bit)


class Nvml:
    """One GPU.

    Args:
        visible: ``CUDA_VISIBLE_DEVICES``, whose first entry (a number or a UUID) is the GPU that CUDA calls 0. Numbers
            are those of NVML, and CUDA's with ``CUDA_DEVICE_ORDER=PCI_BUS_ID`` or equal GPUs.

    Raises:
        NoNvml: no driver with NVML, or no such GPU.
    """

    def __init__(self, visible: str | None = None) -> None:
        try:
            self._lib: Any = ctypes.CDLL("libnvidia-ml.so.1")
        except OSError:
            raise NoNvml("this machine has no NVML (libnvidia-ml.so.1)") from None
        if self._lib.nvmlInit_v2():
            raise NoNvml("NVML does not start; is the driver loaded?")
        self._handle = ctypes.c_void_p()
        first = (visible if visible is not None else os.environ.get("CUDA_VISIBLE_DEVICES", "")).split(",")[0].strip()
        if first.startswith("GPU-"):
            failed = self._lib.nvmlDeviceGetHandleByUUID(first.encode(), ctypes.byref(self._handle))
        else:
            number = int(first) if first.isdigit() else 0
            failed = self._lib.nvmlDeviceGetHandleByIndex_v2(number, ctypes.byref(self._handle))
        if failed:
            raise NoNvml(f"NVML knows no GPU {first or 0}")

    def name(self) -> str | None:
        """What the GPU is called, e.g. ``NVIDIA L4``."""
        text = ctypes.create_string_buffer(96)
        failed = self._lib.nvmlDeviceGetName(self._handle, text, len(text))
        return None if failed else text.value.decode(errors="replace")

    def driver(self) -> str | None:
        """Version of the driver, e.g. ``550.54.15``."""
        text = ctypes.create_string_buffer(80)
        failed = self._lib.nvmlSystemGetDriverVersion(text, len(text))
        return None if failed else text.value.decode(errors="replace")

    def read(self) -> Gpu:
        """Clocks, temperature and reasons now."""
        mask = self._get("nvmlDeviceGetCurrentClocksEventReasons", ctypes.c_ulonglong)
        if mask is None:  # its name before driver 535
            mask = self._get("nvmlDeviceGetCurrentClocksThrottleReasons", ctypes.c_ulonglong)
        return Gpu(
            mhz=self._get("nvmlDeviceGetClockInfo", ctypes.c_uint, _SM),
            memory_mhz=self._get("nvmlDeviceGetClockInfo", ctypes.c_uint, _MEMORY),
            celsius=self._get("nvmlDeviceGetTemperature", ctypes.c_uint, _TEMPERATURE),
            reasons=reasons(int(mask or 0)),
        )

    def joules(self) -> float | None:
        """Joules of the whole board since the driver was loaded (Volta and newer), or None."""
        millijoules = self._get("nvmlDeviceGetTotalEnergyConsumption", ctypes.c_ulonglong)
        return None if millijoules is None else millijoules / 1e3

    def _get(self, name: str, kind: Any, *arguments: int) -> float | None:
        """One number of a query of this GPU; None where the driver or the GPU does not know it."""
        value = kind()
        with contextlib.suppress(AttributeError):
            if not getattr(self._lib, name)(self._handle, *arguments, ctypes.byref(value)):
                return float(value.value)
        return None

    def close(self) -> None:
        """Let NVML go."""
        self._lib.nvmlShutdown()


def told() -> tuple[str | None, str | None] | None:
    """Name of the GPU and version of its driver, as far as NVML tells them; None where there is no GPU."""
    nvml = found()
    if nvml is None:
        return None
    try:
        return nvml.name(), nvml.driver()
    finally:
        nvml.close()


def found() -> Nvml | None:
    """Open the GPU, or return None where there is none."""
    try:
        return Nvml()
    except NoNvml:
        return None
