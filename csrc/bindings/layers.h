// What the bindings of one operation lend to those that are made of several.
#pragma once

#include "common.h"

namespace fasttx::bindings {

inline const OptionalTensor kNone = std::nullopt;

inline int64_t width_of(const Tensor& x) { return x.size(x.dim() - 1); }

// A result within an op: a tensor of its own where that is `kept` for the backward, else in a workspace.
class Intermediate {
 public:
  Intermediate(const Sizes& sizes, const Tensor& like, bool kept);
  Tensor& operator*() { return tensor_; }
  // What the op returns of it.
  Tensor returned() const { return kept_ ? tensor_ : nothing(tensor_); }

 private:
  bool kept_;
  Workspace workspace_;
  Tensor tensor_;
};

// A view of memory with these sizes and strides, of `like`'s dtype.
Tensor view_of(void* data, const Sizes& sizes, const Sizes& strides, const Tensor& like);

// What happens to a result on its way to memory: residual + dropout(result).
struct Ending {
  const OptionalTensor& residual;
  double dropout_p;
  const OptionalTensor& seed;
};

// Writes the output, which is dense. on_vectors: as in Gemm.
void linear_forward(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& packed,
                    const Ending& ending, Tensor& output, bool on_vectors = false);
// Writes dinput, which is dense, with `residual` added to it, unless it is null; returns (dweight, dbias).
std::tuple<Tensor, Tensor> linear_backward(const Tensor& grad, const Tensor& input, const Tensor& weight,
                                           const OptionalTensor& residual, Tensor* dinput, bool needs_weight,
                                           bool needs_bias);

// Writes the output, which is dense, and returns preact. on_vectors: as in Gemm.
Tensor feed_forward_forward(const Tensor& input, const Tensor& weight1, const OptionalTensor& bias1,
                            const Tensor& weight2, const OptionalTensor& bias2, int64_t activation, double dropout_p,
                            const OptionalTensor& seed, bool store_preact, const OptionalTensor& packed1,
                            const OptionalTensor& packed2, const Ending& ending, Tensor& output,
                            bool on_vectors = false);
// `residual` is added to dinput.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> feed_forward_backward(
    const Tensor& grad, const Tensor& input, const Tensor& preact, const Tensor& weight1, const Tensor& weight2,
    int64_t activation, double dropout_p, const OptionalTensor& seed, const OptionalTensor& residual, bool needs_input,
    bool needs_weight1, bool needs_bias1, bool needs_weight2, bool needs_bias2);

Tensor layer_norm_fwd(const Tensor& input, int64_t width, const OptionalTensor& weight, const OptionalTensor& bias,
                      double eps);
std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm_bwd(const Tensor& grad, const OptionalTensor& grad_sum,
                                                              const Tensor& sum, const OptionalTensor& weight,
                                                              int64_t width, double eps, double dropout_p,
                                                              const OptionalTensor& seed, bool needs_input,
                                                              bool needs_residual, bool needs_weight, bool needs_bias);

// Everything but the tensors that both directions of attention take, as the ops' schemas list it.
struct AttentionOptions {
  const OptionalTensor &attn_mask, &key_lengths, &cu_queries, &cu_keys, &alibi_slopes;
  bool is_causal;
  int64_t query_offset, window_left, window_right;
  double dropout_p;
  const OptionalTensor& seed;
  double scale;
};

// Which of the weights that attention applies are wanted: none, those of each head, or their mean over the heads.
enum class Weights : int64_t { none, each, mean };
Weights make_weights(int64_t code);

struct AttentionResults {
  Tensor lse, stats;  // empty where they are not wanted
  Tensor weights;     // (batch, heads, queries, keys), the mean (batch, queries, keys), or empty
};
// Writes the output, which has unit rows; weights need stats.
AttentionResults attention_forward(const Tensor& query, const Tensor& key, const Tensor& value,
                                   const AttentionOptions& options, bool with_stats, Weights weights, Tensor& output);
// What reaches the results of a forward; its weights, by their dimensions.
struct AttentionGradients {
  const Tensor& output;
  const OptionalTensor &lse, &weights;
};
// Writes the gradients, which have unit rows.
void attention_backward(const AttentionGradients& grads, const Tensor& query, const Tensor& key, const Tensor& value,
                        const Tensor& output, const Tensor& stats, const AttentionOptions& options, Tensor& dquery,
                        Tensor& dkey, Tensor& dvalue);

// What both directions of self-attention over a layer's input take beside tensors that get gradients.
struct SelfAttention {
  int64_t heads;
  bool batch_first;
  const OptionalTensor &attn_mask, &cu_seqlens;
  bool is_causal;
  double scale, attention_p;
  const OptionalTensor& attention_seed;
};

// Writes the output, which is dense; returns (qkv, attended, stats, weights), empty without `store`, and weights where
// they are not wanted. x is dense.
std::tuple<Tensor, Tensor, Tensor, Tensor> self_attention_forward(
    const Tensor& x, const Tensor& weight_in, const OptionalTensor& bias_in, const Tensor& weight_out,
    const OptionalTensor& bias_out, const SelfAttention& of, bool store, Weights weights,
    const OptionalTensor& packed_in, const OptionalTensor& packed_out, const Ending& ending, Tensor& output);
// As linear_backward; returns (dweight_in, dbias_in, dweight_out, dbias_out).
std::tuple<Tensor, Tensor, Tensor, Tensor> self_attention_backward(
    const Tensor& grad, const OptionalTensor& grad_weights, const Tensor& x, const Tensor& weight_in, const Tensor& weight_out, const Tensor& qkv,
    const Tensor& attended, const Tensor& stats, const SelfAttention& of, const OptionalTensor& residual,
    Tensor* dinput, bool needs_weight_in, bool needs_bias_in, bool needs_weight_out, bool needs_bias_out);

}  // namespace fasttx::bindings
