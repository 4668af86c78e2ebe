#!/usr/bin/env python3
"""Planned memory beside measured memory: builds and trains models on the GPUs present, part by part.

    scripts/bench_memory.py --gpu [--json FILE] [--cases NAME ...]   # on 1 to 4 GPUs, NCCL, Transformer Engine, bf16
    scripts/bench_memory.py --cpu                                     # tiny, on gloo: parts that are counted exactly

Every case builds a model as the RL loop does (``build_model``, DDP, Megatron's optimizer, balancing), and makes two
optimizer steps on packed micro-batches of as many tokens as planned, with replayed routes that spread evenly. Columns:

- parameters, gradients, optimizer, slots: bytes of the tensors themselves.
- step: most that torch's allocator had given out during a step, less what was there before it; planned: activations,
  what comes and goes, and routes.
- allocator: most that it had reserved, less most that it had given out; libraries: what the driver says is in use
  beyond that, the CUDA context included.
- total: what the driver says is in use at the end of the steps. The allocator gives nothing back meanwhile.

Each figure is of the fullest rank. Bar (exit code 1): every total within 10% of its plan. On CPUs only the parts that
are counted exactly are compared. Measured, not simulated.
"""

from __future__ import annotations

import argparse
import gc
import sys
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

BAR = 0.10
GIB = 2**30
EXACT = ("parameters", "gradients", "optimizer", "slots")
PARTS = (*EXACT, "step", "allocator", "libraries", "total")


@dataclass(frozen=True)
class Case:
    """One model under one layout.

    Attributes:
        name: of the case.
        ranks: GPUs.
        parallel: sizes other than 1.
        recompute: as ``trainer.recompute``, with modules.
        distributed_optimizer: shards optimizer states.
        slots: of balancing; 0 is none.
        tokens: of a micro-batch.
        micro_batches: of a step, on a data-parallel rank.
        model: fields of the config.json.
    """

    name: str
    ranks: int
    parallel: dict[str, int] = field(default_factory=dict)
    recompute: tuple[Any, ...] = ("none",)
    distributed_optimizer: bool = True
    slots: int = 0
    tokens: int = 8192
    micro_batches: int = 4
    model: dict[str, Any] = field(default_factory=dict)


MODEL: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 8,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "norm_topk_prob": True,
    "vocab_size": 65536,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
}
# A narrow model with many layers, where activations are most of it, and a wide vocabulary, where logits are.
NARROW = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "vocab_size": 16384}
WORDS = {"num_hidden_layers": 4, "vocab_size": 151936}
CASES: tuple[Case, ...] = (
    Case("1 GPU, recompute full", 1, recompute=("full",)),
    Case("1 GPU, recompute moe", 1, recompute=("selective", ("moe",))),
    Case("1 GPU, narrow", 1, model=NARROW),
    Case("1 GPU, 152k words", 1, recompute=("full",), model=WORDS),
    Case("EP 2", 2, {"ep": 2}),
    Case("EP 2, plain optimizer, recompute full", 2, {"ep": 2}, ("full",), distributed_optimizer=False),
    Case("EP 2, recompute moe_act, layernorm", 2, {"ep": 2}, ("selective", ("moe_act", "layernorm"))),
    Case("EP 2, 2 slots", 2, {"ep": 2}, slots=2),
    Case("PP 2", 2, {"pp": 2}),
    Case("PP 2, VPP 2, recompute full", 2, {"pp": 2, "vpp": 2}, ("full",)),
    Case("TP 2 x EP 2", 2, {"tp": 2, "ep": 2}),
    Case("data parallel 2, recompute full", 2, recompute=("full",)),
    Case("EP 4", 4, {"ep": 4}),
    Case("PP 2 x EP 2", 4, {"pp": 2, "ep": 2}),
    Case("EP 4, recompute full, 16k tokens", 4, {"ep": 4}, ("full",), tokens=16384),
)
TINY = {
    "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 48, "num_hidden_layers": 4, "head_dim": 16,
    "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 8, "num_experts_per_tok": 2, "vocab_size": 256,
}  # fmt: skip


def tiny(case: Case) -> Case:
    """The same case for CPUs, which have no grouped experts whose activations could be recomputed."""
    recompute = ("selective", ("layernorm",)) if "moe_act" in str(case.recompute) else case.recompute
    return replace(case, recompute=recompute, tokens=64, micro_batches=2, model={**case.model, **TINY})


def architecture_of(case: Case) -> Any:
    """What the case builds."""
    from rl.models.architecture import architecture

    return architecture(MODEL | case.model)


