"""One TOML file in: `file < --set` is the whole order of precedence, and a wrong key gets the nearest right one.

Configuration models are frozen pydantic models that stand beside the code that reads them; this file only loads,
overrides, explains and dumps them. What thinwire wrote itself as JSON is read here too: whatever is wrong with a file,
and with a value in it, is said in the same words everywhere.
"""

import difflib
import json
import math
import tomllib
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, model_validator

from thinwire.errors import ConfigError, ThinwireError

_OWN: Mapping[str, str] = {"written by": "thinwire"}
"""Context of what is checked without a word about old names."""
_FILE_BYTES = 1 << 24
"""Configuration files are read up to here: a device such as /dev/zero never ends."""


class Frozen(BaseModel):
    """Base of every configuration model and document: immutable, unknown keys refused, NaN and infinity refused.

    `renamed` has the names that keys had in the last release, which still work: old -> new. Whoever writes one in a run
    file or in Python is told the new one; documents that thinwire wrote itself are read without a word.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    renamed: ClassVar[Mapping[str, str]] = {}

    @model_validator(mode="before")
    @classmethod
    def _known_and_fit(cls, data: Any, info: ValidationInfo) -> Any:
        if isinstance(data, Mapping):
            data = cls._with_new_names(data, silent=info.context is not None)
            for key, value in data.items():
                if key not in cls.model_fields:
                    raise ValueError(f"unknown key {_shown(key)}{_nearest_key(str(key), cls)}")
                _refuse_unfit(key, value, cls.model_fields[key].annotation)
        return data

    def __getattr__(self, name: str) -> Any:
        now = type(self).renamed.get(name)
        if now is None:
            return super().__getattr__(name)  # type: ignore[misc]  # there, but only while the code runs
        warnings.warn(_note(name, now), FutureWarning, stacklevel=2)
        return getattr(self, now)

    @classmethod
    def _with_new_names(cls, data: Mapping[str, Any], *, silent: bool) -> Mapping[str, Any]:
        """`data` under the names that its keys have now. Raises ValueError where one is given under both."""
        old = [key for key in data if key in cls.renamed]
        for key in old:
            if cls.renamed[key] in data:
                raise ValueError(_both(key, cls.renamed[key]))
            if not silent:
                warnings.warn(_note(key, cls.renamed[key]), FutureWarning, stacklevel=4)
        return {cls.renamed.get(key, key): value for key, value in data.items()} if old else data

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """As pydantic's, with the names of the last release too."""
        return super().model_copy(update=update and self._with_new_names(update, silent=False), deep=deep)


def _note(old: str, new: str) -> str:
    return f"{old} is {new} now; the old name works for one more release"


def _both(old: str, new: str) -> str:
    return f"{old} is {new} now, and both are given; leave {old} out"


M = TypeVar("M", bound=BaseModel)


def _refuse_unfit(key: str, value: Any, annotation: Any) -> None:
    """Raises ValueError for true where a number belongs (pydantic takes it for 1), and for text that no file can hold."""
    if isinstance(value, bool) and not _takes_truth(annotation):
        raise ValueError(f"{key} = {_shown(value)}, but that is no yes-or-no setting; write its value")
    if isinstance(value, str) and ("\0" in value or not _encodable(value)):
        raise ValueError(f"{key} = {_shown(value)} is no UTF-8 text (or has a NUL in it); give another")
    if value == "" and Path in (annotation, *get_args(annotation)):
        raise ValueError(f"{key} is an empty path; give one, or leave {key} out")


def _takes_truth(annotation: Any) -> bool:
    return annotation in (bool, Any, object) or any(_takes_truth(part) for part in get_args(annotation))


def _encodable(text: str) -> bool:
    """False for what bytes in arguments become that are no UTF-8: nothing could write them down again."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def nearest(key: str, known: Sequence[str], *, listed: str = "there are", cutoff: float = 0.6) -> str:
    """The end of a sentence about an unknown word: what is near it, else all there are.

    Words that begin with it count as near, all of them: 'a100' is a100-80g and a100-40g.
    """
    begun = [name for name in known if name.lower().startswith(key.lower())] if key else []
    found = begun or difflib.get_close_matches(key.lower(), known, n=1, cutoff=cutoff)
    if found and len(found) <= 4:
        return f"; did you mean {' or '.join(map(repr, found))}?"
    return f"; {listed} {', '.join(known)}"


def _nearest_key(key: str, model: type[BaseModel]) -> str:
    return nearest(key, sorted(model.model_fields), listed="the keys here are", cutoff=0.5)


def parse_toml(text: str) -> dict[str, Any]:
    """Raises ValueError that says what is wrong with `text`."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"is not valid TOML: {error}") from None
    except ValueError:
        raise ValueError("holds a number of more digits than can be read") from None
    except RecursionError:
        raise ValueError("nests lists or tables too deeply to be read") from None


