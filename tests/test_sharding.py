"""Two and three ranks that each keep a part of the encoder train it as one process does; what cannot be sharded."""

import dataclasses

import pytest
import torch
from naming import naming
from ranks import run_ranks
from test_distributed import CONFIG, assert_equal, make_sum, read_log, train_drawing, train_once, train_one_pair
from tiny import make_dataset, make_embedder
from torch import nn

from embedft import FinetuneConfig, finetune, load_embedder, new_scorer
from embedft.training import sharding
from embedft.training.memory import check_memory
from embedft.training.sharding import Sharding, clip_gradients
from embedft.training.train import TrainConfig

SHARDED = dataclasses.replace(CONFIG, shard_weights=True)


@pytest.mark.parametrize(
    "options", [{}, {"mini_batch_tokens": 8}, {"checkpoint_activations": True}, {"lr_decay": 0.5}], ids=str
)
def test_two_ranks_are_one(tmp_path, options):
    """As without sharding (test_distributed.py): a learned temperature, a reference, clipped gradients, the best
    weights of several validations, batches in which a rank has no query."""
    one = train_once(tmp_path / "base", tmp_path / "one", dataclasses.replace(CONFIG, **options), make_sum)
    arguments = tmp_path / "base", tmp_path / "many", dataclasses.replace(SHARDED, **options), make_sum
    for several in run_ranks(2, train_once, *arguments, folder=tmp_path):
        assert_equal(several[0], one[0], 1e-9)
        assert_equal(several[1], one[1], 1e-6)
        assert several[2] == one[2]
    assert_equal(read_log(tmp_path / "many"), read_log(tmp_path / "one"), 1e-9)


def test_ranks_without_texts_stay_in_step(tmp_path):
    config = dataclasses.replace(CONFIG, epochs=1, accumulate=4)
    one = train_once(tmp_path / "base", tmp_path / "one", config, make_sum, batch_size=1)
    config = dataclasses.replace(config, shard_weights=True)
    for several in run_ranks(3, train_one_pair, tmp_path / "base", tmp_path / "many", config, folder=tmp_path):
        assert_equal(several[0], one[0], 1e-9)
        assert several[2] == one[2]


def test_resumed_after_sigkill(tmp_path):
    """From the checkpoint of the second step, with dropout; the checkpoint is whole, as without sharding."""
    make_embedder(tmp_path / "base", dropout=0.1)
    place = {"folder": tmp_path}
    whole = run_ranks(2, train_drawing, tmp_path / "base", tmp_path / "whole", SHARDED, **place)
    assert run_ranks(2, train_drawing, tmp_path / "base", tmp_path / "cut", SHARDED, 5, **place) == [None, None]
    resumed = run_ranks(2, train_drawing, tmp_path / "base", tmp_path / "cut", SHARDED, **place)
    assert_equal(resumed, [whole[0]] * 2, 0.0)
    assert_equal(read_log(tmp_path / "cut")[5:], read_log(tmp_path / "whole")[5:], 0.0)


def parts_of(base):
    """Numbers of weights that this rank keeps, of its embedder's outside and inside `whole`, and the weights then."""
    embedder = make_embedder(base, dtype=torch.float64)
    expected = {name: x.clone() for name, x in embedder.state_dict().items()}
    parts = Sharding(embedder)
    kept = sum(p.to_local().numel() for p in parts.trained.encoder.parameters())
    outside = sum(p.numel() for p in embedder.encoder.parameters())
    with parts.whole() as whole:
        assert whole is embedder
        assert all(torch.equal(x, expected[name]) for name, x in whole.state_dict().items())
        vectors = whole.encode(["hello world"])
    assert sum(p.numel() for p in embedder.encoder.parameters()) == 0
    return kept, outside, vectors.tolist()


def test_each_rank_keeps_half(tmp_path):
    embedder = make_embedder(tmp_path / "base", dtype=torch.float64)
    total = sum(p.numel() for p in embedder.encoder.parameters())
    found = run_ranks(2, parts_of, tmp_path / "base", folder=tmp_path)
    assert sum(kept for kept, _, _ in found) == total
    assert max(kept for kept, _, _ in found) < 0.51 * total
    for _, outside, vectors in found:
        assert outside == 0
        assert vectors == embedder.encode(["hello world"]).tolist()


def clipped_by_hand():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    own = nn.Parameter(torch.zeros(1))
    own.grad = torch.tensor([2.0])
    parts = nn.Parameter(distribute_tensor(torch.zeros(2), init_device_mesh("cpu", (2,)), [Shard(0)]))
    parts.grad = distribute_tensor(torch.tensor([4.0, 4.0]), parts.device_mesh, [Shard(0)])
    norm = clip_gradients([own, parts], 3.0)
    return norm.item(), own.grad.tolist(), parts.grad.full_tensor().tolist()


def test_clipped_by_hand(tmp_path):
    """sqrt(2^2 + 4^2 + 4^2) = 6, of which half is kept."""
    for norm, own, parts in run_ranks(2, clipped_by_hand, folder=tmp_path):
        assert norm == 6.0
        assert [*own, *parts] == pytest.approx([1.0, 2.0, 2.0], rel=1e-6)


def finetuned(base, out, is_sharded):
    embedder, data = make_embedder(base, dropout=0.0, dtype=torch.float64), make_dataset(12, 9)
    config = FinetuneConfig(epochs=2, batch_size=4, lr=1e-2, shard_weights=is_sharded)
    assert finetune(embedder, data, config, validation=data, out=out) is embedder
    return {name: x.clone() for name, x in embedder.state_dict().items()}


@pytest.mark.filterwarnings("ignore:.*memorisation")
def test_finetune(tmp_path):
    """From the first check to the saved model."""
    one = finetuned(tmp_path / "base", tmp_path / "one", False)
    found = run_ranks(2, finetuned, tmp_path / "base", tmp_path / "two", True, folder=tmp_path)
    saved = load_embedder(tmp_path / "two" / "model", dtype=torch.float64).state_dict()
    for two in (*found, saved):
        assert_equal(two, one, 1e-9)


def test_what_cannot_be_sharded(tmp_path, monkeypatch):
    embedder = make_embedder(tmp_path / "base")
    with pytest.raises(ValueError, match=naming("shard_weights", "one", "torchrun")):
        check_memory(embedder, TrainConfig(shard_weights=True))
    with pytest.raises(ValueError, match=naming("shard_weights", "refresh")):
        Sharding(embedder, refresh=print)
    for options in ({"ema": 0.9}, {"tuned_share": 0.5}, {"depths": [1, 2]}, {"precision": "float16"}):
        with pytest.raises(ValueError, match=naming(*options, "shard_weights")):
            TrainConfig(shard_weights=True, **options)
    for options in ({"lora": {"rank": 2}}, {"mine_every": 1, "num_negatives": 1}):
        with pytest.raises(ValueError, match=naming(next(iter(options)), "shard_weights")):
            FinetuneConfig(shard_weights=True, **options)
    with pytest.raises(ValueError, match=naming("shard_weights", "Scorer")):
        sharding.check_sharding(new_scorer(make_embedder(tmp_path / "base")), num_ranks=2)
    embedder.query_side = make_embedder(tmp_path / "base")
    with pytest.raises(ValueError, match=naming("shard_weights", "queries")):
        sharding.check_sharding(embedder, num_ranks=2)
    embedder.query_side, embedder.encoder.layers = None, None
    with pytest.raises(ValueError, match=naming("shard_weights", "layers")):
        sharding.check_sharding(embedder, num_ranks=2)
