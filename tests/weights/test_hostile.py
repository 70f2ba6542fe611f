"""Files that are damaged, forged or dangerous: each is an error that names the file, and nothing in it is ever run."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import random
import shutil
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.serialization import safe_globals

from mindgen.commands.convert import main
from mindgen.commands.show import main as show
from mindgen.weights.manifest import MANIFEST, read_manifest
from mindgen.weights.open import open_source
from mindgen.weights.pickles import load_pickle
from mindgen.weights.verify import verify
from tests.weights.folders import config_of, random_tensors, write_folder
from tests.weights.foreign import Style, write_megatron

CONFIG = config_of(num_hidden_layers=2)


@pytest.fixture
def origin(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "origin", CONFIG)


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Converts a folder that cannot be converted; its message."""

    def convert(path: Path, kind: str = "hf") -> str:
        target = tmp_path / "target"
        capsys.readouterr()
        flags = ["--load-model-type", kind, "--save-model-type", "mg", "--load-dir", path, "--save-dir", target]
        assert main([str(flag) for flag in flags]) == 2
        assert not target.exists()
        message = capsys.readouterr().err
        assert message.startswith("convert_ckpt.py: error: ") and "Traceback" not in message
        return message

    return convert


def to_megatron(origin: Path, target: Path, *flags: str) -> Path:
    usual = ["--load-model-type", "hf", "--save-model-type", "mg", "--load-dir", str(origin), "--save-dir", str(target)]
    assert main([*usual, "--target-tensor-parallel-size", "2", *flags]) == 0
    return target


def megatron(path: Path, style: Style | None = None) -> Path:
    """A foreign checkpoint with its `config.json`; the file of its first shard."""
    folder = write_megatron(path, CONFIG, random_tensors(CONFIG), style or Style(args=None))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder / "mp_rank_00" / "model_optim_rng.pt"


