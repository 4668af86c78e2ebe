import re
import shutil
import subprocess

import numpy as np
import pytest

from megatron_ultraep.layout import ExpertLayout
from megatron_ultraep.telemetry import Recorder
from megatron_ultraep.telemetry.view import main
from tests.megatron_ultraep.telemetry.plans import key, make_plan
from tests.megatron_ultraep.telemetry.test_whatif import make_trace

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome in PATH")


def write_run(directory, layout, steps=4, microbatches=2, layers=2, **options):
    """Of many layers, only the first ones have plans of their own."""
    with Recorder(directory, max_mib=8, name="ep0-pp0", meta={"model": "tiny <b>"}) as r:
        for step in range(steps):
            for mb in range(microbatches):
                for layer in range(layers):
                    if layer < 3:
                        plan = make_plan(layout, seed=step * 31 + mb * 7 + layer, **options)
                    r.record(key(step, mb), layer, plan)
    return directory


def write_page(*arguments):
    assert main([str(a) for a in arguments]) == 0


def dump(path, tmp_path, fragment=""):
    """The page's document after its script ran, and what the browser's console said."""
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1200,900", "--enable-logging=stderr",
         f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", f"file://{path}{fragment}"],
        capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
    console = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    return done.stdout.partition('<script type="application/json"')[0], done.stdout, console


def test_the_page_needs_nothing_but_itself(tmp_path, capsys):
    write_page(write_run(tmp_path / "run", ExpertLayout(16, 4, slots=1)))
    page = (tmp_path / "run" / "loads.html").read_text()
    assert "wrote" in capsys.readouterr().out
    addresses = set(re.findall(r"https?://[^\"'\s)]+", page))
    assert addresses == {"http://www.w3.org/2000/svg"}, "only the name of SVG, which nothing fetches"
    assert not re.search(r"<(link|img|iframe)|@import|src=", page)


@needs_chromium
def test_drill_down_renders(tmp_path):
    layout = ExpertLayout(16, 4, tuple(np.random.default_rng(0).permutation(16).tolist()), 2, 1)
    write_page(write_run(tmp_path / "run", layout), "--out", tmp_path / "x.html")
    body, document, console = dump(tmp_path / "x.html", tmp_path, "#record=3")
    assert console == []
    assert 'data-ready="true"' in document
    assert '<ul class="warnings" id="warnings"></ul>' in body
    assert "model: tiny &lt;b&gt;" in body
    plan = make_plan(layout, seed=7 + 1)  # record 3: step 0, micro-batch 1, layer 1
    assert "step 0, micro-batch 1, layer 1" in body
    before, after = (x.max() / x.mean() for x in (plan.before, plan.after))
    assert f"imbalance {before:.3f} → {after:.3f}" in body
    for expert, rank, slot in plan.replicas:
        assert re.search(
            rf"rank {rank}, expert {expert} \(replica in slot {slot}; home rank \d+\): [\d,]+ tokens", body
        )
        assert f"expert {expert}: rank {layout.home_rank(expert)} to slot {slot} of rank {rank}" in body
    assert body.count('class="copy"') == body.count('class="replica"') == len(plan.replicas) > 0
    for decision in plan.decisions:
        assert f'<td class="n">{decision.before:,}</td>' in body
    assert "<option" in body
    assert "replicas were made" in body


KEYS_AND_SELECTS = """<script>
const press = (key) => document.querySelector("#heat canvas").dispatchEvent(new KeyboardEvent("keydown", { key }));
const choose = (id, value) => { $(id).value = value; $(id).dispatchEvent(new Event("change")); };
choose("quantity", "replicas");
document.querySelector("#heat canvas").dispatchEvent(new Event("focus"));
press("ArrowDown"); press("ArrowRight"); press("ArrowRight"); press("Enter");
document.body.dataset.afterKeys = $("detail-facts").textContent;
choose("choice", "sample"); choose("layer", "0");
const listed = [...$("record").options].map((option) => option.textContent);
const ofLayer = listed.filter((text) => text.includes("layer 0")).length;
document.body.dataset.afterSelects = `${listed.length}, ${ofLayer} of layer 0`;
$("next").click();
document.body.dataset.afterNext = $("record").selectedIndex;
choose("pass", "1");
document.body.dataset.afterPass = $("detail-facts").textContent;
</script>"""


