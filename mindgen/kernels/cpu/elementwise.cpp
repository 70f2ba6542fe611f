// What stands between the products of a layer: norms, gated activations, rotations. Numbers are bf16 in memory and
// float32 in registers, and rounded to bf16 where the layers of mindgen/layers round them.
#include <cmath>

#include "bf16.h"
#include "calls.h"
#include "exported.h"

namespace mindgen {
namespace {

using Int = std::int64_t;

constexpr float LOG2_E = 1.44269504f;
constexpr Int FEW = 1 << 15;  // numbers that one thread is done with before others would have woken up

struct All {};  // where others have a mask

using mindgen::load;
using mindgen::store;

inline __m512 load(const bf16* from, All) {
  return widened(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}

inline void store(bf16* to, All, __m512 numbers) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(numbers)));
}

// Calls body(at, mask) for the registers of `size` numbers; masks cost time, so that only the last one has any.
template <typename Body>
inline void over(Int size, Body body) {
  Int at = 0;
  for (; at + LANES <= size; at += LANES) body(at, All{});
  if (at < size) body(at, first(size - at));
}

// As it is after a store and a load.
inline __m512 rounded(__m512 numbers) { return widened(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(numbers))); }

// 2 ** x, within 3e-7 of itself; of infinities too, and NaN is NaN.
inline __m512 power(__m512 x) {
  // The polynomial of degree 5 with the least relative error between 0 and 1.
  constexpr float LOWER[]{0.00898934025f, 0.0558263179f, 0.240153617f, 0.693153073f, 0.999999925f};
  const __m512 part = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);  // of infinities 0
  __m512 sum = _mm512_set1_ps(0.00187757661f);
  for (const float next : LOWER) sum = _mm512_fmadd_ps(sum, part, _mm512_set1_ps(next));
  return _mm512_scalef_ps(sum, x);  // which takes the whole part of x
}

// x times the logistic function of `by` * ln(2).
inline __m512 gated(__m512 x, __m512 by) {
  return _mm512_div_ps(x, _mm512_add_ps(_mm512_set1_ps(1), power(_mm512_sub_ps(_mm512_setzero_ps(), by))));
}

struct Silu {
  static __m512 of(__m512 x) { return gated(x, _mm512_mul_ps(x, _mm512_set1_ps(LOG2_E))); }
};

// x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))), and (1 + tanh(y)) / 2 is the logistic function of 2 y.
struct GeluTanh {
  static __m512 of(__m512 x) {
    const __m512 cubic = _mm512_mul_ps(_mm512_mul_ps(x, x), _mm512_set1_ps(0.044715f));
    return gated(x, _mm512_mul_ps(_mm512_set1_ps(1.59576912f * LOG2_E), _mm512_fmadd_ps(cubic, x, x)));
  }
};

// gates_and_ups [rows, 2 size] -> outputs [rows, size]
template <typename Activation>
void gate(const bf16* gates_and_ups, bf16* outputs, Int rows, Int size, Int stride, int num_threads) {
#pragma omp parallel for schedule(static) num_threads(num_threads) if (rows * size > FEW)
  for (Int row = 0; row < rows; ++row) {
    const bf16* const from = gates_and_ups + row * stride;
    over(size, [=](Int at, auto mask) {
      const __m512 activated = rounded(Activation::of(load(from + at, mask)));
      store(outputs + row * size + at, mask, _mm512_mul_ps(activated, load(from + size + at, mask)));
    });
  }
}

float sum_of_squares(const bf16* from, Int size) {
  __m512 sums[4] = {};
  Int at = 0;
  for (; at + 4 * LANES <= size; at += 4 * LANES)
#pragma GCC unroll 4
    for (int part = 0; part < 4; ++part) {
      const __m512 numbers = load(from + at + part * LANES, All{});
      sums[part] = _mm512_fmadd_ps(numbers, numbers, sums[part]);
    }
  for (; at < size; at += LANES) {
    const __m512 numbers = load(from + at, first(size - at));
    sums[0] = _mm512_fmadd_ps(numbers, numbers, sums[0]);
  }
  return _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(sums[0], sums[1]), _mm512_add_ps(sums[2], sums[3])));
}

