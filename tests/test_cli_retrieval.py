"""`embedft evaluate` and `embedft compare` by `main`, beside the functions they stand for."""

import csv
import dataclasses
import io
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from api_server import ApiServer
from naming import names, naming
from test_tables import make_report
from tiny import make_dataset, make_embedder

from embedft import Report, bm25_run, compare, evaluate, evaluate_run, fuse, load_embedder
from embedft.cli import main
from embedft.commands.compare import short_names
from embedft.retrieval.evaluate import evaluate_grid
from embedft.retrieval.report import compare_seeds
from embedft.retrieval.tables import format_comparisons, format_grid, format_reports


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working directory with a model and data."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EMBEDFT_PROGRESS", "0")
    monkeypatch.setattr("embedft.encoders.loading.default_device", lambda: torch.device("cpu"))
    make_embedder(tmp_path / "model")
    make_dataset().save("pairs.json")
    return tmp_path


def run(capsys, arguments: str) -> str:
    """What a command that succeeds prints."""
    assert main(arguments.split()) == 0
    return capsys.readouterr().out


def bm25_report(embedder, how: dict | None = None, **cutoffs) -> Report:
    return evaluate_run(
        bm25_run(make_dataset(), tokenize=embedder.tokenize, depth=cutoffs.get("depth", 100), **(how or {})),
        make_dataset(),
        **cutoffs,
    )


# evaluate: one setting.


def test_evaluate(place, capsys):
    embedder = make_embedder(place / "model")
    report, bm25 = evaluate(embedder, make_dataset()), bm25_report(embedder)
    table = format_reports({"model": report, "bm25": bm25}, style="text")
    assert run(capsys, "evaluate model pairs.json --out eval") == f"model: {report}\n\n{table}\n"
    assert [line.split()[0] for line in table.splitlines()] == ["report", "model", "bm25"]
    assert Report.load("eval").metrics == report.metrics
    saved = Report.load("eval/bm25")
    assert (saved.metrics, saved.run.to_dict()) == (bm25.metrics, bm25.run.to_dict())
    assert (saved.setting["index"], saved.setting["tokens"]) == ("bm25", "the encoder's")
    assert {path.name for path in (place / "eval").iterdir()} == {"metrics.json", "per_query.jsonl", "run.trec", "bm25"}


def test_a_report_is_replaced_on_request_and_nothing_of_it_stays(place, capsys):
    run(capsys, "evaluate model pairs.json --fuse --out eval")
    (place / "eval" / "fused" / "notes.txt").write_text("mine")
    check_error(capsys, "evaluate missing-model pairs.json --no-bm25 --out eval", "eval", "--overwrite")
    run(capsys, "evaluate model pairs.json --no-bm25 --overwrite --out eval")
    found = sorted(str(path.relative_to(place / "eval")) for path in (place / "eval").rglob("*") if path.is_file())
    assert found == ["fused/notes.txt", "metrics.json", "per_query.jsonl", "run.trec"]
    assert not (place / "eval" / "bm25").exists()
    # A report that another command wrote into a folder of --out is not this evaluation's to remove.
    run(capsys, "evaluate model pairs.json --out eval/mine")
    run(capsys, "evaluate model pairs.json --no-bm25 --overwrite --out eval")
    assert all((place / "eval" / "mine" / name / "metrics.json").is_file() for name in (".", "bm25"))
    (place / "eval" / "mine" / "metrics.json").write_text("{")
    run(capsys, "evaluate model pairs.json --overwrite --out eval")
    assert (place / "eval" / "mine" / "metrics.json").read_text() == "{"
    run(capsys, "evaluate model pairs.json --no-bm25 --out eval/dim32-float32-flat-baseline")
    run(capsys, "evaluate model pairs.json --no-bm25 --overwrite --out eval")
    assert (place / "eval" / "dim32-float32-flat-baseline" / "metrics.json").is_file()
    run(capsys, "evaluate model pairs.json --dims 32 8 --out grid")
    check_error(capsys, "evaluate model pairs.json --out grid", "grid/bm25", "--overwrite")
    check_error(capsys, "evaluate model pairs.json --overwrite", "--overwrite", "--out")


