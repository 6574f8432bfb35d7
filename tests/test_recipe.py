"""recipe/: what `finetune` leaves on disk and in memory, what it refuses before any work, and resuming."""

import json
import secrets
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_tiny_folder
from naming import names, naming
from ranks import run_ranks
from tiny import MEASURED, make_dataset, make_embedder
from torch import nn

from embedft import LOSSES, FinetuneConfig, Report, RetrievalDataset, evaluate, finetune, load_embedder
from embedft.data.batches import make_batches
from embedft.data.mixture import join_datasets, make_mixture
from embedft.encoders.adapter import Adapter
from embedft.encoders.maps import LinearMap
from embedft.files import read_json, read_jsonl, sha256_file
from embedft.losses.contrastive import in_batch_negatives
from embedft.losses.registry import build_loss
from embedft.recipe import finetune as finetuning
from embedft.recipe import inputs, job
from embedft.training import run_folder
from embedft.training import train as train_module
from embedft.training.references import FrozenEmbeddings

CONFIG = FinetuneConfig(epochs=2, batch_size=4, lr=1e-3, checkpoint_every=2)  # 6 steps
UNJUDGED = RetrievalDataset({"q": "a b c"}, {"d": "d e f"}, {})


def weights_of(embedder) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in embedder.state_dict().items()}


