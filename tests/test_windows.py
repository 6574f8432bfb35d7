"""Training on passages: which windows a batch takes, gradients against a naive maximum, and fine-tuning."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from naming import naming
from ranks import run_ranks
from tiny import make_dataset, make_embedder

from embedft import FinetuneConfig, RetrievalDataset, evaluate, finetune
from embedft.data.batches import Batches, make_batches
from embedft.data.mixture import make_mixture
from embedft.files import read_json, read_jsonl
from embedft.losses.contrastive import in_batch_negatives
from embedft.recipe import finetune as finetuning
from embedft.recipe import inputs
from embedft.training.cached import cached_backward
from embedft.training.references import best_windows

PASSAGES = (6, 4)  # four tokens of text, none twice


def long_dataset(num_documents: int = 6, num_windows: int = 5, **changes) -> RetrievalDataset:
    """Document j is `num_windows` windows of four letters; its two queries quote the second and the last of them."""
    letters = np.random.default_rng(0).choice(list("abcdefghijklmnopqrstuvwxyz"), (num_documents, num_windows, 4))
    corpus = {f"d{j}": " ".join(words.flatten()) for j, words in enumerate(letters)}
    queries = {f"q{j}-{i}": " ".join(words[i]) for j, words in enumerate(letters) for i in (1, num_windows - 1)}
    qrels = {query_id: {document_of(query_id): 1} for query_id in queries}
    return RetrievalDataset(**({"queries": queries, "corpus": corpus, "qrels": qrels} | changes))


def document_of(query_id: str) -> str:
    return "d" + query_id[1:].partition("-")[0]


@pytest.fixture
def embedder(tmp_path):
    return make_embedder(tmp_path / "base", dropout=0.0)


def texts_of(embedder, packed) -> list[str]:
    backend = embedder.tokenizer.backend
    parts = packed.input_ids.split(packed.lengths().tolist())
    return [" ".join(backend.id_to_token(i) for i in part.tolist()[1:-1]) for part in parts]


# Batches.


def test_all_windows_where_there_is_room(embedder):
    data = RetrievalDataset(
        {"q1": "a", "q2": "x"},
        {"d1": "a b c d e f g h i", "d2": "x y"},
        {"q1": {"d1": 1}, "q2": {"d2": 1}},
        titles={"d2": "w"},
    )
    batches = make_batches(data, embedder.pack, batch_size=2, seed=0, passages=PASSAGES, windows_per_document=3)
    batch = batches.collate([("q1", "d1"), ("q2", "d2")])
    assert texts_of(embedder, batch.documents) == ["a b c d", "e f g h", "i", "w x y"]
    assert batch.targets.document.tolist() == batch.documents.source.tolist() == [0, 0, 0, 1]
    assert batch.targets.group.tolist() == [[0], [1]]
    assert batch.document_ids == ["d1", "d2"]
    assert batch.queries.source is None
    whole = make_batches(data, embedder.pack, batch_size=2, seed=0).collate([("q1", "d1"), ("q2", "d2")])
    assert whole.targets.document is None


def test_the_best_of_every_query_then_others_at_random(embedder):
    data = long_dataset()
    options = {"batch_size": 12, "seed": 3, "passages": PASSAGES}
    examples = [("q0-1", "d0"), ("q0-4", "d0"), ("q1-1", "d1"), ("q2-4", "d2")]
    drawn = set()
    for epoch in range(20):
        batches = make_batches(data, embedder.pack, windows_per_document=3, **options)
        found = {"q0-1": {"d0": 1}, "q0-4": {"d0": 4}, "q1-1": {"d1": 1, "d0": 3}}
        batches = replace(batches, collate=replace(batches.collate, best_windows=found))
        batch = batches.collate(examples, draw=(epoch, 0))
        assert batch.targets.document.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
        found = texts_of(embedder, batch.documents)
        windows = [[" ".join(data.corpus[d].split()[4 * i : 4 * i + 4]) for i in range(5)] for d in ("d0", "d1", "d2")]
        numbers = [[windows[d].index(text) for text in found[3 * d : 3 * d + 3]] for d in range(3)]
        assert all(of_one == sorted(set(of_one)) for of_one in numbers)  # each once, in the text's order
        assert {1, 4} <= set(numbers[0])
        assert 1 in numbers[1]
        drawn.add(tuple(map(tuple, numbers)))
        # The same draw gives the same windows, another batch of the epoch others.
        again = batches.collate(examples, draw=(epoch, 0))
        assert torch.equal(again.documents.input_ids, batch.documents.input_ids)
    assert {of_all[0] for of_all in drawn} == {(0, 1, 4), (1, 2, 4), (1, 3, 4)}
    assert {window for of_all in drawn for window in of_all[2]} == {0, 1, 2, 3, 4}
    # More best ones than room: those of the first queries.
    batches = make_batches(data, embedder.pack, windows_per_document=1, **options)
    batches = replace(batches, collate=replace(batches.collate, best_windows={"q0-1": {"d0": 1}, "q0-4": {"d0": 4}}))
    assert texts_of(embedder, batches.collate(examples[:2]).documents) == [data.queries["q0-1"]]
    assert texts_of(embedder, batches.collate(examples[1::-1]).documents) == [data.queries["q0-4"]]


def ids_of(batches):
    return [batch.documents.input_ids.tolist() for batch in batches]


@pytest.mark.parametrize("several", [False, True])
def test_windows_follow_from_seed_epoch_and_batch(embedder, several):
    def made(seed):
        options = {"batch_size": 5, "seed": seed, "passages": PASSAGES, "windows_per_document": 2}
        if several:
            half = {name: long_dataset(3) for name in ("one", "two")}
            return make_mixture(half, embedder.pack, sampling="round_robin", **options)
        return make_batches(long_dataset(), embedder.pack, **options)

    first, second = (ids_of(made(-1).epoch(number)) for number in (0, 1))
    assert ids_of(made(-1).epoch(1)) == second != first
    assert ids_of(made(-1).epoch(1, start=1)) == second[1:]
    assert ids_of(made(7).epoch(1)) != second


def test_the_draw_changes_with_the_epoch_of_one_batch(embedder):
    """One query: all batches are alike but for the windows that are drawn."""
    data = long_dataset(1, 12, qrels={"q0-1": {"d0": 1}})
    batches = make_batches(data, embedder.pack, batch_size=1, seed=0, passages=PASSAGES, windows_per_document=2)
    assert len({str(ids_of(batches.epoch(number))) for number in range(8)}) > 4


@pytest.mark.parametrize("several", [False, True])
def test_the_draw_changes_with_the_batch_of_one_epoch(embedder, several):
    """Twelve batches of one text, each with two of its five windows."""
    options = {"batch_size": 1, "seed": 0, "passages": PASSAGES, "windows_per_document": 2}
    text = long_dataset(1, 12).corpus["d0"]
    queries = {f"q{i}": f"a b {i}" for i in range(12)}
    data = RetrievalDataset(queries, {"d": text}, {query_id: {"d": 1} for query_id in queries})
    batches = (
        make_mixture({"one": data}, embedder.pack, **options)
        if several
        else make_batches(data, embedder.pack, **options)
    )
    assert len({str(drawn) for drawn in ids_of(batches.epoch(0))}) > 4


def test_batches_by_tokens_count_the_windows(embedder):
    """A document of 18 tokens of text: windows of 6, 6, 6, 6 and 4 tokens, of which two are taken, 12; a query is 6."""
    corpus = {f"d{j}": " ".join("abcdefghijklmnopqr") for j in range(4)} | {"short": "a"}
    queries = {f"q{j}": "a b c d" for j in range(4)}
    data = RetrievalDataset(queries, corpus, {f"q{j}": {f"d{j}": 1} for j in range(4)})
    options = {"seed": 0, "passages": PASSAGES, "windows_per_document": 2}
    assert len(make_batches(data, embedder.pack, batch_tokens=36, **options)) == 2
    assert len(make_batches(data, embedder.pack, batch_tokens=35, **options)) == 3
    assert len(make_batches(data, embedder.pack, batch_tokens=72, **options)) == 1
    assert len(make_batches(data, embedder.pack, batch_tokens=36, **(options | {"windows_per_document": 9}))) == 4


def test_a_best_window_that_is_not_there(embedder):
    batches = make_batches(long_dataset(), embedder.pack, batch_size=2, seed=0, passages=PASSAGES)
    for best in (5, 7):
        collate = replace(batches.collate, best_windows={"q0-1": {"d0": best}})
        with pytest.raises(ValueError, match=naming("document", "'d0'", "windows", 5, "best", best)):
            collate([("q0-1", "d0")])
    with pytest.raises(ValueError, match=naming("windows_per_document", 0, 1)):
        make_batches(long_dataset(), embedder.pack, batch_size=2, seed=0, passages=PASSAGES, windows_per_document=0)


# Gradients.


def naive_loss(Q, D, targets):
    """In-batch negatives over the best window of each document, found one by one."""
    documents, total = targets.document.tolist(), 0.0
    for query, (positive,) in zip(Q, targets.group.tolist(), strict=True):
        windows = [[query @ D[c] for c, of in enumerate(documents) if of == j] for j in range(max(documents) + 1)]
        logits = torch.stack([max(of_one, key=lambda score: score.item()) for of_one in windows]) / 0.05
        total = total - logits.log_softmax(0)[positive]
    return total / len(Q)


def gradients_of(embedder):
    found = {name: parameter.grad.clone() for name, parameter in embedder.named_parameters()}
    embedder.zero_grad()
    return found


def test_gradients_equal_those_of_the_naive_maximum(embedder):
    batches = make_batches(
        long_dataset(), embedder.pack, batch_size=12, seed=0, passages=PASSAGES, windows_per_document=3
    )
    batch = batches.collate([(f"q{j}-{i}", f"d{j}") for j, i in ((0, 1), (1, 4), (2, 1), (3, 4), (4, 1))])
    found = []
    for loss in (in_batch_negatives, naive_loss):
        value = loss(*embedder.embed_pair(batch.queries, batch.documents), batch.targets)
        value.backward()
        found.append((value.item(), gradients_of(embedder)))
    value = cached_backward(
        embedder, batch.queries, batch.documents, batch.targets, in_batch_negatives, mini_batch_tokens=20
    )
    found.append((value.item(), gradients_of(embedder)))
    for value, gradients in found[1:]:
        assert value == pytest.approx(found[0][0], abs=1e-5)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, found[0][1][name], atol=1e-5, rtol=1e-4)


# The best windows.


def naive_best(embedder, data, pairs):
    best = {}
    for query_id, document_id in pairs:
        words = data.corpus[document_id].split()
        windows = [" ".join(words[i : i + 4]) for i in range(0, len(words), 4)]
        query = embedder.encode([data.queries[query_id]], role="query")[0]
        best.setdefault(query_id, {})[document_id] = int((embedder.encode(windows) @ query).argmax())
    return best


def test_the_best_windows_are_those_of_the_model(embedder):
    data = long_dataset()
    negatives = {query_id: ["d5" if "d5" not in data.qrels[query_id] else "d0"] for query_id in data.queries}
    data = RetrievalDataset(data.queries, data.corpus, data.qrels, negatives)
    options = {"batch_size": 4, "seed": 0, "passages": PASSAGES}
    pairs = [(query_id, document_id) for query_id, by in data.qrels.items() for document_id in by]
    assert best_windows(embedder, make_batches(data, embedder.pack, **options)) == naive_best(embedder, data, pairs)
    pairs += [(query_id, document_id) for query_id, ids in negatives.items() for document_id in ids]
    batches = make_batches(data, embedder.pack, num_negatives=1, **options)
    found = best_windows(embedder, batches, at_a_time=2)
    assert found == naive_best(embedder, data, pairs)
    # The features that `encode` leaves out count: training moves them all.
    embedder.truncate_dim = 3
    assert best_windows(embedder, batches) == found
    # A quotation is found where it stands, by this model for most.
    assert sum(found[query_id][document_of(query_id)] == int(query_id[-1]) for query_id in data.queries) >= 8


def test_documents_of_one_window_leave_nothing_to_choose(embedder):
    short = make_dataset()
    batches = make_batches(short, embedder.pack, batch_size=4, seed=0, passages=(40, 20))
    assert best_windows(embedder, batches) == {}


# Fine-tuning.

CONFIG = FinetuneConfig(epochs=2, batch_size=4, lr=1e-3, passages=[6, 4], windows_per_document=2)


def weights_of(embedder):
    return {name: tensor.clone() for name, tensor in embedder.state_dict().items()}


def test_finetune_over_passages(tmp_path):
    data = long_dataset()
    embedder = make_embedder(tmp_path / "base")
    base = evaluate(embedder, data, passages=PASSAGES)
    out = tmp_path / "run"
    finetune(embedder, data, CONFIG, validation=data, out=out)
    assert read_json(out / "config.json")["passages"] == [6, 4]
    measured = [x["metrics"]["map@100"] for _, x in read_jsonl(out / "train.jsonl") if "metrics" in x]
    assert measured[0] == base.metrics["map@100"]
    assert evaluate(embedder, data, passages=PASSAGES).metrics["map@100"] in measured
    assert evaluate(embedder, data).setting != base.setting
    # A query's own window is in each step that has the query: 12 queries of 6 tokens, documents of at most 12 tokens.
    assert all(x["tokens"] <= 4 * 6 + 4 * 12 for _, x in read_jsonl(out / "train.jsonl") if "tokens" in x)


@pytest.mark.parametrize("several", [False, True])
def test_resumed_bit_for_bit(tmp_path, monkeypatch, several):
    data = {name: long_dataset(3) for name in ("one", "two")} if several else long_dataset()
    whole = make_embedder(tmp_path / "base")
    finetune(whole, data, CONFIG, out=tmp_path / "whole")

    made, real = [], finetuning.train

    def train(embedder, batches, loss, config, **options):
        calls = iter(range(100))

        def stopped(Q, D, targets):
            if next(calls) == 4 and not made:
                made.append(True)
                raise KeyboardInterrupt
            return loss(Q, D, targets)

        assert batches.collate.best_windows.keys() == batches.collate.dataset.queries.keys()
        return real(embedder, batches, stopped, config, **options)

    monkeypatch.setattr(finetuning, "train", train)
    with pytest.raises(KeyboardInterrupt):
        finetune(make_embedder(tmp_path / "base"), data, CONFIG, out=tmp_path / "run")
    resumed = make_embedder(tmp_path / "base")
    finetune(resumed, data, CONFIG, out=tmp_path / "run", existing="resume")
    found, expected = weights_of(resumed), weights_of(whole)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


REFRESHED = replace(CONFIG, epochs=3, lr=1e-2, refresh_windows=True, checkpoint_every=2)  # 3 batches per epoch


def vague_dataset(num_documents: int = 6) -> RetrievalDataset:
    """As `long_dataset`, but what the queries say is in no window: which is best depends on the weights."""
    data, generator = long_dataset(num_documents), np.random.default_rng(1)
    queries = {query_id: " ".join(generator.choice(list("0123456789"), 4)) for query_id in data.queries}
    return replace(data, queries=queries)


def spied(monkeypatch):
    """What every search for the best windows found, and by which weights."""
    found, real = [], inputs.best_windows

    def search(embedder, batches):
        found.append((real(embedder, batches), weights_of(embedder)))
        return found[-1][0]

    monkeypatch.setattr(inputs, "best_windows", search)
    return found


def test_best_windows_follow_the_model(tmp_path, monkeypatch):
    """Before each of three epochs those of the model as it is then, by a naive search; off, those of the base."""
    data = vague_dataset()
    pairs = [(query_id, document_id) for query_id, by in data.qrels.items() for document_id in by]
    found = spied(monkeypatch)
    finetune(make_embedder(tmp_path / "base"), data, REFRESHED, out=tmp_path / "run")
    assert len(found) == 3
    other = make_embedder(tmp_path / "base")
    for windows, weights in found:
        other.load_state_dict(weights)
        assert windows == naive_best(other, data, pairs)
    assert found[0][0] != found[1][0] != found[2][0]
    steps = [x for _, x in read_jsonl(tmp_path / "run" / "train.jsonl")]
    assert [x["step"] for x in steps if "refresh_seconds" in x] == [4, 7]
    found.clear()
    finetune(make_embedder(tmp_path / "base"), data, replace(REFRESHED, refresh_windows=False))
    assert len(found) == 1


@pytest.mark.parametrize("several", [False, True])
def test_a_batch_takes_the_windows_of_the_last_refresh(tmp_path, monkeypatch, several):
    """With one window per document, the tokens and loss of the second epoch equal those of a hand-written loop."""
    data = {name: vague_dataset(3) for name in ("one", "two")} if several else vague_dataset()
    config, taken, real = replace(REFRESHED, windows_per_document=1), [], finetuning.train
    found = spied(monkeypatch)

    epoch = Batches.epoch

    def kept(batches, number, *, start=0):
        for batch in epoch(batches, number, start=start):
            taken.append((number, batch))
            yield batch

    def train(*arguments, **options):
        monkeypatch.setattr(Batches, "epoch", kept)
        return real(*arguments, **options)

    monkeypatch.setattr(finetuning, "train", train)
    embedder = make_embedder(tmp_path / "base")
    finetune(embedder, data, config)
    assert [number for number, _ in taken] == sorted([0, 1, 2] * (len(taken) // 3))
    texts = data["one"].corpus if several else data.corpus
    for number, batch in taken:
        windows = texts_of(embedder, batch.documents)
        for document_id, window in zip(batch.document_ids, windows, strict=True):
            words = texts[document_id.rpartition("/")[2]].split()
            asking = [q for q in batch.query_ids if document_id in found[number][0].get(q, {})]
            first = found[number][0][asking[0]][document_id]
            assert window == " ".join(words[4 * first : 4 * first + 4])


@pytest.mark.parametrize("call", [6, 9])
@pytest.mark.parametrize("several", [False, True])
def test_resumed_with_refreshed_windows(tmp_path, monkeypatch, several, call):
    """Stopped in a step of the second epoch or the third; the checkpoints are behind every second step."""
    data = {name: vague_dataset(3) for name in ("one", "two")} if several else vague_dataset()
    whole = make_embedder(tmp_path / "base")
    finetune(whole, data, REFRESHED, out=tmp_path / "whole")
    real = finetuning.train

    def train(embedder, batches, loss, config, **options):
        calls = iter(range(1, 100))

        def stopped(*arguments):
            if next(calls) == call:
                raise KeyboardInterrupt
            return loss(*arguments)

        return real(embedder, batches, stopped, config, **options)

    with monkeypatch.context() as patch:
        patch.setattr(finetuning, "train", train)
        with pytest.raises(KeyboardInterrupt):
            finetune(make_embedder(tmp_path / "base"), data, REFRESHED, out=tmp_path / "run")
    resumed = make_embedder(tmp_path / "base")
    finetune(resumed, data, REFRESHED, out=tmp_path / "run", existing="resume")
    found, expected = weights_of(resumed), weights_of(whole)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    logs = [[x["loss"] for _, x in read_jsonl(tmp_path / name / "train.jsonl")] for name in ("whole", "run")]
    assert logs[0] == logs[1]


def finetuned_windows(folder):
    """The losses of a run with refreshed windows, in float64 and without dropout; how often this rank searched."""
    embedder = make_embedder(folder / "base", dropout=0.0, dtype=torch.float64)
    searches, real = [], inputs.best_windows
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inputs, "best_windows", lambda *arguments: searches.append(1) or real(*arguments))
        state_before = weights_of(embedder)
        finetune(embedder, vague_dataset(), REFRESHED)
    assert any(not torch.equal(tensor, state_before[name]) for name, tensor in embedder.state_dict().items())
    return weights_of(embedder), len(searches)


def test_two_ranks_refresh_as_one(tmp_path):
    make_embedder(tmp_path / "base", dropout=0.0)
    expected, searches = finetuned_windows(tmp_path)
    assert searches == 3
    results = run_ranks(2, finetuned_windows, tmp_path, folder=tmp_path)
    assert [searches for _, searches in results] == [3, 0]  # rank 0 finds for all
    for weights, _ in results:
        for name, tensor in expected.items():
            torch.testing.assert_close(weights[name], tensor, rtol=0, atol=1e-8)


@pytest.mark.parametrize(
    ("options", "facts"),
    [
        ({"refresh_windows": True}, ("refresh_windows", True, "no", "passages")),
        ({"passages": [6]}, ("passages", [6], "[size, stride]", "whole")),
        ({"passages": [6, 2.5]}, ("passages", [6, 2.5], "int", "null")),
        ({"passages": [6, True]}, ("passages", [6, True], "int", "null")),
        ({"windows_per_document": 0}, ("windows_per_document", 0, 1)),
        (
            {"passages": [6, 4], "references": {"guide": None}, "loss": {"name": "guided_in_batch_negatives"}},
            ("references", "passages"),
        ),
    ],
)
def test_settings_are_checked_when_made(options, facts):
    with pytest.raises(ValueError, match=naming(*facts)):
        FinetuneConfig(**options)


def test_what_cannot_be_cut_is_found_before_training(tmp_path):
    embedder = make_embedder(tmp_path / "base")
    for passages, facts in (
        ([49, 4], ("passages", 49, 3, 48)),
        ([6, 7], ("passages", 7, 1, 6)),
    ):
        config = FinetuneConfig(epochs=1, batch_size=4, passages=passages)
        with pytest.raises(ValueError, match=naming(*facts)):
            finetune(embedder, long_dataset(), config, out=tmp_path / "run")
    with pytest.raises(ValueError, match=naming("references", "passages")):
        finetune(embedder, long_dataset(), CONFIG, references={"guide": embedder}, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
