"""custom.py: an encoder of a user's class, trained, saved and loaded by another program; and those that cannot be."""

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
    max_length = 64


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
    assert "mine_encoder.Encoder, which cannot be imported here (No module named 'mine_encoder')" in done.stderr


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

    assert "Local cannot be imported by another program" in refused(mine.Encoder(Local(*sizes)))
    assert "mine_encoder.Other cannot be made from its config alone" in refused(mine.Other(plain.config, more=1))
    monkeypatch.setattr(mine.Larger, "dim", sizes[0], raising=False)
    larger = mine.Larger(plain.config)
    monkeypatch.setattr(mine.Larger, "dim", sizes[0] + 1)
    assert "rebuilt from its config, has another token.weight" in refused(larger)
    assert "name=(1,)" in refused(mine.Encoder(mine.Config(*sizes, name=(1,))))
    monkeypatch.setattr(mine.Encoder, "__module__", "__main__")
    assert "__main__.Encoder cannot be imported by another program" in refused(mine.Encoder(plain.config))
    assert not steps


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder": "os.system"}, "os has no such class"),
        ({"encoder": "pathlib.Path"}, "not an nn.Module and a dataclass"),
        ({"encoder": "mine_encoder.None"}, "mine_encoder has no such class"),
        ({"encoder": ".."}, "config.json: "),
        ({"encoder": 3}, "config.json: "),
        ({"settings": {}}, "config.json: "),
        ({"settings": {"hidden_size": 1, "vocab_size": 200}}, "token.weight is "),
        ({"encoder_config": "torch.nn.Linear"}, "not an nn.Module and a dataclass"),
    ],
)
def test_a_config_that_is_wrong(make, tmp_path, changes, message):
    make().save(tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    write_json(config, read_json(config) | changes)
    with pytest.raises(ValueError, match=message):
        load_embedder(tmp_path / "model", device="cpu")
