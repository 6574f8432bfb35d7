"""embedder.py against sentence-transformers with the same weights: vectors, prompts, loss and every gradient."""

import json
import random

import numpy as np
import pytest
import torch
from naming import names, naming

from embedft import Targets, load_embedder
from embedft import device as devices
from embedft.encoders import attention
from embedft.encoders.bert import key_map
from embedft.encoders.card import facts
from embedft.encoders.embedder import Embedder
from embedft.encoders.packing import Packed
from embedft.encoders.pooling import Pooling
from embedft.encoders.weights import checkpoint_tensors
from embedft.losses.contrastive import in_batch_negatives
from embedft.retrieval.report import model_setting

TEXTS = [
    "",
    " ",
    "a",
    "fees",
    "What is a limit order?",
    "\n\ttabs and\nnewlines \r\n",
    "null \x00 and bell \x07",
    "日本語のテキスト、中文",
    "👩‍👩‍👧‍👦 🇩🇪 🙂🙂",
    "naïve café \u200b\ufeff e\u0301",
    "[SEP] [MASK] [CLS]",
    "Revenue was $1,234.56, up 10% (2021–2022).",
    "x" * 500,
    "beyond the maximum " * 300,
    "!" * 2000,
]
QUERIES = [
    "what is a limit order?",
    "who pays the fee",
    "revenue in 2021",
    "日本",
    "drivers and riders, long question here",
]
DOCUMENTS = [
    "A limit order is an order to buy or sell at a given price or a better one.",
    "Fees are paid by riders.",
    "Revenue grew by 57% in 2021, to $17.5 billion.",
    "Tokyo 東京",
    "Drivers are independent contractors in most places.",
]


def difference(a: np.ndarray, b: np.ndarray) -> float:
    assert a.shape == b.shape
    return float(np.abs(a - b).max())


def write_settings(folder, **settings):
    (folder / "config_sentence_transformers.json").write_text(json.dumps(settings))
    return folder


# Against sentence-transformers.


def test_vectors_of_odd_texts(minilm, minilm_reference):
    found = minilm.encode(TEXTS)
    assert found.dtype == np.float32
    assert difference(found, minilm_reference.encode(TEXTS)) <= 1e-5
    assert np.linalg.norm(found, axis=1) == pytest.approx(1, abs=1e-6)


def test_vectors_of_every_length(minilm, minilm_reference, monkeypatch):
    """Two to forty tokens, and around the maximum."""
    for model, name in ((minilm, "max_length"), (minilm_reference, "max_seq_length")):
        monkeypatch.setattr(model, name, 128)
    words = " ".join(["order limit price buy sell"] * 40).split()
    texts = [" ".join(words[:n]) for n in (*range(39), 63, *range(120, 132))]
    assert difference(minilm.encode(texts), minilm_reference.encode(texts)) <= 1e-5


@pytest.fixture(scope="module")
def uber(shared_data) -> tuple[list[str], list[str]]:
    """A tenth of the chunks (660 tokens on average) and of the questions of the Uber filing."""
    data = json.loads((shared_data / "lyft_uber" / "val_dataset.json").read_text(encoding="utf-8"))
    return list(data["corpus"].values())[::10], list(data["queries"].values())[::10]


@pytest.mark.slow
def test_vectors_of_uber_chunks_and_questions(minilm, minilm_reference, monkeypatch, uber):
    chunks, questions = uber
    assert (len(chunks), len(questions)) == (40, 79)
    for model, name in ((minilm, "max_length"), (minilm_reference, "max_seq_length")):
        monkeypatch.setattr(model, name, 512)
    for role, texts, encode in (
        ("document", chunks, minilm_reference.encode_document),
        ("query", questions, minilm_reference.encode_query),
    ):
        assert difference(minilm.encode(texts, role=role), encode(texts)) <= 1e-5


