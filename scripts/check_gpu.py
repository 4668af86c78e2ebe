#!/usr/bin/env python3
"""The trainer on GPUs: NCCL, Transformer Engine, bf16, against float64 on the CPU.

    scripts/check_gpu.py prepare DIR       # on any machine of the CPU stack: a tiny model, reference results
    scripts/check_gpu.py run DIR [--json FILE]   # on a machine with at least 2 GPUs

``prepare`` computes the loss, the gradients and the log-probs of one mini-batch with replayed routes in float64.
``run`` computes the same on the GPUs under several layouts and prints, per layout: the loss; the worst gradient tensor,
||d g|| / ||g|| against float64; mean and largest difference of a log-prob; and whether every router consumed
the captured routes. bf16 has 8 bits of mantissa: an error of a few 1e-2 in the worst tensor is its rounding, and the
row on one GPU shows how much that is. Exits with 1 when a layout is more than twice as far off as one GPU, or routes
differ. Measured, not simulated.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

CASES: tuple[tuple[str, int, dict[str, Any], dict[str, Any]], ...] = (
    ("one GPU", 1, {}, {}),
    ("data parallel 2", 2, {}, {}),
    ("EP 2", 2, {"ep": 2}, {}),
    ("EP 2, distributed optimizer", 2, {"ep": 2}, {"distributed_optimizer": True}),
    ("PP 2", 2, {"pp": 2}, {}),
    ("PP 2, VPP 2", 2, {"pp": 2, "vpp": 2}, {}),
    ("TP 2 x EP 2", 2, {"tp": 2, "ep": 2}, {}),
    ("EP 2, recompute full", 2, {"ep": 2}, {"recompute": ("full",)}),
    ("EP 2, recompute moe", 2, {"ep": 2}, {"recompute": ("selective", ("moe",))}),
    ("EP 2, recompute moe_act, layernorm", 2, {"ep": 2}, {"recompute": ("selective", ("moe_act", "layernorm"))}),
)
MODEL = {"layers": 4, "hidden": 128, "head_dim": 64, "moe_intermediate": 128, "initializer_range": 0.05}


def step(model: str, layout: dict[str, Any], dtype: str, spec: dict[str, Any]) -> dict[str, Any]:
    """This rank's loss, gradients, log-probs and route digests of one mini-batch, then two optimizer steps."""
    from rl.models.weights import export_weights
    from rl.training.batch import MiniBatch
    from rl.training.passes import PassSettings
    from rl.training.worker import PolicyObjective
    from tests.rl.training.common import LOSS, make_layout, make_samples, make_worker

    distributed = spec.get("distributed_optimizer", False)
    worker = make_worker(model, layout, dtype=dtype, **{"distributed_optimizer": False, **spec})
    samples = make_samples(worker.actor.arch)
    settings = PassSettings(temperature=0.7, with_entropy=True)
    batch = MiniBatch.make(samples, make_layout(samples, worker.spec.layout)).part(worker.groups.coordinates["dp"])
    logprobs, _ = worker.logprobs(batch, "actor", "old_logprob", 0, "replay", settings)
    objective = PolicyObjective(LOSS, settings)
    loss, _, report = worker.gradients(batch, 0, objective)
    # The distributed optimizer leaves each rank its shard of the gradients only.
    gradients = {} if distributed else dict(export_weights(worker.actor, source="main_grad"))
    tensors = {name: t.double().cpu().numpy().copy() for name, t in gradients.items()}
    after = [worker.train(batch, i + 1, objective) for i in range(2)]
    return {
        "loss": loss,
        "tensors": tensors,
        "logprobs": logprobs,
        "digests": report.digests,
        "after": [r.loss for r in after],
        "updated": all(r.updated for r in after),
    }


def merged(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """The whole model's view."""
    import numpy as np

    out: dict[str, Any] = {"loss": 0.0, "tensors": {}, "logprobs": {}, "digests": {}, "after": np.zeros(2)}
    for part in parts:
        out["loss"] += part["loss"]
        out["after"] = out["after"] + np.array(part["after"])
        out["tensors"] |= part["tensors"]
        out["logprobs"] |= part["logprobs"]
        for name, digest in part["digests"].items():
            with np.errstate(over="ignore"):
                out["digests"][name] = out["digests"].get(name, np.zeros_like(digest)) + digest
    return out


def prepare(directory: Path) -> None:
    """Write ``model/`` and ``reference.npz``."""
    import numpy as np
    import torch.distributed as dist

    from rl.models import tiny

    directory.mkdir(parents=True, exist_ok=True)
    model = tiny.qwen3_moe(directory / "model", seed=3, dtype="bfloat16", **MODEL)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{directory.absolute()}/store", rank=0, world_size=1)
    result = merged([step(str(model), {}, "float64", {})])
    arrays = {f"gradient {n}": g.astype("float32") for n, g in result["tensors"].items()}
    arrays |= {f"logprobs {n}": p for n, p in result["logprobs"].items()}
    np.savez_compressed(directory / "reference.npz", loss=result["loss"], after=result["after"], **arrays)
    dist.destroy_process_group()
    (directory / "store").unlink(missing_ok=True)
    print(f"float64 on the CPU: loss {result['loss']:.6f}, after one and two steps {result['after'].tolist()}")


def one_rank(rank: int, world: int, directory: str, results: str) -> None:
    """All cases of one world size, in one process per GPU."""
    import torch
    import torch.distributed as dist

    torch.cuda.set_device(rank)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(29500 + world), CUDA_DEVICE_MAX_CONNECTIONS="1")
    dist.init_process_group("nccl", rank=rank, world_size=world, device_id=torch.device("cuda", rank))
    found = {}
    for name, ranks, layout, spec in CASES:
        if ranks != world:
            continue
        started = time.perf_counter()
        mine: dict[str, Any] = {}
        try:
            mine = step(f"{directory}/model", layout, "bfloat16", spec)
        except Exception as error:
            traceback.print_exc()
            mine = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
        parts: list[Any] = [None] * world
        dist.all_gather_object(parts, mine)
        if any("error" in p for p in parts):
            found[name] = {"error": next(p["error"] for p in parts if "error" in p)}
        else:
            found[name] = merged(parts) | {"seconds": time.perf_counter() - started}
    if rank == 0:
        torch.save(found, results)
    dist.barrier()
    dist.destroy_process_group()


