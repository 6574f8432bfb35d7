"""static.py: token tables of sentence-transformers and model2vec, against StaticEmbedding."""

import functools
import importlib.util
import json
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
from embedft.encoders.card import facts
from embedft.encoders.loading import load_tokenizer
from embedft.encoders.pooling import Pooling
from embedft.files import read_json, write_json

TEXTS = ["the fee", "", "order of the hello world", "日本 語", "long " * 600, "☃ unknown"]
SIZE = len(TINY_VOCABULARY)
load = functools.partial(load_embedder, device="cpu")


@pytest.fixture
def reference(reference):
    """A function from a folder with a token table to the SentenceTransformer that reads it, normalized or not."""

    def make(folder: Path, *, normalize: bool = True):
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer.modules import Normalize, StaticEmbedding

        parts = [StaticEmbedding.load(str(folder)), *([Normalize()] if normalize else [])]
        return SentenceTransformer(modules=parts, device="cpu")

    return make


def write_table(folder: Path, tensors: dict, config: dict | None = None, *, max_tokens: int | None = None) -> Path:
    write_tiny_folder(folder)
    for name in ("config.json", "tokenizer_config.json"):
        (folder / name).unlink()
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.enable_padding(length=8)
    if max_tokens:
        backend.enable_truncation(max_tokens, direction="left")
    backend.save(str(folder / "tokenizer.json"))
    save_file(tensors, folder / "model.safetensors")
    if config is not None:
        write_json(folder / "config.json", config)
    return folder


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def quantized() -> dict[str, torch.Tensor]:
    """Rows of 8 bits, shared by tokens, each with its weight."""
    mapping = torch.arange(SIZE).flip(0) % 20
    rows = (draw(20, 16) * 50).clamp(-127, 127).to(torch.int8)
    return {"embeddings": rows, "mapping": mapping, "weights": draw(SIZE).abs().double()}


TABLES = {
    "float32": lambda: {"embeddings": draw(SIZE, 16)},
    "bfloat16": lambda: {"embeddings": draw(SIZE, 16, dtype=torch.bfloat16).float()},
    "weights": lambda: {"embeddings": draw(SIZE, 16, dtype=torch.float16), "weights": draw(SIZE)},
    "mapping": lambda: {"embeddings": draw(20, 16), "mapping": torch.arange(SIZE, dtype=torch.int32) % 20},
    "unsigned": lambda: {"embeddings": draw(20, 16), "mapping": (torch.arange(SIZE) % 20).to(torch.uint32)},
    "all": quantized,
}


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize(
    "config", [{"model_type": "model2vec", "hidden_dim": 16, "normalize": True}, {"normalize": True}]
)
def test_model2vec_folders(reference, tmp_path, name, config):
    """The published package has no model_type."""
    folder = write_table(tmp_path / "model", TABLES[name](), config)
    embedder, theirs = load(folder), reference(folder)
    expected = theirs.encode(TEXTS)
    found = embedder.encode(TEXTS)
    assert np.abs(found - expected).max() <= 1e-6
    assert not found[1].any()  # no token, and no vector
    embedder.save(tmp_path / "saved")
    assert {"embeddings"} == load_file(tmp_path / "saved" / "model.safetensors").keys()
    assert config.items() <= read_json(tmp_path / "saved" / "config.json").items()
    again = load(tmp_path / "saved")
    assert np.array_equal(again.encode(TEXTS), found)
    assert again.sha256() == embedder.sha256()
    assert np.abs(reference(tmp_path / "saved").encode(TEXTS) - found).max() <= 1e-6


@pytest.mark.parametrize("path", ["", ".", "0_StaticEmbedding"])
@pytest.mark.parametrize("normalize", [True, False])
def test_static_embedding_modules(reference, tmp_path, path, normalize):
    folder = write_table(tmp_path / "model" / path, {"embedding.weight": draw(SIZE, 16)})
    kinds = {path: "StaticEmbedding", **({"1_Normalize": "Normalize"} if normalize else {})}
    entries = [
        {"idx": i, "name": str(i), "path": place, "type": f"sentence_transformers.models.{kind}"}
        for i, (place, kind) in enumerate(kinds.items())
    ]
    write_json(tmp_path / "model" / "modules.json", entries)
    settings = {"similarity_fn_name": "cosine" if normalize else "dot", "prompts": {"query": "what "}}
    write_json(tmp_path / "model" / "config_sentence_transformers.json", settings)
    embedder = load(tmp_path / "model")
    expected = reference(folder, normalize=normalize)
    assert np.abs(embedder.encode(TEXTS) - expected.encode(TEXTS)).max() <= 1e-6
    queries = embedder.encode(TEXTS, role="query")
    assert np.abs(queries - expected.encode(TEXTS, prompt="what ")).max() <= 1e-6
    embedder.save(tmp_path / "saved")
    assert {"embedding.weight"} == load_file(tmp_path / "saved" / "model.safetensors").keys()
    assert np.array_equal(load(tmp_path / "saved").encode(TEXTS, role="query"), queries)


def test_truncation_is_the_tokenizers_own(reference, tmp_path):
    folder = write_table(tmp_path / "model", TABLES["float32"](), {}, max_tokens=7)
    text = " ".join(TINY_VOCABULARY[5:25])
    embedder = load(folder)
    assert embedder.max_length == 7
    assert np.abs(embedder.encode([text]) - reference(folder).encode([text])).max() <= 1e-6
    assert np.array_equal(embedder.encode([text]), embedder.encode([" ".join(TINY_VOCABULARY[18:25])]))
    embedder.max_length = 4
    embedder.save(tmp_path / "saved")
    assert load(tmp_path / "saved").max_length == 4
    assert np.abs(reference(tmp_path / "saved").encode([text]) - embedder.encode([text])).max() <= 1e-6
    assert load(folder, max_length=5).max_length == 5


