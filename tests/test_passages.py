"""Passages, from the cut to the report: windows by hand and against the tokenizer's own, MaxP against a double loop."""

import numpy as np
import pytest
import torch
from conftest import TINY_VOCABULARY, write_tiny_folder
from naming import naming

from embedft import RetrievalDataset, load_embedder
from embedft.encoders.adapter import Adapter
from embedft.encoders.maps import LinearMap
from embedft.encoders.packing import concatenate, pack, take
from embedft.retrieval.evaluate import evaluate
from embedft.retrieval.index import FlatIndex, Found, search_exact
from embedft.retrieval.passages import WindowIndex
from embedft.retrieval.search import Searcher

LONG = "a b c d e f g h i j"  # ten tokens, a word each
TEXTS = ["the fee", LONG, "", "k l m n", "query " * 40, "o p q r s"]


@pytest.fixture
def tiny(tiny_bert):
    return load_embedder(tiny_bert, device="cpu")


def words(windows: list[list[int]]) -> list[str]:
    return [" ".join(TINY_VOCABULARY[i] for i in ids) for ids in windows]


# Cutting.


@pytest.mark.parametrize(
    ("size", "stride", "expected"),
    [
        # 6 tokens less [CLS] and [SEP] are 4 of text; from 0, 2, 4 and 6, where the window reaches the end.
        (6, 2, ["a b c d", "c d e f", "e f g h", "g h i j"]),
        # From 0, 3 and 6: the last one is not full less than it must be.
        (6, 3, ["a b c d", "d e f g", "g h i j"]),
        (6, 4, ["a b c d", "e f g h", "i j"]),
        # Every 6 tokens would leave out two of every six: the next begins where the last one ended.
        (6, 6, ["a b c d", "e f g h", "i j"]),
        (6, 1, ["a b c d", "b c d e", "c d e f", "d e f g", "e f g h", "f g h i", "g h i j"]),
        (11, 1, ["a b c d e f g h i", "b c d e f g h i j"]),
        (11, 9, ["a b c d e f g h i", "j"]),
        (12, 1, ["a b c d e f g h i j"]),
        (48, 5, ["a b c d e f g h i j"]),
        (3, 1, list("abcdefghij")),
    ],
)
def test_windows_by_hand(tiny, size, stride, expected):
    windows, source = tiny.tokenizer.windows(["", LONG, "a"], (size, stride))
    assert words(windows) == ["[CLS] [SEP]", *(f"[CLS] {text} [SEP]" for text in expected), "[CLS] a [SEP]"]
    assert source == [0, *[1] * len(expected), 2]


def test_the_prompt_is_in_front_of_every_window(tiny):
    windows, source = tiny.tokenizer.windows([LONG, ""], (8, 2), prompt="query: ")
    expected = ["a b c d", "c d e f", "e f g h", "g h i j"]
    assert words(windows) == [*(f"[CLS] query : {text} [SEP]" for text in expected), "[CLS] query : [SEP]"]
    assert source == [0, 0, 0, 0, 1]


def test_a_prompt_that_grows_into_the_text(tiny):
    """ "que" + "ry a b c d" is "query a b c d": the word is of the text, and not in front of the later windows."""
    windows, _ = tiny.tokenizer.windows(["ry a b c d"], (6, 3), prompt="que")
    assert words(windows) == ["[CLS] query a b c [SEP]", "[CLS] c d [SEP]"]
    # A text that begins as the prompt does keeps its own beginning.
    windows, _ = tiny.tokenizer.windows(["the the the a"], (5, 5), prompt="the ")
    assert words(windows) == ["[CLS] the the the [SEP]", "[CLS] the the a [SEP]"]


def test_special_tokens_written_in_a_text_are_text(tiny):
    windows, _ = tiny.tokenizer.windows(["[SEP] a [CLS] b [SEP]"], (5, 2))
    assert words(windows) == ["[CLS] [SEP] a [CLS] [SEP]", "[CLS] [CLS] b [SEP] [SEP]"]


