"""The event log: valid JSON always, torn ends left out, later lines count."""

import errno
import json
import os
from pathlib import Path

import pytest

from thinwire.errors import ConfigError
from thinwire.files import events
from thinwire.files.events import EventLog, read_events, steps


def test_records_survive_and_non_finite_numbers_stay_valid_json(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl")
    log.write("step", step=1, loss=float("nan"), wire={"node": {"G-reduce": 8}}, row=[float("inf")])
    log.write("eval", step=1, loss=2.0)
    log.close()
    for line in (tmp_path / "events.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: (_ for _ in ()).throw(ValueError(name)))
    assert next(read_events(tmp_path / "events.jsonl", "step"))["loss"] == "nan"


def test_a_torn_last_line_is_left_out_and_a_repeated_step_counts_once(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text('{"event":"step","step":1,"loss":3}\n{"event":"step","step":1,"loss":2}\n{"event":"step","st')
    assert steps(path) == {1: {"event": "step", "step": 1, "loss": 2}}


TORN = [
    b'{"event":"step","st',
    b'{"event":"step","step":3}',
    b"\0\0\0\0",
    b"\0\0\0\n",
    b"\xff\xfe\n\x80",
    b"\n\n",
    b"\0" * 200_000,
    b'{"event":"step","x":"' + b"y" * 200_000,
]


@pytest.mark.parametrize("torn", TORN, ids=lambda torn: repr(torn[:20]))
@pytest.mark.parametrize("before", [0, 2])
def test_a_torn_end_is_left_out_when_read_and_cut_off_when_appended_to(
    tmp_path: Path, torn: bytes, before: int
) -> None:
    path = tmp_path / "events.jsonl"
    whole = b"".join(b'{"event":"step","step":%d,"long":"%s"}\n' % (i + 1, b"z" * 70_000) for i in range(before))
    path.write_bytes(whole + torn)
    assert list(steps(path)) == list(range(1, before + 1))
    log = EventLog(path)
    log.write("step", step=before + 1)
    log.close()
    assert path.read_bytes().startswith(whole)
    assert list(steps(path)) == list(range(1, before + 2))


def test_a_damaged_line_with_others_behind_it_is_named(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text('{"event":"step","step":1}\n{"event":"step","st{"event":"run_start"}\n{"event":"step","step":2}\n')
    with pytest.raises(ValueError, match="line 2 is no record"):
        steps(path)


def test_a_log_that_cannot_be_opened_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").mkdir()
    with pytest.raises(ConfigError, match=r"events\.jsonl cannot be written: Is a directory"):
        EventLog(tmp_path / "events.jsonl")


def _disk_with_room(patch: pytest.MonkeyPatch, room: list[int], number: int) -> None:
    """Writes get no more than `room[0]` bytes, as on a disk that fills up."""
    plain = os.write

    def write(descriptor: int, raw: memoryview) -> int:
        if room[0] == 0:
            raise OSError(number, os.strerror(number))
        written = plain(descriptor, raw[: room[0]])
        room[0] -= written
        return written

    patch.setattr(os, "write", write)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO], ids=lambda number: errno.errorcode[number])
def test_what_a_full_disk_does_not_take_waits_in_order_and_nothing_is_torn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    path, room = tmp_path / "events.jsonl", [100]
    _disk_with_room(monkeypatch, room, number)
    log = EventLog(path)
    for step in range(1, 6):
        log.write("step", step=step)
    assert log.refused == os.strerror(number) and log.waiting == 5 - len(steps(path))
    assert path.read_bytes().endswith(b"}\n") and list(steps(path)) == [1, 2][: len(steps(path))]
    room[0] = 10**6
    log.write("step", step=6)
    assert log.refused is None and log.waiting == 0
    assert list(steps(path)) == [1, 2, 3, 4, 5, 6]
    log.close()


def test_only_so_many_records_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "_WAITING_MOST", 3)
    room = [0]
    _disk_with_room(monkeypatch, room, errno.ENOSPC)
    log = EventLog(tmp_path / "events.jsonl")
    for step in range(1, 6):
        log.write("step", step=step)
    assert (log.waiting, log.lost) == (3, 2)
    room[0] = 10**6
    log.write("step", step=6)
    assert list(steps(tmp_path / "events.jsonl")) == [4, 5, 6] and log.lost == 3
    log.close()
