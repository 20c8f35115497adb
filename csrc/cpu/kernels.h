// The table of kernels that every instruction set exports, and the arguments that each kernel takes.
//
// A kernel never sees a tensor, a thread or an allocator. It is given its arguments (raw pointers, sizes, strides counted
// in elements), a private scratch block, and a range of work items; `plan` says how many items there are and how much
// scratch one call needs. Items are independent and may run in any order on any thread: results never depend on how the
// range was divided.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "types.h"

namespace fasttx {

struct Plan {
  int64_t items;         // work items in the whole call
  int64_t grain;         // items that are worth waking a thread for
  size_t scratch_bytes;  // private to one thread, 64-byte aligned
  bool uneven;           // items differ in cost: hand them out one grain at a time
};

template <class Args>
struct Kernel {
  Plan (*plan)(const Args&);
  void (*run)(const Args&, void* scratch, int64_t begin, int64_t end);
};

// Philox dropout: an element is kept when its word is at least `threshold`, and then multiplied by `scale`.
struct Dropout {
  uint64_t seed;
  uint32_t threshold;
  double scale;
  bool active;
};

enum class Activation : int32_t { none, relu, gelu, gelu_tanh };

// Storage type T is the dtype of the call; accumulate type A is double for float64 and float for every other.

// y = (x - mean) * rstd * weight + bias over rows of `width`. With `residual`, x is first replaced by residual + dropout(x),
// and stored to `sum` unless that is null.
struct LayerNormFwd {
  const void* x;         // T (rows, width)
  const void* residual;  // T (rows, width) or null
  const void* weight;    // T (width) or null
  const void* bias;      // T (width) or null
  void* y;               // T (rows, width)
  void* sum;             // T (rows, width) or null
  int64_t rows, width;
  double eps;
  Dropout dropout;
  bool streamed;  // y and sum go past the caches; their rows begin and end with lines of 64 bytes
};

// Items are chunks of rows; each writes its own line of the partial sums, which reduce_rows adds in order.
struct LayerNormBwd {
  const void* dy;      // T (rows, width)
  const void* dsum;    // T (rows, width) or null: gradient that reaches the sum by another way
  const void* x;       // T (rows, width): what was normalised
  const void* weight;  // T (width) or null
  void* dx;            // T (rows, width) or null: gradient of what was normalised (with dsum)
  void* dinput;        // T (rows, width) or null: dx through the dropout
  void* dweight_partial;  // A (chunks, width) or null
  void* dbias_partial;    // A (chunks, width) or null
  int64_t rows, width, partial_stride;
  double eps;
  Dropout dropout;
  bool streamed;  // dx and dinput, as above
};

// out[j] = sum over i of partial[i][j], in the order of i, by blocks of kSumBlock; with `tail`, the columns from `split`
// on go there. `out` may be the first row of `partial`.
struct ReduceRows {
  const void* partial;  // A (rows, width), row stride row_stride
  void* out;            // T (width), or T (split)
  int64_t rows, width, row_stride;
  void* tail;  // T (width - split) or null
  int64_t split;
};

// partial[c][j] = sum of x[i][j] over the rows of chunk c; items are chunks, as many as sum_chunks(rows).
struct ColumnSum {
  const void* x;  // T (rows, width), row stride x_stride
  void* partial;  // A (chunks, width)
  int64_t rows, width, x_stride;
};

// y = activation(x + bias); items are rows.
struct ActivationFwd {
  const void* x;     // T (rows, width)
  const void* bias;  // T (width) or null
  void* y;           // T (rows, width)
  int64_t rows, width;
  Activation activation;
};

struct ActivationBwd {
  const void* dy;    // T (rows, width)
  const void* x;     // T (rows, width)
  const void* bias;  // T (width) or null
  void* dx;          // T (rows, width)
  int64_t rows, width;
  Activation activation;
};

enum class MaskKind : int32_t { none, boolean, additive };

// Attention mask or softmax mask, broadcast by strides (0 where it repeats).
struct Mask {
  const void* data;
  MaskKind kind;
  bool wide;  // additive: stored in the accumulate type rather than in T
  int64_t stride_b, stride_h, stride_q, stride_k;
};

// y = softmax(x + mask) over rows of `width`; the row index is (b, h, q) with q the fastest. Fully masked rows give zeros.
struct SoftmaxFwd {
  const void* x;  // T (batch, heads, queries, width)
  void* y;        // the same
  int64_t batch, heads, queries, width;
  Mask mask;
  bool is_causal;
};

struct SoftmaxBwd {
  const void* dy;  // T (rows, width)
  const void* y;   // T (rows, width)
  void* dx;        // T (rows, width)
  int64_t rows, width;
};

// Where the matrices of attention lie: element (b, h, t, d) of a tensor is at b * stride_b + h * stride_h + t * stride_t + d.
struct Strides {
  int64_t b, h, t;
};

// Fused attention. Padded: sequence b holds `queries` rows and key_lengths[b] <= keys keys. Packed (varlen): sequence b
// holds rows cu_queries[b] .. cu_queries[b + 1] of the token axis (stride b is not used), and likewise its keys; `queries` and
// `keys` are those of the longest sequence.
struct AttentionShape {
  int64_t batch, heads, kv_heads, queries, keys, width, value_width;
  const int64_t* key_lengths;  // (batch) or null
  const int64_t* key_places;   // (batch, keys) or null: where the key_lengths[b] keys of sequence b stand, ascending; no
                               // query sees any other
  const int64_t* cu_queries;   // (batch + 1) or null: packed
  const int64_t* cu_keys;      // (batch + 1) or null
  int64_t query_offset;
  int64_t window_left, window_right;  // negative: unlimited
  bool is_causal;
  double scale;
  Mask mask;
  const void* alibi_slopes;  // A (heads) or null
  Dropout dropout;
  int64_t first_pair, pairs;  // the (sequence, kv head) pairs of this launch; pairs 0: all of them
};

struct AttentionFwd {
  AttentionShape shape;
  const void *q, *k, *v;  // T
  Strides q_strides, k_strides, v_strides, out_strides;
  void* out;                       // T
  void* lse;                       // A: (batch, heads, queries), or packed (heads, total queries); or null
  void* stats;                     // A, two for each lse: the largest score as the kernel keeps it, and 1 / the sum of
                                   // exponentials above it; null with lse
  void *k_packed, *v_packed;       // from attention_pack, or null: items pack their own, and are fewer
};

// Packs keys and values of every (sequence, kv head) once, for all the query tiles that read them.
struct AttentionPack {
  AttentionShape shape;
  const void *k, *v;  // T
  Strides k_strides, v_strides;
  void *k_packed, *v_packed;
};

struct AttentionBwd {
  AttentionShape shape;
  const void *dout, *q, *k, *v, *out;  // T
  Strides dout_strides, q_strides, k_strides, v_strides, out_strides, dq_strides, dk_strides, dv_strides;
  const void* stats;   // A, from the forward: the sum of lse's two parts would round off what they hold
  const void* dlse;    // A or null: gradient that reaches lse itself
  const void* dweights;  // T or null: gradient that reaches the weights, (batch, heads, queries, keys), or where it
                         // `averages` them over the heads (batch, queries, keys); not of packed sequences
  bool averages;
  void *dq, *dk, *dv;  // T
  void* dq_partial;    // attention_dq_bytes for each pair of the launch: items are chunks of keys, and attention_dq
                       // makes dq of their shares; or null: items are pairs
};

// The gradient of an additive mask: dS, summed over the axes that the mask has once for all. The call is that of the
// backward, whose own results are not read.
struct AttentionBiasBwd : AttentionBwd {
  void* dmask;  // dense (mask_batch, mask_heads, mask_queries, mask_keys), each of them 1 or full; of the mask's type
  int64_t mask_batch, mask_heads, mask_queries, mask_keys;
};

// The gradient of the ALiBi slopes: dS times minus the distance, summed over the queries and keys of one sequence.
struct AttentionAlibiBwd : AttentionBwd {
  void* dslopes_partial;  // A (batch, heads)
};

// The weights that the forward applied, dropped ones too. The call is that of the backward, without gradients.
struct AttentionWeightsFwd : AttentionBwd {
  void* weights;  // T, as dweights
};
// What dweights adds to delta: the sum of weights times dweights over each row. Without dout.
struct AttentionWeightsBwd : AttentionBwd {
  void* dlse_total;  // A (batch, heads, queries): dlse less that sum
};

// Copies a (k, n) matrix, given by its strides, to panels of the tile's width: [panel][k][column], zero-padded.
struct PackB {
  const void* b;  // T
  int64_t k_stride, n_stride, k, n;
  bool on_vectors;  // as the Gemm's that takes it
  void* packed;  // P; in parts, bf16
};

// c = epilogue(a b): bias, stored pre-activation, activation, dropout, residual; or, backward, times activation'(preact).
struct Gemm {
  const void* a;  // T (m, k), by its strides
  int64_t a_row_stride, a_k_stride;
  const void* b;  // T (k, n), by its strides; not read where it is packed and its products are not of parts
  int64_t b_k_stride, b_n_stride;
  const void* packed_b;  // from PackB, or null
  int64_t m, n, k;
  int64_t threads;  // how many will share the work: decides how it is cut, and nothing else
  bool on_vectors;  // products that the matrix unit would take in parts (split.inl), which for a few rows takes longer
  const void* bias;  // T (n) or null
  Activation activation;
  void* preact;             // T (m, n) or null: a b + bias
  const void* grad_preact;  // T (m, n) or null: c = dropout(a b) * activation'(grad_preact), and
  void* recomputed;         // T (m, n) or null: dropout(activation(grad_preact))
  const void* residual;     // T (m, n) or null: added last
  void* c;                  // T (m, n)
  bool residual_is_wide, c_is_wide;  // A in place of T: a product of many parts is rounded once
  int64_t c_stride;         // also of preact, grad_preact, recomputed and residual
  int64_t row_offset;       // index of row 0 in the whole matrix, for the dropout
  Dropout dropout;
};

// Cross-entropy over classes that come a stretch after the other, those from first_class on in this call. The target
// distribution gives 1 - label_smoothing to the target and spreads the rest over all classes. A line of logits is a class's,
// as lanes are rows. Items are vectors of rows.
struct CrossEntropyFwd {
  const void* logits;     // A (columns, rows), row stride logits_stride, without the bias
  const void* bias;       // T (columns) or null
  const int64_t* target;  // (places)
  const int64_t* places;  // (rows): which line of target, stats and loss each row has
  void* stats;            // A (places, 2): the largest logit so far, and the sum of exponentials above it
  void* loss;  // A (places): the target distribution's mean of the logits so far; after the last stretch, the loss
  int64_t rows, columns, logits_stride, first_class, classes;
  double label_smoothing;
};

struct CrossEntropyBwd {
  const void* logits;  // these as above
  const void* bias;
  const int64_t* target;
  const int64_t* places;
  const void* stats;  // A (places, 2), of all classes
  const void* grad;   // A: one for each place, or one
  bool grad_is_shared;
  int64_t divisor;  // of the gradient
  void* dlogits;    // T (columns, rows), row stride logits_stride; may be the logits, where T is A
  int64_t rows, columns, logits_stride, first_class, classes;
  double label_smoothing;
};

// sum[i] = the sum of line i of x, added to what is there unless it is the `first`; out[i], after the `last`. Items are
// lines.
struct LineSum {
  const void* x;  // T (lines, width), row stride x_stride
  void* sum;      // A (lines)
  void* out;      // T (lines), or null where others are still to be added
  int64_t lines, width, x_stride;
  bool first;
};

// out = the sum of the losses / divisor; one item.
struct CrossEntropySum {
  const void* loss;  // A (count)
  int64_t count, divisor;
  void* out;  // A
};

// y = dropout(layer_norm(token_scale * token_weight[token] + position_weight[position] + segment_weight[segment])); items
// are rows.
struct Embedding {
  const int64_t* token_ids;     // (rows)
  const int64_t* position_ids;  // (rows), or null: offset + row % length
  const int64_t* segment_ids;   // (rows), or null: 0
  const void* token_weight;     // T (.., width)
  const void* position_weight;  // T (.., width) or null
  const void* segment_weight;   // T (.., width) or null
  const void* norm_weight;      // T (width), or null: no layer norm
  const void* norm_bias;        // T (width) or null
  int64_t rows, width, length, offset;
  double token_scale, eps;
  Dropout dropout;
};

struct EmbeddingFwd : Embedding {
  void* y;  // T (rows, width)
};

// Items are chunks of rows; each writes its own line of the partial sums, which reduce_rows adds in order.
struct EmbeddingBwd : Embedding {
  const void* dy;         // T (rows, width)
  void* dx;               // A (rows, width): gradient of the sum of the entries
  void* dweight_partial;  // A (chunks, width) or null
  void* dbias_partial;    // A (chunks, width) or null
  int64_t partial_stride;
};

// out[entries[i]] = scale * the sum of the rows of x that list i names, in its order, by blocks of kSumBlock. Items are
// (list, group of kListVectors vectors of columns).
struct ListSum {
  const void* x;          // A (rows, width)
  const int64_t* order;   // the lists' rows, one list after the other
  const int64_t* starts;  // (lists + 1): where in `order`
  const int64_t* entries;  // (lists)
  void* out;               // T (.., width)
  int64_t lists, width;
  double scale;
};

// Multiply-adds that stay in registers, which no product can outrun; each item is one thread's.
struct Peak {
  int64_t items, steps;
  void* out;  // A (items): of no use but that it depends on all of them
};

// The sum of every chunk of x: how fast memory can be read.
struct Read {
  const void* x;  // T (count); what is left after the last whole chunk of kReadChunk is not read
  int64_t count;
  void* sums;  // A (items)
};
constexpr int64_t kReadChunk = 1 << 14;

constexpr int kDTypes = 4;  // in the order of DType

struct KernelTable {
  const char* isa;
  bool takes_parts[kDTypes];  // whether linear layers and attention take values in parts, unless on_vectors
  size_t (*packed_b_bytes[kDTypes])(int64_t k, int64_t n, bool on_vectors);
  size_t (*attention_packed_bytes[kDTypes])(const AttentionShape&, int64_t width);
  size_t (*attention_dq_bytes[kDTypes])(const AttentionShape&);  // 0 where there is one chunk

