"""Tokenizer + encoder + pooling: texts in, vectors out, for training (`embed`) and for inference (`encode`).

Vectors have length one where similarity is the cosine, so the inner product is the similarity in every case. Not
here: where an Embedder comes from and how it is written (loading.py).

    embedder = load_embedder("sentence-transformers/all-MiniLM-L6-v2")
    embedder.encode(["what is a limit order?"], role="query")      # [1, 384] float32, unit length
    vectors_WD, source_W = embedder.encode_passages(long_texts, (128, 64))    # windows of 128 tokens, one every 64

Shapes: N texts, W windows of them, T tokens, B sequences, D features.
"""

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import device as devices
from ..progress import progress_bar
from .adapter import Adapter, Base
from .fingerprint import precision, weights_sha256
from .folder import Source, write_folder
from .packing import Packed, concatenate, pack, sort_by_length
from .pooling import POOLING_MODES, pool
from .store import Space, Store
from .tokenization import Tokenizer

ROLES = ("query", "document")
SIMILARITIES = ("cosine", "dot")
# Texts tokenised and sorted by length together: bounds what `encode` holds beside its result.
WINDOW_TEXTS = 16_384
# Texts cut into windows together, as long as books perhaps, and windows encoded together, almost all of one length.
CUT_TEXTS, CUT_WINDOWS = 64, 1_024


