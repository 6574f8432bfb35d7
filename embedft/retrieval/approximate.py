"""FAISS indices, which find most of the nearest neighbors faster than exact search.

    index = FaissIndex(documents, "hnsw,efSearch=128")         # a preset and a parameter of `faiss.ParameterSpace`
    index = FaissIndex(documents, "IVF1024,SQ8,nprobe=32")     # any string for FAISS's index_factory

Presets are hnsw (about 4 D + 270 bytes per vector), ivf (4 D + 8) and ivfpq (D / 8 + 8, residuals in one byte for at
least 8 dimensions). IVF has 4 sqrt(N) lists, or fewer if that would leave under 39 training documents per list.

Source: Malkov and Yashunin 2018 (HNSW); Jegou et al. 2011 (IVF, PQ); FAISS's wiki, "Guidelines to choose an index".
Shapes: Q queries, N documents, D dimensions.
"""

import contextlib
import math
import re
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np

from ..progress import progress_bar
from .index import Found, Index, checked_embeddings, first_of, slices_of

# Fewest and most documents to train on: per list of an IVF (FAISS warns below 39), and for product quantization.
LEAST_PER_LIST, TRAINED_PER_LIST, LEAST_PQ, TRAINED_PQ = 39, 64, 256, 65_536


class FaissIndex(Index):
    """A FAISS index over an array or memory map of any float type, by inner product. `seed` fixes the training sample
    and k-means; HNSW graphs still vary, because threads link documents concurrently. Raises like `check_index`."""

    def __init__(self, embeddings_ND: np.ndarray, name: str, *, seed: int = 0):
        super().__init__(embeddings_ND)
        self.name, number = name, len(self)
        self._index, self.factory, self.parameters, at_most = check_index(name, self.dim, num_documents=number)
        with _refusals(name, self.dim):
            if not self._index.is_trained:
                rows = np.sort(np.random.default_rng(seed).choice(number, min(at_most, number), replace=False))
                if (ivf := _ivf(self._index)) is not None:
                    ivf.cp.seed = seed
                self._index.train(checked_embeddings(embeddings_ND[rows]))
            with progress_bar(number, "indexing", unit="document") as bar:
                for _, slice_ND in slices_of(embeddings_ND, self.dim):
                    self._index.add(slice_ND)
                    bar.update(len(slice_ND))

    @cached_property
    def bytes_per_vector(self) -> float:
        """The size of the index as FAISS writes it, divided by N."""
        import faiss

        sizes = []
        faiss.write_index(self._index, faiss.PyCallbackIOWriter(lambda block: sizes.append(len(block))))
        return sum(sizes) / len(self)

    def _search(self, queries_QD: np.ndarray, depth: int) -> Found:
        with _refusals(self.name, self.dim):
            return first_of(*self._index.search(queries_QD, min(depth, len(self))), depth)


def split_name(name: str) -> tuple[str, str]:
    """The preset or factory string in the name of an index, and its parameters ("" if none)."""
    parts = name.split(",")
    return ",".join(part for part in parts if "=" not in part), ",".join(part for part in parts if "=" in part)


def check_index(name: str, dim: int, *, num_documents: int | None = None) -> tuple[Any, str, str, int]:
    """An empty index for vectors [N, dim], its factory string and parameters, and the most documents to train it on.
    Raises `ValueError` for a name that FAISS does not accept, for an index that does not search by inner product, and
    for too few documents to train it on (`num_documents` None: not checked)."""
    import faiss

    preset, parameters = split_name(name)
    num_lists = max(1, min(round(4 * math.sqrt(num_documents or 1)), (num_documents or 1) // LEAST_PER_LIST))
    num_parts = max(parts for parts in range(1, max(dim // 8, 1) + 1) if dim % parts == 0)
    presets = {
        "hnsw": ("HNSW32,Flat", "efConstruction=200,efSearch=64"),
        "ivf": (f"IVF{num_lists},Flat", "nprobe=16"),
        # "np": no polysemous training, which takes most of the time and only helps a search that is not used here.
        "ivfpq": (f"IVF{num_lists},PQ{num_parts}x8np", "nprobe=16"),
    }
    factory, defaults = presets.get(preset, (preset, ""))
    values = dict(part.split("=", 1) for part in f"{defaults},{parameters}".split(",") if part)
    parameters = ",".join(f"{key}={value}" for key, value in values.items())
    with _refusals(name, dim):
        index = faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
        if index.metric_type != faiss.METRIC_INNER_PRODUCT:  # some types ignore it: their smallest score is best
            raise RuntimeError("it does not search by inner product")
        if parameters:
            faiss.ParameterSpace().set_index_parameters(index, parameters)
    least, at_most = LEAST_PQ, TRAINED_PQ
    if (ivf := _ivf(index)) is not None:
        is_flat = isinstance(faiss.downcast_index(ivf), faiss.IndexIVFFlat)
        least = max(ivf.nlist, 1 if is_flat else LEAST_PQ)
        at_most = max(TRAINED_PER_LIST * ivf.nlist, 1 if is_flat else TRAINED_PQ)
    if num_documents is not None and num_documents < least and not index.is_trained:
        raise ValueError(f"index {name!r} needs at least {least:,} documents to train on, found {num_documents:,}")
    return index, factory, parameters, at_most


@contextlib.contextmanager
def _refusals(name: str, dim: int) -> Iterator[None]:
    """Turns what FAISS raises about an index into a `ValueError`."""
    try:
        yield
    except RuntimeError as error:
        reason = re.sub(r"^Error in .* at \S+:\d+: ", "", str(error).strip().splitlines()[-1])  # drops the line of C++
        expected = "flat, hnsw, ivf, ivfpq or a string for FAISS's index_factory, parameters as in hnsw,efSearch=128"
        raise ValueError(f"index {name!r} at {dim} dimensions: expected {expected} ({reason})") from None


def _ivf(index: Any) -> Any:
    """The inverted file in an index, or None."""
    import faiss

    with contextlib.suppress(RuntimeError):
        return faiss.extract_index_ivf(index)
    return None
