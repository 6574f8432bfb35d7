"""Frozen dataclasses <-> the command line and JSON, by one strict path: an unknown key or a wrong type is an error.

A field is written once, with its type, its default and what it means; the option, its help, its parsing and the JSON
key follow from it. Classes that inherit from each other share options.

    @dataclass(frozen=True, kw_only=True)
    class Options:
        data: str = setting(REQUIRED, "what to read", metavar="DATA", positional=True)
        epochs: int = setting(3, "passes over the data")          # --epochs 3
        passages: tuple[int, int] | None = setting(None, "...")   # --passages 128 64
        dims: list[int] | None = setting(None, "...")             # --dims 384 128
        fuse: bool = setting(False, "...")                        # --fuse, --no-fuse, --fuse true
        loss: dict[str, Any] = setting({"name": "x"}, "...")      # --loss.name x, --loss name=x, --loss '{"name": "x"}'

    options = parse(Options, ["pairs.csv", "--epochs", "1"])
"""

import copy
import dataclasses
import difflib
import json
import re
import shutil
import textwrap
import types
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from .files import read_object

Config = TypeVar("Config")
REQUIRED = dataclasses.MISSING
METAVARS = {int: "N", float: "X", str: "TEXT", Path: "PATH", bool: ""}
HELP_COLUMN = 26


def setting(default: Any, meaning: str, *, metavar: str | None = None, positional: bool = False) -> Any:
    """A dataclass field that is an option, or an argument known by its position.

    Args:
        default: REQUIRED when there is none.
        meaning: for the help, which adds the default unless this ends with one in brackets.
        metavar: what stands for the value in the help.
    """
    metadata = {"meaning": meaning, "metavar": metavar, "positional": positional}
    if isinstance(default, dict | list):
        return dataclasses.field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def to_dict(config: Any) -> dict[str, Any]:
    """Every field, defaults included, as JSON can hold it."""
    return dataclasses.asdict(config)


def from_dict(cls: type[Config], values: dict[str, Any], *, where: str = "configuration") -> Config:
    """The inverse of `to_dict`. Raises `ValueError` for an unknown key, or a value of the wrong type or range."""
    converted = _checked(cls, values, where)
    try:
        return cls(**converted)
    except ValueError as error:
        raise ValueError(f"{where}: {error}" if where else str(error)) from None


def check_types(config: Any) -> None:
    """Raises `ValueError` for the first field of a dataclass whose value is not of its annotated type."""
    for field in dataclasses.fields(config):
        _convert(getattr(config, field.name), field.type, field.name)


def changed(config: Any, names: Iterable[str]) -> list[str]:
    """The options of those fields whose value is not the default: ["--batch-size", "--no-merge"]."""
    defaults = {field.name: _default(field) for field in dataclasses.fields(config)}
    given = [name for name in names if getattr(config, name) != defaults[name]]
    return [option_name(f"no_{name}" if defaults[name] is True else name) for name in given]


def check_at_most_one(config: Any, *names: str) -> None:
    """Raises `ValueError` when more than one of the fields differs from its default."""
    if len(given := changed(config, names)) > 1:
        raise ValueError(f"{' and '.join(given)} cannot be combined")


def option_name(field_name: str) -> str:
    """The option of a field: "batch_size" -> "--batch-size"."""
    return f"--{field_name.replace('_', '-')}"


def suggestion(word: str, known: Iterable[str]) -> str:
    """What to add to an error about an unknown word: "; did you mean --epochs?", or nothing."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


# The command line.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Every command."""

    config: Path | None = setting(None, "JSON file with any of these options; the command line wins", metavar="FILE")
    quiet: bool = setting(False, "show no progress")


