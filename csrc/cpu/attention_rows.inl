// The rows of a sequence that take part in attention: keys that some query may see, and in the backward queries that a
// gradient reaches. Tiles are counted among those alone, so that rows that stand before or between them change no sum.

// The positions of `count` rows, ascending; without a list, 0, 1, 2, ...
struct Places {
  int64_t count;
  const int64_t* list;

  int64_t operator[](int64_t i) const { return list == nullptr ? i : list[i]; }
  // Whether rows [first, first + n), n > 0, stand side by side.
  bool adjoin(int64_t first, int64_t n) const {
    return list == nullptr || list[first + n - 1] - list[first] == n - 1;
  }
  // How many stand before a position.
  int64_t before(int64_t position) const {
    if (list == nullptr) return max_of(0, min_of(count, position));
    int64_t low = 0, high = count;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (list[middle] < position) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  }
};

// Rows of a matrix, `stride` values apart.
template <class T>
struct MatrixRows {
  const T* first;
  int64_t stride;
  const T* operator[](int64_t row) const { return first + row * stride; }
};

// Rows [first, first + n), n > 0, of those at `places`: where they lie if they are side by side, else copied to
// `buffer`.
template <class T>
static MatrixRows<T> rows_at(const MatrixRows<T>& matrix, const Places& places, int64_t first, int64_t n, int64_t width,
                             T* buffer) {
  if (places.adjoin(first, n)) return {matrix[places[first]], matrix.stride};
  for (int64_t i = 0; i < n; ++i) memcpy(buffer + i * width, matrix[places[first + i]], sizeof(T) * width);
  return {buffer, width};
}

// Zeros those of `rows` rows that are not at `places`.
template <class T>
static void clear_others(T* matrix, int64_t stride, const Places& places, int64_t rows, int64_t width) {
  int64_t next = 0;
  for (int64_t row = 0; row < rows; ++row) {
    if (next < places.count && places[next] == row) {
      ++next;
    } else {
      memset(matrix + row * stride, 0, sizeof(T) * width);
    }
  }
}

// Whether all values of a row are zero, of either sign.
template <class T>
static bool is_zero(const T* row, int64_t width) {
  for (int64_t i = 0; i < width; ++i) {
    uint64_t bits = 0;
    memcpy(&bits, row + i, sizeof(T));
    if (bits << (65 - 8 * sizeof(T)) != 0) return false;
  }
  return true;
}

// One sequence of the batch: its queries, where its rows lie on the token axis, and the keys that take part.
struct Sequence {
  int64_t batch, queries, first_query, first_key;
  Places keys;
};
static inline Sequence sequence_of(const AttentionShape& g, int64_t b) {
  if (g.cu_queries != nullptr) {
    return {b, g.cu_queries[b + 1] - g.cu_queries[b], g.cu_queries[b], g.cu_keys[b],
            {g.cu_keys[b + 1] - g.cu_keys[b], nullptr}};
  }
  return {b, g.queries, 0, 0,
          {g.key_lengths == nullptr ? g.keys : g.key_lengths[b],
           g.key_places == nullptr ? nullptr : g.key_places + b * g.keys}};
}
template <class T>
static inline const T* first_row(const void* data, const Strides& strides, const AttentionShape& g, int64_t batch,
                                 int64_t head, int64_t row) {
  return static_cast<const T*>(data) + (g.cu_queries == nullptr ? batch * strides.b : 0) + head * strides.h +
         row * strides.t;
}
template <class T>
static inline T* first_row(void* data, const Strides& strides, const AttentionShape& g, int64_t batch, int64_t head,
                           int64_t row) {
  return const_cast<T*>(first_row<T>(static_cast<const void*>(data), strides, g, batch, head, row));
}
// All queries or keys of one head of a sequence.
template <class T>
static inline MatrixRows<T> queries_of(const AttentionShape& g, const void* data, const Strides& strides,
                                       const Sequence& sequence, int64_t head) {
  return {first_row<T>(data, strides, g, sequence.batch, head, sequence.first_query), strides.t};
}
template <class T>
static inline MatrixRows<T> keys_of(const AttentionShape& g, const void* data, const Strides& strides,
                                    const Sequence& sequence, int64_t head) {
  return {first_row<T>(data, strides, g, sequence.batch, head, sequence.first_key), strides.t};
}
// Index of a row's lse: (batch, heads, queries), or packed (heads, total queries).
static inline int64_t lse_index(const AttentionShape& g, const Sequence& sequence, int64_t head, int64_t query) {
  if (g.cu_queries != nullptr) return head * g.cu_queries[g.batch] + sequence.first_query + query;
  return (sequence.batch * g.heads + head) * g.queries + query;
}

// A query's position, and the keys [first, last) of the sequence that it allows; last < first where none.
struct TileRow {
  int64_t head, query, first, last;
};
static inline TileRow tile_row(const AttentionShape& g, const Places& keys, int64_t head, int64_t query) {
  const int64_t position = query + g.query_offset;
  TileRow row = {head, query, 0, keys.count};
  if (g.window_left >= 0) row.first = keys.before(position - g.window_left);
  if (g.is_causal) row.last = keys.before(position + 1);
  if (g.window_right >= 0) row.last = min_of(row.last, keys.before(position + g.window_right + 1));
  if (row.last <= row.first) row = {head, query, keys.count, 0};
  return row;
}

// The rows of one tile, the keys that any of them sees, and those that all see.
constexpr int64_t kMaxQueryTile = 64;
struct TileRows {
  TileRow rows[kMaxQueryTile];
  int64_t count = 0, first = INT64_MAX, last = 0, first_for_all = 0, last_for_all = INT64_MAX;
  void add(const TileRow& row) {
    rows[count++] = row;
    first = min_of(first, row.first);
    last = max_of(last, row.last);
    first_for_all = max_of(first_for_all, row.first);
    last_for_all = min_of(last_for_all, row.last);
  }
  // Whether every row sees all of [key, key + n).
  bool all_see(int64_t key, int64_t n) const { return first_for_all <= key && key + n <= last_for_all; }
};

// The dropout's factors of a row for the keys [key, key + n); finite beyond the sequence's last.
template <class A>
static void keep_keys(const AttentionShape& g, const Sequence& sequence, const TileRow& row, int64_t key, int64_t n,
                      A* keep) {
  const auto keep_columns = [&](int64_t column, int64_t columns, A* to) {
    dropout_keep(to, columns, g.dropout.seed, static_cast<uint32_t>(sequence.batch), static_cast<uint32_t>(row.head),
                 row.query, column, g.dropout.threshold, static_cast<A>(g.dropout.scale));
  };
  const Places& places = sequence.keys;
  const int64_t present = min_of(n, places.count - key);
  if (places.adjoin(key, present)) return keep_columns(places[key], n, keep);
  constexpr int64_t kBlock = 64;
  for (int64_t i = 0; i < present;) {
    A block[kBlock];
    const int64_t column = places[key + i] / kBlock * kBlock;
    keep_columns(column, kBlock, block);
    for (; i < present && places[key + i] < column + kBlock; ++i) keep[i] = block[places[key + i] - column];
  }
  for (int64_t i = present; i < n; ++i) keep[i] = A(0);
}