  Kernel<LayerNormFwd> layer_norm_fwd[kDTypes];
  Kernel<LayerNormBwd> layer_norm_bwd[kDTypes];
  Kernel<ReduceRows> reduce_rows[kDTypes];
  Kernel<ColumnSum> column_sum[kDTypes];
  Kernel<ActivationFwd> activation_fwd[kDTypes];
  Kernel<ActivationBwd> activation_bwd[kDTypes];
  Kernel<SoftmaxFwd> softmax_fwd[kDTypes];
  Kernel<SoftmaxBwd> softmax_bwd[kDTypes];
  Kernel<CrossEntropyFwd> cross_entropy_fwd[kDTypes];
  Kernel<CrossEntropyBwd> cross_entropy_bwd[kDTypes];
  Kernel<CrossEntropySum> cross_entropy_sum[kDTypes];
  Kernel<LineSum> line_sum[kDTypes];
  Kernel<EmbeddingFwd> embedding_fwd[kDTypes];
  Kernel<EmbeddingBwd> embedding_bwd[kDTypes];
  Kernel<ListSum> list_sum[kDTypes];
  Kernel<PackB> pack_b[kDTypes];
  Kernel<Gemm> gemm[kDTypes];
  Kernel<AttentionPack> attention_pack[kDTypes];
  Kernel<AttentionFwd> attention_fwd[kDTypes];
  Kernel<AttentionBwd> attention_bwd[kDTypes];
  Kernel<AttentionBwd> attention_dq[kDTypes];
  Kernel<AttentionBiasBwd> attention_bias_bwd[kDTypes];
  Kernel<AttentionAlibiBwd> attention_alibi_bwd[kDTypes];
  Kernel<AttentionWeightsFwd> attention_weights_fwd[kDTypes];
  Kernel<AttentionWeightsBwd> attention_weights_bwd[kDTypes];
  Kernel<Peak> peak[kDTypes];
  double peak_step_flops[kDTypes];  // of one step, in one item
  Kernel<Read> read[kDTypes];
};

// Rows are summed in chunks whose number depends on the rows alone, so that sums do not depend on the threads. Chunks are
// short: the rounding error of a sum grows with the length of its chain.
constexpr int64_t kSumChunkRows = 8;
constexpr int64_t kSumMaxChunks = 256;
// Vectors or rows whose sum is taken by itself, before it is added to the rest: shorter chains round less.
constexpr int64_t kSumBlock = 16;
static inline int64_t sum_chunk_rows(int64_t rows) {
  const int64_t even = (rows + kSumMaxChunks - 1) / kSumMaxChunks;
  return even > kSumChunkRows ? even : kSumChunkRows;
}
static inline int64_t sum_chunks(int64_t rows) {
  const int64_t chunk = sum_chunk_rows(rows);
  return (rows + chunk - 1) / chunk;
}

}  // namespace fasttx
