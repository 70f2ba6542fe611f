// The arithmetic of products: rows times what a reader gives of panels.
//
// Rows lie in tiles: a pair of inputs of up to 12 rows side by side, so that they are read in the order of use.
#pragma once

#include "panels.h"

namespace mindgen {

constexpr int HEIGHT = 12;  // rows at a time: 24 sums, 2 registers of weights, one of inputs
constexpr int TWINS = 2;    // rows for which two panels are read at once, as the sums of one would be waited for

// Reads plain numbers, two pairs after the other.
struct PlainReader {
  const bf16* from;

  void ask() {}

  void read(__m512i (&numbers)[4]) {
    for (int i = 0; i < 4; ++i, from += WIDTH) numbers[i] = _mm512_loadu_si512(from);
  }

  void read_last(__m512i (&numbers)[2]) {
    for (int i = 0; i < 2; ++i, from += WIDTH) numbers[i] = _mm512_loadu_si512(from);
  }
};

// The same of a panel, asking for what comes then.
struct PanelReader : PlainReader {
  Ahead ahead;

  void ask() { ahead.ask<4>(); }
};

// Reads compact numbers and leaves them plain in `room`.
struct ExpandingReader {
  CompactReader reader;
  bf16* room;

  void ask() { reader.ask(); }

  void read(__m512i (&numbers)[4]) {
    reader.read(numbers);
    for (int i = 0; i < 4; ++i, room += WIDTH) _mm512_storeu_si512(room, numbers[i]);
  }

  void read_last(__m512i (&numbers)[2]) {
    reader.read_last(numbers);
    for (int i = 0; i < 2; ++i, room += WIDTH) _mm512_storeu_si512(room, numbers[i]);
  }
};

// The sums of M rows for a panel.
template <int M>
struct Sums {
  __m512 left[M], right[M];

  void begin(const float* from) {
#pragma GCC unroll 12
    for (int i = 0; i < M; i++) {
      left[i] = from ? _mm512_loadu_ps(from + i * WIDTH) : _mm512_setzero_ps();
      right[i] = from ? _mm512_loadu_ps(from + i * WIDTH + LANES) : _mm512_setzero_ps();
    }
  }

  void add(const std::uint32_t* rows, const __m512i* numbers) {
    const __m512bh low = reinterpret_cast<__m512bh>(numbers[0]), high = reinterpret_cast<__m512bh>(numbers[1]);
#pragma GCC unroll 12
    for (int i = 0; i < M; i++) {
      const __m512bh input = reinterpret_cast<__m512bh>(_mm512_set1_epi32(rows[i]));
      left[i] = _mm512_dpbf16_ps(left[i], low, input);
      right[i] = _mm512_dpbf16_ps(right[i], high, input);
    }
  }

  void end(float* to) const {
#pragma GCC unroll 12
    for (int i = 0; i < M; i++) {
      _mm512_storeu_ps(to + i * WIDTH, left[i]);
      _mm512_storeu_ps(to + i * WIDTH + LANES, right[i]);
    }
  }
};

// Adds the products of M rows with a part of N panels to sums [N, M, WIDTH], or begins them with these. The order of
// additions is that of the inputs, whatever M and N are: a row gets the same sums in any company.
template <int M, int N, typename Reader>
void multiply(const std::uint32_t* rows, const Reader* from, std::int64_t pairs, float* sums, bool begins) {
  Sums<M> totals[N];
  Reader readers[N];
#pragma GCC unroll 2
  for (int n = 0; n < N; n++) {
    readers[n] = from[n];
    totals[n].begin(begins ? nullptr : sums + n * M * WIDTH);
  }
  std::int64_t pair = 0;
  for (; pair + 1 < pairs; pair += 2) {
#pragma GCC unroll 2
    for (int n = 0; n < N; n++) {
      __m512i numbers[4];
      readers[n].ask();
      readers[n].read(numbers);
      totals[n].add(rows + pair * M, numbers);
      totals[n].add(rows + (pair + 1) * M, numbers + 2);
    }
  }
#pragma GCC unroll 2
  for (int n = 0; n < N; n++) {
    __m512i numbers[2];
    if (pair < pairs) {
      readers[n].read_last(numbers);
      totals[n].add(rows + pair * M, numbers);
    }
    totals[n].end(sums + n * M * WIDTH);
  }
}

template <int N, typename Reader>
using Multiply = void (*)(const std::uint32_t*, const Reader*, std::int64_t, float*, bool);

// By the number of rows.
template <typename R>
constexpr Multiply<1, R> MULTIPLY[HEIGHT + 1] = {
    nullptr,           multiply<1, 1, R>,  multiply<2, 1, R>,  multiply<3, 1, R>, multiply<4, 1, R>,
    multiply<5, 1, R>, multiply<6, 1, R>,  multiply<7, 1, R>,  multiply<8, 1, R>, multiply<9, 1, R>,
    multiply<10, 1, R>, multiply<11, 1, R>, multiply<12, 1, R>};

template <typename R>
constexpr Multiply<2, R> MULTIPLY_TWO[TWINS + 1] = {nullptr, multiply<1, 2, R>, multiply<2, 2, R>};

}  // namespace mindgen
