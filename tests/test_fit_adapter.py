"""fit_adapter.py, corpus_softmax.py, closed forms: by hand, against dense versions and the published loop."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from naming import naming

from embedft import LOSSES, Adapter, AdapterConfig, fit_adapter
from embedft import device as devices
from embedft.commands.adapter import Options
from embedft.config import as_typed
from embedft.encoders.adapter import Base
from embedft.encoders.maps import LinearMap, build_map
from embedft.training.corpus_softmax import Documents, Pairs, first_ranks, full_corpus_softmax
from embedft.training.fit_adapter import _metrics
from experiments.closed_forms import procrustes, relevant_pairs, ridge


def draw(num, dim=6, seed=0, dtype=np.float64):
    return np.random.default_rng(seed).standard_normal((num, dim)).astype(dtype)


def problem(num_queries=24, num_documents=12, dim=6, *, seed=0, dtype=np.float32, turn=0.7, noise=0.1):
    """Queries are rotations of their documents, so a linear map recovers them. Query i asks for document i mod M."""
    D = draw(num_documents, dim, seed, dtype)
    rotation, _ = np.linalg.qr(np.eye(dim) + turn * draw(dim, dim, seed + 1))
    Q = D[np.arange(num_queries) % num_documents] @ rotation + noise * draw(num_queries, dim, seed + 2)
    return Q.astype(dtype), D, {i: {i % num_documents: 1} for i in range(num_queries)}


PLAIN = AdapterConfig(
    temperature=0.02, bias=True, batch_size=None, held_out=0, epochs=20, toward_identity=0, schedule="constant", lr=0.01
)


# The softmax over a corpus.


def test_softmax_by_hand():
    """Cosines 0.6, 0.8 and 0 at temperature 0.2; the first document, of length 2, answers."""
    documents = Documents(np.array([[2.0, 0.0], [0.0, 1.0], [-0.8, 0.6]]), at_once=3, dtype=torch.float64)
    pairs = Pairs.of({0: [0]}, [0], documents)
    value = full_corpus_softmax(torch.tensor([[3.0, 4.0]], dtype=torch.float64), documents, pairs, temperature=0.2)
    assert value.item() == pytest.approx(-math.log(math.exp(3) / (math.exp(3) + math.exp(4) + math.exp(0))))


def test_softmax_by_hand_with_two_answers():
    """Each answer against the third document alone, the mean of both, and of that the mean with a second query."""
    documents = Documents(np.array([[2.0, 0.0], [0.0, 1.0], [-0.8, 0.6]]), at_once=3, dtype=torch.float64)
    pairs = Pairs.of({0: [0, 1], 1: [0]}, [0, 1], documents)
    queries = torch.tensor([[3.0, 4.0], [1.0, 0.0]], dtype=torch.float64)
    first = (math.log(1 + math.exp(-3)) + math.log(1 + math.exp(-4))) / 2
    second = math.log(1 + math.exp(0 - 5) + math.exp(-4 - 5))
    value = full_corpus_softmax(queries, documents, pairs, temperature=0.2)
    assert value.item() == pytest.approx((first + second) / 2)
    # Ranks: of query 0 the better answer is first; with document 0 as its only answer it would be second.
    assert first_ranks(queries, documents, pairs).tolist() == [1, 1]
    assert first_ranks(queries, documents, Pairs.of({0: [0], 1: [2]}, [0, 1], documents)).tolist() == [2, 3]


def dense_softmax(Q, D, relevant, temperature):
    """The formula, query by query and answer by answer."""
    total = 0
    for q, answers in enumerate(relevant):
        s = torch.stack([F.cosine_similarity(Q[q], d, dim=0) for d in D]) / temperature
        negative = [n for n in range(len(D)) if n not in answers]
        for p in answers:
            total = total - torch.log(s[p].exp() / (s[p].exp() + s[negative].exp().sum())) / len(answers) / len(Q)
    return total


RELEVANT = [[0], [3, 7], [3], [10], [1, 2, 4], list(range(11))]  # the last: every document answers


@pytest.mark.parametrize("mapped", [False, True], ids=["frozen", "mapped"])
@pytest.mark.parametrize(("at_once", "temperature"), [(1, 0.05), (3, 1.0), (11, 0.05), (100, 1.0)])
def test_softmax_in_parts_is_the_dense_one(at_once, mapped, temperature):
    Q, D = torch.from_numpy(draw(6)).requires_grad_(), draw(11, seed=1) * 5
    document_map = LinearMap(6).double() if mapped else None
    if mapped:
        document_map.weight.data += 0.3 * torch.from_numpy(draw(6, seed=2))
    documents = Documents(D, at_once=at_once, dtype=torch.float64)
    pairs = Pairs.of(dict(enumerate(RELEVANT)), range(6), documents)
    value = full_corpus_softmax(Q, documents, pairs, temperature=temperature, document_map=document_map)
    dense = torch.from_numpy(D)
    expected = dense_softmax(Q, document_map(dense) if mapped else dense, RELEVANT, temperature)
    wanted = [Q, *(document_map.parameters() if mapped else ())]
    assert value.item() == pytest.approx(expected.item(), rel=1e-10)
    for found, other in zip(torch.autograd.grad(value, wanted), torch.autograd.grad(expected, wanted), strict=True):
        torch.testing.assert_close(found, other, rtol=1e-10, atol=1e-10)


def test_softmax_of_far_scores():
    """Scores of +-1,000: exact where a sum of exponentials without a running maximum is infinite."""
    D = np.array([[1.0, 0], [-1, 0], [0, 1], [0, -1]])
    documents = Documents(D, at_once=2, dtype=torch.float64)
    pairs = Pairs.of({0: [1]}, [0], documents)
    Q = torch.tensor([[1.0, 0.0]], dtype=torch.float64, requires_grad=True)
    value = full_corpus_softmax(Q, documents, pairs, temperature=1e-3)
    assert value.item() == 2000
    value.backward()
    assert Q.grad.isfinite().all()


@pytest.mark.parametrize("at_once", [1, 2, 5])
@pytest.mark.parametrize("mapped", [False, True])
def test_ties_go_to_the_document_that_is_first(at_once, mapped):
    """As in a search. Documents 0, 1 and 3 are one vector: the answers are 1st to 3rd; of two the first counts."""
    documents = Documents(np.array([[1.0, 1], [2, 2], [0, 1], [4, 4], [1, 0]]), at_once=at_once, dtype=torch.float64)
    Q = torch.ones(4, 2, dtype=torch.float64)
    relevant = {0: [0], 1: [1], 2: [3], 3: [1, 3]}
    document_map = (lambda x: x * 2) if mapped else None
    pairs = Pairs.of(relevant, range(4), documents)
    assert first_ranks(Q, documents, pairs, document_map=document_map).tolist() == [1, 2, 3, 2]


@pytest.mark.parametrize("at_once", [1, 4, 11])
def test_ranks_are_counted(at_once):
    Q, D = torch.from_numpy(draw(6)), draw(11, seed=1)
    documents = Documents(D, at_once=at_once, dtype=torch.float64)
    found = first_ranks(Q, documents, Pairs.of(dict(enumerate(RELEVANT)), range(6), documents))
    for rank, q, answers in zip(found.tolist(), Q, RELEVANT, strict=True):
        order = F.cosine_similarity(q[None], torch.from_numpy(D)).argsort(descending=True).tolist()
        assert rank == 1 + min(order.index(p) for p in answers)


def test_documents_of_a_memory_map(tmp_path):
    """Read-only, in half precision, some rows of it, in parts: the same as the rows themselves."""
    np.save(tmp_path / "D.npy", draw(11, seed=1).astype(np.float16))
    stored = np.load(tmp_path / "D.npy", mmap_mode="r")
    rows = np.array([1, 2, 5, 9])
    expected = stored[rows].astype(np.float32)
    for at_once in (3, 50):
        documents = Documents(stored, at_once=at_once).subset(rows)
        assert len(documents) == 4
        found = torch.cat([documents.vectors(part, unit=False) for part in documents.parts])
        torch.testing.assert_close(found, torch.from_numpy(expected), rtol=0, atol=0)
        unit = torch.cat([documents.vectors(part) for part in documents.parts])
        torch.testing.assert_close(unit, F.normalize(torch.from_numpy(expected), dim=1))
        torch.testing.assert_close(documents.vectors(torch.tensor([3, 0, 3])), unit[[3, 0, 3]])
        torch.testing.assert_close(documents.vectors(torch.tensor([2]), unit=False), torch.from_numpy(expected[2:3]))


# Fitting.


def accuracy(adapter, Q, D, qrels):
    found = (adapter.transform(Q) @ adapter.transform(D, "document").T).argmax(axis=1)
    return np.mean([qrels[i].get(d, 0) > 0 for i, d in enumerate(found)])


@pytest.mark.parametrize("objective", ["full_corpus", "in_batch"])
@pytest.mark.parametrize("side", ["query", "document", "both", "shared"])
@pytest.mark.parametrize("kind", ["linear", "low_rank", "two_layer"])
def test_it_learns(kind, side, objective):
    Q, D, qrels = problem(noise=0.3)
    before = accuracy(Adapter(LinearMap(6)), Q, D, qrels)
    config = replace(PLAIN, kind=kind, side=side, objective=objective, epochs=60, lr=0.02, rank=6, hidden=32)
    adapter = fit_adapter(Q, D, qrels, config)
    losses = [record["loss"] for record in adapter.history]
    assert adapter.side == side
    assert losses[-1] < 0.8 * losses[0]
    if side != "shared":  # one map for both cannot undo a turn, the loss says what it can
        assert accuracy(adapter, Q, D, qrels) > before


def test_the_loss_of_a_step_is_what_it_says():
    """Step 1, at the identity: the softmax of the vectors as they are; nothing to pull."""
    Q, D, qrels = problem(dtype=np.float64)
    adapter = fit_adapter(Q, D, qrels, replace(PLAIN, epochs=1, temperature=0.3, toward_identity=5.0))
    expected = dense_softmax(torch.from_numpy(Q), torch.from_numpy(D), [[i % 12] for i in range(24)], 0.3)
    assert adapter.history[0]["loss"] == pytest.approx(expected.item(), rel=1e-10)


def test_the_first_step_by_hand():
    """Adam's first step is lr in the direction of the sign of each gradient, here at 1/4 of a warmup of four."""
    Q, D, qrels = problem(dtype=np.float64)
    weight = torch.eye(6, dtype=torch.float64, requires_grad=True)
    value = dense_softmax(torch.from_numpy(Q) @ weight.T, torch.from_numpy(D), [[i % 12] for i in range(24)], 0.02)
    (gradient,) = torch.autograd.grad(value, weight)
    config = replace(PLAIN, epochs=2, bias=False, warmup=4, temperature=0.02)
    adapter = fit_adapter(Q, D, qrels, config)
    assert [record["lr"] for record in adapter.history] == [0, 0.0025]
    torch.testing.assert_close(
        adapter.query.weight.detach(), torch.eye(6, dtype=torch.float64) - 0.0025 * gradient.sign(), atol=1e-6, rtol=0
    )
    assert adapter.history[0]["grad_norm"] == pytest.approx(gradient.norm().item(), rel=1e-6)


