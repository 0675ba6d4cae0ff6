"""Prefixes: beginnings of texts that are read in both directions (Du et al. 2022, "GLM").

All tokens of a prefix see each other; those after it see what is before them, as everywhere. What follows the prefix
fills in for one token of it, the mask: it has the mask's position, and positions of its own in the block it makes up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Prefix:
    """The prefix of one sequence."""

    num_tokens: int
    mask_place: int  # position of the token that what comes after the prefix fills in for


@dataclass(frozen=True)
class PrefixRule:
    """How a prompt says what its prefix is.

    The prefix ends before the first ``start_token``; in a prompt without one it is all of the prompt. The mask is the
    first token of the prompt that is in the first of the groups ``mask_tokens`` of which there is any; without one it
    is the last token of the prefix.
    """

    start_token: int
    mask_tokens: tuple[tuple[int, ...], ...]

    def of(self, prompt: Sequence[int]) -> Prefix:
        """Returns the prefix of a prompt."""
        length = next((place for place, token in enumerate(prompt) if token == self.start_token), len(prompt))
        for group in self.mask_tokens:
            for place, token in enumerate(prompt):
                if token in group:
                    return Prefix(length, place)
        return Prefix(length, max(length - 1, 0))


@dataclass(frozen=True)
class PrefixTokens:
    """What a step's tokens must know of the prefixes of their sequences; [T] int64 each."""

    lengths: Tensor  # tokens of the prefix
    mask_places: Tensor

    def places(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Returns two positions of each token, from its ``positions`` [T] in its sequence.

        In the prefix they are its position and 0; after it, that of the mask and 1, 2, 3 and so on.
        """
        behind = positions - self.lengths
        is_behind = behind >= 0
        return torch.where(is_behind, self.mask_places, positions), torch.where(is_behind, behind + 1, 0)
