// AVX2 with FMA: Haswell, Zen and later.
#if defined(__x86_64__)
#include <algorithm>
#include <array>
#include <cstring>
#include <utility>

#include "kernels.h"

#pragma GCC target("avx2,fma,f16c")
#include <immintrin.h>

#include "vector256.inl"
#include "kernels.inl"

const moedge::Kernels moedge::AVX2 = MOEDGE_KERNELS("avx2");
#endif
