"""token_cache.py: every text once, the same ids in memory and from the file, and nothing that is out of date."""

import copy
import errno
import pickle
import random
import tempfile
import threading

import numpy as np
import pytest
from naming import naming
from tiny import make_dataset, make_embedder

from embedft import FinetuneConfig, finetune
from embedft.data.batches import make_batches
from embedft.encoders import token_cache
from embedft.encoders.token_cache import TokenCache
from embedft.encoders.token_ids import TokenIds, cut

LONG = "a b c d e f g h i j"


def lengths_of(texts: list[str]) -> TokenIds:
    """Stands for a tokenizer: as many ids as the text has characters, all of them its length."""
    return TokenIds.of([[len(text)] * len(text) for text in texts])


@pytest.fixture
def tiny(tiny_bert):
    embedder = make_embedder(tiny_bert)
    embedder.token_cache = TokenCache()
    return embedder


@pytest.mark.parametrize("memory_bytes", [0, 40, 120, 2**20])
def test_ids_are_the_same_wherever_they_are(memory_bytes):
    generator, cache, asked = random.Random(memory_bytes), TokenCache(memory_bytes), []

    def compute(texts):
        asked.extend(texts)
        return lengths_of(texts)

    for _ in range(50):
        texts = ["x" * generator.randrange(12) for _ in range(generator.randrange(6))]
        assert cache.find("key", texts, compute).tolist() == lengths_of(texts).tolist()
    assert sorted(asked) == sorted(set(asked))
    assert cache._memory.nbytes <= memory_bytes
    assert (cache._file is None) == (memory_bytes == 2**20)
    assert cache._num_kept + cache._num_spilled == sum(map(len, set(asked)))


def test_ids_beyond_int32():
    with pytest.raises(ValueError, match=naming("id", 2**31, ..., 2**31 - 1)):
        TokenIds.of([[1], [2, 2**31]])


def test_an_empty_text_in_the_file():
    assert TokenCache(0).find("key", ["", ""], lengths_of).tolist() == [[], []]


def test_memory_grows_with_what_is_kept():
    cache = TokenCache(2**20)
    for size in (100, 10, 200, 1):
        cache.find("key", ["x" * size], lengths_of)
        assert cache._num_kept <= len(cache._memory) <= cache._num_kept * 1.5
    cache.close()
    assert cache._memory.nbytes == len(cache._rows) == 0


def test_keys_are_apart_and_what_was_read_is_a_copy():
    cache = TokenCache()
    first = cache.find("a", ["xy"], lengths_of)
    other = cache.find("b", ["xy"], lambda texts: TokenIds.of([[7]]))
    first.ids[:] = 0
    assert cache.find("a", ["xy"], lengths_of).tolist() == [[2, 2]]
    assert other.tolist() == cache.find("b", ["xy"], lengths_of).tolist() == [[7]]


def test_an_error_keeps_nothing():
    cache = TokenCache()
    with pytest.raises(ZeroDivisionError):
        cache.find("key", ["xy"], lambda texts: 1 / 0)
    assert cache.find("key", ["xy"], lengths_of).tolist() == [[2, 2]]


