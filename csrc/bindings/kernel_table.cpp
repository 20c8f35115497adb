// The kernel table as Python sees it: every kernel of every instruction set, so that tests reach each of them directly.
#include <stdexcept>
#include <type_traits>

#include "host.h"

namespace py = pybind11;

namespace fasttx::bindings {
namespace {

void from_code(int code, Activation& value) { value = make_activation(code); }
void from_code(int code, MaskKind& value) {
  if (code < 0 || code > static_cast<int>(MaskKind::additive)) throw std::invalid_argument("unknown kind of mask");
  value = static_cast<MaskKind>(code);
}

// A struct of arguments, field by field: pointers read and written as addresses (what tensor.data_ptr() gives), enums as
// their codes; with those of a Base.
template <class Args, class... Base>
class Fields {
 public:
  Fields(py::module_& m, const char* name) : type_(m, name) { type_.def(py::init<>()); }

  template <class Field>
  Fields& add(const char* name, Field Args::* field) {
    if constexpr (std::is_pointer_v<Field>) {
      type_.def_property(
          name, [field](const Args& args) { return reinterpret_cast<uintptr_t>(args.*field); },
          [field](Args& args, uintptr_t value) { args.*field = reinterpret_cast<Field>(value); });
    } else if constexpr (std::is_enum_v<Field>) {
      type_.def_property(
          name, [field](const Args& args) { return static_cast<int>(args.*field); },
          [field](Args& args, int code) { from_code(code, args.*field); });
    } else {
      type_.def_readwrite(name, field);
    }
    return *this;
  }

