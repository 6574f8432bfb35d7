"""Embeddings of an OpenAI-compatible server, by the contract of `Embedder.encode`; with a store nothing is paid twice.

Here: which texts are asked for, and what is kept of the answers. Deliberately not here: the asking (endpoint.py),
vectors on disk (store.py); and no training, for the weights are elsewhere. Server and key: see server.py.

    embedder = ApiEmbedder("text-embedding-3-small", store=Store("embeddings"), price=0.02, max_cost=1.00)
    evaluate(embedder, dataset)
    print(embedder.costs)

Shapes: N texts, D features.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np

from ..api.embedding_reply import unit_rows
from ..api.endpoint import ApiCosts, Endpoint
from ..progress import progress_bar
from .adapter import Adapter, Base
from .embedder import ROLES
from .store import Space, Store


class ApiEmbedder:
    """A model behind POST /embeddings. Vectors are scaled to length one.

    Args:
        model: the name that the server knows.
        prompts: {"query": ..., "document": ...}: text in front, for models that want it.
        store: keeps every vector the moment it arrives, so that no text is paid for twice, however a run ends; of
            several processes one asks, the others wait and look again.
        options: of the `Endpoint`: base_url, dimensions, parameters, too_long, max_tokens, batch_texts, concurrency,
            requests_per_minute, tokens_per_minute, price, max_cost, ledger, max_attempts, timeout_seconds.

    `store` may be set. `adapter` (None unless attached): what the server's vectors go through.

    Raises:
        ValueError: no address of a server, no key for api.openai.com, or a setting out of range.
    """

    similarity = "cosine"

    def __init__(
        self, model: str, *, prompts: Mapping[str, str] | None = None, store: Store | None = None, **options: Any
    ):
        self.endpoint = Endpoint(model, **options)
        self.model, self.prompts, self.store = model, dict(prompts or {}), store
        self.adapter: Adapter | None = None

    @property
    def costs(self) -> ApiCosts:
        """What was asked for and paid so far, by this object."""
        return self.endpoint.costs

    @property
    def dim(self) -> int:
        """Features of a vector that `encode` gives; 0 while neither `dimensions`, an answer, nor the store says."""
        return self._whole_dim() if self.adapter is None else self.adapter.out_features

    def _whole_dim(self) -> int:
        """Features of the server's vectors; 0: not known yet."""
        if not self.endpoint.dim and self.store is not None:
            stored = self.store.spaces()
            names = [self._space(role).name for role in ROLES]
            self.endpoint.dim = next((stored[name].space.dim for name in names if name in stored), 0)
        return self.endpoint.dim

    def prompt(self, role: str) -> str:
        """The text put in front of every text of a role ("query" or "document"); "" when there is none."""
        if role not in ROLES:
            raise ValueError(f"role is {role!r}, expected one of {', '.join(ROLES)}")
        return self.prompts.get(role) or ""

    def space(self, role: str) -> Space:
        """What the vectors of a role are of, for a `Store`: the server's, before they are cut or mapped.

        The fingerprint is over the server's address without credentials, the model's name, `dimensions`, the role's
        prompt, and what becomes of long texts; where they are cut, `max_tokens` and the tokenizer too. Its `dim` is 0
        while nothing says what it is (see `dim`). A server that changes the model behind a name shows in nothing else.
        """
        return self._space(role)._replace(dim=self._whole_dim())

    def _space(self, role: str) -> Space:
        prompt = self.prompt(role)
        settings = self.endpoint.settings(prompt)
        fingerprint = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
        roles = " and ".join(other for other in ROLES if self.prompt(other) == prompt)
        return Space(fingerprint, self.endpoint.dim, {**settings, "role": roles})

    def base(self) -> Base:
        """What an adapter notes of the model that it is for: this one, without the adapter that it may have."""
        return Base(self.endpoint.name, self._whole_dim(), {role: self._space(role).fingerprint for role in ROLES})

    def attach(self, adapter: Adapter) -> None:
        """Has vectors go through `adapter`, before they are cut.

        Raises `ValueError` for an adapter of another model or, where it is known already, another width; warns when it
        does not say which model it is for.
        """
        base = self.base()
        adapter.check_base(base._replace(dim=base.dim or adapter.in_features))
        self.adapter = adapter

    def encode(
        self, texts: Sequence[str], *, role: str = "document", dim: int | None = None, progress: bool | None = None
    ) -> np.ndarray:
        """Vectors of N texts, [N, D] float32 of unit length, in the order given. Each distinct text is asked for once.

        Args:
            role: "query" or "document": which prompt goes in front.
            dim: leading features to keep, of length one again; cut here, of what the store keeps whole. None: all.
            progress: show a bar; None: when stderr is a terminal.

        Raises:
            ValueError: a text that is empty, no string or too long; a limit reached; or what the server answered, in
                one line without the key. What came by then is in the store.
        """
        rows, prompt = _first_rows(texts), self.prompt(role)
        if dim is not None and not 1 <= dim <= (self.dim or dim):
            raise ValueError(f"dim is {dim}, expected 1 to {self.dim or 'what the server gives'}")
        if not rows and not self.dim:
            raise ValueError("no texts to encode")
        missing, vectors = self._missing(role, rows), {}

        def keep(new: dict[str, np.ndarray]) -> None:
            if self.store is None:
                vectors.update(new)
            else:
                self.store.fill(self.space(role), list(new), lambda texts: np.stack([new[text] for text in texts]))

        alone = self.store.turn(self._space(role)) if missing and self.store is not None else nullcontext()
        name = f"encode ({role}, {self.model})"
        with alone, progress_bar(len(rows), name, unit="text", show=progress) as bar:
            missing = self._missing(role, missing)  # another process may have asked for some meanwhile
            bar.update(len(rows) - len(missing))

            def done(num_texts: int, cost: str) -> None:
                bar.update(num_texts)
                bar.set_postfix_str(cost and f"cost {cost}", refresh=False)

            least_dim = 1 if dim is None or self.adapter is not None else dim
            self.endpoint.fetch(missing, prompt=prompt, keep=keep, done=done, least_dim=least_dim)
        if self.store is None:
            whole_ND = np.empty((len(texts), self.endpoint.dim), dtype=np.float32)
            for row, text in enumerate(texts):
                whole_ND[row] = vectors[text]
        else:
            whole_ND = self.store.read(self.space(role), self.store.find(self.space(role), texts))
            num_stored = len(texts) - len(missing)
            self.store.hits += num_stored
            self.costs.num_stored += num_stored
        mapped_ND = whole_ND if self.adapter is None else self.adapter.transform(whole_ND, role)
        return mapped_ND if dim is None else _shortened(mapped_ND, dim)

    def _missing(self, role: str, rows: Mapping[str, int]) -> Mapping[str, int]:
        """What is not stored."""
        space = self.space(role)
        if self.store is None or not space.dim:
            return rows
        found = self.store.find(space, list(rows))
        return {text: row for (text, row), place in zip(rows.items(), found, strict=True) if place < 0}


def _first_rows(texts: Sequence[str]) -> dict[str, int]:
    """{text: where it first stands}. Raises `ValueError` for what cannot be sent."""
    if isinstance(texts, str):
        raise ValueError("texts is a str, expected a list of str")
    rows: dict[str, int] = {}
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"texts[{row}] is a {type(text).__name__}, expected a str")
        if not text:
            raise ValueError(f"texts[{row}] is empty, which the API does not take")
        if text not in rows:
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise ValueError(f"texts[{row}] has a lone surrogate at character {error.start}") from None
            rows[text] = row
    return rows


def _shortened(embeddings_ND: np.ndarray, dim: int) -> np.ndarray:
    """The leading features, of length one again. Raises `ValueError` for a vector that has nothing there."""
    if dim == embeddings_ND.shape[1]:
        return embeddings_ND
    if dim > embeddings_ND.shape[1]:
        raise ValueError(f"dim is {dim}, expected 1 to {embeddings_ND.shape[1]}")
    unit_ND, is_good_N = unit_rows(embeddings_ND[:, :dim].astype(np.float64))
    if not is_good_N.all():
        raise ValueError(f"the first {dim} features of texts[{int(is_good_N.argmin())}] are all zero")
    return unit_ND