def test_toward_the_identity():
    Q, D, qrels = problem()
    fits = [fit_adapter(Q, D, qrels, replace(PLAIN, toward_identity=weight)) for weight in (0, 10, 1000)]
    away = [adapter.departure().item() for adapter in fits]
    assert away[0] > 1.02 * away[1] > 10 * away[2] > 0


def test_published_training_is_that_of_a_loop_in_order():
    """In-batch negatives at scale 20, batches of 10 in file order, a short last one, two questions of a document in a
    batch as each other's negatives, no bias, AdamW 2e-5 with decay 0.01, 10% warmup, clip 1, 4 epochs."""
    Q, D, qrels = problem(46, 23, 32, turn=0.2, noise=2.0)
    qrels = {i: {i // 2: 1} for i in range(46)}
    linear = torch.nn.Linear(32, 32, bias=False)
    torch.nn.init.eye_(linear.weight)
    num_steps = 4 * 5
    optimizer = torch.optim.AdamW(linear.parameters(), lr=2e-5, weight_decay=0.01)
    warmup = int(0.1 * num_steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: i / warmup if i < warmup else (num_steps - i) / (num_steps - warmup)
    )
    for _ in range(4):
        for first in range(0, 46, 10):
            rows = list(range(first, min(first + 10, 46)))
            q = linear(torch.from_numpy(Q[rows]))
            d = torch.from_numpy(D[[row // 2 for row in rows]])
            scores = F.normalize(q) @ F.normalize(d).T * 20
            value = F.cross_entropy(scores, torch.arange(len(rows)))
            optimizer.zero_grad()
            value.backward()
            torch.nn.utils.clip_grad_norm_(linear.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    published = AdapterConfig(
        objective="in_batch",
        loss={"name": "in_batch_negatives", "temperature": 0.05},
        bias=False,
        merge_documents=False,
        shuffle=False,
        batch_size=10,
        epochs=4,
        lr=2e-5,
        weight_decay=0.01,
        warmup=warmup,
        schedule="linear",
        max_grad_norm=1.0,
        toward_identity=0.0,
        held_out=0.0,
    )
    adapter = fit_adapter(Q, D, qrels, published)
    moved = (linear.weight - torch.eye(32)).abs().max().item()
    assert moved > 1e-4
    torch.testing.assert_close(adapter.query.weight, linear.weight, rtol=0, atol=1e-7)
    # Here every document of a batch is there twice, so merged, every sum of exponentials is half.
    merged = fit_adapter(Q, D, qrels, replace(published, merge_documents=True))
    losses = [[record["loss"] for record in one.history] for one in (adapter, merged)]
    np.testing.assert_allclose(losses[0], np.array(losses[1]) + math.log(2), rtol=1e-5)


# These compare the documents that a query lists.
COMPARING = {"margin_mse", "listwise_kl", "listwise_cross_entropy", "triplet", "contrastive", "online_contrastive"}
COMPARING |= {"approx_ndcg", "ranknet", "pearson"}


@pytest.mark.parametrize("name", LOSSES)
def test_any_loss_is_taken(name):
    """Each gets the frozen vectors as references and grades as scores, and leaves finite weights."""
    nested = {"dims": [6, 4], "inner": {"name": "in_batch_negatives"}}
    options = {
        "matryoshka": nested,
        "sum": {"losses": [{"name": "in_batch_negatives"}, {"name": "toward_base"}], "weights": [1.0, 0.5]},
        "projected_distillation": {"student_dim": 6, "teacher_dim": 6},
        "quantized": {"precision": "int8", "inner": {"name": "in_batch_negatives"}},
    }
    Q, D, qrels = problem()
    spec = {"name": name, **options.get(name, {})}
    config = replace(PLAIN, objective="in_batch", loss=spec, batch_size=10, epochs=2)
    if name in COMPARING:
        with pytest.raises(ValueError, match=naming(name, 1, "negatives")):
            fit_adapter(Q, D, qrels, config)
        qrels = {i: {**grades, (i + 1) % 12: 0, (i + 5) % 12: 0} for i, grades in qrels.items()}
    adapter = fit_adapter(Q, D, qrels, config)
    assert all(parameter.isfinite().all() for parameter in adapter.parameters())
    assert len(adapter.history) == 6


@pytest.mark.parametrize("merge", [True, False])
def test_a_grade_of_0_makes_a_hard_negative(merge):
    """Step 1, at the identity, against the formula: triplets of what is listed; 2 is asked for twice, 3 has none."""
    Q, D, _ = problem(4, 6, dtype=np.float64)
    qrels = {0: {0: 1, 4: 0}, 1: {5: 0, 1: 2}, 2: {2: 1, 3: 1, 0: 0, 5: 0}, 3: {3: 1}}
    loss = {"name": "triplet", "margin": 0.5, "distance": "cosine"}
    config = replace(PLAIN, objective="in_batch", loss=loss, epochs=1, merge_documents=merge)
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (Q, D)]
    s = unit[0] @ unit[1].T
    triples = [(0, 0, 4), (1, 1, 5), (2, 2, 0), (2, 2, 5), (2, 3, 0), (2, 3, 5)]
    expected = np.mean([max(0, s[q, n] - s[q, p] + 0.5) for q, p, n in triples])
    assert fit_adapter(Q, D, qrels, config).history[0]["loss"] == pytest.approx(expected, rel=1e-10)
    # Their scores are the grades: margin_mse with margins of 1 and 2, of vectors as long as they came.
    config, s = replace(config, loss={"name": "margin_mse", "similarity": "dot"}), Q @ D.T
    margins = [(s[q, p] - s[q, n] - qrels[q][p]) ** 2 for q, p, n in triples]
    assert fit_adapter(Q, D, qrels, config).history[0]["loss"] == pytest.approx(np.mean(margins), rel=1e-10)


def test_hard_negatives_that_are_held_out_do_not_train():
    """Each document's question has all others as hard negatives: 9 of 12 documents train, so 8 triplets a question."""
    Q, D, _ = problem(12, 12, dtype=np.float64)
    qrels = {i: {j: int(j == i) for j in range(12)} for i in range(12)}
    loss = {"name": "triplet", "margin": 0.5, "distance": "cosine"}
    config = replace(PLAIN, objective="in_batch", loss=loss, epochs=1, held_out=0.25, seed=0)
    adapter = fit_adapter(Q, D, qrels, config)
    gone = np.random.default_rng(0).permutation(12)[:3].tolist()
    kept = [d for d in range(12) if d not in gone]
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (Q, D)]
    s = unit[0] @ unit[1].T
    expected = np.mean([max(0, s[q, n] - s[q, q] + 0.5) for q in kept for n in kept if n != q])
    assert adapter.history[1]["loss"] == pytest.approx(expected, rel=1e-10)


def test_all_answers_of_a_query_are_spared_in_a_batch():
    """Documents 0 and 1 answer query 0, 1 answers 2 as well: neither is a negative where it answers."""
    Q, D, _ = problem(3, 4, dtype=np.float64)
    qrels = {0: {0: 1, 1: 1}, 1: {2: 1}, 2: {1: 1}}
    loss = {"name": "in_batch_negatives", "temperature": 0.5}
    adapter = fit_adapter(Q, D, qrels, replace(PLAIN, objective="in_batch", loss=loss, epochs=1))
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (Q, D[:3])]
    s = np.exp(unit[0] @ unit[1].T / 0.5)
    pairs = [(q, d) for q, grades in qrels.items() for d in grades]
    others = [sum(s[q, n] for n in range(3) if n not in qrels[q]) for q, _ in pairs]
    expected = np.mean([-math.log(s[pair] / (s[pair] + other)) for pair, other in zip(pairs, others, strict=True)])
    assert adapter.history[0]["loss"] == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("name", ["embedding_distillation", "toward_base"])
def test_references_are_the_vectors_as_they_came(name):
    """Step 1, at the identity: nothing to learn from them yet, and something after a map of another start."""
    Q, D, qrels = problem(dtype=np.float64)
    config = replace(PLAIN, objective="in_batch", epochs=1, bias=False, loss={"name": name, "distance": "mse"})
    assert fit_adapter(Q, D, qrels, config).history[0]["loss"] == pytest.approx(0, abs=1e-20)
    start = fit_adapter(Q, D, qrels, replace(PLAIN, bias=False))
    assert fit_adapter(Q, D, qrels, config, start=start).history[0]["loss"] > 1e-3


def noisy(Q, D, targets):
    """Draws at every step."""
    return (Q * torch.rand_like(Q)).sum()


def test_a_loss_that_draws_follows_the_seed(monkeypatch):
    """The caller's random state is neither used nor moved."""
    monkeypatch.setitem(LOSSES, "noisy", noisy)
    Q, D, qrels = problem()
    configs = [replace(PLAIN, objective="in_batch", loss={"name": "noisy"}, epochs=8, seed=seed) for seed in (1, 1, 2)]
    histories = []
    for config, state in zip(configs, (5, 6, 5), strict=True):
        torch.manual_seed(state)
        before = torch.get_rng_state()
        histories.append(fit_adapter(Q, D, qrels, config).history)
        assert torch.equal(torch.get_rng_state(), before)
    assert histories[0] == histories[1] != histories[2]


def test_a_loss_with_parameters_is_trained_too():
    Q, D, qrels = problem()
    spec = {"name": "learnable_temperature", "temperature": 0.05}
    config = replace(PLAIN, objective="in_batch", loss=spec)
    fixed = replace(config, loss={"name": "in_batch_negatives", "temperature": 0.05})
    one, other = fit_adapter(Q, D, qrels, config), fit_adapter(Q, D, qrels, fixed)
    assert one.history[0]["loss"] == pytest.approx(other.history[0]["loss"], rel=1e-5)
    assert one.history[-1]["loss"] != pytest.approx(other.history[-1]["loss"], rel=1e-3)


def test_in_batch_of_everything_is_the_full_corpus():
    """One batch of all pairs, each document once, every one with a question: the same softmax, the same weights."""
    Q, D, qrels = problem(dtype=np.float64)
    qrels[3] = {3: 1, 7: 0}
    full = replace(PLAIN, temperature=0.05)
    batch = replace(PLAIN, objective="in_batch", loss={"name": "in_batch_negatives", "temperature": 0.05})
    del qrels[0]  # document 0 has query 12, so each document is in the batch
    one, other = (fit_adapter(Q, D, qrels, config) for config in (full, batch))
    torch.testing.assert_close(one.query.weight, other.query.weight, rtol=0, atol=1e-8)


@pytest.mark.parametrize("objective", ["full_corpus", "in_batch"])
def test_same_seed_same_bits(objective):
    Q, D, qrels = problem()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    config = AdapterConfig(
        objective=objective, kind="two_layer", hidden=4, batch_size=7, epochs=3, seed=3, eval_every=2
    )
    runs = [fit_adapter(Q, D, qrels, one) for one in (config, config, replace(config, seed=4))]
    assert runs[0].history == runs[1].history
    for a, b in zip(runs[0].parameters(), runs[1].parameters(), strict=True):
        assert torch.equal(a, b)
    assert runs[0].history != runs[2].history
    assert torch.equal(torch.get_rng_state(), state)


def test_order_of_batches():
    """Shuffled: another order every epoch, every question once; not shuffled: the same losses at lr about 0."""
    Q, D, qrels = problem()
    config = replace(PLAIN, batch_size=5, epochs=2, lr=1e-12)
    still = [record["loss"] for record in fit_adapter(Q, D, qrels, replace(config, shuffle=False)).history]
    moved = [record["loss"] for record in fit_adapter(Q, D, qrels, config).history]
    assert len(still) == len(moved) == 10
    assert still[:5] == pytest.approx(still[5:], rel=1e-5)
    assert moved[:5] != pytest.approx(moved[5:], rel=1e-3)
    weights = np.array([5, 5, 5, 5, 4]) / 24
    for losses in (still[5:], moved[:5], moved[5:]):
        assert np.dot(losses, weights) == pytest.approx(np.dot(still[:5], weights), rel=1e-4)


@pytest.mark.parametrize("at_once", [1, 5])
def test_documents_at_once_change_nothing(at_once):
    Q, D, qrels = problem(dtype=np.float64)
    for side in ("query", "both"):
        config = replace(PLAIN, side=side, held_out=0.2, epochs=5)
        one, other = (fit_adapter(Q, D, qrels, c) for c in (config, replace(config, documents_at_once=at_once)))
        for a, b in zip(one.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-9)
        assert [r["metrics"] for r in one.history if "metrics" in r] == [
            r["metrics"] for r in other.history if "metrics" in r
        ]


def test_more_documents_than_answers_are_negatives():
    """A document that nobody asks for is in the softmax."""
    Q, D, qrels = problem(dtype=np.float64)
    more = np.concatenate([D, Q[:3]])  # as near to some queries as can be
    first = [fit_adapter(Q, x, qrels, replace(PLAIN, epochs=1)).history[0]["loss"] for x in (D, more)]
    expected = dense_softmax(torch.from_numpy(Q), torch.from_numpy(more), [[i % 12] for i in range(24)], 0.02)
    assert first[1] == pytest.approx(expected.item(), rel=1e-9)
    assert first[1] > first[0]


# Held-out documents.


def test_held_out_documents_leave_training_and_come_back(monkeypatch):
    """Their questions are not trained on, they are no negatives, and validation ranks among all documents."""
    Q, D, qrels = problem(dtype=np.float64)
    adapter = fit_adapter(Q, D, qrels, replace(PLAIN, epochs=1, held_out=0.25, lr=1e-12, seed=0))
    # 3 of 12 documents, 2 questions each.
    assert [adapter.costs[name] for name in ("queries", "documents", "held_out_queries")] == [18, 9, 6]
    losses, order = [], np.random.default_rng(0).permutation(list(range(12)))[:3].tolist()
    kept = [d for d in range(12) if d not in order]
    queries = [i for i in range(24) if i % 12 in kept]
    answers = [[kept.index(i % 12)] for i in queries]
    losses = dense_softmax(torch.from_numpy(Q[queries]), torch.from_numpy(D[kept]), answers, 0.02)
    records = adapter.history
    assert records[1]["loss"] == pytest.approx(losses.item(), rel=1e-9)
    # By hand: the rank of each held-out question's document among all twelve.
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (Q, D)]
    scores = unit[0] @ unit[1].T
    ranks = np.array([1 + (scores[i] > scores[i, i % 12]).sum() for i in range(24) if i % 12 in order])
    assert records[0]["step"] == 0
    assert records[0]["metrics"] == pytest.approx(
        {
            "hit_rate@5": np.mean(ranks <= 5),
            "hit_rate@10": np.mean(ranks <= 10),
            "mrr@5": np.mean((ranks <= 5) / ranks),
            "mrr@10": np.mean((ranks <= 10) / ranks),
        }
    )


def test_what_hangs_together_is_held_out_together():
    """Queries 0 and 1 share document 0, 1 and 2 share document 2: held out all or none."""
    Q, D, _ = problem(8, 8)
    qrels = {0: {0: 1, 1: 1}, 1: {0: 1, 2: 1}, 2: {2: 1}, 3: {3: 1}, 4: {4: 1}, 5: {5: 1, 0: 0}}
    seen = set()
    for seed in range(12):
        config = replace(PLAIN, epochs=1, held_out=0.5, seed=seed)
        costs = fit_adapter(Q, D, qrels, config).costs
        seen.add((costs["queries"], costs["documents"], costs["held_out_queries"]))
    # 3 of 6 answering: documents 3 to 5, or the three that share questions, alone or after one or two of the others.
    assert seen == {(3, 5, 3), (2, 4, 4)}


def test_what_hangs_together_is_not_taken_where_it_is_far_too_much():
    """Of twenty documents, 0 to 15 share questions: the held-out fifth is the other four, whatever is drawn first."""
    Q, D, _ = problem(20, 20)
    qrels = {i: {i: 1, **({i + 1: 1} if i < 15 else {})} for i in range(20)}
    for seed in range(6):
        costs = fit_adapter(Q, D, qrels, replace(PLAIN, epochs=1, held_out=0.2, seed=seed)).costs
        assert (costs["queries"], costs["documents"], costs["held_out_queries"]) == (16, 16, 4)
    # One of 20 is asked for, but documents come in groups of five: five.
    qrels = {i: dict.fromkeys(range(i * 5, i * 5 + 5), 1) for i in range(4)}
    costs = fit_adapter(Q, D, qrels, replace(PLAIN, epochs=1, held_out=0.05)).costs
    assert (costs["queries"], costs["documents"], costs["held_out_queries"]) == (3, 15, 1)


def test_the_best_step_is_kept():
    Q, D, qrels = problem(noise=0.8)
    config = replace(PLAIN, held_out=0.3, epochs=40, eval_every=5, lr=0.2)
    adapter = fit_adapter(Q, D, qrels, config)
    values = {r["step"]: r["metrics"]["mrr@10"] for r in adapter.history if "metrics" in r}
    assert list(values) == [0, 5, 10, 15, 20, 25, 30, 35, 40]
    best = adapter.costs["best_step"]
    assert best == max(values, key=values.__getitem__)
    assert 0 < best < 40
    # It has the weights of that step: those of a run that ends there, which is the same run so far.
    shorter = fit_adapter(Q, D, qrels, replace(config, epochs=best))
    assert torch.equal(shorter.query.weight, adapter.query.weight)


def test_the_identity_competes():
    Q, D, qrels = problem(turn=0, noise=0)
    adapter = fit_adapter(Q, D, qrels, replace(PLAIN, held_out=0.3, lr=10.0))
    assert adapter.costs["best_step"] == 0
    assert torch.equal(adapter.query.weight, torch.eye(6))
    # Of steps that are as good the first is kept.
    adapter = fit_adapter(Q, D, qrels, replace(PLAIN, held_out=0.3, lr=1e-6))
    assert {r["metrics"]["mrr@10"] for r in adapter.history if "metrics" in r} == {1.0}
    assert adapter.costs["best_step"] == 0


def test_weights_that_are_no_numbers_are_no_success():
    """Step 1 leaves the range of float32; no step after it would tell. As the last one, without a choice, an error."""
    Q, D, qrels = problem()
    config = replace(PLAIN, lr=3e38, epochs=1)
    adapter = fit_adapter(Q, D, qrels, replace(config, held_out=0.3))
    assert [record["metrics"]["mrr@10"] for record in adapter.history if "metrics" in record][1:] == [0]
    assert torch.equal(adapter.query.weight, torch.eye(6))
    with pytest.raises(ValueError, match=naming("step", 1, "weights", "finite", 1e39)):
        fit_adapter(Q, D, qrels, replace(config, lr=1e39))


def test_a_loss_that_is_not_finite_is_not_the_option_of_that_name():
    with pytest.raises(ValueError, match=naming("step", "nan")) as caught:
        fit_adapter(*problem(), replace(PLAIN, lr=1e38, epochs=50))
    assert as_typed(str(caught.value), Options, []) == str(caught.value)


def test_patience_stops():
    Q, D, qrels = problem(turn=0, noise=0)
    config = replace(PLAIN, held_out=0.3, lr=10.0, patience=2, eval_every=3, epochs=40, batch_size=4)
    history = fit_adapter(Q, D, qrels, config).history
    assert [r["step"] for r in history if "metrics" in r] == [0, 3, 6]
    assert history[-1]["step"] == 6


# Where it starts, what it gives.


def test_documents_that_all_answer_are_no_training_signal(recwarn):
    Q, D, _ = problem()
    fit_adapter(Q[:2], D[:2], {0: {0: 1}, 1: {0: 1, 1: 1}}, PLAIN)
    assert not recwarn
    with pytest.warns(UserWarning, match=naming("every", "training", "signal")):
        fit_adapter(Q[:2], D[:2], {0: {0: 1, 1: 1}, 1: {0: 1, 1: 1}}, PLAIN)
    with pytest.warns(UserWarning, match=naming("every", "training", "signal")):
        fit_adapter(Q[:1], D[:2], {0: {0: 1}}, PLAIN, source=np.array([0, 0]))


def test_warm_start():
    Q, D, qrels = problem()
    first = fit_adapter(Q, D, qrels, PLAIN)
    before = first.query.weight.clone()
    again = fit_adapter(Q, D, qrels, PLAIN, start=first)
    assert again.history[0]["loss"] < first.history[0]["loss"]
    assert torch.equal(first.query.weight, before)
    for change in ({"bias": False}, {"side": "both"}, {"kind": "low_rank"}):
        with pytest.raises(ValueError, match=naming("start", ("query", first.query.settings), *change.values())):
            fit_adapter(Q, D, qrels, replace(PLAIN, **change), start=first)


def test_a_start_of_another_base_is_refused():
    Q, D, qrels = problem()
    bases = [Base("model", 6, {"query": letter * 64}) for letter in "ab"]
    start = fit_adapter(Q, D, qrels, PLAIN, base=bases[0])
    assert fit_adapter(Q, D, qrels, PLAIN, start=start, base=bases[0]).base == bases[0]
    with pytest.raises(ValueError, match=naming("model", "query", "a" * 12, ..., "b" * 12)):
        fit_adapter(Q, D, qrels, PLAIN, start=start, base=bases[1])
    with pytest.warns(UserWarning, match=naming("adapter", "model")):
        fit_adapter(Q, D, qrels, PLAIN, start=fit_adapter(Q, D, qrels, PLAIN), base=bases[0])


def test_output_folder(tmp_path):
    Q, D, qrels = problem()
    base = Base("model", 6, {"query": "a" * 64})
    adapter = fit_adapter(Q, D, qrels, PLAIN, base=base, normalize=False, out=tmp_path / "out")
    found = Adapter.load(tmp_path / "out")
    assert (found.base, found.normalize) == (base, False)
    assert torch.equal(found.query.weight, adapter.query.weight)
    lines = (tmp_path / "out" / "train.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == adapter.history
    assert AdapterConfig(**json.loads((tmp_path / "out" / "config.json").read_text())) == PLAIN
    assert adapter.costs["seconds"] > 0


def test_other_dimensions():
    Q, D, qrels = problem(dtype=np.float64)
    for side in ("both", "shared"):
        for out_dim in (3, 9):
            adapter = fit_adapter(Q, D, qrels, replace(PLAIN, side=side, out_dim=out_dim))
            assert adapter.transform(D, "document").shape == (12, out_dim)
            assert adapter.query.weight.dtype is torch.float64


def test_embeddings_are_left_as_they_were():
    Q, D, qrels = problem()
    copies = Q.copy(), D.copy(), json.dumps(qrels)
    for array in (Q, D):
        array.flags.writeable = False
    fit_adapter(Q, D, qrels, AdapterConfig(epochs=2))
    np.testing.assert_array_equal(Q, copies[0])
    np.testing.assert_array_equal(D, copies[1])
    assert json.dumps(qrels) == copies[2]


def broken(array, row, value):
    array = array.copy()
    array[row] = value
    return array


Q0, D0, R0 = problem()


@pytest.mark.parametrize(
    ("arguments", "config", "facts"),
    [
        ((Q0, D0[:, :4], R0), {}, ("queries", ..., 6, ..., "documents", ..., 4)),
        ((Q0[0], D0, R0), {}, ("query", [6], "float32", "[rows, features]")),
        ((Q0, D0.astype(int), R0), {}, ("document", [12, 6], "int64")),
        ((Q0, D0[:0], R0), {}, ("document", [0, 6])),
        ((broken(Q0, 3, np.nan), D0, R0), {}, ("query", 3, "finite")),
        ((broken(Q0, 3, 0), D0, R0), {}, ("query", 3, "zero")),
        ((Q0, broken(D0, [4, 7], np.inf), R0), {}, ("document", 4, "finite", 1)),
        ((Q0, broken(D0, 4, 0), R0), {"documents_at_once": 2}, ("document", 4, "zero")),
        ((Q0, D0, {24: {0: 1}}), {}, ("qrels", "query", 24, 0, 23)),
        ((Q0, D0, {0: {12: 1}}), {}, ("qrels", "document", 12, 0, 11)),
        ((Q0, D0, {0: {-1: 1}}), {}, ("qrels", "document", -1, 0, 11)),
        ((Q0, D0, {"q": {0: 1}}), {}, ("qrels", "query", "'q'", 0, 23)),
        ((Q0, D0, {}), {}, ("qrels", "grade", 0, 0)),
        ((Q0, D0, {0: {0: 0}, 1: {}}), {}, ("qrels", "grade", 2, 0)),
        ((Q0, D0, {0: {0: 1}}), {"held_out": 0.1}, ("held_out", 0.1, 1)),
        ((Q0, D0, R0), {"out_dim": 3}, ("features", (6, 3), ..., "queries", ..., (6, 6), ..., "documents")),
        (
            (Q0, D0, R0),
            {"out_dim": 3, "side": "document"},
            ("features", (6, 6), ..., "queries", ..., (6, 3), ..., "documents"),
        ),
        ((Q0, D0, R0), {"lr": 1e38, "epochs": 50}, ("step", "loss", "nan", "norm")),
    ],
)
def test_wrong_input_is_refused(tmp_path, arguments, config, facts):
    with pytest.raises(ValueError, match=naming(*facts)):
        fit_adapter(*arguments, replace(PLAIN, **config), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "facts"),
    [
        ({"kind": "cubic"}, ("kind", "cubic", "linear", "two_layer")),
        ({"rank": 0}, ("rank", 0, 1)),
        ({"patience": 0}, ("patience", 0, 1)),
        ({"lr": 0.0}, ("lr", 0.0, 0)),
        ({"temperature": math.inf}, ("temperature", "inf", 0)),
        ({"toward_identity": -1.0}, ("toward_identity", -1.0, 0)),
        ({"held_out": 1.0}, ("held_out", 1.0, 0, 1)),
        ({"select": "ndcg@10"}, ("select", "ndcg@10", "mrr@K", "hit_rate@K")),
        ({"select": "mrr@0"}, ("select", "mrr@0", "mrr@K", "hit_rate@K")),
        ({"loss": {"name": "nothing"}}, ("loss", "name", "nothing", "in_batch_negatives")),
        ({"epochs": 1.5}, ("epochs", 1.5, "int")),
    ],
)
def test_wrong_settings_are_refused(settings, facts):
    with pytest.raises(ValueError, match=naming(*facts)):
        AdapterConfig(**settings)


# Closed forms.


def test_ridge_by_hand():
    """q = (1, 0) -> d = (0, 1) and strength 1: W = (d q^T + I) (q q^T + I)^-1 = [[1, 0], [1, 1]] diag(1/2, 1)."""
    adapter = ridge(np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]]), strength=1.0)
    assert adapter.side == "query"
    torch.testing.assert_close(adapter.query.weight.detach(), torch.tensor([[0.5, 0.0], [0.5, 1.0]]))
    assert adapter.query.bias is None


