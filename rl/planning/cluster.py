"""GPUs that can be planned for: memory, arithmetic, and links. Figures are the makers' data sheets."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU, as its data sheet has it.

    Attributes:
        name: what ``plan.gpu`` says.
        memory_gib: what a process can take of it (GiB), the driver's own part left out.
        tflops: dense bfloat16 matrix products (TFLOP/s).
        memory_gbs: bandwidth of its memory (GB/s).
        nvlink_gbs: to the other GPUs of its node, one direction (GB/s).
    """

    name: str
    memory_gib: float
    tflops: float
    memory_gbs: float
    nvlink_gbs: float


GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        # NVIDIA A100 80GB SXM data sheet (2021); torch reports 79.3 GiB.
        Gpu("a100", 79.3, 312.0, 2039.0, 300.0),
        # NVIDIA H100 SXM data sheet (2023): 1,979 TFLOP/s with sparsity, half without; torch reports 79.2 GiB.
        Gpu("h100", 79.2, 989.0, 3350.0, 450.0),
        # NVIDIA H200 SXM data sheet (2024); torch reports 139.8 GiB.
        Gpu("h200", 139.8, 989.0, 4800.0, 450.0),
        # NVIDIA B200 (HGX) data sheet (2025): 180 GB, 4.5 PFLOP/s with sparsity.
        Gpu("b200", 178.3, 2250.0, 7700.0, 900.0),
    )
}


@dataclass(frozen=True)
class Cluster:
    """Nodes of equal GPUs.

    Attributes:
        gpu: of all nodes.
        gpus_per_node: joined by NVLink.
        network_gbs: from one GPU to other nodes, one direction (GB/s).
    """

    gpu: Gpu
    gpus_per_node: int = 8
    network_gbs: float = 50.0

    def nodes(self, gpus: int) -> int:
        """Nodes that so many GPUs take."""
        return -(-gpus // self.gpus_per_node)

    def link_gbs(self, consecutive_ranks: int) -> float:
        """One direction per GPU between so many consecutive ranks (GB/s): NVLink inside a node, else the network."""
        return self.gpu.nvlink_gbs if consecutive_ranks <= self.gpus_per_node else self.network_gbs


def cluster_of(gpu: str, gpus_per_node: int, network_gbs: float) -> Cluster:
    """The cluster of these GPUs.

    Raises:
        ValueError: an unknown GPU.
    """
    if gpu not in GPUS:
        raise ValueError(f"expected a GPU among {', '.join(GPUS)}, got {gpu!r}")
    return Cluster(GPUS[gpu], gpus_per_node, network_gbs)
