"""The program of the ranks that an LLM starts: `python -m mindgen.startup.rank <configuration>`, for nobody else.

It follows rank 0 and knows of nothing but the configuration, so that no script or notebook is ever run a second time.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, cast

from mindgen.config import EngineConfig
from mindgen.parallel.launch import join_ranks
from mindgen.startup.opened import Opened, open_model
from mindgen.startup.ranks import ready_rank

PROGRAM = ("-P", "-m", "mindgen.startup.rank")  # -P: what lies in the working directory is not to be imported


def tell(config: EngineConfig, beside: str | None) -> list[str]:
    """The program's arguments; `beside` is that of `open_model`."""
    return [json.dumps({"config": asdict(config), "beside": beside})]


def surroundings(environ: Mapping[str, str]) -> dict[str, str]:
    """Environment variables in which the program finds every package where this process does."""
    return {**environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}


def main(arguments: list[str]) -> int:
    """Follows rank 0 until it stops; 2 if the ranks agreed not to begin, 1 if they lost each other."""
    ranks = join_ranks(os.environ, on_loss=lambda reason: os._exit(1))
    model, error = _open(arguments[0])
    from mindgen.parallel.group import PeerLost
    from mindgen.parallel.rendezvous import RendezvousError
    from mindgen.parallel.world import RankError

    try:
        with ready_rank(ranks, model, error) as (_, runner):
            runner.follow()
        return 0
    except RankError:
        return 2
    except (PeerLost, RendezvousError):
        return 1


def _open(told: str) -> tuple[Opened | None, str | None]:
    """What rank 0 opened too; or what is wrong with it here."""
    values = json.loads(told)
    config = {name: tuple(value) if isinstance(value, list) else value for name, value in values["config"].items()}
    try:
        return open_model(EngineConfig(**cast(dict[str, Any], config)), beside=values["beside"]), None
    except (ValueError, OSError) as error:
        return None, str(error)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
