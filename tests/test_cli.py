"""cli.py: every command by `main` and one in a process of its own; errors are one line and exit code 2."""

import errno
import importlib
import itertools
import json
import os
import re
import subprocess
import sys
import warnings
from dataclasses import fields

import numpy as np
import pytest
import torch
from api_server import ApiServer
from naming import names, naming
from tiny import make_dataset, make_embedder

import embedft
from embedft import Report, evaluate, load_embedder
from embedft.cli import COMMANDS, main
from embedft.commands.options import Data, load_data
from embedft.files import read_json, read_jsonl

TEXTS = ["a b c", "", " x ", "7 8 9"]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working directory with a model, data, and texts."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EMBEDFT_PROGRESS", "0")  # --quiet sets it; so it is put back
    monkeypatch.setattr("embedft.encoders.loading.default_device", lambda: torch.device("cpu"))
    make_embedder(tmp_path / "model")
    make_dataset(negatives=1).save("pairs.jsonl")
    make_dataset().save("pairs.json")
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    (tmp_path / "texts.jsonl").write_text(
        "\n".join(json.dumps(t if i % 2 else {"text": t}) for i, t in enumerate(TEXTS))
    )
    return tmp_path


# What the commands do.


def test_info(place, capsys):
    assert main(["info", "model", "--device", "cpu"]) == 0
    rows = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert (rows["family"], rows["layers"], rows["dimensions"], rows["device"]) == ("bert", "2", "32", "cpu")
    number = sum(p.numel() for p in make_embedder(place / "model").parameters())
    assert rows["parameters"].startswith(f"{number:,}: embeddings ")
    assert rows["max_length"].startswith("48 tokens")
    assert (rows["pooling"], rows["similarity"]) == ("mean", "cosine")


@pytest.mark.parametrize("file", ["texts.txt", "texts.jsonl"])
def test_encode(place, capsys, file):
    assert main(["encode", "model", file, "--out", "out/vectors.npy"]) == 0
    found = np.load("out/vectors.npy")
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, make_embedder(place / "model").encode(TEXTS))
    assert capsys.readouterr().out == "out/vectors.npy: 4 texts x 32 dimensions, float32\n"


def test_encode_with_options(place, capsys):
    settings = {"prompts": {"query": "q ", "document": "d "}}
    (place / "model" / "config_sentence_transformers.json").write_text(json.dumps(settings))
    options = ["--role", "query", "--dim", "8", "--max-length", "4", "--dtype", "bfloat16", "--device", "cpu"]
    assert main(["encode", "model", "texts.txt", "--out", "vectors.npy", *options]) == 0
    embedder = load_embedder("model", device="cpu", max_length=4).bfloat16()
    np.testing.assert_array_equal(np.load("vectors.npy"), embedder.encode(TEXTS, role="query", dim=8))


def test_tf32(place, monkeypatch, capsys):
    """Set before a model computes anything, on its device; refused where there is none."""
    assert main(["encode", "model", "texts.txt", "--out", "vectors.npy", "--tf32", "--device", "cpu"]) == 2
    assert names(capsys.readouterr().err, "--tf32", "'cpu'", "CUDA")
    assert not (place / "vectors.npy").exists()
    chosen = []
    monkeypatch.setattr("embedft.device.use_tf32", chosen.append)
    assert main(["encode", "model", "texts.txt", "--out", "vectors.npy", "--tf32", "--device", "cpu"]) == 0
    options = ["--out", "run", "--epochs", "1", "--batch-size", "4", "--quiet", "--tf32", "--device", "cpu"]
    assert main(["finetune", "model", "pairs.jsonl", *options]) == 0
    assert chosen == [torch.device("cpu")] * 2


