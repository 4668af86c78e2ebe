"""The head and its nodes: who may join, who is lost, when it is over."""

import socket
import threading

import pytest

from rl.slurm import control
from rl.slurm.control import ControlError, HeadControl, NodeControl

LIMIT_S = 30.0


def node(head, name, token="t"):
    return NodeControl("127.0.0.1", head.port, token, name, LIMIT_S)


def test_nodes_join_and_are_told_of_the_end():
    head = HeadControl("127.0.0.1", "t", ["n2", "n3"])
    nodes = [node(head, name) for name in ("n3", "n2")]
    head.wait_for_all(LIMIT_S)
    over: list[bool] = []
    waiting = [threading.Thread(target=lambda n=n: over.append(n.wait_for_end())) for n in nodes]
    for thread in waiting:
        thread.start()
    head.end()
    for thread in waiting:
        thread.join(LIMIT_S)
    assert over == [True, True]
    for each in nodes:
        each.close()
    assert head.lost == ()


def test_who_did_not_come_is_named():
    head = HeadControl("127.0.0.1", "t", ["n2", "n3", "n4"])
    joined = node(head, "n3")
    with pytest.raises(ControlError, match="n2, n4 to join"):
        head.wait_for_all(0.2)
    joined.close()
    head.end()


@pytest.mark.parametrize(("name", "token"), [("n2", "another job's"), ("stranger", "t")])
def test_strangers_are_turned_away(name, token):
    head = HeadControl("127.0.0.1", "t", ["n2"])
    with pytest.raises(ControlError, match="does not take us"):
        node(head, name, token)
    with socket.create_connection(("127.0.0.1", head.port)) as nonsense:
        nonsense.sendall(b"GET / HTTP/1.1\r\n\r\n")
        nonsense.settimeout(LIMIT_S)
        assert nonsense.recv(100) == b""
    with pytest.raises(ControlError, match="n2 to join"):
        head.wait_for_all(0.1)
    head.end()


def test_a_lost_node_is_named_and_a_lost_head_is_noticed():
    head = HeadControl("127.0.0.1", "t", ["n2", "n3"])
    lost, other = node(head, "n2"), node(head, "n3")
    head.wait_for_all(LIMIT_S)
    lost.close()
    assert head.wait_for_loss(LIMIT_S)
    assert head.lost == ("n2",)
    head._connections["n3"].shutdown(socket.SHUT_RDWR)  # what the end of the head's process does
    assert not other.wait_for_end()
    other.close()
    head.end()


def test_a_silent_node_is_lost(monkeypatch):
    monkeypatch.setattr(control, "SILENCE_S", 0.5)
    head = HeadControl("127.0.0.1", "t", ["n2"])
    with socket.create_connection(("127.0.0.1", head.port)) as silent:
        silent.sendall(b'{"token": "t", "node": "n2"}\n')
        head.wait_for_all(LIMIT_S)
        assert head.wait_for_loss(LIMIT_S)
    head.end()


def test_heartbeats_keep_both_sides(monkeypatch):
    monkeypatch.setattr(control, "SILENCE_S", 3.0)
    monkeypatch.setattr(control, "BEAT_S", 0.1)
    head = HeadControl("127.0.0.1", "t", ["n2"])
    joined = node(head, "n2")
    over: list[bool] = []
    waiting = threading.Thread(target=lambda: over.append(joined.wait_for_end()))
    waiting.start()
    assert not head.wait_for_loss(4.5)
    head.end()
    waiting.join(LIMIT_S)
    assert over == [True]
    joined.close()


def test_no_head():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(ControlError, match=f"n2: waited 0.1 s for the head at 127.0.0.1:{port}"):
        NodeControl("127.0.0.1", port, "t", "n2", 0.1)