def test_a_setting_whose_report_cannot_be_read_is_replaced_on_request_only(place, capsys):
    path = place / "grid" / "dim8-float32-flat" / "metrics.json"
    path.parent.mkdir(parents=True)
    for content in ("{", "[]", "{}"):
        path.write_text(content)
        arguments = "evaluate missing-model pairs.json --dims 32 8 --out grid"
        check_error(capsys, arguments, "grid/dim8-float32-flat", "--overwrite")
        assert path.read_text() == content
    run(capsys, "evaluate model pairs.json --dims 32 8 --overwrite --out grid")
    assert Report.load(path.parent).setting["dim"] == 8


def test_a_single_setting_replaces_every_setting_of_a_grid(place, capsys):
    grid = "--passages 8 4 --whole --dims 32 8 --precisions float32 int8 binary --indices flat hnsw,efSearch=20"
    run(capsys, f"evaluate model pairs.json {grid} --out eval")
    assert len(list((place / "eval").iterdir())) == 2 * 2 * 3 * 2 + 1
    run(capsys, "evaluate model pairs.json --no-bm25 --overwrite --out eval")
    assert {path.name for path in (place / "eval").iterdir()} == {"metrics.json", "per_query.jsonl", "run.trec"}


def test_a_metric_by_its_import_path(place, capsys, monkeypatch):
    (place / "by_path.py").write_text("def first(judgments, k): return judgments.grades_QK[:, :k].sum(axis=1)\n")
    monkeypatch.syspath_prepend(place)
    run(capsys, "evaluate model pairs.json --no-bm25 --metrics by_path.first@3 hit_rate@3 --out eval")
    saved = Report.load(place / "eval")
    assert saved.metrics["by_path.first@3"] == saved.metrics["hit_rate@3"]  # one answer each
    assert "by_path.first@3" in run(capsys, "compare eval eval --metric by_path.first@3")


def test_evaluate_without_bm25(place, capsys):
    report = evaluate(make_embedder(place / "model"), make_dataset())
    assert run(capsys, "evaluate model pairs.json --no-bm25 --out eval") == f"model: {report}\n"
    assert (
        run(capsys, "evaluate model pairs.json --no-bm25 --style csv")
        == f"{format_reports({'model': report}, style='csv')}\n"
    )
    assert json.loads(run(capsys, "evaluate model pairs.json --no-bm25 --json")) == report.metrics
    assert not (place / "eval" / "bm25").exists()


@pytest.mark.parametrize("weight", [None, 0.25, 0.0])
def test_evaluate_fuses(place, capsys, weight):
    embedder = make_embedder(place / "model")
    bm25 = bm25_report(embedder)
    dense = evaluate(embedder, make_dataset())
    w = 0.5 if weight is None else weight
    fused = evaluate_run(fuse([bm25.run, dense.run], method="zscore", weights=(w, 1 - w), depth=100), make_dataset())
    option = "" if weight is None else f"--fuse-weight {weight}"
    out = run(capsys, f"evaluate model pairs.json --fuse {option} --style markdown --out eval")
    assert out == format_reports({"model": dense, "bm25": bm25, "fused": fused}) + "\n"
    saved = Report.load("eval/fused")
    assert saved.run.to_dict() == fused.run.to_dict()
    assert (saved.setting["method"], saved.setting["bm25_weight"]) == ("zscore", w)
    if weight is not None:  # the weight is bm25's: 0 leaves what the model found
        assert (saved.metrics == dense.metrics) == (weight == 0)


