#!/usr/bin/env python
"""Host time of an engine step, beside vLLM's own.

    python scripts/bench_engine_step.py                                  # CPU, a model so small that host time is all
    python scripts/bench_engine_step.py --gpu --json FILE                # SmolLM2-135M's shape with 8 experts
    python scripts/bench_engine_step.py --modes before --running 256 --profile

Modes; those that one engine can have in turn are measured in turn:

- ``bare``: vLLM's engine alone, without seeds, log-probs and routes. The ideal.
- ``seeds``, ``logprobs``, ``routes``: bare with one of them, as vLLM does it: a random generator per request, a
  dictionary per token.
- ``noise``, ``flat``: bare with what takes the place of the first two now.
- ``before``: a :class:`RolloutEngine` with generators and dictionaries.
- ``now``: a :class:`RolloutEngine` as it is.

Columns:

- ``step``: ms from the start of a step to the start of the next, all samples decoding, none ending; the median, and of
  several repetitions (``--repeats``) the least.
- ``us/sample``: the same in us per running sample; ``over bare``: of these, what bare vLLM does not need.
- ``cpu``: us of CPU time that the engine's thread used per running sample and step.
- ``mixed``: us per running sample and step, mean, while samples of unequal length end and others take their place.

Measured.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import io
import json
import os
import pstats
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from rl.rollout.config import Device, EngineConfig, Sampling, derive_seed, engine_environment  # noqa: E402
from rl.rollout.engine import RolloutEngine  # noqa: E402
from rl.rollout.ranks import call_ranks  # noqa: E402
from rl.types import Prompt  # noqa: E402

FAMILIES = (("bare", "seeds", "noise", "logprobs", "flat"), ("routes",), ("before", "now"))
MODES = tuple(mode for family in FAMILIES for mode in family)
GROUP = 8  # samples of a prompt
PROMPT_TOKENS = 32
SKIPPED = 4  # first steps with all samples, of which some still compute prompts
LIMIT_S = 1800.0


@dataclass(frozen=True)
class Row:
    """One mode with so many samples; see the module's docstring."""

    mode: str
    running: int
    step_ms: float
    sample_us: float
    cpu_us: float
    mixed_us: float
    steps: int
    over_bare_us: float | None = None


@dataclass(frozen=True)
class Step:
    """Start and end of one call of vLLM's ``step`` in s, CPU seconds of its thread, samples that ran."""

    start: float
    end: float
    cpu: float
    running: int


class Clock:
    """Takes the time of every step of an engine; :meth:`take` hands over what was taken."""

    def __init__(self, engine: Any) -> None:
        self._steps: list[Step] = []
        inner = engine.step

        def step() -> Any:
            running = len(engine.output_processor.request_states)
            cpu, start = time.thread_time(), time.perf_counter()
            outputs = inner()
            self._steps.append(Step(start, time.perf_counter(), time.thread_time() - cpu, running))
            return outputs

        engine.step = step

    def take(self) -> list[Step]:
        taken, self._steps = self._steps, []
        return taken


class Samplers:
    """What draws tokens in an engine of one rank: vLLM's own, or ours."""

    def __init__(self, engine: Any) -> None:
        from rl.rollout import compat, sampling

        self._engine, self._set = engine, compat.set_token_sampler
        self._stock = self._current(compat)
        self.exchanged: bool = call_ranks(engine, sampling.install)[0]
        self._ours = self._current(compat)

    def _current(self, compat: Any) -> Any:
        return self._engine.collective_rpc(lambda worker: compat.token_sampler(worker.model_runner))[0]

    def use(self, ours: bool) -> None:
        module = self._ours if ours else self._stock
        if self.exchanged:
            self._engine.collective_rpc(lambda worker: self._set(worker.model_runner, module))


