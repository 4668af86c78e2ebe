"""Each family from end to end: weights both ways, routes captured by vLLM, a step with replay and balancing."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from rl.models import tiny
from rl.models.weights import copy_weights, export_weights, holdings, load_weights
from rl.rollout.config import EngineConfig, Sampling
from rl.types import Prompt, Sample
from tests.rl.models.test_hf_files import contents
from tests.rl.models.test_weights import build, load_and_save
from tests.rl.rollout.engine_process import EngineProcess
from tests.rl.training.balancing import BALANCE, merge_steps, several_steps
from tests.rl.training.common import make_worker, worst
from tests.rl.training.test_checkpoint import merged, train

FAMILIES = {
    "qwen2_moe": lambda path, seed: tiny.qwen2_moe(
        path, seed=seed, hidden=128, heads=4, kv_heads=2, mlp_only_layers=(1,)
    ),
    "olmoe": lambda path, seed: tiny.olmoe(path, seed=seed),
    "glm4_moe": lambda path, seed: tiny.glm4_moe(
        path, seed=seed, heads=4, kv_heads=2, topk=4, groups=4, chosen_groups=2
    ),
    "deepseek_v3": lambda path, seed: tiny.deepseek_v3(path, seed=seed),
}
ENGINES = FAMILIES | {
    "deepseek_v3 yarn": lambda path, seed: tiny.deepseek_v3(
        path,
        seed=seed,
        yarn={"factor": 4.0, "original_max_position_embeddings": 64, "mscale": 0.8, "mscale_all_dim": 1.2},
    )
}
MOE_LAYERS = {"qwen2_moe": (0, 2, 3), "olmoe": (0, 1, 2, 3), "glm4_moe": (1, 2, 3), "deepseek_v3": (1, 2, 3)}


@pytest.fixture(scope="module")
def directories(tmp_path_factory) -> dict[str, tuple[Path, Path]]:
    root = tmp_path_factory.mktemp("families")
    return {name: (make(root / name, 1), make(root / f"{name}2", 2)) for name, make in ENGINES.items()}


def transformers_choose(path: Path, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Log-prob of every next token, ``[T-1]``, and the experts that routers chose, sorted, ``[T-1, MoE layers, K]``."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    chosen: list[torch.Tensor] = []
    for module in model.modules():
        if type(module).__name__.lower().endswith("topkrouter"):
            module.register_forward_hook(lambda module, inputs, output: chosen.append(output[2]))
    with torch.no_grad():
        logits = model(torch.tensor(tokens[None].astype(np.int64))).logits[0, :-1]
    logprobs = torch.log_softmax(logits.double(), -1).gather(1, torch.tensor(tokens[1:, None].astype(np.int64)))[:, 0]
    return logprobs.numpy(), np.sort(torch.stack(chosen, 1).numpy()[:-1], -1)


def assert_equals_transformers(sample: Sample, path: Path) -> None:
    logprobs, routes = transformers_choose(path, sample.tokens)
    assert np.abs(sample.rollout_logprobs - logprobs[sample.prompt_length - 1 :]).max() <= 1e-4
    np.testing.assert_array_equal(np.sort(sample.routes.handle, -1), routes)


def chunks_of(path: Path, size: int = 20) -> list[dict[str, torch.Tensor]]:
    tensors = list(load_file(path / "model.safetensors").items())
    return [dict(tensors[i : i + size]) for i in range(0, len(tensors), size)]


LAYOUTS = {
    "one": (1, {}),
    "ep2": (2, {"ep": 2}),
    "pp2xep2": (4, {"pp": 2, "ep": 2}),
    "tp2xep2": (2, {"tp": 2, "ep": 2}),
}
WITHOUT_TP = ("olmoe", "deepseek_v3")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_loaded_and_saved_is_bitwise_the_same(ranks, directories, tmp_path, layout):
    world, sizes = LAYOUTS[layout]
    names = [name for name in FAMILIES if "tp" not in sizes or name not in WITHOUT_TP]
    ranks(world).run(
        load_and_save, [(str(directories[n][0]), str(tmp_path / n), sizes, "float32", None) for n in names]
    )
    for name in names:
        assert contents(tmp_path / name) == contents(directories[name][0]), name


def as_sent(directory: str) -> dict[str, tuple[str, np.ndarray]]:
    """What one rank exports for bfloat16 engines: by name, the dtype and the values."""
    worker = make_worker(directory, {"ep": 2}, dtype="bfloat16")
    sent = {n: t for bucket in worker.export(1 << 30, torch.bfloat16) for n, t in bucket.items()}
    for held in holdings(worker.actor, "bfloat16"):
        for spec in held.tensors:
            assert spec.name not in sent or str(sent[spec.name].dtype) == f"torch.{spec.dtype}", spec
    return {n: (str(t.dtype), t.double().numpy()) for n, t in sent.items()}


def test_router_biases_stay_float32(ranks, directories):
    """Rounded to bfloat16, they would choose other experts."""
    directory = directories["glm4_moe"][0]
    stored = load_file(directory / "model.safetensors")
    sent = {n: t for one in ranks(2).run(as_sent, str(directory)) for n, t in one.items()}
    assert sorted(sent) == sorted(stored)
    for name, (dtype, values) in sent.items():
        bias = name.endswith("e_score_correction_bias")
        assert dtype == ("torch.float32" if bias else "torch.bfloat16"), name
        if bias:
            assert np.array_equal(values, stored[name].double().numpy())


def copied(directory: str) -> dict[str, np.ndarray]:
    """What one rank exports of a model that was given another's weights."""
    source, target = (build(directory, {"ep": 2}, "bfloat16") for _ in range(2))
    load_weights(source, directory)
    copy_weights(source, target)
    return {n: t.double().numpy().copy() for n, t in export_weights(target)}


