"""Code that passes tests: ``rl.rewards.code:code_execution`` runs a response's Python in a sandbox.

Tests are the label (or JSON text of it), in one of the forms that data sets use:

- programs that read and write: ``{"inputs": ["1 2\\n"], "outputs": ["3\\n"]}``, or a list of
  ``{"input": "1 2\\n", "output": "3\\n"}``; white space at line ends and at the end does not count;
- a function: ``{"fn_name": "add", "inputs": [[1, 2]], "outputs": [3]}``; arguments and results are JSON values, also as
  text with one argument a line; the function may be a method of ``Solution``;
- assertions: Python text, a list of such texts, or ``{"tests": ...}`` with either.

What a candidate may do is in ``rl.rewards.sandbox``. It shares a process with its assertions, so code that is written
to deceive them can; ending the process early, printing, or replacing ``sys.exit`` is not enough.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rl.rewards.sandbox import Limits, SandboxError, check, python, run
from rl.types import Sample

_HARNESS = Path(__file__).with_name("code_harness.py")
_BLOCK = re.compile(r"```[ \t]*(?:python3?|py)?[ \t]*\r?\n(.*?)```", re.DOTALL | re.IGNORECASE)
_LIMITS = {"time_s", "cpu_s", "memory_mib", "file_mib", "processes", "output_bytes", "allow_network"}
_KNOWN = _LIMITS | {"partial_credit", "max_tests"}


@dataclass(frozen=True)
class ProblemTests:
    """Tests of one problem; one of both is empty.

    Attributes:
        dialogues: standard input and expected standard output of a run each.
        checks: for the harness: ``{"code"}`` or ``{"function", "arguments", "expected"}``.
    """

    dialogues: tuple[tuple[str, str], ...] = ()
    checks: tuple[dict[str, Any], ...] = ()


def code_execution(sample: Sample, args: Mapping[str, Any]) -> float:
    """1.0 when the response's code passes all tests, else 0.0; with ``partial_credit``, the fraction that it passes.

    The code is the last fenced block of Python, or the whole response if there is no fence.

    Args:
        sample: with tests as its label.
        args: ``partial_credit`` (False); ``max_tests`` (null): only the first so many; the limits of
            ``rl.rewards.sandbox.Limits``, which hold for each dialogue, and for all checks together.

    Raises:
        ValueError: a label that holds no tests, or wrong args.
        SandboxError: nothing was run because the sandbox cannot be made.
    """
    limits, partial, most = _settings(args)
    tests = parse_tests(sample.prompt.label)
    code = extract_code(sample.response_text)
    dialogues, checks = tests.dialogues[:most], tests.checks[:most]
    total = len(dialogues) + len(checks)
    if not code.strip():
        return 0.0
    passed = _passed_checks(code, checks, limits) if checks else 0
    for number, (given, expected) in enumerate(dialogues):
        passed += _talks_right(code, given, expected, limits)
        if not partial and passed <= number:
            return 0.0
    return passed / total if partial else float(passed == total)


def extract_code(response: str) -> str:
    """The last fenced block of Python, or of no language; without a fence, the whole text."""
    blocks = _BLOCK.findall(response)
    return blocks[-1] if blocks else ("" if "```" in response else response)


def parse_tests(label: Any) -> ProblemTests:
    """Tests from a label, see the module.

    Raises:
        ValueError: saying what was expected.
    """
    if isinstance(label, str) and label.lstrip()[:1] in ("{", "["):
        try:
            label = json.loads(label)
        except json.JSONDecodeError as error:
            raise ValueError(f"expected tests, got text that begins like JSON and is none: {error}") from None
    if isinstance(label, Mapping):
        if "tests" in label:
            return ProblemTests(checks=_assertions(label["tests"]))
        if "inputs" in label and "outputs" in label:
            name = label.get("fn_name")
            return _pairs(label["inputs"], label["outputs"], name)
        found = ", ".join(sorted(map(str, label))) or "nothing"
        raise ValueError(f"expected tests with inputs and outputs, or with tests, got an object with {found}")
    if isinstance(label, list) and label and all(isinstance(item, Mapping) for item in label):
        if not all({"input", "output"} <= set(item) for item in label):
            raise ValueError("expected input and output in each test, missing in some")
        return _pairs([item["input"] for item in label], [item["output"] for item in label], None)
    return ProblemTests(checks=_assertions(label))


def _assertions(value: Any) -> tuple[dict[str, Any], ...]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError(f"expected tests as Python text or a list of such texts, got {str(value)[:100]!r}")
    return tuple({"code": text} for text in texts)


def _pairs(inputs: Any, outputs: Any, function: Any) -> ProblemTests:
    if not isinstance(inputs, list) or not isinstance(outputs, list) or not inputs or len(inputs) != len(outputs):
        raise ValueError(
            "expected inputs and outputs as lists of the same length >= 1, got "
            f"{len(inputs) if isinstance(inputs, list) else type(inputs).__name__} and "
            f"{len(outputs) if isinstance(outputs, list) else type(outputs).__name__}"
        )
    if function is None:
        if not all(isinstance(text, str) for text in (*inputs, *outputs)):
            raise ValueError("expected inputs and outputs as text, got other values; name the function in fn_name")
        return ProblemTests(dialogues=tuple(zip(inputs, outputs, strict=True)))
    if not isinstance(function, str) or not function.isidentifier():
        raise ValueError(f"expected a function's name as fn_name, got {function!r}")
    return ProblemTests(
        checks=tuple(
            {"function": function, "arguments": _arguments(given), "expected": _value(expected)}
            for given, expected in zip(inputs, outputs, strict=True)
        )
    )


def _arguments(given: Any) -> list[Any]:
    if isinstance(given, str):
        return [_value(line) for line in given.split("\n") if line.strip()]
    return given if isinstance(given, list) else [given]


def _value(text: Any) -> Any:
    """JSON text as its value; other values, and text that is no JSON, as they are."""
    if not isinstance(text, str):
        return text
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _passed_checks(code: str, checks: tuple[dict[str, Any], ...], limits: Limits) -> int:
    word = secrets.token_hex(16)
    stdin = "".join(json.dumps(part) + "\n" for part in (code, word, list(checks)))
    files = {"harness.py": _HARNESS.read_text(encoding="utf-8")}
    outcome = run([*python(), "harness.py"], limits, stdin=stdin, files=files)
    answered = {line for line in outcome.stdout.split("\n") if line.startswith(word)}
    return sum(f"{word} {index} 1" in answered for index in range(len(checks)))


def _talks_right(code: str, given: str, expected: str, limits: Limits) -> bool:
    outcome = run([*python(), "candidate.py"], limits, stdin=given, files={"candidate.py": code})
    return outcome.exit_code == 0 and not outcome.truncated and _lines(outcome.stdout) == _lines(expected)


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().split("\n")]


def _settings(args: Mapping[str, Any]) -> tuple[Limits, bool, int | None]:
    unknown = set(args) - _KNOWN
    if unknown:
        raise ValueError(f"unknown reward args {sorted(unknown)}; known are {sorted(_KNOWN)}")
    for name in _KNOWN & set(args):
        value, flag = args[name], name in ("partial_credit", "allow_network")
        if flag and not isinstance(value, bool):
            raise ValueError(f"expected true or false as {name} in the reward's args, got {value!r}")
        if not flag and (isinstance(value, bool) or not isinstance(value, int | float) or value <= 0):
            raise ValueError(f"expected {name} > 0 in the reward's args, got {value!r}")
    limits = Limits(**{name: args[name] for name in _LIMITS & set(args)})
    return limits, bool(args.get("partial_credit", False)), args.get("max_tests")


def _check_args(args: Mapping[str, Any]) -> None:
    limits, _, _ = _settings(args)
    try:
        check(limits.allow_network)
    except SandboxError as error:
        raise ValueError(str(error)) from error


def _check_label(label: Any) -> None:
    parse_tests(label)


code_execution.check_args = _check_args  # type: ignore[attr-defined]
code_execution.check_label = _check_label  # type: ignore[attr-defined]
