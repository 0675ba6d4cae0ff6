"""References whose prompts are read in both directions: what they need to know of a sequence beside its tokens."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from tests.references.base import Reference
from torch import Tensor


class PrefixedReference(Reference):
    """Knows which tokens were the prompt: all of its first call. The cache is all tokens and the prompt's length."""

    num_prompt_tokens = 0  # of the sequence being computed

    def __call__(  # type: ignore[override]
        self, ids: Tensor, past_key_values: tuple[Tensor, int] | None = None, use_cache: bool = False
    ) -> SimpleNamespace:
        seen, self.num_prompt_tokens = ids, ids.shape[1]
        if past_key_values is not None:
            seen, self.num_prompt_tokens = torch.cat((past_key_values[0], ids), dim=1), past_key_values[1]
        wide = {name: tensor.double() for name, tensor in self.weights.items()}
        logits = self.logits(seen[0], self.config, wide)[-ids.shape[1] :].float().unsqueeze(0)
        return SimpleNamespace(logits=logits, past_key_values=(seen, self.num_prompt_tokens))

    def generate(self, ids: Tensor, max_new_tokens: int, **_: object) -> Tensor:
        cache, new = None, ids
        for _step in range(max_new_tokens):
            step = self(new, past_key_values=cache)
            cache, new = step.past_key_values, step.logits[:, -1:].argmax(-1)
            ids = torch.cat((ids, new), dim=1)
        return ids

    def positions(self, ids: Tensor, start: int, masks: list[list[int]]) -> tuple[int, Tensor, Tensor]:
        """Returns the number of tokens before the one that starts the answer, and both positions of every token.

        Without such a token the prompt ends there. ``masks`` are tokens that the answer may stand for, the preferred
        kinds first; without any it stands for the last token before it.
        """
        prompt = ids.tolist()[: self.num_prompt_tokens]
        length = prompt.index(start) if start in prompt else len(prompt)
        kinds = [[place for place, token in enumerate(prompt) if token in kind] for kind in masks]
        blank = [*sum(kinds, []), max(length - 1, 0)][0]
        own = [place if place < length else blank for place in range(len(ids))]
        block = [max(0, place + 1 - length) for place in range(len(ids))]
        return length, torch.tensor(own), torch.tensor(block)


def attended_with_prefix(q: Tensor, k: Tensor, v: Tensor, length: int) -> Tensor:
    """Attention of q, k and v [T, H, D] under a mask in which the first ``length`` columns are open; [T, H * D]."""
    tokens, heads, size = q.shape
    is_open = torch.ones(tokens, tokens).tril()
    is_open[:, :length] = 1
    out = []
    for head in range(heads):
        scores = q[:, head] @ k[:, head].T / size**0.5
        scores[is_open == 0] = -torch.inf
        out.append(torch.softmax(scores, dim=1) @ v[:, head])
    return torch.cat(out, dim=1)


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(0.7978845608028654 * x * (1 + 0.044715 * x * x)))


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(dim=1, keepdim=True)
    return centred / torch.sqrt((centred * centred).mean(dim=1, keepdim=True) + eps) * weight + bias
