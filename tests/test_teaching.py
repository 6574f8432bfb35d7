"""finetune with a teacher, or on bare texts, from settings to trained weights; by the command line, too."""

import json
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from api_server import ApiServer, input_of
from naming import names, naming
from ranks import run_ranks
from tiny import MEASURED, make_dataset, make_embedder

from embedft import FinetuneConfig, RetrievalDataset, Teacher, finetune, load_teacher, new_scorer, teach
from embedft.cli import main
from embedft.data.batches import list_examples, make_batches
from embedft.files import locked
from embedft.recipe import inputs
from embedft.retrieval.teacher import Vectors
from embedft.training import run_folder

KL = {"name": "listwise_kl", "similarity": "cosine"}


def config(**changes) -> FinetuneConfig:
    teacher = {"models": "bm25", "depth": 4} | changes.pop("teacher", {})
    plain = {"epochs": 1, "batch_size": 4, "loss": KL, "num_negatives": 3, "examples": "lists", "target_scores": True}
    return FinetuneConfig(**plain | changes, teacher=teacher)


def log_of(out) -> list[dict]:
    records = map(json.loads, (out / "train.jsonl").read_text().splitlines())
    return [{key: value for key, value in record.items() if key not in MEASURED} for record in records]


def weights_of(embedder) -> dict[str, torch.Tensor]:
    return {name: x.clone() for name, x in embedder.state_dict().items()}


def same(first: dict, second: dict) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


def test_as_with_a_dataset_that_was_taught(tmp_path):
    """The setting does what `teach` does by hand."""
    taught, counts = teach(load_teacher("bm25"), make_embedder(tmp_path / "base"), make_dataset(), depth=4)
    plain = replace(config(), teacher={})
    by_hand = finetune(make_embedder(tmp_path / "base"), taught, plain)
    found = finetune(make_embedder(tmp_path / "base"), make_dataset(), config(), out=tmp_path / "run")
    assert same(weights_of(by_hand), weights_of(found))
    assert not same(weights_of(found), weights_of(make_embedder(tmp_path / "base")))
    assert log_of(tmp_path / "run")[0] == {"step": -1, "teacher": counts}
    hashes = json.loads((tmp_path / "run" / "environment.json").read_text())["sha256"]
    assert (hashes["train"], hashes["taught"]) == (make_dataset().sha256(), taught.sha256())
    assert len(list((tmp_path / "run" / "lists").glob("*.jsonl"))) == 1


def test_every_kind_of_teacher_together(tmp_path):
    make_embedder(tmp_path / "other", max_length=6)
    new_scorer(make_embedder(tmp_path / "other")).save(tmp_path / "scorer")
    models = {"bm25": 0.5, str(tmp_path / "other"): 0.3, str(tmp_path / "scorer"): 0.2}
    teacher = {"models": models, "passages": [6, 3, 4, 2]}
    embedder = make_embedder(tmp_path / "base", store=tmp_path / "store")
    finetune(embedder, make_dataset(), config(teacher=teacher, passages=[4, 2]), out=tmp_path / "run")
    assert not (tmp_path / "run" / "lists").exists()
    (path,) = (tmp_path / "store" / "lists").glob("*.jsonl")
    made_from = json.loads(path.read_text().partition("\n")[0])["made_from"]
    teacher = load_teacher(models, passages=(6, 3, 4, 2), device="cpu")
    assert {name: part["sha256"] for name, part in made_from["teacher"].items()} == teacher.sha256()
    assert made_from["student"] == Vectors(make_embedder(tmp_path / "base"), (4, 2)).sha256()


def test_embedft_store_counts_and_prunes_lists(tmp_path, capsys):
    """Those that are read again count as used."""
    embedder, store = make_embedder(tmp_path / "base", store=tmp_path / "store"), str(tmp_path / "store")
    for depth in (3, 4):
        finetune(embedder, make_dataset(), config(teacher={"ranking": "teacher", "depth": depth}))
    files = sorted((tmp_path / "store" / "lists").glob("*.jsonl"))
    assert len(files) == 2
    for path in files:
        os.utime(path, (time.time() - 3 * 86_400,) * 2)
    finetune(embedder, make_dataset(), config(teacher={"ranking": "teacher"}))
    (unused,) = [path for path in files if path.stat().st_mtime < time.time() - 86_400]
    assert main(["store", store]) == 0
    assert names(capsys.readouterr().out, 2, "lists")
    assert main(["store", store, "--prune-unused", "4"]) == 0
    assert "lists" not in capsys.readouterr().out
    with locked(unused.with_suffix(".lock")):
        assert main(["store", store, "--prune-unused", "2"]) == 2
    assert names(capsys.readouterr().err, unused.with_suffix(".lock").name)
    assert main(["store", store, "--prune-unused", "2"]) == 0
    assert names(capsys.readouterr().out, 1, "lists")
    assert [path for path in files if path.exists()] == [path for path in files if path != unused]


