"""Engines whose residual stream is in float32: real ones on CPU, and a model without the norms that this needs."""

import asyncio
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from rl.models import tiny
from rl.rollout import compat, residual
from rl.rollout.config import EngineConfig, Sampling, engine_environment
from rl.types import Prompt
from tests.rl.rollout.engine_process import EngineProcess


def test_a_model_without_such_norms() -> None:
    model = torch.nn.ModuleList([torch.nn.Linear(2, 2)])
    worker = types.SimpleNamespace(model_runner=types.SimpleNamespace(model=model))
    with pytest.raises(compat.UnexpectedVllm, match=r"the model has none: set model\.float32_residual to false"):
        raise residual.check(worker).error


def test_norms_of_another_vllm_only_matter_to_who_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM loads the plugin wherever the package is installed, for models of others too."""

    class RMSNorm(torch.nn.Module):
        def __init__(self, size: int) -> None:
            super().__init__()

    layers = types.SimpleNamespace(RMSNorm=RMSNorm)
    monkeypatch.setitem(sys.modules, "vllm.model_executor.layers.layernorm", layers)
    monkeypatch.setattr(residual, "_refused", [])
    before = RMSNorm.__init__
    residual.offer()
    assert RMSNorm.__init__ is before
    with pytest.raises(compat.UnexpectedVllm, match=r"RMSNorm\.__init__ to take .*use a tested vLLM version"):
        raise residual.check(None).error


# Every expert computes every token, since another route would make more difference than any rounding.
DENSE = {"experts": 4, "topk": 4}
FAMILIES = {
    "llama": (tiny.llama, {}),
    "qwen3_moe": (tiny.qwen3_moe, DENSE),
    "mixtral": (tiny.mixtral, DENSE),
    "qwen2_moe": (tiny.qwen2_moe, DENSE),
    "olmoe": (tiny.olmoe, DENSE),
    "glm4_moe": (tiny.glm4_moe, DENSE),
    "deepseek": (tiny.deepseek_v3, {**DENSE, "groups": 1, "chosen_groups": 1}),
}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_are_closer_to_those_of_float32(family, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in engine_environment("cpu").items():
        monkeypatch.setenv(name, value)
    make, sizes = FAMILIES[family]
    directory: Path = make(tmp_path / "model", layers=32, **sizes)
    prompts = [
        Prompt(f"p{i}", i, 0, "", np.random.default_rng(i).integers(5, 250, 12).astype(np.int32)) for i in range(200)
    ]

    async def first_tokens(dtype: str, wide: bool) -> dict[str, tuple[int, float]]:
        """The first sampled token of each prompt and its log-prob."""
        from rl.rollout.engine import RolloutEngine

        engine = RolloutEngine(
            EngineConfig(
                str(directory),
                dtype=dtype,
                max_model_len=64,
                float32_head=dtype == "bfloat16",
                float32_residual=wide,
            )
        )
        await engine.start()
        sampling = Sampling(max_tokens=1, temperature=1.0, ignore_eos=True)
        groups = await asyncio.gather(*[engine.generate(p, [p.uid], sampling, 0) for p in prompts])
        await engine.stop()
        samples = [s for g in groups for s in g]
        return {s.prompt.uid: (int(s.response_tokens[0]), float(s.rollout_logprobs[0])) for s in samples}

    exact = asyncio.run(first_tokens("float32", False))
    rounded = asyncio.run(first_tokens("bfloat16", False))
    ours = asyncio.run(first_tokens("bfloat16", True))
    same = [uid for uid, (token, _) in exact.items() if token == rounded[uid][0] == ours[uid][0]]
    assert len(same) > len(prompts) // 2

    def error(found: dict[str, tuple[int, float]]) -> float:
        return float(np.mean([(found[uid][1] - exact[uid][1]) ** 2 for uid in same]))

    assert error(ours) < error(rounded)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("ranks", [1, 2])
def test_weights_are_updated_on_every_rank(tmp_path, ranks) -> None:
    """Every rank has such norms, or the engine does not start; updated, it samples as one that starts from the new
    weights."""
    old, new = (tiny.qwen3_moe(tmp_path / str(seed), seed=seed, mlp_only_layers=(1,)) for seed in range(2))
    prompt = Prompt("p", 0, 0, "", np.arange(5, 45, dtype=np.int32))

    def logprobs(directory: Path, weights: dict[str, torch.Tensor] | None) -> tuple[np.ndarray, np.ndarray]:
        config = EngineConfig(
            str(directory),
            dtype="bfloat16",
            max_model_len=128,
            kv_cache_memory_bytes=8 << 20,
            tensor_parallel=ranks,
            float32_head=True,
            float32_residual=True,
        )
        with EngineProcess(config) as engine:
            if weights is not None:
                engine.call("update_weights", 1, [weights])
            (sample,) = engine.call("generate", prompt, ["s"], Sampling(32, temperature=1.0, ignore_eos=True), 0)
        return sample.response_tokens, sample.rollout_logprobs

    found, expected = (
        logprobs(old, load_file(new / "model.safetensors")),
        logprobs(new, None),
    )
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))
    assert not np.array_equal(logprobs(old, None)[1], expected[1])
