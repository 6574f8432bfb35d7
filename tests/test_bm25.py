"""bm25.py: by hand, against a double loop and bm25s; ties, empty things, what is saved, and what is refused."""

import math

import numpy as np
import pytest
from naming import naming

from embedft import RetrievalDataset, bm25_run, evaluate_run
from embedft.retrieval import bm25
from embedft.retrieval.bm25 import Bm25Index, split_words, with_runs

INF = np.inf


def scores_of(documents, query, **options):
    """{row: score} of one query, everything that is retrieved."""
    scores_QK, rows_QK = Bm25Index(documents, **options).search([query], 1000)
    return {row: score for row, score in zip(rows_QK[0].tolist(), scores_QK[0].tolist(), strict=True) if row >= 0}


def double_loop(documents, query, *, k1=1.5, b=0.75):
    """The formula as it is written, in Python floats: a score for every document."""
    mean_length = sum(map(len, documents)) / len(documents)
    scores = []
    for document in documents:
        score = 0.0
        for token in query:
            n = sum(token in other for other in documents)
            tf = list(document).count(token)
            if tf:
                idf = math.log(1 + (len(documents) - n + 0.5) / (n + 0.5))
                score += idf * tf / (tf + k1 * (1 - b + b * len(document) / mean_length))
        scores.append(score)
    return scores


def expected(scores, depth):
    """Rows and scores by (score in float32 descending, row ascending), those above 0."""
    rounded = np.array(scores, dtype=np.float32)
    rows = sorted((row for row in range(len(scores)) if scores[row] > 0), key=lambda row: (-rounded[row], row))[:depth]
    return rows, [scores[row] for row in rows]


def random_documents(rng, number, *, vocabulary=60, longest=40):
    return [np.minimum(rng.zipf(1.4, rng.integers(0, longest)), vocabulary).tolist() for _ in range(number)]


# By hand.


def test_three_documents_by_hand():
    documents = [["cat", "sat"], ["cat", "cat", "mat", "hat"], ["dog", "ran", "far"]]
    # N = 3, mean length (2 + 4 + 3) / 3 = 3. "cat" is in 2: idf = ln(1 + 1.5 / 2.5) = ln 1.6 = 0.4700036.
    # Row 0: tf 1, 1.5 (0.25 + 0.75 * 2/3) = 1.125: 1 / 2.125. Row 1: tf 2, 1.5 (0.25 + 0.75 * 4/3) = 1.875: 2 / 3.875.
    found = scores_of(documents, ["cat"])
    assert list(found) == [1, 0]
    assert found[0] == pytest.approx(0.4700036 / 2.125, rel=1e-6)
    assert found[1] == pytest.approx(0.4700036 * 2 / 3.875, rel=1e-6)
    # "mat" is in 1: idf = ln(1 + 2.5 / 1.5) = ln(8/3) = 0.9808293; tf 1, so 1 / 2.875 of it, and "cat" twice as often.
    found = scores_of(documents, ["cat", "mat", "cat"])
    assert found[1] == pytest.approx(2 * 0.4700036 * 2 / 3.875 + 0.9808293 / 2.875, rel=1e-6)
    assert found[0] == pytest.approx(2 * 0.4700036 / 2.125, rel=1e-6)


def test_k1_and_b_by_hand():
    documents = [["a", "a", "a"], ["a"], ["b", "b"]]
    idf = math.log(1 + 1.5 / 2.5)  # of "a": in 2 of 3
    # k1 = 0: tf / tf = 1, however often and however long.
    assert scores_of(documents, ["a"], k1=0) == pytest.approx({0: idf, 1: idf}, rel=1e-6)
    # b = 0: no length. 3 / (3 + 1.5) and 1 / (1 + 1.5).
    assert scores_of(documents, ["a"], b=0) == pytest.approx({0: idf * 3 / 4.5, 1: idf * 1 / 2.5}, rel=1e-6)
    # b = 1: the whole length, mean 2. 3 / (3 + 1.5 * 3/2) = 3 / 5.25 and 1 / (1 + 1.5 * 1/2) = 1 / 1.75: a tie at 4/7.
    assert scores_of(documents, ["a"], b=1) == pytest.approx({0: idf * 4 / 7, 1: idf * 4 / 7}, rel=1e-6)
    # k1 = 2: 3 / (3 + 2 (0.25 + 0.75 * 1.5)) = 3 / 5.75.
    assert scores_of(documents, ["a"], k1=2)[0] == pytest.approx(idf * 3 / 5.75, rel=1e-6)


