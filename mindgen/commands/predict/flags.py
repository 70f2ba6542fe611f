"""The command line of `predict`: its own flags, the engine's, and PaddleNLP's others, which are refused by name."""

from __future__ import annotations

import argparse
from typing import Any

from mindgen.commands.flags import Parser, add_flags, from_flags
from mindgen.commands.predict.options import DEVICES, DIFFERENCES, DTYPES, PredictConfig
from mindgen.config import EngineConfig

_ENGINE_BY_OTHER_NAMES = ("model", "device", "dtype", "block_size", "capture_graphs")
_QUANTISATION = "mindgen does not quantise yet; leave it out, and the weights run in --dtype"
_SPECULATION = "mindgen does not decode speculatively yet; leave it out, and the answers are the same"
_PREFIX = "mindgen does not load prefix-tuned models yet; use the model without its prefix"
_CPU = "a CPU needs no switch of its own here; use --device cpu, with --dtype bfloat16 where it is fast"
_REFUSED = {
    "quant_type": _QUANTISATION,
    "cachekv_int8_type": _QUANTISATION,
    "weightonly_group_size": _QUANTISATION,
    "weight_block_size": _QUANTISATION,
    "moe_quant_type": _QUANTISATION,
    "use_fake_parameter": _QUANTISATION,
    "lora_path": "mindgen does not load adapters yet; merge it into the model and name the merged folder",
    "prefix_path": _PREFIX,
    "export_precache": _PREFIX,
    "speculate_method": _SPECULATION,
    "speculate_max_draft_token_num": _SPECULATION,
    "speculate_max_ngram_size": _SPECULATION,
    "speculate_verify_window": _SPECULATION,
    "speculate_max_candidate_len": _SPECULATION,
    "draft_model_name_or_path": _SPECULATION,
    "draft_model_quant_type": _SPECULATION,
    "return_full_hidden_states": _SPECULATION,
    "avx_model": _CPU,
    "avx_type": _CPU,
    "avx_cachekv_type": "mindgen keeps the cache in --dtype; leave it out",
    "mla_use_matrix_absorption": "mindgen has no model with latent attention yet; leave it out",
    "model_type": "the checkpoint says what its model is; leave it out",
    "model_prefix": "mindgen runs weights, not exported graphs; name the folder that was exported",
    "total_request_num": "the requests are the lines of --data_file; leave it out",
}
_NO_EFFECT = ("use_flash_attention", "append_attn", "dynamic_insert", "output_via_mq")
_OFF = ("", "none", "false", "0", "-1")  # values that ask for nothing


def parser() -> Parser:
    """The flags of the command, in `mindgen predict --help` and in the documentation's table."""
    made = Parser(
        prog="mindgen predict",
        usage="mindgen predict --model_name_or_path DIR --data_file FILE [options]",
        description="Answers every line of a file, with the flags and file formats of PaddleNLP's predictor.",
        epilog=DIFFERENCES,
        formatter_class=_Formatter,
    )
    add_flags(made, PredictConfig)
    add_flags(made, EngineConfig, leave_out=_ENGINE_BY_OTHER_NAMES)
    for name in (*_REFUSED, *_NO_EFFECT):
        made.add_argument(f"--{name}", dest=_hidden(name), nargs="*", default=None, help=argparse.SUPPRESS)
    return made


def read_flags(arguments: list[str]) -> tuple[EngineConfig, PredictConfig, list[str]]:
    """What a command line asks for, and notes for the user. ValueError for all that is wrong."""
    parsed = parser().parse_args(arguments)
    _refuse(parsed)
    options = from_flags(PredictConfig, parsed)
    config = from_flags(
        EngineConfig,
        parsed,
        model=options.model_name_or_path,
        device=DEVICES[options.device],
        dtype=DTYPES[options.dtype] if options.dtype else None,
        block_size=options.block_size,
        capture_graphs=options.mode == "static",
    )
    return config, options, _notes(parsed, options)


def _refuse(parsed: argparse.Namespace) -> None:
    for name, why in _REFUSED.items():
        values = getattr(parsed, _hidden(name))
        if values is not None and not (values and all(value.lower() in _OFF for value in values)):
            raise ValueError(f"--{name}: {why}")


def _notes(parsed: argparse.Namespace, options: PredictConfig) -> list[str]:
    given = [f"--{name}" for name in _NO_EFFECT if getattr(parsed, _hidden(name)) is not None]
    notes = [f"no effect here: {', '.join(given)}"] if given else []
    for name, fact in (("block_attn", "the cache is paged"), ("inference_model", "there is one implementation")):
        if getattr(parsed, name) is False:
            notes.append(f"--{name} False: {fact} all the same; the answers do not depend on it")
    if options.idle:
        notes.append(f"no effect with --decode_strategy {options.decode_strategy}: {', '.join(options.idle)}")
    return notes


def _hidden(name: str) -> str:
    return f"paddlenlp_{name}"


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Help texts in one column of a steady width; the table below them as it stands."""

    def __init__(self, **options: Any) -> None:
        super().__init__(max_help_position=32, **options)
