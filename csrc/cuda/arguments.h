// What each CUDA kernel is given: plain data, the same for the compiler of the host and that of the device.
//
// A kernel has one parameter, one of these structs. Tensors are dense unless strides say otherwise; a pointer that may
// be null says so. `vector`: whether every pointer and every row begins at a multiple of 16 bytes, so that they can be
// read 16 bytes at once.
#pragma once

#include <stdint.h>

#include "tensor_map.h"

#if !defined(__CUDACC__)
struct float2;
struct float4;
#endif

namespace fasttx::cuda {

// Which elements dropout keeps: those whose word is at least the threshold (csrc/cuda/philox.cuh).
struct Dropout {
  const int64_t* seed_at;  // where the seed lies on the device; null: it is `seed`
  uint64_t seed;
  uint32_t threshold;
  float keep_scale;  // what is kept is multiplied by it
  bool active;
};

enum class MaskKind : int32_t { none, boolean, additive, additive_float };

// A mask of (batch, heads, queries, keys) by its strides, 0 where it repeats. Boolean: a byte each, what is not 0 is kept.
// Additive: added to the scores, in the dtype of the kernel's name or in float32.
struct Mask {
  const void* data;
  int64_t stride_b, stride_h, stride_q, stride_k;
  MaskKind kind;
  bool vector;  // what goes with 16 bytes of scores lies together, aligned to its size, or to 16 if that is less
};

// y = softmax(x + mask) of (batch, heads, queries, width): zeros where a row keeps nothing.
struct SoftmaxFwd {
  const void* x;
  void* y;
  Mask mask;
  uint32_t rows;  // batch * heads * queries
  uint32_t heads, queries, width;
  bool is_causal;  // columns beyond the number of the query are masked out
  bool vector;     // the mask's, too
};

// dx = y (dy - sum(y dy)) of (rows, width).
struct SoftmaxBwd {
  const void* dy;
  const void* y;
  void* dx;
  uint32_t rows, width;
  bool vector;
};

// y = gelu(x + bias) of (rows, width).
struct GeluFwd {
  const void* x;
  const void* bias;  // (width,) or null
  void* y;
  int64_t size;    // rows * width
  uint32_t width;  // where there is a bias
  bool vector;
};

// dx = dy gelu'(x + bias). dbias: one line of sums for each program along y, (programs, width), or null.
struct GeluBwd {
  const void* dy;
  const void* x;
  const void* bias;  // (width,) or null
  void* dx;
  float* dbias;
  int64_t size;
  uint32_t width;  // where there is a bias
  bool vector;
};

// y = the layer norm of residual + dropout(x) over rows of (rows, width); sum: that sum before it is rounded.
struct LayerNormFwd {
  const void* x;
  const void* residual;  // or null
  const void* weight;    // (width,) or null
  const void* bias;      // (width,) or null
  void* y;
  void* sum;  // or null
  Dropout dropout;
  uint32_t rows, width;
  float eps;
  bool vector;
};

// The slopes of layer_norm(x) by x, that of x itself added, and by what x is the sum of. dweight, dbias: one line of sums
// for each program, (programs, width).
struct LayerNormBwd {
  const void* dy;
  const void* dsum;  // or null
  const void* x;
  const void* weight;  // (width,) or null
  void* dx;            // dsum + the slope by x, or null
  void* dropped;       // dropout(dx), or null
  float* dweight;      // or null
  float* dbias;        // or null
  float* stats;        // of rows too wide for registers: (rows, 2), each one's mean and 1 / standard deviation
  Dropout dropout;
  uint32_t rows, width;
  float eps;
  bool vector;
};

// out = the sums over the rows of x, (matrices, rows, width) float32; out[i] (width,) of the dtype of the kernel's name.
struct SumPartials {
  const float* x;
  void* out[2];
  uint32_t rows, width;
};

// Rows of a tensor (sequence, head, token, width), by their strides in values; of packed sequences the tokens follow
// each other, and the stride of a sequence is 0. Rows are dense, and begin at multiples of 16 bytes.
struct Rows {
  const void* data;
  int64_t sequence, head, token;
};

// What attention is of. Row i of a sequence sees keys i + lo to i + hi, of those that there are.
struct AttentionProblem {
  Rows query, key, value;
  const int64_t* key_lengths;               // (sequences,) or null: all have `keys`
  const int64_t *cu_queries, *cu_keys;      // (sequences + 1,) where packed sequences begin, or null
  const uint8_t* seen;                      // by sequence and key, whether any of its queries sees it; null: places alone say
  int64_t seen_stride;                      // of a sequence
  const uint8_t* tiles;                     // what masks keep of each tile (MaskTiles), or null: they keep all
  int64_t tile_strides[3];                  // of a sequence, a head, and kTileQueries queries
  const float* slopes;                      // (heads,) of ALiBi, or null
  Mask mask;                                // vector: neighbours of a row lie together, aligned to two of them
  Dropout dropout;
  bool scaled;                              // scores are kept scaled, as something is added to them
  int32_t sequences, heads, group;          // group: heads that share a key's
  int32_t queries, keys;                    // of a sequence at most; packed: of all
  int32_t width, value_width;               // multiples of 8
  int32_t lo, hi;                           // no further from 0 than kFar, which stands for no bound
  float origin;                             // ALiBi's distance of row i and key j: |j - i - origin|
  float scale;
};
constexpr int32_t kFar = 1 << 29;

// The gradients of query, key and value.
struct AttentionBwd {
  AttentionProblem problem;
  Rows out, grad;         // what the forward gave, and its gradient
  const float* grad_lse;  // as lse, or null
  const float* stats;     // the forward's
  // Of each row, by the first of the kernels: its largest score, what is added to an exponent of 2, delta, nothing.
  float4* rows;
  Rows dquery, dkey, dvalue;
  bool laden;
};

// The gradient of an additive mask, of the mask's dtype: (batch, heads, queries, keys), dense, each of them as many as the
// problem's or 1, along which gradients are summed.
struct AttentionBiasBwd {
  AttentionBwd bwd;
  void* dmask;
  int32_t sequences, heads, queries, keys;
};

// What masks keep of a tile of kTileQueries queries and kTileKeys keys: nothing; all, and add nothing; or else `some`.
enum class Kept : uint8_t { nothing, some, all };
constexpr int kTileQueries = 64, kTileKeys = 32;

// tiles (sequences, heads, tiles of queries, tiles of keys): what a mask keeps of each, of as many of all as differ. -infinity
// is kept from, where it is added.
struct MaskTiles {
  Mask mask;
  uint8_t* tiles;
  int32_t heads, queries, keys;
};

// seen (sequences, keys): whether the boolean mask keeps a key for any of its heads and queries, of which there are as many
// as differ.
struct KeysSeen {
  Mask mask;
  uint8_t* seen;
  int32_t heads, queries, keys;
};

// out = softmax(scale query key^T + what is added) value.
struct AttentionFwd {
  AttentionProblem problem;
  Rows out;
  // (sequences, heads, queries), packed (heads, queries), or null. stats: two for each row, the largest score, in the
  // kernel's own units, and 1 / the sum of exponentials relative to it; 0 and 0 where there is nothing to attend to.
  float *lse, *stats;
};

// The same where a group's queries of a sequence are few: its keys are split among blocks. rows: sequences * heads * queries.
// parts (splits, rows, value_width): sums of exponentials times values; part_stats (splits, rows): the largest score, and
// the sum of exponentials relative to it. Null where there is one split.
struct AttentionDecode {
  AttentionFwd fwd;
  float* parts;
  float2* part_stats;
  int32_t splits;
  uint32_t rows;
};

// The same for the kernels of sm_90: maps of (width, tokens, heads, sequences), whose boxes are 64 columns of 64 queries, and
// of kSm90Keys keys or values.
struct AttentionFwdSm90 {
  TensorMap query, key, value;
  AttentionFwd forward;
};

}  // namespace fasttx::cuda
