// Vectors of 256 bits, for AVX2 and, where the compiler was told so, AVX-VNNI.

namespace moedge {
namespace {

struct V {
  using Float = __m256;
  using Int = __m256i;
  static constexpr size_t LANES = 8, FLOAT_TILE = 6, INT_TILE = 2;
  static constexpr bool SIGNED = false;

  static Float load(const float* from) { return _mm256_loadu_ps(from); }
  static Float load_half(const uint16_t* from) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  }
  static void store(float* to, Float value) { _mm256_storeu_ps(to, value); }
  static Float set(float value) { return _mm256_set1_ps(value); }
  static Float fma(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
  static Float mul(Float a, Float b) { return _mm256_mul_ps(a, b); }
  static Float to_float(Int value) { return _mm256_cvtepi32_ps(value); }
  static Int bytes(const uint8_t* from) { return _mm256_loadu_si256(reinterpret_cast<const Int*>(from)); }
  static Int set_int(int32_t value) { return _mm256_set1_epi32(value); }

  static void interleave(const uint8_t* const* rows, size_t at, Int out[4]) {
    Int r[4];
    for (int i = 0; i < 4; ++i) r[i] = _mm256_loadu_si256(reinterpret_cast<const Int*>(rows[i] + at));
    const Int low01 = _mm256_unpacklo_epi8(r[0], r[1]), high01 = _mm256_unpackhi_epi8(r[0], r[1]);
    const Int low23 = _mm256_unpacklo_epi8(r[2], r[3]), high23 = _mm256_unpackhi_epi8(r[2], r[3]);
    out[0] = _mm256_unpacklo_epi16(low01, low23);
    out[1] = _mm256_unpackhi_epi16(low01, low23);
    out[2] = _mm256_unpacklo_epi16(high01, high23);
    out[3] = _mm256_unpackhi_epi16(high01, high23);
  }
  static Int whole(Int bytes) { return bytes; }
  static Int low(Int bytes) { return _mm256_and_si256(bytes, _mm256_set1_epi8(15)); }
  static Int high(Int bytes) { return _mm256_and_si256(_mm256_srli_epi16(bytes, 4), _mm256_set1_epi8(15)); }

  template <bool FOUR>
  static Int dot(Int sum, Int weights, Int x) {
#if defined(__AVXVNNI__)
    return _mm256_dpbusd_avx_epi32(sum, weights, x);
#else
    const Int ones = _mm256_set1_epi16(1);
    // 2 * 15 * 127 fits 16 bits, 2 * 255 * 127 does not: those are widened first.
    if (FOUR) return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(weights, x), ones));
    const Int even = _mm256_and_si256(weights, _mm256_set1_epi16(255)), odd = _mm256_srli_epi16(weights, 8);
    const Int x_even = _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8), x_odd = _mm256_srai_epi16(x, 8);
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(even, x_even));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(odd, x_odd));
#endif
  }
};

}  // namespace
}  // namespace moedge
