"""The Megatron model computes what transformers computes, under every layout, and weights survive the round trip."""

import filecmp
from pathlib import Path

import pytest
import torch

from megatron_ultraep.megatron import compat
from megatron_ultraep.megatron.groups import ParallelLayout, create_groups
from rl.models.architecture import read_architecture
from rl.models.builder import build_model
from rl.models.weights import load_weights, save_hf
from rl.models import tiny


def tokens_of(lengths, vocab, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, vocab, (n,), generator=generator) for n in lengths]


def run_forward(directory, layout_kwargs, lengths, dtype="float32"):
    """Next-token log-probs of packed sequences on every rank; last-stage, tp-rank-0 results are the real ones."""
    import torch.distributed as dist

    from rl.algorithms.logprobs import vocab_parallel_logprobs

    arch = read_architecture(directory)
    groups = create_groups(ParallelLayout(world=dist.get_world_size(), **layout_kwargs), timeout_s=60)
    model = build_model(arch, groups, dtype=getattr(torch, dtype))
    load_weights(model, directory)
    tp = groups.layout.tp
    sequences = tokens_of(lengths, arch.vocab)
    inputs = torch.cat([s[:-1] for s in sequences])
    targets = torch.cat([s[1:] for s in sequences])
    rows = -(-len(inputs) // tp) * tp
    pad = rows - len(inputs)
    bounds = [0]
    for s in sequences:
        bounds.append(bounds[-1] + len(s) - 1)
    if pad:
        bounds.append(rows)
    inputs = torch.nn.functional.pad(inputs, (0, pad))
    targets = torch.nn.functional.pad(targets, (0, pad))
    positions = torch.cat([torch.arange(b - a) for a, b in zip(bounds, bounds[1:])])
    packed = compat.packed_seq_params(torch.tensor(bounds, dtype=torch.int32), max(b - a for a, b in zip(bounds, bounds[1:])))

    def step(iterator, chunk):
        out = chunk(inputs[None], positions[None], None, packed_seq_params=packed)

        def loss(logits, non_loss_data=False):
            lp, _ = vocab_parallel_logprobs(
                logits[0], targets, groups.collection.tp if tp > 1 else None,
                vocab_start=groups.coordinates["tp"] * logits.shape[-1], vocab_size=arch.vocab,
            )
            return lp

        return out, loss

    run = compat.forward_backward_function(groups.layout.pp, groups.layout.vpp, model.config, groups.collection)
    vpp = groups.layout.vpp
    mbs = groups.layout.pp if vpp else 1
    with torch.no_grad():
        out = run(
            forward_step_func=step, data_iterator=[None] * vpp if vpp else None,
            model=model.chunks if vpp else model.chunks[0], num_microbatches=mbs, seq_length=rows, micro_batch_size=1,
            forward_only=True, collect_non_loss_data=True,
        )
    return out[0][: len(inputs) - pad].numpy() if out else None


def reference(directory, lengths):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    out = []
    for s in tokens_of(lengths, model.config.vocab_size):
        with torch.no_grad():
            logits = model(s[None, :-1]).logits[0]
        out.append(torch.log_softmax(logits, -1).gather(1, s[1:, None])[:, 0])
    return torch.cat(out).numpy()


LAYOUTS = {
    "ep1": (1, {}),
    "ep2": (2, {"ep": 2}),
    "pp2": (2, {"pp": 2}),
    "tp2": (2, {"tp": 2, "ep": 2}),
    "vpp": (2, {"pp": 2, "vpp": 2}),
    "pp2xep2": (4, {"pp": 2, "ep": 2}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logprobs_equal_transformers(ranks, tmp_path, layout):
    directory = tiny.qwen3_moe(tmp_path / "m", seed=1)
    world, kwargs = LAYOUTS[layout]
    lengths = (17, 5, 40)
    results = ranks(world).run(run_forward, str(directory), kwargs, lengths)
    got = next(r for r in reversed(results) if r is not None)
    assert abs(got - reference(directory, lengths)).max() <= 1e-5
