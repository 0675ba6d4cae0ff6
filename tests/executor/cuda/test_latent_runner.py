"""CudaRunner over a latent cache, on the CPU: through PyTorch, and with the Triton kernels in triton's interpreter."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tests.support.device_steps import BLOCK, Drive, cpu_runner, request_of, runner_setup
from tests.support.executors import hf_greedy, prompt, tiny_model

from lamella_core.context import AttentionSpec
from lamella_executor.attention.backend import LayerCall
from lamella_executor.attention.paged_cpu import LayerWindow
from lamella_executor.attention.paged_cuda import CudaStepContext, DeviceKvCache, torch_rope_and_cache
from lamella_executor.memory import block_bytes
from lamella_executor.runner.cuda import start

V2, V3 = ("DeepseekV2ForCausalLM", "lite_yarn"), ("DeepseekV3ForCausalLM", "half_split_biased")
PROMPTS = [prompt(1), prompt(7, 1), prompt(13, 2)]
FLOAT8 = torch.float8_e4m3fn
SPEC = AttentionSpec(0, 4, 1, 28, 0.2, value_dim=20)


@pytest.mark.parametrize("model", [V2, V3], ids="-".join)
def test_steps_through_torch(model):
    runner = cpu_runner(model=tiny_model(*model))
    drive = Drive(runner, [request_of(ids) for ids in PROMPTS], chunk=5)
    assert drive.generate(6, ahead=True) == [hf_greedy(ids, 6, model) for ids in PROMPTS]


def test_steps_through_triton(monkeypatch):
    pytest.importorskip("triton", reason="GPU kernels need triton")
    if torch.cuda.is_available():
        pytest.skip("kernels are compiled here: tests/gpu runs them")
    from tests.support.triton_interpreter import repair_interpreter

    from lamella_executor.attention.triton_backend import TritonAttention
    from lamella_executor.runner.cuda.ops import TritonOps
    from lamella_executor.runner.cuda.runner import DeviceParts

    repair_interpreter()
    parts = DeviceParts(TritonAttention(), TritonOps(), torch.device("cpu"))
    monkeypatch.setattr(start, "choose_parts", lambda *_: parts)
    runner = start.start_runner(runner_setup(tiny_model(*V3)), "triton", "cpu")[0]
    drive = Drive(runner, [request_of(ids) for ids in PROMPTS[:2]], chunk=4)
    assert drive.generate(2, ahead=True) == [hf_greedy(ids, 2, V3) for ids in PROMPTS[:2]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, FLOAT8], ids=str)
def test_the_cache_holds_keys_alone(dtype):
    specs = [SPEC, AttentionSpec(1, 4, 2, 28, 0.2), AttentionSpec(2, 4, 1, 28, 0.2, value_dim=20)]
    cache = DeviceKvCache(specs, 3, BLOCK, dtype, "cpu")
    assert cache.num_bytes == 4 * block_bytes(specs, dtype, BLOCK)
    raw = torch.uint8 if dtype == FLOAT8 else torch.int16
    for layer in (0, 2):
        keys, values = (x.view(raw) for x in cache.layer(layer))
        keys[1] = torch.arange(keys[1].numel()).view(keys[1].shape) % 100 + layer
        assert torch.equal(values[1], keys[1][..., 8:])
    cache.copy_blocks(torch.tensor([1]), torch.tensor([2]))
    assert all(torch.equal(cache.layer(n)[0].view(raw)[2], cache.layer(n)[0].view(raw)[1]) for n in (0, 2))


class Noted:
    """A `StepAttention` that notes what it is told."""

    call: LayerCall

    def prefill(self, q, layer, out=None):
        self.call = layer
        return torch.zeros(*q.shape[:2], layer.spec.out_dim)

    decode = prefill

    def leads_prefill(self, q, layer):
        return False


def test_a_float8_cache_has_one_scale_and_is_read_by_prompts_too():
    cache, noted = DeviceKvCache([SPEC], 3, BLOCK, FLOAT8, "cpu"), Noted()
    windows = {0: LayerWindow()}
    step = SimpleNamespace(num_decode=1, num_whole=1)
    ctx = CudaStepContext(cache, torch.arange(3), step, noted, torch_rope_and_cache, windows, None)
    keys, queries = torch.randn(3, 1, 28), torch.randn(3, 4, 28)
    assert ctx.attend(SPEC, queries, keys, None, kv_scales=torch.tensor([0.5, 9.0])).shape == (3, 4, 20)
    assert noted.call.own is None and noted.call.kv_scales.tolist() == [0.5, 0.5]
    kept = (cache.layer(0)[0][0, :, :3].float() * 0.5).transpose(0, 1)
    torch.testing.assert_close(kept, keys, rtol=2**-3, atol=1e-2)
