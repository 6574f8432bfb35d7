"""What is a positive for whom, and what may be a negative: the third argument of every loss.

Identity is data. A loss never compares texts and never guesses from similarity; it asks `masks`.

    targets = Targets(group=torch.tensor([[0], [1]]))        # query i's positive is document i
    positive_BM, negative_BM = targets.masks()

Shapes: B queries, M documents, G listed documents a query, K known pairs, D features.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

SIMILARITIES = ("cosine", "dot")


@dataclass(frozen=True)
class Targets:
    """Relevance between the B queries and the M documents of a batch; document j is row j of a loss's D.

    Args:
        group: [B, G] int64, the documents listed for each query, -1 = none. The first is its positive unless
            `relevance` says otherwise; the rest are its hard negatives.
        relevance: [B, G], above 0 = positive, 0 = hard negative; None: as `group` says.
        known: [K, 2] int64, (query row, document) pairs known to be relevant from elsewhere in the data. They are
            positives in `masks`, so never negatives.
    """

    group: Tensor
    relevance: Tensor | None = None
    known: Tensor | None = None

    def __post_init__(self):
        if self.group.ndim != 2:
            raise ValueError(
                f"group has shape {tuple(self.group.shape)}, expected [queries, documents listed for each]"
            )
        if self.relevance is not None and self.relevance.shape != self.group.shape:
            raise ValueError(
                f"relevance has shape {tuple(self.relevance.shape)}, expected group's {tuple(self.group.shape)}"
            )
        if self.known is not None and (self.known.ndim != 2 or self.known.shape[1] != 2):
            raise ValueError(f"known has shape {tuple(self.known.shape)}, expected [pairs, 2]")

    @property
    def listed_positive(self) -> Tensor:
        """[B, G] bool: which documents of `group` are positives of their query."""
        if self.relevance is not None:
            return (self.relevance > 0) & (self.group >= 0)
        positive_BG = torch.zeros_like(self.group, dtype=torch.bool)
        positive_BG[:, 0] = self.group[:, 0] >= 0
        return positive_BG

    def masks(self, *, num_documents: int | None = None) -> tuple[Tensor, Tensor]:
        """(positive, negative), each [B, M] bool.

        Positive: listed as such, or known. Negative: every other document of the batch, the hard negatives of this
        and of other queries among them. `num_documents` is M; None: up to the largest document listed or known.
        """
        if num_documents is None:
            named = self.group if self.known is None else torch.cat([self.group.flatten(), self.known[:, 1]])
            num_documents = int(named.max()) + 1
        positive_BM = torch.zeros(len(self.group), num_documents, dtype=torch.bool, device=self.group.device)
        rows, places = self.listed_positive.nonzero(as_tuple=True)
        positive_BM[rows, self.group[rows, places]] = True
        if self.known is not None:
            positive_BM[self.known[:, 0], self.known[:, 1]] = True
        return positive_BM, ~positive_BM

    def to(self, device: torch.device | str) -> "Targets":
        """The same on another device."""
        moved = (None if x is None else x.to(device) for x in (self.group, self.relevance, self.known))
        return Targets(*moved)


def scores(Q: Tensor, D: Tensor, *, similarity: str = "cosine") -> Tensor:
    """Similarity of every query with every document, [B, M]; half precision becomes float32.

    "cosine" normalises itself, a vector of length zero has cosine 0 with everything (lengths are clamped at 1e-12);
    "dot" is the inner product.
    """
    if similarity not in SIMILARITIES:
        raise ValueError(f"similarity is {similarity!r}, expected one of {', '.join(SIMILARITIES)}")
    Q, D = (x if x.dtype is torch.float64 else x.float() for x in (Q, D))
    if similarity == "cosine":
        Q, D = F.normalize(Q, dim=1), F.normalize(D, dim=1)
    return Q @ D.T
