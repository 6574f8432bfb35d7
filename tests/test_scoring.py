"""scoring.py against sentence-transformers' CrossEncoder on tiny random weights; training; errors."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import write_tiny_folder
from naming import names, naming
from safetensors.torch import load_file, save_file

from embedft import FinetuneConfig, Report, RetrievalDataset, Run, build_loss, evaluate_run, load_embedder, mine
from embedft.data.collate import PairCollate
from embedft.encoders.scoring import load_scorer, new_scorer
from embedft.recipe.scorer import finetune_scorer
from embedft.retrieval.rerank import rerank, with_scores

PAIRS = [
    ("what order", "the fee of the world is a limit order"),
    ("hello", "hello world"),
    ("", "a"),
    ("the revenue " * 30, "of what " * 30),
    ("fee", "document query " * 40),
]


@pytest.fixture
def folder(tmp_path):
    """A BERT of one label, as transformers saves it."""
    path = write_tiny_folder(tmp_path / "model", num_labels=1, id2label={"0": "LABEL_0"}, label2id={"LABEL_0": 0})
    tensors = load_file(path / "model.safetensors")
    tensors = {f"bert.{name}": x for name, x in tensors.items() if name != "embeddings.position_ids"}
    generator = torch.Generator().manual_seed(7)
    tensors["classifier.weight"] = torch.randn(1, 32, generator=generator)
    tensors["classifier.bias"] = torch.randn(1, generator=generator)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def reference(folder, **options):
    cross_encoder = pytest.importorskip("sentence_transformers").CrossEncoder
    return cross_encoder(str(folder), device="cpu", max_length=48, **options)


def rewrite(folder, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_scores_are_sentence_transformers(folder):
    found = load_scorer(folder, device="cpu").score(PAIRS)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, reference(folder).predict(PAIRS), atol=1e-6, rtol=0)
    assert found.std() > 0.05


@pytest.mark.parametrize("dtype", ["int8", "auto", torch.int8])
def test_dtypes_without_a_scorer(folder, dtype):
    with pytest.raises(ValueError, match=naming("dtype", str(dtype).removeprefix("torch."), "bfloat16")):
        load_scorer(folder, device="cpu", dtype=dtype)


def test_a_dtype_by_its_name(folder):
    assert load_scorer(folder, device="cpu", dtype="bfloat16").head.out.weight.dtype is torch.bfloat16


@pytest.mark.parametrize(
    "changes",
    [
        {"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity", "version": "6.2.0"}},
        {"sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity"},
    ],
)
def test_logits_if_the_model_says_so(folder, changes):
    rewrite(folder, **changes)
    found = load_scorer(folder, device="cpu").score(PAIRS)
    np.testing.assert_allclose(found, reference(folder).predict(PAIRS), atol=1e-5, rtol=0)
    assert found.min() < 0 or found.max() > 1


def test_the_file_of_settings_of_version_6_comes_first(folder, tmp_path):
    rewrite(folder, sentence_transformers={"activation_fn": "torch.nn.modules.linear.Identity"})
    theirs = reference(folder)
    theirs.activation_fn = torch.nn.Sigmoid()
    theirs.save(str(tmp_path / "saved"))
    found, again = load_scorer(tmp_path / "saved", device="cpu", max_length=48), reference(tmp_path / "saved")
    assert found.sigmoid
    np.testing.assert_allclose(found.score(PAIRS), again.predict(PAIRS), atol=1e-6, rtol=0)
    settings = {"activation_fn": "torch.nn.modules.activation.Sigmoid", "default_prompt_name": "query"}
    (tmp_path / "saved" / "config_sentence_transformers.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=naming("default_prompt_name", "'query'")):
        load_scorer(tmp_path / "saved", device="cpu")


def test_the_order_and_the_batch_do_not_matter(folder):
    scorer = load_scorer(folder, device="cpu")
    expected = scorer.score(PAIRS)
    np.testing.assert_allclose(scorer.score(PAIRS[::-1], batch_tokens=1)[::-1], expected, atol=1e-6, rtol=0)
    np.testing.assert_allclose(scorer.score(PAIRS, slice_pairs=2), expected, atol=1e-6, rtol=0)
    assert scorer.score([]).shape == (0,)


def test_memory_of_mps_is_released_between_batches(folder, monkeypatch):
    scorer, released = load_scorer(folder, device="cpu"), []
    monkeypatch.setattr("embedft.device.release_between_batches", released.append)
    scorer.score(PAIRS, batch_tokens=1)
    assert released == [scorer.device] * len(PAIRS)


def test_saved_models_load_everywhere(folder, tmp_path):
    scorer = load_scorer(folder, device="cpu")
    with torch.no_grad():
        for parameter in scorer.parameters():
            parameter += 0.01
    scorer.save(tmp_path / "saved")
    expected = scorer.score(PAIRS)
    assert np.array_equal(load_scorer(tmp_path / "saved", device="cpu").score(PAIRS), expected)
    np.testing.assert_allclose(reference(tmp_path / "saved").predict(PAIRS), expected, atol=1e-6, rtol=0)
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "saved" / "model.safetensors")
    assert before.keys() == after.keys()
    assert load_scorer(tmp_path / "saved", device="cpu").sha256() == scorer.sha256()
    assert load_scorer(folder, device="cpu").sha256() != scorer.sha256()


@pytest.mark.parametrize("kind", ["XLMRoberta", "Roberta", "NomicBert", "Gte", "ModernBert"])
def test_heads_of_other_families(tmp_path, folder, kind):
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=200,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=40,
        max_position_embeddings=50,
        num_labels=1,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForSequenceClassification")(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path / "other")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "other" / name).write_bytes((folder / name).read_bytes())
    scorer = load_scorer(tmp_path / "other", device="cpu")
    with torch.inference_mode():
        for pair in PAIRS:
            packed = scorer.pack_pairs([pair])
            found = scorer.embed(packed, role="document")
            types = packed.token_types
            expected = model(packed.input_ids[None], token_type_ids=None if types is None else types[None]).logits
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    scorer.save(tmp_path / "saved")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("other", "saved"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_new_scorer_starts_from_an_embedder(tiny_bert, tmp_path):
    one, other = (new_scorer(load_embedder(tiny_bert, device="cpu"), seed=seed) for seed in (0, 1))
    again = new_scorer(load_embedder(tiny_bert, device="cpu"), seed=0)
    assert np.array_equal(one.score(PAIRS), again.score(PAIRS))
    assert not np.array_equal(one.score(PAIRS), other.score(PAIRS))
    one.save(tmp_path / "saved")
    np.testing.assert_allclose(reference(tmp_path / "saved").predict(PAIRS), one.score(PAIRS), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("changes", "facts"),
    [
        ({"id2label": {"0": "a", "1": "b"}, "num_labels": 2}, ("labels", 2, 1, "config.json")),
        ({"sentence_transformers": {"activation_fn": "os.system"}}, ("'system'", "Sigmoid", "Identity")),
        ({"num_labels": None, "id2label": None}, ("labels", 2, 1)),
        ({"id2label": 5}, ("id2label", 5, "object", "config.json")),
        ({"hidden_size": 10**9}, ("hidden_size", 10**9, "config.json")),  # the head would take 4 * 10**18 bytes
    ],
)
def test_what_is_no_scorer_is_refused(folder, changes, facts):
    rewrite(folder, **changes)
    with pytest.raises(ValueError, match=naming(*facts)):
        load_scorer(folder, device="cpu")


@pytest.mark.parametrize(
    ("field", "value", "facts"), [("id", "more", (10**6, "vocab_size")), ("type_id", 7, (7, "type_vocab_size"))]
)
def test_what_only_pairs_have_is_checked_too(folder, field, value, facts):
    """The tokenizer gives the token between two texts a type, or an id, that the encoder has no vector for."""
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    steps = tokenizer["post_processor"]
    between = next(i for i, x in enumerate(steps["pair"]) if x.get("SpecialToken", {}).get("id") == "[SEP]")
    steps["special_tokens"]["more"] = {"id": "more", "ids": [10**6], "tokens": ["more"]}
    steps["pair"][between]["SpecialToken"][field] = value
    path.write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match=naming(folder, "pair", *facts)):
        load_scorer(folder, device="cpu")


def test_a_missing_head_is_named(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["classifier.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=naming("head", "out.weight", "absent")):
        load_scorer(folder, device="cpu")


@pytest.mark.parametrize(
    ("pairs", "facts"),
    [
        (["ab"], ("pairs[0]", "'ab'", "two")),
        ([("a", "b"), ("a",)], ("pairs[1]", "('a',)")),
        ([("a", None)], ("texts[0]", "NoneType", "str")),
    ],
)
def test_what_is_no_pair_is_named(folder, pairs, facts):
    with pytest.raises(ValueError, match=naming(*facts)):
        load_scorer(folder, device="cpu").score(pairs)


def test_a_score_that_is_not_finite_is_named(folder):
    scorer = load_scorer(folder, device="cpu")
    with torch.no_grad():
        scorer.head.out.bias.fill_(torch.nan)
    with pytest.raises(ValueError, match=naming("score", "finite", "weights")):
        scorer.score(PAIRS)


# Training and retrieval.


def toy_dataset():
    """Two queries, each with an answer and two hard negatives."""
    corpus = {"a": "the fee", "b": "hello world", "c": "limit order", "d": "revenue of what"}
    negatives = {"1": ["b", "c"], "2": ["d", "a"]}
    return RetrievalDataset(
        {"1": "what fee", "2": "hello"}, corpus, {"1": {"a": 1}, "2": {"b": 1}}, negatives=negatives
    )


def test_a_batch_of_pairs(folder):
    """Each pair has a column of its own, in the order of the rows; the logits are those of the pairs alone."""
    scorer, dataset = load_scorer(folder, device="cpu"), toy_dataset()
    collate = PairCollate(dataset, scorer.pack, num_negatives=2, pack_pairs=scorer.pack_pairs)
    batch = collate([("2", "b"), ("1", "a")])
    assert batch.targets.group.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert (batch.query_ids, batch.document_ids) == (["2", "1"], ["b", "d", "a", "a", "b", "c"])
    Q, D = scorer.embed_pair(batch.queries, batch.documents)
    assert Q.tolist() == [[1.0], [1.0]]
    pairs = [(dataset.queries[q], dataset.corpus[d]) for q, d in zip("222111", batch.document_ids, strict=True)]
    np.testing.assert_allclose(D[:, 0].detach(), scorer.score(pairs, sigmoid=False), atol=1e-6, rtol=0)


@pytest.mark.parametrize("loss", ["listwise_cross_entropy", "binary_cross_entropy"])
def test_losses_of_a_batch_of_pairs_by_hand(folder, loss):
    scorer = load_scorer(folder, device="cpu")
    collate = PairCollate(toy_dataset(), scorer.pack, num_negatives=2, pack_pairs=scorer.pack_pairs)
    batch = collate([("2", "b"), ("1", "a")])
    Q, D = scorer.embed_pair(batch.queries, batch.documents)
    s = D.detach().view(2, 3).double()
    if loss == "listwise_cross_entropy":
        expected = -s.log_softmax(dim=1)[:, 0].mean()
    else:
        expected = torch.nn.functional.binary_cross_entropy_with_logits(s, torch.tensor([[1.0, 0, 0]] * 2).double())
    assert build_loss({"name": loss})(Q, D, batch.targets).item() == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.parametrize("mini_batch_tokens", [None, 16])
def test_training(folder, tmp_path, mini_batch_tokens):
    """It ranks what it has seen, saves, and reloads with the same scores; gradient caching included."""
    scorer, dataset = load_scorer(folder, device="cpu"), toy_dataset()
    config = FinetuneConfig(epochs=30, lr=5e-3, mini_batch_tokens=mini_batch_tokens, seed=0)
    run = Run.from_dict({i: dict.fromkeys(dataset.corpus, 0.0) for i in dataset.queries})
    before = evaluate_run(rerank(scorer, dataset, run), dataset).metrics["mrr@10"]
    options = {"batch_size": 2, "num_negatives": 2, "validation": (dataset, run), "out": tmp_path / "run"}
    assert finetune_scorer(scorer, dataset, config, **options) is scorer
    assert evaluate_run(rerank(scorer, dataset, run), dataset).metrics["mrr@10"] == 1 > before
    saved = load_scorer(tmp_path / "run" / "model", device="cpu")
    assert np.array_equal(saved.score(PAIRS), scorer.score(PAIRS))


def test_the_card_of_a_run_has_data_settings_and_results(folder, tmp_path):
    """Saving writes one that says how to load; a run adds the rest, also if it was killed after the base's report."""
    scorer, dataset, card = load_scorer(folder, device="cpu"), toy_dataset(), tmp_path / "run" / "model" / "README.md"
    scorer.save(tmp_path / "saved")
    text = (tmp_path / "saved" / "README.md").read_text()
    assert all(words in text for words in ("load_scorer", "CrossEncoder", "text-ranking", "| scores | 0 to 1 |"))
    assert "Results" not in text
    run = Run.from_dict({i: dict.fromkeys(dataset.corpus, 0.0) for i in dataset.queries})

    def train(*, stop_at: int | None = None, **options) -> None:
        def watch(state, record):
            if state.step == stop_at:
                raise KeyboardInterrupt

        options |= {"batch_size": 1, "num_negatives": 2, "validation": (dataset, run), "on_step": watch}
        config = FinetuneConfig(epochs=30, lr=5e-3, checkpoint_every=1, eval_every=4)
        finetune_scorer(load_scorer(folder, device="cpu"), dataset, config, out=tmp_path / "run", **options)

    with pytest.raises(KeyboardInterrupt):
        train(stop_at=3)
    train(existing="resume", allow_changed_code=True)
    text = card.read_text()
    for row in ("| batch_size | 1 |", "| num_negatives | 2 |", "| lr | 0.005 |", "listwise_cross_entropy |"):
        assert row in text
    base, tuned = (Report.load(tmp_path / "run" / "eval" / name) for name in ("validation-base", "validation"))
    assert base.metrics["mrr@10"] < tuned.metrics["mrr@10"] == 1
    rows = [line for line in text.splitlines() if line.startswith("| mrr@10 ")]
    assert [f"{report.metrics['mrr@10']:.4f}" in row for report, row in zip((base, tuned), rows, strict=True)] == [
        True
    ] * 2
    assert names(text, len(dataset.queries), "chose the weights")


