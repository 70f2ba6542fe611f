import os
import subprocess
import sys

import pytest

from mindgen.parallel.process import Process


@pytest.fixture
def sleeper():
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as process:
        yield process
        process.kill()


def test_a_process_survives_being_written_down(sleeper):
    process = Process.at(sleeper.pid)
    assert Process.parse(str(process)) == process
    assert process != Process.mine()


def test_the_process_that_was_meant_is_killed(sleeper):
    Process.at(sleeper.pid).kill()
    assert sleeper.wait(20) == -9


@pytest.mark.parametrize("change", [{"boot": "another-host"}, {"start": "1"}, {"start": ""}])
def test_another_process_with_the_same_number_is_left_alone(sleeper, change):
    meant = Process.at(sleeper.pid)
    Process(**{"boot": meant.boot, "pid": meant.pid, "start": meant.start, **change}).kill()
    with pytest.raises(subprocess.TimeoutExpired):
        sleeper.wait(0.2)


def test_a_process_that_is_gone_is_nothing_to_kill(sleeper):
    process = Process.at(sleeper.pid)
    sleeper.kill()
    sleeper.wait()
    process.kill()


def test_a_process_that_has_ended_is_not_alive_even_before_its_parent_asks(sleeper):
    process = Process.at(sleeper.pid)
    assert process.is_alive
    sleeper.kill()
    os.waitid(os.P_PID, sleeper.pid, os.WEXITED | os.WNOWAIT)
    assert not process.is_alive
    sleeper.wait()
    assert not process.is_alive


def test_a_later_process_with_the_same_number_is_not_the_one_that_lived():
    assert Process.mine().is_alive
    assert not Process(Process.mine().boot, os.getpid(), "1").is_alive
