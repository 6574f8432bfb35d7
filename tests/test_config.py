"""config.py: one dataclass, its options and its JSON; what is not in it is refused."""

import argparse
import json
from dataclasses import dataclass, fields
from typing import Any, Literal

import pytest

from embedft import FinetuneConfig
from embedft.config import (
    add_options,
    check_types,
    config_from_options,
    from_dict,
    parse,
    setting,
    to_dict,
)


@dataclass(frozen=True)
class Config:
    epochs: int = setting(3, "passes over the data")
    lr: float = setting(5e-5, "at its highest, 100% of it")
    schedule: Literal["linear", "cosine"] = setting("linear", "of the learning rate")
    eval_every: int | None = setting(None, "steps")
    fused: bool = setting(False, "one kernel")
    select: str = setting("ndcg@10", "the metric")
    loss: dict[str, Any] = setting({"name": "plain", "inner": {"depth": 1}}, "name and options")

    def __post_init__(self):
        check_types(self)
        if self.epochs < 1:
            raise ValueError(f"epochs is {self.epochs}, expected at least 1")


def parsed(*arguments: str) -> Config:
    """The configuration of a command line with a positional and an option of its own."""
    parser = argparse.ArgumentParser()
    parser.add_argument("data")
    parser.add_argument("--out")
    add_options(parser, Config)
    return config_from_options(Config, parse(parser, arguments))


# Dictionaries and JSON.


@pytest.mark.parametrize("config", [Config(), Config(7, 1, "cosine", 10, True, "a", {"name": "x"})])
def test_round_trip(config):
    assert from_dict(Config, json.loads(json.dumps(to_dict(config)))) == config
    assert list(to_dict(config)) == [field.name for field in fields(Config)]  # defaults included


def test_round_trip_of_the_real_one():
    config = FinetuneConfig(epochs=1, warmup=0.1, loss={"name": "in_batch_negatives", "temperature": 0.1})
    assert from_dict(FinetuneConfig, json.loads(json.dumps(to_dict(config)))) == config


def test_what_is_missing_keeps_its_default():
    assert from_dict(Config, {"lr": 1.0}) == Config(lr=1.0)


def test_a_default_that_is_a_dict_is_nobodys_to_change():
    Config().loss["name"] = "changed"
    to_dict(Config())["loss"]["inner"]["depth"] = 9
    assert Config().loss["name"] == "plain"
    assert Config().loss["inner"]["depth"] == 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"epoch": 1},
            "run.json: unknown key 'epoch', expected one of epochs, lr, schedule, eval_every, fused, select",
        ),
        ({"epochs": 1.0}, "run.json: epochs is 1.0, expected int"),
        ({"epochs": "1"}, "run.json: epochs is '1', expected int"),
        ({"epochs": True}, "run.json: epochs is True, expected int"),
        ({"epochs": None}, "run.json: epochs is None, expected int"),
        ({"epochs": 0}, "run.json: epochs is 0, expected at least 1"),
        ({"lr": False}, "run.json: lr is False, expected float"),
        ({"lr": "1"}, "run.json: lr is '1', expected float"),
        ({"schedule": "step"}, "run.json: schedule is 'step', expected one of 'linear', 'cosine'"),
        ({"schedule": ["linear"]}, r"run.json: schedule is \['linear'\], expected one of 'linear', 'cosine'"),
        ({"eval_every": "no"}, "run.json: eval_every is 'no', expected int or null"),
        ({"fused": 1}, "run.json: fused is 1, expected bool"),
        ({"select": 10}, "run.json: select is 10, expected str"),
        ({"loss": "plain"}, "run.json: loss is 'plain', expected dict"),
        ([1], "run.json: list found, expected an object"),
    ],
)
def test_refuses_what_is_not_in_it(values, message):
    with pytest.raises(ValueError, match=message):
        from_dict(Config, values, where="run.json")


def test_check_types():
    with pytest.raises(ValueError, match="select is 5, expected str"):
        Config(select=5)


# The command line.


