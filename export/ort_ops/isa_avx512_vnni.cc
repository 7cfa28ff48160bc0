// AVX-512 with VNNI: Ice Lake, Zen 4 and later.
#if defined(__x86_64__)
#include <algorithm>
#include <array>
#include <cstring>
#include <utility>

#include "kernels.h"

#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")
#include <immintrin.h>

namespace moedge {
namespace {

struct V {
  using Float = __m512;
  using Int = __m512i;
  static constexpr size_t LANES = 16, FLOAT_TILE = 12, INT_TILE = 4;

  static Float load(const float* from) { return _mm512_loadu_ps(from); }
  static Float load_half(const uint16_t* from) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  }
  static void store(float* to, Float value) { _mm512_storeu_ps(to, value); }
  static Float set(float value) { return _mm512_set1_ps(value); }
  static Float fma(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
  static Float mul(Float a, Float b) { return _mm512_mul_ps(a, b); }
  static Float to_float(Int value) { return _mm512_cvtepi32_ps(value); }
  static Int bytes(const uint8_t* from) { return _mm512_loadu_si512(from); }
  static Int set_int(int32_t value) { return _mm512_set1_epi32(value); }

  static void interleave(const uint8_t* const* rows, size_t at, Int out[4]) {
    Int r[4];
    for (int i = 0; i < 4; ++i) r[i] = _mm512_loadu_si512(rows[i] + at);
    const Int low01 = _mm512_unpacklo_epi8(r[0], r[1]), high01 = _mm512_unpackhi_epi8(r[0], r[1]);
    const Int low23 = _mm512_unpacklo_epi8(r[2], r[3]), high23 = _mm512_unpackhi_epi8(r[2], r[3]);
    out[0] = _mm512_unpacklo_epi16(low01, low23);
    out[1] = _mm512_unpackhi_epi16(low01, low23);
    out[2] = _mm512_unpacklo_epi16(high01, high23);
    out[3] = _mm512_unpackhi_epi16(high01, high23);
  }
  template <bool FOUR>
  static int32_t start(int32_t sum, int32_t) { return minus_zero(FOUR, sum); }
  static Int whole(Int bytes) { return bytes; }
  static Int low(Int bytes) { return _mm512_and_si512(bytes, _mm512_set1_epi8(15)); }
  static Int high(Int bytes) { return _mm512_and_si512(_mm512_srli_epi16(bytes, 4), _mm512_set1_epi8(15)); }
  template <bool FOUR>
  static Int dot(Int sum, Int weights, Int x) {
    // Not the intrinsic: GCC 12 copies the sum before each of them, and runs out of registers.
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(weights), "v"(x));
    return sum;
  }
  template <bool FOUR>
  static Int total(Int sum, Int start) { return _mm512_add_epi32(sum, start); }
};

}  // namespace
}  // namespace moedge

#include "kernels.inl"

const moedge::Kernels moedge::AVX512_VNNI = MOEDGE_KERNELS("avx512-vnni");
#endif
