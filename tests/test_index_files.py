"""index_files.py: what was there stays whole until it is replaced; damage is named."""

import hashlib
import json
import os
import re

import pytest

from embedft.retrieval.index_files import finish, opened, write_hashed


def save(folder, content):
    file = write_hashed(folder, "codes", ".npy", lambda file: [file.write(content[:3]), file.write(content[3:])])
    finish(folder, {"kind": "test", "files": {"codes": file}})
    return folder / file["name"]


def test_a_file_is_named_by_its_hash(tmp_path):
    path = save(tmp_path / "new", b"content")
    digest = hashlib.sha256(b"content").hexdigest()
    assert path.name == f"codes-{digest[:16]}.npy"
    assert path.read_bytes() == b"content"
    description, paths = opened(tmp_path / "new", kind="test")
    assert description["files"]["codes"] == {"name": path.name, "bytes": 7, "sha256": digest}
    assert paths == {"codes": path}


def test_a_second_index_takes_the_place_of_the_first_and_of_nothing_else(tmp_path):
    (tmp_path / "codes-mine.npy").write_text("another's")
    first = save(tmp_path, b"first")
    second = save(tmp_path, b"second")
    assert not first.exists()
    assert {*os.listdir(tmp_path)} == {"codes-mine.npy", second.name, "index.json"}
    assert save(tmp_path, b"second") == second
    assert second.read_bytes() == b"second"


def test_an_error_leaves_the_index_that_was_there(tmp_path):
    first = save(tmp_path, b"first")

    def fail(file):
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_hashed(tmp_path, "codes", ".npy", fail)
    assert {*os.listdir(tmp_path)} == {first.name, "index.json"}
    write_hashed(tmp_path, "codes", ".npy", lambda file: file.write(b"not finished"))
    assert opened(tmp_path, kind="test")[1] == {"codes": first}


@pytest.mark.parametrize(
    "files", [None, 3, {"a": 3}, {"a": {"name": 3}}, {"a": {"name": "../precious", "bytes": 4, "sha256": ""}}]
)
def test_an_index_json_of_something_else_takes_no_file_away(tmp_path, files):
    (tmp_path / "precious").write_text("mine")
    folder = tmp_path / "index"
    folder.mkdir()
    (folder / "index.json").write_text(json.dumps({"files": files}))
    save(folder, b"content")
    assert (tmp_path / "precious").read_text() == "mine"


def test_what_cannot_be_opened(tmp_path):
    with pytest.raises(ValueError, match="holds no index"):
        opened(tmp_path, kind="test")
    path = save(tmp_path, b"content")
    with pytest.raises(ValueError, match="an index of kind 'test', version 1, expected 'faiss', 1"):
        opened(tmp_path, kind="faiss")
    path.write_bytes(b"conten")
    with pytest.raises(ValueError, match="6 bytes, expected 7: it is cut short or another's"):
        opened(tmp_path, kind="test")
    path.write_bytes(b"contemt")
    with pytest.raises(ValueError, match=r"its SHA-256 is not that in index.json: it is damaged"):
        opened(tmp_path, kind="test")
    path.unlink()
    with pytest.raises(ValueError, match=r"is missing, expected by index.json"):
        opened(tmp_path, kind="test")
    description = json.loads((tmp_path / "index.json").read_text())
    (tmp_path / "index.json").write_text(json.dumps({**description, "version": 2}))
    with pytest.raises(ValueError, match="kind 'test', version 2, expected 'test', 1"):
        opened(tmp_path, kind="test")


def test_a_byte_of_the_description_that_changed_is_found(tmp_path):
    save(tmp_path, b"content")
    path = tmp_path / "index.json"
    whole, expected = path.read_bytes(), opened(tmp_path, kind="test")
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(ValueError, match=re.escape(str(path))):
            opened(tmp_path, kind="test")
    path.write_bytes(whole)
    assert opened(tmp_path, kind="test") == expected
    for part in ("sha256", "files"):
        path.write_text(json.dumps({name: value for name, value in json.loads(whole).items() if name != part}))
        with pytest.raises(ValueError, match="its SHA-256 is not that of what it says: it is damaged"):
            opened(tmp_path, kind="test")
