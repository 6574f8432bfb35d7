"""cached.py: by hand; cached = direct for every loss; how mini-batches are cut; what it holds in memory.

"Direct" is the same mini-batches in the same order with their graphs kept and one backward pass.
"""

import contextlib
import functools
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from naming import naming
from tiny import make_dataset, make_embedder
from torch import nn

from embedft import LOSSES, Targets, build_loss, device
from embedft.data.batches import make_batches
from embedft.encoders.packing import pack
from embedft.losses.contrastive import in_batch_negatives
from embedft.losses.registry import loss_options
from embedft.training.cached import cached_backward, mini_batches

BFLOAT16 = functools.partial(torch.autocast, "cpu", dtype=torch.bfloat16)
# Options without which a loss cannot run on vectors of 32 features with a teacher of as many.
NEEDED = {
    "projected_distillation": {"student_dim": 32, "teacher_dim": 32},
    "matryoshka": {"dims": [32, 8], "inner": {"name": "in_batch_negatives"}},
    "quantized": {"precision": "binary", "inner": {"name": "in_batch_negatives"}},
    "sum": {"losses": [{"name": "in_batch_negatives"}, {"name": "in_batch_negatives", "temperature": 0.5}]},
}
# Those that compare with a reference feature by feature need this at 16 dimensions; a projection has one width only.
UNDER_MATRYOSHKA = {"embedding_distillation": {"truncate": True}, "toward_base": {"truncate": True}}
ONE_WIDTH = {"projected_distillation", "matryoshka"}


class LearnedTemperature(nn.Module):
    """In-batch negatives with exp(self.log_scale) for 1 / temperature."""

    def __init__(self):
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(math.log(20.0)))

    def forward(self, Q, D, targets):
        return in_batch_negatives(Q * self.log_scale.exp(), D, targets, temperature=1.0, similarity="dot")


class SampledDimensions(nn.Module):
    """A random number of leading dimensions at each call, drawn from torch's own generator."""

    def forward(self, Q, D, targets):
        dim = int(torch.randint(2, Q.shape[1], ()))
        return in_batch_negatives(Q[:, :dim], D[:, :dim], targets)


class OneRow(nn.Module):
    """Texts of one token: its vector is weight * (the token + noise), noise from torch's generator."""

    device = torch.device("cpu")

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
        self.calls = []

    def embed(self, packed, *, role):
        self.calls.append((role, packed.input_ids.tolist(), torch.is_grad_enabled()))
        return (self.weight * (packed.input_ids.double() + torch.rand(packed.num_sequences).double()))[:, None]


def make_batch(embedder, *, num_negatives: int = 2, batch_size: int = 11, seed: int = 0):
    """11 pairs over 9 documents, so two documents have two queries."""
    batches = make_batches(
        make_dataset(11, 9, negatives=num_negatives),
        embedder.pack,
        batch_size=batch_size,
        seed=seed,
        num_negatives=num_negatives,
    )
    return next(batches.epoch(0))


def direct_backward(embedder, batch, targets, loss, *, mini_batch_tokens, autocast=contextlib.nullcontext):
    """The same mini-batches in the same order, their graphs kept."""
    vectors = []
    for packed, role in ((batch.queries, "query"), (batch.documents, "document")):
        parts, place = mini_batches(packed, mini_batch_tokens)
        embedded = []
        for part in parts:
            with autocast():
                embedded.append(embedder.embed(part, role=role))
        vectors.append(torch.cat(embedded)[place])
    value = loss(*vectors, targets)
    value.backward()
    return value.detach()


def outcome(embedder, batch, targets, loss, backward, **options):
    """Loss, gradients of embedder and loss, and the generator's final state, from the same initial random state."""
    modules = [embedder, *([loss] if isinstance(loss, nn.Module) else [])]
    for module in modules:
        module.zero_grad()
    torch.manual_seed(3)
    value = backward(embedder, batch, targets, loss, **options)
    gradients = {
        f"{i}.{name}": None if parameter.grad is None else parameter.grad.clone()
        for i, module in enumerate(modules)
        for name, parameter in module.named_parameters()
    }
    return value, gradients, torch.get_rng_state()


