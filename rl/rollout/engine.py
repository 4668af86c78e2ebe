"""One rollout engine: tokens in; tokens, log-probs, routes and weight versions out.

In a process of its own it is a Ray actor (``actor.EngineActor``); the same class in-process, for tests:

    engine = RolloutEngine(EngineConfig(model_path=...))
    await engine.start()
    samples = await engine.generate(prompt, ["train/0/0/0", "train/0/0/1"], Sampling(max_tokens=64), seed=1)
    await engine.update_weights(1, chunks, manifest)
    await engine.stop()

Invariants:

1. Every response token's log-prob is that of the policy it was drawn from, temperature included.
2. Routes have one row per token but the last, one entry per MoE layer, in the smallest unsigned type. A row that was
   computed twice is the one computed first.
3. What fails validation is generated again with another seed, at most ``max_regenerations`` times, and then comes
   back as a ``RefusedSample``.
4. Weights change only between two steps; afterwards no key or value of the old weights is used again.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import time
from collections.abc import Awaitable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np

from megatron_ultraep.replay import histogram, layer_digests
from megatron_ultraep.runtime.profiler import ProfileSettings
from rl.rollout import compat, model_files, routes, validation, weights
from rl.rollout.building import build
from rl.rollout.config import Device, EngineConfig, Sampling, derive_seed, engine_environment
from rl.rollout.ranks import call_ranks
from rl.rollout.stepper import EngineFailed, EngineThread, Request
from rl.rollout.validation import RefusedSample
from rl.transfer.links import Membership
from rl.transfer.staging import StagingHandles
from rl.types import Prompt, RouteRef, Sample

_log = logging.getLogger(__name__)
T = TypeVar("T")
RouteSlice = tuple[RouteRef, int, int, int, int]
RouteRows = tuple[RouteRef, int, int]


class EngineTimeout(TimeoutError):
    """An engine did not answer within its limit; the message names it and what was waited for."""


@dataclass(frozen=True)
class EngineInfo:
    """What an engine turned out to be.

    Attributes:
        vllm_version: of the installed distribution.
        moe_layers: indices of the MoE layers among all decoder layers; empty for a dense model.
        experts, topk: of each MoE layer; 0 for a dense model.
        start_s: seconds that the start took.
        pid: process id.
        kv_tokens: tokens whose keys and values the cache holds.
        rank_pids: processes of its tensor-parallel ranks; empty when the only one is in the engine's process.
    """

    vllm_version: str
    moe_layers: tuple[int, ...]
    experts: int
    topk: int
    start_s: float
    pid: int
    kv_tokens: int = 0
    rank_pids: tuple[int, ...] = ()


@dataclass
class Counters:
    """What an engine did since it started."""

    samples: int = 0
    response_tokens: int = 0
    cached_prompt_tokens: int = 0
    refused: int = 0
    regenerated: int = 0
    updates: int = 0


class RolloutEngine:
    """See the module's docstring.

    Args:
        config: settings of the engine.
        index: place among its pool's engines; it is in every ``RouteRef`` and every error.
    """

    def __init__(self, config: EngineConfig, index: int = 0) -> None:
        self.config = config
        self.index = index
        self.counters = Counters()
        self.info: EngineInfo | None = None
        self._thread: EngineThread | None = None
        self._up = asyncio.Event()
        self._torn: str | None = None
        self._weights_awake = False  # while the rest sleeps
        self._tokenizer: Any = None
        self._end_tokens: tuple[int, ...] = ()
        self._manifest: dict[str, tuple[int, ...]] = {}
        self._optional: tuple[str, ...] = ()
        self._exchanged = False  # what draws tokens, see ``sampling.install``
        self._finished: dict[str, Sample] = {}  # of groups that still run
        _set_environment(config.device)

    # ------------------------------------------------------------------ life

    async def start(self) -> EngineInfo:
        """Load the model; returns what it is.

        Raises:
            UntestedVersion: of vLLM, unless ``allow_untested``.
            EngineTimeout: not up within ``start_timeout_s``.
        """
        started = time.monotonic()
        version = compat.check_version(self.config.allow_untested, self.config.device)
        path = Path(self.config.model_path)
        self._manifest = weights.checkpoint_manifest(path)
        self._optional = ("lm_head.weight",) if weights.ties_embeddings(path) else ()
        self._end_tokens = model_files.end_tokens(path)
        self._thread = EngineThread(self._build, self.config.initial_version, f"rollout-engine-{self.index}")
        await self._wait(self._thread.ready, self.config.start_timeout_s, "its start")
        self._tokenizer = await asyncio.to_thread(model_files.load_tokenizer, path)
        shape = await self._call(_describe, self.config.start_timeout_s, "its model's shape")
        moe_layers, experts, topk, kv_tokens = shape
        seconds = time.monotonic() - started
        pids = self._thread.rank_pids
        self.info = EngineInfo(version, moe_layers, experts, topk, seconds, os.getpid(), kv_tokens, pids)
        self._up.set()
        return self.info

    def _build(self) -> Any:
        engine = build(self.config)
        self._exchanged = self._exchange_sampler(engine)
        return engine

    def _exchange_sampler(self, engine: Any) -> bool:
        """See ``sampling.install``."""
        from rl.rollout import sampling  # imports torch

        return all(call_ranks(engine, sampling.install))

    async def stop(self) -> None:
        """End the engine and free its memory; running requests fail with ``EngineFailed``.

        Raises:
            EngineTimeout: its thread did not end within ``stop_timeout_s``.
        """
        thread, self._thread = self._thread, None
        if thread is not None and not await asyncio.to_thread(thread.stop, self.config.stop_timeout_s):
            raise EngineTimeout(f"engine {self.index}: did not stop within {self.config.stop_timeout_s:g} s")

    def health(self) -> dict[str, Any]:
        """Whether the engine serves, and what it did; never waits."""
        thread = self._thread
        return {
            "engine": self.index,
            "pid": os.getpid(),
            "alive": thread is not None and thread.failure is None and self.info is not None,
            "failure": None if thread is None or thread.failure is None else repr(thread.failure),
            "torn": self._torn,
            "running": 0 if thread is None else thread.running,
            "weight_version": None if thread is None else thread.version,
            **vars(self.counters),
        }

    # ------------------------------------------------------------------ generation

    async def generate(
        self, prompt: Prompt, sample_ids: Sequence[str], sampling: Sampling, seed: int
    ) -> list[Sample | RefusedSample]:
        """Draw a group of samples of one prompt; the same (seed, sample id) draws with the same random stream.

        Args:
            prompt: what to answer.
            sample_ids: one per sample, unique among running ones.
            sampling: how to draw.
            seed: of the run or iteration.

        Returns:
            One entry per sample id, in their order.

        Raises:
            EngineTimeout: not all done within ``generate_timeout_s``; what ran was aborted.
            EngineFailed: the engine died; ``RankDied`` if the process of one of its ranks did.
            TornWeights: a weight update broke off and was not repeated.
        """
        work = [self._sample(prompt, sample_id, sampling, seed, None) for sample_id in sample_ids]
        return await self._group(work, sample_ids, f"{len(sample_ids)} samples of prompt {prompt.uid}")

    async def continue_samples(
        self, samples: Sequence[Sample], sampling: Sampling, seed: int
    ) -> list[Sample | RefusedSample]:
        """Go on with samples that were aborted, on this or another engine, from their prompt and response so far.

        Keys and values are computed again from the tokens; tokens, log-probs, version spans and routes of the part
        before stay as they are, and what comes is appended. ``sampling.max_tokens`` counts the whole response. With the
        seed of ``generate``, and on the same kind of device, they draw with the random numbers they would have had.
        """
        for sample in samples:
            if sample.finish_reason != "abort":
                raise ValueError(f"sample {sample.sample_id} ended with {sample.finish_reason!r}, not 'abort'")
        work = [self._sample(sample.prompt, sample.sample_id, sampling, seed, sample) for sample in samples]
        return await self._group(work, [s.sample_id for s in samples], f"continuing {len(samples)} samples")

    async def abort(self, sample_ids: Sequence[str]) -> int:
        """End samples now; their ``generate`` returns what they have, with finish reason "abort".

        Returns how many were running.
        """
        # What was asked for before this has not reached the engine's thread yet if it came in the same round.
        await asyncio.sleep(0)
        return await self._wait(self._live().abort(list(sample_ids)), self.config.update_timeout_s, "aborting samples")

    async def progress(self) -> dict[str, int]:
        """Response tokens so far of every running sample."""
        return await self._wait(self._live().progress(), self.config.update_timeout_s, "the progress of its samples")

    async def step_times(self) -> dict[int, tuple[int, float]]:
        """See ``EngineThread.step_times``; by samples that ran in the step, at most ``max_num_seqs``."""
        found: dict[int, tuple[int, float]] = {}
        taken = await self._wait(self._live().step_times(), self.config.update_timeout_s, "the times of its steps")
        for running, (steps, seconds) in taken.items():
            seats = min(running, self.config.max_num_seqs)
            before = found.get(seats, (0, 0.0))
            found[seats] = before[0] + steps, before[1] + seconds
        return found

    async def unfinished(self, sample_ids: Sequence[str]) -> dict[str, int]:
        """Response tokens so far of those of its samples that have not ended, queued ones included."""
        running = await self.progress()
        return {name: running.get(name, 0) for name in sample_ids if name not in self._finished}

    def finished(self, sample_ids: Sequence[str]) -> list[Sample | None]:
        """Those of its samples that have ended, of groups that still run; None for the others. Never waits."""
        return [self._finished.get(name) for name in sample_ids]

    async def _group(
        self, work: Sequence[Awaitable[Sample | RefusedSample]], sample_ids: Sequence[str], what: str
    ) -> list[Sample | RefusedSample]:
        tasks = [asyncio.ensure_future(item) for item in work]
        try:
            async with asyncio.timeout(self.config.generate_timeout_s):
                return list(await asyncio.gather(*tasks))
        except TimeoutError as error:
            raise EngineTimeout(
                f"engine {self.index}: waited {self.config.generate_timeout_s:g} s for {what}; "
                "raise generate_timeout_s or lower max_tokens"
            ) from error
        finally:
            for sample_id in sample_ids:
                self._finished.pop(sample_id, None)
            if not all(task.done() for task in tasks):
                for task in tasks:
                    task.cancel()
                if self._thread is not None:
                    self._thread.abort(list(sample_ids))

    async def _sample(
        self, prompt: Prompt, sample_id: str, sampling: Sampling, seed: int, before: Sample | None
    ) -> Sample | RefusedSample:
        """Generate until a sample passes validation or attempts run out."""
        attempts = 1 + self.config.max_regenerations
        reason = ""
        for attempt in range(attempts):
            sample = await self._attempt(prompt, sample_id, sampling, seed, attempt, before)
            if isinstance(sample, Sample):
                self.counters.samples += 1
                self.counters.response_tokens += len(sample.response_tokens)
                if sample.finish_reason != "abort":
                    self._finished[sample_id] = sample
                return sample
            reason = sample
            self.counters.regenerated += attempt + 1 < attempts
        self.counters.refused += 1
        return RefusedSample(sample_id, prompt.uid, reason, attempts)

    async def _attempt(
        self, prompt: Prompt, sample_id: str, sampling: Sampling, seed: int, attempt: int, before: Sample | None
    ) -> Sample | str:
        """One request; a sample, or why what came back must be refused."""
        tokens = prompt.tokens if before is None else before.tokens
        # A continuation has the seed of the part before: random numbers go by the tokens that are there.
        params = self._params(prompt, sampling, derive_seed(seed, sample_id, attempt), len(tokens))
        thread = self._live()
        request: Request = await asyncio.wrap_future(thread.submit(sample_id, tokens.tolist(), params))
        result = await asyncio.shield(asyncio.wrap_future(request.output))
        self.counters.cached_prompt_tokens += result.num_cached_tokens or 0
        earlier = None if before is None or before.routes is None else await self._rows(before.routes)
        return self._assemble(prompt, sample_id, before, earlier, result.outputs[0], tuple(request.spans))

    def _params(self, prompt: Prompt, sampling: Sampling, seed: int, length: int) -> Any:
        if self._torn is not None:
            raise weights.TornWeights(
                f"engine {self.index}: a weight update broke off ({self._torn}); send a whole update before generating"
            )
        room = self.config.max_model_len - length
        most = min(sampling.max_tokens, int(prompt.metadata.get("max_tokens", sampling.max_tokens)))
        allowed = most - (length - len(prompt.tokens))
        if not len(prompt.tokens) or room < 1 or allowed < 1:
            raise ValueError(
                f"prompt {prompt.uid}: expected 1 to {self.config.max_model_len - 1} tokens before the next and fewer "
                f"than {most} response tokens, got {length} tokens of which {len(prompt.tokens)} are "
                "the prompt; filter long prompts or raise max_model_len"
            )
        from rl.rollout.sampling import request_seed

        vllm = compat.engine_api()
        end_tokens = () if sampling.ignore_eos else self._end_tokens
        return vllm.SamplingParams(
            temperature=sampling.temperature,
            max_tokens=min(room, allowed),
            logprobs=0,
            flat_logprobs=True,  # one list per request instead of an object per token
            stop_token_ids=sorted({*end_tokens, *sampling.stop_token_ids}),
            ignore_eos=True,  # the end tokens are in stop_token_ids: the engine has no tokenizer to ask
            detokenize=False,
            output_kind=vllm.FINAL_ONLY,
            **request_seed(seed, self._exchanged),
        )

    def _assemble(
        self,
        prompt: Prompt,
        sample_id: str,
        before: Sample | None,
        earlier: np.ndarray | None,
        output: Any,
        spans: tuple[tuple[int, int], ...],
    ) -> Sample | str:
        """vLLM's final output, after what a continued sample had ``before`` (its routes: ``earlier``)."""
        response = np.asarray(output.token_ids, dtype=np.int32)
        logprobs = compat.sampled_logprobs(output)
        reason = validation.check_logprobs(logprobs, len(response))
        if reason is not None:
            return reason
        captured = output.routed_experts
        if before is not None:
            spans = routes.join_versions(before.weight_versions, len(before.response_tokens), spans)
            response = np.concatenate([before.response_tokens, response])
            logprobs = np.concatenate([before.rollout_logprobs, logprobs])
        learnt = self._until_end(response)
        reference, counts, digests = None, None, None
        if self._captures and len(response):
            assert self.info is not None
            if captured is not None:
                captured = routes.select_moe_layers(captured, self.info.moe_layers, self.info.experts)
            if earlier is not None:
                captured = earlier if captured is None else routes.join(earlier, captured)
            reason = validation.check_routes(
                captured,
                len(prompt.tokens) + len(response),
                len(self.info.moe_layers),
                self.info.experts,
                self.info.topk,
            )
            if reason is not None:
                return reason
            counts = histogram(captured, self.info.experts)
            digests = layer_digests(captured)
            reference = RouteRef(captured, self.index, captured.shape, str(captured.dtype), sample_id)
        return Sample(
            sample_id=sample_id,
            prompt=prompt,
            response_tokens=response,
            rollout_logprobs=logprobs,
            weight_versions=spans,
            finish_reason=output.finish_reason,
            routes=reference,
            histogram=counts,
            route_digests=digests,
            response_text=self._decode(response[:learnt]),
            learnt_tokens=learnt,
        )

    def _until_end(self, response: np.ndarray) -> int | None:
        """Tokens up to the first end token, itself included, of a response that went on after it; None: it did not."""
        ends = np.nonzero(np.isin(response[:-1], self._end_tokens))[0]
        return int(ends[0]) + 1 if len(ends) else None

    @property
    def _captures(self) -> bool:
        return self.config.capture_routes and self.info is not None and bool(self.info.moe_layers)

    def _decode(self, response: np.ndarray) -> str:
        if self._tokenizer is None:
            return ""
        # A padded vocabulary has ids that no tokenizer knows; counting those that it knows is not free.
        known = response[response < len(self._tokenizer)].tolist()
        return str(self._tokenizer.decode(known, skip_special_tokens=True))

    # ------------------------------------------------------------------ routes

    async def slice_routes(self, requests: Sequence[RouteSlice]) -> list[np.ndarray]:
        """Parts of routes, cut here so that only they travel.

        Args:
            requests: ``(reference, row start, row stop, MoE layer start, MoE layer stop)`` each.

        Returns:
            For each an array ``[rows, layers, topk]`` of its own memory.

        Raises:
            ValueError: a part lies outside its routes.
        """
        checked = [routes.checked_slice(request) for request in requests]
        arrays = await self._all_rows([ref for ref, _, _ in checked])
        return [np.ascontiguousarray(a[rows, layers]) for a, (_, rows, layers) in zip(arrays, checked, strict=True)]

    async def count_routes(self, requests: Sequence[RouteRows]) -> list[np.ndarray]:
        """How often each expert occurs in runs of rows: int32 ``[MoE layers, experts]`` each; only counts travel.

        Args:
            requests: ``(reference, row start, row stop)`` each.

        Raises:
            ValueError: a run lies outside its routes.
        """
        # An engine that takes the place of a dead one may be asked before it is up.
        await self._wait_for(self._up.wait(), self.config.start_timeout_s, "its start")
        assert self.info is not None
        checked = [routes.checked_slice((ref, first, stop, 0, ref.shape[1])) for ref, first, stop in requests]
        arrays = await self._all_rows([ref for ref, _, _ in checked])
        return [histogram(a[rows], self.info.experts) for a, (_, rows, _) in zip(arrays, checked, strict=True)]

    async def _all_rows(self, references: Sequence[RouteRef]) -> list[np.ndarray]:
        """Every object once, all at the same time: short ones are with the process that asked for the samples, a round
        trip away."""
        apart = {_name(reference): reference.handle for reference in references}
        arrays = dict(zip(apart, await asyncio.gather(*(map(self._fetch, apart.values()))), strict=True))
        return [reference.of(arrays[_name(reference)]) for reference in references]

    async def _rows(self, reference: RouteRef) -> np.ndarray:
        return reference.of(await self._fetch(reference.handle))

    async def _fetch(self, handle: Any) -> np.ndarray:
        if isinstance(handle, np.ndarray):
            return handle
        return await self._wait_for(handle, self.config.generate_timeout_s, "routes in the object store")

    # ------------------------------------------------------------------ weights

    async def transfer_join(self, membership: Membership, staging: StagingHandles | None = None) -> None:
        """Join a generation of direct transfers; ``update_weights(version, [Incoming(plan)], plan.manifest)`` follows.

        Args:
            membership: the generation.
            staging: of the trainer rank on the same GPU, if weights come through its memory.

        Raises:
            TransferTimeout: naming the members that did not come.
            TransferError: staging memory cannot be opened.
        """

        def join(engine: Any) -> None:
            call_ranks(engine, "ultraep_transfer_join", membership, self.index, staging)

        await self._call(join, membership.limits.join_s + self.config.update_timeout_s, "joining a weight transfer")

    async def update_weights(
        self,
        version: int,
        chunks: Sequence[Any],
        manifest: weights.Manifest | None = None,
        in_flight: Literal["refuse", "continue"] = "refuse",
    ) -> float:
        """Put new weights into the engine, in place, between two steps; returns the seconds it took.

        Args:
            version: what the weights are called from now on.
            chunks: dicts from Hugging Face name to full tensor (torch or numpy), or Ray references to such dicts,
                fetched one at a time; best in layer order (see ``weights``).
            manifest: name -> shape of all tensors; needed where chunks are references.
            in_flight: with "refuse", requests must not be running. With "continue" they go on: tokens and rows of
                routes they have stay, keys and values are computed again under the new weights.

        Raises:
            WeightMismatch: names or shapes are wrong; the engine keeps its weights.
            TornWeights: it broke off half-way; the engine refuses to generate until an update succeeds.
            EngineTimeout: not done within ``update_timeout_s``; the update may still finish.
        """
        manifest = dict(weights.manifest_of(chunks) if manifest is None else manifest)
        weights.check_manifest(manifest, self._manifest, self._optional)
        thread = self._live()
        timeout = self.config.update_timeout_s

        def update(engine: Any) -> float:
            started = time.monotonic()
            if thread.running and in_flight == "refuse":
                raise RuntimeError(
                    f"engine {self.index}: {thread.running} requests are running; wait for them or pass "
                    'in_flight="continue"'
                )
            self._torn = f"to version {version}"
            try:
                weights.update_ranks(engine, chunks, manifest, timeout)
            except Exception as error:
                self._torn = f"to version {version}: {error}"
                raise weights.TornWeights(f"engine {self.index}: the update {self._torn}; send it again") from error
            if not engine.reset_prefix_cache(reset_running_requests=bool(thread.running)):
                raise weights.TornWeights(f"engine {self.index}: the prefix cache of the old weights did not go away")
            thread.start_version(engine, version)
            self._torn = None
            self.counters.updates += 1
            return time.monotonic() - started

        return await self._call(update, timeout, f"the weight update to version {version}")

    async def sleep(self, keep_weights: bool = False) -> float:
        """Free the device for others, until :meth:`wake`; returns the seconds it took. On CPU nothing is freed.

        An engine that sleeps already stays as it is.

        Args:
            keep_weights: keep them in host memory. Otherwise they are dropped, and must be sent before generating.

        Raises:
            RuntimeError: samples are running.
        """
        thread = self._live()

        def nap(engine: Any) -> float:
            started = time.monotonic()
            if thread.running:
                raise RuntimeError(f"engine {self.index}: {thread.running} requests are running; wait before sleeping")
            if self._weights_awake:
                compat.wake(engine, weights_only=False, weights_awake=True)
                self._weights_awake = False
            if self.config.sleep_mode and not engine.is_sleeping():
                engine.reset_prefix_cache()
                engine.sleep(level=1 if keep_weights else 2)
                if not keep_weights:
                    self._torn = "it slept and dropped its weights"
            return time.monotonic() - started

        return await self._call(nap, self.config.update_timeout_s, "falling asleep")

    async def wake(self, weights_only: bool = False) -> float:
        """Take the device again; returns the seconds it took. Waking an engine that is awake does nothing.

        Args:
            weights_only: take memory of weights, which may then be updated, and leave that of keys and values until
                the engine is woken wholly.
        """

        def rise(engine: Any) -> float:
            started = time.monotonic()
            if self.config.sleep_mode and engine.is_sleeping():
                compat.wake(engine, weights_only=weights_only, weights_awake=self._weights_awake)
                self._weights_awake = weights_only
            return time.monotonic() - started

        return await self._call(rise, self.config.update_timeout_s, "waking up")

    # ------------------------------------------------------------------ profiling

    async def profile(self, settings: ProfileSettings, path: str) -> None:
        """Begin a profiled window where the engine's first rank computes: on the engine's thread, if it has but one.

        Args:
            settings: how.
            path: of the trace.
        """

        def begin(engine: Any) -> None:
            call_ranks(engine, "ultraep_profile", settings, path)

        await self._call(begin, self.config.update_timeout_s, "starting a profiled window")

    async def end_profile(self) -> str | None:
        """End the window, if one is open; the trace that was written."""

        def end(engine: Any) -> str | None:
            return call_ranks(engine, "ultraep_end_profile")[0]

        return await self._call(end, self.config.generate_timeout_s, "writing a trace")

    # ------------------------------------------------------------------ waiting

    def _live(self) -> EngineThread:
        if self._thread is None:
            raise EngineFailed(f"engine {self.index} is not running: call start() first")
        return self._thread

    async def _call(self, function: Any, timeout_s: float, what: str) -> Any:
        return await self._wait(self._live().call(function), timeout_s, what)

    async def _wait(self, future: Future[T], timeout_s: float, what: str) -> T:
        return await self._wait_for(asyncio.wrap_future(future), timeout_s, what)

    async def _wait_for(self, awaitable: Awaitable[T], timeout_s: float, what: str) -> T:
        try:
            async with asyncio.timeout(timeout_s):
                return await awaitable
        except TimeoutError as error:
            raise EngineTimeout(f"engine {self.index}: waited {timeout_s:g} s for {what}") from error


def _set_environment(device: Device) -> None:
    """What is missing of :func:`engine_environment`; a Ray actor has it from its runtime_env already."""
    missing = {n: value for n, value in engine_environment(device).items() if n not in os.environ}
    os.environ.update(missing)
    late = sorted(missing.keys() & {"OMP_NUM_THREADS", "TORCH_COMPILE_DISABLE"}) if "torch" in sys.modules else []
    if late:
        _log.warning(
            "%s set after torch was imported: the first request may compile for half a minute. Put "
            "engine_environment() into the environment before the process starts.",
            " and ".join(late),
        )


def _describe(engine: Any) -> tuple[tuple[int, ...], int, int, int]:
    layers = tuple(call_ranks(engine, "ultraep_moe_layer_ids")[0])
    experts, topk = compat.model_shape(engine) if layers else (0, 0)
    return layers, experts, topk, compat.cache_tokens(engine)


def _name(reference: RouteRef) -> Any:
    """Of the object that its rows are in: references to one object are equal, arrays are not to be compared."""
    handle = reference.handle
    return id(handle) if isinstance(handle, np.ndarray) else handle
