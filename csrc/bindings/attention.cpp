#include "key_places.h"
#include "layers.h"

namespace fasttx::bindings {
namespace {

// The shape that the kernels take, and the dense tensors that its pointers lead into.
struct Problem {
  AttentionShape shape;
  bool packed;             // (total tokens, heads, width) instead of (batch, heads, tokens, width)
  int64_t total_queries;   // rows of one head on the token axis
  OptionalTensor key_lengths, cu_queries, cu_keys, alibi_slopes;
  std::optional<Workspace> key_places;
};

bool has_unit_rows(const Tensor& tensor) {
  return tensor.size(tensor.dim() - 1) <= 1 || tensor.stride(tensor.dim() - 1) == 1;
}
Tensor with_unit_rows(const Tensor& tensor) {
  return has_unit_rows(tensor) ? tensor : torch::stable::contiguous(tensor);
}

Strides strides_of(const Tensor& tensor) {
  if (tensor.dim() == 3) return {0, tensor.stride(1), tensor.stride(0)};
  return {tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

void check_int64(const Tensor& tensor, int64_t length, const char* name) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.scalar_type() == ScalarType::Long, name, " must be int64 on the CPU");
  STD_TORCH_CHECK(tensor.dim() == 1 && tensor.numel() == length, name, " must hold ", length, " values");
}

const int64_t* values_of(const OptionalTensor& tensor) { return static_cast<const int64_t*>(data(tensor)); }

// The longest sequence; throws unless the offsets rise from 0 to the number of tokens.
int64_t longest(const Tensor& offsets, int64_t total, const char* name) {
  const int64_t* at = static_cast<const int64_t*>(offsets.const_data_ptr());
  const int64_t sequences = offsets.numel() - 1;
  STD_TORCH_CHECK(at[0] == 0 && at[sequences] == total, name, " must run from 0 to ", total);
  int64_t most = 0;
  for (int64_t i = 0; i < sequences; ++i) {
    STD_TORCH_CHECK(at[i] <= at[i + 1], name, " must not decrease");
    most = std::max(most, at[i + 1] - at[i]);
  }
  return most;
}

Mask make_mask(const OptionalTensor& mask, const Tensor& query, const Sizes& sizes) {
  if (!mask.has_value()) return {nullptr, MaskKind::none, false, 0, 0, 0, 0};
  STD_TORCH_CHECK(mask->is_cpu(), "attn_mask is not on the CPU");
  const ScalarType dtype = mask->scalar_type();
  const bool boolean = dtype == ScalarType::Bool;
  STD_TORCH_CHECK(boolean || dtype == query.scalar_type() || dtype == accumulate_type(query),
                  "attn_mask must be bool, of the query's dtype, or of its accumulate type");
  STD_TORCH_CHECK(mask->dim() == 4, "attn_mask must have 4 dimensions here");
  Sizes strides(4, 0);
  for (int64_t dim = 0; dim < 4; ++dim) {
    STD_TORCH_CHECK(mask->size(dim) == 1 || mask->size(dim) == sizes[dim], "attn_mask does not broadcast: ",
                    mask->size(dim), " against ", sizes[dim]);
    if (mask->size(dim) != 1) strides[dim] = mask->stride(dim);
  }
  return {data(mask), boolean ? MaskKind::boolean : MaskKind::additive, dtype != query.scalar_type(),
          strides[0], strides[1], strides[2], strides[3]};
}

Problem make_problem(const Tensor& query, const Tensor& key, const Tensor& value, const AttentionOptions& options) {
  const bool packed = options.cu_queries.has_value();
  STD_TORCH_CHECK(packed == options.cu_keys.has_value(), "cu_seqlens_q and cu_seqlens_k come together");
  check_like(key, query, "key");
  check_like(value, query, "value");
  const int64_t dims = packed ? 3 : 4, heads_dim = 1, tokens_dim = packed ? 0 : 2;
  STD_TORCH_CHECK(query.dim() == dims && key.dim() == dims && value.dim() == dims, "query, key and value must have ",
                  dims, " dimensions");
  const int64_t width = query.size(dims - 1), heads = query.size(heads_dim), kv_heads = key.size(heads_dim);
  STD_TORCH_CHECK(key.size(dims - 1) == width, "query and key differ in width");
  STD_TORCH_CHECK(value.size(heads_dim) == kv_heads && value.size(tokens_dim) == key.size(tokens_dim),
                  "key and value differ in heads or length");
  STD_TORCH_CHECK(kv_heads == 0 ? heads == 0 : heads % kv_heads == 0, "query's heads must be a multiple of key's");

  Problem problem = {};
  problem.packed = packed;
  problem.total_queries = query.size(tokens_dim);
  AttentionShape& shape = problem.shape;
  shape.heads = heads;
  shape.kv_heads = kv_heads;
  shape.width = width;
  shape.value_width = value.size(dims - 1);
  if (packed) {
    STD_TORCH_CHECK(!options.attn_mask.has_value() && !options.key_lengths.has_value(),
                    "packed sequences take no attn_mask and no key_lengths");
    shape.batch = std::max<int64_t>(options.cu_queries->numel(), 1) - 1;
    check_int64(*options.cu_queries, shape.batch + 1, "cu_seqlens_q");
    check_int64(*options.cu_keys, shape.batch + 1, "cu_seqlens_k");
    problem.cu_queries = dense(options.cu_queries);
    problem.cu_keys = dense(options.cu_keys);
    shape.queries = longest(*problem.cu_queries, query.size(0), "cu_seqlens_q");
    shape.keys = longest(*problem.cu_keys, key.size(0), "cu_seqlens_k");
  } else {
    shape.batch = query.size(0);
    shape.queries = query.size(2);
    shape.keys = key.size(2);
    STD_TORCH_CHECK(key.size(0) == shape.batch && value.size(0) == shape.batch, "query, key and value differ in batch");
  }
  if (options.key_lengths.has_value()) {
    check_int64(*options.key_lengths, shape.batch, "key_lengths");
    problem.key_lengths = dense(options.key_lengths);
    for (int64_t b = 0; b < shape.batch; ++b) {
      const int64_t length = values_of(problem.key_lengths)[b];
      STD_TORCH_CHECK(length >= 0 && length <= shape.keys, "key_lengths must lie in [0, ", shape.keys, "]");
    }
  }
  if (options.alibi_slopes.has_value()) {
    STD_TORCH_CHECK(options.alibi_slopes->is_cpu() && options.alibi_slopes->scalar_type() == accumulate_type(query) &&
                        options.alibi_slopes->dim() == 1 && options.alibi_slopes->numel() == heads,
                    "alibi_slopes must hold one value of the accumulate type for each head");
    problem.alibi_slopes = dense(options.alibi_slopes);
  }
  shape.key_lengths = values_of(problem.key_lengths);
  shape.cu_queries = values_of(problem.cu_queries);
  shape.cu_keys = values_of(problem.cu_keys);
  shape.alibi_slopes = data(problem.alibi_slopes);
  // Positions further off than any tensor is long are all alike, and their sums must not overflow.
  constexpr int64_t kFar = int64_t{1} << 48;
  shape.query_offset = std::clamp(options.query_offset, -kFar, kFar);
  shape.window_left = std::min(options.window_left, 2 * kFar);
  shape.window_right = std::min(options.window_right, 2 * kFar);
  shape.is_causal = options.is_causal;
  shape.scale = options.scale;
  shape.mask = make_mask(options.attn_mask, query, {shape.batch, heads, shape.queries, shape.keys});
  shape.dropout = make_dropout(options.dropout_p, options.seed);
  leave_out_unseen_keys(shape, problem.key_places);
  return problem;
}

Sizes lse_sizes(const Problem& problem) {
  if (problem.packed) return {problem.shape.heads, problem.total_queries};
  return {problem.shape.batch, problem.shape.heads, problem.shape.queries};
}
Sizes stats_sizes(const Problem& problem) {
  Sizes sizes = lse_sizes(problem);
  sizes.push_back(2);
  return sizes;
}

// As (tokens, heads, width) in memory, which the next linear reads without a copy.
Tensor allocate_tokens_first(const Tensor& like, int64_t width) {
  if (like.dim() == 3) return allocate({like.size(0), like.size(1), width}, like.scalar_type());
  Sizes sizes = {like.size(0), like.size(2), like.size(1), width}, strides = dense_strides(sizes);
  std::swap(sizes[1], sizes[2]);
  std::swap(strides[1], strides[2]);
  return allocate(sizes, strides, like.scalar_type());
}
// In the memory order of the tensor that it is the gradient of.
Tensor allocate_gradient(const Tensor& like) {
  if (like.is_contiguous()) return allocate_like(like);
  Tensor gradient = torch::stable::empty_like(like);
  return has_unit_rows(gradient) ? gradient : allocate_tokens_first(like, like.size(like.dim() - 1));
}

// Whether there are so few (sequence, kv head) pairs that threads share them.
bool threads_share_pairs(const AttentionShape& shape) {
  return shape.batch * shape.kv_heads < 4 * static_cast<int64_t>(torch::stable::get_num_threads());
}

// Calls run() for all pairs in turn, so many at a time that `bytes`, of all of them, come to 16 MiB.
template <class F>
void for_waves(AttentionShape& shape, int64_t bytes, const F& run) {
  constexpr int64_t kMostBytes = int64_t{16} << 20;
  const int64_t pairs = shape.batch * shape.kv_heads, waves = std::min(pairs, (bytes + kMostBytes - 1) / kMostBytes);
  for (int64_t wave = 0; wave < waves; ++wave) {
    shape.first_pair = pairs * wave / waves;
    shape.pairs = pairs * (wave + 1) / waves - shape.first_pair;
    run();
  }
}

Sizes weights_sizes(const AttentionShape& shape, bool averages) {
  if (averages) return {shape.batch, shape.queries, shape.keys};
  return {shape.batch, shape.heads, shape.queries, shape.keys};
}

// An operand that is there, if empty: memory without a value has no address.
const void* present(const Tensor& tensor) { return tensor.numel() == 0 ? &tensor : data(tensor); }

void run_forward(int dtype, AttentionFwd args) {
  const KernelTable& kernels = table();
  const AttentionShape& shape = args.shape;
  // Without keys nothing is packed, and there would be no wave to write the zeros.
  if (shape.keys == 0 || shape.queries * (shape.heads / shape.kv_heads) <= 32 || !threads_share_pairs(shape)) {
    launch(kernels.attention_fwd[dtype], args);
    return;
  }
  // Threads share packed keys; else each packs its own, in memory that it uses again.
  const auto packed_bytes = [&](int64_t width) {
    return static_cast<int64_t>(kernels.attention_packed_bytes[dtype](args.shape, width));
  };
  for_waves(args.shape, packed_bytes(shape.width) + packed_bytes(shape.value_width), [&] {
    const Workspace k_packed(packed_bytes(shape.width)), v_packed(packed_bytes(shape.value_width));
    args.k_packed = k_packed.data();
    args.v_packed = v_packed.data();
    launch(kernels.attention_pack[dtype], AttentionPack{args.shape, args.k, args.v, args.k_strides, args.v_strides,
                                                        args.k_packed, args.v_packed});
    launch(kernels.attention_fwd[dtype], args);
  });
}

// What a backward reads: arguments without results, and the tensors that they lead into.
struct Backward {
  Problem problem;
  Tensor q, k, v, o, g, s;
  OptionalTensor dl, dw;
  std::optional<Workspace> dlse_total;
  AttentionBwd args;

