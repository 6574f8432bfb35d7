"""Thousands of seeded faults in data files, checkpoints and PDFs: read right, or refused in one line.

Model folders have tests of this kind in test_mutated_folders.py, replies of servers in test_questions.py and
test_openai_api.py.
"""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from api_server import mutated
from naming import names
from test_checkpoint import assert_same, everything, make_loss, make_state
from test_pdf import pdf_bytes

from embedft import RetrievalDataset
from embedft.corpus.documents import read_documents
from embedft.training.checkpoint import load_checkpoint, save_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::UserWarning")]
BLOCKS = 4  # pytest-xdist runs the blocks of a kind side by side


def spoiled(content: bytes, generator: random.Random) -> bytes:
    """Bytes that were flipped, cut off, dropped, doubled or put in."""
    place, length = generator.randrange(len(content) + 1), generator.choice([1, 2, 10, 200])
    before, part, after = content[:place], content[place : place + length], content[place + length :]
    junk = generator.choice([b"\0", b"\xff\xfe", b'"', b"\n", b"\r", b",", b"\t", b"{", b"]", b"\\", b"\xe2\x80\xa8"])
    flipped = bytes(byte ^ (1 << generator.randrange(8)) for byte in part)
    kinds = [
        before + flipped + after,
        before,
        before + after,
        before + part + part + after,
        before + junk + part + after,
    ]
    return generator.choice(kinds)


def spoil(path: Path, generator: random.Random) -> None:
    """One fault in a file: in its JSON values, its bytes or its place on the disk."""
    content = path.read_bytes()
    draw = generator.random()
    if draw < 0.05:
        path.unlink()
        if generator.random() < 0.5:
            path.mkdir()
    elif draw < 0.5 and path.suffix == ".json":
        path.write_text(json.dumps(mutated(json.loads(content), generator)), encoding="utf-8", errors="surrogatepass")
    elif draw < 0.5 and path.suffix == ".jsonl":
        lines = [json.loads(line) for line in content.splitlines()]
        row = generator.randrange(len(lines))
        lines[row] = mutated(lines[row], generator)
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    elif draw < 0.5 and path.suffix == ".safetensors":
        length = int.from_bytes(content[:8], "little")
        header = json.dumps(mutated(json.loads(content[8 : 8 + length]), generator)).encode()
        path.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
    else:
        path.write_bytes(spoiled(content, generator))


def is_refused(action: Callable[[], object], where: str) -> bool:
    """Whether the action raises, in one line that names `where`. Any other exception fails the test."""
    try:
        action()
    except (ValueError, OSError) as found:
        error = found
    else:
        return False
    assert type(error) is ValueError or isinstance(error, OSError), repr(error)
    assert "\n" not in str(error), error
    assert len(str(error)) < 700, error
    assert names(str(error), where) or names(str(error), "finite"), error
    return True


def make_files(folder: Path) -> dict[str, Path]:
    """A small dataset in every format."""
    queries = {f"q{i}": f'what is "{i}", exactly?' for i in range(6)}
    corpus = {f"d{i}": f"text {i}, with a\nline and a\ttab" for i in range(6)}
    dataset = RetrievalDataset(queries, corpus, {f"q{i}": {f"d{i}": 1} for i in range(6)})
    for name in ("qa.json", "pairs.jsonl", "beir"):
        dataset.save(folder / name)
    rows = [[queries[f"q{i}"], corpus[f"d{i}"].replace("\n", " ").replace("\t", " ")] for i in range(6)]
    quoted = "".join(",".join('"' + cell.replace('"', '""') + '"' for cell in row) + "\r\n" for row in rows)
    (folder / "pairs.csv").write_text("question,context\r\n" + quoted, newline="")
    (folder / "pairs.tsv").write_text("question\tcontext\n" + "".join("\t".join(row) + "\n" for row in rows))
    return {name: folder / name for name in ("qa.json", "pairs.jsonl", "beir", "pairs.csv", "pairs.tsv")}


