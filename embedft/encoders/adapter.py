"""Adapters: small maps on the embeddings of queries, documents or both, which improve a model without rerunning it.

    adapter = Adapter(query=LinearMap(384))
    adapter(queries_ND, role="query"), adapter(documents_MD, role="document")
    adapter.save("adapter"); adapter = Adapter.load("adapter")

The base may be any model, even one behind an API. Maps: maps.py; fitting: training/fit_adapter.py.

Shapes: N vectors, D features in, E features out.
"""

import contextlib
import hashlib
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
import torch
import torch.nn.functional as F
from safetensors.torch import load, save
from torch import Tensor, nn

from ..files import atomic_write, read_object, replace_files, write_json
from .maps import Map, build_map
from .pickles import read_pickle

ROLES = ("query", "document")
CONFIG_FILE, WEIGHTS_FILE, FORMAT_VERSION = "adapter.json", "adapter.safetensors", 2
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # of weights; torch computes little in others
FORMATS = {"embedft": (CONFIG_FILE, WEIGHTS_FILE), "llamaindex": ("config.json", "pytorch_model.bin")}


def check_role(role: str) -> None:
    """Raises `ValueError` for anything but "query" and "document"."""
    if role not in ROLES:
        raise ValueError(f"role is {role!r}, expected one of {', '.join(ROLES)}")


class Base(NamedTuple):
    """The model whose vectors an adapter was fitted on."""

    name: str
    dim: int
    fingerprints: dict[str, str]  # {role: SHA-256 of everything its vectors depend on besides the text}


class Adapter(nn.Module):
    """Maps query and document vectors; None leaves them unchanged, and the same map may be passed for both.
    `base` is the model the adapter is for (None: unknown). With `normalize`, `transform` returns unit vectors.
    Raises `ValueError` without a map, or if query and document vectors would differ in width."""

    def __init__(
        self, query: Map | None = None, document: Map | None = None, *, base: Base | None = None, normalize: bool = True
    ):
        super().__init__()
        one = query or document
        if one is None:
            raise ValueError("the adapter has no map: expected one for queries, documents or both")
        self.query, self.document, self.base, self.normalize = query, document, base, normalize
        self.in_features, self.out_features = one.in_features, one.out_features
        q, d = ((x.in_features, x.out_features) if x else (one.in_features,) * 2 for x in (query, document))
        if q != d:
            raise ValueError(f"features in and out are {q} for queries, but {d} for documents")
        if base is not None and base.dim != self.in_features:
            raise ValueError(f"the base {base.name} has {base.dim} features, the adapter takes {self.in_features}")
        self.name = "adapter"  # in reports; the folder it was loaded from; "": it is part of a model
        self.history: list[dict[str, Any]] = []  # this and `costs` are filled in by `fit_adapter`
        self.costs: dict[str, Any] = {}

    @property
    def side(self) -> str:
        """ "query", "document", "both" (two maps) or "shared" (one)."""
        if self.query is None or self.document is None:
            return "document" if self.query is None else "query"
        return "shared" if self.query is self.document else "both"

    def map_of(self, role: str) -> Map | None:
        """The map of a role; None: its vectors stay unchanged."""
        check_role(role)
        return self.query if role == "query" else self.document

    def forward(self, x_ND: Tensor, role: str = "query") -> Tensor:
        """The mapped vectors, [N, E], with gradient, in the dtype of `x_ND`; not normalized."""
        part = self.map_of(role)
        if x_ND.ndim != 2 or x_ND.shape[1] != self.in_features:
            raise ValueError(f"vectors are {list(x_ND.shape)}, the adapter takes [N, {self.in_features}]")
        return x_ND if part is None else part(x_ND)

    def departure(self) -> Tensor:
        """How far the maps are from the identity, summed (a shared map counts once): a scalar, with gradient."""
        return sum(part.departure() for part in self.children())

    def transform(self, embeddings_ND: np.ndarray, role: str = "query", *, slice_rows: int = 16_384) -> np.ndarray:
        """Maps the rows of an array, `slice_rows` at a time: [N, E] float32, of unit length with `normalize`."""
        mapped_NE = np.empty((len(embeddings_ND), self.out_features), dtype=np.float32)
        device = next(self.parameters()).device
        with torch.inference_mode():
            for first in range(0, max(1, len(embeddings_ND)), slice_rows):
                rows = slice(first, first + slice_rows)
                part_NE = self(torch.from_numpy(np.array(embeddings_ND[rows], dtype=np.float32)).to(device), role)
                mapped_NE[rows] = (F.normalize(part_NE, dim=1) if self.normalize else part_NE).cpu().numpy()
        return mapped_NE

    def check_base(self, base: Base) -> None:
        """Raises `ValueError` unless the adapter is for `base`; warns if it does not record its model."""
        if base.dim != self.in_features:
            raise ValueError(f"the adapter takes {self.in_features} features, {base.name} has {base.dim}")
        if self.base is None or not self.base.fingerprints:
            warnings.warn(f"the adapter does not record which model it is for; using it with {base.name}", stacklevel=2)
            return
        for role, found in base.fingerprints.items():
            if (expected := self.base.fingerprints.get(role, found)) != found:
                bases = f"{self.base.name} ({role} {expected[:12]}), this is {base.name} ({role} {found[:12]})"
                raise ValueError(f"the adapter is for {bases}: weights, lengths or prompts differ")

    def save(self, folder: str | Path, *, base: Base | None = None) -> None:
        """Writes the adapter to a folder; an error changes nothing there. `base` overrides its own."""
        content = save({name: x.detach().cpu().contiguous() for name, x in self.named_parameters()})  # once if shared
        config = {role: part and part.settings for role in ROLES for part in [self.map_of(role)]}
        base = base or self.base
        config |= {"side": self.side, "normalize": self.normalize, "base": base and base._asdict()}
        config |= {"format_version": FORMAT_VERSION, "weights_sha256": hashlib.sha256(content).hexdigest()}
        with replace_files(folder) as new:
            path, weights = (new / name for name in FORMATS["embedft"])
            with atomic_write(weights, "wb") as file:
                file.write(content)
            write_json(path, config)

    @classmethod
    def load(cls, folder: str | Path, *, allow_pickle: bool = True) -> "Adapter":
        """Reads a folder that `save` or LlamaIndex wrote, whose pytorch_model.bin is unpickled: tensors only, no code.
        Raises `ValueError` for a missing or damaged file, and for LlamaIndex's unless `allow_pickle`."""
        there = [name for name, files in FORMATS.items() if all((Path(folder) / file).is_file() for file in files)]
        if not there:
            expected = ", or ".join(f"{config} and {weights} ({name})" for name, (config, weights) in FORMATS.items())
            raise ValueError(f"{folder}: no adapter, expected {expected}")
        path, weights = (Path(folder) / name for name in FORMATS[there[0]])
        if there[0] == "llamaindex" and not allow_pickle:
            raise ValueError(f"{weights}: is read only with allow_pickle")
        config = read_object(path)
        with naming(path):
            config, tensors = (_read if there[0] == "embedft" else _from_llamaindex)(config, weights)
            with torch.device("meta"):  # sizes are compared with the tensors' before they take memory
                maps = {role: None if config[role] is None else build_map(**config[role]) for role in ROLES}
            if config["side"] == "shared":
                maps["document"] = maps["query"]
                tensors |= {name.replace("query", "document", 1): tensor for name, tensor in tensors.items()}
            adapter = cls(**maps, base=config["base"] and Base(**config["base"]), normalize=config["normalize"])
        fill(adapter, tensors, weights)
        adapter.to_empty(device="cpu").load_state_dict(tensors)
        adapter.name = str(folder)
        return adapter.eval()


