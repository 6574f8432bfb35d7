"""guided.py: by hand, against sentence-transformers with stored vectors, against a loop."""

import math

import pytest
import torch
import torch.nn.functional as F
from loss_checks import PRECISIONS, assert_equal, loss_and_gradients, random_pair, random_vectors
from naming import naming
from test_contrastive import EDGES, identities, random_targets
from torch import nn

from embedft import Targets
from embedft.losses.contrastive import in_batch_negatives
from embedft.losses.guided import guided_in_batch_negatives

APART = {"contrast_queries": False, "contrast_positives": False}


def guided(targets: Targets, *guide: torch.Tensor) -> Targets:
    return Targets(
        targets.group, targets.relevance, targets.known, targets.document, references={"guide": tuple(guide)}
    )


def test_by_hand():
    """The guide has cosines 0.8 with the positive, 0.6 and 0.96 with the two others: the last is left out."""
    Q, D = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.8, 0.6]])
    guide_Q, guide_D = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.8, 0.6], [0.6, 0.8], [0.96, 0.28]])
    targets = guided(Targets(torch.tensor([[0]])), guide_Q, guide_D)

    def loss(**options) -> float:
        return guided_in_batch_negatives(Q, D, targets, temperature=1.0, **options).item()

    # Only the cosine of 0.6 is left beside the positive's 1.
    assert loss() == pytest.approx(math.log(1 + math.exp(-0.4)), rel=1e-6)
    assert loss(margin=0.1) == loss()
    assert loss(margin=0.3) == 0.0  # above 0.5: both
    assert loss(margin=-0.2) == pytest.approx(math.log(1 + math.exp(-0.4) + math.exp(-0.2)), rel=1e-6)
    # A fifth of 0.8 below it is 0.64, three tenths below it 0.56.
    assert loss(margin=0.2, margin_strategy="relative") == loss()
    assert loss(margin=0.3, margin_strategy="relative") == 0.0


def test_what_the_guide_finds_as_near_as_the_positive_stays():
    """Only above the limit is left out: document 1 is to the guide what document 0 is."""
    Q, D = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    guide = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    loss = guided_in_batch_negatives(Q, D, guided(Targets(torch.tensor([[0]])), *guide), temperature=1.0)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-0.4)), rel=1e-6)


