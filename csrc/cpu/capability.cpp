#include "cpu/capability.h"

#include <atomic>
#include <cstring>

namespace refinedet {
namespace {

constexpr const char* kNames[] = {"baseline", "avx2", "avx512"};

Capability detect() {
#ifdef REFINEDET_X86_TARGETS
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("fma")) {
    return Capability::kAvx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Capability::kAvx2;
#endif
  return Capability::kBaseline;
}

std::atomic<Capability>& current() {
  static std::atomic<Capability> capability{detect()};
  return capability;
}

}  // namespace

Capability cpu_capability() { return current().load(std::memory_order_relaxed); }

}  // namespace refinedet

extern "C" __attribute__((visibility("default"))) const char* refinedet_cpu_capability() {
  return refinedet::kNames[static_cast<int>(refinedet::cpu_capability())];
}

// Chooses the kernels for tests and measurements; false, and no change, where this CPU lacks the instructions.
extern "C" __attribute__((visibility("default"))) bool refinedet_set_cpu_capability(const char* name) {
  for (int i = 0; i < 3; ++i) {
    if (std::strcmp(name, refinedet::kNames[i]) == 0 && i <= static_cast<int>(refinedet::detect())) {
      refinedet::current().store(static_cast<refinedet::Capability>(i), std::memory_order_relaxed);
      return true;
    }
  }
  return false;
}