@pytest.mark.parametrize(("size", "stride"), [(3, 1), (7, 2), (16, 14), (64, 31), (128, 64)])
def test_windows_equal_those_of_the_library(minilm, size, stride):
    """`tokenizers` gives the windows of a text as what overflows, for an overlap instead of a stride."""
    texts = ["", "a", "naïve café 日本語 " * 20, "[SEP] order " * 60, "x" * 150, "one two three " * 90]
    theirs = type(minilm.tokenizer.backend).from_str(minilm.tokenizer.backend.to_str())
    theirs.enable_truncation(size, stride=size - 2 - stride)
    expected, rows = [], []
    for row, text in enumerate(texts):
        encoding = theirs.encode(text)
        cut = [encoding.ids, *(part.ids for part in encoding.overflowing)]
        expected, rows = expected + cut, rows + [row] * len(cut)
    before = minilm.tokenizer.encode(texts)
    assert minilm.tokenizer.windows(texts, (size, stride)) == (expected, rows)
    assert minilm.tokenizer.encode(texts) == before  # truncation is as it was
    fitting = [row for row in range(len(texts)) if rows.count(row) == 1]
    assert {0, 1} <= set(fitting)
    assert [expected[rows.index(row)] for row in fitting] == minilm.tokenizer.encode([texts[i] for i in fitting])


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_side_of_truncation_changes_nothing(tmp_path, side):
    folder = write_tiny_folder(tmp_path / "model", tokenizer_config={"truncation_side": side})
    windows, _ = load_embedder(folder, device="cpu").tokenizer.windows([LONG], (9, 7))
    assert words(windows) == ["[CLS] a b c d e f g [SEP]", "[CLS] h i j [SEP]"]


@pytest.mark.parametrize(
    ("passages", "facts"),
    [
        ((49, 5), ("passages", 49, 5, 2, ..., "special", ..., 2, ..., "prompt", 48, "max_length")),
        ((4, 1), ("passages", 4, 5, 48)),
        ((6, 0), ("passages", 0, 1, 6)),
        ((6, 7), ("passages", 7, 1, 6)),
        ((6,), ("passages", (6,), "(size, stride)", "whole")),
        (("6", "2"), ("passages", ("6", "2"), "(size, stride)", "whole")),
        ((6.0, 2), ("passages", (6.0, 2), "(size, stride)", "whole")),
        (6, ("passages", 6, "(size, stride)", "whole")),
    ],
)
def test_passages_that_cannot_be_cut(tiny, passages, facts):
    tiny.prompts = {"document": "the: "}
    for call in (
        lambda: tiny.pack([LONG], role="document", passages=passages),
        lambda: tiny.encode_passages([LONG], passages),
        lambda: tiny.encode_passages([], passages),
    ):
        with pytest.raises(ValueError, match=naming(*facts)):
            call()


def test_what_is_not_a_text(tiny):
    for texts, facts in (("abc", ("texts", "str", "list")), (["a", None], ("texts[1]", "NoneType", "str"))):
        for prompt in ("", "the "):
            with pytest.raises(ValueError, match=naming(*facts)):
                tiny.tokenizer.windows(texts, (8, 4), prompt=prompt)


# Packing and encoding.


def test_packed_windows_say_their_source(tiny):
    packed = tiny.pack(["a", LONG], role="document", passages=(6, 4))
    assert packed.source.tolist() == [0, 1, 1, 1]
    assert packed.lengths().tolist() == [3, 6, 6, 4]
    assert tiny.pack(["a"], role="document").source is None
    # Some of them, in another order.
    some = take(packed, torch.tensor([3, 1]))
    assert some.source.tolist() == [1, 1]
    assert words([some.input_ids.tolist()]) == ["[CLS] i j [SEP] [CLS] a b c d [SEP]"]
    assert (some.cu_seqlens.tolist(), some.max_seqlen) == ([0, 4, 10], 6)
    assert some.positions.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 4, 5]
    assert concatenate(packed, packed).source is None
    assert pack([[1]], source=[7]).source.tolist() == [7]


