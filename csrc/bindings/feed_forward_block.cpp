// The feed-forward half of a transformer layer: norm(x + dropout(f(x))), or x + f(norm(x)), the latter in inference only.
#include "layers.h"

namespace fasttx::bindings {
namespace {

// (output, preact, sum): all but the first are what the backward reads.
std::tuple<Tensor, Tensor, Tensor> feed_forward_block_fwd(
    const Tensor& input, const Tensor& weight1, const OptionalTensor& bias1, const Tensor& weight2,
    const OptionalTensor& bias2, const OptionalTensor& norm_weight, const OptionalTensor& norm_bias, double eps,
    bool norm_first, int64_t activation, double dropout1_p, const OptionalTensor& seed1, double dropout2_p,
    const OptionalTensor& seed2, bool store, const OptionalTensor& packed1, const OptionalTensor& packed2,
    bool decodes) {
  const Tensor x = dense(input);
  const Tensor y = norm_first ? layer_norm_fwd(x, width_of(x), norm_weight, norm_bias, eps) : x;
  Intermediate sum(sizes_of(x), x, store || norm_first);
  const Tensor preact = feed_forward_forward(y, weight1, bias1, weight2, bias2, activation, dropout1_p, seed1, store,
                                             packed1, packed2, {x, dropout2_p, seed2}, *sum, decodes);
  if (norm_first) return {*sum, nothing(x), nothing(x)};
  return {layer_norm_fwd(*sum, width_of(x), norm_weight, norm_bias, eps), preact, sum.returned()};
}

// Gradients of input, weight1, bias1, weight2, bias2, norm_weight and norm_bias.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> feed_forward_block_bwd(
    const Tensor& grad, const Tensor& input, const Tensor& weight1, const Tensor& weight2,
    const OptionalTensor& norm_weight, const Tensor& preact, const Tensor& sum, double eps,
    int64_t activation, double dropout1_p, const OptionalTensor& seed1, double dropout2_p, const OptionalTensor& seed2,
    bool needs_input, bool needs_weight1, bool needs_bias1, bool needs_weight2, bool needs_bias2,
    bool needs_norm_weight, bool needs_norm_bias) {
  const bool dropped = dropout2_p > 0.0;
  auto [dsum, dinput, dnorm_weight, dnorm_bias] =
      add_layer_norm_bwd(grad, kNone, sum, norm_weight, width_of(sum), eps, dropout2_p, seed2, dropped, true,
                         needs_norm_weight, needs_norm_bias);
  auto [dx, dweight1, dbias1, dweight2, dbias2] =
      feed_forward_backward(dropped ? dinput : dsum, input, preact, weight1, weight2, activation, dropout1_p, seed1,
                            dsum, needs_input, needs_weight1, needs_bias1, needs_weight2, needs_bias2);
  return {dx, dweight1, dbias1, dweight2, dbias2, dnorm_weight, dnorm_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fasttx, CPU, m) {
  FASTTX_IMPL(m, feed_forward_block_fwd);
  FASTTX_IMPL(m, feed_forward_block_bwd);
}

}  // namespace fasttx::bindings
