"""Engine directories that are damaged, foreign, in the way, or written by someone who was interrupted."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.tiny_models import hf_dir

from lamella_core.checkpoint.safetensors_file import SafetensorsFile, write_safetensors
from lamella_core.engine import Engine, writer
from lamella_core.engine.spec import SCHEMA_VERSION
from lamella_core.errors import CheckpointError, EngineFormatError
from lamella_core.models.llama import LlamaForCausalLM


@pytest.fixture(scope="module")
def built() -> Engine:
    return Engine.from_model(LlamaForCausalLM.from_hugging_face(hf_dir("LlamaForCausalLM", "grouped")))


@pytest.fixture
def saved(built: Engine, tmp_path: Path) -> Path:
    built.save(tmp_path / "engine")
    return tmp_path / "engine"


def edit(directory: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = directory / "engine.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


RANK = "rank0.safetensors"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda d: d.update(schema_version=SCHEMA_VERSION + 1, lamella_version="9.9"),
            r"Lamella 9\.9.*Upgrade Lamella",
        ),
        (lambda d: d.pop("schema_version"), "not that of a Lamella engine"),
        (lambda d: d.update(schema_version="1"), "not that of a Lamella engine"),
        (lambda d: d.pop("build"), "damaged"),
        (lambda d: d["build"].update(max_batch_size=-3), "max_batch_size"),
        (lambda d: d["build"].update(unknown=1), "unknown"),
        (lambda d: d.update(plans=[]), "plans"),
        (lambda d: d.update(timings=3), "damaged"),
        (lambda d: d.update(cpu=None), "cpu"),
        (lambda d: d["model"].update(hidden_size="x"), "hidden_size"),
        (lambda d: d["model"].pop("architecture"), "names no architecture"),
        (lambda d: d.pop("files"), f"does not describe {RANK}"),
        (lambda d: d["files"][RANK].pop("checksums"), f"does not describe {RANK}"),
        (lambda d: d["files"][RANK]["checksums"].pop("norm.weight"), r"disagree about norm\.weight"),
        (lambda d: d["files"][RANK]["checksums"].update({"norm.weight": "0" * 16}), r"wrong checksum of norm\.weight"),
    ],
)
def test_a_damaged_engine_json_names_the_problem(saved: Path, change: Any, message: str) -> None:
    edit(saved, change)
    with pytest.raises(EngineFormatError, match=message) as caught:
        Engine.load(saved)
    assert str(saved) in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d["model"].update(norm_eps=2e-6),
        lambda d: d["model"]["rope"].update(theta=10001.0),
        lambda d: d["build"].update(max_batch_size=65),
        lambda d: d.update(note="mine"),
        lambda d: d.pop("checksum"),
    ],
)
def test_an_engine_json_that_was_changed_but_makes_sense(saved: Path, change: Any) -> None:
    edit(saved, change)
    with pytest.raises(EngineFormatError, match=r"engine\.json is damaged or was edited: its checksum differs"):
        Engine.load(saved)
    assert Engine.load(saved, verify=False).ranks == [0]


def test_white_space_and_order_of_keys_do_not_count(saved: Path) -> None:
    data = json.loads((saved / "engine.json").read_text())
    (saved / "engine.json").write_text(json.dumps(dict(reversed(data.items())), indent=8))
    assert Engine.load(saved).ranks == [0]


@pytest.mark.parametrize("text", ["", "{", "[1]", "\udcff"])
def test_engine_json_that_is_no_json_object(saved: Path, text: str) -> None:
    (saved / "engine.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(EngineFormatError, match=r"engine\.json is damaged"):
        Engine.load(saved)


def test_a_missing_rank_file(saved: Path) -> None:
    (saved / RANK).unlink()
    with pytest.raises(EngineFormatError, match=rf"{RANK} is missing; copy the whole engine directory again"):
        Engine.load(saved)


@pytest.mark.parametrize("cut", [1, 100, 10_000])
def test_a_truncated_rank_file(saved: Path, cut: int) -> None:
    path = saved / RANK
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(EngineFormatError, match=rf"{RANK} has \d+ bytes instead of \d+: the copy is incomplete"):
        Engine.load(saved)


def test_every_flipped_bit_is_found_and_only_when_asked_for(saved: Path) -> None:
    path = saved / RANK
    raw = path.read_bytes()
    begin = min(info.begin for info in SafetensorsFile(path).tensors.values())
    for at in range(begin, len(raw), len(raw) // 11):
        path.write_bytes(raw[:at] + bytes([raw[at] ^ 16]) + raw[at + 1 :])
        with pytest.raises(EngineFormatError, match="wrong checksum of"):
            Engine.load(saved)
    assert Engine.load(saved, verify=False).ranks == [0]


def test_a_damaged_header_is_an_engine_error(saved: Path) -> None:
    path = saved / RANK
    raw = bytearray(path.read_bytes())
    raw[9] = 0xFF
    path.write_bytes(raw)
    with pytest.raises(EngineFormatError, match=RANK):
        Engine.load(saved)


def test_weights_of_another_shape_do_not_run(built: Engine) -> None:
    weights = dict(built.weights())
    with pytest.raises(EngineFormatError, match=r"norm\.weight is torch.float32 \[31\]"):
        Engine(built.spec, {0: {**weights, "norm.weight": torch.ones(31)}}).model()
    with pytest.raises(EngineFormatError, match=r"norm\.weight is torch.float64"):
        Engine(built.spec, {0: {**weights, "norm.weight": torch.ones(32).double()}}).model()
    del weights["norm.weight"]
    with pytest.raises(EngineFormatError, match=r"does not fit LlamaForCausalLM: norm\.weight"):
        Engine(built.spec, {0: weights}).model()


def test_directories_that_are_no_engine(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none", hf_dir("LlamaForCausalLM", "grouped")):
        with pytest.raises(EngineFormatError, match=r"is no engine: it has no engine\.json; build one"):
            Engine.load(path)


def test_saving_replaces_an_engine_but_nothing_else(built: Engine, saved: Path, tmp_path: Path) -> None:
    built.save(saved)
    (tmp_path / "empty").mkdir()
    built.save(tmp_path / "empty")
    assert Engine.load(tmp_path / "empty").ranks == [0]
    (saved / "notes.txt").write_text("mine")
    with pytest.raises(EngineFormatError, match=r"not an engine's \(notes\.txt\)"):
        built.save(saved)
    assert (saved / "notes.txt").read_text() == "mine"
    (tmp_path / "file").write_text("")
    with pytest.raises(EngineFormatError, match="is a file"):
        built.save(tmp_path / "file")
    built.save(tmp_path / "deep" / "er" / "engine")
    assert Engine.load(tmp_path / "deep" / "er" / "engine").ranks == [0]


def test_saving_through_a_link_keeps_the_link(built: Engine, tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    link.symlink_to(target)
    for _ in range(2):  # to a directory that is missing, then to an engine
        built.save(link)
        assert link.is_symlink() and Engine.load(target).ranks == [0]
        assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "target"]


def test_a_directory_that_cannot_be_replaced_is_refused_at_once(
    built: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(EngineFormatError, match=r"here is the current directory;.* such as .*here/engine"):
        built.save(".")
    monkeypatch.setattr(Path, "is_mount", lambda path: path.name == "volume")
    (tmp_path / "volume").mkdir()
    with pytest.raises(EngineFormatError, match="volume is a mount point"):
        built.save(tmp_path / "volume")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here", "volume"]


@pytest.mark.parametrize("exchange", [True, False], ids=["renameat2", "two_renames"])
@pytest.mark.parametrize("call", range(8))
def test_an_interrupted_save_leaves_the_old_engine(
    built: Engine, saved: Path, monkeypatch: pytest.MonkeyPatch, call: int, exchange: bool
) -> None:
    """The nth call that touches the disk fails: afterwards there is a whole engine, the old or the new one."""
    before = (saved / RANK).read_bytes()
    changed = Engine(built.spec, {0: {**built.weights(), "norm.weight": torch.full((32,), 2.0)}})
    if not exchange:
        monkeypatch.setattr(writer, "_exchange", lambda one, other: False)
    calls = 0

    def failing(real: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == call + 1:
                raise OSError(28, "No space left on device")
            return real(*args, **kwargs)

        return wrapped

    for name in ("fsync", "replace", "rename"):
        monkeypatch.setattr(os, name, failing(getattr(os, name)))
    try:
        changed.save(saved)
        failed = False
    except CheckpointError as error:
        failed = True
        assert "No space left" in str(error)
    monkeypatch.undo()
    engine = Engine.load(saved)
    if failed:
        assert (saved / RANK).read_bytes() == before
    else:
        assert engine.weights()["norm.weight"][0] == 2
    assert [path.name for path in saved.parent.iterdir()] == ["engine"]


def test_keyboard_interrupt_leaves_nothing(built: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(writer, "tensor_checksum", interrupted)
    with pytest.raises(KeyboardInterrupt):
        built.save(tmp_path / "engine")
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_writer_left_behind_is_not_in_the_way(built: Engine, tmp_path: Path) -> None:
    leftover = tmp_path / ".engine.00000000.tmp"
    leftover.mkdir()
    write_safetensors(leftover / RANK, {"x": torch.ones(2)})
    built.save(tmp_path / "engine")
    assert Engine.load(tmp_path / "engine").ranks == [0]
