"""Kinds of question: prompts and replies, corpus/kinds.py, the command that writes them, and training on some."""

import json
import math

import pytest
import torch
from api_server import ApiServer
from naming import names, naming
from tiny import make_dataset, make_embedder

from embedft import FinetuneConfig, RetrievalDataset, finetune
from embedft.cli import main
from embedft.corpus.chunks import Chunk
from embedft.corpus.cleaning import clean
from embedft.corpus.kinds import PSEUDO_KINDS, join_kinds, keywords, pseudo_kinds, without_keywords
from embedft.corpus.prompts import CLAIM, KEYWORDS, KINDS, QUESTION, TITLE, fill_template, parse_reply
from embedft.corpus.questions import QuestionConfig, write_questions
from embedft.data.mixture import join_datasets
from embedft.files import read_json, read_jsonl

# What a model may write about a chunk; nothing fits another kind as well.
WRITTEN = {
    "question": ["What did Lyft earn in {i}?", "Who audits the books of {i}?"],
    "claim": ["Lyft earned more in {i} than before.", "An outside firm audits the books of {i}."],
    "keywords": ["lyft revenue {i} growth", "auditor books {i} firm"],
    "title": ["Lyft's Revenue, {i}", "The Auditors of {i}"],
}
DISTINCT = ["ab", "cd", "ef", "gh", "ij", "kl", "mn", "op", "qr", "st"]


def text_of(number: int) -> str:
    return f"Number {number} is about {DISTINCT[number]}. " + "Here are more words that fill the page. " * 3


def write_chunks(path, count: int = 4):
    rows = ({"id": f"c{i}", "text": text_of(i)} for i in range(count))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write(prompt: str, num_questions: int) -> list[str]:
    """What the prompt asks for: its kind is known by its first sentence, its chunk by the number in it."""
    number = prompt.partition("Number ")[2].partition(" ")[0]
    (kind,) = (
        name for name, kind in KINDS.items() if prompt.startswith(kind.template.partition("{num_questions}")[0])
        and kind.template.partition("{num_questions}")[2].partition(".")[0] in prompt
    )  # fmt: skip
    return [line.format(i=number) for line in WRITTEN[kind][:num_questions]]


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EMBEDFT_PROGRESS", "0")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-any")
    write_chunks(tmp_path / "chunks.jsonl")
    return tmp_path


# Prompts and replies


@pytest.mark.parametrize("name", KINDS)
def test_a_prompt_says_what_to_write_and_how_much(name):
    kind = KINDS[name]
    prompt = fill_template(kind.template, text="The books of 2021.", num_questions=3)
    assert prompt.endswith("\nPassage:\nThe books of 2021.\n")
    assert names(prompt, 3)
    assert "{" not in prompt
    schema = kind.response_format["json_schema"]
    assert schema["name"] == kind.keys[0]
    assert schema["schema"]["required"] == [kind.keys[0]]


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_replies_of_each_kind(kind):
    """As JSON under its key or bare, broken or fenced; as lines with numbers, quotes, labels and preambles."""
    one, two = (line.format(i=2021) for line in WRITTEN[kind.name])
    replies = [
        f"{one}\n{two}",
        f"Sure! Here are two for the passage:\n\n1. {one}\n2. {two}\n",
        f'- "{one}"\n- "{two}"',
        f"<think>What is the passage about?\nLyft and its books.</think>\n{one}\n{two}",
        json.dumps({kind.keys[0]: [one, two]}),
        json.dumps({kind.keys[-1]: [one, two]}),
        json.dumps({"reasoning": "These are facts of a filing from 2021.", kind.keys[0]: [one, two]}),
        json.dumps([one, two]),
        f"```json\n{json.dumps({kind.keys[0]: [one, two]})}\n```",
        json.dumps({kind.keys[0]: [one, two, "more"]})[:-8],
        f"**{one}**\n{one.upper()}\n**{two}**\n",
    ]
    if kind is not QUESTION:
        label = kind.name.capitalize()
        replies += [
            f"**{label}:** {one}\n**{label} 2**: {two}",
            f"{one}\nLet me know if that helps.\n{two}",
        ]
        replies += [f"I hope this helps!\n{one}\n{two}", f"{label}: {one}\n{label} 2: {two}"]
        replies += [json.dumps({kind.keys[0]: [f"{label} 1: {one}", two]})]
    for reply in replies:
        assert parse_reply(reply, 2, kind) == [one, two], reply
    assert parse_reply(f"{one}\n{two}", 1, kind) == [one]


