"""contrastive.py: by hand, against sentence-transformers, against a loop over queries and documents."""

import functools
import itertools
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from loss_checks import (
    PRECISIONS,
    assert_equal,
    loss_and_gradients,
    random_pair,
    random_vectors,
    reference_gradients,
)
from naming import naming

from embedft import Targets
from embedft.losses.contrastive import (
    LearnableTemperature,
    in_batch_negatives,
    multi_positive,
    symmetric_in_batch_negatives,
)
from embedft.losses.registry import loss_options

# What sentence-transformers calls the directions.
REFERENCE_DIRECTIONS = {
    "query_document": "query_to_doc",
    "document_query": "doc_to_query",
    "query_query": "query_to_query",
    "document_document": "doc_to_doc",
}
ALL = tuple(REFERENCE_DIRECTIONS)
BOTH = ("query_document", "document_query")
HARDNESS = ("in_batch_negatives", "hard_negatives", "all_negatives")


def random_targets(num_queries: int, num_documents: int, seed: int) -> Targets:
    """Everything that data can hold: shared documents, several positives or none, -1, pairs known besides."""
    generator = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator)

    group = torch.stack([torch.randperm(num_documents, generator=generator)[:3] for _ in range(num_queries)])
    group[integers(0, 4, *group.shape) == 0] = -1
    known = torch.stack([integers(0, num_queries, 5), integers(0, num_documents, 5)], dim=1)
    return Targets(group, integers(0, 3, *group.shape), known)


def test_by_hand():
    """Cosines 1 and 0.6 at temperature 1: each query loses -log(e^1 / (e^1 + e^0.6)) = log(1 + e^-0.4)."""
    Q, D = torch.tensor([[2.0, 0.0], [3.0, 4.0]]), torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    targets = Targets(torch.tensor([[0], [1]]))
    loss = in_batch_negatives(Q, D, targets, temperature=1.0)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-0.4)), rel=1e-6)
    assert loss.item() == pytest.approx(0.513015, abs=1e-6)
    # Inner products: 2 against 1.2 for the first query, 5 against 3 for the second.
    loss = in_batch_negatives(Q, D, targets, temperature=2.0, similarity="dot")
    assert loss.item() == pytest.approx((math.log(1 + math.exp(-0.4)) + math.log(1 + math.exp(-1.0))) / 2, rel=1e-6)


def test_options_by_hand():
    """The same cosines: 1 for the positive, 0.6 for all else, query with query and document with document too."""
    Q, D = torch.tensor([[2.0, 0.0], [3.0, 4.0]]), torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    targets = Targets(torch.tensor([[0], [1]]))

    def loss(**options) -> float:
        return in_batch_negatives(Q, D, targets, temperature=1.0, **options).item()

    assert loss(directions=BOTH, partition="per_direction") == pytest.approx(math.log(1 + math.exp(-0.4)), rel=1e-6)
    # Twice e^1 and twice e^0.6 over e^1.
    assert loss(directions=BOTH) == pytest.approx(math.log(2 + 2 * math.exp(-0.4)), rel=1e-6)
    assert loss(directions=("query_document", "query_query")) == pytest.approx(
        math.log(1 + 2 * math.exp(-0.4)), rel=1e-6
    )
    assert loss(directions=ALL) == pytest.approx(math.log(2 + 4 * math.exp(-0.4)), rel=1e-6)
    # The negative's 0.6 becomes 0.6 + 2 * 0.6 = 1.8, 0.8 above the positive.
    assert loss(hardness="all_negatives", hardness_strength=2.0) == pytest.approx(math.log(1 + math.exp(0.8)), rel=1e-6)
    assert loss(hardness="hard_negatives", hardness_strength=2.0) == pytest.approx(loss(), rel=1e-6)
    # log(e^0.6) - 1.
    assert loss(decoupled=True) == pytest.approx(-0.4, rel=1e-6)
    hard = Targets(torch.tensor([[0, 1], [1, -1]]))
    assert in_batch_negatives(Q, D, hard, temperature=1.0, in_batch=False).item() == pytest.approx(
        0.513015 / 2, rel=1e-5
    )


