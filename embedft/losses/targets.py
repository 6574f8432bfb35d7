"""What is relevant to what, and what may be a negative: the third argument of every loss.

Identity is data. Losses never compare texts and never guess from similarity; they ask `masks`.

    targets = Targets(group=torch.tensor([[0], [1]]))        # query i's positive is document i
    positive_BM, negative_BM = targets.masks()

Shapes: B queries, M documents, C vectors of their windows, G listed per query, K known pairs, P pairs, D, E features.
"""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

DIRECTIONS = ("query_document", "document_query", "query_query", "document_document")
WINDOWS = ("max", "softmax")


@dataclass(frozen=True)
class Targets:
    """Relevance between the B queries and the M documents of a batch, and other knowledge about them.
    Raises `ValueError` for a shape that does not fit and, on the CPU (elsewhere the check would wait for the device),
    for an index that is not a query or document of the batch."""

    # [B, G] int64, documents listed for each query, -1 = none. Without `relevance`: its positive, then hard negatives.
    group: Tensor
    relevance: Tensor | None = None  # [B, G], above 0 = positive, 0 = hard negative
    known: Tensor | None = None  # [K, 2] int64, (query row, document): further positives, so never negatives
    document: Tensor | None = None  # [C] int64, the document of each row of D, if some have several; None: row j is j
    target_scores: Tensor | None = None  # [B, G], a teacher's scores, or the gold score of a scored pair
    # (Q [B, E], D [C, E]), the same texts embedded by other models: "guide", "teacher" or "base"; constant.
    references: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    # [B] int64, equal for rows of the same query, which share all relevant documents. None: all rows differ.
    query: Tensor | None = None

    def __post_init__(self):
        group, pairs = tuple(self.group.shape), (0 if self.known is None else len(self.known), 2)
        for name, fits, expected in (
            ("group", len(group) == 2, "[queries, documents listed for each]"),
            ("relevance", self.relevance is None or self.relevance.shape == group, f"group's {group}"),
            ("target_scores", self.target_scores is None or self.target_scores.shape == group, f"group's {group}"),
            ("known", self.known is None or self.known.shape == pairs, "[pairs, 2]"),
            ("document", self.document is None or self.document.ndim == 1, "[document vectors]"),
            ("query", self.query is None or self.query.shape == group[:1], "[queries], as group has them"),
        ):
            if not fits:
                raise ValueError(f"{name} has shape {tuple(getattr(self, name).shape)}, expected {expected}")
        if self.group.device.type == "cpu":
            self._check_numbers()

    @property
    def listed_positive(self) -> Tensor:
        """[B, G] bool: which documents of `group` are positives of their query."""
        is_first_G = torch.arange(self.group.shape[1], device=self.group.device) == 0
        return (self.group >= 0) & (is_first_G if self.relevance is None else self.relevance > 0)

    @property
    def listed_negative(self) -> Tensor:
        """[B, G] bool: which documents of `group` are hard negatives of their query and not known to be relevant."""
        numbers_P, documents_P = self._pairs(self.listed_positive)
        stride = int(torch.cat([self.group.flatten(), documents_P]).max()) + 1 if self.group.numel() else 1
        pairs_BG = self._numbers()[:, None] * stride + self.group
        return (self.group >= 0) & ~torch.isin(pairs_BG, numbers_P * stride + documents_P)

    def num_documents(self, num_columns: int) -> int:
        """M, if D has `num_columns` rows. Raises `ValueError` if `document` has another length or, without
        `document` and on the CPU, for an index out of range."""
        if self.document is None:
            if self.group.device.type == "cpu":
                self._check_numbers(num_columns)
            return num_columns
        if len(self.document) != num_columns:
            raise ValueError(f"document has {len(self.document)} entries, but D has {num_columns} rows")
        return int(self.document.max()) + 1

    def masks(self, direction: str = "query_document", *, num_documents: int | None = None) -> tuple[Tensor, Tensor]:
        """(positive, negative), both bool: which pairs of a row and a column are positives, and which negatives.

        - query_document, [B, M]: positive if listed as such or known, for any row of the query; otherwise negative.
        - document_query, [M, B]: the same, transposed.
        - query_query, [B, B]: rows of one query, or that share a positive document, are positive; others are negative.
        - document_document, [M, M]: two positives of one query are positive. Two that no query lists or knows together
          are negative. Others are neither, such as a positive and its query's hard negative.
        Nothing is positive or negative to itself. `num_documents` is M; None: the largest document number plus 1."""
        check_one_of("direction", direction, DIRECTIONS)
        numbers_P, documents_P = self._pairs(self.listed_positive)
        number_B = self._numbers()
        if direction == "query_query":
            positive = _sharing(numbers_P, documents_P, len(self.group))[number_B][:, number_B]
            positive = (positive | (number_B[:, None] == number_B)).fill_diagonal_(False)
            return positive, (~positive).fill_diagonal_(False)
        if num_documents is None:
            named = [self.group.flatten(), self.document, None if self.known is None else self.known[:, 1]]
            num_documents = int(torch.cat([x for x in named if x is not None]).max()) + 1
        elif self.group.device.type == "cpu":
            self._check_numbers(num_documents)
        if direction == "document_document":
            positive = _sharing(documents_P, numbers_P, num_documents)
            together = _sharing(*reversed(self._pairs(self.group >= 0)), num_documents)
            return positive, (~together).fill_diagonal_(False)
        positive = torch.zeros(len(self.group), num_documents, dtype=torch.bool, device=self.group.device)
        positive[numbers_P, documents_P] = True
        positive = positive[number_B]
        return (positive, ~positive) if direction == "query_document" else (positive.T, ~positive.T)

    def check_queries(self, Q: Tensor) -> None:
        """Raises `ValueError` unless Q has one row per query."""
        if len(Q) != len(self.group):
            raise ValueError(f"Q has {len(Q)} rows, group has {len(self.group)} queries")

    def check_several(self, loss: str) -> None:
        """Raises `ValueError` if queries list only one document each, so that there is nothing to compare."""
        if (listed := self.group.shape[1]) < 2:
            raise ValueError(f"{loss} compares the documents of a query, but each lists {listed}: add hard negatives")

    def warn_without_negatives(self, D: Tensor) -> None:
        """Warns when a batch consists of one document, so that no query has a negative."""
        alone = len(D) == 1
        if self.document is not None:
            # Counting documents waits for the device, so this is done only for a batch of one query.
            alone = len(self.group) == 1 and self.num_documents(len(D)) == 1
        if alone:
            message = "a batch has one document, so it has no training signal: use larger batches or hard negatives"
            warnings.warn(message, stacklevel=1)  # one place for all losses, so that Python shows it once

    def reference(self, name: str, Q: Tensor, D: Tensor) -> tuple[Tensor, Tensor]:
        """`references[name]`. Raises `ValueError` unless it has a vector for every row of Q and D."""
        self.check_queries(Q)
        if name not in self.references:
            found = ", ".join(self.references) or "none"
            raise ValueError(f"the loss needs references[{name!r}], vectors of the batch by that model; found {found}")
        found, expected = tuple(map(len, self.references[name])), (len(Q), len(D))
        if found != expected:
            raise ValueError(f"references[{name!r}] has {found} queries and documents, the batch {expected}")
        return self.references[name]

    def of_queries(self, start: int, stop: int) -> "Targets":
        """Only the queries `start` to `stop`, numbered from 0; the documents stay the same."""
        of_rows = ("group", "relevance", "target_scores", "query")
        parts = {name: x[start:stop] for name in of_rows if (x := getattr(self, name)) is not None}
        # All relevant documents of a query, including those listed in its other rows, become known to one of its rows.
        numbers_P, documents_P = self._pairs(self.listed_positive)
        numbers = self._numbers()[start:stop]
        row_N = self.group.new_full((len(self.group),), -1)
        row_N[numbers] = torch.arange(len(numbers), device=row_N.device)
        known = torch.stack([row_N[numbers_P], documents_P], dim=1)
        references = {name: (Q[start:stop], D) for name, (Q, D) in self.references.items()}
        return replace(self, **parts, known=known[known[:, 0] >= 0], references=references)

    def to(self, device: torch.device | str, transfer: Callable | None = None) -> "Targets":
        """The same on another device. `transfer`: (tensors, device) -> the tensors there; None: one after the other."""
        own = {name: x for name, x in vars(self).items() if isinstance(x, Tensor)}
        tensors = [*own.values(), *(x for pair in self.references.values() for x in pair)]
        moved = iter([x.to(device) for x in tensors] if transfer is None else transfer(tensors, device))
        own = {name: next(moved) for name in own}
        return Targets(**own, references={name: (next(moved), next(moved)) for name in self.references})

    def _numbers(self) -> Tensor:
        """[B] int64 from 0: a number for each query, the same for all of its rows."""
        if self.query is None:
            return torch.arange(len(self.group), device=self.group.device)
        return self.query.unique(return_inverse=True)[1]

    def _pairs(self, of_listed_BG: Tensor) -> tuple[Tensor, Tensor]:
        """(query number, document), each [P], of the pairs of `group` in `of_listed_BG` and of the known pairs."""
        queries, places = of_listed_BG.nonzero(as_tuple=True)
        documents = self.group[queries, places]
        if self.known is not None:
            known = self.known.to(self.group)  # torch.tensor([]) is a float tensor
            queries, documents = torch.cat([queries, known[:, 0]]), torch.cat([documents, known[:, 1]])
        return self._numbers()[queries], documents

    def _check_numbers(self, num_documents: float = math.inf) -> None:
        """Raises `ValueError` for an index that is not a query or document (`document` gives their number)."""
        if self.document is not None:
            documents = self.document.unique()
            num_documents = len(documents)
            if num_documents and (documents[0] != 0 or documents[-1] != num_documents - 1):
                found = f"{num_documents} numbers from {int(documents[0])} to {int(documents[-1])}"
                raise ValueError(f"document has {found}, expected every number from 0 to the last")
        limits = [("group", "document", self.group, -1, num_documents)]
        if self.known is not None:
            limits.append(("known", "query", self.known[:, 0], 0, len(self.group)))
            limits.append(("known", "document", self.known[:, 1], 0, num_documents))
        for name, what, numbers, least, limit in limits:
            for number in numbers.aminmax() if numbers.numel() else ():
                if not least <= number < limit:
                    raise ValueError(f"{name} has {what} {int(number)}, expected at least {least} and below {limit}")


