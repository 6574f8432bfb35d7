"""lora.py: updates against a naive version in every family, merging, files of PEFT, and sides."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from families import SEQUENCES, randomize, tiny_encoder
from naming import naming
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from tiny import make_dataset, make_embedder
from torch import nn

from embedft import FinetuneConfig, finetune, load_embedder
from embedft.cli import main
from embedft.data.batches import make_batches
from embedft.encoders.folder import FAMILIES, encoder_keys
from embedft.encoders.loading import load_tokenizer
from embedft.encoders.lora import Lora, LoraConfig, Update, add_lora, merge_lora
from embedft.encoders.packing import pack
from embedft.encoders.pooling import Pooling
from embedft.encoders.store import Store
from embedft.losses.contrastive import in_batch_negatives
from embedft.training import train as train_module

TEXTS = ["a b c", "d e f g h", "a"]
HAS_LAYERS = [name for name in FAMILIES if any(isinstance(x, nn.Linear) for x in tiny_encoder(name).modules())]
every_family = pytest.mark.parametrize("model_type", HAS_LAYERS)


def make_lora(encoder, *, drawn: bool = True, **settings) -> Lora:
    """With `drawn`, B is random too, as after training."""
    lora = Lora(encoder, encoder_keys(encoder), LoraConfig(**{"rank": 3, **settings}))
    return randomize(lora) if drawn else lora


def add_drawn(embedder, **settings) -> None:
    add_lora(embedder, LoraConfig(**{"rank": 3, **settings}))
    randomize(embedder.lora)


def one_part(encoder) -> str:
    """The checkpoint's name of a layer that is stacked with others, where there are any, else of any layer."""
    stacks = [stack for stack in encoder_keys(encoder).values() if not isinstance(stack, str)]
    layers = [name for name, layer in encoder.named_modules() if isinstance(layer, nn.Linear)]
    return list(stacks[0])[-1] if stacks else layers[0]


@every_family
def test_training_starts_from_the_models_own_vectors(model_type):
    """Bit for bit, because B is zero."""
    encoder = tiny_encoder(model_type)
    lora, packed = make_lora(encoder, drawn=False), pack(SEQUENCES)
    with torch.inference_mode():
        plain = encoder(packed)
        with lora.applied(encoder):
            assert torch.equal(encoder(packed), plain)
        randomize(lora)
        with lora.applied(encoder):
            assert not torch.allclose(encoder(packed), plain, atol=1e-3)
        assert torch.equal(encoder(packed), plain)  # no hook is left


@every_family
@pytest.mark.parametrize("part", [False, True])
def test_equals_a_naive_version(model_type, part):
    """The encoder with W + alpha / rank * B A in place of W, for each part of a stack: outputs and gradients."""
    encoder = tiny_encoder(model_type).double()
    lora = make_lora(encoder, alpha=1.5, targets=[one_part(encoder)] if part else [])
    packed, weights = pack(SEQUENCES), dict(encoder.named_parameters())
    for place, update in lora.updates().items():
        dense = torch.zeros_like(weights[f"{place}.weight"])
        for i, rows in enumerate(update.rows.values()):
            before = sum(len(other) for other in list(update.rows.values())[:i])
            product = update.B[before : before + len(rows)] @ update.A[3 * i : 3 * i + 3]
            dense = dense + nn.functional.pad(product, (0, 0, rows.start, len(dense) - rows.stop))
        weights[f"{place}.weight"] = weights[f"{place}.weight"] + 1.5 / 3 * dense
    naive = torch.func.functional_call(encoder, weights, (packed,))
    with lora.applied(encoder):
        found = encoder(packed)
    torch.testing.assert_close(found, naive, rtol=0, atol=1e-9)
    signal = torch.randn(naive.shape, dtype=naive.dtype, generator=torch.Generator().manual_seed(0))
    trained = list(lora.parameters())
    assert len(trained) == 2 * len(lora.places)
    ours, theirs = (torch.autograd.grad((hidden * signal).sum(), trained) for hidden in (found, naive))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)


