"""The error tree is drawn as it is."""

from collections.abc import Iterator

from thinwire import errors


def _drawn(error: type[errors.ThinwireError], depth: int = 1) -> Iterator[tuple[int, str, str]]:
    yield depth, error.__name__, str(error.exit_status)
    for below in error.__subclasses__():
        if below.__module__ == errors.__name__:
            yield from _drawn(below, depth + 1)


def test_the_tree_in_the_docstring_is_that_of_the_classes() -> None:
    assert errors.__doc__ is not None
    lines = [line for line in errors.__doc__.splitlines() if line.startswith("    ")]
    assert lines[0].split() == ["ThinwireError", "exit", "status"]
    found = [((len(line) - len(line.lstrip())) // 4, *line.split()) for line in lines[1:]]
    assert found == list(_drawn(errors.ThinwireError))[1:]
