"""Tests that every loss in LOSSES must pass; a loss that needs options also has a line in SPECS.

Each is tested on its own and inside a Matryoshka loss.
"""

import copy
import dataclasses
import itertools

import pytest
import torch
from loss_checks import assert_equal, loss_and_gradients, random_vectors
from naming import naming
from ranks import run_ranks
from tiny import make_embedder
from torch import Tensor, nn

from embedft import LOSSES, Targets, build_loss
from embedft.losses import rows
from embedft.training import distributed
from embedft.training.distributed import LocalBatch
from embedft.training.train import TrainConfig, backward

DIM, TEACHER_DIM = 8, 8
# Options that a loss needs to run on `make_batch`, alone and cut to fewer dimensions.
SPECS = {
    "embedding_distillation": {"truncate": True},
    "projected_distillation": {"student_dim": DIM, "teacher_dim": TEACHER_DIM},
    "toward_base": {"truncate": True},
    "matryoshka": {"dims": [4, 2], "weights": [1.0, 0.5], "inner": {"name": "cosent"}},
    "quantized": {"precision": "binary", "inner": {"name": "in_batch_negatives"}},
    "sum": {
        "losses": [{"name": "in_batch_negatives"}, {"name": "toward_base", "distance": "similarities"}],
        "weights": [1.0, 0.3],
    },
}
WRAPPERS = ("plain", "matryoshka")
# Sums over queries, whose scores are computed some rows at a time; the second ones where documents have windows.
SUMS = {"in_batch_negatives", "learnable_temperature", "multi_positive", "sigmoid", "learnable_sigmoid", "sum"}
SUMS |= {"quantized"}
STRAIGHT_THROUGH = {"quantized"}  # its gradient is not that of its value: test_quantized.py
LISTED = {"triplet", "contrastive", "online_contrastive", "cosine_mse", "cosent", "angle", "margin_mse", "listwise_kl"}
LISTED |= {"listwise_cross_entropy", "binary_cross_entropy", "approx_ndcg", "ranknet", "pearson"}
MORE = {"group": -1, "relevance": 0.0, "target_scores": 0.0}
every_loss = pytest.mark.parametrize("name", LOSSES)
every_wrapper = pytest.mark.parametrize("wrapper", WRAPPERS)
# The wrapped Matryoshka has the full width of what it gets, 4, and the wrapper that of the batch.
pytestmark = pytest.mark.filterwarnings("ignore:dims:UserWarning")


def test_what_has_a_line_is_a_loss():
    assert set(SPECS) <= set(LOSSES)


def make_loss(name: str, wrapper: str = "plain", dtype: torch.dtype = torch.float64):
    spec = {"name": name} | SPECS.get(name, {})
    if wrapper == "matryoshka":
        spec = {"name": "matryoshka", "dims": [DIM, 4], "weights": [1.0, 0.7], "inner": spec}
    loss = build_loss(spec)
    return loss.to(dtype) if isinstance(loss, nn.Module) else loss


def make_batch(
    num_queries: int = 6, num_documents: int = 9, *, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Targets]:
    """Everything that data can hold: shared documents, documents that are not there, known pairs, a query of two rows,
    every reference, and with an even seed grades."""
    generator = torch.Generator().manual_seed(seed)
    group = torch.stack([torch.randperm(num_documents, generator=generator)[:3] for _ in range(num_queries)])
    if num_queries > 2:
        group[1, 0], group[2, 2], group[3] = group[0, 0], -1, torch.tensor([-1, 0, -1])
    known = torch.stack([torch.randint(0, n, (3,), generator=generator) for n in (num_queries, num_documents)], dim=1)
    Q, D = (random_vectors(n, DIM, seed=seed + n, dtype=dtype) for n in (num_queries, num_documents))
    references = {
        reference: tuple(
            random_vectors(n, dim, seed=seed + 7 * n + i, dtype=dtype).detach() for n in (num_queries, num_documents)
        )
        for i, (reference, dim) in enumerate({"guide": 5, "teacher": TEACHER_DIM, "base": DIM}.items())
    }
    scores = random_vectors(num_queries, 3, seed=seed + 50, dtype=dtype).detach()
    query = torch.arange(num_queries)
    query[-1] = query[0]
    relevance = torch.tensor([1, 2, 0], dtype=dtype).repeat(num_queries, 1) if seed % 2 == 0 else None
    return Q, D, Targets(group, relevance, known, target_scores=scores, references=references, query=query)


