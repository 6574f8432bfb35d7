"""Frozen dataclasses <-> the command line and JSON, by one strict path: an unknown key or a wrong type is an error.

A field is written once, with its type, default and meaning; the option, its help, its parsing and the JSON key follow.
Classes that inherit from each other share options.

    @dataclass(frozen=True, kw_only=True)
    class MyOptions(Options):
        data: str = setting(REQUIRED, "what to read", metavar="DATA", positional=True)
        dims: list[int] | None = setting(None, "...")         # --dims 384 128
        fuse: bool = setting(False, "...")                    # --fuse, --no-fuse, --fuse true
        loss: dict[str, Any] = setting({"name": "x"}, "...")  # --loss.name x, --loss name=x, --loss '{"name": "x"}'

    options = parse(MyOptions, ["pairs.csv", "--dims", "384", "128"])
"""

import copy
import dataclasses
import difflib
import json
import math
import operator
import re
import shutil
import textwrap
import types
import typing
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

from .files import read_object

Config = TypeVar("Config")
REQUIRED = dataclasses.MISSING
BOUNDS = {"at least": operator.ge, "above": operator.gt, "below": operator.lt}
METAVARS = {int: "N", float: "X", str: "TEXT", bool: "", dict: "KEY=VALUE"}


def setting(
    default: Any,
    meaning: str,
    *,
    metavar: str | None = None,
    positional: bool = False,
    least: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> Any:
    """A dataclass field that is an option, or an argument known by its position.

    Args:
        default: REQUIRED when there is none.
        meaning: for the help, which adds the default unless this ends with one in brackets.
        metavar: what stands for the value in the help.
        least, above, below: the range of a number; with any of them it also has to be finite.
    """
    bounds = {name: bound for name, bound in zip(BOUNDS, (least, above, below), strict=True) if bound is not None}
    metadata = {"meaning": meaning, "metavar": metavar, "positional": positional, "bounds": bounds}
    if isinstance(default, dict | list):
        return dataclasses.field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def to_dict(config: Any) -> dict[str, Any]:
    """Every field, defaults included, as JSON can hold it."""
    return dataclasses.asdict(config)


def from_dict(cls: type[Config], values: dict[str, Any], *, where: str = "configuration") -> Config:
    """The inverse of `to_dict`. Raises `ValueError` for an unknown key, or a value of the wrong type or range."""
    _check(cls, values, where)
    try:
        return cls(**values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}" if where else str(error)) from None


def part(options: Any, cls: type[Config]) -> Config:
    """The configuration among the options of a class that inherits from it."""
    return cls(**{field.name: getattr(options, field.name) for field in dataclasses.fields(cls)})


def check_types(config: Any) -> None:
    """Raises `ValueError` for the first field of a dataclass whose value is not of its type or not in its range."""
    for field in dataclasses.fields(config):
        value, bounds = getattr(config, field.name), field.metadata.get("bounds")
        _check_type(value, field.type, field.name)
        if not bounds or value is None:
            continue
        if not (abs(value) < math.inf and all(BOUNDS[name](value, bound) for name, bound in bounds.items())):
            expected = " and ".join(f"{name} {bound}" for name, bound in bounds.items())
            raise ValueError(f"{field.name} is {value}, expected {expected}")


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

    config: str | None = setting(None, "JSON file with any of these options; the command line wins", metavar="FILE")
    quiet: bool = setting(False, "show no progress")


def parse(cls: type[Config], arguments: Sequence[str]) -> Config:
    """The dataclass (an `Options`) that a command line describes: defaults, then the file of --config, then the rest.

    Raises `ValueError` for what is unknown, missing, or of the wrong type or range.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}
    given, inner = _read(fields, list(arguments))
    values, where = {}, ""
    if path := given.get("config"):
        values, where = read_object(path), f"{path} and command line"
        _check(cls, values, path)
    values |= given
    for (name, *keys, last), text in inner:
        target = values.setdefault(name, _default(fields[name]))
        for key in keys:
            target = target.setdefault(key, {})
            if not isinstance(target, dict):
                raise ValueError(f"--{'.'.join([name, *keys, last])}: {key} is {target!r}, which has no keys")
        target[last] = _from_text(text, Any)
    if missing := [field for name, field in fields.items() if name not in values and _default(field) is REQUIRED]:
        names = (f.metadata["metavar"] if f.metadata["positional"] else option_name(f.name) for f in missing)
        raise ValueError(f"missing {' and '.join(names)}")
    return from_dict(cls, values, where=where)


def _read(fields: dict[str, dataclasses.Field], words: list[str]) -> tuple[dict[str, Any], list[tuple[list, str]]]:
    """Splits a command line into {field: value}, and [([field, key, ...], text)] of what is set inside of dicts."""
    given, inner, positions = {}, [], []
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            positions.append(word)
            continue
        option, equals, text = word.partition("=")
        words[:0] = [text] if equals else []
        first, *keys = option[2:].split(".")
        name = first.replace("-", "_")  # --batch_size, as the field is called, is the same as --batch-size
        negated = name not in fields and name.startswith("no_") and name[3:] in fields
        field = fields.get(name[3:] if negated else name)
        kind, item = (None, None) if field is None else _kind(field)
        if (
            kind is None
            or field.metadata["positional"]
            or (keys and kind is not dict)
            or (negated and kind is not bool)
        ):
            raise ValueError(f"unknown option {option}{suggestion(f'--{first}', map(option_name, fields))}")
        if kind is bool:
            word = words.pop(0) if equals or (words and words[0].lower() in ("true", "false")) else "true"
            given[field.name] = {"true": not negated, "false": negated}.get(word.lower(), word)
            continue
        texts = _take(words, option, many=kind is list, numbers=item in (int, float))
        key, equals, text = texts[0].partition("=")
        if keys:
            inner.append(([name, *keys], texts[0]))
        elif kind is dict and equals and not key.lstrip().startswith("{"):
            inner.append(([name, key], text))
        elif kind is list and texts != ["null"]:
            given[name] = [*given.get(name, ()), *(_from_text(text, item) for text in texts)]
        else:
            given[name] = _from_text(texts[0], field.type)
    for field in (field for field in fields.values() if field.metadata["positional"]):
        many = _kind(field)[0] is list
        if positions:
            given[field.name] = positions if many else positions.pop(0)
            positions = [] if many else positions
    if positions:
        raise ValueError(f"unexpected argument {positions[0]!r}")
    return given, inner


def _take(words: list[str], option: str, *, many: bool, numbers: bool) -> list[str]:
    """Takes the values of an option off the front of the words: one, or all up to the next option or non-number."""
    count = 1
    while many and count < len(words) and not words[count].startswith("--"):
        if numbers and isinstance(_from_text(words[count], float), str):
            break
        count += 1
    if not words or words[0].startswith("--"):
        raise ValueError(f"{option} expects a value")
    taken = words[:count]
    del words[:count]
    return taken


def _from_text(text: str, wanted: Any) -> Any:
    """What a word of the command line gives for a type, as JSON would hold it; if it does not fit, the word."""
    kind = _without_none(wanted)
    if kind is not wanted and text in ("null", "None"):
        return None
    try:
        if kind in (int, float):
            return kind(text)
        return text if kind is str or typing.get_origin(kind) is typing.Literal else json.loads(text)
    except ValueError:
        return {"True": True, "False": False, "None": None}.get(text, text)


def format_help(cls: type, *, program: str, description: str, epilog: str = "") -> str:
    """What --help prints: positional arguments, the options of `cls`, then those of the classes that it inherits from,
    each under the beginning of its docstring."""
    owners = [owner for owner in cls.__mro__ if dataclasses.is_dataclass(owner)]
    titles = {owner: re.split(r"[.:]\s|\.?$", owner.__doc__, maxsplit=1)[0] for owner in owners} | {cls: "Options"}
    groups = {"Arguments": [], **{titles[owner]: [] for owner in sorted(owners, key=lambda owner: owner is Options)}}
    usage = ["usage:", program]
    for field in dataclasses.fields(cls):
        owner = next(owner for owner in owners if field.name in owner.__annotations__)
        kind, item = _kind(field)
        choices = "|".join(typing.get_args(item)) if typing.get_origin(item) is typing.Literal else None
        value = field.metadata["metavar"] or choices or METAVARS.get(item, "VALUE")
        value += " ..." * (kind is list and (field.metadata["positional"] or not field.metadata["metavar"]))
        if field.metadata["positional"]:
            usage.append(value)
            groups["Arguments"].append(_entry(value, field))
        else:
            name = option_name(field.name) if field.default is not True else f"--[no-]{option_name(field.name)[2:]}"
            groups[titles[owner]].append(_entry(f"{name} {value}".rstrip(), field))
    sections = [f"{title}:\n" + "\n".join(entries) for title, entries in groups.items() if entries]
    return "\n\n".join([" ".join([*usage, "[options]"]), description, *sections, *([epilog] if epilog else [])])


def _entry(name: str, field: dataclasses.Field, *, column: int = 26) -> str:
    """A name and its meaning, from a column on; a long name has a line of its own."""
    meaning, default = field.metadata["meaning"], _default(field)
    meaning += f" (or --{field.name}.KEY VALUE)" if _kind(field)[0] is dict else ""
    if not (meaning.endswith("]") or default is False or default in (None, REQUIRED, {}, [])):
        shown = " ".join(map(str, default)) if isinstance(default, list) else default
        meaning += f" [{shown if isinstance(shown, str) else json.dumps(shown)}]"
    width = max(shutil.get_terminal_size().columns, 60) - 2 - column
    first = f"  {name}".ljust(column) if len(name) < column - 3 else f"  {name}\n{' ' * column}"
    return first + f"\n{' ' * column}".join(textwrap.wrap(meaning, width, break_on_hyphens=False))


# Types.


def _check(cls: type, values: Any, where: str) -> None:
    """Raises `ValueError` unless every key is a field, and every value of its type."""
    if not isinstance(values, dict):
        raise ValueError(f"{where}: {type(values).__name__} found, expected an object")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for key, value in values.items():
        if key not in fields:
            raise ValueError(f"{where}: unknown key {key!r}, expected one of {', '.join(fields)}")
        _check_type(value, fields[key].type, f"{where}: {key}" if where else option_name(key))


def _check_type(value: Any, wanted: Any, name: str) -> None:
    if not _has_type(value, wanted):
        raise ValueError(f"{name} is {value!r}, expected {_type_name(wanted)}")


def _has_type(value: Any, wanted: Any) -> bool:
    origin, inside = typing.get_origin(wanted), typing.get_args(wanted)
    if origin in (types.UnionType, typing.Union):
        return any(_has_type(value, option) for option in inside)
    if origin is typing.Literal:
        return value in inside
    if origin is list:
        return isinstance(value, list | tuple) and all(_has_type(item, inside[0]) for item in value)
    if wanted is Any or (wanted in (int, float) and isinstance(value, bool)):
        return wanted is Any
    return isinstance(value, (int, float) if wanted is float else origin or wanted)


def _type_name(wanted: Any) -> str:
    origin, inside = typing.get_origin(wanted), typing.get_args(wanted)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(map(_type_name, inside))
    if origin is typing.Literal:
        return "one of " + ", ".join(map(repr, inside))
    if origin is list:
        return f"a list of {_type_name(inside[0])}"
    return "null" if wanted is types.NoneType else getattr(wanted, "__name__", str(wanted))


def _without_none(wanted: Any) -> Any:
    """X of the annotation X | None."""
    options = [option for option in typing.get_args(wanted) if option is not types.NoneType]
    is_union = typing.get_origin(wanted) in (types.UnionType, typing.Union)
    return options[0] if is_union and len(options) == 1 else wanted


def _kind(field: dataclasses.Field) -> tuple[Any, Any]:
    """(list, X) of a list[X]; else a type twice, of dict[str, X] dict."""
    plain = _without_none(field.type)
    if typing.get_origin(plain) is list:
        return list, typing.get_args(plain)[0]
    plain = dict if typing.get_origin(plain) is dict else plain
    return plain, plain


def _default(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is REQUIRED else field.default_factory()
