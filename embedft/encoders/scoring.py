"""Cross-encoders: a query and a document in one sequence, one score. Slower than vectors and sharper, so they rescore
what a search found, teach an embedder (`listwise_kl`), and tell hard negatives from unjudged answers.

    scorer = load_scorer("cross-encoder/ms-marco-MiniLM-L6-v2")
    scorer.score([("what is a limit order?", "A limit order ...")])      # [1] float32
    scorer.embed(scorer.pack_pairs(pairs), role="document")              # [P, 1] logits, with gradient

To losses and the training loop a scorer looks like an embedder with one feature: the "document" of a pair is its score,
every "query" is 1, and their dot product is the score. So every loss over listed documents trains it.

Shapes: P pairs, B queries, T tokens, D features.
"""

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import device as devices
from ..device import default_device, find_device
from ..files import replace_files, write_json
from ..progress import progress_bar
from .adapter import check_role, fill
from .at_once import AtOnce
from .card import write_card
from .classifier import FIELDS, LAYOUTS, Head, build_head, classifier_name, find_layout
from .dtypes import find_dtype
from .embedder import Embedder
from .fingerprint import fingerprint
from .folder import Source, encoder_parts, read_config, read_tokenizer
from .layers import inference
from .loading import find_folder
from .packing import Packed, encoded, pack, rows_by_length, sort_by_length
from .pooling import Pooling
from .schema import CONFIG_FILE, MODEL_CONFIG_FILE, check, read_fields
from .token_ids import TokenIds
from .tokenization import Tokenizer, check_texts
from .weights import WEIGHTS_FILE, read_encoder, write_tensors


