"""run_folder.py: made once, checked for writing before work starts, resumed only unchanged, closed last."""

import json
import os
import secrets
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from naming import names, naming

from embedft import FinetuneConfig
from embedft.files import read_json
from embedft.training import run_folder
from embedft.training.run_folder import check_run, check_unchanged, close_run, lock, open_log, open_run

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
        with pytest.raises(ValueError, match=naming(tmp_path, "overwrite", "resume")):
            refused()
    assert files_in(tmp_path) == before


@pytest.mark.parametrize("done", [False, True])
def test_overwriting_leaves_nothing_of_the_old_run_and_everything_else(tmp_path, done):
    """A finished run is kept aside until the new one is done."""
    open_(tmp_path)
    fill(tmp_path)
    (tmp_path / "diff.patch").write_text(patch := secrets.token_hex(8))
    (tmp_path / "notes.md").write_text("mine")
    old = files_in(tmp_path)
    if done:
        close_run(tmp_path)
        old = files_in(tmp_path)
    open_(tmp_path, {"epochs": 3}, existing="overwrite")
    assert read_json(tmp_path / "config.json") == {"epochs": 3}
    visible = {path.name for path in tmp_path.iterdir()} - {"diff.patch", ".replaced"}
    assert visible == {"config.json", "environment.json", "notes.md"}
    assert (tmp_path / ".replaced").exists() == done
    if done:
        aside = files_in(tmp_path / ".replaced")
        assert aside == {name: content for name, content in old.items() if name != "notes.md"}
    (tmp_path / "train.jsonl").write_text("new")
    open_(tmp_path, {"epochs": 4}, existing="overwrite")  # the second one was not done: the first one is still there
    assert (tmp_path / ".replaced" / "DONE").exists() == done
    close_run(tmp_path)
    assert not (tmp_path / ".replaced").exists()
    assert files_in(tmp_path).keys() - {"diff.patch"} == {"config.json", "environment.json", "notes.md", "DONE"}
    assert patch not in "".join(path.read_text() for path in tmp_path.iterdir())


class Killed(BaseException):
    """In place of SIGKILL: no cleaning up follows it, see `killed_at`."""


def killed_at(patch, place: int) -> None:
    """The process ends before its `place`-th change of the disk: nothing is changed from then on."""
    changes = []

    def guard(owner, name):
        function = getattr(owner, name)

        def wrapped(*arguments, **options):
            changes.append(name)
            if len(changes) >= place:
                raise Killed
            return function(*arguments, **options)

        patch.setattr(owner, name, wrapped)

    for name in ("replace", "unlink", "rmdir", "mkdir", "fsync"):
        guard(os, name)


@pytest.mark.parametrize("before", ["nothing", "unfinished", "finished"])
@pytest.mark.parametrize("place", range(1, 30))
def test_killed_at_any_point_of_opening_and_closing(tmp_path, before, place):
    """What is left can be resumed or overwritten; a finished run stays complete somewhere until the new one is done."""
    out = tmp_path / "run"
    if before != "nothing":
        open_(out)
        fill(out)
    if before == "finished":
        close_run(out)
    existing = "refuse" if before == "nothing" else "overwrite"
    with pytest.MonkeyPatch.context() as patch:
        killed_at(patch, place)
        try:
            with lock(out):
                open_(out, {"epochs": 3}, existing=existing)
                if before != "finished":
                    (out / "model").mkdir(exist_ok=True)
                    (out / "checkpoints" / "step-000001").mkdir(parents=True)
                    for name in ("a", "b"):
                        (out / "checkpoints" / "step-000001" / name).write_text("x")
                    close_run(out)
        except Killed:
            pass
    if (out / "DONE").exists() or (out / ".replaced" / "DONE").exists():
        whole = out if (out / "DONE").exists() else out / ".replaced"
        assert (whole / "config.json").is_file()
    for option in ("resume", "overwrite"):
        try:
            with lock(out):
                open_(out, {"epochs": 3}, existing=option)
            break
        except ValueError as error:
            if option == "overwrite" or not names(str(error), "resume"):
                raise
    close_run(out)
    assert not (out / ".replaced").exists()
    assert read_json(out / "config.json") == {"epochs": 3}


def test_only_one_process_writes(tmp_path):
    with lock(tmp_path), pytest.raises(ValueError, match=naming(tmp_path, "process", ".lock")), lock(tmp_path):
        pass
    with lock(tmp_path):
        open_(tmp_path)
    assert (tmp_path / ".lock").exists()


def test_an_interrupt_says_how_to_resume(tmp_path):
    def interrupt(*calls) -> str:
        try:
            with lock(tmp_path / "run"):
                for call in calls:
                    call(tmp_path / "run")
                raise KeyboardInterrupt
        except KeyboardInterrupt as error:
            return str(error)

    assert interrupt() == ""  # nothing was begun
    assert names(interrupt(open_), tmp_path / "run", "existing='resume'")
    assert interrupt(close_run) == ""  # it is done


