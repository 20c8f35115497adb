#include "matmul.h"

#include "sums.h"

namespace fasttx::bindings {
namespace {

// Rows from which on packing a whole operand first takes less time than packing it anew for every block of rows.
constexpr int64_t kRowsWorthPacking = 512;

void pack(int dtype, const Matrix& b, bool on_vectors, void* packed) {
  launch(table().pack_b[dtype],
         PackB{b.data, b.row_stride, b.column_stride, b.rows, b.columns, on_vectors, packed});
}

}  // namespace

Tensor pack_right(int dtype, const Matrix& b, bool on_vectors) {
  const size_t bytes = table().packed_b_bytes[dtype](b.rows, b.columns, on_vectors);
  Tensor packed = allocate({static_cast<int64_t>(bytes)}, ScalarType::Byte);
  pack(dtype, b, on_vectors, out(packed));
  return packed;
}

void check_packed(const Tensor& packed, int dtype, int64_t k, int64_t n, bool on_vectors, const char* name) {
  STD_TORCH_CHECK(packed.is_cpu() && packed.is_contiguous() && packed.scalar_type() == ScalarType::Byte &&
                      packed.numel() == static_cast<int64_t>(table().packed_b_bytes[dtype](k, n, on_vectors)),
                  name, " was not packed for this weight and instruction set (", table().isa, ")");
}

Right::Right(int dtype, const Matrix& b, int64_t rows, const OptionalTensor& packed, bool on_vectors)
    : b_(b), packed_(data(packed)), on_vectors_(on_vectors) {
  if (packed_ != nullptr || rows < kRowsWorthPacking) return;
  workspace_.emplace(table().packed_b_bytes[dtype](b.rows, b.columns, on_vectors));
  pack(dtype, b, on_vectors, workspace_->data());
  packed_ = workspace_->data();
}

void multiply(int dtype, const Matrix& a, const Right& right, Gemm epilogue) {
  epilogue.a = a.data;
  epilogue.a_row_stride = a.row_stride;
  epilogue.a_k_stride = a.column_stride;
  epilogue.b = right.b_.data;
  epilogue.b_k_stride = right.b_.row_stride;
  epilogue.b_n_stride = right.b_.column_stride;
  epilogue.packed_b = right.packed_;
  epilogue.on_vectors = right.on_vectors_;
  epilogue.m = a.rows;
  epilogue.n = right.b_.columns;
  epilogue.k = a.columns;
  epilogue.threads = torch::stable::get_num_threads();
  launch(table().gemm[dtype], epilogue);
}

Tensor column_sums(int dtype, const Matrix& x, const Tensor& like) {
  const int64_t chunks = sum_chunks(x.rows);
  const Workspace partial(chunks * x.columns * accumulate_size(like));
  Tensor sum = allocate({x.columns}, like.scalar_type());
  launch_and_sum(dtype, table().column_sum[dtype],
                 ColumnSum{x.data, partial.data(), x.rows, x.columns, x.row_stride},
                 {.partial = partial.data(), .out = out(sum), .rows = chunks, .width = x.columns, .row_stride = x.columns});
  return sum;
}

}  // namespace fasttx::bindings
