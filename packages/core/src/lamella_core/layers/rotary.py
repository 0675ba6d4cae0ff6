"""Rotary position embedding (Su et al. 2021) with the context extensions found in Hugging Face configs.

Cosines and sines are computed per position in float32 and kept as tables, so that a token's rotation is the same bits
in every batch. Three extensions choose frequencies by the length of the sequence; here a position decides for itself:

* dynamic (NTK): position p >= max_position_embeddings rotates as in a sequence that ends with it.
* qwen_dynamic: the same in steps. (Qwen-1's own code rotates a whole request by the step of its prompt's length.)
* longrope (Ding et al. 2024): short factors below the original context length, long ones from there on, until
  `RotaryEmbedding.set_max_seq_len` says that sequences will be longer: then long factors for all.

dynamic and longrope equal transformers when it generates token by token.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from lamella_core.errors import ConfigError
from lamella_core.kernels import ops
from lamella_core.rope_config import RopeConfig

_FIRST_CAPACITY = 2048  # positions in the first table


@dataclass(frozen=True)
class Rotation:
    """The rotations of one step's tokens, looked up once for all layers."""

    cos: torch.Tensor  # [T, rotary_dim / 2] float32
    sin: torch.Tensor  # [T, rotary_dim / 2] float32
    rotary_dim: int
    interleaved: bool
    local: Rotation | None = None  # of layers with a window, where they rotate otherwise
    query_scale: torch.Tensor | None = None  # [T, 1, 1] float32, multiplies the queries besides
    unrotated_scale: torch.Tensor | None = None  # [T, 1, 1] float32, of queries in layers that do not rotate

    def copy_(self, other: Rotation) -> None:
        """Writes the other's values, of the same shapes, over this one's."""
        self.cos.copy_(other.cos)
        self.sin.copy_(other.sin)
        if self.query_scale is not None and other.query_scale is not None:
            self.query_scale.copy_(other.query_scale)
        if self.unrotated_scale is not None and other.unrotated_scale is not None:
            self.unrotated_scale.copy_(other.unrotated_scale)
        if self.local is not None and other.local is not None:
            self.local.copy_(other.local)

    def apply_(self, q: torch.Tensor, k: torch.Tensor) -> None:
        """Rotates q [T, Hq, D] and k [T, Hkv, D] in place."""
        ops.rope_inplace(q, k, self.cos, self.sin, self.rotary_dim, self.interleaved)


class RotaryEmbedding:
    """Turns positions into rotations of the first ``rotary_dim`` elements of queries and keys.

    ``local`` is the embedding of layers with a window, where that is another.
    """

    def __init__(self, rope: RopeConfig, max_position_embeddings: int, local: RopeConfig | None = None) -> None:
        self.rope = rope
        self.local = RotaryEmbedding(local, max_position_embeddings) if local is not None else None
        self.max_position_embeddings = max_position_embeddings
        self.max_seq_len: int | None = None
        self._tables: torch.Tensor | None = None  # [2, positions, rotary_dim / 2] float32: cos and sin, read at once

    def set_max_seq_len(self, max_seq_len: int) -> None:
        """Makes the tables for all positions below ``max_seq_len`` now; with longrope also chooses the factors."""
        self.max_seq_len = max_seq_len
        self._tables = torch.stack(rotary_tables(self.rope, max_seq_len, self.max_position_embeddings, max_seq_len))
        if self.local is not None:
            self.local.set_max_seq_len(max_seq_len)

    def __call__(self, positions: torch.Tensor) -> Rotation:
        """Returns the rotations of ``positions`` [T] int64.

        The tables grow as needed; on a GPU only `set_max_seq_len` makes them, so that no value is waited for.
        """
        cos, sin = self._covering(positions).index_select(1, positions)
        local = self.local(positions) if self.local is not None else None
        scale = None
        if self.rope.logn_length is not None:
            scale = _logn(positions, self.rope.logn_length)
        unrotated = None
        if self.rope.temperature_length is not None:
            unrotated = _temperature(positions, self.rope.temperature_length, self.rope.temperature_scale)
        return Rotation(cos, sin, self.rope.rotary_dim, self.rope.interleaved, local, scale, unrotated)

    def _covering(self, positions: torch.Tensor) -> torch.Tensor:
        """Returns tables that reach all positions, on their device."""
        tables = self._tables
        if tables is not None and positions.is_cuda:
            if tables.device != positions.device:
                self._tables = tables = tables.to(positions.device)
            return tables
        needed = int(positions.max()) + 1 if positions.numel() else 1
        if tables is None or needed > tables.shape[1]:
            capacity = max(_FIRST_CAPACITY, 1 << (needed - 1).bit_length())
            both = rotary_tables(self.rope, capacity, self.max_position_embeddings, self.max_seq_len)
            self._tables = tables = torch.stack(both).to(positions.device)
        return tables


