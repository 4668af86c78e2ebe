"""``ultraep-schedule``: find a fused schedule of a problem and draw it beside plain 1F1B."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_ultraep.pipeline.gantt import charts, page, svg
from megatron_ultraep.pipeline.problem import Problem, Schedule
from megatron_ultraep.pipeline.simulate import simulate
from megatron_ultraep.pipeline.solve import solve


def read(path: Path, instance: str | None) -> Problem | Schedule:
    """What is in a file: a problem, a schedule, or with ``instance`` a row of a file of instances.

    Raises:
        ValueError: none of these.
    """
    text = path.read_text()
    given = json.loads(text)
    if not isinstance(given, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(given).__name__}")
    if "instances" in given:
        rows = {row["name"]: row for row in given["instances"]}
        if instance not in rows:
            raise ValueError(f"{path} holds instances: name one with --instance: {', '.join(rows)}; got {instance}")
        return Problem.of_instance(rows[instance])
    if instance is not None:
        raise ValueError(f"--instance {instance}: expected a file of instances, {path} is not one")
    return Schedule.from_json(text) if "orders" in given else Problem.from_json(text)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; see ``--help``."""
    parser = argparse.ArgumentParser(prog="ultraep-schedule", description=__doc__)
    parser.add_argument("input", type=Path, help="JSON: a problem, a schedule (only drawn), or a list of instances")
    parser.add_argument("--instance", metavar="NAME", help="which one of a list of instances")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write an .html page, or an .svg drawing")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the schedule, for the executor")
    parser.add_argument("--seconds", type=float, default=10.0, help="most time for the makespan (default 10)")
    parser.add_argument("--memory-seconds", type=float, default=20.0, help="most time for memory (default 20)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if options.out is not None and options.out.suffix not in (".html", ".svg"):
        parser.error(f"--out: expected a name that ends in .html or .svg, got {options.out}")
    try:
        given = read(options.input, options.instance)
        if isinstance(given, Schedule):
            schedule, note = given, "The order of every node as given."
        else:
            found = solve(given, options.seed, options.seconds, options.memory_seconds)
            schedule = found.schedule
            note = f"Found in {found.seconds + found.memory_seconds:.1f} s, seed {options.seed}."
        timeline = simulate(schedule)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    drawn = charts(timeline)
    for one in drawn:
        nodes = range(schedule.problem.nodes)
        print(f"{one.title}: makespan {one.makespan:.6g}, peak memory {max(one.peak(n) for n in nodes):.6g}")
    print(f"speed-up {drawn[1].makespan / drawn[0].makespan:.3f}x, simulated. {note}")
    if options.json is not None:
        options.json.write_text(schedule.to_json() + "\n")
    if options.out is not None:
        title = options.instance or options.input.stem
        text = page(timeline, title, note) if options.out.suffix == ".html" else svg(drawn, schedule.problem)
        options.out.write_text(text)
        print(f"wrote {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