def reference_loss(Q, D, guide_Q, guide_D, num_columns, monkeypatch, **options):
    """GISTEmbedLoss with the vectors of model and guide handed to it."""
    gist = pytest.importorskip("sentence_transformers.sentence_transformer.losses.gist_embed")
    reference = gist.GISTEmbedLoss.__new__(gist.GISTEmbedLoss)
    nn.Module.__init__(reference)
    columns = {"model": [Q, *D.chunk(num_columns)], "guide": [guide_Q, *guide_D.chunk(num_columns)]}
    monkeypatch.setattr(gist, "embed_columns", lambda which, features: columns[which])
    settings = {"temperature": 0.01, "margin_strategy": "absolute", "margin": 0.0}
    settings |= {"contrast_anchors": True, "contrast_positives": True, "gather_across_devices": False}
    settings |= {"must_retokenize": False, "model": "model", "guide": "guide"} | options
    for name, value in settings.items():
        setattr(reference, name, value)
    reference.similarity_fct = nn.CosineSimilarity(dim=-1)
    reference.cross_entropy_loss = nn.CrossEntropyLoss()
    value = reference([], None)
    return value.detach(), *torch.autograd.grad(value, (Q, D))


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize("fill", ["random", "duplicates", "some zero"])
@pytest.mark.parametrize("num_negatives", [0, 1])
@pytest.mark.parametrize("contrast", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("margin", [("absolute", 0.0), ("absolute", 0.2), ("relative", 0.1), ("relative", 0.6)])
def test_equals_sentence_transformers(margin, contrast, num_negatives, fill, dtype, tolerance, monkeypatch):
    """The reference takes one hard negative a query at most. The temperature is one that float32 bears."""
    Q, D, group = random_pair(8, 1 + num_negatives, duplicates=fill == "duplicates", dtype=dtype)
    if fill == "some zero":
        with torch.no_grad():
            Q[3], D[5] = 0, 0
    guide_Q = Q.detach()[:, :6] + random_vectors(8, 6, seed=5, dtype=dtype).detach()
    guide_D = D.detach()[:, :6] + random_vectors(len(D), 6, seed=6, dtype=dtype).detach()
    # The guide has to find something of what is relevant, or nothing is left.
    guide_D[:8] += guide_Q
    strategy, size = margin
    options = {"temperature": 0.1, "margin_strategy": strategy, "margin": size}
    theirs = reference_loss(
        *(Q, D, guide_Q, guide_D, 1 + num_negatives, monkeypatch),
        contrast_anchors=contrast[0],
        contrast_positives=contrast[1],
        **options,
    )
    options |= {"contrast_queries": contrast[0], "contrast_positives": contrast[1]}
    targets = guided(Targets(group), guide_Q, guide_D)
    assert_equal(loss_and_gradients(guided_in_batch_negatives, Q, D, targets, **options), theirs, tolerance)


def naive_guided(Q, D, targets, temperature, limit, contrast_queries, contrast_positives):
    positives, hard, relevant = identities(targets)
    listed = relevant | {(i, j) for i, of_query in enumerate(hard) for j in of_query}
    guide_Q, guide_D = targets.references["guide"]
    numbers = range(len(D))

    def cosine(x, y):
        return F.cosine_similarity(x, y, dim=0)

    losses = []
    for i, q in enumerate(Q):
        of_query = []
        for p in positives[i]:
            highest = limit(cosine(guide_Q[i], guide_D[p]))
            score = cosine(q, D[p]) / temperature
            pool = [score]
            pool += [
                cosine(q, D[n]) / temperature
                for n in numbers
                if (i, n) not in relevant and cosine(guide_Q[i], guide_D[n]) <= highest
            ]
            for r in range(len(Q)) if contrast_queries else ():
                shared = any((i, j) in relevant and (r, j) in relevant for j in numbers)
                if r != i and not shared and cosine(guide_Q[i], guide_Q[r]) <= highest:
                    pool.append(cosine(q, Q[r]) / temperature)
            for n in sorted({j for one in positives for j in one}) if contrast_positives else ():
                together = any((r, p) in listed and (r, n) in listed for r in range(len(Q)))
                if n != p and not together and cosine(guide_D[p], guide_D[n]) <= highest:
                    pool.append(cosine(D[p], D[n]) / temperature)
            of_query.append(torch.stack(pool).logsumexp(dim=0) - score)
        if of_query:
            losses.append(sum(of_query) / len(of_query))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("contrast", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("margin", [("absolute", 0.1), ("relative", 0.4), ("absolute", -0.5)])
def test_equals_a_loop(margin, contrast, seed):
    """With shared documents, several positives and known ones; a margin below 0 lets the guide leave out little."""
    Q, D, targets = random_vectors(6, 5, seed=seed), random_vectors(8, 5, seed=seed + 100), random_targets(6, 8, seed)
    targets = guided(targets, random_vectors(6, 3, seed=9).detach(), random_vectors(8, 3, seed=10).detach())
    strategy, size = margin
    flags = {"temperature": 0.2, "contrast_queries": contrast[0], "contrast_positives": contrast[1]}
    ours = loss_and_gradients(guided_in_batch_negatives, Q, D, targets, margin=size, margin_strategy=strategy, **flags)
    limits = {"absolute": lambda g: g - size, "relative": lambda g: g - g.abs() * size}
    assert_equal(ours, loss_and_gradients(naive_guided, Q, D, targets, limit=limits[strategy], **flags), 1e-9)


def test_windows_are_one_document_to_the_guide_too():
    """Windows of one document each side: by the best window of both, the loss of the documents worked out apart."""
    Q, D = random_vectors(3, 4), random_vectors(6, 4, seed=1)
    guide_Q, guide_D = random_vectors(3, 3, seed=2).detach(), random_vectors(6, 3, seed=3).detach()
    document = torch.tensor([0, 1, 2, 2, 1, 0])
    targets = guided(Targets(torch.tensor([[0], [1], [2]]), document=document), guide_Q, guide_D)

    def by_document(x, y):
        cosines = F.normalize(x, dim=1) @ F.normalize(y, dim=1).T
        return torch.stack([cosines[:, document == m].max(dim=1).values for m in range(3)], dim=1)

    scores, said = by_document(Q, D) / 0.1, by_document(guide_Q, guide_D)
    kept = (said <= said.diagonal()[:, None]) | torch.eye(3, dtype=torch.bool)
    expected = F.cross_entropy(scores.masked_fill(~kept, float("-inf")), torch.arange(3))
    theirs = expected.detach(), *torch.autograd.grad(expected, (Q, D))
    assert 0 < (~kept).sum() < 6
    assert_equal(loss_and_gradients(guided_in_batch_negatives, Q, D, targets, temperature=0.1, **APART), theirs, 1e-9)


def test_windows_of_the_guide_by_hand():
    """The limit is 0.8. Document 1 has cosines 0.81 and 0.75 by the guide: the best is above it, the soft maximum
    0.75 + 0.06 / (1 + e^-1.2) = 0.796 is not. The model finds 0.6 in both windows."""
    Q, D = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.6, 0.8]])
    guide_D = torch.tensor([[c, math.sqrt(1 - c * c)] for c in (0.8, 0.81, 0.75)])
    targets = guided(Targets(torch.tensor([[0]]), document=torch.tensor([0, 1, 1])), Q, guide_D)
    options = {"temperature": 1.0, **APART}
    assert guided_in_batch_negatives(Q, D, targets, **options).item() == 0.0
    soft = guided_in_batch_negatives(Q, D, targets, windows="softmax", **options).item()
    assert soft == pytest.approx(math.log(1 + math.exp(-0.4)), rel=1e-6)


