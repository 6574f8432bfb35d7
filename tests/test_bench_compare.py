"""benchmarks/compare.py: what is marked, worked by hand, and what is warned of."""

import json
from pathlib import Path

import pytest
from naming import names, naming

from benchmarks.compare import apart, main, mark, parser, read_results


def result(seconds: list[float], *, peer_seconds: list[float] | None = None, **more: object) -> dict:
    row = {"case": "questions", "seconds": seconds, "peak_bytes": more.pop("peak_bytes", 100)}
    if peer_seconds:
        row |= {"peer": "peer 1.0", "peer_seconds": peer_seconds}
    common = {"arguments": {"rounds": 3}, "versions": {"torch": "2.13.0"}, "hardware": {"cpu": "EPYC"}}
    return {"benchmark": "encode", **common, **more, "rows": [row]}


def compared(folder: Path, capsys, old: dict, new: dict, *options: str) -> tuple[list[str], str]:
    """The cells of the only row, and everything printed."""
    for name, content in (("old", old), ("new", new)):
        (folder / f"{name}.json").write_text(json.dumps(content))
    main(parser().parse_args([str(folder / "old.json"), str(folder / "new.json"), *options]))
    text = capsys.readouterr().out
    line = next(line for line in text.splitlines() if line.startswith("| encode"))
    return [cell.strip() for cell in line.strip("|").split("|")], text


def test_ranges_that_do_not_overlap():
    assert apart([1.0, 1.1, 1.2], [1.3, 1.4, 1.5])
    assert apart([1.3, 1.4, 1.5], [1.0, 1.1, 1.2])
    assert not apart([1.0, 1.1, 1.3], [1.3, 1.4, 1.5])
    assert not apart([1.0, 1.5], [2.0, 2.5, 3.0])  # two rounds say too little


def test_only_changes_larger_than_the_percentage_are_marked():
    assert mark([1.00, 1.00, 1.01], [1.04, 1.04, 1.05], 5) == ""  # 1.04 / 1.00: 4%
    assert mark([1.00, 1.00, 1.01], [1.04, 1.04, 1.05], 3) == "slower"
    assert mark([1.00, 1.00, 1.01], [0.90, 0.90, 0.91], 5) == "faster"
    assert mark([1.00, 1.00, 1.30], [1.20, 1.20, 1.20], 5) == ""  # 20%, but the ranges overlap


def test_a_slower_row(tmp_path, capsys):
    cells, text = compared(tmp_path, capsys, result([2.0, 2.0, 2.5]), result([3.0, 4.0, 5.0], peak_bytes=150))
    # Medians 4 / 2; the range is from 3 / 2.5 to 5 / 2.
    assert cells == [
        "encode: questions",
        "2.000 [2.000, 2.500]",
        "4.000 [3.000, 5.000]",
        "2.000 [1.200, 2.500]",
        "seconds",
        "1.50",
        "slower, more memory",
    ]
    assert "of 1 rows, 0.1 would" in text  # 2 / C(6, 3) = 2 / 20
    assert "warning" not in text


def test_times_are_relative_to_the_peer_of_the_same_alternation(tmp_path, capsys):
    # Everything took twice as long in the new run, so nothing changed: 0.5 of the peer's time each time.
    old, new = result([1, 1, 1.1], peer_seconds=[2, 2, 2.2]), result([2, 2, 2.2], peer_seconds=[4, 4, 4.4])
    cells, _ = compared(tmp_path, capsys, old, new)
    assert cells[1:5] == ["0.500 [0.500, 0.500]", "0.500 [0.500, 0.500]", "1.000 [1.000, 1.000]", "peer 1.0"]
    assert cells[-1] == ""
    new["rows"][0]["peer"] = "peer 2.0"  # another peer: seconds
    cells, _ = compared(tmp_path, capsys, old, new)
    assert cells[3:5] == ["2.000 [1.818, 2.200]", "seconds"]
    assert (cells[0], cells[-1]) == ("encode: questions: peer", "slower")


def test_a_row_for_each_peer(tmp_path, capsys):
    old = result([1, 1, 1], peer_seconds=[2, 2, 2])
    old["rows"].append(old["rows"][0] | {"peer": "other 1.0 int8", "peer_seconds": [1, 1, 1]})
    _, text = compared(tmp_path, capsys, old, old)
    assert [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| encode")] == [
        "encode: questions: peer",
        "encode: questions: other int8",
    ]


def test_few_rounds_and_rows_of_one_file(tmp_path, capsys):
    old, new = result([1.0]), result([9.0, 9.0, 9.0])
    new["rows"].append({"case": "chunks", "seconds": [1.0]})
    old["rows"].append({"case": "contexts", "recall": 0.9})
    cells, text = compared(tmp_path, capsys, old, new)
    assert cells[-1] == "too few rounds"
    assert "only in the old file: encode: contexts" in text
    assert "only in the new file: encode: chunks" in text


def test_warnings_of_other_conditions_and_failures(tmp_path, capsys):
    old = result([1, 1, 1])
    new = result([1, 1, 1], versions={"torch": "2.14.0"}, arguments={"rounds": 5, "dtype": "bfloat16"})
    other = {**new, "benchmark": "train"}
    failures = [{"benchmark": "search", "error": "no faiss"}]
    old_file, new_file = ({"results": r} for r in ([old, {**old, "benchmark": "train"}], [new, other]))
    _, text = compared(tmp_path, capsys, old_file, new_file | {"failures": failures})
    warnings = [line for line in text.splitlines() if line.startswith("warning")]
    assert len(warnings) == 3  # rounds may differ
    assert names(warnings[0], "dtype", None, ..., "bfloat16")
    assert names(warnings[1], "torch", "2.13.0", ..., "2.14.0", "encode", "train")
    assert names(warnings[2], "search", "no faiss")


def test_other_files_are_refused(tmp_path):
    (tmp_path / "x.json").write_text("[1]")
    with pytest.raises(ValueError, match=naming(tmp_path / "x.json", "rows", "results")):
        read_results(tmp_path / "x.json")
