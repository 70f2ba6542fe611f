"""Packed weights: the same products, the same numbers, the same names; and what happens where they do not exist."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mindgen.layers import packed as layout
from mindgen.layers.packed import can_pack, linear, packed, plain
from mindgen.model.build import build_stage
from mindgen.model.decoder import Decoder
from mindgen.parallel.group import SingleGroup
from mindgen.parallel.topology import SINGLE
from mindgen.weights.families import rows_of
from mindgen.weights.huggingface import open_huggingface
from mindgen.weights.load import load_weights
from mindgen.weights.rows import parameters, shard
from mindgen.weights.source import reader

CPU = torch.device("cpu")
PACKABLE = [dtype for dtype in (torch.float32, torch.bfloat16, torch.float16) if can_pack(dtype)]


@pytest.fixture
def unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A torch without the operators."""

    def absent(weight: Tensor) -> Tensor:
        raise AttributeError("'_OpNamespace' 'mkldnn' object has no attribute '_reorder_linear_weight'")

    monkeypatch.setattr(layout, "_pack", absent)
    can_pack.cache_clear()
    yield
    can_pack.cache_clear()


def loaded(folder: Path, dtype: torch.dtype) -> Decoder:
    source = open_huggingface(folder)
    model = build_stage(source.spec, SINGLE, SingleGroup(), dtype, CPU)
    load_weights(model, source, SINGLE)
    return model


@pytest.mark.parametrize("rows", [0, 1, 3, 8, 100])
@pytest.mark.parametrize("dtype", PACKABLE)
def test_a_packed_weight_multiplies_as_a_plain_one(dtype: torch.dtype, rows: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    shapes = ((rows, 65), (70, 65), (70,), (rows, 70))  # no multiple of anything
    inputs, weight, bias, residual = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    tight = packed(weight)
    assert tight.is_mkldnn and torch.equal(tight.to_dense(), weight)
    exact = F.linear(inputs.double(), weight.double(), bias.double()) + residual.double()
    torch.testing.assert_close(linear(inputs, tight, bias, residual).double(), exact, rtol=1e-2, atol=_step(dtype))
    exact = F.linear(inputs.double(), weight.double())
    torch.testing.assert_close(linear(inputs, tight).double(), exact, rtol=1e-2, atol=_step(dtype))
    torch.testing.assert_close(linear(inputs[..., None, :], tight).double(), exact[..., None, :], rtol=1e-2, atol=1)


def _step(dtype: torch.dtype) -> float:
    return 16 * torch.finfo(dtype).eps


def test_where_torch_lacks_the_operators_weights_stay_plain(unpacked: None, checkpoint: Callable[[str], Path]) -> None:
    assert not can_pack(torch.float32)
    weight = torch.randn(4, 3)
    assert packed(weight) is weight
    model = loaded(checkpoint("llama31"), torch.float32)
    assert not any(parameter.is_mkldnn for parameter in model.parameters())


def test_an_operator_that_computes_something_else_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    pack = layout._pack
    monkeypatch.setattr(layout, "_pack", lambda weight: pack(weight * 1.1))
    can_pack.cache_clear()
    assert not can_pack(torch.float32)
    can_pack.cache_clear()


def test_weights_of_other_devices_stay_plain() -> None:
    weight = torch.empty(4, 3, device="meta")
    assert packed(weight) is weight


@pytest.mark.parametrize("name", ["llama31", "llama32", "qwen2"])
def test_a_loaded_model_has_the_rows_names_and_numbers(name: str, checkpoint: Callable[[str], Path]) -> None:
    source = open_huggingface(checkpoint(name))
    model = loaded(checkpoint(name), torch.float32)
    found = dict(model.named_parameters())
    wanted = {parameter.name: parameter for parameter in parameters(rows_of(source.spec.family), source.spec, SINGLE)}
    assert set(found) == set(wanted)
    assert any(parameter.is_mkldnn for parameter in found.values()) or torch.float32 not in PACKABLE
    for place, parameter in wanted.items():
        local = shard(parameter.row, reader(source, parameter.row, parameter.layer), source.spec, SINGLE)
        held = getattr(model.get_submodule(place.rpartition(".")[0]), "parts", None) or [found[place].data]
        assert torch.equal(torch.cat([plain(part) for part in held], dim=-1), local), place