def test_a_windows_vector_is_that_of_its_text(tiny):
    vectors, source = tiny.encode_passages([LONG, "a b", ""], (6, 2))
    texts = ["a b c d", "c d e f", "e f g h", "g h i j", "a b", ""]
    np.testing.assert_allclose(vectors, tiny.encode(texts), atol=1e-6)
    assert (vectors.dtype, source.dtype) == (np.float32, np.int64)
    assert source.tolist() == [0, 0, 0, 0, 1, 2]
    embedded = tiny.embed(tiny.pack([LONG, "a b", ""], role="document", passages=(6, 2)), role="document")
    np.testing.assert_allclose(embedded.detach().numpy(), vectors, atol=1e-6)
    short, _ = tiny.encode_passages([LONG, "a b", ""], (6, 2), dim=5)
    np.testing.assert_allclose(short, tiny.encode(texts, dim=5), atol=1e-6)
    for texts in ([], ["a"]):
        vectors, source = tiny.encode_passages(texts, (6, 2))
        assert (vectors.shape, source.tolist()) == ((len(texts), 32), [0] * len(texts))


@pytest.mark.parametrize("include_prompt", [True, False])
def test_windows_with_a_prompt(tiny, include_prompt):
    tiny.prompts, tiny.include_prompt = {"document": "the: "}, include_prompt
    vectors, _ = tiny.encode_passages([LONG], (8, 4))
    expected = tiny.encode(["a b c d", "e f g h", "i j"])
    np.testing.assert_allclose(vectors, expected, atol=1e-6)
    # A query has no prompt, so its windows have more room: 6 of text.
    assert tiny.encode_passages([LONG], (8, 4), role="query")[1].tolist() == [0, 0]
    if not include_prompt:
        # [CLS] the : and [SEP] leave a window of five for one token.
        for call in (
            lambda: tiny.pack([""], role="document", passages=(4, 1)),
            lambda: tiny.encode_passages([], (4, 1)),
        ):
            with pytest.raises(ValueError, match=naming("passages", 4, 5, 48)):
                call()


def test_slices_of_texts_change_nothing(tiny, monkeypatch):
    expected, source = tiny.encode_passages(TEXTS, (8, 3))
    calls = []
    whole = tiny.tokenizer.whole

    def counted(texts, **options):
        calls.append(len(texts))
        return whole(texts, **options)

    monkeypatch.setattr(tiny.tokenizer, "whole", counted)
    found, rows = tiny.encode_passages(TEXTS, (8, 3), batch_tokens=20, cut_texts=2)
    assert calls == [0, 2, 2, 2]  # none first, to check the size
    np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_array_equal(rows, source)
    assert (np.diff(rows) >= 0).all()


def test_inference_leaves_the_mode_as_it_was(tiny):
    tiny.train()
    first, second = (tiny.encode_passages([LONG], (6, 2))[0] for _ in range(2))
    np.testing.assert_array_equal(first, second)  # no dropout
    assert tiny.training


def test_a_store_keeps_a_window_once_for_all_sizes(tiny, tiny_bert, tmp_path, monkeypatch):
    expected = {passages: tiny.encode_passages(TEXTS, passages) for passages in ((8, 3), (6, 3), (8, 6))}
    whole = tiny.encode(TEXTS)
    stored = load_embedder(tiny_bert, device="cpu", store=tmp_path / "store")
    numbers = []
    for passages, (vectors, source) in expected.items():
        found, rows = stored.encode_passages(TEXTS, passages)
        np.testing.assert_allclose(found, vectors, atol=1e-6)
        np.testing.assert_array_equal(rows, source)
        numbers.append(len({vector.tobytes() for vector in vectors}))
    assert stored.store.misses < sum(numbers)  # (8, 6) asks for windows that (8, 3) had
    assert stored.store.hits == 0  # none was there before
    np.testing.assert_allclose(stored.encode(TEXTS), whole, atol=1e-6)  # texts are not taken for windows
    assert len(stored.store.spaces()) == 2
    misses = stored.store.misses
    monkeypatch.setattr(stored, "_pooled", None)  # nothing is computed again
    for passages, (vectors, _) in expected.items():
        np.testing.assert_allclose(stored.encode_passages(TEXTS, passages, dim=4)[0].shape, (len(vectors), 4))
    assert stored.store.misses == misses


