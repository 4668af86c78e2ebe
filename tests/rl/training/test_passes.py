"""Passes: log-probs equal transformers', each sample once, routes consumed are those captured."""

import dataclasses

import numpy as np
import pytest
import torch

from megatron_ultraep.replay import layer_digests
from rl.models import tiny
from rl.models.architecture import read_architecture
from rl.training.batch import MiniBatch
from rl.training.passes import PassSettings, _consecutive
from rl.types import RouteRef
from tests.ranks import RankError
from tests.rl.training.common import make_layout, make_samples, make_worker

LAYOUTS = {
    "one": (1, {}),
    "dp2": (2, {}),
    "tp2xep2": (2, {"tp": 2, "ep": 2}),
    "pp2": (2, {"pp": 2}),
    "vpp2": (2, {"pp": 2, "vpp": 2}),
    "pp2xep2": (4, {"pp": 2, "ep": 2}),
}
TEMPERATURE = 0.7


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    # The first layer is dense: MoE layer i is layer i+1, and a stage begins in the middle of the numbering.
    return str(tiny.qwen3_moe(tmp_path_factory.mktemp("passes") / "m", seed=3, mlp_only_layers=[0]))


def forward(directory, samples):
    """transformers' log-probs ``[T]`` and its routers' choices ``[T-1, moe_layers, topk]``, per sample."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    logprobs, routes = {}, {}
    for s in samples:
        tokens = torch.from_numpy(s.tokens).long()
        with torch.no_grad():
            output = model(tokens[None, :-1], output_router_logits=True)
        values = torch.log_softmax(output.logits[0] / TEMPERATURE, -1).gather(1, tokens[1:, None])[:, 0]
        logprobs[s.sample_id] = np.where(s.loss_mask, np.concatenate([[0], values.numpy()]), 0)
        topk = model.config.num_experts_per_tok
        chosen = [x.reshape(len(tokens) - 1, -1).topk(topk).indices.numpy() for x in output.router_logits]
        routes[s.sample_id] = np.stack(chosen, axis=1).astype(np.uint8)
    return logprobs, routes


def run_pass(directory, layout, samples, routes, model="actor", **spec):
    worker = make_worker(directory, layout, **spec)
    batch = MiniBatch.make(samples, make_layout(samples, worker.spec.layout)).part(worker.groups.coordinates["dp"])
    settings = PassSettings(temperature=TEMPERATURE, chunk_tokens=16)
    values, report = worker.logprobs(batch, model, "old_logprob", 0, routes, settings)
    return values, report, torch.is_grad_enabled()


def gathered(results):
    values, digests, rows, differing = {}, {}, 0, 0
    for one, report, grad_enabled in results:
        assert grad_enabled, "a pass must leave gradients as they were"
        assert not set(values) & set(one), "a sample came from two ranks"
        values |= one
        rows, differing = rows + report.rows, differing + report.differing
        for name, digest in report.digests.items():
            with np.errstate(over="ignore"):
                digests[name] = digests.get(name, np.zeros_like(digest)) + digest
    return values, digests, rows, differing


def with_routes(samples, routes):
    return [
        dataclasses.replace(s, routes=RouteRef(r, 0, r.shape, "uint8"))
        for s, r in ((s, routes[s.sample_id]) for s in samples)
    ]


@pytest.fixture(scope="module")
def case(directory):
    samples = make_samples(read_architecture(directory))
    logprobs, own = forward(directory, samples)
    return samples, logprobs, own


def assert_close(values, expected):
    assert set(values) == set(expected)
    for name in expected:
        assert values[name].shape == expected[name].shape
        assert np.abs(values[name] - expected[name]).max() <= 1e-5
        assert (values[name] == 0).tolist() == (expected[name] == 0).tolist()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_own_and_replayed_routes_give_the_logprobs_of_transformers(ranks, directory, case, layout):
    samples, expected, own = case
    world, sizes = LAYOUTS[layout]
    values, digests, rows, _ = gathered(ranks(world).run(run_pass, directory, sizes, samples, "own"))
    assert_close(values, expected)
    assert (digests, rows) == ({}, 0)

    replayed = with_routes(samples, own)
    values, digests, rows, differing = gathered(ranks(world).run(run_pass, directory, sizes, replayed, "replay"))
    assert_close(values, expected)
    assert differing == 0
    assert rows == 3 * sum(s.rows for s in samples)
    captured = {name: layer_digests(r) for name, r in own.items()}
    assert set(digests) == set(captured)
    assert all(np.array_equal(digests[n], captured[n]) for n in captured)


@pytest.mark.parametrize("layout", ["one", "tp2xep2", "pp2xep2"])
def test_other_routes_are_taken_and_counted(ranks, directory, case, layout):
    samples, expected, own = case
    world, sizes = LAYOUTS[layout]
    values, digests, rows, differing = gathered(ranks(world).run(run_pass, directory, sizes, samples, "replay"))
    assert all(np.array_equal(digests[s.sample_id], layer_digests(s.routes.handle)) for s in samples)
    assert max(np.abs(values[n] - expected[n]).max() for n in expected) > 0.01
    # Captured at random: most rows differ. Only the first MoE layer sees what transformers' saw.
    assert rows * 0.8 < differing < rows
    first = sum(int((np.sort(s.routes.handle[:, 0]) != np.sort(own[s.sample_id][:, 0])).any(-1).sum()) for s in samples)
    assert first <= differing


def test_the_order_of_samples_does_not_matter(ranks, directory, case):
    samples, expected, _ = case
    (answer,) = ranks(1).run(run_pass, directory, {}, samples[::-1], "own")
    assert_close(answer[0], expected)


def test_the_reference_is_a_model_of_its_own(ranks, directory, case):
    samples, expected, own = case
    results = ranks(2).run(
        run_pass, directory, {"ep": 2}, with_routes(samples, own), "replay", model="reference", reference=True
    )
    values, digests, _, _ = gathered(results)
    assert_close(values, expected)
    assert set(digests) == set(expected)


def broken(samples, how):
    routes = samples[3].routes
    if how == "none":
        routes = None
    elif how == "layers":
        routes = RouteRef(routes.handle[:, 1:], 0, routes.handle[:, 1:].shape, "uint8")
    elif how == "duplicate":
        handle = routes.handle.copy()
        handle[4, 1] = 6
        routes = RouteRef(handle, 0, handle.shape, "uint8")
    return [*samples[:3], dataclasses.replace(samples[3], routes=routes), *samples[4:]]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("none", r"sample s3: expected captured routes of shape \(24, 3, 2\) to replay, got None; capture"),
        ("layers", r"sample s3: expected captured routes of shape \(24, 3, 2\) to replay, got \(24, 2, 2\)"),
        ("duplicate", r"actor/old_logprob/step 0/micro-batch \d, MoE layer 1: expected distinct .* got \[6, 6\]"),
    ],
)
def test_routes_that_do_not_fit_are_refused(ranks, directory, case, how, message):
    with pytest.raises(RankError, match=message):
        ranks(1).run(run_pass, directory, {}, broken(case[0], how), "replay")


def fail_then_go_on(directory, samples):
    worker = make_worker(directory, {})
    layout = make_layout(samples, worker.spec.layout)
    arguments = ("actor", "old_logprob", 0, "replay", PassSettings())
    try:
        worker.logprobs(MiniBatch.make(broken(samples, "duplicate"), layout), *arguments)
    except RuntimeError:
        pending = worker.replay.pending()
    _, report = worker.logprobs(MiniBatch.make(samples, layout), *arguments)
    return pending, report.digests


def test_a_failed_pass_leaves_nothing_behind(ranks, directory, case):
    ((pending, digests),) = ranks(1).run(fail_then_go_on, directory, case[0])
    assert pending == []
    assert all(np.array_equal(digests[s.sample_id], layer_digests(s.routes.handle)) for s in case[0])


def test_runs_of_consecutive_layers():
    assert _consecutive([]) == []
    assert _consecutive([0, 1, 2]) == [(0, 3)]
    assert _consecutive([1, 4, 5, 7]) == [(1, 2), (4, 6), (7, 8)]
