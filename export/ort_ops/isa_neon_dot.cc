// 64-bit Arm with the dot product instructions (ARMv8.2): Cortex-A76, A78AE (Jetson Orin), Neoverse, Apple and later.
#if defined(__aarch64__)
#include <algorithm>
#include <array>
#include <cstring>
#include <utility>

#include "kernels.h"

#pragma GCC target("arch=armv8.2-a+dotprod")
#include <arm_neon.h>

namespace moedge {
namespace {

struct V {
  using Float = float32x4_t;
  using Int = int32x4_t;
  static constexpr size_t LANES = 4, FLOAT_TILE = 10, INT_TILE = 4;

  static Float load(const float* from) { return vld1q_f32(from); }
  static Float load_half(const uint16_t* from) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from))); }
  static void store(float* to, Float value) { vst1q_f32(to, value); }
  static Float set(float value) { return vdupq_n_f32(value); }
  static Float fma(Float a, Float b, Float c) { return vfmaq_f32(c, a, b); }
  static Float mul(Float a, Float b) { return vmulq_f32(a, b); }
  static Float to_float(Int value) { return vcvtq_f32_s32(value); }
  static Int bytes(const uint8_t* from) { return vreinterpretq_s32_u8(vld1q_u8(from)); }
  static Int set_int(int32_t value) { return vdupq_n_s32(value); }

  static void interleave(const uint8_t* const* rows, size_t at, Int out[4]) {
    uint8x16_t r[4];
    for (int i = 0; i < 4; ++i) r[i] = vld1q_u8(rows[i] + at);
    const uint16x8_t low01 = vreinterpretq_u16_u8(vzip1q_u8(r[0], r[1]));
    const uint16x8_t high01 = vreinterpretq_u16_u8(vzip2q_u8(r[0], r[1]));
    const uint16x8_t low23 = vreinterpretq_u16_u8(vzip1q_u8(r[2], r[3]));
    const uint16x8_t high23 = vreinterpretq_u16_u8(vzip2q_u8(r[2], r[3]));
    out[0] = vreinterpretq_s32_u16(vzip1q_u16(low01, low23));
    out[1] = vreinterpretq_s32_u16(vzip2q_u16(low01, low23));
    out[2] = vreinterpretq_s32_u16(vzip1q_u16(high01, high23));
    out[3] = vreinterpretq_s32_u16(vzip2q_u16(high01, high23));
  }
  // Weights are taken minus their zero point: products are signed by signed.
  template <bool FOUR>
  static int32_t start(int32_t, int32_t) { return 0; }
  static Int whole(Int bytes) {
    return vreinterpretq_s32_u8(veorq_u8(vreinterpretq_u8_s32(bytes), vdupq_n_u8(128)));
  }
  static Int less_eight(uint8x16_t nibbles) {
    return vreinterpretq_s32_s8(vsubq_s8(vreinterpretq_s8_u8(nibbles), vdupq_n_s8(8)));
  }
  static Int low(Int bytes) { return less_eight(vandq_u8(vreinterpretq_u8_s32(bytes), vdupq_n_u8(15))); }
  static Int high(Int bytes) { return less_eight(vshrq_n_u8(vreinterpretq_u8_s32(bytes), 4)); }
  template <bool FOUR>
  static Int dot(Int sum, Int weights, Int x) {
    return vdotq_s32(sum, vreinterpretq_s8_s32(weights), vreinterpretq_s8_s32(x));
  }
  template <bool FOUR>
  static Int total(Int sum, Int) { return sum; }
};

}  // namespace
}  // namespace moedge

#include "kernels.inl"

const moedge::Kernels moedge::NEON_DOT = MOEDGE_KERNELS("neon-dot");
#endif
