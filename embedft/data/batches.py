"""A dataset's training pairs in seeded, shuffled batches.

One example is one (query, relevant document) pair, or a query with all its relevant documents, or a pair with a score.
An epoch is a permutation of them that follows from seed and epoch alone, so training resumes anywhere from two
numbers: the plan of an epoch is made again, nothing is packed. In a batch a document is there once, however many of
its queries are, and every pair that the data knows to be relevant is marked: no query's own document is its negative.
Rows of one query are marked as such too.

    batches = Batches(dataset, embedder.pack, batch_size=64, seed=0)
    for batch in batches.epoch(0): ...

Not here: several datasets (mixture.py), and how a batch is cut for memory (training/cached.py).

Shapes: P examples, N batches of an epoch, B queries of a batch, M documents, C columns of them
(with passages: windows), G listed documents a query, K known pairs.
"""

import functools
import itertools
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from ..encoders.packing import Packed, take
from ..losses.targets import Targets
from .dataset import RetrievalDataset

ExampleKind = Literal["pairs", "queries", "scored"]
EXAMPLES = get_args(ExampleKind)
# Texts tokenised together when only their lengths are wanted: as passages, they may be long.
COUNTED_TEXTS = 1_024
# A row of a batch: a query and its document; None: all documents relevant to it.
Example = tuple[str, str | None]


class Batch(NamedTuple):
    """What a training step gets: packed texts, what is relevant to whom, and the ids for messages."""

    queries: Packed  # B sequences
    documents: Packed  # M sequences; with passages C, and `source` says of which document each is
    targets: Targets
    query_ids: list[str]  # [B]
    document_ids: list[str]  # [M]
    sources: list[str] | None = None  # [B], the dataset that a query is from; None: there is one


