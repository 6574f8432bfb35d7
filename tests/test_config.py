"""config.py: one dataclass, its options, its help and its JSON; anything else is refused."""

import json
import re
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import pytest
from naming import naming

from embedft import FinetuneConfig
from embedft.config import (
    REQUIRED,
    Options,
    as_typed,
    changed,
    check_at_most_one,
    check_types,
    from_dict,
    make_parser,
    option,
    parse,
    part,
)


@dataclass(frozen=True)
class Config:
    """How to do it. And more."""

    epochs: int = option(3, "passes over the data")
    lr: float = option(5e-5, "at its highest, 100% of it")
    schedule: Literal["linear", "cosine"] | None = option("linear", "of the learning rate")
    eval_every: int | None = option(None, "steps [every epoch]")
    fused: bool = option(False, "one kernel")
    bias: bool = option(True, "add one")
    no_duplicates: bool = option(False, "each text once")
    select: str = option("ndcg@10", "the metric")
    dims: list[int] | None = option(None, "to keep")
    names: list[str] = option(["a"], "of something")
    window: list[float] | None = option(None, "size and stride", metavar="SIZE STRIDE")
    loss: dict[str, Any] = option({"name": "plain", "inner": {"depth": 1}}, "name and options")

    def __post_init__(self):
        check_types(type(self), vars(self))
        if self.epochs < 1:
            raise ValueError(f"epochs is {self.epochs}, expected at least 1")


@dataclass(frozen=True, kw_only=True)
class Command(Config, Options):
    """A command."""

    data: list[str] = option(REQUIRED, "what to read", metavar="DATA", positional=True)
    out: str = option(REQUIRED, "where to write", metavar="DIR")


def parsed(*arguments: str) -> Command:
    return parse(Command, arguments)


def expected(**changes: Any) -> Command:
    return Command(**{"data": ["d.csv"], "out": "o", **changes})


# Dictionaries and JSON.


@pytest.mark.parametrize(
    "config", [Config(), Config(7, 1, "cosine", 10, True, False, True, "a", [1], ["b"], [1, 2], {"x": 1})]
)
def test_round_trip(config):
    assert from_dict(Config, json.loads(json.dumps(asdict(config)))) == config
    assert list(asdict(config)) == [field.name for field in fields(Config)]  # defaults included


def test_round_trip_of_the_real_one():
    config = FinetuneConfig(epochs=1, warmup=0.1, loss={"name": "in_batch_negatives", "temperature": 0.1})
    assert from_dict(FinetuneConfig, json.loads(json.dumps(asdict(config)))) == config


def test_missing_keys_keep_their_default():
    assert from_dict(Config, {"lr": 1.0}) == Config(lr=1.0)


def test_a_default_that_is_a_dict_or_list_is_not_shared():
    Config().loss["name"] = "changed"
    Config().names.append("b")
    asdict(Config())["loss"]["inner"]["depth"] = 9
    assert (Config().loss["name"], Config().loss["inner"]["depth"], Config().names) == ("plain", 1, ["a"])


@pytest.mark.parametrize(
    ("values", "facts"),
    [
        ({"epoch": 1}, ("'epoch'", "epochs", "loss")),
        ({"epochs": 1.0}, ("epochs", 1.0, "int")),
        ({"epochs": "1"}, ("epochs", "'1'", "int")),
        ({"epochs": True}, ("epochs", True, "int")),
        ({"epochs": None}, ("epochs", None, "int")),
        ({"epochs": 0}, ("epochs", 0, 1)),
        ({"lr": False}, ("lr", False, "float")),
        ({"lr": "1"}, ("lr", "'1'", "float")),
        ({"schedule": "step"}, ("schedule", "'step'", "'linear'", "'cosine'")),
        ({"schedule": ["linear"]}, ("schedule", ["linear"], "'linear'", "'cosine'")),
        ({"eval_every": "no"}, ("eval_every", "'no'", "int", "null")),
        ({"fused": 1}, ("fused", 1, "bool")),
        ({"select": 10}, ("select", 10, "str")),
        ({"loss": "plain"}, ("loss", "'plain'", "KEY=VALUE")),
        ({"dims": 3}, ("dims", 3, "list", "int", "null")),
        ({"dims": [1, "2"]}, ("dims", [1, "2"], "list", "int")),
        ({"dims": [1, True]}, ("dims", [1, True], "list", "int")),
        ({"window": "12"}, ("window", "'12'", "list", "float", "null")),
    ],
)
def test_refuses_what_is_not_in_it(values, facts):
    with pytest.raises(ValueError, match=naming("run.json", *facts)):
        from_dict(Config, values, prefix="run.json: ")


