import json
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest

from rl.charts import SERIES_COUNT, Series, line_chart, stacked_chart
from rl.evaluation import write_eval
from rl.ledger import Ledger, LedgerError, StepRecord
from rl.metrics import MetricLogger
from rl.report import LINE_PANELS, render, wilson_interval, write_report
from tests.rl.test_config import BASE
from tests.rl.test_evaluation import make_sample

VERSIONS = {"python": "3.11.0", "torch": "2.13.0+cpu", "vllm": None}


def make_run(directory, steps, *, outcome="finished", config=BASE, timings=True):
    facts = {"versions": VERSIONS, "topology": {}, "data_digests": {}}
    ledger = Ledger.create(directory, config=config, seeds={}, **facts)
    for step in range(1, steps + 1):
        ledger.append(StepRecord(step, step, 0, ((0, step),), (), timings={"generate": 1.0} if timings else {}))
    if outcome:
        ledger.finish(outcome, "engine 0 <did> not answer" if outcome == "failed" else "")
    ledger.close()


def all_metrics(step):
    values = {line.metric: 0.5 + step for panel in LINE_PANELS for line in panel.lines if panel.axis == "step"}
    return values | {"perf/time/generate": 1.0, "perf/time/train": 2.0}


class Page(HTMLParser):
    """Tags, links and text of a page; complains about tags that are not closed."""

    VOID = frozenset({"meta", "br", "link", "img"})

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.links, self.ids, self.text = [], [], [], [], []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        attributes = dict(attrs)
        self.links += [attributes[name] for name in ("src", "href", "xlink:href") if name in attributes]
        self.ids += [attributes["id"]] if "id" in attributes else []
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_data(self, data):
        self.text.append(data)


def page(directory):
    html = write_report(directory).read_text()
    return Page(html), html


@pytest.mark.parametrize("steps", [1, 2, 150])
def test_a_whole_run(tmp_path, steps):
    make_run(tmp_path, steps)
    with MetricLogger(tmp_path) as metrics:
        for step in range(1, steps + 1):
            metrics.log(step, all_metrics(step))
            metrics.log(step, {"warmup/loss": 1.0}, axis="warmup_step")
    found, html = page(tmp_path)
    assert found.tags.count("figure") == len(LINE_PANELS) + 1
    assert "Not recorded" not in html
    assert "finished" in html
    assert "2.13.0+cpu" in html
    assert "vllm" not in html.split("Versions")[1].split("Full configuration")[0]


def test_the_page_is_self_contained(tmp_path):
    make_run(tmp_path, 2)
    with MetricLogger(tmp_path) as metrics:
        for step in (1, 2):
            metrics.log(step, all_metrics(step))
    found, html = page(tmp_path)
    assert all(link.startswith("#") for link in found.links)
    assert "script" not in found.tags
    assert "link" not in found.tags
    assert not re.search(r"@import|url\((?!#)", html)
    assert len(found.ids) == len(set(found.ids))
    assert {link[1:] for link in found.links} <= set(found.ids)


def test_missing_metrics_are_named(tmp_path):
    make_run(tmp_path, 3, timings=False)
    with MetricLogger(tmp_path) as metrics:
        metrics.log(1, {"rollout/reward/mean": 0.5, "train/entropy": float("nan")})
    found, html = page(tmp_path)
    assert found.tags.count("figure") == 1
    missing = html.split("Not recorded in this run:")[1].split("</p>")[0]
    assert "entropy of the policy" in missing
    assert "time by phase" in missing
    assert "reward" not in missing


def test_a_run_without_any_step(tmp_path):
    make_run(tmp_path, 0, outcome=None)
    _, html = page(tmp_path)
    assert "No step has been recorded yet." in html
    assert "running, or killed" in html


def test_timings_of_the_ledger_stand_in_for_metrics(tmp_path):
    make_run(tmp_path, 2)
    assert "Time by phase" in render(tmp_path).split("Not recorded")[0]


