#include "key_places.h"

#include <cstring>
#include <type_traits>

namespace fasttx::bindings {
namespace {

// seen[key] becomes nonzero for every key that the mask's sequence b lets some query see. The last queries first: under
// a causal mask they see the most, and after one that sees everything there is nothing left to find.
void find_seen(const AttentionShape& shape, int64_t b, uint8_t* seen) {
  const Mask& mask = shape.mask;
  std::memset(seen, 0, shape.keys);
  const auto add_row = [&](const uint8_t* row, auto stride) {
    uint8_t all = 1;
    for (int64_t key = 0; key < shape.keys; ++key) all &= seen[key] |= row[key * stride];
    return all != 0;
  };
  const int64_t heads = mask.stride_h == 0 ? 1 : shape.heads, queries = mask.stride_q == 0 ? 1 : shape.queries;
  for (int64_t query = queries - 1; query >= 0; --query) {
    for (int64_t head = 0; head < heads; ++head) {
      const uint8_t* row = static_cast<const uint8_t*>(mask.data) + b * mask.stride_b + head * mask.stride_h +
                           query * mask.stride_q;
      const bool all = mask.stride_k == 1 ? add_row(row, std::integral_constant<int64_t, 1>{})
                                          : add_row(row, mask.stride_k);
      if (all) return;
    }
  }
}

}  // namespace

void leave_out_unseen_keys(AttentionShape& shape, std::optional<Workspace>& memory) {
  const Mask& mask = shape.mask;
  const int64_t batch = shape.batch, keys = shape.keys, masks = mask.stride_b == 0 ? 1 : batch;
  if (mask.kind != MaskKind::boolean || batch * keys * shape.heads * shape.queries == 0) return;
  memory.emplace(sizeof(int64_t) * batch * (1 + keys) + masks * keys);
  int64_t* lengths = static_cast<int64_t*>(memory->data());
  int64_t* places = lengths + batch;
  uint8_t* seen = reinterpret_cast<uint8_t*>(places + batch * keys);

  const bool shared = mask.stride_h == 0 && mask.stride_q == 0;
  torch::stable::parallel_for(0, masks, shared ? masks : 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) find_seen(shape, b, seen + b * keys);
  });
  bool first_keys = true;  // of every sequence
  for (int64_t b = 0; b < batch; ++b) {
    const uint8_t* sees = seen + (masks == 1 ? 0 : b * keys);
    int64_t* list = places + b * keys;
    int64_t count = 0;
    for (int64_t key = 0; key < (shape.key_lengths == nullptr ? keys : shape.key_lengths[b]); ++key) {
      list[count] = key;
      count += sees[key] != 0;
    }
    first_keys &= count == 0 || list[count - 1] == count - 1;
    lengths[b] = count;
  }
  shape.key_lengths = lengths;
  if (!first_keys) shape.key_places = places;
  if (shared) shape.mask.kind = MaskKind::none;
}

}  // namespace fasttx::bindings
