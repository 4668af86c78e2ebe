"""What a run reads before its processes start: model, tokenizer, prompts; and whether they fit the configuration."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rl.config import ConfigError, RunConfig, SourceSection, Violation
from rl.data.dataset import PromptDataset
from rl.data.files import Columns, read_files
from rl.data.sources import (
    BadRow,
    Row,
    check_labels,
    drop_overlap,
    listing,
    overlap,
    raise_bad_rows,
    reasoning_gym_rows,
)
from rl.data.supervised import SupervisedExample, sft_examples
from rl.files import write_json_lines
from rl.rewards.loading import label_check
from rl.rollout.model_files import end_tokens


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


def _rows(config: RunConfig, path: str, source: SourceSection, bad: list[BadRow]) -> list[Row]:
    """Rows of a source that can be used, as far as one sees without a tokenizer; the others are added to ``bad``.

    Args:
        config: of the run.
        path: the source's field, for messages.
        source: where rows come from.
        bad: rows that cannot be used, so far.

    Raises:
        DataError: none can be used.
    """
    reward = config.reward
    found: list[BadRow] = []
    if source.files is not None:
        columns = Columns(source.prompt_key, source.label_key, label_optional=reward.needs_label is False)
        rows, found = read_files(source.files, columns, source.size)
        name = ", ".join(map(str, source.files))
    else:
        assert source.reasoning_gym is not None  # rl.config.rules
        assert source.size is not None
        assert source.seed is not None
        rows = reasoning_gym_rows(source.reasoning_gym, source.size, source.seed, source.args)
        name = f"reasoning-gym task {source.reasoning_gym!r}"
    count = len(rows) + len(found)
    check = label_check(reward.path, reward.args, reward.needs_label)
    if check is not None:
        rows, refused = check_labels(rows, check)
        found += refused
    if not rows:
        raise_bad_rows(f"{path}: {name}", found, count)
    bad += found
    return rows


def load_data(config: RunConfig, tokenizer: Any) -> Data:
    """All prompts of a run; held-out problems that are in the training data too are dropped.

    With ``data.on_bad_row: skip``, rows that cannot be used are left out, counted on the terminal, and listed in
    ``skipped_rows.jsonl`` of the run directory.

    Raises:
        ConfigError: a chat template that the tokenizer does not have; a warm-up with a tokenizer that ends text with
            another token than engines stop at.
        DataError: rows that cannot be used, all named; or none that can.
    """
    section, warmup = config.data, config.warmup
    if section.chat and not getattr(tokenizer, "chat_template", None):
        message = (
            f"expected a tokenizer with a chat template, the one in {config.model.path} has none; add "
            "chat_template.jinja to that directory, or set data.chat to false and use data.prompt_template."
        )
        raise ConfigError("data.chat", [Violation("data.chat", message)])
    if warmup.steps:
        _check_ends(config.model.path, tokenizer)
    encoding = {
        "template": section.prompt_template,
        "chat": section.chat,
        "chat_args": section.chat_args,
        "max_prompt_tokens": section.max_prompt_tokens,
    }
    skipped: dict[str, list[BadRow]] = {"train": [], "eval": []}
    train_rows = _rows(config, "data.train", section.train, skipped["train"])
    solved_rows: list[Row] = []
    if warmup.steps:
        wanted = warmup.examples or warmup.steps * warmup.batch_size
        source = section.train.model_copy(update={"size": wanted, "seed": warmup.examples_seed})
        solved_rows = _rows(config, "warmup", source, skipped["train"])
    held_out = None
    if section.eval is not None:
        eval_rows = _rows(config, "data.eval", section.eval, skipped["eval"])
        seen = [*train_rows, *solved_rows]
        if shared := overlap(seen, eval_rows):
            print(f"data: {shared} of {len(eval_rows)} held-out problems are in the training data too; dropped")
        held_out = PromptDataset(
            drop_overlap(seen, eval_rows),
            tokenizer,
            shuffle=False,
            split="eval",
            limit=config.evaluation.prompts,
            skip_bad=True,
            **encoding,
        )
        skipped["eval"] += held_out.skipped
    examples = []
    if solved_rows:
        wording = {"answer_template": warmup.answer_template, "learn_prompts": warmup.learn == "text"}
        examples = sft_examples(solved_rows, tokenizer, **wording, **encoding)
    train = PromptDataset(
        train_rows, tokenizer, seed=config.run.seed, shuffle=section.shuffle, skip_bad=True, **encoding
    )
    skipped["train"] += train.skipped
    if section.on_bad_row == "error":
        for split, data in (("train", train), ("eval", held_out)):
            raise_bad_rows(f"data.{split}", skipped[split], (len(data) if data else 0) + len(skipped[split]))
    _report_skipped(config.output_dir, skipped)
    digests = {"train": train.digest} | ({"eval": held_out.digest} if held_out else {})
    return Data(train=train, held_out=held_out, warmup=examples, digests=digests)


def _check_ends(model: Path, tokenizer: Any) -> None:
    """Solved problems end with the tokenizer's end, responses with the model's."""
    ends = end_tokens(model)
    if ends and tokenizer.eos_token_id not in ends:
        message = (
            f"the tokenizer in {model} ends text with {tokenizer.eos_token!r} (id {tokenizer.eos_token_id}), but the "
            f"model's config ends it with {', '.join(map(str, ends))}: a warm-up would teach an end at which no engine "
            "stops. Correct eos_token in its tokenizer_config.json, or eos_token_id in its generation_config.json."
        )
        raise ConfigError("warmup.steps", [Violation("model.path", message)])


def _report_skipped(run_directory: Path, skipped: Mapping[str, Sequence[BadRow]]) -> None:
    """Say which rows are left out, and keep the list."""
    lines = [
        {"split": split, "place": row.place, "reason": row.reason} for split, rows in skipped.items() for row in rows
    ]
    path = run_directory / "skipped_rows.jsonl"
    path.unlink(missing_ok=True)
    if not lines:
        return
    run_directory.mkdir(parents=True, exist_ok=True)
    write_json_lines(path, lines)
    for split, rows in skipped.items():
        if rows:
            count = "1 row" if len(rows) == 1 else f"{len(rows)} rows"
            print(f"data: {count} of {split} cannot be used and skipped ({path}):\n  {listing(rows)}")


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