@pytest.mark.parametrize("changes", [{"lora": {"rank": 2}}, {"passages": [8, 4]}, {"references": {"base": None}}])
def test_training_refuses_what_is_for_embedders(folder, changes):
    with pytest.raises(ValueError, match=naming(*changes, *map(str, changes.values()))):
        finetune_scorer(load_scorer(folder, device="cpu"), toy_dataset(), FinetuneConfig(**changes))


@pytest.mark.parametrize("loss", [{"name": "in_batch_negatives"}, {"name": "margin_mse", "similarity": "cosine"}])
def test_training_refuses_losses_over_other_queries_documents(folder, loss):
    *_, (option, value) = loss.items()
    with pytest.raises(ValueError, match=naming("loss", option, value)):
        finetune_scorer(load_scorer(folder, device="cpu"), toy_dataset(), loss=loss)


def test_training_resumed_is_uninterrupted(folder, tmp_path):
    dataset = toy_dataset()
    run = Run.from_dict({i: dict.fromkeys(dataset.corpus, 0.0) for i in dataset.queries})

    def train(name: str, *, stop_at: int | None = None, **options) -> str:
        def watch(state, record):
            if state.step == stop_at:
                raise KeyboardInterrupt

        config = FinetuneConfig(epochs=3, lr=1e-3, checkpoint_every=1)
        options |= {"batch_size": 1, "num_negatives": 2, "validation": (dataset, run), "on_step": watch}
        scorer = load_scorer(folder, device="cpu")
        return finetune_scorer(scorer, dataset, config, out=tmp_path / name, **options).sha256()

    whole = train("whole")
    with pytest.raises(KeyboardInterrupt):
        train("cut", stop_at=3)
    assert train("cut", existing="resume", allow_changed_code=True) == whole


