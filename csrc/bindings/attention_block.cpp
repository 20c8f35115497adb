// The attention half of a transformer layer: norm(x + dropout(out(attention(in(x))))), or x + out(attention(in(norm(x)))),
// the latter in inference only.
#include "layers.h"

namespace fasttx::bindings {
namespace {

// (output, qkv, attended, stats, sum): all but the first are what the backward reads.
using AttentionBlock = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

AttentionBlock attention_block_fwd(const Tensor& input, const Tensor& weight_in, const OptionalTensor& bias_in,
                                   const Tensor& weight_out, const OptionalTensor& bias_out,
                                   const OptionalTensor& norm_weight, const OptionalTensor& norm_bias, double eps,
                                   bool norm_first, int64_t heads, bool batch_first, const OptionalTensor& attn_mask,
                                   const OptionalTensor& cu_seqlens, bool is_causal, double scale, double attention_p,
                                   const OptionalTensor& attention_seed, double dropout_p, const OptionalTensor& seed,
                                   bool store, const OptionalTensor& packed_in, const OptionalTensor& packed_out) {
  const Tensor x = dense(input);
  const Tensor y = norm_first ? layer_norm_fwd(x, width_of(x), norm_weight, norm_bias, eps) : x;
  Intermediate sum(sizes_of(x), x, store || norm_first);
  auto [qkv, attended, stats, weights] = self_attention_forward(
      y, weight_in, bias_in, weight_out, bias_out,
      {heads, batch_first, attn_mask, cu_seqlens, is_causal, scale, attention_p, attention_seed}, store,
      Weights::none, packed_in, packed_out, {x, dropout_p, seed}, *sum);
  if (norm_first) return {*sum, nothing(x), nothing(x), nothing(x), nothing(x)};
  return {layer_norm_fwd(*sum, width_of(x), norm_weight, norm_bias, eps), qkv, attended, stats, sum.returned()};
}

// Gradients of input, weight_in, bias_in, weight_out, bias_out, norm_weight and norm_bias.
using AttentionBlockGradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

AttentionBlockGradients attention_block_bwd(
    const Tensor& grad, const Tensor& input, const Tensor& weight_in, const Tensor& weight_out,
    const OptionalTensor& norm_weight, const Tensor& qkv, const Tensor& attended, const Tensor& stats,
    const Tensor& sum, double eps, int64_t heads, bool batch_first,
    const OptionalTensor& attn_mask, const OptionalTensor& cu_seqlens, bool is_causal, double scale, double attention_p,
    const OptionalTensor& attention_seed, double dropout_p, const OptionalTensor& seed, bool needs_input,
    bool needs_weight_in, bool needs_bias_in, bool needs_weight_out, bool needs_bias_out, bool needs_norm_weight,
    bool needs_norm_bias) {
  const Tensor x = dense(input);
  const bool dropped = dropout_p > 0.0;
  auto [dsum, dinput, dnorm_weight, dnorm_bias] =
      add_layer_norm_bwd(grad, kNone, sum, norm_weight, width_of(sum), eps, dropout_p, seed, dropped, true,
                         needs_norm_weight, needs_norm_bias);
  Tensor dx = needs_input ? allocate_like(x) : nothing(x);
  auto [dweight_in, dbias_in, dweight_out, dbias_out] = self_attention_backward(
      dropped ? dinput : dsum, kNone, x, weight_in, weight_out, qkv, attended, stats,
      {heads, batch_first, attn_mask, cu_seqlens, is_causal, scale, attention_p, attention_seed}, dsum,
      needs_input ? &dx : nullptr, needs_weight_in, needs_bias_in, needs_weight_out, needs_bias_out);
  return {dx, dweight_in, dbias_in, dweight_out, dbias_out, dnorm_weight, dnorm_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fasttx, CPU, m) {
  FASTTX_IMPL(m, attention_block_fwd);
  FASTTX_IMPL(m, attention_block_bwd);
}

}  // namespace fasttx::bindings
