"""distributed.py: by hand; two and three ranks = one; resumed = uninterrupted; errors reach all; under torchrun."""

import contextlib
import dataclasses
import io
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
from naming import names, naming
from ranks import run_ranks
from tiny import MEASURED, make_dataset, make_embedder
from torch import nn
from torch.nn import Parameter

from embedft import FinetuneConfig, build_loss, finetune, load_embedder
from embedft.cli import main
from embedft.data.batches import make_batches
from embedft.encoders.packing import pack
from embedft.files import read_json
from embedft.losses.contrastive import in_batch_negatives
from embedft.training import distributed
from embedft.training.cached import mini_batches
from embedft.training.distributed import LocalBatch, OtherRankError, gather, rank_and_size
from embedft.training.references import FrozenEmbeddings
from embedft.training.train import NonFiniteError, TrainConfig, backward, train

METRIC = "ndcg@10"
STATE = ("step", "stopped", "evaluations", "best_step")


def rank() -> int:
    return rank_and_size()[0]


def token_ids(packed) -> list[list[int]]:
    return [part.tolist() for part in packed.input_ids.split(packed.lengths().tolist())]


# By hand.


def two_parts():
    """Lengths 1, 4, 2, 3: in order of length rows 1, 3, 2, 0, of which rank 0 has the first and the third."""
    queries, documents = pack([[1], [2, 2, 2, 2], [3, 3], [4, 4, 4]]), pack([[7, 7]])
    local = LocalBatch.of(queries, documents)
    Q, D = (
        torch.tensor([ids[0] for ids in token_ids(part)], dtype=torch.float32).view(-1, 1)
        for part in (local.queries, local.documents)
    )
    return token_ids(local.queries), token_ids(local.documents), [X.flatten().tolist() for X in local.gather(Q, D)]


def test_the_parts_of_two_ranks(tmp_path):
    """Rank 1 has no document; the vectors of all come back in the order of the batch."""
    whole = [[1, 2, 3, 4], [7]]
    assert run_ranks(2, two_parts, folder=tmp_path) == [
        ([[2, 2, 2, 2], [3, 3]], [[7, 7]], whole),
        ([[4, 4, 4], [1]], [], whole),
    ]


def test_one_rank_has_all_and_changes_nothing():
    assert rank_and_size() == (0, 1)
    queries, documents = pack([[1], [2, 2]]), pack([[7]])
    local = LocalBatch.of(queries, documents)
    assert local.queries is queries
    assert local.documents is documents
    Q, D = torch.ones(2, 3), torch.ones(1, 3)
    assert local.gather(Q, D)[0] is Q
    assert local.gather(Q, D)[1] is D
    weight, state = Parameter(torch.ones(2)), torch.get_rng_state()
    weight.grad = torch.tensor([3.0, 4.0])
    with distributed.summing_gradients([weight]) as begin_sums:
        begin_sums()
    distributed.broadcast_weights(nn.Linear(1, 1))
    state = torch.get_rng_state()
    distributed.reseed(1, apart=True)
    distributed.check_same({"seed": 1})
    assert torch.equal(torch.get_rng_state(), state)
    assert weight.grad.tolist() == [3.0, 4.0]
    assert distributed.from_first(lambda: 5) == distributed.together(lambda: 5) == 5
    assert distributed.rank_device(None) is None
    assert distributed.rank_device("cuda") == "cuda"


def gather_by_hand():
    own = torch.tensor([[[30.0], [20.0]], [[5.0]]][rank()], dtype=torch.float64, requires_grad=True)
    X = gather(own, torch.tensor([2, 0, 1]))
    value = X[0, 0] * X[2, 0] + X[1, 0] ** 2
    value.backward()
    return X.tolist(), value.item(), own.grad.tolist()


def test_gather_by_hand(tmp_path):
    """Order 2, 0, 1: rank 0 has rows 2 and 1 (30 and 20), rank 1 row 0 (5), so x = (5, 20, 30).

    L = x0 x2 + x1^2 = 150 + 400 = 550 on both. dL/dx = (x2, 2 x1, x0) = (30, 40, 5): rank 0 gets 5 for row 2 and 40 for
    row 1, rank 1 gets 30 for row 0, each once.
    """
    whole = [[5.0], [20.0], [30.0]]
    found = run_ranks(2, gather_by_hand, folder=tmp_path)
    assert found == [(whole, 550.0, [[5.0], [40.0]]), (whole, 550.0, [[30.0]])]