def test_pairs_by_hand():
    documents = [["red", "car"], ["car", "red", "old", "car"]]
    # Lengths with pairs 2 + 1 and 4 + 3, mean 5. "red" and "car" are in both: idf = ln(1 + 0.5 / 2.5) = ln 1.2; the
    # pair is in the first alone: ln(1 + 1.5 / 1.5) = ln 2.
    found = scores_of(documents, ["red", "car"], ngram=2)
    # Row 0: 1.5 (0.25 + 0.75 * 3/5) = 1.05, each once. Row 1: 1.5 (0.25 + 0.75 * 7/5) = 1.95, "car" twice.
    assert found[0] == pytest.approx((2 * 0.1823216 + 0.6931472) / 2.05, rel=1e-6)
    assert found[1] == pytest.approx(0.1823216 * (1 / 2.95 + 2 / 3.95), rel=1e-6)
    # In the other order, the pair is in the second alone.
    found = scores_of(documents, ["car", "red"], ngram=2)
    assert found[1] == pytest.approx(0.1823216 * (1 / 2.95 + 2 / 3.95) + 0.6931472 / 2.95, rel=1e-6)


def test_runs_by_hand():
    assert with_runs("abcd", 1) == "abcd"
    assert with_runs("abcd", 2) == ["a", "b", "c", "d", ("a", "b"), ("b", "c"), ("c", "d")]
    assert with_runs("abc", 9) == ["a", "b", "c", ("a", "b"), ("b", "c"), ("a", "b", "c")]
    assert with_runs([7], 2) == [7]
    assert with_runs([], 2) == []


def test_a_token_that_looks_like_a_pair_is_none():
    assert scores_of([["a", "b"]], [str(("a", "b"))], ngram=2) == {}


def test_one_document_and_a_term_in_all_of_them():
    # idf = ln(1 + 0.5 / 1.5): small and above 0, so the document is found.
    assert scores_of([["a", "b"]], ["b"]) == pytest.approx({0: math.log(4 / 3) / 2.5}, rel=1e-6)


def test_places_without_a_document():
    index = Bm25Index([["a"], ["b"], [], ["a", "c"]])
    scores_QK, rows_QK = index.search([["a"], ["unknown"], [], ["b", "unknown"]], depth=9)
    assert scores_QK.dtype == np.float32
    assert rows_QK.dtype == np.int64
    assert rows_QK.tolist() == [[0, 3, -1, -1], [-1] * 4, [-1] * 4, [1, -1, -1, -1]]
    assert np.isneginf(scores_QK).tolist() == (rows_QK == -1).tolist()
    assert [array.shape for array in index.search([], 3)] == [(0, 3), (0, 3)]


def test_documents_without_any_token_are_never_found():
    index = Bm25Index([[], []])
    assert index.search([["a"]], 2)[1].tolist() == [[-1, -1]]


# Against others.


@pytest.mark.parametrize(("k1", "b"), [(1.5, 0.75), (0.0, 0.75), (1.2, 0.0), (0.9, 1.0)])
@pytest.mark.parametrize("depth", [1, 3, 500])
def test_equals_a_double_loop(k1, b, depth):
    rng = np.random.default_rng(depth)
    documents = random_documents(rng, 90)
    queries = random_documents(rng, 12, longest=8)
    scores_QK, rows_QK = Bm25Index(documents, k1=k1, b=b, slice_terms=97).search(queries, depth)
    assert scores_QK.shape == (12, min(depth, 90))
    for query, scores_K, rows_K in zip(queries, scores_QK, rows_QK, strict=True):
        all_scores = double_loop(documents, query, k1=k1, b=b)
        rows, scores = expected(all_scores, depth)
        kept = len(rows)
        np.testing.assert_allclose(scores_K[:kept], scores, rtol=1e-6)
        assert (rows_K[kept:] == -1).all()
        # Scores that differ by a rounding may change places with it; each row has its own score.
        np.testing.assert_allclose([all_scores[row] for row in rows_K[:kept]], scores_K[:kept], rtol=1e-6)
        assert len(set(rows_K[:kept].tolist())) == kept