def test_loss_and_every_gradient(minilm, minilm_reference):
    """In-batch negatives over the whole MiniLM, dropout off, against MultipleNegativesRankingLoss."""
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    minilm_reference.eval()
    features = [minilm_reference.preprocess(texts) for texts in (QUERIES, DOCUMENTS)]
    expected = losses.MultipleNegativesRankingLoss(minilm_reference)(features, None)

    minilm.eval()
    queries, documents = minilm.pack(QUERIES, role="query"), minilm.pack(DOCUMENTS, role="document")
    targets = Targets(group=torch.arange(len(QUERIES))[:, None])
    found = in_batch_negatives(*minilm.embed_pair(queries, documents), targets)
    assert found.item() == pytest.approx(expected.item(), abs=1e-6)

    for model, loss in ((minilm, found), (minilm_reference, expected)):
        model.zero_grad()
        loss.backward()
    theirs = {
        name.removeprefix("0.model."): parameter.grad
        for name, parameter in minilm_reference.named_parameters()
        if parameter.grad is not None
    }
    gradients = {name: parameter.grad for name, parameter in minilm.encoder.named_parameters()}
    ours = checkpoint_tensors(gradients, key_map(minilm.encoder.config))
    for model in (minilm, minilm_reference):
        model.zero_grad()
    assert ours.keys() == theirs.keys()
    assert len(ours) == 5 + 16 * 6
    largest = max(float(gradient.abs().max()) for gradient in theirs.values())
    assert largest > 0.01
    for name in theirs:
        assert float((ours[name] - theirs[name]).abs().max()) <= 1e-5 * largest, name


# Batches.


@pytest.mark.parametrize("batch_tokens", [1, 50, 700, 10**9])
def test_the_batch_does_not_matter(minilm, batch_tokens):
    texts = [*TEXTS[:10], *QUERIES, *DOCUMENTS, TEXTS[-2]]
    expected = minilm.encode(texts)
    order = random.Random(batch_tokens).sample(range(len(texts)), len(texts))
    found = minilm.encode([texts[i] for i in order], batch_tokens=batch_tokens)
    assert difference(found, expected[order]) <= 1e-6


def test_a_text_alone_is_as_in_a_crowd(minilm):
    texts = [*TEXTS[:12], *QUERIES]
    alone = np.concatenate([minilm.encode([text]) for text in texts])
    assert difference(alone, minilm.encode(texts)) <= 1e-6


def test_windows_of_texts(minilm):
    expected = minilm.encode(TEXTS[:12])
    assert difference(minilm.encode(TEXTS[:12], slice_texts=5), expected) <= 1e-6


def test_same_bits_every_time(minilm):
    assert np.array_equal(minilm.encode(TEXTS), minilm.encode(TEXTS))


def test_no_texts(minilm):
    assert minilm.encode([]).shape == (0, 384)
    assert minilm.encode([], dim=8).shape == (0, 8)


# Prompts.


PROMPTS = {"query": "Represent this question for searching: ", "document": "passage: "}


@pytest.mark.parametrize("include_prompt", [True, False])
@pytest.mark.parametrize("mode", ["mean", "cls", "weightedmean"])
def test_prompts_by_role(write_tiny, reference, tmp_path, mode, include_prompt):
    pooling = {"pooling_mode": mode, "include_prompt": include_prompt}
    folder = write_tiny(tmp_path / "model", modules=True, pooling=pooling, settings={"prompts": PROMPTS})
    embedder, model = load_embedder(folder, device="cpu"), reference(folder)
    texts = ["", "the fee", "order of the world", "日本 order ", "long " * 60]
    for role, encode in (("query", model.encode_query), ("document", model.encode_document)):
        found = embedder.encode(texts, role=role)
        assert difference(found, encode(texts)) <= 1e-6
        assert difference(found, load_embedder(folder, device="cpu", prompts={}).encode(texts, role=role)) > 1e-3
    packed = embedder.pack(texts, role="document")
    assert packed.prompt_lengths is None if include_prompt else packed.prompt_lengths.tolist() == [9] * 5


