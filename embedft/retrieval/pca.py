"""Fewer dimensions by principal components: what a model trained for few dimensions has to beat.

    embedder.attach(fit_pca(embedder, dataset, 32))     # queries and documents in 32 dimensions from now on

Shapes: N documents or windows, W dimensions of the model, D of them kept.
"""

import numpy as np
import torch

from ..data.dataset import RetrievalDataset
from ..encoders.adapter import Adapter
from ..encoders.embedder import Embedder
from ..encoders.maps import LinearMap
from .encoding import Passages, encode_documents, join_slices


def fit_pca(embedder: Embedder, dataset: RetrievalDataset, dim: int, *, passages: Passages = None) -> Adapter:
    """The map of queries and documents onto the first `dim` principal components of the vectors of a dataset's
    documents, or of their windows: x -> V^T x, scaled to unit length if the model's vectors are.

    V [W, D] are the eigenvectors of the vectors' covariance with the largest eigenvalues, computed in float64; the
    largest entry of each is positive. The mean is not subtracted from what is mapped, as in the source: subtracting it
    found less (experiments/LOG.md). Raises `ValueError` as `check_pca` does.

    Source: sentence-transformers, examples/training/distillation/dimensionality_reduction.py."""
    check_pca(embedder, dataset, dim)
    vectors_NW, _ = join_slices(list(encode_documents(embedder, dataset.texts, passages, None, {})))
    centered_NW = vectors_NW - vectors_NW.mean(axis=0, dtype=np.float64)
    _, eigenvectors_WW = np.linalg.eigh(centered_NW.T @ centered_NW)  # eigenvalues ascending
    components_DW = eigenvectors_WW.T[::-1][:dim]
    largest_D = np.take_along_axis(components_DW, np.abs(components_DW).argmax(axis=1)[:, None], axis=1)
    components_DW = components_DW * np.sign(largest_D)
    part = LinearMap(embedder.full_dim, dim, bias=False)
    with torch.no_grad():
        part.weight.copy_(torch.from_numpy(components_DW))
    adapter = Adapter(part, part, base=embedder.base(), normalize=embedder.normalize)
    adapter.name = f"pca-{dim}"
    return adapter


def check_pca(embedder: Embedder, dataset: RetrievalDataset, dim: int) -> None:
    """Raises `ValueError` unless the documents have `dim` principal components, and the model its plain vectors."""
    if embedder.adapter is not None or embedder.truncate_dim is not None:
        raise ValueError(f"pca is {dim}, but the model's vectors are mapped or truncated already")
    if dim > (most := min(embedder.full_dim, len(dataset.corpus) - 1)):
        size = f"{embedder.full_dim} dimensions, {len(dataset.corpus):,} documents"
        raise ValueError(f"pca is {dim}, expected at most {most}: {size}")
