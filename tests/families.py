"""What the tests of encoder families share: tiny configurations, and the comparison with transformers.

encoder, model = load_both(tmp_path, RobertaModel(RobertaConfig(**sizes)))
assert_equal_to_reference(encoder, model, SEQUENCES)
"""

import json
import shutil
from dataclasses import MISSING, asdict, fields
from functools import partial
from pathlib import Path

import torch
from conftest import TINY_VOCABULARY, write, write_tiny_folder
from safetensors.torch import load_file, save_file

from embedft.encoders.folder import FAMILIES, read_config
from embedft.encoders.packing import pack
from embedft.encoders.weights import checkpoint_tensors, read_encoder

# Values for the fields of a Config that have no default, by name: a new family may need more.
SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
}
DISTILBERT_SIZES = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 40}
# Settings of real checkpoints, besides SIZES and OPTIONS: kinds of layers, and stretched rotary positions.
KINDS = ["sliding_attention", "full_attention"]
SETTINGS = {
    "qwen3": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}},
    "llama": {
        "num_key_value_heads": 2,
        "head_dim": 8,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "gemma3_text": {"num_key_value_heads": 2, "head_dim": 8, "layer_types": KINDS},
    "modernbert": {
        "layer_types": KINDS,
        "rope_parameters": {kind: {"rope_type": "default", "rope_theta": 1e4} for kind in KINDS},
    },
    "new": {"rope_scaling": {"type": "ntk", "factor": 2.0}},
    "model2vec": {"table": "embeddings"},
}
# Different and equal lengths, a single token, and a longer one. No token 0 or 1, because transformers gives the
# embedding of padding no gradient.
SEQUENCES = [[2, 7, 9, 3], [2, 3], [2, 11, 12, 13, 14, 3], [2, 30, 31, 3], [40], list(range(2, 50))]


def tiny_encoder(model_type: str, *, seed: int = 0, **changes) -> torch.nn.Module:
    """A random encoder of a family in float32, large enough weights for every parameter to count."""
    family = FAMILIES[model_type]
    sizes = {f.name: (SIZES | DISTILBERT_SIZES)[f.name] for f in fields(family.Config) if f.default is MISSING}
    return randomize(family.Encoder(family.Config(**sizes | changes)), seed).eval()


def randomize(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Draws all weights; those of norms around 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            is_norm = "norm" in name.lower() and name.endswith("weight")
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2 + is_norm)
    return model


def write_family(folder: Path, model_type: str, *, shards: int = 0, **options) -> Path:
    """A folder of a family with random weights and the tokenizer of the tiny BERT; `shards`: the number of weight
    files, 0 for one without an index; `options` are those of `write_tiny_folder`."""
    write_tiny_folder(folder, **options)
    changes = {"vocab_size": len(TINY_VOCABULARY)} | OPTIONS.get(model_type, {}) | SETTINGS.get(model_type, {})
    encoder = tiny_encoder(model_type, **changes)
    config = {name: value for name, value in asdict(encoder.config).items() if value is not None}
    write(folder / "config.json", {"model_type": model_type, **config})
    tensors = checkpoint_tensors(encoder.state_dict(), FAMILIES[model_type].key_map(encoder.config))
    tensors = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors")
    if shards:
        in_shards(folder, *(f"model-{i:05}-of-{shards:05}.safetensors" for i in range(1, shards + 1)))
    return folder


def in_shards(folder: Path, *shards: str) -> None:
    """Cuts model.safetensors in as many files, tensor by tensor in turn, with their index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    place = {name: shards[i % len(shards)] for i, name in enumerate(tensors)}
    for shard in shards:
        save_file({name: tensors[name] for name in tensors if place[name] == shard}, folder / shard)
    write(folder / "model.safetensors.index.json", {"metadata": {"total_size": 1}, "weight_map": place})


class Halved(torch.nn.Module):
    """Stands for dropout where the places of two models are compared."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / 2


def load_both(folder: Path, model: torch.nn.Module, dtype: torch.dtype = torch.float64, **options):
    """(ours, theirs): a random transformers model, saved by transformers and loaded by embedft."""
    randomize(model).save_pretrained(folder)
    family, config, _ = read_config(folder)
    encoder, _ = read_encoder(folder, family, config, dtype, **options)
    return encoder.eval(), model.to(dtype).eval()


def exact_norms(model: torch.nn.Module) -> torch.nn.Module:
    """The model with its RMSNorms in float64, where transformers computes them in float32."""

    def forward(norm, x):
        weight = norm.weight + 1 if type(norm).__name__.startswith("Gemma") else norm.weight
        eps = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
        return weight * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()

    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = partial(forward, module)
    return model


def publish(folder: Path, config: dict, *, tokenizer: Path | None = None) -> None:
    """Gives a folder another config.json, of a published checkpoint, and the tokenizer of another folder."""
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json") if tokenizer else ():
        shutil.copy(tokenizer / name, folder)


