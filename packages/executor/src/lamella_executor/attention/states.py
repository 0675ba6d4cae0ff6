"""RecurrentStates: the tensors of layers that keep a state of fixed size per sequence, on either device."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import torch
from torch import Tensor

from lamella_core.context import StateSpec
from lamella_executor.attention.memory import reserve

COPY_TILE = 16  # slots copied at a time: bounds the temporary memory


@dataclass(frozen=True, slots=True)
class StepStates:
    """Where the states of a step's sequences are, in the order of the sequences; device tensors."""

    slots: Tensor  # [S] int32
    is_first: Tensor  # [S] int32, not 0: the sequence starts in this step


class RecurrentStates:
    """States of every such layer, by slot; owns the memory. Slot `num_slots`, one more than there are, is scratch.

    States of one shape share an allocation, over all layers. On a CPU memory is reserved but not touched.
    """

    def __init__(self, specs: SequenceOf[StateSpec], num_slots: int, device: torch.device | str = "cpu") -> None:
        self.num_slots = num_slots
        self._layers: dict[int, tuple[Tensor, ...]] = {}
        self._pools: list[Tensor] = []  # [layers, slots + 1, *shape]
        is_cpu = torch.device(device).type == "cpu"
        alike: dict[tuple[tuple[int, ...], torch.dtype], list[tuple[int, int]]] = defaultdict(list)
        for spec in specs:
            for place, kind in enumerate(zip(spec.shapes, spec.dtypes, strict=True)):
                alike[kind].append((spec.layer_idx, place))
        found: dict[tuple[int, int], Tensor] = {}
        for (shape, dtype), members in alike.items():
            whole = (len(members), num_slots + 1, *shape)
            pool = reserve(whole, dtype) if is_cpu else torch.zeros(whole, dtype=dtype, device=device)
            self._pools.append(pool)
            found.update({member: pool[index] for index, member in enumerate(members)})
        for spec in specs:
            self._layers[spec.layer_idx] = tuple(found[spec.layer_idx, place] for place in range(len(spec.shapes)))

    @property
    def scratch_slot(self) -> int:
        """Where rows that only pad a step keep their states."""
        return self.num_slots

    @property
    def num_bytes(self) -> int:
        return sum(pool.nbytes for pool in self._pools)

    def layer(self, layer_idx: int) -> tuple[Tensor, ...]:
        """Returns a layer's states, [slots + 1, *shape] each."""
        return self._layers[layer_idx]

    def copy(self, sources: Tensor, destinations: Tensor) -> None:
        """Copies slots in every layer; [n] int64 each, on the device of the states.

        A source may become a destination in a later pair, not in an earlier one; no destination may come twice.
        """
        for start in range(0, sources.shape[0], COPY_TILE):
            source, destination = sources[start : start + COPY_TILE], destinations[start : start + COPY_TILE]
            for pool in self._pools:
                pool.index_copy_(1, destination, pool.index_select(1, source))


def state_bytes(specs: SequenceOf[StateSpec], num_slots: int) -> int:
    """Returns the memory of `RecurrentStates`."""
    return (num_slots + 1) * sum(spec.num_bytes for spec in specs)
