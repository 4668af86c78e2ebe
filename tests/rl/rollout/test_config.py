import itertools
import math
from pathlib import Path

import pytest

from rl.rollout.config import (
    EngineConfig,
    Sampling,
    decodes_with_graphs,
    derive_seed,
    engine_environment,
    graph_sizes,
)


@pytest.fixture
def model(tmp_path: Path) -> str:
    (tmp_path / "config.json").write_text("{}")
    return str(tmp_path)


def test_all_problems_are_reported_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError) as caught:
        EngineConfig(str(tmp_path), block_size=16, tensor_parallel=0, stop_timeout_s=0, max_regenerations=-1)
    for words in (
        "config.json",
        "multiple of 32",
        "tensor_parallel must be >=",
        "stop_timeout_s",
        "max_regenerations",
    ):
        assert words in str(caught.value)


def test_defaults_are_sound(model: str) -> None:
    EngineConfig(model)
    EngineConfig(model, device="cuda", block_size=16)


def test_an_engine_of_several_ranks_does_not_sleep(model: str) -> None:
    EngineConfig(model, tensor_parallel=2)
    with pytest.raises(ValueError, match="sleep_mode must be false for an engine of several ranks"):
        EngineConfig(model, device="cuda", tensor_parallel=2, sleep_mode=True)


def test_what_needs_a_gpu_or_16_bits(model: str) -> None:
    EngineConfig(model, device="cuda", dtype="bfloat16", cuda_graphs=True, float32_head=True, float32_residual=True)
    wrong = r"cuda_graphs must be false on CPU; float32_head is for 16-bit models.*float32_residual is for"
    with pytest.raises(ValueError, match=wrong):
        EngineConfig(model, cuda_graphs=True, float32_head=True, float32_residual=True)


@pytest.mark.parametrize("most", [1, 3, 32, 100, 512, 1024])
def test_sizes_of_graphs(most: int) -> None:
    sizes = graph_sizes(most)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == most
    assert len(sizes) <= 16
    # A step of more than 32 samples is padded by at most half.
    assert all(after <= 1.5 * before for before, after in itertools.pairwise(sizes) if before >= 32)


@pytest.mark.parametrize("arguments", [{"top_p": 0.9}, {"top_k": 20}])
def test_truncation_is_refused_and_says_how_to_lift_it(arguments: dict) -> None:
    with pytest.raises(ValueError, match=r"Set top_p=1 and top_k=0.*renormalise"):
        Sampling(8, **arguments)


@pytest.mark.parametrize("arguments", [{"max_tokens": 0}, {"temperature": -1.0}, {"temperature": math.nan}])
def test_bad_sampling_is_refused(arguments: dict) -> None:
    with pytest.raises(ValueError, match=r"must be"):
        Sampling(**({"max_tokens": 8} | arguments))


@pytest.mark.parametrize(
    ("wanted", "device", "latent", "graphs"),
    [
        (True, "cuda", False, True),
        (True, "cuda", True, False),
        (True, "cpu", False, False),
        (False, "cuda", False, False),
    ],
)
def test_who_decodes_with_graphs(wanted: bool, device: str, latent: bool, graphs: bool) -> None:
    assert decodes_with_graphs(wanted, device=device, latent_attention=latent) is graphs


def test_seeds_are_stable_and_differ() -> None:
    assert derive_seed(1, "train/0/0/0") == 1574460873
    seeds = {derive_seed(s, f"p/{k}", a) for s in range(4) for k in range(64) for a in range(2)}
    assert len(seeds) == 4 * 64 * 2
    assert all(0 <= seed < 2**31 for seed in seeds)


def test_environment_of_cpu_engines_has_no_compiler_and_one_process() -> None:
    cpu = engine_environment("cpu")
    assert cpu["TORCH_COMPILE_DISABLE"] == "1"
    assert cpu["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert cpu["VLLM_MLA_DISABLE"] == "1"
    assert not {"TORCH_COMPILE_DISABLE", "VLLM_MLA_DISABLE"} & set(engine_environment("cuda"))
