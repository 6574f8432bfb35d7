"""modules.py and head.py: what precedes and follows pooling in sentence-transformers' folders, there and back."""

import functools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from conftest import TINY_VOCABULARY, write_tiny_folder
from naming import naming
from safetensors.torch import load_file, save_file
from tiny import make_dataset

from embedft import FinetuneConfig, finetune, load_embedder
from embedft.encoders.head import ACTIVATIONS, Dense, DenseConfig, LayerNorm, LayerNormConfig, Normalize
from embedft.encoders.modules import read_modules
from embedft.encoders.store import Store
from embedft.files import read_json, write_json

modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
TEXTS = ["", "the fee", "order of the hello world", "日本 語", "long " * 60]
load = functools.partial(load_embedder, device="cpu")


def difference(a: np.ndarray, b: np.ndarray) -> float:
    assert a.shape == b.shape
    return float(np.abs(a.astype(np.float64) - b).max())


def dense(rows: int, columns: int, **options) -> "modules.Dense":
    """Larger weights than torch's, so that activations bend."""
    torch.manual_seed(rows)
    part = modules.Dense(rows, columns, **options)
    with torch.no_grad():
        for parameter in part.parameters():
            parameter.mul_(3)
    return part


def layer_norm(size: int) -> "modules.LayerNorm":
    part = modules.LayerNorm(size)
    torch.manual_seed(size)
    with torch.no_grad():
        part.norm.weight.normal_(1.0, 0.3)
        part.norm.bias.normal_(0.0, 0.3)
    return part


def router(query: list, document: list) -> "modules.Router":
    return modules.Router.for_query_document(query, document)


class Bases:
    """Modules that precede the rest, made from tiny folders."""

    def __init__(self, tmp_path: Path):
        self.tmp_path = tmp_path

    def __call__(self, size: int = 32, seed: int = 0, **pooling) -> list:
        folder = write_tiny_folder(self.tmp_path / f"base-{seed}", modules=True, seed=seed, hidden_size=size)
        return [modules.Transformer(str(folder)), modules.Pooling(size, **pooling)]

    def static(self, size: int = 32) -> list:
        if not (folder := self.tmp_path / "static").is_dir():
            write_tiny_folder(folder)
        backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        torch.manual_seed(1)
        return [modules.StaticEmbedding(backend, embedding_weights=torch.randn(len(TINY_VOCABULARY), size))]


def one_in_both_routes(base: Bases) -> list:
    return [router([*(shared := base()), dense(32, 8)], [*shared, dense(32, 8, bias=False)]), modules.Normalize()]


def one_dense_in_both_routes(base: Bases) -> list:
    return [*base(), router([part := dense(32, 16)], [part, layer_norm(16)])]


SEQUENCES = {
    "dense": lambda base: [*base(), dense(32, 16)],
    "no bias, no activation": lambda base: [*base(), dense(32, 64, bias=False, activation_function=None)],
    "two, then normalized": lambda base: [
        *base(), dense(32, 64, activation_function=torch.nn.GELU()), dense(64, 8), modules.Normalize()
    ],
    "residual": lambda base: [*base(), dense(32, 16, use_residual=True), dense(16, 16, use_residual=True)],
    "layer norm of two poolings": lambda base: [
        *base(pooling_mode=("mean", "cls")), layer_norm(64), dense(64, 16), modules.Normalize()
    ],
    "normalized first": lambda base: [*base(), modules.Normalize(), dense(32, 16)],
    "normalized twice": lambda base: [*base(), modules.Normalize(), modules.Normalize()],
    "a head of each role": lambda base: [*base(), router([dense(32, 16)], [dense(32, 16), layer_norm(16)])],
    "a head of one role": lambda base: [*base(), router([dense(32, 32)], []), modules.Normalize()],
    "one module in both routes": one_dense_in_both_routes,
    "an encoder in both routes": one_in_both_routes,
    "an encoder of each role": lambda base: [
        router([*base(16, 1), dense(16, 32)], base()), layer_norm(32), modules.Normalize()
    ],
    "static": lambda base: base.static(),
    "static, then dense": lambda base: [*base.static(), dense(32, 16), modules.Normalize()],
    "static for queries": lambda base: [router(base.static(), base()), modules.Normalize()],
}  # fmt: skip


@pytest.fixture
def make(tmp_path, reference):
    """(their model, the folder that they saved it in) of a name in SEQUENCES."""

    def saved(name: str, **options) -> tuple:
        sequence = SEQUENCES[name](Bases(tmp_path))
        options |= {"similarity_fn_name": "cosine" if isinstance(sequence[-1], modules.Normalize) else "dot"}
        from sentence_transformers import SentenceTransformer

        model = SentenceTransformer(modules=sequence, device="cpu", **options).eval()
        model.save(str(tmp_path / "theirs"), create_model_card=False)
        return model, tmp_path / "theirs"

    return saved


