"""Reference: a network written down from its published description, where transformers has no class for it.

References compute whole sequences in float64, one after the other and without a cache, on tensors as the published
checkpoints hold them. They offer as much of transformers' interface as the conformance suite uses.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Shapes = dict[str, tuple[int, ...]]


class Reference:
    """Subclasses say which tensors there are (`shapes`) and what they compute (`logits`)."""

    architecture: str
    model_type: str
    published_name: str | None = None  # what config.json calls the architecture; None: what we do

    def __init__(self, config: SimpleNamespace, weights: dict[str, Tensor] | None = None) -> None:
        self.config = config
        self.weights = weights or {name: torch.zeros(shape) for name, shape in self.shapes(config).items()}

    @staticmethod
    def config_class(**values: Any) -> SimpleNamespace:
        return SimpleNamespace(**{"tie_word_embeddings": False, **values})

    def shapes(self, c: SimpleNamespace) -> Shapes:
        raise NotImplementedError

    def logits(self, ids: Tensor, c: SimpleNamespace, w: dict[str, Tensor]) -> Tensor:
        """Returns [T, vocab] for ids [T]; ``w`` are the weights in float64."""
        raise NotImplementedError

    def __call__(self, ids: Tensor, past_key_values: Tensor | None = None, use_cache: bool = False) -> SimpleNamespace:
        """As transformers is called with one sequence, ids [1, T]; what it caches is the ids so far."""
        seen = ids if past_key_values is None else torch.cat((past_key_values, ids), dim=1)
        wide = {name: tensor.double() for name, tensor in self.weights.items()}
        logits = self.logits(seen[0], self.config, wide)[-ids.shape[1] :]
        return SimpleNamespace(logits=logits.float().unsqueeze(0), past_key_values=seen)

    def generate(self, ids: Tensor, max_new_tokens: int, **_: Any) -> Tensor:
        """Returns ids [1, T] and the most likely tokens after them."""
        for _step in range(max_new_tokens):
            ids = torch.cat((ids, self(ids).logits[:, -1:].argmax(-1)), dim=1)
        return ids

    def named_parameters(self) -> list[tuple[str, Tensor]]:
        return list(self.weights.items())

    def named_buffers(self) -> list[tuple[str, Tensor]]:
        return []

    def state_dict(self) -> dict[str, Tensor]:
        return self.weights

    def eval(self) -> Reference:
        return self

    def save_pretrained(self, directory: Path) -> None:
        directory.mkdir()
        architecture = self.published_name or self.architecture
        names = {"architectures": [architecture], "model_type": self.model_type, "torch_dtype": "float32"}
        (directory / "config.json").write_text(json.dumps({**vars(self.config), **names}))
        save_file(self.weights, directory / "model.safetensors")

    @classmethod
    def from_pretrained(cls, directory: Path, **_: Any) -> Reference:
        config = json.loads((directory / "config.json").read_text())
        return cls(SimpleNamespace(**config), load_file(directory / "model.safetensors"))


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Every row divided by the root of the mean of its squares."""
    return weight * x / torch.sqrt((x * x).mean(dim=1, keepdim=True) + eps)


def silu(x: Tensor) -> Tensor:
    return x * torch.special.expit(x)


def turned(x: Tensor, angles: Tensor) -> Tensor:
    """Halves of x [T, heads, D] as real and imaginary parts, turned by angles [T, D / 2]."""
    half = x.shape[-1] // 2
    z = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.cat((z.real, z.imag), dim=-1)


def attended(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor | None = None) -> Tensor:
    """Causal attention of q [T, Hq, D] on k and v [T, Hkv, D]; returns [T, Hq * D].

    With slopes [Hq], every key's score falls by its head's slope per token of distance.
    """
    tokens, heads, size = q.shape
    shared = heads // k.shape[1]
    place = torch.arange(tokens)
    ahead = place[None, :] - place[:, None]  # of key to query: negative in the past
    out = torch.empty_like(q)
    for head in range(heads):
        scores = q[:, head] @ k[:, head // shared].T / size**0.5
        if slopes is not None:
            scores = scores + slopes[head] * ahead
        scores = torch.where(ahead > 0, -torch.inf, scores)
        out[:, head] = torch.softmax(scores, dim=1) @ v[:, head // shared]
    return out.reshape(tokens, heads * size)


def ntk_angles(tokens: int, size: int, base: float, factor: float | None, trained: int) -> Tensor:
    """Angles [tokens, size / 2] of a rotary embedding.

    With a factor (dynamic NTK scaling), tokens beyond the trained length turn by a base that grows with their place, as
    they do in text that is generated token by token.
    """
    rows = []
    for place in range(tokens):
        grown = base
        if factor is not None and place + 1 > trained:
            grown = base * (factor * (place + 1) / trained - factor + 1) ** (size / (size - 2))
        rows.append([place / grown ** (2 * pair / size) for pair in range(size // 2)])
    return torch.tensor(rows, dtype=torch.float64)
