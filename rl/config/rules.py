"""What fields of a run's configuration demand of each other.

Each rule is a function that yields `Violation`s. `check` runs them all, so that a user sees everything at once.
A rule names the fields it looks at; when one of those is already known to be invalid, the violation is dropped,
because its text would speak about a value that the user did not write.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rl.config.algorithm_rules import algorithm
from rl.config.critic_rules import critic
from rl.config.data_rules import data
from rl.config.fusion_rules import fuse
from rl.config.profile_rules import profile
from rl.config.sections import RunConfig
from rl.config.stream_rules import stream
from rl.config.trainer import OptimizerSection
from rl.config.violations import Rule, Violation

_ENGINE_RANKS_TESTED = {"cpu": 2, "cuda": 2}
RECOMPUTE_MODULES = ("core_attn", "moe_act", "layernorm", "mlp", "moe", "shared_experts")


def check(config: RunConfig, ignore: frozenset[str] = frozenset()) -> list[Violation]:
    """All violations of cross-field rules, in the order of the file.

    Args:
        config: a configuration whose single fields are valid.
        ignore: dotted fields that are known to be invalid; violations that involve them are left out.
    """
    found = [violation for rule in RULES for violation in rule(config)]
    return [v for v in found if not any(_touches(field, bad) for field in (v.path, *v.fields) for bad in ignore)]


def _touches(field: str, bad: str) -> bool:
    return field == bad or field.startswith(bad + ".") or bad.startswith(field + ".")


def _sampling(config: RunConfig) -> Iterator[Violation]:
    for name, off, value in (("top_p", 1.0, config.sampling.top_p), ("top_k", 0, config.sampling.top_k)):
        if value != off:
            yield Violation(
                f"sampling.{name}",
                f"expected {off} (off), came {value}: training computes log-probs of the whole distribution, so "
                f"truncated sampling would make every ratio wrong; set it to {off}.",
            )


def _lengths(config: RunConfig) -> Iterator[Violation]:
    longest = config.longest_sample
    if longest > config.rollout.max_model_len:
        yield Violation(
            "rollout.max_model_len",
            f"expected at least data.max_prompt_tokens + sampling.max_tokens = {longest}, came "
            f"{config.rollout.max_model_len}; raise it or lower one of them.",
            ("data.max_prompt_tokens", "sampling.max_tokens"),
        )
    if config.reward.model is not None and config.trainer.tokens_per_micro_batch < longest:
        yield Violation(
            "trainer.tokens_per_micro_batch",
            "a reward model sees the last token too: expected room for the longest sample (data.max_prompt_tokens + "
            f"sampling.max_tokens = {longest}), came {config.trainer.tokens_per_micro_batch}; raise it.",
            ("data.max_prompt_tokens", "sampling.max_tokens", "reward.model"),
        )
    if config.trainer.tokens_per_micro_batch < longest - 1:
        yield Violation(
            "trainer.tokens_per_micro_batch",
            f"expected room for the longest sample (data.max_prompt_tokens + sampling.max_tokens - 1 = {longest - 1}), "
            f"came {config.trainer.tokens_per_micro_batch}; raise it or lower one of them.",
            ("data.max_prompt_tokens", "sampling.max_tokens"),
        )


def _layout(config: RunConfig) -> Iterator[Violation]:
    ranks, per_node = config.trainer.ranks, config.trainer.ranks_per_node
    if per_node is not None and ranks % per_node:
        yield Violation(
            "trainer.ranks_per_node",
            f"expected a divisor of trainer.ranks = {ranks}, came {per_node}; every node has as many ranks.",
            ("trainer.ranks",),
        )
    if per_node is not None and config.stream.colocated:
        yield Violation(
            "trainer.ranks_per_node",
            f"expected null because stream.colocated fills nodes GPU by GPU, came {per_node}; remove it.",
            ("stream.colocated",),
        )
    for path, parallel in config.layouts.items():
        fields = ("trainer.ranks", path)
        blamed = "trainer.ranks" if path == "trainer.parallel" else path
        if parallel.cp > 1:
            yield Violation(
                f"{path}.cp",
                f"context parallelism is not supported, came {parallel.cp}; set it to 1 and use tp or pp.",
            )
        for names in (("tp", "pp"), ("etp", "ep", "pp")):
            size = 1
            for name in names:
                size *= getattr(parallel, name)
            product = "*".join(names)
            if ranks < size:
                yield Violation(
                    blamed,
                    f"expected trainer.ranks at least {product} = {size}, came {ranks}; raise it or lower {path}.",
                    fields,
                )
            elif ranks % size:
                yield Violation(
                    blamed,
                    f"expected trainer.ranks a multiple of {product} = {size}, came {ranks}; change it or {path}.",
                    fields,
                )
        if parallel.vpp > 1 and parallel.pp == 1:
            yield Violation(
                f"{path}.vpp",
                f"virtual pipeline stages need a pipeline: expected 1 because pp = 1, came {parallel.vpp}; "
                "raise pp or set vpp to 1.",
                (f"{path}.pp",),
            )


def _kernels(config: RunConfig) -> Iterator[Violation]:
    trainer = config.trainer
    for name in ("fuse_gradients", "permute_fusion"):
        if getattr(trainer, name) and trainer.backend != "nccl":
            yield Violation(
                f"trainer.{name}",
                f"Transformer Engine's kernels need GPUs (trainer.backend: nccl), came {trainer.backend}; set it to "
                "false.",
                ("trainer.backend",),
            )
    if trainer.overlap and config.stream.pipelining:
        yield Violation(
            "trainer.overlap",
            "with stream.pipelining a set's gradients are reduced once, after its last chunk, and not during a "
            "backward; set one of them to false.",
            ("stream.pipelining",),
        )


def _sequence_parallel(config: RunConfig) -> Iterator[Violation]:
    parallel = config.trainer.parallel
    if parallel.tp > 1 and not config.trainer.sequence_parallel:
        yield Violation(
            "trainer.sequence_parallel",
            f"expected true because trainer.parallel.tp = {parallel.tp} (Megatron's MoE layers demand it), "
            "came false; set it.",
            ("trainer.parallel.tp",),
        )
    if parallel.tp == 1 and config.trainer.sequence_parallel:
        yield Violation(
            "trainer.sequence_parallel",
            "expected false because trainer.parallel.tp = 1, came true; remove it or raise tp.",
            ("trainer.parallel.tp",),
        )


def _ahead(config: RunConfig) -> Iterator[Violation]:
    """What is planned from rollout's routes."""
    balance = config.balance
    for name in ("foresight", "reorder", "compose"):
        if not getattr(balance, name):
            continue
        if not balance.enabled:
            yield Violation(
                f"balance.{name}",
                "expected false because balance.enabled is false, came true; enable balancing or remove it.",
                ("balance.enabled",),
            )
        if not config.rollout.capture_routes:
            yield Violation(
                f"balance.{name}",
                "it plans from rollout's routes, and rollout.capture_routes is false; capture routes or remove it.",
                ("rollout.capture_routes",),
            )
    if balance.foresight and config.rollout.capture_routes and config.algorithm.routes.train != "replay":
        yield Violation(
            "balance.foresight",
            "plans are made for the routes of rollout, and algorithm.routes.train is own: every plan would be for "
            "other routes than training takes; set `replay`, or foresight to false (exact loads are then planned on).",
            ("algorithm.routes.train",),
        )


