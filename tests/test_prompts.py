"""Prompts and replies: filling in what has braces of its own, and reading what language models make of a request."""

import contextlib
import json
import time

import pytest
from naming import naming

from embedft.corpus import prompts
from embedft.corpus.prompts import TEMPLATE, fill_template, message_text, parse_reply, strip_numbering

ONE, TWO = "What did Lyft earn in 2020?", "Who runs Uber?"
LINES = f"{ONE}\n{TWO}"
JSON = json.dumps({"questions": [ONE, TWO]})


def test_a_template_is_filled_in_one_pass_and_keeps_other_braces():
    template = 'Write {num_questions} for {text}, as {"questions": ["{a}", {}]}. {text}'
    filled = fill_template(template, text="{num_questions} of {text} \\1 {x", num_questions=3)
    inside = "{num_questions} of {text} \\1 {x"
    assert filled == f'Write 3 for {inside}, as {{"questions": ["{{a}}", {{}}]}}. {inside}'
    with pytest.raises(ValueError, match=naming("template", "{text}")):
        fill_template("Write {num_questions} questions.", text="a", num_questions=1)


def test_the_default_template_holds_the_passage_and_the_number():
    filled = fill_template(TEMPLATE, text="Lyft earned 2.4 billion.", num_questions=7)
    assert "Write 7 questions" in filled
    assert filled.endswith("Passage:\nLyft earned 2.4 billion.\n")
    assert "{" not in filled


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("a", "a"),
        (None, ""),
        ([], ""),
        ([{"type": "text", "text": "a"}, {"text": "b"}], "ab"),
        (
            [
                {"type": "thinking", "thinking": "no"},
                {"type": "reasoning", "text": "no"},
                {"type": "text", "text": "a"},
            ],
            "a",
        ),
        ([{"type": "text"}, 3, None], ""),
        ([{"type": "output_text", "text": "a"}, {"type": "reasoning.text", "text": "no"}], "a"),
        (["a", {"text": "b"}, ["c"]], "abc"),
        ({"type": "text", "text": "a"}, "a"),
        ({"type": "refusal", "refusal": "no"}, ""),
    ],
)
def test_the_text_of_a_message(content, text):
    assert message_text(content) == text