VARIANTS = [
    {},
    {"temperature": 0.2},
    *({"directions": ("query_document", *more)} for n in (1, 2, 3) for more in itertools.combinations(ALL[1:], n)),
    {"directions": BOTH, "partition": "per_direction"},
    {"partition": "per_direction"},
    *({"hardness": name, "hardness_strength": 5.0} for name in HARDNESS),
    {"hardness": "all_negatives", "hardness_strength": 9.0, "directions": ALL, "temperature": 0.1},
    {"hardness": "all_negatives", "hardness_strength": 9.0, "directions": ALL},
    {"hardness": "in_batch_negatives", "hardness_strength": 9.0, "directions": ALL[:3]},
    {"hardness": "hard_negatives", "hardness_strength": 9.0, "directions": (*ALL[:2], ALL[3])},
]


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize("duplicates", [False, True])
@pytest.mark.parametrize("num_negatives", [0, 1, 3])
@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_equals_sentence_transformers(options, num_negatives, duplicates, dtype, tolerance):
    """Equal texts under different ids are negatives of each other, here as there.

    In float32 each result is the reference's, or nearer to what the reference gives in float64 on the same numbers:
    with several directions rounding alone takes the reference's gradients 6e-7 from the exact ones.
    """
    st_losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    Q, D, group = random_pair(8, 1 + num_negatives, duplicates=duplicates, dtype=dtype)
    reference = st_losses.MultipleNegativesRankingLoss(
        model=None,
        scale=1 / options.get("temperature", 0.05),
        directions=tuple(REFERENCE_DIRECTIONS[name] for name in options.get("directions", ALL[:1])),
        partition_mode=options.get("partition", "joint"),
        hardness_mode=options.get("hardness"),
        hardness_strength=options.get("hardness_strength", 0.0),
    )
    ours = loss_and_gradients(in_batch_negatives, Q, D, Targets(group), **options)
    theirs = []
    for precision in (dtype, torch.float64):
        vectors = (x.detach().to(precision).requires_grad_() for x in (Q, D))
        results = reference_gradients(reference, *vectors, 1 + num_negatives, None)
        theirs.append([result.to(dtype) for result in results])
    nearest = [min(pair, key=lambda x: (x - our).abs().max()) for our, *pair in zip(ours, *theirs, strict=True)]
    assert_equal(ours, nearest, tolerance)


@pytest.mark.parametrize("num_negatives", [0, 2])
@pytest.mark.filterwarnings("ignore:The MultipleNegativesSymmetricRankingLoss is deprecated:DeprecationWarning")
def test_equals_sentence_transformers_with_inner_products_and_symmetric(num_negatives):
    st = pytest.importorskip("sentence_transformers")
    st_losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    Q, D, group = random_pair(8, 1 + num_negatives)
    reference = st_losses.MultipleNegativesRankingLoss(model=None, scale=0.5, similarity_fct=st.util.dot_score)
    ours = loss_and_gradients(in_batch_negatives, Q, D, Targets(group), temperature=2.0, similarity="dot")
    assert_equal(ours, reference_gradients(reference, Q, D, 1 + num_negatives, None), 1e-9)
    reference = st_losses.MultipleNegativesSymmetricRankingLoss(model=None, scale=10.0)
    ours = loss_and_gradients(symmetric_in_batch_negatives, Q, D, Targets(group), temperature=0.1)
    assert_equal(ours, reference_gradients(reference, Q, D, 1 + num_negatives, None), 1e-9)


def identities(targets: Targets):
    """(positives, hard negatives) of every query as listed, and every relevant pair, as sets."""
    known = set() if targets.known is None else {tuple(pair) for pair in targets.known.tolist()}
    positives, hard = [], []
    for i, listed in enumerate(targets.group.tolist()):
        relevance = [1] + [0] * (len(listed) - 1) if targets.relevance is None else targets.relevance[i].tolist()
        grades = [(j, grade) for j, grade in zip(listed, relevance, strict=True) if j >= 0]
        positives.append([j for j, grade in grades if grade > 0])
        hard.append([j for j, grade in grades if not grade > 0])
    relevant = known | {(i, j) for i, of_query in enumerate(positives) for j in of_query}
    return positives, [[j for j in of_query if (i, j) not in relevant] for i, of_query in enumerate(hard)], relevant


