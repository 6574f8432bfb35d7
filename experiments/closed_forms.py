"""Adapters in closed form: baselines for trained ones.

    adapter = ridge(*relevant_pairs(queries_ND, documents_MD, qrels), strength=1.0)

Shapes: P pairs of a query and a document that answers it, N queries, M documents, D features.
"""

from collections.abc import Mapping

import numpy as np
import torch

from embedft.encoders.adapter import Adapter
from embedft.encoders.maps import LinearMap


def ridge(queries_PD: np.ndarray, positives_PD: np.ndarray, *, strength: float) -> Adapter:
    """The linear map of queries, without bias, W = argmin of sum over pairs of ||W q - d||^2 + strength ||W - I||^2.

    With q and d the rows of Q and X: W = (X^T Q + strength I) (Q^T Q + strength I)^-1. Strength 0 is least squares,
    which needs Q of full rank; a large strength approaches the identity. Computed in float64, on the vectors as given.

    Source: Hoerl and Kennard 1970, shrinking toward the identity instead of 0.
    """
    Q, X = _pairs(queries_PD, positives_PD)
    if not 0 <= strength < np.inf:
        raise ValueError(f"strength is {strength}, expected at least 0 and finite")
    if strength == 0 and np.linalg.matrix_rank(Q) < Q.shape[1]:
        raise ValueError(f"strength is 0, expected above 0: the queries span fewer than {Q.shape[1]} dimensions")
    toward = strength * np.eye(Q.shape[1])
    return _adapter(np.linalg.solve(Q.T @ Q + toward, Q.T @ X + toward).T)


def procrustes(queries_PD: np.ndarray, positives_PD: np.ndarray) -> Adapter:
    """The orthogonal map of queries, W = argmin over W^T W = I of sum over pairs of ||W q - d||^2.

    With q and d the rows of Q and X: W = U V^T, from the singular value decomposition X^T Q = U S V^T. It keeps lengths
    and angles between queries; reflections are allowed. W is not unique if the pairs do not span all dimensions.

    Source: Schönemann 1966.
    """
    Q, X = _pairs(queries_PD, positives_PD)
    U, _, Vt = np.linalg.svd(X.T @ Q)
    return _adapter(U @ Vt)


def relevant_pairs(
    queries_ND: np.ndarray, documents_MD: np.ndarray, qrels: Mapping[int, Mapping[int, int]]
) -> tuple[np.ndarray, np.ndarray]:
    """(queries, documents) of the pairs with a grade above 0, each [P, D], in the order of the qrels."""
    pairs = [(query, document) for query, grades in qrels.items() for document, grade in grades.items() if grade > 0]
    if not pairs:
        raise ValueError(f"none of the {len(qrels)} queries in the qrels has a relevant document")
    query_rows, document_rows = map(list, zip(*pairs, strict=True))
    return queries_ND[query_rows], documents_MD[document_rows]


def _pairs(queries_PD: np.ndarray, positives_PD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if queries_PD.ndim != 2 or queries_PD.shape != positives_PD.shape or not queries_PD.size:
        found = f"{list(queries_PD.shape)} and {list(positives_PD.shape)}"
        raise ValueError(f"queries and positives are {found}, expected [pairs, features] of the same shape")
    Q, X = (np.asarray(part, dtype=np.float64) for part in (queries_PD, positives_PD))
    for what, part in (("query", Q), ("positive", X)):
        if not np.isfinite(part).all():
            raise ValueError(f"the embedding of {what} row {int(np.argwhere(~np.isfinite(part))[0, 0])} is not finite")
    return Q, X


def _adapter(weight_DD: np.ndarray) -> Adapter:
    part = LinearMap(weight_DD.shape[1], weight_DD.shape[0], bias=False)
    with torch.no_grad():
        part.weight.copy_(torch.from_numpy(weight_DD))
    return Adapter(query=part)