def test_a_text_of_digits_is_not_a_window(tiny_bert, tmp_path):
    stored = load_embedder(tiny_bert, device="cpu", store=tmp_path)
    (window,), _ = stored.tokenizer.windows(["a"], (6, 4))
    digits = " ".join(map(str, window))
    before = stored.encode([digits])
    (vector,), _ = stored.encode_passages(["a"], (6, 4))
    assert np.abs(stored.encode([digits]) - vector).max() > 1e-3
    np.testing.assert_array_equal(stored.encode([digits]), before)


# Scores of documents.


def naive(queries, vectors, source, depth, num_sizes=1):
    """A double loop over queries and documents, in float64; the whole order by (-score, row)."""
    rows, scores = [], []
    for query in queries.astype(np.float64):
        found = []
        for document in range((source[-1] + 1) // num_sizes):
            total = 0.0
            for number in range(document * num_sizes, (document + 1) * num_sizes):
                total += max(float(query @ v) for v, s in zip(vectors, source, strict=True) if s == number)
            found.append((-total / num_sizes, document))
        found.sort()
        scores.append([-score for score, _ in found[:depth]])
        rows.append([row for _, row in found[:depth]])
    return np.array(scores), np.array(rows)


def random_windows(seed, num_documents=40, num_queries=7, dim=4, most=6):
    """Whole numbers, so that inner products are exact and ties many."""
    rng = np.random.default_rng(seed)
    source = np.repeat(np.arange(num_documents), rng.integers(1, most + 1, num_documents))
    vectors = rng.integers(-2, 3, size=(len(source), dim)).astype(np.float32)
    return rng.integers(-2, 3, size=(num_queries, dim)).astype(np.float32), vectors, source


@pytest.mark.parametrize("depth", [1, 7, 39, 40, 100])
@pytest.mark.parametrize("block", [1, 60, 1 << 24])
def test_equals_a_double_loop(depth, block):
    queries, vectors, source = random_windows(depth)
    index = WindowIndex(vectors, source, max_scores=block)
    assert len(index) == 40
    scores, rows = index.search(queries, depth)
    assert (scores.dtype, rows.dtype) == (np.float32, np.int64)
    expected_scores, expected_rows = naive(queries, vectors, source, depth)
    np.testing.assert_allclose(scores, expected_scores, rtol=1e-6)
    np.testing.assert_array_equal(rows, expected_rows)


def test_one_window_a_document_is_flat_search():
    queries, vectors, _ = random_windows(3, num_documents=200, num_queries=1030)  # in two blocks
    index = WindowIndex(vectors, np.arange(len(vectors)))
    for found, expected in zip(index.search(queries, 50), search_exact(queries, vectors, 50), strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("num_queries", [1, 3, 200])
def test_documents_of_equal_windows_tie_wherever_they_stand(num_queries):
    """4,097 documents of five kinds, by real numbers, whose products a library may round by place."""
    rng = np.random.default_rng(0)
    kinds, kind = rng.standard_normal((5, 2, 33)).astype(np.float32), rng.integers(0, 5, 4097)
    queries = rng.standard_normal((num_queries, 33)).astype(np.float32)
    vectors = kinds[kind].reshape(-1, 33)
    vectors.setflags(write=False)  # as those of a memory map
    _, rows = WindowIndex(vectors, np.arange(len(vectors)) // 2).search(queries, 100)
    for query, found in zip(queries, rows, strict=True):
        best = (kinds @ query).max(axis=1).argmax()
        np.testing.assert_array_equal(found, np.flatnonzero(kind == best)[:100])


# Windows of several sizes.


def test_the_mean_of_the_best_of_each_size_by_hand():
    """Query 1. Document 0: large 4 and 1, small 2: (4 + 2) / 2 = 3. Document 1: large 6, small -2 and 1: 3.5.
    Document 2: large 5, small 1, 0 and 0: 3, behind document 0, with which it ties."""
    vectors = np.array([[4], [1], [2], [6], [-2], [1], [5], [1], [0], [0]], dtype=np.float32)
    source = [0, 0, 1, 2, 3, 3, 4, 5, 5, 5]
    index = WindowIndex(vectors, source, num_sizes=2)
    assert len(index) == 3
    scores, rows = index.search(np.array([[1.0], [-1.0]]), 3)
    # Query -1: (-1 - 2) / 2, (-6 + 2) / 2, (-5 + 0) / 2.
    np.testing.assert_array_equal(rows, [[1, 0, 2], [0, 1, 2]])
    np.testing.assert_array_equal(scores, [[3.5, 3, 3], [-1.5, -2, -2.5]])
    np.testing.assert_array_equal(index.scores_of(np.array([[1.0]], dtype=np.float32), [2, 1, 2]), [[3, 3.5, 3]])
    # One size: each window list is a document.
    np.testing.assert_array_equal(WindowIndex(vectors, source).search(np.array([[1.0]]), 2).rows, [[2, 4]])


@pytest.mark.parametrize(("num_sizes", "num_documents"), [(2, 20), (3, 13), (2, 1), (5, 2)])
@pytest.mark.parametrize("block", [1, 60, 1 << 24])
@pytest.mark.parametrize("depth", [1, 7, 100])
def test_several_sizes_equal_a_double_loop(num_sizes, num_documents, block, depth):
    """Whole numbers; the mean of two or more is rounded alike for equal documents."""
    queries, vectors, source = random_windows(depth, num_documents * num_sizes)
    expected_scores, expected_rows = naive(queries, vectors, source, depth, num_sizes)
    for candidates in (None, FlatIndex(vectors)):
        index = WindowIndex(vectors, source, num_sizes=num_sizes, max_scores=block, candidates=candidates)
        assert len(index) == num_documents
        scores, rows = index.search(queries, depth)
        assert scores.dtype == np.float32
        if candidates is None or depth >= num_documents:
            np.testing.assert_allclose(scores, expected_scores, rtol=1e-6)
            np.testing.assert_array_equal(rows, expected_rows)
        every = index.scores_of(queries, np.arange(num_documents))
        np.testing.assert_array_equal(scores, np.take_along_axis(every, rows, axis=1))


@pytest.mark.parametrize("num_queries", [1, 200])
def test_equal_documents_of_several_sizes_tie_wherever_they_stand(num_queries):
    """4,097 documents of five kinds: windows of three sizes, 2, 1 and 3 of them, by real numbers."""
    rng = np.random.default_rng(0)
    kinds, kind = rng.standard_normal((5, 6, 33)).astype(np.float32), rng.integers(0, 5, 4097)
    queries = rng.standard_normal((num_queries, 33)).astype(np.float32)
    source = (np.arange(4097)[:, None] * 3 + [0, 0, 1, 2, 2, 2]).ravel()
    index = WindowIndex(kinds[kind].reshape(-1, 33), source, num_sizes=3, max_scores=2**18)
    best_of = np.array([[(k[:2] @ q).max() + k[2] @ q + (k[3:] @ q).max() for k in kinds] for q in queries])
    for best, found in zip(best_of.argmax(axis=1), index.search(queries, 100).rows, strict=True):
        np.testing.assert_array_equal(found, np.flatnonzero(kind == best)[:100])


def test_candidates_of_several_sizes_are_scored_by_all_their_windows():
    """Document 1's small window is the only one known of it; its score is (2 + 9) / 2."""
    vectors = np.array([[8.0], [1.0], [2.0], [9.0], [7.0], [7.0]], dtype=np.float32)
    source = np.arange(6)
    candidates = Truncating(vectors, [0, 3])
    scores, rows = WindowIndex(vectors, source, num_sizes=2, candidates=candidates).search(np.array([[1.0]]), 2)
    np.testing.assert_array_equal(rows, [[1, 0]])  # document 2, whose score is 7, is not among them
    np.testing.assert_array_equal(scores, [[5.5, 4.5]])
    with pytest.raises(ValueError, match=naming("source", 4, 2, "sizes")):
        WindowIndex(vectors[:5], source[:5], num_sizes=2)


# Approximate search.


class Truncating:
    """An exact index that knows only some windows, like an inverted file whose other lists are not probed."""

    def __init__(self, vectors, known):
        self.known, self.size, self.widths = np.asarray(known), len(vectors), []
        self.index = FlatIndex(vectors[self.known])

    def __len__(self):
        return self.size

    def search(self, queries, depth):
        self.widths.append((len(queries), depth))
        scores, rows = self.index.search(queries, depth)
        missing = depth - rows.shape[1]
        rows = np.pad(self.known[rows], ((0, 0), (0, missing)), constant_values=-1)
        return Found(np.pad(scores, ((0, 0), (0, missing)), constant_values=-np.inf), rows)


@pytest.mark.parametrize("depth", [40, 100])
def test_candidates_that_hold_everything_give_the_exact_result(depth):
    queries, vectors, source = random_windows(5)
    found, expected = (
        WindowIndex(vectors, source, candidates=candidates).search(queries, depth)
        for candidates in (FlatIndex(vectors), None)
    )
    np.testing.assert_array_equal(found.scores, expected.scores)
    np.testing.assert_array_equal(found.rows, expected.rows)


def test_many_windows_of_one_document_on_top_widen_the_search():
    """The 100 best windows are document 0's: 2 documents are found at a width of 128 (4, 8, ..., 64, then 128)."""
    vectors = np.array([[200.0 - i] for i in range(100)] + [[50.0], [40.0], [30.0]] + [[-1.0]] * 60, dtype=np.float32)
    source = np.concatenate([np.zeros(100, dtype=int), [1, 2, 3], np.arange(4, 64)])
    candidates = Truncating(vectors, np.arange(len(vectors)))
    # The second query is satisfied at once: its best windows are all of different documents.
    queries = np.array([[1.0], [-1.0]])
    scores, rows = WindowIndex(vectors, source, candidates=candidates).search(queries, 2)
    assert candidates.widths == [(2, 4), *((1, width) for width in (8, 16, 32, 64, 128))]
    np.testing.assert_array_equal(rows, [[0, 1], [4, 5]])
    np.testing.assert_array_equal(scores, [[200, 50], [1, 1]])
    np.testing.assert_array_equal(rows, WindowIndex(vectors, source).search(queries, 2).rows)


def test_all_windows_of_a_found_document_count():
    """Candidates come from one window each, not the best: the score is still that of the whole document."""
    vectors = np.array([[1.0], [9.0], [2.0], [3.0], [8.0]], dtype=np.float32)
    source = np.array([0, 0, 1, 2, 2])
    candidates = Truncating(vectors, [0, 2])
    scores, rows = WindowIndex(vectors, source, candidates=candidates).search(np.array([[1.0]]), 2)
    np.testing.assert_array_equal(rows, [[0, 1]])  # document 2, whose score is 8, is not among them
    np.testing.assert_array_equal(scores, [[9, 2]])
    assert candidates.widths == [(1, 4)]


def test_every_document_is_scored_when_candidates_run_out():
    """Three documents are known and ten asked for."""
    queries, vectors, source = random_windows(2)
    candidates = Truncating(vectors, np.flatnonzero(source < 3))
    found = WindowIndex(vectors, source, candidates=candidates).search(queries, 10)
    exact = WindowIndex(vectors, source).search(queries, 10)
    assert candidates.widths == [(7, 20)]
    np.testing.assert_array_equal(found.rows, exact.rows)
    np.testing.assert_allclose(found.scores, exact.scores, rtol=1e-6)


def test_misuse():
    for source, *facts in (
        ([0, 1, 2], [3], "int64", [2]),
        ([1, 2], "row", 0, "document", 1),
        ([0, 2], "row", 1, "document", 2, 0),
        ([1, 0], "row", 0, "document", 1),
        ([0, -1], "row", 1, "document", -1, 0),
        ([0.0, 1.0], [2], "float64", [2]),
    ):
        with pytest.raises(ValueError, match=naming("source", *facts)):
            WindowIndex(np.zeros((2, 3)), source)
    with pytest.raises(ValueError, match=naming("embeddings", (0, 3), "[N, D]")):
        WindowIndex(np.zeros((0, 3)), [])
    bad = np.zeros((3, 3))
    bad[2, 2] = np.nan
    with pytest.raises(ValueError, match=naming("window", "document", 1, "finite")):
        WindowIndex(bad, [0, 1, 1])
    index = WindowIndex(np.zeros((3, 3)), [0, 1, 1])
    assert len(index) == 2
    with pytest.raises(ValueError, match=naming("row", 2, "finite")):
        index.search(bad, 1)
    with pytest.raises(ValueError, match=naming("depth", 0, 1)):
        index.search(np.zeros((1, 3)), 0)
    with pytest.raises(ValueError, match=naming("embeddings", (3,), "[N, 3]")):
        index.search(np.zeros(3), 1)
    assert index.search(np.empty((0, 3)), 2).rows.shape == (0, 2)


# Evaluation.


def long_dataset(**changes) -> RetrievalDataset:
    """What a question asks for is at the end of its document, beyond the first 6 tokens."""
    fields = {
        "queries": {"q1": "revenue order limit", "q2": "hello world fee", "q3": "x y z"},
        "corpus": {
            "d2": "the of the of the of hello world fee hello",
            "d1": "the of the of the of revenue order limit",
            "d3": "x y z",
        },
        "qrels": {"q1": {"d1": 1}, "q2": {"d2": 1}, "q3": {"d3": 1}},
    }
    return RetrievalDataset(**(fields | changes))


def test_evaluate_over_passages(tiny):
    dataset = long_dataset()
    report = evaluate(tiny, dataset, passages=(6, 3), ks=(1,), slice_documents=2)
    assert report.setting["passages"] == [6, 3]
    # 10, 9 and 3 tokens of text in windows of 4 of it, one every 3: 3, 3 and 1 windows, 7 for 3 documents.
    assert report.costs["windows_per_document"] == pytest.approx(7 / 3)
    assert report.costs["bytes_per_document"] == pytest.approx(32 * 4 * 7 / 3)
    vectors, source = tiny.encode_passages([dataset.corpus[i] for i in ("d1", "d2", "d3")], (6, 3))
    queries = tiny.encode(list(dataset.queries.values()), role="query")
    scores, rows = naive(queries, vectors, source, 3)
    assert report.run.document_ids == ["d1", "d2", "d3"]
    np.testing.assert_array_equal(report.run.indices, rows)
    np.testing.assert_allclose(report.run.scores, scores, atol=1e-5)


def test_texts_that_fit_one_window_score_as_whole_texts(tiny):
    dataset = long_dataset()
    whole, cut = evaluate(tiny, dataset), evaluate(tiny, dataset, passages=(48, 40))
    assert cut.metrics == whole.metrics
    np.testing.assert_allclose(cut.run.scores, whole.run.scores, atol=1e-6)
    assert whole.setting["passages"] is None
    assert "windows_per_document" not in whole.costs
    assert cut.costs["bytes_per_document"] == whole.costs["bytes_per_document"] == 128


def test_the_title_is_part_of_the_text(tiny):
    with_title = long_dataset(corpus={"d": "c d e f"}, qrels={"q1": {"d": 1}}, titles={"d": "a b"})
    report = evaluate(tiny, with_title, passages=(5, 3))
    assert report.costs["windows_per_document"] == 2  # "a b c" and "d e f"
    texts = ["a b c", "d e f"]
    best = (tiny.encode(["revenue order limit"]) @ tiny.encode(texts).T).max()
    assert report.run.scores[0, 0] == pytest.approx(best, abs=1e-5)


def test_documents_of_equal_best_windows_are_ordered_by_id(tiny):
    corpus = {"b": "a b c d x y", "c": "x y a b c d", "a": "a b c d x y"}
    dataset = long_dataset(queries={"q": "a b c d"}, corpus=corpus, qrels={"q": {"a": 1}})
    report = evaluate(tiny, dataset, passages=(6, 2))
    assert [report.run.document_ids[i] for i in report.run.indices[0]] == ["a", "b", "c"]


def test_evaluate_over_several_sizes(tiny):
    """The mean over sizes of what each size alone gives, whatever the slices."""
    dataset, alone = long_dataset(), []
    for passages in ((6, 3), (8, 2), (4, 4)):
        run = evaluate(tiny, dataset, passages=passages).run.to_dict()
        alone.append({(q, d): score for q, found in run.items() for d, score in found.items()})
    for slice_documents in (None, 2, 1):
        report = evaluate(tiny, dataset, passages=(6, 3, 8, 2, 4, 4), slice_documents=slice_documents)
        assert report.setting["passages"] == [6, 3, 8, 2, 4, 4]
        # 10, 9 and 3 tokens: 3, 3 and 1 windows of 4; of 6, one every 2, 3, 3 and 1; of 2, 5, 5 and 2.
        assert report.costs["windows_per_document"] == pytest.approx((7 + 7 + 12) / 3)
        for query_id, found in report.run.to_dict().items():
            assert list(found.values()) == sorted(found.values(), reverse=True)
            for document_id, score in found.items():
                expected = np.mean([scores[query_id, document_id] for scores in alone])
                assert score == pytest.approx(expected, abs=1e-6)
    assert report.name.endswith(" + windows 6/3+8/2+4/4")


@pytest.mark.parametrize(
    ("passages", "facts"),
    [
        ((6, 3, 4), ("passages", (6, 3, 4), 3)),
        ((), ("passages", "()", 0)),
        ((6, 3, 6, 2), ("passages", (6, 3, 6, 2), 6, "twice")),
        ((6, 3, 49, 5), ("passages", 49, 48, "max_length")),
        ((6, 3, 0, 1), ("passages", 0, 3, 48)),
        ((6, 3, 8, 0), ("passages", 0, 8)),
        ((6, 3, 8, 9), ("passages", 9, 8)),
        ((6, 3, 8.0, 2), ("passages", (6, 3, 8.0, 2))),
        (((6, 3), (8, 2)), ("passages", ((6, 3), (8, 2)))),
    ],
)
def test_sizes_that_cannot_be_combined(tiny, monkeypatch, passages, facts):
    monkeypatch.setattr(tiny, "_pooled", lambda *_: pytest.fail("encoding has begun"))
    for call in (evaluate, Searcher):
        with pytest.raises(ValueError, match=naming(*facts)) as error:
            call(tiny, long_dataset(), passages=passages)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=naming("passages", (6, 3, 8, 2), "(size, stride)")):
        tiny.encode_passages([LONG], (6, 3, 8, 2))  # which gives windows of one size


def test_an_adapter_and_a_store(tiny_bert, tmp_path):
    reports = []
    for store in (None, tmp_path / "store"):
        embedder = load_embedder(tiny_bert, device="cpu", store=store)
        adapter_map = LinearMap(32)
        adapter_map.weight.data += torch.randn(32, 32, generator=torch.Generator().manual_seed(0)) * 0.2
        embedder.attach(Adapter(document=adapter_map, base=embedder.base()))
        reports.append(evaluate(embedder, long_dataset(), passages=(6, 3), dim=5))
    np.testing.assert_allclose(reports[0].run.scores, reports[1].run.scores, atol=1e-6)
    plain = evaluate(load_embedder(tiny_bert, device="cpu"), long_dataset(), passages=(6, 3), dim=5)
    assert np.abs(plain.run.scores - reports[0].run.scores).max() > 1e-3


def test_passages_need_an_embedder_that_cuts_windows(tiny):
    class Plain:
        similarity = "cosine"

        def encode(self, texts, *, role, dim):
            return np.ones((len(texts), 2), dtype=np.float32)

    with pytest.raises(ValueError, match=naming("passages", (6, 3), "Plain")):
        evaluate(Plain(), long_dataset(), passages=(6, 3))


def test_a_window_that_is_not_finite_names_its_document(tiny, monkeypatch):
    monkeypatch.setattr(
        type(tiny),
        "encode_passages",
        lambda self, texts, *_, **__: (np.full((2, 32), np.nan if "fee" in texts[0] else 1.0), [0, 0]),
    )
    with pytest.raises(ValueError, match=naming("window", "document", "'d2'", "finite")):
        evaluate(tiny, long_dataset(), passages=(6, 3), slice_documents=1)
