"""memory.py: activations computed again give the same bits with less memory; mini-batches shrink as memory runs out."""

import dataclasses
import itertools

import pytest
import torch
from families import SEQUENCES, tiny_encoder
from naming import names, naming
from ranks import run_ranks
from test_train import assert_same, interrupted_at, make_batches, read_log, weights_of
from tiny import MEASURED, make_dataset, make_embedder

from embedft import FinetuneConfig, finetune
from embedft import device as devices
from embedft.encoders.folder import FAMILIES
from embedft.encoders.lora import LoraConfig, add_lora
from embedft.encoders.packing import pack
from embedft.losses.contrastive import in_batch_negatives
from embedft.training.memory import layers_of, recomputing
from embedft.training.train import TrainConfig, train


class Model:
    """What `recomputing` needs of an Embedder or a cross-encoder."""

    def __init__(self, encoder):
        self.encoder = encoder


def gradients(encoder, packed, *, recomputed: bool) -> tuple[dict, torch.Tensor, int]:
    """Gradients of the weights, the generator's final state, and the bytes that were kept for the backward pass."""
    kept = {}

    def keep(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    encoder.zero_grad()
    torch.manual_seed(0)
    with recomputing(Model(encoder), recomputed):
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            hidden_TD = encoder(packed)
        (hidden_TD * torch.randn(hidden_TD.shape)).sum().backward()
    weights = {p.untyped_storage().data_ptr() for p in encoder.parameters()}
    size = sum(number for place, number in kept.items() if place not in weights)
    return {name: p.grad.clone() for name, p in encoder.named_parameters()}, torch.get_rng_state(), size


@pytest.mark.parametrize("slack", [0.0, 1.0])
@pytest.mark.parametrize("model_type", [name for name in FAMILIES if hasattr(tiny_encoder(name), "layers")])
def test_every_family_gets_the_same_gradients(monkeypatch, model_type, slack):
    """Bit for bit under dropout, of hidden states and of attention weights, padded or not, with less memory."""
    monkeypatch.setattr(devices, "length_slack", lambda device: slack)
    encoder = tiny_encoder(model_type).train()
    encoder.attention_dropout = 0.1
    plain, state, size = gradients(encoder, pack(SEQUENCES), recomputed=False)
    found, after, less = gradients(encoder, pack(SEQUENCES), recomputed=True)
    assert_same(found, plain)
    assert torch.equal(after, state)
    assert less < 0.5 * size
    assert not any("forward" in vars(layer) for layer in encoder.layers)


@pytest.mark.parametrize(
    "changes",
    [{}, {"mini_batch_tokens": 20}, {"precision": "bfloat16", "mini_batch_tokens": 20}, {"depths": [1, 2]}],
    ids=str,
)
@pytest.mark.parametrize("with_lora", [False, True])
def test_training_ends_with_the_same_weights(tmp_path, changes, with_lora):
    """With gradient caching, autocast, drawn depths and LoRA, whose updates have no hooks in the backward pass."""
    found = []
    for recomputed in (False, True):
        embedder = make_embedder(tmp_path / "base")
        if with_lora:
            torch.manual_seed(0)
            add_lora(embedder, LoraConfig(rank=2, dropout=0.2))
            embedder.lora.get_submodule("layers.0.qkv").B.data.fill_(0.1)
        config = TrainConfig(epochs=1, lr=1e-3, **changes)
        config = dataclasses.replace(config, checkpoint_activations=recomputed)
        train(embedder, make_batches(embedder), in_batch_negatives, config)
        found.append(weights_of(embedder))
    assert_same(*found)
    assert not torch.equal(
        found[0]["encoder.layers.0.qkv.weight"], make_embedder(tmp_path / "base").encoder.layers[0].qkv.weight
    )


def test_both_sides_are_recomputed(tmp_path):
    embedder = make_embedder(tmp_path / "base")
    embedder.attach_query_side(make_embedder(tmp_path / "base"))
    assert layers_of(embedder) == [*embedder.encoder.layers, *embedder.query_side.encoder.layers]


def test_an_encoder_without_layers_is_refused(tmp_path):
    embedder = make_embedder(tmp_path / "base")
    embedder.encoder = torch.nn.Module()
    embedder.encoder.config = None
    with pytest.raises(ValueError, match=naming("checkpoint_activations", "Module", "layers")), recomputing(embedder):
        pass


def test_finetune_refuses_before_it_starts(tmp_path, monkeypatch):
    embedder = make_embedder(tmp_path / "base")
    monkeypatch.setattr(embedder.encoder, "layers", torch.nn.Sequential(*embedder.encoder.layers))
    config = FinetuneConfig(checkpoint_activations=True)
    with pytest.raises(ValueError, match=naming("checkpoint_activations", "layers")):
        finetune(embedder, make_dataset(), config, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


# Mini-batches of automatic size.

AUTO = TrainConfig(epochs=2, lr=1e-3, mini_batch_tokens="auto", checkpoint_every=2)
NO_MEMORY = "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to"


def limited(embedder, most: int, error=RuntimeError):
    """Memory for a forward pass of so many tokens; random numbers are drawn before it runs out."""
    encoder = embedder.encoder.forward

    def forward(packed):
        if len(packed.input_ids) > most:
            torch.rand(3)
            raise error(NO_MEMORY)
        return encoder(packed)

    embedder.encoder.forward = forward
    return embedder


def run(folder, out, config=AUTO, *, most=10**9, loss=in_batch_negatives, error=RuntimeError):
    out.mkdir(exist_ok=True)
    embedder = limited(make_embedder(folder), most, error)
    state = train(embedder, make_batches(embedder), loss, config, out=out)
    log = [{**record, **dict.fromkeys(MEASURED)} for record in read_log(out)]
    return weights_of(embedder), state.mini_batch_tokens, log


@pytest.mark.parametrize(
    ("error", "most", "expected"), [(RuntimeError, 30, 26), (MemoryError, 14, 14), (torch.OutOfMemoryError, 30, 26)]
)
def test_mini_batches_are_halved_until_they_fit(tmp_path, error, most, expected):
    """As with that size from the start, bit for bit: nothing is left of the attempts that failed.
    The first batch has 52 tokens, its longest text 14."""
    weights, tokens, log = run(tmp_path / "base", tmp_path / "auto", most=most, error=error)
    assert tokens == expected
    assert [record.pop("mini_batch_tokens") for record in log] == [tokens] * 8
    fixed = run(tmp_path / "base", tmp_path / "fixed", dataclasses.replace(AUTO, mini_batch_tokens=tokens))
    assert_same(weights, fixed[0])
    assert log == fixed[2]


def test_gradients_of_a_failed_attempt_are_dropped(tmp_path):
    """The first of two batches has had its backward pass when memory runs out at the second."""
    config, found = dataclasses.replace(AUTO, epochs=1, accumulate=2), []
    for tokens in ("auto", 29):  # half of the larger of the two batches
        embedder = make_embedder(tmp_path / "base")
        encoder, calls = embedder.encoder.forward, itertools.count(1)

        def forward(packed, encoder=encoder, calls=calls, tokens=tokens):
            if tokens == "auto" and next(calls) == 2:
                raise RuntimeError(NO_MEMORY)
            return encoder(packed)

        embedder.encoder.forward = forward
        batches = make_batches(embedder)
        state = train(embedder, batches, in_batch_negatives, dataclasses.replace(config, mini_batch_tokens=tokens))
        found.append(weights_of(embedder))
        assert state.mini_batch_tokens == (29 if tokens == "auto" else None)
    assert_same(*found)


def test_with_enough_memory_there_is_no_caching(tmp_path):
    weights, tokens, log = run(tmp_path / "base", tmp_path / "auto")
    assert tokens is None
    assert {record.pop("mini_batch_tokens") for record in log} == {None}
    fixed = run(tmp_path / "base", tmp_path / "fixed", dataclasses.replace(AUTO, mini_batch_tokens=None))
    assert_same(weights, fixed[0])
    assert log == fixed[2]


def test_the_size_is_resumed(tmp_path):
    """The run does not try what did not fit before: it would draw other numbers for dropout."""
    uninterrupted = run(tmp_path / "base", tmp_path / "one", most=20)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "base", tmp_path / "two", most=20, loss=interrupted_at(5))
    resumed = run(tmp_path / "base", tmp_path / "two")  # where all would fit
    assert_same(resumed[0], uninterrupted[0])
    assert resumed[1:] == uninterrupted[1:]


def test_it_ends_where_a_text_alone_does_not_fit(tmp_path):
    embedder = limited(make_embedder(tmp_path / "base"), 4)
    longest = max(batch.documents.max_seqlen for batch in list(make_batches(embedder).epoch(0))[:1])
    with pytest.raises(ValueError, match=naming("mini_batch_tokens", "'auto'", longest)) as caught:
        train(embedder, make_batches(embedder), in_batch_negatives, AUTO)
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_other_errors_are_raised_as_they_are(tmp_path):
    def loss(Q, D, targets):
        raise RuntimeError("something else")

    embedder = make_embedder(tmp_path / "base")
    with pytest.raises(RuntimeError, match=naming("else")):
        train(embedder, make_batches(embedder), loss, AUTO)


def test_what_the_allocator_says_is_out_of_memory():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert devices.is_out_of_memory(caught.value)
    for text in (
        "DefaultCPUAllocator: not enough memory: you tried to",
        "MPS backend out of memory (MPS allocated: 1",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    ):
        assert devices.is_out_of_memory(RuntimeError(text))
    assert not devices.is_out_of_memory(RuntimeError("shape"))


def test_several_ranks_need_a_number(tmp_path):
    make_embedder(tmp_path / "base")
    for message in run_ranks(2, refused, tmp_path / "base", folder=tmp_path):
        assert names(message, "mini_batch_tokens", "'auto'", 2, "ranks")


def refused(folder) -> str:
    embedder = make_embedder(folder)
    with pytest.raises(ValueError, match=naming("auto")) as caught:
        finetune(embedder, make_dataset(), FinetuneConfig(mini_batch_tokens="auto"))
    return str(caught.value)
