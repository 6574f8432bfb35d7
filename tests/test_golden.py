"""Losses, embeddings and short training runs against saved figures: a change in any digit shows at once.

tests/golden/generate.py writes them. A change that is meant to move them reruns it and says why.
"""

import json
from pathlib import Path

import pytest
from golden import generate

GOLDEN = Path(__file__).resolve().parent / "golden"


def on_file(name: str):
    return json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))


def test_losses():
    found, golden = generate.losses(), on_file("losses")
    assert found.keys() == golden.keys(), "run tests/golden/generate.py for a new loss"
    for name, figures in golden.items():
        assert found[name] == pytest.approx(figures, rel=1e-10, abs=1e-14), name


def test_embeddings(tmp_path):
    found, golden = generate.embeddings(tmp_path / "tiny"), on_file("embeddings")
    for row, figures in zip(found, golden, strict=True):
        assert row == pytest.approx(figures, abs=1e-6)


def test_trainings(tmp_path):
    found, golden = generate.trainings(tmp_path), on_file("trainings")
    assert found.keys() == golden.keys()
    for name, losses in golden.items():
        assert found[name] == pytest.approx(losses, rel=1e-5), name
