"""Compiles ``csrc`` with torch's extension loader, once for each machine, and calls it through ctypes.

The library has a C interface and includes no header of torch, so it builds in seconds and does not depend on Python's
or torch's binary interface.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Literal

import torch

_SOURCES = Path(__file__).parent / "csrc"

Target = Literal["cuda", "host", "lanes"]


class BuildError(RuntimeError):
    """The kernels could not be compiled here."""


class Library:
    """The compiled kernels. Every function checks what it launches.

    Args:
        target: ``cuda``, or ``host``: the same kernels on the CPU, synchronous, for tests and for reading along; or
            ``lanes``: on the CPU with warps of 32, slowly, for tests of what only such warps do (``csrc/lanes.h``).
    """

    def __init__(self, target: Target) -> None:
        self.target = target
        self._library = ctypes.CDLL(_compile(target))
        self._library.ultraep_error.restype = ctypes.c_char_p
        self._functions: dict[str, Callable[..., int]] = {}

    def __call__(self, name: str, *arguments: int | torch.Tensor | None, stream: int = 0) -> None:
        """Launch ``ultraep_<name>`` with these arguments and a stream.

        Args:
            name: of the launcher.
            arguments: integers (passed as int64) and tensors (their address; contiguous); None is 0.
            stream: raw CUDA stream; without meaning on the host.

        Raises:
            RuntimeError: the launch failed, with CUDA's message.
        """
        # Every microsecond here is one that the device may have to wait for the host.
        values = [
            a if type(a) is int else a.data_ptr() if isinstance(a, torch.Tensor) else int(a or 0) for a in arguments
        ]
        function = self._functions.get(name) or self._function(name, len(values) + 1)
        code = function(*values, stream)
        if code:
            raise RuntimeError(f"kernel {name}: {self._library.ultraep_error(code).decode()}")

    def _function(self, name: str, count: int) -> Callable[..., int]:
        function = self._library[f"ultraep_{name}"]
        function.argtypes = [ctypes.c_int64] * count  # addresses too: they travel alike
        self._functions[name] = function
        return function


def current_stream(device: torch.device) -> int:
    """The raw CUDA stream that is current on a device; 0 on a CPU."""
    if device.type != "cuda":
        return 0
    return int(torch._C._cuda_getCurrentRawStream(device.index))


@cache
def library(target: Target) -> Library:
    """The kernels for a target, compiled on first use (about 20 s; later processes find them in torch's cache).

    Raises:
        BuildError: no compiler, or it failed; says what to install.
    """
    return Library(target)


def library_of(device: torch.device) -> Library:
    """The kernels for tensors on a device."""
    return library("cuda" if device.type == "cuda" else "host")


def _compile(target: Target) -> str:
    from torch.utils import cpp_extension

    if target == "cuda" and cpp_extension.CUDA_HOME is None:
        raise BuildError(
            "kernels need nvcc, which was not found: install the CUDA toolkit of torch's version "
            f"({torch.version.cuda}) or set CUDA_HOME; or use transport: collective"
        )
    name = f"ultraep_{target}"
    lanes = ["-DULTRAEP_HOST_LANES"] if target == "lanes" else []
    try:
        cpp_extension.load(
            name=name,
            sources=[str(_SOURCES / ("kernels.cu" if target == "cuda" else "kernels_host.cpp"))],
            extra_cflags=["-O2", "-std=c++17", "-Wall", "-Wno-unknown-pragmas", *lanes],
            extra_cuda_cflags=["-O3", "-std=c++17", "--expt-relaxed-constexpr"],
            extra_include_paths=[str(_SOURCES)],
            with_cuda=target == "cuda",
            is_python_module=False,
        )
        directory = cpp_extension._get_build_directory(name, verbose=False)
    except (RuntimeError, OSError, ImportError) as error:
        raise BuildError(f"kernels did not compile for {target}: {error}") from error
    # A rebuild in a process that had loaded an older one gets a version suffix; the newest file is the current one.
    return str(max(Path(directory).glob(f"{name}*.so"), key=lambda file: file.stat().st_mtime))
