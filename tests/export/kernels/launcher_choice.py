"""Which kernel the C++ library takes on a GPU: a spec of kernels without code, the stand-in for libcuda.

Arguments: plugin library, stand-in for libcuda, compute capability here, `.target` of each kernel. Prints the target of
the kernel that is launched, or the library's reason.
"""

from __future__ import annotations

import ctypes
import re
import sys
from typing import Any

CALLBACK = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_void_p
)

library, device, here, *targets = sys.argv[1:]
kernels = []
for target in targets:
    ptx = f".version 8.7\n.target {target}\n"
    number = re.sub(r"\D", "", target)
    kernels.append(f"{number} 9 32 0 0 {'0 1 1 ' * 3}kernel {len(ptx)}\n{ptx}")
spec = f"moedge.launch/1 Toy 0 0 1 1 {len(kernels)}\n0 1 -1\n0 1 1 0 0\n{''.join(kernels)}".encode()
launched: list[str] = []


def launch(ptx: bytes, *_: Any) -> int:
    launched.append(re.findall(r"sm_\w+", ptx.decode())[0])
    return 0


callback = CALLBACK(launch)
cuda = ctypes.CDLL(device, ctypes.RTLD_GLOBAL)
cuda.use(callback, int(here))
plugins = ctypes.CDLL(library)
plugins.moedgeLaunchReason.restype = ctypes.c_char_p
empty = (ctypes.c_void_p * 1)()
status = cuda.run(plugins.getCreators, spec, len(spec), 1, 1, (ctypes.c_long * 2)(1, 4), empty, empty)
reasons = [plugins.moedgeLaunchReason().decode() for _ in range(2)]
assert not reasons[1], "a reason is given once"
assert (status == 0) == bool(launched) == (not reasons[0])
print(*launched, reasons[0])
