"""custom.py: an encoder of a user's class, trained, saved and loaded by another program; and those that cannot be."""

import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from naming import names, naming
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


class ByIdentity(Config):
    __eq__ = object.__eq__


class Outer:
    class Nested(Encoder):
        pass


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
    assert names(done.stderr.splitlines()[-1], "mine_encoder.Encoder", "ModuleNotFoundError", "PYTHONPATH")


def test_configs_are_compared_by_their_fields(make, mine, tmp_path):
    embedder = make()
    sizes = (embedder.encoder.config.hidden_size, embedder.encoder.config.vocab_size)
    embedder.encoder = mine.Encoder(mine.ByIdentity(*sizes))
    embedder.save(tmp_path / "model")
    again = load_embedder(tmp_path / "model", device="cpu")
    np.testing.assert_array_equal(again.encode(TEXTS), embedder.encode(TEXTS))
    embedder.encoder = mine.Encoder(mine.ByIdentity(*sizes, name=(1,)))
    with pytest.raises(ValueError, match=naming("mine_encoder.Encoder", "name=(1,)", "name=[1]")):
        embedder.save(tmp_path / "other")


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

    def assert_refused(encoder: nn.Module, *facts) -> None:
        embedder.encoder = encoder
        with pytest.raises(ValueError, match=naming(*facts)):
            finetune(
                embedder, dataset, FinetuneConfig(epochs=1), out=tmp_path / "run", on_step=lambda *_: steps.append(1)
            )
        assert not (tmp_path / "run").exists()

    assert_refused(mine.Encoder(Local(*sizes)), repr(f"{Local.__module__}.{Local.__qualname__}"), "module.name")
    assert_refused(mine.Outer.Nested(plain.config), "mine_encoder.Outer.Nested", "top of a module")
    assert_refused(mine.Other(plain.config, more=1), "mine_encoder.Other", "config", "TypeError")
    monkeypatch.setattr(mine.Larger, "dim", sizes[0], raising=False)
    larger = mine.Larger(plain.config)
    monkeypatch.setattr(mine.Larger, "dim", sizes[0] + 1)
    assert_refused(larger, "token.weight", [sizes[1], sizes[0]], ..., [sizes[1], sizes[0] + 1])
    assert_refused(mine.Encoder(mine.Config(*sizes, name=(1,))), "mine_encoder.Encoder", "name=(1,)", "name=[1]")
    assert_refused(mine.Reading(plain.config), "mine_encoder.Reading", "meta", "RuntimeError", "Tensor.item()")
    monkeypatch.setattr(mine, "Encoder", mine.Larger)
    assert_refused(plain, "mine_encoder.Encoder", "mine_encoder.Larger")
    monkeypatch.setattr(type(plain), "__module__", "__main__")
    assert_refused(plain, "__main__.Encoder", "module.name")
    assert not steps


@pytest.mark.parametrize(
    ("changes", "facts"),
    [
        ({"encoder": "os.system"}, ("os.system", "mine_encoder.Config", "nn.Module", "dataclass")),
        ({"encoder": "pathlib.Path"}, ("pathlib.Path", "mine_encoder.Config", "nn.Module", "dataclass")),
        ({"encoder": "mine_encoder.None"}, ("mine_encoder.None", "AttributeError", "'None'")),
        *(
            ({"encoder": path}, (repr(path), "module.name"))
            for path in (5, "", "..", ".a.B", "noDot", "a-b.C", "embedft.__main__.X", "idlelib.__main__.X")
        ),
        ({"encoder": "mine_exits.X"}, ("mine_exits.X", "SystemExit", 1)),
        ({"encoder": "mine_fails.X"}, ("mine_fails.X", "ZeroDivisionError")),
        ({"encoder": "mine_absent.X"}, ("mine_absent.X", "ModuleNotFoundError", "PYTHONPATH")),
        ({"encoder": "mine_encoder.Asserting"}, ("mine_encoder.Asserting", "meta", "AssertionError: another name")),
        ({"encoder_config": "mine_encoder.Unlimited"}, ("mine_encoder.Unlimited", "max_length", None, 1)),
        (
            {"encoder_config": "mine_encoder.Sizeless", "settings": {"max_length": 9}},
            ("mine_encoder.Sizeless", "hidden_size", None, 1),
        ),
        ({"settings": {}}, ("mine_encoder.Config", "settings", "TypeError")),
        ({"settings": 3}, ("mine_encoder.Config", "settings", "TypeError")),
        ({"settings": {"hidden_size": None, "vocab_size": 200}}, ("mine_encoder.Config", "hidden_size", None, 1)),
        ({"settings": {"hidden_size": 1, "vocab_size": 200}}, ("token.weight", [200, 1])),
        ({"encoder_config": "torch.nn.Linear"}, ("mine_encoder.Encoder", "torch.nn.Linear", "nn.Module", "dataclass")),
    ],
)
def test_a_config_that_is_wrong(make, tmp_path, changes, facts):
    (tmp_path / "mine_exits.py").write_text("import sys\nsys.exit(1)")
    (tmp_path / "mine_fails.py").write_text("1 / 0")
    make().save(tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    write_json(config, read_json(config) | changes)
    with pytest.raises(ValueError, match=naming(tmp_path / "model", *facts)) as error:
        load_embedder(tmp_path / "model", device="cpu")
    assert "\n" not in str(error.value)


def test_sizes_are_compared_before_memory_is_allocated(make, tmp_path):
    make().save(tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    config = read_json(path)
    size = config["settings"]["hidden_size"]

    def assert_refused(*facts, encoder: str, **settings: int) -> None:
        write_json(path, config | {"encoder": f"mine_encoder.{encoder}", "settings": config["settings"] | settings})
        with pytest.raises(ValueError, match=naming(*facts)):
            load_embedder(tmp_path / "model", device="cpu")

    assert_refused("layers.0.bias", "absent", ..., [size], encoder="Deep", num_layers=1)
    assert_refused("token.weight", [10**12, size], encoder="Encoder", vocab_size=10**12)


def test_an_encoder_of_a_family_in_place_of_a_custom_one_is_not_saved(make, tiny_bert, tmp_path):
    make().save(tmp_path / "model")
    embedder = load_embedder(tmp_path / "model", device="cpu")
    embedder.encoder = load_embedder(tiny_bert, device="cpu").encoder
    with pytest.raises(ValueError, match=naming(type(embedder.encoder), "Embedder", "family")):
        embedder.save(tmp_path / "bert")