def test_a_full_disk_is_named_and_loses_nothing():
    """What the failed write left in the file is not taken for ids later."""

    class Full:
        def __init__(self, file):
            self.file = file

        def write(self, content):
            self.file.write(content[: len(content) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")

        def __getattr__(self, name):
            return getattr(self.file, name)

    cache = TokenCache(0)
    cache.find("key", ["x" * 3], lengths_of)
    file, cache._file = cache._file, Full(cache._file)
    with pytest.raises(OSError, match=naming("space")) as caught:
        cache.find("key", ["x" * 8], lengths_of)
    assert caught.value.filename == tempfile.gettempdir()
    cache._file = file
    texts = ["x" * n for n in (5, 3, 8)]
    assert cache.find("key", texts, lengths_of).tolist() == lengths_of(texts).tolist()


def test_a_copy_starts_empty():
    cache = TokenCache(40)
    cache.find("key", ["x" * 20], lengths_of)
    for other in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        assert (other.memory_bytes, other._rows) == (40, {})
    file = cache._file
    cache.close()
    cache.close()
    assert file.closed
    assert cache.find("key", ["xy"], lengths_of).tolist() == [[2, 2]]


def test_threads_share_it():
    cache, texts, found = TokenCache(4_000), ["x" * n for n in range(60)], []

    def look(seed: int) -> None:
        for _ in range(30):
            some = random.Random(seed).sample(texts, 20)
            found.append(cache.find("key", some, lengths_of).tolist() == lengths_of(some).tolist())

    threads = [threading.Thread(target=look, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 120
    assert len(cache._rows["key"]) == len(cache._starts) <= 60


# As part of an embedder.


def counted(embedder, monkeypatch) -> list[str]:
    """The texts that the embedder's tokenizer is asked for from now on."""
    asked = []
    for name in ("token_ids", "whole"):
        function = getattr(embedder.tokenizer, name)
        monkeypatch.setattr(
            embedder.tokenizer, name, lambda texts, f=function, **options: asked.extend(texts) or f(texts, **options)
        )
    return asked


def test_a_change_of_anything_tokenizes_again(tiny, monkeypatch):
    asked = counted(tiny, monkeypatch)

    def is_new(role: str = "query", **options) -> bool:
        before, found = len(asked), tiny.pack([LONG], role=role, **options)
        cache, tiny.token_cache = tiny.token_cache, None
        expected = tiny.pack([LONG], role=role, **options)
        tiny.token_cache = cache
        assert [found.input_ids.tolist(), found.cu_seqlens.tolist()] == [
            expected.input_ids.tolist(),
            expected.cu_seqlens.tolist(),
        ]
        return len(asked) == before + 2

    assert [is_new(), is_new(), is_new("document")] == [True, False, False]  # without prompts, roles do not differ
    tiny.prompts = {"query": "the "}
    assert [is_new("document"), is_new(), is_new()] == [False, True, False]
    tiny.max_length = 7
    assert [is_new(), is_new(), is_new("document")] == [True, False, True]
    tiny.tokenizer.backend.add_tokens(["e f"])
    assert [is_new(), is_new()] == [True, False]
    # Windows: whatever their size and stride.
    assert [is_new(passages=(6, 2)), is_new(passages=(6, 2)), is_new(passages=(7, 1))] == [True, False, False]


def test_errors_are_those_without_a_cache(tiny):
    tiny.pack(["a"], role="query")
    with pytest.raises(ValueError, match=naming("texts[1]", "list", "str")):
        tiny.pack(["a", ["b"]], role="query")
    with pytest.raises(ValueError, match=naming("passages", 4_000)):
        tiny.pack(["a"], role="document", passages=(4_000, 1))


def test_vectors_are_those_without_a_cache(tiny, tiny_bert):
    texts, plain = [LONG, "", "the fee", LONG], make_embedder(tiny_bert)
    for _ in range(2):
        np.testing.assert_array_equal(tiny.encode(texts), plain.encode(texts))
        for found, expected in zip(
            tiny.encode_passages(texts, (6, 2)), plain.encode_passages(texts, (6, 2)), strict=True
        ):
            np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("memory", [0, 1_024])
@pytest.mark.parametrize("options", [{"batch_size": 4}, {"batch_tokens": 60}, {"passages": [8, 4], "batch_size": 4}])
def test_a_run_tokenizes_each_text_once(tmp_path, tiny_bert, monkeypatch, options, memory):
    """Queries and documents of the training and the validation set, over epochs of training and validation."""
    data, held_out = make_dataset(negatives=1), make_dataset(5, 4, seed=1)
    config = FinetuneConfig(epochs=3, num_negatives=1, token_memory=memory, **options)
    embedder = make_embedder(tiny_bert)
    asked = counted(embedder, monkeypatch)
    finetune(embedder, data, config, validation=held_out)
    asked = [text for text in asked if text]  # a check of passages cuts ""
    expected = {text for part in (data, held_out) for texts in (part.queries, part.texts) for text in texts.values()}
    assert set(asked) == expected
    # Queries are tokenized as whole texts if they are documents of some dataset, too.
    assert len(asked) == len(expected)
    assert embedder.token_cache is None


def test_training_is_the_same_bit_for_bit(tmp_path, tiny_bert, monkeypatch):
    weights = []
    for is_cached in (True, False):
        embedder, data = make_embedder(tiny_bert), make_dataset(negatives=1)
        batches = make_batches(data, make_embedder(tiny_bert).pack, batch_size=4, seed=0, num_negatives=1)
        given = {} if is_cached else {"batches": batches}
        batching = {"batch_size": 4, "num_negatives": 1} if is_cached else {}
        finetune(embedder, data, FinetuneConfig(epochs=2, seed=0, **batching), **given)
        weights.append({name: x.numpy() for name, x in embedder.state_dict().items()})
    for name, expected in weights[1].items():
        np.testing.assert_array_equal(weights[0][name], expected)


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_a_run_that_fails_leaves_no_cache(tiny_bert, error):
    def fail(state, record):
        raise error

    embedder = make_embedder(tiny_bert)
    with pytest.raises(error):
        finetune(embedder, make_dataset(), FinetuneConfig(epochs=1), on_step=fail)
    assert embedder.token_cache is None


def test_a_cache_of_the_embedders_own_stays(tiny):
    own = tiny.token_cache
    with token_cache.token_cache(tiny, 0):
        tiny.pack([LONG], role="query")
    assert tiny.token_cache is own
    assert len(own._starts) == 1


# Tokenizing ahead, as for a GPU.


@pytest.fixture
def ahead(monkeypatch):
    monkeypatch.setattr(token_cache.devices, "batches_ahead", lambda device: 2)
    yield
    assert "prefetch" not in [thread.name for thread in threading.enumerate()]


@pytest.mark.parametrize("count", [0, 1, 7, 9])
def test_slices_tokenized_ahead_change_nothing(tiny_bert, tmp_path, ahead, monkeypatch, count):
    texts = [f"the fee of {'a ' * n}" for n in range(count)]
    expected = make_embedder(tiny_bert).encode(texts)
    embedder = make_embedder(tiny_bert)
    asked = counted(embedder, monkeypatch)
    np.testing.assert_array_equal(embedder.encode(texts, slice_texts=3), embedder.encode(texts, slice_texts=3))
    np.testing.assert_allclose(embedder.encode(texts, slice_texts=3), expected, rtol=0, atol=1e-6)
    assert sorted(asked) == sorted(3 * texts)
    stored = make_embedder(tiny_bert, store=tmp_path / "store")
    for _ in range(2):
        np.testing.assert_allclose(stored.encode(texts, slice_texts=3), expected, rtol=0, atol=1e-6)


def test_errors_of_slices_tokenized_ahead(tiny_bert, ahead, monkeypatch):
    embedder = make_embedder(tiny_bert)
    with pytest.raises(ValueError, match=naming("texts[1]", "int", "str")):
        embedder.encode(["a", "b", "c", 1], slice_texts=2)
    with pytest.raises(ValueError, match=naming("dim", 33, 1, 32)):
        embedder.encode(["a"], dim=33)

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(embedder.encoder, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        embedder.encode(["a"] * 9, slice_texts=2)


def test_a_tokenizer_is_used_by_one_thread_at_a_time(tiny_bert):
    """Windows are cut from texts that are not truncated; another thread's texts still are."""
    embedder, found = make_embedder(tiny_bert), []
    embedder.max_length = 6
    expected, sha256 = embedder.tokenizer.encode([LONG] * 20), embedder.tokenizer.sha256()

    def look(cut_windows: bool) -> None:
        for _ in range(50):
            if cut_windows:
                found.append(len(embedder.tokenizer.windows([LONG] * 20, (6, 4))[0]) == 60)
            else:
                found.append(embedder.tokenizer.encode([LONG] * 20) == expected)
                found.append(embedder.tokenizer.sha256() == sha256)

    threads = [threading.Thread(target=look, args=(i % 2 == 0,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 300


def test_cut_by_hand():
    """Two of each text's ids begin every window and one ends it; with 5 at most, 2 of the text's own fit."""
    whole = TokenIds.of([[2, 1, 8, 9, 1, 2, 3, 4, 5, 7], [2, 1, 8, 9, 1, 7], [0, 0]])
    windows, source = cut(whole, 5, 3)
    assert windows.tolist() == [[8, 9, 1, 2, 7], [8, 9, 3, 4, 7], [8, 9, 5, 7], [8, 9, 1, 7], []]
    assert source.tolist() == [0, 0, 0, 1, 2]