def parse(cls: type[Config], arguments: Sequence[str]) -> Config:
    """The dataclass (an `Options`) that a command line describes: defaults, then the file of --config, then the rest.

    Raises `ValueError` for what is unknown, missing, or of the wrong type or range.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}
    given, dotted = _read(fields, list(arguments))
    values, where = {}, ""
    if path := given.get("config"):
        values, where = read_object(path), f"{path} and command line"
        _checked(cls, values, path)
    values |= given
    for (name, *keys, last), text in dotted:
        target = values.setdefault(name, _default(fields[name]))
        for key in keys:
            target = target.setdefault(key, {})
            if not isinstance(target, dict):
                raise ValueError(f"--{'.'.join([name, *keys, last])}: {key} is {target!r}, which has no keys")
        target[last] = _from_text([text], Any)
    if missing := [field for name, field in fields.items() if name not in values and _default(field) is REQUIRED]:
        names = (f.metadata["metavar"] if f.metadata["positional"] else option_name(f.name) for f in missing)
        raise ValueError(f"missing {' and '.join(names)}")
    return from_dict(cls, values, where=where)


def _read(fields: dict[str, dataclasses.Field], words: list[str]) -> tuple[dict[str, Any], list[tuple[list, str]]]:
    """Splits a command line into {field: value} and the dotted options, [([field, key, ...], text of the value)]."""
    given, dotted, positions = {}, [], []
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            positions.append(word)
            continue
        option, equals, text = word.partition("=")
        words[:0] = [text] if equals else []
        first, *keys = option[2:].split(".")
        name = first.replace("-", "_")  # --batch_size, as the field is called, is the same as --batch-size
        negated = name not in fields and name.startswith("no_") and _is(fields.get(name[3:]), bool)
        name = name[3:] if negated else name
        if name not in fields or fields[name].metadata["positional"] or (keys and not _is(fields[name], dict)):
            raise ValueError(f"unknown option {option}{suggestion(f'--{first}', map(option_name, fields))}")
        kind = _without_none(fields[name].type)
        if kind is bool:
            word = words.pop(0) if equals or (words and words[0].lower() in ("true", "false")) else "true"
            given[name] = {"true": not negated, "false": negated}.get(word.lower(), word)
            continue
        texts = _take(words, kind, option)
        if _is(fields[name], dict):
            key, equals, value = texts[0].partition("=")
            if keys or (equals and not key.lstrip().startswith("{")):
                dotted.append(([name, *(keys or [key])], texts[0] if keys else value))
                continue
        value = _from_text(texts, fields[name].type)
        given[name] = [*given.get(name, ()), *value] if _repeated(kind) else value
    for field in (field for field in fields.values() if field.metadata["positional"]):
        count = len(positions) if _is(field, list) else 1
        if taken := positions[:count]:
            given[field.name] = _from_text(taken, field.type)
        positions = positions[count:]
    if positions:
        raise ValueError(f"unexpected argument {positions[0]!r}")
    return given, dotted


def _take(words: list[str], kind: Any, option: str) -> list[str]:
    """Takes the words that belong to one option off the front."""
    count = 1
    if typing.get_origin(kind) is tuple or _repeated(kind):
        count = len(typing.get_args(typing.get_args(kind)[0] if _repeated(kind) else kind))
    elif typing.get_origin(kind) is list:
        numbers = typing.get_args(kind)[0] in (int, float)
        ends = (i for i, word in enumerate(words) if word.startswith("--") or (numbers and not _is_number(word)))
        count = max(1, next(ends, len(words)))
    taken = words[:count]
    if len(taken) < count or any(word.startswith("--") for word in taken):
        raise ValueError(f"{option} expects {count} value{'s' * (count > 1)}")
    del words[:count]
    return taken


def _repeated(kind: Any) -> bool:
    """Whether an option may be given again and again, each time with the same number of values: list[tuple[...]]."""
    return typing.get_origin(kind) is list and typing.get_origin(typing.get_args(kind)[0]) is tuple


def _is_number(word: str) -> bool:
    return not isinstance(_from_text([word], float), str)


def _from_text(texts: list[str], wanted: Any) -> Any:
    """What the words of an option give for a type, as JSON would hold it; a word that does not fit stays a word."""
    kind = _without_none(wanted)
    origin, inside = typing.get_origin(kind), typing.get_args(kind)
    if kind is not wanted and texts in (["null"], ["None"]):
        return None
    if _repeated(kind):
        return [_from_text(texts, inside[0])]
    if origin in (list, tuple):
        return [_from_text([text], item) for text, item in zip(texts, inside * len(texts), strict=False)]
    (text,) = texts
    try:
        if kind in (int, float):
            return kind(text)
        return text if kind in (str, Path) or origin is typing.Literal else json.loads(text)
    except ValueError:
        return {"True": True, "False": False, "None": None}.get(text, text)


def format_help(cls: type, *, program: str, description: str, epilog: str = "") -> str:
    """What --help prints: positional arguments, the options of `cls`, then those of the classes that it inherits from,
    each under the beginning of its docstring."""
    classes = [owner for owner in cls.__mro__ if dataclasses.is_dataclass(owner)]
    groups: dict[str, list[str]] = {"Arguments": []} | {
        _title(owner, cls): [] for owner in sorted(classes, key=lambda owner: owner is Options)
    }
    for field in dataclasses.fields(cls):
        positional, kind = field.metadata["positional"], _without_none(field.type)
        owner = next(owner for owner in classes if field.name in owner.__annotations__)
        metavar = field.metadata["metavar"] or _metavar(kind)
        name = f"{option_name(field.name)} {metavar}".rstrip()
        if positional:
            name = f"{metavar} ..." if _is(field, list) else metavar
        if field.default is True:
            name = f"--[no-]{name[2:]}"
        groups["Arguments" if positional else _title(owner, cls)].append(_entry(name, _meaning(field)))
    usage = " ".join(["usage:", program, *(re.split(r"  +", entry)[1] for entry in groups["Arguments"]), "[options]"])
    sections = [f"{title}:\n" + "\n".join(entries) for title, entries in groups.items() if entries]
    return "\n\n".join([usage, description, *sections, *([epilog] if epilog else [])])


def _title(owner: type, cls: type) -> str:
    return "Options" if owner is cls else re.split(r"[.:]\s|\.?$", owner.__doc__, maxsplit=1)[0]


def _entry(name: str, meaning: str) -> str:
    """A line of the help; the name has a line of its own when it is long."""
    width = max(shutil.get_terminal_size().columns, 60) - 2
    lines = textwrap.wrap(meaning, width - HELP_COLUMN, break_on_hyphens=False)
    head = f"  {name}"
    first = head.ljust(HELP_COLUMN) if len(head) < HELP_COLUMN - 1 else f"{head}\n{' ' * HELP_COLUMN}"
    return first + f"\n{' ' * HELP_COLUMN}".join(lines)


def _meaning(field: dataclasses.Field) -> str:
    meaning, default = field.metadata["meaning"], _default(field)
    if _is(field, dict):
        meaning += f" (or --{field.name}.KEY VALUE)"
    if meaning.endswith("]") or default is False or default in (None, REQUIRED, {}, []):
        return meaning
    shown = " ".join(map(str, default)) if isinstance(default, list | tuple) else default
    return f"{meaning} [{shown if isinstance(shown, str) else json.dumps(shown)}]"


def _metavar(kind: Any) -> str:
    origin, inside = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return "|".join(map(str, inside))
    if origin is tuple:
        return " ".join(map(_metavar, inside))
    if origin is list:
        return _metavar(inside[0]) if _repeated(kind) else f"{_metavar(inside[0])} ..."
    return "KEY=VALUE" if (origin or kind) is dict else METAVARS.get(kind, "VALUE")


# Types.


def _checked(cls: type, values: Any, where: str | Path) -> dict[str, Any]:
    """The values, every key known and every value of its field's type."""
    if not isinstance(values, dict):
        raise ValueError(f"{where}: {type(values).__name__} found, expected an object")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for key in values:
        if key not in fields:
            raise ValueError(f"{where}: unknown key {key!r}, expected one of {', '.join(fields)}")
    names = {key: f"{where}: {key}" if where else option_name(key) for key in values}
    return {key: _convert(value, fields[key].type, names[key]) for key, value in values.items()}


