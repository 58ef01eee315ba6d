"""What the site has beyond the Markdown files: a reference from config models and docstrings, and the examples."""

import ast
import inspect
import itertools
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

import thinwire
from thinwire.lab.config import LabConfig
from thinwire.plan.sync import SyncConfig
from thinwire.train.config import RunConfig

ROOT = Path(__file__).parents[1]
_PLOT = re.compile(r'<img [^>]*src="([^"]+\.png)"[^>]*>')
_INLINE = re.compile(r"<code>([^<]*)</code>")
_HYPHENATED = re.compile(r"[\w-]*-[\w-]+")
_BARE_BAR = re.compile(r"(`[^`]*`)|\|")
_OUTSIDE = re.compile(r"\]\(\.\./(examples|benchmarks)/([^)]+)\)")


def on_files(files: Files, config: Any) -> Files:
    """The generated pages, and copies of the files outside docs/ that pages link to."""
    files.append(File.generated(config, "reference.md", content=reference()))
    files.append(File.generated(config, "library.md", content=library()))
    linked = {match.groups() for page in Path(config.docs_dir).rglob("*.md") for match in _links(page)}
    for folder, name in sorted(linked):
        content = (ROOT / folder / name).read_bytes()
        files.append(File.generated(config, f"source/{folder}/{name}.txt", content=content))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links to files outside docs/ lead to their copies."""
    return _OUTSIDE.sub(r"](source/\1/\2.txt)", markdown)


def on_page_content(html: str, **_: Any) -> str:
    """A picture of many small figures opens alone at a click, where a phone can enlarge it; `--options` stay in a line."""
    html = _INLINE.sub(lambda code: f"<code>{_HYPHENATED.sub(_kept, code[1])}</code>", html)
    return _PLOT.sub(r'<a href="\1">\g<0></a>', html)


def _kept(match: re.Match[str]) -> str:
    return f'<span class="word">{match[0]}</span>' if len(match[0]) < 25 else match[0]


def _links(page: Path) -> Iterator[re.Match[str]]:
    return _OUTSIDE.finditer(page.read_text(encoding="utf-8"))


def reference() -> str:
    """Every key of a run file and of a lab file: type, default, meaning."""
    parts = ["# Every key\n\nMade from the configuration models. `required` has no default.\n"]
    parts += _section("", RunConfig, nested=False)
    for name, field in RunConfig.model_fields.items():
        parts += _section(name, _model(field))
    parts += (
        _section("plan.sync", SyncConfig) if "sync" not in _model(RunConfig.model_fields["plan"]).model_fields else []
    )
    return "\n".join([*parts, "## A lab file\n", *_table(LabConfig), ""])


def _section(path: str, model: type[BaseModel], *, nested: bool = True) -> Iterator[str]:
    if path:
        yield f"## [{path}]\n\n{inspect.cleandoc(model.__doc__ or '')}\n"
        yield from _table(model)
    for name, field in model.model_fields.items() if nested else ():
        for inner in _models_in(field.annotation):
            yield from _section(f"{path}.{name}", inner)


def _table(model: type[BaseModel]) -> Iterator[str]:
    said = attribute_docstrings(model)
    yield "| key | type | default | meaning |\n| --- | --- | --- | --- |"
    for name, field in model.model_fields.items():
        cells = (f"`{name}`", f"`{_type(field)}`", _default(field), said.get(name, ""))
        yield "| " + " | ".join(_BARE_BAR.sub(_escaped, " ".join(cell.split())) for cell in cells) + " |"
    yield ""


def _escaped(match: re.Match[str]) -> str:
    """Between backticks a bar is no border of a cell, and a backslash before it would be seen."""
    return match[1] or "\\|"


def _type(field: FieldInfo) -> str:
    text = field.annotation.__name__ if isinstance(field.annotation, type) else str(field.annotation)
    text = re.sub(r"\b(typing|collections\.abc|pathlib|thinwire(\.\w+)*)\.", "", text).replace("NoneType", "None")
    return re.sub(r"^Optional\[(.*)\]$", r"\1 | None", text)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.default if field.default is not PydanticUndefined else None
    return "" if value is None or isinstance(value, BaseModel) else f"`{value!r}`"


def _model(field: FieldInfo) -> type[BaseModel]:
    return next(iter(_models_in(field.annotation)))


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in getattr(annotation, "__args__", ()):
        yield from _models_in(part)


def attribute_docstrings(model: type[BaseModel]) -> dict[str, str]:
    """The strings that stand below the fields of `model` and of the models it extends."""
    out: dict[str, str] = {}
    for base in reversed(model.__mro__):
        if issubclass(base, BaseModel) and base.__module__.startswith("thinwire"):
            body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0].body  # type: ignore[attr-defined]
            for before, after in itertools.pairwise(body):
                if isinstance(before, ast.AnnAssign) and isinstance(before.target, ast.Name) and _is_text(after):
                    out[before.target.id] = inspect.cleandoc(after.value.value)
    return out


def _is_text(node: Any) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def library() -> str:
    """The public names with their signatures and docstrings."""
    parts = ["# The library\n\n`from thinwire import ...`; made from the docstrings.\n"]
    for name in thinwire.__all__:
        parts += _entry(name, getattr(thinwire, name), "##")
    return "\n".join(parts)


def _entry(name: str, thing: Any, heading: str) -> Iterator[str]:
    yield f"{heading} {name}\n"
    if isinstance(thing, type) and issubclass(thing, BaseModel):
        yield f"{inspect.cleandoc(thing.__doc__ or '')}\n"
        yield from _table(thing)
    else:
        yield f"```python\n{name}{inspect.signature(thing)}\n```\n\n{inspect.cleandoc(thing.__doc__ or '')}\n"
    if isinstance(thing, type):
        for method, function in vars(thing).items():
            plain = getattr(function, "__func__", function)
            documented = inspect.isfunction(plain) and plain.__doc__ and plain.__module__.startswith("thinwire")
            if documented and not method.startswith("_"):
                yield from _entry(method, plain, heading + "#")
