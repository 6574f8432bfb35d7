"""openai_api.py, endpoint.py: vectors over HTTP from a real local server, each paid for once, whatever fails."""

import asyncio
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
import torch
from api_server import LENGTH_REFUSALS, ApiServer, input_of, mutated, unit_vector
from naming import names, naming

from embedft import RetrievalDataset, cli, evaluate, finetune, load_embedder
from embedft.api import endpoint as endpoints
from embedft.api import sending
from embedft.api.endpoint import shorten
from embedft.api.ledger import Ledger
from embedft.encoders.adapter import Adapter, Base
from embedft.encoders.maps import LinearMap
from embedft.encoders.openai_api import ApiEmbedder
from embedft.encoders.store import Store
from embedft.vectors import unit_rows

KEY = "sk-secret-0123456789"


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.setattr(sending, "BACKOFF_SECONDS", 0.01)


def some_texts(number: int) -> list[str]:
    return [f"text {i}" for i in range(number)]


def expected(texts, dimensions: int = 16, prompt: str = "") -> np.ndarray:
    return np.array([unit_vector(prompt + text, dimensions) for text in texts], dtype=np.float64)


def asked(server: ApiServer) -> list[list[str]]:
    """The texts of each request, in the order they came."""
    return [input_of(body) for _, _, body in server.log]


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def totals(ledger: Ledger) -> tuple:
    """Requests, tokens, requests without a report, cost, and the most that these may cost."""
    return ledger.num_requests, ledger.prompt_tokens, len(ledger.open), ledger.cost, ledger.open_cost


def api(server: ApiServer, **options) -> ApiEmbedder:
    return ApiEmbedder("m", base_url=server.base_url, **options)


# Order, batches, what is sent.


def test_vectors_come_in_the_order_of_the_texts():
    texts = some_texts(8)
    with ApiServer() as server:
        found_ND = api(server, batch_texts=3).encode(texts, role="query")
        assert sorted(len(batch) for batch in asked(server)) == [2, 3, 3]
    assert found_ND.dtype == np.float32
    np.testing.assert_allclose(found_ND, expected(texts), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(found_ND.astype(np.float64), axis=1), 1.0, atol=1e-7)


def test_requests_overlap_and_their_order_is_no_matter():
    """The first batch is answered last; each reply is in reverse. Twelve batches, five in flight."""
    texts = some_texts(36)
    faults = ["late", *["reversed"] * 11]
    with ApiServer(delay=0.03, late_seconds=0.3, faults=lambda *_: faults.pop(0)) as server:
        # Late for the server is no fault: the reply comes, after all the others.
        found_ND = api(server, batch_texts=3, concurrency=5).encode(texts)
        assert server.counts["max_concurrent"] == 5
        assert server.counts["embeddings"] == 12
    np.testing.assert_allclose(found_ND, expected(texts), atol=1e-6)


def test_one_at_a_time():
    with ApiServer(delay=0.01) as server:
        api(server, batch_texts=1, concurrency=1).encode(some_texts(4))
        assert server.counts["max_concurrent"] == 1
        assert asked(server) == [["text 0"], ["text 1"], ["text 2"], ["text 3"]]


def test_a_text_that_stands_twice_is_asked_for_once():
    texts = ["a", "b", "a", "c", "b", "a"]
    with ApiServer() as server:
        embedder = api(server)
        found_ND = embedder.encode(texts)
        assert asked(server) == [["a", "b", "c"]]
    np.testing.assert_allclose(found_ND, expected(texts), atol=1e-6)
    assert str(embedder.costs) == "3 texts computed, 0 from the store: 1 requests, 0 tokens"  # a quarter of one


def test_batches_hold_so_many_bytes():
    """4 + 6 bytes fit into ten; a text that is too long for any batch goes alone."""
    with ApiServer() as server:
        api(server, concurrency=1, batch_bytes=10).encode(["aaaa", "äää", "b", "c" * 30, "d"])
        assert asked(server) == [["aaaa", "äää"], ["b"], ["c" * 30], ["d"]]


def test_prompts_go_in_front():
    with ApiServer() as server:
        embedder = api(server, prompts={"query": "query: "})
        query_ND, document_ND = embedder.encode(["a"], role="query"), embedder.encode(["a"], role="document")
        assert asked(server) == [["query: a"], ["a"]]
    np.testing.assert_allclose(query_ND, expected(["a"], prompt="query: "), atol=1e-6)
    np.testing.assert_allclose(document_ND, expected(["a"]), atol=1e-6)


@pytest.mark.parametrize(
    ("base64", "formats"),
    [("given", ["base64"] * 2), ("ignored", ["base64"] * 2), ("refused", ["base64", *["float"] * 2])],
)
def test_base64_numbers_or_neither(base64, formats):
    """A server that refuses base64 is asked for numbers, from then on."""
    with ApiServer(base64=base64) as server:
        embedder = api(server)
        for texts in (["a", "b"], ["c"]):
            np.testing.assert_allclose(embedder.encode(texts), expected(texts), atol=1e-6)
        assert [body["encoding_format"] for _, _, body in server.log] == formats


def test_dimensions_are_asked_of_the_server():
    with ApiServer(dimensions=16) as server:
        embedder = api(server, dimensions=4)
        assert embedder.dim == 4
        np.testing.assert_allclose(embedder.encode(["a"]), expected(["a"], 4), atol=1e-6)
        assert api(server).encode(["a"]).shape == (1, 16)
        assert [body.get("dimensions") for _, _, body in server.log] == [4, None]


def test_dim_is_cut_here():
    """Keeps the leading four features, at unit length. The server is asked for all of them, once."""
    whole_ND = expected(["a", "b"])[:, :4]
    with ApiServer() as server:
        embedder = api(server)
        assert embedder.dim == 0  # nobody knows yet
        found_ND = embedder.encode(["a", "b"], dim=4)
        assert embedder.dim == 16
        assert "dimensions" not in server.log[0][2]
        np.testing.assert_array_equal(embedder.encode(["a"], dim=16), embedder.encode(["a"]))
        with pytest.raises(ValueError, match=naming("dim", 17, 1, 16)):
            embedder.encode(["a"], dim=17)
        num_asked = server.counts["embeddings"]
        with pytest.raises(ValueError, match=naming("dim", 0, 1)):
            api(server).encode(["a"], dim=0)
        assert server.counts["embeddings"] == num_asked
    np.testing.assert_allclose(found_ND, whole_ND / np.linalg.norm(whole_ND, axis=1, keepdims=True), atol=1e-6)


