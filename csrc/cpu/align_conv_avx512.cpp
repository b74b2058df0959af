#include "cpu/capability.h"

#ifdef REFINEDET_X86_TARGETS
// Before the pragma, so that no function of theirs is compiled for a CPU that may not be there.
#include <cstdint>
#include <cstring>

#pragma GCC target("avx512f,avx512vl,avx512bw,avx512dq,fma,prefer-vector-width=512")
#define REFINEDET_VECTOR_BYTES 64
#define REFINEDET_VECTOR_REGISTERS 32
#define REFINEDET_KERNELS kAlignConvAvx512
#include "cpu/align_conv_kernels.h"
#endif
