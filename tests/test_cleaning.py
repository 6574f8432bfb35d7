"""cleaning.py: each rule on hand-judged sentences, merging by hand, and the round trip against sorting."""

import json
import random
import time

import numpy as np
import pytest
from naming import naming

from embedft import RetrievalDataset
from embedft.corpus.cleaning import (
    PROMPT,
    SOURCE,
    clean,
    copies,
    drop_held_out,
    question_key,
    report,
    round_trip,
    tidy,
)
from embedft.corpus.prompts import asks

# Tidying.


@pytest.mark.parametrize(
    ("text", "tidied"),
    [
        ("Who may vote?", "Who may vote?"),
        ("1. Who may vote?", "Who may vote?"),
        ("Q2: Who may vote?", "Who may vote?"),
        ("- Who may vote?", "Who may vote?"),
        ('"Who may vote?"', "Who may vote?"),
        ('2) "Who may vote?"', "Who may vote?"),
        ("Who may\n  vote?", "Who may vote?"),
        ("Here are two questions: Who may vote?", "Who may vote?"),
        ("Sure! Here is a question about the meeting:\n1. Who may vote?", "Who may vote?"),
        ("Here are two questions:", "Here are two questions:"),  # nothing would be left
        ('"Cause" or "Good Reason"?', '"Cause" or "Good Reason"?'),
        ("2021: what happened to revenue?", "2021: what happened to revenue?"),
        ("1.5 million shares were sold to whom?", "1.5 million shares were sold to whom?"),
        ("Here are the drivers: who pays them?", "Here are the drivers: who pays them?"),
        ("1.", ""),
    ],
)
def test_tidy(text, tidied):
    assert tidy(text) == tidied
    assert tidy(tidied) == tidied


# Asking.


@pytest.mark.parametrize(
    "text",
    [
        "Who may vote?",
        "The revenue of 2021 was how large?",
        "谁可以投票？",
        "Explain how Adjusted EBITDA is calculated.",
        "Please describe the lease.",
        "In the context of revenue recognition, explain the difference between principal and agent.",
        "In Section 2.17, Uber and Lyft are named. Compare them.",
        "As of December 31, 2021, calculate the total lease liabilities.",
        "Under Section 2.17 of the lease, list the duties of the tenant.",
        "According to the plan, what is the limit",
        "Uber acts as an agent. Discuss the indicators.",
        "Define the term.",
        "List three risks.",
        "Provide examples of risks.",
        "Name the auditor.",
        "what is the purpose of form 10-K",
        "how long is the lease",
        "In which state was it founded",
        "When was it founded",
        "Is the auditor independent",
        "Shall the fee be paid",
        'He said "stop." Why',
    ],
)
def test_what_asks(text):
    assert asks(text)


@pytest.mark.parametrize(
    "text",
    [
        "Here are two questions:",
        "Sure! I will write questions about the lease.",
        "The lease ends in 2031.",
        "In 2020, we define revenue more narrowly than before.",
        "In 2021, revenue rose, which was expected.",
        "When the company was founded, it had three employees.",
        "Do not hesitate to ask for more.",
        "List of subsidiaries.",
        "Name and address of the registrant.",
        "State law applies.",
        "Show cause orders were issued.",
        "How revenue is recognized:",
        "They explain nothing.",
        "N/A",
        "???",
        "12 345?",
        "",
    ],
)
def test_what_asks_nothing(text):
    assert not asks(text)


# The prompt.


def first(pattern, text: str) -> str | None:
    found = pattern.search(text)
    return found and found[0]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (
            "How does the context information provided relate to the role of a teacher or professor?",
            "teacher or professor",
        ),
        ("As a teacher, how would you define liquidity?", "As a teacher"),
        ("Explain to your students what a lease is.", "your students"),
        ("What would you ask in a quiz on leases?", "quiz"),
        ("Why are diverse questions of use?", "diverse questions"),
        ("Which exam questions follow from this?", "exam questions"),
        ("Why are there questions in an examination?", "questions in an exam"),
        ("Would you like me to write more questions?", "Would you like me to write more questions"),
        ("As an auditor, which tasks did the firm undertake?", None),
        ("What do teachers earn?", None),
        ("Which discounts do students get?", None),
        ("Which regulatory examinations are pending?", None),
        ("Who answers questions of shareholders?", None),
    ],
)
def test_shows_prompt(text, shown):
    assert first(PROMPT, text) == shown


