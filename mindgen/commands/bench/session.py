"""Rank 0's part of a benchmark: probe, measure, probe again, report."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from torch import nn

from mindgen.commands.bench.bounds import Work, count_parameters, count_work
from mindgen.commands.bench.job import BenchJob
from mindgen.commands.bench.machine import Machine, Memory, Probe, describe_host
from mindgen.commands.bench.measure import Measured, Task, batch_task, measure, run_ours, serving_task
from mindgen.commands.bench.report import probes, result, text_of
from mindgen.commands.bench.rival import Rival
from mindgen.engine.engine import Engine
from mindgen.engine.runner import Runner
from mindgen.layers.linear import PackedWeight
from mindgen.layers.packed import stored_share
from mindgen.startup.ready import computing_dtype

FORMAT = 1  # of the JSON file; a higher number means that names have changed


def serve(job: BenchJob, engine: Engine) -> int:
    """Measures everything that the job asks for, prints the report and writes the files. The exit code."""
    runner = engine.runner
    assert isinstance(runner, Runner) and isinstance(runner.model, nn.Module)
    check_room(job, engine)
    dtype = computing_dtype(job.model.config, job.model.source.spec)
    machine = Machine(runner.device, dtype, runner.world.topology.world_size)
    weights = [module.weight for module in runner.model.modules() if isinstance(module, PackedWeight)]
    work = count_work(job.model.source.spec, dtype.itemsize, runner.world.topology.tp).stored(stored_share(weights))
    memory = Memory(machine)
    print("bench: probing the machine", file=sys.stderr)
    before = machine.probe()
    measured, held = _measure_all(job, engine, machine, _tasks(job, work), memory)
    after = machine.probe()
    report = _report(job, runner, machine, work) | {"memory": held, "probes": probes(before, after)}
    best = before.best(after)
    report["results"] = [result(found, best) for found in measured]
    print(text_of(report), flush=True)
    _write(job, report, measured, best)
    return 0


def check_room(job: BenchJob, engine: Engine) -> None:
    """Every prompt of a batch must find room at once, or its rates would be those of a queue. ValueError otherwise."""
    if job.options.is_serving:
        return
    pool = engine.scheduler.pool
    if pool is not None and job.num_slots > pool.num_blocks * pool.block_size:
        raise ValueError(
            f"the longest batch takes {job.num_slots} tokens of cache, which holds {pool.num_blocks * pool.block_size}"
            "; raise --kv-cache-memory, or lower --batch-size, --input-len or --output-len"
        )


def _tasks(job: BenchJob, work: Work) -> list[Task]:
    assert job.words is not None
    if job.options.is_serving:
        return [serving_task(job.options, work, job.words)]
    return [batch_task(shape, work, job.words) for shape in job.options.shapes()]


def _measure_all(
    job: BenchJob, engine: Engine, machine: Machine, tasks: list[Task], memory: Memory
) -> tuple[list[Measured], dict[str, Any]]:
    """All runs, and the memory that the ranks hold after them, without what transformers takes.

    With transformers in the process the memory is read before that is loaded, after a run of every task.
    """
    if job.options.vs is None:
        measured = [measure(task, engine, None, job.options, machine) for task in tasks]
        return measured, memory.now()
    for task in tasks:
        run_ours(task, engine, task.arrivals("memory"))
    held = memory.now()
    assert job.rival is not None
    rival = Rival(job.model.source, job.rival, machine, machine.dtype)
    return [measure(task, engine, rival, job.options, machine) for task in tasks], held


def _report(job: BenchJob, runner: Runner, machine: Machine, work: Work) -> dict[str, Any]:
    """What does not depend on time."""
    spec, topology = job.model.source.spec, runner.world.topology
    return {
        "format": FORMAT,
        "arguments": list(job.arguments),
        "host": describe_host(machine) | _versions(job),
        "model": {
            "name": job.model.config.model,
            "family": spec.family,
            "parameters": count_parameters(spec),
            "weight_bytes_per_step": work.weight_bytes,
            "cache_bytes_per_token": work.cache_bytes,
            "linear_flops_per_token": work.linear_flops,
        },
        "run": {
            "dtype": str(machine.dtype).removeprefix("torch."),
            "tensor_parallel_size": topology.tp,
            "pipeline_parallel_size": topology.pp,
            "num_threads": machine.num_threads,
            "max_batch_tokens": job.model.config.max_batch_tokens,
            "repeats": job.options.repeats,
            "warmup": job.options.warmup,
            "seed": job.options.seed,
        },
    }


def _versions(job: BenchJob) -> dict[str, str]:
    if job.options.vs is None:
        return {}
    import transformers

    return {"transformers": transformers.__version__}


def _write(job: BenchJob, report: dict[str, Any], measured: list[Measured], best: Probe) -> None:
    """The files that were asked for. ValueError names one that cannot be written."""
    try:
        if job.options.json is not None:
            text = json.dumps(report, indent=2, allow_nan=False)
            Path(job.options.json).write_text(text + "\n", encoding="utf-8")
        if job.options.plot is not None:
            from mindgen.commands.bench.plot import draw

            draw(Path(job.options.plot), measured, report["results"], best)
    except OSError as error:
        raise ValueError(f"{error.filename} cannot be written: {error.strerror}") from None