class Batches:
    """Batches of a dataset, by epoch.

    Every example is in an epoch once, and every epoch has the same number of batches, whatever the options.

    Args:
        dataset: its qrels with a grade above 0 are what is trained on.
        pack: (texts, role="query" | "document") -> Packed, as `Embedder.pack`.
        batch_size: examples a batch; the last batch of an epoch may be smaller.
        batch_tokens: instead of batch_size: the tokens of a batch, of queries, documents and hard negatives together,
            as `pack` cuts them. The examples of an epoch are cut into ceil(all tokens / batch_tokens) batches of like
            size: at most batch_tokens on average, and each less than one example above that average. The texts are
            tokenised once for it, when the first batch is asked for.
        seed: of the order; epoch e is `torch.randperm` from a generator seeded with seed + e, as in the trainer of
            sentence-transformers.
        num_negatives: hard negatives listed for each query, at most: the first ones that the dataset has for it. A
            query with fewer, or none, lists those; `group` is as wide for every batch.
        examples: "pairs": one a (query, relevant document). "queries": one a query, all its relevant documents listed
            with their grades as relevance. "scored": one a (query, document) that `dataset.scores` has, relevant or
            not, its grade as relevance.
        target_scores: put `dataset.scores` of all listed documents into the targets; "scored" always does.
        no_duplicates: no text stands in two rows of a batch, be it query, document or hard negative: what the first
            such batch cannot take waits for the next that can. Documents of one id never are each other's negatives
            anyway; this is for equal texts with different ids, and for losses that want a document a query. A text of
            many rows makes all batches of an epoch more and smaller than the size asks for, which is warned of; and a
            batch may be larger by the few that fit into no other.
        passages: (size, stride) in tokens: documents become windows, as `pack(texts, role=..., passages=...)` cuts
            them, and all windows of a document are columns with its number (`Targets.document`). None: one column.
        windows_per_document: of a longer document so many windows are in a batch: the best for each of its queries
            in the batch, as far as `best_windows` says, then others drawn at random, by seed, epoch and batch. With
            `batch_tokens` a document counts as that many of its longest windows.
        length_window: batches' worth of the shuffled examples sorted by length together, then cut, and the batches
            shuffled over the epoch; 0: not sorted. Every example stays as likely at every step, but its in-batch
            negatives are of about its own length, closer to it than a sample of the corpus: a different task, easier
            or harder as length tells documents apart. Packed sequences have no padding, so there is little to gain.

    Raises:
        ValueError: nothing to train on, no query with as many as `num_negatives` hard negatives, a listed document
            without a score where scores are wanted.
    """

    def __init__(
        self,
        dataset: RetrievalDataset,
        pack: Callable[..., Packed],
        *,
        batch_size: int | None = None,
        batch_tokens: int | None = None,
        seed: int,
        num_negatives: int = 0,
        examples: ExampleKind = "pairs",
        target_scores: bool = False,
        no_duplicates: bool = False,
        length_window: int = 0,
        passages: Sequence[int] | None = None,
        windows_per_document: int = 4,
    ):
        if (batch_size is None) == (batch_tokens is None):
            raise ValueError(f"batch_size is {batch_size}, batch_tokens is {batch_tokens}: expected one of the two")
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("batch_tokens", batch_tokens, 1),
            ("length_window", length_window, 0),
            ("num_negatives", num_negatives, 0),
            ("windows_per_document", windows_per_document, 1),
        ):
            if value is not None and value < least:
                raise ValueError(f"{name} is {value}, expected at least {least}")
        self.dataset, self.pack = dataset, pack
        self.batch_size, self.batch_tokens, self.seed = batch_size, batch_tokens, seed
        self.num_negatives, self.kind = num_negatives, examples
        self.target_scores = target_scores or examples == "scored"
        self.no_duplicates, self.length_window = no_duplicates, length_window
        self.passages, self.windows_per_document = passages, windows_per_document
        # {query id: {document id: the number of its window that is best for the query}}: see training/windows.py.
        self.best_windows: Mapping[str, Mapping[str, int]] = {}
        # {(role, text): its tokens}, of texts counted so far.
        self.lengths: dict[tuple[str, str], int] = {}
        self.texts = dict(zip(dataset.corpus, dataset.document_texts(), strict=True))
        self.examples = list_examples(dataset, examples)
        if num_negatives:
            most = max(len(dataset.negatives.get(query_id, ())) for query_id, _ in self.examples)
            if num_negatives > most:
                raise ValueError(
                    f"num_negatives is {num_negatives}, the most hard negatives that a query has are {most}"
                )
        for example in self.examples if self.target_scores else ():
            for document_id in self.listed(example):
                if document_id not in dataset.scores.get(example[0], {}):
                    raise ValueError(f"query {example[0]!r} has no score of document {document_id!r}")
        self._planned: tuple[int, list[list[int]]] | None = None

    def __len__(self) -> int:
        """Batches of an epoch, N."""
        return self._num_batches

    def epoch(self, number: int, *, start: int = 0) -> Iterator[Batch]:
        """The batches of epoch `number` (from 0), from batch `start` on, which may be the one behind the last."""
        if not 0 <= start <= len(self):
            raise ValueError(f"start is {start}, expected 0 to {len(self)}, the batches of an epoch")
        for place, rows in enumerate(self.plan(number)[start:], start):
            yield self.collate([self.examples[row] for row in rows], draw=(number, place))

    def plan(self, number: int) -> list[list[int]]:
        """The examples of each batch of an epoch, as places in `examples`; nothing is packed."""
        if self._planned is None or self._planned[0] != number:
            self._planned = number, self._plan(number)
        return self._planned[1]

    def collate(self, examples: list[Example], *, draw: tuple[int, int] = (0, 0)) -> Batch:
        """A batch of the examples given: their own documents first, then the hard negatives, each document once.

        `draw`, epoch and batch, is what the windows that are drawn at random follow from, beside the seed.
        """
        query_ids = [query_id for query_id, _ in examples]
        listed = [self.listed(example) for example in examples]
        # Column by column: all first documents, then all second ones, and so on; None where a query has fewer.
        column: dict[str, int] = {}
        for documents in itertools.zip_longest(*listed):
            for document_id in documents:
                if document_id is not None:
                    column.setdefault(document_id, len(column))
        known = [
            (row, column[document_id])
            for row, query_id in enumerate(query_ids)
            for document_id, grade in self.dataset.qrels.get(query_id, {}).items()
            if grade > 0 and document_id in column
        ]
        # Also where no query of the batch has a hard negative: a loss that needs some is content with the data or not.
        width = max(1 + self.num_negatives, *map(len, listed))
        options = {}
        if len(set(query_ids)) < len(query_ids):
            first: dict[str, int] = {}
            options["query"] = torch.tensor([first.setdefault(q, len(first)) for q in query_ids])
        if self.kind != "pairs":
            grades = [
                [self.dataset.qrels.get(query_id, {}).get(document_id, 0) for document_id in documents]
                for query_id, documents in zip(query_ids, listed, strict=True)
            ]
            options["relevance"] = torch.tensor([_filled(row, width, 0) for row in grades], dtype=torch.float32)
        if self.target_scores:
            scores = [
                [float(self.dataset.scores[query_id][document_id]) for document_id in documents]
                for query_id, documents in zip(query_ids, listed, strict=True)
            ]
            options["target_scores"] = torch.tensor([_filled(row, width, 0.0) for row in scores], dtype=torch.float32)
        documents = self._pack_documents(column, query_ids, listed, draw)
        targets = Targets(
            group=torch.tensor([_filled([column[i] for i in documents], width, -1) for documents in listed]),
            known=torch.tensor(known, dtype=torch.int64).reshape(-1, 2),
            document=None if self.passages is None else documents.source,
            **options,
        )
        return Batch(
            queries=self.pack([self.dataset.queries[query_id] for query_id in query_ids], role="query"),
            documents=documents,
            targets=targets,
            query_ids=query_ids,
            document_ids=list(column),
        )

    def _pack_documents(
        self, column: Mapping[str, int], query_ids: list[str], listed: list[list[str]], draw: tuple[int, int]
    ) -> Packed:
        """The documents of a batch; as passages, at most `windows_per_document` windows of each, in their order."""
        packed = self._packed([self.texts[document_id] for document_id in column], "document")
        if self.passages is None:
            return packed
        best: dict[str, dict[int, None]] = {document_id: {} for document_id in column}
        for query_id, documents in zip(query_ids, listed, strict=True):
            for document_id in documents:
                window = self.best_windows.get(query_id, {}).get(document_id)
                if window is not None:
                    best[document_id][window] = None
        generator = np.random.default_rng([self.seed % 2**64, *draw])
        kept, first = [], 0
        for (document_id, windows), count in zip(best.items(), packed.source.bincount().tolist(), strict=True):
            if count <= self.windows_per_document:
                chosen = range(count)
            else:
                if windows and max(windows) >= count:
                    raise ValueError(
                        f"document {document_id!r} has {count} windows, the best one was to be window {max(windows)}"
                    )
                # Its queries' best windows, in the order of the batch, then all in an order at random.
                order = dict.fromkeys([*windows, *generator.permutation(count).tolist()])
                chosen = sorted(itertools.islice(order, self.windows_per_document))
            kept += [first + window for window in chosen]
            first += count
        return take(packed, torch.tensor(kept))

    def _packed(self, texts: list[str], role: str) -> Packed:
        if role == "query" or self.passages is None:
            return self.pack(texts, role=role)
        return self.pack(texts, role=role, passages=self.passages)

    def listed(self, example: Example) -> list[str]:
        """The documents listed for an example: its own, then its hard negatives."""
        query_id, document_id = example
        listed = relevant(self.dataset, query_id) if document_id is None else [document_id]
        if self.num_negatives:
            # A scored document may be a hard negative of its query too.
            negatives = self.dataset.negatives.get(query_id, ())[: self.num_negatives]
            listed += [i for i in negatives if i != document_id]
        return listed

    def _plan(self, number: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(self.seed + number)
        order_P = torch.randperm(len(self.examples), generator=generator)
        if self.length_window:
            window = -(-self.length_window * len(order_P) // len(self))
            parts = [part[self._tokens_P[part].argsort(stable=True)] for part in order_P.split(window)]
            order_P = torch.cat(parts)
        sizes_P = self._sizes_P[order_P]
        bounds_N = self._bounds_N
        # An example belongs to the batch in whose share its last unit (example or token) falls.
        place_P = torch.searchsorted(bounds_N, sizes_P.cumsum(0))
        if self._shared:
            rows = order_P.tolist()
            waiting = [i for i, row in enumerate(rows) if row in self._shared]
            # Spread evenly, so that there is room for those that have to wait.
            natural = [i * len(self) // len(rows) for i in waiting]
            moved, loads_N = self._place_apart([rows[i] for i in waiting], natural)
            # The others fill what is left of every share, in their order.
            free_P = torch.ones(len(rows), dtype=torch.bool)
            free_P[waiting] = False
            room_N = (bounds_N.diff(prepend=bounds_N.new_zeros(1)) - torch.tensor(loads_N)).clamp(min=0)
            place_P[free_P] = torch.searchsorted(room_N.cumsum(0), sizes_P[free_P].cumsum(0))
            place_P[waiting] = torch.tensor(moved)
        counts = place_P.bincount(minlength=len(self)).tolist()
        plan = [part.tolist() for part in order_P[place_P.argsort(stable=True)].split(counts)]
        # A text longer than a batch, or many that had to wait, can leave a share empty; a single example always fits.
        for batch in plan:
            if not batch:
                batch.append(max(plan, key=len).pop())
        if self.length_window:
            plan = [plan[i] for i in torch.randperm(len(plan), generator=generator).tolist()]
        return plan

    def _place_apart(self, rows: list[int], natural: list[int]) -> tuple[list[int], list[int]]:
        """The batch of each of the examples `rows`, which share texts, and what every batch then holds.

        Each goes to its natural batch or the next one after it, from the first again behind the last, that is not full
        and has none of its texts; when all of those are full, to the one of them that holds least.
        """
        num_batches, full = len(self), self.batch_size or self.batch_tokens
        held: list[set[int]] = [set() for _ in range(num_batches)]
        loads, placed = [0] * num_batches, []
        following = list(range(num_batches))  # where to look from a batch on: itself, or behind it when it is full

        def find(batch: int) -> int:
            while following[batch] != batch:
                following[batch] = following[following[batch]]
                batch = following[batch]
            return batch

        for row, batch, size in zip(rows, natural, self._sizes_P[rows].tolist(), strict=True):
            texts, first = self._shared[row], find(batch)
            batch = first
            while loads[batch] >= full or not held[batch].isdisjoint(texts):
                batch = find((batch + 1) % num_batches)
                if batch == first:
                    batch = min((k for k in range(num_batches) if held[k].isdisjoint(texts)), key=loads.__getitem__)
                    break
            held[batch].update(texts)
            loads[batch] += size
            placed.append(batch)
            # The last one that is not full stays the end of the chain.
            if loads[batch] >= full and find((batch + 1) % num_batches) != batch:
                following[batch] = (batch + 1) % num_batches
        return placed, loads

    @functools.cached_property
    def _num_batches(self) -> int:
        size, total = self.batch_size or self.batch_tokens, int(self._sizes_P.sum())
        least = -(-total // size)
        if self._shared:
            # At most `most` others keep an example out of a batch: with one batch more there is always one for it.
            count = Counter(text for texts in self._shared.values() for text in texts)
            most = max(sum(count[text] - 1 for text in texts) for texts in self._shared.values())
            apart = min(most + 1, len(self.examples))
            if apart > least:
                warnings.warn(
                    f"no_duplicates: texts are in so many rows that an epoch is {apart:,} batches of about "
                    f"{total // apart:,}, not {least:,} of {size:,}",
                    stacklevel=2,
                )
                return apart
        return min(least, len(self.examples))

    @functools.cached_property
    def _bounds_N(self) -> Tensor:
        """Where the share of each batch ends, in examples or tokens of the epoch."""
        ends_N, total = torch.arange(1, len(self) + 1), int(self._sizes_P.sum())
        if self.batch_size and len(self) == -(-total // self.batch_size):
            return ends_N * self.batch_size
        return ends_N * total // len(self)

    @functools.cached_property
    def _sizes_P(self) -> Tensor:
        """What an example takes of a batch: 1, or its tokens."""
        return self._tokens_P if self.batch_tokens else torch.ones(len(self.examples), dtype=torch.int64)

    @functools.cached_property
    def _tokens_P(self) -> Tensor:
        """Tokens of each example: its query and all documents listed for it."""
        queries = self._count("query", {query_id: self.dataset.queries[query_id] for query_id, _ in self.examples})
        listed = [self.listed(example) for example in self.examples]
        used = dict.fromkeys(document_id for documents in listed for document_id in documents)
        documents = self._count("document", {document_id: self.texts[document_id] for document_id in used})
        return torch.tensor(
            [
                queries[query_id] + sum(documents[i] for i in ids)
                for (query_id, _), ids in zip(self.examples, listed, strict=True)
            ]
        )

    def _count(self, role: str, texts: dict[str, str]) -> dict[str, int]:
        missing = [text for text in dict.fromkeys(texts.values()) if (role, text) not in self.lengths]
        for first in range(0, len(missing), COUNTED_TEXTS):
            part = missing[first : first + COUNTED_TEXTS]
            packed = self._packed(part, role)
            if role == "query" or self.passages is None:
                lengths = packed.lengths().tolist()
            else:
                windows = packed.lengths().split(packed.source.bincount().tolist())
                lengths = [
                    int(of_one.sort(descending=True)[0][: self.windows_per_document].sum()) for of_one in windows
                ]
            self.lengths.update(zip(((role, text) for text in part), lengths, strict=True))
        return {id_: self.lengths[role, text] for id_, text in texts.items()}

    @functools.cached_property
    def _shared(self) -> dict[int, tuple[int, ...]]:
        """{example: those of its texts that another example has too, as numbers}; empty unless `no_duplicates`."""
        if not self.no_duplicates:
            return {}
        number: dict[str, int] = {}
        texts_P = []
        for example in self.examples:
            texts = [self.dataset.queries[example[0]], *(self.texts[i] for i in self.listed(example))]
            texts_P.append({number.setdefault(text, len(number)) for text in texts})
        count = Counter(text for texts in texts_P for text in texts)
        shared = (tuple(text for text in texts if count[text] > 1) for texts in texts_P)
        return {row: texts for row, texts in enumerate(shared) if texts}


def list_examples(dataset: RetrievalDataset, kind: ExampleKind = "pairs") -> list[Example]:
    """The examples of a dataset, in its order; `kind` as in `Batches`."""
    if kind not in EXAMPLES:
        raise ValueError(f"examples is {kind!r}, expected one of {', '.join(EXAMPLES)}")
    if kind == "scored":
        examples = [(q, d) for q, scores in dataset.scores.items() for d in scores]
        if not examples:
            raise ValueError("the training set has no scored pair of a query and a document")
        return examples
    pairs = [(q, d) for q in dataset.qrels for d in relevant(dataset, q)]
    if not pairs:
        raise ValueError("the training set has no pair of a query and a document relevant to it")
    return [(q, None) for q in dict.fromkeys(q for q, _ in pairs)] if kind == "queries" else pairs


def relevant(dataset: RetrievalDataset, query_id: str) -> list[str]:
    """The documents with a grade above 0 for a query, in the order of its qrels."""
    return [document_id for document_id, grade in dataset.qrels[query_id].items() if grade > 0]


def _filled(row: list, width: int, value: float) -> list:
    return row + [value] * (width - len(row))
