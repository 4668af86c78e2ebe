"""Rewards from a service over HTTP: ``rl.rewards.remote:http_reward``.

1. A request holds one sample, ``{"prompt", "response", "label", "metadata"}``, and its answer is a number or an object
   with the reward; that is what slime's ``--rm-type remote_rm`` sends and expects. With ``batch_size`` it holds
   several, ``{"samples": [...]}``, and its answer is a list, or an object with the list ``rewards``.
2. Refused connections, lost ones, time-outs and the codes 408, 425, 429 and 5xx are tried again, with exponential
   waiting and jitter; every other code, and an answer of another form, is an error at once.
3. All calls of one event loop share one client, and so its connections.
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import httpx
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from rl.types import Sample

_RETRIED = {408, 425, 429}
_clients: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, dict[int, httpx.AsyncClient]] = (
    weakref.WeakKeyDictionary()
)


@dataclass(frozen=True)
class Remote:
    """The args of ``http_reward``.

    Attributes:
        url: of the service.
        headers: of each request, for example ``Authorization``.
        timeout_s: seconds for one try.
        tries: at most.
        max_wait_s: longest wait between two tries.
        connections: open at the same time.
        batch_size: samples of a request; None: one, in slime's form.
        reward_key: entry of the answer that is the reward; None: ``score`` or ``reward``, or the answer is a number.
    """

    url: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    timeout_s: float = 10.0
    tries: int = 4
    max_wait_s: float = 5.0
    connections: int = 64
    batch_size: int | None = None
    reward_key: str | None = None


class Unavailable(RuntimeError):
    """The service did not answer, or said that it cannot now; trying again may help."""


async def http_reward(samples: Sequence[Sample], args: Mapping[str, Any]) -> list[float | Any]:
    """The service's rewards of the samples of a prompt, in order.

    Args:
        samples: of one prompt.
        args: see ``Remote``. ``reward.timeout_s`` of the run has to leave room for all tries.

    Raises:
        ValueError: wrong args, a request that the service refuses, or an answer of another form.
        Unavailable: no answer after the last try.
    """
    remote = _remote(args)
    size = remote.batch_size or 1
    chunks = [samples[first : first + size] for first in range(0, len(samples), size)]
    answers = await asyncio.gather(*(_ask(remote, chunk) for chunk in chunks))
    return [reward for answer in answers for reward in answer]


async def _ask(remote: Remote, samples: Sequence[Sample]) -> list[Any]:
    described = [_describe(sample) for sample in samples]
    payload = described[0] if remote.batch_size is None else {"samples": described}
    answer: Any = None
    async for attempt in AsyncRetrying(
        retry=retry_if_exception_type(Unavailable),
        stop=stop_after_attempt(remote.tries),
        wait=wait_random_exponential(multiplier=0.1, max=remote.max_wait_s),
        reraise=True,
    ):
        with attempt:
            answer = await _post(remote, payload)
    if remote.batch_size is None:
        return [_reward(answer, remote)]
    rewards = answer.get("rewards") if isinstance(answer, Mapping) else answer
    if not isinstance(rewards, list) or len(rewards) != len(samples):
        raise ValueError(f"{remote.url}: expected {len(samples)} rewards, got {_shown(answer)}")
    return [_reward(reward, remote) for reward in rewards]


async def _post(remote: Remote, payload: Any) -> Any:
    try:
        response = await _client(remote.connections).post(
            remote.url, json=payload, headers=dict(remote.headers), timeout=remote.timeout_s
        )
    except httpx.InvalidURL as error:
        raise ValueError(f"{remote.url}: {error}") from error
    except httpx.TransportError as error:
        reason = f"{type(error).__name__} {error}".strip()
        raise Unavailable(
            f"{remote.url}: no answer after {remote.tries} tries of {remote.timeout_s:g} s: {reason}"
        ) from error
    code = response.status_code
    if code in _RETRIED or code >= 500:
        raise Unavailable(f"{remote.url}: status {code} after {remote.tries} tries: {_shown(response.text)}")
    if not response.is_success:
        raise ValueError(f"{remote.url}: expected status 200, got {code}: {_shown(response.text)}")
    try:
        return response.json()
    except ValueError:
        raise ValueError(f"{remote.url}: expected JSON, got {_shown(response.text)}") from None


def _client(connections: int) -> httpx.AsyncClient:
    clients = _clients.setdefault(asyncio.get_running_loop(), {})
    if connections not in clients:
        limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
        clients[connections] = httpx.AsyncClient(limits=limits)
    return clients[connections]


def _describe(sample: Sample) -> dict[str, Any]:
    return {
        "prompt": sample.prompt.text,
        "response": sample.response_text,
        "label": sample.prompt.label,
        "metadata": dict(sample.prompt.metadata),
    }


def _reward(answer: Any, remote: Remote) -> Any:
    """The number in an answer; the runner checks that it is one."""
    if not isinstance(answer, Mapping):
        return answer
    names = [remote.reward_key] if remote.reward_key else ["score", "reward"]
    for name in names:
        if name in answer:
            return answer[name]
    raise ValueError(
        f"{remote.url}: expected an answer with {' or '.join(names)}, got {_shown(answer)}; set reward_key"
    )


def _shown(value: Any) -> str:
    text = str(value)
    return repr(text if len(text) <= 200 else text[:197] + "...")


def _remote(args: Mapping[str, Any]) -> Remote:
    known = {f.name for f in fields(Remote)}
    if unknown := set(args) - known:
        raise ValueError(f"unknown reward args {sorted(unknown)}; known are {sorted(known)}")
    remote = Remote(**args)
    if not isinstance(remote.url, str) or not remote.url.startswith(("http://", "https://")):
        raise ValueError(f"expected url to begin with http:// or https:// in the reward's args, got {remote.url!r}")
    for name in ("timeout_s", "max_wait_s"):
        value = getattr(remote, name)
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise ValueError(f"expected {name} > 0 in the reward's args, got {value!r}")
    for name in ("tries", "connections", *(["batch_size"] if remote.batch_size is not None else [])):
        value = getattr(remote, name)
        if type(value) is not int or value < 1:
            raise ValueError(f"expected {name} as a whole number >= 1 in the reward's args, got {value!r}")
    if not isinstance(remote.headers, Mapping):
        raise ValueError(f"expected headers as a mapping in the reward's args, got {remote.headers!r}")
    return remote


def _check_args(args: Mapping[str, Any]) -> None:
    _remote(args)


http_reward.check_args = _check_args  # type: ignore[attr-defined]