  Backward(const AttentionGradients& grads, const Tensor& query, const Tensor& key, const Tensor& value,
           const Tensor& output, const Tensor& stats, const AttentionOptions& options)
      : problem(make_problem(query, key, value, options)),
        q(with_unit_rows(query)),
        k(with_unit_rows(key)),
        v(with_unit_rows(value)),
        o(with_unit_rows(output)),
        g(with_unit_rows(grads.output)),
        s(dense(stats)),
        dl(dense(grads.lse)),
        dw(dense(grads.weights)) {
    Sizes output_sizes = sizes_of(query);
    output_sizes.back() = problem.shape.value_width;
    check_like(output, query, "output", output_sizes);
    check_like(grads.output, query, "grad", output_sizes);
    const auto check_rows = [&](const Tensor& tensor, const Sizes& sizes, const char* name) {
      STD_TORCH_CHECK(tensor.is_cpu() && tensor.scalar_type() == accumulate_type(query) && sizes_of(tensor) == sizes,
                      name, " does not fit the forward");
    };
    check_rows(stats, stats_sizes(problem), "stats");
    if (dl.has_value()) check_rows(*dl, lse_sizes(problem), "grad_lse");
    args = {problem.shape, present(g), data(q), data(k), data(v), data(o), strides_of(g), strides_of(q), strides_of(k),
            strides_of(v), strides_of(o), {}, {}, {}, data(s), data(dl), nullptr, false, nullptr, nullptr, nullptr,
            nullptr};
    if (dw.has_value()) add_weights(query);
  }

