"""Whose fault it is that a collective did not end: the rank that did not come, never the one that waited for it.

A rank whose collective fails asks all others what they are doing (`thinwire.comm.status`) and decides whose state
explains it. The first verdict is told to everybody, so that all ranks name the same one: those that fail because the
first to give up has closed its connections, too.
"""

import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import psutil
import torch.distributed as dist

from thinwire.comm.interfaces import Presence
from thinwire.comm.status import StatusServer, call
from thinwire.errors import LinkError, RankLost, ThinwireError, UseError
from thinwire.units import show_seconds

_ANSWER_S, _CALLERS = 3.0, 64
_BACKENDS = re.compile(
    r"gloo/transport|third_party/gloo|connection closed by peer|connection reset by peer|timed out waiting \d+ms"
    r"|connectFullMesh failed|connection refused|broken pipe|socket timeout|wait timeout|NCCL|TCPStore|c10d",
    re.IGNORECASE,
)
"""How gloo, NCCL and torch's store speak of connections that failed."""

State = Literal["ended", "stopped", "unreachable", "silent", "here"]
_ORDER: tuple[State, ...] = ("ended", "stopped", "unreachable", "silent")


@dataclass(frozen=True)
class Answer:
    """What is known of another rank: how it is, why it cannot be asked, or what its notes say."""

    state: State
    why: str = ""
    notes: Mapping[str, Any] | None = None


class Peers:
    """All ranks of a world, as one of them knows them. Nothing is sent before something fails."""

    def __init__(self, rank: int, everyone: Sequence[Presence], server: StatusServer) -> None:
        self._rank, self._everyone, self._server = rank, everyone, server

    def explain(self, error: Exception) -> Exception:
        """What to raise for `error`: RankLost, or another rank's UseError, if it tells of a connection, else itself.

        A verdict is one sentence of ours, the same on all ranks: a connection's own wording never gets through.
        """
        if isinstance(error, RankLost) or not _is_of_links(error):
            return error
        status = self._server.status
        if status.verdict is None:
            found = find_lost(self._everyone, self._rank, status.snapshot(), self._ask_all())
            if status.verdict is None:  # nobody was faster
                status.verdict = found
                self._tell(found)
        if status.verdict.get("diverged"):
            return UseError(status.verdict["sentence"])
        return RankLost(status.verdict["sentence"], status.verdict["rank"])

    def tell_diverged(self, error: UseError) -> None:
        """Tell all others that ranks have gone different ways: what they raise once they find that nothing comes."""
        verdict = {"rank": self._rank, "sentence": str(error), "diverged": True}
        if self._server.status.verdict is None:
            self._server.status.verdict = verdict
        self._tell(verdict)

    def announce(self, error: Exception) -> None:
        """Tell all others that this rank fails, and why, before they find out that it is gone."""
        text = str(error).splitlines()[0] if str(error) else ""
        reason = text if isinstance(error, ThinwireError) else f"{type(error).__name__}: {text}"
        self._tell({"rank": self._rank, "sentence": f"{self._everyone[self._rank].who} failed: {reason}"})

    def introduction(self) -> str:
        """Over which interface this rank talks, and where another host uses one of another name."""
        own = self._everyone[self._rank]
        hosts = {each.machine: each for each in reversed(self._everyone)}
        if len(hosts) == 1:
            return f"rank {own.rank} talks over {own.over}; all {len(self._everyone)} ranks are on host {own.host}"
        names = {address.interface for address in own.route}
        others = [each for each in hosts.values() if {address.interface for address in each.route} != names]
        also = "".join(f"; rank {each.rank} on {each.host} over {each.over}" for each in reversed(others[-4:]))
        return f"rank {own.rank} talks over {own.over}: {len(self._everyone)} ranks on {len(hosts)} hosts{also}"

    @property
    def route(self) -> Sequence[str]:
        """The addresses at which this rank is reached."""
        return [address.ip for address in self._everyone[self._rank].route]

    @property
    def interfaces(self) -> Sequence[str]:
        return [address.interface for address in self._everyone[self._rank].route]

    @property
    def on_one_host(self) -> bool:
        return len({each.machine for each in self._everyone}) == 1

    def close(self) -> None:
        self._server.close()

    def _others(self) -> list[Presence]:
        return [each for each in self._everyone if each.rank != self._rank]

    def _ask_all(self) -> dict[int, Answer]:
        with ThreadPoolExecutor(_CALLERS) as pool:
            return dict(zip([each.rank for each in self._others()], pool.map(self._ask, self._others()), strict=True))

    def _ask(self, other: Presence) -> Answer:
        reached: list[bool] = []
        state = _process_state(other) if other.pids == self._everyone[self._rank].pids else None
        if state is not None:
            return Answer(state)
        try:
            request = {"token": self._server.token}
            notes = call(other.route[0].ip, other.port, request, _ANSWER_S, connected=lambda: reached.append(True))
        except (ConnectionRefusedError, ConnectionResetError):
            return Answer("ended")
        except OSError as error:
            return Answer("silent" if reached else "unreachable", error.strerror or str(error))
        return Answer("here", notes=notes)

    def _tell(self, verdict: Mapping[str, Any]) -> None:
        request = {"token": self._server.token, "verdict": verdict}

        def tell(other: Presence) -> None:
            try:
                call(other.route[0].ip, other.port, request, _ANSWER_S / 3)
            except OSError:
                return  # it is gone or does not listen: that is why others are told

        with ThreadPoolExecutor(_CALLERS) as pool:
            list(pool.map(tell, self._others()))


