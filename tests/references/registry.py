"""The references by architecture."""

from __future__ import annotations

from tests.references.baichuan import Baichuan, Baichuan7B
from tests.references.base import Reference
from tests.references.chatglm import ChatGLM, ChatGLMConditional
from tests.references.decilm import DeciLM
from tests.references.internlm import InternLM, InternLM2, InternLM3
from tests.references.mpt import MPT
from tests.references.qwen import QWen

_ALL = (Baichuan, Baichuan7B, ChatGLM, ChatGLMConditional, DeciLM, InternLM, InternLM2, InternLM3, MPT, QWen)
REFERENCES: dict[str, type[Reference]] = {cls.architecture: cls for cls in _ALL}