def _balance(config: RunConfig) -> Iterator[Violation]:
    if not config.balance.enabled:
        return
    try:
        config.balance.settings(config.output_dir)
    except ValueError as error:
        yield Violation("balance", f"{str(error).removeprefix('BalanceConfig: ')}.")
        return
    parallel = config.trainer.parallel
    if parallel.ep < 2:
        yield Violation(
            "balance.enabled",
            f"expected false because trainer.parallel.ep = {parallel.ep} leaves nothing to balance, came true; "
            "raise ep or remove it.",
            ("trainer.parallel.ep",),
        )
    if parallel.etp > 1:
        yield Violation(
            "balance.enabled",
            f"expected false because trainer.parallel.etp = {parallel.etp} cuts experts, came true; set etp to 1.",
            ("trainer.parallel.etp",),
        )
    for path, each in config.layouts.items():
        if config.balance.node_size and each.ep > 1 and each.ep % config.balance.node_size:
            yield Violation(
                "balance.node_size",
                f"expected a divisor of {path}.ep = {each.ep}, came {config.balance.node_size}; change one.",
                (f"{path}.ep",),
            )
        if path != "trainer.parallel" and each.ep > 1 and each.etp > 1:
            yield Violation(
                f"{path}.etp",
                f"expected 1 because balancing has to keep experts whole, came {each.etp}; set it to 1.",
                ("balance.enabled",),
            )