def cached(embedder, batch, targets, loss, **options):
    return cached_backward(embedder, batch.queries, batch.documents, targets, loss, **options)


def assert_cached_is_direct(embedder, batch, make_loss, *, targets=None, tolerance=1e-10, tokens=40, **options):
    """`make_loss` is called for each of the two, so that a loss that counts its calls counts the same ones."""
    targets = batch.targets if targets is None else targets
    results = []
    for backward in (cached, direct_backward):
        torch.manual_seed(5)
        results.append(outcome(embedder, batch, targets, make_loss(), backward, mini_batch_tokens=tokens, **options))
    (value, gradients, state), (direct_value, direct_gradients, direct_state) = results
    assert not value.requires_grad
    torch.testing.assert_close(value, direct_value, rtol=tolerance, atol=tolerance)
    assert gradients.keys() == direct_gradients.keys()
    for name, gradient in gradients.items():
        if gradient is None or direct_gradients[name] is None:
            assert gradient is direct_gradients[name], name
            continue
        assert (gradient - direct_gradients[name]).abs().max() <= tolerance * max(1, gradient.abs().max()), name
    assert torch.equal(state, direct_state)
    return value, gradients


@pytest.fixture
def embedder(tmp_path):
    """In float64, with dropout 0.1."""
    return make_embedder(tmp_path / "base", dtype=torch.float64).train()


# By hand.


def test_by_hand():
    """Queries of tokens 1 and 2, a document of token 3, mini-batches of one token; L = sum(Q) * sum(D).

    With noise u1, u2 on the queries, u3 on the document and weight w: L = w^2 (3 + u1 + u2)(3 + u3), so dL/dw is
    2 L / w. Each text is embedded twice with the same noise; the loss sees them once.
    """
    module = OneRow()
    torch.manual_seed(0)
    u1, u2, u3 = torch.rand(3).double()
    expected = 4 * (3 + u1 + u2) * (3 + u3)
    seen = []

    def loss(Q, D, targets):
        seen.append((Q.flatten().tolist(), D.flatten().tolist(), targets))
        return Q.sum() * D.sum()

    torch.manual_seed(0)
    targets = Targets(torch.tensor([[0], [0]]))
    value = cached_backward(module, pack([[1], [2]]), pack([[3]]), targets, loss, mini_batch_tokens=1)
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)
    assert module.weight.grad.item() == pytest.approx(2 * expected.item() / 2, rel=1e-12)
    assert seen == [([2 * (1 + u1).item(), 2 * (2 + u2).item()], [2 * (3 + u3).item()], targets)]
    once = [("query", [1]), ("query", [2]), ("document", [3])]
    assert module.calls == [(*call, False) for call in once] + [(*call, True) for call in once]


def test_rows_stand_where_their_texts_stood(embedder):
    """Mini-batches go by length; Q and D do not."""
    embedder.eval()
    queries = embedder.pack(["a", "b c d e", "f g", "h i j k l"], role="query")
    batch = make_batch(embedder)._replace(queries=queries)
    Q, D = embedder.embed_pair(batch.queries, batch.documents)

    def loss(found_Q, found_D, targets):
        torch.testing.assert_close(found_Q, Q, rtol=0, atol=1e-12)
        torch.testing.assert_close(found_D, D, rtol=0, atol=1e-12)
        return found_Q.sum() + found_D.sum()

    cached(embedder, batch, batch.targets, loss, mini_batch_tokens=10)


def test_equals_the_batch_at_once_without_dropout(embedder):
    """The weights do not depend on how the batch was split: compared with the step that `train` takes without it."""
    embedder.eval()
    batch = make_batch(embedder)
    value, gradients, _ = outcome(embedder, batch, batch.targets, in_batch_negatives, cached, mini_batch_tokens=25)

    def at_once(embedder, batch, targets, loss):
        value = loss(*embedder.embed_pair(batch.queries, batch.documents), targets)
        value.backward()
        return value.detach()

    expected, expected_gradients, _ = outcome(embedder, batch, batch.targets, in_batch_negatives, at_once)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=0, atol=1e-10)


# Cached = direct.


