#include "matmul.h"

namespace fasttx::bindings {
namespace {

Tensor allocate_bytes(size_t bytes) { return allocate({static_cast<int64_t>(bytes)}, ScalarType::Byte); }

}  // namespace

Tensor pack_right(int dtype, const Matrix& b) {
  const KernelTable& kernels = table();
  Tensor packed = allocate_bytes(kernels.packed_b_bytes[dtype](b.rows, b.columns));
  launch(kernels.pack_b[dtype], PackB{b.data, b.row_stride, b.column_stride, b.rows, b.columns, out(packed)});
  return packed;
}

void check_packed(const Tensor& packed, int dtype, int64_t k, int64_t n, const char* name) {
  STD_TORCH_CHECK(packed.is_cpu() && packed.is_contiguous() && packed.scalar_type() == ScalarType::Byte &&
                      packed.numel() == static_cast<int64_t>(table().packed_b_bytes[dtype](k, n)),
                  name, " was not packed for this weight and instruction set (", table().isa, ")");
}

void multiply(int dtype, const Matrix& a, const Tensor& right, int64_t columns, Gemm epilogue) {
  const KernelTable& kernels = table();
  epilogue.m = a.rows;
  epilogue.n = columns;
  epilogue.k = a.columns;
  epilogue.b = data(right);
  OptionalTensor copy;
  if (a.column_stride == 1 && kernels.a_is_packed[dtype](a.columns)) {
    epilogue.a = a.data;
    epilogue.a_stride = a.row_stride;
  } else {
    copy = allocate_bytes(kernels.packed_a_bytes[dtype](a.rows, a.columns));
    launch(kernels.pack_a[dtype], PackA{a.data, a.row_stride, a.column_stride, a.rows, a.columns, out(*copy)});
    epilogue.a = data(*copy);
    epilogue.a_stride = kernels.packed_k[dtype](a.columns);
    epilogue.a_in_blocks = a.column_stride != 1;
  }
  launch(kernels.gemm[dtype], epilogue);
}

Tensor column_sums(int dtype, const Matrix& x, const Tensor& like) {
  Tensor partial = allocate({sum_chunks(x.rows), x.columns}, accumulate_type(like));
  launch(table().column_sum[dtype], ColumnSum{x.data, out(partial), x.rows, x.columns, x.row_stride});
  Tensor sum = allocate({x.columns}, like.scalar_type());
  launch(table().reduce_rows[dtype], ReduceRows{data(partial), out(sum), partial.size(0), x.columns});
  return sum;
}

}  // namespace fasttx::bindings
