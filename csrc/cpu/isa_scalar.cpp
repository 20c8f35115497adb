// Only C headers here: an inline C++ function shared with another unit could end up compiled for this instruction set.
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "kernels.h"

#define FASTTX_ISA scalar

namespace fasttx {
namespace FASTTX_ISA {
#include "vec_scalar.h"
#include "isa.inl"
}  // namespace FASTTX_ISA

extern const KernelTable kScalarTable;
constexpr KernelTable kScalarTable = FASTTX_ISA::kTable;

}  // namespace fasttx