def _sharing(item_P: Tensor, key_P: Tensor, num_items: int) -> Tensor:
    """[N, N] bool: which two different items share a key, given (item, key) pairs."""
    shared = torch.zeros(num_items, num_items, dtype=torch.bool, device=item_P.device)
    key_P, order_P = key_P.sort()
    item_P = item_P[order_P]
    # Pairs with the same key are now adjacent: compare neighbours, then pairs two apart, and so on.
    apart = 1
    while (same := key_P[apart:] == key_P[:-apart]).any():
        one, other = item_P[apart:][same], item_P[:-apart][same]
        shared[one, other] = shared[other, one] = True
        apart += 1
    return shared.fill_diagonal_(False)


def comparable(Q: Tensor, D: Tensor, similarity: str, *, as_pairs: bool = False) -> tuple[Tensor, Tensor]:
    """Vectors in float32 or float64 whose inner products are the similarities.
    "cosine" clamps lengths at 1e-12, so that a zero vector has cosine 0 with everything. With `as_pairs` it follows
    torch.cosine_similarity, as sentence-transformers does for pairs: it clamps values at 1e-8, but not gradients."""
    check_one_of("similarity", similarity, ("cosine", "dot"))
    vectors = float32_or_64(Q), float32_or_64(D)
    if similarity == "dot":
        return vectors
    if not as_pairs:
        return tuple(F.normalize(X, dim=1) for X in vectors)
    lengths = [torch.linalg.vector_norm(X, dim=1, keepdim=True) for X in vectors]
    return tuple(X / (x + (1e-8 - x).clamp(min=0).detach()) for X, x in zip(vectors, lengths, strict=True))


