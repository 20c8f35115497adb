#include <sys/mman.h>
#include <unistd.h>

#include "layers.h"
#include "sums.h"

namespace fasttx::bindings {
namespace {

// Rows of `width` values that the tensor consists of.
int64_t rows_of(const Tensor& input, int64_t width) {
  STD_TORCH_CHECK(width > 0 && input.numel() % width == 0, "input does not consist of rows of ", width);
  return input.numel() / width;
}

// Whether memory that was allocated has been touched before: the pages of a large fresh block come one by one, as zeros
// that lie in cache.
bool is_touched(const void* at) {
  const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  unsigned char resident = 0;
  void* first = reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(at) / page * page);
  return mincore(first, 1, &resident) == 0 && (resident & 1) != 0;
}

// Whether a call with so many operands of `bytes` bytes writes its results past the caches: where these cannot be
// expected to hold them until they are read again, lines that are about to be overwritten would be read for nothing.
bool streamed(int64_t operands, int64_t bytes, int64_t row_bytes, std::initializer_list<const void*> results) {
  constexpr int64_t kLeastBytes = int64_t{64} << 20, kLine = 64;
  return operands * bytes >= kLeastBytes && row_bytes % kLine == 0 &&
         std::all_of(results.begin(), results.end(), [&](const void* result) {
           return result == nullptr || (reinterpret_cast<uintptr_t>(result) % kLine == 0 &&
                                        is_touched(static_cast<const char*>(result) + bytes / 2));
         });
}

struct Sum {
  Tensor output, sum;
};

Sum forward(const Tensor& input, const OptionalTensor& residual, int64_t width, const OptionalTensor& weight,
            const OptionalTensor& bias, double eps, const Dropout& dropout, bool store_sum) {
  const int dtype = dtype_index(input, "input");
  const int64_t rows = rows_of(input, width);
  if (residual.has_value()) check_like(residual, input, "residual", sizes_of(input));
  check_like(weight, input, "weight");
  check_like(bias, input, "bias");
  STD_TORCH_CHECK(!weight.has_value() || weight->numel() == width, "weight must hold ", width, " values");
  STD_TORCH_CHECK(!bias.has_value() || bias->numel() == width, "bias must hold ", width, " values");

  const Tensor x = dense(input);
  const OptionalTensor r = dense(residual), w = dense(weight), b = dense(bias);
  Tensor y = allocate_like(input), sum;
  if (residual.has_value()) sum = store_sum ? allocate_like(input) : nothing(input);
  void* stored = store_sum ? out_or_null(sum) : nullptr;
  const int64_t row_bytes = width * input.element_size(), operands = 2 + residual.has_value() + (stored != nullptr);
  launch(table().layer_norm_fwd[dtype],
         LayerNormFwd{data(x), data(r), data(w), data(b), out(y), stored, rows, width, eps, dropout,
                      streamed(operands, rows * row_bytes, row_bytes, {out(y), stored})});
  return {y, sum};
}

struct Gradients {
  Tensor dx;
  OptionalTensor dropped;  // through the dropout, where that is wanted
  Tensor dweight, dbias;
};

Gradients backward(const Tensor& grad, const OptionalTensor& grad_sum, const Tensor& input,
                   const OptionalTensor& weight, int64_t width, double eps, const Dropout& dropout, bool needs_input,
                   bool needs_dropped, bool needs_weight, bool needs_bias) {
  const int dtype = dtype_index(input, "input");
  const int64_t rows = rows_of(input, width);
  check_like(grad, input, "grad", sizes_of(input));
  if (grad_sum.has_value()) check_like(grad_sum, input, "grad_sum", sizes_of(input));
  check_like(weight, input, "weight");
  STD_TORCH_CHECK(!weight.has_value() || weight->numel() == width, "weight must hold ", width, " values");

  const Tensor dy = dense(grad), x = dense(input);
  const OptionalTensor ds = dense(grad_sum), w = dense(weight);
  Tensor dx = needs_input ? allocate_like(input) : nothing(input);
  OptionalTensor dropped;
  if (needs_dropped) dropped = allocate_like(input);
  Tensor dw = needs_weight ? allocate({width}, input.scalar_type()) : nothing(input);
  Tensor db = needs_bias ? allocate({width}, input.scalar_type()) : nothing(input);

  // Both parameters' partial sums in one block, each line dweight's before dbias's.
  const int64_t row_bytes = width * input.element_size(), operands = 2 + ds.has_value() + needs_input + needs_dropped;
  const int64_t chunks = sum_chunks(rows), line = (needs_weight + needs_bias) * width;
  void* const ddropped = needs_dropped ? out_or_null(*dropped) : nullptr;
  LayerNormBwd args{data(dy), data(ds), data(x), data(w), out_or_null(dx), ddropped, nullptr, nullptr,
                    rows, width, line, eps, dropout,
                    streamed(operands, rows * row_bytes, row_bytes, {out_or_null(dx), ddropped})};
  if (line == 0) {
    launch(table().layer_norm_bwd[dtype], args);
    return {dx, dropped, dw, db};
  }
  const int64_t item_size = accumulate_size(input);
  const Workspace partial(chunks * line * item_size);
  char* first = static_cast<char*>(partial.data());
  if (needs_weight) args.dweight_partial = first;
  if (needs_bias) args.dbias_partial = first + (needs_weight ? width * item_size : 0);
  const bool both = needs_weight && needs_bias;
  launch_and_sum(dtype, table().layer_norm_bwd[dtype], args,
                 {.partial = first, .out = needs_weight ? out(dw) : out(db), .rows = chunks, .width = line,
                  .row_stride = line, .tail = both ? out(db) : nullptr, .split = width});
  return {dx, dropped, dw, db};
}

}  // namespace