def test_a_dim_that_no_answer_has_stops_after_the_first(tmp_path):
    texts = some_texts(20)
    with ApiServer() as server:
        embedder = api(server, batch_texts=1, concurrency=1, store=Store(tmp_path))
        with pytest.raises(ValueError, match=naming("dim", 17, 1, 16)):
            embedder.encode(texts, dim=17)
        assert server.counts["embeddings"] == 1
        with pytest.raises(ValueError, match=naming("dim", 17, 1, 16)):
            embedder.encode(["a"], dim=17)


def test_a_vector_with_nothing_in_front(monkeypatch):
    monkeypatch.setattr("api_server.unit_vector", lambda text, dimensions: [0.0, 0.0, 1.0, 0.0])
    with ApiServer() as server, pytest.raises(ValueError, match=naming(2, "texts[0]", "zero")):
        api(server).encode(["a"], dim=2)


def test_no_texts():
    with ApiServer() as server:
        assert api(server, dimensions=4).encode([]).shape == (0, 4)
        with pytest.raises(ValueError, match=naming("texts")):
            api(server).encode([])
        assert server.counts["embeddings"] == 0


@pytest.mark.parametrize(
    ("texts", "facts"),
    [
        (["a", ""], ("texts[1]", "empty")),
        (["a", 3], ("texts[1]", "int", "str")),
        ("ab", ("texts", "str", "list")),
        (["a", "bcd\ud800"], ("texts[1]", "surrogate", 3)),
    ],
)
def test_texts_that_cannot_be_sent(texts, facts):
    with ApiServer() as server, pytest.raises(ValueError, match=naming(*facts)):
        api(server, prompts={"document": "p"}).encode(texts)
    assert server.counts["embeddings"] == 0


def test_a_role_that_is_none():
    with ApiServer() as server, pytest.raises(ValueError, match=naming("role", "'passage'", "query", "document")):
        api(server).encode(["a"], role="passage")


@pytest.mark.parametrize(
    ("setting", "facts"),
    [
        ({"dimensions": 0}, ("dimensions", 0, 1)),
        ({"concurrency": 0}, ("concurrency", 0, 1)),
        ({"price": 1.0, "max_cost": 0.0}, ("max_cost", 0.0, 0)),
        ({"max_attempts": 0}, ("max_attempts", 0, 1)),
        ({"timeout_seconds": float("inf")}, ("timeout_seconds", "inf", 0)),
        ({"batch_texts": 2049}, ("batch_texts", 2049, 1, 2049)),
        ({"batch_texts": 0}, ("batch_texts", 0, 1, 2049)),
        ({"parameters": {"seed": float("nan")}}, ("parameters", "JSON")),
        ({"price": -0.1}, ("price", -0.1, 0)),
        ({"max_cost": 1.0}, ("max_cost", "price")),
        ({"too_long": "warn"}, ("too_long", "'warn'", "'refuse'", "'cut'")),
        ({"base_url": "localhost"}, ("base_url", "'localhost'")),
        ({"parameters": {"input": "a"}}, ("parameters", "'input'")),
    ],
)
def test_settings_out_of_range(setting, facts):
    with pytest.raises(ValueError, match=naming(*facts)):
        ApiEmbedder("m", **setting)
    with pytest.raises(ValueError, match=naming("model", "empty")):
        ApiEmbedder(" ")


def test_a_key_is_asked_for_by_openai_alone(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(ValueError, match=naming("OPENAI_API_KEY", "https://api.openai.com/v1")):
        ApiEmbedder("m")
    with ApiServer() as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.base_url)
        assert ApiEmbedder("m").encode(["a"]).shape == (1, 16)


def test_it_can_be_evaluated():
    corpus = {f"d{i}": f"text {i}" for i in range(6)}
    queries = {f"q{i}": f"text {i}" for i in range(6)}  # the same text has the same vector
    dataset = RetrievalDataset(queries, corpus, {f"q{i}": {f"d{i}": 1} for i in range(6)})
    with ApiServer() as server:
        report = evaluate(api(server), dataset)
    assert report.metrics["accuracy@1"] == 1.0


def test_where_a_loop_is_running():
    async def notebook(server: ApiServer) -> np.ndarray:
        return api(server).encode(["a"])

    with ApiServer() as server:
        np.testing.assert_allclose(asyncio.run(notebook(server)), expected(["a"]), atol=1e-6)


def test_the_server_is_that_of_the_fingerprint(monkeypatch):
    """Vectors are kept under the address that was set when the embedder was made, so they are asked for there."""
    with ApiServer() as server, ApiServer() as other:
        monkeypatch.setenv("OPENAI_BASE_URL", server.base_url)
        embedder = ApiEmbedder("m")
        monkeypatch.setenv("OPENAI_BASE_URL", other.base_url)
        assert embedder.space("query").description["server"] == server.base_url
        embedder.encode(["a"])
        assert (server.counts["embeddings"], other.counts["embeddings"]) == (1, 0)


# The store.


def test_nothing_is_asked_for_twice(tmp_path):
    """Of eight texts six are there; a new object needs no answer to know the dimension."""
    texts = some_texts(8)
    with ApiServer() as server:
        store = Store(tmp_path)
        first_ND = api(server, store=store).encode(texts[:6])
        assert (store.hits, store.misses) == (0, 6)
        again = api(server, store=Store(tmp_path))
        assert again.dim == 16
        np.testing.assert_array_equal(again.encode(texts[:6]), first_ND)
        assert server.counts["embeddings"] == 1
        found_ND = again.encode([*texts, "text 7"])
        assert asked(server)[1:] == [["text 6", "text 7"]]
        assert (again.store.hits, again.store.misses) == (6, 2)
        np.testing.assert_array_equal(again.encode(texts, dim=8), again.encode(texts, dim=8, role="query"))
        assert server.counts["embeddings"] == 2  # cutting is done here; without prompts the roles are one
    np.testing.assert_allclose(found_ND, expected([*texts, "text 7"]), atol=1e-6)
    assert (again.costs.num_computed, again.costs.num_stored) == (2, 6)  # each text once
    assert str(again.costs) == "2 texts computed, 6 from the store: 1 requests, 2 tokens"


def test_two_at_once_pay_once(tmp_path, capfd):
    """The second job waits for the first, says so, and then requests only what is missing: two texts of its own."""
    texts, found = some_texts(24), {}
    with ApiServer(delay=0.2) as server:
        embedders = [api(server, store=Store(tmp_path), batch_texts=2, concurrency=2) for _ in range(2)]

        def encode(i: int, wanted: list[str]) -> None:
            found[i] = embedders[i].encode(wanted)

        threads = [threading.Thread(target=encode, args=(i, part)) for i, part in enumerate((texts[:22], texts[::-1]))]
        for thread in threads:
            thread.start()
            while not server.counts["embeddings"]:  # the first one asks, and has eleven batches to go
                time.sleep(0.002)
        for thread in threads:
            thread.join()
        assert sorted(text for batch in asked(server) for text in batch) == sorted(texts)
    np.testing.assert_allclose(found[0], expected(texts[:22]), atol=1e-6)
    np.testing.assert_allclose(found[1], expected(texts[::-1]), atol=1e-6)
    assert [embedder.costs.num_computed for embedder in embedders] == [22, 2]
    (line,) = capfd.readouterr().err.splitlines()
    assert names(line, tmp_path, os.getpid())


