"""ALiBi (Press et al. 2021): instead of positions, scores lose a slope of their head per token of distance."""

from __future__ import annotations

import torch


def alibi_slopes(num_heads: int, bias_max: float = 8.0) -> torch.Tensor:
    """Returns the slopes of all heads [num_heads] float32, which `Attention` takes.

    They fall geometrically to 2 ** -bias_max. Where the number of heads is no power of two, those of the largest power
    below come first, then every other one of the next power, as the authors' code has it.
    """
    whole = 1 << (num_heads.bit_length() - 1)
    exponents = [bias_max * (i + 1) / whole for i in range(whole)]
    exponents += [bias_max * (i + 0.5) / whole for i in range(num_heads - whole)]
    return torch.tensor([2.0**-exponent for exponent in exponents], dtype=torch.float32)