class Embedder(nn.Module):
    """A text encoder with everything it needs to go from text to vector.

    Args:
        encoder: packed tokens -> hidden states [T, D]; has `.config` with `hidden_size` and `max_length`.
        tokenizer: the one the weights were trained with.
        pooling: modes of pooling.py; several are concatenated in the order given.
        include_prompt: whether pooling counts the prompt's tokens.
        prompts: {name: text in front}; "query" and "document" are used, by role, as sentence-transformers does.
        similarity: "cosine" or "dot".
        normalize: scale vectors to length one; always so when similarity is "cosine".
        truncate_dim: leading dimensions that `encode` gives unless asked otherwise; None: all.
        source: where it comes from, and what `save` puts back; None: it cannot be saved.

    `store` (None unless set): where `encode` looks for vectors first, and keeps those that it computes. `adapter` (None
    unless attached): what the encoder's vectors go through; its weights are among the parameters.
    """

    def __init__(
        self,
        encoder: nn.Module,
        tokenizer: Tokenizer,
        *,
        pooling: Sequence[str] = ("mean",),
        include_prompt: bool = True,
        prompts: Mapping[str, str] | None = None,
        similarity: str = "cosine",
        normalize: bool = True,
        truncate_dim: int | None = None,
        source: Source | None = None,
    ):
        super().__init__()
        for mode in pooling:
            if mode not in POOLING_MODES:
                raise ValueError(f"pooling mode is {mode!r}, expected one of {', '.join(POOLING_MODES)}")
        if similarity not in SIMILARITIES:
            raise ValueError(f"similarity is {similarity!r}, expected one of {', '.join(SIMILARITIES)}")
        self.encoder, self.tokenizer, self.source = encoder, tokenizer, source
        self.pooling = tuple(pooling)
        self.include_prompt, self.prompts = include_prompt, dict(prompts or {})
        self.similarity = similarity
        self.normalize = normalize or similarity == "cosine"
        self.base_dim = encoder.config.hidden_size * len(self.pooling)
        self.adapter: Adapter | None = None
        self.truncate_dim = None if truncate_dim is None else self._checked_dim(truncate_dim)
        self.max_length = tokenizer.max_length
        self.store: Store | None = None

    @property
    def full_dim(self) -> int:
        """Features of a vector before it is cut: the encoder's, `base_dim`, or those that the adapter makes of them."""
        return self.base_dim if self.adapter is None else self.adapter.out_features

    @property
    def dim(self) -> int:
        """Features of a vector that `encode` gives."""
        return self.truncate_dim or self.full_dim

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def max_length(self) -> int:
        """Tokens that a text is cut to, special tokens and prompt included; may be set."""
        return self.tokenizer.max_length

    @max_length.setter
    def max_length(self, value: int) -> None:
        limit = self.encoder.config.max_length
        if value > limit:
            raise ValueError(f"max_length is {value}, expected at most the encoder's {limit} positions")
        self.tokenizer.max_length = value

    def _checked_dim(self, dim: int) -> int:
        if not 1 <= dim <= self.full_dim:
            raise ValueError(f"dim is {dim}, expected 1 to {self.full_dim}")
        return dim

    def prompt(self, role: str) -> str:
        """The text put in front of every text of a role ("query" or "document"); "" when there is none."""
        _check_role(role)
        return self.prompts.get(role) or ""

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of whole texts: no prompt, no special tokens, no truncation. For counting and for BM25."""
        return self.tokenizer.words(texts)

    def _token_ids(self, texts: Sequence[str], role: str) -> tuple[list[list[int]], int | None]:
        """Token ids ready for the encoder, and how many in front pooling leaves out (None: all count)."""
        prompt = self.prompt(role)
        token_ids = self.tokenizer.encode([prompt + text for text in texts] if prompt else texts)
        return token_ids, self._left_out(role, self.max_length)

    def _left_out(self, role: str, length: int) -> int | None:
        """The tokens in front that pooling leaves out (None: all count) of texts cut to `length`."""
        prompt = self.prompt(role)
        if not prompt or self.include_prompt:
            return None
        prompt_length = self.tokenizer.prompt_length(prompt)
        if prompt_length >= length - 1:
            raise ValueError(f"the {role} prompt has {prompt_length} tokens, max_length is {length}")
        return prompt_length

    def pack(self, texts: Sequence[str], *, role: str, passages: Sequence[int] | None = None) -> Packed:
        """Texts with their prompt as packed tokens, on the CPU, in the order given.

        With `passages` (size and stride, as in `encode_passages`) the sequences are windows of the texts, and `source`
        [B] says which text each is from.
        """
        if passages is None:
            token_ids, prompt_length = self._token_ids(texts, role)
            return pack(token_ids, prompt_length=prompt_length)
        windows, source = self._windows(texts, role, passages)
        return pack(windows, prompt_length=self._left_out(role, passages[0]), source=source)

    def _windows(self, texts: Sequence[str], role: str, passages: Sequence[int]) -> tuple[list[list[int]], list[int]]:
        size, stride = _checked_passages(passages)
        return self.tokenizer.windows(texts, size=size, stride=stride, prompt=self.prompt(role))

    def embed(self, packed: Packed, *, role: str) -> Tensor:
        """Vectors of packed texts, [B, D], with gradient; float32, or float64 when the weights are.

        All features: `truncate_dim` is for `encode` alone, a loss truncates by itself.
        """
        _check_role(role)
        return self._adapted(self._embed(packed), role)

    def _embed(self, packed: Packed) -> Tensor:
        sorted_packed, place_B = sort_by_length(packed)
        sorted_packed = sorted_packed.to(self.device)
        embeddings_BD = pool(self.encoder(sorted_packed), sorted_packed, self.pooling)[place_B.to(self.device)]
        return F.normalize(embeddings_BD, dim=1) if self.normalize else embeddings_BD

    def _adapted(self, embeddings_BD: Tensor, role: str) -> Tensor:
        if self.adapter is None or self.adapter.map_of(role) is None:
            return embeddings_BD
        mapped_BE = self.adapter(embeddings_BD, role)
        return F.normalize(mapped_BE, dim=1) if self.normalize else mapped_BE

    def embed_pair(self, queries: Packed, documents: Packed) -> tuple[Tensor, Tensor]:
        """Vectors of packed queries [B, D] and documents [M, D], in one forward pass of the encoder."""
        embeddings = self._embed(concatenate(queries, documents))
        Q, D = embeddings[: queries.num_sequences], embeddings[queries.num_sequences :]
        return self._adapted(Q, "query"), self._adapted(D, "document")

    def encode(
        self,
        texts: Sequence[str],
        *,
        role: str = "document",
        dim: int | None = None,
        batch_tokens: int | None = None,
        progress: bool | None = None,
    ) -> np.ndarray:
        """Vectors of texts, [N, D] float32, in the order given; without dropout, without gradient.

        With a `store`, each text is computed once, ever: the store keeps the encoder's vectors whole, and they are cut
        as they are read. Memory beside the result: one window of 16,384 tokenised texts, with a store their vectors
        too, and the activations of one batch.

        Args:
            texts: N texts; an empty one is its special tokens.
            role: "query" or "document": which prompt goes in front.
            dim: leading features to keep (scaled to length one again); None: `truncate_dim`, else all.
            batch_tokens: tokens of one forward pass; None: what suits the device. A longer text goes alone.
            progress: show a bar; None: when stderr is a terminal.
        """
        dim = self.dim if dim is None else self._checked_dim(dim)
        embeddings_ND = np.empty((len(texts), dim), dtype=np.float32)
        space = None if self.store is None else self.space(role)
        with self._inference(), progress_bar(len(texts), f"encode ({role})", unit="text", show=progress) as bar:
            if space is None:
                for rows, whole_BD in self._computed(texts, role, batch_tokens, bar.update):
                    embeddings_ND[rows] = self._finished(whole_BD, dim, role).float().cpu().numpy()
            else:
                rows_N = self.store.fill(space, texts, lambda new: self._whole(new, role, batch_tokens, bar.update))
                bar.update(len(texts) - bar.n)
                for first in range(0, len(texts), WINDOW_TEXTS):
                    window = slice(first, first + WINDOW_TEXTS)
                    embeddings_ND[window] = self._read(space, rows_N[window], dim, role)
        return embeddings_ND

    def encode_passages(
        self,
        texts: Sequence[str],
        passages: Sequence[int],
        *,
        role: str = "document",
        dim: int | None = None,
        batch_tokens: int | None = None,
        progress: bool | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Vectors of the windows of texts, [W, D] float32, and the row of `texts` that each is from, [W] int64 rising.

        A window is what `Tokenizer.windows` cuts; its vector is that of a text of its own. With a `store` a window is
        kept under its token ids, so once for all sizes and strides that have it. Memory beside the result: its rows a
        second time while they are put together, and what `encode` holds.

        Args:
            texts: N texts; one that fits is one window, an empty one too.
            passages: (size, stride): tokens of a window at most, special tokens and prompt included, and tokens of
                text from the start of a window to that of the next.
            role, dim, batch_tokens, progress: as in `encode`.

        Raises:
            ValueError: a size beyond `max_length` or without room for text; a stride below 1 or above the size.

        Source: Dai and Callan 2019 (Deeper text understanding for IR with contextual neural language modeling),
        section 3: passages of a window and a stride, scored each for itself.
        """
        dim = self.dim if dim is None else self._checked_dim(dim)
        self._windows([], role, passages)  # tells what is wrong with `passages`, texts or not
        prompt_length = self._left_out(role, passages[0])
        space = None if self.store is None else self._window_space(role)
        parts, sources = [np.empty((0, dim), dtype=np.float32)], [np.empty(0, dtype=np.int64)]

        def compute(windows: Sequence[Sequence[int]], finish: Callable[[Tensor], Tensor], width: int) -> np.ndarray:
            vectors = np.empty((len(windows), width), dtype=np.float32)
            for rows, whole_BD in self._batched(windows, prompt_length, batch_tokens):
                vectors[rows] = finish(whole_BD).float().cpu().numpy()
            return vectors

        def of_keys(keys: Sequence[str]) -> np.ndarray:
            return compute([list(map(int, key.split())) for key in keys], lambda whole_BD: whole_BD, self.base_dim)

        with self._inference(), progress_bar(len(texts), f"encode ({role})", unit="text", show=progress) as bar:
            for windows, source in self._cut(texts, role, passages):
                if space is None:
                    parts.append(compute(windows, lambda whole_BD: self._finished(whole_BD, dim, role), dim))
                else:
                    rows_W = self.store.fill(space, [" ".join(map(str, ids)) for ids in windows], of_keys)
                    parts.append(self._read(space, rows_W, dim, role))
                sources.append(np.array(source))
                bar.update(source[-1] + 1 - bar.n)
        return np.concatenate(parts), np.concatenate(sources)

    def _cut(
        self, texts: Sequence[str], role: str, passages: Sequence[int]
    ) -> Iterator[tuple[list[list[int]], list[int]]]:
        """Windows of texts and their rows, about CUT_WINDOWS at a time."""
        windows, source = [], []
        for first in range(0, len(texts), CUT_TEXTS):
            cut, rows = self._windows(texts[first : first + CUT_TEXTS], role, passages)
            windows += cut
            source += [first + row for row in rows]
            if len(windows) >= CUT_WINDOWS or first + CUT_TEXTS >= len(texts):
                yield windows, source
                windows, source = [], []

    @contextlib.contextmanager
    def _inference(self) -> Iterator[None]:
        """Without dropout and without gradient."""
        was_training = self.training
        self.eval()
        try:
            with torch.inference_mode():
                yield
        finally:
            self.train(was_training)

    def _computed(
        self, texts: Sequence[str], role: str, batch_tokens: int | None, done: Callable[[int], object]
    ) -> Iterator[tuple[np.ndarray, Tensor]]:
        """(rows of `texts`, their vectors [B, D]), batch by batch; `done` hears how many."""
        for first in range(0, len(texts), WINDOW_TEXTS):
            for rows, whole_BD in self._batched(
                *self._token_ids(texts[first : first + WINDOW_TEXTS], role), batch_tokens
            ):
                yield first + rows, whole_BD
                done(len(rows))

    def _batched(
        self, token_ids: Sequence[Sequence[int]], prompt_length: int | None, batch_tokens: int | None
    ) -> Iterator[tuple[np.ndarray, Tensor]]:
        """(rows of `token_ids`, their vectors [B, D]), batch by batch, longest first."""
        batch_tokens = devices.batch_tokens(self.device) if batch_tokens is None else batch_tokens
        for rows in _batches([len(ids) for ids in token_ids], batch_tokens):
            yield np.array(rows), self._embed(pack([token_ids[row] for row in rows], prompt_length=prompt_length))

    def _read(self, space: Space, rows: np.ndarray, dim: int, role: str) -> np.ndarray:
        """Vectors of rows of the store, as `encode` gives them."""
        whole_BD = torch.from_numpy(self.store.read(space, rows)).to(self.device)
        return self._finished(whole_BD, dim, role).cpu().numpy()

    def _whole(
        self, texts: Sequence[str], role: str, batch_tokens: int | None, done: Callable[[int], object]
    ) -> np.ndarray:
        """Vectors of texts, all features of the encoder, [N, D] float32: what a store keeps."""
        whole_ND = np.empty((len(texts), self.base_dim), dtype=np.float32)
        for rows, whole_BD in self._computed(texts, role, batch_tokens, done):
            whole_ND[rows] = whole_BD.float().cpu().numpy()
        return whole_ND

    def _finished(self, whole_BD: Tensor, dim: int, role: str) -> Tensor:
        """Vectors as `encode` gives them, of vectors of the encoder: adapted, cut, and of length one again."""
        cut_BD = self._adapted(whole_BD, role)[:, :dim]
        return F.normalize(cut_BD, dim=1) if dim < self.full_dim and self.normalize else cut_BD

    def space(self, role: str) -> Space:
        """What the vectors of a role are of, for a `Store`: whole vectors, before they are cut.

        The fingerprint is over every weight, the encoder's configuration, the tokenizer, pooling, the role's prompt,
        the maximum length, and the precision that torch is set to. It is taken anew each time, so that a training step
        is never missed (0.05 s for 90 MB of weights: SHA-256, one core of an EPYC, 2026-11-21).
        """
        return self._space(role, precision(self.device))

    def _space(self, role: str, arithmetic: tuple[str, ...]) -> Space:
        prompt, weights = self.prompt(role), weights_sha256(self.encoder)
        encoder = (weights, type(self.encoder).__qualname__, self.encoder.config)
        settings = (self.pooling, self.include_prompt, prompt, self.max_length, self.normalize, arithmetic)
        digest = hashlib.sha256(repr((*encoder, *settings, self.tokenizer.backend.to_str())).encode())
        description = {
            "model": "" if self.source is None else self.source.name,
            "weights": weights,
            "dtype": str(next(self.parameters()).dtype).removeprefix("torch."),
            "role": " and ".join(other for other in ROLES if self.prompt(other) == prompt),
            "prompt": prompt,
            "max_length": self.max_length,
            "pooling": list(self.pooling),
            "normalize": self.normalize,
        }
        return Space(digest.hexdigest(), self.base_dim, description)

    def _window_space(self, role: str) -> Space:
        """What the vectors of windows are of: the texts of this space are token ids, special tokens and all."""
        space = self.space(role)
        fingerprint = hashlib.sha256(f"token ids, {space.fingerprint}".encode()).hexdigest()
        return space._replace(fingerprint=fingerprint, description={**space.description, "texts": "token ids"})

    def base(self) -> Base:
        """What an adapter notes of the model that it is for: this one, however torch multiplies, without an adapter."""
        name = "" if self.source is None else self.source.name
        return Base(name, self.base_dim, {role: self._space(role, ()).fingerprint for role in ROLES})

    def attach(self, adapter: Adapter) -> None:
        """Has vectors go through `adapter`, in `encode` and in training, before they are cut.

        Raises `ValueError` for an adapter of another model or width; warns when it does not say which it is for.
        """
        adapter.check_base(self.base())
        if self.truncate_dim is not None and self.truncate_dim > adapter.out_features:
            raise ValueError(f"truncate_dim is {self.truncate_dim}, the adapter gives {adapter.out_features} features")
        self.adapter = adapter.to(self.device)

    def sha256(self) -> str:
        """A hash of all that its vectors depend on: weights, tokenizer, pooling, prompts, lengths. 64 hex digits."""
        digest = hashlib.sha256()
        for name, tensor in self.state_dict().items():
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
        settings = (self.pooling, self.include_prompt, self.prompts, self.normalize, self.max_length, self.truncate_dim)
        digest.update(repr((self.tokenizer.backend.to_str(), *settings)).encode())
        return digest.hexdigest()

    def save(self, folder: str | Path) -> None:
        """Writes the folder that sentence-transformers and `load_embedder` read; each file atomically.

        An adapter is written twice: as `adapter/`, and for sentence-transformers as Dense modules of a Router, which
        needs linear maps.
        """
        if self.source is None:
            raise ValueError("this Embedder was not loaded from a model folder, so it cannot be saved as one")
        write_folder(
            Path(folder),
            self.source,
            self.encoder,
            self.tokenizer,
            pooling=self.pooling,
            include_prompt=self.include_prompt,
            prompts=self.prompts,
            similarity=self.similarity,
            normalize=self.normalize,
            truncate_dim=self.truncate_dim,
            adapter=self.adapter,
            base=None if self.adapter is None else self.base(),
        )


def _check_role(role: str) -> None:
    if role not in ROLES:
        raise ValueError(f"role is {role!r}, expected one of {', '.join(ROLES)}")


def _checked_passages(passages: Sequence[int]) -> tuple[int, int]:
    numbers = tuple(passages) if isinstance(passages, Sequence) else ()
    if len(numbers) != 2 or not all(isinstance(x, int | np.integer) and not isinstance(x, bool) for x in numbers):
        raise ValueError(f"passages is {passages!r}, expected (size, stride), two whole numbers of tokens")
    return numbers


def _batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Rows in order of length, longest first, cut where the tokens would exceed `batch_tokens`."""
    batch, num_tokens = [], 0
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if batch and num_tokens + lengths[row] > batch_tokens:
            yield batch
            batch, num_tokens = [], 0
        batch.append(row)
        num_tokens += lengths[row]
    if batch:
        yield batch