def float32_or_64(X: Tensor) -> Tensor:
    """Half precision becomes float32; float64 stays as it is."""
    return X if X.dtype is torch.float64 else X.float()


def scores(Q: Tensor, D: Tensor, targets: Targets, *, similarity: str = "cosine", windows: str = "max") -> Tensor:
    """Similarity of every query with every document, [B, M]; half precision becomes float32.

    If documents have several vectors (`targets.document`), `windows` says how to combine the similarities s_w of a
    document's windows w. "max" is the best (MaxP). "softmax" is the sum of s_w * exp(s_w / t) / sum over v of
    exp(s_v / t), t = 0.05, which trains all windows and, unlike a log-sum-exp, does not grow with their number.

    Source: Dai and Callan 2019 (MaxP), section 3."""
    Q, D = comparable(Q, D, similarity)
    targets.check_queries(Q)
    return over_windows(Q @ D.T, targets, windows=windows)


def over_windows(scores_BC: Tensor, targets: Targets, *, windows: str = "max", temperature: float = 0.05) -> Tensor:
    """Combines similarities with document vectors, [B, C], into those with documents, [B, M]; see `scores`."""
    check_one_of("windows", windows, WINDOWS)
    num_documents = targets.num_documents(scores_BC.shape[1])
    if targets.document is None:
        return scores_BC
    nothing_BM = scores_BC.new_zeros(len(scores_BC), num_documents)
    if windows == "max":
        return _best_window(nothing_BM, targets.document, scores_BC)
    best_BM = _best_window(nothing_BM, targets.document, scores_BC.detach())
    weights_BC = ((scores_BC - best_BM[:, targets.document]) / temperature).exp()
    total_BM = nothing_BM.index_add(1, targets.document, weights_BC)
    return nothing_BM.index_add(1, targets.document, weights_BC * scores_BC) / total_BM


def _best_window(into_BM: Tensor, document_C: Tensor, scores_BC: Tensor) -> Tensor:
    return into_BM.scatter_reduce(1, document_C.expand_as(scores_BC), scores_BC, "amax", include_self=False)


# Checks of loss options. A tensor, which is a learned value, is not checked: that would wait for the device.


def check_number(name: str, value: float | Tensor, *, least: float = -math.inf, above: float = -math.inf) -> None:
    """Raises `ValueError` unless a number is finite, at least `least` and above `above`."""
    if not isinstance(value, Tensor) and not (math.isfinite(value) and value >= least and value > above):
        bounds = [f"at least {least:g}"] * math.isfinite(least) + [f"above {above:g}"] * math.isfinite(above)
        raise ValueError(f"{name} is {value}, expected {' and '.join([*bounds, 'finite'])}")


def check_one_of(name: str, value: str, valid: Sequence[str]) -> None:
    """Raises `ValueError` unless an option has a valid value."""
    if value not in valid:
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(valid)}")
