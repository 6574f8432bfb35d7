"""The folder of a saved index: large files, and `index.json`, which names them with their hashes, written last.

    files = {"codes": write_hashed(folder, "codes", ".npy", lambda file: np.save(file, codes))}
    finish(folder, {"kind": "quantized", "files": files})
    description, paths = opened(folder, kind="quantized")

A reader finds the index that was there before or the new one, never a part of each, and `index.json` has a hash of
what it says: a byte that changed anywhere is found.
"""

import hashlib
import json
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

from ..files import atomic_write, read_object, sha256_file, write_json

INDEX_FILE, VERSION = "index.json", 1
NAME_DIGITS = 16


class _Hashing:
    """A file that is written to, and hashed on the way."""

    def __init__(self, file: IO[bytes]):
        self.file, self.digest, self.num_bytes = file, hashlib.sha256(), 0

    def write(self, block: bytes) -> int:
        view = memoryview(block).cast("B")
        self.file.write(view)
        self.digest.update(view)
        self.num_bytes += len(view)
        return len(view)


def write_hashed(folder: Path, stem: str, suffix: str, write: Callable[[Any], object]) -> dict[str, Any]:
    """Writes `stem`-<first digits of its SHA-256>`suffix`, atomically; `write` is given an object with `write(bytes)`.

    Returns:
        {"name", "bytes", "sha256"}, for the description.
    """
    temporary = folder / f"{stem}-{secrets.token_hex(4)}.new"
    try:
        with atomic_write(temporary, "wb") as file:
            hashing = _Hashing(file)
            write(hashing)
        digest = hashing.digest.hexdigest()
        temporary.replace(folder / f"{stem}-{digest[:NAME_DIGITS]}{suffix}")
    finally:
        temporary.unlink(missing_ok=True)
    return {"name": f"{stem}-{digest[:NAME_DIGITS]}{suffix}", "bytes": hashing.num_bytes, "sha256": digest}


def finish(folder: Path, description: Mapping[str, Any]) -> None:
    """Writes `index.json`, then takes away the files that an earlier one named and this one does not."""
    earlier = folder / INDEX_FILE
    names = set(_names(read_object(earlier))) if earlier.exists() else set()
    description = {"version": VERSION, **description}
    write_json(earlier, {**description, "sha256": _digest(description)})
    for name in names - set(_names(description)):
        (folder / name).unlink(missing_ok=True)


def opened(folder: str | Path, *, kind: str) -> tuple[dict[str, Any], dict[str, Path]]:
    """The description of a saved index, and its files by what they hold, each of them found whole.

    Raises:
        ValueError: there is no index, one of another kind or version, or a file that is missing, cut short or changed.
    """
    folder = Path(folder)
    path = folder / INDEX_FILE
    if not path.is_file():
        raise ValueError(f"{folder}: holds no index ({INDEX_FILE} is not there)")
    description = read_object(path)
    if description.get("version") != VERSION or description.get("kind") != kind:
        found = f"kind {description.get('kind')!r}, version {description.get('version')!r}"
        raise ValueError(f"{path}: an index of {found}, expected {kind!r}, {VERSION}")
    if description.pop("sha256", None) != _digest(description):
        raise ValueError(f"{path}: its SHA-256 is not that of what it says: it is damaged")
    paths = {}
    for what, file in description["files"].items():
        paths[what] = folder / file["name"]
        if not paths[what].is_file():
            raise ValueError(f"{paths[what]}: is missing, expected by {INDEX_FILE}")
        size = paths[what].stat().st_size
        if size != file["bytes"]:
            raise ValueError(f"{paths[what]}: {size:,} bytes, expected {file['bytes']:,}: it is cut short or another's")
        if sha256_file(paths[what]) != file["sha256"]:
            raise ValueError(f"{paths[what]}: its SHA-256 is not that in {INDEX_FILE}: it is damaged")
    return description, paths


def _digest(description: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()


def _names(description: Mapping[str, Any]) -> list[str]:
    """Files of this folder that a description names: an `index.json` of something else names none."""
    files = description.get("files")
    if not isinstance(files, Mapping):
        return []
    whole = [
        file for file in files.values() if isinstance(file, Mapping) and {"name", "bytes", "sha256"} <= file.keys()
    ]
    return [file["name"] for file in whole if isinstance(file["name"], str) and Path(file["name"]).name == file["name"]]