@needs_chromium
def test_keys_and_selects_reach_everything(tmp_path):
    with Recorder(tmp_path / "run", max_mib=1, name="a") as r:
        for step in range(4):
            for layer in range(3):
                for pass_ in ("train", "eval"):
                    r.record(key(step, pass_=pass_), layer, make_plan(seed=step * 3 + layer))
    write_page(tmp_path / "run", "--out", tmp_path / "x.html")
    page = (tmp_path / "x.html").read_text()
    (tmp_path / "y.html").write_text(page.replace("</body>", KEYS_AND_SELECTS + "</body>"))
    _, document, console = dump(tmp_path / "y.html", tmp_path)
    assert console == []
    said = dict(re.findall(r'data-after-(\w+)="([^"]*)"', document))
    assert said["keys"].startswith("actor / train, step 2, micro-batch 0, layer 1")
    assert said["selects"] == "4, 4 of layer 0"
    assert said["next"] == "1"
    assert said["pass"].startswith("actor / eval")


ODD = {
    "one rank without slots, one step": (ExpertLayout(4, 1), {"steps": 1}),
    "no tokens": (ExpertLayout(8, 4, slots=1), {"tokens": 0}),
    "512 ranks, 60 layers": (ExpertLayout(512, 512, node_size=8, slots=2), {"steps": 2, "tokens": 600, "layers": 60}),
}


@needs_chromium
@pytest.mark.parametrize("name", ODD)
def test_odd_runs_render(name, tmp_path):
    layout, options = ODD[name]
    write_page(write_run(tmp_path / "run", layout, **options), "--out", tmp_path / "x.html")
    assert (tmp_path / "x.html").stat().st_size < 5_000_000
    body, document, console = dump(tmp_path / "x.html", tmp_path)
    assert console == []
    assert 'data-ready="true"' in document
    assert "NaN" not in body
    assert "undefined" not in body
    assert body.count("<title>rank ") >= (0 if name == "no tokens" else layout.ranks)


@needs_chromium
def test_an_empty_run_and_torn_chunks_are_said(tmp_path):
    run = write_run(tmp_path / "run", ExpertLayout(8, 4, slots=1))
    (run / "ep0-pp0.000000.loads.npz").write_bytes(b"torn")
    write_page(run, "--out", tmp_path / "x.html")
    body, _, console = dump(tmp_path / "x.html", tmp_path)
    assert console == []
    assert "There are no load records to show" in body
    assert "ep0-pp0.000000.loads.npz" in body


@needs_chromium
def test_a_trace_renders(tmp_path):
    make_trace((30, 40, 50, 60)).save(tmp_path / "t.safetensors")
    options = ["--ep", 2, "--tokens-per-microbatch", 60, "--min-tokens", 1, "--tolerance", 0]
    write_page(tmp_path / "t.safetensors", *options, "--slots", 1)
    body, document, console = dump(tmp_path / "t.html", tmp_path)
    assert console == []
    assert 'data-ready="true"' in document
    assert ">micro-batch</text>" in body
    assert "4 samples" in body
    assert float(re.search(r"<b>([\d.]+)</b><span>replicas per micro-batch", body)[1]) > 0

    write_page(tmp_path / "t.safetensors", *options)
    assert '"slots":0' in (tmp_path / "t.html").read_text()


def test_errors_say_what_was_expected(tmp_path, capsys):
    make_trace().save(tmp_path / "t.safetensors")
    run = write_run(tmp_path / "run", ExpertLayout(8, 4, slots=1), steps=1)
    for arguments, message in (
        ([tmp_path / "t.safetensors"], "--ep: expected the number of expert-parallel ranks"),
        ([tmp_path / "t.safetensors", "--ep", 3], "divides the 8 experts: one of 1, 2, 4, 8"),
        ([tmp_path / "t.safetensors", "--ep", 2, "--tokens-per-microbatch", 3], "raise tokens_per_micro_batch"),
        ([run, "--ep", 2], "to try another layout: ultraep-plan"),
        ([run, "--out", tmp_path / "missing" / "x.html"], "No such file or directory"),
        ([tmp_path / "nothing"], "no such file"),
    ):
        with pytest.raises(SystemExit) as end:
            main([str(a) for a in arguments])
        assert end.value.code == 2
        assert message in " ".join(capsys.readouterr().err.split())