def test_other_models_do_not_wait(tmp_path):
    with ApiServer() as server, Store(tmp_path).turn(api(server).space("query")):
        ApiEmbedder("n", base_url=server.base_url, store=Store(tmp_path)).encode(["a"])
        assert server.counts["embeddings"] == 1


def test_no_texts_of_a_store(tmp_path):
    with ApiServer() as server:
        embedder = api(server, store=Store(tmp_path))
        embedder.encode(["a"])
        assert embedder.encode([]).shape == (0, 16)


def test_vectors_are_stored_as_they_come(tmp_path):
    """Eight batches, one at a time; the fifth answer is that the key is wrong. Four are stored, four asked for then."""
    texts = some_texts(16)
    with ApiServer(faults=[None] * 4 + ["401"]) as server:
        options = {"store": Store(tmp_path), "batch_texts": 2, "concurrency": 1}
        with pytest.raises(ValueError, match=naming(server.base_url, "m", 401, "OPENAI_API_KEY", 8, 16)):
            api(server, **options).encode(texts)
        found_ND = api(server, **options).encode(texts)
        assert [text for batch in asked(server)[5:] for text in batch] == texts[8:]
    np.testing.assert_allclose(found_ND, expected(texts), atol=1e-6)


def test_what_a_fingerprint_is_of():
    url = "http://user:password@host:1/v1"

    def fingerprint(model="m", role="query", **options) -> str:
        return ApiEmbedder(model, **{"base_url": url, **options}).space(role).fingerprint

    base = fingerprint()
    assert len(base) == 64
    same = [
        fingerprint(base_url="http://other:secret@host:1/v1/?key=abc"),
        fingerprint(role="document"),
        fingerprint(prompts={"document": "p"}),
        fingerprint(batch_texts=3, concurrency=1, price=1.0, parameters={}),
    ]
    assert set(same) == {base}
    cut = {"too_long": "cut"}
    others = [
        fingerprint("n"),
        fingerprint(base_url="http://host:2/v1"),
        fingerprint(base_url="https://host:1/v1"),
        fingerprint(dimensions=8),
        fingerprint(prompts={"query": "p"}),
        fingerprint(**cut),
        fingerprint(parameters={"input_type": "query"}),
        fingerprint(parameters={"input_type": "document"}),
    ]
    assert len({base, *others}) == 1 + len(others)
    openai = ApiEmbedder("m", too_long="cut").space("query").description
    assert (openai["server"], openai["max_tokens"]) == ("https://api.openai.com/v1", 8191)
    space = ApiEmbedder("m", base_url=url, dimensions=8, prompts={"query": "p"}).space("query")
    assert space.dim == 8
    assert space.description == {
        "server": "http://host:1/v1", "model": "m", "dimensions": 8, "prompt": "p", "too_long": "refuse",
        "max_tokens": None, "tokenizer": None, "role": "query",
    }  # fmt: skip


def test_two_prompts_are_two_spaces(tmp_path):
    with ApiServer() as server:
        embedder = api(server, store=Store(tmp_path), prompts={"query": "q: "})
        for _ in range(2):
            np.testing.assert_allclose(embedder.encode(["a"], role="query"), expected(["a"], prompt="q: "), atol=1e-6)
            np.testing.assert_allclose(embedder.encode(["a"]), expected(["a"]), atol=1e-6)
        assert asked(server) == [["q: a"], ["a"]]