def test_a_blank_prompt_left_out_takes_the_first_token_with_it(write_tiny, reference, tmp_path):
    """A quirk of sentence-transformers: " " adds no token, but leaving it out of the pooling leaves [CLS] out."""
    folder = write_tiny(
        tmp_path / "model",
        modules=True,
        pooling={"pooling_mode": "mean", "include_prompt": False},
        settings={"prompts": {"query": " ", "document": ""}},
    )
    embedder, model = load_embedder(folder, device="cpu"), reference(folder)
    texts = ["the fee", "order"]
    assert difference(embedder.encode(texts, role="query"), model.encode_query(texts)) <= 1e-6
    assert difference(embedder.encode(texts), model.encode_document(texts)) <= 1e-6
    assert difference(embedder.encode(texts), embedder.encode(texts, role="query")) > 1e-3


def test_prompts_on_the_real_model(minilm_folder, minilm_reference, monkeypatch):
    embedder = load_embedder(minilm_folder, device="cpu", prompts=PROMPTS)
    monkeypatch.setattr(minilm_reference, "prompts", PROMPTS)
    assert difference(embedder.encode(QUERIES, role="query"), minilm_reference.encode_query(QUERIES)) <= 1e-5
    assert difference(embedder.encode(DOCUMENTS), minilm_reference.encode_document(DOCUMENTS)) <= 1e-5
    assert embedder.tokenize(["a"]) == load_embedder(minilm_folder, device="cpu").tokenize(["a"])


def test_which_prompt_a_role_gets(tiny_bert):
    """That of its own name, as in sentence-transformers 6.2, where "passage" and "corpus" do not count."""

    def prompts(given):
        loaded = load_embedder(tiny_bert, device="cpu", prompts=given)
        return loaded.prompt("query"), loaded.prompt("document")

    assert prompts({}) == ("", "")
    assert prompts({"query": "q", "passage": "p", "corpus": "c"}) == ("q", "")
    assert prompts({"corpus": "c", "document": "d", "passage": "p"}) == ("", "d")
    assert prompts({"query": None, "document": "d"}) == ("", "d")


def test_the_hash_changes_with_whatever_changes_the_vectors(tiny_bert):
    def changed(change) -> str:
        embedder = load_embedder(tiny_bert, device="cpu")
        change(embedder)
        return embedder.sha256()

    def nudge(embedder):
        with torch.no_grad():
            embedder.encoder.layers[1].qkv.bias[3] += 1e-6

    hashes = [
        changed(lambda e: None),
        changed(nudge),
        changed(lambda e: setattr(e, "max_length", 9)),
        changed(lambda e: e.prompts.update(query="q")),
        changed(lambda e: setattr(e, "pooling", Pooling(("cls",), 32))),
        changed(lambda e: setattr(e, "normalize", False)),
        changed(lambda e: e.half()),
    ]
    assert len(set(hashes)) == len(hashes)
    assert changed(lambda e: None) == hashes[0]


@pytest.mark.parametrize("passages", [None, (8, 4)])
@pytest.mark.parametrize("with_store", [False, True])
def test_a_vector_that_is_not_finite_names_its_text(tiny_bert, tmp_path, passages, with_store):
    embedder = load_embedder(tiny_bert, device="cpu", store=tmp_path / "store" if with_store else None)
    with torch.no_grad():
        embedder.encoder.embeddings.token.weight[embedder.tokenize(["world"])[0], 0] = float("nan")
    encode = embedder.encode if passages is None else lambda texts: embedder.encode_passages(texts, passages)
    encode(["hello", "a"])
    with pytest.raises(ValueError, match=naming("finite", "'hello world'")):
        encode(["hello", "hello world", "a"])
    encode(["hello", "a"])