def naive_in_batch_negatives(
    Q,
    D,
    targets,
    temperature=0.05,
    directions=("query_document",),
    partition="joint",
    in_batch=True,
    hardness=None,
    hardness_strength=0.0,
    decoupled=False,
):
    """The docstring's formula, a query and a document at a time."""
    positives, hard, relevant = identities(targets)
    listed = relevant | {(i, j) for i, of_query in enumerate(hard) for j in of_query}
    numbers = range(len(D))

    def cosine(x, y):
        return F.cosine_similarity(x, y, dim=0)

    losses = []
    for i, q in enumerate(Q):
        of_query = []
        for p in positives[i]:
            score = cosine(q, D[p]) / temperature
            sums = {"query_document": [], "document_query": [], "query_query": [], "document_document": []}
            for n in numbers if in_batch else hard[i]:
                if (i, n) not in relevant:
                    kind = "hard_negatives" if n in hard[i] else "in_batch_negatives"
                    strength = hardness_strength if hardness in (kind, "all_negatives") else 0.0
                    sums["query_document"].append(cosine(q, D[n]) / temperature + strength * cosine(q, D[n]).detach())
            for r, other in enumerate(Q):
                if (r, p) not in relevant:
                    sums["document_query"].append(cosine(other, D[p]) / temperature)
                if r != i and not any((i, j) in relevant and (r, j) in relevant for j in numbers):
                    sums["query_query"].append(cosine(q, other) / temperature)
            for n in numbers:
                together = any((r, p) in listed and (r, n) in listed for r in range(len(Q)))
                if n != p and not together:
                    sums["document_document"].append(cosine(D[p], D[n]) / temperature)
            if not decoupled:
                sums["query_document"].append(score)
                sums["document_query"].append(score)
            if partition == "joint":
                pools = [[s for direction in directions for s in sums[direction]]]
            else:
                pools = [sums[direction] for direction in directions]
            pools = [pool for pool in pools if pool]
            if pools:
                of_query.append(sum(torch.stack(pool).exp().sum().log() for pool in pools) / len(pools) - score)
        if of_query:
            losses.append(sum(of_query) / len(of_query))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "options",
    [
        *VARIANTS[1:],
        {"in_batch": False},
        {"in_batch": False, "hardness": "all_negatives", "hardness_strength": 3.0},
        {"decoupled": True},
        {"decoupled": True, "in_batch": False},
        {"decoupled": True, "directions": ALL},
        {"decoupled": True, "directions": BOTH, "partition": "per_direction"},
    ],
    ids=str,
)
def test_equals_a_loop(options, seed):
    Q, D, targets = random_vectors(6, 5, seed=seed), random_vectors(8, 5, seed=seed + 100), random_targets(6, 8, seed)
    options = {"temperature": 0.2} | options
    ours = loss_and_gradients(in_batch_negatives, Q, D, targets, **options)
    assert_equal(ours, loss_and_gradients(naive_in_batch_negatives, Q, D, targets, **options), 1e-9)


def test_decoupled_directions_without_negatives_by_hand():
    """Cosines s00 = 1, s01 = 0, s10 = 0.6, s11 = 0.8; query 0 is known to be answered by both documents.

    Query 0 has no negative, and its document 0 has query 1: 0.6 - 1. Query 1 has document 0, and its document 1 has no
    query: 0.6 - 0.8.
    """
    Q, D = torch.tensor([[1.0, 0.0], [0.6, 0.8]]), torch.eye(2)
    targets = Targets(torch.tensor([[0], [1]]), known=torch.tensor([[0, 0], [0, 1], [1, 1]]))
    options = {"temperature": 1.0, "directions": BOTH, "partition": "per_direction", "decoupled": True}
    assert in_batch_negatives(Q, D, targets, **options).item() == pytest.approx((-0.4 - 0.2) / 2, rel=1e-6)


