"""What may follow pooling: Dense layers, LayerNorm and Normalize, as sentence-transformers has them.

    dense = Dense(DenseConfig(in_features=384, out_features=128))
    dense(embedding_BD)                # [B, 128]
    read_part("Dense", folder / "2_Dense", in_features=384, dtype=torch.float32)

Their weights are trained, saved and part of every fingerprint. Activations are looked up in a table by their class
path; nothing that a file names is imported.

Shapes: B sequences, D features in, E features out.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..files import write_json
from .adapter import fill
from .layers import without_memory
from .schema import CONFIG_FILE, Size, read_dataclass, read_fields
from .weights import WEIGHTS_FILE, check_sizes, opened, write_tensors

ACTIVATIONS: dict[str, type[nn.Module]] = {
    f"{kind.__module__}.{kind.__name__}": kind
    for kind in (nn.Identity, nn.Tanh, nn.ReLU, nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid, nn.LeakyReLU, nn.ELU, nn.SELU)
}
ACTIVATIONS |= {f"torch.nn.{kind.__name__}": kind for kind in ACTIVATIONS.values()}
TANH = "torch.nn.modules.activation.Tanh"
EMBEDDING = "sentence_embedding"  # what modules after pooling read and write; the other choice is token vectors


def _check_place(config: Any) -> None:
    for name in ("module_input_name", "module_output_name"):
        if (found := getattr(config, name)) != EMBEDDING:
            raise ValueError(f"{name} is {found!r}, expected {EMBEDDING!r}: modules on token vectors are not supported")


@dataclass(frozen=True)
class DenseConfig:
    """The fields of a Dense module's config.json."""

    in_features: Size
    out_features: Size
    bias: bool = True
    activation_function: str = TANH
    use_residual: bool = False
    module_input_name: str = EMBEDDING
    module_output_name: str = EMBEDDING

    def __post_init__(self):
        _check_place(self)
        if self.activation_function not in ACTIVATIONS:
            known = ", ".join(sorted({kind.__name__ for kind in ACTIVATIONS.values()}))
            found = repr(self.activation_function)[:80]
            raise ValueError(f"activation_function is {found}, expected one of torch.nn's {known}")


class Dense(nn.Module):
    """act(W x + b); with `use_residual` plus x, or plus V x if E is not D."""

    Config = DenseConfig

    def __init__(self, config: DenseConfig):
        super().__init__()
        self.config, self.out_features = config, config.out_features
        self.linear = nn.Linear(config.in_features, config.out_features, bias=config.bias)
        self.activation = ACTIVATIONS[config.activation_function]()
        if config.use_residual and config.in_features != config.out_features:
            self.residual = nn.Linear(config.in_features, config.out_features, bias=False)

    def forward(self, x_BD: Tensor) -> Tensor:
        """[B, E], in the dtype of `x_BD`, which is at least float32."""
        weight, bias = self.linear.weight.to(x_BD.dtype), self.linear.bias
        y_BE = self.activation(F.linear(x_BD, weight, None if bias is None else bias.to(x_BD.dtype)))
        if self.config.use_residual:
            y_BE = y_BE + (F.linear(x_BD, self.residual.weight.to(x_BD.dtype)) if hasattr(self, "residual") else x_BD)
        return y_BE.to(x_BD.dtype)


@dataclass(frozen=True)
class LayerNormConfig:
    """The fields of a LayerNorm module's config.json."""

    dimension: Size

    @property
    def in_features(self) -> int:
        return self.dimension


class LayerNorm(nn.Module):
    """(x - mean) / deviation * w + b, over the features."""

    Config = LayerNormConfig

    def __init__(self, config: LayerNormConfig):
        super().__init__()
        self.config, self.out_features = config, config.dimension
        self.norm = nn.LayerNorm(config.dimension)

    def forward(self, x_BD: Tensor) -> Tensor:
        """[B, D], in the dtype of `x_BD`."""
        weight, bias = self.norm.weight.to(x_BD.dtype), self.norm.bias.to(x_BD.dtype)
        return F.layer_norm(x_BD, x_BD.shape[1:], weight, bias, self.norm.eps)


@dataclass(frozen=True)
class NormalizeConfig:
    """The fields of a Normalize module's config.json, which older folders do not have."""

    module_input_name: str = EMBEDDING
    module_output_name: str = EMBEDDING

    def __post_init__(self):
        _check_place(self)


class Normalize(nn.Module):
    """x / |x|."""

    Config = NormalizeConfig

    def __init__(self, config: NormalizeConfig | None = None):
        super().__init__()
        self.config = config or NormalizeConfig()

    def forward(self, x_BD: Tensor) -> Tensor:
        return F.normalize(x_BD, dim=1)


PARTS: dict[str, type[nn.Module]] = {kind.__name__: kind for kind in (Dense, LayerNorm, Normalize)}


def width(head: nn.Sequential, in_features: int) -> int:
    """Features of what comes out of a head."""
    return [in_features, *(part.out_features for part in head if hasattr(part, "out_features"))][-1]


def describe(head: nn.Sequential) -> list[str]:
    """The settings of a head's parts, in order, as text."""
    return [repr(getattr(part, "config", part)) for part in head]


def read_part(
    kind: str, folder: Path, *, in_features: int, dtype: torch.dtype, allow_pickle: bool = False
) -> nn.Module:
    """The part in a module's folder. Raises `ValueError` for settings and weights that do not fit, naming them."""
    path = folder / CONFIG_FILE
    values = read_fields(path)
    config = read_dataclass(path, values, PARTS[kind].Config)
    if (expected := getattr(config, "in_features", in_features)) != in_features:
        raise ValueError(f"{path}: takes {expected} features, but what precedes it gives {in_features}")
    if kind == "Normalize":
        return Normalize(config)
    with opened(folder, allow_pickle=allow_pickle) as (listed, files):
        check_sizes(path, config, files, listed.name)
        tensors = {name: file.get_tensor(name) for name, file in files.items()}
    with without_memory():
        part = PARTS[kind](config)
    fill(part, tensors, listed)  # compares shapes and types
    part.load_state_dict({name: tensor.to(dtype) for name, tensor in tensors.items()}, assign=True)
    return part


def dense_of(weight_ED: Tensor, bias_E: Tensor | None) -> Dense:
    """A Dense layer without activation."""
    sizes = {"in_features": weight_ED.shape[1], "out_features": weight_ED.shape[0], "bias": bias_E is not None}
    with without_memory():
        part = Dense(DenseConfig(**sizes, activation_function="torch.nn.modules.linear.Identity"))
    tensors = {"linear.weight": weight_ED, "linear.bias": bias_E}
    part.load_state_dict({name: tensor for name, tensor in tensors.items() if tensor is not None}, assign=True)
    return part


def write_part(folder: Path, part: nn.Module) -> None:
    """Writes a part in the format of sentence-transformers; fields that older versions lack, only if they are needed.
    Raises `ValueError` for a module of another class."""
    if PARTS.get(type(part).__name__) is not type(part):
        raise ValueError(f"cannot save {type(part)} after pooling, expected one of {', '.join(PARTS)}")
    newer = {"use_residual": False, "module_input_name": EMBEDDING, "module_output_name": EMBEDDING}
    config = {name: value for name, value in asdict(part.config).items() if newer.get(name) != value}
    write_json(folder / CONFIG_FILE, config)
    if part.state_dict():
        write_tensors(folder / WEIGHTS_FILE, part.state_dict())
