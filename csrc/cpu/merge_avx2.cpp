#include "cpu/capability.h"

#ifdef REFINEDET_X86_TARGETS
// Before the pragma, so that no function of theirs is compiled for a CPU that may not be there.
#include <algorithm>
#include <cfloat>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

#pragma GCC target("avx2")  // without fma: sums are not fused, so that every CPU gives the same digits
#define REFINEDET_VECTOR_BYTES 32
#define REFINEDET_KERNELS kMergeAvx2
#include "cpu/merge_kernels.h"
#endif
