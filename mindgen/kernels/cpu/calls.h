// Functions that Python calls and layer.cpp does too. Who defines one includes this, so that the compiler compares them.
#pragma once

#include "bf16.h"
#include "exported.h"

namespace mindgen::attention {
struct Context;
}

MINDGEN_EXPORT std::int64_t mindgen_linear(const mindgen::bf16* inputs, std::int64_t rows, std::int64_t num_inputs,
                                           const mindgen::bf16* panels, std::int64_t num_outputs,
                                           const mindgen::bf16* bias, const mindgen::bf16* residual,
                                           mindgen::bf16* outputs, std::int64_t num_threads);

MINDGEN_EXPORT std::int64_t mindgen_attend(
    const mindgen::bf16* query, std::int64_t query_token, std::int64_t query_group, std::int64_t query_head,
    const mindgen::bf16* key, std::int64_t key_token, std::int64_t key_group, const mindgen::bf16* value,
    std::int64_t value_token, std::int64_t value_group, mindgen::bf16* keys, mindgen::bf16* values,
    mindgen::bf16* output, std::int64_t shared, std::int64_t window, const mindgen::attention::Context* context);

MINDGEN_EXPORT void mindgen_rms_norm(const mindgen::bf16* inputs, const mindgen::bf16* weight, mindgen::bf16* outputs,
                                     std::int64_t outer, std::int64_t inner, std::int64_t size,
                                     std::int64_t outer_stride, std::int64_t inner_stride, const float* epsilon,
                                     std::int64_t has_offset, std::int64_t num_threads);

MINDGEN_EXPORT void mindgen_gated_silu(const mindgen::bf16* inputs, mindgen::bf16* outputs, std::int64_t rows,
                                       std::int64_t size, std::int64_t stride, std::int64_t num_threads);

MINDGEN_EXPORT void mindgen_gated_gelu_tanh(const mindgen::bf16* inputs, mindgen::bf16* outputs, std::int64_t rows,
                                            std::int64_t size, std::int64_t stride, std::int64_t num_threads);

MINDGEN_EXPORT void mindgen_rotate(mindgen::bf16* heads, const mindgen::bf16* cosine, const mindgen::bf16* sine,
                                   std::int64_t tokens, std::int64_t groups, std::int64_t width, std::int64_t size,
                                   std::int64_t token_stride, std::int64_t group_stride, std::int64_t head_stride,
                                   std::int64_t is_interleaved, std::int64_t num_threads);
