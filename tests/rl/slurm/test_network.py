"""Ports and addresses of a job."""

import itertools
import socket
from types import SimpleNamespace

import psutil
import pytest

from rl.slurm import network


def test_each_job_begins_with_a_block_of_its_own():
    first = [next(network.ports_of(job)) for job in range(3000, 3100)]
    assert len(set(first)) == 100
    assert all(20000 <= port < 32000 for port in first)
    block = list(itertools.islice(network.ports_of(7), 12))
    assert block == [*range(20070, 20080), 20080, 20081]
    assert len(set(network.ports_of(7))) == 12000


def test_a_port_in_use_is_left_out():
    job = 1199
    port = network.free_port(job, "127.0.0.1")
    with socket.create_server(("127.0.0.1", port)):
        assert network.free_port(job, "127.0.0.1") != port
    with socket.create_server(("0.0.0.0", port)):
        assert network.free_port(job, "127.0.0.1") != port
    assert network.free_port(job, "127.0.0.1", skip=1) > network.free_port(job, "127.0.0.1")


@pytest.fixture
def machine(monkeypatch):
    """One with two interfaces that are up, and one that is not."""
    addresses = {"lo": "127.0.0.1", "eth0": "10.0.0.5", "ib0": "10.1.0.5", "down0": "10.2.0.5"}
    ipv4 = {n: [SimpleNamespace(family=socket.AF_INET, address=a)] for n, a in addresses.items()}
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: ipv4)
    monkeypatch.setattr(psutil, "net_if_stats", lambda: {n: SimpleNamespace(isup=n != "down0") for n in addresses})
    monkeypatch.setattr(socket, "gethostname", lambda: "node7")
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "127.0.1.1")


def test_interface(machine, monkeypatch):
    assert network.own_address("ib0") == ("ib0", "10.1.0.5")
    for missing in ("down0", "eth9"):
        with pytest.raises(network.NetworkError, match=r"node7: .*eth0 \(10.0.0.5\), ib0 \(10.1.0.5\)"):
            network.own_address(missing)
    with pytest.raises(network.NetworkError, match="--interface"):
        network.own_address(None)
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "10.0.0.5")
    assert network.own_address(None) == ("eth0", "10.0.0.5")
    monkeypatch.setattr(network, "_address_towards", lambda peer: "10.1.0.5" if peer == "10.1.0.1" else None)
    assert network.own_address(None, peer="10.1.0.1") == ("ib0", "10.1.0.5")