def test_a_pair_without_a_negative_in_any_direction_counts_nowhere():
    """Decoupled, there is nothing to divide by: one pair of cosine 1 would be -1 / temperature."""
    options = {"directions": BOTH, "partition": "per_direction", "decoupled": True}
    targets = Targets(torch.tensor([[0]]))
    assert in_batch_negatives(torch.ones(1, 2), torch.ones(1, 2), targets, **options).item() == 0.0


def test_one_document_a_query_has_no_listed_negative():
    Q, D, targets = torch.eye(2), torch.eye(2), Targets(torch.tensor([[0], [1]]), torch.ones(2, 1))
    for loss in (functools.partial(in_batch_negatives, in_batch=False), LearnableTemperature(in_batch=False)):
        with pytest.raises(ValueError, match=naming("in_batch", False, 1, "negatives")):
            loss(Q, D, targets)


def test_a_known_positive_is_no_negative():
    """Two questions of one document, and a document known to answer the first: none of them pushes the other away."""
    Q, D = random_vectors(3, 4), random_vectors(3, 4, seed=1)
    targets = Targets(torch.tensor([[0], [0], [1]]), known=torch.tensor([[0, 2], [1, 2], [2, 2]]))
    _, _, grad_D = loss_and_gradients(in_batch_negatives, Q, D, targets)
    assert grad_D[2].tolist() == [0.0] * 4
    with_it = in_batch_negatives(Q[:2], D[:1], Targets(torch.tensor([[0], [0]])))
    assert with_it.item() == 0.0


@pytest.mark.parametrize("direction", ALL)
def test_queries_of_one_document_are_no_negatives_in_any_direction(direction):
    """What remains of a partition is the positive, once or twice."""
    Q, D = random_vectors(2, 4), random_vectors(2, 4, seed=1)
    targets = Targets(torch.tensor([[0, 1], [0, 1]]), relevance=torch.ones(2, 2))
    loss = in_batch_negatives(Q, D, targets, directions=list(dict.fromkeys(["query_document", direction])))
    assert loss.item() == pytest.approx(math.log(2) if direction == "document_query" else 0, abs=1e-12)


def test_queries_without_a_positive_count_nowhere():
    Q, D = random_vectors(3, 4), random_vectors(3, 4, seed=1)
    with_it = in_batch_negatives(Q, D, Targets(torch.tensor([[0], [1], [-1]])))
    without = in_batch_negatives(Q[:2], D, Targets(torch.tensor([[0], [1]])))
    torch.testing.assert_close(with_it, without, rtol=1e-12, atol=0)
    nothing, *gradients = loss_and_gradients(in_batch_negatives, Q, D, Targets(torch.tensor([[-1], [-1], [-1]])))
    assert nothing.item() == 0.0
    assert not any(gradient.any() for gradient in gradients)


def test_a_broken_vector_is_not_hidden():
    """Nor by leaving out what has no negatives."""
    Q, D = random_vectors(3, 4).detach(), random_vectors(3, 4, seed=1)
    Q[1, 2] = math.nan
    targets = Targets(torch.tensor([[0], [1], [2]]))
    assert in_batch_negatives(Q, D, targets, decoupled=True).isnan()
    assert multi_positive(Q, D, targets).isnan()


