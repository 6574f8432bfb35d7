"""BM25 in NumPy, over the encoder's own tokens or words, alone or with runs of neighbours: no stemming, no stop words.

    run = bm25_run(dataset, tokenize=embedder.tokenize, ngram=2)
    scores, rows = Bm25Index(embedder.tokenize(documents)).search(embedder.tokenize(questions), depth=100)

Shapes: N documents, V terms, P postings (a term in a document), Q queries, K = min(depth, N) results.
"""

import functools
import math
import re
import unicodedata
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from ..data.dataset import RetrievalDataset
from ..progress import progress_bar
from .run import Run

K1, B = 1.5, 0.75  # defaults, here and in commands
Token = int | str
Term = Token | tuple[Token, ...]
Tokenize = Callable[[list[str]], Sequence[Sequence[Token]]]


class Bm25Index:
    """An inverted index over tokenized documents, which may come from a generator.

    score(query, document) = sum over the query's terms t, repetitions included, of
    idf(t) * tf / (tf + k1 * (1 - b + b * length / mean length)), where idf(t) = ln(1 + (N - n + 0.5) / (n + 0.5)).

    Terms: tokens and, with `ngram` above 1, each run of 2 to `ngram` neighbouring tokens. tf: occurrences of t in the
    document; n: how many of the N documents contain t; length: the document's terms, so that T tokens have length
    2 T - 1 with pairs; k1: how much repetition counts (0: only presence counts); b: how much length is penalized, 0 to
    1. There is no factor k1 + 1, and scores are never negative. To bound memory, runs are made for one document at a
    time, and `slice_terms` terms are sorted at a time.

    Source: Robertson et al., "Okapi at TREC-3"; Kamphuis et al., "Which BM25 Do You Mean?", 2020: Lucene (accurate)."""

    def __init__(
        self,
        documents: Iterable[Sequence[Token]],
        *,
        ngram: int = 1,
        k1: float = K1,
        b: float = B,
        slice_terms: int = 1 << 20,
    ):
        if not isinstance(ngram, int) or ngram < 1:
            raise ValueError(f"BM25: ngram is {ngram}, expected a whole number of at least 1")
        if not (0 <= k1 < math.inf and 0 <= b <= 1):
            raise ValueError(f"BM25: k1 is {k1} and b is {b}, expected k1 of at least 0 and b of 0 to 1")
        numbers: defaultdict[Term, int] = defaultdict()
        numbers.default_factory = numbers.__len__
        lengths, terms, parts, first_row = array("q"), array("q"), [], 0
        for row, document in enumerate(documents):
            found = with_runs(document, ngram)
            terms.extend(map(numbers.__getitem__, found))
            lengths.append(len(found))
            if len(terms) >= slice_terms:
                parts.append(_postings(terms, lengths, first_row))
                terms, first_row = array("q"), row + 1
        if not lengths:
            raise ValueError("BM25: no documents")
        parts.append(_postings(terms, lengths, first_row))
        num_documents, lengths_N = len(lengths), np.array(lengths)
        term_P, rows_P, counts_P = (np.concatenate(columns) for columns in zip(*parts, strict=True))
        order_P = np.argsort(term_P, kind="stable")  # rows are ascending already
        rows_P, counts_P = rows_P[order_P], counts_P[order_P]
        frequency_V = np.bincount(term_P, minlength=len(numbers))
        idf_V = np.log1p((num_documents - frequency_V + 0.5) / (frequency_V + 0.5))
        mean_length = max(lengths_N.sum(), 1) / num_documents
        norm_N = k1 * (1 - b + b * lengths_N / mean_length)
        weights_P = np.repeat(idf_V, frequency_V) * counts_P / (counts_P + norm_N[rows_P])
        self.num_documents, self.ngram, self.terms = num_documents, ngram, dict(numbers)
        self.starts_V = np.append(0, np.cumsum(frequency_V))  # int64 [V + 1], where each term's postings begin
        self.rows_P = rows_P  # int32, the document of each posting, ascending within a term
        self.weights_P = weights_P.astype(np.float32)  # what the term adds to the document's score

    def search(self, queries: Sequence[Sequence[Token]], depth: int) -> tuple[np.ndarray, np.ndarray]:
        """Scores [Q, K] float32 and rows [Q, K] int64 of the documents that share a term with tokenized queries, padded
        with -inf and -1. Scores are rounded to float32 before ranking, so equal documents tie; ties go by row."""
        depth = min(depth, self.num_documents)
        scores_QK = np.full((len(queries), depth), -np.inf, dtype=np.float32)
        rows_QK = np.full((len(queries), depth), -1, dtype=np.int64)
        scores_N = np.empty(self.num_documents)
        with progress_bar(len(queries), "searching", unit="query") as bar:
            for i, query in enumerate(queries):
                self._score(query, scores_N)
                best_K, best_rows_K = _top(scores_N, depth)
                scores_QK[i, : len(best_K)], rows_QK[i, : len(best_K)] = best_K, best_rows_K
                bar.update()
        return scores_QK, rows_QK

    def score(self, query: Sequence[Token]) -> np.ndarray:
        """The score of every document for a tokenized query, [N] float32; 0 for those that share no term with it."""
        scores_N = np.empty(self.num_documents)
        self._score(query, scores_N)
        return scores_N.astype(np.float32)

    def _score(self, query: Sequence[Token], scores_N: np.ndarray) -> None:
        found = [self.terms[term] for term in with_runs(query, self.ngram) if term in self.terms]
        numbers = np.array(found, dtype=np.int64)
        scores_N.fill(0)
        # Added in order of term numbers, so that the order of words does not change the score in any bit.
        for term, count in zip(*np.unique(numbers, return_counts=True), strict=True):
            postings = slice(self.starts_V[term], self.starts_V[term + 1])
            scores_N[self.rows_P[postings]] += int(count) * self.weights_P[postings]


