"""Expected seconds of a step by phase, each beside a lower bound that no implementation on these GPUs can beat.

Generation reads weights and cache once a token and step (bandwidth), training computes (arithmetic), experts' tokens
and weights travel (links). Measured shares of the peaks are in ``constants``; bounds take the data sheets' figures.

- Generation: a step of b samples reads the dense weights, ``E (1 - (1 - k/E)^b)`` experts of each layer and b samples'
  cache. A layer takes no less than its kernels' launches, and the host's time for each sample comes after the device's,
  since steps are settled one by one. Bound: the same bytes and operations at the peaks, without the tail of the longest
  sample.
- Passes: 2 operations a parameter and token forward, twice that backward, once more where layers are recomputed, and
  attention's own; times pipeline bubble and imbalance. Bound: forward and backward at the peak, nothing else.
- Dispatch and combine: top-k copies of every token, over NVLink or the network. Bound: part of the passes' own.
"""

from __future__ import annotations

from dataclasses import dataclass

from rl.config.trainer import ParallelSection
from rl.models.architecture import Architecture
from rl.planning import constants
from rl.planning.cluster import Cluster
from rl.planning.memory import kv_bytes_per_token
from rl.planning.parameters import WHOLE, Sharing, layer_sizes, stage_sizes, total_parameters


@dataclass(frozen=True)
class Phase:
    """Seconds of one phase of a step.

    Attributes:
        name: of the phase.
        seconds: expected.
        bound: that nothing can beat.
        note: what it is made of.
    """

    name: str
    seconds: float
    bound: float
    note: str = ""


@dataclass(frozen=True)
class Batch:
    """Samples of one step.

    Attributes:
        samples: how many.
        prompts: different prompts among them.
        prompt, response: mean lengths in tokens.
        longest: longest response in tokens.
        mini_batches: optimizer steps they are cut into.
    """

    samples: int
    prompts: int
    prompt: int
    response: int
    longest: int
    mini_batches: int = 1

    @property
    def length(self) -> int:
        """Mean tokens of a sample."""
        return self.prompt + self.response

    @property
    def tokens(self) -> int:
        """Of all samples."""
        return self.samples * self.length


@dataclass(frozen=True)
class Training:
    """How a model is trained.

    Attributes:
        parallel: its layout.
        ranks: of the trainer.
        tokens_per_micro_batch: of a data-parallel rank.
        recompute: as ``trainer.recompute``.
        modules: as ``trainer.recompute_modules``.
        imbalance: tokens of the busiest expert-parallel rank over the mean.
        width: bytes of a parameter.
    """

    parallel: ParallelSection
    ranks: int
    tokens_per_micro_batch: int
    recompute: str
    modules: tuple[str, ...]
    imbalance: float
    width: int = 2