def test_vectors_of_an_api_are_paid_for_once(tmp_path, monkeypatch):
    """Killed when they are there, but before anything is scored; without a store, they are kept with the lists."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    dataset, how = make_dataset(), config(teacher={"models": "openai:m", "api": {"price": 1.0, "max_cost": 1.0}})
    with ApiServer() as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.base_url)
        with monkeypatch.context() as patch:
            patch.setattr(Teacher, "_weighted", interrupted)
            with pytest.raises(KeyboardInterrupt):
                finetune(make_embedder(tmp_path / "base"), dataset, how, out=tmp_path / "run")
        finetune(make_embedder(tmp_path / "base"), dataset, how, out=tmp_path / "run")
        asked = [text for _, _, body in server.log for text in input_of(body)]
    assert sorted(asked) == sorted(set(asked))
    assert {*dataset.queries.values()} <= {*asked} <= {*dataset.queries.values(), *dataset.corpus.values()}
    assert "sk-secret" not in (tmp_path / "run" / "config.json").read_text()


def test_seeds_share_the_lists_of_a_store(tmp_path, monkeypatch):
    asked, load = [], inputs.load_teacher
    monkeypatch.setattr(inputs, "load_teacher", lambda *given, **how: spying(load(*given, **how), asked))
    for seed in (0, 1):
        embedder = make_embedder(tmp_path / "base", store=tmp_path / "store")
        finetune(embedder, make_dataset(), config(seed=seed), out=tmp_path / f"run{seed}")
    assert len(asked) == 1


def spying(teacher, asked: list):
    part = teacher.parts["bm25"]
    scoring = part.scoring
    object.__setattr__(part, "scoring", lambda *given: asked.append(given) or scoring(*given))  # it is frozen
    return teacher


def test_questions_without_answers_teach(tmp_path):
    dataset = replace(make_dataset(), qrels={})
    found = finetune(make_embedder(tmp_path / "base"), dataset, config())
    assert not same(weights_of(found), weights_of(make_embedder(tmp_path / "base")))
    assert list_examples(make_dataset(), "lists") == list_examples(make_dataset(), "queries")
    taught, _ = teach(load_teacher("bm25"), make_embedder(tmp_path / "base"), dataset, depth=4)
    how = {"examples": "lists", "target_scores": True, "num_negatives": 3, "batch_size": 12, "seed": 0}
    (batch,) = make_batches(taught, make_embedder(tmp_path / "base").pack, **how).epoch(0)
    assert not batch.targets.listed_positive.any()
    listed = [[batch.document_ids[j] for j in row if j >= 0] for row in batch.targets.group.tolist()]
    assert listed == [taught.negatives[query_id][:3] for query_id in batch.query_ids]
    expected = [[taught.scores[q][i] for i in row] for q, row in zip(batch.query_ids, listed, strict=True)]
    torch.testing.assert_close(batch.targets.target_scores[:, :3], torch.tensor(expected))


def test_relabelled_documents_are_trained_on(tmp_path):
    """A teacher for whom all is an answer, and a student too: the margin is larger than any cosine's difference."""
    teacher = {"relabel": 100.0, "depth": 3}
    changes = {"examples": "pairs", "target_scores": False, "loss": {"name": "in_batch_negatives"}, "num_negatives": 0}
    found = config(teacher=teacher, mine_absolute_margin=2.5, **changes)
    finetune(make_embedder(tmp_path / "base"), make_dataset(), found, out=tmp_path / "run")
    first, *rest = log_of(tmp_path / "run")
    new = first["teacher"]["relabelled"]
    assert 24 <= new <= 36
    assert first["teacher"]["scored"] == 12 + new
    assert first["teacher"]["dropped"] == 0
    assert len([record for record in rest if "loss" in record]) == -(-(12 + new) // 4)


def test_relabelled_documents_are_never_mined(tmp_path):
    """Each epoch mines anew, and what is relabelled is an answer to it."""
    teacher = {"relabel": 100.0, "depth": 3}
    changes = {"examples": "queries", "target_scores": False, "loss": {"name": "in_batch_negatives"}}
    how = config(teacher=teacher, mine_absolute_margin=0.0, mine_every=1, mine_ranks=[1, 9], epochs=2, **changes)
    finetune(make_embedder(tmp_path / "base"), make_dataset(), how, out=tmp_path / "run")
    assert log_of(tmp_path / "run")[0]["teacher"]["relabelled"] > 0


def test_several_datasets(tmp_path):
    datasets = {"one": make_dataset(), "two": make_dataset(seed=1)}
    finetune(make_embedder(tmp_path / "base"), datasets, config(), out=tmp_path / "run")
    assert len(list((tmp_path / "run" / "lists").glob("*.jsonl"))) == 2
    assert log_of(tmp_path / "run")[0]["teacher"]["scored"] == sum(
        teach(load_teacher("bm25"), make_embedder(tmp_path / "base"), data, depth=4)[1]["scored"]
        for data in datasets.values()
    )


def teach_on_ranks(base: Path):
    asked, load = [], inputs.load_teacher
    embedder = make_embedder(base, dropout=0.0, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inputs, "load_teacher", lambda *given, **how: spying(load(*given, **how), asked))
        finetune(embedder, make_dataset(), config())
    return weights_of(embedder), len(asked)


@pytest.mark.slow
def test_rank_0_asks_for_all(tmp_path):
    make_embedder(tmp_path / "base", dropout=0.0)
    one, asked = teach_on_ranks(tmp_path / "base")
    assert asked == 1
    results = run_ranks(2, teach_on_ranks, tmp_path / "base", folder=tmp_path)
    assert [asked for _, asked in results] == [1, 0]
    for weights, _ in results:
        torch.testing.assert_close(weights, one, rtol=0, atol=1e-8)


def test_a_killed_run_keeps_its_lists(tmp_path, monkeypatch):
    """Killed before the first step: the folder has only lists, which the next run takes."""
    with monkeypatch.context() as patch:
        patch.setattr("embedft.recipe.finetune.batches_of", interrupted)
        with pytest.raises(KeyboardInterrupt):
            finetune(make_embedder(tmp_path / "base"), make_dataset(), config(), out=tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["lists"]
    asked, load = [], inputs.load_teacher
    monkeypatch.setattr(inputs, "load_teacher", lambda *given, **how: spying(load(*given, **how), asked))
    finetune(make_embedder(tmp_path / "base"), make_dataset(), config(), out=tmp_path / "run")
    assert asked == []


def interrupted(*_, **__):
    raise KeyboardInterrupt


def test_resumed_is_uninterrupted(tmp_path, monkeypatch):
    whole = finetune(make_embedder(tmp_path / "base"), make_dataset(), config(epochs=2), out=tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr("embedft.recipe.finetune.train", interrupted)
        with pytest.raises(KeyboardInterrupt):
            finetune(make_embedder(tmp_path / "base"), make_dataset(), config(epochs=2), out=tmp_path / "run")
    how = {"out": tmp_path / "run", "existing": "resume"}
    changed = config(epochs=2, teacher={"depth": 5})
    with pytest.raises(ValueError, match=naming("teacher", 4, 5)):
        finetune(make_embedder(tmp_path / "base"), make_dataset(), changed, **how)
    resumed = finetune(make_embedder(tmp_path / "base"), make_dataset(), config(epochs=2), **how)
    assert same(weights_of(whole), weights_of(resumed))
    assert log_of(tmp_path / "run") == log_of(tmp_path / "whole")


def test_another_teacher_under_the_same_name_is_not_resumed(tmp_path, monkeypatch):
    teacher = {"models": str(tmp_path / "teacher")}
    make_embedder(tmp_path / "teacher")
    with monkeypatch.context() as patch:
        patch.setattr("embedft.recipe.finetune.train", interrupted)
        with pytest.raises(KeyboardInterrupt):
            finetune(make_embedder(tmp_path / "base"), make_dataset(), config(teacher=teacher), out=tmp_path / "run")
    other = make_embedder(tmp_path / "teacher")
    with torch.no_grad():
        weight = other.encoder.embeddings.token.weight
        weight.copy_(weight.flip(0))
    shutil.rmtree(tmp_path / "teacher")
    other.save(tmp_path / "teacher")
    how = {"out": tmp_path / "run", "existing": "resume"}
    with pytest.raises(ValueError, match=naming("taught")):
        finetune(make_embedder(tmp_path / "base"), make_dataset(), config(teacher=teacher), **how)


@pytest.mark.parametrize(
    ("changes", "facts"),
    [
        ({"num_negatives": 0}, ("num_negatives", 0)),
        ({"mine_every": 1}, ("mine_every", 1)),
        ({"mine_every": 1, "target_scores": False, "examples": "pairs"}, ("mine_every", 1, "relabel")),
        ({"target_scores": False}, ("teacher", "bm25", "target_scores", "relabel", "ranking")),
        ({"mine_relative_margin": 0.1}, ("mine_relative_margin", 0.1)),
        ({"teacher": {"relabel": 0.1}, "mine_ranks": [1, 5]}, ("mine_ranks",)),
        ({"teacher": {"models": ""}}, ("teacher", "models")),
        ({"teacher": {"models": 3}}, ("teacher", "models", 3)),
        ({"teacher": {"model": "bm25"}}, ("teacher", "model", "models")),
        ({"teacher": {"api": {"base_url": "http://key@host"}}}, ("api", "base_url", "OPENAI_BASE_URL")),
        ({"teacher": {"depth": -1}}, ("depth", -1, 0)),
        ({"teacher": {"ranking": "both"}}, ("ranking", "student", "teacher")),
        ({"teacher": {"passages": [4]}}, ("passages", 4)),
        ({"teacher": {"passages": [6, 3, 6, 2]}}, ("passages", [6, 3, 6, 2], 6, "twice")),
        ({"passages": [6, 3, 4, 2]}, ("passages", [6, 3, 4, 2], "training", "one")),
        ({"teacher": {"scale": "softmax"}}, ("scale", "zscore", "raw")),
    ],
)
def test_settings_are_checked_when_made(changes, facts):
    with pytest.raises(ValueError, match=naming(*facts)):
        config(**changes)


@pytest.mark.parametrize(
    ("teacher", "facts"),
    [
        ({"models": "./none"}, ("./none",)),
        ({"models": {"bm25": 0}}, ("bm25", 0)),
        ({"api": {"price": 1}}, ("api", "openai:")),
        ({"models": "openai:m", "api": {"prices": 1}}, ("api", "prices")),
        ({"depth": 0}, ("depth",)),
        ({"bm25": {"ngram": 0}}, ("bm25", "ngram", 0, 1)),
    ],
)
def test_what_cannot_teach_leaves_nothing(tmp_path, teacher, facts):
    dataset = replace(make_dataset(), qrels={}) if "depth" in teacher else make_dataset()
    with pytest.raises(ValueError, match=naming(*facts)):
        finetune(make_embedder(tmp_path / "base"), dataset, config(teacher=teacher), out=tmp_path / "run")
    assert not (tmp_path / "run" / run_folder.CONFIG).exists()


def test_what_cannot_teach_is_named(tmp_path):
    datasets = {"one": make_dataset(), "two": replace(make_dataset(seed=1), qrels={})}
    with pytest.raises(ValueError, match=naming("two", "depth")):
        finetune(make_embedder(tmp_path / "base"), datasets, config(teacher={"depth": 0}))


def test_vectors_of_references_are_kept(tmp_path):
    make_embedder(tmp_path / "other", max_length=6)
    embedder, dataset = make_embedder(tmp_path / "base", store=tmp_path / "store"), make_dataset()
    how = FinetuneConfig(
        epochs=1, loss={"name": "embedding_distillation"}, references={"teacher": str(tmp_path / "other")}
    )
    finetune(embedder, dataset, how)
    other = make_embedder(tmp_path / "other", store=tmp_path / "store")
    other.encode([*dataset.queries.values()], role="query")
    other.encode([*dataset.texts.values()], role="document")
    assert (other.store.hits, other.store.misses) == (21, 0)


def test_every_use_of_a_teacher_is_allowed():
    quiet = {"target_scores": False, "examples": "pairs"}
    for use in ({"relabel": 0.0}, {"ranking": "teacher"}):
        config(teacher=use, **quiet)
    config(teacher={"relabel": 0.0}, mine_every=1, **quiet)
    config(examples="scored", target_scores=False)


# Bare texts.


def test_texts_are_taken_in_turn():
    dataset = make_dataset(5, 3)
    expected = [("q0", "d0"), ("q1", "d1"), ("q2", "d2"), ("q3", "d0"), ("q4", "d1")]
    assert list_examples(replace(dataset, qrels={}), "texts") == expected
    assert list_examples(make_dataset(1, 2), "texts") == [("q0", "d0"), ("q0", "d1")]


def test_nothing_is_said_about_bare_texts(tmp_path):
    dataset = make_dataset(5, 3)
    dataset = replace(dataset, qrels={"q0": {"d0": 2, "d2": 1}})
    pack = make_embedder(tmp_path / "base").pack
    (batch,) = make_batches(dataset, pack, batch_size=5, seed=0, examples="texts").epoch(0)
    positives = batch.targets.listed_positive.any(dim=1).tolist()
    assert dict(zip(batch.query_ids, positives, strict=True)) == {f"q{i}": i == 0 for i in range(5)}


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EMBEDFT_PROGRESS", "0")
    monkeypatch.setattr("embedft.encoders.loading.default_device", lambda: torch.device("cpu"))
    make_embedder(tmp_path / "model", dropout=0.0)
    with torch.no_grad():
        other = make_embedder(tmp_path / "model", dropout=0.0)
        for weight in other.parameters():
            weight.mul_(1.2)
        other.save("teacher")
    return tmp_path


COMMAND = ["--epochs", "4", "--batch-size", "4", "--lr", "1e-3", "--out", "run"]
LEAF = ["--examples", "texts", "--loss.name", "embedding_distillation", "--references.teacher", "teacher"]


@pytest.mark.parametrize("form", ["lines.txt", "chunks.jsonl", "pairs.json"])
def test_texts_toward_a_teacher(place, form):
    texts = list(make_dataset().corpus.values())
    if form == "lines.txt":
        (place / form).write_text("\n".join([*texts, texts[0]]) + "\n")
    elif form == "chunks.jsonl":
        rows = [{"id": str(i), "text": text} for i, text in enumerate(texts)]
        (place / form).write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        RetrievalDataset(dict(enumerate_ids(texts)), dict(enumerate_ids(texts)), {}).save(place / form)
    assert main(["finetune", "model", form, *COMMAND, *LEAF]) == 0
    losses = [record["loss"] for record in log_of(place / "run") if "loss" in record]
    assert losses[-1] < losses[0]
    assert len(losses) == 4 * 3


def enumerate_ids(texts: list[str]):
    return ((str(i), text) for i, text in enumerate(texts))


def test_an_empty_line_is_named_or_dropped(place, capsys):
    (place / "lines.txt").write_text("one\n\ntwo\n")
    assert main(["finetune", "model", "lines.txt", *COMMAND, *LEAF]) == 2
    assert names(capsys.readouterr().err, "lines.txt", "line 2")
    assert main(["finetune", "model", "lines.txt", "--skip-empty", *COMMAND, *LEAF]) == 0
    (place / "none.txt").write_text("")
    assert main(["finetune", "model", "none.txt", *COMMAND[:-1], "other", *LEAF]) == 2
    assert names(capsys.readouterr().err, "none.txt", "texts")


def test_texts_are_one_dataset(place, capsys):
    for name in ("a.txt", "b.txt"):
        (place / name).write_text("one\ntwo\n")
    assert main(["finetune", "model", "a.txt", "b.txt", *COMMAND, *LEAF]) == 2
    assert names(capsys.readouterr().err, "texts", 2)


def test_a_teacher_from_the_command_line(place, capsys):
    make_dataset().save("pairs.json")
    teacher = ["--teacher.models", '{"bm25": 1, "teacher": 0.5}', "--teacher.depth", "4", "--num-negatives", "3"]
    teacher += ["--teacher.ranking", "teacher"]
    loss = ["--target-scores", "--loss.name", "listwise_kl", "--examples", "lists"]
    assert main(["finetune", "model", "pairs.json", *COMMAND, *teacher, *loss, "--store", "store"]) == 0
    (path,) = (place / "store" / "lists").glob("*.jsonl")
    assert json.loads(path.read_text().partition("\n")[0])["made_from"]["ranking"] == "teacher"
    assert json.loads((place / "run" / "config.json").read_text())["teacher"]["models"] == {"bm25": 1, "teacher": 0.5}
    assert main(["finetune", "model", "pairs.json", "--overwrite", *COMMAND, *teacher[2:], *loss]) == 2
    assert names(capsys.readouterr().err, "teacher", "models")
