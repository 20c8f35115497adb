// bf16 products on AMX tiles: https://www.intel.com/sdm, volume 1, chapter 18.

// A tile register holds 16 rows of 64 bytes: of sums, 16 columns in float; of a left operand, 32 values of k; of a panel,
// 16 columns of one step (two values of k) each row.
constexpr int kAmxRows = 16;
constexpr int kAmxCols = 16;
constexpr int kAmxK = 32;

#if defined(__AMX_BF16__)
template <int kTile>
FASTTX_INLINE void amx_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
}
template <int kTile>
FASTTX_INLINE void amx_load(const void* rows, int64_t stride_bytes) {
  asm volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(kTile), "r"(rows), "r"(stride_bytes) : "memory");
}
template <int kTile>
FASTTX_INLINE void amx_store(void* rows, int64_t stride_bytes) {
  asm volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(kTile), "r"(rows), "r"(stride_bytes) : "memory");
}
// Tile kSum += tile kLeft * tile kRight.
template <int kSum, int kLeft, int kRight>
FASTTX_INLINE void amx_multiply() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kLeft), "i"(kRight));
}

// A product whose sums nobody wants. A matrix unit that has rested while the vector unit worked begins its next product
// late; one now and then keeps it from resting (of attention's forward that saves an eighth of the time).
FASTTX_INLINE void amx_keep_awake() { amx_multiply<0, 4, 6>(); }

// The thread's tile registers, its own for as long as this lives: 0 to 3 are sums, two by two; 4 and 5 rows of the left
// operand, 6 and 7 columns of the panel.
class AmxTiles {
 public:
  AmxTiles() { set_rows(kAmxRows, kAmxRows); }
  ~AmxTiles() { asm volatile("tilerelease"); }
  AmxTiles(const AmxTiles&) = delete;

  // How many rows the upper and the lower tiles of sums and left operand have. Clears every register.
  void set_rows(int upper, int lower) {
    if (upper == upper_ && lower == lower_) return;
    upper_ = upper;
    lower_ = lower;
    struct alignas(64) {
      uint8_t palette, start_row, reserved[14];
      uint16_t row_bytes[16];
      uint8_t rows[16];
    } config = {};
    config.palette = 1;
    for (int tile = 0; tile < 8; ++tile) {
      const bool is_lower = tile == 2 || tile == 3 || tile == 5, is_panel = tile >= 6;
      config.row_bytes[tile] = 64;
      config.rows[tile] = static_cast<uint8_t>(is_panel ? kAmxK / 2 : is_lower ? lower : upper);
    }
    asm volatile("ldtilecfg %0" ::"m"(config));
  }

 private:
  int upper_ = 0, lower_ = 0;
};

// out = a panel, or out + a panel, for one or two tiles of rows and of columns. Calls meanwhile() once a step: tile
// instructions are few and take long, so that the vector unit has time for other work.
template <int kPanelCols, bool kLower, bool kRight, class F>
static FASTTX_INLINE void amx_block(const bf16* a, int64_t a_stride, int64_t a_step, const bf16* panel, int64_t k,
                                    bool add, float* out, int64_t out_stride, const F& meanwhile) {
  constexpr int64_t kPanelStride = kPanelCols * 2 * sizeof(bf16);
  const int64_t a_bytes = a_stride * sizeof(bf16), out_bytes = out_stride * sizeof(float);
  const int64_t lower_a = kAmxRows * a_stride;
  float* lower = out + kAmxRows * out_stride;
  if (add) {
    amx_load<0>(out, out_bytes);
    if constexpr (kRight) amx_load<1>(out + kAmxCols, out_bytes);
    if constexpr (kLower) amx_load<2>(lower, out_bytes);
    if constexpr (kLower && kRight) amx_load<3>(lower + kAmxCols, out_bytes);
  } else {
    amx_zero<0>();
    if constexpr (kRight) amx_zero<1>();
    if constexpr (kLower) amx_zero<2>();
    if constexpr (kLower && kRight) amx_zero<3>();
  }
  for (int64_t kk = 0; kk < k; kk += kAmxK, a += a_step, panel += kAmxK * kPanelCols) {
    amx_load<6>(panel, kPanelStride);
    amx_load<4>(a, a_bytes);
    if constexpr (kRight) amx_load<7>(panel + 2 * kAmxCols, kPanelStride);
    if constexpr (kLower) amx_load<5>(a + lower_a, a_bytes);
    amx_multiply<0, 4, 6>();
    if constexpr (kRight) amx_multiply<1, 4, 7>();
    if constexpr (kLower) amx_multiply<2, 5, 6>();
    if constexpr (kLower && kRight) amx_multiply<3, 5, 7>();
    meanwhile();
  }
  amx_store<0>(out, out_bytes);
  if constexpr (kRight) amx_store<1>(out + kAmxCols, out_bytes);
  if constexpr (kLower) amx_store<2>(lower, out_bytes);
  if constexpr (kLower && kRight) amx_store<3>(lower + kAmxCols, out_bytes);
}

// out (rows, columns up to a whole vector) = a panel, or out + a panel, over one panel of kPanelCols columns. `k` is a
// multiple of kAmxK, with zeros where the operands are shorter. Row i of `a` starts at a + i * a_stride, and its next
// kAmxK values lie `a_step` further on. meanwhile() is called again and again.
template <int kPanelCols, class F>
static inline void amx_product(AmxTiles& tiles, const bf16* a, int64_t a_stride, int64_t a_step, const bf16* panel,
                               int64_t k, int64_t rows, int64_t columns, bool add, float* out, int64_t out_stride,
                               const F& meanwhile) {
  for (int64_t row = 0; row < rows; row += 2 * kAmxRows) {
    const int upper = static_cast<int>(min_of(kAmxRows, rows - row));
    const int lower = static_cast<int>(max_of(0, min_of(kAmxRows, rows - row - kAmxRows)));
    tiles.set_rows(upper, lower == 0 ? kAmxRows : lower);
    for (int64_t column = 0; column < columns; column += 2 * kAmxCols) {
      const auto block = [&]<bool kLower, bool kRight>() {
        amx_block<kPanelCols, kLower, kRight>(a + row * a_stride, a_stride, a_step, panel + 2 * column, k, add,
                                              out + row * out_stride + column, out_stride, meanwhile);
      };
      if (columns - column > kAmxCols) {
        lower > 0 ? block.template operator()<true, true>() : block.template operator()<false, true>();
      } else {
        lower > 0 ? block.template operator()<true, false>() : block.template operator()<false, false>();
      }
    }
  }
}
template <int kPanelCols>
static inline void amx_product(AmxTiles& tiles, const bf16* a, int64_t a_stride, int64_t a_step, const bf16* panel,
                               int64_t k, int64_t rows, int64_t columns, bool add, float* out, int64_t out_stride) {
  amx_product<kPanelCols>(tiles, a, a_stride, a_step, panel, k, rows, columns, add, out, out_stride, [] {});
}
#endif

// What a kernel holds while it multiplies values of T.
struct NoUnit {};
template <class T>
struct ProductUnitOf {
  using type = NoUnit;
};
#if defined(__AMX_BF16__)
template <>
struct ProductUnitOf<bf16> {
  using type = AmxTiles;
};
#endif
#if defined(FASTTX_SPLITS)
template <>
struct ProductUnitOf<Split> {
  using type = AmxTiles;
};
#endif
template <class T>
using ProductUnit = typename ProductUnitOf<T>::type;
