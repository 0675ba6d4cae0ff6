"""detect_format: which kind of directory a path is, and what to tell the user otherwise."""

from __future__ import annotations

from pathlib import Path

import pytest

from lamella_core.checkpoint.formats import detect_format
from lamella_core.errors import CheckpointError


def test_the_three_kinds(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert detect_format(tmp_path) == "hugging_face"
    (tmp_path / "config.json").write_text('{"lamella_checkpoint": 1}')
    assert detect_format(str(tmp_path)) == "checkpoint"
    (tmp_path / "engine.json").write_text("{}")  # beside a config.json that came with the tokenizer
    assert detect_format(tmp_path) == "engine"


def test_what_is_none_of_them(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"neither engine\.json .* nor config\.json"):
        detect_format(tmp_path)
    with pytest.raises(CheckpointError, match="does not exist"):
        detect_format(tmp_path / "none")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file"):
        detect_format(tmp_path / "file")
    for text in ("{", "[]", "\xff"):
        (tmp_path / "config.json").write_text(text, encoding="latin-1")
        with pytest.raises(CheckpointError, match=r"config\.json is damaged"):
            detect_format(tmp_path)