def parse_json(raw: bytes | str) -> Any:
    """Raises ValueError that says what is wrong with `raw`."""
    try:
        return json.loads(raw)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}" if raw else "it is empty"
        raise ValueError(f"is no JSON ({where})") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"is no UTF-8 text (byte {error.start})") from None
    except ValueError:
        raise ValueError("holds a number of more digits than can be read") from None
    except RecursionError:
        raise ValueError("nests lists or objects too deeply to be read") from None


def read_toml(path: Path) -> dict[str, Any]:
    """The file as nested dictionaries. Raises ConfigError if it is missing, unreadable or not TOML."""
    try:
        with path.open("rb") as file:
            raw = file.read(_FILE_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; give the path of a run file such as examples/stdlib.toml") from None
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read: {error.strerror or error}; give another, or make it readable"
        ) from None
    if len(raw) > _FILE_BYTES:
        raise ConfigError(f"{path} is larger than {_FILE_BYTES >> 20} MiB, so it is no run file; give another")
    try:
        return parse_toml(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is no UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except ValueError as error:
        raise ConfigError(f"{path} {error}") from None


def read_json(path: Path, *, error: type[ThinwireError] = ConfigError, way_out: str) -> Any:
    """What a JSON file of our own holds. Raises `error`, with `way_out` at the end of its sentence."""
    try:
        return parse_json(path.read_bytes())
    except OSError as reason:
        raise error(f"{path} cannot be read: {reason.strerror or reason}; {way_out}") from None
    except ValueError as reason:
        raise error(f"{path} cannot be read: it {reason}; {way_out}") from None


def read_document(
    path: Path, model: type[M], *, what: str, error: type[ThinwireError] = ConfigError, way_out: str
) -> M:
    """A JSON file of our own as `model`, `what` in words. Raises `error`: which field lacks or is wrong, and `way_out`."""
    tree = read_json(path, error=error, way_out=way_out)
    try:
        return model.model_validate(tree, context=_OWN)
    except ValidationError as reason:
        raise error(f"{path} is no {what}: {explain(reason)}; {way_out}") from None


def _value(text: str) -> Any:
    """A `--set` value: TOML if it parses as TOML, else the bare text (so that `a.b=node` needs no quotes)."""
    try:
        found = tomllib.loads(f"v = {text}")
    except tomllib.TOMLDecodeError:
        return text
    except (ValueError, RecursionError):
        raise ConfigError(f"--set: {_shown(text)} has too many digits or brackets to be read") from None
    if len(found) > 1:
        raise ConfigError(f"--set: {_shown(text)} is more than one value; repeat --set for each key")
    return found["v"]


def override(tree: dict[str, Any], settings: Sequence[str]) -> dict[str, Any]:
    """`tree` with each `"a.b=c"` of `settings` applied in order; `tree` itself is not changed. Raises ConfigError."""
    try:
        out = _copy(tree)
    except RecursionError:
        raise ConfigError("the file nests tables too deeply to be read") from None
    for setting in settings:
        path, equals, text = setting.partition("=")
        keys = [key.strip() for key in path.split(".")]
        if not equals or not all(keys):
            raise ConfigError(f"--set {_shown(setting)} is not of the form section.key=value")
        node = out
        for key in keys[:-1]:
            child = node.setdefault(key, {})
            if not isinstance(child, dict):
                raise ConfigError(f"--set {_shown(setting)}: {_shown(key)} is a value, not a section")
            node = child
        node[keys[-1]] = _value(text.strip())
    return out


def _copy(tree: dict[str, Any]) -> dict[str, Any]:
    return {key: _copy(value) if isinstance(value, dict) else value for key, value in tree.items()}


def build(model: type[M], tree: Mapping[str, Any], source: str) -> M:
    """`tree` checked against `model`. Raises ConfigError with one sentence that names the key and what is wrong.

    Keys may have the names of the last release, as in what thinwire wrote itself; `load` tells users of theirs.
    """
    try:
        return model.model_validate(tree, context=_OWN)
    except ValidationError as error:
        raise ConfigError(f"{source}: {explain(error)}") from None


_WORDS = {
    "int_type": "must be a whole number", "int_parsing": "must be a whole number",
    "int_from_float": "must be a whole number", "int_parsing_size": "must be a whole number of fewer digits",
    "float_type": "must be a number", "float_parsing": "must be a number", "bool_type": "must be true or false",
    "bool_parsing": "must be true or false", "string_type": "must be text", "path_type": "must be a path, as text",
    "tuple_type": "must be a list", "list_type": "must be a list", "dict_type": "must be a table",
    "mapping_type": "must be a table", "model_type": "must be a table", "model_attributes_type": "must be a table",
    "missing": "is required and missing", "too_short": "must not be empty",
    "string_pattern_mismatch": "must begin with a letter, and go on with letters, digits, dashes and underscores",
}  # fmt: skip
"""What is said of pydantic's kinds of errors; of others, what pydantic says."""


def explain(error: ValidationError) -> str:
    """The first error in a pydantic error as `section.key: sentence`."""
    errors = error.errors()
    first = errors[0]
    kind, where = first["type"], ".".join(_keys(first["loc"]))
    message = first["msg"].removeprefix("Value error, ")
    if kind != "value_error":
        message = _wanted(first, errors) or message.replace("Input should", "must")
        shown = first["input"]
        echoed = isinstance(shown, str | int | float) and len(_shown(shown)) < 80
        if echoed and kind not in ("missing", "too_short", "finite_number"):
            message = f"{message}, not {_shown(shown)}"
    return f"{where}: {message}" if where else message


def _wanted(first: Any, errors: Sequence[Any]) -> str:
    """What belongs there: of a union whatever its members say of the same place."""
    alike = [each for each in errors if _keys(each["loc"]) == _keys(first["loc"]) and each["type"].endswith("_type")]
    kinds = [each["type"] for each in alike] if first["type"].endswith("_type") else [first["type"]]
    words = list(dict.fromkeys(_WORDS[kind] for kind in kinds if kind in _WORDS))
    return " or ".join([*words[:1], *(word.removeprefix("must be ") for word in words[1:])])


def _keys(location: Iterable[int | str]) -> list[str]:
    """The user's keys of a place in a document; pydantic adds validators and the members of unions."""
    added = {model.__name__ for model in Frozen.__subclasses__()} | {"str", "int", "float", "bool"}
    return [str(part) for part in location if isinstance(part, int) or not ("[" in part or part in added)]


def show_text(text: str, most: int = 60) -> str:
    """What a user wrote, in quotes; of what is longer than `most` its beginning, and how long it is."""
    return repr(text) if len(text) <= most else f"{text[:most]!r}... ({len(text):,} characters)"


def _shown(value: Any) -> str:
    """A value as a user wrote it, cut short: an integer of thousands of digits cannot be printed, and need not be."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) and abs(value) >= 10**30:
        return "a number of more than 30 digits"
    return show_text(value) if isinstance(value, str) else repr(value)[:80]


def load(model: type[M], path: Path, settings: Sequence[str] = ()) -> M:
    """The TOML file at `path`, overridden by `settings`, checked against `model`. Raises ConfigError.

    A FutureWarning names the new name of each key that is given under an old one, in the file or in a setting.
    """
    notes: list[str] = []
    tree = _renamed_tree(model, read_toml(path), str(path), "", notes)
    given = [_renamed_setting(model, setting, notes) for setting in settings]
    loaded = build(model, override(tree, given), str(path))
    for note in notes:
        warnings.warn(note, FutureWarning, stacklevel=2)
    return loaded


def _renamed_tree(model: Any, tree: Mapping[str, Any], source: str, prefix: str, notes: list[str]) -> dict[str, Any]:
    """`tree` under the names that its keys have now, section by section."""
    out: dict[str, Any] = {}
    for key, value in tree.items():
        now, section = _now(model, key)
        if now != key:
            if now in tree:
                raise ConfigError(f"{source}: {_both(prefix + key, prefix + now)}")
            notes.append(f"{source}: {_note(prefix + key, prefix + now)}")
        nested = section is not None and isinstance(value, dict)
        out[now] = _renamed_tree(section, value, source, f"{prefix}{now}.", notes) if nested else value
    return out


def _renamed_setting(model: Any, setting: str, notes: list[str]) -> str:
    path, equals, text = setting.partition("=")
    keys = [key.strip() for key in path.split(".")]
    names: list[str] = []
    for key in keys:
        now, model = _now(model, key)
        names.append(now)
    if names == keys:
        return setting
    notes.append(f"--set {_note('.'.join(keys), '.'.join(names))}")
    return ".".join(names) + equals + text


def _now(model: Any, key: str) -> tuple[str, Any]:
    """The name that a key of `model` has now, and the model of the section that it is, if it is one."""
    if model is None:
        return key, None
    now = model.renamed.get(key, key)
    field = model.model_fields.get(now)
    kinds = () if field is None else (field.annotation, *get_args(field.annotation))
    return now, next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Frozen)), None)


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