def test_padded_batches_are_updated_token_by_token():
    """Inputs [N, L, D] of a user's own encoder, with two parts of a stack of three, and texts longer than the rank."""
    config = LoraConfig(rank=3)
    update = Update(nn.Linear(4, 12), {"query": range(0, 4), "value": range(8, 12)}, config)
    nn.init.normal_(update.B)
    x_NLD, y_NLE = torch.randn(2, 5, 4), torch.randn(2, 5, 12)
    with torch.no_grad():
        expected = update(x_NLD.flatten(0, 1), y_NLE.flatten(0, 1).clone())
        torch.testing.assert_close(update(x_NLD, y_NLE).flatten(0, 1), expected)


@every_family
def test_merged_is_unmerged(model_type):
    """In float64, where no rounding hides a difference; `test_saved_merged` has float32."""
    encoder, packed = tiny_encoder(model_type).double(), pack(SEQUENCES)
    lora = make_lora(encoder, alpha=0.3)
    with torch.inference_mode():
        plain = encoder(packed)
        with lora.applied(encoder):
            found = encoder(packed)
        before = {name: x.clone() for name, x in encoder.state_dict().items()}
        merged = lora.merged(encoder)
        assert all(torch.equal(x, before[name]) for name, x in encoder.state_dict().items())
        encoder.load_state_dict(merged)
        torch.testing.assert_close(encoder(packed), found, rtol=0, atol=1e-9)
    assert (found - plain).abs().max() > 1e-2


def test_dropout_is_of_the_updates_input_and_in_training_only(tmp_path):
    embedder = make_embedder(tmp_path / "base", dropout=0.0)
    add_drawn(embedder, dropout=0.5)
    packed = embedder.pack(TEXTS, role="query")
    first, second = (embedder.train().embed(packed, role="query") for _ in range(2))
    assert not torch.equal(first, second)
    assert torch.equal(embedder.eval().embed(packed, role="query"), embedder.embed(packed, role="query"))


def test_targets_are_named_as_here_or_in_the_checkpoint():
    encoder = tiny_encoder("bert")
    rows = {
        name: list(update.rows) for name, update in make_lora(encoder, targets=["query", "value"]).updates().items()
    }
    attention = [f"encoder.layer.{i}.attention.self" for i in range(2)]
    assert rows == {f"layers.{i}.qkv": [f"{attention[i]}.query", f"{attention[i]}.value"] for i in range(2)}
    assert make_lora(encoder, targets=["layers.1.qkv"]).places == ["layers.1.qkv"]
    assert make_lora(encoder, targets=["attention.output.dense"]).places == [
        f"layers.{i}.attention_out" for i in range(2)
    ]
    dense = {"attention_out", "feed_forward_in", "feed_forward_out"}
    assert {place.rpartition(".")[2] for place in make_lora(encoder, targets=["dense"]).places} == dense
    with pytest.raises(ValueError, match=naming("targets", "q_proj", "query", "qkv")):
        make_lora(encoder, targets=["query", "q_proj"])


def test_settings_are_checked():
    for settings, facts in [
        ({"rank": 0}, ("rank", 0, 1)),
        ({"dropout": 1.0}, ("dropout", 1.0, 1)),
        ({"side": "passage"}, ("side", "passage", "query", "document", "both")),
        ({"side": "query", "save": "merged"}, ("save", "merged", "side", "query")),
        ({"r": 8}, ("r", "rank", "alpha")),
    ]:
        with pytest.raises(ValueError, match=naming("lora", *facts)):
            FinetuneConfig(lora=settings)


# Saved and loaded.


