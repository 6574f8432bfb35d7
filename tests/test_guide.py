"""embedft/README.md as written: applies each "Add ..." section to a copy of the project and runs its commands.

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
from tiny import make_dataset, make_embedder

CHECKOUT = Path(__file__).resolve().parents[1]
GUIDE = (CHECKOUT / "embedft" / "README.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (Add .+?)\n(.*?)(?=^## |\Z)", GUIDE, flags=re.DOTALL | re.MULTILINE))
MODEL, DATA = "sentence-transformers/all-MiniLM-L6-v2", ("train.csv", "held_out.csv")


@pytest.fixture
def copy(tmp_path) -> Path:
    """A clean copy of the project, with a tiny model and data in place of the guide's."""
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("embedft", "experiments", "tests"):
        shutil.copytree(CHECKOUT / name, tmp_path / name, ignore=ignored)
    make_embedder(tmp_path / "model")
    for name in DATA:
        dataset = make_dataset()
        rows = [f"{dataset.queries[q]},{dataset.corpus[d]}" for q, grades in dataset.qrels.items() for d in grades]
        (tmp_path / name).write_text("\n".join(["question,context", *rows]) + "\n", encoding="utf-8")
    return tmp_path


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
    environment = {**os.environ, "PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
    return done.stdout


def test_the_guide_covers_what_people_change():
    words = ("loss", "encoder family", "pooling", "sampler", "metric", "training step", "command", "experiment")
    assert list(SECTIONS) == [f"Add {'an' if word[0] == 'e' else 'a'} {word}" for word in words]


@pytest.mark.parametrize("title", SECTIONS)
def test_example(title, copy):
    blocks = re.findall(r"^```(\w+)\n(.*?)^```", SECTIONS[title], flags=re.DOTALL | re.MULTILINE)
    assert {language for language, _ in blocks} >= {"python", "sh"}
    for language, text in blocks:
        if language == "python":
            apply(text, copy)
    for language, text in blocks:
        if language == "sh":
            for line in text.replace("\\\n", " ").splitlines():
                output = run(line, copy)
                if " pytest " in line:
                    assert int(re.search(r"(\d+) passed", output)[1]) > 0
