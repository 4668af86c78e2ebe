import dataclasses

import numpy as np
import pytest

from megatron_ultraep.layout import ExpertLayout
from megatron_ultraep.telemetry import read
from megatron_ultraep.telemetry.blocks import Block, Shape, pack, row
from megatron_ultraep.telemetry.store import ChunkStore
from tests.megatron_ultraep.telemetry.plans import key, make_plan

LAYOUT = ExpertLayout(64, 8, node_size=4, slots=2)
SHAPE = Shape.of(LAYOUT)


def disk(directory):
    return sum(p.stat().st_size for p in directory.iterdir())


def block(step, microbatches=2, layers=4):
    rows = [row(key(step, mb), layer, make_plan(LAYOUT, seed=step * 100 + mb * 10 + layer, tokens=3000))
            for mb in range(microbatches) for layer in range(layers)]  # fmt: skip
    return pack(rows, SHAPE, group="a")


@pytest.fixture
def peak(tmp_path, monkeypatch):
    """The most bytes that ever lay in the directory, temporary files included."""
    most = [0]
    original = ChunkStore._replace

    def watched(self, path, data):
        original(self, path, data)
        most[0] = max(most[0], disk(tmp_path))

    monkeypatch.setattr(ChunkStore, "_replace", watched)
    return most


def test_the_bound_holds_and_what_is_kept_is_oldest_newest_and_a_uniform_sample(tmp_path, peak):
    bound = 1 << 17
    store = ChunkStore(tmp_path, "a", bound)
    steps = 150
    for step in range(3, steps):
        store.write(block(step))
        assert store.size == disk(tmp_path) <= bound
    assert peak[0] <= bound
    kept = sorted({r.key.step for r in read(tmp_path)})
    assert len(kept) < steps - 3
    assert (kept[0], kept[-1]) == (3, steps - 1)
    gaps = np.diff(kept[1:])
    stride = gaps[0]
    assert stride > 1
    assert stride & (stride - 1) == 0
    sampled = [s for s in kept[1:] if s % stride == 0]
    # Uniform, up to what was recorded since the bound was last reached: that is dense, and so is the step before it.
    assert np.diff(sampled).max() == stride
    dense = int(np.argmax(gaps == 1)) if (gaps == 1).any() else len(gaps)
    assert (gaps[: dense - 1] == stride).all()
    assert (gaps[dense + 1 :] == 1).all()
    assert len(kept) * 8 == len(list(read(tmp_path))), "a step is kept whole or not at all"
    assert store.thinned == (steps - 3 - len(kept)) * 8
    assert disk(tmp_path) > bound / 4


def test_a_step_that_is_larger_than_the_bound_is_sampled_by_micro_batch_and_layer(tmp_path, peak):
    bound = 1 << 16
    store = ChunkStore(tmp_path, "a", bound)
    for mb in range(60):
        rows = [row(key(0, mb), layer, make_plan(LAYOUT, seed=mb * 10 + layer, tokens=3000)) for layer in range(8)]
        store.write(pack(rows, SHAPE, group="a"))
        assert store.size == disk(tmp_path) <= bound
    assert peak[0] <= bound
    found = list(read(tmp_path))
    assert found
    assert {r.key.microbatch for r in found} >= {0, 59}
    assert len(found) + store.thinned == 480


def test_thinning_survives_chunks_that_cannot_be_read(tmp_path, caplog):
    store = ChunkStore(tmp_path, "a", 1 << 16)
    store.write(block(0))
    (tmp_path / "a.000000.loads.npz").write_bytes(b"torn" * 100)
    for step in range(1, 60):
        store.write(block(step))
    assert disk(tmp_path) <= 1 << 16
    assert "a.000000.loads.npz" in caplog.text
    assert read(tmp_path).warnings == ()


def test_leftovers_of_a_killed_process_are_removed(tmp_path):
    (tmp_path / ".a.000003.loads.npz.tmp").write_bytes(b"x")
    ChunkStore(tmp_path, "a", 1 << 20).close()
    assert [p.name for p in tmp_path.iterdir()] == [".a.lock"]


def test_many_small_chunks_are_joined_when_thinned(tmp_path):
    store = ChunkStore(tmp_path, "a", 1 << 17)
    for step in range(150):
        store.write(block(step, microbatches=1, layers=1))
    files = [p for p in tmp_path.iterdir() if p.suffix == ".npz"]
    assert len(files) < 60
    assert len({r.key.step for r in read(tmp_path)}) == len(list(read(tmp_path)))


def test_chunks_of_other_settings_are_not_joined(tmp_path):
    store = ChunkStore(tmp_path, "a", 1 << 17)
    for step in range(120):
        store.write(dataclasses.replace(block(step, 1, 1), meta={"settings": step // 40}))
        assert store.size <= 1 << 17
    assert store.thinned > 0
    blocks = [Block.read(path) for path in sorted(tmp_path.glob("*.npz"))]
    assert all((np.unique(b.step // 40) == b.meta["settings"]).all() for b in blocks)
    assert len(blocks) < sum(map(len, blocks)), "none were joined: nothing was tested"
