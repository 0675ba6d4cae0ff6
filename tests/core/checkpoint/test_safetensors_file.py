"""The safetensors reader and writer: round trips, alignment, and files damaged in every way."""

from __future__ import annotations

import json
import os
import resource
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lamella_core.checkpoint.safetensors_file import ALIGNMENT, DTYPE_NAMES, SafetensorsFile, write_safetensors
from lamella_core.errors import CheckpointError

TENSORS = {
    "a.weight": torch.arange(24, dtype=torch.float32).reshape(4, 6),
    "b": torch.arange(5, dtype=torch.int64),
    "c.weight": torch.linspace(-1, 1, 33).to(torch.bfloat16),
}


def read_all(path: Path) -> dict[str, torch.Tensor]:
    file = SafetensorsFile(path)
    return {name: file.tensor(name).clone() for name in file.tensors}


def with_header(path: Path, header: object, data: bytes = b"\0" * 64) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


@pytest.mark.parametrize("dtype", list(DTYPE_NAMES.values()), ids=str)
def test_every_dtype_round_trips(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = torch.arange(14).reshape(7, 2).to(dtype)
    write_safetensors(tmp_path / "x.safetensors", {"x": tensor})
    back = read_all(tmp_path / "x.safetensors")["x"]
    assert back.dtype == dtype and back.shape == (7, 2)
    assert torch.equal(back.view(torch.uint8), tensor.view(torch.uint8))


def test_files_of_the_reference_library_are_read_and_ours_by_it(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "theirs.safetensors")
    write_safetensors(tmp_path / "ours.safetensors", TENSORS, {"format": "pt"})
    for ours, theirs in (
        (read_all(tmp_path / "theirs.safetensors"), TENSORS),
        (load_file(tmp_path / "ours.safetensors"), TENSORS),
    ):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert SafetensorsFile(tmp_path / "ours.safetensors").metadata == {"format": "pt"}


def test_scalars_empty_and_noncontiguous_tensors(tmp_path: Path) -> None:
    tensors = {"scalar": torch.tensor(3.5), "empty": torch.empty(0, 4), "turned": torch.arange(6.0).reshape(2, 3).t()}
    write_safetensors(tmp_path / "x.safetensors", tensors)
    back = read_all(tmp_path / "x.safetensors")
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)


def test_tensors_of_whole_lines_are_aligned_whatever_lies_between(tmp_path: Path) -> None:
    tensors = {"odd": torch.zeros(3, dtype=torch.uint8), "even": torch.zeros(64), "half": torch.zeros(1).half()}
    write_safetensors(tmp_path / "x.safetensors", tensors)
    file = SafetensorsFile(tmp_path / "x.safetensors")
    assert file.info("even").begin % ALIGNMENT == 0 and file.tensor("even").data_ptr() % ALIGNMENT == 0
    assert file.info("half").begin % 2 == 0


def test_a_misaligned_tensor_is_read(tmp_path: Path) -> None:
    text = json.dumps({"x": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]}}).encode()
    text += b" " * (-len(text) % 4)  # so that the tensor begins one byte after a multiple of four
    path = with_header(tmp_path / "x", text, b"\xff" + struct.pack("<2f", 1.5, -2.0))
    assert SafetensorsFile(path).tensor("x").tolist() == [1.5, -2.0]


def test_tensors_share_the_file_and_writing_to_one_leaves_it(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"x": torch.zeros(1024)})
    before = path.read_bytes()
    tensor = SafetensorsFile(path).tensor("x")
    tensor.fill_(7)
    assert path.read_bytes() == before and float(tensor.sum()) == 7 * 1024


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"x": torch.ones(4)})

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(CheckpointError, match="No space left"):
        write_safetensors(path, {"x": torch.zeros(4)})
    monkeypatch.undo()
    assert read_all(path)["x"].tolist() == [1, 1, 1, 1]
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


