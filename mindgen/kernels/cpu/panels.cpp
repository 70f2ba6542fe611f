// Lays weights out in panels, and back.

#include "panels.h"

#include <array>

#include "exported.h"

namespace mindgen {
namespace {

constexpr int SIZES = 8;  // of upper bytes without their sign, which have codes

// Sixteen pairs of inputs of 32 outputs, from `pair` on; zero behind the last pair.
struct Square {
  __m512i left[16], right[16];  // of each pair the numbers of the first sixteen outputs, and of the others

  Square(const bf16* weight, std::int64_t pairs, std::int64_t pair) {
    const __mmask16 mask = first(pairs - pair);
    for (int i = 0; i < LANES; ++i) {
      const bf16* row = weight + (i * pairs + pair) * 2;
      left[i] = _mm512_maskz_loadu_epi32(mask, row);
      right[i] = _mm512_maskz_loadu_epi32(mask, row + LANES * pairs * 2);
    }
    transpose(left);
    transpose(right);
  }
};

// The largest of those SIZES, one after the other, that most numbers of a panel have, judged by its diagonal. Of several
// it is the smallest: small numbers are more frequent than large ones.
int usual_size(const bf16* weight, std::int64_t pairs) {
  std::array<int, 128> counts{};
  for (std::int64_t output = 0, input = 0; output < WIDTH; ++output) {
    for (int i = 0; i < 64; ++i, input = input + 1 < 2 * pairs ? input + 1 : 0) {
      ++counts[weight[output * 2 * pairs + input] >> 8 & 127];
    }
  }
  int best = SIZES - 1, most = 0, covered = 0;
  for (int size = 0; size < 128; ++size) {
    covered += counts[size] - (size < SIZES ? 0 : counts[size - SIZES]);
    if (size >= SIZES - 1 && covered > most) best = size, most = covered;
  }
  return best;
}

}  // namespace

// Writes a compact panel from its begin to its end.
class Panel::Writer {
 public:
  Writer(const Panel& panel, int largest)
      : to_(panel.numbers()), strays_(panel.strays()), most_(panel.most_strays()), largest_(largest) {
    for (int code = 0; code < 2 * SIZES; ++code) {
      panel.heading().uppers[code] = static_cast<Byte>(largest - code % SIZES + code / SIZES * 128);
    }
  }

  std::int64_t num_strays() const { return num_strays_; }

  void end() { strays_[num_strays_] = ~Word{0}; }

  // Whether there was room for the strays of two pairs, of which the second may be none.
  bool write(std::int64_t pair, const Square& square, int i, bool both) {
    const __m512i first = upper(square, i), second = upper(square, i + 1);
    const __m512i codes = _mm512_or_si512(code(first), _mm512_slli_epi16(code(second), 4));
    _mm512_storeu_si512(to_, lower(square, i));
    _mm512_storeu_si512(to_ + 64, lower(square, i + 1));
    _mm512_storeu_si512(to_ + 128, codes);
    to_ += TWO;
    return list(pair, first) && (!both || list(pair + 1, second));
  }

 private:
  static __m512i lower(const Square& square, int i) {
    const __m512i byte = _mm512_set1_epi16(255);
    return _mm512_packus_epi16(_mm512_and_si512(square.left[i], byte), _mm512_and_si512(square.right[i], byte));
  }

  static __m512i upper(const Square& square, int i) {
    return _mm512_packus_epi16(_mm512_srli_epi16(square.left[i], 8), _mm512_srli_epi16(square.right[i], 8));
  }

  // How many sizes an upper byte lies below the largest; the lower bits of its code, unless it is a stray.
  __m512i below(__m512i upper) const {
    const __m512i size = _mm512_and_si512(upper, _mm512_set1_epi8(127));
    return _mm512_sub_epi8(_mm512_set1_epi8(static_cast<char>(largest_)), size);
  }

  __m512i code(__m512i upper) const {
    const __m512i sign = _mm512_and_si512(_mm512_srli_epi16(upper, 4), _mm512_set1_epi8(SIZES));
    return _mm512_or_si512(_mm512_and_si512(below(upper), _mm512_set1_epi8(SIZES - 1)), sign);
  }

  bool list(std::int64_t pair, __m512i upper) {
    std::uint64_t strange = _mm512_cmpge_epu8_mask(below(upper), _mm512_set1_epi8(SIZES));
    if (num_strays_ + __builtin_popcountll(strange) > most_) return false;
    alignas(64) Byte bytes[64];
    if (strange) _mm512_store_si512(bytes, upper);
    for (; strange; strange &= strange - 1) {
      const int byte = __builtin_ctzll(strange);
      strays_[num_strays_++] = static_cast<Word>((pair * 64 + byte) << 8 | bytes[byte]);
    }
    return true;
  }

