"""gloo communicators that share one thread for their sockets.

torch gives every gloo group a device of its own, with a thread that wakes up a hundred times a second even if nothing
comes. A world has a dozen groups, the default one among them: that many idle threads cost 23 ms of processor time in a
second, and interrupt what computes each time; on one device they cost 5 (docs/log.md). torch takes a device for a backend
that is registered with it.
"""

import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist

NAME = "shared_gloo"
_INTERFACES = "GLOO_SOCKET_IFNAME"
_Gloo: Any = dist.ProcessGroupGloo  # torch's stubs lack its options and devices
Devices = Sequence[Any]


def open_devices() -> Devices:
    """One for each network interface that GLOO_SOCKET_IFNAME names, as torch's own groups have; else for the host's name."""
    names = [name for name in os.environ.get(_INTERFACES, "").split(",") if name]
    return [_Gloo.create_device(interface=name) for name in names] or [_Gloo.create_default_device()]


def join(store: dist.Store, rank: int, size: int, devices: Devices, timeout: timedelta) -> None:
    """torch.distributed's default group of all ranks, on `devices`."""
    options = _options(devices, timeout)
    dist.init_process_group(NAME, store=store, rank=rank, world_size=size, timeout=timeout, pg_options=options)


def new_group(ranks: Sequence[int], devices: Devices, timeout: timedelta, *, members_only: bool) -> dist.ProcessGroup:
    """A communicator of `ranks` on `devices`; who calls it when is said at `World.communicator`."""
    options = _options(devices, timeout)
    group: dist.ProcessGroup = dist.new_group(
        list(ranks), timeout=timeout, backend=NAME, pg_options=options, use_local_synchronization=members_only
    )
    return group


def _options(devices: Devices, timeout: timedelta) -> Any:
    options = _Gloo._Options()
    options._devices, options._timeout, options._threads = list(devices), timeout, 2 * len(devices)
    return options


def _make(place: Any, options: Any) -> Any:
    """A group that somebody made like the default one has no options: it gets devices of its own."""
    return _Gloo(place.store, place.group_rank, place.group_size, options or _options(open_devices(), place.timeout))


dist.Backend.register_backend(NAME, _make, extended_api=True, devices=["cpu"])
