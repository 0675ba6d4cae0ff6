"""How each family writes a conversation, for directories that hold no chat template of their own.

The formats are those that the families' published code builds. They take texts only: a message is a dict with a
``role``, a ``content`` and, where the format has a place for it, ``metadata``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lamella_core.errors import RequestError

Message = dict[str, Any]
# (messages, add_generation_prompt) -> text with its special tokens; the first has been checked by `check_messages`.
ChatFormat = Callable[[list[Message], bool], str]


def check_messages(messages: object) -> list[Message]:
    """Returns ``messages`` if they are a conversation of texts.

    Raises:
        RequestError: not a list of dicts with the texts ``role`` and ``content``, or empty.
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise RequestError(
            f"messages is {messages!r}; pass a list of dicts such as {{'role': 'user', 'content': '...'}}"
        )
    for i, message in enumerate(messages):
        for name in ("role", "content"):
            if not isinstance(message, dict) or not isinstance(message.get(name), str):
                raise RequestError(
                    f"messages[{i}] is {message!r}; it must be a dict with the strings 'role' and 'content'"
                )
        if message.get("tools") or message.get("tool_calls"):
            raise RequestError(f"messages[{i}] has tools, which the built-in chat format does not write")
    return list(messages)


def chatml(*, bos: str = "", default_system: str | None = None) -> ChatFormat:
    """Returns ChatML: Qwen (with a system message in front of every conversation) and InternLM 2 and 3."""

    def render(messages: list[Message], add_generation_prompt: bool) -> str:
        if default_system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": default_system}, *messages]
        turns = [f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages]
        return bos + "".join(turns) + ("<|im_start|>assistant\n" if add_generation_prompt else "")

    return render


def role_tokens(prefix: str, *, content_prefix: str = "") -> ChatFormat:
    """Returns the format of ChatGLM3 and GLM-4: a token for the role, metadata, a new line, the content.

    Args:
        prefix: in front of the conversation.
        content_prefix: in front of each content; ChatGLM3 encodes contents on their own, which gives them a space.
    """
    roles = ("system", "user", "assistant", "observation")

    def render(messages: list[Message], add_generation_prompt: bool) -> str:
        _check_roles(messages, roles)
        turns = [f"<|{m['role']}|>{m.get('metadata', '')}\n{content_prefix}{m['content']}" for m in messages]
        return prefix + "".join(turns) + ("<|assistant|>" if add_generation_prompt else "")

    return render


def chatglm(messages: list[Message], add_generation_prompt: bool) -> str:
    """ChatGLM-6B: numbered rounds from 0, or the bare question; the prompt ends with its mask."""
    rounds = _rounds(messages)
    turns = [f"[Round {i}]\n问：{question}\n答：{answer or ''}" for i, (question, answer) in enumerate(rounds)]
    text = rounds[0][0] if len(messages) == 1 else "\n".join(turns)
    return text + ("[gMASK]<sop>" if add_generation_prompt else "")


def chatglm2(messages: list[Message], add_generation_prompt: bool) -> str:
    """ChatGLM2-6B: numbered rounds from 1, behind the mask."""
    text = "[gMASK]sop"
    for i, (question, answer) in enumerate(_rounds(messages), start=1):
        text += f"[Round {i}]\n\n问：{question}\n\n" + (f"答：{answer}\n\n" if answer is not None else "")
    return text + ("答：" if add_generation_prompt else "")


def internlm(bos: str) -> ChatFormat:
    """Returns the format of InternLM 1, whose role names are plain text."""
    shapes = {"system": "<|System|>:{}\n", "user": "<|User|>:{}\n", "assistant": "<|Bot|>:{}<eoa>\n"}

    def render(messages: list[Message], add_generation_prompt: bool) -> str:
        _check_roles(messages, tuple(shapes))
        turns = [shapes[m["role"]].format(m["content"]) for m in messages]
        return bos + "".join(turns) + ("<|Bot|>:" if add_generation_prompt else "")

    return render


def baichuan(user: str, assistant: str, answer_end: str) -> ChatFormat:
    """Returns the format of Baichuan: the system's text bare, then reserved tokens as roles.

    Args:
        user: token in front of questions.
        assistant: token in front of answers.
        answer_end: behind each answer.
    """

    def render(messages: list[Message], add_generation_prompt: bool) -> str:
        _check_roles(messages, ("system", "user", "assistant"))
        shapes = {"system": ("", ""), "user": (user, ""), "assistant": (assistant, answer_end)}
        turns = [shapes[m["role"]][0] + m["content"] + shapes[m["role"]][1] for m in messages]
        return "".join(turns) + (assistant if add_generation_prompt else "")

    return render


def _check_roles(messages: list[Message], allowed: Sequence[str]) -> None:
    for i, message in enumerate(messages):
        if message["role"] not in allowed:
            raise RequestError(
                f"messages[{i}] has the role {message['role']!r}; this model's chat format has: {', '.join(allowed)}"
            )


def _rounds(messages: list[Message]) -> list[tuple[str, str | None]]:
    """Returns pairs of question and answer; the last one may have no answer yet.

    Raises:
        RequestError: other roles than user and assistant, or not in turn.
    """
    _check_roles(messages, ("user", "assistant"))
    for i, message in enumerate(messages):
        expected = ("user", "assistant")[i % 2]
        if message["role"] != expected:
            raise RequestError(
                f"messages[{i}] has the role {message['role']!r}; in this chat format it is the {expected}'s turn"
            )
    questions = [m["content"] for m in messages[::2]]
    answers: list[str | None] = [m["content"] for m in messages[1::2]]
    return list(zip(questions, [*answers, None]))
