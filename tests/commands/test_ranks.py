"""`mindgen generate` over several ranks: started by itself, by torchrun, interrupted, and with a rank that dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from mindgen.__main__ import main

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "examples" / "demo" / "model"
ANSWER = "I am fine, thank you! How can I help you today?\n"
MINDGEN = [sys.executable, "-m", "mindgen", "generate", "--device", "cpu"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0"]
TORCHRUN += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0", "-m", "mindgen", "generate", "--device", "cpu"]
TWO = ("--tensor-model-parallel-size", "2")
LONG = ("--load", str(DEMO), "--prompt", "def f():", "--ignore-eos", "--max-new-tokens", "2000", "--stream")


def run(command: list[str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=150)


@contextmanager
def started(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], list[psutil.Process]]]:
    """A generation on two ranks that has begun to print, and its processes. Nothing of it is left afterwards."""
    process = subprocess.Popen(
        [*MINDGEN, *LONG, *TWO, *arguments], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    children: list[psutil.Process] = []
    try:
        assert process.stdout is not None
        assert process.stdout.read(1)
        children = psutil.Process(process.pid).children(recursive=True)
        yield process, children
        _, alive = psutil.wait_procs(children, timeout=10)
        assert not alive, "a rank outlived the others"
    finally:
        for left in [*children, process]:
            with suppress(psutil.NoSuchProcess):
                left.kill()


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model as Megatron shards of TP 2."""
    folder = tmp_path_factory.mktemp("sharded") / "tp2"
    arguments = [
        "--load-model-type",
        "hf",
        "--save-model-type",
        "mg",
        "--load-dir",
        str(DEMO),
        "--save-dir",
        str(folder),
    ]
    command = [sys.executable, str(ROOT / "tools" / "checkpoint" / "convert_ckpt.py"), *arguments]
    subprocess.run([*command, "--target-tensor-parallel-size", "2"], check=True, capture_output=True, timeout=120)
    return folder


@pytest.mark.parametrize("sizes", [TWO, ("--pipeline-model-parallel-size", "2", "--num-layer-list", "3,5")])
def test_ranks_start_by_themselves_and_read_any_layout(sharded: Path, sizes: tuple[str, ...]) -> None:
    done = run(MINDGEN, "--load", str(sharded), "--hf-chat-template", "--stream", *sizes)
    assert (done.returncode, done.stdout) == (0, ANSWER)


def test_under_torchrun_all_ranks_share_the_layers(sharded: Path) -> None:
    done = run(TORCHRUN, "--load", str(sharded), "--hf-chat-template")
    assert (done.returncode, done.stdout) == (0, ANSWER)


def test_under_torchrun_bad_input_is_one_message() -> None:
    done = run(TORCHRUN, "--load", str(DEMO), "--prompt-ids", "1,99999")
    assert done.returncode and not done.stdout
    assert done.stderr.count("token id 99999") == 1
    assert "exitcode  : 2" in done.stderr  # torchrun's own report of a worker
    assert 'File "' not in done.stderr.split("mindgen: ")[0]


def test_a_size_that_torchrun_did_not_start_is_refused() -> None:
    done = run(TORCHRUN, "--load", str(DEMO), "--tensor-model-parallel-size", "4")
    assert done.returncode
    assert "4 ranks" in done.stderr and "--nproc_per_node" in done.stderr


def test_one_bad_shard_is_one_message(tmp_path: Path) -> None:
    from tests.commands.damage import without_tensor

    folder = without_tensor(DEMO, tmp_path / "damaged", "model.layers.5.mlp.up_proj.weight")
    done = run(MINDGEN, "--load", str(folder), *TWO)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.count("model.layers.5.mlp.up_proj.weight") == 1 and "Traceback" not in done.stderr


def test_a_killed_rank_ends_all_within_ten_seconds_and_is_named() -> None:
    with started() as (process, children):
        start = time.monotonic()
        children[0].kill()
        _, err = process.communicate(timeout=30)
        assert process.returncode == 1
        assert "mindgen: rank 1 died (killed by signal 9)" in err
        assert time.monotonic() - start < 10
        assert "Traceback" not in err


def test_killing_rank_0_leaves_no_orphan() -> None:
    with started() as (process, _):
        process.kill()
        process.communicate(timeout=30)


def test_ctrl_c_ends_all_ranks() -> None:
    with started() as (process, _):
        os.kill(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=30)
        assert process.returncode == 130
        assert "Traceback" not in err


def test_ctrl_c_stops_an_answer_and_keeps_the_conversation() -> None:
    chat = [*MINDGEN, "--load", str(DEMO), "--task", "chat", "--temperature", "0", "--ignore-eos", *TWO]
    chat += ["--max-new-tokens", "1500"]
    pipe = subprocess.PIPE
    process = subprocess.Popen(chat, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
    try:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write("how are you?\n")
        process.stdin.flush()
        process.stdout.read(5)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate("quit\n", timeout=60)
        assert process.returncode == 0
        assert err.count("You >> ") == 2 and "Traceback" not in err
    finally:
        process.kill()


def test_help_needs_no_torch() -> None:
    code = "import sys; from mindgen.__main__ import main; main(['--help']); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.parametrize("arguments", [["--help"], ["bench", "--help"]])
def test_a_reader_of_help_may_leave_early(arguments: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "mindgen", *arguments]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    os.close(writer)
    assert done.stderr == ""


def test_an_unknown_command_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generat"]) == 2
    assert "generate" in capsys.readouterr().err


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-"])
def test_a_closed_stream_is_no_reason_to_fail(closed: str) -> None:
    command = f"{sys.executable} -m mindgen generate --device cpu --load {DEMO} --hf-chat-template {closed}"
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and "Traceback" not in done.stderr


def test_ctrl_c_while_torch_is_being_imported_ends_quietly() -> None:
    process = subprocess.Popen([*MINDGEN, *LONG], cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    wait_until(lambda: "libtorch" in Path(f"/proc/{process.pid}/maps").read_text())
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
