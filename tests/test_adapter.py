"""adapter.py and maps.py: maps by hand, sides, files, LlamaIndex's folder, an Embedder that has an adapter."""

import json
import warnings

import numpy as np
import pytest
import torch
from naming import naming
from tiny import make_dataset, make_embedder
from torch import nn

from embedft import Adapter, evaluate, load_embedder
from embedft.device import seeded
from embedft.encoders.adapter import Base
from embedft.encoders.maps import ACTIVATIONS, KINDS, LinearMap, LowRank, TwoLayer, build_map
from embedft.files import read_json, write_json

OPTIONS = {"linear": {}, "low_rank": {"rank": 2}, "two_layer": {"hidden": 3}}


def filled(part, seed=0):
    """The map with every parameter drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in part.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return part


def make(kind, in_features=4, out_features=None, *, seed=0, **options):
    return filled(build_map(kind, in_features, out_features, **OPTIONS[kind], **options), seed)


def vectors(num=5, dim=4, dtype=torch.float32, seed=1):
    return torch.randn(num, dim, dtype=dtype, generator=torch.Generator().manual_seed(seed))


# Maps, by hand.


def test_linear_by_hand():
    part = LinearMap(2)
    part.weight.data, part.bias.data = torch.tensor([[1.0, 2.0], [0.0, 3.0]]), torch.tensor([10.0, 20.0])
    assert part(torch.tensor([[1.0, 1.0], [0.0, 2.0]])).tolist() == [[13.0, 23.0], [14.0, 26.0]]
    # ||W - I||^2 = 2^2 + 2^2, ||b||^2 = 100 + 400, two features.
    assert part.departure().item() == (8 + 500) / 2


def test_low_rank_by_hand():
    part = LowRank(2, rank=1)
    part.up.data, part.down.data = torch.tensor([[2.0], [3.0]]), torch.tensor([[1.0, -1.0]])
    part.bias.data = torch.tensor([0.5, 0.0])
    # V x = 3 - 1 = 2: x + (4, 6) + b.
    assert part(torch.tensor([[3.0, 1.0]])).tolist() == [[7.5, 7.0]]
    # U V = [[2, -2], [3, -3]]: 4 + 4 + 9 + 9.
    assert part.departure().item() == pytest.approx((26 + 0.25) / 2)


def test_two_layer_by_hand():
    part = TwoLayer(2, hidden=2)
    part.weight1.data, part.bias1.data = torch.tensor([[1.0, 0.0], [0.0, -1.0]]), torch.tensor([0.0, 1.0])
    part.weight2.data, part.bias2.data = torch.tensor([[1.0, 1.0], [2.0, 0.0]]), torch.tensor([0.0, 1.0])
    part.scale.data = torch.tensor([0.5])
    # Hidden: relu(3, -5 + 1) = (3, 0); second layer (3, 6 + 1); half of it and x.
    assert part(torch.tensor([[3.0, 5.0]])).tolist() == [[3 + 1.5, 5 + 3.5]]
    # A quarter of 1 + 1 + 4 and 1, two features.
    assert part.departure().item() == 0.25 * 7 / 2
    bare = TwoLayer(2, hidden=2, residual=False)
    bare.load_state_dict({name: t for name, t in part.state_dict().items() if name != "scale"})
    assert bare(torch.tensor([[3.0, 5.0]])).tolist() == [[3.0, 7.0]]
    assert bare.departure().item() == 7 / 2


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("out", "resized"), [(4, [1, 2, 3, 4]), (2, [1, 2]), (6, [1, 2, 3, 4, 0, 0])])
@pytest.mark.parametrize("kind", KINDS)
def test_a_map_starts_at_the_identity(kind, out, resized, bias):
    part = build_map(kind, 4, out, bias=bias, **OPTIONS[kind])
    assert part(torch.tensor([[1.0, 2.0, 3.0, 4.0]])).tolist() == [resized]
    assert part.departure().item() == 0
    assert (part.in_features, part.out_features) == (4, out)
    assert [name for name, _ in part.named_parameters() if "bias" in name] == (
        [] if not bias else ["bias1", "bias2"] if kind == "two_layer" else ["bias"]
    )
    # It can leave it: some gradient is not zero.
    part(vectors()).square().sum().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in part.parameters())


@pytest.mark.parametrize("out", [3, 4, 6])
@pytest.mark.parametrize("kind", ["linear", "low_rank"])
def test_dense_is_the_same_map(kind, out):
    part = make(kind, 4, out)
    weight, bias = part.dense()
    torch.testing.assert_close(vectors() @ weight.T + bias, part(vectors()))
    # The distance from the identity, of the matrix itself.
    away = (weight - torch.eye(out, 4)).square().sum() + bias.square().sum()
    torch.testing.assert_close(part.departure(), away / out)
    assert make(kind, bias=False).dense()[1] is None


def test_two_layers_are_not_dense():
    with pytest.raises(ValueError, match=naming("two-layer", "linear")):
        make("two_layer").dense()


@pytest.mark.parametrize("kind", ["low_rank", "two_layer"])
def test_random_weights_follow_the_seed(kind):
    def draw(seed):
        with seeded(seed, torch.device("cpu")):
            return build_map(kind, 400, **OPTIONS[kind]).state_dict()

    name = "down" if kind == "low_rank" else "weight1"
    assert torch.equal(draw(1)[name], draw(1)[name])
    assert not torch.equal(draw(1)[name], draw(2)[name])
    assert draw(1)[name].std().item() == pytest.approx(1 / 20, rel=0.1)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_are_those_of_torch(activation):
    part = make("two_layer", activation=activation)
    hidden = getattr(nn.functional, activation)(vectors() @ part.weight1.T + part.bias1)
    expected = part.scale * (hidden @ part.weight2.T + part.bias2) + vectors()
    torch.testing.assert_close(part(vectors()), expected)


@pytest.mark.parametrize(
    ("arguments", "options", "facts"),
    [
        (("cubic", 4), {}, ("kind", "cubic", "linear", "low_rank", "two_layer")),
        (("linear", 0), {}, ("in_features", 0, 1)),
        (("linear", 4, -1), {}, ("out_features", -1, 1)),
        (("low_rank", 4), {"rank": 0}, ("rank", 0, 1)),
        (("low_rank", 4), {"rank": True}, ("rank", True, 1)),
        (("two_layer", 4), {"hidden": 2.5}, ("hidden", 2.5, 1)),
        (("linear", 4), {"rank": 2}, ("linear", "unexpected", "rank")),
        (("low_rank", 4), {}, ("low_rank", "missing", "rank")),
        (("two_layer", 4), {"hidden": 2, "activation": "cube"}, ("activation", "cube", "relu", "selu")),
    ],
)
def test_a_wrong_map_is_refused(arguments, options, facts):
    with pytest.raises(ValueError, match=naming(*facts)):
        build_map(*arguments, **options)


# The adapter.


def test_sides():
    q, d = make("linear", seed=1), make("low_rank", seed=2)
    x = vectors()
    assert Adapter(q).side == "query"
    torch.testing.assert_close(Adapter(q)(x), q(x))
    assert Adapter(q)(x, "document") is x
    assert Adapter(document=d).side == "document"
    assert Adapter(document=d)(x) is x
    torch.testing.assert_close(Adapter(document=d)(x, role="document"), d(x))
    both, shared = Adapter(q, d), Adapter(q, q)
    assert (both.side, len(list(both.children()))) == ("both", 2)
    assert (shared.side, len(list(shared.children()))) == ("shared", 1)
    torch.testing.assert_close(both(x, "document"), d(x))
    torch.testing.assert_close(shared(x, "document"), q(x))
    torch.testing.assert_close(both.departure(), q.departure() + d.departure())
    torch.testing.assert_close(shared.departure(), q.departure())
    assert len(list(shared.parameters())) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_float64_stays(kind):
    adapter = Adapter(make(kind))
    assert adapter(vectors()).dtype is torch.float32
    found = adapter(vectors(dtype=torch.float64))
    assert found.dtype is torch.float64
    torch.testing.assert_close(found, adapter.double()(vectors(dtype=torch.float64)))


@pytest.mark.parametrize("normalize", [True, False])
def test_transform(normalize):
    adapter = Adapter(make("linear"), normalize=normalize)
    expected = adapter(vectors()).detach().numpy()
    if normalize:
        expected = expected / np.linalg.norm(expected, axis=1, keepdims=True)
    found = adapter.transform(vectors().numpy(), slice_rows=2)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert found.dtype == np.float32
    frozen = vectors().numpy().astype(np.float16)
    frozen.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert adapter.transform(frozen, "document").shape == (5, 4)
    assert adapter.transform(np.empty((0, 4), np.float32)).shape == (0, 4)


def test_wrong_adapters_are_refused():
    with pytest.raises(ValueError, match=naming("adapter", "map")):
        Adapter()
    with pytest.raises(ValueError, match=naming("features", (4, 2), ..., "queries", ..., (4, 4), ..., "documents")):
        Adapter(make("linear", 4, 2))
    with pytest.raises(ValueError, match=naming("features", (4, 4), ..., "queries", ..., (4, 2), ..., "documents")):
        Adapter(document=make("linear", 4, 2))
    with pytest.raises(ValueError, match=naming("features", (4, 2), ..., "queries", ..., (4, 3), ..., "documents")):
        Adapter(make("linear", 4, 2), make("linear", 4, 3))
    with pytest.raises(ValueError, match=naming("small", ..., 3, ..., "adapter", ..., 4)):
        Adapter(make("linear"), base=Base("small", 3, {}))
    adapter = Adapter(make("linear"))
    with pytest.raises(ValueError, match=naming("role", "title", "query", "document")):
        adapter(vectors(), "title")
    for call in (adapter, lambda x: adapter.transform(x.numpy())):
        for wrong in (torch.ones(4), torch.ones(2, 3)):
            with pytest.raises(ValueError, match=naming("vectors", list(wrong.shape), "[N, 4]")):
                call(wrong)


def test_check_base():
    one = Base("model", 4, {"query": "a" * 64, "document": "b" * 64})
    other = Base("other", 4, {"query": "a" * 64, "document": "c" * 64})
    adapter = Adapter(make("linear"), base=one)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapter.check_base(one)
    with pytest.raises(ValueError, match=naming("document", "model", ..., "b" * 12, ..., "other", ..., "c" * 12)):
        adapter.check_base(other)
    with pytest.raises(ValueError, match=naming("features", "adapter", ..., 4, ..., "small", ..., 3)):
        adapter.check_base(Base("small", 3, {}))
    for base in (None, Base("model", 4, {})):
        adapter.base = base
        with pytest.warns(UserWarning, match=naming("adapter", "model", "other")):
            adapter.check_base(other)


# Files.

SIDES = {
    "query": lambda kind: {"query": make(kind)},
    "document": lambda kind: {"document": make(kind)},
    "both": lambda kind: {"query": make(kind, 4, 3), "document": make("linear", 4, 3, seed=5)},
    "shared": lambda kind: dict.fromkeys(("query", "document"), make(kind, 4, 3)),
}


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded(tmp_path, kind, side):
    base = Base("model", 4, {"query": "a" * 64})
    adapter = Adapter(**SIDES[side](kind), base=base, normalize=side == "query")
    adapter.save(tmp_path / "adapter")
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == ["adapter.json", "adapter.safetensors"]
    found = Adapter.load(tmp_path / "adapter")
    assert (found.side, found.base, found.normalize) == (side, base, side == "query")
    for role in ("query", "document"):
        assert torch.equal(found(vectors(), role), adapter(vectors(), role))
    assert [part.settings for part in found.children()] == [part.settings for part in adapter.children()]


def change(**values):
    def write(folder):
        write_json(folder / "adapter.json", {**read_json(folder / "adapter.json"), **values})

    return write


def cut(folder):
    weights = folder / "adapter.safetensors"
    weights.write_bytes(weights.read_bytes()[:-3])


def without(key):
    def write(folder):
        config = read_json(folder / "adapter.json")
        del config[key]
        write_json(folder / "adapter.json", config)

    return write


def foreign(content):
    """Writes weights of another format, with their hash in the configuration."""

    def write(folder):
        from embedft.files import sha256_file

        (folder / "adapter.safetensors").write_bytes(content)
        change(weights_sha256=sha256_file(folder / "adapter.safetensors"))(folder)

    return write


LINEAR = {"kind": "linear", "in_features": 4, "out_features": 4, "bias": True}
NARROW = {**LINEAR, "out_features": 3}


@pytest.mark.parametrize(
    ("damage", "facts"),
    [
        (cut, ("adapter.json", "adapter.safetensors", "SHA-256")),
        (lambda folder: (folder / "adapter.safetensors").unlink(), ("adapter.safetensors", "pytorch_model.bin")),
        (lambda folder: (folder / "adapter.json").unlink(), ("adapter.json", "pytorch_model.bin")),
        (lambda folder: (folder / "adapter.json").write_text("[]"), ("adapter.json", "object", "[]")),
        (lambda folder: (folder / "adapter.json").write_text("{"), ("adapter.json", 1, 2, "JSON")),
        (change(format_version=1), ("format_version", 1, 2)),
        (change(query={**LINEAR, "kind": "cubic"}), ("adapter.json", "kind", "cubic")),
        (change(query={**LINEAR, "rank": 2}), ("adapter.json", "linear", "unexpected", "rank")),
        (change(query={"in_features": 4}), ("adapter.json", "missing", "kind")),
        (change(query=None), ("adapter.json", "map")),
        (change(document=[]), ("adapter.json", "mapping", "list")),
        (change(query={**LINEAR, "in_features": 10**30}), ("adapter.json", "in_features", 10**30, "1,000,000")),
        # 4 TB if it took memory.
        (change(query={**LINEAR, "in_features": 10**6, "out_features": 10**6}), ("query.bias", ..., [4], ..., [10**6])),
        (change(query={**LINEAR, "bias": False}), ("adapter.safetensors", "query.bias", ..., [4], ..., "absent")),
        (change(query=NARROW, document=NARROW), ("adapter.safetensors", "document.bias", ..., "absent", ..., [3])),
        (change(query={**LINEAR, "in_features": 3, "out_features": 3}), ("query.bias", ..., [4], ..., [3])),
        (change(base={"name": "model"}), ("adapter.json", "missing", "dim", "fingerprints")),
        (without("side"), ("adapter.json", "side")),
        (foreign(b"not tensors"), ("adapter.json", "header")),
    ],
)
def test_damaged_files_are_refused(tmp_path, damage, facts):
    Adapter(make("linear")).save(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=naming(tmp_path, *facts)):
        Adapter.load(tmp_path)


def test_values_that_are_not_finite_are_refused(tmp_path):
    adapter = Adapter(make("linear"))
    adapter.query.bias.data[1] = float("nan")
    adapter.save(tmp_path)
    with pytest.raises(ValueError, match=naming(tmp_path / "adapter.safetensors", "query.bias", "finite")):
        Adapter.load(tmp_path)


def test_weights_of_another_save_are_refused(tmp_path):
    """What a kill between the two files leaves."""
    Adapter(make("linear")).save(tmp_path / "one")
    Adapter(make("linear", seed=9)).save(tmp_path / "other")
    (tmp_path / "other" / "adapter.safetensors").replace(tmp_path / "one" / "adapter.safetensors")
    with pytest.raises(ValueError, match=naming(tmp_path / "one" / "adapter.json", "adapter.safetensors", "SHA-256")):
        Adapter.load(tmp_path / "one")


# LlamaIndex's folder. Its two classes, as its files and PARITY.md describe them.


class TheirLinear(nn.Module):
    def __init__(self, in_features, out_features, bias):
        super().__init__()
        self.linear = nn.Linear(in_features, out_features, bias=bias)

    def forward(self, x):
        return self.linear(x)


class TheirTwoLayer(nn.Module):
    def __init__(self, in_features, hidden_features, out_features, bias, activation_fn_str, add_residual):
        super().__init__()
        self.linear1 = nn.Linear(in_features, hidden_features, bias=bias)
        self.linear2 = nn.Linear(hidden_features, out_features, bias=bias)
        self.residual_weight = nn.Parameter(torch.rand(1))
        self.activation, self.add_residual = getattr(nn.functional, activation_fn_str), add_residual

    def forward(self, x):
        y = self.linear2(self.activation(self.linear1(x)))
        return self.residual_weight * y + x if self.add_residual else y


THEIRS = [
    (TheirLinear, {"in_features": 4, "out_features": 4, "bias": True}),
    (TheirLinear, {"in_features": 4, "out_features": 4, "bias": False}),
    *(
        (
            TheirTwoLayer,
            {
                "in_features": 4,
                "hidden_features": 3,
                "out_features": 4,
                "bias": bias,
                "activation_fn_str": "tanh",
                "add_residual": residual,
            },
        )
        for bias in (True, False)
        for residual in (True, False)
    ),
]


@pytest.mark.parametrize(("cls", "config"), THEIRS)
def test_what_llamaindex_wrote_is_read(tmp_path, cls, config):
    theirs = cls(**config)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(config))
    torch.save(theirs.state_dict(), tmp_path / "theirs" / "pytorch_model.bin")
    adapter = Adapter.load(tmp_path / "theirs")
    assert (adapter.side, adapter.base) == ("query", None)
    torch.testing.assert_close(adapter(vectors()), theirs(vectors()), rtol=0, atol=1e-7)


UNBIASED, DAMAGED = {"in_features": 4, "out_features": 4, "bias": False}, ("pytorch_model.bin", "tensors")


@pytest.mark.parametrize(
    ("config", "weights", "facts"),
    [
        ({"in_features": 4, "bias": True}, {}, ("config.json", "out_features")),
        ({"in_features": 4, "out_features": 2, "bias": True}, {}, ("config.json", "features", (4, 2), (4, 4))),
        ({**UNBIASED, "hidden_features": 2}, {}, ("config.json", "activation_fn_str")),
        (
            {"in_features": 4, "out_features": 4, "bias": True},
            {},
            ("pytorch_model.bin", "query.bias", ..., "absent", ..., [4]),
        ),
        (UNBIASED, {"linear.w": torch.ones(1)}, ("pytorch_model.bin", "query.linear.w", ..., [1], ..., "absent")),
        (UNBIASED, [1], DAMAGED),
        (UNBIASED, {"a": 1}, DAMAGED),
        (UNBIASED, nn.Linear(2, 2), DAMAGED),
        (UNBIASED, b"", DAMAGED),
        (UNBIASED, b"junk", DAMAGED),
    ],
)
def test_foreign_llamaindex_folders_are_refused(tmp_path, config, weights, facts):
    (tmp_path / "config.json").write_text(json.dumps(config))
    if isinstance(weights, bytes):
        (tmp_path / "pytorch_model.bin").write_bytes(weights)
    else:
        torch.save(weights, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=naming(tmp_path, *facts)):
        Adapter.load(tmp_path)


def test_a_cut_llamaindex_file_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(UNBIASED))
    path = tmp_path / "pytorch_model.bin"
    torch.save({"linear.weight": torch.eye(4)}, path)
    assert torch.equal(Adapter.load(tmp_path).query.weight, torch.eye(4))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=naming(tmp_path, *DAMAGED)):
        Adapter.load(tmp_path)


# An Embedder with an adapter.

TEXTS = ["a b c", "d e f g", "7 8 9"]
SIDES_32 = {
    "query": lambda kind: {"query": make(kind, 32)},
    "document": lambda kind: {"document": make(kind, 32)},
    "both": lambda kind: {"query": make(kind, 32, 20), "document": make("linear", 32, 20, seed=5, bias=False)},
    "shared": lambda kind: dict.fromkeys(("query", "document"), make(kind, 32, 20)),
}


@pytest.fixture
def embedder(tmp_path):
    return make_embedder(tmp_path / "base", prompts={"query": "q ", "document": ""})


def fingerprint(embedder):
    """As messages show it."""
    return embedder.base().fingerprints["query"][:12]


def adapted(embedder, side="query", kind="linear"):
    embedder.attach(Adapter(**SIDES_32[side](kind), base=embedder.base()))
    return embedder


@pytest.mark.parametrize("side", SIDES_32)
def test_encode_goes_through_the_adapter(embedder, side):
    base = {role: embedder.encode(TEXTS, role=role) for role in ("query", "document")}
    fingerprints = [embedder.space(role) for role in base]
    adapted(embedder, side)
    assert embedder.dim == embedder.full_dim == embedder.adapter.out_features
    for role, vectors_ND in base.items():
        whole = embedder.adapter.transform(vectors_ND, role)
        np.testing.assert_allclose(embedder.encode(TEXTS, role=role), whole, atol=1e-6)
        # Adapted whole, then cut, then of length one.
        cut = whole[:, :5] / np.linalg.norm(whole[:, :5], axis=1, keepdims=True)
        np.testing.assert_allclose(embedder.encode(TEXTS, role=role, dim=5), cut, atol=1e-6)
        if embedder.adapter.map_of(role) is not None:
            assert np.abs(embedder.encode(TEXTS, role=role)[:, :20] - vectors_ND[:, :20]).max() > 0.01
    # What a store keeps are the vectors of the base, whatever adapter is on it.
    assert [embedder.space(role) for role in base] == fingerprints


def test_a_store_keeps_the_vectors_of_the_base(tmp_path):
    base = make_embedder(tmp_path / "base", store=tmp_path / "store")
    base.encode(TEXTS, role="query")
    embedder = make_embedder(tmp_path / "base", store=tmp_path / "store")
    adapted(embedder)
    found = embedder.encode(TEXTS, role="query")
    assert (embedder.store.hits, embedder.store.misses) == (3, 0)
    np.testing.assert_allclose(found, embedder.adapter.transform(base.encode(TEXTS, role="query")), atol=1e-6)


@pytest.mark.parametrize("side", SIDES_32)
def test_training_goes_through_the_adapter(embedder, side):
    adapted(embedder, side)
    queries, documents = embedder.pack(TEXTS, role="query"), embedder.pack(TEXTS[:2], role="document")
    Q, D = embedder.embed_pair(queries, documents)
    torch.testing.assert_close(Q, embedder.embed(queries, role="query"))
    torch.testing.assert_close(D, embedder.embed(documents, role="document"))
    np.testing.assert_allclose(Q.detach(), embedder.encode(TEXTS, role="query"), atol=1e-6)
    np.testing.assert_allclose(D.detach(), embedder.encode(TEXTS[:2], role="document"), atol=1e-6)
    (Q.sum() + D.sum()).backward()
    assert all(part.weight.grad is not None for part in embedder.adapter.children())


def test_hashes(embedder):
    before = embedder.sha256(), embedder.base()
    adapted(embedder)
    assert embedder.sha256() != before[0]
    assert embedder.base() == before[1]


def test_a_pickle_in_a_model_folder_is_read_on_request_alone(embedder, tmp_path):
    place = tmp_path / "base" / "adapter"
    place.mkdir()
    (place / "adapter.json").write_text("{}")  # without its weights, only LlamaIndex's files are whole
    (place / "config.json").write_text(json.dumps({"in_features": 32, "out_features": 32, "bias": False}))
    torch.save({"linear.weight": torch.eye(32)}, place / "pytorch_model.bin")
    with pytest.raises(ValueError, match=naming(place / "pytorch_model.bin", "allow_pickle")):
        load_embedder(tmp_path / "base", device="cpu")
    for options in ({"allow_pickle": True}, {"adapter": place}):
        with pytest.warns(UserWarning, match=naming("adapter", "model")):
            found = load_embedder(tmp_path / "base", device="cpu", **options)
        assert torch.equal(found.adapter.query.weight, torch.eye(32))


def test_attach_refuses(embedder, tmp_path):
    with pytest.raises(ValueError, match=naming("features", 4, tmp_path / "base", 32)):
        embedder.attach(Adapter(make("linear")))
    with pytest.warns(UserWarning, match=naming("adapter", "model", tmp_path / "base")):
        embedder.attach(Adapter(make("linear", 32)))
    adapter = Adapter(make("linear", 32), base=embedder.base())
    with torch.no_grad():
        next(embedder.encoder.parameters())[0, 0] += 1
    facts = tmp_path / "base", "query", adapter.base.fingerprints["query"][:12], ..., fingerprint(embedder)
    with pytest.raises(ValueError, match=naming(*facts)):
        embedder.attach(adapter)
    embedder.adapter, embedder.truncate_dim = None, 30
    with pytest.raises(ValueError, match=naming("truncate_dim", 30, 20)):
        adapted(embedder, "shared")


def test_load_embedder_with_an_adapter(embedder, tmp_path):
    adapted(embedder)
    embedder.adapter.save(tmp_path / "adapter")
    embedder.adapter.base = embedder.base()
    for given in (embedder.adapter, tmp_path / "adapter"):
        if given is not embedder.adapter:
            Adapter(embedder.adapter.query, base=embedder.base()).save(given)
        found = make_embedder(tmp_path / "base", prompts={"query": "q ", "document": ""}, adapter=given)
        np.testing.assert_array_equal(found.encode(TEXTS, role="query"), embedder.encode(TEXTS, role="query"))
    with pytest.raises(
        ValueError, match=naming(tmp_path / "base", tmp_path / "base", "query", fingerprint(embedder), "prompts")
    ):
        make_embedder(tmp_path / "base", prompts={"query": "other "}, adapter=given)


@pytest.mark.parametrize("fitted", ["float32", "bfloat16"])
def test_an_adapter_is_for_its_model_in_a_lower_precision_too(tmp_path, fitted):
    adapter = Adapter(make("linear", 32), base=make_embedder(tmp_path / "base", dtype=fitted).base())
    embedder = make_embedder(tmp_path / "base", dtype="bfloat16")
    vectors_ND = embedder.encode(TEXTS, role="query")
    embedder = make_embedder(tmp_path / "base", dtype="bfloat16", adapter=adapter)
    np.testing.assert_array_equal(embedder.encode(TEXTS, role="query"), adapter.transform(vectors_ND))
    with pytest.raises(ValueError, match=naming("weights", "lengths", "prompts")):
        make_embedder(tmp_path / "base", dtype="bfloat16", max_length=8, adapter=adapter)


@pytest.mark.parametrize("side", SIDES_32)
@pytest.mark.parametrize("kind", ["linear", "low_rank"])
def test_saved_with_its_model(embedder, tmp_path, kind, side):
    from sentence_transformers import SentenceTransformer

    adapted(embedder, side, kind)
    embedder.save(tmp_path / "saved")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = load_embedder(tmp_path / "saved", device="cpu")
    theirs = SentenceTransformer(str(tmp_path / "saved"), device="cpu", local_files_only=True)
    for role, encode in (("query", theirs.encode_query), ("document", theirs.encode_document)):
        ours = embedder.encode(TEXTS, role=role)
        np.testing.assert_array_equal(found.encode(TEXTS, role=role), ours)
        np.testing.assert_allclose(encode(TEXTS), ours, atol=1e-6)
    # Without a role they take the documents' route.
    np.testing.assert_allclose(theirs.encode(TEXTS), embedder.encode(TEXTS, role="document"), atol=1e-6)
    # What was saved is of a model of its own, and says so.
    assert found.adapter.side == side
    assert found.adapter.base.fingerprints == found.base().fingerprints


def test_saved_again_without_its_adapter(embedder, tmp_path):
    base = embedder.encode(TEXTS, role="query")
    adapted(embedder).save(tmp_path / "saved")
    embedder.adapter = None
    embedder.save(tmp_path / "saved")
    assert load_embedder(tmp_path / "saved", device="cpu").adapter is None
    assert not (tmp_path / "saved" / "adapter").exists()
    np.testing.assert_array_equal(load_embedder(tmp_path / "saved", device="cpu").encode(TEXTS, role="query"), base)


def test_a_saved_adapter_goes_with_other_lengths_but_not_other_weights(embedder, tmp_path):
    adapted(embedder).save(tmp_path / "saved")
    assert load_embedder(tmp_path / "saved", device="cpu", max_length=16).adapter is not None
    assert load_embedder(tmp_path / "saved", device="cpu", prompts={}).adapter is not None
    other = make_embedder(tmp_path / "base")
    with torch.no_grad():
        next(other.encoder.parameters())[0, 0] += 1
    other.save(tmp_path / "other")
    (tmp_path / "other" / "model.safetensors").replace(tmp_path / "saved" / "model.safetensors")
    bases = tmp_path / "base", ..., fingerprint(embedder), ..., tmp_path / "saved"
    with pytest.raises(ValueError, match=naming(*bases, "query", "weights")):
        load_embedder(tmp_path / "saved", device="cpu")


def test_an_adapter_goes_with_other_ways_to_multiply(embedder, tmp_path):
    """A store keeps their vectors apart, but the adapter still fits the model."""
    adapted(embedder).save(tmp_path / "saved")
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        found = load_embedder(tmp_path / "saved", device="cpu")
        assert found.adapter is not None
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found.attach(Adapter(make("linear", 32), base=embedder.base()))
        assert found.space("query").fingerprint != embedder.base().fingerprints["query"]
    finally:
        matmul.fp32_precision = before


def test_saved_in_half_precision(tmp_path):
    """It loads in float32, as every model does, and in its own type."""
    base = make_embedder(tmp_path / "base", dtype=torch.bfloat16)
    base.attach(Adapter(LinearMap(32), base=base.base()))
    base.save(tmp_path / "saved")
    for dtype in (torch.float32, torch.bfloat16):
        assert load_embedder(tmp_path / "saved", device="cpu", dtype=dtype).adapter is not None


def test_two_layers_are_not_written_for_sentence_transformers(embedder, tmp_path):
    adapted(embedder, "query", "two_layer")
    with pytest.raises(ValueError, match=naming("two-layer", "linear")):
        embedder.save(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_without_its_own_files_an_adapter_is_a_head(embedder, tmp_path):
    """As sentence-transformers reads the folder, and as it saves it again."""
    adapted(embedder).save(tmp_path / "saved")
    expected = load_embedder(tmp_path / "saved", device="cpu")
    (tmp_path / "saved" / "adapter" / "adapter.json").unlink()
    found = load_embedder(tmp_path / "saved", device="cpu")
    assert found.adapter is None
    for role in ("query", "document"):
        assert np.abs(found.encode(TEXTS, role=role) - expected.encode(TEXTS, role=role)).max() <= 1e-6


def test_evaluate_takes_an_embedder_with_an_adapter(embedder):
    dataset = make_dataset()
    plain = evaluate(embedder, dataset).metrics
    embedder.attach(Adapter(LinearMap(32), base=embedder.base()))
    assert evaluate(embedder, dataset).metrics == plain
    embedder.adapter.query.weight.data *= -1
    assert evaluate(embedder, dataset).metrics["mrr@10"] < plain["mrr@10"]