def with_runs(tokens: Sequence[Token], ngram: int) -> Sequence[Term]:
    """The tokens, then, as tuples, each two neighbours, and so on up to `ngram` neighbours."""
    if ngram == 1:
        return tokens
    runs = (run for size in range(2, ngram + 1) for run in zip(*(tokens[i:] for i in range(size)), strict=False))
    return [*tokens, *runs]


def _postings(terms: array, lengths: array, first_row: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Term, row and count of each posting, given the term numbers of all documents from `first_row` on."""
    lengths_N = np.array(lengths[first_row:])
    # A term and a document as one integer: a single sort collects the occurrences of each pair.
    width = max(len(lengths_N), 1)
    key_T = np.array(terms) * width + np.repeat(np.arange(len(lengths_N)), lengths_N)
    key_P, counts_P = np.unique(key_T, return_counts=True)
    term_P, row_P = np.divmod(key_P, width)
    return term_P.astype(np.int32), (first_row + row_P).astype(np.int32), counts_P.astype(np.int32)


def _top(scores_N: np.ndarray, depth: int) -> tuple[np.ndarray, np.ndarray]:
    """The `depth` largest scores above 0, rounded to float32, and their rows; ties by ascending row."""
    rows_C = np.flatnonzero(scores_N)
    # The depth-th largest of the maxima of blocks of documents bounds the depth-th largest score from below, at a
    # tenth of the cost of partitioning all scores.
    if (block := len(scores_N) // (8 * depth)) > 1:
        num_blocks = len(scores_N) // block
        maxima = scores_N[: num_blocks * block].reshape(num_blocks, block).max(axis=1)
        bound = np.partition(maxima, num_blocks - depth)[num_blocks - depth]
        # Slightly lower, for scores that are below it in float64 but equal in float32.
        rows_C = np.flatnonzero(scores_N >= bound * (1 - 1e-6)) if bound > 0 else rows_C
    scores_C = scores_N[rows_C].astype(np.float32)
    order_K = np.argsort(-scores_C, kind="stable")[:depth]
    return scores_C[order_K], rows_C[order_K]


@functools.cache
def _word_pattern() -> re.Pattern[str]:
    # \w excludes combining marks such as Hindi vowel signs, which would split words.
    marks = "".join(c for c in map(chr, range(0x20000)) if unicodedata.category(c).startswith("M"))
    return re.compile(rf"[^\W_](?:[^\W_]|[{marks}])*")


def split_words(texts: Sequence[str]) -> list[list[str]]:
    """The lower-cased words of each text, in NFKC: runs of Unicode letters (with their marks) and digits.
    In scripts written without spaces a run is one word: use the encoder's tokens there."""
    if isinstance(texts, str):
        raise ValueError("texts is a str, expected a list of str")
    return [_word_pattern().findall(unicodedata.normalize("NFKC", text).lower()) for text in texts]


def bm25_run(
    dataset: RetrievalDataset,
    *,
    tokenize: Tokenize = split_words,
    depth: int = 100,
    exclude_identical_ids: bool = True,
    **options: Any,
) -> Run:
    """Ranks a dataset's corpus, titles included, for each of its queries; ties by ascending document id.
    `tokenize` maps texts to lists of tokens; `options` are `Bm25Index`'s: ngram (2: tokens and pairs), k1, b.
    Documents that share no term with a query are not found. Raises `ValueError` for values out of range."""
    if depth < 1:
        raise ValueError(f"depth is {depth}, expected at least 1")
    document_ids, texts = zip(*sorted(dataset.texts.items()), strict=True)
    index = Bm25Index(_tokens(tokenize, texts), **options)
    queries = list(_tokens(tokenize, list(dataset.queries.values())))
    scores_QK, rows_QK = index.search(queries, depth + exclude_identical_ids)
    run = Run(list(dataset.queries), list(document_ids), rows_QK, scores_QK)
    return run.without_identical_ids(dataset.qrels, depth=depth) if exclude_identical_ids else run


def _tokens(tokenize: Tokenize, texts: Sequence[str], slice_texts: int = 4096) -> Iterator[Sequence[Token]]:
    with progress_bar(len(texts), "tokenizing", unit="text") as bar:
        for start in range(0, len(texts), slice_texts):
            part = list(texts[start : start + slice_texts])
            tokens = tokenize(part)
            if len(tokens) != len(part) or any(isinstance(text, str) for text in tokens):
                raise ValueError(f"BM25: tokenize did not return a list of tokens for each of {len(part)} texts")
            yield from tokens
            bar.update(len(part))
