"""What one rank of ``bench_fused.py`` does: two models, their stage times, and schedules in turn on one executor."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_ultraep.megatron import compat
from megatron_ultraep.megatron.groups import ParallelLayout, create_groups
from megatron_ultraep.pipeline.agreement import share_schedule
from megatron_ultraep.pipeline.baselines import concatenated, one_f_one_b
from megatron_ultraep.pipeline.bound import lower_bound
from megatron_ultraep.pipeline.communication import Links
from megatron_ultraep.pipeline.executor import ExecutionReport, FusedExecutor, Work, makespan
from megatron_ultraep.pipeline.problem import PipelineModel, Problem, Schedule
from megatron_ultraep.pipeline.simulate import simulate
from megatron_ultraep.pipeline.stage import StageWork
from rl.models.architecture import Architecture
from rl.models.builder import BuiltModel, build_model
from rl.models.critic import build_scalar_model

METHODS = ("serial", "concatenated", "fused")


@dataclass(frozen=True)
class Case:
    """Two models on the nodes.

    Attributes:
        name: of the case.
        layers: of the actor and of the critic.
        stages: of the actor (one on each node) and of the critic, whose replicas fill the nodes in reverse.
        microbatches: of each, of each replica.
        forward_only: the second model is the reference: no backward.
    """

    name: str
    layers: tuple[int, int]
    stages: tuple[int, int]
    microbatches: tuple[int, int]
    forward_only: bool = False


@dataclass(frozen=True)
class Options:
    """Sizes and repetitions.

    Attributes:
        hidden, ffn, experts, topk, vocabulary: of both models.
        rows: of a micro-batch.
        ep: expert parallel size, which is the ranks of a node.
        dtype: of parameters.
        repetitions, warmup: of every method.
        solve_s: time of the search for the fused schedule, in seconds.
        sleep_ms: instead of models, stages that sleep for so long per layer and forward; 0: real models.
    """

    hidden: int
    ffn: int
    experts: int
    topk: int
    vocabulary: int
    rows: int
    ep: int
    dtype: str
    repetitions: int
    warmup: int
    solve_s: float
    sleep_ms: float = 0.0


@dataclass(frozen=True)
class Row:
    """One method of one case; times in milliseconds.

    Attributes:
        predicted: makespan by simulation of the stage times that were measured just before.
        predicted_own: by simulation of the stage times in the method's own runs; None for serial.
        bound: no valid schedule of the predicted times is shorter.
        gib: most device memory in use on a rank; None on CPUs.
    """

    case: str
    method: str
    ms: float
    p10: float
    p90: float
    speedup: float
    predicted: float
    predicted_own: float | None
    bound: float
    finish_ms: float
    gib: float | None

    @property
    def of_predicted(self) -> float:
        return self.ms / self.predicted


def placement(stages: int, nodes: int) -> tuple[tuple[int, ...], ...]:
    """Replicas on consecutive segments, each in reverse."""
    return tuple(tuple(range(first + stages - 1, first - 1, -1)) for first in range(0, nodes, stages))


class Sleeping:
    """Work that sleeps instead of computing: what is left is the executor and its messages."""

    dtype = torch.float32

    def __init__(self, shape: tuple[int, ...], seconds: float) -> None:
        self._shape, self._seconds = shape, seconds

    def complaints(self, schedule: Schedule, model: int, node: int) -> list[str]:
        return []

    def begin(self) -> Sleeping:
        return self

    def shape(self, microbatch: int) -> tuple[int, ...]:
        return self._shape

    def forward(self, microbatch: int, received: torch.Tensor | None) -> torch.Tensor:
        time.sleep(self._seconds)
        return torch.zeros(self._shape)

    def backward(self, microbatch: int, received: torch.Tensor | None) -> torch.Tensor:
        time.sleep(2 * self._seconds)
        return torch.zeros(self._shape)

    def finish(self) -> list[Any]:
        return []


class Subject:
    """Both models of a case on this rank, and the work of a step of each."""

    def __init__(self, case: Case, options: Options) -> None:
        self.case, self.options = case, options
        self.nodes = case.stages[0]
        self.placements = ((tuple(range(self.nodes)),), placement(case.stages[1], self.nodes))
        on_gpu = torch.cuda.is_available() and not options.sleep_ms
        self.device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else _CPU
        self.names = ("actor", "reference" if case.forward_only else "critic")
        self.models: list[BuiltModel] = [] if options.sleep_ms else [self._build(i) for i in (0, 1)]

    def problem(self, times: dict[tuple[int, bool, int], float] | None, delay: float) -> Problem:
        """With measured times by (model, backward, stage), in seconds; unit times before there are any."""
        models = []
        for i, name in enumerate(self.names):
            stages, frozen = self.case.stages[i], self._frozen(i)

            def of(backward: bool, i: int = i, stages: int = stages) -> tuple[float, ...]:
                return tuple(times[i, backward, s] if times else 1.0 + backward for s in range(stages))

            models.append(
                PipelineModel(
                    name,
                    self.placements[i],
                    self.case.microbatches[i],
                    of(False),
                    (0.0,) * stages if frozen else of(True),
                    (self.case.layers[i] / stages,) * stages,
                    delay,
                    frozen,
                )
            )
        return Problem(self.nodes, tuple(models))

    def _frozen(self, model: int) -> bool:
        return self.case.forward_only and model == 1

    def _build(self, index: int) -> BuiltModel:
        o = self.options
        layers = self.case.layers[index]
        arch = Architecture(
            family="qwen3_moe",
            layers=layers,
            moe_layers=tuple(range(layers)),
            hidden=o.hidden,
            heads=o.hidden // 64 or 1,
            kv_heads=max(1, o.hidden // 256),
            head_dim=64,
            ffn=o.ffn,
            moe_ffn=o.ffn,
            experts=o.experts,
            topk=o.topk,
            normalize_topk=True,
            qk_norm=True,
            attention_bias=False,
            vocab=o.vocabulary,
            tied=False,
            norm_eps=1e-6,
            rope_theta=1e6,
            max_positions=max(4096, o.rows),
            dtype=o.dtype,
        )
        layout = ParallelLayout(
            world=dist.get_world_size(), pp=self.case.stages[index], ep=o.ep, placement=self.placements[index]
        )
        groups = create_groups(layout, timeout_s=300)
        dtype = getattr(torch, o.dtype)
        scalar = index == 1 and not self.case.forward_only
        model = (build_scalar_model if scalar else build_model)(arch, groups, name=self.names[index], dtype=dtype)
        generator = torch.Generator(device=model.device).manual_seed(1000 * index + dist.get_rank())
        with torch.no_grad():
            for parameter in model.chunks[0].parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0, 0.02, generator=generator)
                else:
                    parameter.fill_(1)
        chunks = [compat.float16_module(model.config, c) for c in model.chunks] if dtype == torch.bfloat16 else None
        if self._frozen(index):
            model.wrapped = chunks or model.chunks
            return model
        model.wrapped = compat.distributed_data_parallel(
            model.config,
            chunks or model.chunks,
            groups.collection,
            distributed_optimizer=False,
            grad_dtype_fp32=dtype != torch.float64,
        )
        model.config.finalize_model_grads_func = compat.finalize_grads_summed(groups.collection)
        return model

    def work(self, index: int) -> Work:
        """A step of one model; gradients start from zero."""
        o = self.options
        count = self.case.microbatches[index]
        if o.sleep_ms:
            per_stage = self.case.layers[index] / self.case.stages[index]
            return Sleeping((o.rows, 1, o.hidden), per_stage * o.sleep_ms / 1e3)
        model, frozen = self.models[index], self._frozen(index)
        if not frozen:
            model.wrapped[0].zero_grad_buffer()
        generator = torch.Generator().manual_seed(index)
        tokens = torch.randint(0, o.vocabulary, (count, o.rows + 1), generator=generator).to(self.device)
        positions = torch.arange(o.rows, device=self.device)[None]
        packed = compat.packed_seq_params(torch.tensor([0, o.rows], dtype=torch.int32, device=self.device), o.rows)

        def forward_step(data: Iterator[int], chunk: Any) -> tuple[Any, Any]:
            row = tokens[next(data)]
            output = chunk(row[None, :-1], positions, None, packed_seq_params=packed)

            def loss(output: torch.Tensor, non_loss_data: bool = False) -> Any:
                values = output[0].float()
                if values.shape[-1] == 1:
                    total = values.square().mean()
                else:
                    total = torch.nn.functional.cross_entropy(values, row[1:])
                return total.detach() if frozen else (total, torch.ones((), dtype=torch.int32), total.detach())

            return output, loss

        return StageWork(
            chunk=model.wrapped[0],
            config=model.config,
            groups=model.groups,
            forward_step=forward_step,
            data=iter(range(count)),
            rows=(o.rows,) * count,
            forward_only=frozen,
        )


_CPU = torch.device("cpu")


class Bench:
    """Schedules of one case on one executor."""

    def __init__(self, case: Case, options: Options, solve: Callable[[Problem, float], Schedule]) -> None:
        self.subject = Subject(case, options)
        self.case, self.options, self.solve = case, options, solve
        self.node = 0
        s = self.subject
        everything: Sequence[Sequence[int]] = ((0, 1), (0,), (1,))
        self.links = {
            tuple(models): Links([s.placements[m] for m in models], s.nodes, timeout_s=300, device=s.device)
            for models in everything
        }

    def run(self, schedule: Schedule, models: tuple[int, ...]) -> tuple[float, ExecutionReport]:
        """(makespan over all ranks in seconds, this rank's report)."""
        links = self.links[models]
        executor = FusedExecutor(schedule, links)
        report = executor.run([self.subject.work(m) for m in models])
        return makespan(report, links), report

    def delay(self) -> float:
        """Seconds of a message between the first two nodes, the median of some there and back."""
        links, o = self.links[0, 1], self.options
        dtype = torch.float32 if o.sleep_ms else getattr(torch, o.dtype)
        tensor = torch.zeros(o.rows, 1, o.hidden, dtype=dtype, device=self.subject.device)
        found = []
        for _ in range(20):
            dist.barrier(group=links.control)
            started = time.perf_counter()
            if links.node == 0:
                links.send(tensor, 0, False, 1).wait(60)
                links.receive(tensor, 0, True, 1).wait(60)
            elif links.node == 1:
                links.receive(tensor, 0, False, 0).wait(60)
                links.send(tensor, 0, True, 0).wait(60)
            if tensor.is_cuda:
                torch.cuda.synchronize()
            found.append((time.perf_counter() - started) / 2)
        told: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(told, statistics.median(found) if links.node == 0 else 0.0, group=links.control)
        return max(told)

    def times(self, reports: Sequence[ExecutionReport]) -> dict[tuple[int, bool, int], float]:
        """Seconds by (model, backward, stage): medians over micro-batches, runs and the ranks that hold the stage."""
        mine: dict[tuple[int, bool, int], list[float]] = defaultdict(list)
        for report in reports:
            for m in report.measured:
                mine[m.operation.model, m.operation.backward, m.operation.stage].append(m.end - m.start)
        told: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(told, dict(mine), group=self.links[0, 1].control)
        merged: dict[tuple[int, bool, int], list[float]] = defaultdict(list)
        for theirs in told:
            for key, values in theirs.items():
                merged[key] += values
        return {key: statistics.median(values) for key, values in merged.items()}

    def measure(self, say: Callable[[str], None]) -> list[Row]:
        o = self.options
        guess = concatenated(self.subject.problem(None, 0.0))
        reports = [self.run(guess, (0, 1))[1] for _ in range(o.warmup + 3)][o.warmup :]
        problem = self.subject.problem(self.times(reports), self.delay())
        started = time.perf_counter()
        leader = dist.get_rank() == 0
        fused = share_schedule(self.solve(problem, o.solve_s) if leader else None, group=self.links[0, 1].control)
        say(f"{self.case.name}: " + _describe(problem) + f"; schedule found in {time.perf_counter() - started:.1f} s")
        alone = [one_f_one_b(problem, m) for m in (0, 1)]
        together = {"concatenated": concatenated(problem), "fused": fused}
        predicted = {name: simulate(schedule).makespan for name, schedule in together.items()}
        predicted["serial"] = sum(simulate(schedule).makespan for schedule in alone)
        spans: dict[str, list[float]] = defaultdict(list)
        finishes: dict[str, list[float]] = defaultdict(list)
        memory: dict[str, float] = {}
        of_method: dict[str, list[ExecutionReport]] = defaultdict(list)
        for i in range(o.warmup + o.repetitions):
            for name in (*METHODS[i % 3 :], *METHODS[: i % 3]):
                if torch.cuda.is_available():
                    torch.cuda.reset_peak_memory_stats()
                    allocated = torch.cuda.memory_allocated()
                if name == "serial":
                    runs = [self.run(schedule, (m,)) for m, schedule in enumerate(alone)]
                else:
                    runs = [self.run(together[name], (0, 1))]
                if torch.cuda.is_available():
                    # The executor sets torch's peak back at every operation.
                    peaks = [allocated + (report.peak or 0) for _, report in runs]
                    peak = max(*peaks, torch.cuda.max_memory_allocated())
                    memory[name] = max(memory.get(name, 0.0), peak / 2**30)
                if i >= o.warmup:
                    spans[name].append(sum(span for span, _ in runs))
                    finishes[name].append(sum(report.finish_s for _, report in runs))
                    of_method[name] += [report for _, report in runs]
        serial = statistics.median(spans["serial"])
        rows = []
        for name in METHODS:
            own = None
            if name != "serial":
                again = self.subject.problem(self.times(of_method[name]), problem.models[0].delay)
                own = 1e3 * simulate(Schedule(again, together[name].orders)).makespan
            ordered = sorted(spans[name])
            rows.append(
                Row(
                    self.case.name,
                    name,
                    1e3 * statistics.median(ordered),
                    1e3 * ordered[len(ordered) // 10],
                    1e3 * ordered[-1 - len(ordered) // 10],
                    serial / statistics.median(ordered),
                    1e3 * predicted[name],
                    own,
                    1e3 * lower_bound(problem),
                    1e3 * statistics.median(finishes[name]),
                    self._most(memory.get(name)),
                )
            )
        return rows

    def _most(self, gib: float | None) -> float | None:
        told: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(told, gib, group=self.links[0, 1].control)
        return None if gib is None else max(told)


def _describe(problem: Problem) -> str:
    """Measured times in one line."""
    parts = []
    for model in problem.models:
        forward = "/".join(f"{1e3 * t:.2f}" for t in model.forward)
        backward = "/".join(f"{1e3 * t:.2f}" for t in model.backward)
        parts.append(f"{model.name} {model.replicas} x {model.microbatches} micro-batches, F {forward} B {backward} ms")
    return ", ".join(parts) + f", message {1e3 * problem.models[0].delay:.2f} ms"


def solved(problem: Problem, seconds: float) -> Schedule:
    """The search's schedule."""
    from megatron_ultraep.pipeline.solve import solve

    return solve(problem, seed=0, seconds=seconds, memory_seconds=0.0).schedule


def measure(case: Case, options: Options, solve: Callable[[Problem, float], Schedule] = solved) -> list[Row]:
    """All methods of one case; runs on every rank, with the same result on each."""
    torch.manual_seed(0)

    def say(text: str) -> None:
        if dist.get_rank() == 0:
            print(text, flush=True)

    return Bench(case, options, solve).measure(say)


def table(rows: Sequence[Row]) -> str:
    """As printed."""
    lines = [
        f"{'case':14} {'method':12} {'ms':>9} {'p10':>9} {'p90':>9} {'speed-up':>8} {'predicted':>9} {'of it':>6} "
        f"{'own times':>9} {'bound':>9} {'finish':>7} {'GiB':>6}"
    ]
    for r in rows:
        own = "" if r.predicted_own is None else f"{r.predicted_own:.2f}"
        gib = "" if r.gib is None else f"{r.gib:.2f}"
        lines.append(
            f"{r.case:14} {r.method:12} {r.ms:9.2f} {r.p10:9.2f} {r.p90:9.2f} {r.speedup:8.3f} {r.predicted:9.2f} "
            f"{r.of_predicted:6.3f} {own:>9} {r.bound:9.2f} {r.finish_ms:7.2f} {gib:>6}"
        )
    return "\n".join(lines)


def as_json(row: Row) -> dict[str, Any]:
    return {k: round(v, 4) if isinstance(v, float) else v for k, v in dataclasses.asdict(row).items()} | {
        "of_predicted": round(row.of_predicted, 4)
    }
