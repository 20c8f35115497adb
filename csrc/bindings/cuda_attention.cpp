#include "cuda_attention.h"

#include <cmath>

#include "../cuda/attention_tiles.h"

namespace fasttx::bindings {
namespace {

int64_t last_size(const Tensor& tensor) { return tensor.size(tensor.dim() - 1); }

OptionalTensor integers(const OptionalTensor& tensor, int64_t length, const Tensor& like, const char* name) {
  if (!tensor.has_value()) return tensor;
  STD_TORCH_CHECK(tensor->scalar_type() == ScalarType::Long && tensor->is_cuda() == like.is_cuda() && tensor->dim() == 1 &&
                      tensor->numel() == length,
                  name, " must be int64 of shape (", length, ",) on the query's device");
  return dense_beside(tensor);
}

const int64_t* integers_at(const OptionalTensor& tensor) { return static_cast<const int64_t*>(data(tensor)); }

// A bound of places, no further off than any tensor is long.
int32_t near(int64_t place) {
  return static_cast<int32_t>(std::clamp<int64_t>(place, -cuda::kFar, cuda::kFar));
}

int32_t extent(int64_t size, const char* name) {
  STD_TORCH_CHECK(size <= cuda::kFar, name, " of ", size, " are too many for the CUDA kernels");
  return static_cast<int32_t>(size);
}

Tensor allocate_tokens_first(const Tensor& like, int64_t width) {
  if (like.dim() == 3) return allocate_beside(like, {like.size(0), like.size(1), width}, like.scalar_type());
  Sizes sizes = {like.size(0), like.size(2), like.size(1), width}, strides = dense_strides(sizes);
  std::swap(sizes[1], sizes[2]);
  std::swap(strides[1], strides[2]);
  return allocate_beside(like, sizes, strides, like.scalar_type());
}

void decode(const cuda::AttentionFwd& args, const CudaAttention& call, cuda::Queue queue) {
  const cuda::AttentionProblem& problem = call.problem;
  const int32_t splits = std::max(1, (problem.keys + cuda::kSplit - 1) / cuda::kSplit);
  const int64_t rows = int64_t{1} * problem.sequences * problem.heads * problem.queries;
  STD_TORCH_CHECK(rows * splits < int64_t{1} << 31, "attention of too many rows for one launch");
  const int64_t parts = splits == 1 ? 0 : splits;
  Tensor sums = allocate_beside(call.query, {parts, rows, problem.value_width}, ScalarType::Float);
  Tensor stats = allocate_beside(call.query, {parts, rows, 2}, ScalarType::Float);
  const cuda::AttentionDecode decode{args, static_cast<float*>(out_or_null(sums)),
                                     static_cast<float2*>(out_or_null(stats)), splits, static_cast<uint32_t>(rows)};
  check_launch(fasttx_cuda_attention_decode(&decode, call.dtype, queue), "attention_decode");
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_fwd(
    const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& attn_mask,
    const OptionalTensor& key_lengths, const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k,
    const OptionalTensor& alibi_slopes, bool is_causal, int64_t query_offset, int64_t window_left, int64_t window_right,
    double dropout_p, const OptionalTensor& seed, double scale, bool with_lse, int64_t weights) {
  STD_TORCH_CHECK(weights == 0, "the CUDA kernels do not give the weights that attention applies");
  const CudaPlace place(query);
  const CudaAttention call(query, key, value,
                           {attn_mask, key_lengths, cu_seqlens_q, cu_seqlens_k, alibi_slopes, is_causal, query_offset,
                            window_left, window_right, dropout_p, seed, scale},
                           false, place.queue());
  Tensor output = allocate_tokens_first(query, last_size(value));
  Sizes rows = call.row_sizes(), pairs = rows;
  pairs.push_back(2);
  Tensor lse = with_lse ? allocate_beside(query, rows, ScalarType::Float) : allocate_beside(query, {0}, ScalarType::Float);
  Tensor stats = with_lse ? allocate_beside(query, pairs, ScalarType::Float) : allocate_beside(query, {0}, ScalarType::Float);
  if (!call.is_empty()) {
    const cuda::AttentionFwd args{call.problem, rows_of(output), static_cast<float*>(out_or_null(lse)),
                                  static_cast<float*>(out_or_null(stats))};
    if (call.has_few_queries()) {
      decode(args, call, place.queue());
    } else {
      check_launch(fasttx_cuda_attention_fwd(&args, call.dtype, call.laden, place.queue()), "attention_fwd");
    }
  }
  return {output, lse, stats, nothing_beside(query)};
}

// In the memory order of the tensor that it is the gradient of, which has vector rows.
Tensor allocate_gradient(const Tensor& like) {
  if (like.is_contiguous()) return allocate_beside(like);
  const Tensor order = torch::stable::empty_like(like);
  Sizes strides(like.dim());
  for (int64_t dim = 0; dim < like.dim(); ++dim) strides[dim] = order.stride(dim);
  if (last_size(like) > 1 && strides.back() != 1) return allocate_tokens_first(like, last_size(like));
  return allocate_beside(like, sizes_of(like), strides, like.scalar_type());
}

// What both backwards read, with the tensors that its pointers lead into.
struct Backward {
  CudaPlace place;
  CudaAttention call;
  Tensor out, grad, stats, rows;
  OptionalTensor grad_lse;
  cuda::AttentionBwd args;

  Backward(const Tensor& grad_, const OptionalTensor& grad_lse_, const Tensor& query, const Tensor& key,
           const Tensor& value, const Tensor& output, const Tensor& stats_, const AttentionOptions& options,
           const OptionalTensor& grad_weights)
      : place(query), call(query, key, value, options, true, place.queue()) {
    STD_TORCH_CHECK(!grad_weights.has_value(), "the CUDA kernels do not give the weights that attention applies");
    Sizes output_sizes = sizes_of(query), pairs = call.row_sizes();
    output_sizes.back() = last_size(value);
    pairs.push_back(2);
    check_beside(output, query, "output", output_sizes);
    check_beside(grad_, query, "grad", output_sizes);
    const auto check_rows = [&](const Tensor& tensor, const Sizes& sizes, const char* name) {
      STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float && tensor.is_cuda() == query.is_cuda() &&
                          sizes_of(tensor) == sizes,
                      name, " does not fit the forward");
    };
    check_rows(stats_, pairs, "stats");
    if (grad_lse_.has_value()) check_rows(*grad_lse_, call.row_sizes(), "grad_lse");
    pairs.back() = 4;
    rows = allocate_beside(query, pairs, ScalarType::Float);
    out = with_vector_rows(output);
    grad = with_vector_rows(grad_);
    stats = dense_beside(stats_);
    grad_lse = dense_beside(grad_lse_);
    args.problem = call.problem;
    args.out = rows_of(out);
    args.grad = rows_of(grad);
    args.grad_lse = static_cast<const float*>(data(grad_lse));
    args.stats = static_cast<const float*>(data(stats));
    args.rows = static_cast<float4*>(out_or_null(rows));
    args.laden = call.laden;
  }
};

std::tuple<Tensor, Tensor, Tensor> attention_bwd(
    const Tensor& grad, const OptionalTensor& grad_lse, const Tensor& query, const Tensor& key, const Tensor& value,
    const Tensor& output, const Tensor& stats, const OptionalTensor& attn_mask, const OptionalTensor& key_lengths,
    const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k, const OptionalTensor& alibi_slopes,
    bool is_causal, int64_t query_offset, int64_t window_left, int64_t window_right, double dropout_p,
    const OptionalTensor& seed, double scale, const OptionalTensor& grad_weights) {
  Backward of(grad, grad_lse, query, key, value, output, stats,
              {attn_mask, key_lengths, cu_seqlens_q, cu_seqlens_k, alibi_slopes, is_causal, query_offset, window_left,
               window_right, dropout_p, seed, scale},
              grad_weights);
  Tensor dquery = allocate_gradient(of.call.query), dkey = allocate_gradient(of.call.key),
         dvalue = allocate_gradient(of.call.value);
  if (dquery.numel() + dkey.numel() + dvalue.numel() == 0) return {dquery, dkey, dvalue};
  of.args.dquery = rows_of(dquery);
  of.args.dkey = rows_of(dkey);
  of.args.dvalue = rows_of(dvalue);
  check_launch(fasttx_cuda_attention_bwd(&of.args, of.call.dtype, of.place.queue()), "attention_bwd");
  return {dquery, dkey, dvalue};
}

Tensor attention_bias_bwd(const Tensor& grad, const OptionalTensor& grad_lse, const Tensor& query, const Tensor& key,
                          const Tensor& value, const Tensor& output, const Tensor& stats,
                          const OptionalTensor& attn_mask, const OptionalTensor& key_lengths,
                          const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k,
                          const OptionalTensor& alibi_slopes, bool is_causal, int64_t query_offset,
                          int64_t window_left, int64_t window_right, double dropout_p, const OptionalTensor& seed,
                          double scale, const OptionalTensor& grad_weights) {
  STD_TORCH_CHECK(attn_mask.has_value() && attn_mask->scalar_type() != ScalarType::Bool,
                  "attn_mask must be floating to have a gradient");
  const Backward of(grad, grad_lse, query, key, value, output, stats,
                    {attn_mask, key_lengths, cu_seqlens_q, cu_seqlens_k, alibi_slopes, is_causal, query_offset, window_left,
                     window_right, dropout_p, seed, scale},
                    grad_weights);
  Tensor dmask = allocate_beside(query, sizes_of(*attn_mask), attn_mask->scalar_type());
  if (dmask.numel() == 0) return dmask;
  // Of no queries or no keys at all, the sums are of nothing.
  if (of.call.is_empty() || of.call.problem.keys == 0) return torch::stable::zero_(dmask);
  const auto extent_of = [&](int64_t dim) { return static_cast<int32_t>(dmask.size(dim)); };
  const cuda::AttentionBiasBwd args{of.args, out(dmask), extent_of(0), extent_of(1), extent_of(2), extent_of(3)};
  check_launch(fasttx_cuda_attention_bias_bwd(&args, of.call.dtype, of.place.queue()), "attention_bias_bwd");
  return dmask;
}

}  // namespace

Tensor with_vector_rows(const Tensor& tensor) {
  bool fits = tensor.size(tensor.dim() - 1) <= 1 || tensor.stride(tensor.dim() - 1) == 1;
  for (int64_t dim = 0; dim + 1 < tensor.dim(); ++dim) fits = fits && (tensor.size(dim) <= 1 || tensor.stride(dim) % 8 == 0);
  if (fits && reinterpret_cast<uintptr_t>(data(tensor)) % 16 == 0) return tensor;
  if (!tensor.is_contiguous()) return dense_beside(tensor);
  Tensor copy = allocate_beside(tensor);  // dense, but not where 16 bytes begin
  return torch::stable::copy_(copy, tensor);
}

cuda::Rows rows_of(const Tensor& tensor) {
  if (tensor.dim() == 3) return {data(tensor), 0, tensor.stride(1), tensor.stride(0)};
  return {data(tensor), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

CudaAttention::CudaAttention(const Tensor& q, const Tensor& k, const Tensor& v, const AttentionOptions& options,
                             bool backward, cuda::Queue queue)
    : backward(backward), dtype(cuda_dtype(q, "query")), packed(options.cu_queries.has_value()), query(q), key(k), value(v) {
  STD_TORCH_CHECK(dtype != 0, "attention's CUDA kernels are for bfloat16 and float16");
  STD_TORCH_CHECK(packed == options.cu_keys.has_value(), "cu_seqlens_q and cu_seqlens_k come together");
  check_beside(k, q, "key");
  check_beside(v, q, "value");
  const int64_t dims = packed ? 3 : 4, tokens = packed ? 0 : 2;
  STD_TORCH_CHECK(q.dim() == dims && k.dim() == dims && v.dim() == dims, "query, key and value must have ", dims,
                  " dimensions");
  const int64_t width = last_size(q), value_width = last_size(v), heads = q.size(1), kv_heads = k.size(1);
  STD_TORCH_CHECK(last_size(k) == width, "query and key differ in width");
  STD_TORCH_CHECK(width % 8 == 0 && value_width % 8 == 0 && std::max(width, value_width) <= cuda::kMostWidth,
                  "attention's CUDA kernels take heads of up to ", cuda::kMostWidth, " wide, a multiple of 8");
  STD_TORCH_CHECK(v.size(1) == kv_heads && v.size(tokens) == k.size(tokens), "key and value differ in heads or length");
  STD_TORCH_CHECK(kv_heads == 0 ? heads == 0 : heads % kv_heads == 0, "query's heads must be a multiple of key's");
  problem.heads = extent(heads, "heads");
  problem.group = kv_heads == 0 ? 1 : static_cast<int32_t>(heads / kv_heads);
  problem.queries = extent(q.size(tokens), "queries");
  problem.keys = extent(k.size(tokens), "keys");
  problem.width = static_cast<int32_t>(width);
  problem.value_width = static_cast<int32_t>(value_width);
  if (packed) {
    STD_TORCH_CHECK(!options.attn_mask.has_value() && !options.key_lengths.has_value(),
                    "packed sequences take no attn_mask and no key_lengths");
    problem.sequences = extent(std::max<int64_t>(options.cu_queries->numel(), 1) - 1, "sequences");
    cu_queries_ = integers(options.cu_queries, problem.sequences + 1, q, "cu_seqlens_q");
    cu_keys_ = integers(options.cu_keys, problem.sequences + 1, q, "cu_seqlens_k");
  } else {
    problem.sequences = extent(q.size(0), "sequences");
    STD_TORCH_CHECK(k.size(0) == q.size(0) && v.size(0) == q.size(0), "query, key and value differ in batch");
    key_lengths_ = integers(options.key_lengths, problem.sequences, q, "key_lengths");
  }
  if (options.alibi_slopes.has_value()) {
    STD_TORCH_CHECK(options.alibi_slopes->scalar_type() == ScalarType::Float && options.alibi_slopes->dim() == 1 &&
                        options.alibi_slopes->numel() == heads && options.alibi_slopes->is_cuda() == q.is_cuda(),
                    "alibi_slopes must be float32, one for each head, on the query's device");
    slopes_ = dense_beside(options.alibi_slopes);
  }
  query = with_vector_rows(q);
  key = with_vector_rows(k);
  value = with_vector_rows(v);
  problem.query = rows_of(query);
  problem.key = rows_of(key);
  problem.value = rows_of(value);
  problem.key_lengths = integers_at(key_lengths_);
  problem.cu_queries = integers_at(cu_queries_);
  problem.cu_keys = integers_at(cu_keys_);
  problem.slopes = static_cast<const float*>(data(slopes_));
  // Row i sits at place i + query_offset; a negative side of a window is no bound.
  const bool has_hi = options.is_causal || options.window_right >= 0;
  const int64_t ahead = options.is_causal ? (options.window_right < 0 ? 0 : std::min<int64_t>(0, options.window_right))
                                          : options.window_right;
  problem.lo = options.window_left >= 0 ? near(options.query_offset - options.window_left) : -cuda::kFar;
  problem.hi = has_hi ? near(options.query_offset + ahead) : cuda::kFar;
  problem.origin = static_cast<float>(options.query_offset);
  problem.scale = static_cast<float>(options.scale);
  problem.dropout = make_cuda_dropout(options.dropout_p, options.seed, q);
  seed_ = options.seed;
  if (options.attn_mask.has_value() && !is_empty() && problem.keys > 0)
    add_mask(*options.attn_mask, {q.size(0), heads, q.size(2), k.size(2)}, queue);
  problem.scaled = problem.mask.kind >= cuda::MaskKind::additive || problem.slopes != nullptr || !(problem.scale > 0.f);
  laden = problem.scaled || problem.mask.kind != cuda::MaskKind::none || problem.seen != nullptr ||
          problem.dropout.active;
}

void CudaAttention::add_mask(const Tensor& mask, const Sizes& sizes, cuda::Queue queue) {
  const bool boolean = mask.scalar_type() == ScalarType::Bool;
  STD_TORCH_CHECK(mask.is_cuda() == query.is_cuda() && mask.dim() == 4, "attn_mask must have 4 dimensions, on the query's device");
  STD_TORCH_CHECK(boolean || mask.scalar_type() == query.scalar_type() || mask.scalar_type() == ScalarType::Float,
                  "attn_mask must be bool, of the query's dtype, or float32");
  mask_ = mask;
  int64_t strides[4];
  for (int64_t dim = 0; dim < 4; ++dim) {
    STD_TORCH_CHECK(mask.size(dim) == 1 || mask.size(dim) == sizes[dim], "attn_mask does not broadcast: ", mask.size(dim),
                    " against ", sizes[dim]);
    strides[dim] = mask.size(dim) == 1 ? 0 : mask.stride(dim);
  }
  const auto kind = boolean                                        ? cuda::MaskKind::boolean
                    : mask.scalar_type() == ScalarType::Float ? cuda::MaskKind::additive_float
                                                                   : cuda::MaskKind::additive;
  const int64_t two = 2 * mask.element_size();
  const bool in_pairs = strides[3] == 1 && reinterpret_cast<uintptr_t>(data(mask)) % two == 0 && strides[0] % 2 == 0 &&
                        strides[1] % 2 == 0 && strides[2] % 2 == 0;
  const cuda::Mask whole{data(mask), strides[0], strides[1], strides[2], strides[3], kind, in_pairs};
  // A bias of each head keeps everything, most likely: it is not looked at.
  if ((boolean || strides[1] == 0) && (backward || !has_few_queries())) add_tiles(whole, queue);
  // A boolean mask that is the same for all queries of a sequence says nothing but which keys they see.
  const bool alike = boolean && strides[1] == 0 && strides[2] == 0;
  if (!alike) problem.mask = whole;
  if (!boolean) return;
  if (alike && strides[3] == 1) {
    problem.seen = static_cast<const uint8_t*>(whole.data);
    problem.seen_stride = strides[0];
    return;
  }
  const auto batches = static_cast<int>(strides[0] == 0 ? 1 : problem.sequences);
  seen_ = allocate_beside(query, {batches, problem.keys}, ScalarType::Byte);
  problem.seen = static_cast<const uint8_t*>(data(seen_));
  problem.seen_stride = batches == 1 ? 0 : problem.keys;
  const cuda::KeysSeen args{whole, static_cast<uint8_t*>(seen_->mutable_data_ptr()), strides[1] == 0 ? 1 : problem.heads,
                            strides[2] == 0 ? 1 : problem.queries, problem.keys};
  check_launch(fasttx_cuda_keys_seen(&args, batches, queue), "keys_seen");
}

void CudaAttention::add_tiles(const cuda::Mask& mask, cuda::Queue queue) {
  const auto batches = static_cast<int>(mask.stride_b == 0 ? 1 : problem.sequences);
  const int32_t heads = mask.stride_h == 0 ? 1 : problem.heads, queries = mask.stride_q == 0 ? 1 : problem.queries;
  const int64_t down = (queries + cuda::kTileQueries - 1) / cuda::kTileQueries;
  const int64_t across = (problem.keys + cuda::kTileKeys - 1) / cuda::kTileKeys;
  tiles_ = allocate_beside(query, {batches, heads, down, across}, ScalarType::Byte);
  problem.tiles = static_cast<const uint8_t*>(data(tiles_));
  const int64_t strides[] = {heads * down * across, down * across, across};
  const int64_t given[] = {mask.stride_b, mask.stride_h, mask.stride_q};
  for (int dim = 0; dim < 3; ++dim) problem.tile_strides[dim] = given[dim] == 0 ? 0 : strides[dim];
  const cuda::MaskTiles args{mask, static_cast<uint8_t*>(tiles_->mutable_data_ptr()), heads, queries, problem.keys};
  check_launch(fasttx_cuda_mask_tiles(&args, batches, dtype, queue), "mask_tiles");
}

Sizes CudaAttention::row_sizes() const {
  if (packed) return {problem.heads, problem.queries};
  return {problem.sequences, problem.heads, problem.queries};
}

FASTTX_CUDA_LIBRARY(attention, FASTTX_IMPL(m, attention_fwd); FASTTX_IMPL(m, attention_bwd); FASTTX_IMPL(m, attention_bias_bwd);)

}  // namespace fasttx::bindings
