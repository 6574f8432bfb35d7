"""Every family goes to sentence-transformers and comes back, with equal vectors."""

import json

import numpy as np
import pytest
from conftest import TINY_VOCABULARY
from families import SIZES, randomize

from embedft import load_embedder
from embedft.encoders.folder import FAMILIES

TEXTS = ["a b c", "", "what order of the world", "the fee of order " * 15]
TOKENS = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
IDS = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3}
# What a family needs besides SIZES. Windows are shorter than the longest text.
OPTIONS = {
    "modernbert": {"local_attention": 8},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 8},
    "mistral": {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 8},
    "gemma3_text": {"sliding_window": 8, "use_bidirectional_attention": True},
}


# transformers calls "new" "gte", and has no "model2vec" (test_static.py).
@pytest.mark.parametrize("model_type", [name for name in FAMILIES if name not in ("new", "model2vec")])
def test_to_sentence_transformers_and_back(tmp_path, tiny_bert, reference, model_type):
    transformers = pytest.importorskip("transformers")
    sizes = SIZES | IDS | {"vocab_size": len(TINY_VOCABULARY)} | OPTIONS.get(model_type, {})
    config = transformers.AutoConfig.for_model(model_type, **sizes)
    randomize(transformers.AutoModel.from_config(config)).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((tiny_bert / "tokenizer.json").read_bytes())
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **TOKENS}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))

    embedder = load_embedder(tmp_path, device="cpu")
    expected = embedder.encode(TEXTS)
    embedder.save(tmp_path / "ours")
    theirs = reference(tmp_path / "ours")
    np.testing.assert_allclose(theirs.encode(TEXTS), expected, rtol=0, atol=1e-5 * abs(expected).max())
    theirs.save(str(tmp_path / "theirs"))
    assert np.array_equal(load_embedder(tmp_path / "theirs", device="cpu").encode(TEXTS), expected)
