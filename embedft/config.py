"""Reads frozen dataclasses from the command line and JSON, strictly: unknown keys and wrong types are errors.

A field declares its type, default and meaning once; option, help and JSON key follow. Subclasses inherit options.

    @dataclass(frozen=True, kw_only=True)
    class MyOptions(Options):
        data: str = option(REQUIRED, "what to read", metavar="DATA", positional=True)
        dims: list[int] | None = option(None, "...")         # --dims 384 128
        fuse: bool = option(False, "...")                    # --fuse, --no-fuse, --fuse true
        loss: dict[str, Any] = option({"name": "x"}, "...")  # --loss.name x, --loss name=x, --loss '{"name": "x"}'
        axis: list[list[Any]] = option([], "...")            # --axis lr 1e-5 2e-5 --axis epochs 1 2

    options = parse(MyOptions, ["pairs.csv", "--dims", "384", "128"])
"""

import argparse
import copy
import dataclasses
import difflib
import itertools
import json
import math
import operator
import re
import types
import typing
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

from .files import read_object

Config = TypeVar("Config")
REQUIRED = dataclasses.MISSING
BOUNDS = {"least": (operator.ge, "at least"), "most": (operator.le, "at most")}
BOUNDS |= {"above": (operator.gt, "above"), "below": (operator.lt, "below")}
METAVARS = {int: "N", float: "X", str: "TEXT", bool: "", dict: "KEY=VALUE"}
UNIONS = (types.UnionType, typing.Union)


def option(default: Any, meaning: str, *, metavar: str = "", positional: bool = False, **bounds: float) -> Any:
    """A dataclass field that is an option or a positional argument; `default` is REQUIRED if there is none.
    The help shows `metavar` for the value, and adds the default to `meaning` unless that ends with one in brackets.
    A number with `bounds` (any of least=, most=, above= and below=) must also be finite."""
    metadata = {"meaning": meaning, "metavar": metavar, "positional": positional, "bounds": bounds}
    if isinstance(default, dict | list):
        return dataclasses.field(default_factory=partial(copy.deepcopy, default), metadata=metadata)
    # A URL may contain a key.
    return dataclasses.field(default=default, metadata=metadata, repr=metavar != "URL")


def from_dict(cls: type[Config], values: dict[str, Any], prefix: str = "") -> Config:
    """The inverse of `dataclasses.asdict`. Raises `ValueError` for an unknown key, a wrong type or a wrong value."""
    check_types(cls, values, prefix)
    try:
        return cls(**values)
    except ValueError as error:
        raise ValueError(f"{prefix}{error}") from None


def part(options: Any, cls: type[Config]) -> Config:
    """The fields of `cls`, from options whose class inherits from it."""
    return cls(**{field.name: getattr(options, field.name) for field in dataclasses.fields(cls)})


def changed(config: Any, names: Iterable[str]) -> list[str]:
    """The options for those of `names` that are not at their default, such as ["--batch-size", "--no-merge"]."""
    defaults = {field.name: _default(field) for field in dataclasses.fields(config)}
    given = [name for name in names if getattr(config, name) != defaults[name]]
    return [_option(f"no_{name}" if defaults[name] is True else name) for name in given]


def check_at_most_one(config: Any, *names: str) -> None:
    """Raises `ValueError` if more than one of the fields differs from its default."""
    if len(given := changed(config, names)) > 1:
        raise ValueError(f"{' and '.join(given)} cannot be combined")


def check_types(cls: type, values: dict[str, Any], prefix: str = "") -> None:
    """Raises `ValueError` for the first value that is not a field of `cls`, or not of the field's type or range."""
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for key, value in values.items():
        if key not in fields:
            raise ValueError(f"{prefix}unknown key {key!r}, expected one of {', '.join(fields)}")
        if not _has_type(value, fields[key].type):
            raise ValueError(f"{prefix}{key} is {value!r}, expected {_type_name(fields[key].type)}")
        bounds = {} if value is None or isinstance(value, str) else fields[key].metadata.get("bounds", {})
        if bounds and not (abs(value) < math.inf and all(BOUNDS[name][0](value, x) for name, x in bounds.items())):
            expected = " and ".join(f"{BOUNDS[name][1]} {bound}" for name, bound in bounds.items())
            raise ValueError(f"{prefix}{key} is {value}, expected {expected}")