def test_a_prompt_that_leaves_no_room(write_tiny, tmp_path):
    settings = {"prompts": {"query": "a " * 60}}
    folder = write_tiny(
        tmp_path / "model", modules=True, pooling={"pooling_mode": "mean", "include_prompt": False}, settings=settings
    )
    embedder = load_embedder(folder, device="cpu")
    with pytest.raises(ValueError, match=naming("query", "prompt", 47, "max_length", 48)):
        embedder.encode(["text"], role="query")
    embedder.encode(["text"], role="document")


# Similarity and dimensions.


def test_dot_without_normalize_gives_vectors_as_they_come(write_tiny, reference, tmp_path):
    settings = {"similarity_fn_name": "dot"}
    folder = write_tiny(tmp_path / "model", modules=True, normalize=False, settings=settings)
    embedder = load_embedder(folder, device="cpu")
    found = embedder.encode(DOCUMENTS)
    assert embedder.similarity == "dot"
    assert difference(found, reference(folder).encode(DOCUMENTS)) <= 1e-5
    assert np.linalg.norm(found, axis=1).min() > 1.5
    assert difference(embedder.encode(DOCUMENTS, dim=8), found[:, :8]) == 0


def test_dot_with_normalize_has_length_one(write_tiny, reference, tmp_path):
    folder = write_tiny(tmp_path / "model", modules=True, settings={"similarity_fn_name": "dot"})
    found = load_embedder(folder, device="cpu").encode(DOCUMENTS)
    assert difference(found, reference(folder).encode(DOCUMENTS)) <= 1e-6
    assert np.linalg.norm(found, axis=1) == pytest.approx(1, abs=1e-6)


def test_cosine_without_normalize_has_length_one(write_tiny, reference, tmp_path):
    folder = write_tiny(tmp_path / "model", modules=True, normalize=False)
    expected = reference(folder).encode(DOCUMENTS, normalize_embeddings=True)
    assert difference(load_embedder(folder, device="cpu").encode(DOCUMENTS), expected) <= 1e-6


def test_leading_dimensions(minilm, minilm_reference):
    found = minilm.encode(QUERIES, dim=64)
    assert difference(found, minilm_reference.encode(QUERIES, truncate_dim=64, normalize_embeddings=True)) <= 1e-6
    assert difference(minilm.encode(QUERIES, dim=384), minilm.encode(QUERIES)) == 0
    assert minilm.encode(QUERIES, dim=1).shape == (5, 1)


def test_leading_dimensions_by_default(write_tiny, reference, tmp_path):
    folder = write_tiny(tmp_path / "model", modules=True, settings={"truncate_dim": 8})
    embedder = load_embedder(folder, device="cpu")
    assert (embedder.dim, embedder.full_dim) == (8, 32)
    found = embedder.encode(DOCUMENTS)
    assert difference(found, reference(folder).encode(DOCUMENTS, normalize_embeddings=True)) <= 1e-6
    assert embedder.encode(DOCUMENTS, dim=32).shape == (5, 32)
    # Training sees all of them.
    assert embedder.embed(embedder.pack(DOCUMENTS, role="document"), role="document").shape == (5, 32)


def test_several_pooling_modes(write_tiny, reference, tmp_path):
    modes = ["cls", "max", "mean"]
    folder = write_tiny(tmp_path / "model", modules=True, pooling={"pooling_mode": modes})
    embedder = load_embedder(folder, device="cpu")
    assert embedder.dim == 96
    assert difference(embedder.encode(DOCUMENTS), reference(folder).encode(DOCUMENTS)) <= 1e-6


# Training.


def test_embed_is_encode_with_a_gradient(minilm):
    packed = minilm.pack(QUERIES, role="query")
    assert isinstance(packed, Packed)
    assert packed.num_sequences == len(QUERIES)
    embeddings = minilm.embed(packed, role="query")
    assert embeddings.requires_grad
    assert embeddings.dtype == torch.float32
    assert difference(embeddings.detach().numpy(), minilm.encode(QUERIES, role="query")) <= 1e-6


