"""Over sockets, by gloo: communicators that share one thread, and exchanges that use a link in both directions at once.

A gloo receive announces itself to the sender on their one connection, and nothing is sent before that. gloo's own
all-to-all and ring send first: the announcement then waits behind this rank's own data, and the two directions of a link
take turns. Here every receive is posted before the first send. Sends start with the next rank of the group, so that no
two ranks begin with the same receiver. gloo's own reduce-scatter sends twice the least (it is an all-reduce inside), so
here it is an all-to-all and a local sum.

An accelerator's tensors (where ranks share one) travel as copies in host memory: what was computed is waited for before it
is sent, and what came is copied back when it is waited for.

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
from torch import Tensor

from thinwire.comm.transport.transport import Label, TaggedTransport, Waitable
from thinwire.errors import OtherExchangeError

NAME = "shared_gloo"
_Gloo: Any = dist.ProcessGroupGloo  # torch's stubs lack its options and devices
Devices = Sequence[Any]
_HEADERS = 2**30
"""gloo's slot of headers; those of messages are their tags."""
_PIECE_BYTES = 2**22
"""Of the whole tensor, in a large all-reduce; smaller ones were no faster over four hosts at 1 Gbit/s."""


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


class GlooTransport(TaggedTransport):
    """`thinwire.comm.transport.transport.Transport` over sockets."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__(group.rank(), group.size())
        self._group, self.header_bytes = group, Headers.sent_bytes(group.size())

    def _exchange(
        self, received_kn: Tensor, rows: Sequence[Tensor], places: Sequence[int], *, gathers: bool, label: Label
    ) -> Sequence[Waitable]:
        group = self._group
        sources, targets = self._around(places)
        if received_kn.device.type != "cpu":
            here = torch.empty_like(received_kn, device="cpu")
            sent = [rows[0].cpu()] * len(rows) if gathers else [row.cpu() for row in rows]
            works = self._exchange(here, sent, places, gathers=gathers, label=label)
            return [_CopyBack(works, here, received_kn, sources)]
        first: list[Waitable] = []
        if label.tag and gathers:
            first = [Headers(group, [places[j] for j in sources], [places[j] for j in targets], label.tag)]
        # The group's own calls: `dist.irecv` looks ranks up in both directions, which costs more than a small message.
        # Messages of another tag are never taken for this one's: a slot of gloo is a queue of its own.
        both = [group.recv([received_kn[j]], places[j], label.tag) for j in sources]
        return first + both + [group.send([rows[j]], places[j], label.tag) for j in targets]

    def compare(self, tag: int) -> Sequence[Waitable]:
        others = [place for place in range(self._k) if place != self._me]
        return [Headers(self._group, others, others, tag)]

    def pieces_of(self, whole_n: Tensor) -> int:
        """The most pieces of `_PIECE_BYTES` or more that k ranks can share: one is summed while the next still arrives."""
        most = max(1, whole_n.nbytes // _PIECE_BYTES) if whole_n.device.type == "cpu" else 1
        return next((p for p in range(most, 1, -1) if whole_n.numel() % (p * self._k) == 0), 1)


class _CopyBack:
    """Rows on their way into host memory: waiting for them puts them where they belong."""

    def __init__(self, works: Sequence[Waitable], here: Tensor, there: Tensor, places: Sequence[int]) -> None:
        self._works, self._here, self._there, self._places = works, here, there, places

    def wait(self) -> None:
        for work in self._works:
            work.wait()
        for place in self._places:
            self._there[place].copy_(self._here[place])


class Headers:
    """The tag of this rank's gather to all others of it, and theirs to this one; on a slot of gloo's, so in order."""

    def __init__(self, group: dist.ProcessGroup, sources: Sequence[int], targets: Sequence[int], tag: int) -> None:
        self._mine, self._theirs = torch.tensor([tag]), torch.zeros(len(sources), 1, dtype=torch.int64)
        self._works = [group.recv([row], place, _HEADERS) for row, place in zip(self._theirs, sources, strict=True)]
        self._works += [group.send([self._mine], place, _HEADERS) for place in targets]

    @staticmethod
    def sent_bytes(k: int) -> int:
        """By one rank in a gather of k."""
        return 8 * (k - 1)

    def wait(self) -> None:
        """Raises OtherExchangeError."""
        for work in self._works:
            work.wait()
        mine = int(self._mine)
        for theirs in self._theirs.view(-1).tolist():
            if theirs != mine:
                raise OtherExchangeError("ranks are in different all-gathers", mine, theirs)