def _has_type(value: Any, wanted: Any) -> bool:
    origin, inside = typing.get_origin(wanted) or wanted, typing.get_args(wanted)
    if origin in UNIONS:
        return any(_has_type(value, option) for option in inside)
    if origin is typing.Literal:
        return value in inside
    if origin is list:
        return isinstance(value, list | tuple) and all(_has_type(item, inside[0]) for item in value)
    if wanted is Any or isinstance(value, bool):
        return wanted in (Any, bool)
    return isinstance(value, (int, float) if wanted is float else origin)


def _type_name(wanted: Any) -> str:
    origin, inside = typing.get_origin(wanted), typing.get_args(wanted)
    if origin in UNIONS:
        return " or ".join(map(_type_name, inside))
    if origin is typing.Literal:
        return "one of " + ", ".join(map(repr, inside))
    if origin is list:
        return f"a list of {_type_name(inside[0])}"
    if dict in (wanted, origin):
        return "KEY=VALUE or {...}"
    return "null" if wanted is types.NoneType else getattr(wanted, "__name__", str(wanted))


def _kind(field: dataclasses.Field) -> tuple[Any, Any]:
    """(list, X) for the type list[X], (dict, dict) for dict[str, X], else (X, X); the same with "or None"."""
    plain = field.type
    if typing.get_origin(plain) in UNIONS:
        plain = next(option for option in typing.get_args(plain) if option is not types.NoneType)
    if typing.get_origin(plain) is list:
        return list, typing.get_args(plain)[0]
    return (dict, dict) if typing.get_origin(plain) is dict else (plain, plain)


