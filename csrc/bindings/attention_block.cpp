// The attention half of a transformer layer: norm(x + dropout(out(attention(in(x))))), or x + out(attention(in(norm(x)))),
// the latter in inference only.
#include "layers.h"

namespace fasttx::bindings {
namespace {

// The tokens of a block's input, (batch, length, width), (length, batch, width), or packed, (tokens, width).
struct Tokens {
  int64_t batch, length, stride_b, stride_t;  // counted in tokens
  bool packed;

  Tokens(const Tensor& x, bool batch_first, const OptionalTensor& cu_seqlens) : packed(cu_seqlens.has_value()) {
    STD_TORCH_CHECK(x.dim() == (packed ? 2 : 3), "input must have ", packed ? 2 : 3, " dimensions");
    batch = packed ? 1 : x.size(batch_first ? 0 : 1);
    length = packed ? x.size(0) : x.size(batch_first ? 1 : 0);
    stride_b = batch_first ? length : 1;
    stride_t = batch_first || packed ? 1 : batch;
  }

  // The heads of one part of a dense (..., parts * width), as attention takes them.
  Tensor heads(const Tensor& x, int64_t part, int64_t parts, int64_t count) const {
    const int64_t row = x.size(x.dim() - 1), width = row / parts, head = width / count;
    const Sizes sizes = packed ? Sizes{length, count, head} : Sizes{batch, count, length, head};
    const Sizes strides = packed ? Sizes{row, head, 1} : Sizes{stride_b * row, head, stride_t * row, 1};
    char* first = static_cast<char*>(x.mutable_data_ptr()) + part * width * x.element_size();
    return view_of(first, sizes, strides, x);
  }
};

struct Heads {
  Tensor query, key, value;
  Heads(const Tokens& tokens, const Tensor& qkv, int64_t count)
      : query(tokens.heads(qkv, 0, 3, count)),
        key(tokens.heads(qkv, 1, 3, count)),
        value(tokens.heads(qkv, 2, 3, count)) {}
};

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
  const Tokens tokens(x, batch_first, cu_seqlens);
  STD_TORCH_CHECK(heads > 0 && weight_in.dim() == 2 && weight_in.size(0) % (3 * heads) == 0,
                  "weight_in must be (3 * heads * head width, in)");
  const Tensor y = norm_first ? layer_norm_fwd(x, width_of(x), norm_weight, norm_bias, eps) : x;
  Sizes sizes = sizes_of(x);
  sizes.back() = weight_in.size(0);
  Intermediate qkv(sizes, x, store);
  linear_forward(y, weight_in, bias_in, packed_in, {kNone, 0.0, kNone}, *qkv);
  const Heads h(tokens, *qkv, heads);
  sizes.back() /= 3;
  Intermediate attended(sizes, x, store);
  Tensor output = tokens.heads(*attended, 0, 1, heads);
  const AttentionOptions options = {attn_mask, kNone, cu_seqlens, cu_seqlens, kNone, is_causal, 0, -1, -1,
                                    attention_p, attention_seed, scale};
  auto [lse, stats] = attention_forward(h.query, h.key, h.value, options, store, output);
  Intermediate sum(sizes_of(x), x, store || norm_first);
  linear_forward(*attended, weight_out, bias_out, packed_out, {x, dropout_p, seed}, *sum);
  if (norm_first) return {*sum, nothing(x), nothing(x), nothing(x), nothing(x)};
  return {layer_norm_fwd(*sum, width_of(x), norm_weight, norm_bias, eps), qkv.returned(), attended.returned(), stats,
          sum.returned()};
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
  const Tokens tokens(x, batch_first, cu_seqlens);
  STD_TORCH_CHECK(heads > 0 && weight_in.dim() == 2 && weight_in.size(0) % (3 * heads) == 0,
                  "weight_in must be (3 * heads * head width, in)");
  Sizes sizes = sizes_of(x);
  sizes.back() = weight_in.size(0);
  check_like(qkv, x, "qkv", sizes);
  sizes.back() /= 3;
  check_like(attended, x, "attended", sizes);
  STD_TORCH_CHECK(qkv.is_contiguous() && attended.is_contiguous(), "qkv and attended must be those of the forward");

  const bool dropped = dropout_p > 0.0;
  auto [dsum, dinput, dnorm_weight, dnorm_bias] =
      add_layer_norm_bwd(grad, kNone, sum, norm_weight, width_of(sum), eps, dropout_p, seed, dropped, true,
                         needs_norm_weight, needs_norm_bias);
  Intermediate dattended(sizes_of(attended), x, false), dqkv(sizes_of(qkv), x, false);
  auto [dweight_out, dbias_out] = linear_backward(dropped ? dinput : dsum, attended, weight_out, kNone, &*dattended,
                                                  needs_weight_out, needs_bias_out);
  const Heads h(tokens, qkv, heads);
  Heads d(tokens, *dqkv, heads);
  const AttentionOptions options = {attn_mask, kNone, cu_seqlens, cu_seqlens, kNone, is_causal, 0, -1, -1,
                                    attention_p, attention_seed, scale};
  attention_backward(tokens.heads(*dattended, 0, 1, heads), kNone, h.query, h.key, h.value,
                     tokens.heads(attended, 0, 1, heads), stats, options, d.query, d.key, d.value);
  Tensor dx = needs_input ? allocate_like(x) : nothing(x);
  auto [dweight_in, dbias_in] =
      linear_backward(*dqkv, x, weight_in, dsum, needs_input ? &dx : nullptr, needs_weight_in, needs_bias_in);
  return {dx, dweight_in, dbias_in, dweight_out, dbias_out, dnorm_weight, dnorm_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fasttx, CPU, m) {
  FASTTX_IMPL(m, attention_block_fwd);
  FASTTX_IMPL(m, attention_block_bwd);
}

}  // namespace fasttx::bindings
