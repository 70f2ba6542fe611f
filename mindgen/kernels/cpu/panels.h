// Weights in panels, from which products read them.
//
// A panel is 32 outputs of a weight [outputs, inputs]: for each pair of inputs the two numbers of each output side by
// side, as vdpbf16ps multiplies them. At a few rows reading is what a product waits for, so that most panels are
// compact: 12 bits for each number, and none is lost. The numbers of a panel differ little in size. So of the upper byte
// of a bf16 number (sign and seven bits of the exponent) 4 bits are kept, which choose one of sixteen; the few numbers
// that have another upper byte, the strays, are listed, and put right after the others are expanded. The lower byte stays
// as it is. A panel with many strays is kept plain.
#pragma once

#include <algorithm>
#include <cstring>

#include "bf16.h"

namespace mindgen {

constexpr int WIDTH = 2 * LANES;      // outputs of a panel
constexpr int PAIR = 2 * WIDTH;       // its numbers for a pair of inputs: two cache lines
constexpr std::int64_t CHUNK = 64;    // pairs whose strays are counted together

// Asks for memory in the order in which it will be read: from `at` to `end`, then from `next` on.
struct Ahead {
  static constexpr std::int64_t BYTES = 4032;  // between what is read and what is asked for

  const char *at, *end, *next;

  template <int LINES>
  void ask() {
    at = at < end ? at : next;
    for (int line = 0; line < LINES; ++line) _mm_prefetch(at + line * 64, _MM_HINT_T0);
    at += LINES * 64;
  }
};

using Byte = std::uint8_t;
using Word = std::uint32_t;

constexpr int TWO = 3 * 64;  // bytes of two compact pairs: the lower bytes of each, the codes of both

// Reads a compact panel, two pairs after the other.
class CompactReader {
 public:
  CompactReader() = default;

  // uppers [16]: upper bytes by their codes. `stray`: the first one not before pair 2 * two.
  CompactReader(const Byte* uppers, const char* from, std::int64_t two, const Word* stray, Ahead ahead)
      : table_(_mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(uppers)))),
        from_(from),
        two_(two),
        stray_(stray),
        ahead_(ahead) {}

  void ask() { ahead_.ask<TWO / 64>(); }

  // Two pairs, each in two registers.
  void read(__m512i (&numbers)[4]) {
    const __m512i code = _mm512_set1_epi8(15), codes = _mm512_loadu_si512(from_ + 128);
    __m512i first = _mm512_shuffle_epi8(table_, _mm512_and_si512(codes, code));
    __m512i second = _mm512_shuffle_epi8(table_, _mm512_and_si512(_mm512_srli_epi16(codes, 4), code));
    if (__builtin_expect(stray_pair() == two_, 0)) correct(first, second);
    widen(_mm512_loadu_si512(from_), first, numbers[0], numbers[1]);
    widen(_mm512_loadu_si512(from_ + 64), second, numbers[2], numbers[3]);
    from_ += TWO;
    ++two_;
  }

  void read_last(__m512i (&numbers)[2]) {
    __m512i both[4];
    read(both);
    numbers[0] = both[0];
    numbers[1] = both[1];
  }

 private:
  std::int64_t stray_pair() const { return *stray_ >> 15; }

  // Behind the last stray lies one of a pair that no panel has.
  void correct(__m512i& first, __m512i& second) {
    alignas(64) Byte bytes[128];
    _mm512_store_si512(bytes, first);
    _mm512_store_si512(bytes + 64, second);
    for (; stray_pair() == two_; ++stray_) bytes[*stray_ >> 8 & 127] = static_cast<Byte>(*stray_);
    first = _mm512_load_si512(bytes);
    second = _mm512_load_si512(bytes + 64);
  }

  static void widen(__m512i lower, __m512i upper, __m512i& left, __m512i& right) {
    left = _mm512_unpacklo_epi8(lower, upper);
    right = _mm512_unpackhi_epi8(lower, upper);
  }

  __m512i table_;
  const char* from_;
  std::int64_t two_;
  const Word* stray_;
  Ahead ahead_;
};

// A panel in memory: PAIR numbers of heading, then the numbers, PAIR for each pair of inputs, or what is compact instead.
class Panel {
 public:
  Panel(bf16* memory, std::int64_t pairs) : memory_(memory), pairs_(pairs) {}
  Panel(const bf16* memory, std::int64_t pairs) : memory_(const_cast<bf16*>(memory)), pairs_(pairs) {}

  static std::int64_t size(std::int64_t pairs) { return (pairs + 1) * PAIR; }  // in numbers

  bool compact() const { return heading().compact; }

  // Where the numbers from `pair` on begin.
  const char* begin(std::int64_t pair) const { return numbers() + (compact() ? pair / 2 * TWO : pair * PAIR * 2); }

  // Where they end.
  const char* end() const { return numbers() + (compact() ? (pairs_ + 1) / 2 * TWO : pairs_ * PAIR * 2); }

  // Reads a compact panel from `pair`, a multiple of CHUNK, on.
  CompactReader reader(std::int64_t pair, Ahead ahead) const {
    return {heading().uppers, begin(pair), pair / 2, strays() + starts()[pair / CHUNK], ahead};
  }

  // Asks for what must be known before the numbers can be read.
  void ask() const {
    _mm_prefetch(memory_, _MM_HINT_T0);
    _mm_prefetch(starts(), _MM_HINT_T0);
    _mm_prefetch(strays(), _MM_HINT_T0);
  }

  // Fills the panel from `weight` [WIDTH, 2 * pairs].
  void fill(const bf16* weight) const;

  // Fills `weight` from the panel.
  void empty(bf16* weight) const;

  // How many bytes a product reads.
  std::int64_t stored() const {
    if (!compact()) return pairs_ * PAIR * 2;
    return (pairs_ + 1) / 2 * TWO + starts()[chunks()] * sizeof(Word);
  }

 private:
  static constexpr std::int64_t RARE = 256;  // of so many numbers of a compact panel, one may be a stray

  struct Heading {
    Byte uppers[16];  // by their codes: the lower 3 bits count down from the largest size, the highest is the sign
    Word compact;
  };

  class Writer;

  Heading& heading() const { return *reinterpret_cast<Heading*>(memory_); }
  char* numbers() const { return reinterpret_cast<char*>(memory_ + PAIR); }
  std::int64_t chunks() const { return (pairs_ + CHUNK - 1) / CHUNK; }

  // For each chunk, and for the end, the number of strays before it.
  Word* starts() const { return reinterpret_cast<Word*>(numbers() + (pairs_ + 1) / 2 * TWO); }

  // Each an upper byte, below its place: from the lowest bit on the byte of 64, the pair of two, the number of these.
  Word* strays() const { return starts() + chunks() + 1; }

  std::int64_t most_strays() const {
    const char* const end = reinterpret_cast<const char*>(memory_ + size(pairs_));
    const std::int64_t room = (end - reinterpret_cast<const char*>(strays())) / static_cast<std::int64_t>(sizeof(Word));
    return std::min(room - 1, pairs_ * PAIR / RARE);
  }

  bool fill_compact(const bf16* weight) const;
  void fill_plain(const bf16* weight) const;
  void empty_pair(std::int64_t pair, const bf16* numbers, bf16* weight) const;

  bf16* memory_;
  std::int64_t pairs_;
};

}  // namespace mindgen
