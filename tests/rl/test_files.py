import errno
import os

import pytest

from rl import files


def test_write_atomic_replaces_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "a.json"
    files.write_atomic(path, b"one")
    files.write_atomic(path, b"two")
    assert path.read_bytes() == b"two"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_failed_atomic_write_keeps_the_old_content(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    files.write_atomic(path, b"old")

    def no_space(descriptor, view):
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(os, "write", no_space)
    with pytest.raises(OSError, match="no space"):
        files.write_atomic(path, b"new")
    assert path.read_bytes() == b"old"


def test_failed_append_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    files.append_durably(path, b"first\n")
    write = os.write

    def half(descriptor, view):
        if len(view) < 4:
            raise OSError(errno.ENOSPC, "no space")
        return write(descriptor, view[: len(view) // 2])

    monkeypatch.setattr(os, "write", half)
    with pytest.raises(OSError, match="no space"):
        files.append_durably(path, b"second line\n")
    assert path.read_bytes() == b"first\n"


def test_partial_writes_are_completed(tmp_path, monkeypatch):
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, view: write(descriptor, view[:3]))
    files.append_durably(tmp_path / "a", b"0123456789\n")
    assert (tmp_path / "a").read_bytes() == b"0123456789\n"


def test_read_json_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    assert files.read_json_lines(path) == files.JsonLines((), b"")
    path.write_bytes(b'{"a":1}\n{"a":2}\n')
    assert files.read_json_lines(path) == files.JsonLines(({"a": 1}, {"a": 2}), b"")
    path.write_bytes(b'{"a":1}\n{"a":2}')
    assert files.read_json_lines(path) == files.JsonLines(({"a": 1},), b'{"a":2}')
    path.write_bytes(b'{"a":1}\n\x00\x00\x00\n')
    assert files.read_json_lines(path) == files.JsonLines(({"a": 1},), b"\x00\x00\x00\n")


def test_damage_before_the_last_line_is_an_error(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a":1}\n{"a"\n{"a":3}\n')
    with pytest.raises(ValueError, match="line 2: expected JSON"):
        files.read_json_lines(path)