# A process that is killed. It imports once and works in a child, so that a second run takes no seconds to start.
HARNESS = """
import os, sys
import openai
openai.AsyncOpenAI(api_key="none").embeddings
from embedft.encoders.openai_api import ApiEmbedder
from embedft.encoders.store import Store
from embedft.vectors import unit_rows
folder, base_url = sys.argv[1:]
for line in sys.stdin:
    child = os.fork()
    if not child:
        embedder = ApiEmbedder(
            "m", base_url=base_url, store=Store(folder + "/store"), ledger=folder + "/ledger.jsonl", price=1.0,
            batch_texts=2, concurrency=3,
        )
        vectors = embedder.encode([f"text {i}" for i in range(60)])
        vectors.tofile(folder + "/vectors")
        os._exit(0)
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""


def test_killed_and_run_again(tmp_path):
    """Three kills. What was answered and stored is not asked for again; lost is at most what was in flight: 3 x 2."""
    stored = tmp_path / "store"

    def num_stored() -> int:
        return sum(space.num_texts for space in Store(stored).spaces().values())

    with ApiServer(delay=0.02) as server:
        command = [sys.executable, "-c", HARNESS, str(tmp_path), server.base_url]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        with subprocess.Popen(command, **pipes, text=True, bufsize=1) as process:
            for wanted in (8, 20, 40, None):
                process.stdin.write("\n")
                child = int(process.stdout.readline())
                if wanted is not None:
                    deadline = time.monotonic() + 60
                    while num_stored() < wanted:
                        assert time.monotonic() < deadline
                        time.sleep(0.002)
                    os.kill(child, signal.SIGKILL)
                status = int(process.stdout.readline())
            process.stdin.close()
        assert status == 0
        assert sum(len(batch) for batch in asked(server)) <= 60 + 3 * 6
    vectors_ND = np.fromfile(tmp_path / "vectors", dtype=np.float32).reshape(60, 16)
    np.testing.assert_allclose(vectors_ND, expected(some_texts(60)), atol=1e-6)
    # A line for each request before it was sent, and one after it unless it was killed.
    records = lines(tmp_path / "ledger.jsonl")
    reserved = [record["request"] for record in records if "most_cost" in record]
    settled = [record["request"] for record in records if "usage" in record]
    assert reserved == list(range(1, len(reserved) + 1))
    assert 0 <= len(reserved) - len(asked(server)) <= 9
    assert set(settled) < set(reserved)
    assert len(settled) >= 30 - 3  # a kill may come between storing and settling


# Replies that do not fit.

# What the error names, and which of the four texts are lost.
REPLIES = {
    "half": (("texts[4]", 8, ..., 16), [4, 5, 6, 7]),
    "no-values": (("texts[4]", "numbers", "base64", "float32"), [4, 5, 6, 7]),
    "sizes": (("texts[7]", 15, ..., 16), [7]),
    "words": (("texts[7]", "numbers", "base64", "float32"), [7]),
    "nested": (("texts[7]", "numbers", "base64", "float32"), [7]),
    "null": (("texts[7]", "finite"), [7]),
    "nan": (("texts[7]", "finite"), [7]),
    "zero": (("texts[7]", "zeros"), [7]),
}


@pytest.mark.parametrize("base64", ["given", "ignored"])
@pytest.mark.parametrize("fault", REPLIES)
def test_a_reply_that_does_not_fit(tmp_path, fault, base64):
    """The second of three batches is paid for: its good vectors are stored, the rest requested next time."""
    texts, (facts, lost) = some_texts(12), REPLIES[fault]
    with ApiServer(faults=[None, fault], base64=base64) as server:
        embedder = api(server, store=Store(tmp_path), batch_texts=4, concurrency=1)
        with pytest.raises(ValueError, match=naming(server.base_url, "m", *facts, len(lost), 12)):
            embedder.encode(texts)
        assert server.counts["embeddings"] == 3
        np.testing.assert_allclose(embedder.encode(texts), expected(texts), atol=1e-6)
        assert asked(server)[3:] == [[texts[row] for row in lost]]


@pytest.mark.parametrize("fault", ["fewer-vectors", "more-vectors", "same-index", "index-from-1", "index-text"])
def test_vectors_that_cannot_be_assigned_are_requested_again_in_halves(fault):
    texts = some_texts(12)
    with ApiServer(faults=[None, fault]) as server:
        embedder = api(server, batch_texts=4, concurrency=1)
        np.testing.assert_allclose(embedder.encode(texts), expected(texts), atol=1e-6)
        assert asked(server)[:4] == [texts[:4], texts[4:8], texts[4:6], texts[6:8]]


@pytest.mark.parametrize(("gone", "num_kept"), [(["text 5"], 11), (["text 0", "text 11"], 10)])
def test_texts_that_the_server_leaves_out_cost_no_other_its_vector(tmp_path, gone, num_kept):
    """Some servers return no vector for a text that they cannot encode, and count the others from 0."""
    texts = [f"text {i}" for i in range(12)]

    def answered(request):
        kept = [text for text in request["input"] if text not in gone]
        data = [{"index": i, "embedding": unit_vector(text, 16)} for i, text in enumerate(kept)]
        return None if len(kept) == len(request["input"]) else (200, {"object": "list", "data": data})

    with ApiServer(refuses=answered) as server:
        with pytest.raises(ValueError, match=naming(0, "vectors", 1, len(gone), 12)):
            api(server, store=Store(tmp_path), concurrency=1).encode(texts)
        kept = [text for text in texts if text not in gone]
        num_requests = server.counts["embeddings"]
        np.testing.assert_allclose(api(server, store=Store(tmp_path)).encode(kept), expected(kept), atol=1e-6)
        assert len(kept) == num_kept
        assert server.counts["embeddings"] == num_requests


def test_another_dimension_than_asked_for():
    with ApiServer(faults=["half"]) as server, pytest.raises(ValueError, match=naming("texts[0]", 4, ..., 8)):
        api(server, dimensions=8).encode(["a"])


def test_another_dimension_than_stored(tmp_path):
    """The server changed the model behind the name."""
    with ApiServer(dimensions=16) as server:
        api(server, store=Store(tmp_path)).encode(["a"])
        server.dimensions = 12
        with pytest.raises(ValueError, match=naming("texts[1]", 12, ..., 16, 1, 1)):
            api(server, store=Store(tmp_path)).encode(["a", "b"])


def test_a_run_that_begins_with_five_bad_replies_stops():
    """Those five were paid for; the other 95 would be too."""
    with ApiServer(faults=["fewer-vectors"] * 100) as server:
        with pytest.raises(ValueError, match=naming(0, 1, 100, 100)):
            api(server, batch_texts=1, concurrency=1).encode(some_texts(100))
        assert server.counts["embeddings"] == 5


def test_one_bad_vector_in_each_of_the_first_batches_stops_nothing(tmp_path):
    with ApiServer(faults=["nan"] * 6) as server:
        with pytest.raises(ValueError, match=naming("texts[1]", 6, 20)):
            api(server, store=Store(tmp_path), batch_texts=2, concurrency=1).encode(some_texts(20))
        assert server.counts["embeddings"] == 10


# Failures on the way.


def test_faults_on_the_way_are_tried_again():
    texts = some_texts(12)
    faults = ["429-ms", "500", "drop", "drop-middle", "not-json", "503", "408", "409", "429"]
    with ApiServer(faults=faults) as server:
        np.testing.assert_allclose(api(server, batch_texts=3).encode(texts), expected(texts), atol=1e-6)
        assert server.counts["embeddings"] == 4 + len(faults)


def test_a_share_of_faults_changes_nothing(tmp_path):
    texts = some_texts(120)
    with ApiServer(faults=0.3, seed=1) as server:
        found_ND = api(server, store=Store(tmp_path), batch_texts=3, max_attempts=12).encode(texts)
        assert server.counts["embeddings"] > 45
    np.testing.assert_allclose(found_ND, expected(texts), atol=1e-6)


def test_a_pause_that_the_server_asks_for_is_kept():
    with ApiServer(faults=["429-seconds"], retry_after=0.3) as server:
        start = time.monotonic()
        api(server).encode(["a"])
        assert time.monotonic() - start >= 0.3
        assert server.counts["embeddings"] == 2


def test_rates_are_kept():
    """Over all calls: six requests in a row at 1,200 a minute, or of 25 tokens (100 bytes) at 30,000 a minute."""
    for limit in ({"requests_per_minute": 1200}, {"tokens_per_minute": 30_000}):
        with ApiServer() as server:
            embedder, start = api(server, batch_texts=1, **limit), time.monotonic()
            for call in range(2):
                embedder.encode([f"{3 * call + i:0100}" for i in range(3)])
            assert time.monotonic() - start >= 0.249


def test_attempts_have_an_end(tmp_path):
    """Text 3 fails three times with text 2 beside it, then three times alone; text 2 is taken alone."""
    with ApiServer(faults=lambda prompt, attempt: "503" if "text 3" in prompt else None) as server:
        with pytest.raises(ValueError, match=naming(server.base_url, "m", 503, 1, 6)):
            api(server, store=Store(tmp_path), batch_texts=2, max_attempts=3).encode(some_texts(6))
        assert server.counts["503"] == 6


def test_nobody_is_there():
    embedder = ApiEmbedder("m", base_url="http://127.0.0.1:9/v1", max_attempts=2)
    with pytest.raises(ValueError, match=naming("http://127.0.0.1:9/v1", "m", "connection", 1, 1)):
        embedder.encode(["a"])


# Texts that are too long.


def words(number: int, word: str = "a") -> str:
    return " ".join([word] * number)


@pytest.mark.parametrize("wording", LENGTH_REFUSALS)
def test_the_server_refuses_a_text_for_its_length(tmp_path, wording):
    """Two of sixteen texts are too long for it. They are named, the others are stored, and refusals cost nothing."""
    texts = [f"{i:02} {'x' * (500 if i in (5, 11) else 5)}" for i in range(16)]
    with ApiServer(max_tokens=100, wording=wording) as server:
        embedder = api(server, store=Store(tmp_path), price=1e6)
        embedder.encode(["b"])  # from here on the server is known to take base64
        facts = (server.base_url, "m", "texts[5]", LENGTH_REFUSALS[wording][0], 2, 16)
        with pytest.raises(ValueError, match=naming(*facts)):
            embedder.encode(texts)
        assert embedder.costs.prompt_tokens == 0 + 14 * 2  # 1 byte, then 8 each
        # Sixteen in one, then halves: each of the two is found in four steps, and their sisters are taken.
        assert server.counts["refused"] == 1 + 2 * 4
        ok = sorted(text for batch in asked(server)[1:] if max(map(len, batch)) < 100 for text in batch)
        assert ok == sorted(text for text in texts if len(text) < 100)


def test_the_server_is_asked_until_it_takes_the_text(tmp_path, capfd):
    """403 bytes are taken. Of 1,000 letters a tenth at a time leaves 900, 810, 729, ...: nine cuts. Alone at last."""
    long, lengths = "y" * 1000, [1000]
    while lengths[-1] > 403:
        lengths.append(lengths[-1] * 9 // 10)
    with ApiServer(max_tokens=100) as server:
        store = Store(tmp_path)
        embedder = api(server, too_long="cut", store=store)
        embedder.encode(["a"])
        found_ND = embedder.encode([long, "b"])
        sent = [batch for batch in asked(server)[1:] if "b" not in batch]
        assert sent == [["y" * length] for length in lengths]
        assert len(lengths) == 10
        assert names(capfd.readouterr().err, server.base_url, "m", 1, 2, "cut")
        num_asked = server.counts["embeddings"]
        np.testing.assert_array_equal(api(server, too_long="cut", store=store).encode([long]), found_ND[:1])
        assert server.counts["embeddings"] == num_asked
    np.testing.assert_allclose(found_ND, expected(["y" * lengths[-1], "b"]), atol=1e-6)


def test_the_first_cut_is_at_eight_characters_a_token(capfd):
    """Of 10,000 letters 800 are left at once, then 720, ... until 403 bytes or fewer: 382."""
    long = "y" * 10_000
    with ApiServer(max_tokens=100) as server:
        embedder = api(server, too_long="cut")
        embedder.endpoint.max_tokens = 100  # as of OpenAI
        embedder.encode(["a"])
        embedder.encode([long])
        assert [len(batch[0]) for batch in asked(server)[1:]] == [10_000, 800, 720, 648, 583, 524, 471, 423, 380]


@pytest.mark.parametrize(
    ("text", "max_tokens", "shorter"),
    [
        # 20 characters, 18 are kept at most: "ab cd ef gh ij kl m".
        ("ab cd ef gh ij kl mn", None, "ab cd ef gh ij kl"),
        ("a" * 20, None, "a" * 18),
        ("aa" + " " + "a" * 17, None, "aa " + "a" * 15),  # whitespace, but further back than a tenth
        ("a" * 18 + " b", None, "a" * 18),  # the cut is at whitespace already
        ("a" * 17 + "  b", None, "a" * 17),
        ("a" * 100, 2, "a" * 16),  # 8 characters a token
        ("a" * 100, 50, "a" * 90),
        ("a", None, ""),
        (" a", None, ""),
        ("日本語" * 10, None, ("日本語" * 10)[:27]),
    ],
)
def test_shorter_by_hand(text, max_tokens, shorter):
    assert shorten(text, max_tokens) == shorter


def test_it_always_gets_shorter():
    text, lengths = "word " * 40 + "x" * 60 + " \n\t" * 20, []
    while text:
        lengths.append(len(text))
        text = shorten(text, None)
    assert lengths == sorted(set(lengths), reverse=True)
    assert len(lengths) < 60


def test_a_prompt_is_never_cut():
    """The server refuses the text however short it is cut."""
    prompt = "p" * 1000 + " "
    with ApiServer(max_tokens=100) as server, pytest.raises(ValueError, match=naming("texts[0]", 400, 100)):
        api(server, too_long="cut", prompts={"document": prompt}).encode(["word " * 200])
    assert all(batch[0].startswith(prompt) and len(batch[0]) > len(prompt) for batch in asked(server))


@pytest.mark.parametrize("concurrency", [1, 8])
def test_a_batch_beyond_the_tokens_of_a_minute_goes_in_halves(monkeypatch, concurrency):
    """OpenAI answers 429 to a request larger than the limit per minute, for ever; no wording is looked for."""
    monkeypatch.setattr(sending, "BACKOFF_SECONDS", 0.01)
    monkeypatch.setattr(sending, "MAX_BACKOFF_SECONDS", 0.02)
    refusal = 429, {"error": {"message": "Request too large", "code": "rate_limit_exceeded"}}
    texts = some_texts(400)
    with ApiServer(refuses=lambda request: refusal if len(request["input"]) > 20 else None) as server:
        embedder = api(server, batch_texts=100, concurrency=concurrency)
        np.testing.assert_allclose(embedder.encode(texts), expected(texts), atol=1e-6)
        assert embedder.endpoint.batch_texts in (12, 13)
        assert server.counts["refused"] < 60


def test_a_batch_that_is_too_large_goes_in_halves():
    """20, 10 and 10 are refused, four times 5 are taken: later batches have five texts from the start."""
    texts = some_texts(45)
    with ApiServer(max_texts=6) as server:
        embedder = api(server, batch_texts=20, concurrency=1)
        embedder.encode(["a"])
        np.testing.assert_allclose(embedder.encode(texts), expected(texts), atol=1e-6)
        assert [len(batch) for batch in asked(server)[1:]] == [20, 10, 5, 5, 10, 5, 5, *[5] * 5]
        assert embedder.endpoint.batch_texts == 5


# Servers that use their own words. What is refused, in which words; all texts have their vectors in the end.


def at_most(number: int, status: int, body: object) -> Callable[[dict], tuple[int, object] | None]:
    return lambda request: (status, body) if len(input_of(request)) > number else None


def without(field: str, status: int, body: object, *values: object) -> Callable[[dict], tuple[int, object] | None]:
    return lambda request: (status, body) if field in request and (not values or request[field] in values) else None


WORDS = {
    "Gemini": at_most(7, 400, {"error": {"code": 400, "message": "at most 7 requests can be in one batch"}}),
    "DashScope": at_most(10, 400, {"error": {"message": "batch size is invalid, it should not be larger than 10."}}),
    "Chinese": at_most(5, 400, {"error": {"message": "输入数组的长度不得超过5条"}}),
    "without a word": at_most(9, 422, None),
    "with 413": at_most(1, 413, "Payload Too Large"),
    "with 500": at_most(3, 500, {"error": {"code": 500, "message": "input is too large to process"}}),
    "in a 200": at_most(3, 200, {"error": "too much"}),
    "base64, vLLM": without("encoding_format", 400, {"message": "base64 is not currently supported"}, "base64"),
    "base64, LiteLLM": without("encoding_format", 500, {"error": {"message": "UnsupportedParams"}}, "base64"),
    "encoding_format, LiteLLM": without("encoding_format", 500, {"error": {"message": "UnsupportedParams"}}),
    "encoding_format, FastAPI": without("encoding_format", 422, {"detail": [{"type": "extra_forbidden"}]}),
}


@pytest.mark.parametrize("name", WORDS)
@pytest.mark.parametrize("concurrency", [1, 4])
def test_what_a_server_refuses_is_asked_for_otherwise(name, concurrency):
    texts = some_texts(40)
    with ApiServer(refuses=WORDS[name]) as server:
        embedder = api(server, batch_texts=20, concurrency=concurrency)
        np.testing.assert_allclose(embedder.encode(texts), expected(texts), atol=1e-6)
        num_refused, num_asked = server.counts["refused"], server.counts["embeddings"]
        # What works is remembered, by the embedder: nothing is refused again.
        more = [f"more {i}" for i in range(20)]
        np.testing.assert_allclose(embedder.encode(more), expected(more), atol=1e-6)
        assert server.counts["refused"] == num_refused < num_asked


@pytest.mark.parametrize("status", [400, 422, 500, 502])
def test_one_bad_text_spoils_no_other(tmp_path, status):
    """The error names it in the server's own words, and the other forty have vectors."""
    texts = [*some_texts(25), "poison", *(f"more {i}" for i in range(15))]
    reason = "json: unsupported value: NaN"
    body = {"error": {"message": reason}}
    with ApiServer(refuses=lambda request: (status, body) if "poison" in request["input"] else None) as server:
        embedder = api(server, store=Store(tmp_path), max_attempts=3)
        with pytest.raises(ValueError, match=naming("texts[25]", status, reason, 1, 41)):
            embedder.encode(texts)
        assert embedder.endpoint.batch_texts == 256
        num_asked = server.counts["embeddings"]
        others = [text for text in texts if text != "poison"]
        np.testing.assert_allclose(embedder.encode(others), expected(others), atol=1e-6)
        assert server.counts["embeddings"] == num_asked


