// AVX-VNNI: Alder Lake and later, where AVX-512 is switched off.
#if defined(__x86_64__)
#include <algorithm>
#include <array>
#include <cstring>
#include <utility>

#include "kernels.h"

#pragma GCC target("avx2,fma,f16c,avxvnni")
#include <immintrin.h>

#include "vector256.inl"
#include "kernels.inl"

const moedge::Kernels moedge::AVX_VNNI = MOEDGE_KERNELS("avx-vnni");
#endif
