"""The trainer as the loop sees it, in real Ray actors: sets in chunks and offloading, beside a stock step."""

from dataclasses import replace

import numpy as np
import pytest
import ray

from megatron_ultraep.megatron.groups import ParallelLayout
from rl.models import tiny
from rl.models.architecture import read_architecture
from rl.training.accumulate import AccumulationError
from rl.training.batch import Counts, MiniBatch
from rl.training.group import Trainer, TrainerDied
from rl.training.spec import OptimizerSpec, TrainerSpec
from tests.rl.training.common import make_layout, make_samples
from tests.rl.training.streaming import chunks_of, objective_of


@pytest.fixture(scope="module")
def cluster():
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.mark.slow
def test_a_set_in_chunks_is_one_step(cluster, tmp_path):
    directory = str(tiny.qwen3_moe(tmp_path / "m", seed=3))
    arch = read_architecture(directory)
    layout = ParallelLayout(world=2, ep=2)
    spec = TrainerSpec(
        directory, layout, dtype="float64", distributed_optimizer=False, optimizer=OptimizerSpec(1e-3, clip_grad=0.0)
    )
    # Routers choose: captured routes are in the engines, and there are none here.
    samples = make_samples(arch)
    objective = replace(objective_of("token_mean"), routes="own")
    whole = MiniBatch.make(samples, make_layout(samples, layout))
    with Trainer(spec) as trainer:
        with pytest.raises(AccumulationError, match="no gradients to apply"):
            trainer.apply(1.0)
        estimate, chunks = Counts(300, 20), []
        for number, chunk in enumerate(chunks_of(samples, seed=1)):
            batch = MiniBatch.make(chunk, make_layout(chunk, layout), estimate.tokens, estimate.sequences)
            chunks.append(trainer.accumulate(batch, objective, first=number == 0))
            with pytest.raises(AccumulationError, match="apply\\(\\) the open set, or discard\\(\\) it"):
                trainer.accumulate(batch, objective, first=True)
        assert len(chunks) > 1
        assert trainer.accumulated() == whole.learnt
        scale = estimate.scale("token_mean", trainer.accumulated())
        streamed = trainer.apply(scale)
        assert trainer.steps == 1
        assert trainer.accumulated() == Counts()
        assert streamed.loss == pytest.approx(scale * sum(chunk.loss for chunk in chunks))
        assert streamed.tokens == sum(chunk.tokens for chunk in chunks) == whole.learnt.tokens
        assert set(streamed.seconds) == {"forward_backward", "reduce", "optimizer"}
        trainer.accumulate(whole, objective, first=True)
        trainer.discard()

        before = trainer.memory()
        away = trainer.offload()
        assert set(away.bytes) == {"weights", "gradients", "optimizer"}
        held = sum(report.torch_allocated for report in before)
        assert sum(away.bytes.values()) == held > 0
        assert all(r.torch_allocated == 0 < r.device_used <= r.device_peak for r in trainer.memory())
        assert trainer.onload(["weights"]).bytes == {"weights": away.bytes["weights"]}
        references, manifest = trainer.export("float32")
        weights = {name: tensor.numpy() for part in ray.get(references) for name, tensor in part.items()}
        assert set(weights) == set(manifest)
        with pytest.raises(TrainerDied, match="offloaded: onload\\(\\) first"):
            trainer.train(whole, objective)
        trainer.onload()
        assert np.isfinite(trainer.train(whole, objective).loss)

    with Trainer(spec) as trainer:
        stock = trainer.train(whole, objective)
        references, _ = trainer.export("float32")
        expected = {name: tensor.numpy() for part in ray.get(references) for name, tensor in part.items()}
    assert streamed.loss == pytest.approx(stock.loss, rel=1e-6)
    assert streamed.sums == pytest.approx(stock.sums, rel=1e-6)
    assert (streamed.tokens, streamed.lr, streamed.updated) == (stock.tokens, stock.lr, stock.updated)
    assert max(np.abs(weights[name] - expected[name]).max() for name in expected) <= 1e-4
