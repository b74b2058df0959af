// One function compiled for several instruction sets; the loader takes the best that the CPU has.
#pragma once

// What a marked function calls is inlined into it, so that it is compiled for the same instructions.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define REFINEDET_CLONES __attribute__((target_clones("default", "arch=haswell", "arch=skylake-avx512")))
#else
#define REFINEDET_CLONES
#endif
#define REFINEDET_INLINE __attribute__((always_inline)) inline
