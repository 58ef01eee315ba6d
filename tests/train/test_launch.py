"""The port at which ranks are to meet."""

import socket
from pathlib import Path

import pytest

from thinwire.train import launch


def test_a_free_port_is_no_port_of_outgoing_connections() -> None:
    first, last = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    ports = {launch.free_port() for _ in range(20)}
    assert len(ports) > 10
    assert not [port for port in ports if first <= port <= last]
    for port in ports:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", port))


def test_a_taken_port_is_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setattr(launch.random, "sample", lambda ports, k: [taken.getsockname()[1]] * k)
        assert launch.free_port() != taken.getsockname()[1]