def test_evaluate_with_pairs_of_tokens(place, capsys):
    embedder, dense = make_embedder(place / "model"), evaluate(make_embedder(place / "model"), make_dataset())
    bm25 = bm25_report(embedder, {"ngram": 2, "k1": 0.5, "b": 1.0})
    assert bm25.metrics != bm25_report(embedder).metrics
    fused = evaluate_run(fuse([bm25.run, dense.run], method="zscore", weights=(0.5, 0.5), depth=100), make_dataset())
    options = "--fuse --bm25-ngram 2 --bm25-k1 0.5 --bm25-b 1"
    out = run(capsys, f"evaluate model pairs.json {options} --style markdown --out eval")
    called = [f"{name} + ngram 2 + k1 0.5 + b 1" for name in ("bm25", "fused")]
    assert out == format_reports({"model": dense, called[0]: bm25, called[1]: fused}) + "\n"
    for name, label, expected in zip(("bm25", "fused"), called, (bm25, fused), strict=True):
        saved = Report.load(f"eval/{name}")
        assert (saved.name, saved.run.to_dict()) == (label, expected.run.to_dict())
        assert [saved.setting[key] for key in ("bm25_ngram", "bm25_k1", "bm25_b")] == [2, 0.5, 1.0]
    # Values at their defaults are not recorded, so that reports from before there were such options say the same.
    run(capsys, "evaluate model pairs.json --bm25-ngram 1 --bm25-b 0.75 --out plain")
    assert not [key for key in Report.load("plain/bm25").setting if key.startswith("bm25_")]
    out = run(capsys, "evaluate model pairs.json --dims 32 8 --metric mrr@3 --bm25-ngram 2 --style csv")
    assert list(csv.reader(io.StringIO(out)))[-1][:3] == ["", "", "bm25 + ngram 2"]


def test_evaluate_as_json(place, capsys):
    embedder = make_embedder(place / "model")
    dense, bm25 = evaluate(embedder, make_dataset()).metrics, bm25_report(embedder).metrics
    assert json.loads(run(capsys, "evaluate model pairs.json --json")) == {**dense, "bm25": bm25}
    found = json.loads(run(capsys, "evaluate model pairs.json --json --fuse"))
    assert list(found)[-2:] == ["bm25", "fused"]
    assert found["fused"].keys() == dense.keys()


def test_evaluate_with_options(place, capsys):
    options = "--dim 8 --ks 2 7 --depth 7 --gain graded --max-length 6 --json"
    found = json.loads(run(capsys, f"evaluate model pairs.json {options}"))
    embedder = load_embedder("model", device="cpu", max_length=6)
    cutoffs = {"ks": (2, 7), "depth": 7, "gain": "graded"}
    report = evaluate(embedder, make_dataset(), dim=8, **cutoffs)
    assert found == {**report.metrics, "bm25": bm25_report(embedder, **cutoffs).metrics}


def test_every_run_is_as_deep_as_asked(place, capsys):
    run(capsys, "evaluate model pairs.json --depth 3 --ks 3 --fuse --out eval")
    deepest = [int((Report.load(f"eval/{name}").run.indices >= 0).sum(axis=1).max()) for name in ("", "bm25", "fused")]
    assert deepest == [3, 3, 3]


def test_evaluate_in_windows(place, capsys):
    report = evaluate(make_embedder(place / "model"), make_dataset(), passages=(6, 2))
    found = json.loads(run(capsys, "evaluate model pairs.json --passages 6 2 --no-bm25 --json"))
    assert found == report.metrics != evaluate(make_embedder(place / "model"), make_dataset()).metrics
    check_error(capsys, "evaluate model pairs.json --passages 6 8", "passages", 8, 1, 6)