template <bool HAS_OFFSET>
void norm_row(const bf16* from, const bf16* weight, bf16* to, Int size, float epsilon) {
  const __m512 scale = _mm512_set1_ps(1 / std::sqrt(sum_of_squares(from, size) / size + epsilon));
  over(size, [=](Int at, auto mask) {
    const __m512 scaled = _mm512_mul_ps(load(from + at, mask), scale), factor = load(weight + at, mask);
    if constexpr (HAS_OFFSET)
      store(to + at, mask, _mm512_mul_ps(scaled, _mm512_add_ps(factor, _mm512_set1_ps(1))));
    else
      store(to + at, mask, _mm512_mul_ps(rounded(scaled), factor));
  });
}

// One head with the cosines and sines of its position; both partners are read before either is written.
template <typename Mask>
inline __m512 turned(__m512 numbers, __m512 partners, const bf16* cosine, const bf16* sine, Mask mask) {
  return _mm512_fmadd_ps(partners, load(sine, mask), rounded(_mm512_mul_ps(numbers, load(cosine, mask))));
}

void turn_halves(bf16* head, const bf16* cosine, const bf16* sine, Int half) {
  over(half, [=](Int at, auto mask) {
    const __m512 left = load(head + at, mask), right = load(head + half + at, mask);
    store(head + at, mask, turned(left, right, cosine + at, sine + at, mask));
    store(head + half + at, mask, turned(right, left, cosine + half + at, sine + half + at, mask));
  });
}

void turn_neighbours(bf16* head, const bf16* cosine, const bf16* sine, Int size) {
  over(size, [=](Int at, auto mask) {
    const __m512 numbers = load(head + at, mask);
    store(head + at, mask, turned(numbers, _mm512_permute_ps(numbers, 0xb1), cosine + at, sine + at, mask));
  });
}

}  // namespace
}  // namespace mindgen

using namespace mindgen;

// inputs [outer, inner, size], dense in `size` -> outputs [outer, inner, size], dense
MINDGEN_EXPORT void mindgen_rms_norm(const bf16* inputs, const bf16* weight, bf16* outputs, Int outer, Int inner,
                                    Int size, Int outer_stride, Int inner_stride, const float* epsilon, Int has_offset,
                                    Int num_threads) {
  const auto norm = has_offset ? norm_row<true> : norm_row<false>;
#pragma omp parallel for schedule(static) num_threads(num_threads) if (outer * inner * size > FEW)
  for (Int row = 0; row < outer; ++row)
    for (Int column = 0; column < inner; ++column)
      norm(inputs + row * outer_stride + column * inner_stride, weight, outputs + (row * inner + column) * size, size,
           *epsilon);
}

MINDGEN_EXPORT void mindgen_gated_silu(const bf16* inputs, bf16* outputs, Int rows, Int size, Int stride,
                                      Int num_threads) {
  gate<Silu>(inputs, outputs, rows, size, stride, num_threads);
}

MINDGEN_EXPORT void mindgen_gated_gelu_tanh(const bf16* inputs, bf16* outputs, Int rows, Int size, Int stride,
                                           Int num_threads) {
  gate<GeluTanh>(inputs, outputs, rows, size, stride, num_threads);
}

// heads [tokens, groups, width, >= size], in place; cosine and sine [tokens, size], dense
MINDGEN_EXPORT void mindgen_rotate(bf16* heads, const bf16* cosine, const bf16* sine, Int tokens, Int groups, Int width,
                                  Int size, Int token_stride, Int group_stride, Int head_stride, Int is_interleaved,
                                  Int num_threads) {
#pragma omp parallel for schedule(static) num_threads(num_threads) if (tokens * groups * width * size > FEW)
  for (Int token = 0; token < tokens; ++token)
    for (Int group = 0; group < groups; ++group)
      for (Int column = 0; column < width; ++column) {
        bf16* const head = heads + token * token_stride + group * group_stride + column * head_stride;
        if (is_interleaved)
          turn_neighbours(head, cosine + token * size, sine + token * size, size);
        else
          turn_halves(head, cosine + token * size, sine + token * size, size / 2);
      }
}
