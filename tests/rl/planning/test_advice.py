"""Changes that would make a run fit: they do, and the cheapest come first."""

from rl.planning import advice as advising
from rl.planning.advice import advise, apply
from rl.planning.cluster import GIB
from rl.planning.plan import make_plan
from rl.planning.render import render
from tests.rl.planning.test_plan import QWEN, configuration


def test_what_does_not_fit_gets_the_smallest_changes():
    config = configuration(plan={"gpu": "h100", "dimensions": QWEN})
    plan = make_plan(config)
    assert not plan.fits
    found = advise(config, plan)
    assert found
    costs = []
    for each in found:
        changed = apply(config, each.change)
        assert changed is not None, f"{each.change} breaks a rule"
        again = make_plan(changed)
        memory = again.fullest if each.what.startswith("trainer") else again.engine
        assert memory.total == each.bytes <= again.limit
        costs.append(len(each.change))
    assert len({each.render() for each in found}) == len(found)
    text = render(config, plan, found)
    assert "DOES NOT FIT" in text
    assert f"would fit with ({found[0].bytes / GIB:.1f} GiB): {found[0].render()}" in text


def test_advice_prefers_what_costs_little():
    config = configuration(trainer={"recompute": "none"})
    (first, *_) = advise(config, make_plan(config))
    assert set(first.change) == {"trainer.recompute", "trainer.recompute_modules"}


def test_advice_names_no_change_when_nothing_fits(monkeypatch):
    monkeypatch.setattr(advising, "MOST_TRIED", 3)
    config = configuration(trainer={"recompute": "none", "parallel": {"ep": 1}}, plan={"gpu": "h100"})
    found = advise(config, make_plan(config))
    assert found[-1].change == {}
    assert "nothing that was tried fits" in render(config, make_plan(config), found)


def test_engines_that_do_not_fit():
    config = configuration(rollout={"kv_cache_gib": 100.0})
    plan = make_plan(config)
    assert [what for what, _ in plan.over] == ["engine GPU"]
    assert advise(config, plan)[0].change == {"rollout.kv_cache_gib": 50.0}
