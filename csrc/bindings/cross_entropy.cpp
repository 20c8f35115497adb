// The cross-entropy of a linear layer's output, made a tile of rows and classes at a time, so that no more of it is there at
// once. Rows that are ignored are left out before the first product.
#include <cstring>

#include "matmul.h"

namespace fasttx::bindings {
namespace {

// A tile. Classes are cut at fixed places: a row's result does not depend on the rows beside it. Logits lie with a class
// to a line: so the weight's rows are the left operand of the product, which is read as it is, and only the input is packed.
constexpr int64_t kTileRows = 512, kTileClasses = 1024;
// From one line to the next: no power of two, whose lines would fall into few sets of the cache.
constexpr int64_t kLine = kTileRows + 16;

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
class Tiles {
 public:
  Tiles(const Shape& s, const Tensor& weight, const OptionalTensor& bias, const Rows& input, int64_t rows)
      : rows(rows), s_(s), weight_(as_matrix(weight)), bias_(static_cast<const char*>(bindings::data(bias))),
        x_(input.data()) {
    transposed_.reserve((rows + kTileRows - 1) / kTileRows);
    for (int64_t row = 0; row < rows; row += kTileRows)
      transposed_.emplace_back(s.dtype, x_rows(row).transposed(), s.classes);
  }

  int64_t count_from(int64_t row) const { return std::min(kTileRows, rows - row); }
  Matrix x_rows(int64_t row) const { return {x_ + row * s_.width * s_.item, count_from(row), s_.width, s_.width, 1}; }
  Matrix weight_rows(int64_t first, int64_t count) const {
    Matrix some = weight_;
    some.data = static_cast<const char*>(weight_.data) + first * weight_.row_stride * s_.item;
    some.rows = count;
    return some;
  }
  const void* bias_from(int64_t first) const { return bias_ == nullptr ? nullptr : bias_ + first * s_.item; }
  // logits (classes, rows) of A, kLine apart, without the bias.
  void logits(int64_t row, const Matrix& classes, void* logits) const {
    multiply(s_.dtype, classes, transposed_[row / kTileRows], {.c = logits, .c_is_wide = true, .c_stride = kLine});
  }

  const int64_t rows;

 private:
  const Shape& s_;
  const Matrix weight_;
  const char *bias_, *x_;
  std::vector<Right> transposed_;
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
  const Tiles tiles(s, weight, b, counted, places.size());
  const Workspace logits(kTileClasses * kLine * s.accumulator);
  for (int64_t first = 0; first < s.classes && tiles.rows > 0; first += kTileClasses) {
    const int64_t columns = std::min(kTileClasses, s.classes - first);
    const Matrix classes = tiles.weight_rows(first, columns);
    for (int64_t row = 0; row < tiles.rows; row += kTileRows) {
      tiles.logits(row, classes, logits.data());
      launch(table().cross_entropy_fwd[s.dtype],
             CrossEntropyFwd{logits.data(), tiles.bias_from(first), static_cast<const int64_t*>(data(targets)),
                             places.data() + row, out(stats), out(losses), tiles.count_from(row), columns, kLine, first,
                             s.classes, label_smoothing});
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
  const Tiles tiles(s, weight, b, counted, rows);
  const int64_t row_tiles = (rows + kTileRows - 1) / kTileRows;
  const Workspace logits(kTileClasses * kLine * s.accumulator);
  const Workspace narrow(s.item == s.accumulator ? 0 : kTileClasses * kLine * s.item);
  void* dlogits = narrow.data() == nullptr ? logits.data() : narrow.data();
  const Workspace gathered(needs_input && !all ? rows * s.width * s.item : 0);
  char* dx_rows = gathered.data() == nullptr ? static_cast<char*>(out_or_null(dx)) : static_cast<char*>(gathered.data());
  Accumulator to_input(s, needs_input && s.classes > kTileClasses, rows);
  Accumulator to_weight(s, needs_weight && row_tiles > 1, kTileClasses);
  const Workspace bias_sums(needs_bias ? kTileClasses * s.accumulator : 0);

  // Every tile of classes is multiplied by the same rows: they are packed once.
  std::vector<Right> x_tiles;
  x_tiles.reserve(row_tiles);
  for (int64_t row = 0; row < rows && needs_weight; row += kTileRows)
    x_tiles.emplace_back(s.dtype, tiles.x_rows(row), s.classes);

  for (int64_t first = 0; first < s.classes; first += kTileClasses) {
    const int64_t columns = std::min(kTileClasses, s.classes - first);
    const bool is_last = first + columns == s.classes;
    const Matrix classes = tiles.weight_rows(first, columns);
    std::optional<Right> back;
    if (needs_input) back.emplace(s.dtype, classes, rows);
    for (int64_t row = 0, tile = 0; row < rows; row += kTileRows, ++tile) {
      const int64_t count = tiles.count_from(row);
      const bool is_first_tile = tile == 0, is_last_tile = tile + 1 == row_tiles;
      tiles.logits(row, classes, logits.data());
      launch(table().cross_entropy_bwd[s.dtype],
             CrossEntropyBwd{logits.data(), tiles.bias_from(first), static_cast<const int64_t*>(data(targets)),
                             places.data() + row, data(kept), data(slope), s.reduction != Reduction::none,
                             s.reduction == Reduction::mean ? rows : 1, dlogits, count, columns, kLine, first, s.classes,
                             label_smoothing});
      const Matrix slopes{dlogits, columns, count, kLine, 1};
      if (needs_input) to_input.add(slopes.transposed(), *back, dx_rows, row, first == 0, is_last);
      if (needs_weight) {
        to_weight.add(slopes, x_tiles[tile], static_cast<char*>(out(dw)) + first * s.width * s.item, 0, is_first_tile,
                      is_last_tile);
      }
      if (needs_bias) {
        void* sums = is_last_tile ? static_cast<char*>(out(db)) + first * s.item : nullptr;
        launch(table().line_sum[s.dtype], LineSum{dlogits, bias_sums.data(), sums, columns, count, kLine, is_first_tile});
      }
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
