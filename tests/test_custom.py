"""custom.py: an encoder of a user's class, trained, saved and loaded by another program; and those that cannot be."""

import re
import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from tiny import make_dataset
from torch import nn

from embedft import Embedder, FinetuneConfig, finetune, load_embedder
from embedft.files import read_json, write_json

MODULE = """
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Config:
    hidden_size: int
    vocab_size: int
    name: str = "mine"
    num_layers: int = 0
    max_length = 64


@dataclass
class Unlimited:  # no max_length
    hidden_size: int
    vocab_size: int
    name: str
    num_layers: int


@dataclass
class Sizeless:  # no hidden_size
    max_length: int


class Encoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.token = nn.Embedding(config.vocab_size, config.hidden_size)
        self.register_buffer("scale", torch.linspace(0.5, 1.5, config.hidden_size), persistent=False)

    def forward(self, packed):
        return self.token(packed.input_ids) * self.scale


class Other(Encoder):
    def __init__(self, config, more):
        super().__init__(config)


class Deep(Encoder):
    def __init__(self, config):
        super().__init__(config)
        self.layers = nn.ModuleList(nn.Linear(config.hidden_size, config.hidden_size) for _ in range(config.num_layers))


class Reading(Encoder):
    def __init__(self, config):
        super().__init__(config)
        self.first = self.token.weight[0, 0].item()


class Asserting(Encoder):
    def __init__(self, config):
        assert config.name != "mine", "another\\nname"


class Larger(Encoder):
    def __init__(self, config):
        super().__init__(config)
        self.token = nn.Embedding(config.vocab_size, getattr(self, "dim", config.hidden_size))
"""
TEXTS = ["the fee", "order of the hello world", ""]


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A module of a user's, on the path of this process."""
    (tmp_path / "mine_encoder.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    yield pytest.importorskip("mine_encoder")
    del sys.modules["mine_encoder"]


@pytest.fixture
def make(mine, tiny_bert):
    """An Embedder with the user's encoder, made by hand or put into a loaded one."""

    def build(*, loaded: bool = False) -> Embedder:
        base = load_embedder(tiny_bert, device="cpu")
        torch.manual_seed(0)
        encoder = mine.Encoder(mine.Config(base.encoder.config.hidden_size, base.encoder.config.vocab_size))
        base.max_length = 32
        if not loaded:
            return Embedder(encoder, base.tokenizer)
        base.encoder = encoder
        return base

    return build


@pytest.mark.parametrize("loaded", [False, True])
def test_it_trains_saves_and_loads_in_another_program(make, mine, tmp_path, loaded):
    embedder, dataset = make(loaded=loaded), make_dataset()
    before = embedder.encode(TEXTS)
    finetune(embedder, dataset, FinetuneConfig(epochs=1, batch_size=4, lr=0.01), out=tmp_path / "run")
    after = embedder.encode(TEXTS)
    assert np.abs(after - before).max() > 1e-4
    again = load_embedder(tmp_path / "run" / "model", device="cpu")
    assert type(again.encoder) is mine.Encoder
    assert again.sha256() == embedder.sha256()
    np.testing.assert_array_equal(again.encode(TEXTS), after)
    again.save(tmp_path / "again")
    code = (
        "import sys, numpy, embedft; embedder = embedft.load_embedder(sys.argv[1], device='cpu')\n"
        f"numpy.save(sys.argv[2], embedder.encode({TEXTS!r}))"
    )
    out = tmp_path / "vectors.npy"
    run = [sys.executable, "-c", code, str(tmp_path / "again"), str(out)]
    subprocess.run(run, cwd=tmp_path, check=True)  # "-c" imports from the working folder
    np.testing.assert_array_equal(np.load(out), after)
    (tmp_path / "elsewhere").mkdir()
    done = subprocess.run(run, cwd=tmp_path / "elsewhere", capture_output=True, text=True)
    assert "(ModuleNotFoundError: No module named 'mine_encoder'; add its folder to PYTHONPATH)" in done.stderr


def test_a_subclass_of_a_family_is_no_plain_model_of_it(tiny_bert, tmp_path, monkeypatch):
    """It has the same tensors, and would have been loaded as what it is not."""
    (tmp_path / "mine_bert.py").write_text(
        "from embedft.encoders import bert\n\n\nclass Encoder(bert.Encoder):\n"
        "    def forward(self, packed):\n        return 2 * super().forward(packed).tanh()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    embedder = load_embedder(tiny_bert, device="cpu")
    plain = embedder.encode(TEXTS)
    import mine_bert

    encoder = mine_bert.Encoder(embedder.encoder.config)
    encoder.load_state_dict(embedder.encoder.state_dict())
    embedder.encoder = encoder.eval()
    embedder.save(tmp_path / "model")
    again = load_embedder(tmp_path / "model", device="cpu")
    np.testing.assert_array_equal(again.encode(TEXTS), embedder.encode(TEXTS))
    assert np.abs(again.encode(TEXTS) - plain).max() > 1e-3


def test_what_cannot_be_saved_is_refused_before_the_first_step(make, mine, tmp_path, monkeypatch):
    @dataclass
    class Local:
        hidden_size: int
        vocab_size: int
        max_length = 64

    embedder, dataset = make(), make_dataset()
    plain, sizes = embedder.encoder, (embedder.encoder.config.hidden_size, embedder.encoder.config.vocab_size)
    steps = []

    def refused(encoder: nn.Module) -> str:
        embedder.encoder = encoder
        with pytest.raises(ValueError, match=r"cannot be|expected") as error:
            finetune(
                embedder, dataset, FinetuneConfig(epochs=1), out=tmp_path / "run", on_step=lambda *_: steps.append(1)
            )
        assert not (tmp_path / "run").exists()
        return str(error.value)

    assert "Local' cannot be imported by another program" in refused(mine.Encoder(Local(*sizes)))
    assert "mine_encoder.Other'> cannot be made from its config alone" in refused(mine.Other(plain.config, more=1))
    monkeypatch.setattr(mine.Larger, "dim", sizes[0], raising=False)
    larger = mine.Larger(plain.config)
    monkeypatch.setattr(mine.Larger, "dim", sizes[0] + 1)
    assert f"token.weight is [{sizes[1]}, {sizes[0]}], expected [{sizes[1]}, {sizes[0] + 1}]" in refused(larger)
    assert "name=(1,)" in refused(mine.Encoder(mine.Config(*sizes, name=(1,))))
    assert "on device meta (RuntimeError: Tensor.item() cannot be called on meta" in refused(mine.Reading(plain.config))
    monkeypatch.setattr(mine, "Encoder", mine.Larger)
    assert "cannot be saved: it loads as <class 'mine_encoder.Larger'>" in refused(plain)
    monkeypatch.setattr(type(plain), "__module__", "__main__")
    assert "'__main__.Encoder' cannot be imported by another program" in refused(plain)
    assert not steps


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder": "os.system"}, "os.system and mine_encoder.Config are not an nn.Module and a dataclass"),
        ({"encoder": "pathlib.Path"}, "not an nn.Module and a dataclass"),
        (
            {"encoder": "mine_encoder.None"},
            "here (AttributeError: module 'mine_encoder' has no attribute 'None')",
        ),
        *(
            ({"encoder": path}, f"config.json: the class {path!r} cannot be imported by another program")
            for path in (5, "", "..", ".a.B", "noDot", "a-b.C", "embedft.__main__.X", "idlelib.__main__.X")
        ),
        ({"encoder": "mine_exits.X"}, "config.json: .*mine_exits.X, which cannot be imported here (SystemExit: 1)"),
        ({"encoder": "mine_fails.X"}, "config.json: .*here (ZeroDivisionError: division by zero)"),
        ({"encoder": "mine_absent.X"}, "No module named 'mine_absent'; add its folder to PYTHONPATH)"),
        ({"encoder": "mine_encoder.Asserting"}, "from its config alone on device meta (AssertionError: another name)"),
        (
            {"encoder_config": "mine_encoder.Unlimited"},
            "config.json: mine_encoder.Unlimited: max_length is None, expected",
        ),
        (
            {"encoder_config": "mine_encoder.Sizeless", "settings": {"max_length": 9}},
            "config.json: mine_encoder.Sizeless: hidden_size is None, expected a number of at least 1",
        ),
        ({"settings": {}}, "config.json: mine_encoder.Config cannot be made from its settings (TypeError: "),
        ({"settings": 3}, "config.json: mine_encoder.Config cannot be made from its settings (TypeError: "),
        ({"settings": {"hidden_size": None, "vocab_size": 200}}, "config.json: .*hidden_size is None, expected a"),
        ({"settings": {"hidden_size": 1, "vocab_size": 200}}, "token.weight is "),
        ({"encoder_config": "torch.nn.Linear"}, "not an nn.Module and a dataclass"),
    ],
)
def test_a_config_that_is_wrong(make, tmp_path, changes, message):
    (tmp_path / "mine_exits.py").write_text("import sys\nsys.exit(1)")
    (tmp_path / "mine_fails.py").write_text("1 / 0")
    make().save(tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    write_json(config, read_json(config) | changes)
    with pytest.raises(ValueError, match=re.escape(message).replace(r"\.\*", ".*")) as error:
        load_embedder(tmp_path / "model", device="cpu")
    assert "\n" not in str(error.value)


def test_sizes_are_compared_before_memory_is_allocated(make, tmp_path):
    make().save(tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    config = read_json(path)
    size = config["settings"]["hidden_size"]

    def refused(encoder: str, **settings: int) -> str:
        write_json(path, config | {"encoder": f"mine_encoder.{encoder}", "settings": config["settings"] | settings})
        with pytest.raises(ValueError, match="expected") as error:
            load_embedder(tmp_path / "model", device="cpu")
        return str(error.value)

    assert f"layers.0.bias is absent, expected [{size}]" in refused("Deep", num_layers=1)
    assert f"expected [{10**12}, {size}]" in refused("Encoder", vocab_size=10**12)


def test_an_encoder_of_a_family_in_place_of_a_custom_one_is_not_saved(make, tiny_bert, tmp_path):
    make().save(tmp_path / "model")
    embedder = load_embedder(tmp_path / "model", device="cpu")
    embedder.encoder = load_embedder(tiny_bert, device="cpu").encoder
    with pytest.raises(ValueError, match="was not loaded from a model folder of its encoder's family"):
        embedder.save(tmp_path / "bert")
