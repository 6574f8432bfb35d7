"""Frozen dataclasses <-> the command line and JSON. Strict: an unknown key is an error that lists the valid ones.

A field is written once, with its default and what it means (`setting`); the option on the command line, its help and
the JSON key follow from it. A field that is a dict takes dotted options: --loss.temperature 0.05.

    @dataclass(frozen=True)
    class Config:
        epochs: int = setting(3, "passes over the training pairs")
    add_options(parser, Config); config = config_from_options(Config, parser.parse_args())
"""

import argparse
import copy
import dataclasses
import json
import sys
import types
import typing
from collections.abc import Sequence
from typing import Any, TypeVar

from .files import read_json

Config = TypeVar("Config")


def setting(default: Any, meaning: str) -> Any:
    """A dataclass field with a default and a line that says what it means."""
    if isinstance(default, dict | list):
        return dataclasses.field(default_factory=lambda: copy.copy(default), metadata={"meaning": meaning})
    return dataclasses.field(default=default, metadata={"meaning": meaning})


def to_dict(config: Any) -> dict[str, Any]:
    """Every field, defaults included, as JSON can hold it."""
    return dataclasses.asdict(config)


def from_dict(cls: type[Config], values: dict[str, Any], *, where: str = "configuration") -> Config:
    """The inverse of `to_dict`. Raises `ValueError` for an unknown key, or a value of the wrong type or range."""
    if not isinstance(values, dict):
        raise ValueError(f"{where}: {type(values).__name__} found, expected an object")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for key, value in values.items():
        if key not in fields:
            raise ValueError(f"{where}: unknown key {key!r}, expected one of {', '.join(fields)}")
        if not _has_type(value, fields[key].type):
            raise ValueError(f"{where}: {key} is {value!r}, expected {_type_name(fields[key].type)}")
    try:
        return cls(**values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def check_types(config: Any) -> None:
    """Raises `ValueError` for the first field of a dataclass whose value is not of its annotated type."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if not _has_type(value, field.type):
            raise ValueError(f"{field.name} is {value!r}, expected {_type_name(field.type)}")


def add_options(parser: argparse.ArgumentParser, cls: type) -> None:
    """One option a field: --batch-size 64, --loss.temperature 0.05; --config FILE reads a JSON file first."""
    parser.add_argument("--config", metavar="FILE", help="JSON file with any of the settings; options override it")
    group = parser.add_argument_group("settings")
    defaults = to_dict(cls())
    for field in dataclasses.fields(cls):
        dotted = isinstance(defaults[field.name], dict)
        more = f" (or --{field.name}.NAME VALUE, e.g. --{field.name}.name)" if dotted else ""
        meaning = f"{field.metadata['meaning']}{more} [{json.dumps(defaults[field.name])}]"
        group.add_argument(
            f"--{field.name.replace('_', '-')}",
            dest=f"setting.{field.name}",
            metavar="JSON" if dotted else "VALUE",
            default=argparse.SUPPRESS,
            help=meaning.replace("%", "%%"),  # argparse formats it
        )


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """`parse_args`, with dotted options (--loss.temperature 0.05 or =0.05) gathered for `config_from_options`."""
    plain, dotted = [], {}
    given = iter(sys.argv[1:] if arguments is None else arguments)
    # Taken out before argparse looks, which would take the value of an option it does not know for a positional.
    for argument in given:
        name, equals, value = argument.partition("=")
        if not name.startswith("--") or "." not in name:
            # --batch_size, as the setting is called, and --batch-size, as options are written, are the same.
            plain.append(name.replace("_", "-") + equals + value if name.startswith("--") else argument)
            continue
        if not equals:
            value = next(given, "--")
            if value.startswith("--"):
                parser.error(f"argument {name}: expected one argument")
        dotted[name[2:]] = value
    namespace = parser.parse_args(plain)
    namespace.dotted = dotted
    return namespace


def config_from_options(cls: type[Config], namespace: argparse.Namespace) -> Config:
    """The dataclass that the options of `parse` describe: defaults, then --config, then the options."""
    values = {}
    if namespace.config:
        values = read_json(namespace.config)
        from_dict(cls, values, where=namespace.config)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    given = {key.partition(".")[2]: text for key, text in vars(namespace).items() if key.startswith("setting.")}
    for name, text in given.items():
        values[name] = _parsed(text, fields[name].type)
    for key, text in namespace.dotted.items():
        name, *inner = key.split(".")
        if name not in fields or not isinstance(values.get(name, to_dict(cls())[name]), dict):
            dicts = ", ".join(n for n, v in to_dict(cls()).items() if isinstance(v, dict))
            raise ValueError(f"command line: unknown option --{key}, expected --NAME.KEY with NAME one of {dicts}")
        target = values.setdefault(name, to_dict(cls())[name])
        for part in inner[:-1]:
            target = target.setdefault(part, {})
            if not isinstance(target, dict):
                raise ValueError(f"command line: --{key}: {part} is {target!r}, which has no keys of its own")
        target[inner[-1]] = _parsed(text, Any)
    return from_dict(cls, values, where="command line")


def _parsed(text: str, wanted: Any) -> Any:
    """A command line's text as a value: JSON where it is JSON, else the text itself."""
    if wanted is str:
        return text
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return {"True": True, "False": False, "None": None}.get(text, text)


def _has_type(value: Any, wanted: Any) -> bool:
    if wanted is Any:
        return True
    if isinstance(wanted, types.UnionType) or typing.get_origin(wanted) is typing.Union:
        return any(_has_type(value, option) for option in typing.get_args(wanted))
    if typing.get_origin(wanted) is typing.Literal:
        return value in typing.get_args(wanted)
    wanted = typing.get_origin(wanted) or wanted
    if wanted in (int, float) and isinstance(value, bool):
        return False
    return isinstance(value, (int, float) if wanted is float else wanted)


def _type_name(wanted: Any) -> str:
    if isinstance(wanted, types.UnionType) or typing.get_origin(wanted) is typing.Union:
        return " or ".join(_type_name(option) for option in typing.get_args(wanted))
    if typing.get_origin(wanted) is typing.Literal:
        return "one of " + ", ".join(map(repr, typing.get_args(wanted)))
    return "null" if wanted is type(None) else getattr(wanted, "__name__", str(wanted))
