#include "cpu/capability.h"

#ifdef REFINEDET_X86_TARGETS
// Before the pragma, so that no function of theirs is compiled for a CPU that may not be there.
#include <cstdint>
#include <cstring>

#pragma GCC target("avx2,fma")
#define REFINEDET_VECTOR_BYTES 32
#define REFINEDET_VECTOR_REGISTERS 16
#define REFINEDET_KERNELS kAlignConvAvx2
#include "cpu/align_conv_kernels.h"
#endif