@pytest.mark.slow
def test_no_reply_is_taken_amiss():
    """Thousands of replies with a random part replaced, dropped or doubled: right vectors, or a reason in one line."""
    texts = some_texts(3)
    good = ApiServer(dimensions=4).embed({"input": texts, "model": "m"})
    endpoint = endpoints.Endpoint(endpoints.EndpointConfig("m", base_url="http://localhost:1/v1"))
    fetch = endpoints.Fetch(endpoint, dict.fromkeys(texts, 0), "", None)

    async def read(reply: object) -> sending.Response:
        async def post(*request) -> dict | sending.Response:
            return fetch.client.parse(json.dumps(reply))

        endpoint.dim, fetch.client.post = 0, post
        return await fetch._ask(sending.Job("key", (texts, None), 1, 0), None)

    async def read_all() -> list[sending.Response]:
        return [await read(mutated(good, random.Random(seed))) for seed in range(4000)]

    for response in asyncio.run(read_all()):
        assert response.action == "done" or (response.reason and "\n" not in response.reason)
        json.dumps([response.reason, response.usage], ensure_ascii=False).encode()
        vectors = list((response.result or {}).values())
        assert len({vector.shape for vector in vectors}) <= 1
        for vector in vectors:
            np.testing.assert_allclose(np.linalg.norm(unit_rows(vector[None])), 1.0, atol=1e-6)


