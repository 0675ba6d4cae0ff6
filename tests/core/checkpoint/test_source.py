"""WeightSource: which files of a directory are read, and how; nothing in a file is ever executed."""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lamella_core.checkpoint import source as source_module
from lamella_core.checkpoint.source import WeightSource
from lamella_core.errors import CheckpointError

A = torch.arange(40.0).reshape(8, 5)
B = torch.arange(6, dtype=torch.float32).to(torch.bfloat16)


def sharded(directory: Path, suffix: str) -> None:
    stem = "model" if suffix == ".safetensors" else "pytorch_model"
    names = [f"{stem}-{k}-of-2{suffix}" for k in (1, 2)]
    for name, tensors in zip(names, ({"a": A}, {"b": B}), strict=True):
        save_file(tensors, directory / name) if suffix == ".safetensors" else torch.save(tensors, directory / name)
    index = f"{stem}{suffix}.index.json"
    (directory / index).write_text(json.dumps({"metadata": {}, "weight_map": {"a": names[0], "b": names[1]}}))


def write(directory: Path, kind: str) -> None:
    match kind:
        case "single":
            save_file({"a": A, "b": B}, directory / "model.safetensors")
        case "sharded":
            sharded(directory, ".safetensors")
        case "other_name":
            save_file({"a": A, "b": B}, directory / "weights.safetensors")
        case "bin":
            torch.save({"a": A, "b": B}, directory / "pytorch_model.bin")
        case "sharded_bin":
            sharded(directory, ".bin")
        case "old_bin":
            torch.save({"a": A, "b": B}, directory / "pytorch_model.bin", _use_new_zipfile_serialization=False)


KINDS = ["single", "sharded", "other_name", "bin", "sharded_bin", "old_bin"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_directory_reads_the_same(tmp_path: Path, kind: str) -> None:
    write(tmp_path, kind)
    source = WeightSource(tmp_path)
    assert sorted(source.names()) == ["a", "b"]
    assert source.shape("a") == (8, 5) and source.dtype("b") == torch.bfloat16
    assert torch.equal(source.read("a"), A) and torch.equal(source.read("b"), B)
    assert torch.equal(source.read("a", (slice(2, 5), slice(1, 3))), A[2:5, 1:3])


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_are_copied_cast_and_transposed(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_module, "_PIECE_BYTES", 40)  # two rows: the copy takes several pieces
    write(tmp_path, kind)
    source, out = WeightSource(tmp_path), torch.zeros(3, 8, dtype=torch.float64)
    source.copy(out, "a", (slice(None), slice(1, 4)), transpose=True)
    assert torch.equal(out, A[:, 1:4].t().double())
    with pytest.raises(CheckpointError, match=r"'a'.*\[8, 5\].*\[5, 5\]"):
        source.copy(torch.zeros(5, 5), "a")
    assert torch.equal(source.read("a"), A)  # releasing pages lost nothing


def test_safetensors_win_over_bin(tmp_path: Path) -> None:
    save_file({"a": A}, tmp_path / "model.safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(b"garbage")
    assert WeightSource(tmp_path).names() == ["a"]


def test_after_close_reading_opens_the_file_again(tmp_path: Path) -> None:
    write(tmp_path, "single")
    source = WeightSource(tmp_path)
    source.close()
    assert torch.equal(source.read("a"), A)


def index(directory: Path, weight_map: Any) -> None:
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_missing_shards_and_tensors_are_named(tmp_path: Path) -> None:
    save_file({"a": A}, tmp_path / "one.safetensors")
    index(tmp_path, {"a": "one.safetensors", "b": "two.safetensors", "c": "three.safetensors"})
    with pytest.raises(CheckpointError, match=r"2 of 3 weight files are missing: three.safetensors, two.safetensors"):
        WeightSource(tmp_path)
    index(tmp_path, {"a": "one.safetensors", "gone": "one.safetensors"})
    with pytest.raises(CheckpointError, match=r"do not hold: gone"):
        WeightSource(tmp_path)


@pytest.mark.parametrize("file", ["../one.safetensors", "/etc/passwd", "sub/one.safetensors", "one.bin", 3, "", None])
def test_an_index_cannot_name_files_elsewhere(tmp_path: Path, file: object) -> None:
    save_file({"a": A}, tmp_path / "one.safetensors")
    index(tmp_path, {"a": file})
    with pytest.raises(CheckpointError, match=r"index\.json"):
        WeightSource(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"weight_map": []}', '{"weight_map": {}}', "[" * 100_000])
def test_a_damaged_index_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"index\.json"):
        WeightSource(tmp_path)


def test_directories_without_weights(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no weights: expected model.safetensors"):
        WeightSource(tmp_path)
    with pytest.raises(CheckpointError, match="not a directory"):
        WeightSource(tmp_path / "none")


def test_one_tensor_in_two_files_needs_an_index(tmp_path: Path) -> None:
    save_file({"a": A}, tmp_path / "one.safetensors")
    save_file({"a": A}, tmp_path / "two.safetensors")
    with pytest.raises(CheckpointError, match="'a' is in both one.safetensors and two.safetensors"):
        WeightSource(tmp_path)


class Bomb:
    """Unpickled by the ordinary unpickler, this makes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return (Path.touch, (self.target,))


@pytest.mark.parametrize("how", ["torch", "old_torch", "pickle"])
def test_code_in_a_bin_file_is_refused_and_not_run(tmp_path: Path, how: str) -> None:
    target, path = tmp_path / "ran", tmp_path / "pytorch_model.bin"
    payload = {"a": A, "evil": Bomb(target)}
    if how == "pickle":
        path.write_bytes(pickle.dumps(payload))
    else:
        torch.save(payload, path, _use_new_zipfile_serialization=how == "torch")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is refused.*never run"):
        WeightSource(tmp_path)
    assert not target.exists()


@pytest.mark.parametrize(
    "payload", [[A], {"a": [A]}, {"a": A.to_sparse()}, {1: A}], ids=["list", "nested", "sparse", "int"]
)
def test_bin_files_hold_named_dense_tensors_only(tmp_path: Path, payload: Any) -> None:
    torch.save(payload, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        WeightSource(tmp_path)


@pytest.mark.parametrize("keep", [0, 3, 100, 1000])
def test_a_truncated_bin_file_is_named(tmp_path: Path, keep: int) -> None:
    write(tmp_path, "bin")
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        WeightSource(tmp_path)


def test_no_unpickling_happens(tmp_path: Path) -> None:
    """The interpreter's own audit: `pickle.find_class` is raised by every unpickler that resolves a name."""
    events: list[str] = []
    active = [True]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if active[0] and (event.startswith("pickle.") or event in {"exec", "marshal.loads", "os.system"}):
            events.append(event)

    directories = []
    for kind in KINDS:
        directory = tmp_path / kind
        directory.mkdir()
        write(directory, kind)
        WeightSource(directory).read("a")  # imports that the first use needs happen now
        directories.append(directory)
    sys.addaudithook(hook)
    try:
        for directory in directories:
            assert torch.equal(WeightSource(directory).read("a"), A)
        assert events == []
        pickle.loads(pickle.dumps(Path("x")))
        assert "pickle.find_class" in events  # the hook does see what it looks for
    finally:
        active[0] = False
