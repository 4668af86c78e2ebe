"""The traces in the repository are whole: their checksums hold, and they are what their README says."""

import hashlib
import re
from pathlib import Path

import numpy as np
import pytest

from megatron_ultraep.replay import RoutingTrace, histogram

DATA = Path(__file__).resolve().parents[3] / "benchmarks" / "data"
MOST_BYTES = 5_000_000
TRACES = sorted(DATA.glob("*.safetensors"))


def readme_row(path):
    """Samples, rows, bytes and sha256 of a file as the README has them."""
    row = re.search(rf"^\| `{re.escape(path.name)}` \|(.*)\|$", (DATA / "README.md").read_text(), re.MULTILINE)
    assert row, f"{path.name} is not in the README"
    _, samples, rows, size, digest = (cell.strip().strip("`").replace(",", "") for cell in row[1].split("|"))
    return int(samples), int(rows), int(size), digest


def test_there_are_traces():
    assert TRACES
    assert sum(path.stat().st_size for path in TRACES) <= MOST_BYTES


@pytest.mark.parametrize("path", TRACES, ids=lambda path: path.stem)
def test_recorded_trace_is_whole(path):
    samples, rows, size, digest = readme_row(path)
    assert path.stat().st_size == size
    assert hashlib.sha256(path.read_bytes()).hexdigest() == digest
    trace = RoutingTrace.load(path)  # checks its own checksum and every row
    assert len(trace.samples) == samples
    assert sum(len(s.routes) for s in trace.samples) == rows
    assert (trace.experts, trace.topk, trace.moe_layers) == (128, 8, 4)
    assert {len(s.weight_versions) for s in trace.samples} == {1}
    assert all(1 <= s.prompt_length <= len(s.routes) for s in trace.samples)
    total = sum(histogram(s.routes, trace.experts).astype(np.int64) for s in trace.samples)
    np.testing.assert_array_equal(total, trace.histogram())
    assert (total.sum(axis=1) == rows * trace.topk).all()
