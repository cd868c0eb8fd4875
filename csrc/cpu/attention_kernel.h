// Causal attention over blocks of queries, each with only the keys that it sees. The file that includes this
// has included vector_avx512.h and elementary.h and defines WHP_ISA.
//
// With scores s = scale q k^T, weights p = softmax(s) and the incoming gradient g:
//   out = p v,   dv = p^T g,   ds = p * (g v^T - sum(p * g v^T)),   dq = scale ds k,   dk = scale ds^T q.
// The forward pass keeps log(sum(exp(s))) of every query, and the backward pass computes p again. Scores,
// weights and sums are float32; p and ds are rounded to the dtype of q before they meet v, g, k and q.
//
// Products: A is read word by word (one float, or two adjacent bfloat16) and multiplied with vectors of B, which
// is packed: a panel holds 64 lanes, step by step. A lane is what survives the product.
#pragma once
#include <cstring>

#include "attention.h"

namespace whp::attention::WHP_ISA {

using namespace whp::WHP_ISA;

constexpr int64_t block = 64;  // queries in a block
constexpr int64_t panel = 64;  // lanes in a panel of B
constexpr int tile_rows = 6, tile_vectors = 4;

inline int64_t smaller(int64_t x, int64_t y) { return x < y ? x : y; }
inline int64_t larger(int64_t x, int64_t y) { return x > y ? x : y; }
inline int64_t round_up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }
inline __mmask16 first16(int64_t n) { return static_cast<__mmask16>(n >= 16 ? 0xffff : (1 << n) - 1); }

// ---------------------------------------------------------------------------------------------------- numbers

// float32: a word is one number.
struct Single {
  using Stored = float;
  using Word = float;
  static constexpr int64_t numbers = 1;  // in a word
  static __m512 broadcast(const Word* a) { return _mm512_set1_ps(*a); }
  static __m512 words(const Word* b) { return _mm512_load_ps(b); }
  static __m512 dot(__m512 sum, __m512 a, __m512 b) { return _mm512_fmadd_ps(a, b, sum); }
  static Vec widened(const Stored* p) { return load(p); }
  static void narrow(Stored* p, Vec a) { store(p, a); }        // to what a product reads
  static void narrow_exactly(Stored* p, Vec a) { store(p, a); }  // to a result
};

#if defined(__AVX512BF16__)
// bfloat16: a word is two numbers, of which vdpbf16ps adds both products. It takes subnormals for zero.
struct Pair {
  using Stored = uint16_t;
  using Word = uint32_t;
  static constexpr int64_t numbers = 2;
  static __m512bh broadcast(const Word* a) { return (__m512bh)_mm512_set1_epi32(static_cast<int>(*a)); }
  static __m512bh words(const Word* b) { return (__m512bh)_mm512_load_si512(b); }
  static __m512 dot(__m512 sum, __m512bh a, __m512bh b) { return _mm512_dpbf16_ps(sum, a, b); }
  static Vec widened(const Stored* p) { return load_bfloat16(p); }
  static void narrow(Stored* p, Vec a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(a.lanes));
  }
  static void narrow_exactly(Stored* p, Vec a) { store_bfloat16(p, a); }
};
#endif

// ---------------------------------------------------------------------------------------------------- packing

// Rows of `depth` numbers as they are, padded with zeros to `padded` numbers: an A whose steps are adjacent.
template <class Number>
void copy_rows(const typename Number::Stored* from, int64_t stride, int64_t rows, int64_t depth,
               int64_t padded, typename Number::Stored* to) {
  for (int64_t i = 0; i < rows; ++i, from += stride, to += padded) {
    std::memcpy(to, from, depth * sizeof(*to));
    std::memset(to + depth, 0, (padded - depth) * sizeof(*to));
  }
}