@pytest.mark.parametrize("side", ["both", "query", "document"])
def test_saved_as_an_adapter(tmp_path, side):
    embedder = make_embedder(tmp_path / "base")
    base = {role: embedder.encode(TEXTS, role=role) for role in ("query", "document")}
    add_drawn(embedder, targets=["query", "dense"], side=side, save="adapter")
    expected = {role: embedder.encode(TEXTS, role=role) for role in base}
    changed = {role: not np.array_equal(expected[role], base[role]) for role in base}
    assert changed == {role: side in (role, "both") for role in base}
    if side == "both":
        embedder.save(tmp_path / "saved")
    else:
        with pytest.warns(UserWarning, match=naming("PEFT", side)):
            embedder.save(tmp_path / "saved")
    assert not (tmp_path / "saved" / "model.safetensors").exists()
    loaded = load_embedder(tmp_path / "saved", device="cpu")
    assert loaded.sha256() == embedder.sha256()
    for role, vectors in expected.items():
        np.testing.assert_array_equal(loaded.encode(TEXTS, role=role), vectors)


@pytest.mark.parametrize("fault", ["weights", "base"])
def test_what_cannot_be_saved_changes_nothing(tmp_path, fault):
    """A folder with a model's weights, and LoRA of a model that came from no folder."""
    embedder, place = make_embedder(tmp_path / "base"), tmp_path / ("base" if fault == "weights" else "new")
    add_drawn(embedder, save="adapter")
    if fault == "base":
        embedder.lora.base = ""
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    facts = (place, "weights", "folder") if fault == "weights" else ("LoRA", "base", "folder")
    with pytest.raises(ValueError, match=naming(*facts)):
        embedder.save(place)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_saved_merged(tmp_path):
    embedder = make_embedder(tmp_path / "base")
    add_drawn(embedder, alpha=0.3)
    expected = embedder.encode(TEXTS)
    embedder.save(tmp_path / "saved")
    loaded = load_embedder(tmp_path / "saved", device="cpu")
    assert loaded.lora is None
    np.testing.assert_allclose(loaded.encode(TEXTS), expected, rtol=0, atol=1e-6)
    merge_lora(embedder)
    assert embedder.lora is None
    np.testing.assert_array_equal(embedder.encode(TEXTS), loaded.encode(TEXTS))
    # Saved over an adapter, it is a whole model again.
    add_drawn(embedder, save="adapter")
    with pytest.raises(ValueError, match=naming(tmp_path / "saved")):
        embedder.save(tmp_path / "saved")
    embedder.save(tmp_path / "other")
    merge_lora(embedder)
    embedder.save(tmp_path / "other")
    np.testing.assert_array_equal(load_embedder(tmp_path / "other", device="cpu").encode(TEXTS), embedder.encode(TEXTS))


def test_one_side_is_not_merged(tmp_path):
    embedder = make_embedder(tmp_path / "base")
    add_drawn(embedder, side="query")
    with pytest.raises(ValueError, match=naming("side", "query")):
        merge_lora(embedder)
    with pytest.raises(ValueError, match=naming("LoRA")):
        add_lora(embedder, LoraConfig())


def test_the_base_must_be_the_same(tmp_path):
    embedder = make_embedder(tmp_path / "base")
    add_drawn(embedder, save="adapter")
    embedder.save(tmp_path / "saved")
    shutil.move(tmp_path / "base", tmp_path / "moved")
    with pytest.raises(ValueError, match=naming(tmp_path / "base")):
        load_embedder(tmp_path / "saved")
    other = load_embedder(tmp_path / "moved", device="cpu")
    randomize(other.encoder)
    other.save(tmp_path / "base")
    with pytest.raises(ValueError, match=naming(tmp_path / "saved" / "lora.json", "base_sha256", tmp_path / "base")):
        load_embedder(tmp_path / "saved")


