import dataclasses
import json
import multiprocessing
import os
import signal
import time

import pytest

from rl.ledger import (
    FIELDS_THAT_MATTER,
    Ledger,
    LedgerError,
    StepRecord,
    differences,
    file_digest,
    items_digest,
    line_digest,
)

CONFIG = {
    "run": {"name": "x", "seed": 0, "steps": 5},
    "model": {"path": "m", "create_args": {}},
    "sampling": {"temperature": 1.0, "stop": []},
    "trainer": {"ranks": 2, "optimizer": {"lr": 1e-3, "betas": [0.9, 0.95]}},
}
FACTS = {"versions": {"torch": "2.13.0"}, "topology": {"ranks": 2}, "data_digests": {"train": "sha256:aa"}}


def create(directory, **changes):
    return Ledger.create(directory, **{"config": CONFIG, "seeds": {"run": 0}, **FACTS, **changes})


def resume(directory, step, **changes):
    return Ledger.resume(directory, checkpoint_step=step, **{"config": CONFIG, **FACTS, **changes})


def record(step, prompts=4, size=20):
    first = (step - 1) * prompts
    consumed = tuple(divmod(i, size) for i in range(first, first + prompts))
    return StepRecord(
        step=step,
        weight_version=step,
        epoch=consumed[0][0],
        consumed=consumed,
        sample_ids=tuple(f"train/{epoch}/{ordinal}/0 é" for epoch, ordinal in consumed),
        route_digests={"train/0/0/0": ["ab", "cd"]},
        rewards={"mean": 0.5},
        timings={"generate": 1.5},
        extra={"note": "ü\n"},
    )


def lines(directory, name="steps.jsonl"):
    path = directory / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_records_come_back_as_written(tmp_path):
    with create(tmp_path / "deep" / "run") as ledger:
        for step in (1, 2, 3):
            ledger.append(record(step))
        ledger.finish("finished")
    again = Ledger.read(tmp_path / "deep" / "run")
    assert again.records == (record(1), record(2), record(3))
    assert again.last_step == 3
    assert again.run["config"] == CONFIG
    assert again.run["seeds"] == {"run": 0}
    assert again.run["sessions"][0]["outcome"] == "finished"
    assert again.run["sessions"][0]["last_step"] == 3


def test_a_line_is_on_disk_when_append_returns(tmp_path):
    ledger = create(tmp_path)
    for step in (1, 2):
        ledger.append(record(step))
        assert [line["step"] for line in lines(tmp_path)] == list(range(1, step + 1))


def test_create_refuses_a_directory_that_holds_a_run(tmp_path):
    create(tmp_path).close()
    with pytest.raises(LedgerError, match="--resume"):
        create(tmp_path)


def test_create_drops_lines_of_a_run_that_died_while_being_created(tmp_path):
    (tmp_path / "steps.jsonl").write_text('{"step": 1}\n')
    assert create(tmp_path).last_step == 0
    assert lines(tmp_path) == []


def test_two_writers_are_refused(tmp_path):
    ledger = create(tmp_path)
    with pytest.raises(LedgerError, match=rf"another process \(id {os.getpid()}\)"):
        resume(tmp_path, 0)
    ledger.close()
    ledger.close()
    resume(tmp_path, 0).close()


def test_a_closed_or_read_ledger_cannot_be_written(tmp_path):
    ledger = create(tmp_path)
    ledger.close()
    for closed in (ledger, Ledger.read(tmp_path)):
        with pytest.raises(LedgerError, match="not open for writing"):
            closed.append(record(1))
        with pytest.raises(LedgerError, match="not open for writing"):
            closed.finish("finished")


@pytest.mark.parametrize("step", [0, 1, 3])
def test_steps_must_follow_each_other(tmp_path, step):
    ledger = create(tmp_path)
    ledger.append(record(1))
    with pytest.raises(LedgerError, match="expected step 2 after step 1"):
        ledger.append(record(step))


def test_a_prompt_consumed_twice_is_refused(tmp_path):
    ledger = create(tmp_path)
    ledger.append(record(1))
    again = StepRecord(2, 2, 0, ((0, 4), (0, 3)), ("s",))
    with pytest.raises(LedgerError, match=r"\[\(0, 3\)\]"):
        ledger.append(again)
    twice = StepRecord(2, 2, 0, ((0, 4), (0, 4)), ("s",))
    with pytest.raises(LedgerError, match=r"\[\(0, 4\)\]"):
        ledger.append(twice)
    ledger.append(record(2))
    assert ledger.last_step == 2


def test_same_ordinal_of_another_epoch_is_another_prompt(tmp_path):
    ledger = create(tmp_path)
    for step in range(1, 8):
        ledger.append(record(step, prompts=4, size=10))
    assert ledger.consumed_ordinals(1) == tuple(range(10))
    ledger.verify_exactly_once(0, 10)
    ledger.verify_exactly_once(1, 10)
    with pytest.raises(LedgerError, match=r"missing \[8, 9\]"):
        ledger.verify_exactly_once(2, 10)


