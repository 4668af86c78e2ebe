"""Generation and inference of real batches, with and without gathering the tail: the part ``--real`` of bench_tail.

Two vLLM engines and one Megatron rank on CPUs, colocated, with the loop's own code (``rl/orchestration/tail.py``). The
same prompts are answered greedily, plain and gathered in turns, the weights staying as they are: so every repetition
must give the same tokens, and log-probs of actor and reference that differ by no more than packing makes of float32.
Response lengths are log-normal by prompt and cut off (a long tail), whatever the model says. R_t is 20% of the batch.

``seconds``: from the start of generation until the last pass over samples has ended, median over repetitions;
``speed-up``: median over pairs of repetitions that followed each other.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from rl.config import RunConfig, from_dict
from rl.orchestration.ahead import Moved
from rl.orchestration.experience import with_length
from rl.orchestration.feed import Batch
from rl.orchestration.setup import Run, open_run
from rl.orchestration.tail import Inferred, Tail, finish_inference, infer_beside
from rl.rollout.config import Sampling
from rl.rollout.latency import LatencyProfile
from rl.simulation.generation import SimGroup
from rl.simulation.tail import InferenceCost, simulate_tails
from rl.types import Prompt, Sample

ROOT = Path(__file__).resolve().parent.parent
PROMPTS, SAMPLES, LONGEST, MEDIAN, SIGMA = 16, 4, 700, 60, 1.3
FRACTION, CHUNK_TOKENS = 0.2, 1024
MOST_DIFFERENCE = 1e-4  # of log-probs in float32, nats


def configuration(directory: Path) -> RunConfig:
    """A colocated run of two engines and one rank."""
    raw: dict[str, Any] = yaml.safe_load((ROOT / "recipes" / "smoke.yaml").read_text())
    raw["run"] = {"name": "tail", "output_dir": str(directory / "run"), "seed": 1, "steps": 1}
    raw["model"]["path"] = str(directory / "model")
    raw["model"]["create_args"] |= {"hidden": 128, "moe_intermediate": 128}
    raw["data"] |= {"prompts_per_step": PROMPTS, "samples_per_prompt": SAMPLES}
    raw["sampling"] |= {"max_tokens": LONGEST, "forced_lengths": {"median": MEDIAN, "sigma": SIGMA}}
    raw["rollout"] |= {"engines": 2, "max_model_len": 64 + LONGEST + 32, "max_num_seqs": 64}
    raw["trainer"] |= {"ranks": 1, "parallel": {"ep": 1}, "tokens_per_micro_batch": 4096}
    raw["algorithm"] |= {"kl": {"coef": 0.01}}
    raw["stream"] = {"colocated": True}
    raw["fuse"] = {
        "tail": {"enabled": True, "threshold": round(FRACTION * PROMPTS * SAMPLES), "chunk_tokens": CHUNK_TOKENS}
    }
    raw["warmup"], raw["evaluation"] = {"steps": 0}, {"at_start": False, "at_end": False}
    raw["checkpoint"], raw["logging"] = {"every": 0}, {"wandb": "off", "tensorboard": False, "progress": False}
    return from_dict(raw)


def one_batch(run: Run, prompts: Sequence[Prompt], number: int, tail: Tail | None) -> dict[str, Any]:
    """Generate and infer once; what it took, and what came out."""
    run.engines_turn()
    sampling = Sampling(LONGEST, temperature=0.0, ignore_eos=True)
    began = time.time()
    stream = run.service.generate(prompts, SAMPLES, sampling, 1, tail=tail.rule() if tail is not None else None)
    limit_s = run.config.run.limits.generate_s
    batch = Batch(number, tuple(prompts), run.cursor, stream, limit_s)

    def collect() -> None:
        try:
            for group in stream:
                batch.put([sample for sample in group if isinstance(sample, Sample)])
        except BaseException as error:
            batch.fail(error)

    threading.Thread(target=collect, daemon=True).start()
    inferred = infer_beside(run, batch, Moved) if tail is not None else Inferred()
    samples = batch.all()
    inferred.batch_done = batch.completed
    run.trainer_turn(keep_weights=True)
    finish_inference(run, samples, inferred)
    old, reference = inferred.values["old_logprob"], inferred.values["reference"]
    found: dict[str, Any] = {"seconds": time.time() - began, "generated": batch.completed - began}
    if tail is not None:
        found |= inferred.metrics(tail.choice)
    tokens = {sample.sample_id: sample.response_tokens for sample in samples}
    return found | {"tokens": tokens, "old": old, "reference": reference, "inferred": inferred, "samples": samples}


def measure(profile: LatencyProfile, repeats: int) -> dict[str, Any]:
    """Run, print and return the rows."""
    with tempfile.TemporaryDirectory() as name:
        config = configuration(Path(name))
        with open_run(config, None) as run:
            run.update_engines()
            run.updated()
            tail = Tail.of_run(config, run.pool.info, run.packing.layout)
            assert tail is not None
            prompts = [with_length(run.data.train.prompt(0, i), MEDIAN, SIGMA, LONGEST) for i in range(PROMPTS)]
            one_batch(run, prompts, 0, None)  # the first of a process is slower
            plain, gathered = [], []
            for i in range(repeats):
                turns = [(plain, None), (gathered, tail)]
                for rows, how in turns if i % 2 == 0 else reversed(turns):
                    rows.append(one_batch(run, prompts, 1 + i, how))
            return report(profile, run, plain, gathered)


def report(
    profile: LatencyProfile, run: Run, plain: Sequence[dict[str, Any]], gathered: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    first = plain[0]
    tokens_same = all(
        np.array_equal(row["tokens"][name], first["tokens"][name])
        for row in [*plain, *gathered]
        for name in first["tokens"]
    )
    difference = max(
        float(np.abs(row[key][name] - first[key][name]).max())
        for row in [*plain, *gathered]
        for key in ("old", "reference")
        for name in first[key]
    )

    def median(rows: Sequence[dict[str, Any]], key: str) -> float:
        return statistics.median(row[key] for row in rows)

    names = ("seconds", "generated")
    tail_names = [name for name in gathered[0] if name.startswith("fuse/tail/")]
    found: dict[str, Any] = {
        "engines": 2,
        "samples": len(first["tokens"]),
        "tokens": sum(sample.length for sample in first["samples"]),
        "threshold": round(FRACTION * PROMPTS * SAMPLES),
        "repeats": len(plain),
        "load_average": round(os.getloadavg()[0], 1),
        "identical": tokens_same and difference <= MOST_DIFFERENCE,
        "tokens_identical": tokens_same,
        "largest_logprob_difference": difference,
        "plain": {name: median(plain, name) for name in names} | {"every": [round(r["seconds"], 3) for r in plain]},
        "gathered": {name: median(gathered, name) for name in (*names, *tail_names)}
        | {"every": [round(r["seconds"], 3) for r in gathered]},
    }
    pairs = [one["seconds"] / other["seconds"] for one, other in zip(plain, gathered, strict=True)]
    found["speedup"] = statistics.median(pairs)  # neighbours in time: the machine does other things, too
    found["predicted"] = predict(profile, run, first, found)
    print_report(found)
    return found


def predict(profile: LatencyProfile, run: Run, plain: dict[str, Any], found: dict[str, Any]) -> dict[str, float]:
    """What the simulator says of this batch, at the speeds that the plain repetitions had."""
    prompts: dict[str, list[Sample]] = {}
    for sample in plain["samples"]:
        prompts.setdefault(sample.prompt.uid, []).append(sample)
    groups = [
        SimGroup(uid, i, 0, group[0].prompt_length, tuple(len(s.response_tokens) for s in group))
        for i, (uid, group) in enumerate(prompts.items())
    ]
    settings: dict[str, Any] = {"engines": 2, "seats": 64, "kv_tokens": run.pool.info.kv_tokens}
    free = simulate_tails(groups, profile, costs=InferenceCost(0.0), thresholds=[], **settings)
    slowdown = found["plain"]["generated"] / free.plain.generated
    inference = found["plain"]["seconds"] - found["plain"]["generated"]
    # One rank takes as long beside one engine as alone: of two devices it has the one that it needs.
    costs = InferenceCost(inference / found["tokens"])
    sweep = simulate_tails(
        groups, profile.scaled(1 / slowdown), costs=costs, thresholds=[found["threshold"]], **settings
    )
    gathered = sweep.by_threshold[found["threshold"]]
    left = (found["tokens"] - gathered.hidden_tokens) * costs.seconds_per_token
    return {
        "plain_seconds": found["plain"]["seconds"],
        "seconds": gathered.generated + left,
        "speedup": found["plain"]["seconds"] / (gathered.generated + left),
    }


def print_report(found: dict[str, Any]) -> None:
    print(
        f"\nReal: {found['samples']} samples ({found['tokens']} tokens) on 2 engines and 1 rank, R_t "
        f"{found['threshold']}, {found['repeats']} repetitions in turns"
    )
    print(f"{'':9} {'seconds':>8} {'generation':>10}   every repetition")
    for name in ("plain", "gathered"):
        row = found[name]
        every = " ".join(format(value, ".2f") for value in row["every"])
        print(f"{name:9} {row['seconds']:8.2f} {row['generated']:10.2f}   {every}")
    row = found["gathered"]
    print(
        f"{row['fuse/tail/migrated_samples']:.0f} samples moved with {row['fuse/tail/kept_tokens']:.0f} tokens; "
        f"{row['fuse/tail/hidden_fraction']:.0%} of the tokens were inferred on before generation had ended "
        f"({row['fuse/tail/hidden_seconds']:.2f} s)"
    )
    print(
        f"speed-up {found['speedup']:.3f}, simulated {found['predicted']['speedup']:.3f}; load average of the machine "
        f"{found['load_average']:g}"
    )
    print(
        f"greedy tokens {'identical' if found['tokens_identical'] else 'NOT identical'} in all repetitions; log-probs "
        f"within {found['largest_logprob_difference']:.1e} nats"
    )
