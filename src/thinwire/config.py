"""One TOML file in: `file < --set` is the whole order of precedence, and a wrong key gets the nearest right one.

Configuration models are frozen pydantic models that stand beside the code that reads them; this file only loads,
overrides, explains and dumps them.
"""

import difflib
import math
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from thinwire.errors import ConfigError


class Frozen(BaseModel):
    """Base of every configuration model and document: immutable, unknown keys refused, NaN and infinity refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _nearest_key(cls, data: Any) -> Any:
        if isinstance(data, Mapping):
            for key in data:
                if key not in cls.model_fields:
                    raise ValueError(f"unknown key {key!r}{_nearest(str(key), list(cls.model_fields))}")
        return data


M = TypeVar("M", bound=BaseModel)


def _nearest(key: str, known: Sequence[str]) -> str:
    match = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"; did you mean {match[0]!r}?" if match else f"; the keys here are {', '.join(sorted(known))}"


def read_toml(path: Path) -> dict[str, Any]:
    """The file as nested dictionaries. Raises ConfigError if it is missing, unreadable or not TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; give the path of a run file such as examples/stdlib.toml") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None


def _value(text: str) -> Any:
    """A `--set` value: TOML if it parses as TOML, else the bare text (so that `a.b=node` needs no quotes)."""
    try:
        return tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        return text


def override(tree: dict[str, Any], settings: Sequence[str]) -> dict[str, Any]:
    """`tree` with each `"a.b=c"` of `settings` applied in order; `tree` itself is not changed. Raises ConfigError."""
    out = _copy(tree)
    for setting in settings:
        path, equals, text = setting.partition("=")
        keys = [key.strip() for key in path.split(".")]
        if not equals or not all(keys):
            raise ConfigError(f"--set {setting!r} is not of the form section.key=value")
        node = out
        for key in keys[:-1]:
            child = node.setdefault(key, {})
            if not isinstance(child, dict):
                raise ConfigError(f"--set {setting!r}: {key!r} is a value, not a section")
            node = child
        node[keys[-1]] = _value(text.strip())
    return out


def _copy(tree: dict[str, Any]) -> dict[str, Any]:
    return {key: _copy(value) if isinstance(value, dict) else value for key, value in tree.items()}


def build(model: type[M], tree: Mapping[str, Any], source: str) -> M:
    """`tree` checked against `model`. Raises ConfigError with one sentence that names the key and the trouble."""
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{source}: {explain(error)}") from None


def explain(error: ValidationError) -> str:
    """The first trouble of a pydantic error as `section.key: sentence`."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"] if not str(part).startswith("function-"))
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] not in ("value_error", "missing"):
        shown = first["input"]
        message = f"{message[:1].lower()}{message[1:]}, not {shown!r}" if _short(shown) else message
    if first["type"] == "missing":
        message = "is required and missing"
    return f"{where}: {message}" if where else message


def _short(value: Any) -> bool:
    return isinstance(value, str | int | float | bool) and (not isinstance(value, str) or len(value) < 80)


def load(model: type[M], path: Path, settings: Sequence[str] = ()) -> M:
    """The TOML file at `path`, overridden by `settings`, checked against `model`. Raises ConfigError."""
    return build(model, override(read_toml(path), settings), str(path))


def dump_toml(config: BaseModel) -> str:
    """The resolved configuration as TOML text that `load` reads back to an equal model."""
    import tomli_w

    return tomli_w.dumps(_without_none(config.model_dump(mode="json")))


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_none(item) for item in value]
    return value


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    """`(dotted key, old value, new value)` for every leaf that differs; a missing leaf counts as None."""
    out: list[tuple[str, Any, Any]] = []
    for key in sorted({*old, *new}):
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            out += differences(before, after, f"{prefix}{key}.")
        elif before != after and not _both_nan(before, after):
            out.append((f"{prefix}{key}", before, after))
    return out


def _both_nan(a: Any, b: Any) -> bool:
    return isinstance(a, float) and isinstance(b, float) and math.isnan(a) and math.isnan(b)
