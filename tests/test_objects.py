"""objects.py: what a run records about passed-in code changes only with that code and its settings."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import make_dataset
from torch import nn

import embedft
from embedft.losses.contrastive import LearnableSigmoid
from embedft.objects import describe_object


def scaled(factor):
    def loss(Q, D, targets):
        return factor * Q.sum()

    return loss


def rewritten(factor):
    def loss(Q, D, targets):
        return factor * D.sum()

    return loss


class Part(nn.Module):
    def __init__(self, margin):
        super().__init__()
        self.margin, self._cache = margin, object()
        self.weight = nn.Parameter(torch.randn(2))


class Whole(nn.Module):
    def __init__(self, *margins):
        super().__init__()
        self.parts, self.first = nn.ModuleList(Part(margin) for margin in margins), Part(margins[0])

    def method(self, Q, D, targets):
        return 0


class Renamed(Part):
    pass


def test_a_function():
    found = describe_object(scaled(2.0))
    assert found["name"] == "test_objects.scaled.<locals>.loss"
    assert found["values"] == {"factor": 2.0}
    assert len(found["sha256"]) == 64
    assert describe_object(scaled(2.0)) == found
    other = describe_object(rewritten(2.0))
    assert other["values"] == found["values"]
    assert other["sha256"] != found["sha256"]


SAME = [
    (lambda: scaled(3.0), lambda: scaled(3.0)),
    (lambda: Whole(1, 2), lambda: Whole(1, 2)),  # random weights and caches do not count
    (lambda: Whole(1, 2).method, lambda: Whole(1, 2).method),
    (lambda: functools.partial(scaled, factor=1), lambda: functools.partial(scaled, factor=1)),
    (lambda: make_dataset(), lambda: make_dataset()),
    (lambda: torch.optim.SGD, lambda: torch.optim.SGD),
    (lambda: len, lambda: len),
    (lambda: scaled(make_dataset()), lambda: scaled(make_dataset())),
]
DIFFERENT = [
    (lambda: scaled(3.0), lambda: scaled(4.0)),
    (lambda: scaled(scaled(3.0)), lambda: scaled(rewritten(3.0))),
    (lambda: scaled([1] * 1000), lambda: scaled([1] * 999 + [2])),
    (lambda: Whole(1, 2), lambda: Whole(3, 2)),
    (lambda: Whole(1, 2).method, lambda: Whole(3, 2).method),
    (lambda: Part(1), lambda: Renamed(1)),
    (lambda: functools.partial(scaled, factor=1), lambda: functools.partial(scaled, factor=2)),
    (lambda: functools.partial(scaled, 1), lambda: functools.partial(scaled, 2)),
    (lambda: make_dataset(), lambda: make_dataset(seed=1)),
    (lambda: scaled(make_dataset()), lambda: scaled(make_dataset(seed=1))),
    (lambda: torch.optim.SGD, lambda: torch.optim.Adam),
    (lambda: len, lambda: max),
]


@pytest.mark.parametrize(("first", "second"), SAME)
def test_the_same_code_and_settings(first, second):
    assert describe_object(first()) == describe_object(second())


@pytest.mark.parametrize(("first", "second"), DIFFERENT)
def test_other_code_or_settings(first, second):
    assert describe_object(first()) != describe_object(second())


@pytest.mark.parametrize("value", [scaled(float("nan")), scaled("x" * 10**6), Whole(1), scaled(torch.zeros(2)), len])
def test_is_short_json(value):
    assert len(json.dumps(describe_object(value), allow_nan=False)) < 1500


def test_code_without_a_source():
    """As typed into an interpreter: the byte code counts."""
    first, same, other = (describe_object(eval(text)) for text in ("lambda x: x + 1", "lambda x: x + 1", "lambda x: x"))
    assert first == same != other


def test_a_function_that_calls_itself():
    def again(n):
        return again(n - 1) if n else 0

    assert describe_object(again)["name"].endswith("again")


@pytest.mark.parametrize("seed", ["1", "2"])
def test_the_hash_of_a_set_in_byte_code_is_the_same_in_every_process(seed):
    code = """
from embedft.objects import describe_object
print(describe_object(eval("lambda s: s in {'a', 'b', 'c', 'd'}"))["sha256"])
"""
    environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(embedft.__file__).parents[1])}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == describe_object(eval("lambda s: s in {'a', 'b', 'c', 'd'}"))["sha256"]


class Unhashable:
    __hash__ = None

    def __call__(self, Q, D, targets):
        return Q.sum()


def test_a_partial_of_an_object_is_described_by_its_class():
    assert describe_object(functools.partial(Unhashable()))["sha256"] == describe_object(Unhashable())["sha256"]


def test_a_class_typed_into_a_shell_is_known_by_its_compiled_methods():
    def hashed(code: str) -> str:
        scope = {"__name__": "shell"}
        exec(code, scope)
        return describe_object(scope["Loss"]())["sha256"]

    first = "class Loss:\n    def __call__(self, Q, D, targets):\n        return (Q * D).sum()\n"
    assert hashed(first) == hashed(first)
    assert hashed(first) != hashed(first.replace("*", "+"))


def test_inherited_code_is_part_of_the_hash():
    def hashed(factor: int) -> str:
        scope = {"__name__": "shell"}
        exec(f"class Base:\n    def __call__(self, Q, D, targets):\n        return Q.sum() * {factor}\n", scope)
        exec("class Loss(Base):\n    pass\n", scope)
        return describe_object(scope["Loss"]())["sha256"]

    assert hashed(1) == hashed(1)
    assert hashed(1) != hashed(2)


def test_dicts_are_recorded_but_for_tensors_and_keys_without_a_stable_name():
    def recorded(value):
        return describe_object(functools.partial(max, value=value))["values"]["value"]

    assert recorded({"a": 1, "_b": 2, "c": torch.ones(1), object(): 3, "d": {"e": [0.5]}}) == {
        "a": 1,
        "d": {"e": [0.5]},
    }
    assert recorded({384: 1.0, 128: 0.5}) == {384: 1.0, 128: 0.5}
    assert recorded({"a": "x" * 300}) != recorded({"a": "y" * 300})
    first, second = (describe_object(LearnableSigmoid(windows=windows)) for windows in ("max", "softmax"))
    assert first["values"]["options"] == {"windows": "max"}
    assert first != second