# The source. Reports show the detail that is returned, so it is compared too.


@pytest.mark.parametrize(
    ("text", "phrase"),
    [
        ("According to the context information, who administers the plan?", "the context information"),
        (
            "Why? Provide specific examples from the context information to support your answer.",
            "the context information",
        ),
        ("What is the role of the agent in the given context?", "the given context"),
        ("What debt is mentioned in the context?", "the context"),
        ("What is the definition of debt in the context provided?", "the context"),
        ("In the context of the document, what are the covenants?", "the context"),
        ("In the context of this document, what is a lender?", "the context"),
        ("In the context of the given document, what is a lender?", "the context"),
        ("Give an example from the provided context.", "the provided context"),
        ("According to the document, what is the dividend policy?", "the document"),
        ("What rates does the document name for the loans?", "the document"),
        ("How is executive pay described in this document?", "this document"),
        ("What is stated in Section 4.02 of the document?", "the document"),
        ("What does the passage above say on leases?", "the passage"),
        ("Which risks does the text name?", "the text"),
        ("Who is the hero of this article?", "this article"),
        ("What is the main point of the paragraph?", "the paragraph"),
        ("Which rate is in the following table?", "the following table"),
        ("Provide examples from the given information.", "the given information"),
        ("Based on the information provided, what is the market value?", "information provided"),
        ("Use the information provided in the context to answer why.", "information provided"),
        ("Give a calculation based on the data provided in the document.", "data provided"),
        ("In the context of the financial statements provided, what is accrued?", "statements provided"),
        (
            "Based on the provided consolidated statements of loss, what was lost?",
            "the provided consolidated statements",
        ),
        (
            "From the provided audited annual group statements, what was lost?",
            "the provided audited annual group statements",
        ),
        ("Based on the given schedule of awards, how many shares were granted?", "the given schedule"),
        ("Who counts under the given definition?", "the given definition"),
        ("Which costs are shown in the table?", "in the table"),
        ("According to the table of contents, where is Item 7?", "According to the table"),
        ("Based on the table above, what is the total?", "on the table"),
        ("Which figures above are audited?", "figures above"),
        ("As mentioned above, what are the risks?", "As mentioned above"),
        ("Which of the above-named risks are insured?", "the above"),
        ("What follows from the above excerpt?", "the above excerpt"),
        ("In the competitive environment described, who competes?", "described"),
        ("Explain the process and any alternative methods mentioned.", "mentioned"),
        ("Which banks are mentioned?", "mentioned"),
        ("According to the author, why did it fail?", "According to the author"),
        ("What is the author's view of the merger?", "the author"),
        ("How does this differ from the previous question?", "the previous question"),
        ("According to the excerpt, who pays?", "the excerpt"),
    ],
)
def test_what_points_at_its_source(text, phrase):
    assert first(SOURCE, text) == phrase
    assert first(SOURCE, text.upper()) == phrase.upper()


