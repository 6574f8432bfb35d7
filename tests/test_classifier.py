"""classifier.py: every family's head against transformers' model for sequence classification."""

import json

import numpy as np
import pytest
import torch
from families import Halved, write_by_transformers
from naming import naming
from safetensors.torch import load_file
from test_round_trip import TEXTS
from test_tokenizer_steps import QWEN, SENTENCE, byte_level, unigram, word_pieces
from tokenizers import processors

from embedft import load_embedder
from embedft.encoders.classifier import LAYOUTS
from embedft.encoders.scoring import load_scorer, new_scorer

TASK = "AutoModelForSequenceClassification"
PAIRS = [(query, document) for query in TEXTS for document in TEXTS]


def write(folder, model_type: str, tokenizer, **options):
    """The reference, and the scorer loaded from its folder."""
    pytest.importorskip("transformers")
    model = write_by_transformers(folder, model_type, tokenizer, task=TASK, num_labels=1, **options)
    if model_type == "new":  # transformers has it as "gte"
        change(folder, model_type="new")
    return model, load_scorer(folder, device="cpu")


def change(folder, **fields) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def scorer_class(folder) -> list[str]:
    return json.loads((folder / "config.json").read_text())["architectures"]


def their_logits(model, scorer, pairs) -> torch.Tensor:
    """transformers' logits, one pair at a time."""
    found = []
    for ids, types in scorer.tokenizer.encode_pairs(pairs):
        options = (
            {"token_type_ids": torch.tensor([types])} if scorer.pack_pairs([pairs[0]]).token_types is not None else {}
        )
        found.append(model(input_ids=torch.tensor([ids]), **options).logits[0])
    return torch.stack(found)


@pytest.mark.parametrize("model_type", LAYOUTS)
def test_logits_and_saved_tensors_are_theirs(tmp_path, tiny_bert, model_type):
    model, scorer = write(tmp_path / "theirs", model_type, tiny_bert)
    expected = their_logits(model, scorer, PAIRS)
    found = scorer.embed(scorer.pack_pairs(PAIRS), role="document")
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * max(1, expected.abs().max().item()))
    scorer.save(tmp_path / "ours")
    assert scorer_class(tmp_path / "ours") == scorer_class(tmp_path / "theirs") == [type(model).__name__]
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "ours"))
    after = {name.replace("new.", "gte."): x for name, x in after.items()}
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("model_type", [name for name in LAYOUTS if name != "new"])
def test_new_heads_load_in_sentence_transformers(tmp_path, tiny_bert, model_type):
    cross_encoder = pytest.importorskip("sentence_transformers").CrossEncoder
    write_by_transformers(tmp_path / "base", model_type, tiny_bert)
    scorer = new_scorer(load_embedder(tmp_path / "base", device="cpu"))
    with torch.no_grad():
        scorer.head.out.weight *= 50
    scorer.save(tmp_path / "ours")
    theirs = cross_encoder(str(tmp_path / "ours"), device="cpu")
    assert theirs.config.architectures == [type(theirs.model).__name__]
    expected = scorer.score(PAIRS)
    np.testing.assert_allclose(theirs.predict(PAIRS), expected, rtol=0, atol=1e-5)
    assert np.array_equal(load_scorer(tmp_path / "ours", device="cpu").score(PAIRS), expected)


def test_a_cross_encoder_taken_for_an_embedder_is_named(tmp_path, tiny_bert, recwarn):
    write_by_transformers(tmp_path / "base", "bert", tiny_bert)
    embedder = load_embedder(tmp_path / "base", device="cpu")
    assert not recwarn
    new_scorer(embedder).save(tmp_path / "scorer")
    with pytest.warns(UserWarning, match=naming(tmp_path / "scorer", "cross-encoder")):
        embedder = load_embedder(tmp_path / "scorer", device="cpu")
    embedder.save(tmp_path / "saved")
    recwarn.clear()
    load_embedder(tmp_path / "saved", device="cpu")
    load_scorer(tmp_path / "scorer", device="cpu")
    assert not recwarn


# By family: its tokenizer and tokenizer_config.json, and what surrounds a pair.
BERT = {"tokenizer_class": "BertTokenizer", "pad_token": "[PAD]"}
TOKENIZERS = {
    "bert": (lambda: word_pieces(False, "[CLS]", "[SEP]"), BERT, "[CLS] $A [SEP] $B:1 [SEP]:1"),
    "roberta": (byte_level, {"tokenizer_class": "RobertaTokenizer", **SENTENCE}, "<s> $A </s> </s> $B </s>"),
    "xlm-roberta": (unigram, {"tokenizer_class": "XLMRobertaTokenizer", **SENTENCE}, "<s> $A </s> </s> $B </s>"),
    "modernbert": (byte_level, {"tokenizer_class": "PreTrainedTokenizerFast", **SENTENCE}, "<s> $A </s> $B </s>"),
    "qwen3": (lambda: byte_level(qwen=True), {"tokenizer_class": "Qwen2Tokenizer", **QWEN}, "$A $B <|endoftext|>"),
}
WORDS = ["the", "fee", "of", "the", "order", "isn't", "12,345"]
NAMES = ["input_ids", "token_type_ids", "attention_mask"]
LENGTHS = [(1, 1), (1, 7), (7, 1), (5, 4), (60, 1), (1, 60), (60, 60), (9, 60), (60, 9)]