def edit(path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "facts"),
    [
        ({"peft_type": "IA3"}, ("peft_type", "IA3", "LORA")),
        ({"bias": "all"}, ("bias", "all", "none")),
        ({"use_rslora": True}, ("use_rslora", True, False)),
        ({"modules_to_save": ["pooler"]}, ("modules_to_save", "pooler", None)),
        ({"r": "8"}, ("r", "8", 1)),
        ({"r": None}, ("r",)),
        ({"lora_alpha": "x"}, ("lora_alpha", "x")),
        ({"lora_alpha": 10**400}, ("lora_alpha", "finite")),
        ({"lora_alpha": float("inf")}, ("lora_alpha", "inf", "finite")),
        ({"lora_alpha": 1e300}, ("adapter_config.json", "alpha", 1e300, 65504)),
        ({"r": 5}, ("lora_A", 3, 5)),
        ({"r": 2**31 - 1}, ("adapter_config.json", "rank", 2**31 - 1, 96)),
        ({"base_model_name_or_path": "/" + "x" * 5000}, ("adapter_config.json", "no", "folder")),
        ({"base_model_name_or_path": None}, ("base_model_name_or_path",)),
    ],
)
def test_an_adapter_that_is_not_lora_as_here(tmp_path, changes, facts):
    embedder = make_embedder(tmp_path / "base")
    add_drawn(embedder, save="adapter")
    embedder.save(tmp_path / "saved")
    edit(tmp_path / "saved" / "adapter_config.json", **changes)
    with pytest.raises(ValueError, match=naming(*facts)):
        load_embedder(tmp_path / "saved")


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64, torch.float8_e4m3fn, None])
def test_updates_of_other_types_than_weights_have(tmp_path, dtype):
    embedder, path = make_embedder(tmp_path / "base"), tmp_path / "saved" / "adapter_model.safetensors"
    add_drawn(embedder, save="adapter")
    embedder.save(tmp_path / "saved")
    tensors = load_file(path)
    name = min(tensors)
    save_file(tensors | {name: tensors[name].to(dtype)} if dtype else {}, path)
    with pytest.raises(ValueError, match=naming(path, *([name, dtype] if dtype else ["tensors"]))):
        load_embedder(tmp_path / "saved")


def test_adapters_that_do_not_fit(tmp_path):
    embedder = make_embedder(tmp_path / "base")
    add_drawn(embedder, save="adapter")
    embedder.save(tmp_path / "saved")
    with pytest.raises(ValueError, match=naming("num_layers", 1)):
        load_embedder(tmp_path / "saved", num_layers=1)
    shorter = load_embedder(tmp_path / "base", device="cpu", num_layers=1)
    shorter.save(tmp_path / "shorter")
    (tmp_path / "saved" / "lora.json").unlink()
    edit(tmp_path / "saved" / "adapter_config.json", base_model_name_or_path=str(tmp_path / "shorter"))
    with pytest.raises(ValueError, match=naming(tmp_path / "saved" / "adapter_model.safetensors")):
        load_embedder(tmp_path / "saved")
    shutil.copy(tmp_path / "base" / "model.safetensors", tmp_path / "saved")
    with pytest.raises(ValueError, match=naming("adapter_config.json", "model.safetensors")):
        load_embedder(tmp_path / "saved")