def find_lost(
    everyone: Sequence[Presence], me: int, mine: Mapping[str, Any], answers: Mapping[int, Answer]
) -> dict[str, Any]:
    """The rank that keeps others waiting, and a sentence about it. `mine`: this rank's own notes.

    In this order: a rank with a verdict of its own knows best; then who has ended, is stopped, cannot be reached or does
    not answer; then who waits for nobody; then who is at an earlier collective than the others.
    """
    for answer in answers.values():
        if answer.notes is not None and answer.notes["verdict"] is not None:
            return dict(answer.notes["verdict"])
    awaited = _awaited(me, mine)
    for state in _ORDER:
        found = [rank for rank, answer in sorted(answers.items()) if answer.state == state]
        if found:
            what = _IN_WORDS[state].format(
                why=answers[found[0]].why, to=everyone[found[0]].over, by=everyone[me].over, awaited=awaited
            )
            also = "".join(f"; so is rank {rank}" for rank in found[1:4])
            return {"rank": found[0], "sentence": f"{everyone[found[0]].who} {what}{also}"}
    notes = {rank: answer.notes for rank, answer in answers.items() if answer.notes is not None} | {me: mine}
    busy = [rank for rank, of_rank in notes.items() if of_rank["waiting"] is None and rank != me]
    if busy:
        rank = max(busy, key=lambda each: notes[each]["phase_s"])
        return {
            "rank": rank,
            "sentence": f"{everyone[rank].who} has not entered {awaited} but has been in {_doing(notes[rank])}",
        }
    least = min(notes, key=lambda each: (notes[each]["collectives"], each))
    if notes[least]["collectives"] < max(of_rank["collectives"] for of_rank in notes.values()):
        behind = f"waits in {notes[least]['waiting']}, an earlier one"
        return {"rank": least, "sentence": f"{everyone[least].who} has not entered {awaited} but {behind}"}
    rank = min(answers, default=me)
    return {
        "rank": rank,
        "sentence": f"nothing arrives any more between {everyone[me].who} over {everyone[me].over} and the other ranks, "
        f"{everyone[rank].who} at {everyone[rank].over} for one: all are in {awaited.rstrip(',')}",
    }


_IN_WORDS: dict[State, str] = {
    "ended": "has ended: {awaited} cannot be completed; its own message or log says why, or it was killed",
    "stopped": "is stopped (SIGSTOP): {awaited} cannot be completed",
    "unreachable": "cannot be reached any more at {to} from {by}: {why}; {awaited} cannot be completed",
    "silent": "does not answer at {to}: its process is stopped or its machine hangs; {awaited} cannot be completed",
}


def _awaited(me: int, mine: Mapping[str, Any]) -> str:
    if mine["waiting"] is None:
        return f"a collective of rank {me}"
    step = f" of step {mine['step']}" if mine["step"] is not None else ""
    return f"{mine['waiting']}{step}, for which rank {me} has waited {show_seconds(mine['waiting_s'])},"


def _doing(notes: Mapping[str, Any]) -> str:
    step = f" of step {notes['step']}" if notes["step"] is not None else ""
    return f"{notes['phase']}{step} for {show_seconds(notes['phase_s'])}"


def _process_state(other: Presence) -> State | None:
    """Whether a process of this machine has ended or is stopped; None: neither."""
    try:
        state = psutil.Process(other.pid).status()
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return "ended" if not psutil.pid_exists(other.pid) else None
    if state in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP):
        return "stopped"
    return "ended" if state in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD) else None


def _is_of_links(error: Exception) -> bool:
    """Whether it tells of a connection rather than of this rank's own work."""
    if isinstance(error, ThinwireError):
        return isinstance(error, LinkError)
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and bool(_BACKENDS.search(str(error))))