def test_the_head_alone(folder):
    scorer = load_scorer(folder, device="cpu")
    before = {name: x.clone() for name, x in scorer.state_dict().items()}
    config = FinetuneConfig(epochs=1, lr=1e-2, freeze_below=len(scorer.encoder.layers))
    finetune_scorer(scorer, toy_dataset(), config, batch_size=2, num_negatives=2)
    changed = {name for name, x in scorer.state_dict().items() if not torch.equal(x, before[name])}
    assert changed == {name for name in before if name.startswith("head.")}


@pytest.mark.parametrize("name", ["batch_size", "num_negatives"])
def test_arguments_are_not_settings_too(folder, name):
    with pytest.raises(ValueError, match=naming(name, 3, "finetune_scorer")):
        finetune_scorer(load_scorer(folder, device="cpu"), toy_dataset(), FinetuneConfig(**{name: 3}))


def test_training_needs_hard_negatives(folder):
    dataset = replace(toy_dataset(), negatives={})
    with pytest.raises(ValueError, match=naming("hard", "mine()")):
        finetune_scorer(load_scorer(folder, device="cpu"), dataset)


class Table:
    """A scorer by hand: {(query, document): logit}, 0 for others."""

    def __init__(self, logits):
        self.logits = logits

    def score(self, pairs, *, sigmoid=None, progress=None):
        found = np.array([self.logits.get(pair, 0.0) for pair in pairs], dtype=np.float32)
        return found if sigmoid is False else 1 / (1 + np.exp(-found))


