"""encoders/prompts.py: which of a model's prompts is whose, by the names that published models give them."""

import pytest
from naming import names

from embedft import load_embedder
from embedft.cli import main
from embedft.encoders.prompts import choose_prompts, names_of

TEXTS = ["the fee", "order of the hello world"]


@pytest.mark.parametrize(
    ("prompts", "query", "document"),
    [
        ({}, None, None),
        ({"query": "q: ", "document": "d: "}, "q: ", "d: "),
        ({"query": "q: ", "passage": "p: "}, "q: ", "p: "),
        ({"search_query": "q: ", "search_document": "d: ", "clustering": "c: "}, "q: ", "d: "),
        ({"s2p_query": "q: ", "s2s_query": "s: "}, "q: ", None),
        ({"web_search_query": "q: ", "sts_query": "s: ", "summarization_query": "s: "}, "q: ", None),
        ({"retrieval.query": "q: ", "retrieval.passage": "p: ", "text-matching": ""}, "q: ", "p: "),
        ({"Retrieval-query": "q: ", "Retrieval-document": "d: ", "STS": "s: "}, "q: ", "d: "),
        ({"query_prefix": "q: ", "passage_prefix": "p: "}, "q: ", "p: "),
        ({"corpus": "c: "}, None, "c: "),
        # The reserved names win, even if they are empty.
        ({"query": "q: ", "Retrieval-query": "other: "}, "q: ", None),
        ({"document": "", "passage": "p: "}, None, ""),
        # Of two, none is chosen, unless they agree.
        ({"passage": "p: ", "corpus": "c: "}, None, None),
        ({"passage": "p: ", "corpus": "p: "}, None, "p: "),
        ({"passage": "p: ", "corpus": ""}, None, None),
        # Not names of a role, though they contain one.
        ({"s2s_query": "s: ", "document_classification": "c: ", "my query": "m: "}, None, None),
    ],
)
def test_choice(prompts, query, document):
    chosen = choose_prompts(prompts)
    assert (chosen.get("query"), chosen.get("document")) == (query, document)
    assert prompts.items() <= chosen.items()


def test_names_of_a_role():
    assert names_of("document", ["doc", "query", "Passage"]) == ["doc", "Passage"]
    assert names_of("document", ["doc", "document"]) == ["document"]


def test_an_alias_is_saved_under_the_name_of_its_role(write_tiny, reference, tmp_path):
    """So that sentence-transformers uses it for documents; it does not use "passage" by itself."""
    settings = {"prompts": {"search_query": "what ", "passage": "the "}, "default_prompt_name": "passage"}
    embedder = load_embedder(write_tiny(tmp_path / "model", modules=True, settings=settings), device="cpu")
    assert (embedder.prompt("query"), embedder.prompt("document")) == ("what ", "the ")
    embedder.save(tmp_path / "saved")
    theirs = reference(tmp_path / "saved")
    assert theirs.default_prompt_name == "passage"
    for role, encode in (("query", theirs.encode_query), ("document", theirs.encode_document)):
        assert abs(encode(TEXTS) - embedder.encode(TEXTS, role=role)).max() <= 1e-6


def test_names_on_the_command_line(write_tiny, tmp_path, capsys):
    """A name that a role's option gives; the other role keeps the alias that the folder has for it."""
    prompts = {"s2s_query": "of ", "s2p_query": "what ", "passage": "the "}
    folder = str(write_tiny(tmp_path / "model", modules=True, settings={"prompts": prompts}))

    def shown(*options: str) -> str:
        main(["info", folder, "--device", "cpu", *options])
        lines = capsys.readouterr().out.splitlines()
        return next(line for line in lines if line.startswith("prompts")).removeprefix("prompts").strip()

    assert shown() == "query: 'what ', document: 'the '"
    assert shown("--query-prompt", "s2s_query") == "query: 'of ', document: 'the '"
    assert shown("--document-prompt", "") == "query: 'what '"


@pytest.mark.parametrize("given", ["s2p_qurey", "passage", "Query"])
def test_one_word_that_is_no_name_is_mistyped(write_tiny, tmp_path, capsys, given):
    settings = {"prompts": {"query": "what ", "s2p_query": "of "}}
    folder = str(write_tiny(tmp_path / "model", modules=True, settings=settings))
    assert main(["info", folder, "--device", "cpu", "--query-prompt", given]) == 2
    assert names(capsys.readouterr().err, "--query-prompt", repr(given), "query", "s2p_query")
    for text in (f"{given} ", f"{given}:", "検索"):
        assert main(["info", folder, "--device", "cpu", "--query-prompt", text]) == 0
        assert f"query: {text!r}" in capsys.readouterr().out
