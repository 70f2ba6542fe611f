// Half a layer in one call: what Python would call one after the other, without the way through Python between them. At
// one token that takes longer than all but the products.
#include <algorithm>
#include <tuple>
#include <utility>

#include "attention.h"
#include "calls.h"

namespace mindgen {
namespace {

using Int = std::int64_t;

// Where there is no bias, no norm of queries and keys, or no residual, there is null. T tokens, G groups, Q queries and
// W = Q + 2 heads a group, D head_dim.
struct SelfAttention {
  const bf16* norm;
  const bf16* qkv;
  const bf16* qkv_bias;
  const bf16* query_norm;
  const bf16* key_norm;
  const bf16* proj;
  const bf16* proj_bias;
  const float* epsilon;
  Int has_offset;
  Int hidden_size;
  Int groups;
  Int shared;
  Int head_dim;

  Int group() const { return (shared + 2) * head_dim; }
  Int queries() const { return groups * shared * head_dim; }
};

struct FeedForward {
  const bf16* norm;
  const bf16* up;
  const bf16* up_bias;
  const bf16* down;
  const bf16* down_bias;
  const float* epsilon;
  Int has_offset;
  Int hidden_size;
  Int inner_size;
  Int is_silu;
};

// [T, G, ...]
struct Heads {
  bf16* at;
  Int group;  // stride
};

// Queries and keys, which lie in `qkv` [T, G, W, D], each with its norm, now in `to`, one behind the other.
std::pair<Heads, Heads> normed(const SelfAttention& half, const bf16* qkv, bf16* to, Int tokens, Int threads) {
  const Int rows = tokens * half.groups, queries = half.shared * half.head_dim, size = half.head_dim;
  bf16* const keys = to + rows * queries;
  mindgen_rms_norm(qkv, half.query_norm, to, rows, half.shared, size, half.group(), size, half.epsilon, half.has_offset,
                   threads);
  mindgen_rms_norm(qkv + queries, half.key_norm, keys, rows, 1, size, half.group(), 0, half.epsilon, half.has_offset,
                   threads);
  return {{to, queries}, {keys, size}};
}

// What the calling thread works in, kept from call to call: so much memory would be new to the process in every one.
// Null where memory ends.
bf16* room_for(Int numbers) {
  static thread_local Kept<bf16> room;
  bf16* found = nullptr;
  status_of([&] { found = room.at_least(std::max<Int>(1, numbers)); });
  return found;
}

}  // namespace
}  // namespace mindgen

using namespace mindgen;

// hidden [T, hidden_size] -> outputs, plus residual: norm, queries, keys and values, their norms and rotation, the new
// ones stored in keys and values [blocks, block_size, G, D], attention, projection. cosine and sine [T, turned] or null.
MINDGEN_EXPORT std::int64_t mindgen_self_attention(const SelfAttention* self, const attention::Context* context,
                                                   const bf16* hidden, Int tokens, const bf16* cosine, const bf16* sine,
                                                   Int turned, Int is_interleaved, bf16* keys, bf16* values,
                                                   Int window, const bf16* residual, bf16* outputs) {
  const SelfAttention& half = *self;
  const Int threads = context->threads, size = half.head_dim, token = half.groups * half.group();
  const Int wide = std::max(half.hidden_size, half.queries());
  bf16* const room = room_for(tokens * (wide + 2 * token));  // the last part for norms of queries and keys
  if (!room) return NO_MEMORY;
  bf16* const qkv = room + tokens * wide;
  mindgen_rms_norm(hidden, half.norm, room, tokens, 1, half.hidden_size, half.hidden_size, 0, half.epsilon,
                   half.has_offset, threads);
  if (mindgen_linear(room, tokens, half.hidden_size, half.qkv, token, half.qkv_bias, nullptr, qkv, threads) != DONE)
    return NO_MEMORY;
  Heads query{qkv, half.group()}, key{qkv + half.shared * size, half.group()};
  if (half.query_norm) std::tie(query, key) = normed(half, qkv, qkv + tokens * token, tokens, threads);
  if (cosine)
    for (const auto& [heads, count] : {std::pair{query, half.shared}, std::pair{key, Int{1}}})
      mindgen_rotate(heads.at, cosine, sine, tokens, half.groups, count, turned, half.groups * heads.group, heads.group,
                     size, is_interleaved, threads);
  const bf16* value = qkv + (half.shared + 1) * size;
  if (mindgen_attend(query.at, half.groups * query.group, query.group, size, key.at, half.groups * key.group, key.group,
                     value, token, half.group(), keys, values, room, half.shared, window, context) != DONE)
    return NO_MEMORY;
  return mindgen_linear(room, tokens, half.queries(), half.proj, half.hidden_size, half.proj_bias, residual, outputs,
                        threads);
}

// hidden [T, hidden_size] -> outputs, plus residual: norm, gate and up, activation, down. `most` tokens at a time.
MINDGEN_EXPORT std::int64_t mindgen_feed_forward(const FeedForward* self, const bf16* hidden, Int tokens,
                                                 const bf16* residual, Int most, bf16* outputs, Int threads) {
  const FeedForward& half = *self;
  const Int size = half.hidden_size, inner = half.inner_size;
  const auto gate = half.is_silu ? mindgen_gated_silu : mindgen_gated_gelu_tanh;
  bf16* const room = room_for(most * (std::max(size, inner) + 2 * inner));
  if (!room) return NO_MEMORY;
  bf16* const gates = room + most * std::max(size, inner);
  for (Int at = 0; at < tokens; at += most) {
    const Int count = std::min(most, tokens - at);
    const bf16* const more = residual ? residual + at * size : nullptr;
    mindgen_rms_norm(hidden + at * size, half.norm, room, count, 1, size, size, 0, half.epsilon, half.has_offset, threads);
    if (mindgen_linear(room, count, size, half.up, 2 * inner, half.up_bias, nullptr, gates, threads) != DONE)
      return NO_MEMORY;
    gate(gates, room, count, inner, 2 * inner, threads);
    if (mindgen_linear(room, count, inner, half.down, size, half.down_bias, more, outputs + at * size, threads) != DONE)
      return NO_MEMORY;
  }
  return DONE;
}
