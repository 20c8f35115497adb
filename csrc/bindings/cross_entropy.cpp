// The cross-entropy of a linear layer's output, made a tile of rows and classes at a time, so that no more of it is there at
// once. Rows that are ignored are left out before the first product.
#include <cstring>

#include "matmul.h"
#include "sums.h"

namespace fasttx::bindings {
namespace {

// A tile. Classes are cut at fixed places: a row's result does not depend on the rows beside it.
constexpr int64_t kTileRows = 512, kTileClasses = 1024;

enum class Reduction : int64_t { none, mean, sum };

struct Shape {
  int dtype;
  int64_t rows, width, classes, item, accumulator;  // the last two: bytes of T and of A
  Reduction reduction;
};

Shape check(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, const Tensor& target,
            double label_smoothing, int64_t reduction) {
  const int dtype = dtype_index(input, "input");
  STD_TORCH_CHECK(weight.dim() == 2 && input.dim() >= 1 && input.size(input.dim() - 1) == weight.size(1),
                  "weight must be (classes, in) with `in` the input's width");
  STD_TORCH_CHECK(weight.size(0) > 0 && weight.size(1) > 0, "weight is empty");
  check_like(weight, input, "weight");
  check_like(bias, input, "bias", {weight.size(0)});
  STD_TORCH_CHECK(target.is_cpu() && target.scalar_type() == ScalarType::Long, "target must be int64 on the CPU");
  Sizes rows = sizes_of(input);
  rows.pop_back();
  STD_TORCH_CHECK(sizes_of(target) == rows, "target must have the input's sizes but the last");
  STD_TORCH_CHECK(0.0 <= label_smoothing && label_smoothing <= 1.0, "label_smoothing must be in [0, 1]");
  STD_TORCH_CHECK(0 <= reduction && reduction <= 2, "reduction must be 0, 1 or 2");
  return {dtype, target.numel(), weight.size(1), weight.size(0), static_cast<int64_t>(input.element_size()),
          accumulate_size(input),
          static_cast<Reduction>(reduction)};
}

Sizes stats_sizes(const Tensor& target) {
  Sizes sizes = sizes_of(target);
  sizes.push_back(2);
  return sizes;
}

// The rows that count, by their places in the input; throws where a target is no class.
std::vector<int64_t> places_of(const Tensor& target, int64_t ignore_index, int64_t classes) {
  const auto* targets = static_cast<const int64_t*>(data(target));
  std::vector<int64_t> places;
  places.reserve(target.numel());
  for (int64_t i = 0; i < target.numel(); ++i) {
    if (targets[i] == ignore_index) continue;
    STD_TORCH_CHECK(0 <= targets[i] && targets[i] < classes, "target ", targets[i], " is neither in [0, ", classes - 1,
                    "] nor ignore_index, ", ignore_index);
    places.push_back(i);
  }
  return places;
}

// The input's rows that count, one after the other: the input itself where all do.
class Rows {
 public:
  Rows(const Tensor& input, const Shape& s, const std::vector<int64_t>& places) : data_(static_cast<const char*>(data(input))) {
    const int64_t count = places.size(), bytes = s.width * s.item;
    if (count == s.rows) return;
    memory_.emplace(count * bytes);
    char* to = static_cast<char*>(memory_->data());
    torch::stable::parallel_for(0, count, 64, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) std::memcpy(to + i * bytes, data_ + places[i] * bytes, bytes);
    });
    data_ = to;
  }
  const char* data() const { return data_; }

 private:
  static const void* data(const Tensor& tensor) { return tensor.const_data_ptr(); }
  const char* data_;
  std::optional<Workspace> memory_;
};

void clear(void* memory, int64_t bytes) {
  constexpr int64_t kPiece = 1 << 20;
  torch::stable::parallel_for(0, (bytes + kPiece - 1) / kPiece, 1, [&](int64_t begin, int64_t end) {
    std::memset(static_cast<char*>(memory) + begin * kPiece, 0, std::min(bytes, end * kPiece) - begin * kPiece);
  });
}

// What the loops over tiles read.
struct Tiles {
  const Shape& s;
  Matrix weight;  // (classes, width)
  const char* bias;
  const char* x;
  int64_t rows;

  Matrix x_rows(int64_t row, int64_t count) const { return {x + row * s.width * s.item, count, s.width, s.width, 1}; }
  Matrix weight_rows(int64_t first, int64_t count) const {
    Matrix some = weight;
    some.data = static_cast<const char*>(weight.data) + first * weight.row_stride * s.item;
    some.rows = count;
    return some;
  }
  const void* bias_from(int64_t first) const { return bias == nullptr ? nullptr : bias + first * s.item; }
  // logits (count, columns) of A, kTileClasses apart.
  void logits(int64_t row, int64_t count, const Right& classes, int64_t first, void* logits) const {
    multiply(s.dtype, x_rows(row, count), classes,
             {.bias = bias_from(first), .c = logits, .c_is_wide = true, .c_stride = kTileClasses});
  }
};

