"""Where the shards of a Megatron checkpoint lie, and which of them there must be."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from mindgen.weights.files import open_regular, regular_file

TRACKER = "latest_checkpointed_iteration.txt"
NAMES = {"torch": "model_optim_rng.pt", "safetensors": "model.safetensors"}
_RANK = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?(?:_(\d{3,}))?")


@dataclass(frozen=True)
class Grid:
    """The shards of one iteration: `files[stage][rank]`. `save_format` is a key of NAMES."""

    folder: Path
    tp: int
    pp: int
    save_format: str
    files: tuple[tuple[Path, ...], ...]


def is_megatron(path: Path) -> bool:
    """Whether a folder looks like a Megatron checkpoint, complete or not, or like one of its iterations."""
    names = [entry.name for entry in path.iterdir()] if path.is_dir() else []
    return TRACKER in names or any(name == "release" or name.startswith(("iter_", "mp_rank_")) for name in names)


def shard_name(stage: int, rank: int, pp: int) -> str:
    """The directory of one shard."""
    return f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if pp > 1 else "")


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
    """All shards of an iteration. Raises ValueError listing those that are missing, or that no dense model has."""
    found: dict[tuple[int, int], Path] = {}
    for entry in sorted(folder.glob("mp_rank_*")):
        match = _RANK.fullmatch(entry.name)
        if match is None:
            raise ValueError(f"{entry} is not a name that Megatron gives to a shard (mp_rank_TT or mp_rank_TT_PPP)")
        rank, stage, expert = match.groups()
        if expert is not None:
            raise ValueError(f"{entry} is of a model with experts (mp_rank_TT_PPP_EEE), which mindgen does not read")
        if (int(stage or 0), int(rank)) in found:
            raise ValueError(f"{entry} and {found[int(stage or 0), int(rank)]} name the same shard")
        found[int(stage or 0), int(rank)] = entry
    if not found:
        raise ValueError(f"{folder} holds no shards (mp_rank_00, ...)")
    pp, tp = max(stage for stage, _ in found) + 1, max(rank for _, rank in found) + 1
    missing = [shard_name(stage, rank, pp) for stage in range(pp) for rank in range(tp) if (stage, rank) not in found]
    if missing:
        shown = ", ".join(missing[:8]) + (", ..." if len(missing) > 8 else "")
        raise ValueError(f"{folder} lacks {len(missing)} of the {tp} x {pp} shards: {shown}")
    save_format = _save_format(found[0, 0])
    files = tuple(tuple(_file(folder, found[stage, rank], save_format) for rank in range(tp)) for stage in range(pp))
    return Grid(folder, tp, pp, save_format, files)


def _save_format(directory: Path) -> str:
    formats = [name for name, file in NAMES.items() if (directory / file).exists()]
    if len(formats) != 1:
        reason = "holds two formats" if formats else f"holds neither {' nor '.join(NAMES.values())}"
        raise ValueError(f"{directory} {reason}; a shard has exactly one of them")
    return formats[0]


def _file(folder: Path, directory: Path, save_format: str) -> Path:
    return regular_file(folder, f"{directory.name}/{NAMES[save_format]}")
