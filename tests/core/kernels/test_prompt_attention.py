"""The host's part of attention over prompts on Hopper: what is served, and what the kernel is told."""

from __future__ import annotations

import logging
import struct
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lamella_core.kernels.cuda import driver
from lamella_core.kernels.cuda import prompt_attention as module
from lamella_core.kernels.cuda.prompt_attention import BegunKeys, prompt_attention

BF16, FP16, FP8 = torch.bfloat16, torch.float16, torch.float8_e4m3fn
MAP = 128  # bytes


class Launches:
    """A kernel on a GPU of 132 multiprocessors that computes nothing."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, bytes]] = []
        self.maps: list[tuple[Any, ...]] = []
        self.counters = torch.zeros(2, dtype=torch.int32)

    def launch(self, blocks: int, params: bytes, device: int | None) -> None:
        self.calls.append((blocks, params))

    def tensor_map(self, *arguments: Any) -> bytes:
        self.maps.append(arguments)
        return bytes(MAP)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Launches:
    launches = Launches()
    monkeypatch.setattr(module, "serves", lambda q, *_: q.dtype in (BF16, FP16))
    monkeypatch.setattr(module, "_processors", lambda _: 132)
    monkeypatch.setattr(module, "_kernel_for", lambda *_: launches)
    monkeypatch.setattr(module, "_counters", lambda *_: launches.counters)
    monkeypatch.setattr(driver, "tensor_map", launches.tensor_map)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda _: 0, raising=False)
    return launches


def inputs(tokens: int, dtype: torch.dtype = BF16, heads: int = 6, kv_heads: int = 2, dim: int = 64) -> Any:
    """Queries, keys and values out of one projection."""
    fused = torch.zeros(tokens, heads + 2 * kv_heads, dim, dtype=dtype)
    return fused.split([heads, kv_heads, kv_heads], dim=1)


def starts(*lengths: int, first: int = 0) -> torch.Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0).int() + first


def test_what_the_kernel_is_told(gpu):
    q, k, v = inputs(400)
    begun = BegunKeys(
        *torch.zeros(2, 999, 2, 64, dtype=BF16), torch.tensor([700, 9]).int(), torch.tensor([0.5, 2.0])
    )  # fmt: skip
    query_start, out_scale, out = starts(300, 9, 80), torch.ones(()), torch.empty(400, 6, 64, dtype=FP8)
    result = prompt_attention(q, k, v, query_start, scale=0.5, begun=begun, out_scale=out_scale, out=out)
    assert result is out
    ((blocks, params),) = gpu.calls
    tiles = 400 // 128 + 3
    assert blocks == tiles * 6
    *addresses, factor, sequences, num_begun, heads, group, told = struct.unpack("6Qf5i", params[5 * MAP :])
    tensors = (out, query_start, begun.lengths, begun.scales, out_scale, gpu.counters)
    assert addresses == [x.data_ptr() for x in tensors]
    assert factor == pytest.approx(0.5 / 0.6931472) and (sequences, num_begun, heads, group) == (3, 2, 6, 3)
    assert told == tiles
    assert [arguments[0] for arguments in gpu.maps] == [x.data_ptr() for x in (q, k, v, begun.k, begun.v)]
    row = 10 * 64 * 2  # bytes of the projection
    assert gpu.maps[0][1:] == (BF16, (64, 6, 400), (128, row), (64, 1, 128))
    assert gpu.maps[1][1:] == (BF16, (64, 2, 400), (128, row), (64, 1, 128))
    assert gpu.maps[3][1:] == (BF16, (64, 2, 999), (128, 256), (64, 1, 128))


def test_blocks_are_no_more_than_multiprocessors(gpu):
    result = prompt_attention(*inputs(9000, FP16), starts(9000), scale=1.0)
    assert result is not None and result.dtype == FP16 and result.shape == (9000, 6, 64)
    ((blocks, params),) = gpu.calls
    *addresses, _, sequences, num_begun, _, _, tiles = struct.unpack("6Qf5i", params[5 * MAP :])
    assert (blocks, sequences, num_begun, tiles) == (132, 1, 0, 9000 // 128 + 1)
    assert addresses[2:5] == [0, 0, 0]


@pytest.mark.parametrize("first", [0, 1, 127, 128, 200])
def test_numbers_suffice_for_the_tiles_of_all_sequences(first):
    """As the source has it: sequence i has the numbers from its first token // 128 + i on."""
    for lengths in ((1,) * 300, (0, 129, 0, 127, 128), (257, 1, 128, 300)):
        begins = starts(*lengths, first=first).tolist()
        numbers = [
            begin // 128 + i + tile
            for i, (begin, length) in enumerate(zip(begins, lengths))
            for tile in range(-(-length // 128))
        ]
        assert len(set(numbers)) == len(numbers) and max(numbers) < begins[-1] // 128 + len(lengths)


def test_what_is_not_served(gpu):
    q, k, v = inputs(300)
    for arguments in ((q, k.half(), v), (q, k, v[..., ::2]), (q, k[..., 1:], v[..., 1:]), (q.float(), k, v)):
        assert prompt_attention(*arguments, starts(300), scale=1.0) is None
    fitting = torch.empty(300, 6, 64, dtype=BF16)
    for out in (fitting.to(FP8), fitting[1:], fitting.view(300, 3, 128), torch.empty(300, 12, 64, dtype=BF16)[:, ::2]):
        assert prompt_attention(q, k, v, starts(300), scale=1.0, out=out) is None
    assert not gpu.calls
    assert prompt_attention(q, k, v, starts(300), scale=1.0, out=fitting) is fitting and gpu.calls


def test_a_single_head_and_a_single_token_may_have_any_stride():
    x = torch.zeros(4, 64, dtype=BF16)
    assert module._strides(x[:, None]) == module._strides(x.as_strided((4, 1, 64), (64, 3, 1))) == (128, 128)
    assert module._strides(x[:1].as_strided((1, 2, 64), (7, 64, 1))) == (128, 256)


def test_without_a_gpu_nothing_is_served():
    q, k, v = inputs(300)
    assert not module.serves(q, 2) and prompt_attention(q, k, v, starts(300), scale=1.0) is None


def test_a_kernel_that_cannot_be_made_is_said_once_and_not_served(monkeypatch, caplog):
    def missing(*_: Any) -> bytes:
        raise OSError("libnvrtc.so.13: cannot open shared object file")

    monkeypatch.setattr(driver, "kept_code", missing)
    monkeypatch.setattr(module, "_processors", lambda _: 132)
    monkeypatch.setattr(module, "_fits", lambda _: True)
    q = SimpleNamespace(is_cuda=True, dtype=BF16, shape=(300, 6, 64), device=SimpleNamespace(index=0))
    module._kernel.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            assert not module.serves(q, 2) and not module.serves(q, 2)
    finally:
        module._kernel.cache_clear()
    assert [record.message for record in caplog.records] == [
        "attention of prompts goes to another kernel on GPU 0: libnvrtc.so.13: cannot open shared object file"
    ]


def test_counters_are_not_made_in_a_recording(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="first in a recording"):
        module._counters(0, 12345)