GOOD = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"not json", "not valid JSON"),
        (b"[]", "not an object"),
        (b'{"a": {"dtype": "F32"}}', "needs dtype, shape and data_offsets"),
        (b'{"a": 1, "a": 2}', "appears twice"),
        (b"[" * 100_000, "not valid JSON"),
        ({"a": {**GOOD, "dtype": "F31"}}, "dtype 'F31'"),
        ({"a": {**GOOD, "dtype": []}}, "dtype"),
        ({"a": {**GOOD, "shape": [-4]}}, "impossible shape"),
        ({"a": {**GOOD, "shape": [True]}}, "impossible shape"),
        ({"a": {**GOOD, "shape": [2**62, 2**62]}}, "impossible shape"),
        ({"a": {**GOOD, "shape": [1] * 40}}, "impossible shape"),
        ({"a": {**GOOD, "shape": "4"}}, "impossible shape"),
        ({"a": {**GOOD, "data_offsets": [0, 2**64]}}, "impossible data_offsets"),
        ({"a": {**GOOD, "data_offsets": [16, 0]}}, "takes 16 bytes"),
        ({"a": {**GOOD, "data_offsets": [0, 12]}}, "takes 16 bytes"),
        ({"a": {**GOOD, "shape": [32], "data_offsets": [0, 128]}}, "truncated"),
        ({"a": {**GOOD, "shape": [4096], "data_offsets": [0, 16384]}}, "truncated: tensor 'a' ends at byte"),
        ({"a": GOOD, "b": {**GOOD, "data_offsets": [8, 24]}}, "overlap"),
        ({"__metadata__": {"a": 1}}, "__metadata__"),
        ({"__metadata__": []}, "__metadata__"),
    ],
)
def test_a_damaged_header_is_one_clear_error(tmp_path: Path, header: object, message: str) -> None:
    path = with_header(tmp_path / "bad.safetensors", header, b"\0" * 100)
    with pytest.raises(CheckpointError, match=message) as caught:
        SafetensorsFile(path)
    assert "bad.safetensors" in str(caught.value)


@pytest.mark.parametrize("length", [0, 7, 2**40, 2**63, 2**64 - 1])
def test_impossible_header_lengths(tmp_path: Path, length: int) -> None:
    (tmp_path / "x").write_bytes(struct.pack("<Q", length)[: max(1, min(8, length))] + b"{}")
    with pytest.raises(CheckpointError):
        SafetensorsFile(tmp_path / "x")


def test_missing_file_and_lfs_pointer(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="missing"):
        SafetensorsFile(tmp_path / "none.safetensors")
    (tmp_path / "x").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n")
    with pytest.raises(CheckpointError, match="git lfs pull"):
        SafetensorsFile(tmp_path / "x")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("fuzz") / "x.safetensors"
    write_safetensors(path, TENSORS)
    return path.read_bytes()


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_mutated_files_give_checkpoint_error_or_tensors(original: bytes, tmp_path: Path, data: st.DataObject) -> None:
    """Bytes of the header change, files are cut or grow: never a crash, a hang or an allocation beyond the file."""
    raw = bytearray(original)
    header_end = 8 + struct.unpack("<Q", original[:8])[0]
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, min(header_end, len(raw)) - 1))
        match data.draw(st.sampled_from(["byte", "digit", "insert", "delete", "cut", "grow"])):
            case "byte":
                raw[at] = data.draw(st.integers(0, 255))
            case "digit":
                raw[at : at + 1] = str(data.draw(st.integers(0, 2**70))).encode()
            case "insert":
                raw[at:at] = data.draw(st.binary(min_size=1, max_size=8))
            case "delete":
                del raw[at : at + data.draw(st.integers(1, 8))]
            case "cut":
                del raw[data.draw(st.integers(1, len(raw))) :]
            case _:
                raw += data.draw(st.binary(max_size=64))
        if not raw:
            break
    path = tmp_path / "mutated.safetensors"
    path.write_bytes(raw)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        tensors = read_all(path)
    except CheckpointError as error:
        assert "mutated.safetensors" in str(error)
    else:
        assert sum(tensor.nbytes for tensor in tensors.values()) <= len(raw)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 256 << 10  # KiB
