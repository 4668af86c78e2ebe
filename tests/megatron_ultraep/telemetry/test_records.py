import pytest

from megatron_ultraep.layout import ExpertLayout
from megatron_ultraep.telemetry import Recorder, read
from megatron_ultraep.telemetry.records import has_records
from tests.megatron_ultraep.telemetry.plans import key, make_plan


def test_a_worked_example(tmp_path):
    # Two ranks with two experts each: rank 0 sends 10 and 2 tokens, rank 1 sends 6 and 2; expert 0 is hot.
    plan = make_plan(ExpertLayout(4, 2, slots=1), loads=[[10, 1, 1, 0], [6, 0, 2, 0]])
    with Recorder(tmp_path / "loads", max_mib=1, name="a") as r:
        r.record(key(), 3, plan)
    (found,) = read(tmp_path)
    assert found.before.tolist() == [[16, 1, 0, 0], [0, 0, 3, 0]]
    assert found.after.tolist() == [[8, 1, 0, 0], [8, 0, 3, 0]]
    assert found.source_tokens.tolist() == [12, 8]
    assert [(r.expert, r.home, r.rank, r.slot, r.tokens) for r in found.replicas] == [(0, 0, 1, 0, 8)]
    assert found.decisions == plan.decisions


def test_torn_chunks_are_skipped_with_a_warning_that_names_them(tmp_path, caplog):
    for number in range(3):
        with Recorder(tmp_path, max_mib=1, name="a") as r:
            r.record(key(number), 0, make_plan())
    torn = tmp_path / "a.000001.loads.npz"
    torn.write_bytes(torn.read_bytes()[:-30])
    (tmp_path / "a.000009.loads.npz").write_bytes(b"")
    records = read(tmp_path)
    assert [r.key.step for r in records] == [0, 2]
    assert len(records.warnings) == 2
    assert "a.000001.loads.npz" in records.warnings[0]
    assert "a.000009.loads.npz" in records.warnings[1]
    assert "a.000001.loads.npz" in caplog.text


def test_damage_inside_is_found_when_loads_are_read(tmp_path):
    with Recorder(tmp_path, max_mib=1, name="a") as r:
        r.record(key(), 0, make_plan())
    path = tmp_path / "a.000000.loads.npz"
    content = bytearray(path.read_bytes())
    content[content.index(b"source_tokens.npy") + 60] ^= 255
    path.write_bytes(bytes(content))
    records = read(tmp_path)
    assert list(records) == []
    assert "a.000000.loads.npz" in records.warnings[0]


def test_empty_and_missing(tmp_path):
    assert list(read(tmp_path)) == []
    assert not has_records(tmp_path)
    with pytest.raises(FileNotFoundError, match="expected a directory with load records"):
        read(tmp_path / "missing")


def test_the_same_name_in_two_runs_is_kept_apart(tmp_path):
    for run in ("one", "two"):
        with Recorder(tmp_path / run, max_mib=1, name="a") as r:
            r.record(key(), 0, make_plan())
    assert len(list(read(tmp_path))) == 2