def test_hardness_is_held_constant():
    """Its share of the logit has no gradient: with the strength s, d logit / d sim stays 1 / temperature."""
    Q, D = random_vectors(1, 4).detach(), random_vectors(2, 4, seed=1).detach()
    Q, D = F.normalize(Q, dim=1).requires_grad_(), F.normalize(D, dim=1).requires_grad_()
    options = {"temperature": 0.5, "similarity": "dot", "hardness": "all_negatives", "hardness_strength": 3.0}
    _, _, grad_D = loss_and_gradients(in_batch_negatives, Q, D, Targets(torch.tensor([[0]])), **options)
    positive, negative = (Q @ D.T)[0].detach().tolist()
    share = 1 / (1 + math.exp(positive / 0.5 - negative / 0.5 - 3 * negative))
    torch.testing.assert_close(grad_D, torch.stack([-share * Q[0] / 0.5, share * Q[0] / 0.5]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "facts"),
    [
        ({"temperature": 0.0}, ("temperature", 0.0, 0, "finite")),
        ({"temperature": -1.0}, ("temperature", -1.0, 0, "finite")),
        ({"temperature": math.nan}, ("temperature", math.nan, 0, "finite")),
        ({"temperature": math.inf}, ("temperature", math.inf, 0, "finite")),
        ({"similarity": "l2"}, ("similarity", "l2", "cosine", "dot")),
        ({"directions": []}, ("directions", "[]", "query_document")),
        ({"directions": ["query_query"]}, ("directions", ["query_query"], "query_document")),
        ({"directions": ["query_document"] * 2}, ("directions", ["query_document"] * 2, "once")),
        ({"directions": ["query_doc"]}, ("direction", "query_doc", "query_document", "document_document")),
        ({"partition": "own"}, ("partition", "own", "joint", "per_direction")),
        ({"partition": "per_direction", "directions": ALL}, ("partition", "per_direction", "query_query")),
        ({"in_batch": False, "directions": BOTH}, ("in_batch", False, "rows", None, "directions", "query_document")),
        ({"hardness": "all", "hardness_strength": 1.0}, ("hardness", "all", "in_batch_negatives", "all_negatives")),
        ({"hardness": "all_negatives"}, ("hardness_strength", 0.0, 0, "finite")),
        ({"hardness_strength": 5.0}, ("hardness_strength", 5.0, "hardness")),
        ({"rows": 0}, ("rows", 0, 1)),
        ({"rows": 2, "directions": BOTH}, ("rows", 2, "directions", "query_document")),
        ({"windows": "mean"}, ("windows", "mean", "max", "softmax")),
    ],
    ids=str,
)
@pytest.mark.parametrize("module", [False, True])
def test_refuses(options, facts, module):
    Q = torch.ones(1, 2)
    targets = Targets(torch.tensor([[0]]))
    if module and "temperature" in options:
        facts = "temperature", options["temperature"], 0.01, "finite"
    with pytest.raises(ValueError, match=naming(*facts)):
        (LearnableTemperature(**options) if module else lambda *given: in_batch_negatives(*given, **options))(
            Q, Q, targets
        )


EDGES = {
    "a batch of one": (1, 1, Targets(torch.tensor([[0]]))),
    "one query, one hard negative": (1, 2, Targets(torch.tensor([[0, 1]]))),
    "no negative at all": (2, 1, Targets(torch.tensor([[0], [0]]))),
    "all documents known": (2, 2, Targets(torch.tensor([[0], [1]]), known=torch.tensor([[0, 1], [1, 0]]))),
    "nothing listed": (2, 2, Targets(torch.tensor([[-1], [-1]]))),
    "a hard negative that is not there": (2, 3, Targets(torch.tensor([[0, 2], [1, -1]]))),
    "no list": (2, 2, Targets(torch.zeros(2, 0, dtype=torch.int64))),
}


def two_columns(targets: Targets) -> Targets:
    """With columns of nothing behind those there are."""
    return Targets(F.pad(targets.group, (0, 2), value=-1), known=targets.known)


@pytest.mark.parametrize("fill", ["random", "equal", "zero", "tiny", "huge"])
@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize(
    "loss",
    [
        in_batch_negatives,
        lambda *given: in_batch_negatives(*given, directions=ALL),
        lambda Q, D, targets: in_batch_negatives(Q, D, two_columns(targets), in_batch=False, decoupled=True),
        lambda *given: in_batch_negatives(*given, directions=BOTH, partition="per_direction", decoupled=True),
        lambda *given: in_batch_negatives(*given, directions=ALL, decoupled=True),
        lambda *given: in_batch_negatives(*given, hardness="all_negatives", hardness_strength=9.0),
        symmetric_in_batch_negatives,
        LearnableTemperature(),
        multi_positive,
        lambda *given: multi_positive(*given, form="in"),
    ],
)
def test_value_and_gradients_are_finite(loss, edge, fill):
    num_queries, num_documents, targets = EDGES[edge]
    Q, D = (random_vectors(n, 4, seed=n, dtype=torch.float32).detach() for n in (num_queries, num_documents))
    if fill in ("equal", "zero"):
        Q, D = (torch.full_like(x, float(fill == "equal")) for x in (Q, D))
    elif fill != "random":
        Q, D = (x * {"tiny": 1e-15, "huge": 1e15}[fill] for x in (Q, D))
    for result in loss_and_gradients(loss, Q.requires_grad_(), D.requires_grad_(), targets):
        assert torch.isfinite(result).all()


