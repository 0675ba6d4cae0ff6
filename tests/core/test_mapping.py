"""Mapping: derived ranks and groups, layer ranges, and checks that can fail."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamella_core.errors import ConfigError
from lamella_core.mapping import Mapping


def test_ranks_and_groups_of_tp2_pp2():
    m = Mapping(world_size=4, rank=3, tp_size=2, pp_size=2)
    assert (m.tp_rank, m.pp_rank) == (1, 1)
    assert m.tp_group == (2, 3)
    assert m.pp_group == (1, 3)
    assert (m.prev_pp_rank, m.next_pp_rank) == (1, None)
    assert m.is_last_pp_rank and not m.is_first_pp_rank


def test_node_and_local_rank():
    m = Mapping(world_size=16, rank=11, tp_size=16, gpus_per_node=8)
    assert (m.node_rank, m.local_rank) == (1, 3)


@pytest.mark.parametrize(
    "sizes,expected",
    [
        ({}, (8, 1)),
        ({"moe_ep_size": 4}, (2, 4)),
        ({"moe_tp_size": 4}, (4, 2)),
        ({"moe_tp_size": 2, "moe_ep_size": 4}, (2, 4)),
    ],
)
def test_moe_sizes_are_derived(sizes, expected):
    m = Mapping(world_size=8, tp_size=8, **sizes)
    assert (m.moe_tp_size, m.moe_ep_size) == expected


def test_uneven_layers_go_to_the_first_stages():
    ranges = [Mapping(world_size=3, rank=r, pp_size=3).pp_layers(8) for r in range(3)]
    assert ranges == [range(0, 3), range(3, 6), range(6, 8)]


def test_pp_partition_is_honoured():
    ranges = [Mapping(world_size=2, rank=r, pp_size=2, pp_partition=(5, 3)).pp_layers(8) for r in range(2)]
    assert ranges == [range(0, 5), range(5, 8)]


@given(tp=st.sampled_from([1, 2, 4]), pp=st.integers(1, 4), layers=st.integers(4, 40), ep=st.sampled_from([1, 2, 4]))
def test_every_layer_and_expert_has_exactly_one_owner(tp, pp, layers, ep):
    if tp % ep:
        ep = 1
    every = [Mapping(world_size=tp * pp, rank=r, tp_size=tp, pp_size=pp, moe_ep_size=ep) for r in range(tp * pp)]
    for tp_rank in range(tp):
        owned = [i for m in every if m.tp_rank == tp_rank for i in m.pp_layers(layers)]
        assert owned == list(range(layers))
    for m in every:
        assert m.rank in m.tp_group and m.rank in m.pp_group and m.rank in m.moe_tp_group and m.rank in m.moe_ep_group
        assert m.tp_group[m.tp_rank] == m.rank and m.moe_ep_group[m.moe_ep_rank] == m.rank
        experts = [e for r in m.moe_ep_group for e in m.with_rank(r).ep_experts(8)]
        assert experts == list(range(8))
        assert Mapping.from_dict(m.to_dict()) == m


@pytest.mark.parametrize(
    "fields,words",
    [
        ({"world_size": 4, "tp_size": 2}, ["tp_size 2", "pp_size 1", "world_size is 4"]),
        ({"world_size": 2, "tp_size": 2, "rank": 2}, ["rank is 2", "0 to 1"]),
        ({"world_size": 2, "tp_size": 2, "rank": -1}, ["rank is -1"]),
        ({"tp_size": 0}, ["tp_size is 0", "at least 1"]),
        ({"world_size": 2, "tp_size": 2, "moe_ep_size": "2"}, ["moe_ep_size is '2'", "integer"]),
        ({"rank": False}, ["rank is False", "integer"]),
        ({"world_size": 8, "tp_size": 8, "moe_ep_size": 3}, ["moe_ep_size 3", "tp_size 8"]),
        ({"world_size": 2, "pp_size": 2, "pp_partition": (4,)}, ["(4,)", "2 entries"]),
        ({"world_size": 2, "pp_size": 2, "pp_partition": 4}, ["pp_partition is 4", "2 entries"]),
        ({"world_size": 2, "pp_size": 2, "pp_partition": (4, 0)}, ["pp_partition is 0", "at least 1"]),
        ({"world_size": 2, "pp_size": 2, "pp_partition": (4, 1.5)}, ["pp_partition is 1.5", "integer"]),
    ],
)
def test_bad_sizes_are_rejected_with_numbers(fields, words):
    with pytest.raises(ConfigError) as caught:
        Mapping(**fields)
    assert all(word in str(caught.value) for word in words), caught.value


def test_layers_and_experts_that_do_not_fit():
    with pytest.raises(ConfigError, match="4 exceeds the model's 3 layers"):
        Mapping(world_size=4, pp_size=4).pp_layers(3)
    with pytest.raises(ConfigError, match="adds up to 5 layers; the model has 6"):
        Mapping(world_size=2, pp_size=2, pp_partition=(2, 3)).pp_layers(6)
    with pytest.raises(ConfigError, match="does not divide the model's 6 experts"):
        Mapping(world_size=4, tp_size=4, moe_ep_size=4).ep_experts(6)


def test_unknown_field():
    with pytest.raises(ConfigError, match="tp_sise"):
        Mapping.from_dict({"tp_sise": 2})