def run(directory: Path, json_file: Path | None) -> int:
    """Run all cases and print the table; 1 when something is off."""
    import numpy as np
    import torch
    import torch.multiprocessing as mp

    from megatron_ultraep.megatron import compat
    from megatron_ultraep.replay import layer_digests
    from rl.models.architecture import read_architecture
    from tests.rl.training.common import make_samples

    reference = np.load(directory / "reference.npz")
    captured = {
        s.sample_id: layer_digests(s.routes.handle) for s in make_samples(read_architecture(directory / "model"))
    }
    found: dict[str, Any] = {}
    for world in sorted({ranks for _, ranks, _, _ in CASES}):
        if world > torch.cuda.device_count():
            print(f"cases on {world} GPUs were not run: this machine has {torch.cuda.device_count()}")
            continue
        results = f"/tmp/check_gpu_{world}.pt"
        mp.spawn(one_rank, args=(world, str(directory), results), nprocs=world)
        found |= torch.load(results, weights_only=False)
    rows = []
    for name, *_ in CASES:
        if name not in found:
            continue
        case = found[name]
        if "error" in case:
            rows.append({"layout": name, "error": case["error"]})
            continue
        gradient = max(
            (
                float(np.linalg.norm(g - reference[f"gradient {n}"]) / np.linalg.norm(reference[f"gradient {n}"]))
                for n, g in case["tensors"].items()
            ),
            default=None,
        )
        difference = np.concatenate([np.abs(p - reference[f"logprobs {n}"]) for n, p in case["logprobs"].items()])
        routes = set(case["digests"]) == set(captured) and all(
            np.array_equal(captured[n], d) for n, d in case["digests"].items()
        )
        rows.append(
            {
                "layout": name,
                "loss": case["loss"],
                "loss_difference": abs(case["loss"] - float(reference["loss"])),
                "loss_after": [float(x) for x in case["after"]],
                "gradient_error": gradient,
                "logprob_mean": float(difference[difference > 0].mean()),
                "logprob_max": float(difference.max()),
                "routes_as_captured": routes,
                "seconds": case["seconds"],
            }
        )
    base = rows[0]
    failed = False
    print(f"float64 on the CPU: loss {float(reference['loss']):.6f}, later {reference['after'].tolist()}")
    print(f"{'layout':36} {'loss':>10} {'after 2 steps':>13} {'grad err':>9} {'|d logp|':>9} {'max':>9} routes")
    for row in rows:
        if "error" in row:
            failed = True
            print(f"{row['layout']:36} {row['error']}")
            continue
        error = row["gradient_error"]
        bad = not row["routes_as_captured"] or row["logprob_mean"] > 2 * base["logprob_mean"]
        bad |= error is not None and error > 2 * base["gradient_error"]
        failed |= bad
        print(
            f"{row['layout']:36} {row['loss']:10.6f} {row['loss_after'][1]:13.6f} "
            f"{'sharded' if error is None else format(error, '.1e'):>9} {row['logprob_mean']:9.1e} "
            f"{row['logprob_max']:9.1e} {'equal' if row['routes_as_captured'] else 'DIFFER'}{'  OFF' if bad else ''}"
        )
    if json_file:
        import transformer_engine

        json_file.write_text(
            json.dumps(
                {
                    "measured": True,
                    "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
                    "torch": torch.__version__,
                    "megatron-core": compat.version(),
                    "transformer-engine": transformer_engine.__version__,
                    "dtype": "bfloat16",
                    "rows": rows,
                },
                indent=1,
            )
            + "\n"
        )
    return int(failed)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["prepare", "run"])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    arguments = parser.parse_args()
    if arguments.action == "prepare":
        prepare(arguments.directory)
        return 0
    return run(arguments.directory, arguments.json)


if __name__ == "__main__":
    sys.exit(main())
