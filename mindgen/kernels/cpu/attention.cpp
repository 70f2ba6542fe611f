// Flash attention over the paged cache (Dao et al. 2022): prompts, chunks and decodes in one call.
//
// The query heads of a KV head times the queries of a sequence are rows, query after query. A task is up to ROWS rows
// of one sequence and one KV head, and takes KEYS keys at a time, where they lie. What bf16 products want is pairs of
// neighbours in one 32-bit word: of a key's dimensions, of tokens' values. Scores never leave the registers. A task's
// numbers depend on nothing but its sequence, so they are the same bits with any number of threads.
#include <omp.h>

#include <atomic>
#include <cstring>
#include <vector>

#include "attention_query.h"
#include "calls.h"

namespace mindgen::attention {
namespace {

void begin(const Call& call, Room& room, const Task& task) {
  const Int start = call.starts[task.sequence], queries = call.starts[task.sequence + 1] - start;
  for (Int row = 0; row < task.rows; ++row) {
    const Int query = (task.from + row) / call.shared, head = (task.from + row) % call.shared;
    const bf16* at = call.query.at + (start + query) * call.query.token + task.group * call.query.group;
    std::memcpy(room.query + row * call.head_dim, at + head * call.query.head, call.head_dim * sizeof(bf16));
    room.position[row] = call.lengths[task.sequence] - queries + query;
    room.slope[row] = call.slopes ? call.slopes[task.group * call.shared + head] : 0;
    room.most[row] = std::numeric_limits<float>::lowest();
  }
  std::fill_n(room.output, task.rows * call.columns(), 0.f);
  std::fill_n(room.sums, task.rows * LANES, 0.f);
}

void finish(const Call& call, const Room& room, const Task& task) {
  const Int columns = call.columns();
  for (Int row = 0; row < task.rows; ++row) {
    const Int query = (task.from + row) / call.shared, head = (task.from + row) % call.shared;
    const Int token = call.starts[task.sequence] + query;
    bf16* to = call.output + ((token * call.groups + task.group) * call.shared + head) * call.head_dim;
    const __m512 share = _mm512_set1_ps(1 / _mm512_reduce_add_ps(_mm512_load_ps(room.sums + row * LANES)));
    for (Int at = 0; at < call.head_dim; at += LANES)
      store(to + at, first(call.head_dim - at), _mm512_mul_ps(_mm512_load_ps(room.output + row * columns + at), share));
  }
}

// Where the task's first keys lie stands in `now` already; afterwards it is where those of the `following` one do.
void attend_rows(const Call& call, Room& room, const Task& task, const Task& following) {
  begin(call, room, task);
  const bool once = task.rows <= FEW && room.position[0] == room.position[task.rows - 1];
  for (Int start = task.start; start < task.end; start += KEYS) {
    const bool more = start + KEYS < task.end;
    locate(call, more ? task : following, more ? start + KEYS : following.start, *room.next);
    (once ? attend_keys_once : attend_keys)(call, room, task.rows, start);
    std::swap(room.now, room.next);
  }
  finish(call, room, task);
}

// Everything that is to be done, handed out from the end: the last queries of a prompt see most.
class Work {
 public:
  explicit Work(const Call& call) : call_(call), before_(call.sequences + 1, 0) {
    for (Int sequence = 0; sequence < call.sequences; ++sequence)
      before_[sequence + 1] = before_[sequence] + (call.rows(sequence) + ROWS - 1) / ROWS * call.groups;
    left_ = before_.back();
  }

  // One that nobody has; without rows if there is none.
  Task take() {
    const Int number = --left_;
    if (number < 0) return {};
    const Int sequence = std::upper_bound(before_.begin(), before_.end(), number) - before_.begin() - 1;
    const Int own = number - before_[sequence], from = own / call_.groups * ROWS;
    const Int rows = std::min<Int>(ROWS, call_.rows(sequence) - from);
    const Int cached = call_.lengths[sequence] - call_.rows(sequence) / call_.shared;
    const Int start = std::max<Int>(0, cached + from / call_.shared + 1 - call_.window);
    return {sequence, own % call_.groups, from, rows, start, cached + (from + rows - 1) / call_.shared + 1};
  }

 private:
  const Call& call_;
  std::vector<Int> before_;  // the tasks of earlier sequences
  std::atomic<Int> left_;
};

void attend_all(const Call& call, int threads) {
  Work work(call);
  const Int tokens = call.starts[call.sequences];
  static thread_local Kept<Room> rooms;
  Room* const all_rooms = rooms.at_least(threads);
#pragma omp parallel num_threads(threads)
  {
#pragma omp for
    for (Int token = 0; token < tokens; ++token) write(call, token);
    Room& room = all_rooms[omp_get_thread_num()];
    Task task = work.take();
    locate(call, task, task.start, *room.now);
    while (task.rows) {
      const Task following = work.take();
      attend_rows(call, room, task, following);
      task = following;
    }
  }
}

}  // namespace
}  // namespace mindgen::attention

// Stores the new keys and values at `slots`, then attends. Strides count elements; no window is 0.
// query [T, G, Q, D], key and value [T, G, D], keys and values [blocks, block_size, G, D], output [T, G, Q, D] dense.
// D is even and at most 256.
MINDGEN_EXPORT std::int64_t mindgen_attend(
    const mindgen::bf16* query, std::int64_t query_token, std::int64_t query_group, std::int64_t query_head,
    const mindgen::bf16* key, std::int64_t key_token, std::int64_t key_group, const mindgen::bf16* value,
    std::int64_t value_token, std::int64_t value_group, mindgen::bf16* keys, mindgen::bf16* values,
    mindgen::bf16* output, std::int64_t shared, std::int64_t window, const mindgen::attention::Context* context) {
  constexpr std::int64_t ALL = std::numeric_limits<std::int64_t>::max() / 2;
  const auto& same = *context;
  const mindgen::attention::Call call{
      {query, query_token, query_group, query_head}, {key, key_token, key_group, 0},
      {value, value_token, value_group, 0}, keys, values, output, same.cache_block, same.cache_token, same.cache_group,
      same.slots, same.starts, same.lengths, same.tables, same.width, same.sequences, same.groups, shared,
      same.head_dim, same.block_size, window ? window : ALL, same.scale, same.softcap, same.slopes};
  return mindgen::status_of([&] { mindgen::attention::attend_all(call, static_cast<int>(same.threads)); });
}
