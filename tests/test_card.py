"""card.py: facts and FLOPs by hand, the card that `save` and `finetune` write; `embedft push` to a local hub."""

import json
import os
import subprocess
import sys

import pytest
import torch
from families import tiny_encoder
from hub_server import Hub
from naming import names, naming
from tiny import make_dataset, make_embedder

from embedft import FinetuneConfig, finetune, load_embedder, load_scorer
from embedft.cli import main
from embedft.encoders.card import MARK, facts, flops, model_card
from embedft.encoders.folder import FAMILIES
from embedft.encoders.lora import LoraConfig, add_lora
from embedft.encoders.push import push_folder
from embedft.files import REPLACING, read_json, write_json
from embedft.losses.contrastive import in_batch_negatives


def test_flops_by_hand(tiny_bert):
    """Width 32, 40 inner features, 2 layers: 4 matrices of 32 x 32 and 2 of 32 x 40 each; 2 products with 32 values."""
    encoder = load_embedder(tiny_bert, device="cpu").encoder
    assert flops(encoder) == (2 * 2 * (4 * 32 * 32 + 2 * 32 * 40), 2 * 2 * 2 * 32)


def test_flops_are_those_that_torch_counts(tiny_bert):
    """In float64, where every product is one that torch's counter knows."""
    from torch.utils.flop_counter import FlopCounterMode

    embedder = load_embedder(tiny_bert, device="cpu", dtype=torch.float64)
    packed = embedder.pack(["a b c d e f"], role="query")
    linear, attention = flops(embedder.encoder)
    length = len(packed.input_ids)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        embedder.encoder(packed)
    assert counter.get_total_flops() == length * linear + length**2 * attention


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_family_says_how_many_layers_it_has(model_type):
    encoder = tiny_encoder(model_type)
    linear, attention = flops(encoder)
    assert (attention > 0) == (linear > 0) == hasattr(encoder, "layers")
    if attention:
        assert attention % encoder.config.num_hidden_layers == 0


def test_flops_of_heads_wider_than_their_share():
    """2 layers of 4 heads of 16 values, twice what 32 features give each."""
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    assert flops(tiny_encoder("qwen3", **sizes, head_dim=16))[1] == 2 * 2 * 2 * 4 * 16


def test_cells_of_the_card_stay_in_their_column(tiny_bert):
    embedder = load_embedder(tiny_bert, device="cpu", prompts={"query": "a | b: "})
    assert r"| prompts | query: 'a \| b: ' |" in model_card(embedder, training={})


def test_facts(tiny_bert):
    found = facts(load_embedder(tiny_bert, device="cpu", max_length=20))
    assert found["family"] == "bert"
    assert found["parameters"] == "19,248: embeddings 5,280, layers 13,968"
    assert found["max_length"] == "20 tokens (the encoder takes 48)"
    assert found["fingerprint"] == load_embedder(tiny_bert, device="cpu", max_length=20).sha256()[:16]


def test_saving_writes_a_card_but_spares_those_of_others(tiny_bert, tmp_path):
    embedder, card = load_embedder(tiny_bert, device="cpu"), tmp_path / "model" / "README.md"
    embedder.save(tmp_path / "model")
    assert MARK in card.read_text()
    assert "base_model" not in card.read_text()
    embedder.max_length = 30
    embedder.save(tmp_path / "model")
    assert "30 tokens" in card.read_text()
    card.write_text("my own words")
    embedder.save(tmp_path / "model")
    assert card.read_text() == "my own words"


def test_the_card_names_other_libraries_only_if_they_give_the_same_vectors(tiny_bert, tmp_path):
    for side, expected in (("both", True), ("query", False)):
        embedder = load_embedder(tiny_bert, device="cpu")
        add_lora(embedder, LoraConfig(rank=2, side=side))
        card = model_card(embedder, training={})
        assert ("sentence-transformers" in card, "SentenceTransformer" in card) == (expected, expected)
        assert f"| LoRA | rank 2, alpha 16, side {side} |" in card
    embedder = load_embedder(tiny_bert, device="cpu")
    embedder.encoder.__class__ = type("Mine", (type(embedder.encoder),), {})
    assert "SentenceTransformer" not in model_card(embedder, training={})


def test_the_card_of_a_run_has_data_settings_and_results(tmp_path):
    embedder, data, held_out = make_embedder(tmp_path / "base"), make_dataset(8, 8), make_dataset(8, 8, seed=1)
    options = {"validation": held_out, "out": tmp_path / "run"}
    finetune(embedder, data, FinetuneConfig(epochs=1, batch_size=4, lr=3e-4), **options)
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    for row in ("| data | 8 questions, 8 documents |", "| lr | 0.0003 |", "| batch_size | 4 |"):
        assert row in card
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert environment["sha256"]["train"] in card
    report = json.loads((tmp_path / "run" / "eval" / "validation" / "metrics.json").read_text())
    rows = [line for line in card.splitlines() if f"{report['metrics']['ndcg@10']:.4f}" in line]
    assert any("fine-tuned" in row and "[" in row for row in rows)
    assert any(names(line, 8, "chose the weights", "max_length", embedder.max_length) for line in card.splitlines())


def my_loss(Q, D, targets):
    return in_batch_negatives(Q, D, targets)


