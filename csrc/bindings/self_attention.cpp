// Self-attention with its projections: out(attention(q, k, v)), with q, k and v the thirds of in(x).
#include "layers.h"

namespace fasttx::bindings {
namespace {

// The tokens of the input, (batch, length, width), (length, batch, width), or packed, (tokens, width).
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

Sizes check(const Tensor& x, const Tensor& weight_in, int64_t heads) {
  STD_TORCH_CHECK(heads > 0 && weight_in.dim() == 2 && weight_in.size(0) % (3 * heads) == 0,
                  "weight_in must be (3 * heads * head width, in)");
  Sizes sizes = sizes_of(x);
  sizes.back() = weight_in.size(0);
  return sizes;  // of what in(x) gives
}

AttentionOptions attention_options(const SelfAttention& of) {
  return {of.attn_mask, kNone, of.cu_seqlens, of.cu_seqlens, kNone, of.is_causal, 0, -1, -1,
          of.attention_p, of.attention_seed, of.scale};
}

// (output, qkv, attended, stats, weights): the three in the middle are what the backward reads.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> self_attention_fwd(
    const Tensor& input, const Tensor& weight_in, const OptionalTensor& bias_in, const Tensor& weight_out,
    const OptionalTensor& bias_out, int64_t heads, bool batch_first, const OptionalTensor& attn_mask,
    const OptionalTensor& cu_seqlens, bool is_causal, double scale, double attention_p,
    const OptionalTensor& attention_seed, bool store, const OptionalTensor& packed_in,
    const OptionalTensor& packed_out, int64_t weights) {
  const Tensor x = dense(input);
  STD_TORCH_CHECK(x.dim() > 0 && weight_out.dim() == 2, "weight_out must be (out, heads * head width)");
  Sizes sizes = sizes_of(x);
  sizes.back() = weight_out.size(0);
  dtype_index(x, "input");
  Tensor output = allocate(sizes, x.scalar_type());
  auto [qkv, attended, stats, applied] = self_attention_forward(
      x, weight_in, bias_in, weight_out, bias_out,
      {heads, batch_first, attn_mask, cu_seqlens, is_causal, scale, attention_p, attention_seed}, store,
      make_weights(weights), packed_in, packed_out, {kNone, 0.0, kNone}, output);
  return {output, qkv, attended, stats, applied};
}

// Gradients of input, weight_in, bias_in, weight_out and bias_out.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> self_attention_bwd(
    const Tensor& grad, const Tensor& input, const Tensor& weight_in, const Tensor& weight_out, const Tensor& qkv,
    const Tensor& attended, const Tensor& stats, int64_t heads, bool batch_first, const OptionalTensor& attn_mask,
    const OptionalTensor& cu_seqlens, bool is_causal, double scale, double attention_p,
    const OptionalTensor& attention_seed, bool needs_input, bool needs_weight_in, bool needs_bias_in,
    bool needs_weight_out, bool needs_bias_out, const OptionalTensor& grad_weights) {
  const Tensor x = dense(input);
  Tensor dx = needs_input ? allocate_like(x) : nothing(x);
  auto [dweight_in, dbias_in, dweight_out, dbias_out] = self_attention_backward(
      grad, grad_weights, x, weight_in, weight_out, qkv, attended, stats,
      {heads, batch_first, attn_mask, cu_seqlens, is_causal, scale, attention_p, attention_seed}, kNone,
      needs_input ? &dx : nullptr, needs_weight_in, needs_bias_in, needs_weight_out, needs_bias_out);
  return {dx, dweight_in, dbias_in, dweight_out, dbias_out};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> self_attention_forward(
    const Tensor& x, const Tensor& weight_in, const OptionalTensor& bias_in, const Tensor& weight_out,
    const OptionalTensor& bias_out, const SelfAttention& of, bool store, Weights weights,
    const OptionalTensor& packed_in, const OptionalTensor& packed_out, const Ending& ending, Tensor& output) {
  const Tokens tokens(x, of.batch_first, of.cu_seqlens);
  Sizes sizes = check(x, weight_in, of.heads);
  Intermediate qkv(sizes, x, store);
  linear_forward(x, weight_in, bias_in, packed_in, {kNone, 0.0, kNone}, *qkv);
  const Heads h(tokens, *qkv, of.heads);
  sizes.back() /= 3;
  Intermediate attended(sizes, x, store);
  Tensor joined = tokens.heads(*attended, 0, 1, of.heads);
  const AttentionResults results =
      attention_forward(h.query, h.key, h.value, attention_options(of), store, weights, joined);
  linear_forward(*attended, weight_out, bias_out, packed_out, ending, output);
  return {qkv.returned(), attended.returned(), results.stats, results.weights};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> self_attention_backward(
    const Tensor& grad, const OptionalTensor& grad_weights, const Tensor& x, const Tensor& weight_in,
    const Tensor& weight_out, const Tensor& qkv, const Tensor& attended, const Tensor& stats, const SelfAttention& of,
    const OptionalTensor& residual, Tensor* dinput, bool needs_weight_in, bool needs_bias_in, bool needs_weight_out, bool needs_bias_out) {
  const Tokens tokens(x, of.batch_first, of.cu_seqlens);
  Sizes sizes = check(x, weight_in, of.heads);
  check_like(qkv, x, "qkv", sizes);
  sizes.back() /= 3;
  check_like(attended, x, "attended", sizes);
  STD_TORCH_CHECK(qkv.is_contiguous() && attended.is_contiguous(), "qkv and attended must be those of the forward");

  Intermediate dattended(sizes_of(attended), x, false), dqkv(sizes_of(qkv), x, false);
  auto [dweight_out, dbias_out] =
      linear_backward(grad, attended, weight_out, kNone, &*dattended, needs_weight_out, needs_bias_out);
  const Heads h(tokens, qkv, of.heads);
  Heads d(tokens, *dqkv, of.heads);
  attention_backward({tokens.heads(*dattended, 0, 1, of.heads), kNone, grad_weights}, h.query, h.key, h.value,
                     tokens.heads(attended, 0, 1, of.heads), stats, attention_options(of), d.query, d.key, d.value);
  auto [dweight_in, dbias_in] =
      linear_backward(*dqkv, x, weight_in, residual, dinput, needs_weight_in, needs_bias_in);
  return {dweight_in, dbias_in, dweight_out, dbias_out};
}

STABLE_TORCH_LIBRARY_IMPL(fasttx, CPU, m) {
  FASTTX_IMPL(m, self_attention_fwd);
  FASTTX_IMPL(m, self_attention_bwd);
}

}  // namespace fasttx::bindings
