"""The softmax over a whole corpus of frozen vectors: every document that does not answer a query is a negative.

    documents = Documents(embeddings_MD, at_once=16_384)
    loss = full_corpus_softmax(queries_BD, documents, Pairs.of(relevant, range(B), documents), temperature=0.05)

[B, M] is never held in memory. A document may have several vectors, one per window; the best one counts (MaxP).

Shapes: B queries, M vectors of N documents, C vectors at a time, A pairs of a query and a document that answers it, P
pairs of a query and a vector of such a document, D features.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..encoders.packing import cut_by_tokens
from ..vectors import checked_source

# The score of anything but a negative: its exponential is 0 and, unlike minus infinity, it makes no gradient NaN.
NOTHING = -1e30
DocumentMap = Callable[[Tensor], Tensor]


class Documents:
    """Frozen document vectors, an array or memory map, read `at_once` rows at a time; `kind` is their dtype and device.
    `source`: the document of each row, ascending from 0 without gaps; None: each row is a document. Raises `ValueError`
    for any other source, and for a row that is zero or not finite."""

    def __init__(self, embeddings_MD: np.ndarray, source: np.ndarray | None = None, *, at_once: int, **kind: Any):
        self.embeddings_MD, self.at_once, self.like = embeddings_MD, at_once, torch.empty(0, **kind)
        self.lengths_M = checked_lengths(embeddings_MD, "document" if source is None else "window", at_once)
        rows = np.arange(len(embeddings_MD))
        self._keep(rows, rows if source is None else checked_source(source, len(rows)))

    def _keep(self, rows: np.ndarray, source: np.ndarray) -> None:
        self.rows, self.source, self._whole = rows, source, {}
        counts = np.unique(source, return_counts=True)[1].tolist()
        edges = [0, *accumulate(counts)]
        self.parts = [slice(edges[i.start], edges[i.stop]) for i in cut_by_tokens(counts, self.at_once)]

    def __len__(self) -> int:
        return len(self.rows)

    def windows(self, document: int) -> range:
        """The places of a document's vectors."""
        return range(*np.searchsorted(self.source, [document, document + 1]).tolist())

    def subset(self, kept: Sequence[int]) -> "Documents":
        """Only the documents `kept`, which keep their numbers."""
        part, chosen = copy.copy(self), np.isin(self.source, kept)
        part._keep(self.rows[chosen], self.source[chosen])
        return part

    def vectors(self, places: slice | Tensor, *, unit: bool = True) -> Tensor:
        """The vectors at some places, [C, D], of unit length or as they are."""
        if len(self) > self.at_once:
            return self._read(self.rows[places if isinstance(places, slice) else places.cpu().numpy()], unit)
        if unit not in self._whole:
            self._whole[unit] = self._read(self.rows, unit)
        return self._whole[unit][places]

    def _read(self, rows: np.ndarray, unit: bool) -> Tensor:
        part_CD = torch.from_numpy(np.asarray(self.embeddings_MD[rows])).to(self.like)
        return part_CD / torch.from_numpy(self.lengths_M[rows]).to(part_CD)[:, None] if unit else part_CD


class Pairs(NamedTuple):
    """Which documents answer which queries (A), and the vectors of these documents in order of place (P)."""

    query_A: Tensor
    weight_A: Tensor  # 1 / (queries x documents that answer the query): the weights sum to 1
    query_P: Tensor
    place_P: Tensor
    answer_P: Tensor  # the entry of A it belongs to

    @classmethod
    def of(cls, relevant: Mapping[int, Sequence[int]], queries: Sequence[int], documents: Documents) -> "Pairs":
        """For `queries`, renumbered from 0; `relevant` lists the documents that answer each."""
        answers = sorted((document, row) for row, query in enumerate(queries) for document in relevant[query])
        weights = [1 / (len(relevant[queries[row]]) * len(queries)) for _, row in answers]
        listed = sorted((place, a) for a, (document, _) in enumerate(answers) for place in documents.windows(document))
        place_P, answer_P = torch.tensor(listed, device=documents.like.device).T.contiguous()
        query_A = torch.tensor([row for _, row in answers], device=documents.like.device)
        return cls(query_A, documents.like.new_tensor(weights), query_A[answer_P], place_P, answer_P)

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