def fill(module: nn.Module, tensors: Mapping[str, Tensor], path: Path | str) -> None:
    """Loads tensors into a module, if not on meta. Raises `ValueError` for one absent, of another shape or type, or not
    finite."""
    own = module.state_dict()
    for name in sorted(own.keys() | tensors.keys()):
        found, wanted = (list(part[name].shape) if name in part else "absent" for part in (tensors, own))
        if found != wanted:
            raise ValueError(f"{path}: {name} is {found}, expected {wanted}")
        if (dtype := tensors[name].dtype) not in (own[name].dtype, *FLOATS):
            raise ValueError(f"{path}: {name} has type {dtype}, expected a floating-point one of 16 to 64 bits")
        if not tensors[name].isfinite().all():
            raise ValueError(f"{path}: {name} has values that are not finite")
    if not any(x.is_meta for x in own.values()):
        module.load_state_dict(tensors)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Prefixes errors about a missing or invalid field with the file's path."""
    try:
        yield
    except KeyError as error:
        raise ValueError(f"{path}: no {error}") from None
    except (ValueError, TypeError, safetensors.SafetensorError) as error:
        raise ValueError(f"{path}: {error}") from None


def _read(config: dict[str, Any], weights: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if (found := config.get("format_version")) != FORMAT_VERSION:
        raise ValueError(f"format_version is {found!r}, expected {FORMAT_VERSION}; fit the adapter again")
    content = weights.read_bytes()
    if hashlib.sha256(content).hexdigest() != config["weights_sha256"]:
        raise ValueError(f"{weights.name} is truncated or from another adapter (its SHA-256 does not match)")
    return config, load(content)


SETTINGS = {"linear": {"in_features": "in_features", "out_features": "out_features", "bias": "bias"}}
TWO_LAYERS = {"hidden": "hidden_features", "activation": "activation_fn_str", "residual": "add_residual"}
SETTINGS["two_layer"] = SETTINGS["linear"] | TWO_LAYERS
TENSORS = {f"linear{i}.{kind}": f"query.{kind}{i}" for i in ("", 1, 2) for kind in ("weight", "bias")}
TENSORS["residual_weight"] = "query.scale"


def _from_llamaindex(config: dict[str, Any], weights: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    kind = "two_layer" if "hidden_features" in config else "linear"
    settings = {"kind": kind, **{ours: config[theirs] for ours, theirs in SETTINGS[kind].items()}}
    tensors = read_pickle(weights).tensors
    tensors = {TENSORS.get(name, f"query.{name}"): tensor for name, tensor in tensors.items()}
    if kind == "two_layer" and not settings["residual"]:
        tensors.pop("query.scale", None)
    return {"query": settings, "document": None, "side": "query", "base": None, "normalize": True}, tensors
