"""embedft/README.md as written: applies each "Add ..." section to a copy of the project and runs its commands. So for
the sections of README.md on cross-encoders and on teachers.

The first line of a python block says where it goes: `# FILE` (a new file, or the end of one), `# FILE, imports`,
`# FILE, in TABLE` (an entry of that dict) or `# FILE, before TABLE`.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import make_dataset, make_embedder

from embedft import load_embedder, new_scorer

CHECKOUT = Path(__file__).resolve().parents[1]
GUIDE = (CHECKOUT / "embedft" / "README.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (Add .+?)\n(.*?)(?=^## |\Z)", GUIDE, flags=re.DOTALL | re.MULTILINE))
README = (CHECKOUT / "README.md").read_text(encoding="utf-8")
MODEL, DATA = "sentence-transformers/all-MiniLM-L6-v2", ("train.csv", "held_out.csv")
SCORER = "cross-encoder/ms-marco-MiniLM-L6-v2"


@pytest.fixture
def copy(tmp_path) -> Path:
    """A clean copy of the project, with a tiny model and data in place of the guide's."""
    ignored = shutil.ignore_patterns("*.egg-info")  # not compiled code, so that no process compiles all of it again
    for name in ("embedft", "experiments", "tests"):
        shutil.copytree(CHECKOUT / name, tmp_path / name, ignore=ignored)
    make_embedder(tmp_path / "model")
    write_data(tmp_path)
    return tmp_path


def write_data(folder: Path, *sizes: int) -> None:
    for name in DATA:
        dataset = make_dataset(*sizes)
        rows = [f"{dataset.queries[q]},{dataset.corpus[d]}" for q, grades in dataset.qrels.items() for d in grades]
        (folder / name).write_text("\n".join(["question,context", *rows]) + "\n", encoding="utf-8")


def apply(block: str, root: Path) -> None:
    """Inserts a python block where its first line says."""
    place, _, code = block.partition("\n")
    match = re.fullmatch(r"# ([\w/.]+\.py)(?:, (imports|in|before) ?(\w*))?", place)
    assert match, place
    path, where, table = root / match[1], match[2], match[3]
    if where is None:
        text = f"{path.read_text()}\n\n{code}" if path.exists() else code
    else:
        pattern = {"imports": r"^(?=from \.)", "in": rf"^{table}\b.*\{{\n", "before": rf"^(?={table}\b.*\{{\n)"}[where]
        text, count = re.subn(pattern, lambda found: found[0] + code, path.read_text(), count=1, flags=re.MULTILINE)
        assert count == 1, place
    path.write_text(text)


def run(line: str, root: Path) -> str:
    """Runs one line of a sh block, with the tiny model and data."""
    program, *arguments = shlex.split(line.replace(MODEL, "model"))
    command = {"python": [sys.executable], "embedft": [sys.executable, "-m", "embedft"]}[program] + arguments
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
    return done.stdout


def test_the_guide_covers_what_people_change():
    words = ("loss", "encoder family", "pooling", "sampler", "metric", "training step", "command", "experiment")
    assert list(SECTIONS) == [f"Add {'an' if word[0] == 'e' else 'a'} {word}" for word in words]


@pytest.mark.parametrize("title", SECTIONS)
def test_example(title, copy):
    follow(SECTIONS[title], copy)


def test_cross_encoders(copy):
    scorer = new_scorer(load_embedder(copy / "model", device="cpu"))
    with torch.no_grad():
        scorer.head.out.weight *= 100  # so that scores spread as those of a trained model
    scorer.save(copy / "scorer")
    write_data(copy, 30, 30)  # because negatives are mined from rank 10 on
    (section,) = re.findall(r"^## Cross-encoders\n(.*?)(?=^## )", README, flags=re.DOTALL | re.MULTILINE)
    assert MODEL in section
    assert SCORER in section
    follow(section.replace(MODEL, "model").replace(SCORER, "scorer"), copy)


@pytest.mark.slow
def test_teachers(copy):
    make_embedder(copy / "teacher")
    (copy / "texts.txt").write_text("".join(f"{text}\n" for text in make_dataset().corpus.values()))
    write_data(copy, 12, 12)
    (section,) = re.findall(r"^## Teachers\n(.*?)(?=^## )", README, flags=re.DOTALL | re.MULTILINE)
    assert section.count(MODEL) == 5
    follow(section.replace(MODEL, "model").replace("sentence-transformers/all-mpnet-base-v2", "teacher"), copy)
    assert len(list((copy / "vectors" / "lists").glob("*.jsonl"))) == 2


@pytest.mark.slow
def test_the_section_on_ablations_works(copy):
    """On fewer values and seeds, so that five processes are enough."""
    write_data(copy, 30, 30)
    (section,) = re.findall(r"^## Run ablations\n(.*?)(?=^## )", README, flags=re.DOTALL | re.MULTILINE)
    blocks = re.findall(r"^```\w+\n(.*?)^```", section, flags=re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.splitlines() if line and line != "# split.py"]
    assert len(lines) < 10
    for many, few in ((" 1e-5 2e-5", " 1e-5"), (" 0.02 0.05 0.1", " 0.02"), (" 0 1 2", " 0 1")):
        assert many in section
        section = section.replace(many, few)
    follow(section, copy)
    assert len(list((copy / "runs" / "temperature" / "cells").glob("*/result.json"))) == 1 + 2 * 2
    assert (copy / "runs" / "temperature" / "report" / "report.html").stat().st_size > 10_000


def follow(section: str, root: Path) -> None:
    """Does what a section says."""
    blocks = re.findall(r"^```(\w+)\n(.*?)^```", section, flags=re.DOTALL | re.MULTILINE)
    assert {language for language, _ in blocks} >= {"python", "sh"}
    for language, text in blocks:
        if language == "python":
            apply(text, root)
    for language, text in blocks:
        if language == "sh":
            for line in text.replace("\\\n", " ").splitlines():
                output = run(line, root)
                if " pytest " in line:
                    assert int(re.search(r"(\d+) passed", output)[1]) > 0
