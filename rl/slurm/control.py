"""The thread between the head of a job and its other nodes: who is there, who is lost, when it is over.

Every node but the head keeps one TCP connection to the head, one JSON value a line:

1. node -> head: ``{"token": ..., "node": name}``; head -> node: ``{"ok": true}``, or the connection closes: the token
   is that of the job, so that no other job's node gets in by a wrong address.
2. Both sides send ``{}`` every :data:`BEAT_S` seconds. A side that is silent for :data:`SILENCE_S` seconds, or whose
   connection closes, is lost. Ray and Slurm take longer to notice (Slurm up to its ``SlurmdTimeout``, often 300 s).
3. head -> node: ``{"end": true}``: the run is over, the node stops its part and leaves.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import socket
import threading
import time
from collections.abc import Sequence
from typing import Any

BEAT_S = 5.0
SILENCE_S = 30.0


class ControlError(RuntimeError):
    """A node that did not come, or a head that does not want us; the message names it."""


class HeadControl:
    """The head's side; listens on a port of the system's choice.

    Args:
        address: to listen on.
        token: of the job.
        nodes: names of the nodes that are to come.

    Attributes:
        port: that is listened on.
    """

    def __init__(self, address: str, token: str, nodes: Sequence[str]) -> None:
        self._token = token
        self._expected = tuple(nodes)
        self._connections: dict[str, socket.socket] = {}
        self._lost: list[str] = []
        self._changed = threading.Condition()
        self._ended = False
        self._server = socket.create_server((address, 0))
        self.port: int = self._server.getsockname()[1]
        threading.Thread(target=self._accept, name="control-accept", daemon=True).start()

    @property
    def lost(self) -> tuple[str, ...]:
        """Nodes that came and are gone."""
        with self._changed:
            return tuple(self._lost)

    def wait_for_all(self, limit_s: float) -> None:
        """Until every node has come.

        Raises:
            ControlError: within the limit some did not.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: set(self._connections) >= set(self._expected), limit_s):
                missing = sorted(set(self._expected) - set(self._connections))
                raise ControlError(
                    f"waited {limit_s:g} s for {', '.join(missing)} to join; their logs are beside this one, and "
                    "--interface says which network to use"
                )

    def wait_for_loss(self, limit_s: float) -> bool:
        """Whether a node is lost within the limit."""
        with self._changed:
            return self._changed.wait_for(lambda: bool(self._lost), limit_s)

    def end(self) -> None:
        """Tell all nodes that it is over, and hang up."""
        with self._changed:
            self._ended = True
            connections = list(self._connections.values())
        for connection in connections:
            with contextlib.suppress(OSError):
                _send(connection, {"end": True})
        self._server.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._server.accept()
            except OSError:  # closed
                return
            threading.Thread(target=self._serve, args=(connection,), name="control-node", daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        connection.settimeout(SILENCE_S)
        lines = connection.makefile("rb")
        with connection, lines:
            hello = _receive(lines)
            node = hello.get("node") if hello else None
            if not hello or node not in self._expected or not hmac.compare_digest(str(hello["token"]), self._token):
                return
            with contextlib.suppress(OSError):
                _send(connection, {"ok": True})
            with self._changed:
                self._connections[node] = connection
                self._changed.notify_all()
            stop = _beat(connection)
            while _receive(lines) is not None:
                pass
            stop.set()
            with self._changed:
                if not self._ended:
                    self._lost.append(node)
                self._changed.notify_all()


class NodeControl:
    """Another node's side.

    Args:
        address, port: of the head.
        token: of the job.
        node: our name.
        limit_s: to reach the head within.

    Raises:
        ControlError: it was not reached, or does not want us.
    """

    def __init__(self, address: str, port: int, token: str, node: str, limit_s: float) -> None:
        self._connection = _connect(address, port, node, limit_s)
        self._connection.settimeout(SILENCE_S)
        self._lines = self._connection.makefile("rb")
        _send(self._connection, {"token": token, "node": node})
        if not (_receive(self._lines) or {}).get("ok"):
            raise ControlError(f"{node}: the head at {address}:{port} does not take us for a node of its job")
        self._stop = _beat(self._connection)

    def wait_for_end(self) -> bool:
        """Until the run is over; False when the head is lost instead."""
        while (message := _receive(self._lines)) is not None:
            if message.get("end"):
                return True
        return False

    def close(self) -> None:
        self._stop.set()
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()


def _connect(address: str, port: int, node: str, limit_s: float) -> socket.socket:
    deadline = time.monotonic() + limit_s
    while True:
        try:
            return socket.create_connection((address, port), timeout=BEAT_S)
        except OSError as error:
            if time.monotonic() > deadline:
                raise ControlError(
                    f"{node}: waited {limit_s:g} s for the head at {address}:{port} ({error}); is it on a network that "
                    "this node reaches? --interface says which to use"
                ) from error
            time.sleep(1.0)


def _send(connection: socket.socket, message: dict[str, Any]) -> None:
    connection.sendall(json.dumps(message).encode() + b"\n")


def _receive(lines: Any) -> dict[str, Any] | None:
    """The next message; None when there will be none."""
    try:
        line = lines.readline(4096)
        return dict(json.loads(line)) if line.endswith(b"\n") else None
    except (OSError, ValueError, TypeError):
        return None


def _beat(connection: socket.socket) -> threading.Event:
    """Send heartbeats until the event is set or the connection is gone."""
    stop = threading.Event()

    def run() -> None:
        while not stop.wait(BEAT_S):
            try:
                _send(connection, {})
            except OSError:
                return

    threading.Thread(target=run, name="control-beat", daemon=True).start()
    return stop