  char* to_;
  Word* const strays_;
  const std::int64_t most_;
  const int largest_;
  std::int64_t num_strays_ = 0;
};

void Panel::fill(const bf16* weight) const {
  heading().compact = fill_compact(weight);
  if (!compact()) fill_plain(weight);
}

bool Panel::fill_compact(const bf16* weight) const {
  if (most_strays() < 0 || pairs_ * PAIR >= 1 << 23) return false;
  Writer writer(*this, usual_size(weight, pairs_));
  for (std::int64_t pair = 0; pair < pairs_; pair += 16) {
    if (pair % CHUNK == 0) starts()[pair / CHUNK] = static_cast<Word>(writer.num_strays());
    const Square square(weight, pairs_, pair);
    for (int i = 0; i < std::min<std::int64_t>(16, pairs_ - pair); i += 2) {
      if (!writer.write(pair + i, square, i, pair + i + 1 < pairs_)) return false;
    }
  }
  starts()[chunks()] = static_cast<Word>(writer.num_strays());
  writer.end();
  return true;
}

void Panel::fill_plain(const bf16* weight) const {
  for (std::int64_t pair = 0; pair < pairs_; pair += 16) {
    const Square square(weight, pairs_, pair);
    bf16* to = memory_ + PAIR + pair * PAIR;
    for (int i = 0; i < std::min<std::int64_t>(16, pairs_ - pair); ++i, to += PAIR) {
      _mm512_storeu_si512(to, square.left[i]);
      _mm512_storeu_si512(to + WIDTH, square.right[i]);
    }
  }
}

void Panel::empty(bf16* weight) const {
  if (!compact()) {
    for (std::int64_t pair = 0; pair < pairs_; ++pair) empty_pair(pair, memory_ + PAIR + pair * PAIR, weight);
    return;
  }
  CompactReader reader = this->reader(0, {begin(0), end(), begin(0)});
  for (std::int64_t pair = 0; pair < pairs_; pair += 2) {
    __m512i numbers[4];
    reader.read(numbers);
    const bf16* both = reinterpret_cast<const bf16*>(numbers);
    empty_pair(pair, both, weight);
    if (pair + 1 < pairs_) empty_pair(pair + 1, both + PAIR, weight);
  }
}

void Panel::empty_pair(std::int64_t pair, const bf16* numbers, bf16* weight) const {
  for (int i = 0; i < PAIR; ++i) weight[(i / 2 * pairs_ + pair) * 2 + i % 2] = numbers[i];
}

}  // namespace mindgen

// weight [outputs, inputs] -> panels [outputs / 32, 1 + inputs / 2, 64].
MINDGEN_EXPORT void mindgen_pack(const mindgen::bf16* weight, std::int64_t outputs, std::int64_t inputs,
                                 mindgen::bf16* panels, std::int64_t num_threads) {
  using namespace mindgen;
  const std::int64_t pairs = inputs / 2;
#pragma omp parallel for schedule(static) num_threads(num_threads)
  for (std::int64_t i = 0; i < outputs / WIDTH; ++i) {
    Panel(panels + i * Panel::size(pairs), pairs).fill(weight + i * WIDTH * inputs);
  }
}

// The weight [outputs, inputs] of `mindgen_pack`.
MINDGEN_EXPORT void mindgen_unpack(const mindgen::bf16* panels, std::int64_t outputs, std::int64_t inputs,
                                   mindgen::bf16* weight) {
  using namespace mindgen;
  const std::int64_t pairs = inputs / 2;
  for (std::int64_t i = 0; i < outputs / WIDTH; ++i) {
    Panel(panels + i * Panel::size(pairs), pairs).empty(weight + i * WIDTH * inputs);
  }
}

// How many bytes of these panels a product reads.
MINDGEN_EXPORT void mindgen_stored(const mindgen::bf16* panels, std::int64_t outputs, std::int64_t inputs,
                                   std::int64_t* bytes) {
  using namespace mindgen;
  const std::int64_t pairs = inputs / 2;
  *bytes = 0;
  for (std::int64_t i = 0; i < outputs / WIDTH; ++i) *bytes += Panel(panels + i * Panel::size(pairs), pairs).stored();
}
