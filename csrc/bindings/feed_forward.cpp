#include "layers.h"
#include "matmul.h"

namespace fasttx::bindings {
namespace {

// Rows that go through both layers together: their hidden values stay in cache. Each chunk wakes the threads twice.
int64_t chunk_rows(int64_t rows, int64_t row_bytes) {
  constexpr int64_t kLeastRows = 512, kBytes = 3 << 20;
  return std::min(rows, std::max(kLeastRows, kBytes / std::max<int64_t>(row_bytes, 1)));
}

struct Shape {
  int dtype;
  int64_t rows, in, hidden, out;
  Sizes outer;  // the input's sizes less the last

  Sizes sizes(int64_t last) const {
    Sizes all = outer;
    all.push_back(last);
    return all;
  }
};

Shape check(const Tensor& input, const Tensor& weight1, const Tensor& weight2) {
  const int dtype = dtype_index(input, "input");
  STD_TORCH_CHECK(weight1.dim() == 2 && input.dim() >= 1 && input.size(input.dim() - 1) == weight1.size(1),
                  "weight1 must be (hidden, in) with `in` the input's width");
  STD_TORCH_CHECK(weight2.dim() == 2 && weight2.size(1) == weight1.size(0), "weight2 must be (out, hidden)");
  check_like(weight1, input, "weight1");
  check_like(weight2, input, "weight2");
  Shape s{dtype, 1, weight1.size(1), weight1.size(0), weight2.size(0), sizes_of(input)};
  s.outer.pop_back();
  for (const int64_t size : s.outer) s.rows *= size;
  return s;
}

// Row `row` of a dense matrix of rows.
template <class Pointer>
Pointer at_row(Pointer base, int64_t row, int64_t columns, const Tensor& like) {
  using Byte = std::conditional_t<std::is_const_v<std::remove_pointer_t<Pointer>>, const char, char>;
  return base == nullptr ? nullptr : static_cast<Byte*>(base) + row * columns * like.element_size();
}

std::tuple<Tensor, Tensor> feed_forward_fwd(const Tensor& input, const Tensor& weight1, const OptionalTensor& bias1,
                                            const Tensor& weight2, const OptionalTensor& bias2, int64_t activation,
                                            double dropout_p, const OptionalTensor& seed, bool store_preact,
                                            const OptionalTensor& packed1, const OptionalTensor& packed2) {
  const Shape s = check(input, weight1, weight2);
  Tensor y = allocate(s.sizes(s.out), input.scalar_type());
  const Tensor preact = feed_forward_forward(input, weight1, bias1, weight2, bias2, activation, dropout_p, seed,
                                             store_preact, packed1, packed2, {std::nullopt, 0.0, std::nullopt}, y);
  return {y, preact};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> feed_forward_bwd(
    const Tensor& grad, const Tensor& input, const Tensor& preact, const Tensor& weight1, const Tensor& weight2,
    int64_t activation, double dropout_p, const OptionalTensor& seed, bool needs_input, bool needs_weight1,
    bool needs_bias1, bool needs_weight2, bool needs_bias2) {
  return feed_forward_backward(grad, input, preact, weight1, weight2, activation, dropout_p, seed, std::nullopt,
                               needs_input, needs_weight1, needs_bias1, needs_weight2, needs_bias2);
}

}  // namespace

Tensor feed_forward_forward(const Tensor& input, const Tensor& weight1, const OptionalTensor& bias1,
                            const Tensor& weight2, const OptionalTensor& bias2, int64_t activation, double dropout_p,
                            const OptionalTensor& seed, bool store_preact, const OptionalTensor& packed1,
                            const OptionalTensor& packed2, const Ending& ending, Tensor& output, bool on_vectors) {
  const Shape s = check(input, weight1, weight2);
  check_like(bias1, input, "bias1", {s.hidden});
  check_like(bias2, input, "bias2", {s.out});
  check_like(ending.residual, input, "residual", s.sizes(s.out));
  check_like(output, input, "output", s.sizes(s.out));
  const Dropout dropout = make_dropout(dropout_p, seed), dropout2 = make_dropout(ending.dropout_p, ending.seed);
  if (packed1.has_value()) check_packed(*packed1, s.dtype, s.in, s.hidden, on_vectors, "packed1");
  if (packed2.has_value()) check_packed(*packed2, s.dtype, s.hidden, s.out, on_vectors, "packed2");
  const Right w1(s.dtype, as_matrix(weight1).transposed(), s.rows, packed1, on_vectors);
  const Right w2(s.dtype, as_matrix(weight2).transposed(), s.rows, packed2, on_vectors);

  const Tensor x = dense(input);
  const OptionalTensor b1 = dense(bias1), b2 = dense(bias2), r = dense(ending.residual);
  Tensor preact = store_preact ? allocate(s.sizes(s.hidden), input.scalar_type()) : nothing(input);
  const int64_t row_bytes = s.hidden * input.element_size(), chunk = chunk_rows(s.rows, row_bytes);
  const Workspace hidden(chunk * row_bytes);
  for (int64_t row = 0; row < s.rows; row += chunk) {
    const int64_t rows = std::min(chunk, s.rows - row);
    multiply(s.dtype, {at_row(data(x), row, s.in, x), rows, s.in, s.in, 1}, w1,
             {.bias = data(b1), .activation = make_activation(activation),
              .preact = at_row(out_or_null(preact), row, s.hidden, x), .c = hidden.data(), .c_stride = s.hidden,
              .row_offset = row, .dropout = dropout});
    multiply(s.dtype, {hidden.data(), rows, s.hidden, s.hidden, 1}, w2,
             {.bias = data(b2), .residual = at_row(data(r), row, s.out, x),
              .c = at_row(out(output), row, s.out, x), .c_stride = s.out, .row_offset = row, .dropout = dropout2});
  }
  return preact;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> feed_forward_backward(
    const Tensor& grad, const Tensor& input, const Tensor& preact, const Tensor& weight1, const Tensor& weight2,
    int64_t activation, double dropout_p, const OptionalTensor& seed, const OptionalTensor& residual, bool needs_input,
    bool needs_weight1, bool needs_bias1, bool needs_weight2, bool needs_bias2) {
  const Shape s = check(input, weight1, weight2);
  check_like(grad, input, "grad", s.sizes(s.out));
  check_like(preact, input, "preact", s.sizes(s.hidden));
  check_like(residual, input, "residual", sizes_of(input));
  const Tensor dense_grad = dense(grad), dense_input = dense(input), dense_preact = dense(preact);
  const Matrix dy = as_rows(dense_grad, s.rows, s.out), x = as_rows(dense_input, s.rows, s.in);

  Tensor dx = needs_input ? allocate_like(input) : nothing(input);
  Tensor dw1 = needs_weight1 ? allocate_like(weight1) : nothing(input);
  Tensor dw2 = needs_weight2 ? allocate_like(weight2) : nothing(input);
  Tensor db1 = nothing(input);
  if (needs_input || needs_weight1 || needs_bias1 || needs_weight2) {
    // One pass gives the gradient before the activation and, where dw2 needs it, the activation over again.
    const size_t bytes = s.rows * s.hidden * input.element_size();
    const Workspace dpreact(bytes), hidden(needs_weight2 ? bytes : 0);
    multiply(s.dtype, dy, Right(s.dtype, as_matrix(weight2), s.rows),
             {.activation = make_activation(activation), .grad_preact = data(dense_preact),
              .recomputed = hidden.data(), .c = dpreact.data(), .c_stride = s.hidden,
              .dropout = make_dropout(dropout_p, seed)});
    const Matrix da = {dpreact.data(), s.rows, s.hidden, s.hidden, 1};
    if (needs_weight2) {
      multiply(s.dtype, dy.transposed(), Right(s.dtype, {hidden.data(), s.rows, s.hidden, s.hidden, 1}, s.out),
               {.c = out(dw2), .c_stride = s.hidden});
    }
    if (needs_input) {
      const OptionalTensor r = dense(residual);
      multiply(s.dtype, da, Right(s.dtype, as_matrix(weight1), s.rows),
               {.residual = data(r), .c = out(dx), .c_stride = s.in});
    }
    if (needs_weight1) {
      multiply(s.dtype, da.transposed(), Right(s.dtype, x, s.hidden), {.c = out(dw1), .c_stride = s.in});
    }
    if (needs_bias1) db1 = column_sums(s.dtype, da, input);
  }
  return {dx, dw1, db1, dw2, needs_bias2 ? column_sums(s.dtype, dy, input) : nothing(input)};
}

STABLE_TORCH_LIBRARY_IMPL(fasttx, CPU, m) {
  FASTTX_IMPL(m, feed_forward_fwd);
  FASTTX_IMPL(m, feed_forward_bwd);
}

}  // namespace fasttx::bindings