@pytest.mark.parametrize("options", [[], ["--deterministic"]])
def test_determinism_is_allowed_before_anything_is_computed(place, monkeypatch, options):
    """torch reads the variable at its first product on a GPU, which may be of the validation before training."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    seen, load = [], load_embedder
    monkeypatch.setattr(
        "embedft.load_embedder", lambda *a, **k: seen.append(os.environ.get("CUBLAS_WORKSPACE_CONFIG")) or load(*a, **k)
    )
    assert main(["finetune", "model", "pairs.jsonl", "--out", "run", "--epochs", "1", "--quiet", *options]) == 0
    assert seen == [":4096:8" if options else None]


def test_lengths_are_shown_only_where_they_differ(place, capsys):
    options = ["--validation", "pairs.json", "--epochs", "1", "--batch-size", "4", "--quiet"]
    assert main(["finetune", "model", "pairs.jsonl", "--out", "run", *options]) == 0
    assert "max_length" not in capsys.readouterr().out


def test_finetune(place, capsys, recwarn):
    options = ["--validation", "pairs.json", "--epochs", "1", "--batch_size", "4", "--loss.temperature=0.1", "--quiet"]
    options += ["--max-length", "40"]  # differs from the base, which is meant and needs no warning
    assert main(["finetune", "--num_negatives", "1", "model", "pairs.jsonl", "--out", "run", *options]) == 0
    printed = capsys.readouterr()
    assert "max_length" not in printed.err + "".join(str(warning.message) for warning in recwarn)
    trained, kept, table, lengths, caution, where = printed.out.splitlines()
    assert names(lengths, "base", "max_length", 48, 40)  # `kept` is about the base at 40 tokens, `table` at its own 48
    log = [record for _, record in read_jsonl("run/train.jsonl") if "metrics" in record]
    best = max(log, key=lambda record: record["metrics"]["ndcg@10"])  # the first of equals
    step = f"the weights of step {best['step']} of {log[-1]['step']}"
    step = step if best["step"] else "the base weights, which no step improved on"
    first, chosen = (record["metrics"]["ndcg@10"] for record in (log[0], best))
    assert kept == f"kept {step} (ndcg@10 {first:.4f} -> {chosen:.4f})"
    losses = [record["loss"] for _, record in read_jsonl("run/train.jsonl") if "loss" in record]
    assert trained == f"{len(losses)} steps, loss {losses[0]:.4f} -> {losses[-1]:.4f}"
    assert re.match(r"ndcg@10: 0\.\d{4} -> 0\.\d{4}, difference [+-]0\.\d{4} \[.*\] at 95%, p = ", table)
    assert caution.startswith("these questions chose the weights")
    assert where == "model: run/model"
    config = read_json("run/config.json")
    expected = {"epochs": 1, "batch_size": 4, "num_negatives": 1}
    assert {name: config[name] for name in expected} == expected
    assert config["loss"] == {"name": "in_batch_negatives", "temperature": 0.1}
    after = evaluate(load_embedder("run/model", device="cpu"), make_dataset())
    assert Report.load("run/eval/validation").metrics == after.metrics
    assert (place / "run" / "DONE").is_file()

    assert main(["finetune", "model", "pairs.json", "--out", "run", "--epochs", "1"]) == 2
    assert names(capsys.readouterr().err, "finetune", ..., "run", ..., "--overwrite", "--resume")
    assert main(["finetune", "model", "pairs.json", "--out", "run", "--epochs", "1", "--overwrite"]) == 0
    trained, where = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"\d+ steps, loss .* -> .*", trained)
    assert where == "model: run/model"
    assert main(["finetune", "model", "pairs.json", "--out", "fresh", "--epochs", "1", "--resume"]) == 0
    assert names(capsys.readouterr().err, "fresh", "resume")


@pytest.mark.parametrize("command", ["finetune", "adapter"])
def test_validation_that_trains_too_is_told_in_one_line(place, command):
    arguments = [command, "model", "pairs.json", "--validation", "pairs.json", "--out", "run", "--epochs", "1"]
    done = subprocess.run([sys.executable, "-m", "embedft", *arguments], capture_output=True, text=True)
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"embedft {command}: warning: ")
    assert names(line, 12, 12, ..., "questions", ..., 9, 9, "documents", "validation", "training")


def test_an_api_cannot_be_trained(place, capsys, monkeypatch):
    """The command says so without asking for a key."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert main(["finetune", "openai:x", "pairs.json", "--out", "run"]) == 2
    assert names(capsys.readouterr().err, "finetune", "openai:x", "API", "trained")