# Windows.


@pytest.mark.parametrize("windows", ["max", "softmax"])
@pytest.mark.parametrize("loss", [in_batch_negatives, multi_positive])
def test_windows_of_a_document_are_one_document(loss, windows):
    """Three windows of document 0, two of 1: the loss of the documents' scores, worked out apart."""
    Q, D = random_vectors(2, 4), random_vectors(5, 4, seed=1)
    targets = Targets(torch.tensor([[0], [1]]), document=torch.tensor([0, 1, 0, 1, 0]))
    cosines = F.normalize(Q, dim=1) @ F.normalize(D, dim=1).T
    documents = []
    for window in (cosines[:, ::2], cosines[:, 1::2]):
        soft = ((window / 0.05).softmax(dim=1) * window).sum(dim=1)
        documents.append(window.max(dim=1).values if windows == "max" else soft)
    expected = F.cross_entropy(torch.stack(documents, dim=1) / 0.05, torch.tensor([0, 1]))
    theirs = expected.detach(), *torch.autograd.grad(expected, (Q, D))
    assert_equal(loss_and_gradients(loss, Q, D, targets, windows=windows), theirs, 1e-9)


def test_windows_between_documents():
    """Documents are as near as their nearest windows: cosines 0.6 between the documents, 0 between the queries."""
    Q = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    D = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8], [0.0, 1.0]])
    targets = Targets(torch.tensor([[0], [1]]), document=torch.tensor([0, 1, 0, 1]))
    loss = in_batch_negatives(Q, D, targets, temperature=1.0, directions=("query_document", "document_document"))
    first = math.log(1 + math.exp(0 - 1) + math.exp(0.8 - 1))
    second = math.log(1 + math.exp(0.8 - 1) + math.exp(0.8 - 1))
    assert loss.item() == pytest.approx((first + second) / 2, rel=1e-6)


# Learnable temperature.


def test_learnable_temperature_is_in_batch_negatives():
    Q, D, targets = random_vectors(6, 5), random_vectors(8, 5, seed=1), random_targets(6, 8, 0)
    options = {"directions": ALL, "hardness": "all_negatives", "hardness_strength": 2.0}
    loss = LearnableTemperature(temperature=0.07, **options).double()
    found = loss_and_gradients(loss, Q, D, targets)
    temperature = loss.log_temperature.exp().item()
    assert temperature == pytest.approx(0.07, rel=1e-6)
    assert_equal(
        found, loss_and_gradients(in_batch_negatives, Q, D, targets, temperature=temperature, **options), 1e-12
    )
    # It takes every option.
    ours, theirs = loss_options(LearnableTemperature), loss_options(in_batch_negatives)
    assert {name: ours[name].default for name in ours.keys() - {"minimum"}} == {
        name: option.default for name, option in theirs.items()
    }


@pytest.mark.parametrize("rows", [None, 4])
def test_the_gradient_of_the_temperature(rows):
    """Central differences of the function; chunked queries add theirs up."""
    Q, D, targets = random_vectors(6, 5), random_vectors(8, 5, seed=1), random_targets(6, 8, 0)
    loss = LearnableTemperature(temperature=0.2, rows=rows).double()
    loss(Q, D, targets).backward()
    log_temperature, step = loss.log_temperature.item(), 1e-5
    above, below = (
        in_batch_negatives(Q, D, targets, temperature=math.exp(log_temperature + s)).item() for s in (step, -step)
    )
    assert loss.log_temperature.grad.item() == pytest.approx((above - below) / (2 * step), rel=1e-7)


