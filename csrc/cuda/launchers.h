// What launches each kernel: raw pointers, a stream, and an error returned; 0 is none, driver.h has the text of others.
//
// dtype: 0 float32, 1 bfloat16, 2 float16.
#pragma once

#include "arguments.h"
#include "driver.h"

namespace fasttx::cuda {

// Lines of partial sums that a sum over so many rows is made of: a number that depends on nothing else, as the result does.
// A line is of 32 rows at least, beside which it is little to write and to read again.
inline uint32_t partial_lines(int64_t rows) {
  const int64_t lines = (rows + 31) / 32;
  return uint32_t(lines < 1 ? 1 : lines < 256 ? lines : 256);
}

extern "C" {

// tanh: whether the approximation by it.
int fasttx_cuda_gelu_fwd(const GeluFwd* args, int dtype, int tanh, Queue queue);
// args->dbias, if it is not null, has partial_lines(rows) lines.
int fasttx_cuda_gelu_bwd(const GeluBwd* args, int dtype, int tanh, Queue queue);
int fasttx_cuda_layer_norm_fwd(const LayerNormFwd* args, int dtype, Queue queue);
// args->dweight and args->dbias, if they are not null, have layer_norm_lines lines, and args->stats is there if a row is
// wide.
int fasttx_cuda_layer_norm_bwd(const LayerNormBwd* args, int dtype, Queue queue);
uint32_t fasttx_cuda_layer_norm_lines(uint32_t rows, uint32_t width, int dtype);
int fasttx_cuda_layer_norm_is_wide(uint32_t width, int dtype);
int fasttx_cuda_softmax_fwd(const SoftmaxFwd* args, int dtype, Queue queue);
int fasttx_cuda_softmax_bwd(const SoftmaxBwd* args, int dtype, Queue queue);
int fasttx_cuda_sum_partials(const SumPartials* args, int matrices, int dtype, Queue queue);

// Where problem's widths are at most kMostWidth, and dtype is 1 or 2. laden: whether something is added to scores, masks or
// drops them, or scale is not positive.
int fasttx_cuda_attention_fwd(const AttentionFwd* args, int dtype, int laden, Queue queue);
// laden is the forward's; rows has one for each of its rows.
int fasttx_cuda_attention_bwd(const AttentionBwd* args, int dtype, Queue queue);
// args->bwd as for fasttx_cuda_attention_bwd, but for the gradients; its mask is additive.
int fasttx_cuda_attention_bias_bwd(const AttentionBiasBwd* args, int dtype, Queue queue);
// Where a group has at most kMostRows queries in a sequence.
int fasttx_cuda_attention_decode(const AttentionDecode* args, int dtype, Queue queue);
int fasttx_cuda_mask_tiles(const MaskTiles* args, int sequences, int dtype, Queue queue);
int fasttx_cuda_keys_seen(const KeysSeen* args, int sequences, Queue queue);

}  // extern "C"

}  // namespace fasttx::cuda

// The kernels of an image that differ in their dtype, in its order.
#define FASTTX_BY_DTYPE(image, name) {image, name "_float"}, {image, name "_bf16"}, {image, name "_fp16"}
