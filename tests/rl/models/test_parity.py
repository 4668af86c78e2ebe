"""The Megatron model computes what transformers computes: log-probs of packed sequences, under every layout."""

import itertools

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_ultraep.megatron import compat
from megatron_ultraep.megatron.groups import ParallelLayout, create_groups
from rl.algorithms.logprobs import vocab_parallel_logprobs
from rl.models import tiny
from rl.models.architecture import read_architecture
from rl.models.builder import build_model
from rl.models.weights import load_weights
from tests.ranks import RankError

LENGTHS = (17, 5, 40)
# Short enough that positions of the sequences are stretched.
YARN = {"factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 32, "beta_slow": 1} | {
    "mscale": 0.8,
    "mscale_all_dim": 1.2,
}
MODELS = {
    "qwen3_moe": lambda path: tiny.qwen3_moe(path, seed=1),
    "qwen3_moe dense layers": lambda path: tiny.qwen3_moe(path, seed=2, mlp_only_layers=[0, 2]),
    "qwen3_moe 7 layers": lambda path: tiny.qwen3_moe(path, seed=16, layers=7, mlp_only_layers=[3]),
    "qwen3_moe tied": lambda path: tiny.qwen3_moe(path, seed=3, tie_word_embeddings=True),
    "qwen3_moe not normalised": lambda path: not_normalised(tiny.qwen3_moe(path, seed=4, topk=3)),
    "mixtral": lambda path: tiny.mixtral(path, seed=5, heads=4, kv_heads=2),
    "qwen2_moe": lambda path: tiny.qwen2_moe(path, seed=8, heads=4, kv_heads=2),
    "qwen2_moe sparse step": lambda path: tiny.qwen2_moe(path, seed=9, heads=4, kv_heads=2, decoder_sparse_step=2),
    "olmoe": lambda path: tiny.olmoe(path, seed=10, heads=4, kv_heads=2),
    "glm4_moe": lambda path: tiny.glm4_moe(path, seed=11, heads=4, kv_heads=2, topk=4, groups=4, chosen_groups=2),
    "glm4_moe air": lambda path: tiny.glm4_moe(path, seed=12, heads=4, kv_heads=2, use_qk_norm=False),
    "deepseek_v3": lambda path: tiny.deepseek_v3(path, seed=13),
    "deepseek_v3 two dense layers": lambda path: tiny.deepseek_v3(path, seed=14, dense_layers=2),
    "deepseek_v3 yarn": lambda path: tiny.deepseek_v3(path, seed=15, yarn=YARN),
    "llama": lambda path: tiny.llama(path, seed=6, heads=4, kv_heads=2),
    "llama tied": lambda path: tiny.llama(path, seed=7, heads=4, kv_heads=2, tie_word_embeddings=True),
}
WITHOUT_TP = ("olmoe", "deepseek_v3")
LAYOUTS = {
    "one": (1, {}),
    "ep2": (2, {"ep": 2}),
    "pp2": (2, {"pp": 2}),
    "tp2xep2": (2, {"tp": 2, "ep": 2}),
    "vpp2": (2, {"pp": 2, "vpp": 2}),
    "pp2xep2": (4, {"pp": 2, "ep": 2}),
    "pp4": (4, {"pp": 4}),
}


def not_normalised(directory):
    """``norm_topk_prob`` off: the probabilities of the chosen experts do not sum to 1."""
    file = directory / "config.json"
    file.write_text(file.read_text().replace('"norm_topk_prob": true', '"norm_topk_prob": false'))
    return directory


def sequences(vocab):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, vocab, (n,), generator=generator) for n in LENGTHS]


def megatron_logprobs(jobs):
    """Per job ``(directory, layout)``: next-token log-probs of the packed sequences, None but on the last stage."""
    return [one_model(directory, layout) for directory, layout in jobs]


