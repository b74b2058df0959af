#include "cpu/capability.h"

// What every CPU of the architecture has. Sums are not fused, so that every CPU gives the same digits.
#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#elif !defined(REFINEDET_X86_TARGETS)
#pragma GCC optimize("fp-contract=off")
#endif
#define REFINEDET_VECTOR_BYTES 16
#define REFINEDET_KERNELS kMergeBaseline
#include "cpu/merge_kernels.h"
