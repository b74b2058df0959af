// Which instructions the CPU kernels may use; one library runs on every CPU of its architecture.
#pragma once

// Kernels for wider instructions live in their own file, which opens with `#pragma GCC target` after its includes.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define REFINEDET_X86_TARGETS 1
#endif

namespace refinedet {

enum class Capability { kBaseline = 0, kAvx2 = 1, kAvx512 = 2 };

// The best that this CPU has, unless refinedet_set_cpu_capability lowered it.
Capability cpu_capability();

}  // namespace refinedet