def write_tokenizer(folder, model_type: str, **changes) -> None:
    """Replaces a folder's tokenizer by one with the shape of the family's own."""
    make, config, pair = TOKENIZERS[model_type]
    backend = make()
    names = {name.partition(":")[0] for name in pair.split()} - {"$A", "$B"}
    single = pair.partition(" $B")[0].removesuffix(" </s>") + (" </s>" if "</s> </s>" in pair else "")
    single = "$A <|endoftext|>" if model_type == "qwen3" else single
    special = [(name, backend.token_to_id(name)) for name in names]
    backend.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=special)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"truncation_side": "left"},
        {"tokenizer_class": "PreTrainedTokenizerFast"},
        {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": NAMES},
    ],
)
@pytest.mark.parametrize("model_type", TOKENIZERS)
def test_pairs_are_cut_and_scored_as_by_cross_encoder(tmp_path, tiny_bert, model_type, changes):
    cross_encoder = pytest.importorskip("sentence_transformers").CrossEncoder
    pad = {"qwen3": 0, "bert": 0}.get(model_type, 1)
    options = {"num_labels": 1, "vocab_size": 500, "pad_token_id": pad, "type_vocab_size": 2}
    write_by_transformers(tmp_path, model_type, tiny_bert, task=TASK, **options)
    write_tokenizer(tmp_path, model_type, **changes)
    pairs = [(" ".join((WORDS * 9)[:first]), " ".join((WORDS * 9)[1 : 1 + second])) for first, second in LENGTHS]
    theirs = cross_encoder(str(tmp_path), device="cpu", max_length=24)
    scorer = load_scorer(tmp_path, device="cpu", max_length=24)
    their_ids = theirs.tokenizer(*map(list, zip(*pairs, strict=True)), truncation=True, max_length=24)["input_ids"]
    assert [ids for ids, _ in scorer.tokenizer.encode_pairs(pairs)] == their_ids
    found = scorer.score(pairs)
    np.testing.assert_allclose(found, theirs.predict(pairs), rtol=0, atol=1e-5)
    np.testing.assert_allclose([scorer.score([pair])[0] for pair in pairs], found, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"classifier_activation": "relu", "classifier_pooling": "mean", "norm_eps": 0.1},
        {"classifier_bias": True, "norm_bias": True},
    ],
)
def test_modernbert_sets_its_head(tmp_path, tiny_bert, options):
    model, scorer = write(tmp_path, "modernbert", tiny_bert, **options)
    found = scorer.embed(scorer.pack_pairs(PAIRS), role="document")
    expected = their_logits(model, scorer, PAIRS)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * max(1, expected.abs().max().item()))


@pytest.mark.parametrize(
    ("model_type", "options", "expected"),
    [
        ("bert", {"hidden_dropout_prob": 0.3}, 0.3),
        ("bert", {"hidden_dropout_prob": 0.3, "classifier_dropout": 0.2}, 0.2),
        ("electra", {"classifier_dropout": 0.2}, 0.2),
        ("mpnet", {"hidden_dropout_prob": 0.3}, 0.3),
        ("distilbert", {"dropout": 0.1, "seq_classif_dropout": 0.4}, 0.4),
        ("modernbert", {"classifier_dropout": 0.4}, 0.4),
        ("nomic_bert", {"classifier_dropout": 0.4}, 0.4),
    ],
)
def test_dropout_of_the_head(tmp_path, tiny_bert, model_type, options, expected):
    """Its probability, and its places: both models halve there instead."""
    model, scorer = write(tmp_path, model_type, tiny_bert, **options)
    assert scorer.head.dropout.p == expected
    scorer.head.dropout = Halved()
    places = {name: part for name, part in model.named_modules() if isinstance(part, torch.nn.Dropout)}
    heads = [name for name in places if name.count(".") < 2 and places[name].p == expected]
    for name in heads:
        model.set_submodule(name, Halved())
    found, theirs = scorer.embed(scorer.pack_pairs(PAIRS), role="document"), their_logits(model, scorer, PAIRS)
    torch.testing.assert_close(found, theirs, rtol=0, atol=1e-5 * max(1, theirs.abs().max().item()))


@pytest.mark.parametrize("model_type", ["distilbert", "mpnet", "modernbert"])
def test_dropout_without_a_field_is_transformers_default(tmp_path, tiny_bert, model_type):
    model, _ = write(tmp_path, model_type, tiny_bert)
    config = json.loads((tmp_path / "config.json").read_text())
    fields = ("classifier_dropout", "seq_classif_dropout", "hidden_dropout_prob")
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in fields}))
    expected = next(getattr(model.config, name) for name in fields if getattr(model.config, name, None) is not None)
    assert load_scorer(tmp_path, device="cpu").head.dropout.p == expected


@pytest.mark.parametrize(
    ("fields", "facts"),
    [
        ({"classifier_dropout": "half"}, ("classifier_dropout", "'half'", 0, 1)),
        ({"classifier_activation": "step"}, ("classifier_activation", "'step'", "gelu")),
        ({"classifier_pooling": "middle"}, ("pooling", "'middle'", "mean")),
        ({"classifier_pooling": ["cls"]}, ("classifier_pooling", "['cls']", "string")),
        ({"id2label": 1}, ("id2label", 1, "object")),
        ({"num_labels": "1"}, ("num_labels", "'1'")),
        ({"sentence_transformers": "Identity"}, ("sentence_transformers", "'Identity'", "object")),
    ],
)
def test_invalid_settings_are_named(tmp_path, tiny_bert, fields, facts):
    write(tmp_path, "modernbert", tiny_bert)
    change(tmp_path, **fields)
    with pytest.raises(ValueError, match=naming("config.json", *facts)):
        load_scorer(tmp_path, device="cpu")