@pytest.mark.parametrize("ngram", [2, 3])
def test_runs_equal_a_double_loop(ngram):
    rng = np.random.default_rng(ngram)
    documents, queries = random_documents(rng, 70, vocabulary=9), random_documents(rng, 12, vocabulary=9, longest=8)

    def runs(tokens):
        return [tuple(tokens[i : i + n]) for n in range(1, ngram + 1) for i in range(len(tokens) - n + 1)]

    index = Bm25Index((np.array(document) for document in documents), ngram=ngram, k1=1.2, b=1.0, slice_terms=97)
    assert any(len(term) == ngram for term in index.terms if isinstance(term, tuple))
    for query in queries:
        expected = double_loop(list(map(runs, documents)), runs(query), k1=1.2, b=1.0)
        np.testing.assert_allclose(index.score(query), expected, rtol=1e-6)
        scores_QK, rows_QK = index.search([query], 70)
        np.testing.assert_array_equal(scores_QK[0][rows_QK[0] >= 0], index.score(query)[rows_QK[0][rows_QK[0] >= 0]])


@pytest.mark.parametrize(("k1", "b"), [(1.5, 0.75), (0.9, 0.4)])
def test_equals_bm25s(k1, b):
    bm25s = pytest.importorskip("bm25s")
    rng = np.random.default_rng(0)
    documents = [[str(token) for token in document] for document in random_documents(rng, 400, vocabulary=300)]
    queries = [document[:9] for document in documents[:40] if document] + [["1", "1", "1", "2"]]
    reference = bm25s.BM25(method="lucene", k1=k1, b=b, dtype="float64")
    reference.index(documents, show_progress=False)
    index = Bm25Index(documents, k1=k1, b=b)
    assert all(token in index.terms for query in queries for token in query)  # bm25s does not take others
    scores_QK, rows_QK = index.search(queries, 400)
    for query, scores_K, rows_K in zip(queries, scores_QK, rows_QK, strict=True):
        ours_N = np.zeros(400)
        ours_N[rows_K[rows_K >= 0]] = scores_K[rows_K >= 0]
        np.testing.assert_allclose(ours_N, reference.get_scores(query), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("depth", [1, 7, 40])
def test_the_shortcut_over_blocks_equals_sorting_everything(depth):
    # Enough documents for blocks, few lengths and terms: many ties, at the cutoff too.
    rng = np.random.default_rng(1)
    share = np.array([8, 8, *[1] * 10]) / 26
    documents = [rng.choice(12, size=rng.choice([2, 3]), p=share).tolist() for _ in range(3000)]
    index = Bm25Index(documents)
    queries = [[0], [1, 2], [3, 3, 4, 5], [6, 7, 8, 9, 10, 11], [99]]
    scores_QK, rows_QK = index.search(queries, depth)
    all_scores_QN, all_rows_QN = index.search(queries, 3000)
    np.testing.assert_array_equal(scores_QK, all_scores_QN[:, :depth])
    np.testing.assert_array_equal(rows_QK, all_rows_QN[:, :depth])
    for scores_N, rows_N in zip(all_scores_QN[:-1], all_rows_QN[:-1], strict=True):
        found = int((rows_N >= 0).sum())
        order = np.lexsort((rows_N[:found], -scores_N[:found]))
        assert order.tolist() == list(range(found))


def test_scores_equal_in_float32_go_by_row_at_the_cut_off():
    # In float64 the later row is ahead by less than float32 can say; alone in its block it sets the bound.
    scores_N = np.zeros(64)
    scores_N[3], scores_N[40] = 1.0, 1.0 + 1e-9
    scores_K, rows_K = bm25._top(scores_N, 1)
    assert (scores_K.tolist(), rows_K.tolist()) == ([1.0], [3])


def test_fewer_documents_found_than_asked_for_among_many():
    documents = [["x"]] * 100 + [["y"]] + [["x"]] * 100
    assert Bm25Index(documents).search([["y"]], 4)[1].tolist() == [[100, -1, -1, -1]]


# Properties.


@pytest.mark.parametrize("tokens", [1, 50, 1 << 20])
def test_slices_change_nothing(tokens):
    documents = random_documents(np.random.default_rng(3), 80)
    whole = Bm25Index(documents)
    sliced = Bm25Index(iter(documents), slice_terms=tokens)
    assert sliced.terms == whole.terms
    for name in ("starts_V", "rows_P", "weights_P"):
        np.testing.assert_array_equal(getattr(sliced, name), getattr(whole, name))


def test_postings_are_those_of_the_documents():
    documents = random_documents(np.random.default_rng(4), 50)
    index = Bm25Index(documents)
    assert (index.starts_V.dtype, index.rows_P.dtype, index.weights_P.dtype) == (np.int64, np.int32, np.float32)
    for token, term in index.terms.items():
        rows = [row for row, document in enumerate(documents) if token in document]
        assert index.rows_P[index.starts_V[term] : index.starts_V[term + 1]].tolist() == rows


def test_the_order_of_documents_and_of_words_matters_only_for_ties():
    rng = np.random.default_rng(5)
    documents = random_documents(rng, 150)
    queries = [query for query in random_documents(rng, 30, longest=9) if query]
    order = rng.permutation(150)
    plain = Bm25Index(documents).search(queries, 150)
    shuffled = Bm25Index([documents[row] for row in order]).search(
        [rng.permutation(query).tolist() for query in queries], 150
    )
    for scores_K, rows_K, other_scores_K, other_rows_K in zip(*plain, *shuffled, strict=True):
        found = dict(zip(rows_K.tolist(), scores_K.tolist(), strict=True))
        other = {int(order[row]) if row >= 0 else -1: s for row, s in zip(other_rows_K, other_scores_K, strict=True)}
        assert other == pytest.approx(found, rel=3e-7)
    again = Bm25Index(documents).search([query[::-1] for query in queries], 150)
    np.testing.assert_array_equal(again, plain)


def test_equal_documents_tie_by_row():
    documents = [["b", "a", "c"], ["z"], ["c", "b", "a"], ["a", "c", "b"]]
    scores_QK, rows_QK = Bm25Index(documents).search([["c", "b"]], 2)
    assert rows_QK.tolist() == [[0, 2]]
    assert scores_QK[0, 0] == scores_QK[0, 1]


def test_numpy_tokens_are_tokens():
    documents = [[3, 5, 5], [5], [7]]
    of_arrays = Bm25Index([np.array(document) for document in documents])
    plain = Bm25Index(documents)
    np.testing.assert_array_equal(of_arrays.search([np.array([5, 3])], 3), plain.search([[5, 3]], 3))


# What is refused.


@pytest.mark.parametrize(
    ("documents", "options", "facts"),
    [
        ([], {}, ("BM25", "no", "documents")),
        ([["a"]], {"k1": -0.1}, ("BM25", "k1", -0.1, ..., "b", ..., 0.75, 0, 0, 1)),
        ([["a"]], {"k1": math.nan}, ("BM25", "k1", "nan", ..., "b", ..., 0.75, 0, 0, 1)),
        ([["a"]], {"k1": math.inf}, ("BM25", "k1", "inf", ..., "b", ..., 0.75, 0, 0, 1)),
        ([["a"]], {"b": 1.01}, ("BM25", "k1", 1.5, ..., "b", ..., 1.01, 0, 0, 1)),
        ([["a"]], {"b": -0.01}, ("BM25", "k1", 1.5, ..., "b", ..., -0.01, 0, 0, 1)),
        ([["a"]], {"b": math.nan}, ("BM25", "k1", 1.5, ..., "b", ..., "nan", 0, 0, 1)),
        ([["a"]], {"ngram": 0}, ("BM25", "ngram", 0, 1)),
        ([["a"]], {"ngram": 1.5}, ("BM25", "ngram", 1.5, 1)),
    ],
)
def test_build_refuses(documents, options, facts):
    with pytest.raises(ValueError, match=naming(*facts)):
        Bm25Index(documents, **options)


# Words, and a dataset.


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("What is Uber's Q4-2021 revenue?", ["what", "is", "uber", "s", "q4", "2021", "revenue"]),
        ("snake_case __x__", ["snake", "case", "x"]),
        ("Größe ÉTÉ", ["größe", "été"]),
        ("e\u0301te\u0301", ["été"]),  # a letter and its accent, composed
        ("ﬁnance １２", ["finance", "12"]),  # a ligature, full-width digits
        ("हिन्दी में", ["हिन्दी", "में"]),  # vowel signs are marks, and parts of the word
        ("\u0301 x", ["x"]),  # a mark without a letter is none
        ("... !?", []),
        ("", []),
    ],
)
def test_split_words(text, found):
    assert split_words([text]) == [found]