def _default(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is REQUIRED else field.default_factory()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """All commands."""

    config: str | None = option(None, "JSON file with any of these options; the command line wins", metavar="FILE")
    quiet: bool = option(False, "hide progress")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise ValueError(message.removeprefix("argument "))


class _Formatter(argparse.RawDescriptionHelpFormatter):
    def _format_action_invocation(self, action: argparse.Action) -> str:
        return " ".join([*action.option_strings[:1], action.metavar]).rstrip()


def make_parser(cls: type, **texts: str) -> argparse.ArgumentParser:
    """A parser whose help lists the options of `cls`, then those of each class that it inherits from."""
    how = {"add_help": False, "allow_abbrev": False, "conflict_handler": "resolve", "formatter_class": _Formatter}
    parser = _Parser(**texts, **how, argument_default=argparse.SUPPRESS)
    arguments, usage = parser.add_argument_group("Arguments"), [parser.prog]
    owners = [owner for owner in cls.__mro__ if dataclasses.is_dataclass(owner)]
    groups = {}
    for owner in sorted(owners, key=lambda owner: owner is Options):  # which comes last
        title = "Options" if owner is cls else re.split(r"[.:]\s|\.?$", owner.__doc__, maxsplit=1)[0]
        groups[owner] = parser.add_argument_group(title)
    for field in dataclasses.fields(cls):
        kind, item = _kind(field)
        choices = "|".join(typing.get_args(item)) if typing.get_origin(item) is typing.Literal else "VALUE"
        metavar = field.metadata["metavar"] or METAVARS.get(item, choices) + " ..." * (kind is list)
        how = {"metavar": metavar, "help": _meaning(field).replace("%", "%%")}
        if field.metadata["positional"]:
            how["metavar"] += " ..." * (kind is list)
            usage.append(how["metavar"])
            arguments.add_argument(field.name, nargs="*" if kind is list else "?", **how)
            continue
        is_repeated = typing.get_origin(item) is list  # each time with a list
        how |= {list: {"action": "extend", "nargs": "+"}, dict: {"action": "append"}}.get(kind, {})
        how |= {"action": "append"} if is_repeated else {}
        wanted = typing.get_args(item)[0] if is_repeated else item
        how |= {} if kind is dict else {"type": partial(_from_text, wanted=wanted if kind is list else field.type)}
        names = [_option(f"[no_]{field.name}")] * (field.default is True) + [_option(field.name)]
        owner = next(owner for owner in owners if field.name in owner.__annotations__)
        groups[owner].add_argument(*names, dest=field.name, **how)
        if kind is bool:
            hidden = {"dest": field.name, "help": argparse.SUPPRESS}
            parser.add_argument(_option(f"no_{field.name}"), action="store_false", **hidden)
    parser.usage = " ".join([*usage, "[options]"])
    return parser


def _meaning(field: dataclasses.Field) -> str:
    meaning, default = field.metadata["meaning"], _default(field)
    meaning += f" (or {_option(field.name)}.KEY VALUE)" if isinstance(default, dict) else ""
    if meaning.endswith("]") or default is False or default in (None, REQUIRED, {}, []):
        return meaning
    shown = " ".join(map(str, default)) if isinstance(default, list) else default
    return f"{meaning} [{shown if isinstance(shown, str) else json.dumps(shown)}]"


def parse(cls: type[Config], arguments: Sequence[str]) -> Config:
    """Builds `cls` (an `Options`) from a command line: defaults, overridden by the --config file, then by the rest.
    Raises `ValueError` for anything unknown, missing, or of the wrong type or range."""
    parser, fields = make_parser(cls), {field.name: field for field in dataclasses.fields(cls)}
    options = {_option(name): field for name, field in fields.items() if not field.metadata["positional"]}
    given, rest = parser.parse_known_intermixed_args(_prepare(arguments, options, parser))
    if unknown := [word.partition("=")[0] for word in rest if word.startswith("--")]:
        raise ValueError(f"unknown option {unknown[0]}{suggestion(unknown[0].partition('.')[0], options)}")
    if rest:
        raise ValueError(f"unexpected argument {rest[0]!r}")
    values, prefix = {}, ""
    if path := getattr(given, "config", None):
        values, prefix = read_object(path), f"{path} and command line: "
        check_types(cls, values, f"{path}: ")
    for name, value in vars(given).items():
        if _kind(fields[name])[0] is dict:
            texts, value = value, values.get(name, _default(fields[name]))
            for text in texts:
                value = insert(value, text, _option(name))
        values[name] = None if value == ["null"] else value
    if missing := [field for name, field in fields.items() if name not in values and _default(field) is REQUIRED]:
        names = (f.metadata["metavar"] if f.metadata["positional"] else _option(f.name) for f in missing)
        raise ValueError(f"missing {' and '.join(names)}")
    return from_dict(cls, values, prefix)


def _prepare(arguments: Sequence[str], options: dict[str, dataclasses.Field], parser: _Parser) -> list[str]:
    """Rewrites words for argparse (--a_b to --a-b, --flag to --flag=true) and adds options such as --loss.name."""
    words = []
    for word, following in itertools.zip_longest(arguments, arguments[1:]):
        if word.startswith("--"):
            name, rest = re.match("--([^.=]*)(.*)", word, re.DOTALL).groups()
            word, inner = f"{_option(name)}{rest}", rest.partition("=")[0]
            field = options.get(_option(name))
            kind = field and _kind(field)[0]
            if kind is dict and inner:
                how = {"dest": field.name, "action": "append", "type": f"{inner[1:]}={{}}".format}
                parser.add_argument(f"{_option(name)}{inner}", **how)
            elif kind is bool and not rest and following not in ("true", "false", "True", "False"):
                word += "=true"
        elif word.startswith("-") and words and re.fullmatch("--[^=]+", name := words[-1]):
            words[-1] = f"{name}={word}"  # a value: argparse would take -1e-3 for an option
            if name not in options or _kind(options[name])[0] is not list or (following or "--").startswith("--"):
                continue
            word = name  # argparse takes one value after "=", and the rest of the list again after the name
        words.append(word)
    return words


def insert(values: dict[str, Any], text: str, option: str) -> Any:
    """`values` after setting KEY=VALUE or KEY.KEY=VALUE, or the JSON object that replaces them."""
    path, equals, value = text.partition("=")
    if not equals or path.lstrip().startswith("{"):
        return _from_text(text, Any)
    *keys, last = path.split(".")
    target = values
    for key in keys:
        target = target.setdefault(key, {}) if isinstance(target, dict) else target
    if not isinstance(target, dict):
        raise ValueError(f"{option}.{path}: found {target!r}, which has no keys")
    target[last] = _from_text(value, Any)
    return values


def _from_text(text: str, wanted: Any) -> Any:
    """Parses a command-line word as the type `wanted`, to a JSON value; returns the word if it does not fit."""
    number = next((kind for kind in (int, float) if kind in (wanted, *typing.get_args(wanted))), json.loads)
    try:
        value = number(text)
    except ValueError:
        value = {"True": True, "False": False, "None": None, "null": None}.get(text, text)
    return value if wanted is Any or (_has_type(value, wanted) and not isinstance(value, str)) else text


def as_typed(message: str, cls: type, arguments: Sequence[str]) -> str:
    """A message of the library, with the fields of `cls` named as on the command line; the keys of a JSON file stay."""
    names = {field.name for field in dataclasses.fields(cls) if not field.metadata["positional"]}
    typed = {_option(word.partition("=")[0].lstrip("-")) for word in arguments}
    if any(word in message for word in _comma_lists(cls, arguments)):
        message += "; separate several values by blanks, not by commas"
    message += _json_list(message, arguments)
    # A path, or the key in --loss.temperature, may be called like a field.
    values = {name for word in arguments for name in re.findall(r"\w+", re.sub("^--[^.=]+", "", word))}

    def as_option(word: re.Match[str]) -> str:
        name = word["existing"] or word[0]
        several = f"{name}s"  # "dim is 0" may be about an entry of --dims
        name = several if several in names and _option(several) in typed else name
        return _option(name) if name in names - values else word[0]

    # A word with an underscore is a name; so is another one if a clause says what it is, or what `existing` may be.
    # Not so what an option may be: values that may be called like one.
    quoted, clause = r"'[^']*'|\"[^\"]*\"|expected one of [^;]*", r"(?:(?<=: )|(?<=but )|\A)\w+(?= (?:is|has) )"
    words = rf"{quoted}|\w+_\w+(?![\w./'\"(=])|{clause}|existing='(?P<existing>\w+)'"
    return message if ".json: " in message else re.sub(rf"(?<![\w./'\"=-])(?:{words})", as_option, message)


def _comma_lists(cls: type, arguments: Sequence[str]) -> Iterator[str]:
    """The words with commas that were given to an argument that takes several words."""
    lists = [field for field in dataclasses.fields(cls) if _kind(field)[0] is list]
    several = {"" if field.metadata["positional"] else _option(field.name) for field in lists}
    name = ""
    for word in arguments:
        if word.startswith("--"):
            name, _, word = word.partition("=")
            name = _option(name[2:])
        if "," in word and name in several:
            yield word


def _json_list(message: str, arguments: Sequence[str]) -> str:
    """A suffix for the error about a list that is an option's key: "; type --loss.dims '[384, 128]'", or ""."""
    key = re.search(r"(\w+) is .*, expected (?:a list|\[)", message)
    for word, following in itertools.zip_longest(arguments, arguments[1:], fillvalue=""):
        name, equals, text = word.partition("=")
        if key and name.startswith("--") and name.endswith(f".{key[1]}"):
            text = text if equals else following
            items = [_from_text(item, Any) for item in re.findall(r"[^\s,'\"\[\]]+", text)]
            return "" if isinstance(_from_text(text, Any), list) else f"; type {name} '{json.dumps(items)}'"
    return ""


def suggestion(word: str, known: Iterable[str]) -> str:
    """A suffix for the error about an unknown word: "; did you mean --epochs?", or ""."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _option(field_name: str) -> str:
    return f"--{field_name.replace('_', '-')}"
