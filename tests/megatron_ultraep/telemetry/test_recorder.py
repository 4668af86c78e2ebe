import logging
import subprocess
import sys
import threading
import time

import pytest

from megatron_ultraep.layout import ExpertLayout
from megatron_ultraep.telemetry import Recorder, blocks, read, recorder
from tests.megatron_ultraep.telemetry.plans import key, make_plan


def test_what_is_recorded_is_read_back(tmp_path):
    plans = {(step, mb, layer): make_plan(seed=step * 9 + mb * 3 + layer)
             for step in range(3) for mb in range(2) for layer in (1, 4)}  # fmt: skip
    with Recorder(tmp_path, max_mib=1, name="ep0-pp0", meta={"topk": 8}) as r:
        for (step, mb, layer), plan in plans.items():
            r.record(key(step, mb), layer, plan)
    records = read(tmp_path)
    found = {(x.key.step, x.key.microbatch, x.layer): x for x in records}
    assert found.keys() == plans.keys()
    for name, plan in plans.items():
        assert found[name].after.sum(axis=1).tolist() == plan.after.tolist()
        assert found[name].before.sum(axis=1).tolist() == plan.before.tolist()
    assert records.meta == {"ep0-pp0": {"topk": 8}}
    assert records.counts == {"ep0-pp0": {"dropped": 0, "thinned": 0, "failed": 0}}


def test_a_key_recorded_again_is_stored_once(tmp_path):
    plan = make_plan()
    with Recorder(tmp_path, max_mib=1, name="a") as r:
        for _ in range(3):
            r.record(key(1), 2, plan)
        r.record(key(1), 3, plan)
        r.record(key(1, pass_="old_logprob"), 2, plan)
        r.flush()
        assert (r.counts.recorded, r.counts.repeated) == (3, 2)
    assert len(list(read(tmp_path))) == 3


def test_layouts_may_change_between_steps_and_models_may_differ(tmp_path):
    layouts = [
        ExpertLayout(8, 4, slots=1),
        ExpertLayout(8, 4, (7, 6, 5, 4, 3, 2, 1, 0), slots=1),
        ExpertLayout(6, 2, slots=0),
    ]
    with Recorder(tmp_path, max_mib=1, name="a") as r:
        for step, layout in enumerate(layouts):
            r.record(key(step), 0, make_plan(layout, step))
    assert {x.key.step: x.layout for x in read(tmp_path)} == dict(enumerate(layouts))


def test_a_full_queue_drops_and_counts_and_never_waits(tmp_path, monkeypatch, caplog):
    go = threading.Event()
    original = blocks.row

    def slow_row(*arguments):
        assert go.wait(30)
        return original(*arguments)

    monkeypatch.setattr(recorder, "row", slow_row)
    plan = make_plan(ExpertLayout(64, 64, slots=2), tokens=64)  # 98 KiB of quotas: 1 MiB takes ten
    r = Recorder(tmp_path, max_mib=1, name="a", queue_mib=1)
    started = time.perf_counter()
    for step in range(100):
        r.record(key(step), 0, plan)
    assert time.perf_counter() - started < 1
    assert r.counts.dropped >= 85
    go.set()
    with caplog.at_level(logging.WARNING):
        r.close()
    assert r.counts.recorded + r.counts.dropped == 100
    assert "dropped=" in caplog.text
    records = read(tmp_path)
    assert len(list(records)) == r.counts.recorded
    assert records.counts["a"]["dropped"] == r.counts.dropped


def test_recording_costs_the_caller_microseconds(tmp_path):
    plan = make_plan(ExpertLayout(256, 64, node_size=8, slots=2))
    with Recorder(tmp_path, max_mib=16, name="a") as r:
        times = []
        for step in range(200):
            started = time.perf_counter()
            r.record(key(step), 0, plan)
            times.append(time.perf_counter() - started)
    assert sorted(times)[100] < 200e-6, f"median {sorted(times)[100] * 1e6:.0f} us"