@pytest.mark.parametrize(
    ("kind", "reply"),
    [
        (CLAIM, "What did Lyft earn in 2021?"),
        (CLAIM, json.dumps({"claims": ["What did Lyft earn in 2021?"]})),
        (CLAIM, '{"claims": ['),
        (CLAIM, "Here are two claims:"),
        (KEYWORDS, json.dumps({"searches": ["revenue", "Lyft", "2021"]})),  # one search in three parts
        (KEYWORDS, "revenue\nLyft"),
        (KEYWORDS, "How did revenue grow?"),
        (TITLE, "Introduction"),
        (TITLE, ""),
    ],
)
def test_replies_of_another_kind_are_none(kind, reply):
    with pytest.raises(ValueError, match=naming(kind.name, "reply")):
        parse_reply(reply, 2, kind)


def test_claims_in_other_languages():
    claims = ["来福车公司二零二一年的收入高于上一年度。", "La société a gagné davantage en 2021."]
    assert parse_reply("\n".join(claims), 2, CLAIM) == claims


# Cleaning


def test_only_questions_have_to_ask():
    texts = {
        "c/q1": "What did Lyft earn in 2021?",
        "c/q2": "Lyft earned more in 2021.",
        "c/claim1": "Lyft earned more in 2021 than before.",
        "c/claim2": "According to the passage, Lyft earned more.",
        "c/keywords1": "lyft revenue 2021 growth",
        "c/title1": "Lyft's Revenue, 2021",
        "c/title2": "lyft revenue, 2021 Growth",
        "c/q3": "Lyft",
    }
    kinds = {i: i.split("/")[1][:-1].replace("q", "question") for i in texts if i != "c/q3"}
    dataset = RetrievalDataset(texts, {"c": "The books."}, {i: {"c": 1} for i in texts}, kinds=kinds)
    cleaned, dropped = clean(dataset)
    assert {i: reason for i, (reason, _) in dropped.items()} == {
        "c/q2": "asks nothing",
        "c/claim2": "points at its source",
        "c/title2": "repeats another query",
        "c/q3": "asks nothing",  # of no kind: a question
    }
    assert cleaned.kinds == {i: kind for i, kind in kinds.items() if i not in dropped}


# Without a model


def test_keywords_by_hand():
    """tf * ln(N / df), N = 3. Chunk a: "tax" 3 * ln(3/2) = 1.22 comes before "audit", "board", "chair" with
    1 * ln(3/1) = 1.10 each; of these and "delay", as heavy, two more are taken, by the alphabet."""
    filler = "the one and two of three or four in five " * 2  # in every chunk: weight 0
    texts = {
        "a": f"{filler} tax tax tax delay chair board audit 2021 ox9 of no",
        "b": f"{filler} tax elk fox gnu hen",
        "c": f"{filler} imp jay kid lark mole",
    }
    assert 3 * math.log(3 / 2) > math.log(3) > math.log(3 / 2)
    dataset = keywords([Chunk(id, text) for id, text in texts.items()])
    assert dataset.queries == {
        "a/q": "tax audit board chair delay",
        "b/q": "elk fox gnu hen tax",
        "c/q": "imp jay kid lark mole",
    }
    assert dataset.qrels == {f"{id}/q": {id: 1} for id in texts}
    assert dataset.corpus == texts


def test_why_chunks_have_no_keywords():
    filler = "the one and two of three or four in five " * 2
    texts = {
        "short": f"{filler[: len(filler) // 2]} elk fox gnu hen imp",
        "common": f"{filler} elk fox",
        "twin": f"{filler} ant bee cat dog eel",
        "other twin": f"{filler} eel dog cat bee ant",
        "good": f"{filler} jay kid lark mole newt",
    }
    chunks = [Chunk(id, text) for id, text in texts.items()]
    left_out = without_keywords(chunks)
    assert left_out.keys() == texts.keys() - {"good"}
    assert names(left_out["short"], 20, "words")
    assert names(left_out["common"], 5)
    assert left_out["twin"] == left_out["other twin"]
    assert list(keywords(chunks).queries) == ["good/q"]


HEADED = "The Rules of House {i}\nNumber {i} is let to {word} until spring. The doors close at night for {other}. "
HEADED += "Nobody but the keeper has a key to the {word} room and the {other} garden of the house.\n"
HEADED += "in it are {word}een, {word}ish, {word}ow, {word}ly and {word}ing things, as a list without an end says"


def headed(count: int = 3) -> list[Chunk]:
    texts = [HEADED.format(i=i, word="abc"[i] * 4, other="xyz"[i] * 5) for i in range(count)]
    return [Chunk(f"h{i}", text) for i, text in enumerate(texts)]


