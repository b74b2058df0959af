// One function compiled for several instruction sets; the loader takes the best that the CPU has.
#pragma once

// Named by what they compute with: `arch=haswell` and the like test for the maker's name, and leave AMD's CPUs at the
// default. What a marked function calls is inlined into it, so that it is compiled for the same instructions.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define REFINEDET_CLONES __attribute__((target_clones("default", "avx2", "avx512f")))
#else
#define REFINEDET_CLONES
#endif
#define REFINEDET_INLINE __attribute__((always_inline)) inline
