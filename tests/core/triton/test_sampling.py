"""The sampling kernels against the host's sampler, number by number."""

import pytest
import torch

from lamella_core.kernels.triton import sampling, sampling_filters
from lamella_core.kernels.triton.sampling import SamplingRows, sample
from lamella_executor.runner import base
from lamella_executor.sampler.filters import best_token, filter_logits
from lamella_executor.sampler.random import uniform
from lamella_executor.sampling_params import SamplingParams

BF16, FP32 = torch.bfloat16, torch.float32


def make_rows(params, device, seeds=None, positions=None):
    """SamplingRows whose slots are in another order than the rows, among slots of strangers."""
    count = len(params)
    slots = torch.randperm(count + 3, generator=torch.Generator().manual_seed(4))[:count]
    seeds = range(count) if seeds is None else seeds
    positions = [7 * i for i in range(count)] if positions is None else positions

    def per_slot(values, dtype, stranger):
        tensor = torch.full((count + 3,), stranger, dtype=dtype)
        tensor[slots] = torch.tensor(list(values), dtype=dtype)
        return tensor.to(device)

    def word(seed, place):
        value = (seed >> (64 * place)) & (2**64 - 1)
        return value - 2**64 if value >= 2**63 else value

    return SamplingRows(
        temperature=per_slot((p.temperature for p in params), torch.float64, 0.7),
        top_k=per_slot((p.top_k or 0 for p in params), torch.int32, 3),
        top_p=per_slot((1.0 if p.top_p is None else p.top_p for p in params), torch.float64, 0.5),
        min_p=per_slot((p.min_p or 0.0 for p in params), torch.float64, 0.1),
        seed_low=per_slot((word(seed, 0) for seed in seeds), torch.int64, 5),
        seed_high=per_slot((word(seed, 1) for seed in seeds), torch.int64, 5),
        slots=slots.int().to(device),
        positions=torch.tensor(positions, dtype=torch.int32, device=device),
    )


def device_tokens(logits, params, device, vocab_size=None, greedy=False, **options):
    out = torch.full((len(logits),), -9, dtype=torch.int32, device=device)
    rows = None if greedy else make_rows(params, device, **options)
    sample(logits.to(device), out, vocab_size=vocab_size or logits.shape[1], rows=rows, greedy=greedy)
    return out.tolist()


def host_tokens(logits, params, seeds=None, positions=None):
    tokens = []
    for i, (scores, param) in enumerate(zip(logits.float(), params)):
        if param.temperature == 0.0:
            tokens.append(best_token(scores))
            continue
        seed = i if seeds is None else seeds[i]
        position = 7 * i if positions is None else positions[i]
        tokens.append(filter_logits(scores, param).draw(uniform(seed, 0, position)))
    return tokens


def random_logits(rows, vocab, dtype=BF16, spread=3.0, seed=0):
    return (torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * spread).to(dtype)


FILTERS = {
    "temperature": {"temperature": 1.0},
    "hot": {"temperature": 5.0},
    "cold": {"temperature": 0.01},
    "coldest": {"temperature": 1e-12},
    "top_k": {"top_k": 20},
    "top_k_1": {"top_k": 1},
    "top_k_most": {"top_k": 1400},
    "top_k_all": {"top_k": 1501},
    "top_p": {"top_p": 0.9},
    "top_p_small": {"top_p": 1e-6},
    "top_p_most": {"top_p": 0.9999},
    "top_k_top_p": {"top_k": 50, "top_p": 0.8},
    "top_k_most_top_p": {"top_k": 1400, "top_p": 0.99, "temperature": 30.0},
    "min_p": {"min_p": 0.05},
    "min_p_1": {"min_p": 1.0},
    "all": {"temperature": 0.8, "top_k": 100, "top_p": 0.95, "min_p": 0.02},
}


@pytest.mark.parametrize("options", FILTERS.values(), ids=FILTERS)
@pytest.mark.parametrize("dtype", [BF16, torch.float16, FP32], ids=str)
def test_equals_the_host(device, options, dtype):
    """Every row alike: near ties are too rare to meet here, since a boundary must lie within 1e-8 of the number."""
    logits = random_logits(20 if device == "cuda" else 1, 1501, dtype, seed=len(str(options)))
    params = [SamplingParams(**({"temperature": 1.0} | options))] * len(logits)
    assert device_tokens(logits, params, device) == host_tokens(logits, params)


def test_agreement_over_many_rows(device):
    """All filters mixed, greedy rows between them, on flat and on peaked rows."""
    count, vocab = (2000, 50_000) if device == "cuda" else (34, 300)
    spreads = torch.tensor([0.2, 1.0, 3.0, 8.0]).repeat(count)[:count, None]
    logits = (random_logits(count, vocab, FP32, 1.0) * spreads).to(BF16)
    kinds = [*FILTERS.values(), {"temperature": 0.0}]
    params = [SamplingParams(**({"temperature": 1.0} | kinds[i % len(kinds)])) for i in range(count)]
    same = [a == b for a, b in zip(device_tokens(logits, params, device), host_tokens(logits, params))]
    assert sum(same) >= 0.999 * count


def test_several_chunks_and_padding(device):
    """Rows of more than one chunk, whose padding columns hold the largest scores, in a wider tensor."""
    vocab = 2 * sampling.CHUNK + 300
    logits = random_logits(4, vocab + 40, spread=1.0)
    logits[:, vocab:] = 100.0
    params = [
        SamplingParams(**options)
        for options in (
            {"temperature": 1.0},
            {"temperature": 1.0, "top_p": 0.7},
            {"temperature": 0.0},
            {"temperature": 2.0, "top_k": 9},
        )
    ]
    assert device_tokens(logits, params, device, vocab) == host_tokens(logits[:, :vocab], params)
    assert device_tokens(logits[:, 8:], params, device, vocab - 8) == host_tokens(logits[:, 8:vocab], params)


