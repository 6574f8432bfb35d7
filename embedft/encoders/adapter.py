"""Small maps on embeddings, for queries, documents or both, which improve a model without running it again.

    adapter = Adapter(query=LinearMap(384))
    adapter(queries_ND, role="query"), adapter(documents_MD, role="document")
    adapter.save("adapter"); adapter = Adapter.load("adapter")

The base may be any model, even one behind an API. Maps: maps.py; fitting: training/fit_adapter.py.

Shapes: N vectors, D features in, E features out.
"""

import contextlib
import io
import pickle
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
import torch
import torch.nn.functional as F
from safetensors.torch import load, save
from torch import Tensor, nn

from ..files import atomic_write, read_object, sha256_file, write_json
from .maps import Map, build_map

ROLES = ("query", "document")
CONFIG_FILE, WEIGHTS_FILE, FORMAT_VERSION = "adapter.json", "adapter.safetensors", 2
LLAMAINDEX_CONFIG, LLAMAINDEX_WEIGHTS = "config.json", "pytorch_model.bin"
FORMATS = ("embedft", "llamaindex")


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
    """Maps on the vectors of queries and documents; None leaves them unchanged.

    Args:
        query, document: pass the same object twice for one shared map.
        base: the model whose vectors they are for; None: unknown.
        normalize: `transform` returns unit vectors, as models with cosine similarity do.

    Raises:
        ValueError: no map at all, or maps whose outputs cannot be compared, such as queries of 128 features with
            documents that keep their 384.
    """

    def __init__(
        self,
        query: Map | None = None,
        document: Map | None = None,
        *,
        base: Base | None = None,
        normalize: bool = True,
    ):
        super().__init__()
        if query is None and document is None:
            raise ValueError("an adapter without a map: expected one for queries, documents or both")
        self.query, self.document, self.base, self.normalize = query, document, base, normalize
        # Filled in by `fit_adapter`.
        self.history: list[dict[str, Any]] = []
        self.costs: dict[str, Any] = {}
        given = [part for part in (query, document) if part is not None]
        self.in_features, self.out_features = given[0].in_features, given[0].out_features
        if len(given) == 1 and self.in_features != self.out_features:
            role, sizes = "document" if query else "query", f"makes {self.out_features} of {self.in_features} features"
            raise ValueError(f"the map {sizes}, but a {role} has none and keeps its {self.in_features}")
        sizes = [(part.in_features, part.out_features) for part in given]
        if sizes[0] != sizes[-1]:
            raise ValueError(f"features in and out are {sizes[0]} of queries and {sizes[1]} of documents")
        if base is not None and base.dim != self.in_features:
            raise ValueError(f"the base {base.name} has {base.dim} features, the adapter takes {self.in_features}")

    @property
    def side(self) -> str:
        """ "query", "document", "both" (two maps) or "shared" (one)."""
        if self.query is None or self.document is None:
            return "document" if self.query is None else "query"
        return "shared" if self.query is self.document else "both"

    def map_of(self, role: str) -> Map | None:
        """The map of a role; None: its vectors are left unchanged."""
        check_role(role)
        return self.query if role == "query" else self.document

    def maps(self) -> list[Map]:
        """The maps, a shared one once."""
        return list(dict.fromkeys(part for part in (self.query, self.document) if part is not None))

    def forward(self, x_ND: Tensor, role: str = "query") -> Tensor:
        """The mapped vectors, [N, E], with gradient; float32 and float64 are kept, nothing is normalized."""
        part = self.map_of(role)
        if x_ND.ndim != 2 or x_ND.shape[1] != self.in_features:
            raise ValueError(f"vectors are {list(x_ND.shape)}, the adapter takes [N, {self.in_features}]")
        return x_ND if part is None else part(x_ND)

    def departure(self) -> Tensor:
        """How far the maps are from the identity, summed over them: a scalar, with gradient."""
        return sum(part.departure() for part in self.maps())

    def transform(self, embeddings_ND: np.ndarray, role: str = "query", *, slice_rows: int = 16_384) -> np.ndarray:
        """The mapped vectors of an array, [N, E] float32, `slice_rows` at a time; unit rows with `normalize`."""
        mapped_NE = np.empty((len(embeddings_ND), self.out_features), dtype=np.float32)
        device = next(self.parameters()).device
        with torch.inference_mode():
            for first in range(0, max(1, len(embeddings_ND)), slice_rows):
                rows = slice(first, first + slice_rows)
                part_ND = torch.from_numpy(np.array(embeddings_ND[rows], dtype=np.float32)).to(device)
                part_NE = self(part_ND, role)
                mapped_NE[rows] = (F.normalize(part_NE, dim=1) if self.normalize else part_NE).cpu().numpy()
        return mapped_NE

    def check_base(self, base: Base) -> None:
        """Raises `ValueError` unless the adapter is for `base`; warns if it does not say which model it is for."""
        if base.dim != self.in_features:
            raise ValueError(f"the adapter takes {self.in_features} features, {base.name} has {base.dim}")
        if self.base is None or not self.base.fingerprints:
            warnings.warn(f"the adapter does not say which model it is for; used with {base.name}", stacklevel=2)
            return
        for role, found in base.fingerprints.items():
            expected = self.base.fingerprints.get(role)
            if expected is not None and expected != found:
                bases = f"{self.base.name} ({role} {expected[:12]}), this is {base.name} ({role} {found[:12]})"
                raise ValueError(f"the adapter is for {bases}: other weights, lengths or prompts")

    def save(self, folder: str | Path, *, format: str = "embedft", base: Base | None = None) -> None:
        """Writes the adapter to a folder, each file atomically, adapter.json last.

        Args:
            format: "embedft" (adapter.safetensors, adapter.json), or "llamaindex" (config.json and a pickled
                pytorch_model.bin), which holds a linear or two-layer map of queries and does not name the base.
            base: replaces the adapter's own.

        Raises `ValueError` for a format that is unknown or cannot hold this adapter.
        """
        if format not in FORMATS:
            raise ValueError(f"format is {format!r}, expected one of {', '.join(FORMATS)}")
        folder = Path(folder)
        if format == "llamaindex":
            config, tensors = _to_llamaindex(self)
            if (folder / CONFIG_FILE).exists():
                raise ValueError(f"{folder}: has an {CONFIG_FILE}, which would be loaded in place of this")
            buffer = io.BytesIO()
            torch.save(tensors, buffer)
            with atomic_write(folder / LLAMAINDEX_WEIGHTS, "wb") as file:
                file.write(buffer.getvalue())
            return write_json(folder / LLAMAINDEX_CONFIG, config)
        skipped = "document." if self.side == "shared" else " "
        tensors = {n: t.cpu().contiguous() for n, t in self.state_dict().items() if not n.startswith(skipped)}
        with atomic_write(folder / WEIGHTS_FILE, "wb") as file:
            file.write(save(tensors))
        maps = {role: self.map_of(role) for role in ROLES}
        config = {role: part and {"kind": part.kind, **part.settings()} for role, part in maps.items()}
        config |= {"format_version": FORMAT_VERSION, "side": self.side, "normalize": self.normalize}
        config |= {"base": base._asdict() if (base := base or self.base) else None}
        write_json(folder / CONFIG_FILE, config | {"weights_sha256": sha256_file(folder / WEIGHTS_FILE)})

    @classmethod
    def load(cls, folder: str | Path) -> "Adapter":
        """The adapter in a folder, in either format of `save`. Raises `ValueError` for a missing or damaged file."""
        folder = Path(folder)
        if (folder / CONFIG_FILE).is_file():
            return _load(folder)
        if (folder / LLAMAINDEX_CONFIG).is_file() and (folder / LLAMAINDEX_WEIGHTS).is_file():
            return _from_llamaindex(folder)
        formats = f"{CONFIG_FILE} and {WEIGHTS_FILE}, or LlamaIndex's {LLAMAINDEX_CONFIG} and {LLAMAINDEX_WEIGHTS}"
        raise ValueError(f"{folder}: no adapter, expected {formats}")


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Says which file lacks a field, or has a wrong one."""
    try:
        yield
    except KeyError as error:
        raise ValueError(f"{path}: no {error}") from None
    except (ValueError, TypeError, safetensors.SafetensorError) as error:
        raise ValueError(f"{path}: {error}") from None


def _load(folder: Path) -> Adapter:
    path, weights = folder / CONFIG_FILE, folder / WEIGHTS_FILE
    config = read_object(path)
    if config.get("format_version") not in (1, FORMAT_VERSION):
        raise ValueError(f"{path}: format_version is {config.get('format_version')!r}, expected {FORMAT_VERSION}")
    if not weights.is_file():
        raise ValueError(f"{folder}: no {WEIGHTS_FILE}")
    if sha256_file(weights) != config.get("weights_sha256"):
        raise ValueError(f"{weights}: cut off, or of another adapter (its SHA-256 is not the one in {CONFIG_FILE})")
    maps: dict[str, Map | None] = {}
    with _naming(path):
        for role in ROLES:
            maps[role] = None if config[role] is None else build_map(**config[role])
        if config["side"] == "shared":
            maps["document"] = maps["query"]
        base = None if config["base"] is None else Base(**config["base"])
        if base and config["format_version"] == 1:
            base = base._replace(fingerprints={})  # hashed differently, so they cannot be compared
        adapter = Adapter(**maps, base=base, normalize=config["normalize"])
        tensors = load(weights.read_bytes())
    if adapter.side == "shared":
        tensors |= {f"document.{name.partition('.')[2]}": tensor for name, tensor in tensors.items()}
    return _filled(adapter, tensors, weights)


def _filled(adapter: Adapter, tensors: Mapping[str, Tensor], path: Path) -> Adapter:
    """The adapter with these tensors. Raises `ValueError` naming one that does not fit."""
    own = adapter.state_dict()
    for name in sorted(own.keys() | tensors.keys()):
        found, wanted = (list(part[name].shape) if name in part else "missing" for part in (tensors, own))
        if found != wanted:
            raise ValueError(f"{path}: {name} is {found}, expected {wanted if name in own else 'no such tensor'}")
        if not tensors[name].isfinite().all():
            raise ValueError(f"{path}: {name} has values that are not finite")
    adapter.load_state_dict(tensors)
    return adapter.eval()


# LlamaIndex's names -> ours: of tensors and of settings, of a linear map and of what one with two layers has besides.
LLAMAINDEX_LINEAR = {"linear.weight": "weight", "linear.bias": "bias"}
LLAMAINDEX_TWO_LAYER = {f"linear{i}.{kind}": f"{kind}{i}" for i in (1, 2) for kind in ("weight", "bias")} | {
    "residual_weight": "scale"
}
LLAMAINDEX_SETTINGS = {"in_features": "in_features", "out_features": "out_features", "bias": "bias"}
LLAMAINDEX_MORE = {"hidden_features": "hidden", "activation_fn_str": "activation", "add_residual": "residual"}


def _to_llamaindex(adapter: Adapter) -> tuple[dict[str, Any], dict[str, Tensor]]:
    part = adapter.query
    if adapter.side != "query" or part.kind == "low_rank":
        found = f"{adapter.maps()[0].kind} for {adapter.side}"
        raise ValueError(f"the format 'llamaindex' holds a linear or two-layer map of queries, this is {found}")
    two_layers, state = part.kind == "two_layer", {name: x.cpu().clone() for name, x in part.state_dict().items()}
    names = LLAMAINDEX_SETTINGS | (LLAMAINDEX_MORE if two_layers else {})
    config = {theirs: part.settings()[ours] for theirs, ours in names.items()}
    if two_layers:
        state.setdefault("scale", torch.zeros(1))  # theirs is always there
    names = LLAMAINDEX_TWO_LAYER if two_layers else LLAMAINDEX_LINEAR
    return config, {theirs: state[ours] for theirs, ours in names.items() if ours in state}


def _from_llamaindex(folder: Path) -> Adapter:
    path, weights = folder / LLAMAINDEX_CONFIG, folder / LLAMAINDEX_WEIGHTS
    config = read_object(path)
    two_layers = "hidden_features" in config
    try:
        if not zipfile.is_zipfile(weights):  # on which torch may fail in any way
            raise RuntimeError
        tensors = torch.load(weights, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError):
        raise ValueError(f"{weights}: not a complete file of plain tensors") from None
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise ValueError(f"{weights}: holds something other than named tensors")
    names = LLAMAINDEX_SETTINGS | (LLAMAINDEX_MORE if two_layers else {})
    with _naming(path):
        settings = {ours: config[theirs] for theirs, ours in names.items()}
        adapter = Adapter(build_map("two_layer" if two_layers else "linear", **settings))
    names = LLAMAINDEX_TWO_LAYER if two_layers else LLAMAINDEX_LINEAR
    if two_layers and not settings["residual"]:
        tensors.pop("residual_weight", None)
    return _filled(adapter, {f"query.{names.get(name, name)}": tensor for name, tensor in tensors.items()}, weights)