class TestHuggingFace:
    FILE = "model-00001-of-00002.safetensors"

    @pytest.mark.parametrize("size", [0, 7, 8, 100, -3000, -1])
    def test_truncated(self, origin: Path, refused: Callable[..., str], size: int) -> None:
        file = origin / self.FILE
        os.truncate(file, size if size >= 0 else file.stat().st_size + size)
        assert self.FILE in refused(origin)

    @pytest.mark.parametrize("length", [0, 1 << 63, 1 << 30, (1 << 64) - 1])
    def test_a_header_of_a_senseless_length(self, origin: Path, refused: Callable[..., str], length: int) -> None:
        with (origin / self.FILE).open("r+b") as file:
            file.write(length.to_bytes(8, "little"))
        assert self.FILE in refused(origin)

    @pytest.mark.parametrize("name", ["../origin/x", "/etc/passwd", "a/../../x", "..", "", "a\0b", "x" * 5000, 3, None])
    def test_an_index_that_leads_elsewhere(self, origin: Path, refused: Callable[..., str], name: Any) -> None:
        index = origin / "model.safetensors.index.json"
        weight_map = json.loads(index.read_text())["weight_map"]
        weight_map["model.norm.weight"] = name
        index.write_text(json.dumps({"weight_map": weight_map}))
        assert str(origin) in refused(origin)

    def test_a_pipe_or_a_folder_in_place_of_a_file(self, origin: Path, refused: Callable[..., str]) -> None:
        (origin / self.FILE).unlink()
        os.mkfifo(origin / self.FILE)
        assert "not a regular file" in refused(origin)
        (origin / self.FILE).unlink()
        (origin / self.FILE).mkdir()
        assert "not a regular file" in refused(origin)

    @pytest.mark.parametrize(
        "text", ["", "[]", "{", '{"weight_map": []}', '{"weight_map": {}}', "\ufeff{}", "[" * 9999]
    )
    def test_an_index_that_is_none(self, origin: Path, refused: Callable[..., str], text: str) -> None:
        (origin / "model.safetensors.index.json").write_text(text)
        assert "model.safetensors.index.json" in refused(origin)

    def test_an_index_that_disagrees_with_its_files(self, origin: Path, refused: Callable[..., str]) -> None:
        index = origin / "model.safetensors.index.json"
        weight_map = json.loads(index.read_text())["weight_map"]
        (origin / self.FILE).unlink()
        assert self.FILE in refused(origin)
        write_folder(origin, CONFIG)
        weight_map.pop("model.norm.weight")
        index.write_text(json.dumps({"weight_map": weight_map}))
        assert "model.norm.weight" in refused(origin)

    def test_a_tensor_in_two_files(self, origin: Path, refused: Callable[..., str]) -> None:
        second = origin / "model-00002-of-00002.safetensors"
        tensors = load_file(second)
        tensors["model.embed_tokens.weight"] = torch.zeros(61, 32)
        save_file(tensors, second)
        assert "model.embed_tokens.weight of model-00002" in refused(origin)

    @pytest.mark.parametrize("change", ["missing", "left over", "wrong shape", "wrong dtype"])
    def test_other_tensors_than_the_model_has(self, origin: Path, refused: Callable[..., str], change: str) -> None:
        tensors = random_tensors(CONFIG)
        name = "model.layers.1.mlp.up_proj.weight"
        if change == "missing":
            del tensors[name]
        elif change == "left over":
            name = "model.layers.1.mlp.up_proj.bias"
            tensors[name] = torch.zeros(48)
        elif change == "wrong shape":
            tensors[name] = torch.zeros(32, 48).bfloat16()
        else:
            tensors[name] = torch.zeros(48, 32, dtype=torch.float8_e4m3fn)
        shutil.rmtree(origin)
        message = refused(write_folder(origin, CONFIG, tensors))
        assert f"{change}: {name}" in message

    @pytest.mark.parametrize(
        "change",
        [
            {"num_hidden_layers": "2"}, {"num_hidden_layers": 0}, {"num_hidden_layers": -1}, {"num_hidden_layers": 2.5},
            {"num_hidden_layers": 10**18}, {"rms_norm_eps": float("nan")}, {"model_type": "evil"}, {"head_dim": 3},
            {"rope_scaling": {"rope_type": ["x"]}}, {"num_attention_heads": [8]}, {"rms_norm_eps": None},
        ],
    )  # fmt: skip
    def test_a_config_that_is_no_model(self, origin: Path, refused: Callable[..., str], change: dict[str, Any]) -> None:
        (origin / "config.json").write_text(json.dumps(CONFIG | change))
        assert "config.json" in refused(origin)

    def test_a_bin_file_with_code(self, origin: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
        for file in origin.glob("model*"):
            file.unlink()
        torch.save(Evil(tmp_path / "canary"), origin / "pytorch_model.bin")
        message = refused(origin)
        assert "pytorch_model.bin" in message and "system" in message
        assert not (tmp_path / "canary").exists()


class Evil:
    """Writes a file when it is unpickled by a reader that runs what it finds."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.system, (f"touch '{self.canary}'",)


class Gadget(Evil):
    """The same by looking the function up in a module."""

    def __reduce__(self) -> Any:
        return eval, (f"open({str(self.canary)!r}, 'w')",)


def test_the_bombs_of_these_tests_are_real(tmp_path: Path) -> None:
    for evil in (Evil, Gadget):
        pickle.loads(pickle.dumps(evil(tmp_path / evil.__name__)))
        assert (tmp_path / evil.__name__).exists()


class TestPickles:
    @pytest.mark.parametrize("protocol", [2, 4])
    @pytest.mark.parametrize("evil", [Evil, Gadget])
    @pytest.mark.parametrize("place", ["args", "model", "name", "rng_state"])
    def test_code_is_never_run(
        self, tmp_path: Path, refused: Callable[..., str], protocol: int, evil: type[Evil], place: str
    ) -> None:
        bomb = evil(tmp_path / "canary")
        values: dict[str, Any] = {
            "args": {"args": argparse.Namespace(num_layers=bomb)},
            "model": {"model": bomb},
            "name": {"model": {"embedding.word_embeddings.weight": bomb}},
            "rng_state": {"rng_state": [bomb]},
        }
        style = Style(args=None, protocol=protocol, top=values[place])
        file = megatron(tmp_path / "mg", style)
        message = refused(tmp_path / "mg", "mg")
        assert str(file) in message and ("system" in message or "eval" in message)
        assert not (tmp_path / "canary").exists()

    def test_what_others_told_torch_to_trust_is_not_trusted(self, tmp_path: Path) -> None:
        file = megatron(tmp_path / "mg", Style(args=None, top={"extra": Evil(tmp_path / "canary")}))
        with safe_globals([os.system, argparse.Namespace]):  # type: ignore[list-item]
            with pytest.raises(ValueError, match="system"):
                load_pickle(file)
            assert os.system in torch.serialization.get_safe_globals()
        assert not (tmp_path / "canary").exists()

    def test_looking_up_attributes_of_a_stand_in_runs_nothing(self, tmp_path: Path) -> None:
        class Named:
            def __reduce__(self) -> Any:
                return getattr, (OrderedDict, "fromkeys")

        for protocol in (2, 4):
            torch.save({"model": {}, "x": Named()}, tmp_path / "x.pt", pickle_protocol=protocol)
            assert type(load_pickle(tmp_path / "x.pt")["x"]).__mro__[1].__name__ == "Inert"

    @pytest.mark.parametrize("part", range(8))
    @pytest.mark.parametrize("protocol", [2, 4])
    def test_truncated(self, tmp_path: Path, refused: Callable[..., str], protocol: int, part: int) -> None:
        file = megatron(tmp_path / "mg", Style(args=None, protocol=protocol))
        os.truncate(file, file.stat().st_size * part // 8 + (part > 5))
        assert "model_optim_rng.pt" in refused(tmp_path / "mg", "mg")

    def test_random_bytes_in_the_pickle_are_refused_or_harmless(self, tmp_path: Path) -> None:
        chance = random.Random(0)
        for protocol in (2, 4):
            file = megatron(tmp_path / str(protocol), Style(protocol=protocol))
            data = bytearray(file.read_bytes())
            with zipfile.ZipFile(file) as archive:
                entry = next(entry for entry in archive.infolist() if entry.filename.endswith("data.pkl"))
            for _ in range(150):
                changed = bytearray(data)
                for _ in range(3):
                    changed[entry.header_offset + 64 + chance.randrange(entry.file_size)] = chance.randrange(256)
                (tmp_path / "changed.pt").write_bytes(changed)
                try:
                    load_pickle(tmp_path / "changed.pt")
                except ValueError as error:
                    assert "changed.pt" in str(error)

    @pytest.mark.parametrize(
        "data",
        [
            b"\x80\x04r\xff\xff\xff\x7f.",  # memory for two thousand million entries
            b"\x80\x04N\x94" + b"(" * 100_000 + b".",
            b"\x80\x05\x96\xff\xff\xff\xff\xff\xff\xff\x7f.",
            b"\x80\x04]\x94\x00.",
            b"",
            pickle.dumps([1, 2], protocol=4),
        ],
    )
    def test_a_pickle_that_is_no_checkpoint(self, tmp_path: Path, data: bytes) -> None:
        file = self._archive(tmp_path / "x.pt", {"x/data.pkl": data})
        with pytest.raises(ValueError, match=r"x\.pt"):
            load_pickle(file)

    def test_lists_in_lists_take_no_time(self, tmp_path: Path) -> None:
        nested: Any = {"a": 1}
        for _ in range(60):
            nested = {"a": nested, "b": nested}
        for protocol in (2, 4):
            torch.save(
                {"model": nested, "args": argparse.Namespace(x=nested)}, tmp_path / "x.pt", pickle_protocol=protocol
            )
            load_pickle(tmp_path / "x.pt")

    def test_a_compressed_archive_is_refused(self, tmp_path: Path) -> None:
        with zipfile.ZipFile(tmp_path / "x.pt", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("x/data.pkl", b"\0" * 10_000_000)
        with pytest.raises(ValueError, match="compressed"):
            load_pickle(tmp_path / "x.pt")

    def test_a_tensor_beyond_its_data_is_refused(self, tmp_path: Path) -> None:
        for protocol in (2, 4):
            file = tmp_path / "x.pt"
            model = {"w": torch.zeros(77, 3), "behind it": torch.zeros(99_999)}
            torch.save({"model": model}, file, pickle_protocol=protocol)
            with zipfile.ZipFile(file) as archive:
                before = archive.read("x/data.pkl")
            after = before.replace(b"KMK\x03\x86", b"K\xffK\xff\x86").replace(b"K\x03K\x01\x86", b"K\xffK\x01\x86")
            assert len(after) == len(before) and after != before
            checksums = [zlib.crc32(data).to_bytes(4, "little") for data in (before, after)]
            file.write_bytes(file.read_bytes().replace(before, after).replace(*checksums))
            with pytest.raises(ValueError, match=r"x\.pt"):
                load_pickle(file)

    def test_files_from_before_zip_archives_are_refused_with_what_to_do(self, tmp_path: Path) -> None:
        torch.save({"model": {}}, tmp_path / "x.pt", _use_new_zipfile_serialization=False)
        with pytest.raises(ValueError, match="must be saved again"):
            load_pickle(tmp_path / "x.pt")

    @staticmethod
    def _archive(path: Path, members: dict[str, bytes]) -> Path:
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in members.items():
                archive.writestr(name, data)
        return path


class TestMegatronFiles:
    @pytest.mark.parametrize("kind", ["pipe", "device", "link out", "folder"])
    def test_a_shard_that_is_no_file_of_its_folder(
        self, tmp_path: Path, refused: Callable[..., str], kind: str
    ) -> None:
        file = megatron(tmp_path / "mg")
        file.rename(tmp_path / "elsewhere.pt")
        if kind == "pipe":
            os.mkfifo(file)
        elif kind == "folder":
            file.mkdir()
        else:
            file.symlink_to("/dev/zero" if kind == "device" else tmp_path / "elsewhere.pt")
        assert str(file) in refused(tmp_path / "mg", "mg")

    @pytest.mark.parametrize("name", ["../x", "/etc/passwd", "mp_rank_00/../../x", "a\0b", ""])
    def test_a_manifest_that_leads_elsewhere(
        self, origin: Path, tmp_path: Path, refused: Callable[..., str], name: str
    ) -> None:
        folder = to_megatron(origin, tmp_path / "mg") / "iter_0000001"
        manifest = read_manifest(folder)
        assert manifest is not None
        record = next(iter(manifest.files.values()))
        (folder / MANIFEST).write_bytes(replace(manifest, files=manifest.files | {name: record}).write())
        assert "must lie inside its own folder" in refused(tmp_path / "mg", "mg")

    @pytest.mark.parametrize("args", [{"num_layers": "2"}, {"rope_scaling_type": ["x"]}, {"num_query_groups": 0}])
    def test_args_of_another_type(self, tmp_path: Path, refused: Callable[..., str], args: dict[str, Any]) -> None:
        folder = write_megatron(tmp_path / "mg", CONFIG, random_tensors(CONFIG), Style(args=args))
        (folder / "config.json").write_text(json.dumps(CONFIG))
        assert "args" in refused(tmp_path / "mg", "mg")


@pytest.fixture(params=["torch", "safetensors"])
def written(request: pytest.FixtureRequest, origin: Path, tmp_path: Path) -> Path:
    """A checkpoint of ours; the folder of its iteration."""
    return to_megatron(origin, tmp_path / "mg", "--save-format", request.param) / "iter_0000001"


def problem(folder: Path) -> str:
    """What opening and verifying says of a damaged checkpoint; empty if it finds nothing."""
    try:
        open_source(folder).check()
        manifest = read_manifest(folder)
        assert manifest is not None
        verify(folder, manifest)
    except ValueError as error:
        return str(error)
    return ""


class TestDamage:
    def test_any_flipped_bit_is_found(self, written: Path) -> None:
        assert problem(written) == ""
        chance = random.Random(0)
        files = [path for path in sorted(written.rglob("*")) if path.is_file()]
        for number in range(100):
            file = files[number % len(files)]
            data = bytearray(file.read_bytes())
            place, bit = chance.randrange(len(data)), chance.randrange(8)
            data[place] ^= 1 << bit
            file.write_bytes(data)
            assert problem(written), (file.name, place, bit)
            data[place] ^= 1 << bit
            file.write_bytes(data)
        assert problem(written) == ""

    def test_the_damaged_tensor_is_named(
        self, written: Path, refused: Callable[..., str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        file = next((written / "mp_rank_01").iterdir())
        data = file.read_bytes()
        name = "decoder.layers.1.mlp.linear_fc2.weight"
        weights = random_tensors(CONFIG)["model.layers.1.mlp.down_proj.weight"]
        part = weights[:, 24:].contiguous().view(torch.uint8).numpy().tobytes()
        assert data.count(part) == 1
        place = data.index(part) + 17
        file.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
        assert show([str(written), "--verify"]) == 2
        assert f"mp_rank_01/{file.name} has other bytes than were written: {name}\n" in capsys.readouterr().err
        assert name in refused(written.parent, "mg"), "the converter does not convert damage"

    def test_swapped_shards_are_found_at_once(self, written: Path) -> None:
        first, second = written / "mp_rank_00", written / "mp_rank_01"
        first.rename(written / "x")
        second.rename(first)
        (written / "x").rename(second)
        with pytest.raises(ValueError, match="it comes from elsewhere"):
            open_source(written)

    def test_a_shard_of_another_conversion_is_found_at_once(self, written: Path, origin: Path, tmp_path: Path) -> None:
        file = next((written / "mp_rank_01").iterdir()).relative_to(written)
        save_format = "torch" if file.suffix == ".pt" else "safetensors"
        other = to_megatron(origin, tmp_path / "other", "--save-format", save_format) / "iter_0000001"
        assert (other / file).stat().st_size == (written / file).stat().st_size
        shutil.copy(other / file, written / file)
        with pytest.raises(ValueError, match="it comes from elsewhere"):
            open_source(written).check()

    def test_a_missing_manifest_is_said(self, written: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (written / MANIFEST).unlink()
        assert show([str(written)]) == 0
        assert show([str(written), "--verify"]) == 2
        assert "no manifest" in capsys.readouterr().err

    def test_a_hugging_face_folder_of_ours_is_verified_too(self, written: Path, tmp_path: Path) -> None:
        flags = ["--load-model-type", "mg", "--save-model-type", "hf", "--load-dir", str(written)]
        assert main([*flags, "--save-dir", str(tmp_path / "back")]) == 0
        assert show([str(tmp_path / "back" / "mg2hf"), "--verify"]) == 0
        file = tmp_path / "back" / "mg2hf" / "model.safetensors"
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
        assert show([str(tmp_path / "back" / "mg2hf"), "--verify"]) == 2
