"""Trains the demo model on this machine's Python library, for a given number of minutes.

The clock, not a step count, drives the learning rate and the row length; a run that was stopped goes on
from its last checkpoint with the minutes it has left. Under torchrun the processes share the rows of each step:
on a busy machine, two processes of one thread wait less for each other than two threads do.
"""

from __future__ import annotations

import argparse
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import sentencepiece
import torch
import torch.distributed as dist
import torch.nn.functional as F
from corpus import Corpus, chunks, read_corpus
from data import IGNORED, Document, Mixer, copying_probes
from export import write_folder
from network import Llama, Shape
from torch import Tensor
from tqdm import tqdm
from vocabulary import train_sentencepiece

Loss = Callable[[Llama, Tensor, Tensor], Tensor]

PROBE = 400  # tokens of the functions whose copying is watched in the log


@dataclass(frozen=True)
class Stage:
    """Until this share of the time: rows of `length` tokens with this mixture."""

    until: float
    length: int
    shares: dict[str, float]


STAGES = (
    Stage(0.15, 256, {"code": 30, "copies": 40, "noise": 25, "chat": 5}),
    Stage(0.28, 512, {"code": 42, "copies": 40, "noise": 8, "chat": 10}),
    Stage(0.66, 1024, {"code": 50, "copies": 38, "noise": 2, "chat": 10}),
    Stage(0.80, 2048, {"code": 50, "copies": 38, "noise": 2, "chat": 10}),
    Stage(0.95, 2048, {"code": 32, "copies": 58, "noise": 2, "chat": 8}),
    Stage(1.00, 2048, {"code": 18, "copies": 76, "chat": 6}),
)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo-run"), help="folder for vocabulary, checkpoints, model")
    parser.add_argument("--minutes", type=float, default=90, help="training time; resumed runs count what they had")
    parser.add_argument("--tokens-per-step", type=int, default=4096)
    parser.add_argument("--muon-lr", type=float, default=0.015, help="peak learning rate of the matrices")
    parser.add_argument("--adam-lr", type=float, default=3e-3, help="peak learning rate of embedding and norms")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--save-every", type=float, default=4, help="minutes between checkpoints")
    parser.add_argument("--compile", action="store_true", help="torch.compile; needs a C++ compiler")
    return parser.parse_args()


def learning_rate_factor(progress: float) -> float:
    """A trapezoid: up in the first 1% of the time, level, and from 50% down to nothing."""
    return min(1.0, progress / 0.01 + 0.01, max(0.0, (1 - progress) / 0.5))


def stage_at(progress: float) -> Stage:
    return next((stage for stage in STAGES if progress < stage.until), STAGES[-1])