def test_part():
    assert part(expected(epochs=2), Config) == Config(epochs=2)


def test_check_types():
    with pytest.raises(ValueError, match=naming("select", 5, "str")):
        Config(select=5)
    assert Config(window=(1, 2)).window == (1, 2)  # a tuple passes for a list


# The command line.


@pytest.mark.parametrize(
    ("arguments", "changes"),
    [
        ("", {}),
        ("--epochs 7 --lr=1", {"epochs": 7, "lr": 1.0}),
        ("--lr 2e-5", {"lr": 2e-5}),
        ("--lr .5", {"lr": 0.5}),
        ("--lr -1e-3 --select -x", {"lr": -0.001, "select": "-x"}),
        ("--eval_every 5", {"eval_every": 5}),
        ("--eval-every null", {"eval_every": None}),
        ("--eval-every None", {"eval_every": None}),
        ("--fused", {"fused": True}),
        ("--fused True", {"fused": True}),
        ("--fused=false", {}),
        ("--fused --no-fused", {}),
        ("--no-bias", {"bias": False}),
        ("--bias false", {"bias": False}),
        ("--no-duplicates", {"no_duplicates": True}),
        ("--no-duplicates false", {}),
        ("--schedule cosine", {"schedule": "cosine"}),
        ("--schedule null", {"schedule": None}),
        ("--select 10", {"select": "10"}),  # a text stays one
        ("--dims 3 -1", {"dims": [3, -1]}),
        ("--dims -1 2 -3 4 --lr 1", {"dims": [-1, 2, -3, 4], "lr": 1.0}),
        ("--window -1e1 -2 3 --dims -1", {"window": [-10.0, -2.0, 3.0], "dims": [-1]}),
        ("--names x y --epochs 1", {"names": ["x", "y"], "epochs": 1}),
        ("--window 128 6.5 --window 1", {"window": [128.0, 6.5, 1.0]}),
        ("--dims null", {"dims": None}),
        ("--loss.temperature 0.05", {"loss": {"name": "plain", "inner": {"depth": 1}, "temperature": 0.05}}),
        ("--loss.temperature=0.05", {"loss": {"name": "plain", "inner": {"depth": 1}, "temperature": 0.05}}),
        ("--loss temperature=0.05", {"loss": {"name": "plain", "inner": {"depth": 1}, "temperature": 0.05}}),
        ("--loss.margin -0.5", {"loss": {"name": "plain", "inner": {"depth": 1}, "margin": -0.5}}),
        ("--loss.inner.depth 2", {"loss": {"name": "plain", "inner": {"depth": 2}}}),
        ("--loss.new.deep x=y", {"loss": {"name": "plain", "inner": {"depth": 1}, "new": {"deep": "x=y"}}}),
        ("--loss.name other --loss.x=[1,2]", {"loss": {"name": "other", "inner": {"depth": 1}, "x": [1, 2]}}),
        ("--loss.on True --loss.off null", {"loss": {"name": "plain", "inner": {"depth": 1}, "on": True, "off": None}}),
        ('--loss {"name":"y=z"} --loss.z 1', {"loss": {"name": "y=z", "z": 1}}),
        ("--loss.a 1 --loss.a 2", {"loss": {"name": "plain", "inner": {"depth": 1}, "a": 2}}),
    ],
)
def test_options(arguments, changes):
    assert parsed("d.csv", "--out", "o", *arguments.split()) == expected(**changes)