def planned(case: Case, width: int, *, staged: bool, stage: int) -> dict[str, int]:
    """Bytes by column, of a rank of a pipeline stage."""
    from rl.config.trainer import ParallelSection
    from rl.planning.activations import Workload
    from rl.planning.memory import Balancing, ModelOnRanks, trainer_memory

    granularity, modules = case.recompute[0], tuple(case.recompute[1]) if len(case.recompute) > 1 else ()
    work = Workload(case.tokens, width, 1.0, granularity, modules)
    parallel = ParallelSection(**case.parallel)
    memory = trainer_memory(
        [ModelOnRanks("actor", architecture_of(case), parallel, True, work)],
        case.ranks,
        case.micro_batches,
        distributed_optimizer=case.distributed_optimizer,
        balancing=Balancing(case.slots, staged=staged) if case.slots else None,
        replayed_rows=case.micro_batches * case.tokens,
    )[stage]
    return {
        "parameters": memory.bytes_of("actor: parameters"),
        "gradients": memory.bytes_of("actor: gradients"),
        "optimizer": memory.bytes_of("actor: optimizer"),
        "slots": memory.bytes_of("replica slots"),
        "step": sum(map(memory.bytes_of, ("activations", "coming and going", "routes"))),
        "allocator": memory.bytes_of("allocator"),
        "libraries": memory.bytes_of("libraries") + memory.bytes_of("context"),
        "total": memory.total,
    }


def measure(case: Case) -> dict[str, Any]:
    """This rank's bytes by column, and its plan. Collective over all ranks of the case."""
    import torch
    import torch.distributed as dist

    from megatron_ultraep.config import BalanceConfig
    from megatron_ultraep.megatron import microbatch
    from megatron_ultraep.megatron.attach import attach
    from megatron_ultraep.megatron.groups import ParallelLayout, create_groups
    from megatron_ultraep.megatron.router_replay import RoutingReplay
    from rl.algorithms.losses import PolicyLossConfig
    from rl.models.builder import DTYPES, Recompute, build_model
    from rl.training.batch import MiniBatch
    from rl.training.passes import PassRunner, PassSettings
    from rl.training.spec import OptimizerSpec
    from rl.training.trained import TrainedModel
    from rl.training.worker import PolicyObjective
    from scripts.bench_subject import initialise
    from tests.rl.training.common import make_layout, make_samples

    gpu = torch.cuda.is_available()
    microbatch.install()
    if gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    layout = ParallelLayout(world=dist.get_world_size(), **case.parallel)
    groups = create_groups(layout, timeout_s=120)
    arch = architecture_of(case)
    model = build_model(
        arch, groups, dtype=DTYPES["bfloat16" if gpu else "float32"], recompute=Recompute(*case.recompute)
    )
    for index, chunk in enumerate(model.chunks):
        initialise(chunk, index)
    runner = PassRunner(model, RoutingReplay(model.chunks, arch.moe_layer_of()))
    trained = TrainedModel(model, runner, OptimizerSpec(), distributed_optimizer=case.distributed_optimizer)
    balance = BalanceConfig(slots=max(1, case.slots), min_tokens=1, gate=False, enabled=bool(case.slots))
    trained.balancer = attach(model.wrapped, balance, timeout_s=120)
    # Pieces of a micro-batch that fill it exactly: a sample of n tokens has n - 1 rows.
    pieces = [case.tokens // 4 + 1] * (4 * case.micro_batches * layout.dp)
    samples = make_samples(arch, tuple(pieces))
    batch = MiniBatch.make(samples, make_layout(samples, layout, case.tokens)).part(groups.coordinates["dp"])
    objective = PolicyObjective(PolicyLossConfig(), PassSettings(chunk_tokens=1024))
    trained.train(batch, 0, objective)
    before = 0
    if gpu:
        torch.cuda.synchronize()
        gc.collect()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    trained.train(batch, 1, objective)
    found = _tensors(trained)
    staged = (
        bool(case.slots) and found["slots"] > 0 and type(trained.balancer.transport).__name__ == "CollectiveTransport"
    )  # type: ignore[union-attr]
    if gpu:
        torch.cuda.synchronize()
        free, total = torch.cuda.mem_get_info()
        given, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        found |= {
            "step": given - before,
            "allocator": reserved - given,
            "libraries": total - free - torch.cuda.memory_reserved(),
            "total": total - free,
        }
    plan = planned(case, 2 if gpu else 4, staged=staged, stage=groups.coordinates["pp"])
    return {"measured": found, "planned": plan}


def _tensors(trained: Any) -> dict[str, int]:
    """Bytes that a trained model's own tensors take."""
    from megatron_ultraep.megatron import compat
    from megatron_ultraep.megatron.optimizer import held_by

    weights = {
        p.untyped_storage().data_ptr(): p.untyped_storage().nbytes()
        for chunk in trained.model.wrapped
        for p in chunk.parameters()
    }
    states = {
        tensor.data_ptr(): tensor.numel() * tensor.element_size()
        for held in held_by(trained.optimizer).values()
        for tensor in held.tensors().values()
    }
    return {
        "parameters": sum(weights.values()),
        "gradients": sum(b.untyped_storage().nbytes() for b in compat.gradient_buffers(trained.model.wrapped)),
        "optimizer": sum(states.values()),
        "slots": trained.balancer.slot_bytes if trained.balancer is not None else 0,
    }


@dataclass(frozen=True)
class Row:
    """A case: bytes by column of its fullest rank, and how far its plan is off."""

    case: Case
    planned: dict[str, int]
    measured: dict[str, int]

    @property
    def off(self) -> float | None:
        """Planned over measured total, less 1; None on CPUs."""
        return self.planned["total"] / self.measured["total"] - 1 if "total" in self.measured else None

    @property
    def kept(self) -> bool:
        """Whether the case keeps the bar; on CPUs whether the exact parts are exact, but for padding."""
        if self.off is not None:
            return abs(self.off) <= BAR
        return all(abs(self.planned[part] - self.measured[part]) <= 0.02 * self.planned[part] for part in EXACT)

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"off": self.off, "kept": self.kept}


