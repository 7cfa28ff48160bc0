// Plain C++ on vectors of four, for any processor; also the reference of the other files.
#include <algorithm>
#include <array>
#include <cstring>
#include <utility>

#include "kernels.h"

namespace moedge {
namespace {

struct V {
  typedef float Float __attribute__((vector_size(16)));
  typedef int32_t Int __attribute__((vector_size(16)));
  typedef uint8_t Bytes __attribute__((vector_size(16)));
  static constexpr size_t LANES = 4, FLOAT_TILE = 4, INT_TILE = 2;

  static Float load(const float* from) {
    Float value;
    std::memcpy(&value, from, sizeof value);
    return value;
  }
  static float to_single(uint16_t half) {
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16, exponent = half >> 10 & 31, rest = half & 1023;
    float value;
    if (exponent == 0) {
      value = static_cast<float>(rest) / 16777216.0f;  // 2^-24 each
    } else {
      const uint32_t bits = (exponent == 31 ? 255u << 23 : (exponent + 112) << 23) | rest << 13;
      std::memcpy(&value, &bits, sizeof value);
    }
    return sign ? -value : value;
  }
  static Float load_half(const uint16_t* from) {
    return Float{to_single(from[0]), to_single(from[1]), to_single(from[2]), to_single(from[3])};
  }
  static void store(float* to, Float value) { std::memcpy(to, &value, sizeof value); }
  static Float set(float value) { return Float{value, value, value, value}; }
  static Float fma(Float a, Float b, Float c) { return a * b + c; }
  static Float mul(Float a, Float b) { return a * b; }
  static Float to_float(Int value) { return __builtin_convertvector(value, Float); }
  static Int bytes(const uint8_t* from) {
    Int value;
    std::memcpy(&value, from, sizeof value);
    return value;
  }
  static Int set_int(int32_t value) { return Int{value, value, value, value}; }

  static void interleave(const uint8_t* const* rows, size_t at, Int out[4]) {
    uint8_t bytes[64];
    for (int column = 0; column < 16; ++column)
      for (int row = 0; row < 4; ++row) bytes[4 * column + row] = rows[row][at + column];
    std::memcpy(out, bytes, sizeof bytes);
  }
  template <bool FOUR>
  static int32_t start(int32_t sum, int32_t) { return minus_zero(FOUR, sum); }
  static Int whole(Int bytes) { return bytes; }
  static Int low(Int bytes) { return (Int)((Bytes)bytes & 15); }
  static Int high(Int bytes) { return (Int)((Bytes)bytes >> 4); }
  template <bool FOUR>
  static Int dot(Int sum, Int weights, Int x) {
    uint8_t w[16];
    int8_t v[16];
    std::memcpy(w, &weights, sizeof w);
    std::memcpy(v, &x, sizeof v);
    for (int lane = 0; lane < 4; ++lane)
      for (int i = 0; i < 4; ++i) sum[lane] += static_cast<int32_t>(w[4 * lane + i]) * v[4 * lane + i];
    return sum;
  }
  template <bool FOUR>
  static Int total(Int sum, Int start) { return sum + start; }
};

}  // namespace
}  // namespace moedge

#include "kernels.inl"

const moedge::Kernels moedge::PORTABLE = MOEDGE_KERNELS("portable");