DATASET = RetrievalDataset(
    {"q1": "the cat", "q2": "a dog?", "unjudged": "cat", "nothing": "zebra"},
    {"d10": "the dog", "d2": "the Cat", "d1": "the cat", "d3": "a mouse"},
    {"q1": {"d2": 1}, "q2": {"d10": 1}, "nothing": {"d3": 1}},
    titles={"d3": "On cats: the cat and"},
)


def test_a_run_of_a_dataset():
    run = bm25_run(DATASET)
    assert run.query_ids == list(DATASET.queries)
    assert run.document_ids == ["d1", "d10", "d2", "d3"]
    results = run.to_dict()
    # d1 and d2 tie and go by id; d3 is longer and has both words in its title; d10 has one of them.
    assert list(results["q1"]) == ["d1", "d2", "d3", "d10"]
    assert results["q1"]["d1"] == results["q1"]["d2"]
    assert list(results["unjudged"]) == ["d1", "d2", "d3"]
    assert results["nothing"] == {}
    texts = dict(zip(DATASET.corpus, split_words(list(DATASET.texts.values())), strict=True))
    scores = double_loop([texts[document_id] for document_id in run.document_ids], ["a", "dog"])
    assert results["q2"] == pytest.approx({"d10": scores[1], "d3": scores[3]}, rel=1e-6)
    report = evaluate_run(run, DATASET)
    # q1 at rank 2; q2: "dog" is one of two words in d10, "a" one of seven in d3; nothing for the last.
    assert report.per_query["mrr@10"].tolist() == [1 / 2, 1.0, 0.0]


