"""Checks an exported folder: transformers reads the same ids and computes the same logits as the plain parts do."""

from __future__ import annotations

import argparse
from pathlib import Path

import sentencepiece
import torch
from corpus import read_corpus
from export import read_folder
from network import Llama
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

ODD_TEXTS = (
    "", " ", "  a  b ", "\n", "\n\n\n", "\tdef f():\n\treturn 1\r\n", "\n     five spaces", "\n" + " " * 50 + "deep",
    "naïve — “quoted” ½ ﬁ", "你好, 世界 🎉", "\x00\x01\x7f", "a" * 300, "=" * 77, " " * 77, "12345 3.14",
    "<|user|>hi<|assistant|>hello", "zero\u200bwidth \u2028 line", "e\u0301",
)  # fmt: skip


def wrong_ids(
    fast: PreTrainedTokenizerBase, pieces: sentencepiece.SentencePieceProcessor, texts: list[str]
) -> list[str]:
    """The texts that the two tokenizers split differently, or that do not come back as they were."""
    wrong = []
    for text in texts:
        ids = pieces.encode(text)
        same = fast(text, add_special_tokens=False)["input_ids"] == ids
        if not (same and fast.decode(ids) == text == pieces.decode(ids)):
            wrong.append(text)
    return wrong


def spells_control_token(text: str) -> bool:
    """SentencePiece never reads `<s>` out of a text; Hugging Face tokenizers always do."""
    return any(token in text for token in ("<unk>", "<s>", "</s>"))


@torch.inference_mode()
def largest_difference(model: Llama, folder: Path, tokens: list[int]) -> float:
    theirs = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()
    row = torch.tensor([tokens])
    return (theirs(row).logits - model(row)).abs().max().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path(__file__).parent / "model", help="Hugging Face folder")
    args = parser.parse_args()
    model, pieces = read_folder(args.model)
    corpus = read_corpus()
    texts = [*ODD_TEXTS, *(s.text for s in corpus.held_out), *corpus.held_out_functions]
    texts = [text for text in texts if not spells_control_token(text)]
    wrong = wrong_ids(AutoTokenizer.from_pretrained(str(args.model)), pieces, texts)
    difference = largest_difference(model, args.model, pieces.encode(corpus.held_out[0].text)[:2048])
    print(
        f"{len(texts) - len(wrong)} of {len(texts)} texts have the same ids; logits differ by at most {difference:.1e}"
    )
    if wrong or difference > 1e-3:
        raise SystemExit(f"the export is not faithful; first wrong text: {wrong[:1]!r}")


if __name__ == "__main__":
    main()
