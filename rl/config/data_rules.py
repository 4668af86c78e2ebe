"""What the sections about prompts and evaluation demand of each other."""

from __future__ import annotations

from collections.abc import Iterator

from rl.config.data import FILE_ENDINGS, SourceSection
from rl.config.sections import RunConfig
from rl.config.violations import Violation


def data(config: RunConfig) -> Iterator[Violation]:
    """Violations of sources, templates, held-out prompts and evaluation."""
    sources = {"data.train": config.data.train} | ({"data.eval": config.data.eval} if config.data.eval else {})
    for path, source in sources.items():
        yield from _source(path, source)
    yield from _template(config)
    yield from _held_out(config)
    yield from _evaluation(config)


def _source(path: str, source: SourceSection) -> Iterator[Violation]:
    if (source.reasoning_gym is None) == (source.files is None):
        came = "neither" if source.files is None else "both"
        yield Violation(path, f"expected one of `reasoning_gym` and `files`, came {came}; set one, the other to null.")
    elif source.files is None:
        for name in ("size", "seed"):
            if getattr(source, name) is None:
                yield Violation(f"{path}.{name}", "a reasoning-gym task needs a number, came null; set it.", (path,))
        for name, default in (("prompt_key", "prompt"), ("label_key", None)):
            if getattr(source, name) != default:
                yield Violation(
                    f"{path}.{name}",
                    f"only files have columns, came {getattr(source, name)!r} with `reasoning_gym`; remove it.",
                    (path,),
                )
    else:
        for name, value in (("args", source.args), ("seed", source.seed)):
            if value not in (None, {}):
                yield Violation(
                    f"{path}.{name}",
                    f"only a reasoning-gym task takes it, came {value!r} with `files`; remove it.",
                    (path,),
                )
        if not source.files:
            yield Violation(f"{path}.files", "expected at least one file, came an empty list; name one.", (path,))
        other = [str(file) for file in source.files if file.suffix not in FILE_ENDINGS]
        if other:
            yield Violation(
                f"{path}.files",
                f"expected files that end in {' or '.join(FILE_ENDINGS)}, came {', '.join(other)}; rename or convert "
                "them (`ultraep-rl convert`).",
                (path,),
            )
        twice = sorted({str(file) for file in source.files if source.files.count(file) > 1})
        if twice:
            yield Violation(f"{path}.files", f"expected each file once, came {', '.join(twice)} twice.", (path,))


def _template(config: RunConfig) -> Iterator[Violation]:
    template = config.data.prompt_template
    if "{prompt}" not in template:
        yield Violation(
            "data.prompt_template", f"expected a text that holds {{prompt}}, came {template!r}; put {{prompt}} in it."
        )
    if config.data.chat and template != "{prompt}":
        yield Violation(
            "data.chat",
            "expected either the chat template or `prompt_template`, came both; remove one.",
            ("data.prompt_template",),
        )
    if config.data.chat_args and not config.data.chat:
        yield Violation(
            "data.chat_args",
            "they are arguments of the chat template, and data.chat is false; set it to true or remove them.",
            ("data.chat",),
        )
    own = sorted({"tokenize", "add_generation_prompt", "conversation", "return_dict"} & set(config.data.chat_args))
    if own:
        yield Violation("data.chat_args", f"{', '.join(own)}: set by the loop itself; remove it.")


def _held_out(config: RunConfig) -> Iterator[Violation]:
    """Problem i of a task has generator seed `seed + i`, so it is the seed ranges that must not overlap."""
    held_out = config.data.eval
    if held_out is None:
        return
    train = config.data.train
    both = set(train.files or ()) & set(held_out.files or ())
    if both:
        yield Violation(
            "data.eval.files",
            "held-out problems would not be held out: training reads "
            f"{', '.join(sorted(map(str, both)))} too; use other files.",
            ("data.train.files",),
        )
    used = [("data.train", train.reasoning_gym, train.seed, train.size)]
    if config.warmup.steps > 0:
        examples = config.warmup.examples or config.warmup.steps * config.warmup.batch_size
        used.append(("warmup", train.reasoning_gym, config.warmup.examples_seed, examples))
    for path, task, seed, size in used:
        if task is None or task != held_out.reasoning_gym:
            continue
        if seed is None or size is None or held_out.seed is None or held_out.size is None:
            continue
        if seed < held_out.seed + held_out.size and held_out.seed < seed + size:
            yield Violation(
                "data.eval.seed",
                "held-out problems would not be held out: they use generator seeds "
                f"{_range(held_out.seed, held_out.size)} "
                f"and {path} uses {_range(seed, size)} of the same task; set seeds further apart.",
                ("data.train", "data.eval.size", *(("warmup",) if path == "warmup" else ())),
            )


def _range(first: int, count: int) -> str:
    return f"{first}..{first + count - 1}"


def _evaluation(config: RunConfig) -> Iterator[Violation]:
    evaluation, held_out = config.evaluation, config.data.eval
    success = evaluation.success
    if evaluation.samples > 1 and evaluation.greedy:
        yield Violation(
            "evaluation.samples",
            f"greedy decoding gives the same response every time: expected 1, came {evaluation.samples}; set "
            "evaluation.greedy to false or take one sample.",
            ("evaluation.greedy",),
        )
    if held_out is None:
        for path, wanted in (
            ("evaluation.every", evaluation.every > 0),
            ("evaluation.success.before_max", success.before_max is not None),
            ("evaluation.success.after_min", success.after_min is not None),
        ):
            if wanted:
                yield Violation(
                    path, "needs held-out prompts, and data.eval is null; set data.eval or remove it.", ("data.eval",)
                )
        return
    if held_out.size is not None and evaluation.prompts > held_out.size:
        yield Violation(
            "evaluation.prompts",
            f"expected at most data.eval.size = {held_out.size}, came {evaluation.prompts}; "
            "lower it or raise the size.",
            ("data.eval.size",),
        )
    for name, when in (("before_max", "at_start"), ("after_min", "at_end")):
        if getattr(success, name) is not None and not getattr(evaluation, when):
            yield Violation(
                f"evaluation.success.{name}",
                f"needs the evaluation that evaluation.{when}: false turns off; set {when} to true or {name} to null.",
                (f"evaluation.{when}",),
            )