def test_evaluations_thresholds_and_samples(tmp_path):
    config = {**BASE, "evaluation": {"success": {"before_max": 0.3, "after_min": 0.6}}}
    make_run(tmp_path, 2, outcome="thresholds", config=config)
    hostile = "<script>alert('x')</script> & \x07"
    label = {"task": "chain_sum", "entry": {"answer": "fourty-two", "question": "hidden"}}
    for step, right in ((0, 2), (2, 5)):
        write_eval(
            tmp_path,
            step,
            [make_sample(i, float(i < right), response=hostile, text=hostile * 200, label=label) for i in range(10)],
        )
    found, html = page(tmp_path)
    assert "script" not in found.tags
    assert "&lt;script&gt;" in html
    assert "fourty-two" in html
    assert "hidden" not in html
    rows = html.split("Held-out evaluation")[1].split("</table>")[0]
    assert "20.0%" in rows
    assert "5.7% to 51.0%" in rows
    assert re.search(r"at most 30.0%.*?met", rows)
    assert re.search(r"at least 60.0%.*?missed", rows)
    assert "20.0% → 50.0%" in html
    assert "accuracy threshold missed" in html
    # Prompts whose reward changed are the ones shown first: samples 2, 3, 4 were wrong and became right.
    assert html.count("step 0, reward 0.00") == 3


def test_several_samples_of_each_prompt(tmp_path):
    make_run(tmp_path, 2)
    for step, right in ((0, 1), (2, 3)):
        samples = [make_sample(i, float(k < right), sample_id=f"eval/0/{i}/{k}") for i in range(10) for k in range(4)]
        write_eval(tmp_path, step, samples)
    _, html = page(tmp_path)
    rows = html.split("Held-out evaluation")[1].split("</table>")[0]
    assert "pass@k" in rows
    assert "25.0% @1, 50.0% @2, 100.0% @4" in rows
    assert "75.0% @1, 100.0% @2, 100.0% @4" in rows
    assert "25.0% → 75.0%" in html
    assert ">10<" in rows


def test_sessions_and_failure(tmp_path):
    make_run(tmp_path, 3, outcome=None)
    facts = {"versions": VERSIONS, "topology": {}, "data_digests": {}}
    with Ledger.resume(tmp_path, checkpoint_step=1, config=BASE, **facts) as ledger:
        ledger.finish("failed", "engine 0 <did> not answer")
    _, html = page(tmp_path)
    assert "engine 0 &lt;did&gt; not answer" in html
    sessions = html.split("<h2>Sessions")[1].split("</table>")[0]
    assert "2, 3" in sessions
    assert "2 sessions" in html


def test_the_report_does_not_change_the_run(tmp_path):
    make_run(tmp_path, 1)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    write_report(tmp_path)
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name != "report.html"}
    assert after == before


def test_no_run(tmp_path):
    with pytest.raises(LedgerError):
        write_report(tmp_path)


def test_a_damaged_last_metrics_line_is_left_out(tmp_path):
    make_run(tmp_path, 1)
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "train/entropy": 1.0}) + '\n{"step": 2, "tr')
    assert "Entropy" in render(tmp_path)


def test_charts_follow_the_theme_and_parse():
    svg = line_chart("a", [Series("x", [(1, 1.0), (2, float("inf")), (3, 2.0)]), Series("none", [])])
    ET.fromstring(svg)
    assert "var(--c0)" in svg
    assert "var(--c1)" not in svg
    assert "currentColor" in svg
    assert not re.search(r"#[0-9a-f]{6}", svg)
    assert 'id="a-' in svg
    assert svg == line_chart("a", [Series("x", [(1, 1.0), (2, float("inf")), (3, 2.0)]), Series("none", [])])


def test_log_scale_falls_back_when_a_value_is_not_positive():
    assert "10^" not in line_chart("a", [Series("x", [(1, 0.0), (2, 1.0)])], log_scale=True)
    ET.fromstring(line_chart("a", [Series("x", [(1, 1e-6), (2, 1e-3)])], log_scale=True))


def test_stacked_chart_sums_small_parts_and_groups_many_steps():
    parts = {f"phase {index}": [float(index)] * 130 for index in range(12)}
    svg = stacked_chart("time", range(1, 131), parts)
    ET.fromstring(svg)
    assert "other" in svg
    assert "a bar is the mean of 3" in svg
    assert f"var(--c{SERIES_COUNT - 1})" in svg
    assert "phase 11" in svg
    assert "phase 3<" not in svg


def test_wilson_interval():
    low, high = wilson_interval(0.5, 100)
    assert (round(low, 4), round(high, 4)) == (0.4038, 0.5962)
    assert wilson_interval(0.0, 10)[0] == 0.0
    assert wilson_interval(1.0, 10)[1] == 1.0