def test_each_kind_is_taken_from_what_is_left():
    dataset, left_out = pseudo_kinds(headed(), seed=0, keep_share=0)
    assert list(dataset.queries)[::3] == ["h0/title", "h0/claim", "h0/keywords"]
    assert dataset.kinds == {i: i.partition("/")[2] for i in dataset.queries}
    assert left_out == {kind: {} for kind in PSEUDO_KINDS}
    for i, chunk in enumerate(headed()):
        document = dataset.corpus[chunk.id]
        assert dataset.queries[f"h{i}/title"] == f"The Rules of House {i}"
        assert "Rules" not in document
        assert dataset.queries[f"h{i}/claim"] in " ".join(chunk.text.split())
        assert dataset.queries[f"h{i}/claim"] not in " ".join(document.split())
        assert set(dataset.queries[f"h{i}/keywords"].split()) <= set(document.lower().replace(",", " ").split())
    # The order asked for makes no difference; a kind alone is that kind of the whole chunk.
    assert pseudo_kinds(headed(), ["keywords", "claim", "title"], seed=0, keep_share=0)[0] == dataset
    alone = pseudo_kinds(headed(), ["keywords"], seed=0)[0]
    assert alone.corpus == {chunk.id: chunk.text for chunk in headed()}
    assert list(alone.queries.values()) == list(keywords(headed()).queries.values())


def test_a_kind_that_no_chunk_has_does_not_cost_the_others():
    chunks = [Chunk(f"c{i}", text_of(i).replace("ab", "ab")) for i in range(3)]
    dataset, left_out = pseudo_kinds(chunks, ["title", "claim"], seed=0)
    assert left_out["title"].keys() == {"c0", "c1", "c2"}
    assert set(dataset.kinds.values()) == {"claim"}
    with pytest.raises(ValueError, match=naming(3, "title")):
        pseudo_kinds(chunks, ["title"], seed=0)
    short = [Chunk("a", "The mill is closed."), Chunk("b", "磨坊建于一八二〇年。镇上拥有它！")]
    facts = ("title", ..., "heading", ..., "claim", ..., "keywords", ..., 20)  # of each kind, its commonest reason
    with pytest.raises(ValueError, match=naming(2, *facts, "words")):
        pseudo_kinds(short, seed=0)
    with pytest.raises(ValueError, match=naming("'question'", "model", "title", "claim", "keywords")):
        pseudo_kinds(chunks, ["question"], seed=0)


def test_joined_kinds_keep_their_ids_apart():
    questions = RetrievalDataset({"a/q1": "Who?", "a/q2": "Why?"}, {"a": "me"}, {"a/q1": {"a": 1}, "a/q2": {"a": 1}})
    claims = RetrievalDataset({"a/q1": "It is me."}, {"a": "me"}, {"a/q1": {"a": 1}})
    joined = join_kinds({"question": questions, "claim": claims})
    assert joined.queries == {"a/q1": "Who?", "a/q2": "Why?", "a/claim1": "It is me."}
    assert joined.kinds == {"a/q1": "question", "a/q2": "question", "a/claim1": "claim"}
    assert joined.qrels == {i: {"a": 1} for i in joined.queries}
    assert join_datasets({"x": joined}).kinds == {f"x/{i}": kind for i, kind in joined.kinds.items()}


# The command


def ask(server: ApiServer, *options: str) -> int:
    return main(["questions", "chunks.jsonl", "--out", "out", "--base-url", server.base_url, *options])


