#include "cpu/capability.h"

// What every CPU of the architecture has.
#define REFINEDET_VECTOR_BYTES 16
#ifdef __aarch64__
#define REFINEDET_VECTOR_REGISTERS 32
#else
#define REFINEDET_VECTOR_REGISTERS 16
#endif
#define REFINEDET_KERNELS kAlignConvBaseline
#include "cpu/align_conv_kernels.h"