def gradients_by_hand():
    both, first, second, none, of_loss, bare = (Parameter(torch.zeros(2, 1, dtype=torch.float64)) for _ in range(6))
    of_loss.data = of_loss.data.float()
    both.grad = torch.tensor([[1.0], [2.0]]).double() * (1 + rank())
    if rank() == 0:
        first.grad = torch.tensor([[5.0], [6.0]]).double()
    else:
        second.grad = torch.tensor([[7.0], [8.0]]).double()
    of_loss.grad = torch.full((2, 1), 9.0 + rank())
    with distributed.summing_gradients([both, first, second, none], of_first=[of_loss, bare]):
        pass
    assert of_loss.grad.dtype is torch.float32
    return [None if p.grad is None else p.grad.flatten().tolist() for p in (both, first, second, none, of_loss, bare)]


def test_gradients_by_hand(tmp_path):
    """(1, 2) + 2 (1, 2) = (3, 6); what one rank has alone; none where none has; of the loss's own the first rank's."""
    summed = [[3.0, 6.0], [5.0, 6.0], [7.0, 8.0], None, [9.0, 9.0], None]
    assert run_ranks(2, gradients_by_hand, folder=tmp_path) == [summed] * 2


def sums_during_backward(case: str):
    """Gradients of a small chain x -> a -> b -> c, when each sum began, and whether hooks are gone."""
    generator = torch.Generator().manual_seed(rank())
    a, b, c, unused, frozen = (Parameter(torch.ones(3, 5, 5)[i] + i) for i in (0, 1, 2, 0, 0))
    frozen.requires_grad_(False)
    parameters, events, all_reduce = [a, b, c, unused, frozen], [], torch.distributed.all_reduce

    def watched(tensor, **options):
        events.append("sum")
        return all_reduce(tensor, **options)

    def passes():
        x = torch.randn(4, 5, generator=generator)
        return (((x @ a).tanh() @ b).tanh() @ c).square().sum()

    trained = [p for p in parameters if case == "unused" or p is not unused]
    has_pass = case != "idle" or rank() != 1
    patched = mock.patch.object(torch.distributed, "all_reduce", watched)
    with patched, distributed.summing_gradients(trained) as begin_sums:
        passes().backward()  # the first of two batches
        events.append("first")
        if has_pass:
            if case != "never":
                begin_sums()
            passes().backward()
        events.append("last")
    found = [None if p.grad is None else p.grad.clone() for p in parameters]
    passes().backward()  # does not begin a sum
    return found, events


SUMS = ("never", "begun", "idle", "unused")


def sums_of_every_case():
    return {case: sums_during_backward(case) for case in SUMS}


def test_sums_begin_while_the_backward_pass_goes_on(tmp_path):
    """With bits of sums after it, on three ranks: all three begun during the last pass, the number of gradients that
    exist last. Without a pass on a rank, or behind a parameter that it does not use, they begin after it."""
    ranks = run_ranks(3, sums_of_every_case, folder=tmp_path)
    for number, found in enumerate(ranks):
        for case in SUMS:
            assert_equal(found[case][0], ranks[0][case][0], 0.0)
            assert found[case][0][3:] == [None, None]
        assert_equal(found["begun"][0], found["never"][0], 0.0)
        during = ["first", "sum", "sum", "sum", "last", "sum"]
        after = ["first", "last", "sum", "sum", "sum", "sum"]
        assert found["begun"][1] == during
        assert found["never"][1] == after
        assert found["idle"][1] == (after if number == 1 else during)
        assert found["unused"][1] == [*after, "sum"]