def test_a_list_of_lists_gets_one_each_time():
    @dataclass(frozen=True, kw_only=True)
    class Ablate(Options):
        data: str = option(REQUIRED, "", metavar="DATA", positional=True)
        axis: list[list[Any]] = option([], "", metavar="KEY VALUE ...")
        seeds: list[int] = option([0], "")

    words = ["d.csv", "--axis", "lr", "1e-5", "-2", "--seeds", "1", "2", "--axis", "loss.name", "a", "null"]
    found = parse(Ablate, [*words, '{"x": [1]}'])
    assert found.axis == [["lr", 1e-5, -2], ["loss.name", "a", None, {"x": [1]}]]
    assert (found.data, found.seeds) == ("d.csv", [1, 2])
    assert parse(Ablate, ["d.csv"]).axis == []
    with pytest.raises(ValueError, match=naming("--axis", "least", "one", "argument")):
        parse(Ablate, ["d.csv", "--axis"])


def test_options_may_precede_arguments():
    found = parsed("--out", "o", "d.csv", "--dims", "3", "4", "--fused", "e.csv", "--loss.a", "1", "f.csv")
    changes = {"dims": [3, 4], "fused": True, "loss": {**Config().loss, "a": 1}}
    assert found == expected(data=["d.csv", "e.csv", "f.csv"], **changes)


def test_arguments_fill_their_places_in_order():
    @dataclass(frozen=True, kw_only=True)
    class Search(Options):
        model: str = option(REQUIRED, "", metavar="MODEL", positional=True)
        question: str | None = option(None, "", metavar="[QUESTION]", positional=True)

    assert parse(Search, ["m"]) == Search(model="m")
    assert parse(Search, ["m", "q"]) == Search(model="m", question="q")
    with pytest.raises(ValueError, match=naming("argument", "'r'")):
        parse(Search, ["m", "q", "r"])
    with pytest.raises(ValueError, match=naming("missing", "MODEL")):
        parse(Search, [])
    with pytest.raises(ValueError, match=naming("option", "--model")):
        parse(Search, ["--model", "m"])


def test_a_file_and_options_that_override_it(tmp_path):
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"epochs": 5, "lr": 1.0, "loss": {"name": "other", "a": 1, "b": 2}, "window": [1, 2]}))
    config = parsed("d.csv", "--out", "o", "--config", str(path), "--epochs", "6", "--loss.b", "3")
    changes = {"epochs": 6, "lr": 1.0, "loss": {"name": "other", "a": 1, "b": 3}, "window": [1, 2]}
    assert config == expected(config=str(path), **changes)
    # to_dict writes such a file, and required options may come from it.
    path.write_text(json.dumps({**asdict(Config(epochs=2)), "out": "there"}))
    assert parsed("d.csv", "--config", str(path)) == expected(config=str(path), epochs=2, out="there")


@pytest.mark.parametrize(
    ("content", "facts"),
    [
        ('{"epoch": 5}', ("'epoch'", "config", "epochs", "out")),
        ('{"epochs": "5"}', ("epochs", "'5'", "int")),
        ('{"lr": 1, "epochs": 0}', ("command", "epochs", 0, 1)),
        ('{"epochs": ', (1, 12, "JSON")),
        ("[]", ("[]", "object")),
    ],
)
def test_a_wrong_file_is_named(tmp_path, content, facts):
    path = tmp_path / "run.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=naming(path, *facts)):
        parsed("d.csv", "--out", "o", "--config", str(path))