// B of which rows are the lanes and columns the steps, from rows that are padded to whole words already. Lanes
// are filled up with zeros to a multiple of 16.
template <class Number>
void pack_transposed(const typename Number::Word* rows, int64_t stride, int64_t lanes, int64_t steps,
                     typename Number::Word* to) {
  const __m512i places = _mm512_mullo_epi32(
      _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
      _mm512_set1_epi32(static_cast<int>(stride)));
  for (int64_t first = 0; first < lanes; first += 16) {
    const __mmask16 there = first16(lanes - first);
    auto* out = to + first / panel * panel * steps + first % panel;
    for (int64_t step = 0; step < steps; ++step) {
      const __m512i words =
          _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), there, places, rows + first * stride + step, 4);
      _mm512_store_si512(out + step * panel, words);
    }
  }
}

// Step number `step` of an operand of which columns are the lanes and rows the steps: words of the same column
// of adjacent rows, zeros where there is no row. `lanes` is a multiple of 16.
inline void pack_step(const float* rows, int64_t stride, int64_t count, int64_t lanes, int64_t step,
                      float* to) {
  const float* row = rows + step * stride;
  for (int64_t lane = 0; lane < lanes; lane += 16) {
    _mm512_store_ps(to + lane, step < count ? _mm512_loadu_ps(row + lane) : _mm512_setzero_ps());
  }
}
inline void pack_step(const uint16_t* rows, int64_t stride, int64_t count, int64_t lanes, int64_t step,
                      uint32_t* to) {
  const uint16_t* even = rows + 2 * step * stride;
  const __mmask16 first = 2 * step < count ? 0xffff : 0, second = 2 * step + 1 < count ? 0xffff : 0;
  for (int64_t lane = 0; lane < lanes; lane += 16) {
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first, even + lane));
    const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(second, even + stride + lane));
    _mm512_store_si512(to + lane, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }
}

// B of which columns are the lanes and rows the steps.
template <class Stored, class Word>
void pack_rows(const Stored* rows, int64_t stride, int64_t count, int64_t lanes, int64_t steps, Word* to) {
  for (int64_t first = 0; first < lanes; first += panel, to += steps * panel) {
    for (int64_t step = 0; step < steps; ++step) {
      pack_step(rows + first, stride, count, smaller(panel, lanes - first), step, to + step * panel);
    }
  }
}

// Rows [count, width] as words [ceil(count / numbers), width], each of the same column of adjacent rows: an A
// of which the rows are the steps.
template <class Number>
void interleave(const typename Number::Stored* rows, int64_t count, int64_t width,
                typename Number::Word* to) {
  const int64_t steps = (count + Number::numbers - 1) / Number::numbers;
  for (int64_t from = 0; from < width; from += panel) {
    const int64_t lanes = smaller(panel, width - from);
    for (int64_t step = 0; step < steps; ++step) {
      pack_step(rows + from, width, count, lanes, step, to + step * width + from);
    }
  }
}

// --------------------------------------------------------------------------------------------------- products

// Where a product reads A: strides in words.
template <class Number>
struct Left {
  const typename Number::Word* words;
  int64_t row_stride, step_stride;
};

// The steps [0, count) of B from its first step on; panels are panel_stride words apart.
template <class Number>
struct Right {
  const typename Number::Word* words;
  int64_t panel_stride, count;
};

struct Result {
  float* data;
  int64_t row_stride;
  bool accumulate;
};

template <class Number, int rows, int vectors>
void tile(const Left<Number>& a, const typename Number::Word* b, int64_t steps, const Result& out) {
  __m512 sums[rows][vectors];
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j) sums[i][j] = _mm512_setzero_ps();
  }
  const typename Number::Word* left = a.words;
  for (int64_t step = 0; step < steps; ++step, left += a.step_stride, b += panel) {
    decltype(Number::words(b)) right[vectors];
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j) right[j] = Number::words(b + 16 * j);
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) {
      const auto word = Number::broadcast(left + i * a.row_stride);
#pragma GCC unroll 4
      for (int j = 0; j < vectors; ++j) sums[i][j] = Number::dot(sums[i][j], word, right[j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j) {
      float* to = out.data + i * out.row_stride + 16 * j;
      if (out.accumulate) sums[i][j] = _mm512_add_ps(_mm512_load_ps(to), sums[i][j]);
      _mm512_store_ps(to, sums[i][j]);
    }
  }
}