@pytest.mark.parametrize(
    "reply",
    [
        LINES,
        f"\n\n{ONE}\n\n \t\n{TWO}\n\n",
        f"{ONE}\r\n{TWO}",
        f"1. {ONE}\n2. {TWO}",
        f"1. {ONE} 2. {TWO}",
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
        # Thoughts, whatever opens and closes them.
        f"Two questions are wanted.\nShould I ask for the year?\n</think>\n\n{LINES}",
        f"What is there to ask?\n</think>\n{JSON}",
        f"<thinking>\nWhat else?\n</thinking>\n{LINES}",
        f"<reasoning>Hm? What?</reasoning>{JSON}",
        f"<THINK>Hm?\nWhat?</THINK>{LINES}",
        f"<seed:think>Hm?</seed:think>{LINES}",
        f"[THINK]What to ask?[/THINK]{LINES}",
        f"<analysis>\nWhat to ask?\n</analysis>\n{LINES}",
        f"<|begin_of_thought|>What to ask?<|end_of_thought|>\n{LINES}",
        f"<|START_THINKING|>What to ask?<|END_THINKING|>{JSON}",
        f"{LINES}\n<|START_THINKING|>Is that all?",
        f"<|channel|>analysis<|message|>What is it?\nHm?<|end|><|channel|>final<|message|>{JSON}<|return|>",
        f"{LINES}\n<think>\nIs that all?",
        f"<|channel>thought\nWhat is it?\nHm?<channel|>{LINES}<turn|>",
        f"{LINES}\n<|channel>thought\nIs that all?",
        f"<unused94>thought\nWhat is it?\nHm?<unused95>{LINES}",
        f"{LINES}\n<unused94>thought\nIs that all?",
        f"What is there to ask?\n</thinking_process>\n{LINES}",
        f'<internal-monologue id="1">What is there to ask?</internal-monologue>{JSON}',
        f"<plan>\nWhat is there to ask?\n</plan>\n{LINES}",
        f"<reasoning_effort>Hm?</reasoning_effort>{LINES}",
        f"Here is my thought process: What is there to ask?\nHere is my response: {LINES}",
        f"[INST] What is there to ask? [/INST] {LINES}",
        # Headers of roles.
        f"assistant\n\n{JSON}",
        f"assistant\n{LINES}",
        f"Assistant: {LINES}",
        f"<|im_start|>assistant\n{LINES}<|im_end|>",
        f"<|start_header_id|>assistant<|end_header_id|>\n\n{LINES}<|eot_id|>",
        f"json\n{JSON}",
        # JSON wherever it is.
        f"Let me think about the passage.\nIs it about money?\n\n{JSON}",
        f"{JSON}\n\nI hope this helps! Do you want more?",
        f"{JSON}\n{JSON}",
        f'As {{"questions": ["...", "..."]}} then: {JSON}',
        f"\ufeff{JSON}",
        f"```json{JSON}```",
        f"```json\r\n{JSON}\r\n```",
        JSON.replace("questions", "Questions"),
        json.dumps([[ONE], [TWO]]),
        json.dumps([{"question": ONE, "answer": "Billions."}, {"question": TWO, "answer": "Who knows?"}]),
        f'{{"question": "{ONE}"}}\n{{"question": "{TWO}"}}',
        json.dumps({"questions": [ONE, 3, TWO]}),
        json.dumps({"answers": [ONE, TWO]}),
        # JSON in a string of JSON.
        json.dumps(JSON),
        json.dumps(json.dumps(LINES)),
        json.dumps({"questions": json.dumps([ONE, TWO])}),
        json.dumps({"questions": [json.dumps([ONE, TWO])]}),
        json.dumps([json.dumps({"question": ONE}), json.dumps({"question": TWO})]),
        JSON.replace('"', '\\"'),
        # Markup that a server or a model left in.
        f"{LINES}<end_of_turn>",
        f"<s> {LINES}</s>",
        f"{ONE}</s>\n{TWO} <eos>",
        f"<question>{ONE}</question>\n<question>{TWO}</question>",
        f"<questions>\n<question>\n{ONE}\n</question>\n<question>{TWO}</question>\n</questions>",
        f"<question>{ONE}</question><question>{TWO}</question>",
        f'<ol class="a"><li>{ONE}</li><li><b>{TWO}</b></li></ol>',
        f"<li>{ONE}\n<li>{TWO}",
        f"{ONE}<br/>{TWO}",
        f"| # | Question |\n|---|---|\n| 1 | {ONE} |\n| 2 | {TWO} |",
        f"| {ONE} | 2.4 billion |\n| {TWO} | A person. |",
        f"*{ONE}*\n_{TWO}_",
        f"1. *{ONE}*\n* ***{TWO}***",
        f"*1.* {ONE}\n__Question 2: {TWO}__",
        f"[ ] {ONE}\n- [x] {TWO}",
        f"1、{ONE}\n2、 {TWO}",
        f"（1）{ONE}\n2：{TWO}",
        f"(i) {ONE}\n(ii) {TWO}",
        f"iii. {ONE}\nIV) {TWO}",
        f"w) {ONE}\n(x) {TWO}",
        f"① {ONE}\n2\ufe0f\u20e3 {TWO}",
        f"✅ {ONE}\n→ {TWO}",
        f"\U0001f449 {ONE}\n> {TWO}",
        f"Question one: {ONE}\n**Question two:** {TWO}",
        f"Question one\n{ONE}\nQuestion two\n{TWO}",
        f"\x00{ONE}\x07\n\x1b[1;31m{TWO}\x1b[0m",
        json.dumps({"questions": [f"{ONE}\x00", f"\x1b[31m{TWO}"]}),
        # Tags written for HTML.
        f"&lt;think&gt;\nWhat is it?\n&lt;/think&gt;\n{LINES}",
        f"What is it? &#60;/THINK&#x3e;\n{LINES}\n&#x3C;think&#062;What else?",
        f"&amp;lt;think&amp;gt;What is it?&amp;lt;/think&amp;gt;{LINES}&lt;|im_end|&gt;",
        f"&lt;p&gt;{ONE}&lt;/p&gt;&lt;p&gt;{TWO}&lt;/p&gt;",
        f"&lt;think&gt;Which?&lt;/think&gt;{JSON}",
        # One line.
        f"{ONE} {TWO}",
        f"1. {ONE}  {TWO}\n",
        json.dumps({"questions": [f"{ONE} {TWO}"]}),
        # Thoughts without tags.
        f"Thought: What could one ask?\n**Reasoning:** which year?\n{LINES}",
        # Broken JSON: the whole strings that ask.
        JSON[:-2] + ",]}",
        JSON[:-1],
        JSON.replace('"', "'"),
        f'{JSON[:-2]}, "What is cut',
        # Thoughts by other names, and headings.
        f"<cot>\nWhat to ask?\nMaybe this?\n</cot>\n{LINES}",
        f"<réflexion>\nWhat to ask?\n</réflexion>\n{JSON}",
        f"<思考>\nWhat to ask?\n</思考>\n\n<questions>\n{LINES}\n</questions>",
        f'<details type="reasoning" done="true">\n<summary>Why?</summary>\nWhat to ask?\n</details>\n{LINES}',
        f"<notes>\nWhat to ask?\n</notes>\n<list>\n- {ONE}\n- {TWO}\n</list>",
        f"<ul>\n<li>{ONE}</li>\n</ul>\n<ul>\n<li>{TWO}</li>\n</ul>",
        f"<q1>\n{ONE}\n</q1>\n<q2>\n{TWO}\n</q2>",
        f"Which facts are there?\n<\\/think>\n{LINES}",
        f"Which facts are there?\n< / think >\n{LINES}",
        f"analysisWhich facts are there? Maybe this?assistantfinal{LINES}",
        f"Reasoning: which facts are there?\n\nFinal Answer:\n{LINES}",
        f"### Thoughts\nWhat to ask?\nMaybe this?\n\n### Questions\n{LINES}",
        f"What to ask?\n\n**Final questions:**\n1. {ONE}\n2. {TWO}",
        f"**Question**\n{ONE}\n**Answer**\n2.4 billion.\n**Question**\n{TWO}",
        f"{LINES}<｜end▁of▁sentence｜>",
        f"<｜Assistant｜>{LINES}",
    ],
)
def test_both_questions_are_found(reply):
    assert parse_reply(reply, 2) == [ONE, TWO]