def one_model(directory, layout):
    arch = read_architecture(directory)
    if not arch.is_moe:
        layout = {name: size for name, size in layout.items() if name != "ep"}
    groups = create_groups(ParallelLayout(world=dist.get_world_size(), **layout), timeout_s=60)
    model = build_model(arch, groups)
    load_weights(model, directory)
    layout = groups.layout
    tokens = sequences(arch.vocab)
    padding = -sum(len(s) - 1 for s in tokens) % layout.tp
    padded = torch.zeros(padding, dtype=torch.int64)
    inputs = torch.cat([*(s[:-1] for s in tokens), padded])
    targets = torch.cat([*(s[1:] for s in tokens), padded])
    lengths = [len(s) - 1 for s in tokens] + ([padding] if padding else [])
    bounds = list(itertools.accumulate(lengths, initial=0))
    positions = torch.cat([torch.arange(n) for n in lengths])
    packed = compat.packed_seq_params(torch.tensor(bounds, dtype=torch.int32), max(lengths))

    def step(iterator, chunk):
        def on_last_stage(logits, non_loss_data=False):
            return vocab_parallel_logprobs(
                logits[0],
                targets,
                groups.collection.tp if layout.tp > 1 else None,
                vocab_start=groups.coordinates["tp"] * logits.shape[-1],
                vocab_size=arch.vocab,
            )[0]

        return chunk(inputs[None], positions[None], None, packed_seq_params=packed), on_last_stage

    run = compat.forward_backward_function(layout.pp, layout.vpp, model.config, groups.collection)
    with torch.no_grad():
        kept = run(
            forward_step_func=step,
            data_iterator=[None] * layout.vpp if layout.vpp else None,
            model=model.chunks if layout.vpp else model.chunks[0],
            num_microbatches=layout.pp if layout.vpp else 1,
            seq_length=len(inputs),
            micro_batch_size=1,
            forward_only=True,
            collect_non_loss_data=True,
        )
    return kept[0][: len(inputs) - padding].numpy() if kept else None


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    root = tmp_path_factory.mktemp("parity")
    return {name: make(root / name.replace(" ", "_")) for name, make in MODELS.items()}


@pytest.fixture(scope="module")
def reference(directories):
    from transformers import AutoModelForCausalLM

    values = {}
    for name, directory in directories.items():
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        rows = []
        for s in sequences(model.config.vocab_size):
            with torch.no_grad():
                logits = model(s[None, :-1]).logits[0]
            rows.append(torch.log_softmax(logits, -1).gather(1, s[1:, None])[:, 0])
        values[name] = torch.cat(rows).numpy()
    return values


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logprobs_equal_those_of_transformers(ranks, directories, reference, layout):
    world, sizes = LAYOUTS[layout]
    names = [name for name in directories if "tp" not in sizes or not name.startswith(WITHOUT_TP)]
    if "vpp" in sizes:
        names.remove("qwen3_moe 7 layers")
    answers = ranks(world).run(megatron_logprobs, [(str(directories[name]), sizes) for name in names])
    for i, name in enumerate(names):
        stages = [one[i] for one in answers if one[i] is not None]
        assert len(stages) == world // sizes.get("pp", 1)
        for got in stages:
            assert np.abs(got - reference[name]).max() <= 1e-5, name


def test_the_models_differ_where_they_should(reference, directories):
    """The bar above would not notice a renormalisation that changes nothing."""
    from transformers import AutoModelForCausalLM

    normalised = AutoModelForCausalLM.from_pretrained(
        directories["qwen3_moe not normalised"], dtype=torch.float32, norm_topk_prob=True
    )
    tokens = sequences(normalised.config.vocab_size)[0]
    with torch.no_grad():
        logprobs = torch.log_softmax(normalised(tokens[None, :-1]).logits[0], -1).gather(1, tokens[1:, None])[:, 0]
    assert np.abs(logprobs.numpy() - reference["qwen3_moe not normalised"][: len(tokens) - 1]).max() > 1e-2


@pytest.mark.parametrize(
    ("name", "world", "layout", "message"),
    [
        ("qwen3_moe", 4, {"tp": 4, "ep": 2}, "tp=4 must divide 4 attention heads and 2 key/value heads"),
        ("qwen3_moe", 2, {"tp": 2}, r"tp=2 with ep=1 needs etp=2 \(or ep > 1\)"),
        ("qwen3_moe", 2, {"pp": 2, "vpp": 3}, r"pp\*vpp = 6 must divide 4 layers"),
        ("qwen3_moe", 3, {"ep": 3}, "ep=3 must divide 8 experts"),
        ("olmoe", 2, {"tp": 2, "ep": 2}, "tp=2 is not tested with olmoe's attention: set it to 1"),
        ("deepseek_v3", 2, {"tp": 2, "ep": 2}, "tp=2 is not tested with deepseek_v3's attention: set it to 1"),
        ("llama", 2, {"etp": 2}, "a dense model has no experts, got ep=1, etp=2: set them to 1"),
    ],
)
def test_layouts_that_do_not_fit_are_refused(ranks, directories, name, world, layout, message):
    with pytest.raises(RankError, match=message):
        ranks(world).run(megatron_logprobs, [(str(directories[name]), layout)])