std::tuple<Tensor, Tensor> linear_cross_entropy_fwd(const Tensor& input, const Tensor& weight, const Tensor& target,
                                                    const OptionalTensor& bias, int64_t ignore_index,
                                                    double label_smoothing, int64_t reduction) {
  const Shape s = check(input, weight, bias, target, label_smoothing, reduction);
  const Tensor x = dense(input), targets = dense(target);
  const OptionalTensor b = dense(bias);
  const auto places = places_of(targets, ignore_index, s.classes);
  const ScalarType accumulate = accumulate_type(input);
  Tensor stats = allocate(stats_sizes(target), accumulate), losses = allocate(sizes_of(target), accumulate);
  if (static_cast<int64_t>(places.size()) < s.rows || s.rows == 0) {
    clear(out(stats), 2 * s.rows * s.accumulator);
    clear(out(losses), s.rows * s.accumulator);
  }
  const Rows counted(x, s, places);
  const Tiles tiles{s, as_matrix(weight), static_cast<const char*>(data(b)), counted.data(),
                    static_cast<int64_t>(places.size())};
  const Workspace logits(kTileClasses * std::min(tiles.rows, kTileRows) * s.accumulator);
  for (int64_t first = 0; first < s.classes && tiles.rows > 0; first += kTileClasses) {
    const int64_t columns = std::min(kTileClasses, s.classes - first);
    const Right classes(s.dtype, tiles.weight_rows(first, columns).transposed(), tiles.rows);
    for (int64_t row = 0; row < tiles.rows; row += kTileRows) {
      const int64_t count = std::min(kTileRows, tiles.rows - row);
      tiles.logits(row, count, classes, first, logits.data());
      launch(table().cross_entropy_fwd[s.dtype],
             CrossEntropyFwd{logits.data(), static_cast<const int64_t*>(data(targets)), places.data() + row, out(stats),
                             out(losses), count, columns, kTileClasses, first, s.classes, label_smoothing});
    }
  }
  if (s.reduction == Reduction::none) return {losses, stats};
  Tensor loss = allocate({}, accumulate);
  launch(table().cross_entropy_sum[s.dtype],
         CrossEntropySum{data(losses), s.rows, s.reduction == Reduction::mean ? tiles.rows : 1, out(loss)});
  return {loss, stats};
}

// The gradient of a result that is a sum over tiles: kept in A until the last one is added, then rounded. Where T is A it
// is kept where it is to lie.
class Accumulator {
 public:
  Accumulator(const Shape& s, bool has_parts, int64_t rows)
      : s_(s), room_(has_parts && s.item != s.accumulator ? rows * s.width * s.accumulator : 0) {}
  // to (rows, width) += a right, of which row 0 is the accumulator's `row`.
  void add(const Matrix& a, const Right& right, char* to, int64_t row, bool first, bool last) {
    const int64_t at = row * s_.width;
    char* wide = s_.item == s_.accumulator ? to : static_cast<char*>(room_.data());
    const bool is_wide = !last;
    multiply(s_.dtype, a, right,
             {.residual = first ? nullptr : wide + at * s_.accumulator,
              .c = is_wide ? wide + at * s_.accumulator : to + at * s_.item,
              .residual_is_wide = true,
              .c_is_wide = is_wide,
              .c_stride = s_.width});
  }

 private:
  const Shape& s_;
  Workspace room_;
};

