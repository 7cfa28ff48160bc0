// AVX-VNNI: Alder Lake and later, where AVX-512 is switched off.
#include "kernels.h"
#if defined(MOEDGE_AVX_VNNI)
#include <algorithm>
#include <array>
#include <cstring>
#include <utility>

#pragma GCC target("avx2,fma,f16c,avxvnni")
#include <immintrin.h>

#define MOEDGE_DPBUSD  // GCC does not set __AVXVNNI__ for a target that a pragma names
#include "vector256.inl"
#include "kernels.inl"

const moedge::Kernels moedge::AVX_VNNI = MOEDGE_KERNELS("avx-vnni");
#endif
