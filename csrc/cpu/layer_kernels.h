// The layer kernels of an instruction set: every number is read once, worked on in float32, rounded once. The
// file that includes this has included its vector_*.h and elementary.h and defines WHP_ISA.
#pragma once
#include <cstring>

#include "layers.h"

namespace whp::layers::WHP_ISA {

using namespace whp::WHP_ISA;

// --------------------------------------------------------------------------------------- reading and writing

inline Vec read(const float* p) { return load(p); }
inline Vec read(const uint16_t* p) { return load_bfloat16(p); }
inline void write(float* p, Vec a) { store(p, a); }
inline void write(uint16_t* p, Vec a) { store_bfloat16(p, a); }

// Fewer elements than a vector holds, n of them; the other lanes are 0.
template <class T>
inline Vec read(const T* p, int64_t n) {
  T lanes[Vec::width] = {};
  std::memcpy(lanes, p, n * sizeof(T));
  return read(lanes);
}
template <class T>
inline void write(T* p, Vec a, int64_t n) {
  T lanes[Vec::width];
  write(lanes, a);
  std::memcpy(p, lanes, n * sizeof(T));
}

// body(j) for whole vectors, body(j, n) for what is left of [begin, end).
template <class Whole, class Part>
inline void for_vectors(int64_t begin, int64_t end, Whole whole, Part part) {
  int64_t j = begin;
  for (; j + Vec::width <= end; j += Vec::width) whole(j);
  if (j < end) part(j, end - j);
}

// Row n as float32, padded with zeros to whole vectors: the row itself where it can be read so, else a copy.
inline const float* row_of(const Rows& rows, int64_t n, int64_t width, float* buffer) {
  if (rows.element == Element::float32) {
    const float* from = reinterpret_cast<const float*>(rows.data) + n * width;
    if (width % Vec::width == 0) return from;
    for_vectors(0, width, [&](int64_t j) { store(buffer + j, load(from + j)); },
                [&](int64_t j, int64_t left) { store(buffer + j, read(from + j, left)); });
  } else {
    const uint16_t* from = reinterpret_cast<const uint16_t*>(rows.data) + n * width;
    for_vectors(0, width, [&](int64_t j) { store(buffer + j, read(from + j)); },
                [&](int64_t j, int64_t left) { store(buffer + j, read(from + j, left)); });
  }
  return buffer;
}

template <class T>
inline void write_row(T* to, int64_t width, const float* row) {
  for_vectors(0, width, [&](int64_t j) { write(to + j, load(row + j)); },
              [&](int64_t j, int64_t left) { write(to + j, load(row + j), left); });
}

inline void write_row(const Rows& rows, int64_t n, int64_t width, const float* row) {
  if (rows.element == Element::float32) {
    write_row(reinterpret_cast<float*>(rows.data) + n * width, width, row);
  } else {
    write_row(reinterpret_cast<uint16_t*>(rows.data) + n * width, width, row);
  }
}

// ---------------------------------------------------------------------------------------------------- RMSNorm

inline void norm_forward(const Norm& p, int64_t begin, int64_t end, float* buffers) {
  const int64_t padded = padded_width(p.width);
  float *first = buffers, *second = buffers + padded, *out = buffers + 2 * padded;
  for (int64_t n = begin; n < end; ++n) {
    const float* x = row_of(p.x, n, p.width, first);
    if (p.branch.data) {
      const float* branch = row_of(p.branch, n, p.width, second);
      for (int64_t j = 0; j < p.width; j += Vec::width) store(out + j, load(x + j) + load(branch + j));
      write_row(p.sum, n, p.width, out);
      x = row_of(p.sum, n, p.width, first);  // rounded to the dtype of the sum, as the backward pass reads it
    }
    Vec squares = fill(0.0f);
    for (int64_t j = 0; j < p.width; j += Vec::width) squares = fma(load(x + j), load(x + j), squares);
    const double mean = total(squares) / static_cast<double>(p.width);
    const float scale = static_cast<float>(1.0 / __builtin_sqrt(mean + static_cast<double>(p.eps)));
    p.scale[n] = scale;
    const Vec r = fill(scale);
    for (int64_t j = 0; j < p.width; j += Vec::width) store(out + j, load(x + j) * r * load(p.weight + j));
    write_row(p.out, n, p.width, out);
  }
}

inline void norm_backward(const Norm& p, int64_t begin, int64_t end, float* buffers, float* d_weight) {
  const int64_t padded = padded_width(p.width);
  float *first = buffers, *second = buffers + padded, *out = buffers + 2 * padded;
  for (int64_t n = begin; n < end; ++n) {
    const float* x = row_of(p.sum, n, p.width, first);
    const float* g = row_of(p.g_out, n, p.width, second);
    const Vec r = fill(p.scale[n]);
    Vec sum = fill(0.0f);
    if (d_weight) {
      for (int64_t j = 0; j < p.width; j += Vec::width) {
        const Vec gn = load(g + j) * (load(x + j) * r);
        store(d_weight + j, load(d_weight + j) + gn);
        sum = fma(gn, load(p.weight + j), sum);
      }
    } else {
      for (int64_t j = 0; j < p.width; j += Vec::width) {
        sum = fma(load(g + j) * (load(x + j) * r), load(p.weight + j), sum);
      }
    }
    const Vec mean = fill(static_cast<float>(total(sum) / static_cast<double>(p.width)));
    for (int64_t j = 0; j < p.width; j += Vec::width) {
      const Vec gw = load(g + j) * load(p.weight + j), normal = load(x + j) * r;
      store(out + j, (gw - normal * mean) * r);
    }
    if (p.g_sum.data) {
      const float* through = row_of(p.g_sum, n, p.width, first);
      for (int64_t j = 0; j < p.width; j += Vec::width) store(out + j, load(out + j) + load(through + j));
    }
    write_row(p.g_x, n, p.width, out);
    if (p.g_branch.data) write_row(p.g_branch, n, p.width, out);
  }
}

// ----------------------------------------------------------------------------------------------------- SwiGLU

// 1 / (1 + exp(-x)), without overflow on either side
inline Vec sigmoid(Vec x) {
  const Vec one = fill(1.0f), e = exp(fill(0.0f) - absolute(x));
  return where(at_least(x, fill(0.0f)), one, e) / (one + e);
}

template <class T>
inline void swiglu_forward(const T* gate, const T* up, T* out, int64_t begin, int64_t end) {
  const auto result = [](Vec g, Vec u) { return g * sigmoid(g) * u; };
  for_vectors(
      begin, end, [&](int64_t j) { write(out + j, result(read(gate + j), read(up + j))); },
      [&](int64_t j, int64_t n) { write(out + j, result(read(gate + j, n), read(up + j, n)), n); });
}

template <class T>
inline void swiglu_backward(const T* g, const T* gate, const T* up, T* g_gate, T* g_up, int64_t begin,
                            int64_t end) {
  struct Pair {
    Vec gate, up;
  };
  const auto result = [](Vec d, Vec x, Vec u) -> Pair {
    const Vec s = sigmoid(x), one = fill(1.0f);
    return {d * u * s * fma(x, one - s, one), d * (x * s)};
  };
  for_vectors(
      begin, end,
      [&](int64_t j) {
        const Pair d = result(read(g + j), read(gate + j), read(up + j));
        write(g_gate + j, d.gate);
        write(g_up + j, d.up);
      },
      [&](int64_t j, int64_t n) {
        const Pair d = result(read(g + j, n), read(gate + j, n), read(up + j, n));
        write(g_gate + j, d.gate, n);
        write(g_up + j, d.up, n);
      });
}

inline void swiglu_forward(Element element, const char* gate, const char* up, char* out, int64_t begin,
                           int64_t end) {
  if (element == Element::float32) {
    swiglu_forward(reinterpret_cast<const float*>(gate), reinterpret_cast<const float*>(up),
                   reinterpret_cast<float*>(out), begin, end);
  } else {
    swiglu_forward(reinterpret_cast<const uint16_t*>(gate), reinterpret_cast<const uint16_t*>(up),
                   reinterpret_cast<uint16_t*>(out), begin, end);
  }
}

inline void swiglu_backward(Element element, const char* g, const char* gate, const char* up, char* g_gate,
                            char* g_up, int64_t begin, int64_t end) {
  if (element == Element::float32) {
    swiglu_backward(reinterpret_cast<const float*>(g), reinterpret_cast<const float*>(gate),
                    reinterpret_cast<const float*>(up), reinterpret_cast<float*>(g_gate),
                    reinterpret_cast<float*>(g_up), begin, end);
  } else {
    swiglu_backward(reinterpret_cast<const uint16_t*>(g), reinterpret_cast<const uint16_t*>(gate),
                    reinterpret_cast<const uint16_t*>(up), reinterpret_cast<uint16_t*>(g_gate),
                    reinterpret_cast<uint16_t*>(g_up), begin, end);
  }
}

// ------------------------------------------------------------------------------------------------------- RoPE

// One head of one place: y = x cos + swap(x) sin, with swap exchanging the halves; transposed:
// x = y cos + swap(y sin).
template <class T>
inline void rotate(const T* from, T* to, const float* cos, const float* sin, int64_t half, bool inverse) {
  struct Pair {
    Vec left, right;
  };
  const auto turn = [inverse](Vec a, Vec b, Vec cos_a, Vec cos_b, Vec sin_a, Vec sin_b) -> Pair {
    if (inverse) return {fma(b, sin_b, a * cos_a), fma(a, sin_a, b * cos_b)};
    return {fma(b, sin_a, a * cos_a), fma(a, sin_b, b * cos_b)};
  };
  for_vectors(
      0, half,
      [&](int64_t j) {
        const int64_t k = j + half;
        const Pair y = turn(read(from + j), read(from + k), load(cos + j), load(cos + k), load(sin + j),
                            load(sin + k));
        write(to + j, y.left);
        write(to + k, y.right);
      },
      [&](int64_t j, int64_t n) {
        const int64_t k = j + half;
        const Pair y = turn(read(from + j, n), read(from + k, n), read(cos + j, n), read(cos + k, n),
                            read(sin + j, n), read(sin + k, n));
        write(to + j, y.left, n);
        write(to + k, y.right, n);
      });
}

template <class T>
inline void rope_rows(const Rope& p, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t batch = row / p.places, place = row % p.places;
    const int64_t entry = batch * p.table_stride + place * 2 * p.half;
    const T* from = reinterpret_cast<const T*>(p.from.data) + batch * p.from.batch_stride +
                    place * p.from.place_stride;
    T* to = reinterpret_cast<T*>(p.to.data) + batch * p.to.batch_stride + place * p.to.place_stride;
    for (int64_t head = 0; head < p.heads; ++head) {
      rotate(from + head * p.from.head_stride, to + head * p.to.head_stride, p.cos + entry, p.sin + entry,
             p.half, p.inverse);
    }
  }
}

inline void rope(const Rope& p, int64_t begin, int64_t end) {
  if (p.from.element == Element::float32) {
    rope_rows<float>(p, begin, end);
  } else {
    rope_rows<uint16_t>(p, begin, end);
  }
}

}  // namespace whp::layers::WHP_ISA
