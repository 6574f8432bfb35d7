"""fingerprint.py: one hash over everything that vectors depend on."""

import functools
import importlib.util
import linecache
import sys

import numpy as np
import pytest
import tokenizers
import torch
from naming import naming
from tiny import make_embedder

from embedft.encoders import fingerprint as fingerprints
from embedft.encoders.fingerprint import fingerprint, weights_sha256
from embedft.encoders.pooling import POOLINGS, Pooling
from embedft.encoders.store import Store

TEXTS = ["a b c", "", "the revenue", "what order of the world", "a b c", "x" * 30, "7 8 9 hello hello world"]


def change_weight(embedder):
    with torch.no_grad():
        embedder.encoder.layers[1].feed_forward_out.bias[3] += 1


def change_weight_unseen(embedder):
    """Changes that autograd's version counter misses."""
    embedder.encoder.embeddings.token.weight.data[7, 3] += 1


def step(embedder):
    embedder.train()
    embedder.embed(embedder.pack(TEXTS, role="document"), role="document")[:, 0].sum().backward()
    torch.optim.SGD(embedder.parameters(), lr=1.0).step()
    embedder.zero_grad()


def change_tokenizer(embedder):
    embedder.tokenizer.backend.normalizer = tokenizers.normalizers.Replace("a", "b")