@pytest.mark.parametrize(
    ("arguments", "facts"),
    [
        ("--epochs many", ("epochs", "'many'", "int")),
        ("--epochs 1.5", ("epochs", "'1.5'", "int")),
        ("--epochs 0", ("epochs", 0, 1)),
        ("--epochs", ("--epochs", "one", "argument")),
        ("--epochs --fused", ("--epochs", "one", "argument")),
        ("--epoch 1", ("option", "--epoch", "--epochs")),
        ("--no-epochs", ("option", "--no-epochs", "--epochs")),
        ("--fused=maybe", ("fused", "'maybe'", "bool")),
        ("--dims", ("--dims", "least", "one", "argument")),
        ("--dims two", ("dims", ["two"], "list", "int")),
        ("--window two", ("window", ["two"], "list", "float")),
        ("--schedule step", ("schedule", "'step'", "'linear'", "'cosine'", "null")),
        ("--loss other", ("loss", "'other'", "KEY=VALUE")),
        ("--loss.temperature", ("--loss.temperature", "one", "argument")),
        ("--loss.temperature --epochs 3", ("--loss.temperature", "one", "argument")),
        ("--lss.name x", ("option", "--lss.name", "--loss")),
        ("--lr.x 1", ("option", "--lr.x")),
        ("--loss.name.x 1", ("--loss.name.x", "'plain'", "keys")),
        ("--loss other --loss.x 1", ("--loss.x", "'other'", "keys")),
        ("--.x 1", ("option", "--.x")),
        ("--config missing.json", ("missing.json",)),
    ],
)
def test_a_wrong_option_is_named(arguments, facts):
    with pytest.raises((ValueError, OSError), match=naming(*facts)):
        parsed("d.csv", "--out", "o", *arguments.split())


def test_missing_options_are_named():
    with pytest.raises(ValueError, match=naming("missing", "DATA", "--out")):
        parsed()


@pytest.mark.parametrize(
    ("message", "arguments", "expected"),
    [
        ("batch_size is 0, expected at least 1", (), "--batch-size is 0, expected at least 1"),
        ("model: max_length is 9, expected at most 8", (), "model: --max-length is 9, expected at most 8"),
        ("lr is 1, but epochs is 2: (max_length)", (), "--lr is 1, but --epochs is 2: (--max-length)"),
        ("epochs has 'x', but lr has 'y': data has 'z'", (), "--epochs has 'x', but --lr has 'y': data has 'z'"),
        ("choose another, or pass existing='overwrite'", (), "choose another, or pass --overwrite"),
        ("pass existing='other', existing=", (), None),
        # Several values as one word; other words may have commas.
        ("dims is ['3,4']", ("--dims", "3,4"), "--dims is ['3,4']; separate several values by blanks, not by commas"),
        ("unknown 'a,b'", ("--dims=1", "a,b"), "unknown 'a,b'; separate several values by blanks, not by commas"),
        ("data: 'a,b'", ("a,b", "--lr", "c,d"), "data: 'a,b'"),
        ("lr is '3,4'", ("--dims", "3", "--lr", "3,4"), "--lr is '3,4'"),
        # A list for one key of an option: JSON, as typed or corrected.
        ("a: b is '3,x', expected a list of str", ("--a.b", "3,x"), "…; type --a.b '[3, \"x\"]'"),
        ("a: b is 3, expected [int, ...]", ("--c.b=4", "--a.c.b=3"), "…; type --c.b '[4]'"),
        ("a: b is ['3'], expected [int, ...]", ("--a.b", '["3"]'), None),
        ("a: b is 3, expected [int, ...]", ("--b", "3", "x.b"), None),
        # One of several values.
        ("dim is 9, expected 1 to 8", (), "--dim is 9, expected 1 to 8"),
        ("dim is 9, expected 1 to 8", ("x", "--dims", "9", "7"), "--dims is 9, expected 1 to 8"),
        ("dim is 9, expected 1 to 8", ("x", "--dims=9"), "--dims is 9, expected 1 to 8"),
        # Other words, positional arguments, paths, values, calls and keys of files stay.
        ("the lr is what epochs are; data is bad", (), "the lr is what epochs are; data is bad"),
        ("a/batch_size: 'batch_size' and batch_size.json", (), "a/batch_size: 'batch_size' and batch_size.json"),
        ("f(max_length=3), my_max_length", (), "f(max_length=3), my_max_length"),
        ("x.json: batch_size is 0, expected one of lr, batch_size", (), None),
        ("'a batch_size, but lr is' and \"its: lr is\"", (), "'a batch_size, but lr is' and \"its: lr is\""),
        # So do the values that an option may have.
        (
            "it is 'x', expected one of a, max_length; batch_size",
            (),
            "it is 'x', expected one of a, max_length; --batch-size",
        ),
        # So does what was typed, but not as this option: a folder, the key of another option.
        ("batch_size: no such folder", ("./batch_size/", "--epochs", "3"), "batch_size: no such folder"),
        ("in_batch: lr is 'x'; epochs is 2", ("x", "--loss.lr=x"), "in_batch: lr is 'x'; epochs is 2"),
        ("in_batch: lr is 'x', but epochs is 2", ("--loss", "lr=x"), "in_batch: lr is 'x', but --epochs is 2"),
    ],
)
def test_errors_name_options_as_typed(message, arguments, expected):
    @dataclass(frozen=True, kw_only=True)
    class Typed(Options):
        data: str = option(REQUIRED, "data", positional=True)
        batch_size: int = option(3, "size")
        dim: int = option(3, "dimensions")
        dims: list[int] = option([3], "dimensions")
        max_length: int = option(3, "length")
        lr: float = option(3.0, "rate")
        epochs: int = option(3, "epochs")
        overwrite: bool = option(False, "overwrite")

    expected = message if expected is None else expected.replace("…", message)
    assert as_typed(message, Typed, arguments) == expected


