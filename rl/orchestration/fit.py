"""Whether a model and a configuration fit, from the model's ``config.json`` alone; imports nothing heavy."""

from __future__ import annotations

from rl.config import ConfigError, RunConfig, Violation
from rl.models.architecture import Architecture, UnsupportedModel, read_architecture
from rl.models.stages import stage_layers


def check_model(config: RunConfig) -> Architecture:
    """What the model is, if this project builds it and the configuration fits it.

    Raises:
        FileNotFoundError: the model's directory has no ``config.json``.
        ConfigError: a model that is not supported, or fields that do not fit it.
    """
    try:
        arch = read_architecture(config.model.path)
    except UnsupportedModel as error:
        raise ConfigError(str(config.model.path), [Violation("model.path", f"{error}.")]) from error
    check_against_model(config, arch)
    return arch


def check_against_model(config: RunConfig, arch: Architecture) -> None:
    """Refuse what only the model can show to be wrong, all at once.

    Raises:
        ConfigError: with every field that does not fit.
    """
    violations = []

    def demand(ok: bool, path: str, message: str) -> None:
        if not ok:
            violations.append(Violation(path, message))

    if not arch.is_moe:
        demand(
            not config.rollout.capture_routes, "rollout.capture_routes", "a dense model has no routes; set it to false."
        )
    # Models with a directory of their own are checked by the ranks that build them.
    elsewhere = {"reward.model.parallel"}
    if config.critic is not None and config.critic.model_path is not None:
        elsewhere.add("critic.parallel")
    for path, p in config.layouts.items():
        if path in elsewhere:
            continue
        try:
            stage_layers(arch.layers, p.pp, p.vpp)
        except ValueError as error:
            demand(False, f"{path}.pp", f"{error}.")
        demand(
            arch.heads % p.tp == 0 and arch.kv_heads % p.tp == 0,
            f"{path}.tp",
            f"must divide {arch.heads} attention heads and {arch.kv_heads} key/value heads, came {p.tp}.",
        )
        demand(
            p.tp == 1 or arch.tensor_parallel,
            f"{path}.tp",
            f"tensor parallelism is not tested with the attention of {arch.family}, came {p.tp}; set it to 1.",
        )
        if arch.is_moe:
            demand(arch.experts % p.ep == 0, f"{path}.ep", f"must divide {arch.experts} experts, came {p.ep}.")
        else:
            demand(p.ep == 1 and p.etp == 1, f"{path}.ep", "a dense model has no experts; set ep and etp to 1.")
    ranks = config.rollout.tensor_parallel
    demand(
        arch.heads % ranks == 0 and (arch.kv_heads % ranks == 0 or ranks % arch.kv_heads == 0),
        "rollout.tensor_parallel",
        f"must divide {arch.heads} attention heads, and divide {arch.kv_heads} key/value heads or be a multiple of "
        f"their number, came {ranks}.",
    )
    demand(
        ranks == 1 or arch.tensor_parallel or config.allow_untested,
        "rollout.tensor_parallel",
        f"engines of several ranks are not tested with the attention of {arch.family}, came {ranks}; set it to 1, or "
        "allow_untested: true.",
    )
    demand(
        config.rollout.max_model_len <= arch.max_positions,
        "rollout.max_model_len",
        f"the model is made for {arch.max_positions} positions, came {config.rollout.max_model_len}; lower it.",
    )
    if violations:
        raise ConfigError(str(config.model.path), violations)
