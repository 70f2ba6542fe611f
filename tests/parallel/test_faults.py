"""Ranks that die, hang or are told to end: all of them end, one message says why, and nobody is left behind.

Times are bounded generously, for a machine that does other things; constants in `watchdog` say what is typical.
"""

from __future__ import annotations

import signal
import time

import pytest

from mindgen.parallel.place import COLLECTIVES
from tests.parallel.runs import Run

TORCHRUN = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone")
SOON = 40.0  # seconds; alone on a machine these take less than 8


@pytest.fixture
def start():
    """Starts runs, and ends what is left of them."""
    runs: list[Run] = []

    def start(act: str, size: int, launcher: tuple[str, ...] = (), **variables: str) -> Run:
        runs.append(Run(act, size, launcher, **variables))
        return runs[-1]

    yield start
    for run in runs:
        run.end()


every_kind = pytest.mark.parametrize("kind", ["auto", "gloo"])


@every_kind
def test_a_started_rank_that_is_killed_is_named_and_all_others_end(start, kind):
    run = start("work", 3, **{COLLECTIVES: kind})
    run.wait_until_working()[2].kill()
    run.wait_for_end(SOON)
    assert (run.code, run.messages) == (1, ["mindgen: rank 2 died (killed by signal 9)"])
    assert "Traceback" not in run.errors


def test_a_killed_rank_0_is_named_by_one_of_the_others(start):
    run = start("idle", 2)
    run.wait_until_working()[0].kill()
    run.wait_for_end(SOON)
    assert (run.code, run.messages) == (-signal.SIGKILL, ["mindgen: rank 0 died"])
    assert "Traceback" not in run.errors


@pytest.mark.parametrize("kind", ["auto", pytest.param("gloo", marks=pytest.mark.full)])
def test_hung_ranks_are_named_and_pauses_forgiven(start, tmp_path, kind):
    """Three runs at once, since each mostly waits."""
    stop_file = tmp_path / "stop"
    hung, headless = start("work", 2, **{COLLECTIVES: kind}), start("idle", 2, **{COLLECTIVES: kind})
    paused = start("work", 2, STOP_FILE=str(stop_file), **{COLLECTIVES: kind})
    hung.wait_until_working()[1].suspend()
    headless.wait_until_working()[0].suspend()
    pause(paused, ranks=[1], seconds=1.0)
    pause(paused, ranks=[0, 1], seconds=7.0)
    assert len(paused.survivors()) == 2
    stop_file.touch()

    for run in (hung, headless, paused):
        run.wait_for_end(SOON)
        assert "Traceback" not in run.errors
    assert (hung.code, hung.messages) == (1, ["mindgen: rank 1 stopped answering"])
    assert (headless.code, headless.messages) == (-signal.SIGKILL, ["mindgen: rank 0 stopped answering"])
    assert (paused.code, paused.messages) == (0, [])


def pause(run: Run, ranks: list[int], seconds: float) -> None:
    """As Ctrl-Z and fg do, or a laptop that sleeps."""
    processes = run.wait_until_working()
    for rank in ranks:
        processes[rank].suspend()
    time.sleep(seconds)
    for rank in ranks:
        processes[rank].resume()


@every_kind
def test_ctrl_c_ends_all_ranks_quietly_with_130(start, kind):
    run = start("work", 2, **{COLLECTIVES: kind})
    run.wait_until_working()
    run.interrupt()
    run.wait_for_end(SOON)
    assert run.code == 130
    assert "Traceback" not in run.errors and run.messages == []


def test_ranks_that_cannot_share_memory_say_why_and_work_over_gloo(start, tmp_path):
    run = start("confined", 2, STOP_FILE=str(tmp_path / "stop"))
    run.wait_until_working()
    (tmp_path / "stop").touch()
    run.wait_for_end(SOON)
    reason = "[Errno 27] File too large"
    assert run.messages == [f"mindgen: ranks of this host talk over gloo, which is slow here: {reason}"]
    assert run.code == 0


@pytest.mark.full
def test_an_error_on_one_rank_is_told_once_by_rank_0_with_exit_code_2(start):
    run = start("disagree", 2)
    run.wait_for_end()
    assert (run.code, run.messages) == (2, ["mindgen: rank 1: shard 1 is torn"])


def test_a_rank_that_fails_alone_is_named_with_its_reason(start):
    run = start("fail_on_one", 2)
    run.wait_for_end()
    assert (run.code, run.messages) == (1, ["mindgen: rank 1 failed: OSError: the disk is on fire"])


class TestBeforeTheRanksAreConnected:
    def test_the_exit_code_of_rank_0_is_the_programs(self, start):
        run = start("exit_with_three", 3)
        run.wait_for_end(SOON)
        assert (run.code, run.messages) == (3, [])

    def test_a_rank_that_ends_early_is_named_with_its_code(self, start):
        run = start("exit_with_rank", 2)
        run.wait_for_end(SOON)
        assert (run.code, run.messages) == (1, ["mindgen: rank 1 ended with exit code 1"])

    @pytest.mark.parametrize(
        ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)]
    )
    def test_a_signal_to_rank_0_ends_all(self, start, number, code):
        run = start("sleep", 3)
        run.wait_until_working()[0].send_signal(number)
        run.wait_for_end(SOON)
        assert run.code == code
        assert run.messages == (["mindgen: rank 0 died"] if code < 0 else [])

    def test_a_killed_rank_ends_all(self, start):
        run = start("sleep", 3)
        run.wait_until_working()[1].kill()
        run.wait_for_end(SOON)
        assert (run.code, run.messages) == (1, ["mindgen: rank 1 died (killed by signal 9)"])


class TestUnderTorchrun:
    def test_a_hung_rank_is_named_and_all_end(self, start):
        run = start("work", 2, TORCHRUN)
        run.wait_until_working()[1].suspend()
        run.wait_for_end(SOON)
        assert (run.code, run.messages) == (1, ["mindgen: rank 1 stopped answering"])

    def test_ctrl_c_ends_all_ranks_without_a_word_from_them(self, start):
        run = start("idle", 2, TORCHRUN)
        run.wait_until_working()
        run.interrupt()
        run.wait_for_end(SOON)
        assert run.messages == [] and "rank_program.py" not in run.errors

    @pytest.mark.full
    def test_a_killed_rank_ends_all(self, start):
        run = start("work", 2, TORCHRUN)
        run.wait_until_working()[0].kill()
        run.wait_for_end(SOON)
        assert run.code == 1 and "exitcode  : -9" in run.errors
        assert 'rank_program.py", line' not in run.errors

    @pytest.mark.full
    def test_ranks_do_not_outlive_torchrun(self, start):
        run = start("idle", 2, TORCHRUN)
        run.wait_until_working()
        run.process.kill()
        run.wait_for_end(SOON)
        assert len(run.messages) == 1 and run.messages[0].startswith("mindgen: the launcher is gone")
