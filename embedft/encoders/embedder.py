"""Tokenizer + encoder + pooling: texts in, vectors out, for training (`embed`) and for inference (`encode`).

Vectors have length one where similarity is the cosine, so the inner product is the similarity in every case. Not
here: where an Embedder comes from and how it is written (loading.py).

    embedder = load_embedder("sentence-transformers/all-MiniLM-L6-v2")
    embedder.encode(["what is a limit order?"], role="query")      # [1, 384] float32, unit length

Shapes: N texts, T tokens, B sequences, D features.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import device as devices
from ..progress import progress_bar
from .folder import Source, write_folder
from .packing import Packed, concatenate, pack, sort_by_length
from .pooling import POOLING_MODES, pool
from .tokenization import Tokenizer

ROLES = ("query", "document")
SIMILARITIES = ("cosine", "dot")
# Texts tokenised and sorted by length together: bounds what `encode` holds beside its result.
WINDOW_TEXTS = 16_384


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
        self.full_dim = encoder.config.hidden_size * len(self.pooling)
        self.truncate_dim = None if truncate_dim is None else self._checked_dim(truncate_dim)
        self.max_length = tokenizer.max_length

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
        if not prompt or self.include_prompt:
            return token_ids, None
        prompt_length = self.tokenizer.prompt_length(prompt)
        if prompt_length >= self.max_length - 1:
            raise ValueError(f"the {role} prompt has {prompt_length} tokens, max_length is {self.max_length}")
        return token_ids, prompt_length

    def pack(self, texts: Sequence[str], *, role: str) -> Packed:
        """Texts with their prompt as packed tokens, on the CPU, in the order given."""
        token_ids, prompt_length = self._token_ids(texts, role)
        return pack(token_ids, prompt_length=prompt_length)

    def embed(self, packed: Packed, *, role: str) -> Tensor:
        """Vectors of packed texts, [B, D], with gradient; float32, or float64 when the weights are.

        All features: `truncate_dim` is for `encode` alone, a loss truncates by itself.
        """
        _check_role(role)
        return self._embed(packed)

    def _embed(self, packed: Packed) -> Tensor:
        sorted_packed, place_B = sort_by_length(packed)
        sorted_packed = sorted_packed.to(self.device)
        embeddings_BD = pool(self.encoder(sorted_packed), sorted_packed, self.pooling)[place_B.to(self.device)]
        return F.normalize(embeddings_BD, dim=1) if self.normalize else embeddings_BD

    def embed_pair(self, queries: Packed, documents: Packed) -> tuple[Tensor, Tensor]:
        """Vectors of packed queries [B, D] and documents [M, D], in one forward pass of the encoder."""
        embeddings = self._embed(concatenate(queries, documents))
        return embeddings[: queries.num_sequences], embeddings[queries.num_sequences :]

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

        Memory beside the result: one window of 16,384 tokenised texts, and the activations of one batch.

        Args:
            texts: N texts; an empty one is its special tokens.
            role: "query" or "document": which prompt goes in front.
            dim: leading features to keep (scaled to length one again); None: `truncate_dim`, else all.
            batch_tokens: tokens of one forward pass; None: what suits the device. A longer text goes alone.
            progress: show a bar; None: when stderr is a terminal.
        """
        dim = self.dim if dim is None else self._checked_dim(dim)
        if batch_tokens is None:
            batch_tokens = devices.batch_tokens(self.device)
        embeddings_ND = np.empty((len(texts), dim), dtype=np.float32)
        was_training = self.training
        self.eval()
        try:
            with (
                torch.inference_mode(),
                progress_bar(len(texts), f"encode ({role})", unit="text", show=progress) as bar,
            ):
                for first in range(0, len(texts), WINDOW_TEXTS):
                    token_ids, prompt_length = self._token_ids(texts[first : first + WINDOW_TEXTS], role)
                    for rows in _batches([len(ids) for ids in token_ids], batch_tokens):
                        packed = pack([token_ids[row] for row in rows], prompt_length=prompt_length)
                        embeddings_BD = self.embed(packed, role=role)[:, :dim]
                        if dim < self.full_dim and self.normalize:
                            embeddings_BD = F.normalize(embeddings_BD, dim=1)
                        embeddings_ND[first + np.array(rows)] = embeddings_BD.float().cpu().numpy()
                        bar.update(len(rows))
        finally:
            self.train(was_training)
        return embeddings_ND

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
        """Writes the folder that sentence-transformers and `load_embedder` read; each file atomically."""
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
        )


def _check_role(role: str) -> None:
    if role not in ROLES:
        raise ValueError(f"role is {role!r}, expected one of {', '.join(ROLES)}")


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