def test_verify_exactly_once_lists_what_is_wrong(tmp_path):
    with create(tmp_path) as ledger:
        ledger.append(StepRecord(1, 1, 0, ((0, 0), (0, 2), (0, 7)), ()))
    # Repeats cannot be appended; write one as a broken program would.
    value = lines(tmp_path)[0]
    with open(tmp_path / "steps.jsonl", "a") as file:
        file.write(json.dumps({**value, "step": 2, "consumed": [[0, 2]]}) + "\n")
    with pytest.raises(LedgerError) as error:
        Ledger.read(tmp_path).verify_exactly_once(0, 4)
    assert "missing [1, 3]" in str(error.value)
    assert "repeated [2]" in str(error.value)
    assert "out of range [7]" in str(error.value)


def test_resume_rolls_back_what_came_after_the_checkpoint(tmp_path):
    with create(tmp_path) as ledger:
        for step in range(1, 6):
            ledger.append(record(step))
    with resume(tmp_path, 3) as ledger:
        assert ledger.session == 1
        assert ledger.last_step == 3
        assert ledger.consumed_ordinals(0) == tuple(range(12))
        assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]
        undone = lines(tmp_path, "steps.rolled_back.jsonl")
        assert [(line["step"], line["session"], line["rolled_back_by_session"]) for line in undone] == [
            (4, 0, 1),
            (5, 0, 1),
        ]
        ledger.append(record(4))
        ledger.append(record(5))
        ledger.verify_exactly_once(0, 20)
    assert [line["session"] for line in lines(tmp_path)] == [0, 0, 0, 1, 1]
    with resume(tmp_path, 4) as ledger:
        assert ledger.run["sessions"][2]["rolled_back"] == [5]
    undone = lines(tmp_path, "steps.rolled_back.jsonl")
    assert [(line["step"], line["session"]) for line in undone] == [(4, 0), (5, 0), (5, 1)]


def test_resume_without_checkpoint_starts_over(tmp_path):
    with create(tmp_path) as ledger:
        ledger.append(record(1))
    with resume(tmp_path, 0) as ledger:
        assert ledger.last_step == 0
        ledger.append(record(1))


def test_a_crash_in_the_middle_of_rolling_back_keeps_each_line_once(tmp_path, monkeypatch):
    with create(tmp_path) as ledger:
        for step in (1, 2, 3):
            ledger.append(record(step))

    def crash(*args):
        raise KeyboardInterrupt

    for target in ("rl.ledger.write_json_lines", "rl.ledger.write_atomic"):
        with monkeypatch.context() as patch:
            patch.setattr(target, crash)
            with pytest.raises(KeyboardInterrupt):
                resume(tmp_path, 1)
    with resume(tmp_path, 1) as ledger:
        assert ledger.last_step == 1
        assert ledger.session == 1
    assert [line["step"] for line in lines(tmp_path, "steps.rolled_back.jsonl")] == [2, 3]


def test_crash_at_every_byte_of_the_last_line(tmp_path):
    with create(tmp_path) as ledger:
        ledger.append(record(1))
        whole = (tmp_path / "steps.jsonl").stat().st_size
        ledger.append(record(2))
    content = (tmp_path / "steps.jsonl").read_bytes()
    run = (tmp_path / "run.json").read_bytes()
    for cut in range(whole, len(content)):
        (tmp_path / "steps.jsonl").write_bytes(content[:cut])
        (tmp_path / "run.json").write_bytes(run)
        assert Ledger.read(tmp_path).last_step == 1
        with resume(tmp_path, 1) as ledger:
            assert ledger.run["sessions"][1]["torn_bytes"] == cut - whole
            ledger.append(record(2))
        assert [line["step"] for line in lines(tmp_path)] == [1, 2], cut
        assert Ledger.read(tmp_path).records == (record(1), record(2))
    assert lines(tmp_path, "steps.rolled_back.jsonl") == []


def test_a_torn_line_of_rolled_back_steps_is_written_again(tmp_path):
    with create(tmp_path) as ledger:
        ledger.append(record(1))
        ledger.append(record(2))
    (tmp_path / "steps.rolled_back.jsonl").write_bytes(b'{"step": 2, "sess')
    resume(tmp_path, 0).close()
    assert [line["step"] for line in lines(tmp_path, "steps.rolled_back.jsonl")] == [1, 2]


def test_a_checkpoint_without_its_lines_is_refused(tmp_path):
    with create(tmp_path) as ledger:
        ledger.append(record(1))
    with pytest.raises(LedgerError, match="checkpoint of step 2"):
        resume(tmp_path, 2)
    resume(tmp_path, 1).close()


def test_a_gap_is_refused(tmp_path):
    with create(tmp_path) as ledger:
        for step in (1, 2, 3):
            ledger.append(record(step))
    kept = (tmp_path / "steps.jsonl").read_bytes().split(b"\n")
    (tmp_path / "steps.jsonl").write_bytes(b"\n".join([kept[0], kept[2], b""]))
    with pytest.raises(LedgerError, match=r"came \[1, 3\]"):
        resume(tmp_path, 1)