template <class Number, int rows>
void tile_of(int64_t vectors, const Left<Number>& a, const typename Number::Word* b, int64_t steps,
             const Result& out) {
  switch (vectors) {
    case 1:
      return tile<Number, rows, 1>(a, b, steps, out);
    case 2:
      return tile<Number, rows, 2>(a, b, steps, out);
    case 3:
      return tile<Number, rows, 3>(a, b, steps, out);
    default:
      return tile<Number, rows, tile_vectors>(a, b, steps, out);
  }
}

// out [rows, columns] = a @ b, or += it; columns is a multiple of 16, rows of out are 64-byte aligned.
template <class Number>
void product(Left<Number> a, int64_t rows, Right<Number> b, int64_t columns, const Result& out) {
  for (int64_t j = 0; j < columns; j += panel, b.words += b.panel_stride) {
    const int64_t vectors = smaller(tile_vectors, (columns - j) / 16);
    Left<Number> left = a;
    Result to{out.data + j, out.row_stride, out.accumulate};
    for (int64_t i = 0; i < rows; i += tile_rows) {
      switch (smaller(tile_rows, rows - i)) {
        case 1:
          tile_of<Number, 1>(vectors, left, b.words, b.count, to);
          break;
        case 2:
          tile_of<Number, 2>(vectors, left, b.words, b.count, to);
          break;
        case 3:
          tile_of<Number, 3>(vectors, left, b.words, b.count, to);
          break;
        case 4:
          tile_of<Number, 4>(vectors, left, b.words, b.count, to);
          break;
        case 5:
          tile_of<Number, 5>(vectors, left, b.words, b.count, to);
          break;
        default:
          tile_of<Number, tile_rows>(vectors, left, b.words, b.count, to);
      }
      left.words += tile_rows * left.row_stride;
      to.data += tile_rows * out.row_stride;
    }
  }
}

// ----------------------------------------------------------------------------------------------------- memory

// Memory of one thread. Keys are filled up with zeros to whole panels, the depth to whole vectors.
template <class Number>
struct Scratch {
  using Stored = typename Number::Stored;
  using Word = typename Number::Word;
  static constexpr int64_t numbers = Number::numbers;

  int64_t depth, keys;         // padded
  Stored* rows;                // [keys or block, depth]: before it is packed
  Word *k_lanes, *v_lanes;     // B of which the keys are the lanes
  Word *k_steps, *v_steps;     // B of which the keys are the steps
  Stored *q, *g;               // [block, depth]
  Word *q_steps, *g_steps;     // B of which the queries are the steps
  float *scores, *products;    // [block, keys]
  Stored *weights, *d_scores;  // [block, keys]
  Word *weight_steps, *d_score_steps;  // an A of which the queries are the steps: [block / numbers, keys]
  float* out;                          // [block, depth]
  float *g_k, *g_v;                    // [keys, depth]
  int64_t bytes = 0;

  Scratch(const Problem& p, bool backward, char* memory) : memory_(memory) {
    depth = round_up(p.depth, 16);
    keys = round_up(p.keys, panel);
    take(&rows, larger(keys, block) * depth);
    take(&k_lanes, keys * depth / numbers);
    take(&v_steps, keys * depth_in_panels() / numbers);
    take(&q, block * depth);
    take(&scores, block * keys);
    take(&weights, block * keys);
    take(&out, block * depth);
    if (!backward) return;
    take(&v_lanes, keys * depth / numbers);
    take(&k_steps, keys * depth_in_panels() / numbers);
    take(&g, block * depth);
    take(&q_steps, block * depth_in_panels() / numbers);
    take(&g_steps, block * depth_in_panels() / numbers);
    take(&products, block * keys);
    take(&d_scores, block * keys);
    take(&weight_steps, block * keys / numbers);
    take(&d_score_steps, block * keys / numbers);
    take(&g_k, keys * depth);
    take(&g_v, keys * depth);
  }
  int64_t depth_in_panels() const { return round_up(depth, panel); }

