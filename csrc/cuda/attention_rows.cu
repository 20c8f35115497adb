#include "attention_bwd.cuh"

#define FASTTX_ATTENTION_ROWS(T)                                              \
  extern "C" __global__ void __launch_bounds__(fasttx::cuda::kAttentionThreads) \
      attention_rows_##T(const __grid_constant__ fasttx::cuda::AttentionBwd args) { \
    fasttx::cuda::attention_rows<fasttx::cuda::T>(args);                      \
  }
FASTTX_ATTENTION_ROWS(bf16)
FASTTX_ATTENTION_ROWS(fp16)