@pytest.mark.parametrize("options", [{"top_p": 0.5}, {"top_k": 30}, {"top_k": 30, "top_p": 0.5}, {"min_p": 0.9}])
def test_ties(device, options):
    """Few distinct scores: top-k keeps all that equal the k-th, top-p the first ones of its last score."""
    logits = torch.randint(0, 4, (4, 600), generator=torch.Generator().manual_seed(6)).to(BF16) / 2
    logits[logits == 0] = -0.0
    params = [SamplingParams(temperature=1.0, **options)] * len(logits)
    assert device_tokens(logits, params, device) == host_tokens(logits, params)


@pytest.mark.parametrize("options", [{"top_p": 0.8}, {"top_k": 700}, {"top_k": 700, "top_p": 0.6}], ids=str)
def test_boundary_below_the_window(device, options):
    """Scores around zero: their keys are too many for the window, which covers eight octaves of the positive ones."""
    logits = random_logits(3, 900, BF16, spread=1e-3)
    octaves = sampling_filters.WINDOW.value / 128
    inside = (logits > logits.max(1, keepdim=True).values * 2**-octaves).float().mean(1)
    assert (inside < 0.55).all()
    params = [SamplingParams(temperature=1.0, **options)] * len(logits)
    assert device_tokens(logits, params, device) == host_tokens(logits, params)


def test_banned_tokens_are_not_drawn(device):
    logits = random_logits(4, 500)
    logits[:, ::2] = float("-inf")
    params = [
        SamplingParams(temperature=1.0, **options) for options in ({}, {"top_k": 400}, {"top_p": 0.99}, {"min_p": 1e-6})
    ]
    tokens = device_tokens(logits, params, device)
    assert tokens == host_tokens(logits, params)
    assert all(token % 2 for token in tokens)


def test_seeds_and_positions(device):
    """128-bit seeds, negative ones, and positions: the same numbers as the host's generator."""
    seeds = [0, 1, -1, 2**63, 2**64 - 1, 2**127 + 12345, -(2**70), 987654321987654321]
    positions = [0, 1, 2, 2**31 - 1, 1000, 77, 5, 123456]
    logits = random_logits(1, 1000, FP32, 0.01).expand(len(seeds), -1).contiguous()
    params = [SamplingParams(temperature=1.0)] * len(seeds)
    kwargs = {"seeds": seeds, "positions": positions}
    tokens = device_tokens(logits, params, device, **kwargs)
    assert tokens == host_tokens(logits, params, **kwargs)
    assert len(set(tokens)) == len(tokens)


@pytest.mark.parametrize("greedy", [True, False], ids=["all_greedy", "mixed"])
@pytest.mark.parametrize("dtype", [BF16, torch.float16, FP32], ids=str)
def test_greedy(device, dtype, greedy):
    """The lowest id wins a tie, within a chunk and between chunks."""
    vocab = sampling.CHUNK + 500
    logits = random_logits(5, vocab, dtype)
    logits[1, [400, 30, sampling.CHUNK + 4]] = 50.0
    logits[2] = -1.0
    logits[3, :] = float("-inf")
    logits[3, vocab - 1] = -1e4
    logits[4, [17, 20]] = 0.0
    logits[4] = -logits[4].abs()
    params = [SamplingParams(temperature=0.0)] * 5
    tokens = device_tokens(logits, params, device, greedy=greedy)
    assert tokens == host_tokens(logits, params)
    assert tokens[1:4] == [30, 0, vocab - 1]


@pytest.mark.parametrize("temperature", [0.0, 1.0, "all_greedy"])
def test_impossible_rows(device, temperature):
    vocab = sampling.CHUNK + 100
    logits = random_logits(6, vocab, FP32)
    logits[0, 3] = float("nan")
    logits[1, vocab - 1] = float("inf")
    logits[2] = float("-inf")
    logits[3, 5], logits[3, vocab - 2] = float("inf"), float("nan")
    logits[4] = -torch.full((vocab,), float("nan"))
    params = [SamplingParams(temperature=0.0 if temperature == "all_greedy" else temperature, top_p=0.9)] * 6
    tokens = device_tokens(logits, params, device, greedy=temperature == "all_greedy")
    assert (
        tokens[:5]
        == [base.NAN_LOGITS, base.POSITIVE_INFINITE_LOGITS, base.NEGATIVE_INFINITE_LOGITS] + [base.NAN_LOGITS] * 2
    )
    assert tokens[5] >= 0


def test_a_row_does_not_depend_on_the_batch(device, monkeypatch):
    """Alone a row is spread over more programs, as if there were fewer rows."""
    logits = random_logits(2, 2 * sampling_filters.HISTOGRAM_BLOCK + 100, spread=0.5)
    params = [SamplingParams(temperature=1.0, top_p=0.9)] * 2
    together = device_tokens(logits, params, device)
    monkeypatch.setattr(sampling, "HISTOGRAM_PROGRAMS", 1)
    alone = [device_tokens(logits[i : i + 1], params[:1], device, seeds=[i], positions=[7 * i])[0] for i in range(2)]
    assert alone == together


def test_what_is_refused(device):
    out = torch.zeros(1, dtype=torch.int32, device=device)
    logits = random_logits(1, 8).to(device)
    with pytest.raises(ValueError, match="missing"):
        sample(logits, out, vocab_size=8)
    sample(logits[:0], out[:0], vocab_size=8)
