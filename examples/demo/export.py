"""Writes a training checkpoint as an ordinary Hugging Face folder, and reads such a folder back."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path

import sentencepiece
import torch
from network import Llama, Shape
from safetensors.torch import load_file, save_file
from torch import Tensor
from vocabulary import write_tokenizer


def config_of(shape: Shape) -> dict:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": shape.max_positions,
        "rms_norm_eps": shape.norm_eps,
        "rope_theta": shape.rope_theta,
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
    }


def generation_config() -> dict:
    return {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "do_sample": False, "max_length": 2048}


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", "utf-8")


def tensors_of(model: Llama) -> dict[str, Tensor]:
    """The weights in bfloat16 under their Hugging Face names; the tied head is not written."""
    return {f"model.{name}": value.to(torch.bfloat16).contiguous() for name, value in model.state_dict().items()}


def write_folder(model: Llama, pieces: sentencepiece.SentencePieceProcessor, out: Path) -> None:
    """Every file is complete before it takes its name, so a reader never sees half of one."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as name:
        made = Path(name)
        write_json(made / "config.json", config_of(model.shape))
        write_json(made / "generation_config.json", generation_config())
        write_tokenizer(pieces, made, model.shape.max_positions)
        save_file(tensors_of(model), made / "model.safetensors", metadata={"format": "pt"})
        for path in sorted(made.iterdir()):
            path.chmod(0o644)
            os.replace(path, out / path.name)


def read_folder(folder: Path) -> tuple[Llama, sentencepiece.SentencePieceProcessor]:
    """The exported model in float32 and its vocabulary, without transformers."""
    model = Llama(Shape())
    tensors = load_file(folder / "model.safetensors")
    model.load_state_dict({name.removeprefix("model."): value.float() for name, value in tensors.items()})
    return model.eval(), sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("demo-run"), help="folder that train.py wrote")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "model", help="Hugging Face folder to write"
    )
    args = parser.parse_args()
    model = Llama(Shape())
    model.load_state_dict(torch.load(args.run / "checkpoint.pt", weights_only=True)["model"])
    write_folder(model, sentencepiece.SentencePieceProcessor(model_file=str(args.run / "tokenizer.model")), args.out)


if __name__ == "__main__":
    main()
