// Vectors of 256 bits, for AVX2 and, where the compiler was told so, AVX-VNNI.

namespace moedge {
namespace {

struct V {
  using Float = __m256;
  using Int = __m256i;
  static constexpr size_t LANES = 8, FLOAT_TILE = 6, INT_TILE = 2;

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

#if defined(MOEDGE_DPBUSD)
  template <bool FOUR>
  static int32_t start(int32_t sum, int32_t) { return minus_zero(FOUR, sum); }
  template <bool FOUR>
  static Int dot(Int sum, Int weights, Int x) { return _mm256_dpbusd_avx_epi32(sum, weights, x); }
  template <bool FOUR>
  static Int total(Int sum, Int start) { return _mm256_add_epi32(sum, start); }
#else
  // Without VNNI pairs of products are summed in 16 bits (vpmaddubsw: unsigned by signed). Four bits: a block's 16 pairs
  // are at most 8 * 2 * 15 * 127 in a lane, so they are widened once a block. Eight bits: 2 * 255 * 127 is too large, so
  // |x| is multiplied by weights as signed bytes, at most 2 * 128 * 127. Where x is negative all their bits are turned,
  // which makes w - 128 into 127 - w; the products are then x (w - 128) + x, and `start` takes that x away again.
  template <bool FOUR>
  static int32_t start(int32_t sum, int32_t negative) { return FOUR ? minus_zero(FOUR, sum) : -negative; }
  template <bool FOUR>
  static Int dot(Int sum, Int weights, Int x) {
    if (FOUR) return _mm256_add_epi16(sum, _mm256_maddubs_epi16(weights, x));
    const Int turn = _mm256_xor_si256(_mm256_cmpgt_epi8(_mm256_setzero_si256(), x), _mm256_set1_epi8(-128));
    const Int pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(x), _mm256_xor_si256(weights, turn));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
  template <bool FOUR>
  static Int total(Int sum, Int start) {
    return _mm256_add_epi32(FOUR ? _mm256_madd_epi16(sum, _mm256_set1_epi16(1)) : sum, start);
  }
#endif
};

}  // namespace
}  // namespace moedge