@pytest.mark.parametrize(
    "text",
    [
        "In the context of revenue recognition, what is a principal?",
        "What is a deferred payment in the context of the Plan?",
        "In the context of a lease, who pays?",
        "What was the context in which the law was passed?",
        "What was the context for the ruling?",
        "Why is the Mine Safety section not applicable in this context?",
        "Which context did the founders work in?",
        "What does the law say on text messages?",
        "When may the text messages be sent?",
        "What does the text of the amendment require?",
        "When did the passage of the law change prices?",
        "What are the benefits provided to drivers?",
        "What information is provided to investors in a prospectus?",
        "Who verifies the information provided in Exhibit 31.1(b)?",
        "How does it protect information provided by customers?",
        "What were the factors, based on the information provided in the statements of cash flows?",
        "What documents are required of a lender?",
        "Which of the documents are required?",
        "What is the document retention policy of the firm?",
        "What is the Plan document for?",
        "How does the firm use document management systems?",
        "Under Section 409A, when is a payment due?",
        "What happens under paragraph (d) of the agreement?",
        "What follows from the paragraph (d) on indemnity?",
        "What does the Article 5 demand?",
        "According to the agreement, who may assign it?",
        "What is the start date mentioned in the offer letter?",
        "Which banks are mentioned in Section 2.16?",
        "What is the situation described in Section 2.08(c)(ii)?",
        "What can be described as a change of control?",
        "How can risk be described?",
        "Which patents were mentioned by the court?",
        "What did the chairman bring to the table?",
        "Which limits stand in the table of Schedule 2?",
        "How are tables set for dinner?",
        "What does the certification statement provided by the CEO say?",
        "What are the given names of the founders?",
        "Who is the author of the patent?",
        "What is a contextual advertisement?",
        "How is a textbook sold?",
        "Which floors are above the lobby?",
        "How do they compare with the preceding annual financial statements?",
        "What did the article-based newsletter cost?",
    ],
)
def test_what_does_not_point_at_its_source(text):
    assert first(SOURCE, text) is None


# Copies.

LEASE = (
    "Overview. The revolving credit facility matures on November 3, 2024, and the depot is let until 2031. "
    "The Lyft, Inc. Executive Change in Control and Severance Plan pays benefits."
)


@pytest.mark.parametrize(
    ("question", "copied"),
    [
        ("The revolving credit facility matures on November 3, 2024?", True),
        ("the REVOLVING credit-facility matures on november 3?", True),
        # 8 of 10 words in one run.
        ("So the depot is let until 2031. The Lyft Inc?", True),
        # 9 of 10 words, 6 of 7 plain ones; then 8 of 10, but 6 of 8.
        ("The revolving credit facility matures on November 3, 2024, really?", True),
        ("Why the revolving credit facility matures on November 3, really?", False),
        ("Why is it that the revolving credit facility matures on November 3?", False),
        # The words are there, but not in one run.
        ("The depot matures until November and the facility is let on 2031?", False),
        # 11 of 13 words, most of them a name.
        ("What is the Lyft, Inc. Executive Change in Control and Severance Plan?", False),
        # Too short to tell: four plain words.
        ("The depot is let?", False),
        # The end of a word is not a word.
        ("Evolving credit facility matures on?", False),
        ("When does the revolving credit facility end?", False),
        ("", False),
    ],
)
def test_copies(question, copied):
    assert copies(question, LEASE) is copied


def naive_copies(question: list[str], document: list[str]) -> bool:
    """All runs of the question, words without capitals or digits being plain."""
    num_plain = sum(word.islower() for word in question)
    for first in range(len(question)):
        for last in range(first + 1, len(question) + 1):
            run = question[first:last]
            plain = sum(word.islower() for word in run)
            lowered = [word.lower() for word in run]
            places = range(len(document) - len(run) + 1)
            if any(document[i : i + len(run)] == lowered for i in places):
                long_enough = 10 * len(run) >= 8 * len(question) and 10 * plain >= 8 * num_plain
                if long_enough and plain >= 5:
                    return True
    return False


def test_copies_against_all_runs():
    generator = random.Random(0)
    found = 0
    for _ in range(3000):
        document = generator.choices("abcd", k=30)
        start = generator.randrange(15)
        question = document[start : start + generator.randint(4, 12)]
        for _ in range(generator.randint(0, 3)):
            question[generator.randrange(len(question))] = generator.choice("abcdxy")
        question = ["x", *(word.upper() if generator.random() < 0.2 else word for word in question)]
        expected = naive_copies(question, document)
        assert copies(" ".join(question), " ".join(document)) is expected, (question, document)
        found += expected
    assert 300 < found < 2700


