"""Compiled CUDA sources on disk: the same code again, and never code of something else."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lamella_core import disk_cache
from lamella_core.kernels.cuda import driver

SOURCE, ARCHITECTURE = "gated_product.cu", "sm_90a"


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[Any, ...]]:
    """What was asked of a compiler of version 13.0, whose code is the number of the call."""
    calls: list[tuple[Any, ...]] = []

    def compile_source(*asked: Any) -> bytes:
        calls.append(asked)
        return b"code %d\0" % len(calls)

    set_version(monkeypatch, 13, 0)
    monkeypatch.setattr(driver, "compile_source", compile_source)
    monkeypatch.setattr(disk_cache, "cache_root", lambda: tmp_path)
    return calls


def set_version(monkeypatch: pytest.MonkeyPatch, major: int, minor: int) -> None:
    def version(first: Any, second: Any) -> int:
        first._obj.value, second._obj.value = major, minor
        return 0

    monkeypatch.setattr(driver, "_nvrtc", lambda: SimpleNamespace(nvrtcVersion=version))


def kept(**macros: int) -> bytes:
    return driver.kept_code(SOURCE, macros, ARCHITECTURE)


def test_code_is_compiled_once(compiled, tmp_path):
    assert kept(A=1) == kept(A=1) == b"code 1\0"
    assert compiled == [(SOURCE, {"A": 1}, ARCHITECTURE)]
    (file,) = tmp_path.rglob("*.cubin")
    assert file.parent == tmp_path / "kernels" / "cuda" and file.name.startswith("gated_product-")


def test_code_of_something_else_is_not_taken(compiled, monkeypatch):
    kept(A=1)
    assert kept(A=2) == b"code 2\0"
    assert kept(A=1, B=0) == b"code 3\0"
    assert driver.kept_code(SOURCE, {"A": 1}, "sm_100a") == b"code 4\0"
    set_version(monkeypatch, 13, 1)
    assert kept(A=1) == b"code 5\0"
    source = driver._source
    monkeypatch.setattr(driver, "_source", lambda name: source(name) + b"// changed" * name.endswith(".h"))
    assert kept(A=1) == b"code 6\0"


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: b"", lambda data: data[:-2] + b"9\0"])
def test_damaged_code_is_compiled_again(damage, compiled, tmp_path):
    kept()
    (file,) = tmp_path.rglob("*.cubin")
    file.write_bytes(damage(file.read_bytes()))
    assert kept() == kept() == b"code 2\0"


def test_a_folder_that_cannot_be_written(compiled, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setattr(disk_cache, "cache_root", lambda: tmp_path / "file")
    assert kept() == b"code 1\0" and kept() == b"code 2\0"