std::tuple<Tensor, Tensor, Tensor> linear_cross_entropy_bwd(const Tensor& grad, const Tensor& input,
                                                            const Tensor& weight, const Tensor& target,
                                                            const OptionalTensor& bias, const Tensor& stats,
                                                            int64_t ignore_index, double label_smoothing,
                                                            int64_t reduction, bool needs_input, bool needs_weight,
                                                            bool needs_bias) {
  const Shape s = check(input, weight, bias, target, label_smoothing, reduction);
  const ScalarType accumulate = accumulate_type(input);
  STD_TORCH_CHECK(grad.is_cpu() && grad.scalar_type() == accumulate, "grad must be of the loss's dtype, on the CPU");
  STD_TORCH_CHECK(sizes_of(grad) == (s.reduction == Reduction::none ? sizes_of(target) : Sizes{}),
                  "grad has the wrong shape");
  STD_TORCH_CHECK(stats.is_cpu() && stats.scalar_type() == accumulate && sizes_of(stats) == stats_sizes(target),
                  "stats are not those of the forward");
  const Tensor x = dense(input), targets = dense(target), slope = dense(grad), kept = dense(stats);
  const OptionalTensor b = dense(bias);
  const auto places = places_of(targets, ignore_index, s.classes);
  const int64_t rows = places.size();
  const bool all = rows == s.rows;

  Tensor dx = needs_input ? allocate_like(input) : nothing(input);
  Tensor dw = needs_weight ? allocate({s.classes, s.width}, input.scalar_type()) : nothing(input);
  Tensor db = needs_bias ? allocate({s.classes}, input.scalar_type()) : nothing(input);
  if (rows == 0) {
    for (Tensor* each : {&dx, &dw, &db})
      if (each->numel() > 0) clear(out(*each), each->numel() * s.item);
    return {dx, dw, db};
  }

  const Rows counted(x, s, places);
  const Tiles tiles{s, as_matrix(weight), static_cast<const char*>(data(b)), counted.data(), rows};
  const int64_t most = std::min(rows, kTileRows), row_tiles = (rows + kTileRows - 1) / kTileRows;
  const Workspace logits(kTileClasses * most * s.accumulator);
  const Workspace narrow(s.item == s.accumulator ? 0 : kTileClasses * most * s.item);
  void* dlogits = narrow.data() == nullptr ? logits.data() : narrow.data();
  const Workspace gathered(needs_input && !all ? rows * s.width * s.item : 0);
  char* dx_rows = gathered.data() == nullptr ? static_cast<char*>(out_or_null(dx)) : static_cast<char*>(gathered.data());
  Accumulator to_input(s, needs_input && s.classes > kTileClasses, rows);
  Accumulator to_weight(s, needs_weight && row_tiles > 1, kTileClasses);
  const auto wide = s.accumulator == sizeof(double) ? DType::f64 : DType::f32;
  const Workspace chunks(needs_bias ? kSumMaxChunks * kTileClasses * s.accumulator : 0);
  const Workspace lines(needs_bias ? row_tiles * kTileClasses * s.accumulator : 0);

  // Every tile of classes is multiplied by the same rows: they are packed once.
  std::vector<Right> x_tiles;
  x_tiles.reserve(row_tiles);
  for (int64_t row = 0; row < rows && needs_weight; row += kTileRows)
    x_tiles.emplace_back(s.dtype, tiles.x_rows(row, std::min(kTileRows, rows - row)), s.classes);

  for (int64_t first = 0; first < s.classes; first += kTileClasses) {
    const int64_t columns = std::min(kTileClasses, s.classes - first);
    const bool is_last = first + columns == s.classes;
    const Matrix some = tiles.weight_rows(first, columns);
    const Right classes(s.dtype, some.transposed(), rows);
    std::optional<Right> back;
    if (needs_input) back.emplace(s.dtype, some, rows);
    for (int64_t row = 0, tile = 0; row < rows; row += kTileRows, ++tile) {
      const int64_t count = std::min(kTileRows, rows - row);
      tiles.logits(row, count, classes, first, logits.data());
      launch(table().cross_entropy_bwd[s.dtype],
             CrossEntropyBwd{logits.data(), static_cast<const int64_t*>(data(targets)), places.data() + row, data(kept),
                             data(slope), s.reduction != Reduction::none, s.reduction == Reduction::mean ? rows : 1,
                             dlogits, count, columns, kTileClasses, kTileClasses, first, s.classes, label_smoothing});
      const Matrix slopes{dlogits, count, columns, kTileClasses, 1};
      if (needs_input) to_input.add(slopes, *back, dx_rows, row, first == 0, is_last);
      if (needs_weight) {
        to_weight.add(slopes.transposed(), x_tiles[tile], static_cast<char*>(out(dw)) + first * s.width * s.item, 0,
                      row == 0, tile + 1 == row_tiles);
      }
      if (needs_bias) {
        void* line = static_cast<char*>(lines.data()) + tile * columns * s.accumulator;
        launch_and_sum(static_cast<int>(wide), table().column_sum[s.dtype],
                       ColumnSum{dlogits, chunks.data(), count, columns, kTileClasses},
                       {.partial = chunks.data(), .out = line, .rows = sum_chunks(count), .width = columns,
                        .row_stride = columns});
      }
    }
    if (needs_bias) {
      launch(table().reduce_rows[s.dtype], ReduceRows{.partial = lines.data(),
                                                      .out = static_cast<char*>(out(db)) + first * s.item,
                                                      .rows = row_tiles, .width = columns, .row_stride = columns});
    }
  }

  if (needs_input && !all) {
    const int64_t bytes = s.width * s.item;
    clear(out(dx), s.rows * bytes);
    torch::stable::parallel_for(0, rows, 64, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        std::memcpy(static_cast<char*>(out(dx)) + places[i] * bytes, dx_rows + i * bytes, bytes);
    });
  }
  return {dx, dw, db};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fasttx, CPU, m) {
  FASTTX_IMPL(m, linear_cross_entropy_fwd);
  FASTTX_IMPL(m, linear_cross_entropy_bwd);
}

}  // namespace fasttx::bindings
