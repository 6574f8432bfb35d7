"""BM25 in NumPy alone: the word-matching baseline that every dense run stands beside.

An inverted index over tokens of any kind: the encoder's own (`embedder.tokenize`) or words. No stemming, no stop words:
a word that is in every document weighs next to nothing.

    index = Bm25Index.build(embedder.tokenize(documents))
    scores, rows = index.search(embedder.tokenize(questions), depth=100)
    run = bm25_run(dataset, tokenize=embedder.tokenize)       # all of it for a dataset

Shapes: N documents, V terms, P postings (a term in a document), Q queries, K = min(depth, N) results.
"""

import functools
import itertools
import json
import math
import re
import unicodedata
import zipfile
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral
from pathlib import Path

import numpy as np

from ..data.dataset import RetrievalDataset
from ..files import atomic_write
from ..progress import progress_bar
from .run import Run

FORMAT = "embedft-bm25-1"
Token = int | str
# Tokens sorted together while an index is built: bounds what building holds beside the postings.
SLICE_TOKENS = 1 << 20
# Texts tokenised together.
SLICE_TEXTS = 4096
# A term in more than this share of the documents is also kept as a row over all of them, at most twice the memory of
# its postings. 100,000 documents of 49 tokens, 17 a query: 1.1 ms a query, without such rows 1.9 ms (CPU time of one
# core of an AMD EPYC, 2026-11-21).
DENSE_SHARE = 0.25