def _recompute(config: RunConfig) -> Iterator[Violation]:
    yield from _recompute_of("trainer", config.trainer.recompute, config.trainer.recompute_modules)
    if config.critic is not None:
        yield from _recompute_of("critic", config.critic.recompute, config.critic.recompute_modules)


def _recompute_of(section: str, mode: str, modules: Sequence[str]) -> Iterator[Violation]:
    path = f"{section}.recompute_modules"
    if mode == "selective" and not modules:
        yield Violation(
            path,
            f"expected some of {', '.join(RECOMPUTE_MODULES)} because recompute is selective, came none; list them.",
            (f"{section}.recompute",),
        )
    if mode != "selective" and modules:
        yield Violation(
            path,
            f"expected none because recompute is {mode}, came {', '.join(modules)}; set `recompute: selective`.",
            (f"{section}.recompute",),
        )
    unknown = [module for module in modules if module not in RECOMPUTE_MODULES]
    if unknown:
        yield Violation(
            path,
            f"expected some of {', '.join(RECOMPUTE_MODULES)}, came {', '.join(unknown)}; correct or remove it.",
        )


def _machine(config: RunConfig) -> Iterator[Violation]:
    if config.model.dtype == "float64" and config.trainer.backend != "gloo":
        yield Violation(
            "model.dtype",
            f"float64 trains on CPU only (trainer.backend: gloo), came {config.trainer.backend}; change one of them.",
            ("trainer.backend",),
        )
    if config.rollout.device == "cpu" and config.engine_dtype == "bfloat16" and not config.allow_untested:
        yield Violation(
            "rollout.dtype",
            "bfloat16 engines on CPUs are not tested; set it (or model.dtype) to float32, or allow_untested: true.",
            ("model.dtype", "rollout.device"),
        )
    yield from _engine_ranks(config)
    needed = config.trainer.ranks + config.rollout.engines * config.rollout.tensor_parallel
    if config.ray.address is not None:
        for name in ("num_cpus", "temp_dir"):
            if getattr(config.ray, name) is not None:
                yield Violation(
                    f"ray.{name}",
                    "only a private instance takes it, and ray.address joins a running one; remove one of them.",
                    ("ray.address",),
                )
    elif config.ray.num_cpus is not None and config.ray.num_cpus < needed:
        yield Violation(
            "ray.num_cpus",
            f"expected at least {needed} (trainer ranks and engine ranks, one each), came {config.ray.num_cpus}; "
            "raise it or set it to null (these are Ray's tokens, not cores: more than the machine has is fine).",
            ("trainer.ranks", "rollout.engines", "rollout.tensor_parallel"),
        )


def _engine_ranks(config: RunConfig) -> Iterator[Violation]:
    ranks, device = config.rollout.tensor_parallel, config.rollout.device
    tested = _ENGINE_RANKS_TESTED[device]
    if ranks > tested and not config.allow_untested:
        yield Violation(
            "rollout.tensor_parallel",
            f"engines of more than {tested} rank{'s' * (tested > 1)} are not tested on {device}, came {ranks}; lower "
            "it, or set allow_untested: true.",
            ("rollout.device",),
        )
    if ranks > 1 and config.stream.colocated:
        yield Violation(
            "rollout.tensor_parallel",
            f"a colocated engine shares one GPU with one trainer rank: expected 1, came {ranks}; set it to 1, or "
            "stream.colocated: false.",
            ("stream.colocated",),
        )


def _optimizer(config: RunConfig) -> Iterator[Violation]:
    yield from _optimizer_of("trainer.optimizer", config.trainer.optimizer)
    if config.critic is not None:
        yield from _optimizer_of("critic.optimizer", config.critic.optimizer)


