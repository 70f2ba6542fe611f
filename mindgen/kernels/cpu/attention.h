// What attention works on, and the numbers that it works with.
#pragma once

#include <algorithm>
#include <array>
#include <limits>

#include "bf16.h"
#include "exported.h"

namespace mindgen::attention {

using Int = std::int64_t;
using Pair = std::uint32_t;  // two bf16 numbers

constexpr int ROWS = 240;      // of a task: what they work in fits a second-level cache
constexpr int KEYS = 64;       // at a time
constexpr int MOST_DIM = 256;
constexpr int TALL = 6;        // rows of a product, and
constexpr int WIDE = 4;        // registers of its columns: 24 sums, 4 columns and a row fit 32 registers
constexpr int FEW = 8;         // rows of one query for which it does not pay to write values down in pairs
constexpr int FEWEST = 2;      // rows of one query for which it does not pay to turn keys over
constexpr float LOG2_E = 1.44269504f;

// A tensor [T, G, Q, D] or [T, G, D] whose last dimension is dense.
struct View {
  const bf16* at;
  Int token, group, head;
};

// What is the same for all layers of a step. `slots` [T], `starts` [S + 1], `lengths` [S], `tables` [S, width], `slopes`
// of the heads or null; no soft cap is 0. Strides of the cache count elements.
struct Context {
  const Int* slots;
  const Int* starts;
  const Int* lengths;
  const Int* tables;
  const float* slopes;
  Int width;
  Int sequences;
  Int cache_block;
  Int cache_token;
  Int cache_group;
  Int block_size;
  Int groups;
  Int head_dim;
  Int threads;
  float scale;
  float softcap;
};

// What `mindgen_attend` was called with.
struct Call {
  View query, key, value;
  bf16 *keys, *values, *output;
  Int cache_block, cache_token, cache_group;
  const Int *slots, *starts, *lengths, *tables;
  Int width, sequences, groups, shared, head_dim, block_size, window;
  float scale, softcap;
  const float* slopes;

  Int rows(Int sequence) const { return (starts[sequence + 1] - starts[sequence]) * shared; }
  Int columns() const { return (head_dim + 31) / 32 * 32; }
  bool plain() const { return scale > 0 && softcap == 0 && slopes == nullptr; }
};

// Rows of one sequence and one KV head, from `from` on, and the part of the context that they see.
struct Task {
  Int sequence, group, from, rows, start, end;
};

// Where in the cache some keys and values lie. The last one is repeated: it is as finite as the others, and what lies
// behind it may not be.
struct Places {
  Int count;
  Int at[KEYS];
};

// What a thread works in.
struct Room {
  alignas(64) bf16 query[ROWS * MOST_DIM];       // [rows][head_dim]
  alignas(64) Pair keys[MOST_DIM / 2 * KEYS];    // [head_dim / 2][KEYS]
  alignas(64) Pair values[KEYS / 2 * MOST_DIM];  // [KEYS / 2][columns]
  alignas(64) float output[ROWS * MOST_DIM];     // [rows][columns], not yet divided by the sums
  alignas(64) float sums[ROWS * LANES];          // [rows][LANES] of weights
  float most[ROWS];                              // the largest score so far, in powers of two as all scores are
  float slope[ROWS];
  Int position[ROWS];
  Places places[2], *now = places, *next = places + 1;  // keys and values at hand, and those that come next
};

// 2 ** x where `mask` says, within 3e-6 of itself, else 0.
inline __m512 power(__mmask16 mask, __m512 x) {
  // The polynomial of degree 4 with the least relative error between 0 and 1.
  constexpr std::array<float, 4> LOWER{0.0520114619f, 0.241442756f, 0.693003835f, 1.00000259f};
  const __m512 part = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  __m512 sum = _mm512_set1_ps(0.0135341672f);
  for (const float next : LOWER) sum = _mm512_fmadd_ps(sum, part, _mm512_set1_ps(next));
  return _mm512_maskz_scalef_ps(mask, sum, x);  // which takes the whole part of x
}

inline __m512 power(__m512 x) { return power(0xffff, x); }

// Within 6e-7 of itself below SMALL, where the difference of 1 and nearly 1 would keep few digits, else within 7e-6.
inline __m512 tanh(__m512 x) {
  constexpr float SMALL = 0.25f;
  const __m512 one = _mm512_set1_ps(1), square = _mm512_mul_ps(x, x);
  // (tanh(x) / x - 1) / x^2 as the polynomial of degree 1 in x^2 with which tanh has the least relative error.
  const __m512 bend = _mm512_fmadd_ps(_mm512_set1_ps(0.12876421f), square, _mm512_set1_ps(-0.333245714f));
  const __m512 small = _mm512_fmadd_ps(_mm512_mul_ps(square, bend), x, x);
  const __m512 grown = power(_mm512_mul_ps(x, _mm512_set1_ps(2 * LOG2_E)));
  const __m512 large = _mm512_sub_ps(one, _mm512_div_ps(_mm512_set1_ps(2), _mm512_add_ps(one, grown)));
  return _mm512_mask_mov_ps(large, _mm512_cmp_ps_mask(square, _mm512_set1_ps(SMALL * SMALL), _CMP_LT_OQ), small);
}

// sums += left [M][depth] right [depth][N registers]
template <int M, int N>
inline void multiply(__m512 (&sums)[M][N], const Pair* left, Int left_stride, const Pair* right, Int right_stride,
                     Int depth) {
  for (Int step = 0; step < depth; ++step, right += right_stride) {
    __m512bh columns[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) columns[n] = reinterpret_cast<__m512bh>(_mm512_load_si512(right + n * LANES));
#pragma GCC unroll 6
    for (int m = 0; m < M; ++m) {
      const __m512bh row = reinterpret_cast<__m512bh>(_mm512_set1_epi32(left[m * left_stride + step]));
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) sums[m][n] = _mm512_dpbf16_ps(sums[m][n], row, columns[n]);
    }
  }
}

}  // namespace mindgen::attention