def test_rerank_by_hand():
    dataset = toy_dataset()
    table = Table({("what fee", "the fee"): 3.0, ("what fee", "limit order"): -1.0})
    run = Run.from_dict({"1": {"c": 4.0, "d": 3.0, "a": 2.0, "b": 1.0}, "2": {}})
    assert rerank(table, dataset, run, depth=3).to_dict() == {"1": {"a": 3.0, "d": 0.0, "c": -1.0}}
    with pytest.raises(ValueError, match=naming("depth", 0, 1)):
        rerank(table, dataset, run, depth=0)
    with pytest.raises(ValueError, match=naming("document", "'z'")):
        rerank(table, dataset, Run.from_dict({"1": {"z": 1.0}}))


def test_a_teacher_scores_what_is_listed():
    taught = with_scores(Table({("hello", "hello world"): 2.0}), toy_dataset())
    assert taught.scores == {"1": {"a": 0.0, "b": 0.0, "c": 0.0}, "2": {"b": 2.0, "d": 0.0, "a": 0.0}}
    assert taught.negatives == toy_dataset().negatives


def test_mining_with_a_scorer(tiny_bert):
    """Its scores say what is too close to the answer: sigmoid(2) = 0.88 for the answer, 0.95 for c, else 0.5."""
    dataset = replace(toy_dataset(), negatives={}, queries={"1": "what fee"}, qrels={"1": {"a": 1}})
    table = Table({("what fee", "the fee"): 2.0, ("what fee", "limit order"): 3.0})
    embedder, options = load_embedder(tiny_bert, device="cpu"), {"ranks": (1, 4), "num_negatives": 4, "sampling": "top"}
    assert sorted(mine(embedder, dataset, **options).negatives["1"]) == ["b", "c", "d"]
    mined = mine(embedder, dataset, absolute_margin=0.1, scorer=table, **options)
    assert sorted(mined.negatives["1"]) == ["b", "d"]
    assert "1" not in mine(embedder, dataset, absolute_margin=0.5, scorer=table, **options).negatives


def test_mining_compares_each_candidate_by_its_own_score(tiny_bert):
    """Of the candidates, from rank 2 on, the one of logit 3 alone reaches 0.9: sigmoid(3) = 0.95, else 0.5."""
    dataset = replace(toy_dataset(), negatives={}, queries={"1": "what fee"}, qrels={"1": {"a": 1}})
    embedder, options = load_embedder(tiny_bert, device="cpu"), {"ranks": (2, 4), "num_negatives": 3}
    candidates = mine(embedder, dataset, **options).negatives["1"]
    assert len(candidates) >= 2
    for document in candidates:
        table = Table({("what fee", dataset.corpus[document]): 3.0})
        assert mine(embedder, dataset, min_score=0.9, scorer=table, **options).negatives == {"1": [document]}
    # The lowest answer counts: sigmoid(-3) = 0.05, below every candidate's 0.5.
    table, both = Table({("what fee", "the fee"): 3.0, ("what fee", "hello world"): -3.0}), {"1": {"a": 1, "b": 1}}
    assert mine(embedder, replace(dataset, qrels=both), absolute_margin=0.0, scorer=table, **options).negatives == {}