def generation(
    arch: Architecture,
    batch: Batch,
    cluster: Cluster,
    *,
    engines: int,
    tensor_parallel: int,
    seats: int,
    kv_cache_bytes: int,
    width: int,
    graphs: bool,
) -> Phase:
    """All samples of a step, on all engines.

    Args:
        seats: samples that an engine computes at once, if its cache holds them.
        kv_cache_bytes: of each of an engine's GPUs.
        width: bytes of a weight, and of a key or value.
        graphs: decoding steps are replayed as CUDA graphs; else launched kernel by kernel.
    """
    per_token = kv_bytes_per_token(arch, width, tensor_parallel)
    held = max(1, kv_cache_bytes // max(1, per_token * batch.length))
    mine = -(-batch.samples // engines)
    running = max(1, min(seats, held, mine))
    gpu = cluster.gpu

    def step(samples: int, share: float) -> float:
        cache = samples * (batch.prompt + batch.response / 2) * per_token
        read = (_read(arch, samples) * width / tensor_parallel + cache) / (gpu.memory_gbs * 1e9 * share)
        computed = samples * _operations(arch, batch.length, 1.0) / (tensor_parallel * gpu.tflops * 1e12 * share)
        return max(read, computed)

    def measured(samples: int) -> float:
        layer = constants.DECODE_LAYER_GRAPHS_S if graphs else constants.DECODE_LAYER_EAGER_S
        device = max(arch.layers * layer, step(samples, constants.DECODE_EFFICIENCY))
        return device + samples * constants.DECODE_SAMPLE_S

    steps = mine * batch.response / running
    prompts = -(-batch.prompts // engines) * batch.prompt * _operations(arch, batch.prompt, 1.0)
    prefill = prompts / (tensor_parallel * gpu.tflops * 1e12)
    tail = max(0, batch.longest - batch.response) * measured(max(1, running // 8))
    return Phase(
        "generation",
        steps * measured(running) + tail + prefill / constants.FORWARD_EFFICIENCY + mine * constants.REQUEST_S,
        steps * step(running, 1.0) + prefill,
        f"{running} samples at a time on an engine, {measured(running) * 1e3:.1f} ms a step "
        f"({'CUDA graphs' if graphs else 'eager'}), the tail {tail:.0f} s",
    )


def one_pass(
    name: str, arch: Architecture, batch: Batch, cluster: Cluster, training: Training, *, backward: bool
) -> Phase:
    """A pass over all samples of a step: forward, or forward and backward with the optimizer's steps."""
    parallel, ranks, gpu = training.parallel, training.ranks, cluster.gpu
    passes = 1.0 + (2.0 if backward else 0.0)
    again = _recomputed(arch, training) if backward else 0.0
    work = batch.tokens * (
        passes * _operations(arch, batch.length, training.imbalance)
        + again * _operations(arch, batch.length, training.imbalance)
    )
    efficiency = constants.TRAIN_EFFICIENCY if backward else constants.FORWARD_EFFICIENCY
    per_rank = batch.tokens * parallel.tp * parallel.pp / ranks / (batch.mini_batches if backward else 1)
    micro_batches = max(1.0, -(-per_rank // training.tokens_per_micro_batch))
    bubble = (micro_batches + (parallel.pp - 1) / parallel.vpp) / micro_batches
    computing = work / (ranks * gpu.tflops * 1e12 * efficiency)
    forwards = passes + (1.0 if again else 0.0)
    updates = batch.mini_batches if backward else 1
    host = updates * micro_batches * arch.layers / parallel.pp * constants.LAYER_HOST_S * forwards
    dispatching = forwards * _dispatch(arch, batch, cluster, training)
    gathering = forwards * _gathering(arch, batch, cluster, training)
    moving = dispatching + gathering
    reducing = batch.mini_batches * _reduction(arch, cluster, training) if backward else 0.0
    stepping = batch.mini_batches * _optimizer(arch, cluster, training) if backward else 0.0
    ideal = batch.tokens * passes * _operations(arch, batch.length, 1.0) / (ranks * gpu.tflops * 1e12)
    notes = [f"computing {computing:.1f} s", f"{micro_batches:.0f} micro-batches, bubble {bubble - 1:.0%}"]
    if dispatching:
        notes.append(f"dispatch {dispatching:.1f} s")
    if gathering:
        notes.append(f"tensor parallelism {gathering:.1f} s")
    gpu_bound = (computing + moving) * bubble
    if host * bubble > gpu_bound:
        notes.append(f"waits for the host {host:.1f} s")
    if reducing:
        notes.append(f"gradients {reducing:.1f} s")
    return Phase(name, max(gpu_bound, host * bubble) + reducing + stepping, ideal, ", ".join(notes))


def transfer(
    arch: Architecture, cluster: Cluster, *, path: str, engines: int, tensor_parallel: int, width: int
) -> Phase:
    """New weights to all engines; by ``ipc`` from trainer ranks on the engines' own GPUs."""
    size = total_parameters(arch) * width
    gpus = engines * tensor_parallel + (path != "ipc")
    link = cluster.gpu.nvlink_gbs if gpus <= cluster.gpus_per_node else cluster.network_gbs
    bound = size / tensor_parallel / (link * 1e9)
    if path in ("nccl", "ipc"):
        share = constants.NVLINK_EFFICIENCY if link == cluster.gpu.nvlink_gbs else constants.NETWORK_EFFICIENCY
        return Phase("weights", bound / share, bound, f"{size / 1e9:.0f} GB, GPU to GPU")
    return Phase("weights", size / (constants.STORE_GBS * 1e9), bound, f"{size / 1e9:.0f} GB by Ray's object store")


def turns(held_bytes: int) -> Phase:
    """Colocated: a trainer rank leaves its GPU and comes back.

    Args:
        held_bytes: weights and optimizer states of a rank.
    """
    seconds = 2 * held_bytes / (constants.OFFLOAD_GBS * 1e9)
    return Phase("turns", seconds, seconds, "trainer to host memory and back; what engines do is not counted")


def _operations(arch: Architecture, length: int, imbalance: float) -> float:
    """Floating-point operations of one token's forward; experts' count as often as the busiest rank's tokens."""
    count = 0.0 if arch.scalar_head else 2.0 * arch.vocab * arch.hidden
    for layer in range(arch.layers):
        sizes = layer_sizes(arch, WHOLE, moe=layer in arch.moe_layers)
        count += 2.0 * sum(sizes.dense)
        if sizes.experts:
            count += 2.0 * sum(sizes.experts) * arch.topk / arch.experts * imbalance
    return count + arch.layers * 2.0 * length * arch.heads * arch.head_dim  # causal: half of all pairs


def _read(arch: Architecture, samples: int) -> float:
    """Parameters that a decoding step of so many samples reads."""
    count = float(arch.vocab * arch.hidden)
    for layer in range(arch.layers):
        sizes = layer_sizes(arch, WHOLE, moe=layer in arch.moe_layers)
        count += sum(sizes.dense)
        if sizes.experts:
            count += sum(sizes.experts) * (1.0 - (1.0 - arch.topk / arch.experts) ** samples)
    return count


def _recomputed(arch: Architecture, training: Training) -> float:
    """Forwards that backward makes again."""
    if training.recompute == "full":
        return 1.0
    if training.recompute == "selective" and "moe" in training.modules and arch.is_moe:
        layer = layer_sizes(arch, WHOLE, moe=True)
        experts = sum(layer.experts) * arch.topk / arch.experts
        return experts / (experts + sum(layer.dense))
    return 0.0


def _dispatch(arch: Architecture, batch: Batch, cluster: Cluster, training: Training) -> float:
    """Seconds of all-to-alls of one forward: every token's copies to their experts and back."""
    parallel = training.parallel
    if not arch.is_moe or parallel.ep == 1:
        return 0.0
    rows = batch.tokens / training.ranks * parallel.pp * len(arch.moe_layers) / parallel.pp
    size = 2 * rows * arch.topk * arch.hidden * training.width * training.imbalance
    inside = min(parallel.ep * parallel.etp, cluster.gpus_per_node)
    away = 1.0 - inside / (parallel.ep * parallel.etp)
    near = (1.0 - away) * (inside - 1) / inside
    nvlink = size * near / (cluster.gpu.nvlink_gbs * 1e9 * constants.NVLINK_EFFICIENCY)
    network = size * away / (cluster.network_gbs * 1e9 * constants.NETWORK_EFFICIENCY)
    return nvlink + network


def _gathering(arch: Architecture, batch: Batch, cluster: Cluster, training: Training) -> float:
    """Seconds of tensor parallelism in one forward: rows are gathered before attention and scattered after it, and so
    around dense layers; experts take a rank's own rows."""
    parallel = training.parallel
    if parallel.tp == 1:
        return 0.0
    rows = batch.tokens * parallel.tp / training.ranks
    around = 2 * (2 * arch.layers - (0 if arch.shared_ffn else len(arch.moe_layers)))
    size = rows * around * arch.hidden * training.width * (parallel.tp - 1) / parallel.tp
    inside = parallel.tp <= cluster.gpus_per_node
    share = constants.NVLINK_EFFICIENCY if inside else constants.NETWORK_EFFICIENCY
    return size / (cluster.link_gbs(parallel.tp) * 1e9 * share)


def _reduction(arch: Architecture, cluster: Cluster, training: Training) -> float:
    """Seconds to add gradients up over ranks and to gather parameters, once for each optimizer step."""
    sharing, parallel = Sharing.of(training.ranks, training.parallel), training.parallel
    dense, experts = _fullest(arch, parallel)
    seconds = 0.0
    for ranks, stride, size in (
        (sharing.dense, parallel.tp, dense),
        (sharing.experts, parallel.etp * parallel.ep, experts),
    ):
        if ranks > 1:
            inside = ranks * stride <= cluster.gpus_per_node
            share = constants.NVLINK_EFFICIENCY if inside else constants.NETWORK_EFFICIENCY
            link = cluster.link_gbs(ranks * stride) * 1e9 * share
            seconds += size * (4 + training.width) * (ranks - 1) / ranks / link
    return seconds


def _optimizer(arch: Architecture, cluster: Cluster, training: Training) -> float:
    """Seconds of Adam: it reads and writes what it holds."""
    sharing = Sharing.of(training.ranks, training.parallel)
    dense, experts = _fullest(arch, training.parallel)
    mine = dense / sharing.dense + experts / sharing.experts
    return mine * (4 + 2 * 12 + training.width) / (cluster.gpu.memory_gbs * 1e9 * 0.7)


def _fullest(arch: Architecture, parallel: ParallelSection) -> tuple[int, int]:
    """Parameters of a rank of the stage that has most: dense ones and experts'."""

    def of(stage: int) -> tuple[int, int]:
        chunks = stage_sizes(arch, parallel, stage)
        return sum(sum(chunk.dense) for chunk in chunks), sum(sum(chunk.experts) for chunk in chunks)

    return max((of(stage) for stage in range(parallel.pp)), key=sum)
