"""Logits in float32 from 16-bit weights: exact to float32, with the gradients of the rounded ones."""

import pytest
import torch
import torch.distributed as dist

from megatron_ultraep.megatron import compat
from megatron_ultraep.megatron.groups import ParallelLayout, create_groups
from rl.float32 import float32_product
from rl.models import tiny
from rl.models.architecture import read_architecture
from rl.models.builder import build_model
from rl.models.float32_head import install
from rl.models.weights import load_weights

LAYOUTS = {"one": (1, {}), "tp2": (2, {"tp": 2, "ep": 2})}


def outputs(directory, sizes, float32_head):
    """Logits, what the output layer was given, and gradients by name, of one packed sequence."""
    groups = create_groups(ParallelLayout(world=dist.get_world_size(), **sizes), timeout_s=60)
    model = build_model(read_architecture(directory), groups, dtype=torch.bfloat16, float32_head=float32_head)
    load_weights(model, directory)
    (chunk,) = model.chunks
    given = []
    chunk.output_layer.register_forward_pre_hook(lambda _, args, kwargs: given.append(args[0]), with_kwargs=True)
    tokens = torch.arange(5, 37)[None]
    packed = compat.packed_seq_params(torch.tensor([0, 32], dtype=torch.int32), 32)
    logits = chunk(tokens, torch.arange(32)[None], None, packed_seq_params=packed)[0]
    weights = torch.linspace(-1, 1, logits.shape[-1]).cos()
    (logits.float() * weights).sum().backward()
    gradients = {name: p.grad.float() for name, p in chunk.named_parameters() if p.grad is not None}
    weight = chunk.output_layer.weight
    weight = chunk.shared_embedding_or_output_weight() if weight is None else weight
    return logits.detach(), given[0].detach(), gradients, weight.detach()


def compare(directory, sizes):
    plain, _, plain_gradients, _ = outputs(directory, sizes, False)
    ours, given, gradients, weight = outputs(directory, sizes, True)
    assert plain.dtype == torch.bfloat16
    assert ours.dtype == torch.float32
    if dist.get_world_size() == 1:
        exact = given[:, 0].double() @ weight.double().t()
        assert (ours - exact).abs().max() < 1e-5 * exact.abs().max()
    assert torch.equal(ours.bfloat16(), plain)
    assert not torch.equal(ours, plain.float())
    assert gradients.keys() == plain_gradients.keys()
    for name, gradient in gradients.items():
        scale = plain_gradients[name].abs().max()
        assert (gradient - plain_gradients[name]).abs().max() <= 2**-6 * scale, name
    head = "embedding.word_embeddings.weight" if "output_layer.weight" not in gradients else "output_layer.weight"
    assert gradients[head].abs().max() > 0


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_and_gradients(ranks, tmp_path, layout, tied):
    world, sizes = LAYOUTS[layout]
    directory = tiny.qwen3_moe(tmp_path / "m", layers=2, tie_word_embeddings=tied, dtype="bfloat16", seed=3)
    ranks(world).run(compare, str(directory), sizes)


def test_product_keeps_dimensions():
    x, weight = torch.randn(2, 3, 8).bfloat16(), torch.randn(5, 8).bfloat16()
    product = float32_product(x, weight)
    assert product.shape == (2, 3, 5)
    assert torch.allclose(product, x.float() @ weight.float().t())


def test_what_is_left_alone():
    chunk = torch.nn.Module()
    assert not install(chunk, torch.bfloat16)  # a stage without output layer
    chunk.output_layer = torch.nn.Linear(2, 2)
    assert not install(chunk, torch.float32)
    with pytest.raises(TypeError, match="ColumnParallelLinear without a bias"):
        install(chunk, torch.bfloat16)
