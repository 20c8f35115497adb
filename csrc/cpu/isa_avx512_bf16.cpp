// Only C headers here: an inline C++ function shared with another unit could end up compiled for this instruction set.
#include <immintrin.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "kernels.h"

#define FASTTX_ISA avx512_bf16

namespace fasttx {
namespace FASTTX_ISA {
#include "vec_avx512.h"
#include "isa.inl"
}  // namespace FASTTX_ISA

extern const KernelTable kAvx512Bf16Table;
constexpr KernelTable kAvx512Bf16Table = FASTTX_ISA::kTable;

}  // namespace fasttx