 private:
  char* memory_;
  template <class T>
  void take(T** what, int64_t count) {
    *what = reinterpret_cast<T*>(memory_ + bytes);
    bytes += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
  }
};

template <class Stored>
const Stored* head_of(const View& view, int64_t batch, int64_t head) {
  return reinterpret_cast<const Stored*>(view.data) + batch * view.batch_stride + head * view.head_stride;
}

// Rows of float32 times a factor, rounded, into their places.
template <class Number>
void write_rows(const float* from, int64_t padded, int64_t rows, int64_t depth, const float* factors,
                float factor, typename Number::Stored* to, int64_t stride) {
  typename Number::Stored last[16];
  for (int64_t i = 0; i < rows; ++i, from += padded, to += stride) {
    const Vec by = fill(factors ? factors[i] : factor);
    int64_t j = 0;
    for (; j + 16 <= depth; j += 16) Number::narrow_exactly(to + j, load(from + j) * by);
    if (j < depth) {
      Number::narrow_exactly(last, load(from + j) * by);
      std::memcpy(to + j, last, (depth - j) * sizeof(*to));
    }
  }
}

// The keys that a block of queries sees: from `left`, at the start of a panel, to `right`.
struct Span {
  int64_t first, rows, left, padded;
  int64_t place;  // of the first query
  Span(const Problem& p, int64_t from) : first(from), rows(smaller(block, p.queries - from)) {
    place = p.keys - p.queries + first;
    left = p.window ? larger(0, place - p.window + 1) / panel * panel : 0;
    padded = round_up(place + rows - left, 16);
  }
  // What query i of the block sees, counted from left.
  int64_t begin(const Problem& p, int64_t i) const {
    return p.window ? larger(0, place + i - p.window + 1 - left) : 0;
  }
  int64_t end(int64_t i) const { return place + i + 1 - left; }
};

// -inf where a query sees no key
inline void hide(float* row, int64_t begin, int64_t end, int64_t padded) {
  const __m512 lowest = _mm512_set1_ps(-__builtin_inff());
  for (int64_t j = 0; j < begin; j += 16) _mm512_mask_store_ps(row + j, first16(begin - j), lowest);
  const int64_t edge = end / 16 * 16;
  for (int64_t j = edge; j < padded; j += 16) {
    const __mmask16 kept = j == edge ? first16(end - edge) : 0;
    _mm512_mask_store_ps(row + j, static_cast<__mmask16>(~kept), lowest);
  }
}

// ------------------------------------------------------------------------------------------------ both passes