def test_windows_of_several_sizes(place, capsys):
    """One --passages is one setting; several are a grid, in folders named after their windows."""
    embedder, dataset = make_embedder(place / "model"), make_dataset()
    report = evaluate(embedder, dataset, passages=(6, 2, 4, 1))
    out = run(capsys, "evaluate model pairs.json --passages 6 2 4 1 --no-bm25 --out eval")
    assert out == f"model + windows 6/2+4/1: {report}\n"
    assert Report.load("eval").metrics == report.metrics
    assert report.metrics not in [evaluate(embedder, dataset, passages=pair).metrics for pair in ((6, 2), (4, 1))]
    grid = "evaluate model pairs.json --passages 6 2 4 1 --passages 6 2 --whole --no-bm25 --overwrite --out eval"
    assert "6/2+4/1" in run(capsys, grid)
    windows = ("", "6-2-", "6-2+4-1-")
    assert {path.name for path in (place / "eval").iterdir()} == {f"{name}dim32-float32-flat" for name in windows}
    assert Report.load("eval/6-2+4-1-dim32-float32-flat").metrics == report.metrics
    run(capsys, "evaluate model pairs.json --no-bm25 --overwrite --out eval")
    assert {path.name for path in (place / "eval").iterdir()} == {"metrics.json", "per_query.jsonl", "run.trec"}
    for words, *facts in (
        ("6 2 4", "--passages", (6, 2, 4), 3),
        ("6 2 6 1", "--passages", (6, 2, 6, 1), 6, "twice"),
        ("6 2 49 1", "passages", 49, 48),
        ("6 2 0 1", "passages", 0, 48),
        ("6 2 4 5", "passages", 5, 4),
    ):
        check_error(capsys, f"evaluate model pairs.json --passages {words}", *facts)


@pytest.mark.parametrize("option", ["--precisions int8", "--indices hnsw", "--dims 8", "--precisions int8 int8"])
def test_one_setting_is_no_grid(place, capsys, option):
    name, value = option.split()[:2]
    key = {"--precisions": "precision", "--indices": "index", "--dims": "dim"}[name]
    expected = evaluate(make_embedder(place / "model"), make_dataset(), **{key: int(value) if key == "dim" else value})
    what = f"dim {value}" if key == "dim" else value
    assert run(capsys, f"evaluate model pairs.json --no-bm25 {option} --out eval") == f"model + {what}: {expected}\n"
    assert Report.load("eval").setting[key] == expected.setting[key]


