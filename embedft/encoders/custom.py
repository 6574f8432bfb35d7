"""Encoders of user-defined classes: saved as weights, the import paths of two classes, and the configuration.

    embedder.encoder = mine.Encoder(mine.Config(hidden_size=64))    # a dataclass; see `Embedder` for what it must have
    embedder.save("model")                                          # loads wherever `import mine` works

Not here: embedft's own families, whose folders other libraries can read too (folder.py).
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from .. import device as devices
from ..objects import find_object, in_one_line
from .adapter import fill
from .layers import without_memory

MODEL_TYPE = "custom"  # in config.json


class Family(NamedTuple):
    """The classes of an encoder and its configuration, under the same names as in a family's module."""

    Encoder: type[nn.Module]
    Config: type


def describe(encoder: nn.Module) -> dict[str, Any]:
    """The fields of config.json. Raises `ValueError` for an encoder that cannot be rebuilt from them."""
    config, paths = encoder.config, [f"{x.__module__}.{x.__qualname__}" for x in (type(encoder), type(encoder.config))]
    values = {"model_type": MODEL_TYPE, "encoder": paths[0], "encoder_config": paths[1]}
    with in_one_line(f"encoder.config is {config}, which cannot be saved"):
        settings = {field.name: getattr(config, field.name) for field in fields(config) if field.init}
        values["settings"] = json.loads(json.dumps(settings, allow_nan=False))
    family, read = read_family(values)
    if tuple(family) != (type(encoder), type(config)) or asdict(read) != asdict(config):  # not ==, for `eq=False`
        raise ValueError(f"{paths[0]} with {config} cannot be saved: it loads as {family.Encoder} with {read}")
    fill(build(family, read, "meta"), encoder.state_dict(), f"{paths[0]}, rebuilt from its config")
    return values


def read_family(values: Mapping[str, Any]) -> tuple[Family, Any]:
    """Imports the classes that config.json names, and reads the configuration. Raises `ValueError` if it cannot."""
    family, settings = Family(find_object(values["encoder"]), find_object(values["encoder_config"])), values["settings"]
    if not (isinstance(family.Encoder, type) and issubclass(family.Encoder, nn.Module) and is_dataclass(family.Config)):
        raise ValueError(f"{values['encoder']} and {values['encoder_config']} are not an nn.Module and a dataclass")
    with in_one_line(f"{values['encoder_config']} cannot be made from its settings"):
        config = family.Config(**settings)
    for name, kinds in (("hidden_size", (int,)), ("max_length", (int, float))):
        if type(size := getattr(config, name, None)) not in kinds or not size >= 1:
            raise ValueError(f"{values['encoder_config']}: {name} is {size}, expected a number of at least 1")
    return family, config


def build(family: Family, config: Any, device: str) -> nn.Module:
    """An encoder whose weights are yet to be loaded. Raises `ValueError` if its class needs more than its config."""
    what = f"{family.Encoder} cannot be made from its config alone on device {device}"
    place = without_memory() if device == "meta" else torch.device(device)
    with in_one_line(what), devices.seeded(0, torch.device("cpu")), place:  # the caller's draws stay
        return family.Encoder(config)