def test_a_request_that_is_wrong_ends_soon():
    """Every size and form is refused: five texts that are refused alone end it."""
    with ApiServer(refuses=lambda request: (400, {"error": {"message": "no dimensions"}})) as server:
        with pytest.raises(ValueError, match=naming(400, "dimensions", 100, 100)):
            api(server, batch_texts=4, concurrency=1, dimensions=8).encode(some_texts(100))
        # Of the first batch 4, 2, 1, 1, 2, 1, 1 texts, of the second 4, 2, 1, each in three forms.
        assert server.counts["embeddings"] == 3 * (7 + 3)


@pytest.mark.parametrize("body", [{"embeddings": [[1.0, 2.0]]}, [[1.0, 2.0]], {"data": [{"vector": [1.0]}] * 6}])
def test_replies_of_another_api_end_it_soon(body):
    """Six texts in one batch: five replies of the wrong shape, instead of every text alone."""
    with ApiServer(refuses=lambda request: (200, body)) as server:
        with pytest.raises(ValueError, match=naming(json.dumps(body), 6, 6)):
            api(server).encode(some_texts(6))
        assert server.counts["embeddings"] == 5


def test_parameters_are_sent_as_they_are():
    with ApiServer() as server:
        embedder = api(server, parameters={"input_type": "query", "encoding_format": "float", "truncate": "END"})
        np.testing.assert_allclose(embedder.encode(["a"]), expected(["a"]), atol=1e-6)
        body = {"model": "m", "input": ["a"], "input_type": "query", "encoding_format": "float", "truncate": "END"}
        assert server.log[0][2] == body


def test_an_error_in_a_200_is_told():
    reason = "Model 'm' is not an embedding model"
    body = {"error": {"message": reason, "code": 400}}
    with ApiServer(refuses=lambda request: (200, body)) as server:
        with pytest.raises(ValueError, match=naming("texts[0]", 400, reason)):
            api(server).encode(["a"])
        assert server.counts["embeddings"] == 3


# Money.


