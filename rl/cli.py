"""``ultraep-rl``: train, look at and verify runs.

Exit codes: 0 all is well, 1 the run failed (or a plan does not fit), 2 the configuration, its data or the command line
is wrong, 3 an accuracy threshold (`evaluation.success`) was missed, 75 SIGUSR1 asked the run to stop and `--resume`
goes on, 130 Ctrl-C or SIGTERM.

Heavy packages (torch, ray, vllm) are imported only by the commands that need them, so that `--dry-run` is immediate
and works where they are not installed.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand

from rl import placement, versions
from rl.config import ConfigError, RunConfig, Violation, describe, load, to_yaml
from rl.ledger import LedgerError, ResumeError
from rl.orchestration.fit import check_model

OK, FAILED, USAGE, THRESHOLDS, INTERRUPTED = 0, 1, 2, 3, 130

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    help="Reinforcement learning of mixture-of-experts models on Megatron-core and vLLM.",
)


class _TrainCommand(TyperCommand):
    """Lets ``--resume`` stand alone: it then means ``--resume auto``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, list(_complete_resume(args)))


def _complete_resume(args: Sequence[str]) -> Iterator[str]:
    for index, argument in enumerate(args):
        following = args[index + 1] if index + 1 < len(args) else None
        yield argument
        if argument == "--resume" and (
            following is None
            or following.startswith("-")
            or (("=" in following or following.endswith((".yaml", ".yml"))) and not Path(following).is_dir())
        ):
            yield "auto"


@app.command(cls=_TrainCommand)
def train(
    config_file: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="Configuration of the run.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="A.B=C", help="Fields that win over the file.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the resolved configuration and the placement; start nothing.")
    ] = False,
    resume: Annotated[
        str | None,
        typer.Option(
            metavar="[DIR|auto]",
            help="Continue the run in DIR; alone or auto: in the configuration's run directory, if there is one.",
        ),
    ] = None,
    allow_untested: Annotated[
        bool, typer.Option("--allow-untested", help="Run with versions that were not tested.")
    ] = False,
    allow_changes: Annotated[
        bool, typer.Option("--allow-changes", help="Resume although fields that matter differ from the run's.")
    ] = False,
) -> None:
    """Train a model as CONFIG.yaml says."""
    flags = [
        f"{name}=true" for name, on in (("allow_untested", allow_untested), ("allow_changes", allow_changes)) if on
    ]
    try:
        config = load(config_file, [*(overrides or []), *flags])
        if dry_run:
            _print_plan(config)
            _check_model(config)
            return
        config, resume_directory = _resolve_resume(config, resume)
        versions.check(config.allow_untested, _device(config))
        missing = list(_missing_files(config))
        if missing:
            raise ConfigError(str(config_file), missing)
        _check_model(config)
    except (ConfigError, versions.UntestedVersionError) as error:
        _stop(USAGE, str(error))
    raise typer.Exit(_run(config, resume_directory))


@app.command()
def report(run_directory: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Directory of a run.")]) -> None:
    """Write RUN_DIR/report.html anew from what the run has recorded."""
    from rl.report import write_report

    try:
        typer.echo(str(write_report(run_directory)))
    except LedgerError as error:
        _stop(USAGE, str(error))


@app.command()
def verify_eval(
    run_directory: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Directory of a run.")],
) -> None:
    """Score the saved evaluation samples again; end with 1 if a recorded reward differs, 3 if a threshold is missed."""
    from rl.rewards.loading import RewardLoadError
    from rl.verification.evaluations import verify_eval as verify

    try:
        result = verify(run_directory)
    except (ConfigError, LedgerError, RewardLoadError) as error:
        _stop(USAGE, str(error))
    typer.echo(result.render())
    raise typer.Exit(FAILED if result.mismatches else THRESHOLDS if result.missed else OK)


@app.command()
def verify(
    run_directory: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Directory of a run.")],
    rewards: Annotated[
        bool, typer.Option(help="Score the saved evaluation samples again, with the run's reward function.")
    ] = True,
) -> None:
    """Check from its files that a run fits together: ledger, prompts, metrics, data, routes, plans, checkpoints and
    evaluations; end with 1 if something does not, 3 if a threshold is missed."""
    from rl.verification.run import verify_run

    try:
        result = verify_run(run_directory, rewards=rewards)
    except (ConfigError, LedgerError) as error:
        _stop(USAGE, str(error))
    typer.echo(result.render())
    raise typer.Exit(FAILED if result.mismatches else THRESHOLDS if result.missed else OK)


@app.command()
def fields(
    section: Annotated[str | None, typer.Argument(help="Only this section, e.g. trainer.optimizer.")] = None,
) -> None:
    """List the fields of a configuration with type, default and meaning."""
    try:
        typer.echo(describe(section))
    except ConfigError as error:
        _stop(USAGE, str(error))


@app.command()
def convert(
    files: Annotated[list[Path], typer.Argument(metavar="INPUT... OUTPUT", help="JSONL or parquet files.")],
    prompt_key: Annotated[
        str | None, typer.Option(help="Column of the prompt, dots for inner ones; by default found by name.")
    ] = None,
    label_key: Annotated[str | None, typer.Option(help="Column of the label, likewise.")] = None,
    no_label: Annotated[bool, typer.Option("--no-label", help="Labels are null.")] = False,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave out rows that cannot be used, and list them.")
    ] = False,
) -> None:
    """Write data sets of other tools as one file with the columns prompt and label; all other columns are kept."""
    from rl.data.convert import convert as convert_files
    from rl.data.sources import DataError

    if len(files) < 2:
        _stop(USAGE, "expected at least one input and the output, came one file; see ultraep-rl convert --help")
    *inputs, output = files
    try:
        result = convert_files(
            inputs, output, prompt_key=prompt_key, label_key=label_key, no_label=no_label, skip_bad=skip_bad
        )
    except DataError as error:
        _stop(USAGE, str(error))
    typer.echo(result.render())


