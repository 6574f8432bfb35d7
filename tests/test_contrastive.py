"""contrastive.py: by hand, against sentence-transformers, against a loop; and what holds for every loss of LOSSES."""

import math

import pytest
import torch
import torch.nn.functional as F

from embedft import LOSSES, Targets
from embedft.losses.contrastive import in_batch_negatives

every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


def random_vectors(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype).requires_grad_()


def random_targets(num_queries: int, num_documents: int, seed: int) -> Targets:
    """Everything that data can hold: shared documents, several positives or none, -1, pairs known besides."""
    generator = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator)

    group = torch.stack([torch.randperm(num_documents, generator=generator)[:3] for _ in range(num_queries)])
    group[integers(0, 4, *group.shape) == 0] = -1
    known = torch.stack([integers(0, num_queries, 5), integers(0, num_documents, 5)], dim=1)
    return Targets(group, integers(0, 3, *group.shape), known)


def loss_and_gradients(loss, Q, D, targets, **options):
    value = loss(Q, D, targets, **options)
    return value.detach(), *torch.autograd.grad(value, (Q, D))


def test_by_hand():
    """Cosines 1 and 0.6 at temperature 1: each query loses -log(e^1 / (e^1 + e^0.6)) = log(1 + e^-0.4)."""
    Q, D = torch.tensor([[2.0, 0.0], [3.0, 4.0]]), torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    loss = in_batch_negatives(Q, D, Targets(torch.tensor([[0], [1]])), temperature=1.0)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-0.4)), rel=1e-6)
    assert loss.item() == pytest.approx(0.513015, abs=1e-6)
    # Inner products: 2 against 1.2 for the first query, 5 against 3 for the second.
    loss = in_batch_negatives(Q, D, Targets(torch.tensor([[0], [1]])), temperature=2.0, similarity="dot")
    assert loss.item() == pytest.approx((math.log(1 + math.exp(-0.4)) + math.log(1 + math.exp(-1.0))) / 2, rel=1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-6)])
@pytest.mark.parametrize("num_negatives", [0, 1, 3])
def test_equals_sentence_transformers(num_negatives, dtype, tolerance):
    """Value, and gradients on queries and documents relative to their largest."""
    st_losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    num_queries, num_columns = 10, 1 + num_negatives
    Q = random_vectors(num_queries, 16, dtype=dtype)
    D = random_vectors(num_queries * num_columns, 16, seed=1, dtype=dtype)
    group = torch.arange(num_queries * num_columns).view(num_columns, num_queries).T
    ours = loss_and_gradients(in_batch_negatives, Q, D, Targets(group))

    reference = st_losses.MultipleNegativesRankingLoss(model=None)
    value = reference.compute_loss_from_embeddings([Q, *D.chunk(num_columns)], labels=None)
    theirs = value.detach(), *torch.autograd.grad(value, (Q, D))
    for our, their in zip(ours, theirs, strict=True):
        assert our.dtype is dtype
        assert (our - their).abs().max() <= tolerance * their.abs().max()


def naive_in_batch_negatives(Q, D, targets, temperature):
    """The docstring's formula, a query and a document at a time."""
    known = set() if targets.known is None else {tuple(pair) for pair in targets.known.tolist()}
    losses = []
    for i, listed in enumerate(targets.group.tolist()):
        relevance = [1] + [0] * (len(listed) - 1) if targets.relevance is None else targets.relevance[i].tolist()
        positives = [j for j, grade in zip(listed, relevance, strict=True) if j >= 0 and grade > 0]
        similarity = [F.cosine_similarity(q, d, dim=0) / temperature for q, d in ((Q[i], document) for document in D)]
        negatives = [s.exp() for j, s in enumerate(similarity) if j not in positives and (i, j) not in known]
        of_query = [-(similarity[j].exp() / (similarity[j].exp() + sum(negatives))).log() for j in positives]
        if positives:
            losses.append(sum(of_query) / len(of_query))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("seed", range(5))
def test_equals_a_loop(seed):
    Q, D, targets = random_vectors(7, 5, seed=seed), random_vectors(9, 5, seed=seed + 100), random_targets(7, 9, seed)
    ours = loss_and_gradients(in_batch_negatives, Q, D, targets, temperature=0.2)
    theirs = loss_and_gradients(naive_in_batch_negatives, Q, D, targets, temperature=0.2)
    for our, their in zip(ours, theirs, strict=True):
        assert (our - their).abs().max() <= 1e-9 * their.abs().max()


def test_a_known_positive_is_no_negative():
    """Two questions of one document, and a document known to answer the first: none of them pushes the other away."""
    Q, D = random_vectors(3, 4), random_vectors(3, 4, seed=1)
    targets = Targets(torch.tensor([[0], [0], [1]]), known=torch.tensor([[0, 2], [1, 2], [2, 2]]))
    _, _, grad_D = loss_and_gradients(in_batch_negatives, Q, D, targets)
    assert grad_D[2].tolist() == [0.0] * 4
    with_it = in_batch_negatives(Q[:2], D[:1], Targets(torch.tensor([[0], [0]])))
    assert with_it.item() == 0.0


