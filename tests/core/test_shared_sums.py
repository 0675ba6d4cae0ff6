"""Sums over the ranks that layers leave to the norms after them."""

import pytest
import torch
from tests.support.reference_context import ReferenceCache, forward_step, run_ranks
from tests.support.tiny_models import hf_dir

from lamella_core.auto import AutoModelForCausalLM
from lamella_core.kernels import ops
from lamella_core.mapping import Mapping

TOKENS = [5, 9, 3, 77]


class FusingCommunicator:
    """Sums and norms at once, as GPUs do, and counts."""

    def __init__(self, plain):
        self.plain, self.size, self.rank = plain, plain.size, plain.rank
        self.sums = self.fused = 0

    def all_reduce(self, x):
        self.sums += 1
        return self.plain.all_reduce(x)

    def all_gather(self, x, dim=-1):
        return self.plain.all_gather(x, dim)

    def rms_norm_of_sum(self, x, residual, weight, eps, out_scale=None, unit_offset=False):
        self.fused += 1
        return ops.rms_norm(self.plain.all_reduce(x), weight, eps, residual, out_scale, unit_offset)


def forward(directory, fuse):
    """Logits [tokens, vocab] of each of two ranks, the sums and the fused sums that it made."""

    def work(rank, tp):
        model = AutoModelForCausalLM.from_hugging_face(directory, mapping=Mapping(2, rank, tp_size=2))
        tp = FusingCommunicator(tp) if fuse else tp
        found = forward_step(model, ReferenceCache(), {0: TOKENS}, tp)[0]
        return found, getattr(tp, "sums", 0), getattr(tp, "fused", 0)

    return run_ranks(2, work)


@pytest.mark.parametrize(
    ("architecture", "variant", "fused"),
    [
        ("LlamaForCausalLM", "grouped", 3),
        ("GemmaForCausalLM", "tied", 3),
        ("MixtralForCausalLM", "top2", 3),
        ("Gemma2ForCausalLM", "window", 0),  # norms what its halves add: they sum by themselves
        ("OPTForCausalLM", "norm_before", 0),
        ("CohereForCausalLM", "tied", 0),
    ],
)
def test_norms_sum_for_the_layer_before(architecture, variant, fused):
    """Of two layers' four sums the last stays one; halves side by side are summed at once; the embedding sums too."""
    directory = hf_dir(architecture, variant)
    expected = forward(directory, fuse=False)[0][0]
    for logits, sums, count in forward(directory, fuse=True):
        assert torch.equal(logits, expected)
        assert count == fused and sums == (3 if architecture.startswith("Cohere") else 5) - fused
