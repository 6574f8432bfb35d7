"""Inference that runs out of memory goes on with smaller batches, and gives what enough memory gives."""

import numpy as np
import pytest
import torch
from naming import naming
from tiny import make_dataset, make_embedder

from embedft import new_scorer

TEXTS = [*make_dataset(12, 12).corpus.values()]


def limited(model, most: int, error: type = torch.OutOfMemoryError) -> list[int]:
    """Lets the encoder run out of memory above so many tokens; the tokens of each attempt."""
    forward, attempts = model.encoder.forward, []

    def encoder(packed):
        attempts.append(len(packed.input_ids))
        if attempts[-1] > most:
            raise error("CUDA out of memory. Tried to allocate 2.00 GiB")
        return forward(packed)

    model.encoder.forward = encoder
    return attempts


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError])
def test_a_batch_is_halved_until_it_fits(tmp_path, error):
    """And so are the next ones, without trying more again."""
    embedder = make_embedder(tmp_path / "base")
    expected = embedder.encode(TEXTS, batch_tokens=64)
    attempts = limited(embedder, 20, error)
    with pytest.warns(UserWarning, match=naming("cpu", "memory", "tokens")) as caught:
        found = embedder.encode(TEXTS, batch_tokens=64)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    assert len(caught) == len([n for n in attempts if n > 20]) == 2  # from at most 64 to 32, then 16
    attempts.clear()
    np.testing.assert_array_equal(embedder.encode(TEXTS, batch_tokens=64), found)
    assert max(attempts) <= 20


def test_pairs_too(tmp_path):
    scorer = new_scorer(make_embedder(tmp_path / "base")).eval()
    pairs = [("hello", text) for text in TEXTS]
    expected = scorer.score(pairs)
    attempts = limited(scorer, 40)
    with pytest.warns(UserWarning, match=naming("memory", "tokens")):
        found = scorer.score(pairs)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    assert len([n for n in attempts if n > 40]) < len([n for n in attempts if n <= 40])


def test_a_text_that_does_not_fit_alone_is_an_error(tmp_path):
    embedder = make_embedder(tmp_path / "base")
    limited(embedder, 3)
    longest = max(map(len, embedder.tokenizer.encode(TEXTS)))
    with (
        pytest.warns(UserWarning, match=naming("memory")),
        pytest.raises(ValueError, match=naming("cpu", "memory", longest, "tokens")),
    ):
        embedder.encode(TEXTS)


def test_other_errors_stay_what_they_are(tmp_path):
    embedder = make_embedder(tmp_path / "base")

    def encoder(packed):
        raise RuntimeError("shapes differ")

    embedder.encoder.forward = encoder
    with pytest.raises(RuntimeError, match=naming("differ")):
        embedder.encode(TEXTS)