def test_procrustes_by_hand():
    """The axes, turned by 90 degrees and stretched: the turn."""
    adapter = procrustes(np.eye(2), np.array([[0.0, 2.0], [-3.0, 0.0]]))
    torch.testing.assert_close(adapter.query.weight.detach(), torch.tensor([[0.0, -1.0], [1.0, 0.0]]))


@pytest.mark.parametrize("strength", [0.0, 0.3, 50.0])
def test_ridge_is_optimal(strength):
    Q, X = draw(20), draw(20, seed=1)
    W = ridge(Q, X, strength=strength).query.weight.detach().double().requires_grad_()
    target = ((torch.from_numpy(Q) @ W.T - torch.from_numpy(X)) ** 2).sum() + strength * ((W - torch.eye(6)) ** 2).sum()
    (gradient,) = torch.autograd.grad(target, W)
    assert gradient.abs().max().item() < 1e-4  # the weights are rounded to float32
    large = ridge(Q, X, strength=1e9).query.weight
    torch.testing.assert_close(large.detach(), torch.eye(6), rtol=0, atol=1e-5)


def test_procrustes_is_orthogonal_and_optimal():
    Q, X = draw(20), draw(20, seed=1)
    W = procrustes(Q, X).query.weight.detach().double().numpy()
    np.testing.assert_allclose(W.T @ W, np.eye(6), atol=1e-6)

    def distance(W):
        return ((Q @ W.T - X) ** 2).sum()

    for seed in range(20):
        turn, _ = np.linalg.qr(np.eye(6) + 0.05 * draw(6, seed=seed))
        turn *= np.sign(np.diag(turn))
        assert distance(turn @ W) > distance(W)
    # A turn is found again exactly.
    turn, _ = np.linalg.qr(draw(6, seed=3))
    np.testing.assert_allclose(procrustes(Q, Q @ turn.T).query.weight.detach(), turn, atol=1e-6)


