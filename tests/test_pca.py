"""pca.py: principal components by hand and as FAISS has them, and an Embedder that maps onto them."""

import faiss
import numpy as np
import pytest
from naming import naming
from tiny import make_dataset, make_embedder

from embedft import RetrievalDataset, evaluate
from embedft.retrieval.encoding import encode_documents, join_slices
from embedft.retrieval.pca import fit_pca


class Vectors:
    """An embedder of given vectors, document i at row i, with the part of `Embedder` that `fit_pca` uses."""

    similarity, normalize, adapter, truncate_dim = "dot", False, None, None

    def __init__(self, rows):
        self.rows = np.array(rows, dtype=np.float32)
        self.full_dim = self.rows.shape[1]

    def encode(self, texts, *, role, dim):
        return self.rows[[int(text) for text in texts]]

    def base(self):
        return None


def documents(number):
    return RetrievalDataset({"q": "0"}, {f"d{i}": str(i) for i in range(number)}, {"q": {"d0": 1}})


def test_the_first_component_by_hand():
    """Three points on a line with slope 1: the component is (1, 1) / sqrt(2), and the mean is not subtracted."""
    embedder = Vectors([[0, 1], [1, 2], [2, 3]])
    adapter = fit_pca(embedder, documents(3), 1)
    found = adapter.transform(embedder.rows, "document")
    np.testing.assert_allclose(found[:, 0], np.array([1, 3, 5]) / np.sqrt(2), atol=1e-6)
    np.testing.assert_allclose(adapter.transform(np.float32([[1, 0]]), "query"), [[1 / np.sqrt(2)]], atol=1e-6)


@pytest.mark.parametrize("dim", [1, 3, 8])
def test_components_are_those_of_faiss(dim):
    rows = np.random.default_rng(0).standard_normal((50, 8)).astype(np.float32) * np.arange(1, 9) + 3
    reference = faiss.PCAMatrix(8, dim)
    reference.train(rows)
    expected = reference.apply(rows)
    found = fit_pca(Vectors(rows), documents(50), dim).transform(rows, "document")
    # FAISS subtracts the mean, and a component's sign is free.
    found = found - found.mean(axis=0)
    np.testing.assert_allclose(found * np.sign((found * expected).sum(axis=0)), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("passages", [None, (8, 4)])
def test_an_embedder_searches_in_the_components(tmp_path, passages):
    embedder, dataset, other = make_embedder(tmp_path / "model"), make_dataset(12, 9), make_dataset(8, 8, seed=1)
    whole_NW, _ = join_slices(list(encode_documents(embedder, dataset.texts, passages, None, {})))
    queries_QW = embedder.encode(list(other.queries.values()), role="query")
    embedder.attach(fit_pca(embedder, dataset, 4, passages=passages))
    centered_NW = whole_NW - whole_NW.mean(axis=0)
    _, _, components_WW = np.linalg.svd(centered_NW.astype(np.float64), full_matrices=False)
    expected = queries_QW @ components_WW[:4].T
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    found = embedder.encode(list(other.queries.values()), role="query")
    np.testing.assert_allclose(np.abs(found), np.abs(expected), atol=1e-4)
    setting = evaluate(embedder, other, passages=passages).setting
    assert (setting["adapter"], setting["model_dim"]) == ("pca-4", 4)


def test_too_many_components_and_mapped_vectors_are_refused(tmp_path):
    with pytest.raises(ValueError, match=naming("pca", 3, 2, "documents")):
        fit_pca(Vectors(np.eye(3)), documents(3), 3)
    with pytest.raises(ValueError, match=naming("pca", 9, 8, "dimensions")):
        fit_pca(Vectors(np.eye(20, 8)), documents(20), 9)
    embedder = make_embedder(tmp_path / "model")
    embedder.attach(fit_pca(embedder, make_dataset(), 4))
    with pytest.raises(ValueError, match=naming("pca", 4, "mapped")):
        fit_pca(embedder, make_dataset(), 4)