def test_an_llm_writes_every_kind_once(place, capsys):
    kinds = ["--kinds", "question", "claim", "keywords", "title"]
    prices = ["--price-in", "1", "--price-out", "2"]
    with ApiServer(write=write) as server:
        assert ask(server, *kinds, *prices, "--dry-run") == 0
        out = capsys.readouterr().out
        assert names(out, "16 requests", "4 chunks", "4 kinds", "cost")
        assert server.counts["chat"] == 0
        assert ask(server, "--kinds", "question", "--max-cost", "1", *prices) == 0
        assert server.counts["chat"] == 4
        assert ask(server, *kinds, *prices) == 2  # other kinds replace the dataset only on request
        assert names(capsys.readouterr().err, "out/chunks.json", "--overwrite")
        assert ask(server, *kinds, *prices, "--overwrite") == 0
        assert server.counts["chat"] == 16  # the questions were there
        assert ask(server, *kinds) == 0
        assert server.counts["chat"] == 16
        schemas = [body["response_format"]["json_schema"]["schema"]["required"] for _, _, body in server.log]
        assert schemas == [["questions"]] * 4 + [["claims"]] * 4 + [["searches"]] * 4 + [["titles"]] * 4
    dataset = RetrievalDataset.load("out/chunks.json")
    expected = {
        f"c{i}/{'q' if kind == 'question' else kind}{n}": text.format(i=i)
        for kind, texts in WRITTEN.items()
        for i in range(4)
        for n, text in enumerate(texts, 1)
    }
    assert dataset.queries == expected
    assert {i: kind for i, kind in dataset.kinds.items() if kind != "question"} == {
        i: i.partition("/")[2][:-1] for i in expected if "/q" not in i
    }
    assert list(dataset.kinds.values()).count("question") == 8
    assert dataset.corpus == {f"c{i}": text_of(i) for i in range(4)}
    report = read_json("out/question-report.json")
    assert report["missing"] == {kind: {} for kind in WRITTEN}
    assert report["settings"]["template_sha256"].keys() == WRITTEN.keys()
    recorded = [record.get("kind") for _, record in read_jsonl("out/replies.jsonl")]
    assert [recorded.count(kind) for kind in (None, "claim", "keywords", "title")] == [4] * 4


def test_kinds_that_share_a_prompt_are_asked_apart(place):
    chunks = [Chunk("c", text_of(1))]
    with ApiServer(write=lambda prompt, number: ["Lyft earned more in 2021."]) as server:
        config = QuestionConfig(base_url=server.base_url)
        for kind in (CLAIM, TITLE, CLAIM):
            write_questions(chunks, config, folder="out", template="About: {text}", kind=kind)
        assert server.counts["chat"] == 2


def test_lines_will_do_for_every_kind(place):
    with ApiServer(write=write, schema=False) as server:
        assert ask(server, "--kinds", "title", "claim", "--num-questions", "1") == 0
    dataset = RetrievalDataset.load("out/chunks.json")
    assert dataset.queries["c2/title1"] == "Lyft's Revenue, 2"
    assert dataset.queries["c2/claim1"] == "Lyft earned more in 2 than before."


def test_a_budget_is_shared_by_the_kinds_and_the_rest_comes_next_time(place, capsys):
    with ApiServer(write=write) as server:
        assert ask(server, "--kinds", "claim", "title", "--max-requests", "6") == 1
        assert server.counts["chat"] == 6
        err = capsys.readouterr().err
        assert names(err, "2 of 4 chunks have no titles")
        assert "no claims" not in err
        dataset = RetrievalDataset.load("out/chunks.json")
        assert sorted(dataset.kinds.values()) == ["claim"] * 8 + ["title"] * 4
        assert ask(server, "--kinds", "claim", "title") == 0
        assert server.counts["chat"] == 8


def test_without_kinds_nothing_is_recorded(place):
    with ApiServer(write=write) as server:
        assert ask(server) == 0
    assert "kinds" not in read_json("out/chunks.json")
    assert all("kind" not in record for _, record in read_jsonl("out/replies.jsonl"))


def test_a_template_of_ones_own_is_for_questions(place, capsys):
    (place / "mine.txt").write_text("Ask {num_questions} things: {text}")
    assert main(["questions", "chunks.jsonl", "--out", "out", "--template", "mine.txt", "--kinds", "title"]) == 2
    assert names(capsys.readouterr().err, "--template", "questions", "--kinds", "title")
    asked = []

    def answer(prompt, num_questions):
        asked.append(prompt.startswith("Ask 2 things"))
        return WRITTEN["question"] if asked[-1] else write(prompt, num_questions)

    with ApiServer(write=answer) as server:
        assert ask(server, "--kinds", "question", "title", "--template", "mine.txt") == 0
    assert (asked.count(True), asked.count(False)) == (4, 4)


def test_a_mix_without_a_key(place, capsys):
    rows = [{"id": chunk.id, "text": chunk.text} for chunk in headed()]
    (place / "chunks.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in [*rows, {"id": "e", "text": "Short."}])
    )
    command = ["questions", "chunks.jsonl", "--out", "out", "--method", "pseudo", "--held-out"]
    assert main(command) == 0
    out = capsys.readouterr().out
    for kind in PSEUDO_KINDS:
        assert names(out, "1 of 4", f"no {kind}")
    dataset = RetrievalDataset.load("out/chunks.json")
    assert sorted(dataset.kinds.values()) == ["claim"] * 3 + ["keywords"] * 3 + ["title"] * 3
    assert not any(dataset.queries[f"h{i}/claim"] in dataset.corpus[f"h{i}"] for i in range(3))
    report = read_json("out/question-report.json")
    assert report["missing"].keys() == {f"e/{kind}" for kind in PSEUDO_KINDS}
    assert report["settings"]["kinds"] == list(PSEUDO_KINDS)
    assert main([*command, "--kinds", "keywords", "--overwrite"]) == 0
    assert set(RetrievalDataset.load("out/chunks.json").kinds.values()) == {"keywords"}