# Equal questions.


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("What is the limit?", "what is  limit"),
        ("A lender is who?", "Lender is who?"),
        ("What is “Cause”?", 'What is "cause"?'),
        ("What is the company’s policy?", "What is the company's policy?"),
        ("Is it a long-term lease?", "Is it a long term lease?"),
        ("Ｗhat is the ﬁne?", "What is the fine?"),
        ("What of revenue, costs and fees?", "What of revenue, costs, and fees?"),
    ],
)
def test_equal_questions(one, other):
    assert question_key(one) == question_key(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("What was revenue in 2020?", "What was revenue in 2021?"),
        ("Is it deductible?", "Is it not deductible?"),
        ("What is Class A stock?", "What is Class stock?"),
        ("What is Class A stock?", "What is Class B stock?"),
        ("Is 2.5 the limit?", "Is 25 the limit?"),
        ("Is it level 1.2?", "Is it level 1 2?"),
        ("Is it 5%?", "Is it 5?"),
        ("Is it $5?", "Is it €5?"),
        ("Did it change by -5 points?", "Did it change by 5 points?"),
        ("Is C# used?", "Is C used?"),
        ("Is C++ used?", "Is C used?"),
        ("Does Lyft own Uber?", "Does Uber own Lyft?"),
        ("क्या यह कि है?", "क्या यह की है?"),  # vowel signs are no punctuation
    ],
)
def test_different_questions(one, other):
    assert question_key(one) != question_key(other)


# The whole.


def dataset_of(queries: dict[str, str], **more) -> RetrievalDataset:
    corpus = {"d1": LEASE, "d2": "The treasurer signs all checks of the company.", "d3": "Nobody asks for this one."}
    qrels = {query_id: {"d1": 1} for query_id in queries}
    return RetrievalDataset(queries, corpus, **{"qrels": qrels, **more})


def test_clean_drops_by_the_first_reason_and_reports():
    queries = {
        "preamble": "Here are two questions:",
        "good": "1. When does the facility mature?",
        "prompt": "As a teacher, what is the purpose of the document?",
        "source": "2. According to the document, who signs?",
        "copy": "The revolving credit facility matures on November 3, 2024?",
        "again": "When does facility mature",
        "also": "Until when is the depot let?",
    }
    dataset = dataset_of(queries, titles={"d2": "Checks"})
    cleaned, dropped = clean(dataset)
    assert list(dropped.items()) == [
        ("preamble", ("asks nothing", "")),
        ("prompt", ("shows the prompt", "As a teacher")),
        ("source", ("points at its source", "the document")),
        ("copy", ("copies its document", "d1")),
        ("again", ("repeats another query", "good")),
    ]
    kept = {"good": "When does the facility mature?", "also": queries["also"]}
    assert cleaned == RetrievalDataset(
        kept, dataset.corpus, {query_id: {"d1": 1} for query_id in kept}, titles=dataset.titles
    )
    assert list(cleaned.queries) == ["good", "also"]
    assert dataset.queries == queries
    assert len(dataset.qrels) == 7
    found = json.loads(json.dumps(report(dataset, cleaned, dropped)))
    assert (found["num_queries"], found["num_kept"]) == (7, 2)
    assert found["dropped"]["shows the prompt"] == {
        "count": 1,
        "examples": [{"id": "prompt", "text": queries["prompt"], "detail": "As a teacher"}],
    }
    assert found["changed"] == {
        "count": 1,
        "examples": [{"id": "good", "before": queries["good"], "after": kept["good"]}],
    }
    assert clean(cleaned) == (cleaned, {})


def test_the_report_counts_all_and_shows_five():
    queries = {f"s{i}": f"Statement {i}." for i in range(7)} | {f"p{i}": f"Is this quiz {i}?" for i in range(8)}
    dataset = dataset_of({**queries, **{f"q{i}": f"- Who is number {i}?" for i in range(6)}})
    found = report(dataset, *clean(dataset))
    assert counts(found) == {"shows the prompt": 8, "asks nothing": 7}
    assert list(found["dropped"]) == ["shows the prompt", "asks nothing"]
    assert [example["id"] for example in found["dropped"]["asks nothing"]["examples"]] == [f"s{i}" for i in range(5)]
    assert (found["changed"]["count"], len(found["changed"]["examples"])) == (6, 5)


