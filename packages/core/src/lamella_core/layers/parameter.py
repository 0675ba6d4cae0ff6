"""Parameters that know their shard: made empty, filled by a loader, replaced without losing what they are."""

from __future__ import annotations

import torch
from torch import nn

from lamella_core.errors import CheckpointError
from lamella_core.layers.sharding import ShardSpec


class Parameter(nn.Parameter):
    """A weight of one rank. Inference only: it never requires a gradient.

    ``shard`` says which part of the checkpoint's tensors it holds; shapes there are those of the plain layout, the data
    may since have been laid out for a kernel.
    """

    shard: ShardSpec

    def __new__(cls, data: torch.Tensor, shard: ShardSpec) -> Parameter:
        parameter = torch.Tensor._make_subclass(cls, data, False)
        parameter.shard = shard
        return parameter

    def __init__(self, data: torch.Tensor, shard: ShardSpec) -> None:
        pass

    def __deepcopy__(self, memo: dict[int, object]) -> Parameter:
        copied = Parameter(self.data.clone(), self.shard)
        memo[id(self)] = copied
        return copied


def empty_parameter(shard: ShardSpec, dtype: torch.dtype) -> Parameter:
    """Returns a parameter of the shard's shape without memory (meta device); whoever fills it calls `set_parameter`."""
    return Parameter(torch.empty(shard.shape, dtype=dtype, device="meta"), shard)


def set_parameter(model: nn.Module, name: str, data: torch.Tensor) -> None:
    """Gives the parameter ``name`` (dotted) new data without a copy; its shard stays.

    Raises:
        CheckpointError: the model has no such parameter.
    """
    path, _, leaf = name.rpartition(".")
    try:
        owner = model.get_submodule(path)
        current = owner._parameters[leaf]
    except (AttributeError, KeyError):
        current = None
    if not isinstance(current, Parameter):
        raise CheckpointError(f"{type(model).__name__} has no parameter {name!r}")
    owner._parameters[leaf] = Parameter(data, current.shard)