def listed_alone(targets: Targets, num_queries: int, num_documents: int) -> Targets:
    """The first queries and documents of a batch; documents cut off are no longer listed."""
    group = targets.group[:num_queries]
    return Targets(
        torch.where(group < num_documents, group, -1),
        target_scores=targets.target_scores[:num_queries],
        references={name: (Q[:num_queries], D[:num_documents]) for name, (Q, D) in targets.references.items()},
    )


SIZES = ("batch", "one query", "one document", "nothing listed", "windows")


def degenerate(Q: Tensor, D: Tensor, targets: Targets, fill: str, size: str) -> tuple[Tensor, Tensor, Targets]:
    Q, D = Q.detach().clone(), D.detach().clone()
    if fill == "duplicates":
        Q[1:], D[1::2] = Q[0], D[0]
        D[2] = Q[0]
    elif fill in ("equal", "zero"):
        Q, D = (torch.full_like(x, float(fill == "equal")) for x in (Q, D))
    elif fill == "some zero":
        Q[0], D[:2] = 0, 0
    elif fill == "tiny":
        Q, D = Q * 1e-15, D * 1e-15
    if size == "one query":
        Q, targets = Q[:1], listed_alone(targets, 1, 9)
    elif size == "one document":
        D, targets = D[:1], listed_alone(targets, 6, 1)
    elif size == "nothing listed":
        targets = dataclasses.replace(targets, group=torch.full_like(targets.group, -1), known=None)
    elif size == "windows":
        document = torch.tensor([0, 0, 0, 1, 2, 2, 3, 3, 3])
        targets = dataclasses.replace(targets, group=targets.group.clamp(max=3), known=None, document=document)
    return Q.requires_grad_(), D.requires_grad_(), targets


@every_loss
@every_wrapper
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("fill", ["random", "duplicates", "equal", "zero", "some zero", "tiny"])
def test_value_and_gradients_are_finite(name, wrapper, dtype, fill):
    loss = make_loss(name, wrapper, dtype)
    parameters = list(loss.parameters()) if isinstance(loss, nn.Module) else []
    for size in SIZES:
        Q, D, targets = degenerate(*make_batch(dtype=dtype), fill, size)
        value = loss(Q, D, targets)
        gradients = torch.autograd.grad(value, (Q, D, *parameters), allow_unused=True, materialize_grads=True)
        assert value.shape == (), size
        assert value.dtype is dtype, size
        assert all(torch.isfinite(result).all() for result in (value, *gradients)), size


@every_loss
def test_q_and_targets_of_different_lengths(name):
    """A row of Q that nothing is listed for, or the other way round, is an error, not a wrong number."""
    Q, D, targets = make_batch()
    loss = make_loss(name)
    for other in (Q[:5], Q[:1], torch.cat([Q, Q])):
        with pytest.raises(ValueError, match=naming("Q", ..., len(other), ..., "group", ..., 6)):
            loss(other, D, targets)


@every_loss
@every_wrapper
def test_a_place_where_no_query_lists_a_document_changes_nothing(name, wrapper):
    """Batches list as many documents for every query, none where it has fewer hard negatives."""
    Q, D, targets = make_batch()
    more = {part: torch.cat([getattr(targets, part), torch.full((6, 1), fill)], dim=1) for part, fill in MORE.items()}
    found = [
        loss_and_gradients(make_loss(name, wrapper), Q, D, given)
        for given in (targets, dataclasses.replace(targets, **more))
    ]
    assert_equal(*found, 1e-12)


@pytest.mark.parametrize("name", [name for name in LOSSES if name not in STRAIGHT_THROUGH])
@every_wrapper
@pytest.mark.parametrize("seed", range(2))
def test_gradient_check(name, wrapper, seed):
    Q, D, targets = make_batch(4, 6, seed=seed)
    loss = make_loss(name, wrapper)
    assert torch.autograd.gradcheck(lambda q, d: loss(q, d, targets), (Q, D))


