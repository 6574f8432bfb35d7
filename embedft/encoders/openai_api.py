"""Embeddings from an OpenAI-compatible server, by the contract of `Embedder.encode`: for `evaluate`, not for training.

Each call is paid for; nothing is kept here. The key comes from OPENAI_API_KEY, the server from `base_url` or
OPENAI_BASE_URL.

    embedder = ApiEmbedder("text-embedding-3-small")
    evaluate(embedder, dataset)
"""

import os
from collections.abc import Iterator, Sequence

import numpy as np

from ..progress import progress_bar

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
        ValueError: there is no key for api.openai.com.
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

        base_url = base_url or os.environ.get("OPENAI_BASE_URL")
        self.model, self.prompts = model, dict(prompts or {})
        self._key = os.environ.get("OPENAI_API_KEY")
        if not self._key and base_url is None:
            raise ValueError("OPENAI_API_KEY is not set, and api.openai.com wants a key (another server: base_url)")
        self._client = openai.OpenAI(
            api_key=self._key or "none", base_url=base_url, timeout=timeout_seconds, max_retries=MAX_RETRIES
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
                except openai.OpenAIError as error:
                    raise ValueError(f"{self._client.base_url} {self.model}: {self._redacted(error)}") from None
                by_place = sorted(answer.data, key=lambda item: item.index)
                if [item.index for item in by_place] != list(range(len(batch))):
                    raise ValueError(f"{self.model}: {len(by_place)} vectors came back for {len(batch)} texts")
                rows += [np.asarray(item.embedding, dtype=np.float32) for item in by_place]
                bar.update(len(batch))
        if not rows:
            raise ValueError("no texts to encode")
        embeddings_ND = np.stack(rows)
        if dim is not None and embeddings_ND.shape[1] != dim:
            raise ValueError(f"{self.model} gives {embeddings_ND.shape[1]} dimensions, asked for {dim}")
        lengths_N1 = np.linalg.norm(embeddings_ND, axis=1, keepdims=True)
        return embeddings_ND / np.maximum(lengths_N1, np.finfo(np.float32).tiny)

    def _redacted(self, error: Exception) -> str:
        """The error in one line; some servers quote the key that they did not like."""
        text = " ".join(str(error).split())
        return text.replace(self._key, "[key]") if self._key else text


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