@pytest.mark.parametrize(
    "reply",
    [
        ONE,
        f"{ONE}\n1. {ONE.lower()}",
        f"Here they are:\n{ONE}\n---",
        f"{ONE}\nThe company earned more in 2021.",
        f"1. {ONE}\n2. \ud83d what is it?",  # half of an emoji cannot be stored
        f"{ONE}\n{'What of it, ' * 100}?",
        json.dumps({"questions": [ONE]}),
        json.dumps({"questions": [ONE, ONE, "?"]}),
        json.dumps({"questions": [ONE, 3]}),
        json.dumps([{"question": ONE}]),
        JSON[:-10],
        f"```json\n{JSON[:-10]}",
    ],
)
def test_one_good_question_of_two_is_kept(reply):
    assert parse_reply(reply, 2) == [ONE]


@pytest.mark.parametrize(
    ("line", "num_questions", "questions"),
    [
        ("What is A? What is B? How is C made?", 3, ["What is A?", "What is B?", "How is C made?"]),
        ("What is A? What is B?", 1, ["What is A? What is B?"]),
        ("What is A? What is B?\nWhat is C?", 2, ["What is A? What is B?", "What is C?"]),  # two lines, as asked for
        ("What is A? What is B?\nWhat is C?", 3, ["What is A?", "What is B?", "What is C?"]),
        ("What is A? What is A?", 2, ["What is A?"]),
        ("What is A and its use? What is B?", 2, ["What is A and its use?", "What is B?"]),
        *((f"What is A? {more}", 2, [f"What is A? {more}"]) for more in ("How is it made?", "Why?", "And what is B?")),
        ("Really? What is A made of?", 2, ["Really? What is A made of?"]),
        ('What does "Who? What?" mean?', 2, ['What does "Who? What?" mean?']),
    ],
)
def test_questions_on_one_line_are_told_apart_if_asked_for(line, num_questions, questions):
    assert parse_reply(line, num_questions) == questions