@pytest.mark.slow
def test_adapters_load_in_peft_and_back(tmp_path):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    embedder = make_embedder(tmp_path / "base")
    add_drawn(embedder, targets=["query", "value", "output.dense"], save="adapter")
    embedder.save(tmp_path / "ours")
    packed = embedder.pack(TEXTS, role="query")
    ids = [part[None] for part in packed.input_ids.split(packed.lengths().tolist())]

    def hidden_states(embedder) -> torch.Tensor:
        with torch.inference_mode(), embedder.lora.applied(embedder.encoder):
            return embedder.encoder(packed)

    def theirs(model) -> torch.Tensor:
        with torch.inference_mode():
            return torch.cat([model.eval()(input_ids=row).last_hidden_state[0] for row in ids])

    base = transformers.AutoModel.from_pretrained(tmp_path / "base")
    model = peft.PeftModel.from_pretrained(base, tmp_path / "ours")
    torch.testing.assert_close(theirs(model), hidden_states(embedder), rtol=0, atol=1e-5)

    # Back: an adapter that PEFT made, beside the rest of a folder.
    base = transformers.AutoModel.from_pretrained(tmp_path / "base")
    settings = {"r": 5, "lora_alpha": 7, "target_modules": ["key", "intermediate.dense"], "lora_dropout": 0.1}
    model = peft.get_peft_model(base, peft.LoraConfig(**settings))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path / "theirs")
    shutil.copytree(tmp_path / "ours", tmp_path / "back", ignore=shutil.ignore_patterns("adapter_*", "lora.json"))
    shutil.copytree(tmp_path / "theirs", tmp_path / "back", dirs_exist_ok=True)
    loaded = load_embedder(tmp_path / "back", device="cpu")
    assert (loaded.lora.config.rank, loaded.lora.config.alpha, loaded.lora.config.dropout) == (5, 7, 0.1)
    assert loaded.lora.updates()["layers.0.qkv"].rows.keys() == {"encoder.layer.0.attention.self.key"}
    torch.testing.assert_close(theirs(model), hidden_states(loaded), rtol=0, atol=1e-5)
    loaded.save(tmp_path / "again")
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_folder_with_lora_alone_has_the_rest_from_its_base(tmp_path):
    """As PEFT writes it: without tokenizer, modules and prompts."""
    embedder = make_embedder(tmp_path / "made", prompts={"query": "what "})
    embedder.pooling = Pooling(("cls",), 32)
    embedder.save(tmp_path / "base")
    embedder = load_embedder(tmp_path / "base", device="cpu")
    add_drawn(embedder, save="adapter")
    embedder.save(tmp_path / "ours")
    alone = tmp_path / "alone"
    alone.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(tmp_path / "ours" / name, alone)
    loaded = load_embedder(alone, device="cpu")
    assert loaded.pooling.names == ("cls",)
    for role in ("query", "document"):
        np.testing.assert_array_equal(loaded.encode(TEXTS, role=role), embedder.encode(TEXTS, role=role))
    tokenizer, num_more = load_tokenizer(alone)
    assert (tokenizer.sha256(), num_more) == (embedder.tokenizer.sha256(), 2)
    loaded.save(tmp_path / "saved")
    assert load_embedder(tmp_path / "saved", device="cpu").sha256() == embedder.sha256()
    edit(alone / "adapter_config.json", base_model_name_or_path=str(tmp_path / "ours"))
    with pytest.raises(ValueError, match=naming(alone, tmp_path / "ours", "LoRA")):
        load_embedder(alone)


# One side, and vectors in a store.


def test_the_other_side_has_the_vectors_and_the_space_of_the_base(tmp_path):
    embedder = make_embedder(tmp_path / "base")
    spaces = {role: embedder.space(role) for role in ("query", "document")}
    embedder.store = Store(tmp_path / "store")
    vectors = embedder.encode(TEXTS)
    add_drawn(embedder, side="query")
    assert embedder.space("document") == spaces["document"]
    assert embedder.space("query") != spaces["query"]
    misses = embedder.store.misses
    np.testing.assert_array_equal(embedder.encode(TEXTS), vectors)
    assert embedder.store.misses == misses
    fingerprint = embedder.space("query").fingerprint
    embedder.lora.config = LoraConfig(rank=3, alpha=1.0, side="query")
    assert embedder.space("query").fingerprint != fingerprint  # the scale counts


@pytest.mark.parametrize("side", ["both", "query", "document"])
def test_a_pair_is_embedded_as_each_side(tmp_path, side):
    embedder = make_embedder(tmp_path / "base")
    add_drawn(embedder, side=side)
    queries, documents = (embedder.pack(TEXTS[:n], role="query") for n in (2, 3))
    Q, D = embedder.embed_pair(queries, documents)
    for found, packed, role in ((Q, queries, "query"), (D, documents, "document")):
        torch.testing.assert_close(found, embedder.embed(packed, role=role), rtol=0, atol=1e-6)


# Trained.

CONFIG = FinetuneConfig(epochs=2, batch_size=4, lr=1e-2, checkpoint_every=2, lora={"rank": 2, "dropout": 0.1})


