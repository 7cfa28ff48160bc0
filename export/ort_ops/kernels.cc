// Which table of kernels this processor gets.
#include "kernels.h"

#include <cstdlib>
#include <string>

#include "abi.h"
#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace moedge {
namespace {

struct Choice {
  const Kernels* kernels;
  bool runs;
};

// The best first.
const Choice* choices(size_t& count) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  unsigned a = 0, b = 0, c = 0, d = 0;  // g++ 10 has no name for F16C
  const bool f16c = __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C) != 0;
  const bool avx2 = f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  static const Choice all[] = {{&AVX512_VNNI, avx512 && __builtin_cpu_supports("avx512vnni")},
#if defined(MOEDGE_AVX_VNNI)
                               {&AVX_VNNI, avx2 && __builtin_cpu_supports("avxvnni")},
#endif
                               {&AVX2, avx2},
                               {&PORTABLE, true}};
#elif defined(__aarch64__)
#if defined(__linux__)
  const bool dot = (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#elif defined(__APPLE__)
  const bool dot = true;
#else
  const bool dot = false;  // not known how to ask
#endif
  static const Choice all[] = {{&NEON_DOT, dot}, {&PORTABLE, true}};
#else
  static const Choice all[] = {{&PORTABLE, true}};
#endif
  count = sizeof all / sizeof all[0];
  return all;
}

}  // namespace

const Kernels& kernels() {
  size_t count = 0;
  const Choice* all = choices(count);
  const char* wanted = std::getenv("MOEDGE_CPU_ISA");
  std::string names;
  for (size_t i = 0; i < count; ++i) {
    if (!all[i].runs) continue;
    if (!wanted || !*wanted || std::string(wanted) == all[i].kernels->name) return *all[i].kernels;
    names += std::string(names.empty() ? "" : ", ") + all[i].kernels->name;
  }
  throw Invalid("MOEDGE_CPU_ISA is '" + std::string(wanted) + "'; this processor runs " + names + ".");
}

}  // namespace moedge
