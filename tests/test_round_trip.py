"""Every family goes to sentence-transformers and comes back, with equal vectors."""

import numpy as np
import pytest
import torch
from families import write_by_transformers

from embedft import load_embedder
from embedft.encoders.folder import FAMILIES

TEXTS = ["a b c", "", "what order of the world", "the fee of order " * 15]


# transformers calls "new" "gte", and has no "model2vec" (test_static.py).
@pytest.mark.parametrize("model_type", [name for name in FAMILIES if name not in ("new", "model2vec")])
def test_to_sentence_transformers_and_back(tmp_path, tiny_bert, reference, model_type):
    pytest.importorskip("transformers")
    write_by_transformers(tmp_path, model_type, tiny_bert)
    embedder = load_embedder(tmp_path, device="cpu")
    expected = embedder.encode(TEXTS)
    embedder.save(tmp_path / "ours")
    theirs = reference(tmp_path / "ours")
    np.testing.assert_allclose(theirs.encode(TEXTS), expected, rtol=0, atol=1e-5 * abs(expected).max())
    theirs.save(str(tmp_path / "theirs"))
    back = load_embedder(tmp_path / "theirs", device="cpu")
    assert np.array_equal(back.encode(TEXTS), expected)
    weights, returned = embedder.encoder.state_dict(), back.encoder.state_dict()
    assert weights.keys() == returned.keys()
    assert all(torch.equal(weights[name], returned[name]) for name in weights)
