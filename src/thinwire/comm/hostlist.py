"""Slurm's node lists: `n[003-005,9],m1`, `gpu-[1-2]-[01-16]`, `nodeA,nodeB[001,003]-ib`. A pure function, no torch.

Names stand between commas; a part of a name in brackets stands for each of its numbers and ranges in turn, with leading
zeros kept (`man scontrol`, show hostnames). Only the first name is wanted here, but the whole list has to be one.
"""

import re

from thinwire.errors import ConfigError

_TEXT, _BRACKET = re.compile(r"[A-Za-z0-9._-]+"), re.compile(r"\[([^\[\]]*)\]")
_RANGE = re.compile(r"([0-9]{1,18})(?:-([0-9]{1,18}))?")


def first_host(nodes: str) -> str:
    """The first name of a Slurm node list: `"n[003-005,9],m1"` -> `"n003"`. Raises ConfigError, with why it is none."""
    first, at = "", 0
    while True:
        name, at = _name(nodes, at)
        first = first or name
        if at == len(nodes):
            return first
        if nodes[at] != ",":
            raise _no_list(nodes, f"{nodes[at]!r} at position {at + 1} belongs to no name")
        at += 1


def _name(nodes: str, at: int) -> tuple[str, int]:
    """(the first host that the name at position `at` stands for, where the name ends)."""
    host, start = "", at
    while at < len(nodes) and nodes[at] != ",":
        if text := _TEXT.match(nodes, at):
            host, at = host + text[0], text.end()
        elif bracket := _BRACKET.match(nodes, at):
            host, at = host + _first_number(nodes, bracket[1]), bracket.end()
        else:
            break
    if not host:
        raise _no_list(nodes, f"there is no name at position {start + 1}")
    return host, at


def _first_number(nodes: str, inside: str) -> str:
    ranges = inside.split(",")
    for each in ranges:
        found = _RANGE.fullmatch(each)
        if found is None or int(found[2] or found[1]) < int(found[1]):
            raise _no_list(nodes, f"{_short(each)} in brackets is neither a number nor a range such as 003-005")
    return ranges[0].partition("-")[0]


def _no_list(nodes: str, why: str) -> ConfigError:
    return ConfigError(f"the Slurm node list {_short(nodes)} cannot be read: {why}; set MASTER_ADDR to the first host")


def _short(text: str) -> str:
    return repr(text[:60]) + "..." * (len(text) > 60)
