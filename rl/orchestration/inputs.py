"""What a run reads before its processes start: model, tokenizer, prompts; and whether they fit the configuration."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rl.config import ConfigError, RunConfig, SourceSection, Violation
from rl.data.dataset import PromptDataset
from rl.data.sources import Row, digest, drop_overlap, overlap, read_jsonl, reasoning_gym_rows
from rl.data.supervised import SupervisedExample, sft_examples
from rl.models.architecture import Architecture


@dataclass
class Data:
    """Prompts of training and evaluation, and solved problems for the warm-up; no problem is in two of them."""

    train: PromptDataset
    held_out: PromptDataset | None
    warmup: list[SupervisedExample]
    digests: dict[str, str]


def make_model(config: RunConfig) -> None:
    """Run ``model.create`` if there is no model yet.

    Raises:
        ConfigError: it names no function.
    """
    if (config.model.path / "config.json").is_file() or config.model.create is None:
        return
    module, _, function = config.model.create.partition(":")
    try:
        make = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        message = f"expected an importable module:function, came {config.model.create!r} ({error}); correct it."
        raise ConfigError("model.create", [Violation("model.create", message)]) from error
    make(path=config.model.path, **config.model.create_args)


def load_tokenizer(path: Path) -> Any:
    """The model's tokenizer."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(path))


def _rows(source: SourceSection) -> list[Row]:
    if source.files is not None:
        return read_jsonl(source.files[0], source.size)
    assert source.reasoning_gym is not None  # rl.config.rules
    assert source.size is not None
    assert source.seed is not None
    return reasoning_gym_rows(source.reasoning_gym, source.size, source.seed, source.args)


def load_data(config: RunConfig, tokenizer: Any) -> Data:
    """All prompts of a run; held-out problems that are in the training data too are dropped."""
    section, warmup = config.data, config.warmup
    encoding = {
        "template": section.prompt_template,
        "chat": section.chat,
        "max_prompt_tokens": section.max_prompt_tokens,
    }
    train_rows = _rows(section.train)
    solved_rows: list[Row] = []
    if warmup.steps:
        wanted = warmup.examples or warmup.steps * warmup.batch_size
        source = section.train.model_copy(update={"size": wanted, "seed": warmup.examples_seed})
        # A file has no generator to ask for other problems: the warm-up then learns the training problems' labels.
        solved_rows = _rows(source) if section.train.reasoning_gym else train_rows[:wanted]
    held_out = None
    digests = {"train": digest(train_rows)}
    if section.eval is not None:
        eval_rows = _rows(section.eval)
        seen = [*train_rows, *solved_rows]
        if shared := overlap(seen, eval_rows):
            print(f"data: {shared} of {len(eval_rows)} held-out problems are in the training data too; dropped")
        eval_rows = drop_overlap(seen, eval_rows)[: config.evaluation.prompts]
        digests["eval"] = digest(eval_rows)
        held_out = PromptDataset(eval_rows, tokenizer, shuffle=False, split="eval", **encoding)
    examples = (
        sft_examples(solved_rows, tokenizer, answer_template=warmup.answer_template, **encoding) if solved_rows else []
    )
    return Data(
        train=PromptDataset(train_rows, tokenizer, seed=config.run.seed, shuffle=section.shuffle, **encoding),
        held_out=held_out,
        warmup=examples,
        digests=digests,
    )


def stop_token_ids(config: RunConfig, tokenizer: Any) -> tuple[int, ...]:
    """Of ``sampling.stop``.

    Raises:
        ConfigError: a text that is not one token.
    """
    ids = []
    for text in config.sampling.stop:
        encoded = tokenizer.encode(text, add_special_tokens=False)
        if len(encoded) != 1:
            message = f"expected texts that are one token of the model, {text!r} is {len(encoded)}; leave it out."
            raise ConfigError("sampling.stop", [Violation("sampling.stop", message)])
        ids.append(int(encoded[0]))
    return tuple(ids)


def check_against_model(config: RunConfig, arch: Architecture) -> None:
    """What only the model can show to be wrong, all at once."""
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
        chunks = p.pp * p.vpp
        demand(
            arch.layers % chunks == 0,
            f"{path}.pp",
            f"pp*vpp = {chunks} must divide the model's {arch.layers} layers.",
        )
        demand(
            arch.heads % p.tp == 0 and arch.kv_heads % p.tp == 0,
            f"{path}.tp",
            f"must divide {arch.heads} attention heads and {arch.kv_heads} key/value heads, came {p.tp}.",
        )
        if arch.is_moe:
            demand(arch.experts % p.ep == 0, f"{path}.ep", f"must divide {arch.experts} experts, came {p.ep}.")
        else:
            demand(p.ep == 1 and p.etp == 1, f"{path}.ep", "a dense model has no experts; set ep and etp to 1.")
    demand(
        config.rollout.max_model_len <= arch.max_positions,
        "rollout.max_model_len",
        f"the model is made for {arch.max_positions} positions, came {config.rollout.max_model_len}; lower it.",
    )
    if violations:
        raise ConfigError(str(config.model.path), violations)
