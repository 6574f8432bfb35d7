"""The regularisers: by hand, against sentence-transformers, against loops. Distances: test_distillation.py."""

import dataclasses
import math

import pytest
import torch
from loss_checks import PRECISIONS, assert_equal, loss_and_gradients, random_pair, random_vectors, reference_gradients
from naming import naming

from embedft import RetrievalDataset, Targets
from embedft.data.batches import make_batches
from embedft.losses.contrastive import global_orthogonal
from embedft.losses.distillation import toward_base


def test_global_orthogonal_by_hand():
    """Queries at cosine 0.6, documents at 0.8. m1^2 = 0.36 and 0.64, m2 - 1/2 = 0 (0.36 is below a half) and 0.14."""
    Q, D = torch.tensor([[1.0, 0.0], [3.0, 4.0]]), torch.tensor([[0.0, 1.0], [6.0, 8.0]])
    targets = Targets(torch.tensor([[0], [1]]))
    assert global_orthogonal(Q, D, targets).item() == pytest.approx((0.36 + 0.64 + 0.14) / 2, rel=1e-5)
    weighted = global_orthogonal(Q, D, targets, mean_weight=None, second_moment_weight=2.0, aggregation="sum")
    assert weighted.item() == pytest.approx(2 * 0.14, rel=1e-5)
    # Two questions of one document are related, and one document alone has no pair.
    assert global_orthogonal(Q, D, Targets(torch.tensor([[0], [0]]))).item() == 0.0


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize("duplicates", [False, True])
@pytest.mark.parametrize("num_negatives", [0, 1, 3])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"aggregation": "sum", "mean_weight": None},
        {"mean_weight": 0.3, "second_moment_weight": 2.0},
        {"second_moment_weight": 0.0},
        {"similarity": "dot"},
    ],
    ids=str,
)
def test_global_orthogonal_equals_sentence_transformers(options, num_negatives, duplicates, dtype, tolerance):
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    util = pytest.importorskip("sentence_transformers.util")
    similarity = {"cosine": util.cos_sim, "dot": util.dot_score}[options.get("similarity", "cosine")]
    theirs = {name: value for name, value in options.items() if name != "similarity"}
    reference = losses.GlobalOrthogonalRegularizationLoss(model=None, similarity_fct=similarity, **theirs)
    Q, D, group = random_pair(9, 1 + num_negatives, dim=5, duplicates=duplicates, dtype=dtype)
    ours = loss_and_gradients(global_orthogonal, Q, D, Targets(group), **options)
    assert_equal(ours, reference_gradients(reference, Q, D, 1 + num_negatives), tolerance)


def test_global_orthogonal_equals_a_loop():
    """Shared documents, a window more, a document that is not there: pairs of one document are left out."""
    Q, D = random_vectors(5, 4), random_vectors(7, 4, seed=1)
    document = torch.tensor([0, 1, 2, 3, 3, 4, 5])
    group = torch.tensor([[0, 4], [0, 5], [1, -1], [2, 4], [3, 3]])
    targets = Targets(group, document=document)

    def spread(pairs):
        cosines = [torch.cosine_similarity(x, y, dim=0) for x, y in pairs]
        first, second = sum(cosines) / len(cosines), sum(c**2 for c in cosines) / len(cosines)
        return first**2 + (second - 1 / 4).relu()

    def loop(Q, D, targets):
        # Queries 0 and 1 share document 0.
        sets = [[(Q[i], Q[j]) for i in range(5) for j in range(5) if i != j and {i, j} != {0, 1}]]
        for listed in ({0, 1, 2, 3}, {4, 5, 3}):
            columns = [c for c in range(7) if document[c].item() in listed]
            sets.append([(D[c], D[e]) for c in columns for e in columns if document[c] != document[e]])
        return sum(spread(pairs) for pairs in sets) / 3

    ours = loss_and_gradients(global_orthogonal, Q, D, targets)
    assert_equal(ours, loss_and_gradients(loop, Q, D, targets), 1e-9)


def test_global_orthogonal_knows_a_query_that_is_there_twice():
    """Scored pairs of one query: its two rows are equal and no unrelated texts. All distinct texts are orthogonal."""
    dataset = RetrievalDataset(
        {"q": "one", "r": "two"}, {d: d for d in "abc"}, {}, scores={"q": {"a": 1.0, "b": 0.0}, "r": {"c": 1.0}}
    )
    batches = make_batches(dataset, lambda texts, *, role: texts, batch_size=3, seed=0, examples="scored")
    batch = batches.collate(batches.examples)
    vectors = dict(zip(["one", "two", *"abc"], torch.eye(8), strict=False))
    Q, D = (torch.stack([vectors[text] for text in texts]) for texts in (batch.queries, batch.documents))
    assert torch.equal(Q[0], Q[1])
    assert global_orthogonal(Q, D, batch.targets).item() == 0.0
    assert global_orthogonal(Q, D, dataclasses.replace(batch.targets, query=None)).item() > 0.01


@pytest.mark.parametrize(
    ("options", "facts"),
    [
        ({"mean_weight": math.inf}, ("mean_weight", math.inf, 0, "finite")),
        ({"second_moment_weight": math.inf}, ("second_moment_weight", math.inf, 0, "finite")),
        ({"second_moment_weight": math.nan}, ("second_moment_weight", math.nan, 0, "finite")),
        ({"similarity": "l2"}, ("similarity", "l2", "cosine", "dot")),
        ({"aggregation": "max"}, ("aggregation", "max", "mean", "sum")),
        ({"mean_weight": -1.0}, ("mean_weight", -1.0, 0)),
        ({"mean_weight": None, "second_moment_weight": 0.0}, ("mean_weight", "second_moment_weight", 0, 0)),
    ],
)
def test_global_orthogonal_refuses(options, facts):
    with pytest.raises(ValueError, match=naming(*facts)):
        global_orthogonal(torch.eye(2), torch.eye(2), Targets(torch.tensor([[0], [1]])), **options)


def test_toward_base_is_nothing_at_the_base():
    Q, D = random_vectors(3, 5), random_vectors(4, 5, seed=1)
    base = Q.detach().clone(), D.detach().clone()
    targets = Targets(torch.tensor([[0], [1], [2]]), references={"base": base})
    for distance in ("cosine", "mse", "l2", "squared", "similarities"):
        value, *gradients = loss_and_gradients(toward_base, Q, D, targets, distance=distance)
        assert value.item() == pytest.approx(0.0, abs=1e-14)
        assert all(gradient.abs().max() < 1e-12 for gradient in gradients)


def test_toward_base_of_unit_vectors():
    """|x - r|^2 = 2 (1 - cos); turning everything together changes no similarity."""
    Q, D, base_Q, base_D = (torch.nn.functional.normalize(random_vectors(n, 5, seed=n), dim=1) for n in (3, 4, 5, 6))
    targets = Targets(torch.tensor([[0], [1], [2]]), references={"base": (base_Q[:3].detach(), base_D[:4].detach())})
    squared = toward_base(Q, D, targets, distance="squared")
    torch.testing.assert_close(squared, 2 * toward_base(Q, D, targets))
    turn = torch.linalg.qr(random_vectors(5, 5, seed=9).detach()).Q
    turned = toward_base(Q @ turn, D @ turn, targets, distance="similarities")
    torch.testing.assert_close(turned, toward_base(Q, D, targets, distance="similarities"))
