"""`embedft info NAME` with a local hub that serves models of three families: what is whole loads, now and later without
the hub, and what is not is one line on stderr and exit code 2.

The embedder's own tests of the hub (cache, packages, which files are asked for) are in test_loading.py.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import write_tiny_folder
from families import in_shards, write_by_transformers
from hub_server import Hub
from naming import names

# A process that runs commands, each in a fork of its own, whose modules are imported already. Retries do not wait.
SHELL = """
import json, os, sys, time
import embedft.commands.info, embedft.encoders.loading
from embedft.cli import main
from huggingface_hub import errors, snapshot_download, utils
for line in sys.stdin:
    words, *files = json.loads(line)
    if not (child := os.fork()):
        for number, path in enumerate(files, start=1):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        time.sleep = lambda seconds: None
        code = main(words)
        sys.stderr.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
FIRST, SECOND = "1f" * 20, "2e" * 20
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARDS = [f"model-{i:05}-of-00003.safetensors" for i in (1, 2, 3)]  # of the ModernBERT


class Answer(NamedTuple):
    """What a command did."""

    code: int
    out: str
    err: str


class Shell:
    """Runs `embedft info` with a hub and a cache."""

    def __init__(self, hub: Hub, folder: Path, **more: str):
        self.folder, self.cache = folder, folder / "home" / "hub"
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        path = os.pathsep.join(filter(None, [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH")]))
        environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "home"), "HF_HUB_DISABLE_TELEMETRY": "1"}
        environment |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1", "PYTHONPATH": path} | more
        pipe = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen([sys.executable, "-c", SHELL], env=environment, **pipe)

    def info(self, name: str, *options: str) -> Answer:
        files = [self.folder / "out", self.folder / "err"]
        self.process.stdin.write(json.dumps([["info", name, "--device", "cpu", *options], *map(str, files)]) + "\n")
        self.process.stdin.flush()
        return Answer(int(self.process.stdout.readline()), *(file.read_text() for file in files))

    def cached(self, name: str) -> dict[str, bytes]:
        """The files of a model's snapshots, by their names."""
        places = (self.cache / f"models--{name.replace('/', '--')}" / "snapshots").glob("*/*")
        return {path.name: path.read_bytes() for path in places if path.is_file()}


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def models(tmp_path_factory, tiny_bert) -> dict[str, dict[str, bytes]]:
    """{name: files} of a BERT with sentence-transformers' modules, a ModernBERT in shards, and a Qwen3."""
    tmp = tmp_path_factory.mktemp("served")
    pytest.importorskip("transformers")
    write_tiny_folder(tmp / "bert", modules=True)
    for model_type in ("modernbert", "qwen3"):
        write_by_transformers(tmp / model_type, model_type, tiny_bert)
    in_shards(tmp / "modernbert", *SHARDS)
    found = {f"tiny/{name}": tmp / name for name in ("bert", "modernbert", "qwen3")}
    return {name: files_of(folder) for name, folder in found.items()}


@pytest.fixture(scope="module")
def hub(models):
    with Hub({name: {"main": FIRST, FIRST: files} for name, files in models.items()}) as hub:
        yield hub


@pytest.fixture(scope="module")
def shells(hub, tmp_path_factory):
    """Two with one cache: with the hub, and without."""
    folder = tmp_path_factory.mktemp("shell")
    shells = Shell(hub, folder), Shell(hub, folder, HF_HUB_OFFLINE="1")
    yield shells
    for shell in shells:
        shell.process.communicate()


@pytest.fixture
def shell(shells) -> Shell:
    return shells[0]


@pytest.fixture
def offline(shells) -> Shell:
    return shells[1]


def serve(hub: Hub, name: str, files: dict[str, bytes]) -> str:
    hub.repositories[name] = {"main": FIRST, FIRST: files}
    return name


def assert_refused(answer: Answer, *facts: object) -> None:
    assert answer.code == 2
    assert answer.err.startswith("embedft info: error: "), answer.err
    assert answer.err.count("\n") == 1, answer.err
    assert names(answer.err, *facts), answer.err


def assert_loaded(answer: Answer, shell: Shell, name: str, files: dict[str, bytes]) -> None:
    """The command went well, and what is in the cache is what the hub has."""
    assert (answer.code, answer.err) == (0, ""), answer.err
    cached = shell.cached(name)
    assert WEIGHTS in cached or INDEX in cached
    for path, content in cached.items():
        assert content == files[path], path


@pytest.mark.parametrize("name", ["tiny/bert", "tiny/modernbert", "tiny/qwen3"])
def test_a_model_is_downloaded_once_and_serves_without_the_hub(hub, shell, offline, models, name):
    assert sum(path.endswith(".safetensors") for path in models[name]) == (len(SHARDS) if "modern" in name else 1)
    first = shell.info(name)
    assert_loaded(first, shell, name, models[name])
    assert names(first.out, name.removeprefix("tiny/"), 32)
    hub.log.clear()
    assert shell.info(name) == first
    assert hub.downloaded == []
    assert offline.info(name) == first


def test_a_pinned_revision(hub, shell, offline, models, tmp_path):
    other = files_of(write_tiny_folder(tmp_path / "other", modules=True, num_hidden_layers=1))
    hub.repositories["tiny/two"] = {"main": SECOND, "v1": FIRST, FIRST: models["tiny/bert"], SECOND: other}
    assert names(shell.info("tiny/two").out, "layers", 1)
    for revision in (FIRST, "v1"):
        answer = shell.info("tiny/two", "--revision", revision)
        assert answer.code == 0
        assert names(answer.out, "layers", 2, FIRST)
        assert offline.info("tiny/two", "--revision", revision) == answer
    assert_refused(shell.info("tiny/two", "--revision", "v2"), "tiny/two", "'v2'")


@pytest.mark.parametrize(
    ("name", "path", "facts"),
    [
        ("tiny/bert", "model.safetensors", ("model.safetensors", "none")),
        ("tiny/bert", "config.json", ("config.json", "model", "folder")),
        ("tiny/bert", "tokenizer.json", ("tokenizer.json",)),
        ("tiny/bert", "1_Pooling/config.json", ("1_Pooling", "config.json")),
        ("tiny/modernbert", SHARDS[1], (SHARDS[1], INDEX)),
        ("tiny/modernbert", INDEX, (WEIGHTS, *SHARDS)),
    ],
)
def test_a_missing_file_is_named(hub, shell, models, name, path, facts):
    left = {other: content for other, content in models[name].items() if other != path}
    assert_refused(shell.info(serve(hub, f"{name}-without-{path.replace('/', '-')}", left)), *facts)


@pytest.mark.parametrize("times", [1, 3])
def test_a_connection_that_breaks_now_and_then(hub, shell, models, times):
    """Each connection goes on where the one before it broke off."""
    files = models["tiny/qwen3"]
    name, size = serve(hub, f"tiny/broken-{times}", files), len(files[WEIGHTS])
    hub.cut[name, WEIGHTS] = [size * i // (times + 1) for i in range(1, times + 1)]
    assert shell.info(name).code == 0
    assert shell.cached(name) == {k: v for k, v in files.items() if k in shell.cached(name)}


def test_a_connection_that_breaks_for_good(hub, shell, offline, models):
    """Half a file is never taken for a whole one; the next call starts again."""
    files = models["tiny/bert"]
    name = serve(hub, "tiny/broken", files)
    hub.cut[name, WEIGHTS] = [len(files[WEIGHTS]) // 2] * 100
    for _ in range(2):
        assert_refused(shell.info(name), name, "connection", "hub")
        assert WEIGHTS not in shell.cached(name)
    assert_refused(offline.info(name), name)
    hub.cut.clear()
    assert_loaded(shell.info(name), shell, name, files | {"config.json": shell.cached(name)["config.json"]})


@pytest.mark.parametrize("difference", [-100, 100])
def test_another_size_than_listed(hub, shell, models, difference):
    files = models["tiny/qwen3"]
    name, size = serve(hub, f"tiny/size-{difference + 100}", files), len(files[WEIGHTS])
    hub.sizes[name, WEIGHTS] = size + difference
    assert_refused(shell.info(name), name, size + difference, size)
    assert WEIGHTS not in shell.cached(name)
    hub.sizes.clear()
    assert_loaded(shell.info(name), shell, name, files)


@pytest.mark.parametrize(("name", "path"), [("tiny/bert", WEIGHTS), ("tiny/modernbert", SHARDS[2])])
def test_a_pointer_in_place_of_weights(hub, shell, models, name, path):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 90868376\n"
    assert_refused(shell.info(serve(hub, f"{name}-pointer", models[name] | {path: pointer})), path, "LFS")


def test_code_that_comes_with_a_model_is_never_downloaded(hub, shell, models):
    """What config.json says of it counts for nothing."""
    files = models["tiny/bert"] | {"evil.py": b"raise SystemExit('run')"}
    config = json.loads(files["config.json"]) | {"auto_map": {"AutoModel": "evil.Model"}}
    name = serve(hub, "tiny/coded", files | {"config.json": json.dumps(config).encode()})
    assert shell.info(name).code == 0
    assert "evil.py" not in shell.cached(name)
    config |= {"model_type": "evil", "architectures": ["EvilModel"]}
    name = serve(hub, "tiny/evil", files | {"config.json": json.dumps(config).encode()})
    assert_refused(shell.info(name), "config.json", "model_type", "'evil'", "bert")
    assert "evil.py" not in shell.cached(name)