def test_finetune_on_several_datasets(place, capsys):
    """By the names of their files, or by the names given; a file whose name has an equals sign is a file."""
    make_dataset(num_queries=5, seed=1).save("b=c.json")
    arguments = ["finetune", "model", "pairs.jsonl", "more=pairs.json", "b=c.json", "--out", "run", "--epochs", "1"]
    assert main([*arguments, "--batch-size", "4", "--sampling", "round_robin"]) == 0
    log = [record for _, record in read_jsonl("run/train.jsonl")]
    found = [(source, count) for record in log for source, count in record["sources"].items()]
    assert found == [("pairs", 4), ("more", 4), ("b=c", 4), ("pairs", 4), ("more", 4), ("b=c", 1)]


def test_settings_from_a_file(place, capsys):
    (place / "settings.json").write_text('{"epochs": 3, "batch_size": 12, "loss": {"name": "in_batch_negatives"}}')
    arguments = ["finetune", "model", "pairs.json", "--out", "run", "--config", "settings.json", "--epochs", "1"]
    assert main(arguments) == 0
    config = read_json("run/config.json")
    assert (config["epochs"], config["batch_size"]) == (1, 12)
    # And a run's own configuration is such a file.
    assert main(["finetune", "model", "pairs.json", "--out", "again", "--config", "run/config.json"]) == 0
    assert read_json("again/config.json") == config


def test_rows_with_empty_texts_are_dropped_on_request(place, capsys):
    (place / "pairs.csv").write_text("question,context\na b,a b c\nd,\ne f,e f g\n")
    assert main(["evaluate", "model", "pairs.csv"]) == 2
    assert main(["evaluate", "model", "pairs.csv", "--skip-empty", "--no-merge", "--format", "csv"]) == 0
    output = capsys.readouterr()
    assert output.out.startswith("model: 2 queries\n")
    error, dropped = output.err.splitlines()
    assert names(error, "pairs.csv", 3, "document", "--skip-empty")
    assert names(dropped, "pairs.csv", 1, "empty")


def test_in_a_process_of_its_own(place):
    def embedft(*arguments: str) -> subprocess.CompletedProcess:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            [sys.executable, "-m", "embedft", *arguments], env=environment, capture_output=True, text=True
        )

    good, bad = embedft("info", "model"), embedft("info", "./missing")
    assert (good.returncode, good.stderr) == (0, "")
    assert "family         bert" in good.stdout
    assert (bad.returncode, bad.stdout, bad.stderr.count("\n")) == (2, "", 1)
    assert names(bad.stderr, "info", "./missing", "folder")


def test_a_reader_that_goes_is_no_error(place):
    """As with `embedft info model | head -1`: nothing on stderr, neither at once nor at exit."""
    process = subprocess.Popen(
        [sys.executable, "-m", "embedft", "info", "model"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 1
    process.stderr.close()


@pytest.mark.parametrize(("redirect", "fault"), [(">&-", "closed"), ("> /dev/full", os.strerror(errno.ENOSPC))])
def test_an_output_that_takes_nothing_is_an_error_of_one_line(place, redirect, fault):
    done = subprocess.run(f"{sys.executable} -m embedft info model {redirect}", shell=True, capture_output=True)
    assert done.returncode == 2
    (line,) = done.stderr.decode().splitlines()
    assert line.startswith("embedft info: error: ")
    assert names(line, "output", fault)


INFO = """
import errno, os, sys
from embedft import cli
from embedft.commands import info

def run(options):
    {}

info.run = run
sys.exit(cli.main(["info", "model"]))
"""


@pytest.mark.parametrize("code", ["ENOMEM", "ENOSPC", "EPIPE"])
def test_another_error_without_a_file_leaves_the_output_alone(code):
    """Such an error may be that of a socket, or of a process that cannot be started."""
    script = INFO.format(f"print('one'); raise OSError(errno.{code}, os.strerror(errno.{code}))")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "one\n", 1)
    assert names(done.stderr, "embedft info", os.strerror(getattr(errno, code)))
    assert "output" not in done.stderr


@pytest.mark.parametrize("flags", [[], ["-u"]])
def test_an_output_that_takes_no_long_text_names_itself(flags):
    script = INFO.format("print('x' * 100_000)")
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, *flags, "-c", script], stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert names(done.stderr, "standard output", os.strerror(errno.ENOSPC))


