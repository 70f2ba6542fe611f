"""Programs that use `LLM`: from standard input, without a `__main__` guard, ended in every way, and under torchrun."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
TORCHRUN = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone")
START = f"""
import json, os, sys
sys.path.insert(0, {str(ROOT)!r})
from mindgen import LLM, SamplingParams
DEMO = {str(ROOT / "examples" / "demo" / "model")!r}
LONG = SamplingParams(temperature=0, max_new_tokens=1800, ignore_eos=True)
SMALL = {{"device": "cpu", "kv_cache_memory": 0.05}}
"""
TWO = START + "llm = LLM(DEMO, tensor_parallel_size=2, **SMALL)\n"
LEAVES = TWO + 'for piece in llm.stream("def f", LONG):\n    print(os.getpid(), flush=True)\n    break\n'
STAYS = TWO + 'for piece in llm.stream("def f", LONG):\n    print(os.getpid(), flush=True)\n'
UNDER_TORCHRUN = (
    START
    + """
import asyncio
def show(*results):
    return [[(s.text, s.token_ids, repr(s.logprobs)) for s in result.samples] for result in results]
with LLM(DEMO, **SMALL) as llm:
    told = [llm.config.tensor_parallel_size]
    told += show(*llm.generate(["def f", "how", [1, 5, 7]], SamplingParams(max_new_tokens=9, n=2, logprobs=2)))
    pieces = []
    for piece in llm.stream("def f", LONG):
        pieces.append(piece.text)
        if len(pieces) == 5:
            break
    told.append(pieces)
    for wrong in ({"prompts": ["x", [99999]]}, {"prompts": "x", "params": SamplingParams(logit_bias={99999: 1.0})}):
        try:
            llm.generate(**wrong)
        except ValueError as error:
            told.append(str(error))
    llm.generate("x", SamplingParams(max_new_tokens=1))
    # Nothing is kept of what was refused; what this rank has not asked yet may be there already.
    told.append(sum(number < llm._host.desk._next for number in list(llm._host._digests)))
    async def ask():
        asked = [llm.agenerate("def f", SamplingParams(max_new_tokens=4)) for _ in range(4)]
        return await asyncio.gather(*asked)
    told += show(*asyncio.run(ask()))
rank = int(os.environ["RANK"])
with LLM(DEMO, pipeline_parallel_size=2, **SMALL) as llm:
    told += show(llm.generate("def f", SamplingParams(max_new_tokens=4)))
    try:
        llm.generate(["rank 0 decides", "nobody else"][rank])
        missed = rank == 0
    except RuntimeError as error:
        missed = "ask different things" in str(error)
with open(f"{sys.argv[1]}/{rank}", "w") as file:
    json.dump([told, missed], file)
"""
)


def environment() -> dict[str, str]:
    environ = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "PYTHONPATH")}
    return environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@contextmanager
def started(script: str, folder: Path) -> Iterator[tuple[subprocess.Popen[str], list[psutil.Process]]]:
    """A program whose model has begun to answer, and the ranks it started. None of them is left afterwards."""
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        [sys.executable, "-"], cwd=folder, env=environment(), stdin=pipe, stdout=pipe, stderr=pipe, text=True
    )
    ranks: list[psutil.Process] = []
    try:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(script)
        process.stdin.close()
        process.stdin = None
        line = process.stdout.readline()
        with suppress(psutil.NoSuchProcess):
            ranks = psutil.Process(process.pid).children(recursive=True)
        yield process, ranks
        assert line == f"{process.pid}\n"
        _, alive = psutil.wait_procs(ranks, timeout=30)
        assert not alive, "a rank outlived the program"
    finally:
        for left in [*ranks, process]:
            with suppress(psutil.NoSuchProcess):
                left.kill()
        process.wait()


def test_a_script_without_a_guard_runs_once_and_ends_its_ranks(tmp_path: Path) -> None:
    """The working directory holds a module that no rank may import."""
    (tmp_path / "json.py").write_text("raise SystemExit('imported from the working directory')")
    with started("import sys; sys.path.remove('')\n" + LEAVES, tmp_path) as (process, _):
        out, err = process.communicate(timeout=100)
        assert (process.returncode, out) == (0, ""), err
        assert "imported from" not in err and "Traceback" not in err


def test_ranks_die_with_a_program_that_is_killed(tmp_path: Path) -> None:
    with started(STAYS, tmp_path) as (process, ranks):
        assert len(ranks) == 1
        process.kill()


def test_ctrl_c_ends_a_program_that_does_not_catch_it(tmp_path: Path) -> None:
    handler = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
    with started(handler + STAYS, tmp_path) as (process, ranks):
        for each in (process, *ranks):
            each.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=100)
        assert process.returncode == -signal.SIGINT and len(ranks) == 1
        assert err.rstrip().endswith("KeyboardInterrupt")


def test_under_torchrun_every_rank_gets_what_rank_0_decides(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(UNDER_TORCHRUN)
    command = [sys.executable, *TORCHRUN, str(script), str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    (first, one_asked), (second, other_noticed) = (json.loads((tmp_path / str(rank)).read_text()) for rank in (0, 1))
    assert first == second and first[0] == 2 and len(first) == 13 and 0 in first
    assert one_asked and other_noticed


def test_the_package_itself_imports_no_torch() -> None:
    code = "import sys, mindgen; assert 'torch' not in sys.modules; assert 'LLM' in dir(mindgen)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