@pytest.mark.parametrize("block", range(BLOCKS))
def test_data_files(tmp_path, block):
    """A file with a fault gives a dataset that saves and loads as itself, or is refused by name."""
    made = make_files(tmp_path / "base")
    num_refused = 0
    for seed in range(block, 4000, BLOCKS):
        generator, name = random.Random(seed), list(made)[seed // BLOCKS % len(made)]
        path = tmp_path / f"case-{seed}" / name
        if made[name].is_dir():
            shutil.copytree(made[name], path)
            spoil(generator.choice(sorted(file for file in path.rglob("*") if file.is_file())), generator)
        else:
            path.parent.mkdir()
            shutil.copy(made[name], path)
            spoil(path, generator)

        def load(path=path, loaded=(loaded := [])) -> None:
            dataset = RetrievalDataset.load(path)
            assert dataset.queries.keys() >= dataset.qrels.keys()
            assert all(document_id in dataset.corpus for row in dataset.qrels.values() for document_id in row)
            loaded.append(dataset)

        num_refused += is_refused(load, str(path))
        again = path.parent / "again"
        for dataset in loaded:
            if not is_refused(lambda dataset=dataset, again=again: dataset.save(again, format="beir"), str(again)):
                found = RetrievalDataset.load(again)
                assert found.corpus == dataset.corpus
                assert found.qrels == {query_id: dataset.qrels[query_id] for query_id in found.qrels}
                assert found.queries == {query_id: dataset.queries[query_id] for query_id in found.queries}
        shutil.rmtree(path.parent)
    assert 200 < num_refused < 800


@pytest.mark.parametrize("block", range(BLOCKS))
def test_checkpoints(tmp_path, block):
    """Any change of any file is found before anything is restored."""
    state = make_state(0, loss=make_loss(1.0), at=1)
    state.best_weights = state.refresh_weights = {"x": torch.zeros(3)}
    save_checkpoint(tmp_path / "base", state)
    files = sorted(path.name for path in (tmp_path / "base" / "step-000001").iterdir())
    for seed in range(block, 2000, BLOCKS):
        generator, folder = random.Random(seed), tmp_path / f"checkpoints-{seed}"
        shutil.copytree(tmp_path / "base", folder)
        path = folder / "step-000001" / generator.choice(files)
        content = path.read_bytes()
        spoil(path, generator)
        other = make_state(1, loss=make_loss(5.0))
        before = everything(other)
        if path.is_file() and path.read_bytes() == content:
            assert load_checkpoint(folder, other)
        elif not is_refused(lambda folder=folder, other=other: load_checkpoint(folder, other), str(folder)):
            # Only what does not change the content of files.json, such as a blank, may pass.
            assert path.name == "files.json"
            assert json.loads(path.read_bytes()) == json.loads(content)
        else:
            assert_same(everything(other), before)
            assert other.step == 0
        shutil.rmtree(folder)


def test_pdfs(tmp_path):
    """A damaged file gives its pages, or fewer with a reason for each; a file beside it gives all of its own."""
    pages = [f"Page {i} of the report.\nRevenue was {i} million." for i in range(1, 4)]
    whole = pdf_bytes(pages)
    files = []
    for seed in range(1000):
        generator = random.Random(seed)
        content = whole
        for _ in range(generator.randint(1, 4)):
            content = spoiled(content, generator)
        files.append(tmp_path / f"{seed:04d}.pdf")
        files[-1].write_bytes(content)
    (tmp_path / "whole.pdf").write_bytes(whole)
    found_pages, found_skipped = read_documents([*files, tmp_path / "whole.pdf"], processes=2)
    intact = [page.text for page in found_pages if page.file.endswith("whole.pdf")]
    assert [text.split("\n")[0] for text in intact] == [text.split("\n")[0] for text in pages]
    named = {page.file for page in found_pages} | {skipped.file for skipped in found_skipped}
    assert named == {str(path) for path in [*files, tmp_path / "whole.pdf"]}
    for skipped in found_skipped:
        assert skipped.reason
        assert "\n" not in skipped.reason
        assert len(skipped.reason) < 300
        assert not names(skipped.reason, "seconds")
    for page in found_pages:
        page.text.encode()
    assert os.listdir(tmp_path)