def changed(path, value):
    config = json.loads(json.dumps(CONFIG))
    node = config
    *parents, last = path.split(".")
    for parent in parents:
        node = node.setdefault(parent, {})
    node[last] = value
    return config


@pytest.mark.parametrize("path", ["run.steps", "run.name", "trainer.ranks", "rollout.engines", "trainer.parallel.ep"])
def test_layout_and_length_may_change(tmp_path, path):
    create(tmp_path).close()
    with resume(tmp_path, 0, config=changed(path, 9)) as ledger:
        assert ledger.run["sessions"][1]["changed"][path][1] == 9


@pytest.mark.parametrize("path", [f"{name}.x" if "." not in name else name for name in FIELDS_THAT_MATTER])
def test_fields_that_matter_must_agree(tmp_path, path):
    create(tmp_path).close()
    with pytest.raises(LedgerError) as error:
        resume(tmp_path, 0, config=changed(path, 9))
    assert f"  - {path}: was " in str(error.value)
    assert "is 9" in str(error.value)
    assert "--allow-changes" in str(error.value)
    resume(tmp_path, 0, config=changed(path, 9), allow_changes=True).close()
    # From then on the changed configuration is the one to agree with.
    resume(tmp_path, 0, config=changed(path, 9)).close()


def test_changed_data_is_refused(tmp_path):
    create(tmp_path).close()
    with pytest.raises(LedgerError, match="content of train: was sha256:aa, is sha256:bb"):
        resume(tmp_path, 0, data_digests={"train": "sha256:bb"})


def test_tuples_and_lists_are_the_same(tmp_path):
    create(tmp_path).close()
    resume(tmp_path, 0, config=changed("trainer.optimizer.betas", (0.9, 0.95))).close()


def test_resume_where_there_is_no_run(tmp_path):
    with pytest.raises(LedgerError, match=r"run\.json"):
        resume(tmp_path, 0)


def test_another_format_is_refused(tmp_path):
    create(tmp_path).close()
    run = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps({**run, "format": 99}))
    with pytest.raises(LedgerError, match="expected ledger format 1, came 99"):
        Ledger.read(tmp_path)


def test_unknown_keys_of_a_line_are_left_out(tmp_path):
    with create(tmp_path) as ledger:
        ledger.append(record(1))
    value = lines(tmp_path)[0]
    (tmp_path / "steps.jsonl").write_text(json.dumps({**value, "added_later": 1}) + "\n")
    assert Ledger.read(tmp_path).records == (record(1),)


def _write_until_killed(directory):
    ledger = create(directory)
    step = 0
    while True:
        step += 1
        ledger.append(record(step, prompts=40, size=10**6))


def test_kill_9_while_writing_loses_at_most_the_unfinished_line(tmp_path):
    context = multiprocessing.get_context("fork")
    process = context.Process(target=_write_until_killed, args=(tmp_path,), daemon=True)
    process.start()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and len(lines_or_none(tmp_path)) < 5:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join(10)
    last = Ledger.read(tmp_path).last_step
    assert last >= 4
    with resume(tmp_path, last - 2) as ledger:
        for step in range(last - 1, last + 3):
            ledger.append(record(step, prompts=40, size=10**6))
        ledger.verify_exactly_once(0, (last + 2) * 40)


def lines_or_none(directory):
    path = directory / "steps.jsonl"
    return path.read_bytes().split(b"\n") if path.exists() else []


def test_digests(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert file_digest(tmp_path / "a") == "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert items_digest([{"a": 1, "b": 2}]) == items_digest([{"b": 2, "a": 1}])
    assert items_digest(["a", "b"]) != items_digest(["b", "a"])
    assert items_digest(["ab"]) != items_digest(["a", "b"])


def test_differences():
    assert differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3, "d": 4}}) == {"a.c": [2, 3], "a.d": [None, 4]}


def chain_of(directory):
    """Digests of lines as written, and as computed from the lines."""
    before, computed = "", []
    for line in lines(directory):
        before = line_digest(before, line)
        computed.append(before)
    return [line["chain"] for line in lines(directory)], computed


def test_every_line_has_the_digest_of_itself_and_of_those_before(tmp_path):
    with create(tmp_path) as ledger:
        for step in (1, 2, 3):
            ledger.append(record(step))
    written, computed = chain_of(tmp_path)
    assert written == computed
    assert len(set(written)) == 3
    with resume(tmp_path, 2) as ledger:
        ledger.append(dataclasses.replace(record(3), rewards={"mean": float("nan")}))
        ledger.append(record(4))
    again, computed = chain_of(tmp_path)
    assert again == computed
    assert again[:2] == written[:2]
    assert again[2] != written[2]


def test_lines_without_digests_are_continued(tmp_path):
    with create(tmp_path) as ledger:
        ledger.append(record(1))
    (line,) = lines(tmp_path)
    del line["chain"]
    (tmp_path / "steps.jsonl").write_text(json.dumps(line) + "\n")
    with resume(tmp_path, 1) as ledger:
        ledger.append(record(2))
    assert lines(tmp_path)[1]["chain"] == line_digest("", lines(tmp_path)[1])
