"""What config.json may say in every family: sizes, counts and numbers, checked before anything is built.

A size is compared with the checkpoint's tensors; a window or a limit of positions, which no tensor bears out, costs
nothing when a model loads.
"""

from dataclasses import fields

import pytest
import torch
from conftest import write
from families import write_family
from naming import names, naming

from embedft import load_embedder
from embedft.encoders import static
from embedft.encoders.folder import FAMILIES, read_config
from embedft.encoders.schema import Index, Layers, Rows, Size
from embedft.encoders.weights import read_encoder
from embedft.files import read_json

WHOLE = [-1, 2.5, "32", 10**30, 10**400]
# By annotation, the values that no model can have.
IMPOSSIBLE = {
    Size: [0, 10**9, 10**12, *WHOLE],
    Rows: [10**9, 10**12, *WHOLE],
    Layers: [0, 10**6, 10**12, *WHOLE],
    Index: [2**31, *WHOLE],
    int: [0, 2**31, *WHOLE],
    float: [10**400, float("nan"), float("-inf"), "1"],
    bool: [1, "true"],
    list: [{}, 3],
    dict: [[], 3],
}
IMPOSSIBLE |= {kind | None: values for kind, values in IMPOSSIBLE.items()}


@pytest.fixture
def nothing_is_built(monkeypatch):
    """Modules cannot be made, not even on the meta device."""
    monkeypatch.setattr(torch.nn.Module, "__init__", None)


def refuse(folder, **changes) -> str:
    """Asserts that a folder with these settings is refused in one line, which names its config.json; returns it."""
    path = folder / "config.json"
    before = read_json(path)
    write(path, before | changes)
    try:
        with pytest.raises(ValueError, match=naming(path)) as caught:
            read_encoder(folder, *read_config(folder)[:2], torch.float32)
    finally:
        write(path, before)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400 + len(str(path))
    return str(caught.value)


families = pytest.mark.parametrize("model_type", [name for name in FAMILIES if FAMILIES[name] is not static])


@families
def test_impossible_settings_are_named_before_anything_is_built(tmp_path, request, model_type):
    folder = write_family(tmp_path, model_type)
    request.getfixturevalue("nothing_is_built")
    for field in fields(FAMILIES[model_type].Config):
        for value in IMPOSSIBLE.get(field.type, ()):
            error = refuse(folder, **{field.name: value})
            assert names(error, field.name), (field.name, value, error)


@families
def test_heads_that_do_not_divide_the_features(tmp_path, request, model_type):
    folder = write_family(tmp_path, model_type)
    request.getfixturevalue("nothing_is_built")
    names_of_heads = {"num_attention_heads", "n_heads", "num_key_value_heads"}
    for name in sorted(names_of_heads & read_json(folder / "config.json").keys()):
        for value in (3, 5, 2**31 - 1):
            assert names(refuse(folder, **{name: value}), name, value)
    if "head_dim" in read_json(folder / "config.json"):
        assert names(refuse(folder, head_dim=7), "head_dim", 7, "even")


@families
def test_limits_that_cost_nothing_load(tmp_path, model_type):
    """Positions without a table, and windows longer than any text."""
    folder = write_family(tmp_path, model_type)
    config, most = FAMILIES[model_type].Config, 2**31 - 1
    limits = {field.name for field in fields(config) if field.type in (int, int | None)}
    limits &= {"max_position_embeddings", "sliding_window", "local_attention"}
    path = folder / "config.json"
    write(path, read_json(path) | dict.fromkeys(limits, most))
    embedder = load_embedder(folder, device="cpu")
    assert embedder.max_length == (most if "max_position_embeddings" in limits else embedder.encoder.config.max_length)
    assert embedder.encode(["the fee of order"]).shape == (1, 32)
