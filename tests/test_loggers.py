"""Loggers in run_folder.py: TensorBoard and W&B (stubs here) get the records of train.jsonl; neither is required."""

import json
import sys
import types

import pytest
from naming import naming
from tiny import make_dataset, make_embedder

from embedft import FinetuneConfig, finetune
from embedft.training.run_folder import check_logger, open_logger

CONFIG = {"epochs": 1, "batch_size": 4, "loss": {"name": "learnable_temperature"}}


@pytest.fixture
def calls(monkeypatch):
    """What the stubs are called with."""
    found = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            found.append((folder, purge_step))

        def add_scalar(self, name, value, step):
            found.append((name, value, step))

        def flush(self):
            pass

    class Run:
        def log(self, values, step):
            found.extend((name, value, step) for name, value in values.items())

    def init(**options):
        found.append(options)
        return Run()

    tensorboard, wandb = types.ModuleType("torch.utils.tensorboard"), types.ModuleType("wandb")
    tensorboard.SummaryWriter, wandb.init = SummaryWriter, init
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", tensorboard)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    return found


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_training_is_logged(tmp_path, calls, name):
    data, out = make_dataset(), tmp_path / "run"
    finetune(make_embedder(tmp_path / "base"), data, FinetuneConfig(**CONFIG, log=name), validation=data, out=out)
    if name == "tensorboard":
        assert calls[0] == (str(out / "tensorboard"), 0)
    else:
        assert (calls[0]["dir"], calls[0]["name"], calls[0]["resume"]) == (str(out), "run", "allow")
    records = [json.loads(line) for line in (out / "train.jsonl").read_text().splitlines()]
    logged = {(key, step): value for key, value, step in calls[1:]}
    for record in records:
        if "metrics" in record:
            assert logged["metrics/ndcg@10", record["step"]] == record["metrics"]["ndcg@10"]
        else:
            assert logged["loss", record["step"]] == record["loss"]
            assert logged["components/temperature", record["step"]] == record["components"]["temperature"]


def test_a_run_is_recognised_by_its_folder_and_start(tmp_path, calls):
    for start in ("one", "one", "two"):
        (tmp_path / "environment.json").write_text(start)
        open_logger("wandb", tmp_path, resumed_at=0)
    first, again, other = (call["id"] for call in calls)
    assert first == again != other


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_logger_that_is_not_installed_is_found_before_work(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=naming("log", f"'{name}'", "pip", name, name)):
        finetune(make_embedder(tmp_path / "base"), make_dataset(), FinetuneConfig(log=name), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    check_logger(None, None)


def test_a_logger_needs_a_run_folder(tmp_path):
    with pytest.raises(ValueError, match=naming("log", "wandb", "out")):
        finetune(make_embedder(tmp_path / "base"), make_dataset(), FinetuneConfig(log="wandb"))
    with pytest.raises(ValueError, match=naming("log", "mlflow", "tensorboard", "wandb", "null")):
        FinetuneConfig(log="mlflow")
