// Attention's arguments as its CUDA kernels take them.
#pragma once

#include "../cuda/attention_splits.h"
#include "cuda_common.h"
#include "layers.h"

namespace fasttx::bindings {

// A call's problem, and the tensors that its pointers lead into. Throws for what the kernels cannot take.
struct CudaAttention {
  cuda::AttentionProblem problem = {};
  bool backward;
  int dtype;    // as the launchers count
  bool packed;  // (total tokens, heads, width) instead of (batch, heads, tokens, width)
  // Whether something is added to scores, masks or drops them, so that they are kept as they are.
  bool laden;
  Tensor query, key, value;

  CudaAttention(const Tensor& query, const Tensor& key, const Tensor& value, const AttentionOptions& options, bool backward,
                cuda::Queue queue);

  // Whether the forward splits the keys, so that there are blocks enough. How many keys there are must not count, for padding.
  bool has_few_queries() const { return !packed && problem.group * problem.queries <= cuda::kMostRows; }
  bool is_empty() const { return problem.sequences == 0 || problem.heads == 0 || problem.queries == 0; }
  // Of statistics, one for each row.
  Sizes row_sizes() const;

 private:
  OptionalTensor key_lengths_, cu_queries_, cu_keys_, slopes_, mask_, seed_, seen_, tiles_;

  void add_mask(const Tensor& mask, const Sizes& sizes, cuda::Queue queue);
  void add_tiles(const cuda::Mask& mask, cuda::Queue queue);
};

// The tensor, or a copy of it, with dense rows that begin at multiples of 16 bytes.
Tensor with_vector_rows(const Tensor& tensor);
cuda::Rows rows_of(const Tensor& tensor);

}  // namespace fasttx::bindings
