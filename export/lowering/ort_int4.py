"""Target ``ort-cpu-int4``; see :mod:`ort_quantized`."""

from functools import partial

from moedge.export.lowering.ort_quantized import lower as _lower

lower = partial(_lower, bits=4)