def _convert(value: Any, wanted: Any, name: str) -> Any:
    """A value as its annotated type holds it: JSON's lists as tuples, its strings as paths. Else `ValueError`."""
    fits, converted = _fit(value, wanted)
    if not fits:
        raise ValueError(f"{name} is {value!r}, expected {_type_name(wanted)}")
    return converted


def _fit(value: Any, wanted: Any) -> tuple[bool, Any]:
    """(Whether a value is of a type, the value as that type holds it.)"""
    origin, inside = typing.get_origin(wanted), typing.get_args(wanted)
    if origin in (types.UnionType, typing.Union):
        return next((found for option in inside if (found := _fit(value, option))[0]), (False, value))
    if origin in (list, tuple):
        if not isinstance(value, list | tuple) or (origin is tuple and len(value) != len(inside)):
            return False, value
        found = [_fit(item, kind) for item, kind in zip(value, inside * len(value), strict=False)]
        return all(fits for fits, _ in found), origin(item for _, item in found)
    if origin is typing.Literal:
        return value in inside, value
    if wanted is Path:
        return isinstance(value, str | Path), Path(value) if isinstance(value, str) else value
    if wanted is Any or (wanted is float and type(value) is int):
        return True, value
    return isinstance(value, origin or wanted) and not (wanted in (int, float) and isinstance(value, bool)), value


def _type_name(wanted: Any) -> str:
    origin, inside = typing.get_origin(wanted), typing.get_args(wanted)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(map(_type_name, inside))
    if origin is typing.Literal:
        return "one of " + ", ".join(map(repr, inside))
    if origin is tuple:
        return f"{len(inside)} values ({', '.join(map(_type_name, inside))})"
    if origin is list:
        return f"a list of {_type_name(inside[0])}"
    return "null" if wanted is types.NoneType else getattr(wanted, "__name__", str(wanted))


def _without_none(wanted: Any) -> Any:
    """X of the annotation X | None."""
    options = [option for option in typing.get_args(wanted) if option is not types.NoneType]
    is_union = typing.get_origin(wanted) in (types.UnionType, typing.Union)
    return options[0] if is_union and len(options) == 1 else wanted


def _is(field: dataclasses.Field | None, kind: type) -> bool:
    """Whether a field holds a bool, dict or list."""
    plain = None if field is None else _without_none(field.type)
    return (typing.get_origin(plain) or plain) is kind


def _default(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is REQUIRED else field.default_factory()
