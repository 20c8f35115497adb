// The attention half of a decoder layer over keys and values that are kept from call to call, in inference:
// norm(x + out(attention(q, keys, values))), or x + out(attention(q, keys, values)) with q of norm(x). Queries alone
// may be those of packed sequences, to as many packed sequences of keys and values.
#include <cstring>

#include "layers.h"

namespace fasttx::bindings {
namespace {

// Copies rows (B, H, T, D), a view with unit rows, to places `start` and on of `kept` (B, H, capacity, D).
void append(const Tensor& rows, Tensor& kept, int64_t start) {
  const int64_t batch = rows.size(0), heads = rows.size(1), tokens = rows.size(2), item = rows.element_size();
  const int64_t row_bytes = rows.size(3) * item;
  const char* from = static_cast<const char*>(rows.const_data_ptr());
  char* to = static_cast<char*>(kept.mutable_data_ptr()) + start * kept.stride(2) * item;
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t t = 0; t < tokens; ++t)
        memcpy(to + (b * kept.stride(0) + h * kept.stride(1) + t * kept.stride(2)) * item,
               from + (b * rows.stride(0) + h * rows.stride(1) + t * rows.stride(2)) * item, row_bytes);
}

Tensor cached_attention_block_fwd(const Tensor& input, const Tensor& weight_in, const OptionalTensor& bias_in,
                                  const Tensor& weight_out, const OptionalTensor& bias_out,
                                  const OptionalTensor& norm_weight, const OptionalTensor& norm_bias, double eps,
                                  bool norm_first, const Tensor& keys, const Tensor& values, int64_t length,
                                  const OptionalTensor& attn_mask, const OptionalTensor& cu_queries,
                                  const OptionalTensor& cu_keys, bool is_causal, double scale,
                                  const OptionalTensor& packed_in, const OptionalTensor& packed_out, bool decodes) {
  dtype_index(input, "input");
  const bool packed = cu_queries.has_value();
  STD_TORCH_CHECK(packed == cu_keys.has_value(), "cu_seqlens_q and cu_seqlens_k come together");
  STD_TORCH_CHECK(input.dim() == (packed ? 2 : 3), "input must have ", packed ? 2 : 3, " dimensions");
  const int64_t dims = packed ? 3 : 4;
  STD_TORCH_CHECK(keys.dim() == dims && sizes_of(values) == sizes_of(keys),
                  "keys and values must be of one shape, with ", dims, " dimensions");
  check_like(keys, input, "keys");
  check_like(values, input, "values");
  const Tensor x = dense(input);
  const int64_t batch = packed ? 1 : x.size(0), tokens = x.size(x.dim() - 2), heads = keys.size(1),
                head = keys.size(dims - 1), width = heads * head;
  STD_TORCH_CHECK(packed || keys.size(0) == batch, "keys and input differ in batch");
  STD_TORCH_CHECK(head <= 1 || (keys.stride(dims - 1) == 1 && values.stride(dims - 1) == 1),
                  "keys and values must have unit rows");
  STD_TORCH_CHECK(weight_in.dim() == 2 && (weight_in.size(0) == 3 * width || weight_in.size(0) == width),
                  "weight_in must be (heads * head width, in), or three times as high");
  const bool appends = weight_in.size(0) == 3 * width;
  STD_TORCH_CHECK(!(appends && packed), "packed sequences have no room for keys: weight_in must be (heads * head width, "
                                        "in)");
  const int64_t row = weight_in.size(0), seen = length + (appends ? tokens : 0), places = keys.size(packed ? 0 : 2);
  STD_TORCH_CHECK(length >= 0 && seen <= places, "keys have room for ", places, " tokens, not for ", seen);

  const Tensor y = norm_first ? layer_norm_fwd(x, width_of(x), norm_weight, norm_bias, eps) : x;
  Sizes sizes = sizes_of(x);
  sizes.back() = row;
  Intermediate projected(sizes, x, false);
  linear_forward(y, weight_in, bias_in, packed_in, {kNone, 0.0, kNone}, *projected, decodes);
  const auto heads_of = [&](Tensor& of, int64_t part, int64_t stride) {
    char* first = static_cast<char*>(of.mutable_data_ptr()) + part * width * x.element_size();
    return packed ? view_of(first, {tokens, heads, head}, {stride, head, 1}, x)
                  : view_of(first, {batch, heads, tokens, head}, {tokens * stride, head, stride, 1}, x);
  };
  const auto seen_of = [&](const Tensor& kept) {
    if (packed) return kept;
    return view_of(kept.mutable_data_ptr(), {batch, heads, seen, head},
                   {kept.stride(0), kept.stride(1), kept.stride(2), 1}, x);
  };
  Tensor key = seen_of(keys), value = seen_of(values);
  if (appends) {
    append(heads_of(*projected, 1, row), key, length);
    append(heads_of(*projected, 2, row), value, length);
  }
  sizes.back() = width;
  Intermediate attended(sizes, x, false);
  Tensor joined = heads_of(*attended, 0, width);
  attention_forward(heads_of(*projected, 0, row), key, value,
                    {attn_mask, kNone, cu_queries, cu_keys, kNone, is_causal, appends ? length : 0, -1, -1, 0.0, kNone,
                     scale},
                    false, Weights::none, joined);
  Intermediate sum(sizes_of(x), x, norm_first);
  linear_forward(*attended, weight_out, bias_out, packed_out, {x, 0.0, kNone}, *sum, decodes);
  return norm_first ? *sum : layer_norm_fwd(*sum, width_of(x), norm_weight, norm_bias, eps);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fasttx, CPU, m) { FASTTX_IMPL(m, cached_attention_block_fwd); }

}  // namespace fasttx::bindings