def _logn(positions: torch.Tensor, length: int) -> torch.Tensor:
    """Factors [T, 1, 1] float32 that keep attention sharp beyond ``length`` tokens (Su 2021): logs to that base."""
    return ((positions.double() + 1).log() / math.log(length)).clamp(min=1.0).float()[:, None, None]


def _temperature(positions: torch.Tensor, length: int, scale: float) -> torch.Tensor:
    """Factors [T, 1, 1] float32 that grow with the logarithm of the whole ``length``s passed (Nakanishi 2025)."""
    passed = torch.floor((positions.double() + 1) / length)
    return (passed.log1p() * scale + 1.0).float()[:, None, None]


def rotary_tables(
    rope: RopeConfig, num_positions: int, max_position_embeddings: int, max_seq_len: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns cos and sin, each [num_positions, rotary_dim / 2] float32.

    ``max_seq_len`` is the longest sequence to come when that is known (longrope chooses its factors by it).
    """
    positions = torch.arange(num_positions, dtype=torch.float32)
    frequencies, amplitude = _FREQUENCIES[rope.rope_type](rope, positions, max_position_embeddings, max_seq_len)
    angles = positions[:, None] * frequencies
    return angles.cos() * amplitude, angles.sin() * amplitude


def _exponents(rope: RopeConfig) -> torch.Tensor:
    """2 i / rotary_dim for each pair i: [rotary_dim / 2] float32."""
    return torch.arange(0, rope.rotary_dim, 2, dtype=torch.int64).float() / rope.rotary_dim


# Radians per position [rotary_dim / 2], or one row per position; amplitude, or a column with one per position.
Frequencies = tuple[torch.Tensor, float | torch.Tensor]


def _default(rope: RopeConfig, positions: torch.Tensor, max_positions: int, max_len: int | None) -> Frequencies:
    return 1.0 / rope.theta ** _exponents(rope), 1.0


def _float16(rope: RopeConfig, positions: torch.Tensor, max_positions: int, max_len: int | None) -> Frequencies:
    """Frequencies that were rounded to float16, which models of that time were trained with."""
    return (1.0 / rope.theta ** _exponents(rope)).half().float(), 1.0


def _linear(rope: RopeConfig, positions: torch.Tensor, max_positions: int, max_len: int | None) -> Frequencies:
    """Position interpolation (Chen et al. 2023)."""
    return 1.0 / rope.theta ** _exponents(rope) / rope.scaling["factor"], 1.0


def _dynamic(rope: RopeConfig, positions: torch.Tensor, max_positions: int, max_len: int | None) -> Frequencies:
    """NTK-aware interpolation whose base grows with the sequence beyond the trained length."""
    factor, dim = rope.scaling["factor"], rope.rotary_dim
    plain = 1.0 / rope.theta ** _exponents(rope)
    lengths = positions[max_positions:].double() + 1
    if not lengths.numel():
        return plain, 1.0
    if dim == 2:
        raise ConfigError("rope type 'dynamic' needs a rotary_dim above 2")
    bases = rope.theta * (factor * lengths / max_positions - (factor - 1)) ** (dim / (dim - 2))
    grown = 1.0 / bases.float()[:, None] ** _exponents(rope)
    return torch.cat((plain.expand(max_positions, -1), grown)), 1.0


def _qwen_dynamic(rope: RopeConfig, positions: torch.Tensor, max_positions: int, max_len: int | None) -> Frequencies:
    """Qwen-1's NTK-aware interpolation: the base grows in steps, when the sequence outgrows 1, 2, 4, ... contexts."""
    dim = rope.rotary_dim
    if dim == 2:
        raise ConfigError("rope type 'qwen_dynamic' needs a rotary_dim above 2")
    contexts = (positions.double() + 1) / rope.scaling["original_max_position_embeddings"]
    growth = (2.0 ** (contexts.log2().ceil() + 1) - 1).clamp(min=1.0)
    bases = rope.theta * growth ** (dim / (dim - 2))
    return 1.0 / bases.float()[:, None] ** _exponents(rope), 1.0


def _llama3(rope: RopeConfig, positions: torch.Tensor, max_positions: int, max_len: int | None) -> Frequencies:
    """Llama 3.1: long wavelengths are stretched by ``factor``, short ones kept, those between blended."""
    s = rope.scaling
    plain = 1.0 / rope.theta ** _exponents(rope)
    original, low, high = s["original_max_position_embeddings"], s["low_freq_factor"], s["high_freq_factor"]
    wavelength = 2 * math.pi / plain
    blend = (original / wavelength - low) / (high - low)
    blended = (1 - blend) * plain / s["factor"] + blend * plain
    stretched = torch.where(wavelength > original / low, plain / s["factor"], plain)
    between = (wavelength >= original / high) & (wavelength <= original / low)
    return torch.where(between, blended, stretched), 1.0


def _yarn(rope: RopeConfig, positions: torch.Tensor, max_positions: int, max_len: int | None) -> Frequencies:
    """YaRN (Peng et al. 2023): interpolates per frequency and sharpens attention through the amplitude."""
    s, dim = rope.scaling, rope.rotary_dim
    factor, original = s["factor"], s["original_max_position_embeddings"]

    def pair_of(rotations: float) -> float:
        """The pair (as a real number) that turns ``rotations`` times over the original context."""
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = pair_of(s.get("beta_fast") or 32), pair_of(s.get("beta_slow") or 1)
    if s.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = (torch.arange(dim // 2, dtype=torch.float32) - low) / ((high - low) or 0.001)
    kept = 1 - ramp.clamp(0, 1)
    periods = rope.theta ** _exponents(rope)
    frequencies = 1.0 / (factor * periods) * (1 - kept) + 1.0 / periods * kept
    return frequencies, _yarn_amplitude(s, factor)


def _yarn_amplitude(s: dict[str, Any], factor: float) -> float:
    def sharpening(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if s.get("attention_factor") is not None:
        return float(s["attention_factor"])
    if s.get("mscale") and s.get("mscale_all_dim"):
        return sharpening(s["mscale"]) / sharpening(s["mscale_all_dim"])
    return sharpening(1.0)


def _longrope(rope: RopeConfig, positions: torch.Tensor, max_positions: int, max_len: int | None) -> Frequencies:
    """LongRoPE (Ding et al. 2024); amplitudes follow from the factor, or are given for short and long sequences."""
    s = rope.scaling
    factor, original = s["factor"], s["original_max_position_embeddings"]
    amplitude = s.get("attention_factor")
    if amplitude is None:
        amplitude = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    short_amplitude, long_amplitude = (float(s.get(f"{key}_mscale") or amplitude) for key in ("short", "long"))
    periods = rope.theta ** _exponents(rope)
    short = 1.0 / (torch.tensor(s["short_factor"], dtype=torch.float32) * periods)
    long = 1.0 / (torch.tensor(s["long_factor"], dtype=torch.float32) * periods)
    if max_len is not None and max_len > original:
        return long, long_amplitude
    is_long = (positions >= original)[:, None]
    return torch.where(is_long, long, short), torch.where(is_long, long_amplitude, short_amplitude)


_FREQUENCIES: dict[str, Callable[[RopeConfig, torch.Tensor, int, int | None], Frequencies]] = {
    "default": _default,
    "float16": _float16,
    "linear": _linear,
    "dynamic": _dynamic,
    "qwen_dynamic": _qwen_dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