def what_ranks_tell_each_other():
    """All small checks that need ranks, in one launch."""
    found = {}
    module = nn.BatchNorm1d(2).double()  # parameters, and buffers of two types
    with torch.no_grad():
        for i, tensor in enumerate((*module.parameters(), *module.buffers())):
            tensor.fill_(10 * rank() + i)
    distributed.broadcast_weights(module, nn.Identity())
    found["weights"] = [tensor.flatten()[0].item() for tensor in (*module.parameters(), *module.buffers())]

    draws = []
    for numbers, apart in (((1, 2), True), ((1, 2), True), ((1, 3), True), ((1, 2), False), ((1, 3), False)):
        distributed.reseed(*numbers, apart=apart)
        draws.append(torch.rand(()).item())
    found["draws"] = draws

    found["from_first"] = distributed.from_first(lambda: {"of": rank()})
    found["together"] = distributed.together(rank)

    def fails_on(where: int, error: Exception):
        if rank() == where:
            raise error
        return "fine"

    for name, call in {
        "first fails": lambda: distributed.from_first(lambda: fails_on(0, KeyError("x"))),
        "one of all fails": lambda: distributed.together(lambda: fails_on(1, OSError("gone"))),
        "all fail": lambda: distributed.together(lambda: fails_on(rank(), ValueError(f"of {rank()}"))),
        "the same": lambda: distributed.check_same({"lr": 1, "seed": [2]}),
        "another": lambda: distributed.check_same({"lr": 1, "seed": 7 + rank()}),
        "one more": lambda: distributed.check_same({"lr": 1} | ({"seed": 3} if rank() else {})),
    }.items():
        try:
            found[name] = call()
        except (ValueError, OSError, KeyError) as error:
            found[name] = type(error), str(error)
    found["devices"] = [distributed.rank_device(name) for name in ("cpu", "cuda", "cuda:5")]
    distributed.devices.default_device = lambda: torch.device("mps")
    found["devices"].append(distributed.rank_device(None))
    distributed.devices.default_device = lambda: torch.device("cuda")
    found["devices"].append(distributed.rank_device(None))
    return found


def fits(found: tuple[type, str], kind: type, *facts: object) -> bool:
    return found[0] is kind and names(found[1], *facts)


def test_what_ranks_tell_each_other(tmp_path):
    first, second = run_ranks(2, what_ranks_tell_each_other, folder=tmp_path)
    assert first["weights"] == second["weights"] == [0, 1, 2, 3, 4]
    apart, again, next_batch, alike, alike_next = range(5)
    assert [a == b for a, b in zip(first["draws"], second["draws"], strict=True)] == [False, False, False, True, True]
    for draws in (first["draws"], second["draws"]):
        assert draws[apart] == draws[again]
        assert len({draws[i] for i in (apart, next_batch, alike, alike_next)}) == 4
    assert first["from_first"] == second["from_first"] == {"of": 0}
    assert (first["together"], second["together"]) == (0, 1)
    assert first["first fails"] == (KeyError, "'x'")
    assert fits(second["first fails"], OtherRankError, "rank", 0)
    assert fits(first["one of all fails"], OtherRankError, "rank", 1, "gone")
    assert second["one of all fails"] == (OSError, "gone")
    assert (first["all fail"], second["all fail"]) == ((ValueError, "of 0"), (ValueError, "of 1"))
    for found in (first, second):
        assert found["the same"] is None
        assert fits(found["another"], ValueError, "seed", "rank", 7, ..., 0, ..., 8, ..., 1)
        assert fits(found["one more"], ValueError, "seed", "rank", None, ..., 0, ..., 3, ..., 1)
    assert first["devices"] == ["cpu", "cuda:0", "cuda:5", "cpu", "cuda:0"]
    assert second["devices"] == ["cpu", "cuda:1", "cuda:5", "cpu", "cuda:1"]


# A whole training.

CONFIG = TrainConfig(
    epochs=2, lr=1e-3, warmup=0.2, weight_decay=0.1, accumulate=2, eval_every=1, checkpoint_every=2, loss_lr=1e-2
)
LOSS = {
    "name": "sum",
    "losses": [{"name": "learnable_temperature"}, {"name": "toward_base", "distance": "similarities"}],
    "weights": [1.0, 0.5],
}


class Drawing(nn.Module):
    """In-batch negatives times a number drawn from torch's generator; its parameter gets a gradient of its own rank."""

    def __init__(self):
        super().__init__()
        self.offset = Parameter(torch.zeros(()))

    def forward(self, Q, D, targets):
        return in_batch_negatives(Q, D, targets) * (0.5 + torch.rand(())) + self.offset * (1 + rank())


