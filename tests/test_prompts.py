"""Prompts and replies: filling in what has braces of its own, and reading what language models make of a request."""

import json

import pytest

from embedft.corpus.prompts import TEMPLATE, fill_template, parse_reply, strip_numbering

ONE, TWO = "What did Lyft earn in 2020?", "Who runs Uber?"
LINES = f"{ONE}\n{TWO}"
JSON = json.dumps({"questions": [ONE, TWO]})


def test_a_template_is_filled_in_one_pass_and_keeps_other_braces():
    template = 'Write {num_questions} for {text}, as {"questions": ["{a}", {}]}. {text}'
    filled = fill_template(template, text="{num_questions} of {text} \\1 {x", num_questions=3)
    inside = "{num_questions} of {text} \\1 {x"
    assert filled == f'Write 3 for {inside}, as {{"questions": ["{{a}}", {{}}]}}. {inside}'
    with pytest.raises(ValueError, match=r"^the prompt template has no \{text\}"):
        fill_template("Write {num_questions} questions.", text="a", num_questions=1)


def test_the_default_template_holds_the_passage_and_the_number():
    filled = fill_template(TEMPLATE, text="Lyft earned 2.4 billion.", num_questions=7)
    assert "Write 7 questions" in filled
    assert filled.endswith("Passage:\nLyft earned 2.4 billion.\n")
    assert "{" not in filled


@pytest.mark.parametrize(
    "reply",
    [
        LINES,
        f"\n\n{ONE}\n\n \t\n{TWO}\n\n",
        f"{ONE}\r\n{TWO}",
        f"1. {ONE}\n2. {TWO}",
        f"1) {ONE}\n2) {TWO}",
        f"(1) {ONE}\n(2) {TWO}",
        f"[1] {ONE}\n[2] {TWO}",
        f"a) {ONE}\nb) {TWO}",
        f"- {ONE}\n- {TWO}",
        f"* {ONE}\n• {TWO}",
        f"  1.  {ONE}\n  2.  {TWO}",
        f"Q1: {ONE}\nQ2. {TWO}",
        f"Question 1: {ONE}\n**Question 2:** {TWO}",
        f"Question 1:\n{ONE}\nQuestion 2:\n{TWO}",
        f"**1.** {ONE}\n**2. {TWO}**",
        f"- **{ONE}**\n- 2. **{TWO}**",
        f'"{ONE}"\n“{TWO}”',
        f'1. "{ONE}",\n2. "{TWO}",',
        f"Here are two questions:\n{LINES}",
        f"Sure! Here are two questions for you:\n\n1. {ONE}\n2. {TWO}",
        f"Sure!\n{LINES}",
        f"Here are two questions a person might type.\n{LINES}",
        f"**Questions:**\n{LINES}",
        f"{LINES}\nHow many cities does Lyft serve?\nWhat is a rider?",
        f"{ONE}\n{ONE.upper()}\n{TWO}",
        f"---\n{ONE}\n***\n{TWO}",
        f"<think>\nWhat to ask?\nMaybe this?\n</think>\n\n{LINES}",
        f"```\n{LINES}\n```",
        JSON,
        json.dumps({"questions": [ONE, TWO]}, indent=2),
        json.dumps([ONE, TWO]),
        json.dumps({"questions": [ONE, f" {ONE} ", " ", TWO, "More?"]}),
        json.dumps({"questions": [f"1. {ONE}", f"2.  {TWO}"]}),
        json.dumps({"note": "x", "questions": ["What did Lyft\nearn in  2020?", TWO]}),
        f"```json\n{JSON}\n```",
        f"```\n{JSON}```",
        f"Here is the JSON:\n```json\n{JSON}\n```\nI hope it helps.",
        f"```json\n{JSON}",
        f"<think>{{</think>{JSON}",
    ],
)
def test_both_questions_are_found(reply):
    assert parse_reply(reply, 2) == [ONE, TWO]


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ("", "0 of 2 questions"),
        (" \n\n", "0 of 2 questions"),
        (ONE, "1 of 2 questions"),
        (f"{ONE}\n1. {ONE.lower()}", "1 of 2 questions"),
        (f"Here are they:\n{ONE}\n---", "1 of 2 questions"),
        (f"<think>\n{LINES}", "0 of 2 questions"),
        (json.dumps({"questions": [ONE]}), "1 of 2 questions"),
        (json.dumps({"questions": [ONE, ONE, "?"]}), "1 of 2 questions"),
        ("[]", "0 of 2 questions"),
        (JSON[:-10], r"invalid JSON in the reply \(Unterminated string .* of \d+\)"),
        ("{", r"invalid JSON .* character 1 of 1"),
        (f"```json\n{JSON[:-1]}", "invalid JSON"),
        (json.dumps({"questions": 3}), 'no list of strings under "questions"'),
        (json.dumps({"answers": [ONE, TWO]}), "no list of strings"),
        (json.dumps({"questions": [ONE, 3]}), "no list of strings"),
        (json.dumps([{"question": ONE}]), "no list of strings"),
    ],
)
def test_a_reply_of_no_use_says_why(reply, reason):
    with pytest.raises(ValueError, match=reason):
        parse_reply(reply, 2)