@pytest.mark.parametrize(
    ("options", "facts"),
    [
        (["--method", "ict", "--kinds", "claim"], ("--kinds", "llm", "pseudo", "ict")),
        (["--method", "pseudo", "--kinds", "question"], ("'question'", "language model")),
        (["--kinds", "claim", "claim"], ("kinds", "'claim'", "twice")),
        (["--kinds", "summary"], ("kinds", "summary", "question")),
        (["--kinds", "claim,title"], ("kinds", "claim,title", "blanks")),
        (["--method", "title", "--held-out"], ("--held-out", "pseudo", "title")),
    ],
)
def test_bad_input(place, capsys, options, facts):
    assert main(["questions", "chunks.jsonl", "--out", "out", *options]) == 2
    assert names(capsys.readouterr().err, *facts)
    assert not (place / "out").exists()


# Training


def with_kinds() -> RetrievalDataset:
    plain = make_dataset(16, 8)
    kinds = {i: ("question", "claim", "title")[row % 3] for row, i in enumerate(plain.queries)}
    return RetrievalDataset(plain.queries, plain.corpus, plain.qrels, kinds=kinds)


CONFIG = {"epochs": 2, "batch_size": 4, "lr": 1e-3, "token_memory": 0}


def trained(folder, dataset, **options):
    embedder = make_embedder(folder)
    finetune(embedder, dataset, FinetuneConfig(**CONFIG, **options))
    return embedder.state_dict()


def test_training_on_some_kinds_is_training_on_their_questions(tmp_path):
    data = with_kinds()
    some = trained(tmp_path / "base", data, kinds=["question", "claim"])
    same = trained(tmp_path / "base", data.of_kinds(["claim", "question"]))
    assert all(torch.equal(some[name], same[name]) for name in same)
    whole, plain = trained(tmp_path / "base", data), trained(tmp_path / "base", make_dataset(16, 8))
    assert all(torch.equal(whole[name], plain[name]) for name in plain)
    assert not all(torch.equal(some[name], whole[name]) for name in whole)


def test_kinds_are_chosen_in_every_dataset_of_a_mixture_and_mined_for(tmp_path):
    embedder, data = make_embedder(tmp_path / "base"), with_kinds()
    config = FinetuneConfig(**CONFIG, kinds=["claim"], mine_every=1, num_negatives=1, mine_ranks=[1, 8])
    finetune(embedder, {"a": data, "b": data}, config, out=tmp_path / "run")
    assert read_json(tmp_path / "run" / "config.json")["kinds"] == ["claim"]
    steps = [record for _, record in read_jsonl(tmp_path / "run" / "train.jsonl") if "loss" in record]
    assert len(steps) == 2 * 2 * math.ceil(5 / 4)  # epochs, datasets, 5 claims of 16 questions


def test_mined_data_keeps_the_kinds(place, tmp_path):
    make_embedder(tmp_path / "base")
    data = with_kinds()
    data.save("data.json")
    assert main(["mine", "base", "data.json", "--out", "mined.jsonl", "--num-negatives", "1", "--ranks", "1", "8"]) == 0
    assert RetrievalDataset.load("mined.jsonl").kinds == data.kinds


def test_errors_of_kinds_name_the_dataset_and_what_it_has(tmp_path):
    embedder, data = make_embedder(tmp_path / "base"), with_kinds()
    with pytest.raises(ValueError, match=naming("kinds", ..., "b", "'claim'")):
        finetune(embedder, {"a": data, "b": make_dataset()}, FinetuneConfig(kinds=["claim"]))
    with pytest.raises(ValueError, match=naming("kinds", "'keywords'", "question", 6, "claim", 5, "title", 5)):
        finetune(embedder, data, FinetuneConfig(kinds=["keywords"]), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match=naming("kinds", [], "null")):
        FinetuneConfig(kinds=[])
    with pytest.raises(ValueError, match=naming("kinds", ["claim"], "batches")):
        finetune(embedder, data, FinetuneConfig(kinds=["claim"]), batches=[])