def with_everything(batch) -> Targets:
    """The batch's targets with what any loss may ask for: a teacher's scores, and references of another width."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    targets = batch.targets
    num_queries, num_documents = batch.queries.num_sequences, batch.documents.num_sequences
    references = {
        name: (F.normalize(random(num_queries, width), dim=1), F.normalize(random(num_documents, width), dim=1))
        for name, width in (("guide", 16), ("teacher", 32), ("base", 32))
    }
    return Targets(
        group=targets.group,
        known=targets.known,
        target_scores=random(*targets.group.shape).sigmoid(),
        references=references,
    )


def spec_of(name: str) -> dict:
    return {"name": name, **NEEDED.get(name, {})}


def float64_loss(spec: dict):
    loss = build_loss(spec)
    return loss.double() if isinstance(loss, nn.Module) else loss


@pytest.mark.parametrize("name", LOSSES)
def test_cached_is_direct_for_every_loss(embedder, name):
    batch = make_batch(embedder)
    make_loss = functools.partial(float64_loss, spec_of(name))
    _, gradients = assert_cached_is_direct(embedder, batch, make_loss, targets=with_everything(batch))
    assert any(gradient is not None and gradient.any() for gradient in gradients.values())


@pytest.mark.parametrize("name", [name for name in LOSSES if name not in ONE_WIDTH])
@pytest.mark.parametrize("options", [{}, {"dims_per_step": 1}], ids=["all dimensions", "sampled"])
def test_cached_is_direct_under_matryoshka(embedder, name, options):
    batch = make_batch(embedder)
    inner = {**spec_of(name), **UNDER_MATRYOSHKA.get(name, {})}
    spec = {"name": "matryoshka", "dims": [32, 16, 5], "inner": inner, **options}
    assert_cached_is_direct(embedder, batch, functools.partial(float64_loss, spec), targets=with_everything(batch))


@pytest.mark.parametrize("tokens", [1, 17, 40, 90, 10_000])
@pytest.mark.parametrize("num_negatives", [0, 1, 3])
def test_cached_is_direct_for_any_mini_batch(embedder, tokens, num_negatives):
    """A text at a time, uneven mini-batches, all of a role at once; up to four documents per query."""
    batch = make_batch(embedder, num_negatives=num_negatives)
    assert_cached_is_direct(embedder, batch, lambda: in_batch_negatives, tokens=tokens)


@pytest.mark.parametrize("make_loss", [LearnedTemperature, SampledDimensions])
def test_cached_is_direct_for_modules(embedder, make_loss):
    _, gradients = assert_cached_is_direct(embedder, make_batch(embedder), lambda: make_loss().double())
    if make_loss is LearnedTemperature:
        assert gradients["1.log_scale"] != 0


def test_cached_is_direct_for_a_batch_of_one(embedder):
    batch = make_batch(embedder, batch_size=1, num_negatives=1)
    assert_cached_is_direct(embedder, batch, lambda: in_batch_negatives, tokens=5)


def test_dropout_is_the_same_both_times_and_shows(embedder):
    """Shows that dropout was at work in the tests above."""
    batch = make_batch(embedder)
    value, _, _ = outcome(embedder, batch, batch.targets, in_batch_negatives, cached, mini_batch_tokens=40)
    embedder.eval()
    without, _, _ = outcome(embedder, batch, batch.targets, in_batch_negatives, cached, mini_batch_tokens=40)
    assert abs(value - without) > 1e-3


def test_attention_dropout_too(tmp_path):
    embedder = make_embedder(tmp_path / "base", dtype=torch.float64).train()
    embedder.encoder.attention_dropout = 0.2
    assert_cached_is_direct(embedder, make_batch(embedder), lambda: in_batch_negatives)


def test_float32(tmp_path):
    embedder = make_embedder(tmp_path / "base").train()
    assert_cached_is_direct(embedder, make_batch(embedder), lambda: in_batch_negatives, tolerance=2e-6)


def test_bfloat16(tmp_path):
    """Both forward passes run under autocast, and every weight gets its gradient."""
    embedder = make_embedder(tmp_path / "base").train()
    batch = make_batch(embedder)
    options = {"tolerance": 1e-5, "autocast": BFLOAT16}
    value, gradients = assert_cached_is_direct(embedder, batch, lambda: in_batch_negatives, **options)
    exact, _, _ = outcome(embedder, batch, batch.targets, in_batch_negatives, cached, mini_batch_tokens=40)
    assert value != exact
    assert all(gradient.any() for gradient in gradients.values())


@pytest.mark.parametrize("which", [0, 1])
def test_a_loss_of_queries_or_documents_alone(embedder, which):
    """The side it does not look at is not embedded a second time, and gets no gradient."""
    roles, embed = [], embedder.embed
    embedder.embed = lambda packed, *, role: roles.append(role) or embed(packed, role=role)
    assert_cached_is_direct(
        embedder, make_batch(embedder), lambda: lambda Q, D, targets: (Q, D)[which].cumsum(1).square().mean()
    )
    parts = [roles[:k].count(role) for k in (len(roles),) for role in ("query", "document")]
    queries, documents = (len(mini_batches(p, 40)[0]) for p in make_batch(embedder)[:2])
    twice = (3 * queries, 2 * documents) if which == 0 else (2 * queries, 3 * documents)
    assert tuple(parts) == twice


def test_gradients_are_added(embedder):
    batch = make_batch(embedder)
    _, once, _ = outcome(embedder, batch, batch.targets, in_batch_negatives, cached, mini_batch_tokens=40)
    torch.manual_seed(3)
    cached(embedder, batch, batch.targets, in_batch_negatives, mini_batch_tokens=40)
    for name, parameter in embedder.named_parameters():
        torch.testing.assert_close(parameter.grad, 2 * once[f"0.{name}"], rtol=1e-10, atol=1e-12)


def test_the_loss_is_called_once_outside_of_autocast(tmp_path):
    embedder, calls = make_embedder(tmp_path / "base").train(), []

    def loss(Q, D, targets):
        calls.append((torch.is_autocast_enabled("cpu"), torch.is_grad_enabled(), Q.dtype))
        return in_batch_negatives(Q, D, targets)

    batch = make_batch(embedder)
    cached(embedder, batch, batch.targets, loss, mini_batch_tokens=20, autocast=BFLOAT16)
    assert calls == [(False, True, torch.float32)]


# How mini-batches are cut.


def test_mini_batches_by_hand():
    """Lengths 2, 5, 1, 3, 2 in the order 5, 3, 2, 2, 1; with at most 5 tokens: 5 | 3 2 | 2 1."""
    packed = pack([[1, 2], [3, 4, 5, 6, 7], [8], [9, 10, 11], [12, 13]])
    parts, place = mini_batches(packed, 5)
    assert [part.input_ids.tolist() for part in parts] == [[3, 4, 5, 6, 7], [9, 10, 11, 1, 2], [12, 13, 8]]
    assert [part.cu_seqlens.tolist() for part in parts] == [[0, 5], [0, 3, 5], [0, 2, 3]]
    assert [part.positions.tolist() for part in parts] == [[0, 1, 2, 3, 4], [0, 1, 2, 0, 1], [0, 1, 0]]
    assert [part.max_seqlen for part in parts] == [5, 3, 2]
    assert place.tolist() == [2, 0, 4, 1, 3]
    assert all(part.cu_seqlens.dtype is torch.int32 for part in parts)


def test_a_text_longer_than_a_mini_batch_goes_alone():
    parts, place = mini_batches(pack([[1], [2, 3, 4, 5], [6]]), 2)
    assert [part.input_ids.tolist() for part in parts] == [[2, 3, 4, 5], [1, 6]]
    assert place.tolist() == [1, 0, 2]


def test_token_types_and_prompts_are_cut_too():
    packed = pack([[1, 2], [3, 4, 5]], prompt_length=1)
    packed = packed._replace(token_types=torch.tensor([0, 1, 0, 1, 1]), prompt_lengths=torch.tensor([1, 2]))
    parts, _ = mini_batches(packed, 3)
    assert [part.token_types.tolist() for part in parts] == [[0, 1, 1], [0, 1]]
    assert [part.prompt_lengths.tolist() for part in parts] == [[2], [1]]


@pytest.mark.parametrize("max_tokens", [1, 7, 30, 1000])
def test_every_sequence_is_in_one_mini_batch(max_tokens):
    generator = torch.Generator().manual_seed(max_tokens)
    lengths = torch.randint(1, 12, (50,), generator=generator).tolist()
    sequences = [torch.randint(0, 99, (length,), generator=generator).tolist() for length in lengths]
    parts, place = mini_batches(pack(sequences), max_tokens)
    found = [tokens.tolist() for part in parts for tokens in part.input_ids.split(part.lengths().tolist())]
    assert [found[p] for p in place.tolist()] == sequences
    assert all(len(part.input_ids) <= max_tokens or part.num_sequences == 1 for part in parts)
    # No more of them than the greedy cut needs: two neighbours never fit into one.
    sizes = [(len(part.input_ids), int(part.lengths()[0])) for part in parts]
    assert all(size + first > max_tokens for (size, _), (_, first) in itertools.pairwise(sizes))


def test_refuses_mini_batches_without_a_token():
    with pytest.raises(ValueError, match=naming("max_tokens", 0, 1)):
        mini_batches(pack([[1]]), 0)


# What it holds.


def test_activations_of_one_mini_batch_at_a_time(embedder):
    """The peak of what autograd saves, counted tensor by tensor, is the same for 44 pairs as for 11."""

    def most_kept(copies: int) -> int:
        kept, most = 0, 0

        def keep(x):
            nonlocal kept, most
            handle = Kept(x)
            kept += x.numel()
            most = max(most, kept)
            return handle

        class Kept:
            def __init__(self, x):
                self.x = x

            def __del__(self):
                nonlocal kept
                kept -= self.x.numel()

        queries, documents = ([[5 + i, 6, 7] for i in range(11)] * copies for _ in range(2))
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda handle: handle.x):
            cached_backward(
                embedder, pack(queries), pack(documents), Targets(torch.zeros(len(queries), 1, dtype=torch.int64)),
                lambda Q, D, targets: Q.sum() + D.sum(), mini_batch_tokens=33,
            )  # fmt: skip
        return most

    assert most_kept(4) <= 1.01 * most_kept(1)


def test_memory_is_given_back_after_every_mini_batch(embedder, monkeypatch):
    released = []
    monkeypatch.setattr(device, "release_memory", released.append)
    batch = make_batch(embedder)
    cached(embedder, batch, batch.targets, in_batch_negatives, mini_batch_tokens=20)
    assert len(released) == sum(len(mini_batches(packed, 20)[0]) for packed in batch[:2]) > 2


def test_options_of_the_table_are_those_of_losses():
    """Every entry of NEEDED belongs to an existing loss."""
    for name, options in NEEDED.items():
        if name in LOSSES:
            assert options.keys() <= loss_options(LOSSES[name]).keys()


# What is otherwise elsewhere.


def test_the_two_losses_of_sentence_transformers_differ_under_dropout(embedder, tmp_path, reference):
    """With one column of documents they agree; with two, the plain one embeds both at once, the cached one one by one.

    Ours gives one loss, whatever the columns and mini-batches.
    """
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    model = reference(tmp_path / "base").train()
    columns = [["a b c", "d e"], ["b a f", "e d g h"], ["i j", "k l m"]]
    kinds = losses.MultipleNegativesRankingLoss, losses.CachedMultipleNegativesRankingLoss
    for num_columns in (1, 2):
        values = []
        for kind in kinds:
            torch.manual_seed(3)
            values.append(kind(model)([model.preprocess(column) for column in columns[: 1 + num_columns]], None).item())
        assert (abs(values[0] - values[1]) > 1e-3) == (num_columns == 2)
        documents = [text for column in columns[1 : 1 + num_columns] for text in column]
        targets = Targets(torch.arange(2 * num_columns).view(num_columns, 2).T)
        batch = make_batch(embedder)._replace(
            queries=embedder.pack(columns[0], role="query"), documents=embedder.pack(documents, role="document")
        )
        for tokens in (6, 1000):
            assert_cached_is_direct(embedder, batch, lambda: in_batch_negatives, targets=targets, tokens=tokens)