def test_a_warning_of_an_import_is_one_line(place, capsys, monkeypatch):
    real, shown = importlib.import_module, []

    def warning(*arguments):
        shown.append(warnings.formatwarning("old library", UserWarning, "torch.py", 3))
        return real(*arguments)

    monkeypatch.setattr(importlib, "import_module", warning)
    assert main(["info", "--help"]) == 0
    assert shown == ["embedft info: warning: old library\n"]


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_characters_that_the_output_lacks_are_replaced(place, encoding):
    write_prompts(place / "model", {"query": "検索: ", "document": "≥ "})
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    command = [sys.executable, "-m", "embedft", "info", "model"]
    done = subprocess.run(command, env=environment, capture_output=True, check=True)
    lines = dict(line.split(maxsplit=1) for line in done.stdout.decode(encoding).splitlines())
    assert lines["prompts"] == r"query: '\u691c\u7d22: ', document: '\u2265 '"
    assert "device" in lines  # which is the last one


def test_interrupted_during_an_import(place):
    """NumPy and torch would print a page of advice, or abort."""
    script = """
import os, signal, sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            os.kill(os.getpid(), signal.SIGINT)

signal.signal(signal.SIGINT, signal.default_int_handler)
sys.meta_path.insert(0, Finder())
from embedft.cli import main
sys.exit(main(["info", "model"]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (130, "", 1)
    assert names(done.stderr, "info", "interrupted")


def test_batch_size_and_parameters_of_an_api(place):
    with ApiServer() as server:
        options = ["--batch-texts", "3", "--parameters", "user=x", "--parameters.truncate", "true"]
        arguments = ["encode", "openai:m", "words.txt", "--out", "a.npy", "--base-url", server.base_url, *options]
        (place / "words.txt").write_text("a\nb\nc\nd")
        assert main(arguments) == 0
        sent = [request for kind, _, request in server.log if kind == "embeddings"]
    assert sorted(len(request["input"]) for request in sent) == [1, 3]
    assert {(request["user"], request["truncate"]) for request in sent} == {("x", True)}


# Prompts.


def write_prompts(folder, prompts: dict[str, str]) -> None:
    (folder / "config_sentence_transformers.json").write_text(json.dumps({"prompts": prompts}))


def test_prompts_by_text_or_by_name(place, capsys):
    write_prompts(place / "model", {"passage": "the ", "query": "what "})
    shown = {}
    for options in ([], ["--document-prompt", "passage"], ["--query-prompt", "order ", "--document-prompt", ""]):
        assert main(["info", "model", *options]) == 0
        rows = dict(re.split("  +", line, maxsplit=1) for line in capsys.readouterr().out.splitlines())
        shown[" ".join(options)] = (rows["prompts"], rows.get("other prompts"))
    assert list(shown.values()) == [
        ("query: 'what ', document: 'the '", None),
        ("query: 'what ', document: 'the '", None),
        ("query: 'order '", "passage: 'the '"),
    ]
    main(["encode", "model", "texts.txt", "--out", "a.npy", "--document-prompt", "passage"])
    expected = load_embedder("model", device="cpu", prompts={"document": "the "}).encode(TEXTS)
    np.testing.assert_array_equal(np.load("a.npy"), expected)
    main(["finetune", "model", "pairs.json", "--out", "run", "--epochs", "1", "--document-prompt", "passage"])
    assert load_embedder("run/model", device="cpu").prompt("document") == "the "


# Users' errors.


@pytest.mark.parametrize(
    ("arguments", "facts"),
    [
        ("", ("missing", "COMMAND", "chunk", "info")),
        ("fintune", ("command", "'fintune'", "finetune", "chunk", "info")),
        ("info", ("missing", "MODEL")),
        ("info model more", ("argument", "'more'")),
        ("info model --loss.temperature 1", ("option", "--loss.temperature")),
        ("info ./missing", ("./missing", "folder")),
        ("info full", ("full", "config.json")),
        ("info model --device toaster", ("--device", "'toaster'", ..., "cpu")),
        ("info model --device cuda:99", ("--device", "'cuda:99'", ..., "cpu")),
        ("encode model missing.txt --out x.npy", ("missing.txt", os.strerror(errno.ENOENT))),
        ("encode model bad.jsonl --out x.npy", ("bad.jsonl", 2, "string", "object", "`text`")),
        ("encode model texts.txt --out x.bin", ("--out", "x.bin", ".npy")),
        ("encode model texts.txt --out file/x.npy", ("file/x.npy", "written")),
        ("encode model texts.txt", ("vectors", "--out", "--store")),
        ("encode model texts.txt --out x.npy --role judge", ("role", "'judge'", "'query'", "'document'")),
        ("encode model texts.txt --out x.npy --dim 33", ("dim", 33, 1, 32)),
        ("encode model texts.txt --out x.npy --max-length 49", ("model", "--max-length", 49, 48)),
        ("encode model texts.txt --out x.npy --max-length 2", ("model", "--max-length", 2, 2, "special")),
        ("evaluate model missing.json", ("missing.json", "file", "folder")),
        ("evaluate model file", ("file", "suffix", ".json", ".tsv")),
        ("evaluate model pairs.json --passages 12,6", ("--passages", ["12,6"], "blanks", "commas")),
        ("evaluate model pairs.json --metrics mrr@10,map@10", ("metric", "'mrr@10,map@10'", "blanks", "commas")),
        ("chunk pairs.json,texts.txt --out c", ("pairs.json,texts.txt", "blanks", "commas")),
        ("evaluate model a.pdf", ("a.pdf", "documents", "`embedft chunk`", "`embedft questions`")),
        ("finetune model a --out r", ("a", "documents", "`embedft chunk`", "`embedft questions`")),
        ("mine model chunks.jsonl --out r.jsonl", ("chunks.jsonl", "chunks", "`embedft questions`")),
        ("finetune model chunks --out r", ("chunks", "chunks", "`embedft questions`")),
        ("finetune model pairs.json --validation chunks --out r", ("chunks", "chunks", "`embedft questions`")),
        ("search model a.pdf x", ("a.pdf", "documents", "`embedft chunk`")),
        ("search model a x", ("a", "documents", "`embedft chunk`")),
        ("evaluate model a.pdf --format csv", ("a.pdf", 1, "column", "query")),
        ("evaluate model pairs.json --ks 0", ("ks", (0,), 1, 100)),
        ("evaluate model pairs.json --ks five", ("ks", ["five"], "list", "int")),
        ("evaluate model pairs.json --depth 9", ("ks", (1, 3, 5, 10), "depth", 9)),
        ("evaluate model pairs.json --out file/eval", ("file/eval", "written")),
        ("evaluate model pairs.json --out=file", ("file", ..., "written")),
        ("finetune model pairs.json", ("missing", "--out")),
        ("finetune ./missing pairs.json --out r", ("./missing", "folder")),
        ("finetune model missing.json --out r", ("missing.json", "file", "folder")),
        ("finetune model pairs.json --out r --validation no.json", ("no.json", "file", "folder")),
        ("finetune model pairs.json --out file/r", ("file/r", "written")),
        ("finetune model pairs.json --out full", ("full", "empty", "--overwrite", "--resume")),
        ("finetune model pairs.json --out full --overwrite", ("full", "run", "config.json")),
        ("finetune model pairs.json --out r --overwrite --resume", ("--overwrite", "--resume")),
        ("finetune model pairs.json pairs.jsonl --out r", ("pairs.jsonl", "pairs.json", "'pairs'", "NAME=DATA")),
        ("finetune model pairs.json no=missing.json --out r", ("missing.json", "file", "folder")),
        ("finetune model pairs.json --out r --sampling round_robin", ("sampling", "'round_robin'", "one", "dataset")),
        ("finetune model pairs.json --out r --epochs many", ("epochs", "'many'", "int")),
        ("finetune model pairs.json --out r --epochs 0", ("epochs", 0, 1)),
        ("finetune model pairs.json --out r --epoch 1", ("option", "--epoch", "--epochs")),
        ("finetune model pairs.json --out r --lr nan", ("lr", "nan", 0)),
        ("finetune model pairs.json --out r --lr NaN", ("lr", "nan", 0)),
        ("finetune model pairs.json --out r --loss.temperature", ("--loss.temperature", "one", "argument")),
        ("finetune model pairs.json --out r --loss.temperature 0", ("temperature", 0, 0, "finite")),
        ("finetune model pairs.json --out r --loss.temp 1", ("in_batch_negatives", "'temp'", "temperature", "rows")),
        ("finetune model pairs.json --out r --loss.name mnrl", ("loss", "'mnrl'", "in_batch_negatives")),
        ("finetune model pairs.json --out r --lss.name mnrl", ("option", "--lss.name", "--loss")),
        ("finetune model pairs.json --out r --config file", ("file", 1, 1, "JSON")),
        ("finetune model pairs.json --out r --num_negatives 1", ("--num-negatives", 1, 0)),
        ("finetune model pairs.json --out r --max_length 49", ("--max-length", 49, 48)),
        (
            "finetune model pairs.json --out r --validation pairs.json --select ndcg@ten",
            ("select", "'ndcg@ten'", 1, "ndcg@10"),
        ),
    ],
)
def test_an_error_is_one_line_and_exit_code_2(place, capsys, arguments, facts):
    (place / "full" / "folder").mkdir(parents=True)
    (place / "file").write_text("")
    (place / "bad.jsonl").write_text('"a"\n{"txt": "b"}\n')
    for name, content in (("a.pdf", "%PDF-1.4\n"), ("chunks.jsonl", '{"id": "c", "text": "a b"}\n')):
        (place / name).write_text(content)
        (folder := place / name.partition(".")[0]).mkdir()
        (folder / name).write_text(content)
    before = sorted(place.rglob("*"))
    code, output = main(arguments.split()), capsys.readouterr()
    assert code == 2
    assert output.out == ""
    command = arguments.partition(" ")[0]
    assert output.err.startswith(f"embedft {command}: error: " if command in COMMANDS else "embedft: error: ")
    assert names(output.err, *facts)
    assert output.err.count("\n") == 1
    assert output.err.endswith("\n")
    assert sorted(place.rglob("*")) == before


def test_a_run_that_diverges_is_an_error_of_one_line(place, capsys):
    arguments = "finetune model pairs.json --out run --lr 1e38 --max_grad_norm 1e38 --epochs 3"
    assert main(arguments.split()) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    places = itertools.product((1, 2, 3), ("loss", "norm"), ("nan", "inf"))
    assert any(names(error, "finetune", "step", *facts) for facts in places)
    assert read_json("run/config.json")["lr"] == 1e38


def test_control_characters_in_an_error_are_shown_and_not_sent_to_the_terminal(place, capsys):
    assert main(["finetune", "model", "pairs.jsonl", "--out", "run", "--loss.name", "\x1b[31mred\x07"]) == 2
    assert "\\x1b[31mred\\x07" in capsys.readouterr().err.replace("\\\\", "\\")
    assert main(["info", "no\x1b[31m"]) == 2
    assert "no\\x1b[31m" in (error := capsys.readouterr().err)
    assert "\x1b" not in error


def test_interrupted(place, capsys, monkeypatch):
    def interrupted(options):
        raise KeyboardInterrupt

    monkeypatch.setattr("embedft.commands.info.run", interrupted)
    assert main(["info", "model"]) == 130
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert names(error, "info", "interrupted")


@pytest.mark.parametrize("when", ["load_training_data", "train"])
def test_an_interrupted_run_says_how_it_goes_on(place, capsys, monkeypatch, when):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    command = ["finetune", "model", "pairs.jsonl", "--epochs", "1", "--out", "run"]
    with monkeypatch.context() as patch:
        patch.setattr(
            "embedft.recipe.finetune.train" if when == "train" else f"embedft.commands.finetune.{when}", interrupted
        )
        assert main(command) == 130
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert names(error, "finetune", "interrupted")
    assert names(error, "run", "--resume") == (when == "train")
    assert main([*command, "--resume"]) == 0


def test_what_is_a_bug_keeps_its_traceback(place, monkeypatch):
    def broken(options):
        raise TypeError("bug")

    monkeypatch.setattr("embedft.commands.info.run", broken)
    with pytest.raises(TypeError, match=naming("bug")):
        main(["info", "model"])


# Help.


def help_of(capsys, *command: str) -> str:
    assert main([*command, "--help"]) == 0
    return capsys.readouterr().out


def test_help_lists_every_command(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    text = help_of(capsys)
    for name, meaning in COMMANDS.items():
        assert re.search(rf"^  {name}\s+{meaning}$", text, re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_explains_every_option(capsys, monkeypatch, command):
    """Option names are indented by two columns; their help follows on the same line, or indented on the next."""
    monkeypatch.setenv("COLUMNS", "160")
    text = help_of(capsys, command).partition("\n--examples: ")[0]
    entries = re.split(r"\n  (?=\S)", text)[1:]
    explained = {entry.split()[0]: re.search(r"(?:  |\n)\s*(\S.*)", entry) for entry in entries}
    assert None not in explained.values(), explained
    options = importlib.import_module(f"embedft.commands.{command}").Options
    for field in fields(options):
        name = f"--{field.name.replace('_', '-')}"
        name = field.metadata["metavar"] if field.metadata["positional"] else name
        assert {name, name.replace("--", "--[no-]", 1)} & explained.keys(), name


def test_a_beir_folder_trains_on_train_and_validates_on_test(place, capsys, monkeypatch):
    dataset = make_dataset()
    dataset.save(place / "beir")
    first, *rows = (place / "beir" / "qrels" / "test.tsv").read_text().splitlines(keepends=True)
    (place / "beir" / "qrels" / "test.tsv").write_text("".join([first, *rows[8:]]))
    (place / "beir" / "qrels" / "train.tsv").write_text("".join([first, *rows[:8]]))
    seen = {}

    def spy(embedder, dataset, config, *, validation, out, existing):
        seen.update(train=list(dataset.queries), validation=list(validation.queries))
        raise ValueError("seen")

    monkeypatch.setattr(embedft, "finetune", spy)
    assert main(["finetune", "model", "beir", "--validation", "beir", "--out", "run"]) == 2
    assert seen == {"train": list(dataset.queries)[:8], "validation": list(dataset.queries)[8:]}
    more = ["--split", "test", "--validation-split", "train"]
    assert main(["finetune", "model", "beir", "--validation", "beir", "--out", "run", *more]) == 2
    assert seen == {"train": list(dataset.queries)[8:], "validation": list(dataset.queries)[:8]}
    assert main(["evaluate", "model", "beir", "--split", "train", "--json"]) == 0


def test_strict_refuses_judgements_of_what_is_missing(tmp_path):
    path = tmp_path / "qa.json"
    path.write_text(
        json.dumps({"queries": {"q": "who?"}, "corpus": {"d": "me"}, "relevant_docs": {"q": ["d", "gone"]}})
    )
    with pytest.warns(UserWarning, match=naming(path, "relevant_docs", "'gone'", 1)):
        assert load_data(str(path), Data()).missing == {"q": {"gone": 1}}
    with pytest.raises(ValueError, match=naming(path, "relevant_docs", "'gone'", 1)):
        load_data(str(path), Data(strict=True))


@pytest.mark.parametrize(
    ("given", "found"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "passive"}, None)],
)
def test_threads_spin_less_long_unless_the_user_says_how_they_wait(given, found):
    script = "import os, sys; from embedft.cli import main; main(['--help'])"
    script += "; assert 'torch' not in sys.modules; print(os.environ.get('GOMP_SPINCOUNT'))"
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    done = subprocess.run([sys.executable, "-c", script], env={**environment, **given}, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == str(found), done.stderr