def their_vectors(model, role: str) -> np.ndarray:
    return model.encode_query(TEXTS) if role == "query" else model.encode_document(TEXTS)


@pytest.mark.parametrize("name", SEQUENCES)
def test_theirs_to_ours_to_theirs_to_ours(make, reference, tmp_path, name):
    prompts = {"query": "what ", "document": "the "}
    model, folder = make(name, prompts=prompts)
    embedder = load(folder)
    assert embedder.prompts == prompts
    assert embedder.dim == embedder.full_dim == model.get_embedding_dimension()
    embedder.save(tmp_path / "ours")
    again, back = load(tmp_path / "ours"), reference(tmp_path / "ours")
    for role in ("query", "document"):
        expected, found = their_vectors(model, role), embedder.encode(TEXTS, role=role)
        close = 1e-6 * max(1.0, np.abs(expected).max())
        assert difference(found, expected) <= close
        assert difference(their_vectors(back, role), found) <= close
        assert np.array_equal(again.encode(TEXTS, role=role), found)
    assert again.sha256() == embedder.sha256()
    # Their names differ only if a module of both routes was in the Router before, or is in it now.
    tensors = [{x.numpy().tobytes() for x in theirs.state_dict().values()} for theirs in (model, back)]
    assert tensors[0] == tensors[1]
    back.save(str(tmp_path / "back"), create_model_card=False)
    assert load(tmp_path / "back").sha256() == embedder.sha256()


@pytest.mark.parametrize("name", ["two, then normalized", "a head of each role", "an encoder of each role"])
def test_everything_is_trained_and_saved(make, tmp_path, name):
    """All weights change, those of both sides; the run's model is the trained one."""
    _, folder = make(name)
    embedder = load(folder)
    embedder.similarity, embedder.normalize = "cosine", True
    before = {key: x.clone() for key, x in embedder.state_dict().items()}
    finetune(embedder, make_dataset(), FinetuneConfig(epochs=1, batch_size=4, lr=0.01), out=tmp_path / "run")
    after = embedder.state_dict()
    unchanged = [key for key, x in before.items() if torch.equal(x, after[key])]
    # Positions and types of tokens that the data does not have.
    assert not [key for key in unchanged if "embeddings" not in key and not key.endswith("key.bias")]
    again = load(tmp_path / "run" / "model")
    assert again.sha256() == embedder.sha256()
    for role in ("query", "document"):
        assert np.array_equal(again.encode(TEXTS, role=role), embedder.encode(TEXTS, role=role))


def test_dropout_of_attention_is_that_of_both_sides(make):
    embedder = load(make("an encoder of each role")[1])
    finetune(embedder, make_dataset(), FinetuneConfig(epochs=1, batch_size=4, attention_dropout=0.2))
    assert [embedder.side(role).encoder.attention_dropout for role in ("query", "document")] == [0.2, 0.2]


@pytest.mark.parametrize("name", ["dense", "a head of each role", "an encoder of each role", "static for queries"])
def test_a_pair_is_embedded_as_its_parts_and_with_gradients(make, name):
    embedder = load(make(name)[1])
    queries, documents = (embedder.pack(TEXTS[1:4], role=role) for role in ("query", "document"))
    pair = embedder.embed_pair(queries, documents)
    alone = [embedder.embed(packed, role=role) for packed, role in ((queries, "query"), (documents, "document"))]
    for together, one in zip(pair, alone, strict=True):
        torch.testing.assert_close(together, one, rtol=0, atol=1e-6)
    weights = [torch.randn(x.shape, generator=torch.Generator().manual_seed(0)) for x in pair]
    sum((x * weight).sum() for x, weight in zip(pair, weights, strict=True)).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in embedder.parameters())


def test_fingerprints_follow_the_head_of_their_role(make):
    embedder = load(make("a head of each role")[1])
    before = {role: embedder.space(role).fingerprint for role in ("query", "document")}
    base = embedder.base()
    with torch.no_grad():
        embedder.heads["query"][0].linear.bias[3] += 1
    assert embedder.space("query").fingerprint != before["query"]
    assert embedder.space("document").fingerprint == before["document"]
    assert embedder.base().fingerprints["query"] != base.fingerprints["query"]
    activations = {
        Dense(DenseConfig(32, 16, activation_function=name)).config.activation_function for name in ACTIVATIONS
    }
    sums = set()
    for name in activations:
        part = Dense(DenseConfig(32, 16, activation_function=name))
        part.load_state_dict(embedder.heads["query"][0].state_dict())
        embedder.heads["query"][0] = part
        sums.add(embedder.sha256())
    assert len(sums) == len(activations)