template <class Number>
void forward(const Problem& p, int64_t item, char* memory) {
  using Stored = typename Number::Stored;
  using Word = typename Number::Word;
  constexpr int64_t numbers = Number::numbers;
  // scores are rounded before a peak is taken off: the weight of a single key is exactly 1
  const Scratch<Number> s(p, false, memory);
  const int64_t batch = item / p.kv_heads, kv_head = item % p.kv_heads, group = p.heads / p.kv_heads;
  const int64_t steps = s.depth / numbers, key_steps = s.keys / numbers;

  copy_rows<Number>(head_of<Stored>(p.v, batch, kv_head), p.v.place_stride, p.keys, p.depth, s.depth, s.rows);
  pack_rows(s.rows, s.depth, p.keys, s.depth, key_steps, s.v_steps);
  copy_rows<Number>(head_of<Stored>(p.k, batch, kv_head), p.k.place_stride, p.keys, p.depth, s.depth, s.rows);
  pack_transposed<Number>(reinterpret_cast<const Word*>(s.rows), steps, p.keys, steps, s.k_lanes);

  for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
    const Stored* q = head_of<Stored>(p.q, batch, head);
    Stored* out = const_cast<Stored*>(head_of<Stored>(p.out, batch, head));
    float* log_sums = p.log_sums + (batch * p.heads + head) * p.queries;
    for (int64_t first = 0; first < p.queries; first += block) {
      const Span span(p, first);
      copy_rows<Number>(q + first * p.q.place_stride, p.q.place_stride, span.rows, p.depth, s.depth, s.q);
      product<Number>({reinterpret_cast<const Word*>(s.q), steps, 1}, span.rows,
                      {s.k_lanes + span.left * steps, panel * steps, steps}, span.padded,
                      {s.scores, s.keys, false});
      float inverse[block];
      const Vec scale = fill(p.scale);
      for (int64_t i = 0; i < span.rows; ++i) {
        float* row = s.scores + i * s.keys;
        hide(row, span.begin(p, i), span.end(i), span.padded);
        Vec peak = fill(-__builtin_inff());
        for (int64_t j = 0; j < span.padded; j += 16) peak = whp::avx512::larger(load(row + j), peak);
        const float highest = largest(peak) * p.scale;
        const Vec peaks = fill(highest);
        Vec sum = fill(0.0f);
        Stored* to = s.weights + i * span.padded;
        for (int64_t j = 0; j < span.padded; j += 16) {
          const Vec weight = exp(load(row + j) * scale - peaks);
          sum = sum + weight;
          Number::narrow(to + j, weight);
        }
        const float all = static_cast<float>(total(sum));
        inverse[i] = 1.0f / all;
        log_sums[first + i] = highest + __builtin_logf(all);
      }
      product<Number>({reinterpret_cast<const Word*>(s.weights), span.padded / numbers, 1}, span.rows,
                      {s.v_steps + span.left / numbers * panel, key_steps * panel, span.padded / numbers},
                      s.depth, {s.out, s.depth, false});
      write_rows<Number>(s.out, s.depth, span.rows, p.depth, inverse, 0.0f, out + first * p.out.place_stride,
                         p.out.place_stride);
    }
  }
}

