// Products with weights that lie in panels.
//
// A thread reads its panels from begin to end, once for all rows where these are few. Rows lie likewise, a pair of inputs
// of up to 12 rows side by side, so that they are read in the order of use.

#include <omp.h>

#include <algorithm>
#include <atomic>

#include "calls.h"
#include "multiply.h"

namespace mindgen {
namespace {

constexpr std::int64_t SLAB = 576;     // rows between two readings of the weights
constexpr std::int64_t FEW = 48;       // up to so many rows, the panels are read one after the other
constexpr std::int64_t DEPTH_FEW = 2;  // chunks at a time, so that a part of a panel stays in the L1 cache
constexpr std::int64_t DEPTH_MANY = 3;
constexpr std::int64_t BLOCK = 4;      // panels whose sums stay in the L2 cache

// `pairs` pairs of inputs of `height` rows, which lie `stride` numbers apart, as tiles [pairs, height].
void tile(const bf16* rows, std::int64_t stride, int height, std::int64_t pairs, std::uint32_t* tiles) {
  const __mmask16 mask = first(height);
  for (std::int64_t pair = 0; pair < pairs; pair += 16) {
    const std::int64_t count = std::min<std::int64_t>(16, pairs - pair);
    __m512i square[16];
    for (int i = 0; i < 16; i++) {
      const bf16* row = rows + i * stride + 2 * pair;
      square[i] = i < height ? _mm512_maskz_loadu_epi32(first(count), row) : _mm512_setzero_si512();
    }
    transpose(square);
    for (std::int64_t i = 0; i < count; i++) _mm512_mask_storeu_epi32(tiles + (pair + i) * height, mask, square[i]);
  }
}

struct Product {
  const bf16 *inputs, *panels, *bias, *residual;  // the last two may be null
  bf16* outputs;
  std::int64_t pairs, num_panels;  // of inputs, of outputs

  std::int64_t num_outputs() const { return num_panels * WIDTH; }
};

// Kept by each thread that calls.
struct Rooms {
  Kept<std::uint32_t> tiles;
  Kept<float> sums;
};

// Some rows of a product, in groups of nearly equal height.
class Slab {
 public:
  Slab(const Product& product, std::int64_t row, std::int64_t count)
      : product_(product), row_(row), count_(count), groups_((count + HEIGHT - 1) / HEIGHT) {
    depth_ = groups_ == 1 ? product.pairs : CHUNK * (count > FEW ? DEPTH_MANY : DEPTH_FEW);
    parts_ = (product.pairs + depth_ - 1) / depth_;
  }

  void compute(Rooms& rooms, int num_threads) {
    // No thread shall wait long for the last one.
    const std::int64_t most = std::max<std::int64_t>(1, product_.num_panels / (num_threads * 4));
    const std::int64_t block = std::min<std::int64_t>(count_ > FEW ? BLOCK : count_ > TWINS ? 1 : 2, most);
    const std::int64_t share = count_ > FEW ? block : std::max(block, std::min<std::int64_t>(8, most) / block * block);
    const std::int64_t sums_of_thread = block * count_ * WIDTH;
    tiles_ = rooms.tiles.at_least(count_ * product_.pairs);
    float* const all_sums = rooms.sums.at_least(num_threads * sums_of_thread);
    std::atomic<std::int64_t> next{0};
#pragma omp parallel num_threads(num_threads)
    {
#pragma omp for schedule(static)
      for (std::int64_t group = 0; group < groups_; group++) {
        const bf16* rows = product_.inputs + (row_ + start(group)) * 2 * product_.pairs;
        for (std::int64_t part = 0; part < parts_; part++) {
          const std::int64_t pairs = pair(part + 1) - pair(part);
          tile(rows + 2 * pair(part), 2 * product_.pairs, height(group), pairs, tiles(group, part));
        }
      }
      float* const sums = all_sums + omp_get_thread_num() * sums_of_thread;
      for (std::int64_t begin; (begin = next.fetch_add(share)) < product_.num_panels;) {
        const std::int64_t end = std::min(begin + share, product_.num_panels);
        for (std::int64_t panel = begin; panel < end; panel += block) {
          multiply_block(panel, std::min(panel + block, end), sums);
        }
      }
    }
  }

 private:
  std::int64_t start(std::int64_t group) const { return group * count_ / groups_; }
  int height(std::int64_t group) const { return static_cast<int>(start(group + 1) - start(group)); }
  std::int64_t pair(std::int64_t part) const { return std::min(part * depth_, product_.pairs); }

  // Of a part of the inputs the tiles of all groups lie side by side.
  std::uint32_t* tiles(std::int64_t group, std::int64_t part) const {
    return tiles_ + pair(part) * count_ + start(group) * (pair(part + 1) - pair(part));
  }

  Panel panel(std::int64_t i) const {
    return {product_.panels + i * Panel::size(product_.pairs), product_.pairs};
  }

  void multiply_block(std::int64_t begin, std::int64_t end, float* sums) const {
    if (groups_ > 1) {
      multiply_parts(begin, end, sums);
    } else if (end - begin == 2 && panel(begin).compact() && panel(begin + 1).compact()) {
      multiply_two(begin, sums);
    } else {
      for (std::int64_t i = begin; i < end; i++) multiply_one(i, sums + (i - begin) * count_ * WIDTH);
    }
    for (std::int64_t i = 0; i < count_; i++) finish(i, begin, end, sums + i * WIDTH);
  }

