#include <cstring>

#include "common.h"
#include "sums.h"

namespace fasttx::bindings {
namespace {

// What both directions take, as the ops' schemas list it.
struct Call {
  const Tensor &token_ids, &token_weight;
  const OptionalTensor &position_ids, &position_weight, &segment_ids, &segment_weight, &norm_weight, &norm_bias;
  double token_scale;
  int64_t offset;
  double eps, dropout_p;
  const OptionalTensor& seed;
};

// The call's tensors, dense, and what a kernel is told of them.
struct Operands {
  int dtype;
  Tensor token_ids, token_weight;
  OptionalTensor position_ids, position_weight, segment_ids, segment_weight, norm_weight, norm_bias;
  Embedding args;
};

// Throws unless the ids, where present, are int64 of these sizes, each of them below `entries`.
void check_ids(const OptionalTensor& ids, const Sizes& sizes, int64_t entries, const char* name) {
  if (!ids.has_value()) return;
  STD_TORCH_CHECK(ids->is_cpu() && ids->scalar_type() == ScalarType::Long, name, " must be int64 on the CPU");
  STD_TORCH_CHECK(sizes_of(*ids) == sizes, name, " must have the sizes of token_ids");
  const auto* values = static_cast<const int64_t*>(data(ids));
  for (int64_t i = 0; i < ids->numel(); ++i) {
    STD_TORCH_CHECK(0 <= values[i] && values[i] < entries, name, " holds ", values[i], ", which is not in [0, ",
                    entries - 1, "]");
  }
}

void check_table(const OptionalTensor& weight, const Tensor& like, const char* name) {
  if (!weight.has_value()) return;
  check_like(weight, like, name);
  STD_TORCH_CHECK(weight->dim() == 2 && weight->size(1) == like.size(1), name, " must be as wide as token_weight");
}

Operands operands(const Call& call) {
  const int dtype = dtype_index(call.token_weight, "token_weight");
  STD_TORCH_CHECK(call.token_weight.dim() == 2 && call.token_weight.size(1) > 0, "token_weight must be (entries, width)");
  const int64_t width = call.token_weight.size(1), dims = call.token_ids.dim(), rows = call.token_ids.numel();
  const int64_t length = dims == 0 ? 1 : call.token_ids.size(dims - 1);
  check_table(call.position_weight, call.token_weight, "position_weight");
  check_table(call.segment_weight, call.token_weight, "segment_weight");
  check_like(call.norm_weight, call.token_weight, "norm_weight", {width});
  check_like(call.norm_bias, call.token_weight, "norm_bias", {width});
  STD_TORCH_CHECK(call.norm_weight.has_value() || !call.norm_bias.has_value(), "norm_bias needs a norm_weight");
  STD_TORCH_CHECK(call.position_weight.has_value() || !call.position_ids.has_value(),
                  "position_ids need a position_weight");
  STD_TORCH_CHECK(call.segment_weight.has_value() || !call.segment_ids.has_value(), "segment_ids need a segment_weight");

  Operands o{dtype, dense(call.token_ids), dense(call.token_weight), dense(call.position_ids),
             dense(call.position_weight), dense(call.segment_ids), dense(call.segment_weight), dense(call.norm_weight),
             dense(call.norm_bias), {}};
  const Sizes sizes = sizes_of(call.token_ids);
  check_ids(o.token_ids, sizes, call.token_weight.size(0), "token_ids");
  if (o.position_weight.has_value()) {
    const int64_t positions = o.position_weight->size(0);
    check_ids(o.position_ids, sizes, positions, "position_ids");
    STD_TORCH_CHECK(o.position_ids.has_value() || rows == 0 ||
                        (0 <= call.offset && call.offset <= positions - length),
                    "positions ", call.offset, " to ", call.offset + length - 1, " are not in [0, ", positions - 1, "]");
  }
  if (o.segment_weight.has_value()) {
    check_ids(o.segment_ids, sizes, o.segment_weight->size(0), "segment_ids");
    STD_TORCH_CHECK(o.segment_weight->size(0) > 0, "segment_weight has no entries");
  }
  const auto ids = [](const OptionalTensor& tensor) { return static_cast<const int64_t*>(data(tensor)); };
  o.args = {ids(o.token_ids), ids(o.position_ids), ids(o.segment_ids), data(o.token_weight), data(o.position_weight),
            data(o.segment_weight), data(o.norm_weight), data(o.norm_bias), rows, width, length, call.offset,
            call.token_scale, call.eps, make_dropout(call.dropout_p, call.seed)};
  return o;
}

Sizes output_sizes(const Tensor& token_ids, int64_t width) {
  Sizes sizes = sizes_of(token_ids);
  sizes.push_back(width);
  return sizes;
}

// The dense gradient of a table: rows of dx that share an entry are summed in their order, by that entry.
template <class EntryOf>
Tensor table_gradient(int dtype, const Tensor& weight, const void* dx, int64_t rows, double scale, int64_t padding,
                      const EntryOf& entry_of) {
  Tensor gradient = allocate(sizes_of(weight), weight.scalar_type());
  const int64_t width = weight.size(1), row_bytes = width * weight.element_size();
  torch::stable::parallel_for(0, weight.size(0), std::max<int64_t>(1, (1 << 16) / row_bytes),
                              [&](int64_t begin, int64_t end) {
                                std::memset(static_cast<char*>(out(gradient)) + begin * row_bytes, 0,
                                            (end - begin) * row_bytes);
                              });
  // Keys that sort by entry, then by row.
  std::vector<int64_t> order;
  order.reserve(rows);
  for (int64_t row = 0; row < rows; ++row)
    if (entry_of(row) != padding) order.push_back(entry_of(row) * rows + row);
  std::sort(order.begin(), order.end());
  std::vector<int64_t> starts, entries;
  for (size_t i = 0; i < order.size(); ++i) {
    const int64_t entry = order[i] / rows;
    order[i] %= rows;
    if (!entries.empty() && entries.back() == entry) continue;
    starts.push_back(i);
    entries.push_back(entry);
  }
  starts.push_back(order.size());
  launch(table().list_sum[dtype], ListSum{dx, order.data(), starts.data(), entries.data(), out(gradient),
                                          static_cast<int64_t>(entries.size()), width, scale});
  return gradient;
}

Tensor embedding_fwd(const Tensor& token_ids, const Tensor& token_weight, const OptionalTensor& position_ids,
                     const OptionalTensor& position_weight, const OptionalTensor& segment_ids,
                     const OptionalTensor& segment_weight, const OptionalTensor& norm_weight,
                     const OptionalTensor& norm_bias, double token_scale, int64_t offset, double eps, double dropout_p,
                     const OptionalTensor& seed, int64_t) {
  const Operands o = operands({token_ids, token_weight, position_ids, position_weight, segment_ids, segment_weight,
                               norm_weight, norm_bias, token_scale, offset, eps, dropout_p, seed});
  Tensor y = allocate(output_sizes(token_ids, o.args.width), token_weight.scalar_type());
  EmbeddingFwd args;
  static_cast<Embedding&>(args) = o.args;
  args.y = out(y);
  launch(table().embedding_fwd[o.dtype], args);
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> embedding_bwd(
    const Tensor& grad, const Tensor& token_ids, const Tensor& token_weight, const OptionalTensor& position_ids,
    const OptionalTensor& position_weight, const OptionalTensor& segment_ids, const OptionalTensor& segment_weight,
    const OptionalTensor& norm_weight, const OptionalTensor& norm_bias, double token_scale, int64_t offset, double eps,
    double dropout_p, const OptionalTensor& seed, int64_t padding_idx, bool needs_token, bool needs_position,
    bool needs_segment, bool needs_norm_weight, bool needs_norm_bias) {
  const Operands o = operands({token_ids, token_weight, position_ids, position_weight, segment_ids, segment_weight,
                               norm_weight, norm_bias, token_scale, offset, eps, dropout_p, seed});
  const int64_t rows = o.args.rows, width = o.args.width, item = accumulate_size(token_weight);
  check_like(grad, token_weight, "grad", output_sizes(token_ids, width));
  STD_TORCH_CHECK(!needs_position || position_weight.has_value(), "there is no position_weight to have a gradient");
  STD_TORCH_CHECK(!needs_segment || segment_weight.has_value(), "there is no segment_weight to have a gradient");
  STD_TORCH_CHECK(!(needs_norm_weight || needs_norm_bias) || norm_weight.has_value(), "there is no layer norm");
  const Tensor dy = dense(grad);
  const Workspace dx(rows * width * item);
  const int64_t chunks = sum_chunks(rows), line = width * (needs_norm_weight + needs_norm_bias);
  const Workspace partial(chunks * line * item);
  char* first = static_cast<char*>(partial.data());
  Tensor dweight = needs_norm_weight ? allocate({width}, token_weight.scalar_type()) : nothing(token_weight);
  Tensor dbias = needs_norm_bias ? allocate({width}, token_weight.scalar_type()) : nothing(token_weight);

  EmbeddingBwd args;
  static_cast<Embedding&>(args) = o.args;
  args.dy = data(dy);
  args.dx = dx.data();
  args.dweight_partial = needs_norm_weight ? first : nullptr;
  args.dbias_partial = needs_norm_bias ? first + (needs_norm_weight ? width * item : 0) : nullptr;
  args.partial_stride = line;
  const Kernel<EmbeddingBwd>& kernel = table().embedding_bwd[o.dtype];
  if (line > 0) {
    const bool both = needs_norm_weight && needs_norm_bias;
    launch_and_sum(o.dtype, kernel, args,
                   {.partial = first, .out = needs_norm_weight ? out(dweight) : out(dbias), .rows = chunks,
                    .width = line, .row_stride = line, .tail = both ? out(dbias) : nullptr, .split = width});
  } else {
    launch(kernel, args);
  }

  const Embedding& e = o.args;
  const auto none = nothing(token_weight);
  Tensor dtoken = none, dposition = nothing(token_weight), dsegment = nothing(token_weight);
  if (needs_token) {
    dtoken = table_gradient(o.dtype, o.token_weight, dx.data(), rows, token_scale, padding_idx,
                            [&](int64_t row) { return e.token_ids[row]; });
  }
  if (needs_position) {
    dposition = table_gradient(o.dtype, *o.position_weight, dx.data(), rows, 1.0, -1, [&](int64_t row) {
      return e.position_ids == nullptr ? e.offset + row % e.length : e.position_ids[row];
    });
  }
  if (needs_segment) {
    dsegment = table_gradient(o.dtype, *o.segment_weight, dx.data(), rows, 1.0, -1,
                              [&](int64_t row) { return e.segment_ids == nullptr ? 0 : e.segment_ids[row]; });
  }
  return {dtoken, dposition, dsegment, dweight, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fasttx, CPU, m) {
  FASTTX_IMPL(m, embedding_fwd);
  FASTTX_IMPL(m, embedding_bwd);
}

}  // namespace fasttx::bindings