def test_the_ledger_by_hand(tmp_path):
    """8 and 4 bytes: with four more each, 16 tokens at most, at 2 a million; the server reports 2 + 1."""
    path = tmp_path / "logs" / "ledger.jsonl"
    with ApiServer() as server:
        embedder = api(server, price=2.0, ledger=path)
        embedder.encode(["aaaabbbb"])
        embedder.encode(["cccc"])
    assert totals(embedder.costs) == (2, 3, 0, 6e-6, 0.0)
    assert str(embedder.costs) == "2 texts computed, 0 from the store: 2 requests, 3 tokens, cost 0.000006"
    first, second = lines(path)[:2]
    del first["time"], second["time"], second["seconds"]
    key = hashlib.sha256(json.dumps(["m", "aaaabbbb"]).encode()).hexdigest()
    assert first == {"request": 1, "key": key, "most_prompt_tokens": 12, "most_reply_tokens": 0, "most_cost": 24e-6}
    usage = {"prompt_tokens": 2, "completion_tokens": 0}
    assert second == {"request": 1, "status": "ok", "reason": None, "usage": usage, "cost": 4e-6}
    assert [record["request"] for record in lines(path)] == [1, 1, 2, 2]
    assert totals(embedder.endpoint.spent) == (2, 3, 0, 6e-6, 0.0)


def test_a_request_without_a_report_counts_as_it_was_reserved(tmp_path):
    with ApiServer(faults=["no-usage"]) as server:
        embedder = api(server, price=1e6, ledger=tmp_path / "ledger.jsonl")
        embedder.encode(["aaaa"])
        assert str(embedder.costs).endswith(": 1 requests (1 without a report), 0 tokens, cost 0")
        embedder.encode(["aaaa"])
        assert totals(embedder.endpoint.spent) == (2, 1, 1, 1.0, 8.0)


@pytest.mark.parametrize("with_ledger", [True, False])
def test_the_limit_is_never_passed(tmp_path, with_ledger):
    """A text of 40 bytes may cost 44 and costs 10. Of 100, six fit: after the sixth 60 are spent and 44 would be 104.

    Also over calls, and with a ledger over objects.
    """
    texts = [f"{i:040}" for i in range(20)]
    ledger = tmp_path / "ledger.jsonl" if with_ledger else None
    with ApiServer() as server:
        options = {"price": 1e6, "max_cost": 100.0, "ledger": ledger, "batch_texts": 1, "store": Store(tmp_path / "s")}
        embedder = api(server, **options)
        embedder.encode(texts[:2])
        with pytest.raises(ValueError, match=naming(server.base_url, "m", "--max-cost", 100.0, 14, 18)):
            embedder.encode(texts)
        assert repr(embedder.costs.cost) == "60.0"
        again = api(server, **options) if with_ledger else embedder
        with pytest.raises(ValueError, match=naming("--max-cost", 100.0, 14, 14)):
            again.encode(texts)
        assert server.counts["embeddings"] == 6
        assert again.encode(texts[:6]).shape == (6, 16)  # what is stored costs nothing
        found = api(server, **{**options, "max_cost": 1000.0}).encode(texts)
    np.testing.assert_allclose(found, expected(texts), atol=1e-6)


def test_one_process_has_the_ledger(tmp_path):
    from embedft.files import locked

    path = tmp_path / "ledger.jsonl"
    with ApiServer() as server, locked(tmp_path / "ledger.jsonl.lock"):
        with pytest.raises(ValueError, match=naming(tmp_path, "ledger.jsonl.lock")):
            api(server, ledger=path).encode(["a"])
        assert server.counts["embeddings"] == 0


# The key.


def test_the_key_is_nowhere(tmp_path, capfd, caplog):
    """Not in what the server quotes, not on disk, not in what is printed or can be looked at."""
    texts, options = [], {"store": Store(tmp_path / "s"), "price": 1.0, "ledger": tmp_path / "ledger.jsonl"}
    with ApiServer(faults=["401", "400-context"]) as server:
        embedder = api(server, too_long="cut", **options)
        with pytest.raises(ValueError, match=naming(server.base_url, "m", 401, "[secret]")) as caught:
            embedder.encode(["a b"])
        assert "\n" not in str(caught.value)
        embedder.encode(["a b", "b" * 10])
        assert server.log[-1][1]["authorization"] == f"Bearer {KEY}"
        texts += [str(caught.getrepr()), repr(embedder.space("query")), repr(embedder.base())]
        texts += [repr(vars(embedder)), repr(vars(embedder.endpoint)), repr(embedder.endpoint.server)]
        # An address with a password, of which a server may be behind.
        url = server.base_url.replace("http://", "http://user:pass-word-123@") + "?key=abcdefgh"
        other = ApiEmbedder("m", base_url=url, dimensions=4, **options)
        texts += [repr(other.space("query")), repr(other.base())]
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) >= 3  # the ledger, and the store's database and vectors
    texts += [path.read_bytes().decode("latin-1") for path in files]
    texts += [*capfd.readouterr(), caplog.text]
    assert [text for text in texts if KEY in text or "pass-word" in text or "abcdefgh" in text] == []


# Adapters, loading, the command line.


def test_an_adapter_maps_what_the_server_gave(tmp_path):
    """A map that doubles the first feature: the store keeps the server's vectors, `dim` is cut behind the map."""
    adapter = Adapter(query=LinearMap(16, bias=False))
    with torch.no_grad():
        adapter.query.weight[0, 0] = 2.0
    texts = ["a", "b"]
    with ApiServer() as server:
        embedder = api(server, store=Store(tmp_path))
        with pytest.warns(UserWarning, match=naming("adapter", f"{server.base_url}, m")):
            embedder.attach(adapter)
        assert embedder.dim == 16
        mapped_ND = expected(texts) * np.array([2.0] + [1.0] * 15)
        for dim in (16, 4):
            want_ND = mapped_ND[:, :dim] / np.linalg.norm(mapped_ND[:, :dim], axis=1, keepdims=True)
            np.testing.assert_allclose(embedder.encode(texts, role="query", dim=dim), want_ND, atol=1e-6)
        np.testing.assert_allclose(embedder.encode(texts), expected(texts), atol=1e-6)
        assert server.counts["embeddings"] == 1
        base = embedder.base()
        assert base == Base(
            f"{server.base_url}, m", 16, {role: embedder.space(role).fingerprint for role in ("query", "document")}
        )
        other = Adapter(query=LinearMap(16), base=base)
        api(server).attach(other)
        with pytest.raises(ValueError, match=naming("adapter", base.name, f"{server.base_url}, n")):
            ApiEmbedder("n", base_url=server.base_url).attach(other)
        with pytest.raises(ValueError, match=naming("adapter", 8, 16)):
            embedder.attach(Adapter(query=LinearMap(8)))


