// Everything that one instruction set compiles; included by every isa_*.cpp inside its own namespace, after its vec_*.h.

#include "math.h"
#include "tile.inl"
#include "philox.h"
#include "amx.inl"
#include "reduce.inl"
#include "transpose.inl"
#include "split.inl"
#include "pack.inl"
#include "gemm_operands.inl"
#include "gemm.inl"
#include "layer_norm.inl"
#include "activation.inl"
#include "softmax.inl"
#include "cross_entropy.inl"
#include "embedding.inl"
#include "attention_product.inl"
#include "attention_rows.inl"
#include "attention_tile.inl"
#include "attention_split.inl"
#include "attention_decode.inl"
#include "attention_pack.inl"
#include "attention.inl"
#include "attention_dweights.inl"
#include "attention_key_tile.inl"
#include "attention_bwd.inl"
#include "attention_dq.inl"
#include "attention_bias.inl"
#include "attention_alibi.inl"
#include "attention_weights.inl"
#include "peak.inl"

#define FASTTX_STRING_(name) #name
#define FASTTX_STRING(name) FASTTX_STRING_(name)
#define FASTTX_KERNEL(K)                                                      \
  {                                                                           \
    {&K<float>::plan, &K<float>::run}, {&K<bf16>::plan, &K<bf16>::run},       \
        {&K<fp16>::plan, &K<fp16>::run}, {&K<double>::plan, &K<double>::run}, \
  }
#define FASTTX_FUNCTION(f) {&f<float>, &f<bf16>, &f<fp16>, &f<double>}

inline constexpr KernelTable kTable = {
    .isa = FASTTX_STRING(FASTTX_ISA),
    .takes_parts = {kSplits<float>, kSplits<bf16>, kSplits<fp16>, kSplits<double>},
    .packed_b_bytes = FASTTX_FUNCTION(packed_b_bytes),
    .attention_packed_bytes = FASTTX_FUNCTION(attention_packed_bytes),
    .attention_dq_bytes = FASTTX_FUNCTION(attention_dq_bytes),
    .layer_norm_fwd = FASTTX_KERNEL(LayerNormFwdKernel),
    .layer_norm_bwd = FASTTX_KERNEL(LayerNormBwdKernel),
    .reduce_rows = FASTTX_KERNEL(ReduceRowsKernel),
    .column_sum = FASTTX_KERNEL(ColumnSumKernel),
    .activation_fwd = FASTTX_KERNEL(ActivationFwdKernel),
    .activation_bwd = FASTTX_KERNEL(ActivationBwdKernel),
    .softmax_fwd = FASTTX_KERNEL(SoftmaxFwdKernel),
    .softmax_bwd = FASTTX_KERNEL(SoftmaxBwdKernel),
    .cross_entropy_fwd = FASTTX_KERNEL(CrossEntropyFwdKernel),
    .cross_entropy_bwd = FASTTX_KERNEL(CrossEntropyBwdKernel),
    .cross_entropy_sum = FASTTX_KERNEL(CrossEntropySumKernel),
    .line_sum = FASTTX_KERNEL(LineSumKernel),
    .embedding_fwd = FASTTX_KERNEL(EmbeddingFwdKernel),
    .embedding_bwd = FASTTX_KERNEL(EmbeddingBwdKernel),
    .list_sum = FASTTX_KERNEL(ListSumKernel),
    .pack_b = FASTTX_KERNEL(PackBKernel),
    .gemm = FASTTX_KERNEL(GemmKernel),
    .attention_pack = FASTTX_KERNEL(AttentionPackKernel),
    .attention_fwd = FASTTX_KERNEL(AttentionFwdKernel),
    .attention_bwd = FASTTX_KERNEL(AttentionBwdKernel),
    .attention_dq = FASTTX_KERNEL(AttentionDqKernel),
    .attention_bias_bwd = FASTTX_KERNEL(AttentionBiasBwdKernel),
    .attention_alibi_bwd = FASTTX_KERNEL(AttentionAlibiBwdKernel),
    .attention_weights_fwd = FASTTX_KERNEL(AttentionWeightsFwdKernel),
    .attention_weights_bwd = FASTTX_KERNEL(AttentionWeightsBwdKernel),
    .peak = FASTTX_KERNEL(PeakKernel),
    .peak_step_flops = {PeakLoop<float>::kStepFlops, PeakLoop<bf16>::kStepFlops, PeakLoop<fp16>::kStepFlops,
                        PeakLoop<double>::kStepFlops},
    .read = FASTTX_KERNEL(ReadKernel),
};
