"""README's tutorial, as written: a loss added to a copy of the project is tested and trains from the command line."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import make_dataset, make_embedder

CHECKOUT = Path(__file__).resolve().parents[1]


@pytest.fixture
def copy(tmp_path):
    """The package and its tests, without what running them left."""
    for name in ("embedft", "tests"):
        shutil.copytree(CHECKOUT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def run(command: list[str], folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_adding_a_loss(copy):
    section = (CHECKOUT / "README.md").read_text(encoding="utf-8").partition("## Add a loss\n")[2].partition("\n## ")[0]
    blocks = re.findall(r"```(\w+)\n(.*?)```", section, flags=re.DOTALL)
    assert [language for language, _ in blocks] == ["python", "python", "sh"]
    (function, registration, commands) = (text for _, text in blocks)
    assert function.count("\n") + registration.count("\n") < 15

    contrastive, registry = (copy / "embedft" / "losses" / name for name in ("contrastive.py", "registry.py"))
    contrastive.write_text(f"{contrastive.read_text()}\n\n{function}")
    name = registration.partition(": ")[2].strip(",\n")
    text = registry.read_text()
    for before, added in (("in_batch_negatives, ", f"{name}, "), ('    "in_batch_negatives": in_batch', registration)):
        assert text.count(before) == 1
        text = text.replace(before, added + before)
    registry.write_text(text)

    test, finetune = (shlex.split(command) for command in commands.replace("\\\n", " ").splitlines())
    assert test[:3] == ["python", "-m", "pytest"]
    output = run([sys.executable, *test[1:], "-q", "-p", "no:cacheprovider"], copy)
    assert re.search(r"(\d+) passed", output)
    assert int(re.search(r"(\d+) passed", output)[1]) > 20

    make_embedder(copy / "model")
    make_dataset().save(copy / "train.jsonl")
    places = {"sentence-transformers/all-MiniLM-L6-v2": "model", "train.csv": "train.jsonl"}
    arguments = [places.get(argument, argument) for argument in finetune[1:]]
    assert finetune[0] == "embedft"
    assert set(places.values()) <= set(arguments)
    output = run([sys.executable, "-m", "embedft", *arguments, "--epochs", "1", "--device", "cpu"], copy)
    assert re.fullmatch(r"\d+ steps, loss .* -> .*\nmodel: runs/hardest/model\n", output)
    assert '"margin": 0.1' in (copy / "runs" / "hardest" / "config.json").read_text()
