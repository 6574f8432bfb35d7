"""Embeddings from an OpenAI-compatible server, by the contract of `Embedder.encode`: for `evaluate`, not for training.

Each call is paid for, and nothing is kept here: keep what `encode` returns. Failed requests are tried again by the
client. Server and key: see server.py.

    embedder = ApiEmbedder("text-embedding-3-small")
    evaluate(embedder, dataset)
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ..progress import progress_bar
from ..server import Server

# A request to api.openai.com may hold 2,048 texts and 300,000 tokens; a token is at least a byte.
BATCH_TEXTS, BATCH_BYTES = 256, 300_000
MAX_RETRIES = 6


class ApiEmbedder:
    """A model behind POST /embeddings. Vectors are scaled to length one.

    Args:
        model: the name that the server knows.
        base_url: such as http://localhost:8000/v1; None: OPENAI_BASE_URL, else api.openai.com.
        prompts: {"query": ..., "document": ...}: text in front, for models that want it.
        timeout_seconds: of one request; a failed one is tried again, `MAX_RETRIES` times.

    Raises:
        ValueError: no address of a server, or no key for api.openai.com.
    """

    similarity = "cosine"

    def __init__(
        self,
        model: str,
        *,
        base_url: str | None = None,
        prompts: dict[str, str] | None = None,
        timeout_seconds: float = 60.0,
    ):
        import openai

        self.model, self.prompts, self.server = model, dict(prompts or {}), Server.find(base_url)
        self._client = openai.OpenAI(
            api_key=self.server.key, base_url=self.server.url, timeout=timeout_seconds, max_retries=MAX_RETRIES
        )

    def encode(
        self, texts: Sequence[str], *, role: str = "document", dim: int | None = None, progress: bool | None = None
    ) -> np.ndarray:
        """Vectors of N texts, [N, D] float32 of unit length, in the order given.

        Args:
            role: "query" or "document": which prompt goes in front.
            dim: leading features to keep, asked of the server (`dimensions`); None: all.

        Raises:
            ValueError: an empty text, or what the server answered, in one line without the key.
        """
        import openai

        prompt = self.prompts.get(role, "")
        texts = [prompt + text for text in texts]
        for row, text in enumerate(texts):
            if not text:
                raise ValueError(f"texts[{row}] is empty, which the API does not take")
        options = {} if dim is None else {"dimensions": dim}
        rows: list[np.ndarray] = []
        with progress_bar(len(texts), f"encode ({role}, {self.model})", unit="text", show=progress) as bar:
            for batch in _batches(texts):
                try:
                    answer = self._client.embeddings.create(model=self.model, input=batch, **options)
                except (openai.OpenAIError, ValueError) as error:  # ValueError: what came back is no JSON
                    reason = " ".join(self.server.redact(str(error)).split())
                    raise ValueError(f"{self.server.name}, {self.model}: {reason}") from None
                rows += self._vectors(answer, len(batch))
                bar.update(len(batch))
        if not rows:
            raise ValueError("no texts to encode")
        embeddings_ND = np.stack(rows)
        if dim is not None and embeddings_ND.shape[1] != dim:
            raise ValueError(f"{self.model} gives {embeddings_ND.shape[1]} dimensions, asked for {dim}")
        lengths_N1 = np.linalg.norm(embeddings_ND, axis=1, keepdims=True)
        return embeddings_ND / np.maximum(lengths_N1, np.finfo(np.float32).tiny)

    def _vectors(self, answer: Any, num_texts: int) -> list[np.ndarray]:
        """The vectors of one answer in the order of its texts. Raises `ValueError` for anything else."""
        items = {getattr(item, "index", None): item for item in getattr(answer, "data", None) or ()}
        if items.keys() != set(range(num_texts)):
            raise ValueError(f"{self.server.name}, {self.model}: no {num_texts} vectors came back for as many texts")
        vectors = [np.asarray(items[row].embedding, dtype=np.float32) for row in range(num_texts)]
        if len({vector.shape for vector in vectors}) > 1 or vectors[0].ndim != 1 or not vectors[0].size:
            raise ValueError(f"{self.server.name}, {self.model}: vectors of different sizes came back, or empty ones")
        if not all(np.isfinite(vector).all() for vector in vectors):
            raise ValueError(f"{self.server.name}, {self.model}: a vector came back that is not finite")
        return vectors


def _batches(texts: Sequence[str]) -> Iterator[list[str]]:
    batch, num_bytes = [], 0
    for text in texts:
        size = len(text.encode())
        if batch and (len(batch) == BATCH_TEXTS or num_bytes + size > BATCH_BYTES):
            yield batch
            batch, num_bytes = [], 0
        batch.append(text)
        num_bytes += size
    if batch:
        yield batch
