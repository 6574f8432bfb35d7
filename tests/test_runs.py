"""runs.py: a run's folder is made once, found unwritable before work starts, resumed only as it was, closed last."""

import json
import secrets
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from embedft.files import read_json
from embedft.training import runs
from embedft.training.runs import check_run, close_run, open_run

CONFIG = {"epochs": 2, "loss": {"name": "in_batch_negatives"}}
DATA = {"train": "0" * 64}
CPU = torch.device("cpu")


def open_(out: Path, config=CONFIG, data=DATA, existing: str = "refuse") -> None:
    open_run(out, config, hashes=data, device=CPU, existing=existing)


def fill(out: Path) -> None:
    """What a run leaves on its way."""
    for name in (
        "checkpoints/step-000004/model.safetensors",
        "model/config.json",
        "eval/validation/run.trec",
        "train.jsonl",
    ):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("old")


def files_in(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


# Opening.


def test_a_new_run(tmp_path):
    out = tmp_path / "runs" / "mine"
    check_run(out)
    assert not out.parent.exists()  # checking changes nothing
    open_(out)
    assert read_json(out / "config.json") == CONFIG
    assert {path.name for path in out.iterdir()} - {"diff.patch"} == {"config.json", "environment.json"}


def test_an_empty_folder_is_as_good_as_none(tmp_path):
    open_(tmp_path)
    assert read_json(tmp_path / "config.json") == CONFIG


def test_an_existing_run_is_refused(tmp_path):
    open_(tmp_path)
    fill(tmp_path)
    before = files_in(tmp_path)
    for refused in (lambda: check_run(tmp_path), lambda: open_(tmp_path)):
        with pytest.raises(ValueError, match=f"{tmp_path}: not empty; choose another folder, or overwrite or resume"):
            refused()
    assert files_in(tmp_path) == before


def test_overwriting_leaves_nothing_of_the_old_run_and_everything_else(tmp_path):
    open_(tmp_path)
    fill(tmp_path)
    (tmp_path / "diff.patch").write_text("an old patch")
    close_run(tmp_path)
    (tmp_path / "notes.md").write_text("mine")
    open_(tmp_path, {"epochs": 3}, existing="overwrite")
    assert read_json(tmp_path / "config.json") == {"epochs": 3}
    assert {path.name for path in tmp_path.iterdir()} - {"diff.patch"} == {
        "config.json",
        "environment.json",
        "notes.md",
    }
    assert "an old patch" not in "".join(path.read_text() for path in tmp_path.iterdir())


@pytest.mark.parametrize("existing", ["refuse", "overwrite", "resume"])
def test_foreign_files_are_left_alone(tmp_path, existing):
    """A folder with files but no run is nobody's to empty; `model` and `eval` may be anybody's names."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights.bin").write_text("precious")
    before = files_in(tmp_path)
    with pytest.raises(ValueError, match=f"{tmp_path}: (not empty|holds files, but no run)"):
        open_(tmp_path, existing=existing)
    assert files_in(tmp_path) == before


@pytest.mark.parametrize("existing", ["refuse", "overwrite", "resume"])
def test_what_cannot_be_written_is_found_at_once(tmp_path, existing):
    """Without permissions, which root does not need: a file, below a file, and where the kernel makes no files."""
    file = tmp_path / "file"
    file.write_text("")
    for out in (file, file / "run", file / "runs" / "mine", Path("/proc/embedft/run")):
        with pytest.raises(ValueError, match=f"{out}: cannot be written to"):
            check_run(out, existing)
    assert files_in(tmp_path) == {"file": b""}


def test_what_to_do_about_a_run_is_one_of_three(tmp_path):
    with pytest.raises(ValueError, match="existing is 'replace', expected one of refuse, overwrite, resume"):
        check_run(tmp_path, "replace")


# Resuming.


def test_resuming_changes_nothing(tmp_path):
    open_(tmp_path)
    fill(tmp_path)
    before = files_in(tmp_path)
    check_run(tmp_path, "resume")
    open_(tmp_path, existing="resume")
    assert files_in(tmp_path) == before


def test_resuming_what_never_began_begins_it(tmp_path):
    open_(tmp_path / "run", existing="resume")
    assert read_json(tmp_path / "run" / "config.json") == CONFIG


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({**CONFIG, "epochs": 3}, "epochs was 2 and is 3"),
        ({**CONFIG, "loss": {"name": "other"}}, "loss was {'name': 'in_batch_negatives'} and is {'name': 'other'}"),
        ({**CONFIG, "new": 1}, "new was None and is 1"),
        ({"epochs": 2}, "loss was {'name': 'in_batch_negatives'} and is None"),
    ],
)
def test_a_changed_setting_is_named(tmp_path, config, message):
    open_(tmp_path)
    before = files_in(tmp_path)
    with pytest.raises(ValueError, match=f"{tmp_path}: cannot resume, {message}"):
        open_(tmp_path, config, existing="resume")
    assert files_in(tmp_path) == before


def test_changed_data_is_refused(tmp_path):
    open_(tmp_path)
    for data in ({"train": "1" * 64}, {**DATA, "validation": "0" * 64}, {}):
        with pytest.raises(ValueError, match=f"{tmp_path}: cannot resume, [a-z]+ is not what the run began with"):
            open_(tmp_path, data=data, existing="resume")


def test_a_run_that_is_done_is_not_resumed(tmp_path):
    open_(tmp_path)
    close_run(tmp_path)
    with pytest.raises(ValueError, match=f"{tmp_path}: this run is done, there is nothing to resume"):
        check_run(tmp_path, "resume")


# What is written.


def test_done_comes_last_and_checkpoints_go(tmp_path, monkeypatch):
    open_(tmp_path)
    fill(tmp_path)
    assert not (tmp_path / "DONE").exists()
    remove = runs.shutil.rmtree

    def remove_first(path, **options):
        assert not (tmp_path / "DONE").exists()
        remove(path, **options)

    monkeypatch.setattr(runs.shutil, "rmtree", remove_first)
    close_run(tmp_path)
    assert (tmp_path / "DONE").is_file()
    assert not (tmp_path / "checkpoints").exists()
    assert (tmp_path / "model" / "config.json").is_file()


def test_the_configuration_is_what_makes_a_folder_a_run(tmp_path, monkeypatch):
    """Cut off before it is whole, opening leaves nothing that could be resumed."""
    names = []
    write = runs.write_json
    monkeypatch.setattr(runs, "write_json", lambda path, value: names.append(path.name) or write(path, value))
    open_(tmp_path)
    assert names == ["environment.json", "config.json"]


def test_environment(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["embedft", "finetune", "model"])
    open_(tmp_path)
    found = read_json(tmp_path / "environment.json")
    assert found["arguments"] == ["embedft", "finetune", "model"]
    assert found["sha256"] == DATA
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"].keys() >= {"embedft", "numpy", "faiss-cpu", "tokenizers", "safetensors"}
    assert None not in found["versions"].values()
    assert f"{torch.get_num_threads()} threads" in found["device"]
    assert found["started"].endswith("+00:00")
    assert found.keys() >= {"platform", "packed_attention_kernel", "onednn_linear", "commit", "dirty"}
    assert found["dirty"] == (tmp_path / "diff.patch").exists()


def test_no_secret_of_the_environment_is_written(tmp_path, monkeypatch):
    secret = f"sk-{secrets.token_hex(16)}"
    monkeypatch.setenv("OPENAI_API_KEY", secret)
    open_(tmp_path)
    assert not any(secret.encode() in content for content in files_in(tmp_path).values())


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A git repository of which runs.py seems to be a file."""
    package = tmp_path / "repository" / "embedft"
    (package / "training").mkdir(parents=True)
    (package / "__init__.py").write_text("one\n")
    (package.parent / "README.md").write_bytes("café\n".encode("latin-1"))

    def git(*arguments: str) -> str:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false")
        done = subprocess.run(
            ["git", *identity, *arguments], cwd=package.parent, check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    git("init", "-q")
    git("add", "-A")
    git("commit", "-q", "-m", "one")
    monkeypatch.setattr(runs, "__file__", str(package / "training" / "runs.py"))
    return package, git


def test_a_clean_checkout(tmp_path, checkout):
    _, git = checkout
    open_(tmp_path / "run")
    found = read_json(tmp_path / "run" / "environment.json")
    assert (found["commit"], found["dirty"]) == (git("rev-parse", "HEAD"), False)
    assert not (tmp_path / "run" / "diff.patch").exists()


def test_a_changed_checkout_leaves_a_patch_that_applies(tmp_path, checkout):
    package, git = checkout
    changed = {package / "__init__.py": b"two\n", package.parent / "README.md": "thé\n".encode("latin-1")}
    for path, content in changed.items():
        path.write_bytes(content)
    open_(tmp_path / "run")
    assert read_json(tmp_path / "run" / "environment.json")["dirty"] is True
    git("checkout", "-q", ".")
    git("apply", str(tmp_path / "run" / "diff.patch"))
    assert {path: path.read_bytes() for path in changed} == changed


def test_code_outside_of_a_checkout_has_no_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "__file__", str(tmp_path / "site-packages" / "embedft" / "training" / "runs.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    open_(tmp_path / "run")
    found = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert (found["commit"], found["dirty"]) == (None, False)
