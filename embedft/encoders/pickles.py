"""Reads pytorch_model.bin, the format of older checkpoints: a pickle, so only on request, and tensors alone.

    file = read_pickle(folder / PICKLE_FILE)
    file.get_tensor("linear.weight"), file.get_slice("linear.weight").get_shape()

torch's restricted unpickler (`weights_only`) refuses anything that would run code.
"""

from collections.abc import KeysView
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

PICKLE_FILE = "pytorch_model.bin"
# The floating-point types by their names in safetensors.
DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


class Slice(NamedTuple):
    """A tensor with the methods of a slice of a safetensors file."""

    tensor: Tensor

    def get_shape(self) -> list[int]:
        return list(self.tensor.shape)

    def get_dtype(self) -> str:
        return DTYPES.get(self.tensor.dtype, str(self.tensor.dtype))


class PickledTensors(NamedTuple):
    """Tensors by name, with the methods of an open safetensors file."""

    tensors: dict[str, Tensor]

    def keys(self) -> KeysView[str]:
        return self.tensors.keys()

    def get_tensor(self, name: str) -> Tensor:
        return self.tensors[name]

    def get_slice(self, name: str) -> Slice:
        return Slice(self.tensors[name])


def read_pickle(path: Path) -> PickledTensors:
    """The tensors of a pickled state dict. Raises `ValueError` for anything else, without running it."""
    try:
        found: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises errors of any class for a file that it did not write
        why = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise ValueError(f"{path}: cannot be read as tensors alone ({why})") from None
    if not isinstance(found, dict) or not all(isinstance(x, Tensor) for x in found.values()):
        raise ValueError(f"{path}: holds something other than named tensors")
    for name, tensor in found.items():
        is_plain = tensor.layout is torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
        # A view that repeats its storage is small in the file and may be huge in memory.
        if not is_plain or tensor.nbytes > tensor.untyped_storage().nbytes():
            raise ValueError(f"{path}: {str(name)[:60]!r} is not a tensor with a value of its own in each place")
    return PickledTensors({str(name): tensor for name, tensor in found.items()})
