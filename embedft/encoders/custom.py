"""Encoders of user-defined classes: saved as weights, the import paths of two classes, and the configuration.

    embedder.encoder = mine.Encoder(mine.Config(hidden_size=64))    # a dataclass; see `Embedder` for what it must have
    embedder.save("model")                                          # loads wherever `import mine` works

Not here: embedft's own families, whose folders other libraries can read too (folder.py).
"""

import importlib
import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from .. import device as devices

MODEL_TYPE = "custom"  # in config.json


class Family(NamedTuple):
    """The classes of an encoder and its configuration, under the same names as in a family's module."""

    Encoder: type[nn.Module]
    Config: type


def describe(encoder: nn.Module) -> dict[str, Any]:
    """The fields of config.json. Raises `ValueError` for an encoder that cannot be rebuilt from them."""
    config, family = encoder.config, Family(type(encoder), type(encoder.config))
    if not is_dataclass(config):
        raise ValueError(f"encoder.config is a {type(config).__name__}, expected a dataclass, to save its fields")
    settings = {field.name: getattr(config, field.name) for field in fields(config) if field.init}
    paths = {"encoder": _import_path(family.Encoder), "encoder_config": _import_path(family.Config)}
    try:
        settings = json.loads(json.dumps(settings, allow_nan=False))
        if (read := family.Config(**settings)) != config:
            raise ValueError(f"as JSON it becomes {read}")
    except (TypeError, ValueError) as error:
        raise ValueError(f"encoder.config is {config}, which cannot be saved: {error}") from None
    shapes, again = ({k: x.shape for k, x in part.state_dict().items()} for part in (encoder, build(family, read)))
    if shapes != again:
        name = min(shapes.items() ^ again.items())[0]
        raise ValueError(f"{paths['encoder']}, rebuilt from its config, has another {name}, so it cannot be saved")
    return {"model_type": MODEL_TYPE, **paths, "settings": settings}


def read_family(values: Mapping[str, Any]) -> tuple[Family, Any]:
    """Imports the classes that config.json names, and reads the configuration. Raises `ValueError` if it cannot."""
    family = Family(_find(values["encoder"]), _find(values["encoder_config"]))
    if not (issubclass(family.Encoder, nn.Module) and is_dataclass(family.Config)):
        raise ValueError(f"{values['encoder']} and {values['encoder_config']} are not an nn.Module and a dataclass")
    return family, family.Config(**values["settings"])


def build(family: Family, config: Any) -> nn.Module:
    """An encoder whose weights are yet to be loaded. Raises `ValueError` if its class needs more than its config."""
    try:
        with devices.seeded(0, torch.device("cpu")):  # leaves the caller's random state as it was
            return family.Encoder(config)
    except (TypeError, ValueError, AttributeError, LookupError, RuntimeError) as error:
        name = f"{family.Encoder.__module__}.{family.Encoder.__qualname__}"
        raise ValueError(f"{name} cannot be made from its config alone: {error}") from None


def _import_path(kind: type) -> str:
    path = f"{kind.__module__}.{kind.__qualname__}"
    if kind.__module__ == "__main__" or "<locals>" in path or _find(path) is not kind:
        raise ValueError(f"{path} cannot be imported by another program, so it cannot be saved: move it to a module")
    return path


def _find(path: Any) -> type:
    """The class at "module.Class"."""
    module, _, name = str(path).rpartition(".")
    try:
        kind = getattr(importlib.import_module(module), name, None)
    except ImportError as error:
        raise ValueError(f"the encoder's class is {path}, which cannot be imported here ({error})") from None
    if not isinstance(kind, type):
        raise ValueError(f"the encoder's class is {path}, but {module} has no such class")
    return kind