@every_loss
@every_wrapper
def test_the_order_of_documents_and_queries_is_no_matter(name, wrapper):
    Q, D, targets = make_batch(seed=3)
    loss = make_loss(name, wrapper)
    queries, documents = (torch.randperm(len(x), generator=torch.Generator().manual_seed(len(x))) for x in (Q, D))
    place_of_query, place_of_document = queries.argsort(), documents.argsort()
    moved = Targets(
        torch.where(targets.group < 0, -1, place_of_document[targets.group])[queries],
        known=torch.stack([place_of_query[targets.known[:, 0]], place_of_document[targets.known[:, 1]]], dim=1),
        relevance=None if targets.relevance is None else targets.relevance[queries],
        query=targets.query[queries],
        target_scores=targets.target_scores[queries],
        references={name: (q[queries], d[documents]) for name, (q, d) in targets.references.items()},
    )
    value, grad_Q, grad_D = loss_and_gradients(loss, Q, D, targets)
    found = loss_and_gradients(
        loss, *(x.detach()[i].requires_grad_() for x, i in ((Q, queries), (D, documents))), moved
    )
    assert_equal(found, (value, grad_Q[queries], grad_D[documents]), 1e-9)


@every_loss
@every_wrapper
def test_documents_of_one_window_are_documents(name, wrapper):
    """The columns in any order, `document` saying which is which."""
    Q, D, targets = make_batch(seed=4)
    loss = make_loss(name, wrapper)
    value, grad_Q, grad_D = loss_and_gradients(loss, Q, D, targets)
    document = torch.randperm(len(D), generator=torch.Generator().manual_seed(0))
    references = {reference: (q, d[document]) for reference, (q, d) in targets.references.items()}
    windows = dataclasses.replace(targets, document=document, references=references)
    found = loss_and_gradients(loss, Q, D.detach()[document].requires_grad_(), windows)
    assert_equal(found, (value, grad_Q, grad_D[document]), 1e-9)


@every_loss
@every_wrapper
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(name, wrapper, dtype):
    Q, D, targets = make_batch(dtype=torch.float32)
    Q, D = (x.detach().to(dtype).requires_grad_() for x in (Q, D))
    loss = make_loss(name, wrapper, torch.float32)
    value, grad_Q, grad_D = loss_and_gradients(loss, Q, D, targets)
    assert (value.dtype, grad_Q.dtype, grad_D.dtype) == (torch.float32, dtype, dtype)
    torch.testing.assert_close(value, loss(Q.detach().float(), D.detach().float(), targets), rtol=1e-6, atol=1e-7)
    assert loss(Q.double(), D.double(), targets).dtype is torch.float64


@every_loss
@every_wrapper
def test_everything_stays_on_its_device(name, wrapper):
    """A tensor that a loss creates without a device lands on "meta" here, and mixing it with others fails."""
    Q, D, targets = make_batch(dtype=torch.float32)
    loss = make_loss(name, wrapper, torch.float32)
    expected = loss_and_gradients(loss, Q, D, targets)
    with torch.device("meta"):
        found = loss_and_gradients(loss, Q, D, targets)
    assert all(result.device.type == "cpu" for result in found)
    assert_equal(found, expected, 0.0)


@every_loss
@every_wrapper
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("size", ["batch", "windows"])
def test_a_few_rows_at_a_time_are_the_whole(name, wrapper, dtype, tolerance, size, monkeypatch):
    """Losses that sum over queries give the same result two queries at a time."""
    Q, D, targets = degenerate(*make_batch(dtype=dtype), "random", size)
    loss = make_loss(name, wrapper, dtype)
    parameters = list(loss.parameters()) if isinstance(loss, nn.Module) else []

    def results():
        value = loss(Q, D, targets)
        return value.detach(), *torch.autograd.grad(
            value, (Q, D, *parameters), allow_unused=True, materialize_grads=True
        )

    expected = results()
    sizes, apply = [], rows._ByRows.apply
    monkeypatch.setitem(rows.by_rows.__kwdefaults__, "scores_at_a_time", 18)
    monkeypatch.setattr(rows._ByRows, "apply", lambda *given: sizes.append(given[2]) or apply(*given))
    with torch.device("meta"):
        found = results()
    assert all(result.device.type == "cpu" for result in found)
    assert_equal(found, expected, tolerance)
    assert set(sizes) <= {2}
    if name in SUMS or (size == "windows" and name in LISTED):
        assert sizes


