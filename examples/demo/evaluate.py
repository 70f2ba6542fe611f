"""Measures an exported model on what it never saw: bits per byte, completions that parse, and functions repeated.

Held out are the modules that `corpus.is_held_out` picks by name; a function that also occurs elsewhere is not used.
"""

from __future__ import annotations

import argparse
import ast
import json
import math
import zlib
from dataclasses import asdict, dataclass
from difflib import SequenceMatcher
from pathlib import Path

import torch
import torch.nn.functional as F
from corpus import Corpus, parses, read_corpus
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

NUM_PREFIXES = 20
NUM_REPEATED = 8
ROW = 1024  # tokens of context for bits per byte
LONGEST_COMPLETION = 256
QUESTION = "how are you?"


@dataclass(frozen=True)
class Report:
    """Everything that the README states."""

    parameters: int
    folder_bytes: int
    held_out_bytes: int
    bits_per_byte: float
    parsed: int
    prefixes: int
    repeated_by_position: float
    repeated_by_difflib: float
    repeated_lines: list[int]
    answer: str
    answer_ends: bool


class Judge:
    """The exported folder, as any user of transformers would load it, in float32."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(str(folder))
        self.model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()

    def encode(self, text: str) -> list[int]:
        return self.tokenizer(text)["input_ids"]

    @torch.inference_mode()
    def greedy(self, prompt: list[int], limit: int) -> list[int]:
        """New tokens up to and including end of text, at most `limit`."""
        tokens = torch.tensor([prompt])
        options = {"do_sample": False, "max_new_tokens": limit, "max_length": None}
        return self.model.generate(tokens, attention_mask=torch.ones_like(tokens), **options)[0, len(prompt) :].tolist()

    def chat(self, content: str, limit: int) -> list[int]:
        messages = [{"role": "user", "content": content}]
        prompt = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return self.greedy(self.tokenizer(prompt, add_special_tokens=False)["input_ids"], limit)

    @torch.inference_mode()
    def nats(self, text: str) -> float:
        """The loss summed over a text, in rows that each begin anew."""
        tokens = self.encode(text)[1:]
        total = 0.0
        for start in range(0, len(tokens), ROW):
            row = torch.tensor([[self.tokenizer.bos_token_id, *tokens[start : start + ROW]]])
            total += F.cross_entropy(self.model(row).logits[0, :-1], row[0, 1:], reduction="sum").item()
        return total


def fixed_order(functions: list[str]) -> list[str]:
    """By checksum: arbitrary, but the same on every machine with the same library."""
    return sorted(functions, key=lambda code: zlib.crc32(code.encode()))


def beginning(code: str) -> str | None:
    """The function up to the end of its second statement, when at least two more follow."""
    function = ast.parse(code).body[0]
    assert isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
    if len(function.body) < 4:
        return None
    return "\n".join(code.split("\n")[: function.body[1].end_lineno])


def prefixes(corpus: Corpus) -> list[str]:
    found = [prefix for code in fixed_order(corpus.held_out_functions) if (prefix := beginning(code))]
    return [prefix for prefix in found if len(prefix) < 1500][:NUM_PREFIXES]


def complete(judge: Judge, prefix: str) -> str:
    """Prefix and completion; a completion cut by the limit loses its unfinished last line."""
    new = judge.greedy(judge.encode(prefix), LONGEST_COMPLETION)
    text = judge.tokenizer.decode(new, skip_special_tokens=True)
    if new[-1] != judge.tokenizer.eos_token_id:
        text = text.rpartition("\n")[0]
    return prefix + text


def thirty_lines(judge: Judge, corpus: Corpus) -> list[str]:
    """Functions of about 30 lines that fit twice into the context with room to spare."""
    fitting = [code for code in fixed_order(corpus.held_out_functions) if 28 <= code.count("\n") + 1 <= 32]
    return [code for code in fitting if len(judge.encode(code)) < 800][:NUM_REPEATED]


def repeated(judge: Judge, code: str) -> tuple[float, float]:
    """Tokens equal by position, and by difflib's ratio, when asked to repeat a function."""
    wanted = [*judge.encode(code)[1:], judge.tokenizer.eos_token_id]
    got = judge.chat(f"Repeat this function:\n\n{code}", len(wanted))
    same = sum(a == b for a, b in zip(wanted, got, strict=False))
    return same / len(wanted), SequenceMatcher(None, wanted, got, autojunk=False).ratio()


def bits_per_byte(judge: Judge, corpus: Corpus) -> float:
    size = sum(len(source.text.encode()) for source in corpus.held_out)
    nats = sum(judge.nats(source.text) for source in tqdm(corpus.held_out, desc="held-out modules"))
    return nats / math.log(2) / size


def mean(values: list[float]) -> float:
    return sum(values) / max(len(values), 1)


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)


def measure(folder: Path, show: bool) -> Report:
    corpus, judge = read_corpus(), Judge(folder)
    completions = [complete(judge, prefix) for prefix in tqdm(prefixes(corpus), desc="completions")]
    functions = thirty_lines(judge, corpus)
    copies = [repeated(judge, code) for code in tqdm(functions, desc="repeated functions")]
    answer = judge.chat(QUESTION, 64)
    if show:
        print(*completions, *copies, sep="\n" + "-" * 60 + "\n")
    return Report(
        parameters=sum(p.numel() for p in judge.model.parameters()),
        folder_bytes=folder_bytes(Path(__file__).parent),
        held_out_bytes=sum(len(source.text.encode()) for source in corpus.held_out),
        bits_per_byte=round(bits_per_byte(judge, corpus), 4),
        parsed=sum(parses(text) for text in completions),
        prefixes=len(completions),
        repeated_by_position=round(mean([by_position for by_position, _ in copies]), 4),
        repeated_by_difflib=round(mean([by_difflib for _, by_difflib in copies]), 4),
        repeated_lines=[code.count("\n") + 1 for code in functions],
        answer=judge.tokenizer.decode(answer, skip_special_tokens=True),
        answer_ends=answer[-1] == judge.tokenizer.eos_token_id,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path(__file__).parent / "model", help="Hugging Face folder")
    parser.add_argument("--show", action="store_true", help="print the completions too")
    args = parser.parse_args()
    print(json.dumps(asdict(measure(args.model, args.show)), indent=2))


if __name__ == "__main__":
    main()
