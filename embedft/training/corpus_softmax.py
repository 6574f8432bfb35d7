"""The softmax over a whole corpus of frozen vectors: every document that does not answer a query is a negative.

    documents = Documents(embeddings_MD, at_once=16_384)
    loss = full_corpus_softmax(queries_BD, documents, Pairs.of(relevant, range(B), documents), temperature=0.05)

[B, M] is never held in memory. A document may have several vectors, its windows, and scores as the best (MaxP).

Shapes: B queries, M vectors (a document's, or its windows'), C of them at a time, A pairs of a query and a document
that answers it, P pairs of a query and a vector of such a document, D features.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# The score of what is not a negative: its exponential is 0 and, unlike that of minus infinity, no gradient is NaN.
NOTHING = -1e30
DocumentMap = Callable[[Tensor], Tensor]


class Documents:
    """Frozen document vectors, an array or memory map, read `at_once` rows at a time and computed with in `dtype`.

    `rows` ([M'] int64) are used, None: all; `source` is the document of each, from `checked_source`, None: its own.
    Raises `ValueError` for a row that is not finite, or zero.
    """

    def __init__(
        self,
        embeddings_MD: np.ndarray,
        *,
        at_once: int = 16_384,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        rows: np.ndarray | None = None,
        lengths_M: np.ndarray | None = None,
        source: np.ndarray | None = None,
    ):
        self.embeddings_MD, self.at_once, self.dtype, self.device = embeddings_MD, at_once, dtype, torch.device(device)
        self.rows, self.source = rows, source
        what = "document" if source is None else "window"
        self.lengths_M = checked_lengths(embeddings_MD, what, at_once) if lengths_M is None else lengths_M
        self._whole: dict[bool, Tensor] = {}

    def __len__(self) -> int:
        return len(self.embeddings_MD) if self.rows is None else len(self.rows)

    @property
    def num_documents(self) -> int:
        return len(self) if self.source is None else int(self.source[-1]) + 1

    def windows(self, document: int) -> range:
        """The places of a document's vectors."""
        if self.source is None:
            return range(document, document + 1)
        return range(*np.searchsorted(self.source, [document, document + 1]).tolist())

    def document_of(self, places_C: Tensor) -> Tensor:
        """The document of each place, [C]."""
        return places_C if self.source is None else torch.from_numpy(self.source[places_C.cpu().numpy()]).to(places_C)

    def subset(self, kept: np.ndarray) -> "Documents":
        """Only the documents `kept` (rising numbers), renumbered from 0."""
        options = {name: getattr(self, name) for name in ("at_once", "dtype", "device", "lengths_M")}
        rows, source = kept, None
        if self.source is not None:
            rows = np.flatnonzero(np.isin(self.source, kept))
            source = np.searchsorted(kept, self.source[rows])
        return Documents(self.embeddings_MD, rows=rows, source=source, **options)

    def parts(self) -> list[slice]:
        """The places of each part."""
        return [slice(i, min(i + self.at_once, len(self))) for i in range(0, len(self), self.at_once)]

    def vectors(self, places: slice | Tensor, *, unit: bool = True) -> Tensor:
        """The vectors at some places, [C, D], normalised or as they are."""
        if len(self) > self.at_once:
            return self._read(places if isinstance(places, slice) else places.cpu().numpy(), unit)
        if unit not in self._whole:
            self._whole[unit] = self._read(slice(0, len(self)), unit)
        return self._whole[unit][places]

    def _read(self, places: slice | np.ndarray, unit: bool) -> Tensor:
        where = places if self.rows is None else self.rows[places]
        # A copy, because a memory map is read-only and a tensor cannot be.
        part_CD = torch.from_numpy(np.array(self.embeddings_MD[where])).to(self.device, self.dtype)
        return part_CD / torch.from_numpy(self.lengths_M[where]).to(part_CD)[:, None] if unit else part_CD


class Pairs(NamedTuple):
    """Which documents answer which queries (A), and the vectors of these documents in order of place (P)."""

    query_A: Tensor
    weight_A: Tensor  # 1 / (documents that answer the query x queries): the weights sum to 1
    query_P: Tensor
    place_P: Tensor
    answer_P: Tensor  # the entry of A it belongs to

    @classmethod
    def of(cls, relevant: Mapping[int, Sequence[int]], queries: Sequence[int], documents: Documents) -> "Pairs":
        """For `queries`, renumbered from 0; `relevant` lists the documents that answer each."""
        answers = sorted((document, row) for row, query in enumerate(queries) for document in relevant[query])
        weights = [1 / (len(relevant[queries[row]]) * len(queries)) for _, row in answers]
        listed = sorted((place, a) for a, (document, _) in enumerate(answers) for place in documents.windows(document))
        place_P, answer_P = (torch.tensor(column, device=documents.device) for column in zip(*listed, strict=True))
        query_A = torch.tensor([row for _, row in answers], device=documents.device)
        weight_A = torch.tensor(weights, dtype=documents.dtype, device=documents.device)
        return cls(query_A, weight_A, query_A[answer_P], place_P, answer_P)

    def within(self, places: slice) -> tuple[Tensor, Tensor]:
        """(query, place within the part) of the pairs whose vector is in a part."""
        first, last = torch.searchsorted(self.place_P, self.place_P.new_tensor([places.start, places.stop])).tolist()
        return self.query_P[first:last], self.place_P[first:last] - places.start


def checked_lengths(embeddings_ND: np.ndarray, what: str, at_once: int) -> np.ndarray:
    """The norm of every row, [N]. Raises `ValueError` for a row that is not finite, or zero."""
    kind = np.float64 if embeddings_ND.dtype == np.float64 else np.float32
    lengths_N = np.empty(len(embeddings_ND), dtype=kind)
    for start in range(0, len(embeddings_ND), at_once):
        part_CD = np.asarray(embeddings_ND[start : start + at_once], dtype=kind)
        lengths_N[start : start + len(part_CD)] = np.sqrt(np.einsum("nd,nd->n", part_CD, part_CD))
    for fault, rows in (("not finite", ~np.isfinite(lengths_N)), ("zero", lengths_N == 0)):
        if rows.any():
            more = f" (and {rows.sum() - 1:,} more)" if rows.sum() > 1 else ""
            raise ValueError(f"the embedding of {what} row {rows.argmax():,} is {fault}{more}")
    return lengths_N


def checked_source(source: np.ndarray, num_vectors: int) -> np.ndarray:
    """The document of each vector, [M] int64. Raises `ValueError` unless they rise from 0 without gaps."""
    source = np.asarray(source)
    if source.shape != (num_vectors,) or not np.issubdtype(source.dtype, np.integer):
        raise ValueError(f"source is {list(source.shape)} {source.dtype}, expected [{num_vectors:,}] whole numbers")
    source = source.astype(np.int64)
    steps = np.diff(source, prepend=-1)
    wrong = np.flatnonzero((steps != 1) & ((steps != 0) | (source < 0)))
    if wrong.size:
        found = f"window row {wrong[0]:,} is of document {source[wrong[0]]:,}"
        raise ValueError(f"source: {found}, expected that of the window before or the next, from 0")
    return source


def full_corpus_softmax(
    Q: Tensor, documents: Documents, pairs: Pairs, *, temperature: float, document_map: DocumentMap | None = None
) -> Tensor:
    """Mean over queries of the mean over the documents p that answer them of

        -log( exp(s_p) / (exp(s_p) + sum over all documents n that do not answer the query of exp(s_n)) )

    with s = cosine / temperature, differentiable once. If documents have windows, s_p is the score of p's best window
    under the current maps, and n runs over all windows of documents that do not answer the query.

    Args:
        Q: query vectors, [B, D], not necessarily unit vectors; each has a document that answers it.
        document_map: a trainable map of documents; each part is computed again in the backward pass. None: documents
            are constants, and one pass over them gives the loss and its gradient.

    Source: van den Oord et al. 2018, equation 4, over the corpus; Milakov and Gimelshein 2018, section 3, in parts.
    """
    Q = F.normalize(Q, dim=1) / temperature
    positives_PD = _mapped(documents.vectors(pairs.place_P, unit=document_map is None), document_map)
    scores_P = (Q[pairs.query_P] * positives_PD).sum(dim=1)
    scores_A = torch.full_like(pairs.weight_A, NOTHING).scatter_reduce(0, pairs.answer_P, scores_P, "amax")
    if document_map is None:
        log_sum_B = _FrozenLogSum.apply(Q, documents, pairs)
    else:
        parts = documents.parts()
        compute, again = _log_sum, {}
        if len(parts) > 1:
            compute, again = partial(checkpoint, _log_sum), {"use_reentrant": False, "preserve_rng_state": False}
        sums = [compute(Q, documents, pairs, part, document_map, **again) for part in parts]
        log_sum_B = torch.stack(sums).logsumexp(dim=0)
    return ((torch.logaddexp(log_sum_B[pairs.query_A], scores_A) - scores_A) * pairs.weight_A).sum()


def first_ranks(Q: Tensor, documents: Documents, pairs: Pairs, *, document_map: DocumentMap | None = None) -> Tensor:
    """The rank, from 1, of the best document that answers each query, by cosine among all documents, [B] int64.

    That is 1 + the documents ahead of it that do not answer the query; of equal scores the first document is ahead.
    """
    with torch.no_grad():
        Q = F.normalize(Q, dim=1)
        # The same product as for the other documents: another order of summation would break ties.
        products = [_products(Q, documents, part, document_map)[pairs.within(part)] for part in documents.parts()]
        scores_P = torch.cat(products)
        best_B = scores_P.new_full((len(Q),), NOTHING).scatter_reduce(0, pairs.query_P, scores_P, "amax")
        is_best_P = scores_P == best_B[pairs.query_P]
        document_P = documents.document_of(pairs.place_P)
        document_B = document_P.new_full((len(Q),), documents.num_documents)
        document_B.scatter_reduce_(0, pairs.query_P[is_best_P], document_P[is_best_P], "amin")
        ranks_B = torch.ones(len(Q), dtype=torch.int64, device=Q.device)
        last, is_counted_B = -1, None
        for part in documents.parts():
            scores_BC, best_B1 = _scores(Q, documents, pairs, part, document_map), best_B[:, None]
            document_C = documents.document_of(torch.arange(part.start, part.stop, device=Q.device))
            is_earlier_BC = document_C < document_B[:, None]
            # Counts what is not behind, so that NaN scores count as ahead.
            is_behind_BC = (scores_BC < best_B1) | ((scores_BC == best_B1) & ~is_earlier_BC)
            # A document is ahead if one of its windows is. The first one may have begun in the part before.
            first, is_front_BN = int(document_C[0]), _any_window(~is_behind_BC, document_C)
            if first == last:
                ranks_B -= is_counted_B.long()
                is_front_BN[:, 0] |= is_counted_B
            ranks_B += is_front_BN.sum(dim=1)
            last, is_counted_B = int(document_C[-1]), is_front_BN[:, -1]
    return ranks_B


def _any_window(is_true_BC: Tensor, document_C: Tensor) -> Tensor:
    """Whether any window of each document is true, [B, N] for the N documents of a part."""
    column_C = document_C - document_C[0]
    num_documents = int(column_C[-1]) + 1
    if num_documents == len(column_C):
        return is_true_BC
    counts_BN = column_C.new_zeros(len(is_true_BC), num_documents)
    return counts_BN.scatter_add_(1, column_C.expand_as(is_true_BC), is_true_BC.long()) > 0


class _FrozenLogSum(torch.autograd.Function):
    """Log of the sum of exp(Q d) over the documents d that do not answer a query, [B], in one pass."""

    @staticmethod
    def forward(ctx, Q: Tensor, documents: Documents, pairs: Pairs) -> Tensor:
        highest_B1 = Q.new_full((len(Q), 1), NOTHING)
        sum_B1, mean_BD = torch.zeros_like(highest_B1), torch.zeros_like(Q)
        for part in documents.parts():
            D_CD = documents.vectors(part)
            scores_BC = _scores(Q, documents, pairs, part, None)
            higher_B1 = torch.maximum(highest_B1, scores_BC.amax(dim=1, keepdim=True))
            weights_BC = scores_BC.sub_(higher_B1).exp_()
            shrink_B1 = (highest_B1 - higher_B1).exp()
            sum_B1 = sum_B1 * shrink_B1 + weights_BC.sum(dim=1, keepdim=True)
            mean_BD = torch.addmm(mean_BD * shrink_B1, weights_BC, D_CD)
            highest_B1 = higher_B1
        # The gradient of the log-sum-exp is the mean of the documents under the softmax.
        ctx.save_for_backward(mean_BD / sum_B1)
        return (highest_B1 + sum_B1.log()).squeeze(1)

    @staticmethod
    def backward(ctx, grad_B: Tensor):
        (mean_BD,) = ctx.saved_tensors
        return grad_B[:, None] * mean_BD, None, None


def _log_sum(*arguments: Any) -> Tensor:
    return _scores(*arguments).logsumexp(dim=1)


def _scores(Q: Tensor, documents: Documents, pairs: Pairs, part: slice, document_map: DocumentMap | None) -> Tensor:
    """Scores of one part, [B, C]; NOTHING where the document answers the query."""
    scores_BC = _products(Q, documents, part, document_map)
    scores_BC[pairs.within(part)] = NOTHING
    return scores_BC


def _products(Q: Tensor, documents: Documents, part: slice, document_map: DocumentMap | None) -> Tensor:
    return Q @ _mapped(documents.vectors(part, unit=document_map is None), document_map).T


def _mapped(vectors_CD: Tensor, document_map: DocumentMap | None) -> Tensor:
    return vectors_CD if document_map is None else F.normalize(document_map(vectors_CD), dim=1)
