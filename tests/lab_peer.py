"""A rank for tests of the lab, standard library only: `python lab_peer.py ring BYTES | stream | sleep | fail RANK`."""

import os
import socket
import sys
import threading
import time
from pathlib import Path

_PORT = 5000


def connect(host: int, rank: int) -> socket.socket:
    """Connect to a rank's port, waiting for it to be there."""
    while True:
        try:
            return socket.create_connection((f"host{host}", _PORT + rank), timeout=30)
        except OSError:
            time.sleep(0.1)


def resent() -> int:
    """Segments that this host's kernel has sent again: on a busy machine an acknowledgement may come too late."""
    counters = Path("/proc/net/snmp").read_text().splitlines()
    names, values = (line.split() for line in counters if line.startswith("Tcp:"))
    return int(values[names.index("RetransSegs")])


def ring(size: int) -> None:
    """Send `size` bytes to the next rank while receiving as many from the one before; print seconds, resent segments."""
    rank, ranks, per_host = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    after = (rank + 1) % ranks
    with socket.create_server(("0.0.0.0", _PORT + rank)) as door, connect(after // per_host, after) as out:
        before, _ = door.accept()
        for _ in range(2):  # the first time round says that all are there, the second one that they may begin
            if rank == 0:
                out.sendall(b"!")
            before.recv(1)
            if rank != 0:
                out.sendall(b"!")
        start_s = time.monotonic()
        sender = threading.Thread(target=out.sendall, args=(b"x" * size,))
        sender.start()
        left = size
        while left and (got := len(before.recv(1 << 20))):
            left -= got
        sender.join()
        print(f"{time.monotonic() - start_s:.6f} {resent()}")
        before.close()
    sys.exit(1 if left else 0)


def stream() -> None:
    """Rank 1 sends to rank 0 for ever."""
    if os.environ["RANK"] == "0":
        with socket.create_server(("0.0.0.0", _PORT)) as door:
            before, _ = door.accept()
            while before.recv(1 << 16):
                pass
    elif os.environ["RANK"] == "1":
        with connect(0, 0) as out:
            out.settimeout(None)
            while True:
                out.sendall(b"x" * (1 << 14))
    else:
        time.sleep(600)


def main() -> None:
    what = sys.argv[1]
    if what == "ring":
        ring(int(sys.argv[2]))
    elif what == "stream":
        stream()
    elif what == "fail":
        print("some last words", flush=True)
        if os.environ["RANK"] == sys.argv[2]:
            sys.exit(7)
        time.sleep(600)
    elif what == "sleep":
        print("asleep", flush=True)
        time.sleep(600)


if __name__ == "__main__":
    main()