def test_a_pair_is_embedded_as_each_alone(write_tiny, tmp_path):
    folder = write_tiny(
        tmp_path / "model",
        modules=True,
        pooling={"pooling_mode": "mean", "include_prompt": False},
        settings={"prompts": {"query": "query: "}},
    )
    embedder = load_embedder(folder, device="cpu", dtype=torch.float64)
    queries = embedder.pack(["the fee", "order of the world"], role="query")
    documents = embedder.pack(["a", "", "a long document of the world"], role="document")
    assert queries.prompt_lengths is not None
    assert documents.prompt_lengths is None
    Q, D = embedder.embed_pair(queries, documents)
    assert Q.dtype == torch.float64
    torch.testing.assert_close(Q, embedder.embed(queries, role="query"), rtol=0, atol=1e-12)
    torch.testing.assert_close(D, embedder.embed(documents, role="document"), rtol=0, atol=1e-12)


def test_dropout_is_for_training_and_encode_restores_the_mode(tiny_bert):
    embedder = load_embedder(tiny_bert, device="cpu")
    assert not embedder.training
    expected = embedder.encode(DOCUMENTS)
    assert not embedder.training
    embedder.train()
    assert np.array_equal(embedder.encode(DOCUMENTS), expected)
    assert all(module.training for module in embedder.modules())
    packed = embedder.pack(DOCUMENTS, role="document")
    assert not torch.equal(embedder.embed(packed, role="document"), embedder.embed(packed, role="document"))
    with pytest.raises(ValueError, match=naming("texts[0]", "int", "str")):
        embedder.encode([1])
    assert all(module.training for module in embedder.modules())


def test_encode_leaves_no_gradient_and_weights_can_train_after(tiny_bert):
    embedder = load_embedder(tiny_bert, device="cpu")
    embedder.encode(DOCUMENTS)
    embedder.embed(embedder.pack(DOCUMENTS, role="document"), role="document").sum().backward()
    assert all(parameter.grad is not None for parameter in embedder.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_types_of_weights(minilm_folder, minilm, dtype):
    """encode gives float32; embed float32, or float64 when the weights are."""
    embedder = load_embedder(minilm_folder, device="cpu", dtype=dtype)
    assert {parameter.dtype for parameter in embedder.parameters()} == {dtype}
    found = embedder.encode(QUERIES)
    assert found.dtype == np.float32
    assert difference(found, minilm.encode(QUERIES)) <= (1e-6 if dtype is torch.float64 else 0.02)
    embeddings = embedder.embed(embedder.pack(QUERIES[:1], role="query"), role="query")
    assert embeddings.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)


# What is refused.


@pytest.mark.parametrize(
    ("call", "facts"),
    [
        (lambda e: e.encode(["a"], role="passage"), ("role", "'passage'", "query", "document")),
        (lambda e: e.pack(["a"], role="Query"), ("role", "'Query'", "query", "document")),
        (lambda e: e.embed(e.pack(["a"], role="query"), role=""), ("role", "''", "query", "document")),
        (lambda e: e.encode(["a"], dim=0), ("dim", 0, 1, 32)),
        (lambda e: e.encode(["a"], dim=33), ("dim", 33, 1, 32)),
        (lambda e: e.encode("text"), ("texts", "str", "list")),
        (lambda e: e.pack("text", role="query"), ("texts", "str", "list")),
        (lambda e: e.encode([None]), ("texts[0]", "NoneType", "str")),
    ],
)
def test_calls_that_are_refused(tiny_bert, call, facts):
    with pytest.raises(ValueError, match=naming(*facts)):
        call(load_embedder(tiny_bert, device="cpu"))