def test_changed_and_combined():
    options = expected(epochs=4, bias=False, dims=[1])
    assert changed(options, ["epochs", "lr", "bias", "dims", "loss"]) == ["--epochs", "--no-bias", "--dims"]
    check_at_most_one(options, "epochs", "lr")
    with pytest.raises(ValueError, match=naming("--no-bias", "--dims")):
        check_at_most_one(options, "lr", "bias", "dims")


@pytest.mark.parametrize("cls", [Command, FinetuneConfig])
def test_help_has_every_option_with_meaning_and_default(monkeypatch, cls):
    monkeypatch.setenv("COLUMNS", "200")
    text = make_parser(cls, prog="embedft command", description="Does it.").format_help()
    assert text.startswith(
        "usage: embedft command" + (" DATA ..." if cls is Command else "") + " [options]\n\nDoes it."
    )
    words = " ".join(text.split())
    for field in fields(cls):
        assert field.metadata["meaning"] in words
    if cls is Command:
        for line in (
            "--epochs N passes over the data [3]",
            "--schedule linear|cosine of the learning rate [linear]",
            "--eval-every N steps [every epoch]",
            "--[no-]bias add one [true]",
            "--no-duplicates each text once --",
            "--dims N ... to keep --",
            "--names TEXT ... of something [a]",
            "--window SIZE STRIDE size and stride",
            "--loss KEY=VALUE name and options (or --loss.KEY VALUE) [{",
            "Options: --out DIR where to write How to do it: --epochs",
            "All commands: --config FILE JSON file",
        ):
            assert line in words
    assert all(len(line) <= 200 for line in text.splitlines())
    assert not re.search(r"\[(null|None|false|False)\]", text)
    assert not re.search(r"--\w*_", text)


def test_an_address_is_not_in_the_repr():
    """It may contain a key, and a `repr` ends up in logs and tracebacks."""
    from embedft.corpus.questions import QuestionConfig

    config = QuestionConfig(base_url="http://user:password@host/v1?api-key=0123456789")
    assert "model" in repr(config)
    assert "password" not in repr(config)
    assert "0123456789" not in repr(config)