class Switched(RolloutEngine):
    """The engine as it is, or with what it did before: a generator per request, a dictionary of log-probs per token."""

    before = False
    samplers: Samplers

    def _exchange_sampler(self, engine: Any) -> bool:
        self.samplers = Samplers(engine)
        return self.samplers.exchanged

    async def switch(self, before: bool) -> None:
        self.before, self._exchanged = before, self.samplers.exchanged and not before
        await asyncio.wrap_future(self._live().call(lambda engine: self.samplers.use(not before)))

    def _params(self, *args: Any) -> Any:
        params = super()._params(*args)
        params.flat_logprobs = not self.before
        return params

    def _assemble(self, *args: Any) -> Any:
        if self.before:
            output = args[4]
            pairs = zip(output.logprobs or (), output.token_ids, strict=False)
            logprobs = [entry[token].logprob for entry, token in pairs]
            output.logprobs = SimpleNamespace(logprobs=logprobs, start_indices=range(len(logprobs)))
        return super()._assemble(*args)


class Bare:
    """vLLM's in-process engine, stepped by this thread."""

    def __init__(self, config: EngineConfig) -> None:
        from rl.rollout import compat
        from rl.rollout.sampling import request_seed

        self._request_seed = request_seed
        owner = Switched(config)
        self._engine = owner._build()
        self._samplers = owner.samplers
        self.clock = Clock(self._engine)
        self._vllm = compat.engine_api()
        self._mode = "bare"
        self._count = 0

    def switch(self, mode: str) -> None:
        self._mode = mode
        self._samplers.use(mode == "noise")

    def profiled(self, profile: cProfile.Profile, function: Callable[[], None]) -> None:
        profile.runcall(function)

    def _add(self, length: int) -> None:
        self._count += 1
        seed = derive_seed(0, str(self._count))
        seeded = self._request_seed(seed, self._mode == "noise" and self._samplers.exchanged)
        params = self._vllm.SamplingParams(
            temperature=1.0,
            max_tokens=length,
            logprobs=0 if self._mode in ("logprobs", "flat") else None,
            flat_logprobs=self._mode == "flat",
            ignore_eos=True,
            detokenize=False,
            output_kind=self._vllm.FINAL_ONLY,
            **(seeded if self._mode in ("noise", "seeds") else {}),
        )
        prompt = prompt_tokens(self._count // GROUP).tolist()
        self._engine.add_request(str(self._count), {"prompt_token_ids": prompt}, params)

    def run(self, lengths: Sequence[int], running: int) -> None:
        """Draw samples of these lengths, at most ``running`` at a time."""
        waiting = list(reversed(lengths))
        while waiting or self._engine.has_unfinished_requests():
            while waiting and len(self._engine.output_processor.request_states) < running:
                self._add(waiting.pop())
            self._engine.step()

    def close(self) -> None:
        from rl.rollout import compat

        compat.shut_down(self._engine)


class Ours:
    """A rollout engine, with its thread and its event loop."""

    def __init__(self, config: EngineConfig) -> None:
        self._runner = asyncio.Runner()
        self._engine = Switched(config)
        self._runner.run(self._engine.start())
        self.clock = self._on_thread(Clock)
        self._groups = 0

    def switch(self, mode: str) -> None:
        self._runner.run(self._engine.switch(mode == "before"))

    def _on_thread(self, function: Callable[[Any], Any]) -> Any:
        return self._engine._live().call(function).result(LIMIT_S)

    def profiled(self, profile: cProfile.Profile, function: Callable[[], None]) -> None:
        self._on_thread(lambda engine: profile.enable())
        function()
        self._on_thread(lambda engine: profile.disable())

    def run(self, lengths: Sequence[int], running: int) -> None:
        """Draw samples of these lengths, at most ``running`` at a time, groups of ``GROUP`` together."""
        self._runner.run(self._generate(lengths, running))

    async def _generate(self, lengths: Sequence[int], running: int) -> None:
        seats = asyncio.Semaphore(running // GROUP)
        sampling = Sampling(max_tokens=max(lengths), ignore_eos=True)

        async def group(number: int, length: int) -> None:
            async with seats:
                prompt = Prompt(f"p{number}", 0, 0, "", prompt_tokens(number), metadata={"max_tokens": length})
                samples = await self._engine.generate(prompt, [f"{number}/{k}" for k in range(GROUP)], sampling, number)
                if any(len(getattr(sample, "response_tokens", ())) != length for sample in samples):
                    raise SystemExit(f"expected {GROUP} samples of {length} tokens, got {samples}")

        first = self._groups
        self._groups += len(lengths) // GROUP
        await asyncio.gather(*(group(first + n, length) for n, length in enumerate(lengths[::GROUP])))

    def close(self) -> None:
        self._runner.run(self._engine.stop())
        self._runner.close()


def prompt_tokens(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(3, 200, PROMPT_TOKENS).astype(np.int32)


def make_model(path: Path, device: Device) -> None:
    """Random weights: only times are looked at."""
    from rl.models import tiny

    if device == "cuda":
        shape = {"layers": 30, "hidden": 576, "heads": 9, "kv_heads": 3, "intermediate": 1536}
        tiny.mixtral(path, **shape, initializer_range=0.02, dtype="bfloat16")
    else:
        tiny.mixtral(path, layers=2, hidden=32, heads=1, kv_heads=1, intermediate=32)


def engine_config(arguments: argparse.Namespace) -> EngineConfig:
    return EngineConfig(
        str(arguments.model),
        dtype="bfloat16" if arguments.gpu else "float32",
        device="cuda" if arguments.gpu else "cpu",
        max_model_len=PROMPT_TOKENS + 4 * arguments.tokens,
        max_num_seqs=max(arguments.running),
        kv_cache_memory_bytes=(16 << 30) if arguments.gpu else (256 << 20),
        capture_routes=arguments.family[0] in ("routes", "before", "now"),
        generate_timeout_s=LIMIT_S,
        cuda_graphs=arguments.graphs,
    )


def whole_groups(running: int, tokens: int) -> list[int]:
    """Lengths of three times ``running`` samples, log-normal with median ``tokens / 2``, equal within a group."""
    drawn = np.random.default_rng(7).lognormal(np.log(tokens / 2), 0.6, 3 * running // GROUP)
    return np.repeat(np.clip(drawn, 4, 4 * tokens - 1).astype(int), GROUP).tolist()


def least(rows: Sequence[Row]) -> Row:
    """Of repetitions the least of each figure: what others on the machine add is not ours."""
    first = rows[0]
    figures = {name: min(getattr(row, name) for row in rows) for name in ("step_ms", "sample_us", "cpu_us", "mixed_us")}
    return replace(first, **figures)


def measure(mode: str, subject: Bare | Ours, running: int, tokens: int) -> Row:
    subject.run([SKIPPED] * running, running)  # warm
    subject.clock.take()
    subject.run([tokens] * running, running)
    steps = [step for step in subject.clock.take() if step.running == running][SKIPPED:]
    periods = [after.start - step.start for step, after in pairwise(steps)]
    step_s = statistics.median(periods)
    cpu_s = statistics.median(step.cpu for step in steps[:-1])
    subject.run(whole_groups(running, tokens), running)
    mixed = subject.clock.take()
    seconds = sum(after.start - step.start for step, after in pairwise(mixed))
    mixed_s = seconds / sum(step.running for step in mixed[:-1])
    us = 1e6 / running
    return Row(mode, running, 1e3 * step_s, us * step_s, us * cpu_s, 1e6 * mixed_s, len(periods))


def one_family(arguments: argparse.Namespace) -> None:
    """In a process of its own; prints its rows as JSON lines behind a mark."""
    family: list[str] = arguments.family
    subject = (Ours if "now" in family or "before" in family else Bare)(engine_config(arguments))
    try:
        for running in arguments.running:
            rows: dict[str, list[Row]] = {mode: [] for mode in family}
            for _ in range(arguments.repeats):
                for mode in family:  # in turn, so that what else the machine does befalls all
                    subject.switch(mode)
                    rows[mode].append(measure(mode, subject, running, arguments.tokens))
            for repetitions in rows.values():
                print("ROW " + json.dumps(asdict(least(repetitions))), flush=True)
        if arguments.profile:
            for mode in family:
                subject.switch(mode)
                print(profile(mode, subject, arguments.running[-1], arguments.tokens), flush=True)
    finally:
        subject.close()


def profile(mode: str, subject: Bare | Ours, running: int, tokens: int) -> str:
    """The 40 functions of the engine's thread that took most time of their own."""
    profiler, text = cProfile.Profile(), io.StringIO()
    subject.profiled(profiler, lambda: subject.run([tokens] * running, running))
    pstats.Stats(profiler, stream=text).sort_stats("tottime").print_stats(40)
    return f"\n{mode}, {running} samples of {tokens} tokens\n{text.getvalue()}"


def run_family(family: Sequence[str], arguments: argparse.Namespace, model: Path) -> list[Row]:
    """Rows of modes that one engine can have in turn."""
    device: Device = "cuda" if arguments.gpu else "cpu"
    command = [sys.executable, str(Path(__file__)), "--family", *family, "--model", str(model)]
    command += ["--tokens", str(arguments.tokens), "--repeats", str(arguments.repeats)]
    command += ["--running", *map(str, arguments.running)]
    command += [f"--{flag}" for flag in ("gpu", "profile", "graphs") if getattr(arguments, flag)]
    environment = os.environ | engine_environment(device)
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, timeout=LIMIT_S)
    rows = []
    for line in done.stdout.splitlines():
        if line.startswith("ROW "):
            rows.append(Row(**json.loads(line[4:])))
        elif arguments.profile:
            print(line)
    if done.returncode:
        raise SystemExit(f"{', '.join(family)}: exit code {done.returncode}\n{done.stdout[-4000:]}")
    return rows


def table(rows: Sequence[Row]) -> str:
    rows = sorted(rows, key=lambda row: (MODES.index(row.mode), row.running))
    lines = ["mode       running   step ms   us/sample   over bare       cpu     mixed"]
    for row in rows:
        over = "-" if row.over_bare_us is None else f"{row.over_bare_us:.1f}"
        lines.append(
            f"{row.mode:<10} {row.running:>7} {row.step_ms:>9.2f} {row.sample_us:>11.1f} {over:>11} "
            f"{row.cpu_us:>9.1f} {row.mixed_us:>9.1f}"
        )
    return "\n".join(lines)


def beside_bare(rows: Sequence[Row]) -> list[Row]:
    bare = {row.running: row.sample_us for row in rows if row.mode == "bare"}
    return [
        replace(row, over_bare_us=row.sample_us - bare[row.running] if row.running in bare else None) for row in rows
    ]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", action="store_true", help="on a GPU, with a larger model")
    parser.add_argument("--graphs", action="store_true", help="replay decoding steps as CUDA graphs")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=["bare", "before", "now"])
    parser.add_argument("--running", nargs="+", type=int, default=[32, 128, 256, 512], help=f"multiples of {GROUP}")
    parser.add_argument("--tokens", type=int, default=64, help="of each response")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--profile", action="store_true", help="print the engine thread's functions by own time")
    parser.add_argument("--family", nargs="+", choices=MODES, help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help="Hugging Face directory; default: a random model")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    if arguments.family:
        one_family(arguments)
        return
    from scripts.machine import hardware

    with tempfile.TemporaryDirectory() as directory:
        model = arguments.model or Path(directory) / "model"
        if arguments.model is None:
            make_model(model, "cuda" if arguments.gpu else "cpu")
        rows: list[Row] = []
        for family in FAMILIES:
            chosen = [mode for mode in family if mode in arguments.modes]
            if not chosen:
                continue
            rows += run_family(chosen, arguments, model)
            print(table(beside_bare(rows)) + "\n", flush=True)
    if arguments.json:
        result = {"hardware": hardware(), "tokens": arguments.tokens, "rows": [asdict(r) for r in beside_bare(rows)]}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