@pytest.mark.parametrize(
    ("options", "facts"),
    [
        ({"similarity": "euclidean"}, ("similarity", "'euclidean'", "cosine", "dot")),
        ({"truncate_dim": 64}, ("dim", 64, 1, 32)),
    ],
)
def test_settings_that_are_refused(tiny_bert, options, facts):
    loaded = load_embedder(tiny_bert, device="cpu")
    with pytest.raises(ValueError, match=naming(*facts)):
        Embedder(loaded.encoder, loaded.tokenizer, **options)


def test_vectors_go_back_to_the_device_only_for_an_adapter_or_a_cut(tiny_bert, monkeypatch):
    embedder = load_embedder(tiny_bert, device="cpu")
    expected = embedder.encode(["a", "fees"])
    monkeypatch.setattr(embedder, "_adapted", None)
    np.testing.assert_array_equal(embedder.encode(["a", "fees"]), expected)


def test_encoding_leaves_every_part_in_its_mode(tiny_bert):
    """A part that was put in eval mode within a model in training stays there, even after an error."""
    embedder = load_embedder(tiny_bert, device="cpu").train()
    embedder.encoder.layers[0].eval()
    before = [part.training for part in embedder.modules()]
    expected = load_embedder(tiny_bert, device="cpu").encode(["a b c"])
    assert (embedder.encode(["a b c"]) == expected).all()
    assert [part.training for part in embedder.modules()] == before
    with pytest.raises(ValueError, match=naming("texts[0]", "int")):
        embedder.encode([3])
    assert [part.training for part in embedder.modules()] == before


def test_cuda_infers_in_bfloat16_unless_told_otherwise(tiny_bert, monkeypatch, tmp_path):
    """Through a stand-in: autocast of the CPU, where the packed kernel is said to run."""
    monkeypatch.setattr(attention, "_packed_kernel", lambda q, *rest: q)  # only what calls it matters here
    exact = load_embedder(tiny_bert, device="cpu")
    expected, space = exact.encode(TEXTS), exact.space("document")
    monkeypatch.setattr(devices, "has_packed_attention", lambda device, dtype: dtype is torch.bfloat16)
    seen = []
    embedder = load_embedder(tiny_bert, device="cpu", store=tmp_path)
    embedder.encoder.layers[0].attention_out.register_forward_hook(lambda _, inputs, y: seen.append(y.dtype))
    lower = embedder.encode(TEXTS)
    assert (seen, lower.dtype) == ([torch.bfloat16], np.float32)
    assert embedder.space("document").fingerprint != space.fingerprint
    lowered = model_setting(embedder)["dtype"]
    assert names(lowered, "float32", ..., "bfloat16")
    assert lowered in facts(embedder)["memory"]
    with torch.no_grad():
        assert embedder.embed(embedder.pack(TEXTS, role="document"), role="document").dtype is torch.float32
    assert seen == [torch.bfloat16, torch.float32]
    embedder.autocast = False
    assert embedder.space("document") == space
    assert "dtype" not in model_setting(embedder)
    np.testing.assert_array_equal(embedder.encode(TEXTS), expected)
    assert embedder.store.misses == 2 * len(set(TEXTS))


@pytest.mark.parametrize("autocast", [True, False])
def test_an_encoder_for_queries_infers_like_that_for_documents(tiny_bert, monkeypatch, autocast):
    monkeypatch.setattr(devices, "has_packed_attention", lambda device, dtype: dtype is torch.bfloat16)
    monkeypatch.setattr(attention, "_packed_kernel", lambda q, *rest: q)
    embedder, seen = load_embedder(tiny_bert, device="cpu"), []
    embedder.attach_query_side(load_embedder(tiny_bert, device="cpu"))
    for side in (embedder, embedder.query_side):
        side.encoder.layers[0].attention_out.register_forward_hook(lambda _, inputs, y: seen.append(y.dtype))
    embedder.autocast = autocast
    for role in ("query", "document"):
        embedder.encode(TEXTS, role=role)
    assert seen == [torch.bfloat16 if autocast else torch.float32] * 2
