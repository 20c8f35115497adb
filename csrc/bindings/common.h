// What every binding shares: reading tensors, allocating results, and running a kernel's items on torch's threads.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <optional>
#include <utility>
#include <vector>

#include "../cpu/dispatch.h"

namespace fasttx::bindings {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Sizes = std::vector<int64_t>;

// The table's index for the tensor's dtype; throws for one that fasttx does not compute in.
int dtype_index(const Tensor& tensor, const char* name);
// float64 for float64, else float32.
ScalarType accumulate_type(const Tensor& tensor);
// Bytes of one value of it.
inline int64_t accumulate_size(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Double ? sizeof(double) : sizeof(float);
}

// Throws unless `tensor`, where present, is on the CPU with the dtype of `like`.
void check_like(const OptionalTensor& tensor, const Tensor& like, const char* name);
// The same, and that it has these sizes.
void check_like(const OptionalTensor& tensor, const Tensor& like, const char* name, const Sizes& sizes);

Tensor dense(const Tensor& tensor);
OptionalTensor dense(const OptionalTensor& tensor);

inline Sizes sizes_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return Sizes(sizes.begin(), sizes.end());
}

// The input as (batch, heads, queries, width): missing dims are 1, those before the last four fold into the batch.
Sizes as_four_dims(const Tensor& input);
// The mask's strides over four dims of these sizes, 0 where it repeats; throws where it does not broadcast to them.
Sizes broadcast_strides(const Tensor& mask, const Sizes& sizes);

// Strides of a dense tensor of these sizes.
Sizes dense_strides(const Sizes& sizes);
// Memory for a result on the CPU, without a detour through the dispatcher.
Tensor allocate(const Sizes& sizes, const Sizes& strides, ScalarType dtype);
inline Tensor allocate(const Sizes& sizes, ScalarType dtype) { return allocate(sizes, dense_strides(sizes), dtype); }
inline Tensor allocate_like(const Tensor& like) { return allocate(sizes_of(like), like.scalar_type()); }
// Whether memory that allocate gives is first filled with NaN, so that a test sees what a kernel did not write. Returns
// how many results have been.
int64_t poison_results(bool on);
// What an op returns in place of a result that was not asked for.
inline Tensor nothing(const Tensor& like) { return allocate({0}, like.scalar_type()); }

inline const void* data(const Tensor& tensor) { return tensor.const_data_ptr(); }
inline const void* data(const OptionalTensor& tensor) {
  return tensor.has_value() ? tensor->const_data_ptr() : nullptr;
}
inline void* out(Tensor& tensor) { return tensor.mutable_data_ptr(); }
inline void* out_or_null(Tensor& tensor) { return tensor.numel() == 0 ? nullptr : tensor.mutable_data_ptr(); }

// Inactive at probability 0; otherwise a seed tensor (int64, one element, on the CPU) is required.
Dropout make_dropout(double probability, const OptionalTensor& seed);
Activation make_activation(int64_t code);

// Registers the function `op` for the operator of that name and for its overload `raw`.
#define FASTTX_IMPL(m, op)           \
  m.impl(#op, TORCH_BOX(&op));       \
  m.impl(#op ".raw", TORCH_BOX(&op))

// Memory for the inside of one call, 64-byte aligned. The thread that ends its life keeps it for the next one that fits, so
// that repeated calls touch no fresh pages; what it keeps is bounded, and freed by release_workspaces.
class Workspace {
 public:
  explicit Workspace(size_t bytes);
  ~Workspace();
  Workspace(Workspace&& other) noexcept : block_(std::exchange(other.block_, {})) {}
  Workspace& operator=(Workspace&&) = delete;
  void* data() const { return block_.data; }

  struct Block {
    void* data = nullptr;
    size_t bytes = 0;
  };

 private:
  Block block_;
};
// What all threads keep, in bytes; frees it.
size_t workspace_bytes();
void release_workspaces();

template <class Args>
void launch(const Kernel<Args>& kernel, const Args& args) {
  const Plan plan = kernel.plan(args);
  if (plan.items <= 0) return;
  if (!plan.uneven) {
    torch::stable::parallel_for(0, plan.items, plan.grain, [&](int64_t begin, int64_t end) {
      const Workspace scratch(plan.scratch_bytes);
      kernel.run(args, scratch.data(), begin, end);
    });
    return;
  }
  const int64_t portions = (plan.items + plan.grain - 1) / plan.grain;
  const int64_t workers = std::min<int64_t>(portions, torch::stable::get_num_threads());
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t, int64_t) {
    const Workspace scratch(plan.scratch_bytes);
    for (int64_t begin; (begin = next.fetch_add(plan.grain)) < plan.items;) {
      kernel.run(args, scratch.data(), begin, std::min(begin + plan.grain, plan.items));
    }
  });
}

}  // namespace fasttx::bindings
