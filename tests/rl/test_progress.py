import io

from rl.progress import Progress, summary

METRICS = {
    "rollout/reward/mean": 0.5,
    "perf/tokens_per_second": 1234.5,
    "train/loss": 3.0,
    "rollout/response_length/mean": float("nan"),
}


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_summary_shows_what_is_there():
    assert summary(METRICS) == "reward 0.500  tokens/s 1,234"
    assert summary({}) == ""


def test_one_line_per_step_without_a_terminal():
    stream = io.StringIO()
    with Progress(3, "train", stream=stream) as progress:
        progress.phase("generate")
        progress.update(1, METRICS)
        progress.note("checkpoint of step 1")
        progress.update(2, {})
    assert stream.getvalue() == "train 1/3  reward 0.500  tokens/s 1,234\ncheckpoint of step 1\ntrain 2/3  \n"


def test_a_bar_on_a_terminal():
    stream = Terminal()
    with Progress(5, "train", initial=2, stream=stream) as progress:
        progress.phase("generate")
        progress.update(3, METRICS)
        progress.update(5, METRICS)
        progress.note("hello")
    text = stream.getvalue()
    assert "train: generate" in text
    assert "5/5" in text
    assert "reward 0.500" in text
    assert "hello" in text


def test_disabled_is_silent():
    stream = io.StringIO()
    with Progress(3, enabled=False, stream=stream) as progress:
        progress.phase("x")
        progress.update(1, METRICS)
        progress.note("x")
    assert stream.getvalue() == ""


def test_total_unknown():
    stream = io.StringIO()
    with Progress(None, "warm-up", stream=stream) as progress:
        progress.update(7, {"warmup/loss": 1.5})
    assert stream.getvalue() == "warm-up 7  loss 1.500\n"
