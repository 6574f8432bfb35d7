"""`embedft info NAME` with a local hub that serves models of three families: what is whole loads, now and later without
the hub, and what is not is one line on stderr and exit code 2.

The embedder's own tests of the hub (cache, packages, which files are asked for) are in test_loading.py.
"""

import json
from pathlib import Path

import pytest
from conftest import write_tiny_folder
from families import in_shards, write_by_transformers
from hub_server import Answer, Hub, Shell, assert_refused
from naming import names

FIRST, SECOND = "1f" * 20, "2e" * 20
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARDS = [f"model-{i:05}-of-00003.safetensors" for i in (1, 2, 3)]  # of the ModernBERT


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
def shell(hub, tmp_path_factory):
    with Shell(hub, tmp_path_factory.mktemp("shell")) as shell:
        yield shell


@pytest.fixture(scope="module")
def offline(hub, shell):
    """With the cache of `shell`, and without the hub."""
    with Shell(hub, shell.folder, HF_HUB_OFFLINE="1") as offline:
        yield offline


def serve(hub: Hub, name: str, files: dict[str, bytes]) -> str:
    hub.repositories[name] = {"main": FIRST, FIRST: files}
    return name


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
