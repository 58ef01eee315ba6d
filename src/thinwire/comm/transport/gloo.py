"""gloo communicators that share one thread for their sockets.

torch gives every gloo group a device of its own, with a thread that wakes up a hundred times a second even if nothing
comes. A world has a dozen groups, the default one among them: that many idle threads cost 23 ms of processor time in a
second, and interrupt what computes each time; on one device they cost 5 (docs/log.md). torch takes a device for a backend
that is registered with it.
"""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

NAME = "shared_gloo"
_Gloo: Any = dist.ProcessGroupGloo  # torch's stubs lack its options and devices
Devices = Sequence[Any]


def open_devices(addresses: Sequence[str]) -> Devices:
    """One for each of this machine's addresses."""
    return [_Gloo.create_device(hostname=address) for address in addresses]


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
    """A group that somebody makes like the default one has no options: it gets that one's devices."""
    return _Gloo(place.store, place.group_rank, place.group_size, options or _options(_shared(), place.timeout))


def _shared() -> Devices:
    devices: Devices = dist.group.WORLD._get_backend(torch.device("cpu")).options._devices  # type: ignore[union-attr]
    return devices


dist.Backend.register_backend(NAME, _make, extended_api=True, devices=["cpu"])