@dataclass(frozen=True, eq=False)
class Bm25Index:
    """Which documents hold a term and what it adds to their score; made by `build` or `load`.

    score(query, document) = sum over the query's tokens t, a repeated one as often as it stands there, of
    idf(t) * tf / (tf + k1 * (1 - b + b * length / mean length)), where idf(t) = ln(1 + (N - n + 0.5) / (n + 0.5)).

    tf: how often t is in the document; n: how many of the N documents hold t; length: the document's tokens.
    This is Lucene's form: no score is negative, and the factor k1 + 1, which changes no order, is left out. Lucene
    itself rounds lengths to one byte; here they are exact.

    Args:
        terms: {token: its number}; all tokens are int or all are str.
        starts_V: [V + 1] int64; the postings of term v are at starts_V[v] to starts_V[v + 1].
        rows_P: [P] int32, the document of each posting, ascending within a term.
        weights_P: [P] float32, what the term adds to the document's score.
        document_ids: N distinct ids.
        k1: how soon more occurrences of a term stop to count; 0: only whether it is there.
        b: how much long documents are held back, 0 (not) to 1.
        tokenization: a name or fingerprint of what made the tokens, for whoever loads the index.

    Source: Robertson et al., "Okapi at TREC-3", 1994; Kamphuis et al., "Which BM25 Do You Mean?", ECIR 2020, "Lucene
    (accurate)".
    """

    terms: Mapping[Token, int]
    starts_V: np.ndarray
    rows_P: np.ndarray
    weights_P: np.ndarray
    document_ids: list[str]
    k1: float
    b: float
    tokenization: str = ""

    def __len__(self) -> int:
        return len(self.document_ids)

    @classmethod
    def build(
        cls,
        documents: Iterable[Sequence[Token]],
        *,
        document_ids: Sequence[str] | None = None,
        k1: float = 1.5,
        b: float = 0.75,
        tokenization: str = "",
    ) -> "Bm25Index":
        """Indexes documents given as their tokens; goes over them once, in slices, so a generator will do.

        Args:
            documents: the tokens of each document, all int or all str. A document without tokens is never found.
            document_ids: None: the row numbers.

        Raises:
            ValueError: no documents, ids that are doubled or of another number, a document that is a str, tokens of
                several kinds, k1 below 0, b outside 0 to 1.
        """
        if not (math.isfinite(k1) and k1 >= 0):
            raise ValueError(f"BM25's k1 is {k1}, expected a number of at least 0")
        if not 0 <= b <= 1:
            raise ValueError(f"BM25's b is {b}, expected 0 to 1")
        terms: defaultdict[Token, int] = defaultdict()
        terms.default_factory = terms.__len__
        lengths, slices = array("q"), []
        tokens, first_row = array("q"), 0
        for row, document in enumerate(documents):
            _refuse_text(document, f"document {row}")
            tokens.extend(map(terms.__getitem__, document))
            lengths.append(len(document))
            if len(tokens) >= SLICE_TOKENS:
                slices.append(_count(tokens, lengths, first_row))
                tokens, first_row = array("q"), row + 1
        slices.append(_count(tokens, lengths, first_row))
        num_documents = len(lengths)
        ids = [str(row) for row in range(num_documents)] if document_ids is None else list(document_ids)
        _check_documents(ids, num_documents)
        kinds = {int if isinstance(term, Integral) else type(term) for term in terms}
        if len(kinds) > 1 or kinds - {int, str}:
            found = ", ".join(sorted(kind.__name__ for kind in kinds))
            raise ValueError(f"BM25: tokens are of type {found}, expected all int or all str")

        frequency_V = np.zeros(len(terms), dtype=np.int64)
        for part in slices:
            frequency_V[part.terms_U] += part.frequency_U
        starts_V = np.concatenate([[0], np.cumsum(frequency_V)])
        idf_V = np.log1p((num_documents - frequency_V + 0.5) / (frequency_V + 0.5))
        lengths_N = np.array(lengths)
        mean_length = max(lengths_N.sum(), 1) / num_documents
        norm_N = k1 * (1 - b + b * lengths_N / mean_length)
        rows_P = np.empty(starts_V[-1], dtype=np.int32)
        weights_P = np.empty(starts_V[-1], dtype=np.float32)
        next_V = starts_V[:-1].copy()
        slices.reverse()
        while slices:  # each is freed when its postings are in place
            part = slices.pop()
            start_U = np.cumsum(part.frequency_U) - part.frequency_U
            place_P = np.repeat(next_V[part.terms_U] - start_U, part.frequency_U) + np.arange(len(part.rows_P))
            idf_P = np.repeat(idf_V[part.terms_U], part.frequency_U)
            rows_P[place_P] = part.rows_P
            weights_P[place_P] = idf_P * part.counts_P / (part.counts_P + norm_N[part.rows_P])
            next_V[part.terms_U] += part.frequency_U
        return cls(dict(terms), starts_V, rows_P, weights_P, ids, float(k1), float(b), tokenization)

    def search(self, queries: Sequence[Sequence[Token]], depth: int) -> tuple[np.ndarray, np.ndarray]:
        """The `depth` documents of largest score for each query, given as its tokens; terms not indexed count nothing.

        Scores are sums in float64 of float32 weights, rounded to float32, which is what ranks: so equal documents have
        equal scores. The order is (score descending, row ascending), at the cut-off too.

        Returns:
            scores [Q, K] float32 and rows [Q, K] int64; behind the documents that share a term with the query -inf
            and -1.

        Raises:
            ValueError: depth below 1, or a query that is a str.
        """
        _check_depth(depth)
        depth = min(depth, len(self))
        scores_QK = np.full((len(queries), depth), -np.inf, dtype=np.float32)
        rows_QK = np.full((len(queries), depth), -1, dtype=np.int64)
        scores_N = np.empty(len(self))
        with progress_bar(len(queries), "searching", unit="query") as bar:
            for i, query in enumerate(queries):
                _refuse_text(query, f"query {i}")
                numbers = [self.terms[token] for token in query if token in self.terms]
                scores_N.fill(0)
                # By term number, whatever the order of the query's words: the same words give the same bits.
                terms_U, counts_U = np.unique(np.array(numbers, dtype=np.int64), return_counts=True)
                for term, count in zip(terms_U.tolist(), counts_U.tolist(), strict=True):
                    if term in self._dense:
                        scores_N += count * self._dense[term]
                    else:
                        postings = slice(self.starts_V[term], self.starts_V[term + 1])
                        scores_N[self.rows_P[postings]] += count * self.weights_P[postings]
                best_K, best_rows_K = _first(scores_N, depth)
                scores_QK[i, : len(best_K)], rows_QK[i, : len(best_K)] = best_K, best_rows_K
                bar.update()
        return scores_QK, rows_QK

    @cached_property
    def _dense(self) -> dict[int, np.ndarray]:
        """{term: its weight in every document, [N] float32} of the terms that are in most documents."""
        rows = {}
        for term in np.flatnonzero(np.diff(self.starts_V) > DENSE_SHARE * len(self)):
            postings = slice(self.starts_V[term], self.starts_V[term + 1])
            rows[int(term)] = np.zeros(len(self), dtype=np.float32)
            rows[int(term)][self.rows_P[postings]] = self.weights_P[postings]
        return rows

    def save(self, path: str | Path) -> None:
        """Writes the index as one .npz file under exactly this name, atomically."""
        header = {
            "format": FORMAT,
            "k1": self.k1,
            "b": self.b,
            "tokenization": self.tokenization,
            "document_ids": self.document_ids,
            "terms": [term if isinstance(term, str) else int(term) for term in self.terms],
        }
        header_bytes = np.frombuffer(json.dumps(header).encode(), dtype=np.uint8)
        with atomic_write(path, "wb") as file:
            np.savez(file, header=header_bytes, starts=self.starts_V, rows=self.rows_P, weights=self.weights_P)

    @classmethod
    def load(cls, path: str | Path) -> "Bm25Index":
        """Reads what `save` wrote; the file's checksums are verified.

        Raises:
            ValueError: the file is something else, or damaged.
        """
        path = Path(path)
        with open(path, "rb") as file:  # a file that is not there is not a damaged one
            try:
                with zipfile.ZipFile(file) as archive:
                    if any(member.compress_type for member in archive.infolist()):
                        raise ValueError("it is compressed")
                    if broken := archive.testzip():
                        raise ValueError(f"the checksum of {broken} is wrong")
                file.seek(0)
                with np.load(file, allow_pickle=False) as arrays:
                    header = json.loads(arrays["header"].tobytes())
                    starts_V, rows_P, weights_P = (arrays[name] for name in ("starts", "rows", "weights"))
                if not isinstance(header, dict) or header.pop("format", None) != FORMAT:
                    raise ValueError("another format")
                terms = {term: number for number, term in enumerate(header.pop("terms"))}
                return cls(terms, starts_V, rows_P, weights_P, **header)
            # What zipfile, NumPy and the header raise for bytes that are not theirs.
            except (zipfile.BadZipFile, ValueError, LookupError, TypeError, EOFError, OSError, RuntimeError) as error:
                raise ValueError(f"{path}: not a BM25 index, or damaged ({error})") from None


