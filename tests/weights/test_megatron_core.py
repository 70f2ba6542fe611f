"""Our shards in NVIDIA's own model, and what their `args` state, against transformers. One program serves all cells."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from mindgen.spec import ModelSpec
from mindgen.weights.convert import ConvertConfig, convert
from mindgen.weights.families import rows_of
from mindgen.weights.open import open_source
from tests.checkpoints import CASES
from tests.model.test_decoder import difference
from tests.model.test_layouts import WITH_EXPERTS
from tests.originals import rope_of

# The package around megatron.core, which itself takes seconds to import, and is imported by the program.
pytest.importorskip("megatron", reason="megatron-core, which would judge our shards, is not installed")

# At 2 x 2 the stages have 3 and 2 layers, and the last one a copy of tied embeddings. At tp 4 two KV heads are shared
# by two ranks each, and what is on disk is cut in the middle of them.
LAYOUTS = [(2, 1), (2, 2), (4, 1)]
COMPUTED = (
    *("llama2", "llama31", "llama32", "mistral", "qwen2", "qwen25", "qwen3", "phi3", "glm", "glm_edge", "gpt2"),
    *("chatglm", "baichuan", "internlm2", "qwen"),
)
# It has no word for what these need (FEATURES), so that no model that it makes is theirs.
WITHOUT = {
    "gemma": {"scaled embeddings"},
    "gemma2": {"scaled embeddings", "soft caps", "norms after blocks"},
    "glm4": {"norms after blocks"},
    "glm4_32b": {"norms after blocks"},
    "phi35": {"a factor for each frequency"},
    "bloom": {"ALiBi", "normalised embeddings"},
    "baichuan2": {"a normalised head"},
    "baichuan_13b": {"ALiBi"},
    "baichuan2_13b": {"ALiBi", "a normalised head"},
}
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Feature:
    """What a family may need, and how megatron-core's word for it would look."""

    needed: Callable[[ModelSpec, str], Any]  # of a spec, and the names of its rows
    word: str


FEATURES = {
    "scaled embeddings": Feature(
        lambda spec, _: spec.embedding_scale, r"embed\w*_(scal|multipl|norm)|(scal|multipl)\w*_embed"
    ),
    "normalised embeddings": Feature(lambda _, rows: "word_embeddings.norm" in rows, r"embed\w*_(layer)?norm"),
    "soft caps": Feature(lambda spec, _: spec.attention_softcap or spec.logits_softcap, r"soft_?cap|logits?_cap"),
    "norms after blocks": Feature(lambda _, rows: "post_attn_norm" in rows, r"post_\w*(attn|attention|mlp|ffn)\w*norm"),
    "ALiBi": Feature(lambda spec, _: spec.positions == "alibi", "alibi"),
    "a normalised head": Feature(lambda spec, _: spec.normalised_head, r"norm\w*_(head|output)|(head|output)\w*_norm"),
    "a factor for each frequency": Feature(
        lambda spec, _: spec.rope_scaling and spec.rope_scaling.short_factors, r"long_?rope|(short|long)_factor"
    ),
}

cases = pytest.mark.parametrize("case", COMPUTED)
layouts = pytest.mark.parametrize(("tp", "pp"), LAYOUTS)