def row_of(case: Case, ranks: Sequence[dict[str, Any]]) -> Row:
    """The fullest rank's row."""
    fullest = max(ranks, key=lambda r: r["measured"].get("total", sum(r["measured"].values())))
    return Row(case, fullest["planned"], fullest["measured"])


def table(rows: Sequence[Row]) -> str:
    """Planned and measured GiB of every column; MiB on CPUs."""
    unit = GIB if any(row.off is not None for row in rows) else 2**20
    lines = ["| case | " + " | ".join(PARTS) + " | off |", "|---" * (len(PARTS) + 2) + "|"]
    for row in rows:
        cells = [
            f"{row.planned[part] / unit:.2f} / " + (f"{row.measured[part] / unit:.2f}" if part in row.measured else "-")
            for part in PARTS
        ]
        off = "" if row.off is None else f"{row.off:+.1%}"
        lines.append(f"| {row.case.name} | " + " | ".join(cells) + f" | {off}{'' if row.kept else ' MISSED'} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None, pools: Any = None) -> int:
    """Measure; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--gpu", action="store_true", help="on the GPUs of this machine")
    where.add_argument("--cpu", action="store_true", help="tiny models on CPUs")
    parser.add_argument("--cases", nargs="+", metavar="NAME", help="only these cases")
    parser.add_argument("--json", type=Path, metavar="FILE")
    given = parser.parse_args(argv)

    import torch

    from scripts import bench_memory  # ranks find measure() under this name, not under __main__
    from scripts.bench_common import _pools
    from scripts.bench_results import versions, write
    from scripts.machine import hardware

    own = pools is None
    pools = pools or _pools(given.cpu)
    most = 4 if given.cpu else torch.cuda.device_count()
    rows: list[bench_memory.Row] = []
    failed: list[str] = []
    try:
        for case in CASES:
            if (given.cases and case.name not in given.cases) or case.ranks > most:
                continue
            used = tiny(case) if given.cpu else case
            # Made under the module's name, so that ranks can unpickle it.
            used = bench_memory.Case(**{name: getattr(used, name) for name in Case.__dataclass_fields__})
            try:
                rows.append(bench_memory.row_of(used, pools(used.ranks).run(bench_memory.measure, used, timeout=300)))
            except Exception:
                traceback.print_exc()
                failed.append(case.name)
                if own and not given.cpu:
                    pools.renew()
                continue
            print(table(rows[-1:]).split("\n")[-1], flush=True)
            if given.json:
                document = {"measured": True, "hardware": hardware(), "versions": versions(), "unit": "bytes"}
                write(str(given.json), document | {"rows": [row.to_json() for row in rows]})
    finally:
        if own:
            pools.stop()
    print(f"\nPlanned / measured, {'MiB' if given.cpu else 'GiB'}, of the fullest rank.\n" + table(rows))
    missed = [row.case.name for row in rows if not row.kept]
    print("bar " + ("kept" if rows and not missed and not failed else f"MISSED: {missed}, failed: {failed}"))
    return int(bool(missed or failed or not rows))


if __name__ == "__main__":
    sys.exit(main())
