"""How a conversion gets onto the disk: all of it at once, or not at all.

Everything is written into a temporary folder beside the target; the target appears by one rename, and the tracker,
which readers look for, comes last. Whatever a killed conversion leaves behind is removed by the next one.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import secrets
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mindgen.weights.files import sync_directory
from mindgen.weights.manifest import MANIFEST
from mindgen.weights.megatron_directory import TRACKER


class Publication:
    """One conversion's hold on `folder / name`, which must not exist unless `overwrite`.

    Used as a context manager: inside it `path` is the temporary folder to write into, and `publish` puts it in its
    place. Left without that, nothing remains. `tracker` is the text of Megatron's tracker file, None for none.
    Raises ValueError if the target exists or another conversion holds it; OSError names the file.
    """

    def __init__(self, folder: Path, name: str, tracker: str | None = None, overwrite: bool = False):
        self.conversion = secrets.token_hex(8)
        self.folder = folder
        self.target = folder / name
        self._suffix = f"{os.getpid()}-{self.conversion}"
        self.path = folder / f"{name}.tmp-{self._suffix}"
        self._aside = folder / f"{name}.old-{self._suffix}"
        self._tracker = tracker
        self._overwrite = overwrite
        self._lock = Lock(folder / f".{name}.lock")
        self._made_folder = False

    def __enter__(self) -> Publication:
        try:
            with _undisturbed():
                self._begin()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            with _undisturbed():
                self._leave()
        except BaseException:  # a signal came just before: what is left is still left behind
            with _undisturbed():
                self._leave()
            raise

    def publish(self) -> None:
        """Puts what was written, and made durable file by file, in its place."""
        with _undisturbed():
            self._publish()

    def _begin(self) -> None:
        self._made_folder = not self.folder.exists()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock.acquire()
        self._tidy(self._lock.holder)
        self._refuse_existing()
        self._lock.hold(self.conversion)
        self.path.mkdir()

    def _publish(self) -> None:
        for directory, _, _ in os.walk(self.path, topdown=False):
            sync_directory(Path(directory))
        if self.target.exists():
            self.target.rename(self._aside)
        self.path.rename(self.target)
        sync_directory(self.folder)
        if self._tracker is not None:
            self._write_tracker(self._tracker)

    def _write_tracker(self, text: str) -> None:
        temporary = self.folder / f"{TRACKER}.tmp-{self._suffix}"
        with temporary.open("x", encoding="ascii") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.folder / TRACKER)
        sync_directory(self.folder)

    def _refuse_existing(self) -> None:
        tracker = self.folder / TRACKER
        if self._tracker is not None and tracker.exists():
            current = tracker.read_text(encoding="utf-8", errors="replace")[:100].strip()
            if current != self._tracker:
                raise ValueError(
                    f"{self.folder} holds a checkpoint of another iteration ({TRACKER} says {current!r}), which "
                    "mindgen does not touch; choose another --save-dir"
                )
        if self.target.exists() and not self._overwrite:
            raise ValueError(f"{self.target} exists; choose another --save-dir, or replace it with --overwrite")
        if self.target.exists() and not self.target.is_dir():
            raise ValueError(f"{self.target} is not a folder; choose another --save-dir")

    def _leave(self) -> None:
        if self._lock.held:
            self._tidy(self.conversion)
            self._lock.release()
        if self._made_folder:
            with suppress(OSError):  # it holds what was published, or someone else's files
                self.folder.rmdir()

    def _tidy(self, holder: str | None) -> None:
        """Removes what a conversion left, and puts back what it had moved aside. `holder` is that conversion."""
        unfinished = self._tracker is not None and not (self.folder / TRACKER).exists()
        if unfinished and holder and _conversion(self.target) == holder:
            self._remove(self.target)
        for aside in self._leftovers("old"):
            if self.target.exists():
                self._remove(aside)
            else:
                aside.rename(self.target)
        for left in self._leftovers("tmp"):
            self._remove(left)

    def _leftovers(self, kind: str) -> list[Path]:
        """What conversions named, and nobody else would."""
        names = re.compile(rf"({re.escape(self.target.name)}|{re.escape(TRACKER)})\.{kind}-\d+-[0-9a-f]{{16}}")
        return [path for path in self.folder.iterdir() if names.fullmatch(path.name)]

    def _remove(self, path: Path) -> None:
        """Removes a file or folder; one that is removed by half is never taken for a whole one."""
        doomed = path
        if ".tmp-" not in path.name:
            doomed = self.folder / f"{self.target.name}.tmp-{os.getpid()}-{secrets.token_hex(8)}"
            path.rename(doomed)
        if doomed.is_dir() and not doomed.is_symlink():
            shutil.rmtree(doomed)
        else:
            doomed.unlink()


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Ctrl-C and a request to end wait until the block is done: it is short, and half of it would leave a mess."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals interrupt the main thread only
        return
    arrived: list[int] = []
    before = {
        number: signal.signal(number, lambda number, _: arrived.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for waiting, handler in before.items():
            signal.signal(waiting, handler)
        for number in arrived:
            signal.raise_signal(number)


def _conversion(target: Path) -> str | None:
    """Which conversion wrote a target, if any did."""
    try:
        found = json.loads((target / MANIFEST).read_bytes())["content"]["conversion"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, str) else None


class Lock:
    """A file that one process holds at a time, and that says which conversion it is.

    The system lets go of it when the process ends, however that happens; the file then still names the conversion.
    """

    def __init__(self, path: Path):
        self.path = path
        self.holder: str | None = None
        self._descriptor: int | None = None

    @property
    def held(self) -> bool:
        """Whether this process holds it."""
        return self._descriptor is not None

    def acquire(self) -> None:
        """Takes the lock; `holder` is then the conversion that died with it, if one did. ValueError if it is held."""
        while self._descriptor is None:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                raise ValueError(
                    f"another conversion holds {self.path} right now; wait for it, or choose another --save-dir"
                ) from None
            if self._is_current(descriptor):
                self._descriptor = descriptor
            else:
                os.close(descriptor)  # its holder removed it between our open and our lock
        self.holder = os.pread(self._descriptor, 100, 0).decode("ascii", "replace") or None

    def hold(self, conversion: str) -> None:
        """Writes down who holds it."""
        assert self._descriptor is not None
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, conversion.encode(), 0)
        os.fsync(self._descriptor)

    def release(self) -> None:
        """Lets go of the lock and removes its file."""
        assert self._descriptor is not None
        self.path.unlink(missing_ok=True)
        os.close(self._descriptor)
        self._descriptor = None

    def _is_current(self, descriptor: int) -> bool:
        try:
            there, ours = self.path.stat(), os.fstat(descriptor)
        except FileNotFoundError:
            return False
        return (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino)