@pytest.mark.parametrize(
    "reply",
    [
        *("", " \n\n", "[]", "{", "{}", "---", "I cannot help with that.", "uber revenue 2021\nlyft drivers' pay"),
        f"<think>\n{LINES}",
        f"{LINES}\n</think>",
        f"&lt;think&gt;\n{LINES}",
        '{"questions": 3}',
        '{"questions": ["What did Lyft earn in',
        '{\n "questions": [\n  "What did Lyft earn in',
        json.dumps({"questions": ["\ud83d what is it?"]}),
    ],
)
def test_a_reply_without_questions_is_an_error(reply):
    with pytest.raises(ValueError, match=naming("no", "question", "reply")):
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
        ("What does <div> do?", "What does <div> do?"),
        ("What do <b> and </b> do?", "What do <b> and </b> do?"),
        ("Explain the tag <div>", "Explain the tag <div>"),
        ("Is 1 < 2 and 3 > 2?", "Is 1 < 2 and 3 > 2?"),
        ("<5% of what?", "<5% of what?"),
        ("*Lyft* or *Uber*", "*Lyft* or *Uber*"),
        ("$ 5 million of what?", "$ 5 million of what?"),
        ("§ 10 of what?", "§ 10 of what?"),
        ("VIX: what is it?", "VIX: what is it?"),
        ("What is Lyftâ\x80\x99s name?", "What is Lyftâ\x80\x99s name?"),  # misread UTF-8, which may be mended later
        ("f(x) of what?", "f(x) of what?"),
        ("Q one: What is it?", "What is it?"),
        ("|", ""),
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


def test_what_json_lists_as_questions_need_not_ask():
    terms = ["uber revenue 2021", "lyft drivers' pay"]
    assert parse_reply(json.dumps({"questions": terms}), 2) == terms


@pytest.mark.parametrize(
    "question",
    [
        "What is the <plan> tag?",
        "What does <ReasonCode> hold?",
        "Which tag, <rationale> or <reasoning>, do replies use?",
        "What does the </think> token mark?",
        "What comes before `</think>`, and what before `<think>`?",
    ],
)
def test_a_tag_in_a_sentence_is_no_reasoning(question):
    assert parse_reply(f"1. {question}\n2. {ONE}", 2) == [question, ONE]
    assert parse_reply(f"<think>Hm?</think>{question}\n{ONE}\n<think>Is that all?", 2) == [question, ONE]
    assert parse_reply(f"{question} <think>Is that all?", 2) == [question]


def test_json_in_a_question_is_no_reply_in_json():
    question = 'What does {"retries": 3} set in the configuration file?'
    assert parse_reply(f"1. {question}", 2) == [question]
    tag = json.dumps({"questions": ["What does </think> close?", "What does <think> open?"]})
    assert parse_reply(tag, 2) == json.loads(tag)["questions"]


def test_a_long_reply_is_read_as_far_as_it_takes(monkeypatch):
    """400,000 lines, 4 s when each was taken apart twice: no further than to the second question, equal lines once."""
    calls = []
    monkeypatch.setattr(prompts, "strip_numbering", lambda line: calls.append(line) or strip_numbering(line))
    assert parse_reply("".join(f"- What is {i}?\n" for i in range(400_000)), 2) == ["What is 0?", "What is 1?"]
    assert parse_reply("- What is it?\n" * 400_000, 2) == ["What is it?"]
    assert len(calls) < 10


@pytest.mark.slow
@pytest.mark.parametrize(
    "piece",
    [
        "1. ",
        "- ",
        "**",
        '""',
        "<think>",
        "</think>",
        "[{",
        "[",
        '{"a":',
        '["',
        "```",
        "# ",
        "a: ",
        " ",
        "\n",
        "'a",
        "</",
        "<|",
        "&lt;a",
        "&amp;",
        "What is A? ",
    ],
)
def test_time_is_linear_in_the_reply(piece):
    """400 KB of anything takes a second or so; quadratic code takes minutes."""
    reply = piece * (400_000 // len(piece))
    for text in (reply, f"{reply}\nWhat?\nHow is it?", f"What?\n{reply}"):
        start = time.process_time()
        with contextlib.suppress(ValueError):
            parse_reply(text, 2)
        assert time.process_time() - start < 5
