"""Engines whose output layer gives float32: a real one on CPU, and models without what is needed."""

import asyncio
import types

import numpy as np
import pytest
import torch

from rl.models import tiny
from rl.rollout import compat, head
from rl.rollout.config import EngineConfig, Sampling, engine_environment
from rl.types import Prompt


def worker(*layers: torch.nn.Module) -> types.SimpleNamespace:
    return types.SimpleNamespace(model_runner=types.SimpleNamespace(model=torch.nn.ModuleList(layers)))


def test_a_model_without_output_layer() -> None:
    with pytest.raises(compat.UnexpectedVllm, match="found none"):
        raise head.install(worker(torch.nn.Linear(2, 2))).error


def test_weights_that_are_not_16_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "output_heads", lambda model: list(model))
    with pytest.raises(compat.UnexpectedVllm, match=r"float32 \[2, 2\]; set model.float32_head to false"):
        raise head.install(worker(torch.nn.Linear(2, 2))).error


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_log_probs_of_an_engine_are_not_rounded(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy: of rounded logits, several are often the largest, and log-probs are multiples of their steps."""
    for name, value in engine_environment("cpu").items():
        monkeypatch.setenv(name, value)
    directory = tiny.qwen3_moe(tmp_path / "model", layers=2, dtype="bfloat16")

    async def sample(float32_head: bool) -> np.ndarray:
        from rl.rollout.engine import RolloutEngine

        engine = RolloutEngine(
            EngineConfig(str(directory), dtype="bfloat16", max_model_len=64, float32_head=float32_head)
        )
        await engine.start()
        prompt = Prompt("p", 0, 0, "", np.arange(5, 25, dtype=np.int32))
        ((found,),) = [await engine.generate(prompt, ["s"], Sampling(max_tokens=8, temperature=0.0), 0)]
        logits = await engine._call(lambda live: live.collective_rpc(_dtype), 60.0, "a look at the output layer")
        await engine.stop()
        assert logits == [torch.float32 if float32_head else torch.bfloat16]
        return found.rollout_logprobs

    exact, rounded = asyncio.run(sample(True)), asyncio.run(sample(False))
    assert len(exact)
    assert np.abs(exact[:1] - rounded[:1]).max() < 0.05


def _dtype(worker) -> torch.dtype:
    (layer,) = compat.output_heads(worker.model_runner.model)
    return layer.quant_method.apply(layer, torch.zeros(1, layer.weight.shape[1], dtype=torch.bfloat16)).dtype
