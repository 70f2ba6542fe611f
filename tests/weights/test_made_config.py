"""A `config.json` made for a model that has none holds what JSON can, and transformers reads the model from it."""

from __future__ import annotations

import json
from copy import deepcopy
from typing import Any

import pytest

from mindgen.weights.config_json import config_from_spec, spec_from_config
from mindgen.weights.families import find_family
from tests.checkpoints import CASES, make_model
from tests.weights.test_published_experts import QWEN3_30B, QWEN15_MOE

ALL_EXPERTS = {"qwen1.5 moe": QWEN15_MOE, "qwen3 30b": QWEN3_30B}
OF_TRANSFORMERS = [name for name, case in CASES.items() if not case.original and name not in ("bloom", "gpt2")]


@pytest.mark.parametrize("name", [*OF_TRANSFORMERS, *ALL_EXPERTS])
def test_transformers_reads_the_same_model_from_it(name: str) -> None:
    import transformers

    stated = ALL_EXPERTS[name] if name in ALL_EXPERTS else make_model(name).config.to_dict()
    spec = spec_from_config(stated, "float32", name)
    made = config_from_spec(spec)
    assert json.loads(json.dumps(made)) == made  # no tuple among the lists
    theirs: dict[str, Any] = transformers.AutoConfig.for_model(**deepcopy(made)).to_dict()
    assert spec_from_config(theirs, "float32", name) == spec
    assert hasattr(transformers, find_family(spec.family).architecture)