def test_load_embedder(tmp_path):
    with ApiServer() as server:
        embedder = load_embedder(
            "openai:org/m", store=tmp_path / "s", base_url=server.base_url, dimensions=8, prompts={"query": "q: "}
        )
        assert isinstance(embedder, ApiEmbedder)
        assert embedder.encode(["a"], role="query").shape == (1, 8)
        assert server.log[0][2]["model"] == "org/m"
        assert server.log[0][2]["input"] == ["q: a"]
        base = embedder.base()
        Adapter(query=LinearMap(8), base=base).save(tmp_path / "adapter")
        options = {"base_url": server.base_url, "dimensions": 8, "prompts": {"query": "q: "}}
        mapped = load_embedder("openai:org/m", adapter=tmp_path / "adapter", **options)
        np.testing.assert_allclose(mapped.encode(["a"], role="query"), embedder.encode(["a"], role="query"), atol=1e-6)
        assert mapped.adapter is not None
    assert list(Store(tmp_path / "s").spaces()) == [embedder.space("query").name]


@pytest.mark.parametrize(
    ("argument", "value"), [("device", "cpu"), ("dtype", torch.bfloat16), ("max_length", 8), ("revision", "main")]
)
def test_arguments_that_an_api_has_no_use_for(argument, value):
    with pytest.raises(ValueError, match=naming("openai:m", argument)):
        load_embedder("openai:m", **{argument: value})


def test_arguments_that_a_folder_has_no_use_for(tmp_path):
    with pytest.raises(ValueError, match=naming(tmp_path, "price", "max_cost", "openai:MODEL")):
        load_embedder(tmp_path, price=1.0, max_cost=2.0)


def test_it_is_not_fine_tuned():
    dataset = RetrievalDataset({"q": "a"}, {"d": "b"}, {"q": {"d": 1}})
    embedder = ApiEmbedder("m", base_url="http://127.0.0.1:9/v1")
    with pytest.raises(ValueError, match=naming("m", "API", "trained")):
        finetune(embedder, dataset)


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.json"
    corpus = {f"d{i}": f"text {i}" for i in range(6)}
    queries = {f"q{i}": f"text {i}" for i in range(6)}
    relevant = {f"q{i}": [f"d{i}"] for i in range(6)}
    path.write_text(json.dumps({"queries": queries, "corpus": corpus, "relevant_docs": relevant}))
    return str(path)


def test_evaluate_from_the_command_line(tmp_path, data, capsys):
    with ApiServer() as server:
        command = [
            "evaluate",
            "openai:m",
            data,
            "--json",
            "--base-url",
            server.base_url,
            "--store",
            str(tmp_path / "s"),
        ]
        command += ["--price", "1000000", "--max-cost", "60", "--ledger", str(tmp_path / "l"), "--too-long", "cut"]
        command += ["--requests-per-minute", "6000", "--tokens-per-minute", "600000"]
        assert cli.main(command) == 0
        out, err = capsys.readouterr()
        assert json.loads(out)["accuracy@1"] == 1.0
        # Queries are the documents' texts, and there is no prompt: six texts are computed and none was there.
        costs = "6 texts computed, 0 from the store: 1 requests, 6 tokens, cost 6"
        assert f"{server.base_url}, m: {costs}\n" in err
        assert cli.main(command) == 0
        assert "0 texts computed, 6 from the store: 0 requests, 0 tokens, cost 0\n" in capsys.readouterr().err
        assert server.counts["embeddings"] == 1


def test_encode_from_the_command_line(tmp_path, capsys):
    (tmp_path / "texts.txt").write_text("a\nb\n")
    with ApiServer() as server:
        command = ["encode", "openai:m", str(tmp_path / "texts.txt"), "--out", str(tmp_path / "v.npy")]
        assert cli.main([*command, "--base-url", server.base_url, "--dimensions", "8", "--dim", "4"]) == 0
    assert np.load(tmp_path / "v.npy").shape == (2, 4)
    assert (
        f"{server.base_url}, m: 2 texts computed, 0 from the store: 1 requests, 0 tokens\n" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    "name", [name for name in cli.COMMANDS if name not in ("chunk", "questions", "compare", "report", "store", "push")]
)
def test_commands_that_offer_a_server_work_with_it_and_others_do_not_offer_it(tmp_path, data, name, capsys):
    assert cli.main([name, "--help"]) == 0
    offers = "openai:MODEL" in " ".join(capsys.readouterr().out.split())
    (tmp_path / "texts.txt").write_text("a\n")
    arguments = {
        "encode": [str(tmp_path / "texts.txt"), "--out", str(tmp_path / "v.npy")],
        "search": [data, "text 3"],
        "mine": [data, "--out", str(tmp_path / "mined.jsonl"), "--ranks", "1", "5"],
        "adapter": [data, "--out", str(tmp_path / "adapter"), "--epochs", "1", "--validation", data],
        "finetune": [data, "--out", str(tmp_path / "run")],
        "ablate": [data, "--test", data, "--out", str(tmp_path / "grid")],
        "merge": ["other", "--out", str(tmp_path / "merged")],
        "info": [],
    }
    with ApiServer() as server:
        at = [] if name in ("finetune", "ablate", "merge", "info") else ["--base-url", server.base_url]
        assert cli.main([name, "openai:m", *arguments.get(name, [data]), *at]) == (0 if offers else 2)
    assert offers == (name not in ("finetune", "ablate", "merge"))


def test_errors_from_the_command_line(tmp_path, data, monkeypatch, capsys):
    (tmp_path / "texts.txt").write_text("a\n")
    encode = ["encode", "openai:m", str(tmp_path / "texts.txt"), "--store", str(tmp_path / "s")]
    cases = {
        "--max-cost 1": ("--max-cost", "price"),
        "--max-length 8": ("openai:m", "--max-length"),
        "--dtype bfloat16": ("openai:m", "dtype"),
        "--requests-per-minute 0": ("--requests-per-minute", 0, 1),
        "--concurrency 0": ("--concurrency", 0, 1),
        "--base-url ftp://x": ("--base-url", "'ftp://x'"),
    }
    for options, facts in cases.items():
        assert cli.main([*encode, *options.split()]) == 2
        assert names(capsys.readouterr().err, "encode", *facts)
    monkeypatch.delenv("OPENAI_API_KEY")
    for command in (encode, ["info", "openai:m"]):
        assert cli.main(command) == 2
        assert names(capsys.readouterr().err, command[0], "OPENAI_API_KEY", "https://api.openai.com/v1")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    assert cli.main(["finetune", "openai:m", data, "--out", str(tmp_path / "run")]) == 2
    assert names(capsys.readouterr().err, "finetune", "openai:m", "API", "trained")
    assert not (tmp_path / "run").exists()


def test_info(monkeypatch, capsys):
    assert cli.main(["info", "openai:text-embedding-3-small"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("text-embedding-3-small at https://api.openai.com/v1:")
    assert "8,191 tokens" in out
    monkeypatch.setenv("OPENAI_BASE_URL", "http://localhost:8000/v1")
    assert cli.main(["info", "openai:m"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("m at http://localhost:8000/v1:")
    assert "8,191" not in out