def test_a_folder_in_which_nothing_began_is_removed(tmp_path):
    with pytest.raises(KeyError), lock(tmp_path / "run"):
        raise KeyError
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("existing", "fault"), [("refuse", "empty"), ("overwrite", "config.json"), ("resume", "config.json")]
)
def test_foreign_files_are_left_alone(tmp_path, existing, fault):
    """A folder without a run must not be emptied, even if it has a `model` or `eval`: others use these names too."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights.bin").write_text("precious")
    before = files_in(tmp_path)
    with pytest.raises(ValueError, match=naming(tmp_path, fault)):
        open_(tmp_path, existing=existing)
    assert files_in(tmp_path) == before


@pytest.mark.parametrize("existing", ["refuse", "overwrite", "resume"])
def test_what_cannot_be_written_is_found_at_once(tmp_path, existing):
    """Without permissions, which root does not need: a file, below a file, and where the kernel makes no files."""
    file = tmp_path / "file"
    file.write_text("")
    for out in (file, file / "run", file / "runs" / "mine", Path("/proc/embedft/run")):
        with pytest.raises(ValueError, match=naming(out, "written")):
            check_run(out, existing)
    assert files_in(tmp_path) == {"file": b""}


def test_what_to_do_about_a_run_is_one_of_three(tmp_path):
    with pytest.raises(ValueError, match=naming("existing", "'replace'", "refuse", "overwrite", "resume")):
        check_run(tmp_path, "replace")


# Resuming.

ANOTHER_VERSION = ("setting", "version", "overwrite")


def test_resuming_changes_nothing(tmp_path):
    config = {**CONFIG, "passages": (8, 4)}
    open_(tmp_path, config)
    fill(tmp_path)
    before = files_in(tmp_path)
    check_run(tmp_path, "resume")
    open_(tmp_path, config, existing="resume")
    assert files_in(tmp_path) == before


def test_resuming_what_never_began_begins_it(tmp_path):
    open_(tmp_path / "run", existing="resume")
    assert read_json(tmp_path / "run" / "config.json") == CONFIG


@pytest.mark.parametrize(
    ("config", "facts"),
    [
        ({**CONFIG, "epochs": 3}, ("epochs", 2, ..., 3)),
        ({**CONFIG, "loss": {"name": "other"}}, ("loss", {"name": "in_batch_negatives"}, ..., {"name": "other"})),
        ({**CONFIG, "new": 1}, ("new", 1, *ANOTHER_VERSION)),
        ({"epochs": 2}, ("loss", {"name": "in_batch_negatives"}, *ANOTHER_VERSION)),
    ],
)
def test_a_changed_setting_is_named(tmp_path, config, facts):
    open_(tmp_path)
    before = files_in(tmp_path)
    with pytest.raises(ValueError, match=naming(tmp_path, "resume", *facts)):
        open_(tmp_path, config, existing="resume")
    assert files_in(tmp_path) == before


def test_what_changes_no_result_may_change(tmp_path):
    plain = asdict(FinetuneConfig())
    open_(tmp_path, plain)
    for name, value in {"prefetch": 3, "token_memory": 0, "checkpoint_every": 7, "log": "wandb"}.items():
        assert plain[name] != value
        open_(tmp_path, {**plain, name: value}, existing="resume")
        assert read_json(tmp_path / "config.json") == {**plain, name: value}


def test_changed_data_is_refused(tmp_path):
    open_(tmp_path)
    for data, name in (({"train": "1" * 64}, "train"), ({**DATA, "validation": "0" * 64}, "validation"), ({}, "train")):
        with pytest.raises(ValueError, match=naming(tmp_path, "resume", name, "SHA-256")):
            open_(tmp_path, data=data, existing="resume")
    (tmp_path / "environment.json").write_text("{}")
    with pytest.raises(ValueError, match=naming(tmp_path, "resume", "train", "SHA-256")):
        open_(tmp_path, existing="resume")


def test_a_run_that_is_done_is_not_resumed(tmp_path):
    open_(tmp_path)
    close_run(tmp_path)
    before = files_in(tmp_path)
    with pytest.raises(ValueError, match=naming(tmp_path, "done", "resume")):
        check_run(tmp_path, "resume")
    assert files_in(tmp_path) == before  # without a lock file


@pytest.mark.parametrize(("existing", "fault"), [("resume", "done"), ("refuse", "empty")])
def test_a_run_killed_while_it_was_closed_is_closed_by_the_next_command(tmp_path, existing, fault):
    open_(tmp_path)
    fill(tmp_path)
    close_run(tmp_path)
    whole = files_in(tmp_path)
    for name in ("checkpoints/step-000001/model.safetensors", ".replaced/config.json", ".DONE.0123abcd.tmp"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("left")
    with lock(tmp_path), pytest.raises(ValueError, match=naming(tmp_path, fault)):
        check_run(tmp_path, existing)
    assert files_in(tmp_path) != whole  # another process is at it
    with pytest.raises(ValueError, match=naming(tmp_path, fault)):
        check_run(tmp_path, existing)
    assert {name: text for name, text in files_in(tmp_path).items() if name != ".lock"} == whole


def test_a_run_killed_while_it_was_set_aside_is_left_alone(tmp_path):
    open_(tmp_path)
    fill(tmp_path)
    close_run(tmp_path)
    (tmp_path / ".replaced").mkdir()
    (tmp_path / "train.jsonl").rename(tmp_path / ".replaced" / "train.jsonl")
    before = files_in(tmp_path)
    with pytest.raises(ValueError, match=naming(tmp_path, "done")):
        check_run(tmp_path, "resume")
    assert files_in(tmp_path) == before


# What is written.


def test_checkpoints_go_once_the_run_is_done(tmp_path, monkeypatch):
    open_(tmp_path)
    fill(tmp_path)
    assert not (tmp_path / "DONE").exists()
    remove = run_folder.shutil.rmtree

    def remove_after(path, **options):
        assert (tmp_path / "DONE").exists()
        remove(path, **options)

    monkeypatch.setattr(run_folder.shutil, "rmtree", remove_after)
    close_run(tmp_path)
    assert not (tmp_path / "checkpoints").exists()
    assert (tmp_path / "model" / "config.json").is_file()


OBJECTS = {"loss": {"name": "mine.loss", "sha256": "0", "values": {}}}


@pytest.mark.parametrize(
    ("objects", "facts"),
    [
        ({"loss": {**OBJECTS["loss"], "sha256": "1"}}, ("loss", "mine.loss", "code")),
        ({"loss": {**OBJECTS["loss"], "values": {"a": 1}}}, ("loss", "mine.loss", "settings")),
        ({"loss": {**OBJECTS["loss"], "name": "mine.other"}}, ("loss", "mine.loss", ..., "mine.other")),
        ({}, ("loss", "mine.loss", ..., "given")),
        ({**OBJECTS, "on_step": OBJECTS["loss"]}, ("on_step", "given", ..., "mine.loss")),
    ],
)
def test_changed_code_is_named_and_may_be_allowed(tmp_path, objects, facts):
    open_(tmp_path, {**CONFIG, "objects": OBJECTS})
    config = {**CONFIG, **({"objects": objects} if objects else {})}
    with pytest.raises(ValueError, match=naming(tmp_path, "resume", *facts, "allow_changed_code=True")):
        open_(tmp_path, config, existing="resume")
    options = {"hashes": DATA, "device": CPU, "existing": "resume", "allow_changed_code": True}
    with pytest.raises(ValueError, match=naming("epochs", 2, 3)):
        open_run(tmp_path, {**config, "epochs": 3}, **options)
    assert read_json(tmp_path / "config.json") == {**CONFIG, "objects": OBJECTS}
    open_run(tmp_path, config, **options)
    assert read_json(tmp_path / "config.json") == config
    close_run(tmp_path)
    check_unchanged(tmp_path, config, DATA, "holds another run")


def test_the_log_of_a_resumed_run(tmp_path):
    """What it says of later steps is dropped, and the half line of a killed process."""
    log = open_log(tmp_path, -1)
    for step in (0, 1, 2, 3):
        log({"step": step})
    with open(tmp_path / "train.jsonl", "ab") as file:
        file.write(b'{"step": 1, "\xc3')
    open_log(tmp_path, 2)({"step": 3, "again": True})
    found = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert found == [{"step": 0}, {"step": 1}, {"step": 2}, {"step": 3, "again": True}]
    open_log(None, 0)({"step": 0})


def test_the_configuration_is_what_makes_a_folder_a_run(tmp_path, monkeypatch):
    """Cut off before it is whole, opening leaves nothing that could be resumed."""
    names = []
    write = run_folder.write_json
    monkeypatch.setattr(run_folder, "write_json", lambda path, value: names.append(path.name) or write(path, value))
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
    assert found.keys() >= {
        "platform",
        "packed_attention_kernel",
        "onednn_linear",
        "float32_products",
        "commit",
        "dirty",
    }
    assert found["dirty"] == (tmp_path / "diff.patch").exists()


def test_no_secret_of_the_environment_is_written(tmp_path, monkeypatch):
    secret = f"sk-{secrets.token_hex(16)}"
    monkeypatch.setenv("OPENAI_API_KEY", secret)
    open_(tmp_path)
    assert not any(secret.encode() in content for content in files_in(tmp_path).values())


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A git repository of which run_folder.py seems to be a file."""
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
    monkeypatch.setattr(run_folder, "__file__", str(package / "training" / "run_folder.py"))
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
    elsewhere = tmp_path / "site-packages" / "embedft" / "training" / "run_folder.py"
    monkeypatch.setattr(run_folder, "__file__", str(elsewhere))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    open_(tmp_path / "run")
    found = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert (found["commit"], found["dirty"]) == (None, False)
