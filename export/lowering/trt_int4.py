"""Target ``tensorrt-rtx-int4``; see :mod:`trt_quantized`."""

from functools import partial

from moedge.export.lowering.trt_quantized import lower as _lower

lower = partial(_lower, bits=4)