def test_a_guide_that_finds_nothing_nearer_than_the_positive_changes_nothing():
    Q, D, group = random_pair(6, 3)
    guide_D = torch.eye(18, dtype=torch.float64)
    targets = guided(Targets(group), guide_D[:6], guide_D)
    ours = loss_and_gradients(guided_in_batch_negatives, Q, D, targets, temperature=0.1, **APART)
    assert_equal(ours, loss_and_gradients(in_batch_negatives, Q, D, Targets(group), temperature=0.1), 1e-12)


@pytest.mark.parametrize("fill", ["random", "equal", "zero", "tiny", "huge"])
@pytest.mark.parametrize("edge", EDGES)
def test_value_and_gradients_are_finite(edge, fill):
    num_queries, num_documents, targets = EDGES[edge]
    if targets.group.shape[1] == 0:
        targets = Targets(torch.full((2, 1), -1))
    Q, D = (random_vectors(n, 4, seed=n, dtype=torch.float32).detach() for n in (num_queries, num_documents))
    if fill in ("equal", "zero"):
        Q, D = (torch.full_like(x, float(fill == "equal")) for x in (Q, D))
    elif fill != "random":
        Q, D = (x * {"tiny": 1e-15, "huge": 1e15}[fill] for x in (Q, D))
    results = loss_and_gradients(
        guided_in_batch_negatives, Q.requires_grad_(), D.requires_grad_(), guided(targets, Q, D)
    )
    assert all(torch.isfinite(result).all() for result in results)


def test_the_guide_has_no_gradient():
    """Even when its vectors ask for one."""
    Q, D = random_vectors(3, 4), random_vectors(3, 4, seed=1)
    guide = random_vectors(3, 4, seed=2), random_vectors(3, 4, seed=3)
    guided_in_batch_negatives(Q, D, guided(Targets(torch.tensor([[0], [1], [2]])), *guide)).backward()
    assert guide[0].grad is None
    assert guide[1].grad is None


@pytest.mark.parametrize(
    ("options", "facts"),
    [
        ({"temperature": 0.0}, ("temperature", 0.0, 0)),
        ({"margin_strategy": "percent"}, ("margin_strategy", "percent", "absolute", "relative")),
        ({"margin": math.nan}, ("margin", math.nan, "finite")),
        ({"rows": 2}, ("rows", 2, "contrast_queries", "contrast_positives")),
    ],
)
def test_refuses(options, facts):
    Q = torch.ones(1, 2)
    with pytest.raises(ValueError, match=naming(*facts)):
        guided_in_batch_negatives(Q, Q, guided(Targets(torch.tensor([[0]])), Q, Q), **options)


def test_refuses_to_go_without_a_guide():
    Q = torch.ones(1, 2)
    with pytest.raises(ValueError, match=naming("references['guide']", "none")):
        guided_in_batch_negatives(Q, Q, Targets(torch.tensor([[0]])))
    with pytest.raises(ValueError, match=naming("references['guide']", (1, 2), (1, 1))):
        guided_in_batch_negatives(Q, Q, guided(Targets(torch.tensor([[0]])), Q, torch.ones(2, 2)))