CHANGES = {
    "weight": change_weight,
    "weight unseen": change_weight_unseen,
    "training step": step,
    "prompt": lambda e: e.prompts.update(document="the "),
    "prompt left out": lambda e: (e.prompts.update(document="the "), setattr(e.pooling, "include_prompt", False)),
    "max_length": lambda e: setattr(e, "max_length", 5),
    "pooling": lambda e: setattr(e, "pooling", Pooling(("cls",), 32)),
    "normalize": lambda e: setattr(e, "normalize", False),
    "dtype": lambda e: e.to(torch.bfloat16),
    "tokenizer": change_tokenizer,
    "truncation side": lambda e: (e.tokenizer.config.update(truncation_side="left"), setattr(e, "max_length", 5)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_nothing_stale_comes_back(tiny_bert, tmp_path, name):
    embedder = make_embedder(tiny_bert, store=tmp_path)
    before, old = embedder.encode(TEXTS), embedder.space("document")
    CHANGES[name](embedder)
    new = embedder.space("document")
    assert new.fingerprint != old.fingerprint
    found = embedder.encode(TEXTS)
    assert embedder.store.misses == 12
    embedder.store = None
    np.testing.assert_allclose(found, embedder.encode(TEXTS), rtol=0, atol=1e-6)
    assert np.abs(found - before).max() > 1e-4
    assert len(Store(tmp_path).spaces()) == 2


def test_all_that_vectors_depend_on_is_in_the_fingerprint(write_tiny, tmp_path):
    """Settings that change no weight: of the configuration, of pooling, of how torch multiplies."""
    variants = {
        "as it is": {},
        "activation": {"hidden_act": "relu"},
        "eps": {"layer_norm_eps": 1e-3},
        "heads": {"num_attention_heads": 8},
        "lower case": {"lower_case": True},
        "pooling": {"pooling": {"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True}},
        "query prompt": {"settings": {"prompts": {"query": "query: "}}},
        "length": {"max_seq_length": 6},
        "dot": {"settings": {"similarity_fn_name": "dot"}, "normalize": False},
    }
    spaces = {}
    for name, options in variants.items():
        embedder = make_embedder(write_tiny(tmp_path / name, modules=True, **options))
        spaces[name] = embedder.space("query")
    assert len({space.fingerprint for space in spaces.values()}) == len(variants)
    assert spaces["pooling"].dim == 64

    embedder = make_embedder(tmp_path / "as it is")
    assert embedder.space("query").fingerprint == spaces["as it is"].fingerprint
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert embedder.space("query").fingerprint != spaces["as it is"].fingerprint
    precision = torch.backends.mkldnn.matmul.fp32_precision
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    try:
        assert embedder.space("query").fingerprint != spaces["as it is"].fingerprint
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = precision
    # What they do not depend on.
    embedder.truncate_dim, embedder.prompts = 8, {"document": "other", "name": "of no role"}
    embedder.train()
    assert embedder.space("query").fingerprint == spaces["as it is"].fingerprint
    assert embedder.space("query").dim == 32
    with pytest.raises(ValueError, match=naming("role", "'passage'", "query", "document")):
        embedder.space("passage")


def test_weights_are_told_apart_by_name_shape_and_type():
    """24 bytes of zeros each."""
    hashes = []
    for name, shape, dtype in (
        ("a", (2, 3), torch.float32),
        ("b", (2, 3), torch.float32),
        ("a", (3, 2), torch.float32),
        ("a", (2, 3), torch.int32),
    ):
        module = torch.nn.Module()
        module.register_buffer(name, torch.zeros(shape, dtype=dtype))
        hashes.append(weights_sha256(module))
    assert len(set(hashes)) == 4


def layer(seed: int = 0) -> torch.nn.Linear:
    generator = torch.Generator().manual_seed(seed)
    module = torch.nn.Linear(70, 100)  # more than a block of 8 KiB, and a rest
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return module


def take_step(optimizer_type, **options):
    def change(module):
        for parameter in module.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer_type(module.parameters(), lr=0.1, **options).step()

    return change


def assign_data(module):
    module.weight.data = module.weight.data + 1


def write_through_numpy(module):
    module.bias.detach().numpy()[-1] += 1


def swap_rows_of_data(module):
    module.weight.data[[1, 60]] = module.weight.data[[60, 1]]


def copy_in(mode):
    def change(module):
        with mode():
            module.weight.copy_(torch.ones(100, 70))

    return change


WAYS = {
    "AdamW, fused": take_step(torch.optim.AdamW, fused=True),
    "AdamW, foreach": take_step(torch.optim.AdamW, foreach=True),
    "AdamW, plain": take_step(torch.optim.AdamW, foreach=False),
    "SGD, fused": take_step(torch.optim.SGD, fused=True),
    "load_state_dict": lambda m: m.load_state_dict(layer(1).state_dict()),
    "load_state_dict, assigned": lambda m: m.load_state_dict(layer(1).state_dict(), assign=True),
    "copy_ without grad": copy_in(torch.no_grad),
    "copy_ in inference mode": copy_in(torch.inference_mode),
    "data assigned": assign_data,
    "data changed": lambda m: m.weight.data[7, 3].add_(1),
    "rows of data swapped": swap_rows_of_data,
    "numpy": write_through_numpy,
    "type": lambda m: m.half(),
}


@pytest.mark.parametrize("change", WAYS.values(), ids=WAYS)
def test_every_way_to_change_weights_is_noticed(change):
    module = layer()
    before = weights_sha256(module)
    assert weights_sha256(module) == before
    change(module)
    after = weights_sha256(module)
    assert after != before
    fresh = torch.nn.Linear(70, 100, dtype=module.weight.dtype)
    fresh.load_state_dict(module.state_dict())
    assert weights_sha256(fresh) == after  # the hash itself, not what was remembered


def test_weights_that_did_not_change_are_not_hashed_again(monkeypatch):
    module, calls = layer(), []
    before = weights_sha256(module)
    monkeypatch.setattr(fingerprints.hashlib, "sha256", lambda *_: calls.append(1))
    assert weights_sha256(module) == before
    assert calls == []


def test_odd_sizes_and_offsets():
    whole = torch.arange(11, dtype=torch.float32)
    module = torch.nn.Module()
    module.register_buffer("part", whole[1:10])  # starts 4 bytes behind a multiple of 8
    module.register_buffer("empty", torch.empty(0))
    module.register_buffer("scalar", torch.tensor(True))
    before = weights_sha256(module)
    whole[9] += 1
    assert weights_sha256(module) != before


def write_module(folder, name, source):
    """Imports a module with this source under a name of its own."""
    (folder / f"{name}.py").write_text(source)
    spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    linecache.checkcache()
    spec.loader.exec_module(module)
    return module


BASE_SOURCE = """
import torch
SCALE = 2.0
LIMITS = (0.0, 1.0)
def helper(x):
    return x * SCALE + LIMITS[0]
def pool(tokens):
    return helper(tokens.all_TD)
class Encoder(torch.nn.Module):
    def forward(self, packed):
        return helper(packed)
"""
EDITS = {
    "the function": ("helper(tokens.all_TD)", "-helper(tokens.all_TD)", {"pool"}),
    "the class": ("return helper(packed)", "return helper(packed) + 1", {"Encoder"}),
    "a function that both call": ("x * SCALE", "x / SCALE", {"pool", "Encoder"}),
    "a constant": ("SCALE = 2.0", "SCALE = 3.0", {"pool", "Encoder"}),
    "a tuple": ("(0.0, 1.0)", "(0.5, 1.0)", {"pool", "Encoder"}),
    "a comment": ("import torch", "import torch  # the library", set()),
    "a docstring": ("def helper(x):", 'def helper(x):\n    """Doubles."""', set()),
    "code that neither calls": ("SCALE = 2.0", "SCALE = 2.0\nOTHER = 3\ndef other():\n    return 1\n", set()),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_source_code_counts(tmp_path, edit):
    old, new, changed = edit

    def hashes(name, source):
        module = write_module(tmp_path, "researchers_code", source)
        return {
            "pool": fingerprint([], {}, functions=[module.pool]),
            "Encoder": fingerprint([module.Encoder()], {}),
        }

    before, after = hashes("before", BASE_SOURCE), hashes("after", BASE_SOURCE.replace(old, new))
    assert {name for name in before if before[name] != after[name]} == changed


def scaled(factor):
    def pool(tokens):
        return tokens * factor

    return pool


def power(tokens, exponent=1.0, *, root=True):
    return tokens**exponent


def with_default(exponent):
    def pool(tokens, exponent=exponent):
        return tokens**exponent

    return pool


@pytest.mark.parametrize(
    "make",
    [scaled, with_default, lambda n: functools.partial(power, exponent=n), lambda n: functools.partial(power, n)],
)
def test_what_a_function_carries_counts(make):
    def made(*numbers):
        return fingerprint([], {}, functions=[make(number) for number in numbers])

    assert made(1.0) == made(1.0)
    assert made(1.0, 3.0) == made(3.0, 1.0)
    assert len({made(1.0), made(3.0), made(1.0, 3.0)}) == 3


def test_code_without_a_source_file_counts():
    def made(source):
        scope = {"__name__": "typed"}
        exec(source, scope)
        return fingerprint([], {}, functions=[scope["pool"]])

    first, second = "def pool(x):\n    return x + 1", "def pool(x):\n    return x + 2"
    assert made(first) == made(first) != made(second)


def test_the_librarys_own_code_can_be_left_out(monkeypatch):
    def hashes():
        return [fingerprint([], {}, functions=[Pooling], library=library) for library in (True, False)]

    before = hashes()
    source = fingerprints.source
    monkeypatch.setattr(fingerprints, "source", lambda thing: (source(thing)[0] + "#", ()))
    after = hashes()
    assert before[0] != after[0]
    assert before[1] == after[1]


def test_another_function_under_the_name_of_a_pooling(tiny_bert, tmp_path, monkeypatch):
    before = make_embedder(tiny_bert, store=tmp_path)
    before.encode(TEXTS)
    monkeypatch.setitem(POOLINGS, "mean", lambda tokens: tokens.sum(tokens.vectors_TD).abs())
    after = make_embedder(tiny_bert, store=tmp_path)
    found = after.encode(TEXTS)
    assert after.store.misses == 6
    after.store = None
    np.testing.assert_allclose(found, after.encode(TEXTS), rtol=0, atol=1e-6)
    assert after.sha256() != before.sha256()


def test_weights_of_pooling_count(tiny_bert, tmp_path):
    embedder = make_embedder(tiny_bert, store=tmp_path)
    embedder.pooling = Pooling(("attention",), 32)
    hashes = [(embedder.space("query").fingerprint, embedder.base().fingerprints["query"], embedder.sha256())]
    before = embedder.encode(TEXTS)
    step(embedder)
    hashes.append((embedder.space("query").fingerprint, embedder.base().fingerprints["query"], embedder.sha256()))
    assert all(len(set(kind)) == 2 for kind in zip(*hashes, strict=True))
    assert "pooling.trained.attention.query" in dict(embedder.named_parameters())
    assert np.abs(embedder.encode(TEXTS) - before).max() > 1e-4


def test_the_configuration_counts_in_every_hash(write_tiny, tmp_path):
    """Which changes no weight: the number of heads, the activation."""
    hashes = []
    for name, config in (("a", {}), ("b", {"num_attention_heads": 8}), ("c", {"hidden_act": "relu"})):
        embedder = make_embedder(write_tiny(tmp_path / name, **config))
        hashes.append((embedder.space("query").fingerprint, embedder.base().fingerprints["query"], embedder.sha256()))
    assert all(len(set(kind)) == 3 for kind in zip(*hashes, strict=True))


def test_a_space_says_what_it_is(write_tiny, tmp_path):
    folder = write_tiny(tmp_path / "model", modules=True, settings={"prompts": {"query": "q: "}}, max_seq_length=9)
    embedder = make_embedder(folder)
    description = embedder.space("query").description
    assert description == {
        "model": str(folder),
        "dtype": "float32",
        "role": "query",
        "prompt": "q: ",
        "max_length": 9,
        "pooling": ["mean"],
        "normalize": True,
    }
    assert embedder.space("document").description["role"] == "document"
    embedder.prompts.clear()
    # Without prompts a role makes no difference, and one space serves both.
    assert embedder.space("query") == embedder.space("document")
    assert embedder.space("query").description["role"] == "query and document"
    embedder.source = None
    assert embedder.space("query").description["model"] == ""