def same(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


REPORT = {"metrics.json", "per_query.jsonl", "run.trec"}
MODEL = {
    "1_Pooling/config.json", "config.json", "config_sentence_transformers.json", "model.safetensors", "modules.json",
    "README.md", "sentence_bert_config.json", "tokenizer.json", "tokenizer_config.json",
}  # fmt: skip


def test_the_run_folder(tmp_path, monkeypatch):
    secret = f"sk-{secrets.token_hex(16)}"
    monkeypatch.setenv("OPENAI_API_KEY", secret)
    embedder, validation, out = make_embedder(tmp_path / "base"), make_dataset(seed=1), tmp_path / "runs" / "first"
    base = evaluate(embedder, validation)
    assert finetune(embedder, make_dataset(), CONFIG, validation=validation, out=str(out)) is embedder

    assert tree(out) - {"diff.patch"} == {
        ".lock", "config.json", "environment.json", "train.jsonl", "DONE", *(f"model/{name}" for name in MODEL),
        *(f"eval/{name}/{file}" for name in ("validation-base", "validation") for file in REPORT),
    }  # fmt: skip
    assert not any(secret.encode() in (out / name).read_bytes() for name in tree(out))
    config = read_json(out / "config.json")
    assert FinetuneConfig(**config) == replace(CONFIG, max_length=embedder.max_length)
    assert config["loss"] == {"name": "in_batch_negatives"}
    hashes = {"train": make_dataset().sha256(), "validation": validation.sha256()}
    hashes["model"] = make_embedder(tmp_path / "base").sha256()
    assert read_json(out / "environment.json")["sha256"] == hashes
    log = [record for _, record in read_jsonl(out / "train.jsonl")]
    assert [record["step"] for record in log] == [0, 1, 2, 3, 3, 4, 5, 6, 6]

    # The reports are of the base and of the best weights, which the embedder has and the model folder too.
    before, after = (Report.load(out / "eval" / name) for name in ("validation-base", "validation"))
    assert before.metrics == base.metrics
    assert after.metrics == evaluate(embedder, validation).metrics
    measured = [record["metrics"]["ndcg@10"] for record in log if "metrics" in record]
    assert after.metrics["ndcg@10"] == max(measured)
    loaded = load_embedder(out / "model", device="cpu")
    assert same(weights_of(loaded), weights_of(embedder))
    texts = [*validation.queries.values(), *validation.corpus.values(), ""]
    np.testing.assert_array_equal(loaded.encode(texts), embedder.encode(texts))


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    embedder = make_embedder(tmp_path / "base")
    before = weights_of(embedder)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    assert finetune(embedder, make_dataset(), CONFIG, validation=make_dataset(seed=1)) is embedder
    assert list(Path().iterdir()) == []
    finetune(embedder, make_dataset(), CONFIG)
    assert not same(weights_of(embedder), before)


def test_a_model_that_only_gets_worse_stays_as_it_was(tmp_path):
    embedder, data = make_embedder(tmp_path / "base"), make_dataset()
    before = weights_of(embedder)
    base = evaluate(embedder, data).metrics["ndcg@10"]
    values = iter([0.5, 0.4])
    config = FinetuneConfig(epochs=1, batch_size=4, lr=1e-2)
    options = {"validation": data, "evaluate": lambda model: {"ndcg@10": next(values)}}
    finetune(embedder, data, config, out=tmp_path / "run", **options)
    measured = [x["metrics"]["ndcg@10"] for _, x in read_jsonl(tmp_path / "run" / "train.jsonl") if "metrics" in x]
    assert measured == [0.5, 0.4]
    assert same(weights_of(embedder), before)
    for name in ("validation-base", "validation"):
        assert Report.load(tmp_path / "run" / "eval" / name).metrics["ndcg@10"] == base


def test_same_seed_same_file(tmp_path):
    digests = []
    for name, config in (("a", CONFIG), ("b", CONFIG), ("c", FinetuneConfig(**{**vars(CONFIG), "seed": 43}))):
        finetune(make_embedder(tmp_path / "base"), make_dataset(), config, out=tmp_path / name)
        digests.append(sha256_file(tmp_path / name / "model" / "model.safetensors"))
    assert digests[0] == digests[1] != digests[2]


def test_settings_reach_where_they_belong(tmp_path):
    embedder = make_embedder(tmp_path / "base")
    data = make_dataset(negatives=2)
    config = FinetuneConfig(
        epochs=1, batch_size=5, num_negatives=1, max_length=7, loss={"name": "in_batch_negatives", "temperature": 0.5}
    )
    finetune(embedder, data, config, out=tmp_path / "run")
    assert embedder.max_length == load_embedder(tmp_path / "run" / "model", device="cpu").max_length == 7
    (first, *_) = (record for _, record in read_jsonl(tmp_path / "run" / "train.jsonl"))
    assert first["queries"] == 5
    # Over its 5 to 9 documents a softmax at so high a temperature is nearly even: far from the loss at 0.05.
    assert 1.0 < first["loss"] < np.log(10)


# A cutoff of its own, and a depth.
@pytest.mark.parametrize("select", ["ndcg@10", "mrr@2", "ndcg@200", "map@100", "map@10", "rprec", "judged@7"])
def test_the_selected_metric_is_measured_whatever_its_cutoff(tmp_path, select):
    config = FinetuneConfig(epochs=1, batch_size=12, select=select)
    finetune(make_embedder(tmp_path / "base"), make_dataset(), config, validation=make_dataset(), out=tmp_path / "run")
    assert select in Report.load(tmp_path / "run" / "eval" / "validation").metrics


def test_a_corpus_of_one(tmp_path):
    """Nothing to learn: no negatives, a loss of 0, and every question answered."""
    data = RetrievalDataset({"q0": "a b", "q1": "c"}, {"d": "a b c d"}, {"q0": {"d": 1}, "q1": {"d": 1}})
    embedder = make_embedder(tmp_path / "base")
    before = weights_of(embedder)
    finetune(embedder, data, FinetuneConfig(epochs=1, batch_size=2), validation=data, out=tmp_path / "run")
    log = [record for _, record in read_jsonl(tmp_path / "run" / "train.jsonl")]
    assert [record["loss"] for record in log if "loss" in record] == [0.0]
    assert Report.load(tmp_path / "run" / "eval" / "validation").metrics["mrr@10"] == 1.0
    assert same(weights_of(embedder), before)


# References, and losses that are modules.

TOWARD_BASE = {"name": "toward_base"}
GUIDED = {"name": "sum", "losses": [{"name": "in_batch_negatives"}, {"name": "embedding_distillation"}]}


def first_losses(tmp_path, name: str, config: FinetuneConfig, **options) -> list[float]:
    finetune(make_embedder(tmp_path / "base", dropout=0.0), make_dataset(), config, out=tmp_path / name, **options)
    return [record["loss"] for _, record in read_jsonl(tmp_path / name / "train.jsonl")]


@pytest.mark.parametrize("given", ["in the configuration", "as an argument"])
def test_toward_base_begins_at_zero(tmp_path, given):
    """Without dropout the vectors of the first step are the base's own; later they are not."""
    config = replace(CONFIG, loss=TOWARD_BASE, lr=0.1)
    if given == "in the configuration":
        losses = first_losses(tmp_path, "run", replace(config, references={"base": None}))
    else:
        embedder = make_embedder(tmp_path / "base", dropout=0.0)
        finetune(embedder, make_dataset(), config, references={"base": embedder}, out=tmp_path / "run")
        losses = [record["loss"] for _, record in read_jsonl(tmp_path / "run" / "train.jsonl")]
    assert losses[0] == pytest.approx(0.0, abs=1e-6)
    hashes = read_json(tmp_path / "run" / "environment.json")["sha256"]
    assert hashes["reference base"] == hashes["model"]


def test_the_base_keeps_all_dimensions(tmp_path):
    """`encode` gives 8 of them here, training moves all 32."""
    embedder = make_embedder(tmp_path / "base", dropout=0.0)
    embedder.truncate_dim = 8
    config = replace(CONFIG, loss=TOWARD_BASE, references={"base": None})
    finetune(embedder, make_dataset(), config, out=tmp_path / "run")


def test_another_model_as_teacher(tmp_path):
    """By its folder, as an Embedder, or as a function of the batch: the same losses, and not those of the base."""
    write_tiny_folder(tmp_path / "teacher", seed=1)
    teacher = load_embedder(tmp_path / "teacher", device="cpu")
    config = replace(CONFIG, loss={"name": "embedding_distillation"})
    by_name = first_losses(tmp_path, "a", replace(config, references={"teacher": str(tmp_path / "teacher")}))
    as_embedder = first_losses(tmp_path, "b", config, references={"teacher": teacher})
    frozen = FrozenEmbeddings(teacher, make_dataset())
    as_function = first_losses(tmp_path, "c", config, references={"teacher": lambda batch: frozen(batch)})
    assert by_name == as_embedder == as_function
    assert by_name[0] > 0.1
    hashes = [read_json(tmp_path / name / "environment.json")["sha256"] for name in "abc"]
    assert hashes[0]["reference teacher"] == hashes[1]["reference teacher"] == teacher.sha256()
    assert "reference teacher" not in hashes[2]


def test_another_reference_is_not_resumed(tmp_path, monkeypatch):
    for seed in (1, 2):
        write_tiny_folder(tmp_path / f"teacher{seed}", seed=seed)
    teachers = [load_embedder(tmp_path / f"teacher{seed}", device="cpu") for seed in (1, 2)]
    config = replace(CONFIG, loss={"name": "embedding_distillation"})
    with monkeypatch.context() as patch:
        interrupt(patch, train_module, "backward", 4)
        with pytest.raises(KeyboardInterrupt):
            first_losses(tmp_path, "run", config, references={"teacher": teachers[0]})
    with pytest.raises(ValueError, match=naming(tmp_path / "run", "resume", "reference", "teacher", "SHA-256")):
        first_losses(tmp_path, "run", config, references={"teacher": teachers[1]}, existing="resume")
    first_losses(tmp_path, "run", config, references={"teacher": teachers[0]}, existing="resume")


def test_in_mini_batches(tmp_path):
    config = replace(CONFIG, loss=GUIDED)
    options = {"references": {"teacher": make_embedder(tmp_path / "base", dropout=0.0)}}
    whole = first_losses(tmp_path, "whole", config, **options)
    parts = first_losses(tmp_path, "parts", replace(config, mini_batch_tokens=20), **options)
    assert parts == pytest.approx(whole, rel=1e-3)
    assert parts != whole


class Random(nn.Module):
    """A loss that is initialised at random, from torch's own generator."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(()))

    def forward(self, Q, D, targets):
        return 0 * Q.sum() + self.weight**2


def test_a_loss_begins_as_the_seed_says(tmp_path, monkeypatch):
    """And the caller's random state is left as it was."""
    monkeypatch.setitem(LOSSES, "random", Random)
    losses = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        before = torch.get_rng_state()
        losses.append(first_losses(tmp_path, name, replace(CONFIG, loss={"name": "random"}, seed=seed)))
        assert torch.equal(torch.get_rng_state(), before)
    assert losses[0] == losses[1] != losses[2]
    assert losses[0][1] < losses[0][0]  # and is trained


# Refused before any work, with nothing changed.


def refused(tmp_path, monkeypatch, *facts: object, dataset=None, config=CONFIG, out: Path | None = None, **options):
    embedder = make_embedder(tmp_path / "base")
    before, existing = weights_of(embedder), tree(tmp_path)
    for module, name in ((finetuning, "train"), (job, "evaluate")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("work has begun"))
    with pytest.raises(ValueError, match=naming(*facts)):
        finetune(embedder, dataset or make_dataset(), config, out=out or tmp_path / "run", **options)
    assert same(weights_of(embedder), before)
    assert tree(tmp_path) == existing
    assert not (tmp_path / "run").exists() or out is not None


@pytest.mark.parametrize(("asked", "found"), [("training", [8, 4]), (None, None), ([6, 2, 5, 1], [6, 2, 5, 1])])
def test_validation_may_have_windows_of_its_own(tmp_path, asked, found):
    embedder, validation = make_embedder(tmp_path / "base"), make_dataset(seed=1)
    config = FinetuneConfig(epochs=1, batch_size=4, passages=[8, 4], validation_passages=asked)
    finetune(embedder, make_dataset(), config, validation=validation, out=tmp_path / "run")
    for name in ("validation-base", "validation"):
        report = Report.load(tmp_path / "run" / "eval" / name)
        assert report.setting["passages"] == found
    assert report.metrics == evaluate(embedder, validation, passages=found).metrics


def test_a_validation_set_without_relevant_documents(tmp_path, monkeypatch):
    refused(tmp_path, monkeypatch, 1, "queries", "relevant", validation=UNJUDGED)


def test_an_unknown_metric(tmp_path, monkeypatch):
    for select in ("ndgc@10", "precision", "ndcg@x", "rprec@10", "ndcg@0"):
        config = FinetuneConfig(select=select)
        refused(tmp_path, monkeypatch, "select", select, config=config, validation=make_dataset())


def test_an_empty_dataset(tmp_path, monkeypatch):
    refused(tmp_path, monkeypatch, "training", "pair", "relevant", dataset=UNJUDGED)


def test_too_few_hard_negatives(tmp_path, monkeypatch):
    config = FinetuneConfig(num_negatives=1)
    refused(tmp_path, monkeypatch, "num_negatives", 1, 0, config=config)


def test_a_length_beyond_the_encoders(tmp_path, monkeypatch):
    refused(tmp_path, monkeypatch, "max_length", 49, 48, config=FinetuneConfig(max_length=49))


SAMPLED = {"name": "matryoshka", "dims": [64, 32], "inner": {"name": "in_batch_negatives"}, "dims_per_step": 1}
PROJECTED = {"name": "projected_distillation", "student_dim": 32, "teacher_dim": 8}


@pytest.mark.parametrize(
    ("loss", "references", "facts"),
    [
        ({"name": "embedding_distillation"}, {}, ("references['teacher']", "none")),
        (TOWARD_BASE, {"bas": None}, ("references['base']", "bas")),
        ({"name": "cosent"}, {}, ("cosent", "target_scores")),
        ({"name": "matryoshka", "dims": [64], "inner": {"name": "in_batch_negatives"}}, {}, ("dims", 64, 32)),
        *((SAMPLED | {"seed": seed}, {}, ("dims", 64, 32)) for seed in range(2)),  # whichever dimension is drawn first
        (PROJECTED, {"teacher": None}, ("references['teacher']", 32, 8)),
    ],
)
def test_what_the_loss_lacks(tmp_path, monkeypatch, loss, references, facts):
    config = replace(CONFIG, loss=loss, references=references)
    refused(tmp_path, monkeypatch, *facts, config=config, validation=make_dataset())


def test_a_reference_that_is_given_twice(tmp_path, monkeypatch):
    config = replace(CONFIG, loss=TOWARD_BASE, references={"base": None})
    references = {"base": lambda batch: pytest.fail("asked")}
    refused(tmp_path, monkeypatch, "reference", "base", "config.references", config=config, references=references)


def test_a_reference_that_is_no_model(tmp_path, monkeypatch):
    config = replace(CONFIG, loss=TOWARD_BASE, references={"base": str(tmp_path / "nothing")})
    refused(tmp_path, monkeypatch, tmp_path / "nothing", "folder", config=config)


def test_an_existing_run_is_found_before_a_reference_is_encoded(tmp_path, monkeypatch):
    finetune(make_embedder(tmp_path / "base"), make_dataset(), CONFIG, out=tmp_path / "done")
    monkeypatch.setattr(FrozenEmbeddings, "__init__", lambda *_, **__: pytest.fail("work has begun"))
    config = replace(CONFIG, loss=TOWARD_BASE, references={"base": None})
    refused(tmp_path, monkeypatch, tmp_path / "done", "overwrite", "resume", config=config, out=tmp_path / "done")


def test_an_existing_run(tmp_path, monkeypatch):
    finetune(make_embedder(tmp_path / "base"), make_dataset(), CONFIG, out=tmp_path / "done")
    refused(tmp_path, monkeypatch, tmp_path / "done", "overwrite", "resume", out=tmp_path / "done")
    refused(tmp_path, monkeypatch, tmp_path / "done", "resume", "nothing", out=tmp_path / "done", existing="resume")


def test_an_unwritable_folder(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    refused(tmp_path, monkeypatch, tmp_path / "file" / "run", "written", out=tmp_path / "file" / "run")


@pytest.mark.parametrize(
    ("changes", "facts"),
    [
        ({"batch_size": 0}, ("batch_size", 0, 1)),
        ({"num_negatives": -1}, ("num_negatives", -1, 0)),
        ({"loss": {"name": "triplets"}}, ("loss", "name", "triplets", "in_batch_negatives")),
        ({"loss": {"name": "in_batch_negatives", "temperature": -1}}, ("temperature", -1, 0)),
        ({"epochs": 0}, ("epochs", 0, 1)),
        ({"max_length": 1.5}, ("max_length", 1.5, "int", "null")),
        ({"sampling": "random"}, ("sampling", "random", "proportional", "round_robin", "temperature")),
        ({"sampling_temperature": 0.9}, ("sampling_temperature", 0.9, 1)),
        ({"mini_batch_tokens": 0}, ("mini_batch_tokens", 0, 1)),
        ({"seed": 2**70}, ("seed", 2**70, -(2**62), 2**62)),
        ({"sampling_temperature": 7.0}, ("sampling_temperature", 7.0, "sampling", "proportional")),
        ({"windows_per_document": 9}, ("windows_per_document", 9, "passages")),
        ({"batch_size": 4, "batch_tokens": 99}, ("batch_size", 4, "batch_tokens", 99)),
        ({"references": {"guide": 3}}, ("references", "guide", 3, "folder", "name", "null")),
    ],
)
def test_settings_are_checked_when_made(changes, facts):
    with pytest.raises(ValueError, match=naming(*facts)):
        FinetuneConfig(**changes)


def test_overwriting(tmp_path):
    finetune(make_embedder(tmp_path / "base"), make_dataset(), CONFIG, validation=make_dataset(), out=tmp_path / "run")
    config = FinetuneConfig(epochs=1, batch_size=12)
    finetune(make_embedder(tmp_path / "base"), make_dataset(), config, out=tmp_path / "run", existing="overwrite")
    assert read_json(tmp_path / "run" / "config.json")["epochs"] == 1
    assert [record["step"] for _, record in read_jsonl(tmp_path / "run" / "train.jsonl")] == [1]
    assert not (tmp_path / "run" / "eval").exists()


# Interrupted, and resumed to the same files.


def interrupt(patch, module, name: str, call: int) -> None:
    """The `call`-th call of module.name raises, before it does anything."""
    function, calls = getattr(module, name), []

    def wrapped(*arguments, **options):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return function(*arguments, **options)

    patch.setattr(module, name, wrapped)


PLACES = {
    "validation of the base": (job, "evaluate", 1),
    "before the first checkpoint": (train_module, "backward", 2),
    "between two checkpoints": (train_module, "backward", 6),
    "saving a checkpoint": (train_module, "save_checkpoint", 2),
    "last validation": (job, "evaluate", 4),
    "closing": (run_folder, "close_run", 1),
}


@pytest.mark.parametrize("place", PLACES)
def test_resumed_is_uninterrupted(tmp_path, monkeypatch, place):
    def run(name: str, **options) -> dict[str, bytes]:
        embedder, out = make_embedder(tmp_path / "base"), tmp_path / name
        finetune(embedder, make_dataset(), CONFIG, validation=make_dataset(seed=1), out=out, **options)
        log = [{**record, **dict.fromkeys(MEASURED)} for _, record in read_jsonl(out / "train.jsonl")]
        timed = ("train.jsonl", "environment.json", "DONE", "metrics.json")
        return {
            "log": json.dumps(log).encode(),
            **{path: (out / path).read_bytes() for path in tree(out) if not path.endswith(timed)},
        }

    whole = run("whole")
    with monkeypatch.context() as patch:
        interrupt(patch, *PLACES[place])
        with pytest.raises(KeyboardInterrupt):
            run("cut")
    assert not (tmp_path / "cut" / "DONE").exists()
    assert run("cut", existing="resume") == whole


def test_half_a_report_on_the_base_is_written_anew(tmp_path, monkeypatch):
    """Killed while the first report was saved: there is a folder, but no report in it."""
    embedder, data, out = make_embedder(tmp_path / "base"), make_dataset(), tmp_path / "run"
    expected = evaluate(embedder, data)
    with monkeypatch.context() as patch:
        interrupt(patch, Report, "save", 1)
        with pytest.raises(KeyboardInterrupt):
            finetune(embedder, data, CONFIG, validation=data, out=out)
    base = out / "eval" / "validation-base"
    base.mkdir(parents=True)
    (base / "run.trec").write_text("")
    finetune(embedder, data, CONFIG, validation=data, out=out, existing="resume")
    assert Report.load(base).metrics == expected.metrics


def test_a_changed_setting_is_not_resumed(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt(patch, train_module, "backward", 4)
        with pytest.raises(KeyboardInterrupt):
            finetune(make_embedder(tmp_path / "base"), make_dataset(), CONFIG, out=tmp_path / "run")
    for dataset, changes, facts in (
        (make_dataset(), {"lr": 1.0}, ("lr", 0.001, ..., 1.0)),
        (make_dataset(seed=2), {}, ("train", "SHA-256")),
        (make_dataset(), {"max_length": 9}, ("max_length", 48, ..., 9)),
        (make_dataset(), {"attention_dropout": 0.1}, ("attention_dropout", 0.0, ..., 0.1)),
    ):
        config = FinetuneConfig(**{**vars(CONFIG), **changes})
        options = {"dataset": dataset, "config": config, "out": tmp_path / "run", "existing": "resume"}
        refused(tmp_path, monkeypatch, tmp_path / "run", "resume", *facts, **options)


def test_another_model_is_not_resumed(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt(patch, train_module, "backward", 4)
        with pytest.raises(KeyboardInterrupt):
            finetune(make_embedder(tmp_path / "base"), make_dataset(), CONFIG, out=tmp_path / "run")
    embedder = make_embedder(tmp_path / "base")
    embedder.prompts["query"] = "q: "
    with pytest.raises(ValueError, match=naming(tmp_path / "run", "resume", "model", "SHA-256")):
        finetune(embedder, make_dataset(), CONFIG, out=tmp_path / "run", existing="resume")


SAYS_NOTHING = [
    {"name": "in_batch_negatives"},
    {"name": "matryoshka", "dims": [8], "inner": {"name": "in_batch_negatives"}},
    {"name": "sum", "losses": [{"name": "in_batch_negatives", "similarity": "dot"}, {"name": "in_batch_negatives"}]},
]
SAYS_IT = [
    {"name": "in_batch_negatives", "similarity": "dot"},
    {"name": "matryoshka", "dims": [8], "inner": {"name": "in_batch_negatives", "similarity": "cosine"}},
    {"name": "toward_base"},  # compares with itself, has nothing to say
]


@pytest.mark.parametrize("loss", SAYS_NOTHING)
def test_a_dot_model_needs_a_loss_that_says_how_it_compares(tmp_path, loss):
    embedder = make_embedder(tmp_path / "base")
    embedder.similarity, embedder.normalize = "dot", False
    with pytest.raises(ValueError, match=naming("loss.similarity", "dot", "cosine")):
        finetune(embedder, make_dataset(), replace(CONFIG, loss=loss))


@pytest.mark.filterwarnings("ignore:dims")
@pytest.mark.parametrize("loss", SAYS_IT)
def test_a_dot_model_is_trained_with_a_loss_that_says_it(tmp_path, loss):
    embedder = make_embedder(tmp_path / "base")
    embedder.similarity, embedder.normalize = "dot", False
    finetune(embedder, make_dataset(), replace(CONFIG, loss=loss, references={"base": None}))


def test_attention_dropout_reaches_the_encoder(tmp_path):
    embedder = make_embedder(tmp_path / "base")
    finetune(embedder, make_dataset(), replace(CONFIG, attention_dropout=0.3))
    assert embedder.encoder.attention_dropout == 0.3
    with pytest.raises(ValueError, match=naming("attention_dropout", 1.0, 0, 1)):
        replace(CONFIG, attention_dropout=1.0)


def test_half_precision_weights_are_not_trained(tmp_path):
    with pytest.raises(ValueError, match=naming("weights", torch.bfloat16, "float32")):
        finetune(make_embedder(tmp_path / "base").bfloat16(), make_dataset(), CONFIG)


def test_validation_ids_with_whitespace(tmp_path):
    queries, corpus = {"a question": "a b c"}, {"my file.txt": "d e f"}
    validation = RetrievalDataset(queries, corpus, {"a question": {"my file.txt": 1}})
    embedder, config = make_embedder(tmp_path / "base"), replace(CONFIG, epochs=1)
    finetune(embedder, make_dataset(), config, validation=validation, out=tmp_path / "run")
    report = Report.load(tmp_path / "run" / "eval" / "validation")
    assert report.metrics["mrr@1"] == 1.0
    assert list(report.run.to_dict()["a question"]) == ["my file.txt"]


def test_the_settings_of_batches_reach_them(tmp_path, monkeypatch):
    seen = {}

    def spied(*arguments, **options):
        seen.update(options)
        return make_batches(*arguments, **options)

    monkeypatch.setattr("embedft.recipe.inputs.make_batches", spied)
    given = {"batch_tokens": 60, "examples": "queries", "no_duplicates": True, "num_negatives": 1}
    given |= {"passages": [8, 4], "windows_per_document": 2}
    dataset = make_dataset(num_queries=8, negatives=1)
    finetune(make_embedder(tmp_path / "base"), dataset, FinetuneConfig(epochs=1, **given))
    assert seen == {**given, "batch_size": None, "target_scores": False, "seed": FinetuneConfig().seed}
    with pytest.raises(ValueError, match=naming("batch_tokens", 0, 1)):
        FinetuneConfig(batch_tokens=0)


def test_a_store_keeps_no_vectors_of_weights_on_their_way(tmp_path):
    embedder = make_embedder(tmp_path / "base", store=tmp_path / "store")
    store = embedder.store
    finetune(embedder, make_dataset(), CONFIG, validation=make_dataset(seed=1), out=tmp_path / "run")
    assert embedder.store is store
    assert len(store.spaces()) == 1  # the last report's


@pytest.mark.parametrize("mixed", [False, True])
def test_several_datasets(tmp_path, mixed):
    """As by hand with a Mixture; the ids, the references and the log know where a query is from."""
    datasets = {"first": make_dataset(num_queries=9), "second": make_dataset(num_queries=5, seed=1)}
    options = {"sampling": "temperature", "mixed": mixed}
    config = replace(
        CONFIG, sampling_temperature=3.0, loss={"name": "toward_base"}, references={"base": None}, **options
    )
    tuned, by_hand = make_embedder(tmp_path / "base"), make_embedder(tmp_path / "base")
    finetune(tuned, datasets, config, out=tmp_path / "run")
    batches = make_mixture(datasets, by_hand.pack, batch_size=4, seed=config.seed, temperature=3.0, **options)
    references = {"base": FrozenEmbeddings(by_hand, join_datasets(datasets))}
    train_module.train(by_hand, batches, LOSSES["toward_base"], config, references=references)
    assert same(weights_of(tuned), weights_of(by_hand))
    log = [record for _, record in read_jsonl(tmp_path / "run" / "train.jsonl")]
    for record, batch in zip(log, [batch for epoch in (0, 1) for batch in batches.epoch(epoch)], strict=True):
        assert record["sources"] == {name: batch.sources.count(name) for name in dict.fromkeys(batch.sources)}
        assert len(record["sources"]) == (2 if mixed else 1)
    environment = read_json(tmp_path / "run" / "environment.json")
    assert environment["sha256"]["train"] == join_datasets(datasets).sha256()


@pytest.mark.parametrize("options", [{"sampling": "round_robin"}, {"mixed": True}])
def test_sampling_is_of_several_datasets(tmp_path, options):
    with pytest.raises(ValueError, match=naming(*options, *options.values(), "dataset")):
        finetune(make_embedder(tmp_path / "base"), make_dataset(), replace(CONFIG, **options))


def test_scored_pairs_train(tmp_path):
    dataset = make_dataset(num_queries=8)
    scores = {query: dict.fromkeys(by, 0.1 * i) for i, (query, by) in enumerate(dataset.qrels.items())}
    config = FinetuneConfig(epochs=1, batch_size=4, lr=1e-2, examples="scored", loss={"name": "cosent"})
    base, tuned = make_embedder(tmp_path / "base"), make_embedder(tmp_path / "base")
    finetune(tuned, replace(dataset, scores=scores), config)
    assert tuned.sha256() != base.sha256()


# Objects in place of settings.


def two_sided(Q, D, targets):
    """A loss of one's own."""
    return in_batch_negatives(Q, D, targets) + 0.1 * (Q.square().mean() + D.square().mean())


def momentum(groups):
    return torch.optim.SGD(groups, lr=0.1, momentum=0.9)


class Scaled(nn.Module):
    def __init__(self, start: float):
        super().__init__()
        self.start, self.scale = start, nn.Parameter(torch.tensor(start))

    def forward(self, Q, D, targets):
        return two_sided(Q, D, targets) * self.scale.exp()


def cutoff_by_letters(embedder):
    """A metric of one's own, of the weights alone."""
    return {"size": embedder.get_parameter("encoder.embeddings.token.weight").norm().item(), "other": 0.0}


OWN = replace(CONFIG, lr=5e-5, select="size")


def own_objects(embedder, *, loss=two_sided, batch_size: int = 3) -> dict:
    batches = make_batches(make_dataset(11, 9), embedder.pack, batch_size=batch_size, seed=5)

    def refresh(model):
        seed = int(model.get_parameter("encoder.embeddings.token.weight").norm().item() * 1e6) % 1000
        return make_batches(make_dataset(11, 9), model.pack, batch_size=batch_size, seed=seed)

    return {
        "loss": loss, "batches": batches, "optimizer": momentum, "evaluate": cutoff_by_letters, "refresh": refresh,
        "on_step": lambda state, record: "stop" if state.step == 7 else None,
    }  # fmt: skip


def run_own(base: Path, out: Path, *, loss=two_sided, **options):
    embedder = make_embedder(base, dropout=0.0)
    config = replace(OWN, batch_size=32)
    finetune(embedder, make_dataset(11, 9), config, out=out, **own_objects(embedder, loss=loss), **options)
    unlike = dict.fromkeys(MEASURED)
    return weights_of(embedder), [{**x, **unlike} for _, x in read_jsonl(out / "train.jsonl")]


def test_a_run_of_objects_is_a_run_like_any_other(tmp_path, monkeypatch):
    """It writes its folder, validates, stops, resumes to the same bits, and says what it was given."""
    whole = run_own(tmp_path / "base", tmp_path / "whole")
    assert [x["step"] for x in whole[1]] == [0, 1, 2, 3, 4, 4, 5, 6, 7, 7]
    assert (tmp_path / "whole" / "DONE").exists()
    assert same(weights_of(load_embedder(tmp_path / "whole" / "model", device="cpu")), whole[0])
    objects = read_json(tmp_path / "whole" / "config.json")["objects"]
    assert objects.keys() == {"loss", "batches", "optimizer", "evaluate", "refresh", "on_step"}
    assert objects["loss"]["name"] == "test_recipe.two_sided"
    assert objects["batches"]["values"]["sampler"]["values"]["seed"] == 5
    for call in (2, 6):
        with monkeypatch.context() as patch:
            interrupt(patch, train_module, "backward", call)
            with pytest.raises(KeyboardInterrupt):
                run_own(tmp_path / "base", tmp_path / f"cut{call}")
        resumed = run_own(tmp_path / "base", tmp_path / f"cut{call}", existing="resume")
        assert same(resumed[0], whole[0])
        assert resumed[1] == whole[1]


def test_two_ranks_with_objects_are_one(tmp_path):
    one = run_own(tmp_path / "base", tmp_path / "one")
    for weights, log in run_ranks(2, run_own, tmp_path / "base", tmp_path / "two", folder=tmp_path):
        for name, tensor in one[0].items():
            torch.testing.assert_close(weights[name], tensor, rtol=0, atol=1e-4)
        assert [x["step"] for x in log] == [x["step"] for x in one[1]]


def test_a_loss_that_is_a_module(tmp_path):
    """Tried on a copy before training; its parameters are trained, and `loss_lr` is about them."""
    embedder, loss = make_embedder(tmp_path / "base"), Scaled(0.5)
    finetune(embedder, make_dataset(), replace(CONFIG, loss_lr=0.1), loss=loss, out=tmp_path / "run")
    assert loss.scale.item() != 0.5
    assert read_json(tmp_path / "run" / "config.json")["objects"]["loss"]["values"]["start"] == 0.5


def test_changed_code_is_not_resumed_unless_allowed(tmp_path, monkeypatch):
    def start(**options):
        embedder = make_embedder(tmp_path / "base")
        finetune(embedder, make_dataset(), CONFIG, out=tmp_path / "run", **options)

    with monkeypatch.context() as patch:
        interrupt(patch, train_module, "backward", 4)
        with pytest.raises(KeyboardInterrupt):
            start(loss=Scaled(0.5))
    for options, facts in (
        ({"loss": Scaled(0.25)}, ("loss", "test_recipe.Scaled", "settings", "allow_changed_code")),
        ({}, ("loss", "test_recipe.Scaled", "given", "allow_changed_code")),
        ({"loss": Scaled(0.5), "optimizer": momentum}, ("lr", 0.001, ..., 5e-5)),
    ):
        config = replace(CONFIG, lr=5e-5) if "optimizer" in options else CONFIG
        with pytest.raises(ValueError, match=naming(tmp_path / "run", "resume", *facts)):
            finetune(make_embedder(tmp_path / "base"), make_dataset(), config, out=tmp_path / "run",
                     existing="resume", **options)  # fmt: skip
    start(loss=Scaled(0.25), existing="resume", allow_changed_code=True)
    assert (tmp_path / "run" / "DONE").exists()


@pytest.mark.parametrize(
    ("name", "changes", "field"),
    [
        ("loss", {"loss": {"name": "multi_positive"}}, "loss"),
        ("batches", {"batch_size": 7}, "batch_size"),
        ("batches", {"num_negatives": 1}, "num_negatives"),
        ("batches", {"passages": [8, 4], "refresh_windows": True}, "refresh_windows"),
        ("optimizer", {"lr": 0.25}, "lr"),
        ("optimizer", {"weight_decay": 0.25}, "weight_decay"),
        ("refresh", {"mine_every": 1, "num_negatives": 1}, "mine_every"),
    ],
)
def test_settings_that_an_object_replaces_are_not_ignored(tmp_path, monkeypatch, name, changes, field):
    options = {name: own_objects(make_embedder(tmp_path / "base"))[name]}
    refused(tmp_path, monkeypatch, field, changes[field], name, config=FinetuneConfig(**changes), **options)


def test_a_loss_lr_without_parameters(tmp_path, monkeypatch):
    refused(tmp_path, monkeypatch, "loss_lr", 0.1, "loss", "parameters", config=FinetuneConfig(loss_lr=0.1))


# Hard negatives mined in training.

MINED = replace(CONFIG, epochs=4, lr=1e-2, num_negatives=2, mine_every=2, mine_ranks=[1, 6], mine_sampling="top")


@pytest.mark.parametrize("several", [False, True])
def test_negatives_are_mined_by_the_model_as_it_is(tmp_path, monkeypatch, several):
    """Before the first epoch and the third, with the settings given, and trained on; resumed to the same bits."""
    data = {"a": make_dataset(), "b": make_dataset(seed=1)} if several else make_dataset(negatives=2)
    mined, real = [], inputs.mine

    def spy(embedder, dataset, **options):
        mined.append((embedder.sha256(), options, real(embedder, dataset, **options)))
        return mined[-1][2]

    monkeypatch.setattr(inputs, "mine", spy)

    def run(name: str, **options):
        embedder = make_embedder(tmp_path / "base")
        finetune(embedder, data, MINED, out=tmp_path / name, **options)
        return weights_of(embedder)

    whole = run("whole")
    assert len(mined) == (4 if several else 2)
    assert len({weights for weights, _, _ in mined}) == 2
    assert mined[0][0] == make_embedder(tmp_path / "base").sha256()
    expected = {"ranks": [1, 6], "sampling": "top", "num_negatives": 2, "seed": 42, "replace": True, "passages": None}
    assert mined[0][1] == expected | {"relative_margin": None, "absolute_margin": None}
    assert mined[0][2].negatives != mined[-1][2].negatives
    log = [record for _, record in read_jsonl(tmp_path / "whole" / "train.jsonl")]
    steps = 6 if several else 3
    assert [x["step"] for x in log if "refresh_seconds" in x] == [2 * steps + 1]
    for call in (steps + 2, 3 * steps + 2):
        with monkeypatch.context() as patch:
            interrupt(patch, train_module, "backward", call)
            with pytest.raises(KeyboardInterrupt):
                run(f"cut{call}")
        assert same(run(f"cut{call}", existing="resume"), whole)


def mine_on_two(base: Path):
    searches, real = [], inputs.mine
    embedder = make_embedder(base, dropout=0.0, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inputs, "mine", lambda *a, **k: searches.append(1) or real(*a, **k))
        finetune(embedder, make_dataset(), replace(MINED, epochs=3))
    return weights_of(embedder), len(searches)


def test_rank_0_mines_for_all(tmp_path):
    make_embedder(tmp_path / "base", dropout=0.0)
    one, searches = mine_on_two(tmp_path / "base")
    assert searches == 2
    results = run_ranks(2, mine_on_two, tmp_path / "base", folder=tmp_path)
    assert [searches for _, searches in results] == [2, 0]
    for weights, _ in results:
        torch.testing.assert_close(weights, one, rtol=0, atol=1e-8)


@pytest.mark.parametrize(
    ("changes", "facts"),
    [
        ({"mine_every": 0, "num_negatives": 1}, ("mine_every", 0, 1)),
        ({"mine_every": 1}, ("num_negatives", 0, "mine_every", 1, 1)),
        ({"mine_ranks": [1, 5]}, ("mine_ranks", [1, 5], "mine_every", "null")),
        ({"mine_relative_margin": 0.1}, ("mine_relative_margin", 0.1, "mine_every", "null")),
        ({"mine_every": 1, "num_negatives": 1, "batch_tokens": 99}, ("batch_tokens", 99, "mining")),
        ({"mine_every": 1, "num_negatives": 1, "no_duplicates": True}, ("no_duplicates", True, "mining")),
        (
            {"mine_every": 2, "num_negatives": 1, "passages": [8, 4], "refresh_windows": True},
            ("refresh_windows", True, "mine_every", 2),
        ),
    ],
)
def test_settings_of_mining_are_checked_when_made(changes, facts):
    with pytest.raises(ValueError, match=naming(*facts)):
        FinetuneConfig(**changes)


def test_ranks_that_hold_too_few(tmp_path, monkeypatch):
    config = FinetuneConfig(num_negatives=3, mine_every=1, mine_ranks=[1, 2])
    refused(tmp_path, monkeypatch, "num_negatives", 3, 1, 2, "ranks", 1, 2, config=config)


def test_a_loss_that_does_not_fit_the_vectors_is_refused(tmp_path, monkeypatch):
    """Found by trying it on the first batch: the base's vectors are not cut by Matryoshka."""
    loss = {"name": "matryoshka", "dims": [32, 8], "inner": {"name": "toward_base"}}
    config = replace(CONFIG, loss=loss, references={"base": None})
    refused(tmp_path, monkeypatch, "references['base']", 32, 8, "truncate", config=config)
    config = replace(CONFIG, loss={"name": "learnable_sigmoid", "similarity": "euclid"})
    refused(tmp_path, monkeypatch, "similarity", "euclid", "cosine", "dot", config=config)


# What is refused leaves everything as it was; what is begun can be saved.


def test_a_refused_finetune_leaves_the_embedder_and_a_finished_run(tmp_path, monkeypatch):
    finetune(make_embedder(tmp_path / "base"), make_dataset(), CONFIG, out=tmp_path / "run")
    embedder = make_embedder(tmp_path / "base")
    embedder.attach_query_side(make_embedder(tmp_path / "base"))
    sides = [embedder.side(role).encoder for role in ("query", "document")]
    for side, dropout in zip(sides, (0.125, 0.25), strict=True):
        side.attention_dropout = dropout
    before = {path: (tmp_path / "run" / path).read_bytes() for path in tree(tmp_path / "run")}
    monkeypatch.setattr(embedder, "save", lambda folder: Path(folder, "half").touch() or fail_to_save())
    config = replace(CONFIG, max_length=7, attention_dropout=0.5)
    with pytest.raises(ValueError, match=naming("adapter", "saved")):
        finetune(embedder, make_dataset(), config, out=tmp_path / "run", existing="overwrite")
    assert [embedder.max_length, *(side.attention_dropout for side in sides)] == [48, 0.125, 0.25]
    assert {path: (tmp_path / "run" / path).read_bytes() for path in tree(tmp_path / "run")} == before
    with pytest.raises(ValueError, match=naming("adapter", "saved")):
        finetune(embedder, make_dataset(), config, out=tmp_path / "new")
    assert not (tmp_path / "new").exists()


def fail_to_save():
    raise ValueError("this adapter cannot be saved")


@pytest.mark.parametrize("module", ["a sum of one module twice", "a shared adapter"])
def test_a_module_that_is_used_twice(tmp_path, module):
    """Its weights are one tensor under two names; checkpoints hold it, and it resumes."""
    embedder, options = make_embedder(tmp_path / "base"), {}
    if module == "a shared adapter":
        part = LinearMap(32, 32)
        embedder.attach(Adapter(query=part, document=part))
    else:
        scaled = Scaled(0.5)
        options["loss"] = build_loss({"name": "sum", "losses": [scaled, scaled]})
    finetune(embedder, make_dataset(), CONFIG, out=tmp_path / "run", **options)
    assert (tmp_path / "run" / "DONE").exists()


def test_the_report_on_the_base_is_not_truncated(tmp_path):
    """`max_length` is about training: the base is measured as it is."""
    embedder, data, out = make_embedder(tmp_path / "base"), make_dataset(), tmp_path / "run"
    whole = evaluate(embedder, data).metrics
    embedder.max_length = 4
    truncated = evaluate(embedder, data).metrics
    embedder.max_length = 48
    finetune(embedder, data, replace(CONFIG, max_length=4), validation=data, out=out)
    assert Report.load(out / "eval" / "validation-base").metrics == whole != truncated
    log = [record for _, record in read_jsonl(out / "train.jsonl")]
    assert log[0]["metrics"] == truncated


def test_batches_of_one_pair_are_warned_of_once(tmp_path):
    """By training, and not by the trial of the loss before it."""
    embedder = make_embedder(tmp_path / "base")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("default")
        finetune(embedder, make_dataset(), replace(CONFIG, batch_size=1), out=tmp_path / "run")
    assert sum(names(str(warning.message), "batch", "one", "document") for warning in told) == 1


def test_two_at_once(tmp_path):
    """The second one is refused while the first one trains."""
    embedder, data = make_embedder(tmp_path / "base"), make_dataset()
    errors = []

    def on_step(state, record):
        for existing in ("resume", "overwrite"):
            with pytest.raises(ValueError, match=naming(tmp_path / "run", "process", ".lock")) as caught:
                finetune(make_embedder(tmp_path / "base"), data, CONFIG, out=tmp_path / "run", existing=existing)
            errors.append(str(caught.value))
        return "stop"

    finetune(embedder, data, CONFIG, out=tmp_path / "run", on_step=on_step)
    assert len(errors) == 2
    assert (tmp_path / "run" / "DONE").exists()


def test_a_data_set_needs_a_name(tmp_path):
    with pytest.raises(ValueError, match=naming("dataset", "''")):
        finetune(make_embedder(tmp_path / "base"), {"": make_dataset(), "b": make_dataset(seed=1)})


@pytest.mark.parametrize(
    ("changes", "facts"),
    [
        ({"num_negatives": 2}, ("num_negatives", 2, 0)),
        ({"examples": "scored"}, ("scored",)),
        ({"loss": {"name": "listwise_kl"}}, ("listwise_kl", 1)),
        ({"max_length": 512}, ("max_length", 512, 48)),
        ({"passages": [64, 32]}, ("passages", 64)),
        ({"validation_passages": [8, 4, 64, 32]}, ("passages", 64, 48)),
        ({"freeze": ["nothing"]}, ("freeze", "nothing")),
        ({"lora": {"targets": ["nothing"]}}, ("targets", "nothing")),
        ({"lora": {"rank": 2}, "loss": {"name": "margin_mse"}}, ("margin_mse", 1)),
        ({"select": "ndgc@10"}, ("select", "ndgc@10")),
    ],
)
def test_a_check_raises_what_finetune_would_and_changes_nothing(tmp_path, changes, facts):
    embedder, dataset = make_embedder(tmp_path / "base"), make_dataset()
    before = embedder.sha256(), embedder.max_length, embedder.encoder.attention_dropout
    options = {"validation": dataset.split(0.5, seed=0)[1]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        finetuning.check_finetune(embedder, dataset, FinetuneConfig(attention_dropout=0.3, lora={"rank": 2}), **options)
        with pytest.raises(ValueError, match=naming(*facts)):
            finetuning.check_finetune(embedder, dataset, FinetuneConfig(attention_dropout=0.3, **changes), **options)
    assert (embedder.sha256(), embedder.max_length, embedder.encoder.attention_dropout) == before
    assert embedder.lora is None
