"""fit_adapter.py and corpus_softmax.py over windows of long documents: by hand, and against loops over documents."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from naming import naming
from test_fit_adapter import PLAIN, draw

from embedft import LOSSES, fit_adapter
from embedft.encoders.maps import LinearMap
from embedft.training.corpus_softmax import Documents, Pairs, first_ranks, full_corpus_softmax

SOURCE = np.array([0, 1, 1, 1, 1, 1, 2, 3, 3, 4, 5, 5, 5])
RELEVANT = [[0], [1], [3, 5], [1, 2, 4], [5], list(range(6))]  # the last: every document answers


def best_windows(q, D, source, temperature=1.0):
    """The score of each document, by a loop."""
    s = F.cosine_similarity(q[None], D) / temperature
    return s, [max(s[w] for w in range(len(D)) if source[w] == d) for d in range(source[-1] + 1)]


def softmax_by_loops(Q, D, source, relevant, temperature):
    total = 0
    for q, answers in zip(Q, relevant, strict=True):
        s, best = best_windows(q, D, source, temperature)
        others = sum(s[w].exp() for w in range(len(D)) if source[w] not in answers)
        total = total + sum(torch.log((best[p].exp() + others) / best[p].exp()) for p in answers) / len(answers)
    return total / len(Q)


def rank_by_loops(q, D, source, answers):
    _, best = best_windows(q, D, source)
    order = sorted(range(len(best)), key=lambda d: (-best[d].item(), d))
    return 1 + min(order.index(p) for p in answers)


def problem(seed=0, *, num_documents=12, num_queries=24, dtype=np.float64):
    """Query i asks for the last window of document i mod 12, turned; documents have one to four windows."""
    counts = np.random.default_rng(seed).integers(1, 5, num_documents)
    source = np.repeat(np.arange(num_documents), counts)
    D = draw(len(source), seed=seed)
    turn, _ = np.linalg.qr(np.eye(6) + 0.7 * draw(6, seed=seed + 1))
    asked = np.arange(num_queries) % num_documents
    Q = D[np.cumsum(counts)[asked] - 1] @ turn + 0.3 * draw(num_queries, seed=seed + 2)
    return Q.astype(dtype), D.astype(dtype), {i: {int(d): 1} for i, d in enumerate(asked)}, source


def fit(Q, D, qrels, source, /, **settings):
    return fit_adapter(Q, D, qrels, replace(PLAIN, **settings), source=source)


# The softmax and the ranks.


@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_by_hand(at_once):
    """Cosines 0.6 and 0.8 with document 0's windows, 0 with document 1, at temperature 0.2: exp(3), exp(4), exp(0).

    Document 0 counts by its second window, against document 1. Document 1 has both windows against it, but one
    document in front.
    """
    D = np.array([[2.0, 0.0], [0.0, 1.0], [-0.8, 0.6]])
    documents = Documents(D, at_once=at_once, dtype=torch.float64, source=np.array([0, 0, 1]))
    Q = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    expected = {
        0: -math.log(math.exp(4) / (math.exp(4) + math.exp(0))),
        1: -math.log(math.exp(0) / (math.exp(0) + math.exp(3) + math.exp(4))),
    }
    for answer, loss in expected.items():
        pairs = Pairs.of({0: [answer]}, [0], documents)
        assert full_corpus_softmax(Q, documents, pairs, temperature=0.2).item() == pytest.approx(loss)
        assert first_ranks(Q, documents, pairs).tolist() == [answer + 1]


@pytest.mark.parametrize("mapped", [False, True], ids=["frozen", "mapped"])
@pytest.mark.parametrize(("at_once", "temperature"), [(1, 0.05), (3, 1.0), (4, 0.3), (13, 0.05), (100, 1.0)])
def test_softmax_is_that_of_loops(at_once, mapped, temperature):
    """Values and gradients; with at most 1, 3 and 4 vectors at once, document 1 is more than one part may hold."""
    Q, D = torch.from_numpy(draw(6)).requires_grad_(), draw(13, seed=1) * 5
    document_map = LinearMap(6).double() if mapped else None
    if mapped:
        document_map.weight.data += 0.3 * torch.from_numpy(draw(6, seed=2))
    documents = Documents(D, at_once=at_once, dtype=torch.float64, source=SOURCE)
    pairs = Pairs.of(dict(enumerate(RELEVANT)), range(6), documents)
    value = full_corpus_softmax(Q, documents, pairs, temperature=temperature, document_map=document_map)
    dense = torch.from_numpy(D)
    expected = softmax_by_loops(Q, document_map(dense) if mapped else dense, SOURCE, RELEVANT, temperature)
    wanted = [Q, *(document_map.parameters() if mapped else ())]
    assert value.item() == pytest.approx(expected.item(), rel=1e-10)
    for found, other in zip(torch.autograd.grad(value, wanted), torch.autograd.grad(expected, wanted), strict=True):
        torch.testing.assert_close(found, other, rtol=1e-10, atol=1e-10)


def test_gradient_of_the_softmax():
    documents = Documents(draw(13, seed=1), at_once=4, dtype=torch.float64, source=SOURCE)
    pairs = Pairs.of(dict(enumerate(RELEVANT)), range(6), documents)
    Q, weight = torch.from_numpy(draw(6)), torch.eye(6, dtype=torch.float64)
    inputs = Q.requires_grad_(), weight.requires_grad_()

    def value(Q, weight):
        return full_corpus_softmax(Q, documents, pairs, temperature=0.5, document_map=lambda x: x @ weight)

    assert torch.autograd.gradcheck(value, inputs)
    assert torch.autograd.gradcheck(lambda Q: full_corpus_softmax(Q, documents, pairs, temperature=0.5), inputs[:1])


@pytest.mark.parametrize("at_once", [1, 2, 3, 5, 13])
def test_ranks_are_those_of_loops(at_once):
    """Vectors with few directions, so that windows and documents tie, and documents larger than a part."""
    generator = np.random.default_rng(at_once)
    for _ in range(30):
        D = np.array([[1.0, 0], [0, 1], [-1, 0], [0, -1]])[generator.integers(0, 4, 13)]
        Q = torch.from_numpy(np.array([[1.0, 0], [0, 1]])[generator.integers(0, 2, 6)])
        for vectors_QD, vectors_WD in ((Q, D), (torch.from_numpy(draw(6)), generator.standard_normal((13, 6)))):
            documents = Documents(vectors_WD, at_once=at_once, dtype=torch.float64, source=SOURCE)
            pairs = Pairs.of(dict(enumerate(RELEVANT)), range(6), documents)
            W = torch.from_numpy(vectors_WD)
            expected = [rank_by_loops(q, W, SOURCE, a) for q, a in zip(vectors_QD, RELEVANT, strict=True)]
            assert first_ranks(vectors_QD, documents, pairs).tolist() == expected


@pytest.mark.parametrize("at_once", [2, 50])
def test_some_documents_alone(at_once):
    """With all their windows, under their numbers."""
    D = draw(13, seed=1)
    documents = Documents(D, at_once=at_once, dtype=torch.float64, source=SOURCE).subset(np.array([1, 3, 4]))
    assert len(documents) == 8
    assert [documents.windows(i) for i in (1, 3, 4)] == [range(5), range(5, 7), range(7, 8)]
    assert documents.parts == ([slice(0, 5), slice(5, 7), slice(7, 8)] if at_once == 2 else [slice(0, 8)])
    found = torch.cat([documents.vectors(part, unit=False) for part in documents.parts])
    np.testing.assert_array_equal(found, D[[1, 2, 3, 4, 5, 7, 8, 9]])


# Fitting.


@pytest.mark.parametrize("objective", ["full_corpus", "in_batch"])
@pytest.mark.parametrize("side", ["query", "both"])
def test_documents_of_one_window_are_documents(objective, side):
    """To the bit, in parts and held out too."""
    Q, D, qrels, _ = problem(dtype=np.float32)
    qrels = {i: {i % 12: 1, (i + 3) % 12: 0, **({5: 1} if i % 12 == 4 else {})} for i in qrels}
    settings = {"objective": objective, "side": side, "batch_size": 7, "held_out": 0.2, "documents_at_once": 5}
    one, other = (fit(Q, D[:12], qrels, source, **settings) for source in (None, np.arange(12)))
    assert one.history == other.history
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("at_once", [1, 4])
@pytest.mark.parametrize("side", ["query", "document", "both"])
def test_documents_at_once_change_nothing(at_once, side):
    settings = {"side": side, "held_out": 0.2, "epochs": 5}
    one, other = (fit(*problem(), documents_at_once=n, **settings) for n in (1000, at_once))
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)
    metrics = [[r["metrics"] for r in adapter.history if "metrics" in r] for adapter in (one, other)]
    assert metrics[0] == metrics[1]


@pytest.mark.parametrize("side", ["query", "document", "shared"])
def test_the_best_window_is_that_of_the_adapter_as_it_is(side):
    """Loss and gradient of a step that starts away from the identity, where other windows are the best."""
    Q, D, qrels, source = problem()
    start = fit(Q, D, qrels, source, side=side, bias=False, epochs=60, lr=0.05).float().double()
    adapter = fit_adapter(
        Q, D, qrels, replace(PLAIN, side=side, bias=False, epochs=1, temperature=0.1), source=source, start=start
    )
    vectors = torch.from_numpy(Q), torch.from_numpy(D)
    mapped = start(vectors[0], "query"), start(vectors[1], "document")
    relevant = [[i % 12] for i in range(24)]
    expected = softmax_by_loops(*mapped, source, relevant, 0.1)
    assert adapter.history[0]["loss"] == pytest.approx(expected.item(), rel=1e-10)
    gradient = torch.autograd.grad(expected, list(start.parameters()))
    assert adapter.history[0]["grad_norm"] == pytest.approx(gradient[0].norm().item(), rel=1e-9)

    def best(Q, D):
        s = F.normalize(Q) @ F.normalize(D).T
        return [s[i].where(torch.from_numpy(source == i % 12), -2).argmax().item() for i in range(24)]

    assert best(*vectors) != best(*mapped)


def test_it_learns_which_document():
    """The window that is asked for is one of up to four."""
    adapter = fit(*problem(3), epochs=60, lr=0.02)
    losses = [record["loss"] for record in adapter.history]
    assert losses[-1] < 0.5 * losses[0]


def test_held_out_documents_leave_with_all_their_windows():
    Q, D, qrels, source = problem()
    adapter = fit(Q, D, qrels, source, epochs=1, held_out=0.25, lr=1e-12, seed=0, documents_at_once=4)
    assert [adapter.costs[name] for name in ("queries", "documents", "held_out_queries")] == [18, 9, 6]
    gone = np.random.default_rng(0).permutation(12)[:3].tolist()
    kept = [d for d in range(12) if d not in gone]
    windows = np.flatnonzero(np.isin(source, kept))
    Q, D = torch.from_numpy(Q), torch.from_numpy(D)
    trained = [i for i in range(24) if i % 12 in kept]
    relevant = [[kept.index(i % 12)] for i in trained]
    numbers = [kept.index(d) for d in source[windows]]
    expected = softmax_by_loops(Q[trained], D[windows], numbers, relevant, 0.02)
    assert adapter.history[1]["loss"] == pytest.approx(expected.item(), rel=1e-9)
    # Ranked among all documents.
    ranks = np.array([rank_by_loops(Q[i], D, source, [i % 12]) for i in range(24) if i % 12 in gone])
    metrics = adapter.history[0]["metrics"]
    assert metrics["mrr@10"] == pytest.approx(np.mean((ranks <= 10) / ranks))
    assert metrics["hit_rate@5"] == pytest.approx(np.mean(ranks <= 5))


@pytest.mark.parametrize("merge", [True, False])
def test_in_batch_scores_documents_by_their_best_window(merge):
    """Step 1, at the identity: each question against the documents of the batch, its hard negative among them."""
    Q, D, _, source = problem(num_queries=4)
    qrels = {0: {0: 1, 5: 0}, 1: {1: 1, 2: 1}, 2: {3: 1}, 3: {6: 1, 0: 0}}
    loss = {"name": "in_batch_negatives", "temperature": 0.5}
    adapter = fit(Q, D, qrels, source, objective="in_batch", loss=loss, epochs=1, merge_documents=merge)
    rows = [(q, p) for q, grades in qrels.items() for p, grade in grades.items() if grade]
    columns = [d for q, p in rows for d in (p, *(n for n, grade in qrels[q].items() if not grade))]
    columns = list(dict.fromkeys(columns)) if merge else columns
    total = 0
    for q, p in rows:
        s = np.exp(np.array(best_windows(torch.from_numpy(Q[q]), torch.from_numpy(D), source, 0.5)[1]))
        others = sum(s[d] for d in columns if qrels[q].get(d, 0) == 0)
        if not merge:  # the other answer of a question is a column as any other
            others = sum(s[d] for d in columns) - s[p]
        total -= math.log(s[p] / (s[p] + others))
    assert adapter.history[0]["loss"] == pytest.approx(total / len(rows), rel=1e-10)


@pytest.mark.parametrize("name", LOSSES)
def test_any_loss_takes_windows(name):
    """Each, with hard negatives, leaves finite weights."""
    options = {
        "matryoshka": {"dims": [6, 4], "inner": {"name": "in_batch_negatives"}},
        "sum": {"losses": [{"name": "in_batch_negatives"}, {"name": "toward_base"}], "weights": [1.0, 0.5]},
        "projected_distillation": {"student_dim": 6, "teacher_dim": 6},
        "quantized": {"precision": "int8", "inner": {"name": "in_batch_negatives"}},
    }
    Q, D, qrels, source = problem()
    qrels = {i: {**grades, (i + 1) % 12: 0, (i + 5) % 12: 0} for i, grades in qrels.items()}
    settings = {"objective": "in_batch", "loss": {"name": name, **options.get(name, {})}, "batch_size": 10, "epochs": 2}
    adapter = fit(Q, D, qrels, source, **settings)
    assert all(parameter.isfinite().all() for parameter in adapter.parameters())
    assert len(adapter.history) == 6


# Errors.

Q0, D0, R0, S0 = problem()
WRONG = (S0[::-1], 0), (S0 + 1, 0), (S0 - 1, 0), (2 * S0, np.flatnonzero(S0)[0])  # and the first wrong row


@pytest.mark.parametrize(
    ("source", "qrels", "facts"),
    [
        (S0[:-1], R0, ("source", [len(S0) - 1], "int64", [len(S0)])),
        (S0[:, None], R0, ("source", [len(S0), 1], "int64", [len(S0)])),
        (S0.astype(np.float64), R0, ("source", [len(S0)], "float64", [len(S0)])),
        *((wrong, R0, ("source", "window", row, wrong[row], 0)) for wrong, row in WRONG),
        (S0, {0: {12: 1}}, ("qrels", "document", 12, 0, 11)),
    ],
)
@pytest.mark.parametrize("objective", ["full_corpus", "in_batch"])
def test_wrong_sources_are_refused(tmp_path, source, qrels, facts, objective):
    with pytest.raises(ValueError, match=naming(*facts)):
        fit_adapter(Q0, D0, qrels, replace(PLAIN, objective=objective), source=source, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_windows_are_named():
    D = D0.copy()
    D[7] = 0
    with pytest.raises(ValueError, match=naming("window", 7, "zero")):
        fit_adapter(Q0, D, R0, PLAIN, source=S0)


def test_sources_of_any_whole_numbers():
    for dtype in (np.uint8, np.int32, np.int64):
        found = Documents(D0, S0.astype(dtype), at_once=9).source
        assert found.dtype == np.int64
        np.testing.assert_array_equal(found, S0)
