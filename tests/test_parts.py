"""parts.py: which parameters train, and how fast, by name and by layer."""

from dataclasses import replace

import pytest
import torch
from naming import naming
from tiny import make_dataset, make_embedder
from torch import nn

from embedft import FinetuneConfig, finetune
from embedft.cli import main
from embedft.encoders.lora import LoraConfig, add_lora
from embedft.files import read_json, read_jsonl
from embedft.training.optim import build_optimizer
from embedft.training.parts import frozen_names, learning_rates

CONFIG = FinetuneConfig(epochs=2, batch_size=4, lr=1e-3)


@pytest.fixture
def embedder(tmp_path):
    return make_embedder(tmp_path / "base")


def changed(before: dict, embedder) -> set[str]:
    return {name for name, x in embedder.state_dict().items() if not torch.equal(x, before[name])}


def copy(embedder) -> dict:
    return {name: x.clone() for name, x in embedder.state_dict().items()}


def starting(embedder, *beginnings: str) -> set[str]:
    return {name for name, _ in embedder.named_parameters() if name.startswith(beginnings)}


def test_what_is_frozen_by_name_and_below_a_layer(embedder):
    assert frozen_names(embedder, ["embeddings"], None) == starting(embedder, "encoder.embeddings.")
    assert frozen_names(embedder, ["layers.1.qkv"], None) == starting(embedder, "encoder.layers.1.qkv.")
    # The checkpoint's names.
    assert frozen_names(embedder, ["encoder.layer.1"], None) == starting(embedder, "encoder.layers.1.")
    assert frozen_names(embedder, ["word_embeddings"], None) == {"encoder.embeddings.token.weight"}
    assert frozen_names(embedder, [], None) == set()
    below = [set(), starting(embedder, "encoder.layers.0."), starting(embedder, "encoder.layers.")]
    for layer, layers in enumerate(below):
        assert frozen_names(embedder, [], layer) == starting(embedder, "encoder.embeddings.") | layers


def test_names_that_name_nothing_or_half_a_tensor(embedder):
    with pytest.raises(ValueError, match=naming("freeze", "layers.2", "qkv", "embeddings")):
        frozen_names(embedder, ["layers.2"], None)
    with pytest.raises(ValueError, match=naming("freeze", "query", "encoder.layers.0.qkv.weight")):
        frozen_names(embedder, ["query"], None)
    with pytest.raises(ValueError, match=naming("freeze_below", 3, 2)):
        frozen_names(embedder, [], 3)
    with pytest.raises(ValueError, match=naming("freeze_below", 1, "layers.0")):
        frozen_names(Plain(), [], 1)


def test_an_encoder_for_queries_is_counted_by_itself(tmp_path):
    """It has one layer, that of documents two: its layer is a last one, and what precedes it the embeddings."""
    embedder = make_embedder(tmp_path / "base")
    embedder.attach_query_side(make_embedder(tmp_path / "base", num_layers=1))
    embeddings = starting(embedder, "encoder.embeddings.", "query_side.encoder.embeddings.")
    first = starting(embedder, "encoder.layers.0.", "query_side.encoder.layers.0.")
    assert frozen_names(embedder, [], 0) == embeddings
    assert frozen_names(embedder, [], 1) == embeddings | first
    assert frozen_names(embedder, ["encoder.layer.0"], None) == first
    rates = learning_rates(embedder, lr=1.0, parts={}, decay=0.5)
    assert rates["query_side.encoder.layers.0.qkv.weight"] == 1.0
    assert rates["query_side.encoder.embeddings.token.weight"] == 0.5
    assert rates["encoder.embeddings.token.weight"] == 0.25
    with pytest.raises(ValueError, match=naming("depths", 1)):
        finetune(embedder, make_dataset(), replace(CONFIG, depths=[1]))


@pytest.mark.parametrize("wrong", [{"freeze": ["nothing"]}, {"depths": [3]}, {"lora": {"targets": ["nothing"]}}])
def test_wrong_parts_are_refused_before_anything_is_encoded(embedder, monkeypatch, wrong):
    monkeypatch.setattr(type(embedder), "encode", lambda *_, **__: pytest.fail("encoded"))
    config = replace(CONFIG, num_negatives=1, mine_every=1, references={"base": None}, **wrong)
    with pytest.raises(ValueError, match=naming(*next(iter(wrong.values())))):
        finetune(embedder, make_dataset(), config)
    assert embedder.lora is None


def test_what_follows_the_layers_trains_above_all_of_them():
    model = Plain()
    model.layers, model.norm = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]), nn.LayerNorm(2)
    assert frozen_names(model, [], 2) == starting(model, "linear.", "layers.")
    assert learning_rates(model, lr=1.0, parts={}, decay=0.5)["norm.weight"] == 1.0


@pytest.mark.parametrize("changes", [{"freeze_below": 1}, {"lora": {"targets": ["layers.1"]}}])
def test_each_depth_has_something_to_train(embedder, changes):
    finetune(embedder, make_dataset(), replace(CONFIG, epochs=1, depths=[2], **changes))
    with pytest.raises(ValueError, match=naming("depths", [1, 2], 1)):
        finetune(embedder, make_dataset(), replace(CONFIG, depths=[1, 2], **changes))


class Plain(nn.Module):
    lora = None

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)