class Scorer(nn.Module):
    """Tokenizer, encoder and head: pairs of texts in, scores out.

    `sigmoid`: whether `score` maps logits to 0 to 1; losses always get logits."""

    full_dim, normalize, similarity, autocast = 1, False, "dot", True  # as of an Embedder
    adapter = store = lora = query_side = token_cache = None

    def __init__(
        self,
        encoder: nn.Module,
        head: Head,
        tokenizer: Tokenizer,
        *,
        source: Source,
        pooling: Pooling,
        sigmoid: bool = True,
    ):
        super().__init__()
        self.encoder, self.head, self.tokenizer, self.source, self.sigmoid = encoder, head, tokenizer, source, sigmoid
        self.pooling, self.at_once = pooling, AtOnce()

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def side(self, role: str) -> "Scorer":
        """The scorer itself: one encoder reads both."""
        check_role(role)
        return self

    @property
    def max_length(self) -> int:
        """Pairs are truncated to this many tokens, the longer text first; can be set."""
        return self.tokenizer.max_length

    @max_length.setter
    def max_length(self, value: int) -> None:
        if value > (limit := self.encoder.config.max_length):
            raise ValueError(f"max_length is {value}, expected at most the encoder's {limit} positions")
        self.tokenizer.max_length = value

    def pack_pairs(self, pairs: Sequence[tuple[str, str]]) -> Packed:
        """Tokenizes and packs (query, document) pairs, on the CPU."""
        return self._pack(*self._tokens(pairs))

    def _tokens(self, pairs: Sequence[tuple[str, str]]) -> tuple[TokenIds, TokenIds]:
        """(token ids, token types) of the pairs. transformers scores decoders at the last token that is not padding,
        even if the tokenizer ends every text with it; under causal attention, what follows does not matter."""
        found, padding = self.tokenizer.encode_pairs(pairs), self.source.config.get("pad_token_id")
        if self.pooling.names == ("lasttoken",) and padding is not None:
            for ids, types in found:
                while len(ids) > 1 and ids[-1] == padding:
                    del ids[-1], types[-1]
        return TokenIds.of([ids for ids, _ in found]), TokenIds.of([types for _, types in found])

    def _pack(self, ids: TokenIds, types: TokenIds) -> Packed:
        """Packs token ids with their types, if the encoder distinguishes any."""
        packed, types_T = pack(ids), torch.from_numpy(types.ids).long()
        has_types = getattr(self.encoder.config, "type_vocab_size", 0) > 1 and types_T.any()
        return packed._replace(token_types=types_T) if has_types else packed

    def pack(self, texts: Sequence[str], *, role: str) -> Packed:
        """One token for each text: the queries of a training batch, which `embed` maps to 1 (see above)."""
        check_role(role)
        return pack([[0]] * len(check_texts(texts)))

    def embed(self, packed: Packed, *, role: str) -> Tensor:
        """Logits of packed pairs, [P, 1], with gradient; for role "query" a 1 for each sequence."""
        check_role(role)
        if role == "query":
            # With a gradient, which leads nowhere, because gradient caching asks every vector for one.
            return torch.ones(packed.num_sequences, 1, device=self.device, requires_grad=torch.is_grad_enabled())
        return self._logits(packed)

    def _logits(self, packed: Packed, lowered: contextlib.AbstractContextManager | None = None) -> Tensor:
        sorted_packed, place_P = sort_by_length(packed)
        sorted_packed = sorted_packed.to(self.device)
        with lowered or contextlib.nullcontext():
            hidden_TD = encoded(self.encoder, sorted_packed)
        pooled_PD = self.pooling(hidden_TD, sorted_packed)
        return self.head(pooled_PD.to(self.head.out.weight.dtype))[devices.transfer([place_P], self.device)[0]].float()

    def embed_pair(self, queries: Packed, documents: Packed) -> tuple[Tensor, Tensor]:
        """Ones [B, 1] and the logits of pairs [P, 1]."""
        return self.embed(queries, role="query"), self.embed(documents, role="document")

    def score(
        self,
        pairs: Sequence[tuple[str, str]],
        *,
        sigmoid: bool | None = None,
        batch_tokens: int | None = None,
        progress: bool | None = None,
        slice_pairs: int = 4_096,
    ) -> np.ndarray:
        """Scores of (query, document) pairs, [P] float32, in the same order; without dropout or gradient.

        Args:
            sigmoid: map logits to 0 to 1; None: as the model says.
            batch_tokens: tokens per forward pass; None: depends on the device. A longer pair is a batch of its own.
            progress: show a bar; None: when stderr is a terminal.
            slice_pairs: pairs tokenized and sorted by length at a time; bounds memory.

        Raises `ValueError` for what is not a pair of strings, or a score that is not finite, naming its query."""
        limit = devices.batch_tokens(self.device) if batch_tokens is None else batch_tokens
        sigmoid = self.sigmoid if sigmoid is None else sigmoid
        scores_P = np.empty(len(pairs), dtype=np.float32)

        def logits(ids: TokenIds, types: TokenIds) -> Tensor:
            lowered = devices.inference_autocast(self.device, self.head.out.weight.dtype, self.autocast)
            return self._logits(self._pack(ids, types), lowered)[:, 0]

        def scored(pair: tuple[TokenIds, TokenIds]) -> Tensor:
            devices.release_between_batches(self.device)
            logits_P = self.at_once(logits, self.device, *pair)
            return logits_P.sigmoid() if sigmoid else logits_P

        with inference(self), progress_bar(len(pairs), "score", unit="pair", show=progress) as bar:
            for start in range(0, len(pairs), slice_pairs):
                ids, types = self._tokens(pairs[start : start + slice_pairs])
                rows_of = list(rows_by_length(ids.lengths(), limit))
                found = devices.fetched(scored, ((ids.take(rows), types.take(rows)) for rows in rows_of))
                for rows, found_P in zip(rows_of, found, strict=True):
                    if len(wrong := np.flatnonzero(~np.isfinite(found_P))):
                        text = pairs[start + rows[wrong[0]]][0]
                        raise ValueError(f"the score of {text[:60]!r} is not finite: check the model's weights")
                    scores_P[[start + row for row in rows]] = found_P
                    bar.update(len(rows))
        return scores_P

    def sha256(self) -> str:
        """SHA-256 of everything that scores depend on except precision, as 64 hexadecimal digits."""
        config = sorted((field.name, getattr(self.encoder.config, field.name)) for field in fields(self.encoder.config))
        settings = {"config": config, "max_length": self.max_length, "tokenizer": self.tokenizer.sha256()}
        settings |= {"types": self.tokenizer.has_types, "pooling": self.pooling.names, "sigmoid": self.sigmoid}
        functions = [*self.pooling.functions, Tokenizer, pack, type(self)._logits]
        return fingerprint([self.encoder, self.head, self.pooling], settings, functions=functions)

    def save(self, folder: str | Path) -> None:
        """Writes a folder that `load_scorer`, transformers and sentence-transformers' CrossEncoder can read; an error
        changes nothing there."""
        layout = LAYOUTS[self.source.config["model_type"]]
        config, tensors = encoder_parts(self.encoder, self.source)
        tensors = {layout.prefix + name: x for name, x in tensors.items()}
        for name, x in self.head.state_dict().items():
            module, _, kind = name.partition(".")
            theirs = layout.names()[module]
            tensors[f"{layout.prefix * theirs.startswith('pooler.')}{theirs}.{kind}"] = x
        dtype = str(self.head.out.weight.dtype).removeprefix("torch.")
        labels = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
        activation = f"torch.nn.modules.{'activation.Sigmoid' if self.sigmoid else 'linear.Identity'}"
        more = {"torch_dtype": dtype, "dtype": dtype, "sentence_transformers": {"activation_fn": activation}}
        with replace_files(folder) as new:
            write_tensors(new / WEIGHTS_FILE, tensors)
            write_json(new / CONFIG_FILE, config | labels | more | classifier_name(config))
            self.tokenizer.save(new)
            write_card(new, self, instead_of=Path(folder))


