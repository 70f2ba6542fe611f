"""Conversions that are killed, stopped, starved of disk or doubled: all of a checkpoint is there, or nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mindgen.commands.convert import main
from mindgen.weights.open import open_source
from mindgen.weights.publish import Publication
from tests.weights.folders import config_of, write_folder

ROOT = Path(__file__).parents[2]
TRACKER = "latest_checkpointed_iteration.txt"


@pytest.fixture
def origin(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "origin", config_of(num_hidden_layers=1), num_files=1)


def experiments(origin: Path, **sizes: int) -> dict[str, str]:
    """Runs experiments of tests/weights/forked.py; what each counted, or how it failed."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    named = [f"{name}={size}" for name, size in sizes.items()]
    command = [sys.executable, "-m", "tests.weights.forked", str(origin), *named]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(json.loads(done.stdout))


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("origin")
    origin = write_folder(folder, config_of(num_hidden_layers=1), num_files=1)
    return experiments(origin, kill=1, kill_overwriting=1, kill_at_moments=12, stop=1, too_small=0, at_once=2)


@pytest.mark.parametrize(
    ("name", "at_least"),
    [
        pytest.param("kill", 20, id="killed before any of its calls, it leaves nothing that is loaded"),
        pytest.param("kill_overwriting", 20, id="killed while it replaces, the old or the new is there"),
        pytest.param("kill_at_moments", 5, id="killed at any moment, the next one works"),
        pytest.param("stop", 40, id="asked to end, it cleans up and says so"),
        pytest.param("too_small", 4, id="on a disk that takes no more, the old state stays"),
        pytest.param("at_once", 2, id="of several at once, one does it"),
    ],
)
def test_a_conversion(results: dict[str, str], name: str, at_least: int) -> None:
    assert results[name].isdigit() and int(results[name]) >= at_least, results[name]


@pytest.mark.full
@pytest.mark.timeout(1200)
def test_killed_two_hundred_times(origin: Path) -> None:
    counts = experiments(origin, kill_at_moments=200)
    assert all(count.isdigit() for count in counts.values()), counts


def convert(origin: Path, target: Path, *flags: str) -> int:
    usual = ["--load-model-type", "hf", "--save-model-type", "mg", "--load-dir", str(origin), "--save-dir", str(target)]
    return main([*usual, *flags])


def test_a_full_disk_is_a_clear_error(origin: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting a small disk needs privileges")
    try:
        assert convert(origin, disk / "mg") == 2
        message = capsys.readouterr().err
        assert "No space left on device (nothing was changed; make room" in message and "model_optim_rng.pt" in message
        assert not any(disk.iterdir())
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        assert convert(origin, disk / "mg") == 2
        assert "Read-only file system" in capsys.readouterr().err
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_save_dir_that_is_a_file_is_a_clear_error(
    origin: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    assert convert(origin, tmp_path / "file") == 2
    assert convert(origin, tmp_path / "file" / "below") == 2
    assert capsys.readouterr().err.count(str(tmp_path / "file")) == 2
    assert (tmp_path / "file").read_text() == "mine"


def test_an_existing_target_is_replaced_only_when_asked(
    origin: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "mg"
    assert convert(origin, target) == 0
    before = open_source(target).manifest.conversion  # type: ignore[attr-defined]
    assert convert(origin, target) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert open_source(target).manifest.conversion == before  # type: ignore[attr-defined]
    assert convert(origin, target, "--overwrite", "--target-tensor-parallel-size", "2") == 0
    source = open_source(target)
    source.check()
    assert source.manifest.conversion != before and source.grid.tp == 2  # type: ignore[attr-defined]
    assert sorted(path.name for path in target.iterdir()) == ["iter_0000001", TRACKER]


def test_another_iteration_in_the_target_is_never_touched(origin: Path, tmp_path: Path) -> None:
    target = tmp_path / "mg"
    (target / "iter_0005000").mkdir(parents=True)
    (target / TRACKER).write_text("5000")
    assert convert(origin, target) == 2
    assert convert(origin, target, "--overwrite") == 2
    assert sorted(path.name for path in target.iterdir()) == ["iter_0005000", TRACKER]


def test_files_beside_the_target_are_left_alone(origin: Path, tmp_path: Path) -> None:
    target = tmp_path / "mg"
    target.mkdir()
    mine = [
        target / name for name in ("notes.txt", "iter_0000001.old-backup", "iter_0000001.tmp-1", f"{TRACKER}.tmp-x")
    ]
    for path in mine:
        path.write_text("mine")
    assert convert(origin, target) == 0
    assert all(path.read_text() == "mine" for path in mine)


def test_a_target_that_someone_else_made_is_not_taken_for_a_leftover(origin: Path, tmp_path: Path) -> None:
    """Without a tracker, and with a lock that a dead conversion left."""
    target = tmp_path / "mg"
    (target / "iter_0000001").mkdir(parents=True)
    (target / "iter_0000001" / "mine").write_text("mine")
    (target / ".iter_0000001.lock").write_text("0123")
    assert convert(origin, target) == 2
    assert (target / "iter_0000001" / "mine").read_text() == "mine"


def test_a_second_conversion_is_refused_while_the_first_is_at_work(
    origin: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "mg"
    with Publication(target, "iter_0000001", "1") as publication:
        (publication.path / "file").write_text("half")
        assert convert(origin, target, "--overwrite") == 2
        assert "another conversion holds" in capsys.readouterr().err
        assert (publication.path / "file").read_text() == "half"
    assert not target.exists()
    assert convert(origin, target) == 0


def test_a_source_that_changes_under_way_is_noticed(
    origin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import mindgen.weights.convert as module

    def touching(*arguments: object) -> dict[str, object]:
        os.utime(next(origin.glob("*.safetensors")), (1, 1))
        return {}

    monkeypatch.setattr(module, "write_texts", touching)
    assert convert(origin, tmp_path / "mg") == 2
    assert "was changed while it was read" in capsys.readouterr().err
    assert not (tmp_path / "mg").exists()