def run(folder, name: str, config=CONFIG, **options):
    embedder = make_embedder(folder / "base")
    return finetune(embedder, make_dataset(), config, validation=make_dataset(seed=1), out=folder / name, **options)


def test_a_run_trains_the_updates_alone_and_saves_them_merged(tmp_path):
    base = make_embedder(tmp_path / "base").state_dict()
    tuned = run(tmp_path, "run")
    assert tuned.lora is None
    assert all(parameter.requires_grad for parameter in tuned.parameters())
    changed = {name for name, x in tuned.state_dict().items() if not torch.equal(x, base[name])}
    linear = {f"encoder.{place}.weight" for place, x in tuned.encoder.named_modules() if isinstance(x, nn.Linear)}
    assert changed == linear
    loaded = load_embedder(tmp_path / "run" / "model", device="cpu")
    np.testing.assert_array_equal(loaded.encode(TEXTS), tuned.encode(TEXTS))


def test_a_run_saves_an_adapter(tmp_path):
    base = make_embedder(tmp_path / "base").encoder.state_dict()
    tuned = run(tmp_path, "run", replace(CONFIG, lora={**CONFIG.lora, "save": "adapter"}))
    assert all(torch.equal(x, base[name]) for name, x in tuned.encoder.state_dict().items())
    merged = run(tmp_path, "merged").encode(TEXTS)
    np.testing.assert_allclose(tuned.encode(TEXTS), merged, rtol=0, atol=1e-6)
    loaded = load_embedder(tmp_path / "run" / "model", device="cpu")
    np.testing.assert_array_equal(loaded.encode(TEXTS), tuned.encode(TEXTS))
    with pytest.raises(ValueError, match=naming("LoRA")):
        finetune(loaded, make_dataset(), CONFIG)


def test_an_adapter_of_weights_that_are_nowhere_is_refused_before_training(tmp_path, monkeypatch):
    embedder = make_embedder(tmp_path / "base")
    randomize(embedder.encoder)
    config = replace(CONFIG, lora={"save": "adapter"})
    monkeypatch.setattr(type(embedder), "encode", lambda *_, **__: pytest.fail("encoded"))
    with pytest.raises(ValueError, match=naming("lora", tmp_path / "base")):
        finetune(embedder, make_dataset(), config, out=tmp_path / "run")
    assert embedder.lora is None
    assert not (tmp_path / "run").exists()


def test_a_refused_target_leaves_the_embedder(tmp_path):
    embedder = make_embedder(tmp_path / "base")
    with pytest.raises(ValueError, match=naming("targets", "q_proj")):
        finetune(embedder, make_dataset(), replace(CONFIG, lora={"targets": ["q_proj"]}))
    assert embedder.lora is None
    assert all(parameter.requires_grad for parameter in embedder.parameters())