def their_hidden(model: torch.nn.Module, sequences: list[list[int]], *, padding: int = 1) -> torch.Tensor:
    """transformers' hidden states [T, D] of the sequences end to end: one padded batch, as users run it."""
    longest = max(map(len, sequences))
    ids, mask = (
        torch.tensor([row + [value] * (longest - len(row)) for row in rows])
        for rows, value in ((sequences, padding), ([[1] * len(row) for row in sequences], 0))
    )
    return model(input_ids=ids, attention_mask=mask).last_hidden_state[mask.bool()]


def as_saved(model: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of a transformers model by the names and in the shapes that `save_pretrained` gives them."""
    from transformers.core_model_loading import revert_weight_conversion

    return revert_weight_conversion(model, tensors)


def assert_equal_to_reference(encoder, model, sequences=SEQUENCES, *, exact: float = 1e-9, **options) -> None:
    """Hidden states within `exact`, and the gradients of all parameters by the names of the checkpoint; the models
    are in float64. Parameters of the reference that get no gradient (poolers) are left out."""
    found, expected = encoder(pack(sequences)), their_hidden(model, sequences, **options)
    torch.testing.assert_close(found, expected, rtol=0, atol=exact)
    assert_equal_gradients(encoder, model, found, expected, relative=1e-7)


def assert_equal_gradients(encoder, model, found, expected, *, relative: float) -> None:
    """Of a random sum of the hidden states, by all parameters, within `relative` of the largest of a parameter.
    Gradients of 0, of biases that a softmax cancels, are rounding errors of the others'."""
    weight = torch.randn(expected.shape, dtype=expected.dtype, generator=torch.Generator().manual_seed(1))
    for module, hidden in ((encoder, found), (model, expected)):
        module.zero_grad()
        (hidden * weight).sum().backward()
    gradients = {name: parameter.grad for name, parameter in encoder.named_parameters()}
    keys = next(family for family in FAMILIES.values() if type(encoder) is family.Encoder).key_map(encoder.config)
    ours = checkpoint_tensors(gradients, keys)
    theirs = as_saved(model, {name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert ours.keys() == theirs.keys()
    least = 1e-3 * max(x.abs().max().item() for x in theirs.values())
    for name in theirs:
        largest = theirs[name].abs().max().item()
        difference = (ours[name] - theirs[name]).abs().max().item()
        assert difference <= relative * max(largest, least), (name, difference, largest)


def assert_equal_in_float32(folder: Path, model: torch.nn.Module, sequences=SEQUENCES, **options) -> None:
    """The demand on users' precision: hidden states within 1e-5, gradients within 1e-4 of the largest."""
    encoder, model = load_both(folder, model, torch.float32)
    found, expected = encoder(pack(sequences)), their_hidden(model, sequences, **options)
    assert (found - expected).abs().max() <= 1e-5 * max(1.0, expected.abs().max().item())
    assert_equal_gradients(encoder, model, found, expected, relative=1e-4)


def assert_saved_as_theirs(folder: Path, encoder) -> None:
    """The encoder's tensors have the names and the bits of the file that transformers wrote."""
    family, config, _ = read_config(folder)
    saved, written = (
        checkpoint_tensors(encoder.state_dict(), family.key_map(config)),
        load_file(folder / "model.safetensors"),
    )
    written = {name: x for name, x in written.items() if not name.startswith(family.CARRIED)}
    assert saved.keys() == written.keys()
    assert all(torch.equal(saved[name].to(x.dtype), x) for name, x in written.items())


# Of tokenizer_config.json, for the tiny tokenizer of conftest.py.
TOKENS = {f"{name.lower()}_token": f"[{name}]" for name in ("PAD", "UNK", "CLS", "SEP", "MASK")}
IDS = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3}
# What a family needs besides SIZES. Windows are shorter than the longest text.
OPTIONS = {
    "modernbert": {"local_attention": 8},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 8},
    "mistral": {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 8},
    "gemma3_text": {"sliding_window": 8, "use_bidirectional_attention": True},
}


def write_by_transformers(folder: Path, model_type: str, tokenizer: Path, *, task: str = "AutoModel", **options):
    """Writes a random model with transformers, beside the tokenizer of the folder `tokenizer`; returns the model."""
    import transformers

    sizes = SIZES | IDS | {"vocab_size": len(TINY_VOCABULARY)} | OPTIONS.get(model_type, {}) | options
    config = transformers.AutoConfig.for_model("gte" if model_type == "new" else model_type, **sizes)
    model = randomize(getattr(transformers, task).from_config(config)).eval()
    model.save_pretrained(folder)
    shutil.copy(tokenizer / "tokenizer.json", folder)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **TOKENS}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return model
