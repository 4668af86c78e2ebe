"""The report of a run: one HTML file with curves, tables and sample responses, readable offline.

Made from what the run directory holds (`run.json`, `steps.jsonl`, `metrics.jsonl`, `eval/`), so it can be made again
at any time, and in the middle of a run. What was not recorded is left out and named at the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import yaml

from rl.charts import Series, line_chart, stacked_chart
from rl.evaluation import EvalResult, eval_files, judge, read_eval, summarize_samples
from rl.files import write_atomic
from rl.ledger import Ledger
from rl.metrics import read_metrics
from rl.types import Sample

SAMPLES_SHOWN = 4
CHARACTERS_SHOWN = 1200
PHASE_PREFIX = "perf/time/"
BESIDE_OTHERS = ("reward", "export", "transfer")  # phases inside others or beside them: no part of a sum

Metrics = Mapping[int, Mapping[str, float]]

OUTCOMES = {
    "finished": ("finished", "good"),
    "thresholds": ("accuracy threshold missed", "bad"),
    "failed": ("failed", "bad"),
    "interrupted": ("interrupted", "warn"),
    "stopped": ("stopped as asked, to be resumed", "warn"),
    None: ("running, or killed", "warn"),
}

# Fields of the configuration worth seeing without unfolding all of it.
SUMMARY_FIELDS = (
    "model.path",
    "model.dtype",
    "data.train.reasoning_gym",
    "data.train.files",
    "data.prompts_per_step",
    "data.samples_per_prompt",
    "sampling.temperature",
    "sampling.max_tokens",
    "trainer.ranks",
    "trainer.parallel",
    "trainer.optimizer.lr",
    "algorithm.advantage",
    "algorithm.kl.coef",
    "algorithm.old_logprobs",
    "algorithm.routes",
    "algorithm.zero_advantages",
    "rollout.engines",
    "run.seed",
)


@dataclass(frozen=True)
class Panel:
    """One chart of the page."""

    title: str
    unit: str
    note: str
    svg: str


@dataclass(frozen=True)
class Comparison:
    """Responses to one held-out prompt: ``(step, text, reward)`` of the first and the last evaluation."""

    prompt: str
    label: str
    responses: tuple[tuple[int, str, float | None], ...]


@dataclass(frozen=True)
class _Line:
    metric: str
    label: str
    sparse: bool = False


@dataclass(frozen=True)
class _LinePanel:
    key: str
    title: str
    unit: str
    lines: tuple[_Line, ...]
    note: str = ""
    axis: str = "step"
    log_scale: bool = False
    limits: tuple[float | None, float | None] = (None, None)
    optional: bool = False  # not named as missing


LINE_PANELS = (
    _LinePanel(
        "reward",
        "Reward",
        "",
        (
            _Line("rollout/reward/mean", "training"),
            _Line("eval/accuracy", "held-out accuracy", sparse=True),
            _Line("eval/reward/mean", "held-out reward", sparse=True),
        ),
        "Mean reward of each iteration's samples; accuracy and mean reward on held-out prompts.",
    ),
    _LinePanel(
        "length",
        "Response length",
        "tokens",
        (_Line("rollout/response_length/mean", "mean"), _Line("rollout/response_length/max", "longest")),
        limits=(0, None),
    ),
    _LinePanel(
        "kl",
        "KL divergence",
        "nats per token",
        (_Line("train/kl", "to the reference"), _Line("train/ppo_kl", "to the old policy")),
    ),
    _LinePanel("entropy", "Entropy of the policy", "nats per token", (_Line("train/entropy", "entropy"),)),
    _LinePanel(
        "critic",
        "Explained variance of the critic",
        "",
        (_Line("critic/explained_variance", "before the updates"),),
        "1 - Var(return - value) / Var(return): 1 is perfect, 0 is a constant.",
        limits=(None, 1.0),
        optional=True,
    ),
    _LinePanel("value_loss", "Value loss", "", (_Line("critic/loss", "value loss"),), limits=(0, None), optional=True),
    _LinePanel(
        "logprob",
        "Rollout against training log-probs",
        "mean |difference|, nats",
        (
            _Line("train/rollout_logprob_abs_diff", "as trained"),
            _Line("train/rollout_logprob_abs_diff_own_routes", "without route replay", sparse=True),
        ),
        "How far the engine's log-probs are from the trainer's on the same tokens. "
        "Without replay, training's routers choose their own experts.",
        log_scale=True,
    ),
    _LinePanel(
        "routes",
        "Tokens whose own routes differ",
        "fraction of tokens",
        (_Line("moe/own_routes_differ_fraction", "differ from rollout"),),
        "Share of (token, layer) that the trainer's routers, with the same weights, would send to other experts.",
        limits=(0, None),
    ),
    _LinePanel(
        "gradnorm", "Gradient norm", "norm before clipping", (_Line("train/grad_norm", "norm"),), limits=(0, None)
    ),
    _LinePanel(
        "imbalance",
        "Expert imbalance",
        "(max − mean) / mean",
        (_Line("moe/max_vio", "max violation"),),
        "0: every expert gets the same number of tokens.",
        limits=(0, None),
    ),
    _LinePanel(
        "balance",
        "Imbalance of ranks in training",
        "max / mean of tokens",
        (
            _Line("moe/imbalance_before/mean", "without replicas"),
            _Line("moe/imbalance_after/mean", "as computed"),
        ),
        "1: every expert-parallel rank gets the same number of tokens. Mean over micro-batches and layers; "
        "ultraep-view shows each.",
        optional=True,
    ),
    _LinePanel(
        "foresight",
        "Planned before the pass",
        "fraction of (micro-batch, layer)",
        (_Line("moe/foresight/planned_fraction", "planned ahead"),),
        "1: no pass gathered loads or planned. The others were planned on exact loads.",
        limits=(0, None),
        optional=True,
    ),
    _LinePanel(
        "reorder",
        "Experts that changed their homes",
        "experts, over layers",
        (_Line("moe/reorder/experts_moved", "moved"),),
        "Before each iteration, so that nodes are balanced for its batch; optimizer states move along.",
        limits=(0, None),
        optional=True,
    ),
    _LinePanel(
        "idle",
        "Idle time",
        "fraction of the iteration",
        (_Line("stream/engine_idle_fraction", "engines"), _Line("stream/trainer_idle_fraction", "trainer")),
        "What overlapping generation and training could still save; timeline.json shows where it is.",
        limits=(0, None),
        optional=True,
    ),
    _LinePanel(
        "staleness",
        "Staleness",
        "training steps",
        (_Line("stream/staleness/mean", "mean over tokens"), _Line("stream/staleness/max", "oldest token")),
        "How many steps old the weights were that response tokens were sampled with.",
        limits=(0, None),
        optional=True,
    ),
    _LinePanel(
        "throughput", "Throughput", "tokens/s", (_Line("perf/tokens_per_second", "tokens/s"),), limits=(0, None)
    ),
    _LinePanel(
        "warmuploss", "Supervised warm-up", "nats per token", (_Line("warmup/loss", "loss"),), axis="warmup_step"
    ),
)


def write_report(run_directory: Path | str, output: Path | None = None) -> Path:
    """Write the report of a run.

    Args:
        run_directory: with at least `run.json`.
        output: default ``<run_directory>/report.html``; replaced when it exists.

    Raises:
        LedgerError: the directory holds no run.
    """
    run_directory = Path(run_directory)
    output = output or run_directory / "report.html"
    write_atomic(output, render(run_directory).encode())
    return output


def render(run_directory: Path) -> str:
    """The page as text. Raises `LedgerError` like `write_report`."""
    ledger = Ledger.read(run_directory)
    run, sessions = ledger.run, ledger.run["sessions"]
    config = next((s["config"] for s in reversed(sessions) if s.get("config")), run["config"])
    metrics = {"step": read_metrics(run_directory), "warmup_step": read_metrics(run_directory, "warmup_step")}
    samples = {step: read_eval(path) for step, path in eval_files(run_directory).items()}
    correct_from = _get(config, "evaluation.correct_from", 1.0)
    results = [summarize_samples(step, found, correct_from) for step, found in samples.items() if found]
    panels, missing = _panels(metrics, ledger)
    outcome, tone = OUTCOMES.get(sessions[-1].get("outcome"), (str(sessions[-1].get("outcome")), "warn"))
    return _template().render(
        name=_get(config, "run.name", run_directory.name),
        outcome=outcome,
        tone=tone,
        detail=sessions[-1].get("detail") or "",
        facts=_facts(ledger),
        tiles=_tiles(metrics["step"], results),
        panels=panels,
        missing=missing,
        results=_result_rows(results, config),
        several=any(result.samples > 1 for result in results),
        comparisons=_comparisons(samples),
        sessions=sessions,
        summary=_summary(config),
        versions={name: version for name, version in sessions[-1]["versions"].items() if version},
        config_yaml=yaml.safe_dump(config, sort_keys=False, allow_unicode=True, width=100),
    )


def _template() -> jinja2.Template:
    folder = Path(__file__).parent / "templates"
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    return environment.get_template("report.html.j2")


def _panels(metrics: Mapping[str, Metrics], ledger: Ledger) -> tuple[list[Panel], list[str]]:
    """The charts that have data, and the titles of those that have none."""
    panels, missing = [], []
    for spec in LINE_PANELS:
        series = [
            Series(line.label, points, line.sparse)
            for line in spec.lines
            if (points := _points(metrics[spec.axis], line.metric))
        ]
        if any(line.has_data for line in series):
            xlabel = "step" if spec.axis == "step" else "warm-up step"
            svg = line_chart(spec.key, series, xlabel=xlabel, log_scale=spec.log_scale, limits=spec.limits)
            panels.append(Panel(spec.title, spec.unit, spec.note, svg))
        elif spec.axis == "step" and not spec.optional:
            missing.append(spec.title)
    times = _times(metrics["step"], ledger)
    if times:
        steps = sorted(times)
        phases = dict.fromkeys(phase for step in steps for phase in times[step])
        parts = {phase: [_finite(times[step].get(phase, 0.0)) for step in steps] for phase in phases}
        svg = stacked_chart("time", steps, parts)
        panels.insert(_position(panels, "Throughput"), Panel("Time by phase", "seconds", "", svg))
    else:
        missing.append("Time by phase")
    return panels, missing


def _position(panels: Sequence[Panel], title: str) -> int:
    return next((index for index, panel in enumerate(panels) if panel.title == title), len(panels))


def _points(metrics: Metrics, name: str) -> list[tuple[float, float]]:
    return [(step, values[name]) for step, values in metrics.items() if name in values]


def _times(metrics: Metrics, ledger: Ledger) -> dict[int, dict[str, float]]:
    """Seconds by phase for each step, from the metrics, else from the ledger."""
    found: dict[int, dict[str, float]] = {}
    for step, values in metrics.items():
        phases = {
            name.removeprefix(PHASE_PREFIX): value
            for name, value in values.items()
            if name.startswith(PHASE_PREFIX) and name.removeprefix(PHASE_PREFIX) not in BESIDE_OTHERS
        }
        if phases:
            found[step] = phases
    return found or {record.step: dict(record.timings) for record in ledger.records if record.timings}


def _tiles(metrics: Metrics, results: Sequence[EvalResult]) -> list[tuple[str, str]]:
    """Numbers to read first: (label, value)."""
    tiles = []
    if results:
        tiles.append(("held-out accuracy", _change([result.accuracy for result in results], ".1%")))
    wanted: tuple[tuple[str, str, Callable[[list[float]], str]], ...] = (
        ("training reward", "rollout/reward/mean", lambda values: _change(values, ".3f")),
        ("response length", "rollout/response_length/mean", lambda values: _change(values, ".1f")),
        ("log-prob difference", "train/rollout_logprob_abs_diff", lambda values: f"{_mean(values):.1e}"),
        ("KL rollout / training", "train/rollout_kl", lambda values: f"{_mean(values):.1e}"),
        ("tokens/s, median", "perf/tokens_per_second", lambda values: f"{sorted(values)[len(values) // 2]:,.0f}"),
        ("imbalance, mean", "moe/max_vio", lambda values: f"{_mean(values):.2f}"),
    )
    for label, name, show in wanted:
        values = [value for _, value in _points(metrics, name) if math.isfinite(value)]
        if values:
            tiles.append((label, show(values)))
    return tiles


def _change(values: Sequence[float], form: str) -> str:
    return f"{values[0]:{form}} → {values[-1]:{form}}" if len(values) > 1 else f"{values[0]:{form}}"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _finite(value: float) -> float:
    return value if math.isfinite(value) else 0.0


def _facts(ledger: Ledger) -> list[str]:
    sessions, records = ledger.run["sessions"], ledger.records
    facts = [f"{len(records)} step{'' if len(records) == 1 else 's'}", f"started {_short(ledger.run['created'])}"]
    if len(sessions) > 1:
        facts.append(f"{len(sessions)} sessions")
    last = sessions[-1]
    if last.get("ended"):
        elapsed = datetime.fromisoformat(last["ended"]) - datetime.fromisoformat(last["started"])
        facts.append(f"took {_duration(elapsed.total_seconds())}" + (" (last session)" if len(sessions) > 1 else ""))
    return facts


def _short(timestamp: str) -> str:
    return datetime.fromisoformat(timestamp).strftime("%Y-%m-%d %H:%M UTC")


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def wilson_interval(accuracy: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """95% confidence interval of a fraction (Wilson 1927, score interval)."""
    centre = (accuracy + z * z / (2 * count)) / (1 + z * z / count)
    width = z * math.sqrt(accuracy * (1 - accuracy) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return max(0.0, centre - width), min(1.0, centre + width)


def _result_rows(results: Sequence[EvalResult], config: Mapping[str, Any]) -> list[dict[str, Any]]:
    wanted = {name: _get(config, f"evaluation.success.{name}", None) for name in ("before_max", "after_min")}
    judgements = judge(results, **wanted)
    rows = []
    for result in results:
        low, high = wilson_interval(result.accuracy, result.count)
        rows.append(
            {
                "step": result.step,
                "count": result.count,
                "accuracy": f"{result.accuracy:.1%}",
                "interval": f"{low:.1%} to {high:.1%}",
                "reward": f"{result.reward_mean:.3f}",
                "samples": result.samples,
                "pass_at": ", ".join(f"{value:.1%} @{k}" for k, value in result.pass_at),
                "judgements": [judgement for judgement in judgements if judgement.step == result.step],
            }
        )
    return rows


def _by_prompt(samples: Sequence[Sample]) -> dict[str, Sample]:
    """The first sample of each prompt."""
    found: dict[str, Sample] = {}
    for sample in samples:
        found.setdefault(sample.prompt.uid, sample)
    return found


def _comparisons(samples: Mapping[int, Sequence[Sample]]) -> list[Comparison]:
    """A few held-out prompts with their first and last response; those whose reward changed come first."""
    steps = [step for step, found in samples.items() if found]
    if not steps:
        return []
    first, last = _by_prompt(samples[steps[0]]), _by_prompt(samples[steps[-1]])
    shared = [uid for uid in last if uid in first] or list(last)
    shared.sort(key=lambda uid: uid not in first or first[uid].reward == last[uid].reward)
    found = []
    for uid in shared[:SAMPLES_SHOWN]:
        pair = [(steps[0], first.get(uid)), (steps[-1], last[uid])] if len(steps) > 1 else [(steps[-1], last[uid])]
        responses = tuple((step, _cut(s.response_text), s.reward) for step, s in pair if s is not None)
        found.append(Comparison(_cut(last[uid].prompt.text), _cut(_label_text(last[uid].prompt.label)), responses))
    return found


def _label_text(label: Any) -> str:
    """The right answer; the labels of reasoning-gym tasks hold the whole problem, their answer in ``entry``."""
    entry = label.get("entry") if isinstance(label, Mapping) else None
    return str(entry["answer"] if isinstance(entry, Mapping) and "answer" in entry else label)


def _cut(text: str) -> str:
    return text if len(text) <= CHARACTERS_SHOWN else text[:CHARACTERS_SHOWN] + " …"


def _summary(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = []
    for path in SUMMARY_FIELDS:
        value = _get(config, path, None)
        if value is None or value is False:
            continue
        if isinstance(value, Mapping):
            value = ", ".join(f"{key} {item}" for key, item in value.items())
        rows.append((path, str(value)))
    return rows


def _get(config: Mapping[str, Any], path: str, default: Any) -> Any:
    node: Any = config
    for part in path.split("."):
        if not isinstance(node, Mapping) or part not in node:
            return default
        node = node[part]
    return node