template <class Number>
void backward(const Problem& p, int64_t item, char* memory) {
  using Stored = typename Number::Stored;
  using Word = typename Number::Word;
  constexpr int64_t numbers = Number::numbers;
  const Scratch<Number> s(p, true, memory);
  const int64_t batch = item / p.kv_heads, kv_head = item % p.kv_heads, group = p.heads / p.kv_heads;
  const int64_t steps = s.depth / numbers, key_steps = s.keys / numbers;

  copy_rows<Number>(head_of<Stored>(p.v, batch, kv_head), p.v.place_stride, p.keys, p.depth, s.depth, s.rows);
  pack_transposed<Number>(reinterpret_cast<const Word*>(s.rows), steps, p.keys, steps, s.v_lanes);
  copy_rows<Number>(head_of<Stored>(p.k, batch, kv_head), p.k.place_stride, p.keys, p.depth, s.depth, s.rows);
  pack_transposed<Number>(reinterpret_cast<const Word*>(s.rows), steps, p.keys, steps, s.k_lanes);
  pack_rows(s.rows, s.depth, p.keys, s.depth, key_steps, s.k_steps);
  std::memset(s.g_k, 0, p.keys * s.depth * sizeof(float));
  std::memset(s.g_v, 0, p.keys * s.depth * sizeof(float));

  for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
    const Stored* q = head_of<Stored>(p.q, batch, head);
    const Stored* g = head_of<Stored>(p.g, batch, head);
    Stored* g_q = const_cast<Stored*>(head_of<Stored>(p.g_q, batch, head));
    const float* log_sums = p.log_sums + (batch * p.heads + head) * p.queries;
    for (int64_t first = 0; first < p.queries; first += block) {
      const Span span(p, first);
      const int64_t query_steps = (span.rows + numbers - 1) / numbers;
      copy_rows<Number>(q + first * p.q.place_stride, p.q.place_stride, span.rows, p.depth, s.depth, s.q);
      copy_rows<Number>(g + first * p.g.place_stride, p.g.place_stride, span.rows, p.depth, s.depth, s.g);
      pack_rows(s.q, s.depth, span.rows, s.depth, query_steps, s.q_steps);
      pack_rows(s.g, s.depth, span.rows, s.depth, query_steps, s.g_steps);
      product<Number>({reinterpret_cast<const Word*>(s.q), steps, 1}, span.rows,
                      {s.k_lanes + span.left * steps, panel * steps, steps}, span.padded,
                      {s.scores, s.keys, false});
      product<Number>({reinterpret_cast<const Word*>(s.g), steps, 1}, span.rows,
                      {s.v_lanes + span.left * steps, panel * steps, steps}, span.padded,
                      {s.products, s.keys, false});
      const Vec scale = fill(p.scale);
      for (int64_t i = 0; i < span.rows; ++i) {
        float *row = s.scores + i * s.keys, *products = s.products + i * s.keys;
        hide(row, span.begin(p, i), span.end(i), span.padded);
        const Vec log_sum = fill(log_sums[first + i]);
        Vec sum = fill(0.0f);
        Stored *weights = s.weights + i * span.padded, *d_scores = s.d_scores + i * span.padded;
        for (int64_t j = 0; j < span.padded; j += 16) {
          const Vec weight = exp(load(row + j) * scale - log_sum);
          sum = fma(weight, load(products + j), sum);
          store(row + j, weight);
          Number::narrow(weights + j, weight);
        }
        const Vec mean = fill(static_cast<float>(total(sum)));
        for (int64_t j = 0; j < span.padded; j += 16) {
          Number::narrow(d_scores + j, load(row + j) * (load(products + j) - mean));
        }
      }
      product<Number>({reinterpret_cast<const Word*>(s.d_scores), span.padded / numbers, 1}, span.rows,
                      {s.k_steps + span.left / numbers * panel, key_steps * panel, span.padded / numbers},
                      s.depth, {s.out, s.depth, false});
      write_rows<Number>(s.out, s.depth, span.rows, p.depth, nullptr, p.scale,
                         g_q + first * p.g_q.place_stride, p.g_q.place_stride);
      // weights and d_scores once more, with the queries as steps: the panels of a B laid side by side
      interleave<Number>(s.weights, span.rows, span.padded, s.weight_steps);
      interleave<Number>(s.d_scores, span.rows, span.padded, s.d_score_steps);
      const int64_t seen = smaller(span.padded, p.keys - span.left);
      product<Number>({s.weight_steps, 1, span.padded}, seen,
                      {s.g_steps, query_steps * panel, query_steps}, s.depth,
                      {s.g_v + span.left * s.depth, s.depth, true});
      product<Number>({s.d_score_steps, 1, span.padded}, seen,
                      {s.q_steps, query_steps * panel, query_steps}, s.depth,
                      {s.g_k + span.left * s.depth, s.depth, true});
    }
  }
  Stored* g_k = const_cast<Stored*>(head_of<Stored>(p.g_k, batch, kv_head));
  Stored* g_v = const_cast<Stored*>(head_of<Stored>(p.g_v, batch, kv_head));
  write_rows<Number>(s.g_k, s.depth, p.keys, p.depth, nullptr, p.scale, g_k, p.g_k.place_stride);
  write_rows<Number>(s.g_v, s.depth, p.keys, p.depth, nullptr, 1.0f, g_v, p.g_v.place_stride);
}

template <class Number>
int64_t scratch_bytes(const Problem& p, bool backward) {
  return Scratch<Number>(p, backward, nullptr).bytes;
}

}  // namespace whp::attention::WHP_ISA