Tensor layer_norm_fwd(const Tensor& input, int64_t width, const OptionalTensor& weight, const OptionalTensor& bias,
                      double eps) {
  return forward(input, std::nullopt, width, weight, bias, eps, make_dropout(0.0, std::nullopt), false).output;
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_bwd(const Tensor& grad, const Tensor& input,
                                                  const OptionalTensor& weight, int64_t width, double eps,
                                                  bool needs_input, bool needs_weight, bool needs_bias) {
  auto [dx, dropped, dw, db] = backward(grad, std::nullopt, input, weight, width, eps, make_dropout(0.0, std::nullopt),
                                        needs_input, false, needs_weight, needs_bias);
  return {dx, dw, db};
}

std::tuple<Tensor, Tensor> add_layer_norm_fwd(const Tensor& input, const Tensor& residual, int64_t width,
                                              const OptionalTensor& weight, const OptionalTensor& bias, double eps,
                                              double dropout_p, const OptionalTensor& seed, bool store_sum) {
  auto [output, sum] = forward(input, residual, width, weight, bias, eps, make_dropout(dropout_p, seed), store_sum);
  return {output, sum};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm_bwd(const Tensor& grad, const OptionalTensor& grad_sum,
                                                              const Tensor& sum, const OptionalTensor& weight,
                                                              int64_t width, double eps, double dropout_p,
                                                              const OptionalTensor& seed, bool needs_input,
                                                              bool needs_residual, bool needs_weight, bool needs_bias) {
  auto [dx, dropped, dw, db] = backward(grad, grad_sum, sum, weight, width, eps, make_dropout(dropout_p, seed),
                                       needs_residual, needs_input, needs_weight, needs_bias);
  return {dx, dropped.has_value() ? *dropped : nothing(sum), dw, db};
}

STABLE_TORCH_LIBRARY_IMPL(fasttx, CPU, m) {
  FASTTX_IMPL(m, layer_norm_fwd);
  FASTTX_IMPL(m, layer_norm_bwd);
  FASTTX_IMPL(m, add_layer_norm_fwd);
  FASTTX_IMPL(m, add_layer_norm_bwd);
}

}  // namespace fasttx::bindings