def test_the_temperature_stays_above_its_minimum_and_comes_back():
    Q, D = torch.eye(2), torch.eye(2)
    loss = LearnableTemperature(temperature=0.02, minimum=0.02)
    with torch.no_grad():
        loss.log_temperature.sub_(5.0)
    # Both queries nearest the wrong document: a higher temperature is better.
    loss(Q, D, Targets(torch.tensor([[1], [0]]))).backward()
    assert loss.log_temperature.item() == pytest.approx(math.log(0.02))
    assert loss.log_temperature.grad < 0
    assert [name for name, _ in loss.named_parameters()] == ["log_temperature"]
    with pytest.raises(ValueError, match=naming("minimum", 0, 0, "finite")):
        LearnableTemperature(minimum=0)
    with pytest.raises(ValueError, match=naming("temperature", 0.005, 0.01)):
        LearnableTemperature(temperature=0.005)


# Several positives.


def test_multi_positive_by_hand():
    """Scores 1 and 0 of the positives, 0.5 of the other: Z = e + 1 + e^0.5."""
    Q, D = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, math.sqrt(0.75)]])
    Z = math.log(math.e + 1 + math.exp(0.5))
    for targets in (
        Targets(torch.tensor([[0, 1]]), torch.tensor([[1, 1]])),
        Targets(torch.tensor([[0]]), known=torch.tensor([[0, 1], [0, 0]])),
        Targets(torch.tensor([[1, 0]]), known=torch.tensor([[0, 0]])),
    ):
        assert multi_positive(Q, D, targets, temperature=1.0).item() == pytest.approx(Z - 0.5, rel=1e-6)
        inside = multi_positive(Q, D, targets, temperature=1.0, form="in").item()
        assert inside == pytest.approx(Z - math.log((math.e + 1) / 2), rel=1e-6)


def naive_multi_positive(Q, D, targets, temperature, form):
    _, _, relevant = identities(targets)
    losses = []
    for i, q in enumerate(Q):
        exponentials = [(F.cosine_similarity(q, d, dim=0) / temperature).exp() for d in D]
        shares = [exponentials[j] / sum(exponentials) for j in range(len(D)) if (i, j) in relevant]
        if shares and form == "out":
            losses.append(-sum(share.log() for share in shares) / len(shares))
        elif shares:
            losses.append(-(sum(shares) / len(shares)).log())
    return sum(losses) / len(losses)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("form", ["out", "in"])
def test_multi_positive_equals_a_loop(form, seed):
    Q, D, targets = random_vectors(7, 5, seed=seed), random_vectors(9, 5, seed=seed + 100), random_targets(7, 9, seed)
    ours = loss_and_gradients(multi_positive, Q, D, targets, temperature=0.2, form=form)
    theirs = loss_and_gradients(naive_multi_positive, Q, D, targets, temperature=0.2, form=form)
    assert_equal(ours, theirs, 1e-9)
    assert torch.autograd.gradcheck(lambda q, d: multi_positive(q, d, targets, form=form), (Q, D))


def test_multi_positive_with_one_positive_is_in_batch_negatives():
    Q, D, group = random_pair(6, 3)
    expected = loss_and_gradients(in_batch_negatives, Q, D, Targets(group))
    for form in ("out", "in"):
        assert_equal(loss_and_gradients(multi_positive, Q, D, Targets(group), form=form), expected, 1e-12)
    with pytest.raises(ValueError, match=naming("form", "log", "out", "in")):
        multi_positive(Q, D, Targets(group), form="log")


@pytest.mark.parametrize("loss", [in_batch_negatives, multi_positive])
def test_a_batch_of_one_document_is_warned_of(loss):
    """Its loss is 0, and so is its gradient; with a hard negative it is not."""
    Q, D = random_vectors(1, 4, seed=0), random_vectors(2, 4, seed=1)
    with pytest.warns(UserWarning, match=naming("batch", "one", "document")):
        value = loss(Q, D[:1], Targets(torch.tensor([[0]])))
    assert value.item() == 0
    with pytest.warns(UserWarning, match=naming("batch", "one", "document")):
        loss(Q, D, Targets(torch.tensor([[0]]), document=torch.tensor([0, 0])))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert loss(Q, D, Targets(torch.tensor([[0, 1]]))) > 0
