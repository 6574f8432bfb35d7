"""openai_api.py: vectors over HTTP from a real server on loopback; what goes wrong is one line without the key."""

from types import SimpleNamespace

import numpy as np
import pytest
from api_server import ApiServer, unit_vector

from embedft import RetrievalDataset, evaluate
from embedft.encoders import openai_api
from embedft.encoders.openai_api import ApiEmbedder

KEY = "sk-secret-0123456789"


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)


def test_vectors_come_in_the_order_of_the_texts(monkeypatch):
    monkeypatch.setattr(openai_api, "BATCH_TEXTS", 3)
    texts = [f"text {i}" for i in range(8)]
    with ApiServer(dimensions=16) as server:
        embedder = ApiEmbedder("text-embedding-3-small", base_url=server.base_url)
        found_ND = embedder.encode(texts, role="query")
        sizes = [len(body["input"]) for kind, _, body in server.log if kind == "embeddings"]
    assert sizes == [3, 3, 2]
    assert found_ND.dtype == np.float32
    np.testing.assert_allclose(found_ND, [unit_vector(text, 16) for text in texts], atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(found_ND, axis=1), 1.0, atol=1e-6)


def test_batches_hold_so_many_bytes(monkeypatch):
    monkeypatch.setattr(openai_api, "BATCH_BYTES", 10)
    batches = list(openai_api._batches(["aaaa", "äää", "b", "c" * 30, "d"]))
    assert batches == [["aaaa", "äää"], ["b"], ["c" * 30], ["d"]]  # 4 + 6 bytes; one that is too long goes alone


def test_dim_is_asked_of_the_server_and_prompts_go_in_front():
    with ApiServer(dimensions=16) as server:
        embedder = ApiEmbedder("m", base_url=server.base_url, prompts={"query": "query: "})
        assert embedder.encode(["a"], role="query", dim=4).shape == (1, 4)
        assert embedder.encode(["a"], role="document").shape == (1, 16)
        bodies = [body for kind, _, body in server.log if kind == "embeddings"]
    assert [(body["input"], body.get("dimensions")) for body in bodies] == [(["query: a"], 4), (["a"], None)]


def test_it_can_be_evaluated():
    corpus = {f"d{i}": f"text {i}" for i in range(6)}
    queries = {f"q{i}": f"text {i}" for i in range(6)}  # the same text has the same vector
    dataset = RetrievalDataset(queries, corpus, {f"q{i}": {f"d{i}": 1} for i in range(6)})
    with ApiServer() as server:
        report = evaluate(ApiEmbedder("m", base_url=server.base_url), dataset)
    assert report.metrics["accuracy@1"] == 1.0


def test_faults_on_the_way_are_tried_again():
    with ApiServer(faults=["429-ms", "500", None]) as server:
        assert ApiEmbedder("m", base_url=server.base_url).encode(["a"]).shape == (1, 16)
        assert server.counts["embeddings"] == 3


def test_what_the_server_says_is_one_line_without_the_key():
    with ApiServer(faults=["401"]) as server, pytest.raises(ValueError, match=r"/v1, m: Error code: 401") as caught:
        ApiEmbedder("m", base_url=server.base_url).encode(["a"])
    assert KEY not in str(caught.value)
    assert "[OPENAI_API_KEY]" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_key_is_asked_for_by_openai_alone(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(ValueError, match="OPENAI_API_KEY is not set"):
        ApiEmbedder("m")
    with ApiServer() as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.base_url)
        assert ApiEmbedder("m").encode(["a"]).shape == (1, 16)


@pytest.mark.parametrize(("texts", "message"), [(["a", ""], r"texts\[1\] is empty"), ([], "no texts")])
def test_texts_that_cannot_be_sent(texts, message):
    with ApiServer() as server, pytest.raises(ValueError, match=message):
        ApiEmbedder("m", base_url=server.base_url).encode(texts)


@pytest.mark.parametrize(
    ("answer", "dim", "message"),
    [
        ([(0, [1.0, 0.0]), (0, [1.0, 0.0])], None, "no 2 vectors came back for as many texts"),
        ([(0, [1.0, 0.0])], None, "no 2 vectors"),
        (None, None, "no 2 vectors"),
        ([(0, [1.0, 0.0]), (1, [1.0, 0.0])], 5, "gives 2 dimensions, asked for 5"),
        ([(0, [1.0, 0.0]), (1, [1.0])], None, "different sizes"),
        ([(0, []), (1, [])], None, "or empty ones"),
        ([(0, [1.0, 0.0]), (1, [1.0, float("nan")])], None, "not finite"),
    ],
)
def test_answers_that_do_not_fit(monkeypatch, answer, dim, message):
    embedder = ApiEmbedder("m", base_url="http://127.0.0.1:1/v1")
    items = answer and [SimpleNamespace(index=index, embedding=vector) for index, vector in answer]
    monkeypatch.setattr(embedder._client.embeddings, "create", lambda **_: SimpleNamespace(data=items))
    with pytest.raises(ValueError, match=message):
        embedder.encode(["a", "b"], dim=dim)


def test_a_page_that_is_no_answer():
    with ApiServer(faults=["not-json"] * 10) as server, pytest.raises(ValueError, match="/v1, m: "):
        ApiEmbedder("m", base_url=server.base_url).encode(["a"])


def test_a_zero_vector_stays_zero(monkeypatch):
    embedder = ApiEmbedder("m", base_url="http://127.0.0.1:1/v1")
    answer = SimpleNamespace(data=[SimpleNamespace(index=0, embedding=[0.0, 0.0])])
    monkeypatch.setattr(embedder._client.embeddings, "create", lambda **_: answer)
    np.testing.assert_array_equal(embedder.encode(["a"]), [[0.0, 0.0]])