@dataclass(frozen=True, eq=False)
class _Counts:
    """The postings of some documents by term: U terms, ascending, and how many documents hold each of them."""

    terms_U: np.ndarray
    frequency_U: np.ndarray
    rows_P: np.ndarray
    counts_P: np.ndarray


def _count(tokens: array, lengths: array, first_row: int) -> _Counts:
    """`tokens`: the term numbers of the documents from `first_row` on, one after the other."""
    lengths_N = np.array(lengths[first_row:])
    # A term and a document as one integer, so that one sort brings the occurrences of a pair together.
    width = max(len(lengths_N), 1)
    key_T = np.array(tokens) * width + np.repeat(np.arange(len(lengths_N)), lengths_N)
    key_P, counts_P = np.unique(key_T, return_counts=True)
    terms_U, frequency_U = np.unique(key_P // width, return_counts=True)
    return _Counts(terms_U, frequency_U, (first_row + key_P % width).astype(np.int32), counts_P.astype(np.int32))


def _first(scores_N: np.ndarray, depth: int) -> tuple[np.ndarray, np.ndarray]:
    """The `depth` largest scores above 0, rounded to float32, and their rows; equal ones by ascending row.

    The depth-th largest of the maxima of at least `depth` blocks of documents is a lower bound of the depth-th largest
    score: what is below it need not be sorted, and finding it costs a tenth of a partition of all scores.
    """
    rows_C = np.flatnonzero(scores_N)
    block = len(scores_N) // (8 * depth)
    if block > 1:
        num_blocks = len(scores_N) // block
        maxima = scores_N[: num_blocks * block].reshape(num_blocks, block).max(axis=1)
        bound = np.partition(maxima, num_blocks - depth)[num_blocks - depth]
        # A little lower, for scores that are below it in float64 and equal in float32.
        rows_C = np.flatnonzero(scores_N >= bound * (1 - 1e-6)) if bound > 0 else rows_C
    scores_C = scores_N[rows_C].astype(np.float32)
    order_K = np.argsort(-scores_C, kind="stable")[:depth]
    return scores_C[order_K], rows_C[order_K]


def _check_depth(depth: int) -> None:
    if depth < 1:
        raise ValueError(f"search depth must be at least 1, not {depth}")


def _refuse_text(tokens: Sequence[Token], what: str) -> None:
    if isinstance(tokens, str):
        raise ValueError(f"BM25: {what} is a str, expected its tokens")


def _check_documents(ids: list[str], num_documents: int) -> None:
    if num_documents == 0:
        raise ValueError("BM25: no documents to index")
    if len(ids) != num_documents:
        raise ValueError(f"BM25: {len(ids)} document ids for {num_documents} documents")
    if len(set(ids)) < len(ids):
        twice = next(i for i, j in itertools.pairwise(sorted(ids)) if i == j)
        raise ValueError(f"BM25: document id {twice!r} appears twice")


@functools.cache
def _word_pattern() -> re.Pattern[str]:
    # \w leaves out the marks that stand on letters, such as the vowel signs of Hindi: words would fall apart at them.
    marks = "".join(c for c in map(chr, range(0x20000)) if unicodedata.category(c).startswith("M"))
    return re.compile(rf"[^\W_](?:[^\W_]|[{marks}])*")


def words(texts: Sequence[str]) -> list[list[str]]:
    """The lower-cased words of each text: runs of Unicode letters, with their marks, and digits.

    Texts are brought to Unicode's form NFKC first, so that a ligature of a PDF or a full-width digit is what it stands
    for. A script that is written without spaces gives one word a run: use the encoder's tokens there.

    Raises:
        ValueError: `texts` is a str.
    """
    if isinstance(texts, str):
        raise ValueError("texts is a str, expected a list of str")
    pattern = _word_pattern()
    return [pattern.findall(unicodedata.normalize("NFKC", text).lower()) for text in texts]


def bm25_run(
    dataset: RetrievalDataset,
    *,
    tokenize: Callable[[list[str]], Sequence[Sequence[Token]]] | None = None,
    depth: int = 100,
    k1: float = 1.5,
    b: float = 0.75,
) -> Run:
    """Every query of a dataset against its corpus, titles included; equal scores by ascending document id.

    Args:
        tokenize: texts to the tokens of each, such as `embedder.tokenize`; None: `words`.
        depth: documents retrieved a query at most; those that share no term with it are not.
        k1, b: see `Bm25Index`.

    Raises:
        ValueError: on a depth, k1 or b out of range, or when `tokenize` gives another number of texts.
    """
    _check_depth(depth)
    tokenize = tokenize or words
    document_ids, texts = zip(*sorted(zip(dataset.corpus, dataset.document_texts(), strict=True)), strict=True)
    with progress_bar(len(texts), "indexing", unit="text") as bar:
        index = Bm25Index.build(_tokens(tokenize, texts, bar.update), document_ids=document_ids, k1=k1, b=b)
    queries = list(_tokens(tokenize, list(dataset.queries.values())))
    scores_QK, rows_QK = index.search(queries, depth)
    return Run(list(dataset.queries), index.document_ids, rows_QK, scores_QK)


def _tokens(
    tokenize: Callable[[list[str]], Sequence[Sequence[Token]]],
    texts: Sequence[str],
    update: Callable[[int], object] = lambda number: None,
) -> Iterator[Sequence[Token]]:
    for start in range(0, len(texts), SLICE_TEXTS):
        part = list(texts[start : start + SLICE_TEXTS])
        tokens = tokenize(part)
        if len(tokens) != len(part):
            raise ValueError(f"BM25: tokenize gave {len(tokens)} lists of tokens for {len(part)} texts")
        yield from tokens
        update(len(part))