 private:
  py::class_<Args, Base...> type_;
};
#define FIELD(args, name) add(#name, &args::name)

int checked_dtype(int dtype) {
  if (dtype < 0 || dtype >= kDTypes) throw std::invalid_argument("dtype must be an index of `dtypes`");
  return dtype;
}

// run_<op>(isa, dtype, args, begin, end): one range of a kernel's items on the calling thread; end < 0 means all. Returns
// how many items there are.
template <class Args>
void kernel(py::module_& m, const char* name, Kernel<Args> (KernelTable::*entry)[kDTypes]) {
  m.def((std::string("run_") + name).c_str(),
        [entry](const std::string& isa, int dtype, const Args& args, int64_t begin, int64_t end) {
          const Kernel<Args>& k = (isa_named(isa).table->*entry)[checked_dtype(dtype)];
          const Plan plan = k.plan(args);
          if (end < 0) end = plan.items;
          if (begin < 0 || begin > end || end > plan.items) {
            throw std::invalid_argument("begin and end must lie in order within the " + std::to_string(plan.items) +
                                        " items");
          }
          const Workspace scratch(plan.scratch_bytes);
          k.run(args, scratch.data(), begin, end);
          return plan.items;
        },
        py::arg("isa"), py::arg("dtype"), py::arg("args"), py::arg("begin") = 0, py::arg("end") = -1);
}
#define KERNEL(name) kernel(m, #name, &KernelTable::name)

void define_norms(py::module_& m) {
  using F = LayerNormFwd;
  Fields<F>(m, "LayerNormFwd").FIELD(F, x).FIELD(F, residual).FIELD(F, weight).FIELD(F, bias).FIELD(F, y).FIELD(F, sum)
      .FIELD(F, rows).FIELD(F, width).FIELD(F, eps).FIELD(F, dropout).FIELD(F, streamed);
  using B = LayerNormBwd;
  Fields<B>(m, "LayerNormBwd").FIELD(B, dy).FIELD(B, dsum).FIELD(B, x).FIELD(B, weight)
      .FIELD(B, dx).FIELD(B, dinput).FIELD(B, dweight_partial).FIELD(B, dbias_partial).FIELD(B, rows).FIELD(B, width)
      .FIELD(B, partial_stride).FIELD(B, eps).FIELD(B, dropout).FIELD(B, streamed);
  KERNEL(layer_norm_fwd);
  KERNEL(layer_norm_bwd);
}

void define_sums(py::module_& m) {
  using R = ReduceRows;
  Fields<R>(m, "ReduceRows").FIELD(R, partial).FIELD(R, out).FIELD(R, rows).FIELD(R, width)
      .FIELD(R, row_stride).FIELD(R, tail).FIELD(R, split);
  using S = ColumnSum;
  Fields<S>(m, "ColumnSum").FIELD(S, x).FIELD(S, partial).FIELD(S, rows).FIELD(S, width).FIELD(S, x_stride);
  m.def("sum_chunks", &sum_chunks, py::arg("rows"), "Chunks that this many rows are summed in.");
  KERNEL(reduce_rows);
  KERNEL(column_sum);
}

void define_pointwise(py::module_& m) {
  using F = ActivationFwd;
  Fields<F>(m, "ActivationFwd").FIELD(F, x).FIELD(F, bias).FIELD(F, y).FIELD(F, rows).FIELD(F, width).FIELD(F, activation);
  using B = ActivationBwd;
  Fields<B>(m, "ActivationBwd").FIELD(B, dy).FIELD(B, x).FIELD(B, bias).FIELD(B, dx).FIELD(B, rows).FIELD(B, width)
      .FIELD(B, activation);
  KERNEL(activation_fwd);
  KERNEL(activation_bwd);
}

void define_softmax(py::module_& m) {
  using F = SoftmaxFwd;
  Fields<F>(m, "SoftmaxFwd").FIELD(F, x).FIELD(F, y).FIELD(F, batch).FIELD(F, heads).FIELD(F, queries).FIELD(F, width)
      .FIELD(F, mask).FIELD(F, is_causal);
  using B = SoftmaxBwd;
  Fields<B>(m, "SoftmaxBwd").FIELD(B, dy).FIELD(B, y).FIELD(B, dx).FIELD(B, rows).FIELD(B, width);
  KERNEL(softmax_fwd);
  KERNEL(softmax_bwd);
}

void define_cross_entropy(py::module_& m) {
  using F = CrossEntropyFwd;
  Fields<F>(m, "CrossEntropyFwd").FIELD(F, logits).FIELD(F, bias).FIELD(F, target).FIELD(F, places).FIELD(F, stats).FIELD(F, loss)
      .FIELD(F, rows).FIELD(F, columns).FIELD(F, logits_stride).FIELD(F, first_class).FIELD(F, classes)
      .FIELD(F, label_smoothing);
  using B = CrossEntropyBwd;
  Fields<B>(m, "CrossEntropyBwd").FIELD(B, logits).FIELD(B, bias).FIELD(B, target).FIELD(B, places).FIELD(B, stats).FIELD(B, grad)
      .FIELD(B, grad_is_shared).FIELD(B, divisor).FIELD(B, dlogits).FIELD(B, rows).FIELD(B, columns)
      .FIELD(B, logits_stride).FIELD(B, first_class).FIELD(B, classes).FIELD(B, label_smoothing);
  using S = CrossEntropySum;
  Fields<S>(m, "CrossEntropySum").FIELD(S, loss).FIELD(S, count).FIELD(S, divisor).FIELD(S, out);
  KERNEL(cross_entropy_fwd);
  KERNEL(cross_entropy_bwd);
  KERNEL(cross_entropy_sum);
  using L = LineSum;
  Fields<L>(m, "LineSum").FIELD(L, x).FIELD(L, sum).FIELD(L, out).FIELD(L, lines).FIELD(L, width).FIELD(L, x_stride)
      .FIELD(L, first);
  KERNEL(line_sum);
}

void define_embedding(py::module_& m) {
  using E = Embedding;
  Fields<E>(m, "Embedding").FIELD(E, token_ids).FIELD(E, position_ids).FIELD(E, segment_ids).FIELD(E, token_weight)
      .FIELD(E, position_weight).FIELD(E, segment_weight).FIELD(E, norm_weight).FIELD(E, norm_bias).FIELD(E, rows)
      .FIELD(E, width).FIELD(E, length).FIELD(E, offset).FIELD(E, token_scale).FIELD(E, eps).FIELD(E, dropout);
  using F = EmbeddingFwd;
  Fields<F, E>(m, "EmbeddingFwd").FIELD(F, y);
  using B = EmbeddingBwd;
  Fields<B, E>(m, "EmbeddingBwd").FIELD(B, dy).FIELD(B, dx).FIELD(B, dweight_partial).FIELD(B, dbias_partial)
      .FIELD(B, partial_stride);
  using S = ListSum;
  Fields<S>(m, "ListSum").FIELD(S, x).FIELD(S, order).FIELD(S, starts).FIELD(S, entries).FIELD(S, out).FIELD(S, lists)
      .FIELD(S, width).FIELD(S, scale);
  KERNEL(embedding_fwd);
  KERNEL(embedding_bwd);
  KERNEL(list_sum);
}

void define_products(py::module_& m) {
  using B = PackB;
  Fields<B>(m, "PackB").FIELD(B, b).FIELD(B, k_stride).FIELD(B, n_stride).FIELD(B, k).FIELD(B, n).FIELD(B, on_vectors)
      .FIELD(B, packed);
  using G = Gemm;
  Fields<G>(m, "Gemm").FIELD(G, a).FIELD(G, a_row_stride).FIELD(G, a_k_stride).FIELD(G, b).FIELD(G, b_k_stride)
      .FIELD(G, b_n_stride).FIELD(G, packed_b).FIELD(G, m).FIELD(G, n).FIELD(G, k).FIELD(G, threads)
      .FIELD(G, on_vectors).FIELD(G, bias).FIELD(G, activation).FIELD(G, preact).FIELD(G, grad_preact)
      .FIELD(G, recomputed).FIELD(G, residual).FIELD(G, c).FIELD(G, residual_is_wide).FIELD(G, c_is_wide)
      .FIELD(G, c_stride).FIELD(G, row_offset).FIELD(G, dropout);
  KERNEL(pack_b);
  KERNEL(gemm);
}

void define_attention(py::module_& m) {
  Fields<Strides>(m, "Strides").FIELD(Strides, b).FIELD(Strides, h).FIELD(Strides, t);
  using S = AttentionShape;
  Fields<S>(m, "AttentionShape").FIELD(S, batch).FIELD(S, heads).FIELD(S, kv_heads).FIELD(S, queries).FIELD(S, keys)
      .FIELD(S, width).FIELD(S, value_width).FIELD(S, key_lengths).FIELD(S, key_places).FIELD(S, cu_queries).FIELD(S, cu_keys)
      .FIELD(S, query_offset).FIELD(S, window_left).FIELD(S, window_right).FIELD(S, is_causal).FIELD(S, scale)
      .FIELD(S, mask).FIELD(S, alibi_slopes).FIELD(S, dropout).FIELD(S, first_pair).FIELD(S, pairs);
  using P = AttentionPack;
  Fields<P>(m, "AttentionPack").FIELD(P, shape).FIELD(P, k).FIELD(P, v).FIELD(P, k_strides).FIELD(P, v_strides)
      .FIELD(P, k_packed).FIELD(P, v_packed);
  using F = AttentionFwd;
  Fields<F>(m, "AttentionFwd").FIELD(F, shape).FIELD(F, q).FIELD(F, k).FIELD(F, v).FIELD(F, q_strides)
      .FIELD(F, k_strides).FIELD(F, v_strides).FIELD(F, out_strides).FIELD(F, out).FIELD(F, lse).FIELD(F, stats)
      .FIELD(F, k_packed).FIELD(F, v_packed);
  using B = AttentionBwd;
  Fields<B>(m, "AttentionBwd").FIELD(B, shape).FIELD(B, dout).FIELD(B, q).FIELD(B, k).FIELD(B, v).FIELD(B, out)
      .FIELD(B, dout_strides).FIELD(B, q_strides).FIELD(B, k_strides).FIELD(B, v_strides).FIELD(B, out_strides)
      .FIELD(B, dq_strides).FIELD(B, dk_strides).FIELD(B, dv_strides).FIELD(B, stats).FIELD(B, dlse).FIELD(B, dweights)
      .FIELD(B, averages).FIELD(B, dq).FIELD(B, dk).FIELD(B, dv).FIELD(B, dq_partial);
  using M = AttentionBiasBwd;
  Fields<M, B>(m, "AttentionBiasBwd").FIELD(M, dmask).FIELD(M, mask_batch).FIELD(M, mask_heads).FIELD(M, mask_queries)
      .FIELD(M, mask_keys);
  using L = AttentionAlibiBwd;
  Fields<L, B>(m, "AttentionAlibiBwd").FIELD(L, dslopes_partial);
  using W = AttentionWeightsFwd;
  Fields<W, B>(m, "AttentionWeightsFwd").FIELD(W, weights);
  using D = AttentionWeightsBwd;
  Fields<D, B>(m, "AttentionWeightsBwd").FIELD(D, dlse_total);
  KERNEL(attention_pack);
  KERNEL(attention_fwd);
  KERNEL(attention_bwd);
  KERNEL(attention_dq);
  KERNEL(attention_bias_bwd);
  KERNEL(attention_alibi_bwd);
  KERNEL(attention_weights_fwd);
  KERNEL(attention_weights_bwd);
}

// launch_<op>(isa, dtype, args): all items on PyTorch's threads, for what is timed by itself.
template <class Args>
void launcher(py::module_& m, const char* name, Kernel<Args> (KernelTable::*entry)[kDTypes]) {
  m.def((std::string("launch_") + name).c_str(), [entry](const std::string& isa, int dtype, const Args& args) {
    launch((isa_named(isa).table->*entry)[checked_dtype(dtype)], args);
  }, py::arg("isa"), py::arg("dtype"), py::arg("args"));
}

void define_limits(py::module_& m) {
  using P = Peak;
  Fields<P>(m, "Peak").FIELD(P, items).FIELD(P, steps).FIELD(P, out);
  using R = Read;
  Fields<R>(m, "Read").FIELD(R, x).FIELD(R, count).FIELD(R, sums);
  m.def("peak_step_flops", [](const std::string& isa, int dtype) {
    return isa_named(isa).table->peak_step_flops[checked_dtype(dtype)];
  }, py::arg("isa"), py::arg("dtype"), "FLOP of one step of the peak loop, in each item.");
  m.attr("read_chunk") = kReadChunk;
  KERNEL(peak);
  KERNEL(read);
  launcher(m, "peak", &KernelTable::peak);
  launcher(m, "read", &KernelTable::read);
}

}  // namespace

void define_kernels(py::module_& m) {
  py::class_<Dropout>(m, "Dropout")
      .def(py::init([](uint64_t seed, uint32_t threshold, double scale) { return Dropout{seed, threshold, scale, true}; }));
  Fields<Mask>(m, "Mask").FIELD(Mask, data).FIELD(Mask, kind).FIELD(Mask, wide).FIELD(Mask, stride_b)
      .FIELD(Mask, stride_h).FIELD(Mask, stride_q).FIELD(Mask, stride_k);
  define_norms(m);
  define_sums(m);
  define_pointwise(m);
  define_softmax(m);
  define_cross_entropy(m);
  define_embedding(m);
  define_products(m);
  define_attention(m);
  define_limits(m);
}

}  // namespace fasttx::bindings
