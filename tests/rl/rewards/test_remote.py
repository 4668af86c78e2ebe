"""Rewards from a service that answers, fails for a while, refuses, or is not there."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from rl.rewards.loading import RewardLoadError, load_reward
from rl.rewards.runner import RewardRunner

PATH = "rl.rewards.remote:http_reward"


class Service:
    """A real server; ``answer`` maps a request's body and its number (from 1) to a status and a body."""

    def __init__(self, answer: Callable[[dict, int], tuple[int, object]]) -> None:
        self.requests: list[dict] = []
        self.headers: list[dict] = []
        self.most = self.now = 0
        lock = threading.Lock()
        service = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    service.requests.append(body)
                    service.headers.append(dict(self.headers))
                    number = len(service.requests)
                    service.now += 1
                    service.most = max(service.most, service.now)
                status, value = answer(body, number)
                with lock:
                    service.now -= 1
                content = value if isinstance(value, bytes) else json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.handle_error = lambda *_: None  # clients that give up are what is tested
        self.url = f"http://127.0.0.1:{self._server.server_port}/score"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def serve(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    services = []

    def make(answer):
        services.append(Service(answer))
        return services[-1]

    yield make
    for service in services:
        service.stop()


def score(samples, **args):
    args = {"timeout_s": 20, "max_wait_s": 0.05} | args
    rewards = RewardRunner(load_reward(PATH, args), args, timeout_s=120)
    try:
        return rewards.score(samples)
    finally:
        rewards.close()


def samples_of(make_sample, *responses):
    return [make_sample(text, label=f"l{n}", metadata={"k": n}, index=n // 2) for n, text in enumerate(responses)]


def test_slimes_form(serve, make_sample):
    service = serve(lambda body, number: (200, len(body["response"])))
    scored = score(samples_of(make_sample, "a", "bb", "ccc"), url=service.url, headers={"X-Token": "t"})
    assert [sample.reward for sample in scored] == [1.0, 2.0, 3.0]
    sent = sorted(service.requests, key=lambda body: body["response"])[1]
    assert sent == {"prompt": "Q", "response": "bb", "label": "l1", "metadata": {"k": 1}}
    assert service.headers[0]["X-Token"] == "t"


def test_batches_and_keys(serve, make_sample):
    service = serve(lambda body, number: (200, {"rewards": [{"acc": len(s["response"])} for s in body["samples"]]}))
    samples = [make_sample("x" * n) for n in range(5)]
    scored = score(samples, url=service.url, batch_size=2, reward_key="acc")
    assert [sample.reward for sample in scored] == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert sorted(len(body["samples"]) for body in service.requests) == [1, 2, 2]


def test_what_passes_is_tried_again(serve, make_sample):
    service = serve(lambda body, number: (503, "busy") if number < 3 else (200, {"score": 1.0}))
    (scored,) = score([make_sample("a")], url=service.url)
    assert (scored.reward, scored.reward_error, len(service.requests)) == (1.0, None, 3)


@pytest.mark.parametrize(
    ("status", "body", "requests", "said"),
    [
        (500, "down", 4, "Unavailable: {url}: status 500 after 4 tries: '\"down\"'"),
        (429, "slower", 4, "status 429 after 4 tries"),
        (404, "no", 1, "ValueError: {url}: expected status 200, got 404"),
        (200, b"<html>", 1, "expected JSON, got '<html>'"),
        (200, {"other": 1}, 1, "expected an answer with score or reward, got \"{{'other': 1}}\"; set reward_key"),
        (200, None, 1, "expected a number, got NoneType"),
        (200, b"NaN", 1, "expected a finite number"),
    ],
)
def test_errors_name_the_service(serve, make_sample, status, body, requests, said):
    service = serve(lambda *_: (status, body))
    (scored,) = score([make_sample("a", metadata={"origin": "a.jsonl:3"})], url=service.url)
    assert said.format(url=service.url) in scored.reward_error
    assert scored.reward_error.endswith("(prompt from a.jsonl:3)")
    assert len(service.requests) == requests


def test_a_wrong_number_of_rewards_costs_its_group_only(serve, make_sample):
    def answer(body, number):
        short = body["samples"][0]["response"] == "short"
        return 200, [1.0] * (len(body["samples"]) - short)

    samples = samples_of(make_sample, "short", "a", "b", "c")
    scored = score(samples, url=serve(answer).url, batch_size=4)
    assert [sample.reward for sample in scored] == [0.0, 0.0, 1.0, 1.0]
    assert "expected 2 rewards, got '[1.0]'" in scored[0].reward_error


def test_nobody_there_and_a_service_that_hangs(serve, make_sample):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
        (scored,) = score([make_sample("a")], url=url, tries=2)
        assert f"{url}: no answer after 2 tries of 20 s: ConnectError" in scored.reward_error
    release = threading.Event()
    service = serve(lambda *_: (release.wait(30), (200, 1))[1])
    (scored,) = score([make_sample("a")], url=service.url, tries=2, timeout_s=0.3)
    release.set()
    assert "no answer after 2 tries of 0.3 s: ReadTimeout" in scored.reward_error


def test_connections_are_limited(serve, make_sample):
    service = serve(lambda *_: (time.sleep(0.1), (200, 1))[1])
    score([make_sample("a", index=n) for n in range(8)], url=service.url, connections=2)
    assert service.most == 2


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({}, "expected url to begin with http"),
        ({"url": "localhost:1"}, "expected url to begin with http"),
        ({"url": "http://a", "retries": 3}, "unknown reward args"),
        ({"url": "http://a", "tries": 0}, "expected tries as a whole number >= 1"),
        ({"url": "http://a", "timeout_s": "1"}, "expected timeout_s > 0"),
        ({"url": "http://a", "headers": "x"}, "expected headers as a mapping"),
    ],
)
def test_wrong_args_are_refused_at_once(args, said):
    with pytest.raises(RewardLoadError, match=said):
        load_reward(PATH, args)
