import json

import numpy as np
import pytest

from megatron_ultraep.layout import ExpertLayout
from megatron_ultraep.telemetry import page
from megatron_ultraep.telemetry.blocks import Shape, pack, row
from megatron_ultraep.telemetry.page import collect, render
from tests.megatron_ultraep.telemetry.plans import key, make_plan


def blocks(layout, steps, microbatches=1, layers=2, per_block=50, **options):
    rows = [row(key(step, mb), layer, make_plan(layout, seed=step * 31 + mb * 7 + layer, **options))
            for step in range(steps) for mb in range(microbatches) for layer in range(layers)]  # fmt: skip
    return [pack(rows[i : i + per_block], Shape.of(layout), group="g") for i in range(0, len(rows), per_block)]


LAYOUT = ExpertLayout(16, 4, node_size=2, slots=1)


def test_aggregates_count_every_record_whatever_the_blocks():
    several, one = (collect(blocks(LAYOUT, 60, 2, per_block=n)).data("t") for n in (7, 1000))
    assert several["total"] == one["total"] == 240
    (a,), (b,) = several["series"], one["series"]
    assert a == b
    before = [make_plan(LAYOUT, seed=5 * 31 + mb * 7 + layer).before for mb in range(2) for layer in range(2)]
    ratios = [x.max() / x.mean() for x in before]
    assert a["bins"][5] == [5, 5]
    assert a["before"][5][2] == pytest.approx(np.median(ratios), abs=2e-3)
    assert a["before"][5][5] == pytest.approx(max(ratios), abs=2e-3)
    assert a["heat"]["before"][0][5] == pytest.approx(np.mean(ratios[::2]), abs=2e-3)
    assert sum(count for count, *_ in a["decisions"]) == 480


def test_many_steps_share_bins():
    data = collect(blocks(LAYOUT, 700, layers=1)).data("t")
    (series,) = data["series"]
    assert len(series["bins"]) <= page.MOST_BINS
    assert series["bins"][0] == [0, 2]
    assert series["bins"][-1][1] == 699


def test_the_choice_holds_the_worst_and_every_layer():
    found = blocks(LAYOUT, 100, 2, layers=3)
    data = collect(found).data("t")
    before = np.concatenate([page.imbalances(b.rank_before()) for b in found])
    after = np.concatenate([page.imbalances(b.rank_after()) for b in found])
    for name, values in (("before", before), ("after", after)):
        chosen = [r for r in data["records"] if name in r["why"]]
        assert len(chosen) == 40
        worst = int(values.argmax())
        assert any((r["step"], r["microbatch"], r["layer"]) == (worst // 6, worst % 6 // 3, worst % 3) for r in chosen)
    assert {r["layer"] for r in data["records"] if "layer" in r["why"]} == {0, 1, 2}
    assert sum("sample" in r["why"] for r in data["records"]) == 120


def test_what_was_left_alone_is_chosen():
    data = collect(blocks(ExpertLayout(16, 4), 3)).data("t")
    assert sum("skipped" in r["why"] for r in data["records"]) == 6


def test_the_page_is_bounded_for_large_layouts_that_change(monkeypatch):
    rng = np.random.default_rng(0)
    layout = ExpertLayout(2048, 512, node_size=8, slots=2)
    one = row(key(), 0, make_plan(layout, tokens=2000))
    rows = [
        one._replace(key=key(step), layer=step % 3, home_slot=tuple(rng.permutation(2048).tolist()))
        for step in range(200)
    ]
    data = collect([pack(rows, Shape.of(layout))]).data("t")
    assert len(data["records"]) >= 10
    assert len(data["layouts"]) == len(data["records"])
    assert len(json.dumps(data)) < 4_000_000
    monkeypatch.setattr(page, "MOST_RECORD_BYTES", 100_000)
    data = collect([pack(rows, Shape.of(layout))]).data("t")
    assert 1 <= len(data["records"]) <= 6
    assert len(data["layouts"]) == len(data["records"])


def test_one_step_is_shown_by_micro_batch():
    assert collect(blocks(LAYOUT, 1, 4)).data("t")["axis"] == "micro-batch"
    assert collect(blocks(LAYOUT, 2, 4)).data("t")["axis"] == "step"
    assert collect([]).data("t")["series"] == []


def test_text_of_the_run_cannot_leave_the_script():
    html = render({"title": "</script><b>"}, "/*css*//*js*/<script>/*data*/</script>", "c", "j")
    assert html.count("</script>") == 1
    assert json.loads(html.split("<script>")[1].split("</script>")[0])["title"] == "</script><b>"
    with pytest.raises(ValueError, match="in the template"):
        render({}, "", "", "")
