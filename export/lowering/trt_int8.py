"""Target ``tensorrt-rtx-int8``; see :mod:`trt_quantized`."""

from functools import partial

from moedge.export.lowering.trt_quantized import lower as _lower

lower = partial(_lower, bits=8)