def test_relevant_pairs():
    Q, D = draw(3), draw(4, seed=1)
    queries, positives = relevant_pairs(Q, D, {2: {0: 1, 3: 2}, 0: {1: 0, 2: 1}})
    np.testing.assert_array_equal(queries, Q[[2, 2, 0]])
    np.testing.assert_array_equal(positives, D[[0, 3, 2]])
    with pytest.raises(ValueError, match=naming("qrels", 1)):
        relevant_pairs(Q, D, {0: {1: 0}})


def test_closed_forms_refuse():
    Q, X = draw(4), draw(4, seed=1)
    for solve in (procrustes, lambda q, x: ridge(q, x, strength=1.0)):
        with pytest.raises(ValueError, match=naming("queries", "positives", [4, 6], ..., [3, 6])):
            solve(Q, X[:3])
        with pytest.raises(ValueError, match=naming("positive", 2, "finite")):
            solve(Q, broken(X, 2, np.nan))
    with pytest.raises(ValueError, match=naming("strength", -1, 0)):
        ridge(Q, X, strength=-1)
    with pytest.raises(ValueError, match=naming("strength", 0, 0, "dimensions", 6)):
        ridge(Q, X, strength=0)


def test_build_map_and_adapter_agree_on_kinds():
    assert AdapterConfig.__annotations__["kind"].__args__ == ("linear", "low_rank", "two_layer")
    assert build_map("linear", 3).settings == {"kind": "linear", "in_features": 3, "out_features": 3, "bias": True}