def test_the_store_keeps_finished_vectors(make, tmp_path):
    _, folder = make("an encoder of each role")
    plain, stored = load(folder), load(folder, store=tmp_path / "store")
    for store in (stored.store, Store(tmp_path / "store")):
        stored.store = store
        for role in ("query", "document"):
            assert np.array_equal(stored.encode(TEXTS, role=role), plain.encode(TEXTS, role=role))
    assert (stored.store.hits, stored.store.misses) == (10, 0)


def test_windows_are_cut_by_the_tokenizer_of_their_side(make):
    embedder = load(make("static for queries")[1])
    text = " ".join(TINY_VOCABULARY[5:30])
    for role, room in (("query", 10), ("document", 8)):  # of documents, two tokens are special
        vectors, source = embedder.encode_passages([text], (10, room), role=role)
        words = text.split()
        expected = [" ".join(words[i : i + room]) for i in range(0, len(words), room)]
        assert len(source) == len(vectors) == len(expected)
        assert difference(vectors, embedder.encode(expected, role=role)) <= 1e-6


def test_a_maximum_length_holds_for_both_sides(make):
    embedder = load(make("an encoder of each role")[1])
    embedder.max_length = 7
    assert embedder.side("query").max_length == embedder.side("document").max_length == 7
    for role in ("query", "document"):
        assert embedder.pack(["the of " * 20], role=role).max_seqlen == 7
    assert (
        load(make.__wrapped__ if hasattr(make, "__wrapped__") else embedder.source.folder, max_length=9).max_length == 9
    )


def test_a_refused_maximum_length_changes_neither_side(make):
    embedder = load(make("static for queries")[1])  # which has no special tokens, and would take 2
    before = [embedder.side(role).max_length for role in ("query", "document")]
    with pytest.raises(ValueError, match=naming("max_length", 2)):
        embedder.max_length = 2
    assert [embedder.side(role).max_length for role in ("query", "document")] == before


