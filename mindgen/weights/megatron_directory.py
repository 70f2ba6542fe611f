"""Where the shards of a Megatron checkpoint lie, and which of them there must be."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from mindgen.weights.files import open_regular, regular_file
from mindgen.weights.rows import EMBEDDING
from mindgen.weights.shards import open_shard

TRACKER = "latest_checkpointed_iteration.txt"
NAMES = {"torch": "model_optim_rng.pt", "safetensors": "model.safetensors"}
_MOST_MISSING = 1 << 12  # shards, of which lists are made
_RANK = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?(?:_(\d{3,}))?")


class Place(NamedTuple):
    """Where a shard belongs: its stage, its tensor rank and its expert rank."""

    stage: int
    rank: int
    expert: int = 0


@dataclass(frozen=True)
class Grid:
    """The shards of one iteration by their places. `save_format` is a key of NAMES.

    Every tensor rank is there with some expert rank, and every expert rank with some tensor rank; with all only where
    Megatron's layout asks for it (see expert_layout.py).
    """

    folder: Path
    tp: int
    pp: int
    ep: int
    save_format: str
    files: dict[Place, Path]

    def place(self, stage: int, rank: int) -> Place:
        """A shard of a tensor rank; all that there are of it hold the same but for experts."""
        return min(place for place in self.files if (place.stage, place.rank) == (stage, rank))


def is_megatron(path: Path) -> bool:
    """Whether a folder looks like a Megatron checkpoint, complete or not, or like one of its iterations."""
    names = [entry.name for entry in path.iterdir()] if path.is_dir() else []
    return TRACKER in names or any(name == "release" or name.startswith(("iter_", "mp_rank_")) for name in names)


def shard_name(place: Place, pp: int, ep: int = 1) -> str:
    """The directory of one shard."""
    numbers = [f"{place.rank:02d}"] + [f"{place.stage:03d}"] * (pp > 1) + [f"{place.expert:03d}"] * (ep > 1)
    return "_".join(["mp_rank", *numbers])


def find_iteration(path: Path) -> Path:
    """The folder of the iteration that a checkpoint's tracker names, or `path` itself if it holds shards.

    Raises ValueError for a checkpoint without a tracker, with one that says nothing sensible, or of another format.
    """
    folder = path if any(path.glob("mp_rank_*")) else _tracked(path)
    if (folder / "metadata.json").exists() or (folder / ".metadata").exists():
        raise ValueError(
            f"{folder} is a distributed checkpoint (torch_dist), which mindgen does not read yet; save it again from "
            "Megatron with --ckpt-format torch (--ckpt-convert-format torch --ckpt-convert-save DIR)"
        )
    return folder


def _tracked(path: Path) -> Path:
    tracker = path / TRACKER
    if not tracker.exists():
        raise ValueError(
            f"{path} has no {TRACKER}: its writer never finished. Convert or save it again, or name the folder of an "
            "iteration (iter_0000001) if you know that it is complete"
        )
    with open_regular(path, TRACKER) as file:
        text = file.read(100).decode("utf-8", "replace").strip()
    if text != "release" and not (text.isascii() and text.isdigit() and len(text) < 20):
        raise ValueError(f"{tracker} says {text!r}; it must name an iteration (a number) or say release")
    folder = path / ("release" if text == "release" else f"iter_{int(text):07d}")
    if not folder.is_dir():
        raise ValueError(f"{tracker} says {text}, but there is no {folder}")
    return folder


def find_grid(folder: Path) -> Grid:
    """All shards of an iteration. Raises ValueError listing those that are missing, or that no model has."""
    found = _places(folder)
    pp, tp, ep = (max(numbers) + 1 for numbers in zip(*found, strict=True))
    if pp * max(tp, ep) > _MOST_MISSING + len(found):
        raise ValueError(f"{folder} holds {len(found)} shards; by their names there are {tp} x {pp} x {ep} of them")
    pairs = _pairs({(place.rank, place.expert) for place in found}, tp, ep)
    wanted = [Place(stage, *pair) for stage in range(pp) for pair in sorted(pairs)]
    missing = [shard_name(place, pp, ep) for place in wanted if place not in found]
    if missing:
        shown = ", ".join(missing[:8]) + (", ..." if len(missing) > 8 else "")
        sizes = f"{tp} x {pp}" + (f" x {ep}" if ep > 1 else "")
        raise ValueError(f"{folder} lacks {len(missing)} of the {sizes} shards: {shown}")
    save_format = _save_format(found[wanted[0]])
    return Grid(folder, tp, pp, ep, save_format, {place: _file(folder, found[place], save_format) for place in wanted})


def _pairs(found: set[tuple[int, int]], tp: int, ep: int) -> set[tuple[int, int]]:
    """The tensor and expert ranks that there must be, of all ways in which writers pair them the one that was meant."""
    ways = [{(rank, expert) for rank in range(tp) for expert in range(ep)}]
    if tp % ep == 0:  # as many shards as tensor ranks: neighbours share experts, or have other ones
        ways += [{(rank, rank // (tp // ep)) for rank in range(tp)}, {(rank, rank % ep) for rank in range(tp)}]
    if ep % tp == 0:
        ways.append({(expert % tp, expert) for expert in range(ep)})
    return min((way for way in ways if found <= way), key=len)


def _places(folder: Path) -> dict[Place, Path]:
    """The directories of shards. Of two numbers the second is a stage's, or where all have both ends an expert rank."""
    named: dict[tuple[int, ...], Path] = {}
    for entry in sorted(folder.glob("mp_rank_*")):
        match = _RANK.fullmatch(entry.name)
        if match is None:
            raise ValueError(f"{entry} is not a name that Megatron gives to a shard (mp_rank_TT or mp_rank_TT_PPP)")
        named[tuple(int(number) for number in match.groups() if number is not None)] = entry
    if not named:
        raise ValueError(f"{folder} holds no shards (mp_rank_00, ...)")
    last = max(named, key=lambda numbers: numbers[1:])
    is_expert = len(last) == 2 and last[1] > 0 and _holds_embedding(folder, named[last])
    found: dict[Place, Path] = {}
    for numbers, entry in named.items():
        rank, *others = numbers
        stage, expert = [0, *others] if is_expert and len(others) == 1 else [*others, 0, 0][:2]
        place = Place(stage, rank, expert)
        if place in found:
            raise ValueError(f"{entry} and {found[place]} name the same shard")
        found[place] = entry
    return found


def _holds_embedding(folder: Path, directory: Path) -> bool:
    return EMBEDDING in open_shard(_file(folder, directory, _save_format(directory))).names


def _save_format(directory: Path) -> str:
    formats = [name for name, file in NAMES.items() if (directory / file).exists()]
    if len(formats) != 1:
        reason = "holds two formats" if formats else f"holds neither {' nor '.join(NAMES.values())}"
        raise ValueError(f"{directory} {reason}; a shard has exactly one of them")
    return formats[0]


def _file(folder: Path, directory: Path, save_format: str) -> Path:
    return regular_file(folder, f"{directory.name}/{NAMES[save_format]}")
