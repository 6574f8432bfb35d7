"""experiments/repro_adapter_lyft_uber.py: how settings are chosen, by hand; the table of a small run."""

import argparse
from types import SimpleNamespace

import numpy as np
import pytest
from tiny import make_dataset, make_embedder

from embedft import Adapter, RetrievalDataset, evaluate
from embedft.encoders.maps import build_map
from experiments import repro_adapter_lyft_uber as experiment


def small_vectors() -> experiment.Vectors:
    dataset = make_dataset(12, 8)
    generator = np.random.default_rng(0)
    queries_QD, documents_ND = (
        generator.standard_normal((count, 4)).astype(np.float32) for count in (len(dataset.queries), 8)
    )
    return experiment.Vectors(dataset, queries_QD, documents_ND)


def test_quality_by_hand():
    assert experiment.quality({"hit_rate@5": 0.8, "mrr@10": 0.5, "mrr@5": 0.1}) == pytest.approx(0.65)


def test_the_setting_with_the_best_mean_over_draws_is_chosen(monkeypatch):
    """Two steps an epoch, validated after each. With a bias and pull 10 the second epoch has 0.6 over both draws, the
    third 0.55, though the first draw has 0.7 there; steps between epochs have more and do not count.
    """
    monkeypatch.setattr(experiment, "DRAWS", range(2))
    monkeypatch.setattr(experiment, "TEMPERATURES", (0.05,))
    monkeypatch.setattr(experiment, "PULLS", (3.0, 10.0))
    monkeypatch.setattr(experiment, "FULL_CORPUS", experiment.AdapterConfig(epochs=3, eval_every=1, batch_size=6))
    best = {0: [0.1, 0.9, 0.2, 0.9, 0.6, 0.9, 0.7], 1: [0.1, 0.9, 0.2, 0.9, 0.6, 0.9, 0.4]}

    def fit(vectors, config):
        assert config.held_out == experiment.SHARE
        values = best[config.seed] if config.bias and config.toward_identity == 10 else [0.1, 0.8] * 3 + [0.5]
        records = [{"metrics": {"hit_rate@5": value, "mrr@10": value}} for value in values]
        return SimpleNamespace(history=[{"loss": 1.0}, *records])

    monkeypatch.setattr(experiment, "fit", fit)
    found = experiment.choose_full_corpus(small_vectors())
    assert (found.bias, found.temperature, found.toward_identity, found.epochs) == (True, 0.05, 10.0, 2)
    assert found.held_out == 0  # the fit that is measured has all questions
    assert experiment.describe(found) == "a bias, temperature 0.05, pull 10, 2 epochs"


def test_the_strength_is_chosen_on_documents_that_do_not_train(monkeypatch):
    vectors, asked = small_vectors(), []

    def ridge(queries_PD, documents_PD, *, strength):
        asked.append(len(queries_PD))
        return strength

    def measure(held_out, adapter):
        assert len(held_out.dataset.corpus) == 8  # against all documents
        assert len(held_out.queries_QD) == len(held_out.dataset.queries) < 12
        value = {1.0: 0.2, 10.0: 0.4, 100.0: 0.9, 1000.0: 0.3}[adapter]
        return SimpleNamespace(metrics={"hit_rate@5": value, "mrr@10": value})

    monkeypatch.setattr(experiment, "ridge", ridge)
    monkeypatch.setattr(experiment, "measure", measure)
    assert experiment.choose_strength(vectors) == 100.0
    num_pairs = sum(map(len, vectors.dataset.qrels.values()))
    assert all(0 < count < num_pairs for count in asked)


def test_stored_vectors_are_those_of_the_texts_and_queries_go_through_the_adapter():
    vectors = small_vectors()
    adapter = Adapter(query=build_map("linear", 4, bias=False))
    with_adapter, without = experiment.Stored(vectors, adapter), experiment.Stored(vectors)
    texts = list(vectors.dataset.queries.values())
    chosen = [texts[3], texts[0]]
    np.testing.assert_array_equal(without.encode(chosen, role="query", dim=None), vectors.queries_QD[[3, 0]])
    unit = vectors.queries_QD / np.linalg.norm(vectors.queries_QD, axis=1, keepdims=True)  # at the identity
    np.testing.assert_allclose(with_adapter.encode(chosen, role="query", dim=None), unit[[3, 0]], atol=1e-6)
    documents = list(vectors.dataset.texts.values())
    found = with_adapter.encode(documents, role="document", dim=None)
    np.testing.assert_array_equal(found, vectors.documents_ND)


def test_a_small_run(tmp_path, monkeypatch, capsys):
    """Base and "fine-tuned" are the same model: their rows agree, and the base's equal those of `evaluate`."""
    embedder = make_embedder(tmp_path / "base")
    dataset = make_dataset(12, 8)
    for name in ("train_dataset.json", "val_dataset.json"):
        dataset.save(tmp_path / name, format="llamaindex")
    monkeypatch.setattr(experiment, "MAX_LENGTH", 48)
    monkeypatch.setattr(experiment, "DRAWS", range(2))
    monkeypatch.setattr(experiment, "TEMPERATURES", (0.05,))
    monkeypatch.setattr(experiment, "PULLS", (3.0,))
    monkeypatch.setattr(experiment, "FULL_CORPUS", experiment.AdapterConfig(epochs=2, eval_every=1, batch_size=6))
    base = str(tmp_path / "base")
    options = argparse.Namespace(data=str(tmp_path), base=base, store=None, seeds=[0, 1], tuned=[base])
    experiment.main(options)
    lines = capsys.readouterr().out.splitlines()
    rows = {(cells[1], cells[2]): cells[3:] for line in lines if (cells := [c.strip() for c in line.split("|")])[1:]}
    report = evaluate(embedder, RetrievalDataset.load(tmp_path / "val_dataset.json"))
    for metric in experiment.METRICS:
        assert rows["base", metric][0] == f"{report.metrics[metric]:.4f}"
        assert rows["fine-tuned", metric][:2] == [rows["base", metric][0], "+0.0000"]
    names = ["in-batch, as published", "full-corpus", "ridge", "procrustes", "fine-tuned", "fine-tuned + full-corpus"]
    assert [name for name, metric in rows if metric == "mrr@5"] == ["base", *names]
    assert "±" in rows["full-corpus", "mrr@10"][0]
    assert any("2 epochs" in line or "1 epochs" in line for line in lines)