def train_once(base: Path, out: Path, config: TrainConfig, make_loss, *, batch_size=5, dropout=0.0, die_at=None):
    """Weights, the loss's own, state, and the losses of the steps; every rank but the first begins elsewhere."""
    out.mkdir(exist_ok=True)
    embedder = make_embedder(base, dropout=dropout, dtype=torch.float64)
    dataset = make_dataset(11, 9, negatives=3)
    references = {"base": FrozenEmbeddings(embedder, dataset)}
    loss, calls = make_loss(), itertools.count(1)
    with torch.no_grad():
        for parameter in (*embedder.parameters(), *loss.parameters()):
            parameter += rank()

    def die(module, arguments):
        if next(calls) == die_at:
            (base / f"reached-{rank()}").touch()
            while len(list(base.glob("reached-*"))) < rank_and_size()[1]:
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)

    loss.register_forward_pre_hook(die)

    def evaluate(embedder):
        assert rank() == 0
        done = sum("metrics" in record for record in read_log(out)) if (out / "train.jsonl").exists() else 0
        return {METRIC: (0.1, 0.3, 0.4, 0.2, 0.35)[done]}

    batches = make_batches(dataset, embedder.pack, batch_size=batch_size, seed=0, num_negatives=3)
    state = train(embedder, batches, loss, config, out=out, references=references, evaluate=evaluate)
    return embedder.state_dict(), loss.state_dict(), {name: getattr(state, name) for name in STATE}


def make_sum():
    return build_loss(LOSS)