def test_queries_without_a_positive_count_nowhere():
    Q, D = random_vectors(3, 4), random_vectors(3, 4, seed=1)
    with_it = in_batch_negatives(Q, D, Targets(torch.tensor([[0], [1], [-1]])))
    without = in_batch_negatives(Q[:2], D, Targets(torch.tensor([[0], [1]])))
    torch.testing.assert_close(with_it, without, rtol=1e-12, atol=0)
    nothing, *gradients = loss_and_gradients(in_batch_negatives, Q, D, Targets(torch.tensor([[-1], [-1], [-1]])))
    assert nothing.item() == 0.0
    assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_refuses_a_temperature_that_is_not_above_zero(temperature):
    Q = torch.ones(1, 2)
    with pytest.raises(ValueError, match=f"temperature is {temperature}, expected above 0"):
        in_batch_negatives(Q, Q, Targets(torch.tensor([[0]])), temperature=temperature)


# For every loss: being in LOSSES enrols it.


@every_loss
def test_gradient_check(loss):
    Q, D = random_vectors(4, 3), random_vectors(6, 3, seed=1)
    for targets in (Targets(torch.tensor([[0, 4], [1, 5], [2, 0], [3, 3]])), random_targets(4, 6, seed=2)):
        assert torch.autograd.gradcheck(lambda q, d, targets=targets: loss(q, d, targets), (Q, D))


EDGES = {
    "a batch of one": (1, 1, Targets(torch.tensor([[0]]))),
    "one query, one hard negative": (1, 2, Targets(torch.tensor([[0, 1]]))),
    "no negative at all": (2, 1, Targets(torch.tensor([[0], [0]]))),
    "all documents known": (2, 2, Targets(torch.tensor([[0], [1]]), known=torch.tensor([[0, 1], [1, 0]]))),
    "nothing listed": (2, 2, Targets(torch.tensor([[-1], [-1]]))),
    "a hard negative that is not there": (2, 3, Targets(torch.tensor([[0, 2], [1, -1]]))),
}


@every_loss
@pytest.mark.parametrize("fill", ["random", "equal", "zero", "tiny", "huge"])
@pytest.mark.parametrize("edge", EDGES)
def test_value_and_gradients_are_finite(loss, edge, fill):
    num_queries, num_documents, targets = EDGES[edge]
    Q, D = (random_vectors(n, 4, seed=n, dtype=torch.float32).detach() for n in (num_queries, num_documents))
    if fill in ("equal", "zero"):
        Q, D = (torch.full_like(x, float(fill == "equal")) for x in (Q, D))
    elif fill != "random":
        Q, D = (x * {"tiny": 1e-15, "huge": 1e15}[fill] for x in (Q, D))
    for result in loss_and_gradients(loss, Q.requires_grad_(), D.requires_grad_(), targets):
        assert torch.isfinite(result).all()


@every_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(loss, dtype):
    Q, D = (random_vectors(n, 8, seed=n, dtype=torch.float32).detach().to(dtype) for n in (3, 4))
    targets = Targets(torch.tensor([[0, 3], [1, 3], [2, 3]]))
    value, grad_Q, grad_D = loss_and_gradients(loss, Q.requires_grad_(), D.requires_grad_(), targets)
    assert (value.dtype, grad_Q.dtype, grad_D.dtype) == (torch.float32, dtype, dtype)
    torch.testing.assert_close(value, loss(Q.float(), D.float(), targets), rtol=1e-6, atol=0)
    assert loss(Q.double(), D.double(), targets).dtype is torch.float64


@every_loss
def test_the_order_of_documents_and_queries_is_no_matter(loss):
    Q, D, targets = random_vectors(7, 5), random_vectors(9, 5, seed=1), random_targets(7, 9, seed=3)
    value, grad_Q, grad_D = loss_and_gradients(loss, Q, D, targets)
    queries, documents = (torch.randperm(n, generator=torch.Generator().manual_seed(n)) for n in (7, 9))
    place_of_query, place_of_document = queries.argsort(), documents.argsort()
    moved = Targets(
        torch.where(targets.group < 0, -1, place_of_document[targets.group])[queries],
        targets.relevance[queries],
        torch.stack([place_of_query[targets.known[:, 0]], place_of_document[targets.known[:, 1]]], dim=1),
    )
    Q_moved, D_moved = (x.detach()[order].requires_grad_() for x, order in ((Q, queries), (D, documents)))
    found, found_grad_Q, found_grad_D = loss_and_gradients(loss, Q_moved, D_moved, moved)
    torch.testing.assert_close(found, value, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found_grad_Q, grad_Q[queries], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found_grad_D, grad_D[documents], rtol=1e-9, atol=1e-12)


@every_loss
def test_mutates_nothing(loss):
    Q, D, targets = random_vectors(7, 5), random_vectors(9, 5, seed=1), random_targets(7, 9, seed=3)
    before = [x.detach().clone() for x in (Q, D, targets.group, targets.relevance, targets.known)]
    loss(Q, D, targets).backward()
    for old, new in zip(before, (Q, D, targets.group, targets.relevance, targets.known), strict=True):
        assert torch.equal(old, new)
