"""Directories with tiny tokenizers of families that `transformers` has no class for, loaded as users do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import sentencepiece
from tests.support.vocabularies import sentencepiece_model, write_byte_level, write_tiktoken

from lamella.tokenizer import TokenizerBase
from lamella.tokenizer_loading import load_tokenizer

SYSTEM = {"role": "system", "content": "Be brief."}
HELLO = [{"role": "user", "content": "Hi 你好"}]
TALK = [*HELLO, {"role": "assistant", "content": "A fox."}, {"role": "user", "content": "Why?"}]


def family(directory: Path, class_name: str | None, **config: Any) -> TokenizerBase:
    """Loads the tokenizer of a directory whose vocabulary is there, with this tokenizer_config.json."""
    if class_name is not None:
        entry = {"auto_map": {"AutoTokenizer": [f"tokenization_own.{class_name}", None]}}
        (directory / "tokenizer_config.json").write_text(json.dumps({**entry, **config}))
    return load_tokenizer(None, model_dir=directory)


def from_sentencepiece(
    directory: Path, class_name: str, content: bytes, name: str = "tokenizer.model", **config: Any
) -> tuple[TokenizerBase, Any]:
    """Returns the tokenizer of a directory with this model, and the model as sentencepiece reads it."""
    (directory / name).write_bytes(content)
    return family(directory, class_name, **config), sentencepiece.SentencePieceProcessor(model_proto=content)


def qwen(directory: Path) -> TokenizerBase:
    write_tiktoken(directory / "qwen.tiktoken")
    return family(directory, "QWenTokenizer")


def glm4(directory: Path) -> TokenizerBase:
    write_tiktoken(directory / "tokenizer.model")
    return family(directory, "ChatGLM4Tokenizer")


def chatglm(directory: Path) -> TokenizerBase:
    return from_sentencepiece(directory, "ChatGLMTokenizer", ICE_FIRST, "ice_text.model")[0]


def chatglm3(directory: Path) -> TokenizerBase:
    return from_sentencepiece(
        directory, "ChatGLMTokenizer", sentencepiece_model(), name_or_path="THUDM/chatglm3-6b-base"
    )[0]


def baichuan(directory: Path) -> TokenizerBase:
    (directory / "tokenizer.model").write_bytes(sentencepiece_model())
    return family(directory, "BaichuanTokenizer")


def internlm2(directory: Path) -> TokenizerBase:
    content = sentencepiece_model(user_defined=("[UNUSED_TOKEN_145]", "[UNUSED_TOKEN_146]"))
    added = {3: {"content": "<|im_end|>", "special": True}, 4: {"content": "<|im_start|>", "special": True}}
    return from_sentencepiece(directory, "InternLM2Tokenizer", content, added_tokens_decoder=added)[0]


def glm_english(directory: Path) -> TokenizerBase:
    write_byte_level(directory)
    (directory / "added_tokens.json").write_text(json.dumps(GLM_ADDED))
    return family(
        directory, "GLMGPT2Tokenizer", eos_token="<|endoftext|>", cls_token="[CLS]", pad_token="<|endoftext|>"
    )


ICE_FIRST = sentencepiece_model(user_defined=("<n>",), byte_fallback=False, pad_id=3)
GLM_NAMES = ("<|endoftext|>", "[CLS]", "[MASK]", "[gMASK]", "[sMASK]", "<|startofpiece|>", "<|endofpiece|>")
GLM_ADDED = {name: 1000 + i for i, name in enumerate(GLM_NAMES)}
MAKERS = (qwen, glm4, chatglm, chatglm3, baichuan, internlm2, glm_english)
