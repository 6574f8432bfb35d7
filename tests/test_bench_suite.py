"""benchmarks/suite.py: options, rows, table and JSON of a benchmark of two sleepers."""

import json
import multiprocessing
import os
import signal
import sys
import threading

import numpy as np
import pytest
import torch
from naming import names, naming

from benchmarks import suite
from benchmarks.suite import Row, flops_of, make_parser, matrix_rate, measure, require_close
from benchmarks.workers import Worker, _serve, synchronize
from embedft import load_embedder
from embedft.device import peak_memory_bytes, reset_peak_memory


class Local:
    """Stands in for a `Worker`: takes a known time in this process."""

    device = "cpu"

    def __init__(self, seconds: float):
        self.rate, self.peak_bytes, self.methods = seconds, int(seconds * 2**30), []

    def call(self, method, *arguments) -> None:
        self.methods.append(method)
        self.seconds = self.rate * arguments[0] if method == "work" else 0


class Broken:
    def __init__(self):
        raise ValueError("backend onnx is missing")


class Killed:
    def __init__(self, name: object):
        pass

    def work(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


def sleepers(options) -> list[Row]:
    workers = {"embedft": Local(0.5), **{f"{name} 1.0": Local(2.0) for name in options.peer}}
    rows = measure("sleep", workers, "work", 2, rounds=options.rounds, differences={"slow 1.0": 0.5}, tokens=1_000)
    assert all(worker.methods == [reset_peak_memory, *3 * ["work"]] for worker in workers.values())
    return [*rows, Row("alone", [1.0, 2.0, 3.0], flops=10**9, matrix_flops_per_second=1e9, more={"recall": 0.25})]


def run(monkeypatch, *options: str) -> None:
    parser = make_parser("sleep", "Sleeps.", rounds=2, dtypes=suite.DTYPES, peers=["slow", "slower"])
    monkeypatch.setattr(sys, "argv", ["bench_sleep", *options])
    suite.run(sleepers, parser)


def test_a_benchmark(tmp_path, monkeypatch, capsys):
    run(monkeypatch, "--peer", "slow", "slower", "--json", str(tmp_path / "found.json"))
    found = json.loads((tmp_path / "found.json").read_text())
    slow, slower, alone = found.pop("rows")
    assert (slow["case"], slow["peer"], slow["tokens"], slow["largest_difference"]) == ("sleep", "slow 1.0", 1000, 0.5)
    assert (slower["peer"], slower["seconds"]) == ("slower 1.0", slow["seconds"])
    assert "largest_difference" not in slower
    assert (slow["seconds"], slow["peer_seconds"]) == ([1.0, 1.0], [4.0, 4.0])
    assert (slow["peak_bytes"], slow["peer_peak_bytes"]) == (2**29, 2**31)
    more = {"flops": 10**9, "matrix_flops_per_second": 1e9, "recall": 0.25}
    assert alone == {"case": "alone", "seconds": [1.0, 2.0, 3.0], **more}
    assert (found["benchmark"], found["versions"]["torch"]) == ("sleep", torch.__version__)
    arguments = {"base": found["arguments"]["base"], "device": "cpu", "dtype": "float32", "rounds": 2}
    assert found["arguments"] == {**arguments, "peer": ["slow", "slower"]}
    assert found["hardware"].keys() == {"cpu", "flags", "cores", "threads", "memory"}
    assert {"commit", "dirty", "date"} < found.keys()
    lines = [[cell.strip() for cell in line.split("|")] for line in capsys.readouterr().out.splitlines()]
    table = [dict(zip(lines[0], line, strict=True)) for line in lines[2:5]]
    assert table[2]["GFLOP/s"] == "0"
    assert (table[2]["of matrix products"], table[2]["recall"], table[0]["recall"]) == ("50%", "0.25", "")
    assert table[2]["embedft, s"] == "2.000 [1.000, 3.000]"
    assert (table[0]["peer"], table[0]["peer / embedft"]) == ("slow 1.0", "4.00 [4.00, 4.00]")
    assert (table[0]["tokens/s"], table[0]["peak, GiB"], table[0]["peer's"]) == ("1,000", "0.50", "2.00")


def test_without_a_peer(tmp_path, monkeypatch, capsys):
    run(monkeypatch, "--peer", "none", "--json", str(tmp_path / "found.json"))
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["arguments"]["peer"] == []
    assert found["rows"][0].keys() == {"case", "seconds", "tokens", "peak_bytes"}
    assert "peer" not in capsys.readouterr().out


def test_with_no_option_but_rounds(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench_sleep", "--rounds", "7"])
    suite.run(lambda options: [Row("alone", [1.0])], make_parser("sleep", "", rounds=2, base=False, devices=False))
    assert "7 rounds" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "facts"),
    [
        (("--rounds", "0"), ("--rounds", 0, 1)),
        (("--device", "cuda:99"), ("cuda:99", "cpu")),
        (("--json", __file__ + "/x.json"), (__file__ + "/x.json",)),
    ],
)
def test_options_that_cannot_be(options, facts, monkeypatch, capsys):
    monkeypatch.setattr(suite, "report", lambda *_: pytest.fail("it ran"))
    with pytest.raises(SystemExit):
        run(monkeypatch, *options)
    assert names(capsys.readouterr().err, *facts)


