"""What a vector depends on besides its text, as far as it takes reading: the weights, and how torch multiplies.

Not here: the fingerprint itself, which `Embedder.space` puts together of these and its settings.

    weights_sha256(embedder.encoder)      # "3f0c..."
"""

import hashlib

import torch
from torch import nn


def weights_sha256(module: nn.Module) -> str:
    """Of every tensor's name, type, shape and bytes."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def precision(device: torch.device) -> tuple[str, ...]:
    """Torch's settings that products of float32 depend on: autocast, and what else may take the place of float32."""
    backends = torch.backends
    cast = str(torch.get_autocast_dtype(device.type)) if torch.is_autocast_enabled(device.type) else "none"
    places = (backends, backends.cuda.matmul, backends.mkldnn, backends.mkldnn.matmul)
    return cast, *(place.fp32_precision for place in places)
