// Only C headers here: an inline C++ function shared with another unit could end up compiled for this instruction set.
#include <immintrin.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "kernels.h"

#define FASTTX_ISA amx_float32
#define FASTTX_SPLITS

namespace fasttx {
namespace FASTTX_ISA {
#include "vec_avx512.h"
#include "isa.inl"
}  // namespace FASTTX_ISA

extern const KernelTable kAmxFloat32Table;
constexpr KernelTable kAmxFloat32Table = FASTTX_ISA::kTable;

}  // namespace fasttx
