"""Measured constants of the planner, each with where it comes from. Change them here, with the file that shows it."""

from __future__ import annotations

from rl.planning.cluster import GIB

# ---------------------------------------------------------------- memory

CONTEXT_BYTES = round(0.5 * GIB)
"""CUDA context of a process. Source: ``nvidia-smi`` beside an idle process of the GPU stack on H100."""

WORKSPACE_BYTES = round(1.0 * GIB)
PEER_BYTES = round(0.8 * GIB)
MOST_PEERS = 3
"""Workspaces of cuBLAS and Transformer Engine, and communicators by peers of the expert- and data-parallel groups.
Source: device memory less tensors in benchmarks/results/model-gpu-ep2.json (one peer) and model-gpu-ep4.json (three).
Nothing was measured beyond three peers; more are counted as three."""

ALLOCATOR_SHARE = 0.10
"""What torch's caching allocator holds beyond the tensors of a step, over activations and what comes and goes. Source:
as above."""

DISPATCH_COPIES = 4
"""Copies of dispatched tokens that an MoE layer's all-to-alls and sorts leave with the allocator, since memory that a
communication stream used is free only when that stream has passed. Source: slope of device memory over the imbalance in
benchmarks/results/layer-gpu-ep4.json."""

ENGINE_WORKSPACE_BYTES = round(2.5 * GIB)
"""An engine's process beside weights, key-value cache and logits: context, workspaces, activations of a step. Source:
benchmarks/results/stream-real-gpu.json, turn ``generate`` (21.9 GiB with 16 GiB of cache), less the trainer's residue.
"""

ASLEEP_BYTES = round(1.2 * GIB)
"""What a sleeping engine leaves on its GPU: context and workspaces. Source: as above, turn ``train``."""

# ---------------------------------------------------------------- times

TRAIN_EFFICIENCY = 0.50
"""Share of a GPU's peak in forward and backward with balanced routes, all-to-alls and the optimizer's steps left out.
Source: benchmarks/results/model-trace-gpu-ep4.json, plans made ahead: 293 ms for 16,384 tokens a rank, less what is
planned for those two."""

FORWARD_EFFICIENCY = 0.50
"""The same of a pass without backward: not measured, taken to be as good."""

DECODE_EFFICIENCY = 0.5
"""Share of the memory's bandwidth that decoding reaches, of weights and cache read in a step. Not measured here with a
model of this size, with routes captured."""

DECODE_LAYER_GRAPHS_S = 0.000125
"""Least time of a layer in a decoding step, steps replayed as CUDA graphs: small kernels one after another, and a
layer's share of what the host does once a step. Source: the colocated run of benchmarks/results/stream-real-gpu-2.json,
30 layers, at most 144 samples on an engine. Every group's end is one layer constant, one sample constant and one start
further than the start of its iteration; docs/notes/planner.md has the fit."""

DECODE_LAYER_EAGER_S = 0.00063
"""The same in eager mode, where the host launches every kernel. Source: both runs of
benchmarks/results/stream-real-gpu.json, 30 layers: 9.62 - 1.59 s of generation with 256 samples on an engine and
6.50 - 1.27 s with 128, of 128 steps each, solved for this and 0.34 ms a running sample."""

DECODE_SAMPLE_S = 0.00005
"""Host time of a decoding step for each running sample, in both modes, added to what the device needs: steps are
settled one by one. Source: as ``DECODE_LAYER_GRAPHS_S``. The 0.34 ms of the eager runs are no longer so: there every
request had a random generator, asked one after the other, and every token's log-prob an object. Eager mode was not
measured since."""

REQUEST_S = 0.0017
"""Host time of an engine for each sample besides its decoding steps: asked for, its prompt read, its routes and text
handed back. Source: 0.20 s a start for 128 samples and 4 ms an end of 8 in benchmarks/results/stream-real-gpu-2.json,
and 1.02 s of generation for 512 samples of 3 tokens in docs/runs/smollm2-moe/index.md."""

LAYER_HOST_S = 0.0039
"""Host time of one layer in one micro-batch, forward; backward takes twice that. Source:
benchmarks/results/layer-gpu-ep4.json, stock, 32 experts with balanced routes, where the host was slower than the GPUs:
11.7 ms forward and backward of a MoE layer."""

NVLINK_EFFICIENCY = 0.73
"""Share of NVLink's data sheet that transfers reach. Source: benchmarks/results/transfer-gpu.json (329 of 450 GB/s)."""

NETWORK_EFFICIENCY = 0.8
"""The same of the network between nodes: not measured."""

STORE_GBS = 1.0
"""Weights through Ray's object store, of one engine or rank (GB/s). Source: benchmarks/results/stream-real-gpu.json:
1.33 GB in 1.27 to 1.59 s."""

OFFLOAD_GBS = 40.0
"""Between a GPU and pinned host memory, one direction (GB/s): PCIe 5 x16, not measured here."""

STEP_OVERHEAD_S = 1.0
"""Rewards, advantages, ledger and what else of a step is neither generation nor training: not measured for long
responses. For 1,024 short ones it was 0.2 s, rewards overlapped (docs/runs/smollm2-moe/index.md)."""
