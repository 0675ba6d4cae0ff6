"""Which directories hold a tokenizer that `transformers` has no class for, and what each family is made of.

A family is chosen by the name of the tokenizer class that its repository brings, which is never imported, and by the
vocabulary file that is there. Special tokens, prefixes and formats are those that the published code uses.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lamella.tokenizers import chat_formats
from lamella.tokenizers.byte_level import ByteLevelVocabulary
from lamella.tokenizers.declarations import Declarations
from lamella.tokenizers.family_tokenizer import FamilyTokenizer, Traits
from lamella.tokenizers.ice_text import SPECIAL_TOKENS, IceTextVocabulary
from lamella.tokenizers.sentencepiece_file import SentencePieceVocabulary
from lamella.tokenizers.tiktoken_file import TiktokenVocabulary
from lamella.tokenizers.vocabulary import Vocabulary
from lamella_core.errors import ConfigError

_WORDS = (  # {digits}: how many of them make one word
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_END_OF_TEXT = "<|endoftext|>"
_ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
_MASKS = ("[MASK]", "[gMASK]", "[sMASK]")
_GLM4_MEDIA = ("<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>")
_BAICHUAN_ROLE_IDS = (195, 196)  # of user and assistant, unless generation_config.json has others


@dataclass(frozen=True)
class _Family:
    classes: tuple[str, ...]
    file: str  # its vocabulary
    make: Callable[[Declarations], FamilyTokenizer]

    @property
    def is_known_by_file(self) -> bool:
        return self.file not in ("tokenizer.model", "vocab.json")


def load_family_tokenizer(directory: Path) -> FamilyTokenizer | None:
    """Returns the tokenizer of a directory of one of the families here, or None.

    Raises:
        ConfigError: the vocabulary is missing, damaged, or needs a library that is not installed.
    """
    declared = Declarations(directory)
    name = declared.class_name
    families = [f for f in _FAMILIES if (name in f.classes if name else f.is_known_by_file)]
    for family in families:
        if (directory / family.file).is_file():
            return family.make(declared)
    if name is None or not families or (directory / "tokenizer.json").is_file():
        return None
    files = " or ".join(family.file for family in families)
    raise ConfigError(f"{directory} names the tokenizer class {name}, but has no {files}; copy that file too")


def _number(vocabulary: Vocabulary, names: tuple[str, ...]) -> dict[str, int]:
    """Returns the tokens that follow those of the vocabulary file."""
    return {name: vocabulary.size + i for i, name in enumerate(names)}


def _qwen(declared: Declarations) -> FamilyTokenizer:
    vocabulary = TiktokenVocabulary(declared.directory / "qwen.tiktoken", _WORDS.format(digits=""), normalization="NFC")
    extra = tuple(f"<|extra_{i}|>" for i in range(205))
    traits = Traits(
        tokens={**_number(vocabulary, (_END_OF_TEXT, "<|im_start|>", "<|im_end|>", *extra)), **declared.added},
        bos=_END_OF_TEXT, eos=_END_OF_TEXT, pad=_END_OF_TEXT,
        chat=chat_formats.chatml(default_system="You are a helpful assistant."),
        turn_ends=("<|im_end|>", "<|im_start|>"),
    )  # fmt: skip
    return FamilyTokenizer(declared, vocabulary, traits)


def _glm4(declared: Declarations) -> FamilyTokenizer:
    vocabulary = TiktokenVocabulary(declared.directory / "tokenizer.model", _WORDS.format(digits="{1,3}"))
    names = (_END_OF_TEXT, *_MASKS, "<sop>", "<eop>", *_ROLES, *_GLM4_MEDIA)
    traits = Traits(
        tokens={**_number(vocabulary, names), **declared.added},
        eos=_END_OF_TEXT, pad=_END_OF_TEXT, prefix=("[gMASK]", "<sop>"),
        chat=chat_formats.role_tokens("[gMASK]<sop>"),
        turn_ends=("<|user|>", "<|observation|>"),
    )  # fmt: skip
    return FamilyTokenizer(declared, vocabulary, traits)


def _chatglm(declared: Declarations) -> FamilyTokenizer:
    offset = int(declared.config.get("num_image_tokens", 20000))
    vocabulary = IceTextVocabulary(declared.directory / "ice_text.model", offset)
    names = ("<unk>", "<pad>", "</s>", *SPECIAL_TOKENS)
    traits = Traits(
        tokens={**declared.required(vocabulary, SPECIAL_TOKENS), **declared.known(vocabulary, names)},
        bos="<sop>", eos="<eop>", pad="<pad>",
        suffix=("[gMASK]", "<sop>"), chat=chat_formats.chatglm,
    )  # fmt: skip
    return FamilyTokenizer(declared, vocabulary, traits)


def _chatglm2(declared: Declarations) -> FamilyTokenizer:
    vocabulary = SentencePieceVocabulary(declared.directory / "tokenizer.model")
    is_third = _is_chatglm3(declared)
    names = (*_MASKS, "sop", "eop", *(_ROLES if is_third else ()))
    third = chat_formats.role_tokens("[gMASK]sop", content_prefix=" ")
    traits = Traits(
        tokens={**declared.required(vocabulary, ("<s>", "</s>", "<unk>")), **_number(vocabulary, names)},
        bos="<s>", eos="</s>", pad="<unk>", prefix=("[gMASK]", "sop"),
        chat=third if is_third else chat_formats.chatglm2,
        turn_ends=("<|user|>", "<|observation|>") if is_third else (),
    )  # fmt: skip
    return FamilyTokenizer(declared, vocabulary, traits)


def _is_chatglm3(declared: Declarations) -> bool:
    """Whether a directory is of ChatGLM3, which alone has tokens for roles; class, file and sizes are ChatGLM2's too.

    Only a mention of those tokens or a name can tell, that of the directory last.
    """
    if "<|assistant|>" in json.dumps([declared.config, declared.added, declared.template]):
        return True
    path = declared.directory.absolute()
    folder = path.parent.parent if path.parent.name == "snapshots" else path  # as the hub's cache has it
    names = (declared.read("config.json").get("_name_or_path"), declared.config.get("name_or_path"), folder.name)
    numbers = re.findall(r"chatglm(\d)", " ".join(map(str, names)).lower())
    return numbers[:1] == ["3"]


def _baichuan(declared: Declarations) -> FamilyTokenizer:
    vocabulary = SentencePieceVocabulary(declared.directory / "tokenizer.model")
    generation = declared.read("generation_config.json")
    ids = (generation.get(f"{who}_token_id", i) for who, i in zip(("user", "assistant"), _BAICHUAN_ROLE_IDS))
    user, assistant = (vocabulary.piece(i) for i in ids)
    if not (user.startswith("<reserved_") and assistant.startswith("<reserved_")):
        return _llama_like(declared, vocabulary)
    # The first Baichuan, where these two are named <reserved_102> and <reserved_103>, ends its answers.
    answer_end = str(declared.token("eos", "</s>")) if assistant == "<reserved_103>" else ""
    return _llama_like(
        declared, vocabulary, names=(user, assistant), chat=chat_formats.baichuan(user, assistant, answer_end)
    )


def _internlm(declared: Declarations) -> FamilyTokenizer:
    vocabulary = SentencePieceVocabulary(declared.directory / "tokenizer.model")
    bos = str(declared.token("bos", "<s>"))
    names = tuple(declared.known(vocabulary, ("<eoa>", "<eoh>", "<|im_start|>", "<|im_end|>")))
    if "<|im_end|>" in names:
        return _llama_like(declared, vocabulary, names, chat_formats.chatml(bos=bos), ("<|im_end|>",))
    if "<eoa>" in names:
        return _llama_like(declared, vocabulary, names, chat_formats.internlm(bos), ("<eoa>",))
    return _llama_like(declared, vocabulary)


def _llama_like(
    declared: Declarations,
    vocabulary: SentencePieceVocabulary,
    names: tuple[str, ...] = (),
    chat: chat_formats.ChatFormat | None = None,
    turn_ends: tuple[str, ...] = (),
) -> FamilyTokenizer:
    """Returns a tokenizer that puts bos in front and eos behind as the directory says.

    Args:
        declared: what the directory says.
        vocabulary: its pieces.
        names: further special tokens among them.
        chat: see `Traits`.
        turn_ends: see `Traits`.
    """
    bos, eos, unk = (str(declared.token(*role)) for role in (("bos", "<s>"), ("eos", "</s>"), ("unk", "<unk>")))
    pad = declared.token("pad")
    traits = Traits(
        tokens={**declared.known(vocabulary, (*names, pad, unk)), **declared.required(vocabulary, (bos, eos))},
        bos=bos, eos=eos, pad=pad,
        prefix=(bos,) if declared.config.get("add_bos_token", True) else (),
        suffix=(eos,) if declared.config.get("add_eos_token", False) else (),
        chat=chat, turn_ends=turn_ends,
    )  # fmt: skip
    return FamilyTokenizer(declared, vocabulary, traits)


def _glm(declared: Declarations, vocabulary: Vocabulary) -> FamilyTokenizer:
    eos, cls = str(declared.token("eos", _END_OF_TEXT)), str(declared.token("cls", "[CLS]"))
    pad = str(declared.token("pad", eos))
    required = (eos, cls, pad, *_MASKS, "<|startofpiece|>", "<|endofpiece|>")
    traits = Traits(
        tokens={**declared.known(vocabulary, (declared.token("unk"),)), **declared.required(vocabulary, required)},
        eos=eos, pad=pad, prefix=(cls,), suffix=(eos, "<|startofpiece|>"),
        masks=("[gMASK]", "[MASK]", "[sMASK]"), turn_ends=("<|endofpiece|>",),
    )  # fmt: skip
    return FamilyTokenizer(declared, vocabulary, traits)


def _glm_english(declared: Declarations) -> FamilyTokenizer:
    space = bool(declared.config.get("add_prefix_space", False))
    return _glm(declared, ByteLevelVocabulary(declared.directory, add_prefix_space=space))


def _glm_chinese(declared: Declarations) -> FamilyTokenizer:
    return _glm(declared, SentencePieceVocabulary(declared.directory / "cog-pretrain.model"))


_FAMILIES = (
    _Family(("QWenTokenizer",), "qwen.tiktoken", _qwen),
    _Family(("ChatGLM4Tokenizer",), "tokenizer.model", _glm4),
    _Family(("ChatGLMTokenizer",), "ice_text.model", _chatglm),
    _Family(("ChatGLMTokenizer",), "tokenizer.model", _chatglm2),
    _Family(("BaichuanTokenizer", "BaiChuanTokenizer"), "tokenizer.model", _baichuan),
    _Family(("InternLMTokenizer", "InternLM2Tokenizer", "InternLM3Tokenizer"), "tokenizer.model", _internlm),
    _Family(("GLMGPT2Tokenizer",), "vocab.json", _glm_english),
    _Family(("GLMChineseTokenizer",), "cog-pretrain.model", _glm_chinese),
)
