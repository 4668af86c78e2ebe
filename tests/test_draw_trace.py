"""Traces as pictures: what the GPU did when, and when it did nothing."""

import gzip
import json

import pytest

from scripts import draw_trace


def kernel(name, start_ms, ms, stream=7):
    return {"cat": "kernel", "name": name, "ts": 1e6 + start_ms * 1e3, "dur": ms * 1e3, "args": {"stream": stream}}


def test_what_ran_and_what_did_not(tmp_path, capsys):
    events = [
        kernel("gemm", 0, 2),
        kernel("void ultraep::run<ultraep::Place>(ultraep::Place)", 1, 3, stream=9),
        kernel("ncclDevKernel_SendRecv", 4, 1),
        kernel("gemm", 7, 1),
        {"cat": "cpu_op", "name": "aten::add", "ts": 1e6, "dur": 9e3},
    ]
    file = tmp_path / "ours-rank0.json.gz"
    file.write_bytes(gzip.compress(json.dumps({"traceEvents": events}).encode()))
    picture = tmp_path / "pictures" / "out.png"
    assert draw_trace.main([str(file), "--out", str(picture)]) == 0
    said = capsys.readouterr().out
    assert "8.00 ms, a kernel ran   6.00, one that computes   3.00; longest idle (ms): 2.00 before gemm" in said
    assert picture.stat().st_size > 1000


@pytest.mark.parametrize(("content", "message"), [("{", "could not read it"), ('{"traceEvents": []}', "found none")])
def test_what_is_no_trace(tmp_path, capsys, content, message):
    file = tmp_path / "t.json"
    file.write_text(content)
    with pytest.raises(SystemExit):
        draw_trace.main([str(file)])
    assert message in capsys.readouterr().err
