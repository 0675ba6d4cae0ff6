"""The references by architecture."""

from __future__ import annotations

from tests.references.baichuan import Baichuan, Baichuan7B
from tests.references.base import Reference
from tests.references.chatglm import ChatGLM, ChatGLMConditional
from tests.references.chatglm1 import ChatGLM1
from tests.references.decilm import DeciLM
from tests.references.glm10b import GLM10B, GLM10BConditional
from tests.references.internlm import InternLM, InternLM2, InternLM3
from tests.references.mpt import MPT
from tests.references.phi3small import Phi3Small
from tests.references.qwen import QWen

_ALL = (
    Baichuan, Baichuan7B, ChatGLM, ChatGLM1, ChatGLMConditional, DeciLM, GLM10B, GLM10BConditional, InternLM, InternLM2,
    InternLM3, MPT, Phi3Small, QWen,
)  # fmt: skip
REFERENCES: dict[str, type[Reference]] = {cls.architecture: cls for cls in _ALL}
