"""Balance the experts of an existing Megatron job, whose script stays as it is.

    python -m megatron_ultraep.launch [--ultraep-...] pretrain_gpt.py <the job's own arguments>
    torchrun <...> -m megatron_ultraep.launch [--ultraep-...] pretrain_gpt.py <the job's own arguments>

1. The flags before the script's path become a :class:`BalanceConfig`.
2. Hooks are laid into ``megatron.training`` (:mod:`megatron_ultraep.megatron.training`), or none with
   ``--no-ultraep-enabled``.
3. The script runs as ``python script.py`` would run it.
"""

from __future__ import annotations

import argparse
import os
import runpy
import sys
from collections.abc import Sequence

from megatron_ultraep.config import BalanceConfig
from megatron_ultraep.megatron import arguments, training


def main(argv: Sequence[str] | None = None) -> None:
    """Run a script with balancing; ``argv`` is the command line after ``python -m megatron_ultraep.launch``."""
    config, script, its_arguments = parse(sys.argv[1:] if argv is None else argv)
    training.install(config)
    try:
        run(script, its_arguments)
    finally:
        training.close()
    if training.is_waiting():
        print(
            "megatron_ultraep: the script ended without building a model through megatron.training, so nothing was "
            "balanced; where a script has a training loop of its own, call megatron_ultraep.attach(model, config)",
            file=sys.stderr,
        )


def parse(argv: Sequence[str]) -> tuple[BalanceConfig, str, list[str]]:
    """The config, the script's path, and the script's own arguments.

    Raises:
        SystemExit: code 2 and a sentence, when one of our flags is wrong or comes late, or there is no script.
    """
    parser = argparse.ArgumentParser(
        prog="python -m megatron_ultraep.launch",
        usage="%(prog)s [--ultraep-...] SCRIPT [the script's own arguments]",
        description="Run a Megatron training script with balanced experts; the script stays as it is.",
        allow_abbrev=False,
    )
    count = arguments.leading(argv)
    ours, rest = argv[:count], list(argv[count:])
    if rest and rest[0] in ("-h", "--help"):
        ours, rest = ["--help"], []
    config = arguments.parse(ours, parser)
    if not rest:
        parser.error("the path of a script is expected after the flags")
    script, *its_arguments = rest
    if script.startswith("-"):
        parser.error(f"only --ultraep-* flags go before the script's path, got {script}: put it after the path")
    late = next((word for word in its_arguments if arguments.is_flag(word)), None)
    if late is not None:
        parser.error(f"{late} comes after the script's path {script}: put --ultraep-* flags before it")
    if not os.path.isfile(script):
        parser.error(f"there is no script {script} (flags that are switched on or off take no value: --no-ultraep-...)")
    return config, script, its_arguments


def run(script: str, its_arguments: Sequence[str]) -> None:
    """Run a script in this process as ``python script its_arguments`` would."""
    sys.argv = [script, *its_arguments]
    sys.path.insert(0, os.path.dirname(os.path.abspath(script)))
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