@pytest.mark.parametrize(
    ("line", "stripped"),
    [
        ("What is it?", "What is it?"),
        ("  What   is\tit? ", "What is it?"),
        ("2019. What changed?", "2019. What changed?"),
        ("2020: what changed?", "2020: what changed?"),
        ("3.5 million of what?", "3.5 million of what?"),
        ("10-K or 10-Q?", "10-K or 10-Q?"),
        ("A. Smith did what?", "A. Smith did what?"),
        ("Q3 2020 revenue of Lyft", "Q3 2020 revenue of Lyft"),
        ("Questionable assets of Uber?", "Questionable assets of Uber?"),
        ("-5% of what?", "-5% of what?"),
        ('"Cost" or "price"?', '"Cost" or "price"?'),
        ('"Cost" or "price"', '"Cost" or "price"'),
        ('What is "cost"', 'What is "cost"'),
        ("**Cost** and **price**", "**Cost** and **price**"),
        ("**Lyft** was founded when?", "**Lyft** was founded when?"),
        ("'What is it?'", "What is it?"),
        ("«What is it?»", "What is it?"),
        ("__What is it?__", "What is it?"),
        ("`What is it?`", "What is it?"),
        ("### 1. What is it?", "What is it?"),
        ("12. (a) What is it?", "What is it?"),
        ("**Q: What is it?**", "What is it?"),
        ("1.", ""),
        ("-", "-"),
        ('"', '"'),
        ('""', '""'),
        ("", ""),
    ],
)
def test_only_what_stands_around_a_line_is_taken_off(line, stripped):
    assert strip_numbering(line) == stripped


@pytest.mark.parametrize(
    "reply",
    [
        "**Question 1**\nWhat is A?\n**Question 2**\nWhat is B?",
        "Q1: What is A?\nA1: It is C.\nQ2: What is B?\nA2: It is D.",
        "I wrote two questions for you.\nWhat is A?\nWhat is B?",
        "What is A?\nThis one is about facts.\nWhat is B?",
    ],
)
def test_what_does_not_ask_gives_way(reply):
    assert parse_reply(reply, 2) == ["What is A?", "What is B?"]


def test_search_terms_of_a_template_that_wants_them_are_kept():
    assert parse_reply("uber revenue 2021\nlyft drivers' pay", 2) == ["uber revenue 2021", "lyft drivers' pay"]


def test_json_that_is_nested_too_deep():
    with pytest.raises(ValueError, match="nested too deep"):
        parse_reply('{"questions": ' + "[" * 100_000, 2)