def test_queries_are_ranked_some_at_a_time():
    """Five or all at once, whatever the parts of the documents are."""
    Q, D, qrels = problem(dtype=np.float64)
    relevant = {query: sorted(grades) for query, grades in qrels.items()}
    adapter = fit_adapter(Q, D, qrels, replace(PLAIN, side="both"))
    ranked = torch.from_numpy(Q), Documents(D, at_once=7, dtype=torch.float64), relevant, "mrr@3", adapter
    found = [_metrics(*ranked, at_once=n) for n in (5, 24, 4_096)]
    assert found[0] == found[1] == found[2]


def test_float64_is_not_asked_of_a_device_without_it(monkeypatch):
    monkeypatch.setattr(devices, "has_float64", lambda device: False)
    Q, D, qrels = problem(dtype=np.float64)
    assert fit_adapter(Q, D, qrels, PLAIN).query.weight.dtype is torch.float32


def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match=naming("device", "cuda:99", "cpu")):
        fit_adapter(*problem(), PLAIN, device="cuda:99")


@pytest.mark.parametrize("objective", ["full_corpus", "in_batch"])
@pytest.mark.parametrize("at_once", [5, 64])
def test_every_device_fits_the_same(device, objective, at_once):
    Q, D, qrels = problem()
    config = replace(PLAIN, objective=objective, side="both", held_out=0.2, documents_at_once=at_once)
    source = np.arange(len(D)) // 2
    qrels = {query: {document // 2: 1 for document in grades} for query, grades in qrels.items()}
    expected, found = (fit_adapter(Q, D, qrels, config, source=source, device=where) for where in ("cpu", device))
    assert found.query.weight.device.type == device.type
    torch.testing.assert_close(found.query.weight.cpu(), expected.query.weight, rtol=1e-3, atol=1e-4)