def make_optimizers(model: Llama, muon_lr: float, adam_lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for the embedding and the norms."""
    matrices = [p for p in model.layers.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if not any(p is m for m in matrices)]
    return [
        torch.optim.Muon(matrices, lr=muon_lr, weight_decay=0.03),
        torch.optim.AdamW(others, lr=adam_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def loss_of(model: Llama, tokens: Tensor, labels: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(tokens)
    return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED)


def world() -> tuple[int, int]:
    """This process's rank and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def average_gradients(model: Llama) -> None:
    if not dist.is_initialized():
        return
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= world()[1]
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def common_clock(seconds: float) -> float:
    """The time of rank 0, so that all processes follow the same schedule and stop together."""
    clock = torch.tensor(seconds, dtype=torch.float64)
    if dist.is_initialized():
        dist.broadcast(clock, 0)
    return clock.item()


@torch.no_grad()
def copied_share(model: Llama, probes: list[Document]) -> float:
    """Of the tokens to be repeated, how many are the model's first choice when all before them are right."""
    right = total = 0
    for probe in probes:
        guesses = model(torch.tensor([probe.tokens[:-1]])).argmax(-1)[0]
        wanted = torch.tensor(probe.tokens[1:])
        answer = slice(probe.learned_from - 1, None)
        right += int((guesses == wanted)[answer].sum())
        total += len(wanted[answer])
    return right / max(total, 1)


@dataclass
class Run:
    """A model in training: what is saved, and how one step is taken."""

    model: Llama
    optimizers: list[torch.optim.Optimizer]
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    peaks: list[float] = field(init=False)  # the learning rates at the height of the schedule

    def __post_init__(self) -> None:
        self.peaks = [optimizer.param_groups[0]["lr"] for optimizer in self.optimizers]

    def train_step(self, loss_function: Loss, tokens: Tensor, labels: Tensor, factor: float) -> float:
        loss = loss_function(self.model, tokens, labels)
        loss.backward()
        average_gradients(self.model)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer, peak in zip(self.optimizers, self.peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * factor
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        self.tokens += tokens.numel() * world()[1]
        return loss.item()

    def save(self, path: Path) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "progress": {"step": self.step, "tokens": self.tokens, "seconds": self.seconds},
        }
        torch.save(state, path.with_suffix(".new"))
        os.replace(path.with_suffix(".new"), path)

    def resume(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.tokens, self.seconds = (state["progress"][key] for key in ("step", "tokens", "seconds"))


def load_pieces(out: Path, corpus: Corpus, size: int) -> sentencepiece.SentencePieceProcessor:
    """The vocabulary of this run, trained when it is not there yet."""
    if not (out / "tokenizer.model").exists():
        texts = (chunk for source in corpus.train for chunk in chunks(source.text, 4000))
        train_sentencepiece(texts, out / "tokenizer.model", size)
    return sentencepiece.SentencePieceProcessor(model_file=str(out / "tokenizer.model"))


def train(run: Run, mixer: Mixer, probes: list[Document], args: argparse.Namespace) -> None:
    """Steps until the minutes are used up, saving and logging on the way."""
    loss_function = torch.compile(loss_of, dynamic=False) if args.compile else loss_of
    budget, saved_at, recent = args.minutes * 60, run.seconds, 0.0
    bar = tqdm(desc="train", unit="step", initial=run.step, mininterval=20, disable=world()[0] > 0)
    rank, size = world()
    while run.seconds < budget:
        began = time.monotonic()
        progress = run.seconds / budget
        stage = stage_at(progress)
        tokens, labels = mixer.batch(stage.shares, rows_of(args, stage, size), stage.length)
        loss = run.train_step(loss_function, tokens, labels, learning_rate_factor(progress))
        recent = 0.98 * recent + 0.02 * loss if recent else loss
        bar.update()
        bar.set_postfix(loss=f"{recent:.3f}", length=stage.length, tokens=f"{run.tokens / 1e6:.2f}M", refresh=False)
        run.seconds = common_clock(run.seconds + time.monotonic() - began)
        if rank == 0 and (run.seconds - saved_at > args.save_every * 60 or run.seconds >= budget):
            saved_at = run.seconds
            run.save(args.out / "checkpoint.pt")
            report(run, recent, probes)


def rows_of(args: argparse.Namespace, stage: Stage, num_processes: int) -> int:
    return max(1, args.tokens_per_step // stage.length // num_processes)


def report(run: Run, loss: float, probes: list[Document]) -> None:
    share = copied_share(run.model, probes)
    tqdm.write(
        f"minute {run.seconds / 60:.1f}: step {run.step}, {run.tokens / 1e6:.2f}M tokens, "
        f"loss {loss:.3f}, {share:.1%} of held-out functions copied"
    )


def main() -> None:
    args = parse_args()
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo")
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    corpus = read_corpus()
    shape = Shape()
    pieces = load_pieces(args.out, corpus, shape.vocab)
    model = Llama(shape)
    run = Run(model, make_optimizers(model, args.muon_lr, args.adam_lr))
    if (args.out / "checkpoint.pt").exists():
        run.resume(args.out / "checkpoint.pt")
    mixer = Mixer(corpus, pieces, random.Random(args.seed + run.step + world()[0] * 1_000_000))
    train(run, mixer, list(copying_probes(mixer, corpus.held_out_functions, PROBE, 6)), args)
    if world()[0] == 0:
        write_folder(model, pieces, args.out / "model")


if __name__ == "__main__":
    main()