def load_scorer(
    name: str | Path,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str = torch.float32,
    max_length: int | None = None,
    revision: str | None = None,
    allow_pickle: bool = False,
) -> Scorer:
    """A Scorer from a cross-encoder's folder or its name on the hub; arguments as for `load_embedder`, but no dtype
    "int8" or "auto". Raises `ValueError` for a model without a head of one label, or of a family without a layout."""
    if (kind := find_dtype(dtype)) in ("int8", "auto"):
        raise ValueError(f"dtype is {kind!r}, which a scorer cannot have: expected float32, bfloat16 or float16")
    dtype = getattr(torch, kind)
    folder = find_folder(str(name), revision=revision, allow_pickle=allow_pickle)
    family, config, values = read_config(folder)
    path = folder / CONFIG_FILE
    layout = find_layout(path, values["model_type"])
    check(path, values, FIELDS)
    labels = values.get("num_labels", len(values.get("id2label", "  ")))
    if labels != 1:
        raise ValueError(f"{path}: the model has {labels} labels, expected 1, a score")
    names = tuple(f"{theirs}." for theirs in layout.names().values())
    encoder, carried = read_encoder(folder, family, config, dtype, carried=names, allow_pickle=allow_pickle)
    head, pooling = build_head(layout, config, values, path)  # after the encoder, whose sizes are those of tensors
    head_names = {f"{theirs}.{k}": f"{ours}.{k}" for ours, theirs in layout.names().items() for k in ("weight", "bias")}
    tensors = {ours: carried.pop(theirs).to(dtype) for theirs, ours in head_names.items() if theirs in carried}
    fill(head.to(dtype), tensors, f"{folder / WEIGHTS_FILE} (the head)")
    tokenizer = read_tokenizer(folder, config, max_length)
    _check_pairs(folder, tokenizer, config)
    source = Source(str(name), folder, family, values, carried, None)
    options = {"source": source, "pooling": pooling, "sigmoid": _has_sigmoid(folder, values)}
    device = default_device() if device is None else find_device(str(device))
    return Scorer(encoder, head, tokenizer, **options).to(device).eval()


def _check_pairs(folder: Path, tokenizer: Tokenizer, config: Any) -> None:
    """Raises `ValueError` for a pair's token ids and types that the encoder has no vector for."""
    ids, types = tokenizer.encode_pairs([("a", "a")])[0]
    num_types = getattr(config, "type_vocab_size", 0)
    for what, found, field, size in (
        ("ids", ids, "vocab_size", config.vocab_size),
        ("types", types, "type_vocab_size", num_types if num_types > 1 else math.inf),
    ):
        if max(found, default=0) >= size:
            raise ValueError(f"{folder}: token {what} of a pair reach {max(found)}, the encoder's {field} is {size}")


def new_scorer(embedder: Embedder, *, seed: int = 0) -> Scorer:
    """A Scorer with the encoder of `embedder`, which it takes over, and a new head drawn with `seed`, to be trained.
    Raises `ValueError` if the embedder has no model folder, or one of a family without a layout."""
    if embedder.source is None:
        raise ValueError("the embedder was not loaded from a model folder, so its family is unknown")
    values, path = embedder.source.config, embedder.source.folder / CONFIG_FILE
    layout = find_layout(path, values["model_type"])
    with devices.seeded(seed, torch.device("cpu")):
        head, pooling = build_head(layout, embedder.encoder.config, values, path)
    names = tuple(f"{theirs}." for theirs in layout.names().values())
    kept = {name: x for name, x in embedder.source.carried.items() if not name.startswith(names)}
    source = embedder.source._replace(carried=kept)
    return Scorer(embedder.encoder, head, embedder.tokenizer, source=source, pooling=pooling).to(embedder.device)


def _has_sigmoid(folder: Path, values: Mapping[str, Any]) -> bool:
    """Whether scores are mapped to 0 to 1, which they are unless sentence-transformers' settings say otherwise. They
    are in a file of their own since version 6, and in config.json (`values`) before."""
    own = read_fields(folder / MODEL_CONFIG_FILE)
    if prompt := own.get("default_prompt_name"):
        found = f"default_prompt_name is {prompt[:60]!r}, expected none: no prompt precedes pairs"
        raise ValueError(f"{folder / MODEL_CONFIG_FILE}: {found}")
    older = (
        values.get("sentence_transformers", {}),
        {"activation_fn": values.get("sbert_ce_default_activation_function")},
    )
    name = next((name for settings in (own, *older) if (name := settings.get("activation_fn"))), "Sigmoid")
    kind = str(name).rpartition(".")[2]
    if kind not in ("Sigmoid", "Identity"):
        raise ValueError(f"{folder}: activation_fn is {kind[:60]!r}, expected Sigmoid or Identity")
    return kind == "Sigmoid"