def full_corpus_softmax(
    Q: Tensor, documents: Documents, pairs: Pairs, *, temperature: float, document_map: DocumentMap | None = None
) -> Tensor:
    """Mean over queries of the mean over the documents p that answer them of

        -log( exp(s_p) / (exp(s_p) + sum over all documents n that do not answer the query of exp(s_n)) )

    with s = cosine / temperature, differentiable once. If documents have windows, s_p is the score of p's best window
    under the current maps, and n runs over all windows of documents that do not answer the query.

    With a trainable `document_map`, each part is recomputed in the backward pass. Without one, documents are constant,
    and a single pass over them gives the loss and its gradient.

    Source: van den Oord et al. 2018, equation 4, over the corpus; Milakov and Gimelshein 2018, section 3, in parts."""
    Q = F.normalize(Q, dim=1) / temperature
    scores_P = (Q[pairs.query_P] * _unit_vectors(documents, pairs.place_P, document_map)).sum(dim=1)
    scores_A = torch.full_like(pairs.weight_A, NOTHING).scatter_reduce(0, pairs.answer_P, scores_P, "amax")
    if document_map is None:
        log_sum_B = _FrozenLogSum.apply(Q, documents, pairs)
    else:
        parts, options = documents.parts, {"use_reentrant": False, "preserve_rng_state": False}

        def log_sum(part: slice) -> Tensor:
            return _scores(Q, documents, pairs, part, document_map).logsumexp(dim=1)

        sums = [log_sum(part) if len(parts) == 1 else checkpoint(log_sum, part, **options) for part in parts]
        log_sum_B = torch.stack(sums).logsumexp(dim=0)
    return ((torch.logaddexp(log_sum_B[pairs.query_A], scores_A) - scores_A) * pairs.weight_A).sum()


@torch.no_grad()
def first_ranks(Q: Tensor, documents: Documents, pairs: Pairs, *, document_map: DocumentMap | None = None) -> Tensor:
    """The rank, from 1, of the best document that answers each query, by cosine among all documents, [B] int64.
    That is 1 + the number of documents ahead of it that do not answer the query; ties go to the first document."""
    Q, parts, source = F.normalize(Q, dim=1), documents.parts, torch.from_numpy(documents.source).to(Q.device)
    # The same product as for the other documents: another order of summation would break ties.
    products = ((part, Q @ _unit_vectors(documents, part, document_map).T) for part in parts)
    scores_P = torch.cat([scores_BC[pairs.within(part)] for part, scores_BC in products])
    best_B = scores_P.new_full((len(Q),), NOTHING).scatter_reduce(0, pairs.query_P, scores_P, "amax")
    is_best_P = scores_P == best_B[pairs.query_P]
    document_B = source.new_full((len(Q),), len(source))
    document_B.scatter_reduce_(0, pairs.query_P[is_best_P], source[pairs.place_P[is_best_P]], "amin")
    ranks_B = torch.ones_like(document_B)
    for part in parts:
        scores_BC, best_B1 = _scores(Q, documents, pairs, part, document_map), best_B[:, None]
        # Counts whatever is not behind, so that NaN scores count as ahead.
        is_tied_BC = (scores_BC == best_B1) & (source[part] >= document_B[:, None])
        is_ahead_BC = ~((scores_BC < best_B1) | is_tied_BC)
        _, column_C = source[part].unique_consecutive(return_inverse=True)
        if column_C[-1] + 1 < len(column_C):  # a document is ahead if one of its windows is
            ahead_BN = source.new_zeros(len(Q), column_C[-1] + 1)
            is_ahead_BC = ahead_BN.index_add(1, column_C, is_ahead_BC.long()) > 0
        ranks_B += is_ahead_BC.sum(dim=1)
    return ranks_B


class _FrozenLogSum(torch.autograd.Function):
    """Log of the sum of exp(Q d) over the documents d that do not answer a query, [B], in one pass."""

    @staticmethod
    def forward(ctx, Q: Tensor, documents: Documents, pairs: Pairs) -> Tensor:
        highest_B1 = Q.new_full((len(Q), 1), NOTHING)
        sum_B1, mean_BD = torch.zeros_like(highest_B1), torch.zeros_like(Q)
        for part in documents.parts:
            D_CD = documents.vectors(part)
            scores_BC = Q @ D_CD.T
            scores_BC[pairs.within(part)] = NOTHING
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


def _scores(Q: Tensor, documents: Documents, pairs: Pairs, part: slice, document_map: DocumentMap | None) -> Tensor:
    """Scores of one part, [B, C]; NOTHING where the document answers the query."""
    scores_BC = Q @ _unit_vectors(documents, part, document_map).T
    scores_BC[pairs.within(part)] = NOTHING
    return scores_BC


def _unit_vectors(documents: Documents, places: slice | Tensor, document_map: DocumentMap | None) -> Tensor:
    if document_map is None:
        return documents.vectors(places)
    return F.normalize(document_map(documents.vectors(places, unit=False)), dim=1)
