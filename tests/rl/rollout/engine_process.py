"""A rollout engine in a process of its own, for tests: vLLM changes its process too much to share it with pytest.

with EngineProcess(EngineConfig(...)) as engine:
    samples = engine.call("generate", prompt, ["a"], Sampling(max_tokens=8), 0)
    pending = engine.submit("generate", ...)   # a concurrent future
    engine.call("preemptions")                 # `helpers` below
"""

from __future__ import annotations

import asyncio
import os
import pickle
import socket
import subprocess
import sys
import threading
from concurrent.futures import Future
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

from rl.rollout.config import EngineConfig, engine_environment

ROOT = Path(__file__).resolve().parents[3]
CALL_S = 120.0


class EngineProcess:
    """Runs ``RolloutEngine(config)`` in a child process and calls its methods."""

    def __init__(self, config: EngineConfig) -> None:
        ours, theirs = socket.socketpair()
        environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | engine_environment("cpu")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.rl.rollout.engine_process", str(theirs.fileno())],
            cwd=ROOT,
            env=environment,
            pass_fds=[theirs.fileno()],
        )
        theirs.close()
        self._connection = Connection(ours.detach())
        self._pending: dict[int, Future[Any]] = {}
        self._count = 0
        threading.Thread(target=self._read, daemon=True).start()
        _send(self._connection, config)
        self.info = self.call("start", timeout=300.0)

    def submit(self, method: str, *args: Any, **kwargs: Any) -> Future[Any]:
        self._count += 1
        future: Future[Any] = Future()
        self._pending[self._count] = future
        _send(self._connection, (self._count, method, args, kwargs))
        return future

    def call(self, method: str, *args: Any, timeout: float = CALL_S, **kwargs: Any) -> Any:
        return self.submit(method, *args, **kwargs).result(timeout)

    def _read(self) -> None:
        try:
            while True:
                number, value, error = _receive(self._connection)
                future = self._pending.pop(number)
                future.set_exception(error) if error is not None else future.set_result(value)
        except (EOFError, OSError) as error:
            for future in list(self._pending.values()):
                future.set_exception(RuntimeError(f"the engine's process ended: {error!r}"))

    def __enter__(self) -> EngineProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            _send(self._connection, None)
            self._process.wait(30.0)
        except (OSError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait(10.0)


def _send(connection: Connection, value: Any) -> None:
    # Not connection.send: torch would pass tensors as file descriptors, which needs a common parent process.
    connection.send_bytes(pickle.dumps(value))


def _receive(connection: Connection) -> Any:
    return pickle.loads(connection.recv_bytes())


class Helpers:
    """What tests do inside the engine's process beyond the engine's own methods."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self._preemptions = 0

    async def replace(self, config: EngineConfig) -> Any:
        """Stop the engine and start one of another model, which spares a process and its imports; returns its info."""
        from rl.rollout.engine import RolloutEngine

        await self.engine.stop()
        self.engine = RolloutEngine(config)
        return await self.engine.start()

    async def count_preemptions(self) -> None:
        """From now on, :meth:`preemptions` counts."""

        def wrap(vllm: Any) -> None:
            scheduler = vllm.engine_core.engine_core.scheduler
            original = scheduler._preempt_request

            def preempt(*args: Any, **kwargs: Any) -> Any:
                self._preemptions += 1
                return original(*args, **kwargs)

            scheduler._preempt_request = preempt

        await asyncio.wrap_future(self.engine._thread.call(wrap))

    async def preemptions(self) -> int:
        return self._preemptions

    async def zero_next_routes(self, times: int) -> None:
        """Make the next captured routes all zero, as some engine kernels do."""
        from rl.rollout import routes

        original, left = routes.select_moe_layers, times

        def broken(*args: Any) -> Any:
            nonlocal left
            result = original(*args)
            if left > 0:
                left -= 1
                return result * 0
            routes.select_moe_layers = original
            return result

        routes.select_moe_layers = broken

    async def break_step(self) -> None:
        """Make the engine's next step raise."""

        def wrap(vllm: Any) -> None:
            def step() -> None:
                raise ArithmeticError("broken on purpose")

            vllm.step = step

        await asyncio.wrap_future(self.engine._thread.call(wrap))


async def _serve(connection: Connection) -> None:
    from rl.rollout.engine import RolloutEngine

    helpers = Helpers(RolloutEngine(_receive(connection)))
    tasks = set()

    async def answer(number: int, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        try:
            result = getattr(helpers if hasattr(helpers, method) else helpers.engine, method)(*args, **kwargs)
            value, error = await result if asyncio.iscoroutine(result) else result, None
        except Exception as caught:
            # The exception's type and message; causes may not pickle.
            caught.__cause__ = caught.__context__ = caught.__traceback__ = None
            value, error = None, caught
        _send(connection, (number, value, error))

    while (message := await asyncio.to_thread(_receive, connection)) is not None:
        task = asyncio.create_task(answer(*message))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    await helpers.engine.stop()


if __name__ == "__main__":
    asyncio.run(_serve(Connection(int(sys.argv[1]))))
