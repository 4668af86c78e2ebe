"""Runs a candidate and its checks inside the sandbox; needs the standard library only.

Standard input has three lines of JSON: the candidate's code, a secret word, and the checks. The candidate runs first,
its output thrown away; then every check prints ``word index 1`` or ``word index 0``. A candidate that ends the process
leaves its later checks unanswered.
"""

from __future__ import annotations

import json
import os
import sys


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 1)
    code = json.loads(sys.stdin.readline())
    names: dict = {"__name__": "candidate"}
    exec(compile(code, "candidate.py", "exec"), names)
    word = json.loads(sys.stdin.readline())
    for index, check in enumerate(json.loads(sys.stdin.readline())):
        answers.write(f"{word} {index} {int(passes(check, names))}\n")


def passes(check: dict, names: dict) -> bool:
    """Whether code raises nothing, or a call returns what is expected."""
    try:
        if "code" in check:
            exec(compile(check["code"], "test.py", "exec"), names)
            return True
        function = names.get(check["function"])
        if function is None and isinstance(names.get("Solution"), type):
            function = getattr(names["Solution"](), check["function"])
        returned = json.loads(json.dumps(function(*check["arguments"])))
        return returned == check["expected"] or [returned] == check["expected"]
    except Exception as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return False


if __name__ == "__main__":
    main()
