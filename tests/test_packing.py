"""packing.py against lists of lists."""

import itertools
import random

import numpy as np
import pytest
import torch
from families import tiny_encoder
from naming import naming

from embedft import device as devices
from embedft.encoders.packing import (
    Packed,
    concatenate,
    cut_by_tokens,
    encoded,
    pack,
    sort_by_length,
    take,
)
from embedft.encoders.token_ids import TokenIds


def random_sequences(seed: int, count: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(1000) for _ in range(rng.randint(1, 9))] for _ in range(count)]


def unpack(packed: Packed, name: str = "input_ids") -> list[list[int]]:
    """The sequences of a batch, cut as `cu_seqlens` says."""
    edges = packed.cu_seqlens.tolist()
    return [getattr(packed, name)[start:end].tolist() for start, end in itertools.pairwise(edges)]


def assert_equal(found: Packed, expected: Packed) -> None:
    for name, ours, theirs in zip(Packed._fields, found, expected, strict=True):
        if isinstance(theirs, torch.Tensor):
            assert ours.dtype == theirs.dtype, name
            assert ours.tolist() == theirs.tolist(), name
        elif isinstance(theirs, np.ndarray):
            np.testing.assert_array_equal(ours, theirs, err_msg=name, strict=True)
        else:
            assert ours == theirs, name


def decorated(sequences: list[list[int]], *, token_types: bool, prompts: bool) -> Packed:
    """With optional tensors whose values tell tokens and sequences apart."""
    packed = pack(sequences)
    return packed._replace(
        token_types=packed.input_ids % 7 if token_types else None,
        prompt_lengths=torch.tensor([sum(ids) for ids in sequences], dtype=torch.int64) if prompts else None,
    )


# Layout.


def test_pack_by_hand():
    packed = pack([[101, 7592, 102], [101, 102]], prompt_length=1)
    assert packed.input_ids.tolist() == [101, 7592, 102, 101, 102]
    assert packed.positions.tolist() == [0, 1, 2, 0, 1]
    assert packed.cu_seqlens.tolist() == [0, 3, 5]
    assert packed.max_seqlen == 3
    assert packed.prompt_lengths.tolist() == [1, 1]
    assert packed.token_types is None
    assert packed.num_sequences == 2
    assert packed.lengths().tolist() == packed.host_lengths.tolist() == [3, 2]
    dtypes = [x.dtype for x in (packed.input_ids, packed.positions, packed.cu_seqlens, packed.prompt_lengths)]
    assert dtypes == [torch.int64, torch.int64, torch.int32, torch.int64]


def test_lengths_stay_on_the_cpu():
    assert pack([[5, 6, 7], [8, 9]]).to("meta").host_lengths.tolist() == [3, 2]


def test_lengths_of_tensors_alone():
    tensors = [torch.tensor([5, 6, 7]), torch.tensor([0, 1, 0]), torch.tensor([0, 2, 3], dtype=torch.int32)]
    packed = Packed(*tensors, 2)
    assert packed.host_lengths.tolist() == packed.lengths().tolist() == [2, 1]
    taken = take(packed, torch.tensor([1, 0]))
    assert (taken.input_ids.tolist(), taken.host_lengths.tolist()) == ([7, 5, 6], [1, 2])


@pytest.mark.parametrize("count", [1, 2, 17])
def test_pack_holds_every_sequence(count):
    sequences = random_sequences(count, count)
    packed = pack(sequences)
    assert unpack(packed) == sequences
    assert unpack(packed, "positions") == [list(range(len(ids))) for ids in sequences]
    assert packed.max_seqlen == max(map(len, sequences))
    assert packed.prompt_lengths is None


@pytest.mark.parametrize("count", [0, 1, 17])
def test_token_ids_hold_the_same_as_lists(count):
    sequences = [[], *random_sequences(count, count), []]
    tokens = TokenIds.of(sequences)
    assert (tokens.ids.dtype, tokens.offsets.dtype) == (np.int32, np.int64)
    assert len(tokens) == len(sequences)
    assert tokens.tolist() == [tokens[row].tolist() for row in range(len(sequences))] == sequences
    assert tokens.lengths().tolist() == list(map(len, sequences))
    rows = [count, 0, count, count + 1]
    assert tokens.take(rows).tolist() == [sequences[row] for row in rows]
    assert tokens.take([]).tolist() == []
    assert_equal(pack(tokens, prompt_length=2, allow_empty=True), pack(sequences, prompt_length=2, allow_empty=True))


def test_packed_token_ids_are_a_copy():
    tokens = TokenIds.of([[1, 2], [3]])
    packed = pack(tokens)
    packed.input_ids.zero_()
    packed.cu_seqlens.zero_()
    assert tokens.tolist() == [[1, 2], [3]]


def test_pack_of_nothing_is_refused():
    with pytest.raises(ValueError, match=naming("no", "sequences")):
        pack([])


def test_a_sequence_without_tokens_is_refused():
    with pytest.raises(ValueError, match=naming("sequence", 1, 3, "no", "token")):
        pack([[1], [], [2]])