def counts(found: dict) -> dict[str, int]:
    return {reason: kind["count"] for reason, kind in found["dropped"].items()}


def test_a_copy_is_one_of_a_relevant_document():
    text = "The treasurer signs all checks of the company?"
    assert clean(dataset_of({"q": text}))[1] == {}  # d1 is relevant, d2 copied
    other = {"q": "Who signs?", "copy": text}
    dropped = clean(dataset_of(other, qrels={"q": {"d1": 1}, "copy": {"d1": 1, "d2": 1}}))[1]
    assert dropped == {"copy": ("copies its document", "d2")}
    assert clean(dataset_of(other, qrels={"copy": {"d2": 0}}))[1] == {}
    # The title is part of what is searched.
    titled = dataset_of(
        {"q": "Overview of the whole matter of fees?", "r": "Who?"},
        titles={"d1": "Overview of the whole matter of fees"},
    )
    assert list(clean(titled)[1]) == ["q"]


def test_equal_questions_become_one_with_all_their_documents():
    queries = {"q1": "Who signs?", "q2": "Who pays?", "q3": "who signs", "q4": '"Who signs?"', "q5": "Who owns it?"}
    cleaned, dropped = clean(
        dataset_of(
            queries,
            qrels={"q1": {"d1": 3, "d2": 0}, "q3": {"d2": 2}, "q4": {"d1": 1}, "q5": {}},
            negatives={"q1": ["d2", "d3"], "q2": ["d1"], "q4": ["d3"]},
            scores={"q1": {"d1": 0.5}, "q3": {"d1": 0.1, "d2": 0.25}},
        )
    )
    assert cleaned.queries == {"q1": "Who signs?", "q2": "Who pays?", "q5": "Who owns it?"}
    assert cleaned.qrels == {"q1": {"d1": 3, "d2": 2}, "q5": {}}
    assert cleaned.negatives == {"q1": ["d3"], "q2": ["d1"]}
    assert cleaned.scores == {"q1": {"d1": 0.5, "d2": 0.25}}
    assert dropped == dict.fromkeys(["q3", "q4"], ("repeats another query", "q1"))
    # Twice in one chunk: simply one. Negatives that only the other brought come along.
    once, _ = clean(dataset_of({"q1": "Who signs?", "q2": "Who signs?"}, negatives={"q2": ["d3"]}))
    assert (once.queries, once.qrels, once.negatives) == ({"q1": "Who signs?"}, {"q1": {"d1": 1}}, {"q1": ["d3"]})


def test_judgments_of_documents_that_the_corpus_lacks_stay_with_their_queries():
    queries = {"q1": "Who signs?", "q2": "A statement.", "q3": "Who pays?"}
    dataset = dataset_of(queries, missing={"q2": {"gone": 1}, "q3": {"gone": 2}})
    assert clean(dataset)[0].missing == drop_held_out(dataset, dataset_of({"v": queries["q2"]}))[0].missing
    assert clean(dataset)[0].missing == {"q3": {"gone": 2}}


def test_nothing_left_is_an_error():
    queries = {"a": "A statement.", "b": "Another.", "c": "What does the text say?"}
    reasons = ("2 asks nothing", "1 points at its source")  # as a report has them
    with pytest.raises(ValueError, match=naming(3, "queries", *reasons)):
        clean(dataset_of(queries))


def test_many_questions_are_cleaned_in_seconds():
    corpus = {f"d{i}": f"Part {i}. {LEASE}" for i in range(2_000)}
    queries = {f"q{i}": f"What happens to part {i // 2} of the lease when it ends?" for i in range(4_000)}
    dataset = RetrievalDataset(queries, corpus, {f"q{i}": {f"d{i // 2}": 1} for i in range(4_000)})
    start = time.process_time()
    cleaned, _ = clean(dataset)
    assert len(cleaned.queries) == 2_000
    assert time.process_time() - start < 5  # 0.4 s; all pairs would be eight million


