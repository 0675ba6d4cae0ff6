"""DeviceFacts: what one rank computes on and what connects it to the others, as far as a choice of sizes depends on it.

Rates of CPUs and latencies are round numbers of the right size: they decide between splits that differ by far.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from lamella_core.device import gpu_fingerprint
from lamella_core.hardware import Hardware, find_hardware
from lamella_core.host_memory import available_bytes

_GIB = 1 << 30
NETWORK_BANDWIDTH = 12.5e9  # bytes/s for each rank: 100 Gbit/s
GPU_COLLECTIVE_S, GPU_SEND_S = 12e-6, 10e-6  # of a small message, launch included
GPU_EXPERT_S = 30e-6  # the products of one expert are launched one after another
HOST_COLLECTIVE_S, HOST_SEND_S = 80e-6, 40e-6  # over sockets of one machine
HOST_LINK_BANDWIDTH = 3e9
HOST_EXPERT_S = 40e-6
NETWORK_S = 30e-6  # added where a message leaves the machine
CORE_BANDWIDTH, CORE_FLOPS = 8e9, 50e9  # of one CPU core, per second


@dataclass(frozen=True)
class DeviceFacts:
    """One rank's share of its machine. Rates are per second.

    Attributes:
        name: for people.
        device: "cpu" or "cuda".
        memory_bytes: that one rank may use; of a CPU, its share of the host's free memory.
        bandwidth: bytes read from that memory.
        flops: of dense products in the model's dtype.
        fp8_flops: of float8 products.
        link_bandwidth: bytes between two ranks of one node, in each direction.
        network_bandwidth: bytes between ranks of two nodes, in each direction.
        gpus_per_node: ranks on one node.
        collective_s: seconds of a small all-reduce within a node.
        send_s: seconds of a small message within a node.
        network_s: seconds that leaving the node adds to either.
        expert_s: seconds that each expert with work adds to a layer.
    """

    name: str
    device: str
    memory_bytes: float
    bandwidth: float
    flops: float
    fp8_flops: float
    link_bandwidth: float
    network_bandwidth: float = NETWORK_BANDWIDTH
    gpus_per_node: int = 8
    collective_s: float = GPU_COLLECTIVE_S
    send_s: float = GPU_SEND_S
    network_s: float = NETWORK_S
    expert_s: float = GPU_EXPERT_S

    @classmethod
    def of_gpu(cls, hardware: Hardware, gpus_per_node: int) -> DeviceFacts:
        """Returns the facts of a GPU; a link that is not known counts as PCI Express."""
        return cls(
            hardware.name,
            "cuda",
            hardware.memory_bytes,
            hardware.bandwidth,
            hardware.bf16_flops,
            hardware.fp8_flops or hardware.bf16_flops,
            hardware.link_bandwidth or 25e9,
            gpus_per_node=gpus_per_node,
        )

    @classmethod
    def of_host(cls, cores: int, memory_bytes: float, ranks_per_node: int) -> DeviceFacts:
        """Returns the facts of a CPU whose cores and memory ``ranks_per_node`` ranks share."""
        share = cores / ranks_per_node
        flops = share * CORE_FLOPS
        return cls(
            f"{cores} CPU cores",
            "cpu",
            memory_bytes / ranks_per_node,
            share * CORE_BANDWIDTH,
            flops,
            flops,
            HOST_LINK_BANDWIDTH,
            gpus_per_node=ranks_per_node,
            collective_s=HOST_COLLECTIVE_S,
            send_s=HOST_SEND_S,
            expert_s=HOST_EXPERT_S,
        )

    def describe(self) -> str:
        """Returns one line for people."""
        return (
            f"{self.name}: {self.memory_bytes / _GIB:.1f} GiB and {self.bandwidth / 1e9:.0f} GB/s for each rank, "
            f"{self.gpus_per_node} ranks on a node, {self.link_bandwidth / 1e9:.0f} GB/s between them, "
            f"{self.network_bandwidth / 1e9:.1f} GB/s between nodes"
        )


def device_facts(device: str, world_size: int, gpus_per_node: int | None = None) -> DeviceFacts:
    """Returns what this machine is, taken for one of those that the ranks run on.

    Args:
        device: "cpu" or "cuda".
        world_size: ranks in all.
        gpus_per_node: ranks on one node; None: this machine's GPUs, or on a CPU all of them.
    """
    if device == "cpu":
        per_node = min(world_size, gpus_per_node or world_size)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return DeviceFacts.of_host(cores, available_bytes(), per_node)
    import torch

    found = gpu_fingerprint()
    known = find_hardware(found["name"])
    if known is None:
        known = Hardware(found["name"], 0.92 * found["memory_bytes"], 1e12, 200e12, None, link_bandwidth=25e9)
    return DeviceFacts.of_gpu(known, gpus_per_node or torch.cuda.device_count())
