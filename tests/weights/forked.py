"""Conversions in forked processes, which can be killed, starved or stopped at any of their system calls.

Run as a program with an origin and the names and sizes of experiments (kill=1): everything is imported once, and every
conversion is a fork of that. Prints what each counted, or how it failed, as JSON.
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from mindgen.commands.convert import main
from mindgen.weights.manifest import read_manifest
from mindgen.weights.open import open_source
from mindgen.weights.verify import verify

# The calls that make, name, remove and make durable; a process is stopped just before one of them.
CALLS = {"mkdir", "pwrite", "fsync", "rename", "replace", "unlink", "rmdir", "flock", "ftruncate"}
TARGET = "iter_0000001"
TRACKER = "latest_checkpointed_iteration.txt"


def conversion(origin: Path, target: Path, *flags: str) -> int:
    usual = ["--load-model-type", "hf", "--save-model-type", "mg", "--load-dir", str(origin), "--save-dir", str(target)]
    return main([*usual, "--target-tensor-parallel-size", "2", *flags])


def started(origin: Path, target: Path, *flags: str) -> int:
    """Starts a conversion in a process of its own; gives its id."""
    return forked(lambda: conversion(origin, target, *flags))


def forked(work: Callable[[], int]) -> int:
    """Starts `work` in a process of its own, whose exit code is what it returns; gives its id."""
    child = os.fork()
    if child:
        return child
    code = 99
    try:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
        sys.stdout = sys.stderr
        code = work()
    finally:
        os._exit(code)


def ended(child: int) -> int:
    """Waits for a process; its exit code, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def interrupted(number: int, sent: int, origin: Path, target: Path, *flags: str) -> int:
    """Starts a conversion that gets the signal `sent` just before its call `number` of CALLS."""

    def run() -> int:
        count = 0

        def watch(frame: object, event: str, called: object) -> None:
            nonlocal count
            system = getattr(called, "__module__", "") in ("posix", "fcntl")
            if event == "c_call" and system and getattr(called, "__name__", "") in CALLS:
                count += 1
                if count == number:
                    os.kill(os.getpid(), sent)

        sys.setprofile(watch)
        try:
            return conversion(origin, target, *flags)
        finally:
            sys.setprofile(None)

    return forked(run)


def conversion_of(target: Path) -> str | None:
    """Which conversion a reader finds: None if it is refused. Fails if it finds damage."""
    try:
        source = open_source(target)
    except ValueError as error:
        assert any(word in str(error) for word in ("never finished", "no weights", "does not exist", "there is no"))
        return None
    source.check()
    folder = target / TARGET
    manifest = read_manifest(folder)
    assert manifest is not None
    verify(folder, manifest)
    return manifest.conversion


def assert_tidy(target: Path) -> None:
    assert sorted(path.name for path in target.iterdir()) == [TARGET, TRACKER], list(target.iterdir())


def assert_recovers(origin: Path, target: Path, old: str | None) -> None:
    """After a process was killed: what a reader finds is nothing, what was there before, or all that is new; and the
    next conversion works, and leaves nothing of the dead one. `old` is what was there."""
    found = conversion_of(target)
    assert found is not None or old is not None or not (target / TRACKER).exists(), "the tracker came too early"
    if found is not None or old is not None:
        assert ended(started(origin, target)) == 2, "without --overwrite it is refused"
        restored = conversion_of(target)
        assert restored is not None and restored in (found or old, old)
    assert ended(started(origin, target, *(["--overwrite"] if found or old else []))) == 0
    assert conversion_of(target) not in (None, found, old)
    assert_tidy(target)


def kill_at_calls(origin: Path, scratch: Path, overwrite: bool, step: int) -> int:
    """Kills a conversion before each (or every `step`th) of its calls. The number of kills."""
    flags = ["--overwrite"] if overwrite else []
    for number in range(1, 10_000, step):
        target = scratch / f"{overwrite}{number}"
        old = None
        if overwrite:
            assert ended(started(origin, target)) == 0
            old = conversion_of(target)
        code = ended(interrupted(number, signal.SIGKILL, origin, target, *flags))
        if code == 0:
            return number // step
        assert code == -signal.SIGKILL, code
        assert_recovers(origin, target, old)
    raise AssertionError("it never ended")


def kill_at_moments(origin: Path, scratch: Path, times: int) -> int:
    """Kills conversions at random moments. How many of them were killed before they were done."""
    start = time.monotonic()
    assert ended(started(origin, scratch / "whole")) == 0
    duration, kills = time.monotonic() - start, 0
    chance = random.Random(1)
    for number in range(times):
        target = scratch / f"moment{number}"
        child = started(origin, target)
        time.sleep(chance.uniform(0, duration))
        os.kill(child, signal.SIGKILL)
        kills += ended(child) == -signal.SIGKILL
        assert_recovers(origin, target, None)
    return kills


def stop_at_calls(origin: Path, scratch: Path, step: int) -> int:
    """Asks a conversion to end before every `step`th of its calls: it does so cleanly, and nothing is left."""
    stops = 0
    for number in range(1, 10_000, step):
        for asked in (signal.SIGTERM, signal.SIGINT):
            target = scratch / f"stop{number}-{asked}"
            code = ended(interrupted(number, asked, origin, target))
            if code == 0:
                return stops
            assert code == 128 + asked, code
            if conversion_of(target) is None:
                assert not target.exists(), list(target.rglob("*"))
            else:
                assert_tidy(target)
            stops += 1
    raise AssertionError("it never ended")


def too_small(origin: Path, scratch: Path) -> int:
    """Files may not grow beyond a limit: the conversion fails with 2, and nothing is left; an old target stays."""
    assert ended(started(origin, scratch / "old")) == 0
    old = conversion_of(scratch / "old")
    for number, limit in enumerate((0, 100, 5_000, 9_000)):

        def starved(limit: int = limit, number: int = number) -> int:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            save_format = "torch" if number % 2 else "safetensors"
            fresh = conversion(origin, scratch / "new", "--save-format", save_format)
            return fresh if fresh != 2 else conversion(origin, scratch / "old", "--overwrite")

        assert ended(forked(starved)) == 2
        assert not (scratch / "new").exists()
        assert conversion_of(scratch / "old") == old
        assert_tidy(scratch / "old")
    return 4


def at_once(origin: Path, scratch: Path, rounds: int) -> int:
    """Several converters on one target: one does it, the others are refused."""
    for number in range(rounds):
        target = scratch / f"race{number}"
        children = [started(origin, target) for _ in range(4)]
        codes = sorted(ended(child) for child in children)
        assert codes == [0, 2, 2, 2], codes
        assert conversion_of(target) is not None
        assert_tidy(target)
    return rounds


EXPERIMENTS = {
    "kill": lambda origin, scratch, size: kill_at_calls(origin, scratch, False, size),
    "kill_overwriting": lambda origin, scratch, size: kill_at_calls(origin, scratch, True, size),
    "kill_at_moments": kill_at_moments,
    "stop": stop_at_calls,
    "too_small": lambda origin, scratch, size: too_small(origin, scratch),
    "at_once": at_once,
}


def run(name: str, origin: Path, size: int) -> str:
    """What an experiment counted, or how it failed."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # where making durable takes no time
    with tempfile.TemporaryDirectory(dir=memory) as scratch:
        try:
            return str(EXPERIMENTS[name](origin, Path(scratch), size))
        except AssertionError:
            return traceback.format_exc()


if __name__ == "__main__":
    wanted = dict(argument.split("=") for argument in sys.argv[2:])
    print(json.dumps({name: run(name, Path(sys.argv[1]), int(size)) for name, size in wanted.items()}))
