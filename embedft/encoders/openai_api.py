"""Embeddings from an OpenAI-compatible server, with the interface of `Embedder`; a store keeps what was paid for.

    embedder = ApiEmbedder("text-embedding-3-small", store=Store("embeddings"), price=0.02, max_cost=1.00)
    evaluate(embedder, dataset)
    print(embedder.costs)

Shapes: N texts, D features.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext

import numpy as np

from ..api.endpoint import Endpoint, EndpointConfig, Fetch
from ..progress import progress_bar
from ..vectors import unit_rows
from .adapter import ROLES, Adapter, Base, check_role
from .store import Space, Store
from .tokenization import check_texts


class ApiEmbedder:
    """A model behind POST /embeddings, with vectors of unit length. It cannot be trained: its weights are elsewhere.

    Args:
        prompts: {"query": ..., "document": ...}: text to prepend, for models that expect it.
        store: keeps each vector on arrival, so that no text is paid for twice; concurrent processes take turns.
        options: of `EndpointConfig`, such as base_url, dimensions, parameters, batch_texts, price and max_cost."""

    similarity = "cosine"

    def __init__(self, model: str, *, prompts: Mapping[str, str] | None = None, store: Store | None = None, **options):
        self.model, self.prompts, self.store = model, dict(prompts or {}), store
        self.endpoint = Endpoint(EndpointConfig(model, **options))
        self.costs = self.endpoint.costs
        self.adapter: Adapter | None = None

    @property
    def dim(self) -> int:
        """Features of `encode`'s vectors; 0 until known from `dimensions`, a reply or the store."""
        return max(self.space(role).dim for role in ROLES) if self.adapter is None else self.adapter.out_features

    def prompt(self, role: str) -> str:
        check_role(role)
        return self.prompts.get(role) or ""

    def space(self, role: str) -> Space:
        """What the server's vectors for a role depend on, as far as the client can tell; `dim` 0: not known yet."""
        settings = self.endpoint.settings(self.prompt(role))
        fingerprint = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
        roles = " and ".join(other for other in ROLES if self.prompt(other) == self.prompt(role))
        space = Space(fingerprint, self.endpoint.dim, {**settings, "role": roles})
        if not space.dim and self.store is not None and (stored := self.store.spaces().get(space.name)):
            self.endpoint.dim = stored.space.dim
        return space._replace(dim=self.endpoint.dim)

    def base(self) -> Base:
        """What an adapter records about this model, its own adapter aside."""
        fingerprints = {role: self.space(role).fingerprint for role in ROLES}
        return Base(self.endpoint.name, self.endpoint.dim, fingerprints)

    def attach(self, adapter: Adapter) -> None:
        """Maps vectors with `adapter` from now on. Raises `ValueError` if it is for another model or (known) width."""
        base = self.base()
        adapter.check_base(base._replace(dim=base.dim or adapter.in_features))
        self.adapter = adapter

    def encode(
        self, texts: Sequence[str], *, role: str = "document", dim: int | None = None, progress: bool | None = None
    ) -> np.ndarray:
        """Encodes texts into unit vectors [N, D] float32, in the same order; each distinct text is requested once.
        `role`, `dim` and `progress` as in `Embedder.encode`; a store keeps all features. Raises `ValueError` for an
        empty or refused text, a limit that is reached, or an error of the server, quoted without secrets."""
        rows: dict[str, int] = {}
        for row, text in enumerate(check_texts(texts)):
            rows.setdefault(text, row)
        if "" in rows:
            raise ValueError(f"texts[{rows['']}] is empty, which the API does not accept")
        self._check_dim(dim)
        if not rows and not self.endpoint.dim:
            raise ValueError("no texts to encode")
        vectors, missing, store = {}, self._missing(role, rows), self.store
        turn = store.turn(self.space(role)) if missing and store is not None else nullcontext()
        with turn, progress_bar(len(rows), f"encode ({role}, {self.model})", unit="text", show=progress) as bar:
            missing = self._missing(role, missing)  # another process may have fetched some meanwhile
            bar.update(len(rows) - len(missing))

            def keep(found: dict[str, np.ndarray]) -> None:
                new = dict(zip(found, unit_rows(np.stack(list(found.values()))).astype(np.float32), strict=True))
                if store is None:
                    vectors.update(new)
                else:
                    store.fill(self.space(role), list(new), lambda texts: np.stack([new[text] for text in texts]))
                self._check_dim(dim)
                bar.update(len(new))
                if (spent := self.endpoint.spent).prices is not None:
                    bar.set_postfix_str(f"cost {spent.cost + spent.open_cost:.4f}", refresh=False)

            if missing:
                Fetch(self.endpoint, missing, self.prompt(role), keep).run()
        if store is None:
            found_ND = np.array([vectors[text] for text in texts], np.float32).reshape(-1, self.endpoint.dim)
        else:
            before = store.hits
            found_ND = store.read(self.space(role), store.find(self.space(role), texts))
            self.costs.num_stored += store.hits - before
        if self.adapter is not None:
            found_ND = self.adapter.transform(found_ND, role)
        if dim in (None, found_ND.shape[1]):
            return found_ND
        short_ND = found_ND[:, :dim].astype(np.float64)
        if not (has_length_N := short_ND.any(axis=1)).all():
            raise ValueError(f"the first {dim} features of texts[{has_length_N.argmin()}] are all zero")
        return unit_rows(short_ND).astype(np.float32)

    def _check_dim(self, dim: int | None) -> None:
        if dim is not None and not 1 <= dim <= (self.dim or dim):
            raise ValueError(f"dim is {dim}, expected 1 to {self.dim or 'the full width'}")

    def _missing(self, role: str, rows: Mapping[str, int]) -> Mapping[str, int]:
        space = self.space(role)
        if self.store is None or not space.dim:
            return rows
        places = self.store.find(space, list(rows)).tolist()
        return {text: row for (text, row), place in zip(rows.items(), places, strict=True) if place < 0}