@app.command()
def plan(
    config_file: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="Configuration of the run.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="A.B=C", help="Fields that win over the file.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the plan there too.")] = None,
) -> None:
    """Say what CONFIG.yaml takes: memory of a GPU by part, seconds of a step by phase; 1 if it does not fit."""
    from rl.planning.advice import advise
    from rl.planning.plan import PlanError, make_plan
    from rl.planning.render import render

    try:
        config = load(config_file, overrides or [])
        made = make_plan(config)
    except (ConfigError, PlanError) as error:
        _stop(USAGE, str(error))
    typer.echo(render(config, made, advise(config, made)))
    if json_file is not None:
        json_file.write_text(json.dumps(made.to_json(), indent=1) + "\n")
    raise typer.Exit(OK if made.fits else FAILED)


def _run(config: RunConfig, resume: Path | None) -> int:
    """The loop's exit code; exceptions become codes here."""
    from rl.data.sources import DataError
    from rl.orchestration.sync import run
    from rl.rewards.loading import RewardLoadError

    try:
        return run(config, resume)
    except KeyboardInterrupt:
        _stop(INTERRUPTED, f"interrupted; continue with --resume {config.output_dir}")
    except (ConfigError, DataError, ResumeError, RewardLoadError) as error:
        _stop(USAGE, str(error))
    except Exception as error:
        traceback.print_exc()
        _stop(FAILED, f"run failed: {type(error).__name__}: {error}")


def _print_plan(config: RunConfig) -> None:
    """YAML that can be loaded again; the placement follows as comments, problems of this machine go to stderr."""
    typer.echo(to_yaml(config))
    typer.echo("\n".join(f"# {line}" for line in placement.render(config).split("\n")))
    for line in versions.untested(_device(config)):
        typer.echo(f"warning: {line}", err=True)
    for violation in _missing_files(config):
        typer.echo(f"warning: {violation}", err=True)


def _resolve_resume(config: RunConfig, resume: str | None) -> tuple[RunConfig, Path | None]:
    """The configuration (with DIR as its run directory) and the directory to resume, None to start.

    Raises:
        ConfigError: DIR holds no run, or the run directory of a new run holds one.
    """
    directory = config.output_dir if resume in (None, "auto") else Path(str(resume))
    holds_run = (directory / "run.json").is_file()
    if resume is None:
        if holds_run:
            raise ConfigError(
                "run.output_dir",
                [
                    Violation(
                        "run.output_dir",
                        f"expected a directory without a run, and {directory} holds one; continue it with "
                        "--resume or set "
                        "another run.name.",
                    )
                ],
            )
        return config, None
    if resume == "auto":
        if not holds_run:
            typer.echo(f"nothing to resume in {directory}: starting the run", err=True)
        return config, directory if holds_run else None
    if not holds_run:
        raise ConfigError(
            "--resume",
            [Violation("--resume", f"expected a run directory with run.json, found none in {directory}; check it.")],
        )
    return config.model_copy(update={"run": config.run.model_copy(update={"output_dir": directory})}), directory


def _missing_files(config: RunConfig) -> Iterator[Violation]:
    if not (config.model.path / "config.json").is_file() and config.model.create is None:
        yield Violation(
            "model.path",
            f"expected a Hugging Face directory with config.json, found none at {config.model.path}; correct "
            "the path or "
            "set model.create.",
        )
    for name, source in (("train", config.data.train), ("eval", config.data.eval)):
        for file in (source.files or ()) if source is not None else ():
            if not file.is_file():
                yield Violation(f"data.{name}.files", f"expected a file, found none at {file}; correct the path.")


def _check_model(config: RunConfig) -> None:
    """Refuse a model that is there already and cannot be trained as configured.

    Raises:
        ConfigError: naming all that does not fit.
    """
    if (config.model.path / "config.json").is_file():
        check_model(config)


def _device(config: RunConfig) -> versions.Device:
    return "cuda" if config.rollout.device == "cuda" or config.trainer.backend == "nccl" else "cpu"


def _stop(code: int, message: str) -> NoReturn:
    print(message, file=sys.stderr)
    raise typer.Exit(code)


if __name__ == "__main__":
    app()