# The published files, read by hand.


def test_lyft_and_uber(shared_data):
    lyft = RetrievalDataset.load(shared_data / "lyft_uber" / "train_dataset.json")
    uber = RetrievalDataset.load(shared_data / "lyft_uber" / "val_dataset.json")
    assert all(asks(text) for dataset in (lyft, uber) for text in dataset.queries.values())
    cleaned, dropped = clean(lyft)
    assert counts(report(lyft, cleaned, dropped)) == {
        "points at its source": 94,
        "repeats another query": 9,
        "shows the prompt": 6,
        "copies its document": 1,
    }
    assert len(cleaned.corpus) == 334
    assert sum(len(grades) == 2 for grades in cleaned.qrels.values()) == 9
    roles = [lyft.queries[query_id] for query_id, (reason, _) in dropped.items() if reason == "shows the prompt"]
    assert roles.count("How does the context information provided relate to the role of a teacher or professor?") == 2
    assert counts(report(uber, *clean(uber))) == {"points at its source": 170}


# The round trip.


def encoder(vectors: dict[str, list[float]]):
    def encode(texts: list[str], *, role: str) -> np.ndarray:
        calls.append((role, list(texts)))
        return np.array([vectors[text] for text in texts])

    calls: list[tuple[str, list[str]]] = []
    encode.calls = calls
    return encode


def plane(degrees: float, length: float = 1.0) -> list[float]:
    return [length * np.cos(np.radians(degrees)), length * np.sin(np.radians(degrees))]


OUT_OF_REACH, NOTHING_RELEVANT = "document is not in the top k", "has no relevant document"
# Degrees are the ranking: a query's documents by the angle between them.
ANGLES = {
    "east": plane(0, 9.0),
    "north": plane(90, 0.1),
    "west": plane(180),
    "near east": plane(10),
    "near north": plane(80),
    "by west": plane(150),
    "nowhere": [0.0, 0.0],
}


def compass(qrels: dict, queries=("near east", "near north", "by west"), **more) -> RetrievalDataset:
    corpus = {"e": "east", "n": "north", "w": "west"}
    return RetrievalDataset({text: text for text in queries}, {**corpus, **more}, qrels)


def test_round_trip_keeps_what_is_found():
    # near east: e n w; near north: n e w; by west: w n e.
    dataset = compass({"near east": {"e": 1}, "near north": {"e": 1}, "by west": {"e": 2}})
    encode = encoder(ANGLES)
    cleaned, dropped = round_trip(dataset, encode=encode, k=2)
    assert encode.calls == [("document", ["east", "north", "west"]), ("query", ["near east", "near north", "by west"])]
    assert list(cleaned.queries) == ["near east", "near north"]
    assert dropped == {"by west": (OUT_OF_REACH, "rank 3")}
    assert cleaned.corpus == dataset.corpus
    assert cleaned.qrels == {"near east": {"e": 1}, "near north": {"e": 1}}
    _, dropped = round_trip(dataset, encode=encode, k=1)
    assert list(dropped.items()) == [("near north", (OUT_OF_REACH, "rank 2")), ("by west", (OUT_OF_REACH, "rank 3"))]
    assert round_trip(dataset, encode=encode, k=50) == (dataset, {})


def test_round_trip_takes_the_best_relevant_document_and_ignores_grade_0():
    dataset = compass({"near east": {"w": 1, "e": 1}, "near north": {"n": 0, "w": 1}, "by west": {"w": 0}})
    cleaned, dropped = round_trip(dataset, encode=encoder(ANGLES), k=1)
    assert dropped == {"near north": (OUT_OF_REACH, "rank 3"), "by west": (NOTHING_RELEVANT, "")}
    assert cleaned.qrels == {"near east": {"w": 1, "e": 1}}


