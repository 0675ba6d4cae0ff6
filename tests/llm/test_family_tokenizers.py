"""Tokenizers read from vocabulary files: ids equal tiktoken's and sentencepiece's, specials and chats are by hand."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tiktoken
from tests.support.family_tokenizers import (
    HELLO,
    ICE_FIRST,
    MAKERS,
    SYSTEM,
    TALK,
    chatglm,
    chatglm3,
    family,
    from_sentencepiece,
    glm4,
    glm_english,
    internlm2,
    qwen,
)
from tests.support.vocabularies import byte_level_bpe, sentencepiece_model, tiktoken_ranks, write_tiktoken

from lamella.detokenizer import IncrementalDecoder
from lamella.tokenizer_loading import load_tokenizer
from lamella_core.errors import ConfigError

TEXTS = (
    "Once upon a fox",
    "  two  blanks\n\nand 12345 lines\t!",
    "你好，世界 naïve 😀👩\u200d🚀",
    "it's philosophy\n",
    " ",
    "",
)
# The patterns as published with the models.
QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GLM4_PATTERN = QWEN_PATTERN.replace(r"\p{N}| ", r"\p{N}{1,3}| ")


@pytest.mark.parametrize("make", MAKERS)
def test_texts_survive_and_stream(make: Any, tmp_path: Path):
    tokenizer = make(tmp_path)
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids) == text
        decoder = IncrementalDecoder(tokenizer)
        for token_id in [*ids, *([tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else [])]:
            before = decoder.text
            decoder.push(token_id)
            assert decoder.text.startswith(before) and not decoder.text.endswith("\ufffd")
        decoder.finish()
        assert decoder.text == text
    with_specials = tokenizer.encode("a fox")
    assert tokenizer.decode(with_specials) == "a fox"
    assert tokenizer.encode(tokenizer.decode(with_specials, skip_special_tokens=False), False) == with_specials
    assert tokenizer.decode([10**6, *tokenizer.encode("a fox", False)]) == "a fox"
    assert tokenizer.convert_ids_to_tokens([10**6]) == [""]
    assert {tokenizer.eos_token_id, *tokenizer.turn_end_token_ids} <= tokenizer.special_token_ids


def test_qwen(tmp_path: Path):
    tokenizer = qwen(tmp_path)
    first = len(tiktoken_ranks())
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205))]
    specials = {name: first + i for i, name in enumerate(names)}
    direct = tiktoken.Encoding("q", pat_str=QWEN_PATTERN, mergeable_ranks=tiktoken_ranks(), special_tokens=specials)
    for text in (*TEXTS, "a<|im_start|>b<|extra_204|><|extra_2|>", "cafe\u0301"):
        normal = unicodedata.normalize("NFC", text)
        assert tokenizer.encode(text) == direct.encode(normal, allowed_special="all")
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == tokenizer.pad_token_id == first
    assert tokenizer.turn_end_token_ids == (first + 2, first + 1)
    assert tokenizer.special_token_ids == set(specials.values())
    ids = [*tokenizer.encode("fox"), first + 2]
    assert tokenizer.decode(ids) == "fox" and tokenizer.decode(ids, skip_special_tokens=False) == "fox<|im_end|>"
    assert tokenizer.convert_ids_to_tokens([0xE4, ord("a"), first + 2]) == ["\\xe4", "a", "<|im_end|>"]
    assert tokenizer.apply_chat_template(TALK) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nHi 你好<|im_end|>\n"
        "<|im_start|>assistant\nA fox.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    )
    own = tokenizer.apply_chat_template([SYSTEM, *HELLO], add_generation_prompt=False)
    assert own == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi 你好<|im_end|>\n"
    ids = tokenizer.apply_chat_template(HELLO, tokenize=True)
    assert ids[0] == first + 1 and ids.count(first + 2) == 2


def test_qwen_is_known_by_its_file(tmp_path: Path):
    write_tiktoken(tmp_path / "qwen.tiktoken")
    assert family(tmp_path, None).turn_end_token_ids


def test_glm4(tmp_path: Path):
    tokenizer = glm4(tmp_path)
    first = len(tiktoken_ranks())
    direct = tiktoken.Encoding("g", pat_str=GLM4_PATTERN, mergeable_ranks=tiktoken_ranks(), special_tokens={})
    for text in TEXTS:
        assert tokenizer.encode(text) == [first + 2, first + 4, *direct.encode_ordinary(text)]
    assert tokenizer.encode("159") != qwen_ids("159")  # three digits may be one word here
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (None, first, first)
    assert tokenizer.turn_end_token_ids == (first + 7, first + 9)
    assert tokenizer.convert_ids_to_tokens([first + 1, first + 3, first + 13]) == [
        "[MASK]",
        "[sMASK]",
        "<|end_of_video|>",
    ]
    text = tokenizer.apply_chat_template([SYSTEM, *TALK])
    assert text == (
        "[gMASK]<sop><|system|>\nBe brief.<|user|>\nHi 你好<|assistant|>\nA fox.<|user|>\nWhy?<|assistant|>"
    )
    ids = tokenizer.apply_chat_template(HELLO, tokenize=True)
    assert ids == [first + 2, first + 4, first + 7, *direct.encode_ordinary("\nHi 你好"), first + 8]


def qwen_ids(text: str) -> list[int]:
    return tiktoken.Encoding(
        "q", pat_str=QWEN_PATTERN, mergeable_ranks=tiktoken_ranks(), special_tokens={}
    ).encode_ordinary(text)


def test_chatglm_numbers_what_its_first_file_lacks(tmp_path: Path):
    tokenizer = chatglm(tmp_path)
    direct = sentencepiece.SentencePieceProcessor(model_proto=ICE_FIRST)
    first = 20000 + direct.get_piece_size()  # the image tokens, then the file's; [MASK] comes next
    gmask, sop, eop, tab, blank_2, byte_0 = first + 1, first + 4, first + 5, first + 8, first + 9, first + 88
    words = [20000 + i for i in direct.encode("a fox")]
    assert tokenizer.encode("a fox") == [*words, gmask, sop]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (sop, eop, 20003)
    newline = 20000 + direct.piece_to_id("<n>")
    ids = tokenizer.encode("a\n\tfox   ran😀", add_special_tokens=False)
    assert [i for i in ids if i >= first or i == newline] == [
        newline, tab, blank_2 + 1, *(byte_0 + byte for byte in "😀".encode())
    ]  # fmt: skip
    assert tokenizer.convert_ids_to_tokens([7, blank_2 + 78, byte_0 + 255]) == ["<image_7>", "<|blank_80|>", "<0xFF>"]
    assert tokenizer.decode(tokenizer.encode(" " * 200)) == " " * 200
    assert tokenizer.decode([7, *words]) == "a fox"
    assert tokenizer.apply_chat_template(HELLO) == "Hi 你好[gMASK]<sop>"
    assert tokenizer.apply_chat_template(TALK) == (
        "[Round 0]\n问：Hi 你好\n答：A fox.\n[Round 1]\n问：Why?\n答：[gMASK]<sop>"
    )
    assert tokenizer.apply_chat_template(HELLO, tokenize=True)[-2:] == [gmask, sop]


def test_chatglm_reads_its_later_file(tmp_path: Path):
    blanks = tuple(f"<|blank_{n}|>" for n in range(2, 81))
    masks = ("[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>")
    content = sentencepiece_model(user_defined=("<n>", "<|tab|>", *blanks), control=masks, pad_id=3)
    tokenizer, direct = from_sentencepiece(tmp_path, "ChatGLMTokenizer", content, "ice_text.model", num_image_tokens=0)
    expected = [*direct.encode("a<n><|tab|>b<|blank_3|>c😀"), *map(direct.piece_to_id, ("[gMASK]", "<sop>"))]
    assert tokenizer.encode("a\n\tb   c😀") == expected
    assert tokenizer.decode(expected) == "a\n\tb   c😀"


def test_chatglm2_and_3(tmp_path: Path):
    content = sentencepiece_model()
    second, direct = from_sentencepiece(tmp_path, "ChatGLMTokenizer", content)
    first = direct.get_piece_size()  # [MASK], [gMASK], [sMASK], sop, eop and, in the third, the roles
    for text in TEXTS:
        assert second.encode(text) == [first + 1, first + 3, *direct.encode(text)]
    assert (second.bos_token_id, second.eos_token_id, second.pad_token_id) == (1, 2, 0)
    assert first + 3 not in second.encode("philosophy sop [gMASK] sop", add_special_tokens=False)
    assert second.encode("[gMASK]sop", add_special_tokens=False) == [first + 1, first + 3]
    assert second.apply_chat_template(TALK) == (
        "[gMASK]sop[Round 1]\n\n问：Hi 你好\n\n答：A fox.\n\n[Round 2]\n\n问：Why?\n\n答："
    )
    assert second.special_token_ids == {0, 1, 2, *range(first, first + 5)}
    third = chatglm3(tmp_path)
    assert third.turn_end_token_ids == (first + 6, first + 8)
    expected = [
        first + 1, first + 3, first + 5, *direct.encode("\n"), *direct.encode("Be brief."), first + 6,
        *direct.encode("\n"), *direct.encode("Hi 你好"), first + 7, *direct.encode("interpreter\n"),
        *direct.encode("x"), first + 7,
    ]  # fmt: skip
    talk = [SYSTEM, *HELLO, {"role": "assistant", "metadata": "interpreter", "content": "x"}]
    assert third.apply_chat_template(talk, tokenize=True) == expected


@pytest.mark.parametrize(
    ("path", "model_name", "config", "is_third"),
    [
        ("chatglm2-6b", None, {}, False),
        ("chatglm3-6b", None, {}, True),
        ("models--THUDM--chatglm3-6b/snapshots/0a1b", None, {}, True),
        ("chatglm3-6b", "THUDM/chatglm2-6b", {}, False),
        ("model", None, {"name_or_path": "THUDM/chatglm-6b"}, False),
        ("model", None, {"additional_special_tokens": ["<|user|>", "<|assistant|>"]}, True),
    ],
)
def test_chatglm3_is_told_from_2(path: str, model_name: str | None, config: dict, is_third: bool, tmp_path: Path):
    directory = tmp_path / path
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps({"_name_or_path": model_name}))
    tokenizer, _ = from_sentencepiece(directory, "ChatGLMTokenizer", sentencepiece_model(), **config)
    assert bool(tokenizer.turn_end_token_ids) == is_third


def test_baichuan(tmp_path: Path):
    reserved = tuple(f"<reserved_{i}>" for i in (106, 107, 102, 103))
    content = sentencepiece_model(user_defined=reserved)
    (tmp_path / "generation_config.json").write_text(json.dumps({"user_token_id": 3, "assistant_token_id": 4}))
    second, direct = from_sentencepiece(tmp_path, "BaichuanTokenizer", content, add_bos_token=False)
    for text in TEXTS:
        assert second.encode(text) == direct.encode(text)
    assert second.apply_chat_template([SYSTEM, *TALK]) == (
        "Be brief.<reserved_106>Hi 你好<reserved_107>A fox.<reserved_106>Why?<reserved_107>"
    )
    ids = second.apply_chat_template(HELLO, tokenize=True)
    assert ids == [3, *direct.encode("Hi 你好"), 4] and second.decode(ids) == "Hi 你好"
    (tmp_path / "generation_config.json").write_text(json.dumps({"user_token_id": 5, "assistant_token_id": 6}))
    pad = {"content": "<unk>", "lstrip": False}
    one, _ = from_sentencepiece(tmp_path, "BaiChuanTokenizer", content, add_eos_token=True, pad_token=pad)
    assert one.encode("a fox") == [1, *direct.encode("a fox"), 2]
    assert (one.bos_token_id, one.eos_token_id, one.pad_token_id) == (1, 2, 0)
    assert one.apply_chat_template(TALK) == (
        "<reserved_102>Hi 你好<reserved_103>A fox.</s><reserved_102>Why?<reserved_103>"
    )
    (tmp_path / "generation_config.json").unlink()
    base, _ = from_sentencepiece(tmp_path, "BaichuanTokenizer", content)
    with pytest.raises(ConfigError, match="no chat template"):
        base.apply_chat_template(HELLO)


def test_internlm(tmp_path: Path):
    content = sentencepiece_model(user_defined=("<eoh>", "<eoa>"))
    tokenizer, direct = from_sentencepiece(tmp_path, "InternLMTokenizer", content, pad_token="</s>")
    assert tokenizer.encode("a fox 😀") == [1, *direct.encode("a fox 😀")]
    assert (tokenizer.pad_token_id, tokenizer.turn_end_token_ids) == (2, (4,))
    assert tokenizer.apply_chat_template([SYSTEM, *TALK]) == (
        "<s><|System|>:Be brief.\n<|User|>:Hi 你好\n<|Bot|>:A fox.<eoa>\n<|User|>:Why?\n<|Bot|>:"
    )
    assert tokenizer.apply_chat_template(TALK, tokenize=True).count(4) == 1
    assert tokenizer.decode([5, 3, 4]) == direct.decode([5])


def test_internlm2(tmp_path: Path):
    tokenizer = internlm2(tmp_path)
    text = tokenizer.apply_chat_template(HELLO)
    assert text == "<s><|im_start|>user\nHi 你好<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert ids[:2] == [1, 4] and ids.count(3) == 1
    assert tokenizer.convert_ids_to_tokens([3, 4]) == ["<|im_end|>", "<|im_start|>"]
    assert tokenizer.turn_end_token_ids == (3,)
    plain = {3: {"content": "<|im_end|>", "special": False}}
    tokenizer = family(tmp_path, "InternLM3TokenizerFast", added_tokens_decoder=plain)
    assert tokenizer.decode([3]) == "<|im_end|>" and 3 not in tokenizer.special_token_ids


def test_glm_in_english_and_chinese(tmp_path: Path):
    english = glm_english(tmp_path)
    words = [byte_level_bpe()[0][piece] for piece in english.convert_ids_to_tokens(english.encode("a fox", False))]
    assert english.encode("a fox") == [1001, *words, 1003, 1000, 1005]
    assert english.encode("a fox[MASK]") == [1001, *words, 1002, 1000, 1005]
    assert (english.eos_token_id, english.pad_token_id, english.turn_end_token_ids) == (1000, 1000, (1006,))
    (tmp_path / "vocab.json").unlink()
    chinese, direct = from_sentencepiece(tmp_path, "GLMChineseTokenizer", sentencepiece_model(), "cog-pretrain.model")
    assert chinese.encode("你好[gMASK]") == [1001, *direct.encode("你好"), 1003, 1000, 1005]
    (tmp_path / "added_tokens.json").unlink()
    with pytest.raises(ConfigError, match=r"no token .*\[CLS\].*added_tokens.json"):
        load_tokenizer(None, model_dir=tmp_path)