@pytest.mark.parametrize(
    ("arguments", "changes"),
    [
        ((), {}),
        (("--epochs", "7", "--lr=1"), {"epochs": 7, "lr": 1}),
        (("--lr", "2e-5"), {"lr": 2e-5}),
        (("--eval_every", "null"), {"eval_every": None}),
        (("--eval_every", "None"), {"eval_every": None}),
        (("--fused", "true"), {"fused": True}),
        (("--fused", "True"), {"fused": True}),
        (("--schedule", "cosine"), {"schedule": "cosine"}),
        (("--select", "10"), {"select": "10"}),  # a text stays one
        (("--loss.temperature", "0.05"), {"loss": {"name": "plain", "inner": {"depth": 1}, "temperature": 0.05}}),
        (("--loss.temperature=0.05",), {"loss": {"name": "plain", "inner": {"depth": 1}, "temperature": 0.05}}),
        (("--loss.margin", "-0.5"), {"loss": {"name": "plain", "inner": {"depth": 1}, "margin": -0.5}}),
        (("--loss.inner.depth", "2"), {"loss": {"name": "plain", "inner": {"depth": 2}}}),
        (("--loss.new.deep", "x=y"), {"loss": {"name": "plain", "inner": {"depth": 1}, "new": {"deep": "x=y"}}}),
        (("--loss.name", "other", "--loss.x=[1, 2]"), {"loss": {"name": "other", "inner": {"depth": 1}, "x": [1, 2]}}),
        (("--loss", '{"name": "y"}', "--loss.z", "1"), {"loss": {"name": "y", "z": 1}}),
        (("--loss.a", "1", "--loss.a", "2"), {"loss": {"name": "plain", "inner": {"depth": 1}, "a": 2}}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("before", [True, False])
def test_options(arguments, changes, before):
    """Wherever they stand: before the positional argument, or behind it."""
    assert parsed(*((*arguments, "d.csv") if before else ("d.csv", *arguments))) == Config(**changes)


def test_a_file_and_options_that_override_it(tmp_path):
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"epochs": 5, "lr": 1.0, "loss": {"name": "other", "a": 1, "b": 2}}))
    config = parsed("d.csv", "--config", str(path), "--epochs", "6", "--loss.b", "3")
    assert config == Config(epochs=6, lr=1.0, loss={"name": "other", "a": 1, "b": 3})
    # What to_dict wrote is such a file.
    path.write_text(json.dumps(to_dict(config)))
    assert parsed("d.csv", "--config", str(path)) == config


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"epoch": 5}', "run.json: unknown key 'epoch', expected one of epochs"),
        ('{"epochs": 0}', "run.json: epochs is 0, expected at least 1"),
        ('{"epochs": ', "run.json line 1 column 12: invalid JSON"),
        ("[]", "run.json: list found, expected an object"),
    ],
)
def test_a_wrong_file_is_named(tmp_path, content, message):
    path = tmp_path / "run.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        parsed("d.csv", "--config", str(path), "--epochs", "6")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--epochs", "many"), "command line: epochs is 'many', expected int"),
        (("--epochs", "0"), "command line: epochs is 0, expected at least 1"),
        (("--loss", "other"), "command line: loss is 'other', expected dict"),
        (("--lss.name", "x"), "command line: unknown option --lss.name, expected --NAME.KEY with NAME one of loss"),
        (("--lr.x", "1"), "command line: unknown option --lr.x, expected --NAME.KEY with NAME one of loss"),
        (("--loss.name.x", "1"), "command line: --loss.name.x: name is 'plain', which has no keys of its own"),
        (("--.x", "1"), "command line: unknown option --.x"),
    ],
)
def test_a_wrong_option_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        parsed("d.csv", *arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--loss.temperature",), "argument --loss.temperature: expected one argument"),
        (("--loss.temperature", "--epochs", "3"), "argument --loss.temperature: expected one argument"),
        (("--nonsense", "3"), "unrecognized arguments: --nonsense 3"),
        (("more",), "unrecognized arguments: more"),
    ],
)
def test_what_no_option_is_ends_the_program(capsys, arguments, message):
    with pytest.raises(SystemExit) as caught:
        parsed("d.csv", *arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_values_of_other_options_are_left_alone():
    parser = argparse.ArgumentParser()
    parser.add_argument("data")
    parser.add_argument("--out")
    add_options(parser, Config)
    options = parse(parser, ["./a.b.csv", "--out=x.y", "--loss.a", "1", "--epochs", "2"])
    assert (options.data, options.out, options.dotted) == ("./a.b.csv", "x.y", {"loss.a": "1"})


def test_the_command_line_of_the_process_is_the_default(monkeypatch):
    monkeypatch.setattr("sys.argv", ["program", "d.csv", "--loss.a", "1"])
    parser = argparse.ArgumentParser()
    parser.add_argument("data")
    add_options(parser, Config)
    assert config_from_options(Config, parse(parser)).loss["a"] == 1


@pytest.mark.parametrize("cls", [Config, FinetuneConfig])
def test_help_has_every_setting_with_meaning_and_default(monkeypatch, cls):
    monkeypatch.setenv("COLUMNS", "200")
    parser = argparse.ArgumentParser()
    add_options(parser, cls)
    text = " ".join(parser.format_help().split())
    for name, default in to_dict(cls()).items():
        if isinstance(default, dict):
            head, more = f"--{name} JSON", f" (or --{name}.NAME VALUE, e.g. --{name}.name)"
        else:
            head, more = f"--{name.replace('_', '-')} VALUE", ""
        (meaning,) = (field.metadata["meaning"] for field in fields(cls) if field.name == name)
        assert f" {head} {meaning}{more} [{json.dumps(default)}]" in text
    assert "--config FILE JSON file" in text
