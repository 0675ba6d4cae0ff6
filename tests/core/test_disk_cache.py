"""Files kept between runs: written whole or not at all, and nothing fails without them."""

from __future__ import annotations

from pathlib import Path

import pytest

from lamella_core import disk_cache


def test_where_files_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LAMELLA_CACHE_DIR", str(tmp_path))
    assert disk_cache.cache_root() == tmp_path
    monkeypatch.delenv("LAMELLA_CACHE_DIR")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert disk_cache.cache_root() == tmp_path / ".cache" / "lamella"


def test_without_a_home_nothing_is_kept(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("LAMELLA_CACHE_DIR", raising=False)
    monkeypatch.setattr(Path, "home", nowhere)
    path = disk_cache.cache_root() / "file"
    with caplog.at_level("INFO"):
        disk_cache.write(path, b"data")
    assert disk_cache.read(path) is None and "LAMELLA_CACHE_DIR" in caplog.text


def test_what_was_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    assert disk_cache.read(path) is None
    disk_cache.write(path, b"first")
    disk_cache.write(path, b"second")
    assert disk_cache.read(path) == b"second"
    assert [other.name for other in path.parent.iterdir()] == ["file"]


def test_folders_that_cannot_be_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("not a folder")
    with caplog.at_level("INFO"):
        disk_cache.write(tmp_path / "file" / "x", b"data")
    assert "x is not kept" in caplog.text and "LAMELLA_CACHE_DIR" in caplog.text
    assert disk_cache.read(tmp_path / "file" / "x") is None


def test_an_interrupted_write_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        disk_cache.write(tmp_path / "file", b"data")
    assert not list(tmp_path.iterdir())


def test_parts_do_not_run_together() -> None:
    assert disk_cache.digest("ab", "c") != disk_cache.digest("a", "bc")
    assert disk_cache.digest("ab", b"c") == disk_cache.digest(b"ab", "c")