@pytest.fixture(scope="module")
def shards(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with every case at every layout, as `CASE/TP PP`."""
    folder = tmp_path_factory.mktemp("shards")
    for name in COMPUTED:
        for tp, pp in LAYOUTS:
            config = ConvertConfig(
                load_model_type="hf",
                save_model_type="mg",
                load_dir=str(checkpoint(name)),
                save_dir=str(folder / name / f"{tp} {pp}"),
                target_tensor_parallel_size=tp,
                target_pipeline_parallel_size=pp,
            )
            convert(config)
    return folder


@pytest.fixture(scope="module")
def cells(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the logits that megatron-core computed."""
    out = tmp_path_factory.mktemp("cells")
    texts = [f"{tp},{pp}" for tp, pp in LAYOUTS]
    folders = [str(shards / name) for name in COMPUTED]
    command = [sys.executable, "-W", "ignore", "-m", "tests.weights.megatron_core_program"]
    environ = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([*command, str(out), *texts, "--", *folders], cwd=ROOT, env=environ, check=True, timeout=150)
    return out


def test_every_case_is_computed_or_loaded_or_needs_what_is_not_there() -> None:
    assert sorted([*COMPUTED, *WITH_EXPERTS, *WITHOUT]) == sorted(CASES)


@pytest.mark.parametrize("name", CASES)
def test_a_case_is_left_out_for_what_it_needs(name: str, checkpoint: Callable[[str], Path]) -> None:
    spec = open_source(checkpoint(name)).spec
    rows = " ".join(row.name for row in rows_of(spec.family))
    assert {what for what, feature in FEATURES.items() if feature.needed(spec, rows)} == WITHOUT.get(name, set())


@pytest.mark.parametrize("what", FEATURES)
def test_megatron_core_has_no_word_for_what_is_left_out(what: str, cells: Path) -> None:
    """Red means that a newer one has: let it load and compute those that stand in WITHOUT for it."""
    words = json.loads((cells / "words.json").read_text())
    assert {"rotary_interleaved", "rotary_percent", "learned_absolute", "pre_mlp_layernorm"} <= set(words)
    assert [word for word in words if re.search(FEATURES[what].word, word, re.IGNORECASE)] == []


@layouts
@cases
def test_megatron_core_computes_what_transformers_does(
    case: str, tp: int, pp: int, cells: Path, expected_logits: Callable[[str], list[torch.Tensor]]
) -> None:
    expected = expected_logits(case)[0]
    logits = torch.load(cells / f"{case} {tp} {pp}.pt")
    assert logits.shape == (len(expected), 332)  # the vocabulary of 331, padded for two ranks and for four
    assert difference(logits[:, :331], expected) < 1e-4


@layouts
@cases
def test_every_shard_states_what_megatron_asks_a_checkpoint_for(
    case: str, tp: int, pp: int, shards: Path, judge: Callable[[str], Any]
) -> None:
    expected = stated_by_config(judge(case).config) | {
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "padded_vocab_size": 332,
    }
    files = sorted((shards / case / f"{tp} {pp}").glob("iter_0000001/mp_rank_*/model_optim_rng.pt"))
    assert len(files) == tp * pp
    for file in files:
        with torch.serialization.safe_globals([Namespace]):
            shard = torch.load(file, weights_only=True)
        assert (shard["checkpoint_version"], shard["iteration"]) == (3.0, 1)
        assert {name: getattr(shard["args"], name) for name in expected} == expected
        assert isinstance(shard["args"].rotary_base, int)  # as Megatron's flag is


def stated_by_config(config: Any) -> dict[str, Any]:
    """A transformers config in Megatron's words."""
    is_gpt = config.model_type == "gpt2"
    groups = config.num_attention_heads if is_gpt else config.num_key_value_heads
    rope = rope_of(config)
    return {
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "num_query_groups": groups,
        "group_query_attention": groups < config.num_attention_heads,
        "kv_channels": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        "ffn_hidden_size": 4 * config.hidden_size if is_gpt else config.intermediate_size,
        "max_position_embeddings": config.max_position_embeddings,
        "seq_length": config.max_position_embeddings,
        "position_embedding_type": "learned_absolute" if is_gpt else "rope",
        "rotary_base": rope["rope_theta"],
        "rotary_percent": rope["partial_rotary_factor"],
        "rotary_interleaved": config.model_type == "glm",
        "norm_epsilon": config.layer_norm_epsilon if is_gpt else config.rms_norm_eps,
        "normalization": "LayerNorm" if is_gpt else "RMSNorm",
        "apply_layernorm_1p": False,
        "untie_embeddings_and_output_weights": not config.tie_word_embeddings,
        "swiglu": not is_gpt,
        "add_bias_linear": is_gpt,
        "add_qkv_bias": config.model_type in ("qwen2", "gpt2") or getattr(config, "attention_bias", False),
        "qk_layernorm": config.model_type == "qwen3",
        "num_experts": None,
    }
