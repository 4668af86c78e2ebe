import re
import xml.etree.ElementTree as ElementTree

from megatron_ultraep.pipeline.baselines import concatenated, serial_makespan
from megatron_ultraep.pipeline.gantt import charts, page, svg
from megatron_ultraep.pipeline.problem import Problem, Schedule
from megatron_ultraep.pipeline.schedule_cli import main
from megatron_ultraep.pipeline.simulate import simulate
from tests.megatron_ultraep.pipeline.cases import random_problem
from tests.megatron_ultraep.pipeline.test_bound import two

PROBLEM = two(4, (4, 4, 5), (2, 2, 4))


def test_both_charts_hold_every_operation():
    timeline = simulate(concatenated(PROBLEM))
    fused, plain = charts(timeline)
    count = sum(len(order) for order in timeline.operations)
    assert len(fused.bars) == len(plain.bars) == count
    assert fused.makespan == timeline.makespan
    assert plain.makespan == serial_makespan(PROBLEM)
    assert [fused.peak(n) for n in range(4)] == list(timeline.peak_memory)
    drawn = ElementTree.fromstring(svg((fused, plain), PROBLEM, 100.0))
    titles = [each.text for each in drawn.iter("{http://www.w3.org/2000/svg}title")]
    assert sum("micro-batch" in text for text in titles) == 2 * count


def test_a_page_needs_nothing_but_itself():
    text = page(simulate(concatenated(PROBLEM)), "a <b> & c", "note")
    assert "a &lt;b&gt; &amp; c" in text
    assert set(re.findall(r"https?://[^\"'\s)]+", text)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"<(link|img|iframe|script)|@import|src=", text)
    assert "lower bound" in text


def test_many_nodes_and_tiny_times():
    problem = two(32, (32, 2, 1e-4), (32, 2, 5e-5))
    drawn = svg(charts(simulate(concatenated(problem))), problem)
    assert "node 31" in drawn
    assert "nan" not in drawn


def test_command_line(tmp_path, capsys):
    problem = tmp_path / "problem.json"
    problem.write_text(random_problem(1).to_json())
    schedule, out = tmp_path / "schedule.json", tmp_path / "x.html"
    given = ["--seconds", "2", "--memory-seconds", "2", "--out", str(out), "--json", str(schedule)]
    assert main([str(problem), *given]) == 0
    assert "speed-up" in capsys.readouterr().out
    assert out.read_text().startswith("<!doctype html>")
    found = Schedule.from_json(schedule.read_text())
    assert found.problem == Problem.from_json(problem.read_text())
    assert main([str(schedule), "--out", str(tmp_path / "x.svg")]) == 0
    ElementTree.parse(tmp_path / "x.svg")
