"""Random numbers of samples: the kernel, the rows it is given, and real engines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from rl.models import tiny
from rl.rollout import compat, sampling
from rl.rollout.config import Device, EngineConfig, Sampling, engine_environment
from rl.types import Prompt, Sample
from tests.rl.rollout.engine_process import ROOT, EngineProcess

# Chi-square that one draw in ten thousand exceeds, of 4 and of 24 degrees of freedom.
RARE_4, RARE_24 = 23.5, 59.6


def test_requests_carry_their_seeds_where_the_sampler_looks() -> None:
    assert sampling.request_seed(5, exchanged=True) == {"extra_args": {"ultraep_seed": 5}}
    assert sampling.request_seed(5, exchanged=False) == {"seed": 5}


class Stock(torch.nn.Module):
    logprobs_mode = "processed_logprobs"


def runner(seeds: dict[str, Any], tokens: list[int]) -> Any:
    """As much of vLLM's first-generation model runner as the sampler uses."""
    return SimpleNamespace(
        device=torch.device("cpu"),
        sampler=SimpleNamespace(topk_topp_sampler=Stock()),
        requests={n: SimpleNamespace(sampling_params=SimpleNamespace(extra_args=extra)) for n, extra in seeds.items()},
        input_batch=SimpleNamespace(
            req_ids=list(seeds), num_reqs=len(seeds), num_tokens_no_spec=np.array([*tokens, 99], dtype=np.int32)
        ),
    )


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[int], list[int]]]:
    """Seeds and positions of every call of the kernel, which draws token 1."""
    calls: list[tuple[list[int], list[int]]] = []

    def kernel(logits: torch.Tensor, seeds: np.ndarray, positions: np.ndarray) -> torch.Tensor:
        assert seeds.dtype == positions.dtype == np.int64
        calls.append((seeds.tolist(), positions.tolist()))
        return torch.ones(len(logits), dtype=torch.int64)

    monkeypatch.setattr(compat, "gumbel_argmax", lambda device: kernel)
    monkeypatch.setattr(compat, "top_k_top_p", lambda: lambda logits, k, p: logits)
    return calls


def test_rows_are_drawn_by_seed_and_position(drawn: list) -> None:
    subject = runner({"a": {"ultraep_seed": 7}, "b": {"ultraep_seed": 2**40}}, [12, 3])
    for _ in range(2):  # the second time it is there
        answer = sampling.install(SimpleNamespace(model_runner=subject))
        assert (answer.value, answer.error) == (True, None)
    logits = torch.tensor([[0.0, 1.0, 2.0], [3.0, 1.0, 0.0]])
    tokens, logprobs = subject.sampler.topk_topp_sampler(logits, {}, None, None)
    assert drawn == [([7, 2**40], [12, 3])]
    assert tokens.tolist() == [1, 1]
    torch.testing.assert_close(logprobs, logits.log_softmax(-1))


def test_a_row_without_a_seed_is_refused(drawn: list) -> None:
    for extra in (None, {}, {"other": 1}):
        subject = runner({"a": {"ultraep_seed": 7}, "b": extra}, [12, 3])
        sampling.install(SimpleNamespace(model_runner=subject))
        with pytest.raises(compat.UnexpectedVllm, match=r"to carry its seed.*'a', 'b'"):
            subject.sampler.topk_topp_sampler(torch.zeros(2, 3), {}, None, None)
    with pytest.raises(compat.UnexpectedVllm, match="for each of 2 requests, got 3 rows"):
        subject.sampler.topk_topp_sampler(torch.zeros(3, 3), {}, None, None)
    assert drawn == []


def test_a_runner_that_is_not_known_is_refused() -> None:
    answer = sampling.install(SimpleNamespace(model_runner=SimpleNamespace()))
    assert isinstance(answer.error, compat.UnexpectedVllm)
    assert "expected the sampler of a known model runner" in str(answer.error)