 private:
  void add_weights(const Tensor& query) {
    STD_TORCH_CHECK(!problem.packed, "packed sequences give no weights");
    args.averages = dw->dim() == 3;
    check_like(dw, query, "grad_weights", weights_sizes(problem.shape, args.averages));
    if (dw->numel() == 0) return;
    args.dweights = data(dw);
    const AttentionShape& shape = problem.shape;
    dlse_total.emplace(shape.batch * shape.heads * shape.queries * accumulate_size(query));
    AttentionWeightsBwd sum = {args, dlse_total->data()};
    sum.dout = nullptr;
    launch(table().attention_weights_bwd[dtype_index(query, "query")], sum);
    args.dlse = dlse_total->data();
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_fwd(
    const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& attn_mask,
    const OptionalTensor& key_lengths, const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k,
    const OptionalTensor& alibi_slopes, bool is_causal, int64_t query_offset, int64_t window_left, int64_t window_right,
    double dropout_p, const OptionalTensor& seed, double scale, bool with_lse, int64_t weights) {
  Tensor output = allocate_tokens_first(query, value.size(value.dim() - 1));
  const AttentionResults results = attention_forward(
      query, key, value,
      {attn_mask, key_lengths, cu_seqlens_q, cu_seqlens_k, alibi_slopes, is_causal, query_offset, window_left,
       window_right, dropout_p, seed, scale},
      with_lse, make_weights(weights), output);
  return {output, results.lse, results.stats, results.weights};
}

std::tuple<Tensor, Tensor, Tensor> attention_bwd(
    const Tensor& grad, const OptionalTensor& grad_lse, const Tensor& query, const Tensor& key, const Tensor& value,
    const Tensor& output, const Tensor& stats, const OptionalTensor& attn_mask, const OptionalTensor& key_lengths,
    const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k, const OptionalTensor& alibi_slopes,
    bool is_causal, int64_t query_offset, int64_t window_left, int64_t window_right, double dropout_p,
    const OptionalTensor& seed, double scale, const OptionalTensor& grad_weights) {
  const Tensor q = with_unit_rows(query), k = with_unit_rows(key), v = with_unit_rows(value);
  Tensor dq = allocate_gradient(q), dk = allocate_gradient(k), dv = allocate_gradient(v);
  attention_backward({grad, grad_lse, grad_weights}, q, k, v, output, stats,
                     {attn_mask, key_lengths, cu_seqlens_q, cu_seqlens_k, alibi_slopes, is_causal, query_offset,
                      window_left, window_right, dropout_p, seed, scale},
                     dq, dk, dv);
  return {dq, dk, dv};
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
  const int dtype = dtype_index(query, "query");
  const Backward call({grad, grad_lse, grad_weights}, query, key, value, output, stats,
                      {attn_mask, key_lengths, cu_seqlens_q, cu_seqlens_k, alibi_slopes, is_causal, query_offset,
                       window_left, window_right, dropout_p, seed, scale});
  Tensor dmask = allocate_like(*attn_mask);
  launch(table().attention_bias_bwd[dtype], AttentionBiasBwd{call.args, out(dmask), dmask.size(0), dmask.size(1),
                                                             dmask.size(2), dmask.size(3)});
  return dmask;
}

Tensor attention_alibi_bwd(const Tensor& grad, const OptionalTensor& grad_lse, const Tensor& query, const Tensor& key,
                           const Tensor& value, const Tensor& output, const Tensor& stats,
                           const OptionalTensor& attn_mask, const OptionalTensor& key_lengths,
                           const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k,
                           const OptionalTensor& alibi_slopes, bool is_causal, int64_t query_offset,
                           int64_t window_left, int64_t window_right, double dropout_p, const OptionalTensor& seed,
                           double scale, const OptionalTensor& grad_weights) {
  STD_TORCH_CHECK(alibi_slopes.has_value(), "alibi_slopes must be given to have a gradient");
  const int dtype = dtype_index(query, "query");
  const Backward call({grad, grad_lse, grad_weights}, query, key, value, output, stats,
                      {attn_mask, key_lengths, cu_seqlens_q, cu_seqlens_k, alibi_slopes, is_causal, query_offset,
                       window_left, window_right, dropout_p, seed, scale});
  const AttentionShape& shape = call.problem.shape;
  const Workspace partial(shape.batch * shape.heads * accumulate_size(query));
  launch(table().attention_alibi_bwd[dtype], AttentionAlibiBwd{call.args, partial.data()});
  Tensor dslopes = allocate_like(*alibi_slopes);
  launch(table().reduce_rows[dtype_index(dslopes, "alibi_slopes")],
         ReduceRows{.partial = partial.data(), .out = out(dslopes), .rows = shape.batch, .width = shape.heads,
                    .row_stride = shape.heads});
  return dslopes;
}

}  // namespace

Weights make_weights(int64_t code) {
  STD_TORCH_CHECK(code >= 0 && code <= static_cast<int64_t>(Weights::mean), "weights must be 0, 1 or 2, got ", code);
  return static_cast<Weights>(code);
}

AttentionResults attention_forward(const Tensor& query, const Tensor& key, const Tensor& value,
                                   const AttentionOptions& options, bool with_stats, Weights weights, Tensor& output) {
  const int dtype = dtype_index(query, "query");
  const Problem problem = make_problem(query, key, value, options);
  const AttentionShape& shape = problem.shape;
  const bool averages = weights == Weights::mean, weighs = weights != Weights::none;
  STD_TORCH_CHECK(!weighs || !problem.packed, "packed sequences give no weights");
  STD_TORCH_CHECK(!averages || shape.heads > 0, "there are no heads to average weights over");
  const Tensor q = with_unit_rows(query), k = with_unit_rows(key), v = with_unit_rows(value);
  const bool keeps_stats = with_stats || weighs;
  AttentionResults results = {allocate(keeps_stats ? lse_sizes(problem) : Sizes{0}, accumulate_type(query)),
                              allocate(keeps_stats ? stats_sizes(problem) : Sizes{0}, accumulate_type(query)),
                              allocate(weighs ? weights_sizes(shape, averages) : Sizes{0}, query.scalar_type())};
  if (shape.batch * shape.heads * shape.queries == 0) return results;

  AttentionFwd args = {shape, data(q), data(k), data(v), strides_of(q), strides_of(k), strides_of(v),
                       strides_of(output), out(output), out_or_null(results.lse), out_or_null(results.stats), nullptr,
                       nullptr};
  run_forward(dtype, args);
  if (results.weights.numel() > 0) {
    AttentionWeightsFwd call = {};
    call.shape = shape;
    call.q = args.q;
    call.k = args.k;
    call.q_strides = args.q_strides;
    call.k_strides = args.k_strides;
    call.stats = args.stats;
    call.averages = averages;
    call.weights = out(results.weights);
    launch(table().attention_weights_fwd[dtype], call);
  }
  return results;
}

void attention_backward(const AttentionGradients& grads, const Tensor& query, const Tensor& key, const Tensor& value,
                        const Tensor& output, const Tensor& stats, const AttentionOptions& options, Tensor& dquery,
                        Tensor& dkey, Tensor& dvalue) {
  const int dtype = dtype_index(query, "query");
  const Backward call(grads, query, key, value, output, stats, options);
  AttentionBwd args = call.args;
  args.dq_strides = strides_of(dquery);
  args.dk_strides = strides_of(dkey);
  args.dv_strides = strides_of(dvalue);
  args.dq = out(dquery);
  args.dk = out(dkey);
  args.dv = out(dvalue);
  const KernelTable& kernels = table();
  const int64_t bytes = static_cast<int64_t>(kernels.attention_dq_bytes[dtype](args.shape));
  if (bytes == 0 || !threads_share_pairs(args.shape)) {
    launch(kernels.attention_bwd[dtype], args);
    return;
  }
  for_waves(args.shape, bytes * args.shape.batch * args.shape.kv_heads, [&] {
    const Workspace partial(bytes * args.shape.pairs);
    args.dq_partial = partial.data();
    launch(kernels.attention_bwd[dtype], args);
    launch(kernels.attention_dq[dtype], args);
  });
}

STABLE_TORCH_LIBRARY_IMPL(fasttx, CPU, m) {
  FASTTX_IMPL(m, attention_fwd);
  FASTTX_IMPL(m, attention_bwd);
  FASTTX_IMPL(m, attention_bias_bwd);
  FASTTX_IMPL(m, attention_alibi_bwd);
}

}  // namespace fasttx::bindings
