"""All modules with one difficulty each, by name."""

from zoo import absent, compiled, containers, forwards, kinds, layers, outputs, reads
from zoo.cases import Case

_FILES = (forwards, containers, outputs, absent, reads, kinds, layers, compiled)


def modules() -> dict[str, Case]:
    found = (value for file in _FILES for value in vars(file).values() if isinstance(value, Case))
    return {case.name: case for case in found}