def _optimizer_of(path: str, optimizer: OptimizerSection) -> Iterator[Violation]:
    if optimizer.min_lr > optimizer.lr:
        yield Violation(
            f"{path}.min_lr",
            f"expected at most {path}.lr = {optimizer.lr}, came {optimizer.min_lr}; lower it.",
            (f"{path}.lr",),
        )
    if optimizer.schedule == "constant" and optimizer.decay_steps is not None:
        yield Violation(
            f"{path}.decay_steps",
            f"a constant schedule does not decay: expected null, came {optimizer.decay_steps}; remove it or set "
            "a schedule.",
            (f"{path}.schedule",),
        )
    if optimizer.decay_steps is not None and optimizer.decay_steps <= optimizer.warmup_steps:
        yield Violation(
            f"{path}.decay_steps",
            f"expected more than {path}.warmup_steps = {optimizer.warmup_steps}, came "
            f"{optimizer.decay_steps}; raise it.",
            (f"{path}.warmup_steps",),
        )
    if not all(0 <= beta < 1 for beta in optimizer.betas):
        yield Violation(f"{path}.betas", f"expected two numbers in [0, 1), came {list(optimizer.betas)}; correct them.")


def _batches(config: RunConfig) -> Iterator[Violation]:
    fields = ("data.prompts_per_step", "data.samples_per_prompt", "trainer.ranks", *config.layouts)
    samples, mini_batches = config.samples_per_step, config.algorithm.mini_batches
    data_parallel = max(max(1, config.trainer.ranks // (p.tp * p.pp)) for p in config.layouts.values())
    product = f"data.prompts_per_step * data.samples_per_prompt = {samples}"
    if samples % mini_batches:
        yield Violation(
            "algorithm.mini_batches",
            f"expected a divisor of {product}, came {mini_batches}; change one of them.",
            fields[:2],
        )
    elif samples // mini_batches < data_parallel:
        yield Violation(
            "algorithm.mini_batches",
            f"a mini-batch has {samples // mini_batches} samples and there are {data_parallel} data-parallel ranks; "
            f"each rank needs at least one ({product}); lower mini_batches or take more samples.",
            fields,
        )
    size = config.data.train.size
    if size is not None and config.data.prompts_per_step > size:
        yield Violation(
            "data.prompts_per_step",
            f"expected at most data.train.size = {size}, came {config.data.prompts_per_step}; "
            "lower it or raise the size.",
            ("data.train.size",),
        )


def _routes(config: RunConfig) -> Iterator[Violation]:
    algorithm, capture = config.algorithm, config.rollout.capture_routes
    if not capture:
        for name in ("old_logprob", "train", "reference"):
            if getattr(algorithm.routes, name) == "replay":
                yield Violation(
                    f"algorithm.routes.{name}",
                    "replay needs the routes of rollout, and rollout.capture_routes is false; "
                    "set `own`, or capture routes.",
                    ("rollout.capture_routes",),
                )
    if algorithm.routes.compare_own_every and "replay" not in (algorithm.routes.train, algorithm.routes.old_logprob):
        yield Violation(
            "algorithm.routes.compare_own_every",
            f"expected 0 because no pass replays routes, came {algorithm.routes.compare_own_every}; set it to 0.",
            ("algorithm.routes.train", "algorithm.routes.old_logprob", "rollout.capture_routes"),
        )


def _warmup(config: RunConfig) -> Iterator[Violation]:
    if config.warmup.steps == 0:
        return
    if config.data.train.reasoning_gym is None:
        yield Violation(
            "warmup.steps",
            "the warm-up generates its own problems of data.train.reasoning_gym, and that is null; expected 0, came "
            f"{config.warmup.steps}; set it to 0 (and start from a model that knows the task).",
            ("data.train",),
        )
    if "{answer}" not in config.warmup.answer_template:
        yield Violation(
            "warmup.answer_template",
            f"expected a text that holds {{answer}}, came {config.warmup.answer_template!r}; put {{answer}} in it.",
        )
    if config.warmup.learn == "text" and config.warmup.stop_at_accuracy is not None:
        yield Violation(
            "warmup.stop_at_accuracy",
            f"expected null with warmup.learn=text, came {config.warmup.stop_at_accuracy}: whole texts are never "
            "predicted exactly; set it to null, or learn answers.",
            ("warmup.learn",),
        )


RULES: tuple[Rule, ...] = (
    data,
    _sampling,
    _lengths,
    _layout,
    _kernels,
    _sequence_parallel,
    _balance,
    _ahead,
    _recompute,
    _machine,
    _optimizer,
    _batches,
    _routes,
    algorithm,
    critic,
    stream,
    fuse,
    _warmup,
    profile,
)
