"""A real vLLM engine against transformers, teacher-forced on the same tokens in fp32."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from megatron_ultraep.replay import histogram
from rl.models import tiny
from rl.rollout.config import EngineConfig, Sampling
from rl.rollout.engine import EngineInfo
from rl.rollout.routes import row_versions
from rl.rollout.stepper import EngineFailed
from rl.rollout.validation import RefusedSample
from rl.rollout.weights import TornWeights, WeightMismatch
from rl.types import Prompt, Sample
from tests.rl.rollout.engine_process import EngineProcess
from tests.rl.rollout.reference import assert_equals_transformers, teacher_forced

VOCABULARY = 200
DENSE = 1  # the layer of the Qwen model that is dense
# 64 blocks of 32 tokens: room for the other tests, too little for the one that wants preemptions.
KV_CACHE = 64 * 32 * (4 * 2 * 2 * 32 * 4)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: tiny.qwen3_moe(root / name, seed=i, mlp_only_layers=(DENSE,)) for i, name in enumerate("AB")}


@pytest.fixture(scope="module")
def engine(models: dict[str, Path]) -> Iterator[EngineProcess]:
    config = EngineConfig(
        str(models["A"]), max_model_len=512, max_num_seqs=32, kv_cache_memory_bytes=KV_CACHE, max_num_batched_tokens=512
    )
    with EngineProcess(config) as process:
        process.call("count_preemptions")
        yield process


def prompt(uid: str, length: int, seed: int = 0) -> Prompt:
    tokens = np.random.default_rng(seed).integers(3, VOCABULARY, length).astype(np.int32)
    return Prompt(uid, 0, 0, "", tokens)


def generate(engine: EngineProcess, p: Prompt, n: int, sampling: Sampling, seed: int = 0) -> list[Sample]:
    samples = engine.call("generate", p, [f"{p.uid}/{k}" for k in range(n)], sampling, seed)
    assert all(isinstance(sample, Sample) for sample in samples), samples
    return samples


def free(max_tokens: int, temperature: float = 0.7) -> Sampling:
    return Sampling(max_tokens, temperature=temperature, ignore_eos=True)


def wait_for_tokens(engine: EngineProcess, sample_id: str, tokens: int) -> None:
    deadline = time.monotonic() + 60
    while engine.call("progress").get(sample_id, 0) < tokens:
        assert time.monotonic() < deadline, f"{sample_id} did not reach {tokens} tokens within 60 s"
        time.sleep(0.002)


def chunks_of(path: Path, size: int = 20) -> list[dict]:
    tensors = list(load_file(path / "model.safetensors").items())
    return [dict(tensors[i : i + size]) for i in range(0, len(tensors), size)]


def test_start_reports_the_model(engine: EngineProcess) -> None:
    info: EngineInfo = engine.info
    assert (info.moe_layers, info.experts, info.topk) == ((0, 2, 3), 8, 2)
    assert info.vllm_version == "0.32.0"


def test_logprobs_and_routes_equal_transformers(engine: EngineProcess, models: dict[str, Path]) -> None:
    samples = generate(engine, prompt("plain", 45), 4, free(40))
    for sample in samples:
        assert len(sample.response_tokens) == 40
        assert sample.finish_reason == "length"
        assert sample.weight_versions == ((0, 0),)
        assert sample.routes.dtype == "uint8"
        assert_equals_transformers(sample, models["A"], 0.7)
    assert len({tuple(sample.response_tokens) for sample in samples}) == 4, "samples of a group must differ"


def test_histogram_counts_the_rows(engine: EngineProcess) -> None:
    sample = generate(engine, prompt("histogram", 20), 1, free(20))[0]
    assert sample.histogram.dtype == np.int32
    assert sample.histogram.shape == (3, 8)
    for layer in range(3):
        expected = np.bincount(sample.routes.handle[:, layer].reshape(-1), minlength=8)
        np.testing.assert_array_equal(sample.histogram[layer], expected)


def test_routes_are_sliced_and_counted_by_rows_and_layers(engine: EngineProcess) -> None:
    sample = generate(engine, prompt("slices", 20), 1, free(20))[0]
    parts = engine.call("slice_routes", [(sample.routes, 3, 9, 1, 2), (sample.routes, 0, 39, 0, 3)])
    np.testing.assert_array_equal(parts[0], sample.routes.handle[3:9, 1:2])
    np.testing.assert_array_equal(parts[1], sample.routes.handle)
    with pytest.raises(ValueError, match=r"rows within 0\.\.39"):
        engine.call("slice_routes", [(sample.routes, 0, 40, 0, 3)])
    counts = engine.call("count_routes", [(sample.routes, 3, 9), (sample.routes, 0, 39)])
    np.testing.assert_array_equal(counts[0], histogram(sample.routes.handle[3:9], 8))
    np.testing.assert_array_equal(counts[1], sample.histogram)
    with pytest.raises(ValueError, match=r"rows within 0\.\.39"):
        engine.call("count_routes", [(sample.routes, 0, 40)])


def test_prefix_hits_return_full_routes(engine: EngineProcess, models: dict[str, Path]) -> None:
    generate(engine, prompt("prefix", 100, seed=3), 1, free(4))
    before = engine.call("health")["cached_prompt_tokens"]
    longer = replace(prompt("prefix+", 110, seed=4))
    longer.tokens[:100] = prompt("prefix", 100, seed=3).tokens
    sample = generate(engine, longer, 1, free(20))[0]
    assert engine.call("health")["cached_prompt_tokens"] - before == 96, "expected a hit of three whole blocks"
    assert_equals_transformers(sample, models["A"], 0.7)


def test_preempted_samples_have_right_routes(engine: EngineProcess, models: dict[str, Path]) -> None:
    before = engine.call("preemptions")
    prompts = [prompt(f"preempted-{i}", 60, seed=10 + i) for i in range(24)]
    pending = [engine.submit("generate", p, [p.uid], free(100), 0) for p in prompts]
    samples = [future.result(120)[0] for future in pending]
    assert engine.call("preemptions") > before, "the key-value cache was large enough: this test tests nothing"
    for sample in samples:
        assert_equals_transformers(sample, models["A"], 0.7)


def test_aborted_sample_continues(engine: EngineProcess, models: dict[str, Path]) -> None:
    p = prompt("aborted", 40, seed=40)
    pending: Future = engine.submit("generate", p, ["aborted"], free(300), 0)
    wait_for_tokens(engine, "aborted", 40)
    assert engine.call("abort", ["aborted", "never heard of"]) == 1
    part = pending.result(60)[0]
    assert part.finish_reason == "abort"
    assert 40 <= len(part.response_tokens) < 300
    assert_equals_transformers(part, models["A"], 0.7)
    whole = engine.call("continue_samples", [part], free(300), 0)[0]
    assert whole.finish_reason == "length"
    assert len(whole.response_tokens) == 300
    assert whole.weight_versions == ((0, 0),)
    np.testing.assert_array_equal(whole.response_tokens[: len(part.response_tokens)], part.response_tokens)
    assert_equals_transformers(whole, models["A"], 0.7)
    with pytest.raises(ValueError, match="not 'abort'"):
        engine.call("continue_samples", [whole], free(300), 0)


def test_same_seed_draws_the_same(engine: EngineProcess) -> None:
    p = prompt("seeded", 30)
    first, again, other = (generate(engine, p, 2, free(16), seed) for seed in (5, 5, 6))
    for a, b, c in zip(first, again, other, strict=True):
        np.testing.assert_array_equal(a.response_tokens, b.response_tokens)
        assert (a.response_tokens != c.response_tokens).any()


def test_greedy_takes_the_likeliest(engine: EngineProcess, models: dict[str, Path]) -> None:
    first, second = (generate(engine, prompt("greedy", 30), 1, free(16, 0.0), seed)[0] for seed in (1, 2))
    np.testing.assert_array_equal(first.response_tokens, second.response_tokens)
    assert_equals_transformers(first, models["A"], 0.0)


def test_stop_token_ends_the_response(engine: EngineProcess) -> None:
    stop = tuple(range(100))
    sample = generate(engine, prompt("stop", 30), 1, Sampling(200, stop_token_ids=stop))[0]
    assert sample.finish_reason == "stop"
    assert sample.response_tokens[-1] < 100
    assert (sample.response_tokens[:-1] >= 100).all()
    assert sample.routes.shape[0] == sample.length - 1


def test_long_prompt_is_refused_by_name(engine: EngineProcess) -> None:
    with pytest.raises(ValueError, match=r"prompt too-long: expected 1 to 511 tokens"):
        engine.call("generate", prompt("too-long", 512), ["x"], free(4), 0)


def test_bad_routes_are_generated_again_then_refused(engine: EngineProcess, models: dict[str, Path]) -> None:
    before = engine.call("health")
    engine.call("zero_next_routes", 1)
    assert_equals_transformers(generate(engine, prompt("bad", 30), 1, free(8))[0], models["A"], 0.7)
    engine.call("zero_next_routes", 3)
    refused = engine.call("generate", prompt("worse", 30), ["worse/0"], free(8), 0)[0]
    assert isinstance(refused, RefusedSample)
    assert (refused.sample_id, refused.prompt_uid, refused.attempts) == ("worse/0", "worse", 3)
    assert "all routes are zero" in refused.reason
    after = engine.call("health")
    assert after["refused"] - before["refused"] == 1
    assert after["regenerated"] - before["regenerated"] == 3


def test_wrong_weights_are_refused_and_the_old_stay(engine: EngineProcess, models: dict[str, Path]) -> None:
    whole = load_file(models["B"] / "model.safetensors")
    name = "model.layers.2.mlp.experts.3.up_proj.weight"
    lacking = {k: v for k, v in whole.items() if k != name}
    for tensors, message in (
        (lacking, f"1 missing: {name}"),
        (whole | {"model.layers.9.norm.weight": whole["model.norm.weight"]}, "1 unknown: model.layers.9.norm.weight"),
        (whole | {name: whole[name][:-1]}, r"1 of another shape: .*expected \[64, 64\], got \[63, 64\]"),
    ):
        with pytest.raises(WeightMismatch, match=message):
            engine.call("update_weights", 1, [tensors])
    assert_equals_transformers(generate(engine, prompt("old", 30), 1, free(16))[0], models["A"], 0.7)


def test_weights_change_in_place_and_back(engine: EngineProcess, models: dict[str, Path]) -> None:
    p = prompt("updated", 70, seed=70)  # two whole blocks: keys of old weights must not be found again
    generate(engine, p, 1, free(8))
    for version, name in ((1, "B"), (2, "A"), (3, "B"), (0, "A")):
        engine.call("update_weights", version, chunks_of(models[name]))
        for sample in generate(engine, p, 2, free(24), seed=version):
            assert sample.weight_versions == ((0, version),)
            assert_equals_transformers(sample, models[name], 0.7)


def test_broken_off_update_stops_generation_until_repeated(engine: EngineProcess, models: dict[str, Path]) -> None:
    chunks = chunks_of(models["B"])
    manifest = {name: tuple(tensor.shape) for chunk in chunks for name, tensor in chunk.items()}
    with pytest.raises(TornWeights, match="announced tensors never came"):
        engine.call("update_weights", 1, chunks[:-1], manifest)
    with pytest.raises(TornWeights, match="send a whole update"):
        engine.call("generate", prompt("torn", 30), ["torn"], free(4), 0)
    engine.call("update_weights", 0, chunks_of(models["A"]))
    assert_equals_transformers(generate(engine, prompt("whole", 30), 1, free(16))[0], models["A"], 0.7)


def test_update_under_running_samples(engine: EngineProcess, models: dict[str, Path]) -> None:
    """Tokens and rows made before the update are of the old weights, those after of the new."""
    p = prompt("in-flight", 50, seed=50)
    ids = ["in-flight/0", "in-flight/1"]
    pending = engine.submit("generate", p, ids, free(300), 0)
    wait_for_tokens(engine, ids[1], 30)
    with pytest.raises(RuntimeError, match=r"2 requests are running.*in_flight"):
        engine.call("update_weights", 1, chunks_of(models["B"]))
    engine.call("update_weights", 1, chunks_of(models["B"]), in_flight="continue")
    for sample in pending.result(120):
        (zero, old), (start, new) = sample.weight_versions
        assert (zero, old, new) == (0, 0, 1)
        assert 30 <= start < 300
        versions = row_versions(sample.weight_versions, 50, 300)
        of = {0: teacher_forced(models["A"], sample.tokens, 0.7), 1: teacher_forced(models["B"], sample.tokens, 0.7)}
        rows = np.sort(sample.routes.handle, -1)
        for version, (logprobs, routes) in of.items():
            mine = versions == version
            np.testing.assert_array_equal(rows[mine], routes[mine])
            tokens = mine[49:]
            np.testing.assert_allclose(sample.rollout_logprobs[tokens], logprobs[49:][tokens], atol=1e-4, rtol=0)
    engine.call("update_weights", 0, chunks_of(models["A"]))


def test_dense_model_and_a_step_that_fails(tmp_path: Path) -> None:
    path = tiny.llama(tmp_path / "llama", tie_word_embeddings=True)
    other = tiny.llama(tmp_path / "other", tie_word_embeddings=True, seed=1)
    with EngineProcess(EngineConfig(str(path), max_model_len=256, kv_cache_memory_bytes=8 << 20)) as engine:
        assert engine.info.moe_layers == ()
        for sample in generate(engine, prompt("dense", 40), 2, free(40)):
            assert sample.histogram is None
            assert_equals_transformers(sample, path, 0.7)
        engine.call("update_weights", 1, chunks_of(other))
        assert_equals_transformers(generate(engine, prompt("dense", 40), 1, free(40))[0], other, 0.7)
        pending = engine.submit("generate", prompt("failing", 40), ["failing"], free(200), 0)
        engine.call("break_step")
        with pytest.raises(EngineFailed, match="broken on purpose"):
            pending.result(60)
        assert not engine.call("health")["alive"]
        with pytest.raises(EngineFailed, match="broken on purpose"):
            engine.call("generate", prompt("late", 40), ["late"], free(4), 0)