@pytest.mark.parametrize("first_has", [{}, {"token_types"}, {"prompts"}, {"token_types", "prompts"}])
@pytest.mark.parametrize("second_has", [{}, {"token_types"}, {"prompts"}, {"token_types", "prompts"}])
def test_concatenate(first_has, second_has):
    first, second = random_sequences(1, 5), random_sequences(2, 3)
    a, b = (
        decorated(sequences, token_types="token_types" in has, prompts="prompts" in has)
        for sequences, has in ((first, first_has), (second, second_has))
    )
    both = concatenate(a, b)
    assert_equal(both._replace(token_types=None, prompt_lengths=None), pack(first + second))
    for name, label, size in (("token_types", "token_types", "input_ids"), ("prompt_lengths", "prompts", "cu_seqlens")):
        if label not in {*first_has, *second_has}:
            assert getattr(both, name) is None
            continue
        zeros = [[0] * (len(getattr(packed, size)) - (size == "cu_seqlens")) for packed in (a, b)]
        parts = [
            getattr(packed, name).tolist() if label in has else absent
            for packed, has, absent in zip((a, b), (first_has, second_has), zeros, strict=True)
        ]
        assert getattr(both, name).tolist() == parts[0] + parts[1]


@pytest.mark.parametrize("count", [1, 2, 30])
def test_sort_by_length(count):
    sequences = random_sequences(10 + count, count)
    packed = decorated(sequences, token_types=True, prompts=True)
    before = [x.clone() if isinstance(x, torch.Tensor) else x for x in packed]
    found, place = sort_by_length(packed)
    longest_first = sorted(sequences, key=len, reverse=True)  # stable: ties stay in order
    assert_equal(found, decorated(longest_first, token_types=True, prompts=True))
    assert [unpack(found)[i] for i in place] == sequences
    assert_equal(packed, Packed(*before))


def test_sort_by_length_leaves_absent_tensors_absent():
    found, _ = sort_by_length(pack(random_sequences(3, 6)))
    assert found.token_types is None
    assert found.prompt_lengths is None


def test_ranges_hold_what_they_may():
    lengths = [30, 9, 5, 4, 2, 2, 1]
    assert [[lengths[row] for row in rows] for rows in cut_by_tokens(lengths, 10)] == [[30], [9], [5, 4], [2, 2, 1]]
    assert cut_by_tokens([1, 10, 1], 10) == [range(0, 1), range(1, 2), range(2, 3)]
    assert cut_by_tokens([5, 5], 10) == [range(2)]
    assert cut_by_tokens([], 10) == []
    with pytest.raises(ValueError, match=naming("max_tokens", 0, 1)):
        cut_by_tokens([1], 0)


def test_take():
    packed = pack([[5], [6, 7, 8], [9, 10]], prompt_length=1)
    packed = packed._replace(token_types=torch.tensor([0, 1, 2, 3, 4, 5]), source=torch.tensor([0, 0, 1]))
    taken = take(packed, torch.tensor([2, 1]))
    assert taken.input_ids.tolist() == [9, 10, 6, 7, 8]
    assert (taken.positions.tolist(), taken.cu_seqlens.tolist(), taken.max_seqlen) == ([0, 1, 0, 1, 2], [0, 2, 5], 3)
    assert (taken.token_types.tolist(), taken.prompt_lengths.tolist()) == ([4, 5, 1, 2, 3], [1, 1])
    assert taken.source.tolist() == [1, 0]
    assert taken.host_lengths.tolist() == [2, 3]
    assert taken.cu_seqlens.dtype is torch.int32
    nothing = take(pack([[5], [6, 7]]), torch.tensor([], dtype=torch.int64))
    assert (nothing.num_sequences, nothing.max_seqlen, len(nothing.input_ids)) == (0, 0, 0)
    assert nothing.token_types is nothing.prompt_lengths is nothing.source is None


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ([3, 2], [3, 2]),  # a small batch stays as it is
        ([3] * 5 + [1], [3] * 5 + [1]),  # 16 is a multiple
        ([3] * 6, [3] * 6 + [2]),
        ([3] * 5 + [2], [3] * 5 + [2] + [3]),
        ([1] * 17, [1] * 20),
    ],
)
def test_a_large_batch_is_filled_up(monkeypatch, lengths, expected):
    """What is added is read by the encoder, changes nothing for the rest, and is not returned."""
    monkeypatch.setattr("embedft.device.token_multiple", lambda weight: 4)
    seen = []

    class Encoder(torch.nn.Linear):
        def forward(self, packed):
            seen.append(packed.host_lengths.tolist())
            assert packed.positions.tolist() == [place for length in seen[0] for place in range(length)]
            return packed.input_ids[:, None] * 1.0

    packed = pack([[7 + row] * length for row, length in enumerate(lengths)])
    hidden_TD = encoded(Encoder(1, 1), packed)
    assert seen == [expected]
    assert hidden_TD.flatten().tolist() == packed.input_ids.tolist()


def test_batches_are_filled_up_where_bfloat16_is_multiplied(monkeypatch):
    weight = torch.zeros(1)
    monkeypatch.setattr(devices, "_MULTIPLIES_BFLOAT16", True)
    assert (devices.token_multiple(weight), devices.token_multiple(weight.bfloat16())) == (1, 256)
    with torch.autocast("cpu", torch.bfloat16):
        assert devices.token_multiple(weight) == 256
    monkeypatch.setattr(devices, "_MULTIPLIES_BFLOAT16", False)
    assert devices.token_multiple(weight.bfloat16()) == 1


@pytest.mark.parametrize("family", ["bert", "mpnet", "modernbert", "qwen3"])
def test_filling_up_changes_no_hidden_state_and_no_gradient(monkeypatch, family):
    encoder, found = tiny_encoder(family).double(), []
    packed = pack([[5] * length for length in (7, 7, 6, 3, 2, 1)])
    for multiple in (1, 4):
        monkeypatch.setattr("embedft.device.token_multiple", lambda weight, multiple=multiple: multiple)
        hidden_TD = encoded(encoder, packed)
        gradients = torch.autograd.grad(hidden_TD.square().sum(), list(encoder.parameters()), materialize_grads=True)
        found.append([hidden_TD, *gradients])
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)