def read_log(out: Path) -> list[dict]:
    records = [json.loads(line) for line in (out / "train.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key not in MEASURED} for record in records]


def assert_equal(ours, theirs, tolerance: float) -> None:
    """Tensors and numbers of two nested things, each within `tolerance`; everything else the same."""
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys()
        for key in theirs:
            assert_equal(ours[key], theirs[key], tolerance)
    elif isinstance(theirs, list | tuple):
        assert len(ours) == len(theirs)
        for our, their in zip(ours, theirs, strict=True):
            assert_equal(our, their, tolerance)
    elif isinstance(theirs, torch.Tensor | float):
        our, their = torch.as_tensor(ours), torch.as_tensor(theirs)
        assert our.dtype is their.dtype
        assert (our - their).abs().max() <= tolerance
    else:
        assert ours == theirs


@pytest.mark.parametrize(("size", "mini_batch_tokens"), [(2, None), (2, 8), (3, 8)])
def test_several_ranks_are_one(tmp_path, size, mini_batch_tokens):
    """Batches of 5, 5 and 1 pairs with 3 hard negatives each, so in the last of an epoch ranks have no query.

    The base is a reference, the temperature is learned (in float32, whose rounding is allowed for), two batches make a
    step, and the best weights are those of the second.
    """
    config = dataclasses.replace(CONFIG, mini_batch_tokens=mini_batch_tokens)
    one = train_once(tmp_path / "base", tmp_path / "one", config, make_sum)
    found = run_ranks(size, train_once, tmp_path / "base", tmp_path / "many", config, make_sum, folder=tmp_path)
    for several in found:
        assert_equal(several[0], one[0], 1e-9)
        assert_equal(several[1], one[1], 1e-6)
        assert several[2] == one[2]
    assert one[2]["best_step"] == 2
    assert [key for key, tensor in found[0][1].items() if not torch.equal(tensor, found[-1][1][key])] == []
    assert_equal(read_log(tmp_path / "many"), read_log(tmp_path / "one"), 1e-9)
    assert len(read_log(tmp_path / "one")) == 4 + 5


def test_a_batch_of_one_pair_on_three_ranks(tmp_path):
    """Two ranks have nothing to embed in any batch, and still stay in step."""
    config = dataclasses.replace(CONFIG, epochs=1, accumulate=4)
    arguments = (config, make_sum)
    one = train_once(tmp_path / "base", tmp_path / "one", *arguments, batch_size=1)
    place = {"folder": tmp_path}
    for several in run_ranks(3, train_one_pair, tmp_path / "base", tmp_path / "many", config, **place):
        assert_equal(several[0], one[0], 1e-9)
        assert several[2] == one[2]


def train_one_pair(base, out, config):
    return train_once(base, out, config, make_sum, batch_size=1)


def train_drawing(base, out, config, die_at=None):
    return train_once(base, out, config, Drawing, dropout=0.1, die_at=die_at)


@pytest.mark.parametrize("mini_batch_tokens", [None, 20])
def test_resumed_after_sigkill(tmp_path, mini_batch_tokens):
    """Both ranks killed in the third step, behind the checkpoint of the second; dropout on, and a loss that draws."""
    make_embedder(tmp_path / "base", dropout=0.1)
    config = dataclasses.replace(CONFIG, mini_batch_tokens=mini_batch_tokens)
    place = {"folder": tmp_path}
    whole = run_ranks(2, train_drawing, tmp_path / "base", tmp_path / "whole", config, **place)
    assert run_ranks(2, train_drawing, tmp_path / "base", tmp_path / "cut", config, 5, **place) == [None, None]
    assert [path.name for path in (tmp_path / "cut" / "checkpoints").iterdir()] == ["step-000002"]
    assert len(read_log(tmp_path / "cut")) == 2 * 2 + 1
    resumed = run_ranks(2, train_drawing, tmp_path / "base", tmp_path / "cut", config, **place)
    assert_equal(resumed, [whole[0]] * 2, 0.0)
    assert resumed[0][2]["step"] == 4
    assert_equal(read_log(tmp_path / "cut")[5:], read_log(tmp_path / "whole")[5:], 0.0)


class Spy(nn.Module):
    """Records its arguments and a random number, drawn as a loss might draw one."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, Q, D, targets):
        self.seen.append((Q.detach().clone(), D.detach().clone(), torch.rand(()).item()))
        return in_batch_negatives(Q, D, targets)


class SameBatch:
    """One batch with the same text as two queries and as two documents, twice per epoch."""

    def __init__(self, embedder):
        batch = next(make_batches(make_dataset(2, 2), embedder.pack, batch_size=2, seed=0).epoch(0))
        same = embedder.pack(["a b c"] * 2, role="query")
        self.batch = batch._replace(queries=same, documents=same)

    def __len__(self):
        return 2

    def epoch(self, number, *, start=0):
        return iter([self.batch] * (2 - start))


def see_dropout(base, mini_batch_tokens):
    embedder = make_embedder(base, dropout=0.1)
    spy, state = Spy(), torch.get_rng_state()
    config = TrainConfig(epochs=2, lr=1e-12, accumulate=2, mini_batch_tokens=mini_batch_tokens)
    train(embedder, SameBatch(embedder), spy, config)
    assert torch.equal(torch.get_rng_state(), state)
    return spy.seen


@pytest.mark.parametrize("mini_batch_tokens", [None, 5])
def test_ranks_draw_different_dropout(tmp_path, mini_batch_tokens):
    """The same text, 4 batches with 4 vectors each, no two alike; what the loss gets and draws is alike on both."""
    make_embedder(tmp_path / "base", dropout=0.1)
    first, second = run_ranks(2, see_dropout, tmp_path / "base", mini_batch_tokens, folder=tmp_path)
    assert_equal(first, second, 0.0)
    vectors = [vector for Q, D, _ in first for vector in (*Q, *D)]
    assert len(vectors) == 16
    assert all((a - b).abs().max() > 1e-3 for a, b in itertools.combinations(vectors, 2))
    assert len({number for _, _, number in first}) == 4


def cached_and_direct(base):
    """With dropout and a loss that draws: gradient caching, and the same mini-batches with their graphs kept."""
    embedder = make_embedder(base, dropout=0.1, dtype=torch.float64).train()
    batch = next(make_batches(make_dataset(11, 9), embedder.pack, batch_size=11, seed=0).epoch(0))
    local, found = LocalBatch.of(batch.queries, batch.documents), []

    def drawing(Q, D, targets):
        return in_batch_negatives(Q, D, targets) * (0.5 + torch.rand((), dtype=Q.dtype))

    for tokens in (20, None):
        embedder.zero_grad()
        if tokens is None:
            distributed.reseed(7, apart=True)
            vectors = []
            for packed, role in ((local.queries, "query"), (local.documents, "document")):
                parts, place = mini_batches(packed, 20)
                vectors.append(torch.cat([embedder.embed(part, role=role) for part in parts])[place])
            Q, D = local.gather(*vectors)
            distributed.reseed(7, apart=False)
            value = drawing(Q, D, batch.targets)
            value.backward()
        else:
            settings = {"weight": 1.0, "seeds": (7,), "at_once": tokens}
            value, _ = backward(embedder, local, batch.targets, drawing, TrainConfig(), **settings)
        found.append([value.detach(), *(p.grad.clone() for p in embedder.parameters() if p.grad is not None)])
    return found


def test_cached_is_direct_on_each_rank(tmp_path):
    make_embedder(tmp_path / "base", dropout=0.1)
    for cached, direct in run_ranks(2, cached_and_direct, tmp_path / "base", folder=tmp_path):
        assert_equal(cached, direct, 1e-10)


# Errors.


def errors_of_train(base, folder):
    found = {}

    def attempt(name, **changed):
        embedder = make_embedder(base, dropout=0.0)
        dataset = make_dataset(changed.pop("num_queries", 4), 4)
        batches = make_batches(dataset, embedder.pack, batch_size=2, seed=0)
        loss = changed.pop("loss", in_batch_negatives)
        try:
            train(embedder, batches, loss, TrainConfig(epochs=1), **changed)
        except ValueError as error:
            found[name] = type(error), str(error)

    attempt("not finite", loss=lambda Q, D, targets: in_batch_negatives(Q, D, targets) * float("nan"))
    attempt("metric", evaluate=lambda embedder: {"mrr@10": 0.5})
    attempt("evaluation", evaluate=lambda embedder: {}["nothing"] if rank() else int("x"))
    attempt("batches", num_queries=4 + 2 * rank())
    attempt("checkpoint", out=folder / f"of-{rank()}" if rank() else folder / "elsewhere")
    return found


def test_errors_of_training_come_on_all_ranks(tmp_path):
    embedder = make_embedder(tmp_path / "base", dropout=0.0)
    (tmp_path / "of-1").mkdir()
    (tmp_path / "elsewhere").mkdir()
    batches = make_batches(make_dataset(4, 4), embedder.pack, batch_size=2, seed=0)
    train(embedder, batches, in_batch_negatives, TrainConfig(epochs=1), out=tmp_path / "of-1")
    first, second = run_ranks(2, errors_of_train, tmp_path / "base", tmp_path, folder=tmp_path)
    expected = {
        "not finite": (NonFiniteError, "step", 1, "loss", "nan"),
        "metric": (ValueError, "select", "ndcg@10", "mrr@10"),
        "evaluation": (ValueError, "int()", "'x'"),
        "batches": (ValueError, "batches", "rank", 2, ..., 0, ..., 3, ..., 1),
        "checkpoint": (ValueError, "checkpoint", "rank", 0, ..., 0, ..., 2, ..., 1),
    }
    for found, changed in ((first, {}), (second, {"evaluation": (OtherRankError, "rank", 0)})):
        assert found.keys() == expected.keys()
        assert all(fits(found[name], *facts) for name, facts in (expected | changed).items()), found


def refuse_to_finetune(base, out):
    config = FinetuneConfig(epochs=1, lr=1e-3 * (1 + rank()))
    with pytest.raises(ValueError, match=naming("lr", "rank", 0.001, ..., 0, ..., 0.002, ..., 1)):
        finetune(make_embedder(base), make_dataset(), config, out=out)
    config = FinetuneConfig(epochs=1)
    hashes = (make_dataset(seed=seed).sha256() for seed in (0, 1))
    with pytest.raises(ValueError, match=naming("train", *hashes, "rank", 0, 1)):
        finetune(make_embedder(base), make_dataset(seed=rank()), config, out=out)
    assert not (out / "config.json").exists()
    out.mkdir(exist_ok=True)
    (out / "file").touch()
    with pytest.raises(ValueError, match=naming(*(("rank", 0) if rank() else (out, "overwrite", "resume")))):
        finetune(make_embedder(base), make_dataset(), config, out=out / ("new" if rank() else ""))


def test_finetune_refuses_on_all_ranks(tmp_path):
    make_embedder(tmp_path / "base")
    run_ranks(2, refuse_to_finetune, tmp_path / "base", tmp_path / "run", folder=tmp_path)


# The command line.


def free_ports(count: int) -> list[int]:
    """Distinct ports: a rank that is ahead must not join the rendezvous that another is still leaving."""
    with contextlib.ExitStack() as stack:
        listeners = [stack.enter_context(socket.socket()) for _ in range(count)]
        for listener in listeners:
            listener.bind(("127.0.0.1", 0))
        return [listener.getsockname()[1] for listener in listeners]


def call_commands(folder: Path, ports: list[int], commands: list[list[str]]) -> list[tuple]:
    """(exit code, stdout, stderr) of each, in a process that looks like one of torchrun's."""
    os.chdir(folder)
    os.environ.update(MASTER_ADDR="127.0.0.1", EMBEDFT_PROGRESS="0")
    found = []
    for port, command in zip(ports, commands, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = main(command)
            except SystemExit as stopped:
                code = stopped.code
        assert not torch.distributed.is_initialized()
        found.append((code, out.getvalue(), err.getvalue()))
    return found


FINETUNE = ["finetune", "model", "pairs.json", "--epochs", "1", "--batch_size", "5", "--seed", "3"]


def test_the_command_line(tmp_path):
    """A user's error is reported once and ends all ranks with exit code 2; results are printed once."""
    make_embedder(tmp_path / "model", dropout=0.0)
    make_dataset().save(tmp_path / "pairs.json")
    (tmp_path / "gap.csv").write_text("question,context\na,b\n,c\nb,d\n")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    commands = [FINETUNE, [*FINETUNE, "--out", "run", "--schedule", "sudden"], [*FINETUNE, "--out", "full"]]
    commands.append(["finetune", "model", "nowhere.json", "--out", "run"])
    facts = ("--out",), ("schedule", "sudden", "linear"), ("full", "overwrite", "resume"), ("nowhere.json",)
    good = [*FINETUNE, "--out", "fresh", "--validation", "pairs.json", "--resume"]
    gap = ["finetune", "model", "gap.csv", "--out", "gap", "--epochs", "1", "--skip-empty"]
    every = [*commands, good, gap]
    first, second = run_ranks(2, call_commands, tmp_path, free_ports(len(every)), every, folder=tmp_path, grouped=False)
    for named, (code, out, err), other in zip(facts, first[:4], second[:4], strict=True):
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert names(err, "finetune", "error", *named), err
        assert other == (2, "", "")
    code, out, err = first[4]
    began, warned = err.splitlines()
    assert code == 0
    assert names(began, "fresh", "resume")
    assert names(warned, "finetune", "warning", 12, 12, "questions", 9, 9, "validation")
    told = [line.partition(" ")[0] for line in out.splitlines()]
    assert told == ["3", "kept", "ndcg@10:", "these", "model:"]
    code, out, err = first[5]
    assert (code, out.splitlines()[-1], err.count("\n")) == (0, "model: gap/model", 1)
    assert names(err, "gap.csv", 1, "empty")
    assert second[4:] == [(0, "", ""), (0, "", "")]
    assert (tmp_path / "fresh" / "DONE").is_file()


def test_torchrun(tmp_path, monkeypatch, capsys):
    """`torchrun --nproc-per-node 2` writes the model that one process writes, and prints what it prints."""
    make_embedder(tmp_path / "model", dropout=0.0)
    make_dataset().save(tmp_path / "pairs.json")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EMBEDFT_PROGRESS", "0")
    options = ["--device", "cpu", "--out", "run"]
    root = Path(distributed.__file__).parents[2]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "embedft"]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, *FINETUNE, *options], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"3 steps, loss [0-9.]+ -> [0-9.]+\nmodel: run/model\n", done.stdout)
    shutil.move("run", "many")
    assert main([*FINETUNE, *options]) == 0
    assert capsys.readouterr().out == done.stdout
    one, many, base = (
        torch.from_numpy(load_embedder(folder, device="cpu").encode(list(make_dataset().corpus.values())))
        for folder in ("run/model", "many/model", "model")
    )
    # Of the vectors, not of the weights: where a gradient is zero but for rounding, Adam makes steps of that.
    assert_equal(many, one, 1e-6)
    assert (one - base).abs().max() > 1e-4
    assert read_json("many/config.json") == read_json("run/config.json")
    assert sorted(path.name for path in Path("many").iterdir()) == sorted(path.name for path in Path("run").iterdir())
