"""A trace survives the disk bit by bit; a file that is damaged, cut off or of another kind is refused."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

from megatron_ultraep.replay import RoutingTrace, TraceSample, histogram, route_dtype
from tests.megatron_ultraep.replay.routes import valid_routes


def trace(lengths=(5, 3, 8), experts=8, layers=3, topk=2):
    samples = tuple(
        TraceSample(
            sample_id=f"train/0/{i}",
            routes=valid_routes(rows, layers, experts, topk, seed=i, dtype=route_dtype(experts)),
            prompt_length=i + 1,
            weight_versions=((0, i), (1, i + 1)) if rows > 1 else ((0, i),),
        )
        for i, rows in enumerate(lengths)
    )
    return RoutingTrace(experts, layers, topk, samples, {"name": "tiny", "layers": [0, 1, 3]})


def rewrite(path, change):
    """Read the parts of a file, let ``change(tensors, metadata)`` alter them, write them back."""
    with safe_open(str(path), framework="numpy") as f:
        metadata = f.metadata()
        tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118 (not a mapping)
    change(tensors, metadata)
    save_file(tensors, path, metadata=metadata)


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.integers(1, 12), min_size=0, max_size=6),
    st.sampled_from([(1, 1), (8, 2), (256, 4), (300, 3)]),
    st.integers(1, 3),
)
def test_round_trip(tmp_path_factory, lengths, sizes, layers):
    path = tmp_path_factory.mktemp("trace") / "t.safetensors"
    saved = trace(lengths, sizes[0], layers, sizes[1])
    saved.save(path)
    loaded = RoutingTrace.load(path)
    assert (loaded.experts, loaded.moe_layers, loaded.topk) == (saved.experts, saved.moe_layers, saved.topk)
    assert loaded.model == saved.model
    assert len(loaded.samples) == len(saved.samples)
    for a, b in zip(loaded.samples, saved.samples, strict=True):
        assert (a.sample_id, a.prompt_length, a.weight_versions) == (b.sample_id, b.prompt_length, b.weight_versions)
        assert a.routes.dtype == b.routes.dtype
        assert np.array_equal(a.routes, b.routes)


def test_the_file_is_as_documented_and_replaces_the_old_one(tmp_path):
    path = tmp_path / "t.safetensors"
    trace((2,)).save(path)
    trace((5, 3)).save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["t.safetensors"]
    with safe_open(str(path), framework="numpy") as f:
        metadata = f.metadata()
        assert f.get_tensor("routes").shape == (8, 3, 2)
        assert f.get_tensor("routes").dtype == np.uint8
        assert f.get_tensor("row_offsets").tolist() == [0, 5, 8]
        assert f.get_tensor("prompt_lengths").tolist() == [1, 2]
        assert f.get_tensor("version_offsets").tolist() == [0, 2, 4]
        assert f.get_tensor("version_spans").tolist() == [[0, 0], [1, 1], [0, 1], [1, 2]]
    assert (metadata["format"], metadata["version"]) == ("megatron-ultraep-routing-trace", "1")
    assert json.loads(metadata["sample_ids"]) == ["train/0/0", "train/0/1"]


def test_histogram_is_the_sum_over_samples():
    whole = trace()
    expected = sum(histogram(s.routes, 8).astype(np.int64) for s in whole.samples)
    assert np.array_equal(whole.histogram(), expected)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_a_damaged_or_truncated_file_is_refused(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("trace") / "t.safetensors"
    trace().save(path)
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans(), label="truncate"):
        path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    else:
        header = 8 + int.from_bytes(content[:8], "little")
        content[data.draw(st.integers(header, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"could not read it|the trace is damaged"):
        RoutingTrace.load(path)


def test_a_missing_file_and_other_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="found no such file"):
        RoutingTrace.load(tmp_path / "none")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(ValueError, match="could not read it"):
        RoutingTrace.load(tmp_path / "text")
    save_file({"x": np.zeros(3)}, tmp_path / "weights")
    with pytest.raises(ValueError, match=r"expected format .* got None"):
        RoutingTrace.load(tmp_path / "weights")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, m: m.update(version="2"), "expected version 1, got 2: convert"),
        (lambda t, m: t.pop("row_offsets"), "the trace has no row_offsets"),
        (lambda t, m: m.pop("experts"), "the trace has no experts"),
        (lambda t, m: m.update(sample_ids='["a"]'), "row_offsets, version_offsets, prompt_lengths do not fit the 1"),
        (lambda t, m: m.update(experts="3"), r"sample train/0/0: expected expert ids in 0\.\.2"),
    ],
)
def test_parts_that_do_not_fit_are_refused(tmp_path, change, message):
    path = tmp_path / "t"
    trace().save(path)
    rewrite(path, change)
    with pytest.raises(ValueError, match=message):
        RoutingTrace.load(path)


@pytest.mark.parametrize("spans", [(), ((1, 0),), ((0, 0), (0, 1)), ((0, 0), (5, 1), (2, 2))])
def test_version_spans_start_at_row_0_and_increase(spans):
    sample = TraceSample("a", valid_routes(6, 1, 4, 2), 2, spans)
    with pytest.raises(ValueError, match="sample a: expected weight-version spans that start at row 0 and increase"):
        RoutingTrace(4, 1, 2, (sample,))


def test_samples_are_checked_by_id():
    good, bad = valid_routes(4, 2, 8, 2), np.zeros((4, 2, 2), np.int64)
    with pytest.raises(ValueError, match="sample b: all routes are zero"):
        RoutingTrace(8, 2, 2, (TraceSample("a", good), TraceSample("b", bad)))
    with pytest.raises(ValueError, match="distinct sample ids"):
        RoutingTrace(8, 2, 2, (TraceSample("a", good), TraceSample("a", good)))