@pytest.mark.filterwarnings("ignore:.*PEFT")
@pytest.mark.parametrize("side", ["both", "query"])
def test_resumed_is_uninterrupted(tmp_path, monkeypatch, side):
    config = replace(CONFIG, lora={**CONFIG.lora, "side": side})
    whole, calls, backward = run(tmp_path, "whole", config).sha256(), [], train_module.backward

    def interrupted(*arguments, **options):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return backward(*arguments, **options)

    monkeypatch.setattr(train_module, "backward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, "cut", config)
    assert run(tmp_path, "cut", config, existing="resume").sha256() == whole


@pytest.mark.filterwarnings("ignore:.*PEFT")
@pytest.mark.parametrize("side", ["both", "query", "document"])
def test_in_mini_batches(tmp_path, side):
    """Gradient caching gives the same gradients; without dropout, the same weights up to rounding."""
    lora = {"rank": 2, "side": side}
    make_embedder(tmp_path / "base", dropout=0.0)
    whole, parts = (
        run(tmp_path, f"run-{tokens}", replace(CONFIG, lora=lora, mini_batch_tokens=tokens)) for tokens in (None, 12)
    )
    for role in ("query", "document"):
        np.testing.assert_allclose(parts.encode(TEXTS, role=role), whole.encode(TEXTS, role=role), rtol=0, atol=1e-4)


def tuned_queries(folder) -> list[np.ndarray]:
    """Vectors of queries after training both sides, and queries alone."""
    configs = [replace(CONFIG, lora={"rank": 2, "side": side}) for side in ("both", "query")]
    tuned = [finetune(make_embedder(folder / "base"), make_dataset(), config) for config in configs]
    return [embedder.encode(TEXTS, role="query") for embedder in tuned]


def test_two_ranks_are_one(tmp_path):
    make_embedder(tmp_path / "base", dropout=0.0)
    alone = tuned_queries(tmp_path)
    first, second = run_ranks(2, tuned_queries, tmp_path, folder=tmp_path)
    np.testing.assert_array_equal(first, second)
    np.testing.assert_allclose(first, alone, rtol=0, atol=1e-4)


def test_the_other_side_of_a_run_comes_from_the_store(tmp_path):
    """Documents that the store has are not embedded: only the queries of each epoch go through the encoder."""
    embedder, data, embedded = make_embedder(tmp_path / "base"), make_dataset(), []
    embedder.store = Store(tmp_path / "store")
    before = embedder.encode(list(data.texts.values()), role="document")
    embedder.encoder.register_forward_pre_hook(lambda encoder, inputs: embedded.append(inputs[0].num_sequences))
    finetune(embedder, data, FinetuneConfig(epochs=2, batch_size=4, lora={"side": "query"}))
    assert embedded == [4] * 6
    np.testing.assert_array_equal(embedder.encode(list(data.texts.values()), role="document"), before)


@pytest.mark.filterwarnings("ignore:.*PEFT")
def test_on_the_command_line_too(tmp_path):
    """`finetune` fills the store with the base's documents, which the tuned model then finds there."""
    make_embedder(tmp_path / "base")
    data = make_dataset()
    data.save(tmp_path / "train.json")
    words = [str(tmp_path / name) for name in ("base", "train.json")]
    words += ["--out", str(tmp_path / "run"), "--store", str(tmp_path / "store"), "--epochs", "1"]
    assert main(["finetune", *words, "--lora.rank", "2", "--lora.side", "query", "--device", "cpu"]) == 0
    tuned = load_embedder(tmp_path / "run" / "model", device="cpu", store=tmp_path / "store")
    tuned.encode(list(data.texts.values()), role="document")
    assert (tuned.store.hits, tuned.store.misses) == (len(data.texts), 0)


def test_one_side_is_the_naive_gradient(tmp_path):
    """Documents as the base embeds them, as constants: one step of SGD against the same by hand."""
    make_embedder(tmp_path / "base", dropout=0.0)
    embedder, data = make_embedder(tmp_path / "base"), make_dataset(num_queries=4)
    config = FinetuneConfig(epochs=1, batch_size=4, max_grad_norm=1e9, lora={"side": "query", "rank": 2}, seed=5)
    naive = make_embedder(tmp_path / "base")
    with torch.random.fork_rng():
        torch.manual_seed(5)
        add_lora(naive, LoraConfig(side="query", rank=2))
    finetune(embedder, data, config, optimizer=lambda groups: torch.optim.SGD(groups, lr=0.5))
    (batch,) = make_batches(data, naive.pack, batch_size=4, seed=5).epoch(0)
    D = naive.embed(batch.documents, role="document").detach()
    value = in_batch_negatives(naive.embed(batch.queries, role="query"), D, batch.targets)
    value.backward()
    for name, parameter in naive.lora.named_parameters():
        expected = parameter.data - 0.5 * parameter.grad
        torch.testing.assert_close(embedder.lora.get_parameter(name).data, expected, rtol=0, atol=1e-6)


def test_one_side_cannot_be_trained_on_windows():
    with pytest.raises(ValueError, match=naming("side", "query", "passages")):
        FinetuneConfig(lora={"side": "query"}, passages=[8, 4])
