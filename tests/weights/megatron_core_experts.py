"""A program of four ranks: megatron-core loads our shards of models with experts, strictly. Run by the test beside it.

`python -m tests.weights.megatron_core_experts OUT TP,PP,EP ... -- FOLDER ...`, where each FOLDER holds `TP PP EP`.
To compute with experts, megatron-core needs Transformer Engine and so a GPU; to load them it does not.
"""

from __future__ import annotations

import signal
import sys
from argparse import Namespace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.weights.megatron_core_program import WORLD_SIZE, without_cuda


def main() -> None:
    out, *others = sys.argv[1:]
    bar = others.index("--")
    layouts = [tuple(map(int, text.split(","))) for text in others[:bar]]
    folders = list(map(Path, others[bar + 1 :]))
    torch.set_num_threads(1)
    with without_cuda():
        import tests.weights.megatron_core_model  # noqa: F401  # takes seconds: once, before there are four of us

        mp.start_processes(run_rank, (layouts, folders, Path(out)), WORLD_SIZE, start_method="fork")


def run_rank(rank: int, layouts: list[tuple[int, int, int]], folders: list[Path], out: Path) -> None:
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import initialize_rng_tracker

    signal.signal(signal.SIGINT, signal.SIG_DFL)
    dist.init_process_group("gloo", f"file://{out.resolve()}/meeting", timedelta(seconds=60), WORLD_SIZE, rank)
    for tp, pp, ep in layouts:
        parallel_state.initialize_model_parallel(
            tp,
            pp,
            expert_model_parallel_size=ep,
            expert_tensor_parallel_size=tp // ep,
            create_gloo_process_groups=False,
        )
        initialize_rng_tracker(inference_rng_tracker=True)
        for folder in folders:
            load(folder / f"{tp} {pp} {ep}", (out / f"{folder.name} {tp} {pp} {ep} {rank}"), pp, ep)
        parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def load(folder: Path, target: Path, pp: int, ep: int) -> None:
    """Loads this rank's shard and writes how many tensors that were."""
    shard = read_shard(folder, pp, ep)
    model = make_model(shard["args"])
    model.load_state_dict(shard["model"], strict=True)
    target.write_text(str(len(shard["model"])))


def read_shard(folder: Path, pp: int, ep: int) -> dict[str, Any]:
    """This rank's shard, by the name that Megatron gives it."""
    from megatron.core import parallel_state

    name = f"mp_rank_{parallel_state.get_tensor_model_parallel_rank():02d}"
    name += f"_{parallel_state.get_pipeline_model_parallel_rank():03d}" if pp > 1 else ""
    name += f"_{parallel_state.get_expert_model_parallel_rank():03d}" if ep > 1 else ""
    with torch.serialization.safe_globals([Namespace]):
        shard: dict[str, Any] = torch.load(folder / "iter_0000001" / name / "model_optim_rng.pt", weights_only=True)
    return shard


def make_model(args: Namespace) -> Any:
    """This rank's part of the model that `args` describe."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.models.gpt.gpt_model import GPTModel

    from tests.weights.megatron_core_model import make_config

    config = make_config(args)
    return GPTModel(
        config,
        get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization=args.normalization),
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_base=args.rotary_base,
    )


if __name__ == "__main__":
    main()