def test_several_threads_and_recorders(tmp_path):
    plan = make_plan()
    with Recorder(tmp_path, max_mib=1, name="a") as a, Recorder(tmp_path, max_mib=1, name="b") as b:

        def work(layer):
            for step in range(50):
                a.record(key(step), layer, plan)
                b.record(key(step), layer, plan)

        threads = [threading.Thread(target=work, args=(layer,)) for layer in range(4)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        with pytest.raises(RuntimeError, match="give every recording process its own name"):
            Recorder(tmp_path, max_mib=1, name="a")
    found = list(read(tmp_path))
    assert len(found) == 400
    assert len({(x.group, x.key, x.layer) for x in found}) == 400


def test_resuming_under_the_same_name_continues_and_the_last_counts(tmp_path):
    with Recorder(tmp_path, max_mib=1, name="a") as r:
        for step in range(4):
            r.record(key(step), 0, make_plan(seed=1))
    again = make_plan(seed=2)
    with Recorder(tmp_path, max_mib=1, name="a") as r:
        for step in range(2, 6):
            r.record(key(step), 0, again)
    found = {x.key.step: x for x in read(tmp_path)}
    assert sorted(found) == list(range(6))
    assert all((found[step].tokens == again.loads.sum(axis=0)).all() == (step >= 2) for step in range(6))


def test_closed_and_bad_arguments(tmp_path):
    r = Recorder(tmp_path, max_mib=1, name="a")
    r.close()
    r.close()
    r.flush()
    with pytest.raises(RuntimeError, match="closed before actor/train/step 7"):
        r.record(key(7), 0, make_plan())
    with pytest.raises(ValueError, match="max_mib"):
        Recorder(tmp_path, max_mib=0, name="a")
    with pytest.raises(ValueError, match="expected meta of JSON values"):
        Recorder(tmp_path, max_mib=1, name="b", meta={"model": object()})
    with pytest.raises(ValueError, match=r"letters, digits.*'a/b'"):
        Recorder(tmp_path, max_mib=1, name="a/b")


def test_a_disk_that_fails_ends_nothing(tmp_path, monkeypatch, caplog):
    r = Recorder(tmp_path, max_mib=1, name="a")
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        r.record(key(0), 0, make_plan())
        r.flush()
    r.record(key(1), 0, make_plan())
    r.close()
    assert r.counts.failed == 1
    assert "No space left" in caplog.text
    assert [x.key.step for x in read(tmp_path)] == [1]
    assert not list(tmp_path.glob("*.tmp")) + list(tmp_path.glob(".*.tmp"))


def test_a_flush_that_takes_too_long_says_so(tmp_path, monkeypatch):
    go = threading.Event()
    monkeypatch.setattr(recorder, "row", lambda *a: go.wait(30) and None)
    r = Recorder(tmp_path, max_mib=1, name="a")
    r.record(key(), 0, make_plan())
    with pytest.raises(TimeoutError, match=r"not on disk after 0\.05 s"):
        r.flush(timeout=0.05)
    monkeypatch.undo()
    go.set()
    r.close()


KILLED = """
import os, sys
from megatron_ultraep.telemetry import Recorder
from tests.megatron_ultraep.telemetry.plans import key, make_plan
r = Recorder(sys.argv[1], max_mib=1, name="a")
for step in range(5):
    r.record(key(step), 0, make_plan())
r.flush()
r.record(key(5), 0, make_plan())
if sys.argv[2] == "kill":
    os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize(("end", "kept"), [("kill", (5, 6)), ("exit", (6,))])
def test_a_killed_process_keeps_what_was_flushed_and_one_that_ends_keeps_all(tmp_path, end, kept):
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), end], timeout=60, check=end == "exit")
    assert len(list(read(tmp_path))) in kept
    Recorder(tmp_path, max_mib=1, name="a").close()  # the lock died with it
