"""Families' tokenizers: whose chat template counts, what is refused, and that engines take the vocabulary along."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.support.family_tokenizers import HELLO, SYSTEM, baichuan, chatglm, family, glm4, qwen
from tests.support.vocabularies import write_tiktoken

from lamella import LLM, SamplingParams
from lamella.cli.generate import run_generate
from lamella.tokenizer import TransformersTokenizer
from lamella.tokenizer_loading import load_tokenizer
from lamella_core.engine.writer import has_tokenizer
from lamella_core.errors import ConfigError, RequestError


def test_the_directory_s_own_template_wins(tmp_path: Path):
    tokenizer = qwen(tmp_path)
    named = [{"name": "default", "template": "{{ eos_token }}{{ messages[0]['content'] }}"}]
    for template in (named[0]["template"], named):
        tokenizer = family(tmp_path, "QWenTokenizer", chat_template=template)
        assert tokenizer.apply_chat_template(HELLO) == "<|endoftext|>Hi 你好"
    (tmp_path / "chat_template.jinja").write_text("{% for t in tools %}{{ t['a'] }}{% endfor %}{{ messages[0].x.y }}")
    tokenizer = load_tokenizer(None, model_dir=tmp_path)
    with pytest.raises(RequestError, match="cannot render"):
        tokenizer.apply_chat_template(HELLO)
    assert tokenizer.apply_chat_template(HELLO, chat_template="{{ tools[0]['a'] }}", tools=[{"a": "b"}]) == "b"


@pytest.mark.parametrize(
    ("messages", "match"),
    [
        ("hello", "list of dicts"),
        ([], "list of dicts"),
        ([{"role": "user"}], r"messages\[0\].*'content'"),
        ([{"role": "user", "content": [{"type": "text"}]}], r"messages\[0\].*strings"),
        ([SYSTEM, *HELLO], "role 'system'.*user, assistant"),
        ([*HELLO, *HELLO], r"messages\[1\].*the assistant's turn"),
        ([{"role": "user", "content": "a", "tools": [1]}], "tools"),
    ],
)
def test_bad_conversations(messages: Any, match: str, tmp_path: Path):
    with pytest.raises(RequestError, match=match):
        chatglm(tmp_path).apply_chat_template(messages)


def test_built_in_formats_refuse_what_they_do_not_write(tmp_path: Path):
    with pytest.raises(RequestError, match="takes no tools"):
        qwen(tmp_path).apply_chat_template(HELLO, tools=[{}])
    with pytest.raises(RequestError, match="role 'tool'"):
        glm4(tmp_path).apply_chat_template([{"role": "tool", "content": ""}])


@pytest.mark.parametrize(("name", "make"), [("tiktoken", qwen), ("sentencepiece", baichuan)])
def test_a_missing_library_is_named(name: str, make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    make(tmp_path)  # its vocabulary is made with the library
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=rf"needs the {name} library.*lamella\[tokenizers\]"):
        make(tmp_path)


@pytest.mark.parametrize(
    ("class_name", "file", "content", "match"),
    [
        ("QWenTokenizer", "qwen.tiktoken", b"version https://git-lfs", "no tiktoken vocabulary.*version"),
        ("QWenTokenizer", "qwen.tiktoken", b"IQ== 0\n", "no token for 255 of the 256 bytes"),
        ("ChatGLM4Tokenizer", "tokenizer.model", b"\x0a\xff\xfe", "no tiktoken vocabulary"),
        ("BaichuanTokenizer", "tokenizer.model", b"version https://git-lfs", "no sentencepiece vocabulary"),
        ("BaichuanTokenizer", "tokenizer.model", b"", "no sentencepiece vocabulary.*empty"),
        ("QWenTokenizer", "tokenizer.model", b"", "QWenTokenizer, but has no qwen.tiktoken"),
        ("ChatGLMTokenizer", "vocab.json", b"", "has no ice_text.model or tokenizer.model"),
        ("GLMGPT2Tokenizer", "vocab.json", b"{}", "vocab.json and merges.txt"),
    ],
)
def test_damaged_and_missing_files(class_name: str, file: str, content: bytes, match: str, tmp_path: Path):
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ConfigError, match=match):
        family(tmp_path, class_name)


@pytest.mark.parametrize(
    ("config", "match"),
    [({"added_tokens_decoder": {"x": {"content": "a"}}}, "a number with a content"), (["list"], "not an object")],
)
def test_damaged_configuration(config: Any, match: str, tmp_path: Path):
    write_tiktoken(tmp_path / "qwen.tiktoken")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=match):
        load_tokenizer(None, model_dir=tmp_path)


def test_a_complete_tokenizer_json_serves_where_the_vocabulary_is_missing(model_dir: Path, tmp_path: Path):
    shutil.copy(model_dir / "tokenizer.json", tmp_path)
    shutil.copy(model_dir / "config.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "InternLM2Tokenizer"}')
    assert isinstance(load_tokenizer(None, model_dir=tmp_path), TransformersTokenizer)


def test_an_engine_takes_its_vocabulary_along(model_dir: Path, tmp_path: Path):
    source = tmp_path / "tokenizer"
    source.mkdir()
    expected = qwen(source).encode("a fox")
    with LLM(model_dir, tokenizer=str(source), max_batch_size=1) as llm:
        assert llm.generate("a fox").prompt_token_ids == expected
        llm.save(tmp_path / "engine")
    assert {"qwen.tiktoken", "tokenizer_config.json"} <= {path.name for path in (tmp_path / "engine").iterdir()}
    assert load_tokenizer(None, model_dir=tmp_path / "engine").encode("a fox") == expected


def test_chat_on_the_command_line_stops_at_the_end_of_a_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    sent = []

    class Recorded(Exception):
        pass

    class Recorder:
        tokenizer = qwen(tmp_path)

        def __init__(self, *args: Any) -> None:
            pass

        def __enter__(self) -> Recorder:
            return self

        def __exit__(self, *error: object) -> None:
            pass

        def generate_async(self, *request: Any, streaming: bool) -> None:
            sent.append(request)
            raise Recorded

    monkeypatch.setattr("lamella.cli.generate.LLM", Recorder)
    with pytest.raises(Recorded):
        run_generate("model", ["Why?"], SamplingParams(add_special_tokens=False), chat=True, tokenizer=None)
    text, params = sent[0]
    assert text.endswith("<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n")
    assert tuple(params.stop_token_ids) == Recorder.tokenizer.turn_end_token_ids


@pytest.mark.parametrize("name", ["qwen.tiktoken", "ice_text.model", "cog-pretrain.model", "tokenizer.model"])
def test_each_vocabulary_file_is_a_tokenizer(name: str, tmp_path: Path):
    (tmp_path / name).touch()
    assert has_tokenizer(tmp_path)
