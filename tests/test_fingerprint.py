"""fingerprint.py: one hash over everything that vectors depend on."""

import re

import numpy as np
import pytest
import tokenizers
import torch
from tiny import make_embedder

from embedft.encoders.fingerprint import weights_sha256
from embedft.encoders.store import Store

pytestmark = pytest.mark.usefixtures("one_thread")

TEXTS = ["a b c", "", "the revenue", "what order of the world", "a b c", "x" * 30, "7 8 9 hello hello world"]


def change_weight(embedder):
    with torch.no_grad():
        embedder.encoder.layers[1].feed_forward_out.bias[3] += 1


def change_weight_unseen(embedder):
    """Past autograd's count of changes."""
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
    "prompt left out": lambda e: (e.prompts.update(document="the "), setattr(e, "include_prompt", False)),
    "max_length": lambda e: setattr(e, "max_length", 5),
    "pooling": lambda e: setattr(e, "pooling", ("cls",)),
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
    np.testing.assert_array_equal(found, embedder.encode(TEXTS))
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
    with pytest.raises(ValueError, match="role is 'passage', expected one of query, document"):
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


def test_a_space_says_what_it_is(write_tiny, tmp_path):
    folder = write_tiny(tmp_path / "model", modules=True, settings={"prompts": {"query": "q: "}}, max_seq_length=9)
    embedder = make_embedder(folder)
    description = embedder.space("query").description
    weights = description.pop("weights")
    assert re.fullmatch("[0-9a-f]{64}", weights)
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