def test_half_precision_weights(make):
    _, folder = make("two, then normalized")
    expected = load(folder).encode(TEXTS)
    for file in folder.glob("*_Dense/model.safetensors"):
        save_file({k: v.to(torch.float16) for k, v in load_file(file).items()}, file)
    embedder = load(folder)
    assert {p.dtype for p in embedder.parameters()} == {torch.float32}
    assert 0 < difference(embedder.encode(TEXTS), expected) < 1e-2
    half = load(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert difference(half.encode(TEXTS), expected) < 0.1


def test_parts_by_hand():
    part = Dense(DenseConfig(2, 1, activation_function="torch.nn.ReLU"))
    with torch.no_grad():
        part.linear.weight.copy_(torch.tensor([[2.0, -1.0]]))
        part.linear.bias.fill_(0.5)
    x = torch.tensor([[1.0, 1.0], [0.0, 3.0]])
    assert part(x).tolist() == [[1.5], [0.0]]  # 2 - 1 + 0.5, and 0 - 3 + 0.5 < 0
    assert LayerNorm(LayerNormConfig(2))(x)[1].tolist() == pytest.approx([-1, 1], abs=1e-5)
    assert Normalize()(x)[1].tolist() == [0.0, 1.0]


# Folders in older and newer forms.


@pytest.fixture
def folder(tmp_path, write_tiny) -> Path:
    """Transformer, Pooling and Dense in the form before version 5."""
    folder = write_tiny(tmp_path / "model", modules=True, normalize=False)
    write_json(folder / "2_Dense" / "config.json", {
        "in_features": 32, "out_features": 16, "bias": True,
        "activation_function": "torch.nn.modules.activation.Tanh",
    })  # fmt: skip
    torch.manual_seed(0)
    tensors = {"linear.weight": torch.randn(16, 32) / 4, "linear.bias": torch.randn(16)}
    save_file(tensors, folder / "2_Dense" / "model.safetensors")
    add_modules(folder, Dense="2_Dense")
    return folder


def add_modules(folder: Path, **places: str) -> None:
    """{class name: subfolder} at the end of modules.json."""
    found = read_json(folder / "modules.json")
    for kind, place in places.items():
        entry = {"idx": len(found), "name": str(len(found)), "path": place}
        found.append({**entry, "type": f"sentence_transformers.models.{kind}"})
    write_json(folder / "modules.json", found)


def rewrite(path: Path, **changes) -> None:
    write_json(path, {**read_json(path), **changes})


def assert_refused(folder: Path, *facts) -> None:
    with pytest.raises(ValueError, match=naming(*facts)) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_new_names_of_types(folder):
    expected = load(folder).encode(TEXTS)
    new = {
        "Transformer": "sentence_transformers.base.modules.transformer.Transformer",
        "Pooling": "sentence_transformers.sentence_transformer.modules.pooling.Pooling",
        "Dense": "sentence_transformers.base.modules.dense.Dense",
    }
    found = read_json(folder / "modules.json")
    write_json(folder / "modules.json", [{**x, "type": new[x["type"].rsplit(".")[-1]]} for x in found])
    assert np.array_equal(load(folder).encode(TEXTS), expected)
    assert [module.kind for module in read_modules(folder)["query"]] == list(new)


def test_the_activation_is_tanh_unless_it_is_named(folder, reference):
    path = folder / "2_Dense" / "config.json"
    write_json(path, {key: value for key, value in read_json(path).items() if key != "activation_function"})
    expected = reference(folder).encode(TEXTS, normalize_embeddings=True)
    assert difference(load(folder).encode(TEXTS), expected) <= 1e-6


@pytest.mark.parametrize("routes", [("query", "document"), ("query", "doc"), ("QUERY", "Passage")])
def test_an_asym_of_older_versions(folder, routes):
    query, document = routes
    asym = folder / "3_Asym"
    for name in routes:
        shutil.copytree(folder / "2_Dense", asym / f"{name}_0_Dense")
        rewrite(asym / f"{name}_0_Dense" / "config.json", in_features=16, out_features=8)
        torch.manual_seed(len(name) + name.count("e"))
        tensors = {"linear.weight": torch.randn(8, 16), "linear.bias": torch.randn(8)}
        save_file(tensors, asym / f"{name}_0_Dense" / "model.safetensors")
    structure = {name: [f"{name}_0_Dense"] for name in routes}
    types = {places[0]: "sentence_transformers.models.Dense" for places in structure.values()}
    write_json(asym / "config.json", {"types": types, "structure": structure, "parameters": {"allow_empty_key": True}})
    add_modules(folder, Asym="3_Asym")
    embedder = load(folder)
    assert embedder.dim == 8
    for role, name in (("query", query), ("document", document)):
        stored = load_file(asym / f"{name}_0_Dense" / "model.safetensors")["linear.weight"]
        assert torch.equal(embedder.heads[role][1].linear.weight, stored)


@pytest.mark.parametrize(
    ("change", "facts"),
    [
        ({"structure": {"query": []}}, ("structure", "['query']", "query", "document")),
        ({"structure": {"query": [], "doc": [], "passage": []}}, ("structure", "doc", "passage", "document")),
        ({"structure": {"query": [], "document": 3}}, ("document", 3, "list")),
        ({"structure": {"query": [], "document": ["../x"]}}, ("../x", "folder")),
        ({"structure": {"query": [], "document": ["lost"]}}, ("types", "lost")),
        ({"structure": []}, ("structure", "one", "query")),
        ({"structure": [1]}, ("structure", "[1]", "object")),
        ({"parameters": {"route_mappings": {"(None, 'text')": "query"}}}, ("route_mappings", "none")),
        ({"types": {"a": "torch.nn.Linear"}, "structure": {"query": [], "document": ["a"]}}, ("torch.nn.Linear",)),
    ],
)
def test_routers_that_are_not_understood(folder, change, facts):
    add_modules(folder, Router="3_Router")
    assert_refused(folder, folder / "3_Router", "router_config.json")
    content = {"types": {}, "structure": {"query": [], "document": []}, "parameters": {}}
    write_json(folder / "3_Router" / "router_config.json", content | change)
    assert_refused(folder, folder / "3_Router/router_config.json", *facts)


def test_roles_that_share_the_encoder_but_not_the_pooling(folder):
    found = read_json(folder / "modules.json")
    kind = "sentence_transformers.models.Pooling"
    types, structure = {"q": kind, "d": kind}, {"query": ["q"], "document": ["d"]}
    write_json(folder / "1_Router" / "router_config.json", {"types": types, "structure": structure, "parameters": {}})
    entry = {"idx": 1, "name": "1", "path": "1_Router", "type": "sentence_transformers.models.Router"}
    write_json(folder / "modules.json", [found[0], entry])
    assert_refused(folder, folder, "share", "pooling")


def test_routes_of_different_widths(make):
    _, folder = make("a head of each role")
    path = folder / "2_Router" / "router_config.json"
    config = json.loads(path.read_text())
    config["structure"]["query"] = []
    write_json(path, config)
    assert_refused(folder, folder, "queries", 32, ..., "documents", 16)


@pytest.mark.parametrize(
    "kind", ["WeightedLayerPooling", "CNN", "LSTM", "BoW", "WordEmbeddings", "CLIPModel", "Dropout"]
)
def test_modules_that_are_refused_by_name(folder, kind):
    add_modules(folder, **{kind: f"3_{kind}"})
    assert_refused(folder, folder / "modules.json", kind, kind, "supported", "Transformer", "Pooling")


@pytest.mark.parametrize("name", ["custom_st.Transformer", "torch.nn.Linear", "pylate.models.Dense.Dense", "os.system"])
def test_code_of_others_is_never_run(folder, name):
    found = read_json(folder / "modules.json")
    write_json(folder / "modules.json", [{**found[0], "type": name}, *found[1:]])
    assert_refused(folder, folder / "modules.json", name, "sentence_transformers.*", "code")


@pytest.mark.parametrize(
    ("change", "facts"),
    [
        ({"activation_function": "os.system"}, ("activation_function", "'os.system'", "Tanh", "Identity")),
        ({"activation_function": 3}, ("activation_function", 3, "string")),
        ({"in_features": 16}, (16, 32)),
        ({"in_features": "32"}, ("in_features", "'32'", "whole")),
        ({"in_features": None}, ("in_features", "missing")),
        ({"out_features": 10**9}, ("out_features", 10**9, "model.safetensors", 32)),
        ({"out_features": 17}, ("linear.bias", [16], [17])),
        ({"bias": False}, ("linear.bias", [16], "absent")),
        ({"use_residual": True}, ("residual.weight", "absent", [16, 32])),
        (
            {"module_input_name": "token_embeddings"},
            ("module_input_name", "'token_embeddings'", "'sentence_embedding'"),
        ),
        ({"module_output_name": "other"}, ("module_output_name", "'other'")),
    ],
)
def test_settings_of_dense_that_do_not_fit(folder, change, facts):
    rewrite(folder / "2_Dense" / "config.json", **change)
    assert_refused(folder, folder / "2_Dense", *facts)


@pytest.mark.parametrize(
    ("tensor", "facts"),
    [
        (torch.full((16,), float("nan")), ("linear.bias", "finite")),
        (torch.zeros(16, dtype=torch.int64), ("linear.bias", "torch.int64", "floating-point")),
        (torch.zeros(16, dtype=torch.float8_e4m3fn), ("linear.bias", "torch.float8_e4m3fn", "floating-point")),
    ],
)
def test_weights_of_dense_that_do_not_fit(folder, tensor, facts):
    path = folder / "2_Dense" / "model.safetensors"
    save_file(load_file(path) | {"linear.bias": tensor}, path)
    assert_refused(folder, path, *facts)


def test_a_dense_folder_that_is_not_there(folder):
    shutil.rmtree(folder / "2_Dense")
    assert_refused(folder, folder / "2_Dense/config.json", "in_features", "missing")


def test_a_pointer_instead_of_the_weights_of_dense(folder):
    (folder / "2_Dense" / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert_refused(folder, folder / "2_Dense/model.safetensors", "git lfs pull")


def test_a_module_of_another_class_is_not_saved(folder, tmp_path):
    embedder = load(folder)
    embedder.heads["query"] = embedder.heads["document"] = torch.nn.Sequential(torch.nn.Linear(32, 8))
    with pytest.raises(ValueError, match=naming("torch.nn.modules.linear.Linear", "Dense")):
        embedder.save(tmp_path / "saved")


def test_an_adapter_after_a_head(make, reference, tmp_path):
    """Both are saved as modules, and the adapter is known for what it is when it is loaded."""
    from embedft.encoders.adapter import Adapter
    from embedft.encoders.maps import build_map

    embedder = load(make("a head of one role")[1])
    part = build_map("linear", 32)
    with torch.no_grad():
        part.weight.add_(torch.randn(32, 32, generator=torch.Generator().manual_seed(0)) / 9)
    embedder.attach(Adapter(query=part, base=embedder.base()))
    embedder.save(tmp_path / "saved")
    again, theirs = load(tmp_path / "saved"), reference(tmp_path / "saved")
    assert again.adapter.side == "query"
    for role in ("query", "document"):
        found = embedder.encode(TEXTS, role=role)
        assert np.array_equal(again.encode(TEXTS, role=role), found)
        assert difference(their_vectors(theirs, role), found) <= 1e-6