def test_round_trip_counts_equal_documents_and_lets_ties_pass():
    # Two more copies of north stand before east, and a tie with one's own copy does no harm.
    dataset = compass({"near north": {"e": 1}, "near east": {"e2": 1}}, n2="north", n3="north", e2="east")
    encode = encoder(ANGLES)
    assert round_trip(dataset, encode=encode, k=1)[1]["near north"] == (OUT_OF_REACH, "rank 4")
    assert encode.calls[0] == ("document", ["east", "north", "west"])
    # A vector of zeros is as far from all: all tie.
    lost = compass({"nowhere": {"w": 1}}, queries=["nowhere"])
    assert round_trip(lost, encode=encode, k=1)[1] == {}
    # So is a document of zeros: behind east and north, before west.
    dataset = compass({"near east": {"o": 1}, "near north": {"n": 1}}, o="nowhere")
    assert round_trip(dataset, encode=encode, k=1)[1]["near east"] == (OUT_OF_REACH, "rank 3")


def test_round_trip_with_titles_negatives_and_scores():
    dataset = RetrievalDataset(
        {"q": "near east", "r": "by west"},
        {"d": "east", "o": "west"},
        {"q": {"d": 1}, "r": {"d": 1}},
        negatives={"q": ["o"], "r": ["o"]},
        scores={"q": {"o": 0.5}, "r": {"d": 1.0}},
        titles={"d": "far"},
    )
    cleaned, _ = round_trip(dataset, encode=encoder({**ANGLES, "far east": plane(5)}), k=1)
    assert cleaned == RetrievalDataset(
        {"q": "near east"}, dataset.corpus, {"q": {"d": 1}}, {"q": ["o"]}, {"q": {"o": 0.5}}, dataset.titles
    )


@pytest.mark.parametrize("block", [1, 7, 40, 1024])
def test_round_trip_against_sorting(block):
    generator = np.random.default_rng(0)
    vectors = {f"{kind}{i}": generator.normal(size=5) for kind, n in (("q", 40), ("d", 30)) for i in range(n)}
    qrels = {f"q{i}": {f"d{j}": 1 for j in generator.choice(30, size=1 + i % 3, replace=False)} for i in range(40)}
    dataset = RetrievalDataset({f"q{i}": f"q{i}" for i in range(40)}, {f"d{i}": f"d{i}" for i in range(30)}, qrels)
    expected = []
    for query_id, relevant in qrels.items():
        query = vectors[query_id]
        cosines = {d: query @ vectors[d] / np.linalg.norm(query) / np.linalg.norm(vectors[d]) for d in dataset.corpus}
        ranking = sorted(cosines, key=cosines.get, reverse=True)
        if set(ranking[:6]) & relevant.keys():
            expected.append(query_id)
    assert 5 < len(expected) < 35
    assert list(round_trip(dataset, encode=encoder(vectors), k=6, block=block)[0].queries) == expected


def test_round_trip_errors():
    dataset = compass({"near east": {"w": 1}, "near north": {"w": 1}})
    with pytest.raises(ValueError, match=naming("k", 0, "block", 1024, 1)):
        round_trip(dataset, encode=encoder(ANGLES), k=0)
    with pytest.raises(ValueError, match=naming("k", 1, "block", 0, 1)):
        round_trip(dataset, encode=encoder(ANGLES), k=1, block=0)
    with pytest.raises(ValueError, match=naming(3, "queries", f"2 {OUT_OF_REACH}", f"1 {NOTHING_RELEVANT}")):
        round_trip(dataset, encode=encoder(ANGLES), k=1)
    with pytest.raises(ValueError, match=naming(3, "queries", f"3 {NOTHING_RELEVANT}")):
        round_trip(compass({}), encode=encoder(ANGLES), k=1)
    with pytest.raises(ValueError, match=naming("encode", "finite")):
        round_trip(dataset, encode=lambda texts, role: np.full((len(texts), 2), np.nan), k=1)
