"""What is known of GPUs by their names: memory, rates and links, for calculations that happen before anything runs."""

from __future__ import annotations

from dataclasses import dataclass, replace

_GIB = 1 << 30


@dataclass(frozen=True)
class Hardware:
    """One GPU, or ``count`` of them that work as one. Rates are those of dense products, per second."""

    name: str  # as the driver reports it
    memory_bytes: float  # that one process can use, weights and workspaces included
    bandwidth: float  # bytes per second
    bf16_flops: float
    fp8_flops: float | None  # None: float8 products run at the bfloat16 rate
    is_measured: bool = False  # rates measured on the device rather than taken from its data sheet
    link_bandwidth: float | None = None  # bytes per second to the other GPUs of its machine, in each direction
    count: int = 1

    def times(self, count: int) -> Hardware:
        """Returns ``count`` of these GPUs as one: memory and rates are their sums, links cost nothing."""
        if count == 1:
            return self
        return replace(
            self,
            name=f"{count} x {self.name}",
            memory_bytes=count * self.memory_bytes,
            bandwidth=count * self.bandwidth,
            bf16_flops=count * self.bf16_flops,
            fp8_flops=None if self.fp8_flops is None else count * self.fp8_flops,
            count=count * self.count,
        )


# Data sheet values (without sparsity) unless measured: a copy in device memory, and square products of 8192. Links are
# NVLink's where the GPU has it, else half of what PCI Express carries both ways.
KNOWN_HARDWARE = (
    Hardware("NVIDIA H100 80GB HBM3", 76 * _GIB, 3.0e12, 800e12, 1500e12, is_measured=True, link_bandwidth=450e9),
    Hardware("NVIDIA H100 PCIe", 76 * _GIB, 2.0e12, 756e12, 1513e12, link_bandwidth=63e9),
    Hardware("NVIDIA H200", 135 * _GIB, 4.8e12, 989e12, 1979e12, link_bandwidth=450e9),
    Hardware("NVIDIA A100-SXM4-80GB", 76 * _GIB, 2.039e12, 312e12, None, link_bandwidth=300e9),
    Hardware("NVIDIA A100 80GB PCIe", 76 * _GIB, 1.935e12, 312e12, None, link_bandwidth=31e9),
    Hardware("NVIDIA A100-SXM4-40GB", 37.5 * _GIB, 1.555e12, 312e12, None, link_bandwidth=300e9),
    Hardware("NVIDIA L40S", 42.5 * _GIB, 0.864e12, 362e12, 733e12, link_bandwidth=31e9),
    Hardware("NVIDIA L4", 21 * _GIB, 0.300e12, 121e12, 242e12, link_bandwidth=31e9),
)


def find_hardware(gpu_name: str) -> Hardware | None:
    """Returns what is known of the GPU that the driver calls ``gpu_name``; None if nothing is."""
    return next((hardware for hardware in KNOWN_HARDWARE if hardware.name == gpu_name), None)