def test_router_biases_are_copied_to_other_models_in_float32(ranks, directories):
    directory = directories["deepseek_v3"][0]
    stored = load_file(directory / "model.safetensors")
    got = {n: values for one in ranks(2).run(copied, str(directory)) for n, values in one.items()}
    assert sorted(got) == sorted(stored)
    for name, values in got.items():
        dtype = torch.float32 if name.endswith("e_score_correction_bias") else torch.bfloat16
        assert np.array_equal(values, stored[name].to(dtype).double().numpy()), name


@pytest.mark.parametrize("family", FAMILIES)
def test_a_balanced_step_with_replay_equals_stock(ranks, directories, family):
    """Losses and gradients in float64 with and without balancing, both on the same captured routes."""
    arguments = {"steps": 2, "routes": "replay", "dtype": "float64", "distributed_optimizer": False, "budget": 64}
    stock, balanced = (
        merge_steps(ranks(2).run(several_steps, str(directories[family][0]), {"ep": 2}, balance=balance, **arguments))
        for balance in (None, dataclasses.replace(BALANCE, transport="collective"))
    )
    assert np.abs(balanced["losses"] / stock["losses"] - 1).max() <= 1e-7
    assert worst(balanced["tensors"], stock["tensors"]) <= 1e-8
    assert balanced["replicas"] > 0
    stored = load_file(directories[family][0] / "model.safetensors")
    assert set(balanced["weights"]) == set(stored)
    frozen = [n for n in stored if np.array_equal(balanced["weights"][n], stored[n].double().numpy())]
    assert frozen == [n for n in stored if n.endswith("e_score_correction_bias")]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_resumed_run_goes_on_as_if_nothing_had_happened(ranks, directories, tmp_path, family):
    directory = str(directories[family][0])
    whole, _ = merged(ranks(2).run(train, directory, {"ep": 2}, range(3)))
    path = tmp_path / "checkpoint"
    path.mkdir()
    ranks(2).run(train, directory, {"ep": 2}, range(2), save=(1, str(path)))
    resumed, _ = merged(ranks(2).run(train, directory, {"ep": 2}, range(2, 3), load=str(path)))
    assert worst(resumed, whole) == 0


@pytest.fixture(scope="module")
def engine_of(directories) -> Iterator[Callable[[str], EngineProcess]]:
    """Starts an engine of a family's first directory; one process serves them all, one after the other."""
    with contextlib.ExitStack() as stack:
        processes: list[EngineProcess] = []

        def start(family: str) -> EngineProcess:
            config = EngineConfig(
                str(directories[family][0]),
                max_model_len=256,
                max_num_seqs=8,
                kv_cache_memory_bytes=1 << 24,
                max_num_batched_tokens=256,
            )
            if processes:
                processes[0].info = processes[0].call("replace", config, timeout=300.0)
            else:
                processes.append(stack.enter_context(EngineProcess(config)))
            return processes[0]

        yield start


@pytest.mark.parametrize("family", ENGINES)
def test_engines_return_routes_and_take_weights(directories, engine_of, family):
    """What vLLM sampled and where it routed, before and after an update in place, is what transformers computes."""
    first, second = directories[family]
    tokens = np.random.default_rng(0).integers(3, 200, 37).astype(np.int32)
    engine = engine_of(family)
    assert engine.info.moe_layers == MOE_LAYERS[family.split()[0]]
    for path in (first, second):
        if path is second:
            engine.call("update_weights", 1, chunks_of(second))
        samples = engine.call(
            "generate", Prompt("p", 0, 0, "", tokens), ["a", "b"], Sampling(24, temperature=1.0, ignore_eos=True), 0
        )
        for sample in samples:
            assert_equals_transformers(sample, path)