def test_a_run_leaves_what_is_frozen(embedder):
    before = copy(embedder)
    finetune(embedder, make_dataset(), replace(CONFIG, freeze=["embeddings"], freeze_below=1))
    assert changed(before, embedder) == starting(embedder, "encoder.layers.1.")
    assert all(parameter.requires_grad for parameter in embedder.parameters())
    with pytest.raises(ValueError, match=naming("freeze", "encoder")):
        finetune(embedder, make_dataset(), replace(CONFIG, freeze=["encoder"]))
    with pytest.raises(ValueError, match=naming("freeze_below", 2)):
        finetune(embedder, make_dataset(), replace(CONFIG, freeze_below=2))
    assert all(parameter.requires_grad for parameter in embedder.parameters())


def test_learning_rates_by_hand(embedder):
    """Two layers: the last at the full rate, the one before at 0.5 of it, the embeddings at 0.25."""
    rates = learning_rates(embedder, lr=1.0, parts={}, decay=0.5)
    for part, expected in (("layers.1", 1.0), ("layers.0", 0.5), ("embeddings", 0.25)):
        assert {rates[name] for name in starting(embedder, f"encoder.{part}.")} == {expected}
    # A later name wins, and the decay applies to all.
    parts = {"layers": 8.0, "layers.0.qkv": 2.0}
    rates = learning_rates(embedder, lr=1.0, parts=parts, decay=0.5)
    assert rates["encoder.layers.1.qkv.weight"] == 8.0
    assert rates["encoder.layers.0.qkv.weight"] == 1.0
    assert rates["encoder.layers.0.attention_out.bias"] == 4.0
    assert rates["encoder.embeddings.norm.weight"] == 0.25


def test_updates_of_lora_are_at_their_layers_depth(embedder):
    add_lora(embedder, LoraConfig())
    rates = learning_rates(embedder, lr=1.0, parts={}, decay=0.5)
    assert (rates["lora.layers.0.qkv.A"], rates["lora.layers.1.qkv.B"]) == (0.5, 1.0)
    assert frozen_names(embedder, [], None) == starting(embedder, "encoder.", "pooling.")
    assert frozen_names(embedder, [], 1) == starting(embedder, "encoder.", "lora.layers.0.")


def test_a_step_of_each_group_by_its_own_rate(embedder):
    """Without decay, the first step of Adam moves a parameter by its learning rate, whatever the gradient."""
    optimizer = build_optimizer(embedder, lr=1e-2, lr_parts={"embeddings": 1e-4}, lr_decay=0.5, weight_decay=0.0)
    assert (optimizer.param_groups[0]["name"], optimizer.param_groups[0]["lr"]) == ("matrices", 1e-2)
    before = copy(embedder)
    for parameter in embedder.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for part, rate in (("layers.1", 1e-2), ("layers.0", 5e-3), ("embeddings", 2.5e-5)):
        for name in starting(embedder, f"encoder.{part}."):
            moved = before[name] - embedder.state_dict()[name]
            torch.testing.assert_close(moved, torch.full_like(moved, rate), rtol=1e-2, atol=0)


def test_each_rate_follows_the_schedule_and_resumes(tmp_path):
    config = replace(CONFIG, lr_decay=0.5, lr_parts={"embeddings": 1e-4}, checkpoint_every=2)
    rates = []

    def run(name: str, *, stop_at: int | None = None, **options):
        def watch(state, record):
            rates.append({group["lr"] / group["initial_lr"] for group in state.optimizer.param_groups})
            if state.step == stop_at:
                raise KeyboardInterrupt

        embedder = make_embedder(tmp_path / "base")
        return finetune(embedder, make_dataset(), config, out=tmp_path / name, on_step=watch, **options)

    whole = run("whole")
    assert all(max(factors) - min(factors) < 1e-12 for factors in rates)
    with pytest.raises(KeyboardInterrupt):
        run("cut", stop_at=3)
    resumed = run("cut", existing="resume", allow_changed_code=True)
    assert resumed.sha256() == whole.sha256()
    assert {record["lr"] for _, record in read_jsonl(tmp_path / "whole" / "train.jsonl")} >= {1e-3}


@pytest.mark.parametrize("value", [0, -1e-5, "fast", True, None, float("inf"), [1e-5]])
def test_a_rate_that_is_none(value):
    with pytest.raises(ValueError, match=naming("lr_parts", "layers.0", repr(value))):
        FinetuneConfig(lr_parts={"layers": {"0": value}})


def test_an_unknown_name_is_refused_before_training(embedder):
    with pytest.raises(ValueError, match=naming("lr_parts", "head", "qkv")):
        finetune(embedder, make_dataset(), replace(CONFIG, lr_parts={"head": 1e-3}))


@pytest.mark.filterwarnings("ignore:.*PEFT")
def test_on_the_command_line(tmp_path, capsys):
    make_embedder(tmp_path / "base")
    make_dataset().save(tmp_path / "train.json")
    words = ["finetune", str(tmp_path / "base"), str(tmp_path / "train.json"), "--epochs", "1", "--batch-size", "4"]
    more = [
        "--lora.rank",
        "2",
        "--lora.targets",
        '["query", "value"]',
        "--lora.side",
        "query",
        "--lr-parts.layers.0",
        "1e-3",
    ]
    more += ["--lr-decay", "0.9", "--freeze", "layers.1", "--depths", "1", "2"]
    assert main([*words, *more, "--out", str(tmp_path / "run")]) == 0
    config = read_json(tmp_path / "run" / "config.json")
    assert config["lora"] == {"rank": 2, "targets": ["query", "value"], "side": "query"}
    assert config["lr_parts"] == {"layers": {"0": 1e-3}}
    capsys.readouterr()
    assert main(["info", str(tmp_path / "base"), "--num-layers", "1"]) == 0
    assert "layers         1" in capsys.readouterr().out
    assert main([*words, "--lora.rank", "0", "--out", str(tmp_path / "other")]) == 2
    assert "rank is 0" in capsys.readouterr().err
