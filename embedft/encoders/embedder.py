"""Tokenizer, encoder and pooling: texts in, vectors out, for training (`embed`) and for inference (`encode`).

    embedder = load_embedder("sentence-transformers/all-MiniLM-L6-v2")
    embedder.encode(["what is a limit order?"], role="query")      # [1, 384] float32
    vectors_WD, source_W = embedder.encode_passages(long_texts, (128, 64))    # windows of 128 tokens, every 64

Shapes: N texts, W windows of them, T tokens, B sequences, D features.
"""

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import device as devices
from ..progress import progress_bar
from .adapter import ROLES, Adapter, Base, check_role
from .at_once import AtOnce
from .card import write_card
from .dtypes import described_dtype, dtype_of
from .fingerprint import fingerprint, fingerprint_of_side, precision
from .folder import Source, write_folder
from .head import describe, width
from .layers import inference
from .packing import Packed, concatenate, encoded, pack, rows_by_length, sort_by_length
from .pooling import Pooling
from .store import Space, Store
from .token_cache import TokenCache, find_ids, find_windows, ids_ahead
from .token_ids import TokenIds
from .tokenization import Tokenizer


class Embedder(nn.Module):
    """Everything between a text and its vector: prompt, tokenizer, encoder, pooling, normalization and adapter.

    Args:
        encoder: packed tokens -> hidden states [T, D]; has `.config` with `hidden_size` and `max_length`.
        pooling: None: the mean.
        heads: {"query": what follows pooling, such as Dense layers (head.py), "document": ...}; may be the same object.
        prompts: {name: text to prepend}; those named "query" and "document" are used, by role.
        normalize: scale vectors to unit length; always true when `similarity` is "cosine".
        truncate_dim: leading features that `encode` returns by default; None: all.
        source: the folder it was loaded from; `save` needs it unless the encoder is of your own class.

    `store` and `token_cache` keep vectors and token ids, `adapter` maps the encoder's vectors, `lora` updates layers
    (both are trained too), and `query_side` has encoder, tokenizer, pooling and head for queries, while the Embedder's
    own are for documents: None unless set. `map_batches`, `device.fetched` unless set, calls `vectors_of` for every
    batch. Unless `autocast` is false, float32 weights on CUDA infer in bfloat16; vectors and losses stay float32."""

    def __init__(
        self,
        encoder: nn.Module,
        tokenizer: Tokenizer,
        *,
        pooling: Pooling | None = None,
        heads: Mapping[str, nn.Sequential] | None = None,
        prompts: Mapping[str, str] | None = None,
        similarity: str = "cosine",
        normalize: bool = True,
        truncate_dim: int | None = None,
        source: Source | None = None,
    ):
        super().__init__()
        if similarity not in ("cosine", "dot"):
            raise ValueError(f"similarity is {similarity!r}, expected one of cosine, dot")
        self.encoder, self.tokenizer, self.source = encoder, tokenizer, source
        self.pooling = pooling or Pooling(("mean",), encoder.config.hidden_size)
        self.heads = nn.ModuleDict(heads or dict.fromkeys(ROLES, nn.Sequential()))
        widths = {role: width(head, self.pooling.out_features) for role, head in self.heads.items()}
        if len({*widths.values()}) > 1:
            raise ValueError(f"vectors of queries have {widths['query']} features, documents {widths['document']}")
        self.prompts, self.similarity, self.autocast = dict(prompts or {}), similarity, True
        self.normalize = normalize or similarity == "cosine"
        self.adapter: Adapter | None = None
        self.query_side: Embedder | None = None
        self.lora: nn.Module | None = None
        self.store: Store | None = None
        self.token_cache: TokenCache | None = None
        self.map_batches: Callable[..., Iterable[np.ndarray]] = devices.fetched
        self.truncate_dim = None if truncate_dim is None else self._checked_dim(truncate_dim)
        self.at_once, self.max_length = AtOnce(), tokenizer.max_length

    @property
    def full_dim(self) -> int:
        """Features of a vector before truncation to `truncate_dim`."""
        return self.base_dim if self.adapter is None else self.adapter.out_features

    @property
    def base_dim(self) -> int:
        """Features of a vector before the adapter."""
        return width(self.heads["document"], self.pooling.out_features)

    @property
    def dim(self) -> int:
        """Features of the vectors that `encode` returns."""
        return self.truncate_dim or self.full_dim

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def max_length(self) -> int:
        """Texts are truncated to this many tokens, special tokens and prompt included; can be set."""
        return self.tokenizer.max_length

    @max_length.setter
    def max_length(self, value: int) -> None:
        if value > (limit := self.encoder.config.max_length):
            raise ValueError(f"max_length is {value}, expected at most the encoder's {limit} positions")
        before, self.tokenizer.max_length = self.max_length, value
        if getattr(self, "query_side", None) is not None and value != before:
            self.query_side.max_length = min(value, self.query_side.encoder.config.max_length)

    def side(self, role: str) -> "Embedder":
        """The Embedder whose encoder reads the texts of a role: `query_side`, if there is one and it is for them."""
        check_role(role)
        return self.query_side if role == "query" and self.query_side is not None else self

    def attach_query_side(self, side: "Embedder") -> None:
        """Encodes queries with another Embedder's encoder from now on; prompts, adapter and settings stay this one's.
        Raises `ValueError` unless its vectors are as wide as this one's."""
        if side.base_dim != self.base_dim:
            raise ValueError(f"vectors of queries have {side.base_dim} features, those of documents {self.base_dim}")
        self.query_side = side

    def _checked_dim(self, dim: int | None) -> int:
        dim = self.dim if dim is None else dim
        if not 1 <= dim <= self.full_dim:
            raise ValueError(f"dim is {dim}, expected 1 to {self.full_dim}")
        return dim

    def prompt(self, role: str) -> str:
        """The text prepended to every text of a role ("query" or "document"); "" if there is none."""
        check_role(role)
        return self.prompts.get(role) or ""

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of whole texts: no prompt, no special tokens, no truncation. For counting and for BM25."""
        return self.tokenizer.tokenize(texts)

    def _prompt_length(self, role: str, max_length: int) -> int | None:
        """How many leading tokens pooling leaves out of texts truncated to `max_length`; None: none."""
        prompt, side = self.prompt(role), self.side(role)
        if not prompt or side.pooling.include_prompt:
            return None
        if (prompt_length := side.tokenizer.prompt_length(prompt)) >= max_length - 1:
            raise ValueError(f"the {role} prompt has {prompt_length} tokens, max_length is {max_length}")
        return prompt_length

    def pack(self, texts: Sequence[str], *, role: str, passages: Sequence[int] | None = None) -> Packed:
        """Tokenizes and packs texts with their prompt, on the CPU; with `passages`, their windows, setting `source`."""
        side = self.side(role)
        if passages is None:
            return side._packed(find_ids(self, texts, role), self._prompt_length(role, side.max_length))
        windows, source = find_windows(self, texts, role, passages)
        return side._packed(windows, self._prompt_length(role, passages[0]), source=source)

    def _packed(self, ids: TokenIds, prompt_length: int | None, source: np.ndarray | None = None) -> Packed:
        # Only the mean of no token has a value, 0; and only an encoder without attention can do without any.
        empty = getattr(self.encoder, "reads_empty", False) and self.pooling.names == ("mean",)
        return pack(ids, prompt_length=prompt_length, source=source, allow_empty=empty)

    def embed(self, packed: Packed, *, role: str) -> Tensor:
        """Vectors of packed texts, [B, D], with gradient, all features; float32, or float64 if the weights are."""
        return self._adapted(self._finished(self.side(role)._pooled(packed, role), role), role)

    def embed_pair(self, queries: Packed, documents: Packed) -> tuple[Tensor, Tensor]:
        """Vectors of packed queries [B, D] and documents [M, D], in one forward pass if one encoder reads both."""
        sizes = [queries.num_sequences, documents.num_sequences]
        if self.query_side is not None or (0 not in sizes and self._lora("query") is not self._lora("document")):
            return self.embed(queries, role="query"), self.embed(documents, role="document")
        pooled = self._pooled(concatenate(queries, documents), ROLES[0] if sizes[0] else ROLES[1])
        parts = zip(ROLES, pooled.split(sizes), strict=True)
        Q, D = (self._adapted(self._finished(part, role), role) for role, part in parts)
        return Q, D

    def _lora(self, role: str) -> nn.Module | None:
        return self.lora if self.lora is not None and self.lora.serves(role) else None

    def _lowered(self, role: str) -> contextlib.AbstractContextManager:
        return devices.inference_autocast(self.device, next(self.side(role).parameters()).dtype, self.autocast)

    def _pooled(self, packed: Packed, role: str, lowered: Any = None) -> Tensor:
        sorted_packed, place_B = sort_by_length(packed)
        sorted_packed, lora = sorted_packed.to(self.device), self._lora(role)
        updated = contextlib.nullcontext() if lora is None else lora.applied(self.encoder)
        with updated, lowered or contextlib.nullcontext():
            hidden_TD = encoded(self.encoder, sorted_packed)
        return self.pooling(hidden_TD, sorted_packed)[devices.transfer([place_B], self.device)[0]]

    def _finished(self, pooled_BD: Tensor, role: str) -> Tensor:
        embeddings_BE = self.side(role).heads[role](pooled_BD)
        return F.normalize(embeddings_BE, dim=1) if self.normalize else embeddings_BE

    def _adapted(self, embeddings_BD: Tensor, role: str) -> Tensor:
        if self.adapter is None or self.adapter.map_of(role) is None:
            return embeddings_BD
        mapped_BE = self.adapter(embeddings_BD, role)
        return F.normalize(mapped_BE, dim=1) if self.normalize else mapped_BE

    def encode(
        self,
        texts: Sequence[str],
        *,
        role: str = "document",
        dim: int | None = None,
        batch_tokens: int | None = None,
        progress: bool | None = None,
        slice_texts: int = 16_384,
    ) -> np.ndarray:
        """Encodes texts into vectors [N, D] float32, in the same order; without dropout or gradient.

        A `store` keeps the encoder's full vectors, so each text is computed once; adapter and `dim` apply on reading.

        Args:
            role: "query" or "document": whose prompt to prepend.
            dim: leading features to keep (scaled to unit length again); None: `truncate_dim`, else all.
            batch_tokens: tokens per forward pass; None: depends on the device. A longer text is a batch of its own.
            progress: show a bar; None: when stderr is a terminal.
            slice_texts: texts tokenized and sorted by length at a time; bounds memory, apart from the result.

        Raises `ValueError` for a bad argument, or a vector that is not finite, naming its text."""
        embeddings_ND = np.empty((len(texts), self._checked_dim(dim)), dtype=np.float32)
        encoding = self._encoding(len(texts), role, dim=dim, batch_tokens=batch_tokens, progress=progress)
        with ids_ahead(self, texts, role, slice_texts) as ids, encoding as (vectors, bar):
            for start in range(0, max(1, len(texts)), slice_texts):
                part = slice(start, start + slice_texts)
                embeddings_ND[part] = vectors(texts[part], ids, bar.update)
                bar.update(min(start + slice_texts, len(texts)) - bar.n)
        return embeddings_ND

    def encode_passages(
        self, texts: list[str], passages: Sequence[int], *, role: str = "document", cut_texts: int = 64, **options: Any
    ) -> tuple[np.ndarray, np.ndarray]:
        """Vectors of the windows of texts, [W, D] float32, and the row of `texts` each is from, [W] int64 ascending.

        Each window is embedded as a text of its own. A `store` keeps windows by their token ids, whatever the stride.

        `passages`: (size, stride), as for `Tokenizer.windows`; `options`: dim, batch_tokens and progress, as for
        `encode`. `cut_texts` texts are cut at a time, and about 16 times as many windows encoded at a time.

        Source: Dai and Callan 2019, section 3: passages of a fixed size and stride, scored independently."""
        find_windows(self, [], role, passages)  # checks them even without texts
        parts, waiting, source = [np.empty((0, self._checked_dim(options.get("dim"))), dtype=np.float32)], [], []
        with self._encoding(len(texts), role, passages, **options) as (vectors, bar):
            for start in range(0, len(texts), cut_texts):
                windows, rows = find_windows(self, texts[start : start + cut_texts], role, passages)
                waiting, source = [*waiting, windows], [*source, start + rows]
                if sum(map(len, waiting)) >= 16 * cut_texts or start + cut_texts >= len(texts):
                    parts.append(vectors(*TokenIds.join(waiting).keyed(self.store is not None)))
                    bar.update(int(source[-1][-1]) + 1 - bar.n)
                    waiting = []
        return np.concatenate(parts), np.concatenate([np.empty(0, dtype=np.int64), *source])

    @contextlib.contextmanager
    def _encoding(self, num_texts, role, passages=None, *, dim=None, batch_tokens=None, progress=None) -> Iterator[Any]:
        """Inference mode; yields a function from keys of texts or windows to vectors [N, dim], and a progress bar."""
        dim, store, side = self._checked_dim(dim), self.store, self.side(role)
        space = store and self.space(role, texts="texts" if passages is None else "token ids")
        prompt_length = self._prompt_length(role, side.max_length if passages is None else passages[0])
        limit = devices.batch_tokens(self.device, dtype_of(self)) if batch_tokens is None else batch_tokens

        def vectors(keys: Sequence[str], tokens: Callable, done: Callable = lambda num_texts: None) -> np.ndarray:
            def compute(keys: Sequence[str]) -> np.ndarray:
                token_ids = tokens(keys)
                vectors_ND = np.empty((len(keys), self.base_dim), dtype=np.float32)
                rows_of = list(rows_by_length(token_ids.lengths(), limit))
                batches = ((token_ids.take(rows), role, prompt_length) for rows in rows_of)
                for rows, found in zip(rows_of, self.map_batches(self.vectors_of, batches), strict=True):
                    vectors_ND[rows] = found
                    if len(wrong := np.flatnonzero(~np.isfinite(vectors_ND[rows]).all(axis=1))):
                        row = rows[wrong[0]]
                        text = keys[row] if passages is None else side.tokenizer.backend.decode(token_ids[row].tolist())
                        raise ValueError(f"the vector of {text[:60]!r} is not finite: check the model's weights")
                    done(len(rows))
                return vectors_ND

            whole_ND = compute(keys) if store is None else store.read(space, store.fill(space, keys, compute))
            if self.adapter is None and dim == self.full_dim:
                return whole_ND
            cut_ND = self._adapted(torch.from_numpy(whole_ND).to(self.device), role)[:, :dim]
            return (F.normalize(cut_ND, dim=1) if dim < self.full_dim and self.normalize else cut_ND).cpu().numpy()

        with inference(self), progress_bar(num_texts, f"encode ({role})", unit="text", show=progress) as bar:
            yield vectors, bar

    def vectors_of(self, batch: tuple[TokenIds, str, int | None]) -> Tensor:
        """Vectors before the adapter, [B, D] float32, of token ids, a role, and a number of tokens not to pool."""
        (ids, role, prompt_length), side = batch, self.side(batch[1])
        devices.release_between_batches(self.device)

        def compute(ids: TokenIds) -> Tensor:
            pooled_BD = side._pooled(side._packed(ids, prompt_length), role, self._lowered(role))
            return self._finished(pooled_BD, role).float()

        return self.at_once(compute, self.device, ids)

    def _settings(self, role: str) -> dict[str, Any]:
        side = self.side(role)
        settings = {"prompt": self.prompt(role), "pooling": list(side.pooling.names)}
        settings |= {"max_length": side.max_length, "normalize": self.normalize}
        return settings | ({"head": describe(side.heads[role])} if len(side.heads[role]) else {})

    def _fingerprint(self, role: str, *, library: bool = True, **more: Any) -> str:
        return fingerprint_of_side(self, role, self._settings(role) | more, library=library)

    def space(self, role: str, *, texts: str = "texts") -> Space:
        """The space, in a `Store`, of the encoder's full vectors, before the adapter and truncation.
        Its fingerprint is recomputed on every call, so it follows training. `texts`: "token ids" for windows."""
        roles = " and ".join(other for other in ROLES if self.prompt(other) == self.prompt(role))
        description = {"model": self.source.name if self.source else "", "dtype": described_dtype(self), "role": roles}
        description |= self._settings(role) | ({} if texts == "texts" else {"texts": texts})
        with self._lowered(role):
            found = self._fingerprint(role, precision=precision(self.device), texts=texts)
        return Space(found, self.base_dim, description)

    def base(self) -> Base:
        """What an adapter records about this model; independent of precision and of embedft's own code."""
        fingerprints = {role: self._fingerprint(role, library=False) for role in ROLES}
        return Base(self.source.name if self.source else "", self.base_dim, fingerprints)

    def attach(self, adapter: Adapter, *, base: Base | None = None) -> None:
        """Maps vectors with `adapter` from now on, before truncation. Raises like `Adapter.check_base`.
        `base`: what the adapter must be for; None: this model, in its own precision."""
        adapter.check_base(self.base() if base is None else base)
        if self.truncate_dim is not None and self.truncate_dim > adapter.out_features:
            raise ValueError(f"truncate_dim is {self.truncate_dim}, the adapter gives {adapter.out_features} features")
        self.adapter = adapter.to(self.device)

    def sha256(self) -> str:
        """SHA-256 of everything that the vectors depend on except precision, as 64 hexadecimal digits."""
        parts = [self._fingerprint(role) for role in ROLES]
        if self.adapter is not None:
            settings = {name: part.settings for name, part in self.adapter.named_children()}
            parts.append(fingerprint([self.adapter], settings | {"normalize": self.adapter.normalize}))
        return hashlib.sha256(repr((parts, self.similarity, self.truncate_dim)).encode()).hexdigest()

    def save(self, folder: str | Path) -> None:
        """Writes a folder that `load_embedder` and sentence-transformers can read; an error changes nothing there.
        With an encoder of your own class (encoders/custom.py) only `load_embedder` can, where that class is importable.
        Raises `ValueError` if it is not, and for a nonlinear adapter, which Dense modules cannot express."""
        folder = Path(folder)
        write_folder(folder, self, lambda new: write_card(new, self, instead_of=folder))
