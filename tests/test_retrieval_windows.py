"""windows.py: which window of a relevant document matches a question, against every pair of them."""

import numpy as np
import pytest
from tiny import make_dataset, make_embedder

from embedft.retrieval.windows import make_window_span, matching_windows


@pytest.mark.parametrize("dim", [None, 8])
def test_the_matching_window_is_the_most_similar_of_all_relevant_documents(tmp_path, dim):
    embedder, dataset = make_embedder(tmp_path / "model"), make_dataset(8, 6)
    dataset.qrels["q1"]["d4"] = 1  # a second answer
    dataset.qrels["q2"]["d5"] = 0
    passages = (5, 2)
    found = {place["query_id"]: place for place in matching_windows(embedder, dataset, passages, dim=dim)}
    assert found.keys() == dataset.qrels.keys()
    span, several = make_window_span(embedder, passages), 0
    for query_id, place in found.items():
        (query_D,) = embedder.encode([dataset.queries[query_id]], role="query", dim=dim)
        scores = {}
        for document_id in dataset.relevant(query_id):
            text = dataset.texts[document_id]
            windows_WD, _ = embedder.encode_passages([text], passages, dim=dim)
            scores |= {(document_id, *span(text, i)[:2]): score for i, score in enumerate(windows_WD @ query_D)}
        several += len(scores) > 2
        found_score = scores[place["document_id"], place["start"], place["end"]]
        assert found_score == pytest.approx(max(scores.values()), abs=1e-6)
        assert len(dataset.texts[place["document_id"]][place["start"] : place["end"]].split()) <= 3
    assert several > 4
    assert matching_windows(embedder, dataset, (*passages, 4, 1), dim=dim) == list(found.values())  # of the first size
    assert np.ptp([place["start"] for place in found.values()]) > 0
