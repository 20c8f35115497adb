// Matrix products on packed operands: the steps that linear and feed_forward are made of.
#pragma once

#include "common.h"

namespace fasttx::bindings {

// A matrix in memory: element (row, column) is at row * row_stride + column * column_stride.
struct Matrix {
  const void* data;
  int64_t rows, columns, row_stride, column_stride;
  Matrix transposed() const { return {data, columns, rows, column_stride, row_stride}; }
};

// A tensor's values as `rows` rows; the tensor must be dense.
inline Matrix as_rows(const Tensor& tensor, int64_t rows, int64_t columns) {
  return {data(tensor), rows, columns, columns, 1};
}
// A tensor of two dimensions, with whatever strides it has.
inline Matrix as_matrix(const Tensor& tensor) {
  return {data(tensor), tensor.size(0), tensor.size(1), tensor.stride(0), tensor.stride(1)};
}

// The packed right operand as a tensor of bytes. on_vectors: as in Gemm.
Tensor pack_right(int dtype, const Matrix& b, bool on_vectors);
// Throws unless `packed` is what pack_right returns for a (k, n) matrix.
void check_packed(const Tensor& packed, int dtype, int64_t k, int64_t n, bool on_vectors, const char* name);

// The right operand of a product with `rows` rows: packed before, packed here in a workspace where so many rows are worth
// it, or read as it is, and packed piece by piece inside the product.
class Right {
 public:
  Right(int dtype, const Matrix& b, int64_t rows, const OptionalTensor& packed = std::nullopt, bool on_vectors = false);

 private:
  friend void multiply(int dtype, const Matrix& a, const Right& right, Gemm epilogue);
  Matrix b_;
  const void* packed_;
  bool on_vectors_;
  std::optional<Workspace> workspace_;
};

// c = epilogue(a right): `epilogue` names the result, its stride and what is done to it; the operands are filled in here.
void multiply(int dtype, const Matrix& a, const Right& right, Gemm epilogue);

// The sum of every column of a (rows, width) matrix, as a tensor of `like`'s dtype.
Tensor column_sums(int dtype, const Matrix& x, const Tensor& like);

}  // namespace fasttx::bindings