def test_a_contestant_that_does_not_start():
    ours, theirs = multiprocessing.Pipe()
    thread = threading.Thread(target=_serve, args=(theirs, "cpu", Broken, ()))
    thread.start()
    ours.send(("work", ()))
    error, _, _ = ours.recv()
    ours.close()
    thread.join()
    assert names(str(error), "onnx")


def test_a_contestant_that_is_killed(monkeypatch):
    forked = multiprocessing.get_context("fork")  # the usual ones import torch first
    monkeypatch.setattr(multiprocessing, "get_context", lambda _: forked)
    for worker in (Worker(Killed, "peer 1.0"), Worker(Killed, 1)):
        name = "Killed peer 1.0" if worker.name.endswith("1.0") else "Killed"
        for method in ("work", "rest"):  # and once it is dead
            with pytest.raises(ChildProcessError, match=naming(name, method, -9)):
                worker.call(method)
        worker.close()


def test_equal_outputs():
    assert require_close("c", [1.0, 200.0], [1.5, 100.0], 1.0) == 1.0  # relative above 1
    with pytest.raises(ValueError, match=naming("c", "losses", "3.3e-01", "1e-05")):
        require_close("c", 1.0, 1.5, 1e-5, "losses")
    with pytest.raises(ValueError, match=naming("c", "nan")):
        require_close("c", [float("nan")], [1.0], 1e-5)
    with pytest.raises(ValueError, match=naming("c", (2,), (1,))):
        require_close("c", [1.0, 2.0], [1.0], 1e-5)


def test_flops_by_hand(tiny_bert):
    encoder = load_embedder(tiny_bert, device="cpu").encoder
    of_token, of_pair = 2 * 2 * (4 * 32 * 32 + 2 * 32 * 40), 2 * 2 * 2 * 32
    assert flops_of(encoder, [3, 5]) == 8 * of_token + (9 + 25) * of_pair


def test_matrix_rates(monkeypatch):
    monkeypatch.setattr(suite, "batch_tokens", lambda device: 64)
    assert all(matrix_rate("cpu", dtype) > 1e6 for dtype in ("float32", "bfloat16"))

    def missing(*given):
        raise NotImplementedError

    monkeypatch.setattr(torch, "_int_mm", missing)
    assert matrix_rate("cpu", "int8") is None


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_peak_is_forgotten():
    block = np.ones(256 << 20, dtype=np.uint8)
    high = peak_memory_bytes("cpu")
    del block
    reset_peak_memory("cpu")
    assert peak_memory_bytes("cpu") < high - (200 << 20)


def test_other_devices_are_waited_for_and_asked_for_their_memory(monkeypatch):
    """Stand-ins: no such device is here."""
    asked = []
    monkeypatch.setattr(torch.accelerator, "synchronize", asked.append)
    synchronize("cpu")
    synchronize("cuda:1")
    assert asked == [torch.device("cuda:1")]
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 7)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", asked.append)
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 8)
    assert [peak_memory_bytes(device) for device in ("cuda:1", "mps")] == [7, 8]
    reset_peak_memory("cuda:1")
    assert asked[1:] == ["cuda:1"]


def test_published_data(tmp_path):
    (tmp_path / "finance_qa").mkdir()
    (tmp_path / "finance_qa" / "Financial-QA-10k.csv").touch()
    for given in (tmp_path, tmp_path / "finance_qa"):
        assert suite.published("finance_qa", str(given)) == tmp_path / "finance_qa"
    with pytest.raises(FileNotFoundError, match=naming("--data")):
        suite.published("lyft_uber", str(tmp_path))