def test_options_of_a_run():
    calls = []

    def tokenize(texts):
        calls.append(len(texts))
        return [[ord(c) for c in text] for text in texts]

    run = bm25_run(DATASET, tokenize=tokenize, depth=2)
    assert calls == [4, 4]
    assert run.indices.shape == (4, 2)
    texts = DATASET.texts
    scores = double_loop([texts[document_id] for document_id in run.document_ids], "zebra")
    rows, best = expected(scores, 2)
    assert run.indices[3].tolist() == rows
    np.testing.assert_allclose(run.scores[3], best, rtol=1e-6)
    for wrong in (lambda texts: [["a"]], lambda texts: texts):
        with pytest.raises(ValueError, match=naming("BM25", "tokenize", "list", 4, "texts")):
            bm25_run(DATASET, tokenize=wrong)
    calls.clear()
    for wrong in ({"depth": 0}, {"ngram": 0}, {"k1": -1}, {"b": 2}):
        with pytest.raises(ValueError, match=naming(*wrong, *wrong.values(), 1)):
            bm25_run(DATASET, tokenize=tokenize, **wrong)
    assert not calls  # before any work


def test_a_run_with_pairs():
    """Two documents with the same words: only the pair tells them apart."""
    dataset = RetrievalDataset({"q": "red car"}, {"x": "car red old", "y": "old red car"}, {"q": {"y": 1}})
    assert list(bm25_run(dataset).to_dict()["q"]) == ["x", "y"]  # a tie
    found = bm25_run(dataset, ngram=2, k1=2.0, b=0.0).to_dict()["q"]
    # k1 2 and no length: 1 / 3 of each idf. "red" and "car" are in both, ln(1 + 0.5 / 2.5), the pair in one, ln 2.
    assert found == pytest.approx({"y": (2 * 0.1823216 + 0.6931472) / 3, "x": 2 * 0.1823216 / 3}, rel=1e-6)
    assert list(found) == ["y", "x"]


def test_a_query_does_not_find_itself():
    queries, corpus = {"a": "cat"}, {"a": "cat", "b": "cat dog", "c": "cat dog mouse"}
    dataset = RetrievalDataset(queries, corpus, {"a": {"b": 1}})
    assert list(bm25_run(dataset, depth=2).to_dict()["a"]) == ["b", "c"]
    assert list(bm25_run(dataset, depth=2, exclude_identical_ids=False).to_dict()["a"]) == ["a", "b"]
    relevant = RetrievalDataset(queries, corpus, {"a": {"a": 1}})
    assert list(bm25_run(relevant, depth=2).to_dict()["a"]) == ["a", "b"]


def test_words_of_one_text_instead_of_a_list():
    with pytest.raises(ValueError, match=naming("texts", "str", "list")):
        split_words("ab cd")