@every_loss
@every_wrapper
def test_every_device_agrees(name, wrapper, device):
    Q, D, targets = make_batch(dtype=torch.float32)
    loss = make_loss(name, wrapper, torch.float32)
    expected = loss_and_gradients(loss, Q, D, targets)
    loss = loss.to(device) if isinstance(loss, nn.Module) else loss
    moved = (x.detach().to(device).requires_grad_() for x in (Q, D))
    found = loss_and_gradients(loss, *moved, targets.to(device))
    assert {result.device.type for result in found} == {device.type}
    for our, their in zip(found, expected, strict=True):
        torch.testing.assert_close(our.cpu(), their, rtol=1e-4, atol=1e-5)


@every_loss
@every_wrapper
def test_mutates_nothing(name, wrapper):
    Q, D, targets = make_batch()
    before = [x.detach().clone() for x in (Q, D)], copy.deepcopy(targets)
    loss_and_gradients(make_loss(name, wrapper), Q, D, targets)
    for old, new in zip(before[0], (Q, D), strict=True):
        assert torch.equal(old, new)
    for field in ("group", "relevance", "known", "target_scores", "query"):
        assert torch.equal(getattr(before[1], field), getattr(targets, field))
    for reference, pair in before[1].references.items():
        assert all(torch.equal(old, new) for old, new in zip(pair, targets.references[reference], strict=True))


@every_loss
def test_the_trial_of_a_specification_runs(name):
    """What `finetune` does with it before it trains: both ways in, and a wrong option on top."""
    make_loss(name), make_loss(name, "matryoshka")
    with pytest.raises(ValueError, match=naming(name, "option", "nonsense", *SPECS.get(name, {}))):
        build_loss({"name": name, "nonsense": 1} | SPECS.get(name, {}))


# Two ranks = one: every loss behind a small encoder, each text of the batch embedded by one of the ranks.

MINI_BATCH_TOKENS = (None, 12)


def step_of_every_loss(folder) -> dict[tuple, list[Tensor]]:
    """{(loss, wrapper, mini_batch_tokens): value, gradients of the encoder and of the loss}, in float64, as `train`."""
    embedder = make_embedder(folder, dropout=0.0, dtype=torch.float64)
    words = itertools.cycle([*"abcdefghijklmnopqrstuvwxyz0123456789", "fee", "order", "hello"])
    texts = [" ".join(itertools.islice(words, length)) for length in (3, 1, 8, 2, 5, 13, 2, 9, 1, 4, 16, 6, 11, 3, 5)]
    queries, documents = embedder.pack(texts[:6], role="query"), embedder.pack(texts[6:], role="document")
    targets, found = make_batch()[2], {}
    for name, wrapper, tokens in itertools.product(LOSSES, WRAPPERS, MINI_BATCH_TOKENS):
        loss = make_loss(name, wrapper)
        own = list(loss.parameters()) if isinstance(loss, nn.Module) else []
        embedder.zero_grad()
        with distributed.summing_gradients(embedder.parameters(), of_first=own) as begin_sums:
            value, _ = backward(
                embedder,
                LocalBatch.of(queries, documents),
                targets,
                lambda Q, D, targets, loss=loss: loss(Q[:, :DIM], D[:, :DIM], targets),
                TrainConfig(),
                at_once=tokens,
                weight=0.5,
                seeds=(0,),
                before_last=begin_sums,
            )
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in (*embedder.parameters(), *own)]
        found[name, wrapper, tokens] = [value, *(gradient.clone() for gradient in gradients)]
    return found


@pytest.fixture(scope="module")
def steps(tmp_path_factory) -> tuple[dict, list[dict]]:
    """The same on one rank, and on each of two."""
    folder = tmp_path_factory.mktemp("ranks")
    one = step_of_every_loss(folder / "model")
    return one, run_ranks(2, step_of_every_loss, folder / "model", folder=folder)


@every_loss
@every_wrapper
@pytest.mark.parametrize("mini_batch_tokens", MINI_BATCH_TOKENS)
def test_two_ranks_are_one(name, wrapper, mini_batch_tokens, steps):
    one, two = steps
    expected = one[name, wrapper, mini_batch_tokens]
    assert any(gradient.abs().max() > 1e-6 for gradient in expected[1:])
    scale = max(gradient.abs().max() for gradient in expected)
    for rank in two:
        for our, their in zip(rank[name, wrapper, mini_batch_tokens], expected, strict=True):
            assert (our - their).abs().max() <= 1e-10 * scale