def test_without_a_limit_long_texts_are_read_whole(tmp_path):
    folder = write_table(tmp_path / "model", TABLES["float32"](), {})
    embedder = load(folder)
    assert embedder.pack(["the " * 3000], role="document").max_seqlen == 3000
    tokenizer, num_added = load_tokenizer(folder)
    assert (num_added, tokenizer.max_length) == (0, embedder.max_length)


def test_fine_tuned(tmp_path):
    """Rows of tokens that occur move, also those that shared one; an empty text is no obstacle."""
    embedder = load(write_table(tmp_path / "model", quantized(), {}))
    before = embedder.encoder.embedding.weight.detach().clone()
    data = make_dataset()
    data.corpus["d0"] = "the of the"
    finetune(embedder, data, FinetuneConfig(epochs=2, batch_size=4, lr=0.1), out=tmp_path / "run")
    moved = (embedder.encoder.embedding.weight != before).any(dim=1)
    assert moved.sum() > 20
    assert not moved[TINY_VOCABULARY.index("語")]
    assert load(tmp_path / "run" / "model").sha256() == embedder.sha256()
    packed = embedder.pack(["", "the", ""], role="document")
    vectors = embedder.embed(packed, role="document")
    vectors.sum().backward()
    assert torch.isfinite(embedder.encoder.embedding.weight.grad).all()
    assert vectors[0].tolist() == vectors[2].tolist() == [0.0] * 16


def test_a_lookup_has_no_flops(tmp_path):
    assert "FLOPs" not in facts(load(write_table(tmp_path / "model", TABLES["float32"](), {})))


def test_other_poolings_are_for_trials_alone(tmp_path):
    embedder = load(write_table(tmp_path / "model", TABLES["float32"](), {}))
    embedder.pooling = Pooling(("cls",), 16)
    with pytest.raises(ValueError, match=naming("sequence", "no", "token")):
        embedder.encode(["", "the"])
    with pytest.raises(ValueError, match=naming("pooling", "cls", "mean")):
        embedder.save(tmp_path / "saved")


@pytest.mark.parametrize(
    ("changes", "facts"),
    [
        ({"embeddings": None}, ("model_type", "missing")),
        ({"embeddings": draw(20)}, ("embeddings", (20,), "tokens")),
        ({"embeddings": draw(0, 16)}, ("embeddings", (0, 16))),
        ({"mapping": torch.arange(SIZE)}, ("mapping", 0, SIZE - 1, 20)),
        ({"mapping": -torch.ones(SIZE, dtype=torch.int64)}, ("mapping", -1, 20)),
        ({"mapping": draw(SIZE)}, ("mapping", "torch.float32", "row")),
        ({"mapping": torch.zeros(3 * SIZE, dtype=torch.uint8)}, ("mapping", 3 * SIZE, "tokenizer", "tokens")),
        ({"mapping": torch.zeros(SIZE, dtype=torch.complex64)}, ("mapping", "torch.complex64")),
        ({"weights": torch.ones(SIZE).to(torch.float8_e4m3fn)}, ("weights", "torch.float8_e4m3fn")),
        ({"mapping": torch.arange(0)}, ("mapping", (0,), "row")),
        ({"weights": draw(20)}, ("weights", (20,), (SIZE,))),
        ({"mapping": torch.arange(20), "weights": draw(20)}, ("ids", SIZE - 1, ..., "vocab_size", ..., 20)),
    ],
)
def test_tables_that_do_not_fit(tmp_path, changes, facts):
    tensors = {name: x for name, x in (quantized() | changes).items() if x is not None}
    folder = write_table(tmp_path / "model", tensors, {"normalize": True})
    with pytest.raises(ValueError, match=naming(folder, *facts)) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_a_module_without_a_table(tmp_path):
    folder = write_table(tmp_path / "model", {"weight": draw(SIZE, 16)})
    entry = {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.StaticEmbedding"}
    write_json(folder / "modules.json", [entry])
    with pytest.raises(ValueError, match=naming(folder / "model.safetensors", "embedding.weight", "embeddings")):
        load(folder)


def test_lora_needs_a_linear_layer(tmp_path):
    embedder = load(write_table(tmp_path / "model", {"embeddings": draw(SIZE, 16)}, {"normalize": True}))
    with pytest.raises(ValueError, match=naming("LoRA", "Linear")):
        finetune(embedder, make_dataset(), FinetuneConfig(lora={"rank": 2}))


@pytest.mark.slow
def test_the_published_table(reference, shared_data):
    """tokenlearn-static-model: 276,326 tokens, 10,000 rows of 8 bits by 64."""
    spec = importlib.util.find_spec("static_model")
    if spec is None:
        pytest.skip("the package tokenlearn-static-model is not installed")
    folder = Path(spec.submodule_search_locations[0]) / "model"
    embedder = load(folder)
    assert (embedder.dim, embedder.encoder.config.vocab_size) == (64, 276_326)
    data = json.loads((shared_data / "lyft_uber" / "val_dataset.json").read_text())
    texts = [*data["corpus"].values(), *data["queries"].values(), ""]
    assert np.abs(embedder.encode(texts) - reference(folder).encode(texts)).max() <= 1e-6