def test_the_card_names_objects_in_place_of_settings_and_settings_of_0(tmp_path):
    embedder = make_embedder(tmp_path / "base")
    config = FinetuneConfig(epochs=1, batch_size=4, freeze_below=0)
    finetune(embedder, make_dataset(8, 8), config, loss=my_loss, out=tmp_path / "run")
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert f"| loss | {my_loss.__module__}.my_loss |" in card
    assert "| freeze_below | 0 |" in card


PUSH = """
import sys
from embedft.cli import main
sys.exit(main(sys.argv[1:]))
"""


def push(hub, tmp_path, *words):
    """Runs the command in a process of its own, because huggingface_hub reads its settings when imported."""
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "hf_x", "HF_HUB_OFFLINE": "0"}
    settings |= {"HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-c", PUSH, "push", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | settings, timeout=120)


def test_push(tiny_bert, tmp_path):
    """What arrives is the folder, card included, and nothing hidden or temporary; a second push makes a new commit."""
    load_embedder(tiny_bert, device="cpu").save(tmp_path / "model")
    for name in (".secret", "half.tmp"):
        (tmp_path / "model" / name).write_text("x")
    with Hub({}) as hub:
        done = push(hub, tmp_path, tmp_path / "model", "me/mine", "--private")
        assert (done.returncode, done.stderr.strip().count("Traceback")) == (0, 0), done.stderr
        assert done.stdout.strip() == f"{hub.url}/me/mine/commit/{'1' * 40}"
        (repository,) = hub.repositories.values()
        assert repository["asked"]["visibility"] == "private"
        files = repository[repository["main"]]
        there = {path.name: path for path in (tmp_path / "model").rglob("*") if path.is_file()}
        assert {name.rpartition("/")[2] for name in files} == there.keys() - {".secret", "half.tmp"}
        assert files["model.safetensors"] == there["model.safetensors"].read_bytes()


def test_push_to_a_branch(tiny_bert, tmp_path):
    load_embedder(tiny_bert, device="cpu").save(tmp_path / "model")
    with Hub({}) as hub:
        done = push(hub, tmp_path, tmp_path / "model", "me/mine", "--revision", "trial")
        assert done.returncode == 0, done.stderr
        (repository,) = hub.repositories.values()
        assert (repository["main"], repository["trial"]) == ("0" * 40, "1" * 40)


def test_an_adapter_of_lora_is_pushed_if_others_can_find_its_base(tiny_bert, tmp_path):
    embedder = load_embedder(tiny_bert, device="cpu")
    add_lora(embedder, LoraConfig(save="adapter"))
    embedder.save(tmp_path / "model")
    config = tmp_path / "model" / "adapter_config.json"
    with pytest.raises(ValueError, match=naming(config, "base_model_name_or_path", repr(str(tiny_bert)), "hub")):
        push_folder(tmp_path / "model", "me/mine")
    write_json(config, read_json(config) | {"base_model_name_or_path": "me/base"})
    files = {path.name: path.read_bytes() for path in tiny_bert.iterdir() if path.is_file()}
    with Hub({"me/base": {"main": "2" * 40, "2" * 40: files}}) as hub:
        done = push(hub, tmp_path, tmp_path / "model", "me/mine", "--quiet")
        assert (done.returncode, done.stderr) == (0, "")  # no bars, not even those of fetching the base
        repository = hub.repositories["me/mine"]
        assert "adapter_model.safetensors" in repository[repository["main"]]


def test_the_folder_of_a_run_is_not_its_model(tiny_bert, tmp_path):
    load_embedder(tiny_bert, device="cpu").save(tmp_path / "run" / "model")
    write_json(tmp_path / "run" / "config.json", {"epochs": 3})
    for use in (load_embedder, load_scorer, lambda folder: push_folder(folder, "me/mine")):
        with pytest.raises(ValueError, match=naming(tmp_path / "run", tmp_path / "run" / "model", "model")):
            use(tmp_path / "run")
    (tmp_path / "run" / "model" / REPLACING).touch()
    with pytest.raises(ValueError, match=naming(tmp_path / "run" / "model", "new", "old")):
        push_folder(tmp_path / "run" / "model", "me/mine")


@pytest.mark.parametrize(
    ("folder", "name", "facts"),
    [
        ("model", "mine", ("'mine'", "user/model")),
        ("missing", "me/mine", ("missing", "folder")),
        (".", "me/mine", ("model",)),
        ("model/1_Pooling", "me/mine", ("model.safetensors",)),
        ("model", "me/mine", ("me/mine", "hub", "HF_TOKEN")),
    ],
)
def test_what_cannot_be_pushed_is_one_line(tiny_bert, tmp_path, folder, name, facts):
    load_embedder(tiny_bert, device="cpu").save(tmp_path / "model")
    with Hub({}) as hub:
        hub.read_only = True
        done = push(hub, tmp_path, tmp_path / folder, name)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert names(done.stderr, *facts)
    assert "hf_x" not in done.stderr


def test_info_is_one_screen(tiny_bert, capsys):
    assert main(["info", str(tiny_bert), "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 24
    expected = {"family", "parameters", "memory", "FLOPs", "dimensions", "fingerprint"}
    assert {line.split()[0] for line in lines} >= expected