def test_evaluate_an_api_says_that_bm25_is_over_words(place, capsys, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-0123456789")
    with ApiServer() as server:
        arguments = ["evaluate", "openai:vectors", "pairs.json", "--base-url", server.base_url, "--out", "eval"]
        assert main(arguments) == 0
    output = capsys.readouterr()
    assert names(output.err, "bm25", "words")
    words = evaluate_run(bm25_run(make_dataset()), make_dataset())
    saved = Report.load("eval/bm25")
    assert (saved.setting["tokens"], saved.run.to_dict()) == ("words", words.run.to_dict())


def test_ids_with_whitespace(place, capsys):
    (place / "odd.json").write_text(
        '{"queries": {"a b": "x"}, "corpus": {"c d": "y"}, "relevant_docs": {"a b": ["c d"]}}'
    )
    run(capsys, "evaluate model odd.json --out report")
    assert list(Report.load("report").run.to_dict()["a b"]) == ["c d"]


def test_any_metrics(place, capsys):
    found = json.loads(run(capsys, "evaluate model pairs.json --metrics ndcg@20 rprec map --no-bm25 --json"))
    assert list(found) == ["ndcg@20", "rprec", "map"]
    for metrics in ("judged@9 success@2", "precision@2"):
        out = run(capsys, f"evaluate model pairs.json --dims 32 8 --metrics {metrics} --style csv")
        assert metrics.split()[0] in out.splitlines()[0].split(",")


# evaluate: several.

GRID = "--dims 32 8 --precisions float32 int8 --passages 6 2 --whole"
SETTINGS = {"dims": (32, 8), "precisions": ("float32", "int8"), "passages": (None, (6, 2))}


def test_evaluate_a_grid(place, capsys):
    reports = evaluate_grid(make_embedder(place / "model"), make_dataset(), **SETTINGS)
    out = run(capsys, f"evaluate model pairs.json {GRID} --out eval --no-bm25")
    title, table, legend = out.split("\n\n")
    assert title == "model: 12 queries, ndcg@10; differences from dim32-float32-flat"
    for told in ("each interval", "95% by itself", "Holm", "of exact", "queries/s"):
        assert told in legend

    def without_costs(lines: list[str]) -> list[list[str]]:
        return [re.split("  +", line)[:-3] for line in lines]

    assert without_costs(table.splitlines()) == without_costs(format_grid(reports, style="text").splitlines())
    names = ["dim32-float32-flat", "dim32-int8-flat", "dim8-float32-flat", "dim8-int8-flat"]
    names += [f"6-2-{name}" for name in names]
    assert sorted(path.name for path in (place / "eval").iterdir()) == sorted(names)
    for name, report in zip(names, reports, strict=True):
        saved = Report.load(place / "eval" / name)
        setting = json.loads(json.dumps(report.setting)) | {"model": "model"}  # as the command names it
        assert (saved.metrics, saved.setting) == (report.metrics, setting)


def test_a_grid_has_a_row_of_bm25(place, capsys):
    out = run(capsys, "evaluate model pairs.json --dims 32 8 --metric mrr@3 --style csv --out eval")
    header, *rows = csv.reader(io.StringIO(out))
    assert header[:4] == ["dim", "precision", "index", "mrr@3"]
    assert [row[:3] for row in rows] == [["32", "float32", "flat"], ["8", "float32", "flat"], ["", "", "bm25"]]
    assert rows[2][3] == str(bm25_report(make_embedder(place / "model")).metrics["mrr@3"])
    assert Report.load("eval/bm25").metrics["mrr@3"] == float(rows[2][3])


def test_a_grid_as_json(place, capsys):
    found = json.loads(run(capsys, "evaluate model pairs.json --dims 32 8 --json"))
    reports = evaluate_grid(make_embedder(place / "model"), make_dataset(), dims=(32, 8))
    assert list(found) == ["settings", "bm25"]
    assert [setting["metrics"] for setting in found["settings"]] == [report.metrics for report in reports]
    assert [setting["setting"]["dim"] for setting in found["settings"]] == [32, 8]
    assert found["settings"][0]["costs"].keys() == reports[0].costs.keys()


def test_the_metric_of_a_grid(place, capsys):
    assert "12 queries, ndcg@4;" in run(capsys, "evaluate model pairs.json --dims 32 8 --ks 2 4")
    assert "12 queries, map@100;" in run(capsys, "evaluate model pairs.json --dims 32 8 --metric map@100")


@pytest.mark.parametrize(
    ("arguments", "facts"),
    [
        ("--dim 8 --dims 8 4", ("--dim", "--dims")),
        ("--whole", ("--whole", "--passages")),
        ("--fuse-weight 0.4", ("--fuse-weight", "--fuse")),
        ("--fuse --fuse-weight 1.5", ("--fuse-weight", 1.5, 0, 1)),
        ("--fuse --fuse-weight nan", ("--fuse-weight", "nan", 0, 1)),
        ("--fuse --dims 8 4", ("--fuse", "single", 2)),
        ("--fuse --no-bm25", ("--no-bm25", "--fuse")),
        ("--no-bm25 --bm25-ngram 2", ("--bm25-ngram", "--bm25")),
        ("--bm25-ngram 0", ("--bm25-ngram", 0, 1)),
        ("--bm25-ngram 1.5", ("--bm25-ngram", "'1.5'", "int")),
        ("--bm25-b 1.5", ("--bm25-b", 1.5, 0, 1)),
        ("--bm25-k1 -1", ("--bm25-k1", -1.0, 0)),
        ("--bm25-k1 inf", ("--bm25-k1", "inf", 0)),
        ("--json --style csv", ("--style", "--json")),
        ("--style html", ("style", "'html'", "'text'", "'latex'")),
        ("--metric mrr@3", ("--metric", "several", "one")),
        ("--dims 8 4 --metric mrr@7", ("--metric", "'mrr@7'", "hit_rate@1", "map@100")),
        ("--dims 8 4 --ks 0", ("ks", (0,), 1, 100)),
        ("--dims 33 8", ("--dims", 33, 1, 32)),
        ("--dim 33", ("--dim", 33, 1, 32)),
        ("--precisions int4", ("precisions", ["int4"], "'float32'", "'binary'")),
        ("--indices nothing", ("index", "'nothing'", 32, "flat", "ivfpq")),
        ("--adapter missing", ("missing", "adapter.json")),
    ],
)
def test_errors_of_evaluate(place, capsys, arguments, facts):
    check_error(capsys, f"evaluate model pairs.json --out report {arguments}", *facts)
    assert not (place / "report").exists()


def check_error(capsys, arguments: str, *facts: object) -> None:
    code, output = main(arguments.split()), capsys.readouterr()
    assert (code, output.out) == (2, "")
    assert names(output.err, *facts)
    assert output.err.count("\n") == 1


def test_identical_ids_are_kept_on_request(place, capsys):
    """A query that is in the corpus under its own id finds itself."""
    (place / "own.json").write_text(
        json.dumps({"queries": {"a": "x y"}, "corpus": {"a": "x y", "b": "z"}, "relevant_docs": {"a": ["b"]}})
    )
    arguments = "evaluate model own.json --metrics mrr@10 --json --no-bm25"
    assert json.loads(run(capsys, arguments)) == {"mrr@10": 1.0}
    assert json.loads(run(capsys, f"{arguments} --keep-identical-ids")) == {"mrr@10": 0.5}


# compare.


@pytest.fixture
def reports(place) -> dict[str, Report]:
    """Three reports over the same 8 questions, saved as a run's are, and one over others."""
    ranks = {"base": [1, 2, 4, 0, 1, 9, 3, 2], "tuned": [1, 1, 2, 3, 1, 4, 3, 1], "worse": [2, 4, 0, 0, 2, 9, 5, 0]}
    found = {name: make_report(of_name) for name, of_name in ranks.items()}
    for name, report in found.items():
        report.save(place / "runs" / name / "eval" / "uber")
    make_report([1] * 9).save(place / "runs" / "other" / "eval" / "uber")
    return found


def test_compare(reports, capsys):
    out = run(capsys, "compare runs/base/eval/uber runs/tuned/eval/uber")
    comparison = compare(reports["base"], reports["tuned"])
    table = format_comparisons({"tuned": [comparison]}, base="base", style="text")
    tail = (
        "8 questions in 8 clusters (questions that share a document); differences from base;\n"
        "intervals by bootstrap, p-values by sign flips"
    )
    assert out == f"{table}\n\n{tail}\n"
    assert f"{comparison.difference:+.4f}" in table


def test_compare_several_by_several_metrics(reports, capsys):
    folders = " ".join(f"runs/{name}/eval/uber" for name in reports)
    out = run(capsys, f"compare {folders} --metric mrr@10 hit_rate@1 mrr@10 --style csv")
    by_metric = [
        compare(reports["base"], reports["tuned"], reports["worse"], metric=metric)
        for metric in ("mrr@10", "hit_rate@1")
    ]
    assert by_metric[0][0].num_comparisons == 2
    names = dict(zip(("tuned", "worse"), zip(*by_metric, strict=True), strict=True))
    assert out == format_comparisons(names, base="base", style="csv") + "\n"


def test_compare_names_the_models(place, capsys):
    for place_of, length in (("eval/a", 6), ("eval/b", 5)):
        run(capsys, f"evaluate model pairs.json --no-bm25 --max-length {length} --out {place_of}")
    with pytest.warns(UserWarning, match=naming("max_length", 6, ..., "base", ..., 5, ..., "other")):
        assert "a (model)" in run(capsys, "compare eval/a eval/b")


def test_what_was_evaluated_is_named(place, capsys):
    make_dataset().save("pairs.jsonl")
    assert main(["adapter", "model", "pairs.jsonl", "--out", "fitted", "--epochs", "1"]) == 0
    assert (
        main(["finetune", "model", "pairs.jsonl", "--validation", "pairs.json", "--out", "run", "--epochs", "1"]) == 0
    )
    capsys.readouterr()
    for options, expected in (
        ("--adapter fitted", "model + fitted"),
        ("--passages 6 2 --dim 8", "model + windows 6/2 + dim 8"),
        ("--adapter fitted --precisions int8 --indices hnsw", "model + fitted + int8 + hnsw"),
    ):
        out = run(capsys, f"evaluate model pairs.json {options} --out eval/it --overwrite")
        assert out.startswith(f"{expected}: 12 queries")
        assert f"\n{expected}  " in out  # in the table beside BM25
        tag = expected.replace(" + ", "+").replace(" ", "-")
        assert (place / "eval" / "it" / "run.trec").read_text().splitlines()[0].split()[-1] == tag
        assert Report.load("eval/it").name == expected
        assert Report.load("eval/it/bm25").name == "bm25"
        compared = run(capsys, "compare run/eval/validation-base eval/it eval/it/bm25 run/eval/validation")
        for name in (f"({expected})", "validation (model + fine-tuned)", "validation-base (model)", "it/bm25  "):
            assert name in compared
        assert "p-values are corrected together (Holm)" in compared
    grid = run(capsys, "evaluate model pairs.json --adapter fitted --passages 6 2 --dims 32 8")
    assert grid.startswith("model + fitted: 12 queries")
    assert load_embedder("run/model", device="cpu").adapter is None


def test_compare_refuses_other_questions_under_the_same_ids(place, capsys):
    for seed in (0, 1):
        make_dataset(seed=seed).save(f"{seed}.json")
        run(capsys, f"evaluate model {seed}.json --no-bm25 --out eval/{seed}")
    check_error(capsys, "compare eval/0 eval/1", "eval/1", "questions_sha256", "base", "other")


def test_compare_seeds(reports, capsys):
    folders = " ".join(f"runs/{name}/eval/uber" for name in reports)
    out = run(capsys, f"compare {folders} --seeds --metric mrr@10 hit_rate@1")
    seeds = [reports["tuned"], reports["worse"]]
    expected = [compare_seeds([reports["base"]], seeds, metric=metric) for metric in ("mrr@10", "hit_rate@1")]
    table = format_comparisons({"2 seeds": expected}, base="base", style="text")
    assert out.startswith(f"{table}\n\n8 questions in 8 clusters")
    assert "for new seeds and new questions" in out
    errors = expected[0].question_error, expected[0].seed_error
    assert out.endswith("mrr@10: standard error {:.4f} (questions), {:.4f} (seeds)\n".format(*errors))


def test_compare_a_report_with_itself(reports, capsys):
    out = run(capsys, "compare runs/base/eval/uber runs/base/eval/uber --style csv")
    header, _, row = csv.reader(io.StringIO(out))
    found = dict(zip(header, row, strict=True))
    assert found["report"] == "uber (2)"
    assert [float(found[key]) for key in ("difference", "interval_low", "interval_high", "p_value")] == [0, 0, 0, 1]


def test_compare_draws(reports, capsys, place):
    run(capsys, "compare runs/base/eval/uber runs/tuned/eval/uber --metric mrr@10 ndcg@10 --save-plot figures/a.svg")
    text = (place / "figures" / "a.svg").read_text()
    assert "<!-- base, mrr@10 -->" in text
    assert "<!-- tuned, mrr@10 -->" in text


def test_compare_what_evaluate_wrote(place, capsys):
    run(capsys, "evaluate model pairs.json --fuse --out eval/model")
    out = run(capsys, "compare eval/model eval/model/bm25 eval/model/fused --style csv")
    assert [row[1] for row in csv.reader(io.StringIO(out))][1:] == ["model", "model/bm25", "model/fused"]


@pytest.mark.parametrize(
    ("arguments", "facts"),
    [
        ("runs/base/eval/uber", ("one", "runs/base/eval/uber", "base", "other")),
        ("", ("missing", "DIR")),
        ("runs/base/eval/uber missing", ("missing", ..., "metrics.json")),
        ("runs/base runs/tuned/eval/uber", ("runs/base", "report", "runs/base/eval/uber")),
        ("runs/base/eval runs/tuned/eval/uber", ("runs/base/eval", "report", "runs/base/eval/uber")),
        ("runs/base/eval/uber runs/other/eval/uber", ("runs/other/eval/uber", "questions", 0, 1, ["q8"])),
        ("runs/other/eval/uber runs/tuned/eval/uber runs/few/eval", ("runs/tuned/eval/uber", "questions", 1, ["q8"])),
        ("runs/base/eval/uber runs/few", ("runs/few", "questions", 5, ..., "base", ..., 0, ..., "other")),
        ("runs/base/eval/uber runs/tuned/eval/uber --metric ndcg@7", ("'ndcg@7'", "hit_rate@1", "map@100")),
        ("runs/base/eval/uber runs/damaged", ("runs/damaged/per_query.jsonl", 3, 20, "JSON")),
        ("runs/base/eval/uber runs/corpus", ("runs/corpus", "num_documents", 7, ..., "base", ..., 8, ..., "other")),
        ("runs/base/eval/uber runs/tuned/eval/uber --style exact", ("style", "'exact'", "'text'", "'latex'")),
        ("runs/base/eval/uber runs/tuned/eval/uber --save-plot a.txt", ("'txt'", "svg")),
        ("runs/base/eval/uber runs/tuned/eval/uber --bases 2", ("--bases", 2, 1, "--seeds")),
        ("runs/base/eval/uber runs/tuned/eval/uber runs/worse/eval/uber --bases 2", ("--bases", 2, 1, "--seeds")),
        ("runs/base/eval/uber runs/tuned/eval/uber --seeds", ("--seeds", "base", "two")),
        (
            "runs/base/eval/uber runs/tuned/eval/uber runs/worse/eval/uber --save-plot a.png",
            ("--save-plot", "two", 3),
        ),
    ],
)
def test_errors_of_compare(place, reports, capsys, arguments, facts):
    make_report([1, 2, 3]).save(place / "runs" / "few")
    if "few/eval" in arguments:
        make_report([1, 2, 3]).save(place / "runs" / "few" / "eval")
    reports["base"].save(place / "runs" / "damaged")
    lines = (place / "runs" / "damaged" / "per_query.jsonl").read_text().splitlines(keepends=True)
    (place / "runs" / "damaged" / "per_query.jsonl").write_text("".join([*lines[:2], lines[2][:20]]))
    if "corpus" in arguments:
        for name, number in (("base/eval/uber", 7), ("corpus", 8)):
            dataclasses.replace(reports["base"], setting={"num_documents": number}).save(place / "runs" / name)
    check_error(capsys, f"compare {arguments}", *facts)


def test_compare_without_matplotlib(reports, capsys, monkeypatch, place):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    arguments = "compare runs/base/eval/uber runs/tuned/eval/uber --save-plot a.png"
    check_error(capsys, arguments, "matplotlib", "pip")
    assert not (place / "a.png").exists()


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        (["runs/a/eval/uber", "runs/b/eval/uber"], ["a", "b"]),
        (["a", "b"], ["a", "b"]),
        (["x/a", "y/a"], ["x", "y"]),
        (["a", "a/bm25"], ["a", "a/bm25"]),
        (["runs/a/eval/lyft", "runs/a/eval/uber", "runs/b/eval/uber"], ["a/eval/lyft", "a/eval/uber", "b/eval/uber"]),
        (["a", "a", "./a", "b"], ["a", "a (2)", "a (3)", "b"]),
        (["a/", "a/../b"], ["a", "b"]),
        (["a (3)", "a", "a", "a"], ["a (3)", "a", "a (2)", "a (4)"]),
    ],
)
def test_short_names(folders, names):
    assert short_names(folders) == names


def test_names_are_distinct_parts_of_any_folders():
    rng = np.random.default_rng(0)
    for _ in range(300):
        folders = ["/".join(rng.choice(["a", "b", "a (2)"], rng.integers(1, 4))) for _ in range(rng.integers(2, 6))]
        names = short_names(folders)
        assert len(set(names)) == len(names)
        for name, folder in zip(names, folders, strict=True):
            given_again = re.sub(r" \(\d+\)$", "", name)
            assert any(f"/{part}/" in f"{Path(folder).resolve()}/" for part in (name, given_again))