  void multiply_one(std::int64_t i, float* sums) const {
    if (panel(i).compact()) {
      const CompactReader reader = once(i, i + 1);
      MULTIPLY<CompactReader>[count_](tiles_, &reader, product_.pairs, sums, true);
    } else {
      const PanelReader reader{{reinterpret_cast<const bf16*>(panel(i).begin(0))}, ahead(i, i + 1)};
      MULTIPLY<PanelReader>[count_](tiles_, &reader, product_.pairs, sums, true);
    }
  }

  void multiply_two(std::int64_t i, float* sums) const {
    const CompactReader readers[]{once(i, i + 2), once(i + 1, i + 3)};
    MULTIPLY_TWO<CompactReader>[count_](tiles_, readers, product_.pairs, sums, true);
  }

  // Reads compact panel `i`, and asks for panel `next` before it ends, which this thread most likely reads then.
  CompactReader once(std::int64_t i, std::int64_t next) const { return panel(i).reader(0, ahead(i, next)); }

  Ahead ahead(std::int64_t i, std::int64_t next) const {
    const Panel now = panel(i), then = panel(std::min(next, product_.num_panels - 1));
    then.ask();
    return {std::min(now.begin(0) + Ahead::BYTES, now.end()), now.end(), then.begin(0)};
  }

  // Panels from `begin` to `end`, a part of their inputs at a time: those of all rows stay in the L2 cache meanwhile.
  void multiply_parts(std::int64_t begin, std::int64_t end, float* sums) const {
    for (std::int64_t part = 0; part < parts_; part++) {
      for (std::int64_t i = begin; i < end; i++) {
        multiply_part(part, panel(i), next(part, i, begin, end), sums + (i - begin) * count_ * WIDTH);
      }
    }
  }

  // What is most likely read after part `part` of panel `i`.
  const char* next(std::int64_t part, std::int64_t i, std::int64_t begin, std::int64_t end) const {
    if (i + 1 < end) return panel(i + 1).begin(pair(part));
    if (part + 1 < parts_) return panel(begin).begin(pair(part + 1));
    return panel(std::min(end, product_.num_panels - 1)).begin(0);
  }

  // The first group asks for what comes next, and leaves numbers plain for the others.
  void multiply_part(std::int64_t part, const Panel& panel, const char* next, float* sums) const {
    alignas(64) bf16 room[DEPTH_MANY * CHUNK * PAIR];
    const Ahead ahead{next, next + depth_ * PAIR * 2, next};
    const bf16* numbers = reinterpret_cast<const bf16*>(panel.begin(pair(part)));
    if (panel.compact()) {
      multiply_group(part, 0, ExpandingReader{panel.reader(pair(part), ahead), room}, sums);
      numbers = room;
    } else {
      multiply_group(part, 0, PanelReader{{numbers}, ahead}, sums);
    }
    for (std::int64_t group = 1; group < groups_; group++) multiply_group(part, group, PlainReader{numbers}, sums);
  }

  template <typename Reader>
  void multiply_group(std::int64_t part, std::int64_t group, const Reader& reader, float* sums) const {
    const std::int64_t pairs = pair(part + 1) - pair(part);
    MULTIPLY<Reader>[height(group)](tiles(group, part), &reader, pairs, sums + start(group) * WIDTH, part == 0);
  }

  // The sums of a row, for panels from `begin` to `end`, to outputs: plus the bias, plus the residual, rounded once.
  void finish(std::int64_t i, std::int64_t begin, std::int64_t end, const float* sums) const {
    for (std::int64_t panel = begin; panel < end; panel++, sums += count_ * WIDTH) {
      for (int half = 0; half < 2; half++) {
        const std::int64_t column = panel * WIDTH + half * LANES, place = (row_ + i) * product_.num_outputs() + column;
        __m512 total = _mm512_loadu_ps(sums + half * LANES);
        if (product_.bias) total = _mm512_add_ps(total, load(product_.bias + column, first(LANES)));
        if (product_.residual) total = _mm512_add_ps(total, load(product_.residual + place, first(LANES)));
        store(product_.outputs + place, first(LANES), total);
      }
    }
  }

  const Product& product_;
  const std::int64_t row_, count_, groups_;
  std::int64_t depth_, parts_;
  std::uint32_t* tiles_ = nullptr;
};

}  // namespace
}  // namespace mindgen

// inputs [rows, num_inputs] -> outputs [rows, num_outputs]; bias [num_outputs] and residual [rows, num_outputs], or
// null, are added.
MINDGEN_EXPORT std::int64_t mindgen_linear(const mindgen::bf16* inputs, std::int64_t rows, std::int64_t num_inputs,
                                           const mindgen::bf16* panels, std::int64_t num_outputs,
                                           const mindgen::bf16* bias, const mindgen::bf16* residual,
                                           mindgen::bf16* outputs, std::int64_t num_threads) {
  using namespace mindgen;
  static thread_local Rooms rooms;
  const Product product{inputs, panels, bias, residual, outputs, num_inputs / 2, num_outputs / WIDTH};
  const std::int64_t slabs = (rows + SLAB - 1) / SLAB;
  return status_of([&] {
    for (std::int64_t slab = 0; slab < slabs; slab++) {
      const std::int64_t begin = slab * rows / slabs, end = (slab + 1) * rows / slabs;
      Slab(product, begin, end - begin).compute(rooms, static_cast<int>(num_threads));
    }
  });
}
