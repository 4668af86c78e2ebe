"""Addresses and ports of a job: one interface for everything, and ports that nobody else is likely to want."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import psutil

_FIRST, _BLOCKS, _BLOCK = 20_000, 1_200, 10  # below Linux's ephemeral ports, which begin at 32768


class NetworkError(RuntimeError):
    """No address or port that could be used; the message says what there is."""


def interfaces() -> dict[str, str]:
    """IPv4 address of every interface that is up, loopback left out."""
    up = {name for name, stats in psutil.net_if_stats().items() if stats.isup}
    return {
        name: address.address
        for name, addresses in psutil.net_if_addrs().items()
        for address in addresses
        if address.family == socket.AF_INET and name in up and not address.address.startswith("127.")
    }


def own_address(interface: str | None, peer: str | None = None) -> tuple[str, str]:
    """The interface to use on this node, and its IPv4 address.

    Args:
        interface: to use; None: that which leads to ``peer``, or that which this node's name resolves to, or the only
            one.
        peer: host or address of another node of the job.

    Raises:
        NetworkError: no such interface, or several and nothing that says which.
    """
    there = interfaces()
    if interface is not None:
        if interface not in there:
            raise NetworkError(
                f"{socket.gethostname()}: expected an interface {interface} that is up and has an IPv4 address, there "
                f"is {_listing(there)}; name another with --interface"
            )
        return interface, there[interface]
    by_address = {address: name for name, address in there.items()}
    for address in (_address_towards(peer), _address_of_name()):
        if address in by_address:
            return by_address[address], address
    if len(there) == 1:
        return next(iter(there.items()))
    raise NetworkError(
        f"{socket.gethostname()}: expected one interface or a host name that resolves to one, there is "
        f"{_listing(there)}; name one with --interface"
    )


def ports_of(job: int) -> Iterator[int]:
    """Ports to try for a job, its own block of ten first, then those of others."""
    for block in range(_BLOCKS):
        first = _FIRST + (job + block) % _BLOCKS * _BLOCK
        yield from range(first, first + _BLOCK)


def free_port(job: int, address: str, skip: int = 0) -> int:
    """The first of a job's ports that nobody listens on, at any address of this node.

    Args:
        job: id of the Slurm job.
        address: IPv4 address that will be listened on.
        skip: how many free ones to leave out, after somebody else was faster.

    Raises:
        NetworkError: all are taken.
    """
    free = (port for port in ports_of(job) if _is_free(address, port) and _is_free("0.0.0.0", port))
    for index, port in enumerate(free):
        if index == skip:
            return port
    raise NetworkError(f"{socket.gethostname()}: no free port from {_FIRST} to {_FIRST + _BLOCKS * _BLOCK - 1}")


def _is_free(address: str, port: int) -> bool:
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # what a server does; closed connections do not count
        try:
            s.bind((address, port))
        except OSError:
            return False
        return True


def _address_towards(peer: str | None) -> str | None:
    if peer is None:
        return None
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        try:
            s.connect((peer, 9))  # sends nothing: the kernel only chooses the way
        except OSError:
            return None
        return str(s.getsockname()[0])


def _address_of_name() -> str | None:
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return None


def _listing(there: dict[str, str]) -> str:
    return ", ".join(f"{name} ({address})" for name, address in sorted(there.items())) or "none"