def test_seeds_and_positions_are_mixed_without_collisions() -> None:
    grid = np.arange(1000, dtype=np.uint64)
    numbers = compat.mix(np.repeat(grid, 1000), np.tile(grid, 1000))
    assert len(np.unique(numbers)) == 10**6
    # Every bit of the result changes with every low bit of either, half of the time.
    for seed, position in ((1, 0), (0, 1), (2, 0), (0, 2)):
        flipped = numbers ^ compat.mix(
            np.repeat(grid ^ np.uint64(seed), 1000), np.tile(grid ^ np.uint64(position), 1000)
        )
        share = [((flipped >> np.uint64(bit)) & np.uint64(1)).mean() for bit in range(64)]
        assert 0.49 < min(share) <= max(share) < 0.51


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_kernel_draws_the_distribution_whatever_else_is_drawn(device: Device) -> None:
    environment = os.environ | engine_environment(device)
    command = [sys.executable, "-m", "tests.rl.rollout.drawing", device]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True, timeout=300
    )
    figures = json.loads(done.stdout.splitlines()[-1])
    assert max(figures["positions"], figures["seeds"]) < RARE_4, figures
    assert max(figures["pairs"]) < RARE_24, figures
    assert (figures["alone"], figures["shuffled"]) == (0, 0), figures
    assert figures["distinct"] > 55, figures
    assert figures["last"] == 19_999, figures


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineProcess]:
    path = tiny.qwen3_moe(tmp_path_factory.mktemp("models") / "model", layers=2)
    # Prompts of more than a step's tokens: their first steps draw tokens that are thrown away.
    config = EngineConfig(
        str(path),
        max_model_len=256,
        max_num_seqs=80,
        kv_cache_memory_bytes=16 << 20,
        max_num_batched_tokens=96,
    )
    with EngineProcess(config) as process:
        yield process


def prompt(number: int, length: int) -> Prompt:
    tokens = np.random.default_rng(number).integers(3, 200, length).astype(np.int32)
    return Prompt(f"p{number}", 0, 0, "", tokens)


def generate(engine: EngineProcess, p: Prompt, n: int, tokens: int) -> Any:
    sampling = Sampling(max_tokens=tokens, ignore_eos=True)
    return engine.submit("generate", p, [f"{p.uid}/{k}" for k in range(n)], sampling, 3)


def test_samples_draw_the_same_alone_and_in_company(engine: EngineProcess) -> None:
    mine = [prompt(0, 20), prompt(1, 120)]
    alone = [generate(engine, p, 4, 20).result(120) for p in mine]
    others = [generate(engine, prompt(n, 10 + n), 8, 30) for n in range(2, 10)]
    together = [generate(engine, p, 4, 20) for p in reversed(mine)]
    for future in others:
        future.result(120)
    seen = set()
    for before, future in zip(reversed(alone), together, strict=True):
        for a, b in zip(before, future.result(120), strict=True):
            assert isinstance(a, Sample)
            np.testing.assert_array_equal(a.response_tokens, b.response_tokens)
            np.testing.assert_allclose(a.rollout_logprobs, b.rollout_logprobs, atol=1e-4)
            seen.add(tuple(a.response_tokens.tolist()))
    assert len(seen) == 8, "samples of a prompt must differ"


def test_a_broken_off_sample_goes_on_with_its_own_numbers(engine: EngineProcess) -> None:
    p, kept = prompt(20, 30), 50
    whole = generate(engine, p, 1, 200).result(120)[0]
    rows = whole.routes.handle[: 30 + kept - 1]
    part = replace(
        whole,
        response_tokens=whole.response_tokens[:kept],
        rollout_logprobs=whole.rollout_logprobs[:kept],
        routes=replace(whole.routes, handle=rows, shape=rows.shape),
        finish_reason="abort",
    )
    again = engine.call("continue_samples", [part], Sampling(max_tokens=200, ignore_eos=True), 3)[0]
    np.testing.assert_array_equal(again.response_tokens, whole.response_tokens)
    np.testing.assert_allclose(again.rollout_logprobs, whole.rollout_logprobs, atol=1e-4)
