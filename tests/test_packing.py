"""packing.py against lists of lists, and attention against one softmax per sequence."""

import functools
import itertools
import random
import sys

import pytest
import torch
from naming import naming

from embedft import device as devices
from embedft import load_embedder
from embedft.device import has_packed_attention
from embedft.encoders.packing import (
    Packed,
    Sequences,
    attention,
    concatenate,
    cut_by_tokens,
    pack,
    sort_by_length,
    take,
)

H, K = 3, 4


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
    assert packed.lengths().tolist() == [3, 2]
    dtypes = [x.dtype for x in (packed.input_ids, packed.positions, packed.cu_seqlens, packed.prompt_lengths)]
    assert dtypes == [torch.int64, torch.int64, torch.int32, torch.int64]


@pytest.mark.parametrize("count", [1, 2, 17])
def test_pack_holds_every_sequence(count):
    sequences = random_sequences(count, count)
    packed = pack(sequences)
    assert unpack(packed) == sequences
    assert unpack(packed, "positions") == [list(range(len(ids))) for ids in sequences]
    assert packed.max_seqlen == max(map(len, sequences))
    assert packed.prompt_lengths is None


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


# Groups.


def fewest_groups(lengths: list[int], slack: float) -> int:
    """The smallest number of groups of neighbours within `slack`, by trying every cut."""
    fewest = [0]
    for end in range(1, len(lengths) + 1):
        runs = (start for start in range(end) if min(lengths[start:end]) >= (1 - slack) * max(lengths[start:end]))
        fewest.append(min(fewest[start] + 1 for start in runs))
    return fewest[-1]


@pytest.mark.parametrize("slack", [0.0, 0.125, 0.5, 1.0])
@pytest.mark.parametrize("seed", range(6))
def test_groups_are_runs_of_like_length(seed, slack):
    rng = random.Random(seed)
    lengths = [rng.randint(1, 20) for _ in range(rng.randint(1, 25))]
    if seed % 2:
        lengths.sort(reverse=True)
    groups = Sequences(pack([[0] * n for n in lengths]), slack=slack).groups
    first = 0
    for group in groups:
        members = lengths[first : first + group.num_sequences]
        assert group.num_tokens == sum(members)
        assert group.length == max(members)
        assert min(members) >= (1 - slack) * max(members)
        if len(set(members)) == 1:
            assert group.rows is None
            assert group.mask is None
        else:
            starts = itertools.accumulate([0, *members[:-1]])
            places = [
                [start + j if j < n else 0 for j in range(group.length)]
                for start, n in zip(starts, members, strict=True)
            ]
            assert group.rows.view(len(members), -1).tolist() == places
            assert group.mask.shape == (len(members), 1, 1, group.length)
            assert group.mask.squeeze((1, 2)).tolist() == [[j < n for j in range(group.length)] for n in members]
        first += group.num_sequences
    assert first == len(lengths)
    assert len(groups) == fewest_groups(lengths, slack)


def test_with_no_slack_there_is_no_padding():
    groups = Sequences(pack([[0] * n for n in (7, 7, 5, 5, 5, 7)]), slack=0.0).groups
    assert [(group.num_sequences, group.length, group.rows) for group in groups] == [
        (2, 7, None),
        (3, 5, None),
        (1, 7, None),
    ]


# Attention.


def naive_attention(qkv_T3HK: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """softmax(Q K^T / sqrt(K)) V, sequence by sequence, head by head."""
    outputs = []
    for tokens in qkv_T3HK.split(lengths):
        heads = []
        for head in range(tokens.shape[2]):
            q_LK, k_LK, v_LK = tokens[:, :, head].unbind(1)
            heads.append((q_LK @ k_LK.T / q_LK.shape[1] ** 0.5).softmax(dim=1) @ v_LK)
        outputs.append(torch.cat(heads, dim=1))
    return torch.cat(outputs)


def random_qkv(num_tokens: int, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(num_tokens, 3, H, K, generator=generator, dtype=dtype)).requires_grad_()


LENGTHS = {
    "one sequence": [5],
    "one token": [1],
    "equal": [4, 4, 4],
    "sorted": [9, 9, 8, 7, 3, 3, 1],
    "unsorted": [2, 9, 1, 1, 8, 8, 5, 9],
}


@pytest.mark.parametrize("slack", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_attention_is_one_softmax_a_sequence(lengths, slack):
    qkv = random_qkv(sum(lengths))
    sequences = Sequences(pack([[0] * n for n in lengths]), slack=slack)
    found, expected = attention(qkv, sequences), naive_attention(qkv, lengths)
    assert found.shape == (sum(lengths), H * K)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    weight = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gradients = [torch.autograd.grad((out * weight).sum(), qkv)[0] for out in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)


@pytest.mark.parametrize("slack", [0.0, 1.0])
def test_gradient_of_attention(slack):
    sequences = Sequences(pack([[0] * n for n in (3, 2, 2, 1)]), slack=slack)
    assert torch.autograd.gradcheck(lambda qkv: attention(qkv, sequences), random_qkv(8))


def test_on_the_cpu_sequences_have_no_slack():
    assert [group.rows for group in Sequences(pack([[0] * 8, [0] * 7])).groups] == [None, None]


def test_attention_dropout_drops_whole_weights():
    """Values of one make each output the sum of its softmax weights: 1 without dropout, 1 on average with it."""
    qkv = random_qkv(400).detach().clone()
    qkv[:, 2] = 1
    sequences = Sequences(pack([[0] * 8] * 50))
    torch.testing.assert_close(attention(qkv, sequences), torch.ones(400, H * K, dtype=torch.float64))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        dropped = attention(qkv, sequences, dropout=0.25)
    assert dropped.std() > 0.1
    assert dropped.mean() == pytest.approx(1, abs=0.05)


def stand_in(q_THK, k_THK, v_THK, cu_seq_q, cu_seq_k, max_q, max_k, *, calls):
    """What `varlen_attn` computes and demands, on any device, sequence by sequence."""
    for x in (q_THK, k_THK, v_THK):
        assert x.dtype in (torch.float16, torch.bfloat16)
        assert x.shape == (int(cu_seq_q[-1]), H, K)
        assert x.device == cu_seq_q.device == cu_seq_k.device
        assert x.stride(-1) == 1
    for offsets, longest in ((cu_seq_q, max_q), (cu_seq_k, max_k)):
        assert offsets.dtype == torch.int32
        assert type(longest) is int
        assert longest == int(offsets.diff().max())
    calls.append(len(cu_seq_q) - 1)
    parts = [x.split(cu_seq_q.diff().tolist()) for x in (q_THK, k_THK, v_THK)]
    attended = [
        torch.nn.functional.scaled_dot_product_attention(*(x.transpose(0, 1) for x in qkv)).transpose(0, 1)
        for qkv in zip(*parts, strict=True)
    ]
    return torch.cat(attended)


@pytest.fixture
def packed_kernel(monkeypatch):
    """Sends attention through the packed branch, to the stand-in; the numbers of sequences of its calls."""
    from torch.nn.attention import varlen

    calls = []
    monkeypatch.setattr(varlen, "varlen_attn", functools.partial(stand_in, calls=calls))
    half = (torch.float16, torch.bfloat16)
    monkeypatch.setattr(devices, "has_packed_attention", lambda device, dtype: dtype in half)
    return calls


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_the_packed_branch_is_one_softmax_a_sequence(packed_kernel, lengths, dtype):
    qkv = random_qkv(sum(lengths), dtype=torch.float32).detach().to(dtype).requires_grad_()
    found = attention(qkv, Sequences(pack([[0] * n for n in lengths])))
    assert packed_kernel == [len(lengths)]
    exact = qkv.detach().double().requires_grad_()
    expected = naive_attention(exact, lengths)
    tolerance = 0.02 if dtype is torch.bfloat16 else 0.002
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=3 * tolerance)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    (gradient,) = torch.autograd.grad((found.float() * weight).sum(), qkv)
    (wanted,) = torch.autograd.grad((expected * weight.double()).sum(), exact)
    torch.testing.assert_close(gradient.double(), wanted, rtol=0, atol=10 * tolerance)


def test_the_packed_branch_gives_way_to_dropout(packed_kernel):
    attention(random_qkv(8), Sequences(pack([[0] * 8])), dropout=0.5)
    assert packed_kernel == []


def test_a_whole_encoder_through_the_packed_branch(packed_kernel, monkeypatch, tiny_bert):
    monkeypatch.setattr(sys.modules[__name__], "H", 4)
    monkeypatch.setattr(sys.modules[__name__], "K", 8)
    texts = ["a b c", "", "what order of the world", "the fee " * 9]
    embedder = load_embedder(tiny_bert, device="cpu", dtype=torch.bfloat16)
    found = embedder.encode(texts)
    assert packed_kernel == [4, 4]  # one call per layer
    expected = load_embedder(tiny_bert, device="cpu").encode(texts)  # float32, padded in groups
    packed_kernel.clear()
    monkeypatch.setattr(devices, "has_packed_attention", lambda device, dtype: False)
    assert abs(found - embedder.encode(texts)).max() <= 0.02
    assert abs(found - expected).max() <= 0.05
    assert packed_kernel == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_packed_kernel_agrees(dtype):
    if not has_packed_attention(torch.device("cuda"), dtype):
        pytest.skip("needs an Ampere GPU")
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(32, 3, 2, 64, generator=generator).to("cuda", dtype)
    found = attention(qkv, Sequences(pack([[0] * n for n in (20, 9, 2, 1)]).to("cuda")))
    torch.testing.assert_close(
        found.float().cpu(), naive_attention(qkv.float().cpu(), [20, 9, 2, 1]), rtol=0, atol=0.02
    )


def test_take():
    packed = pack([[5], [6, 7, 8], [9, 10]], prompt_length=1)
    packed = packed._replace(token_types=torch.tensor([0, 1, 2, 3, 4, 5]), source=torch.tensor([0, 0, 1]))
    taken = take(packed, torch.tensor([2, 1]))
    assert taken.input_ids.tolist() == [9, 10, 6, 7, 8]
    assert (taken.positions.tolist(), taken.cu_seqlens.tolist(), taken.max_seqlen) == ([0, 1, 0, 1, 2], [0, 2, 5], 3)
    assert (taken.token_types.tolist(), taken.prompt_lengths.tolist()) == ([4, 5, 1, 2, 3], [1, 1])
    assert taken.source.tolist() == [1, 0]
    assert taken.cu_seqlens.dtype is torch.int32
    nothing = take(pack([[5], [6, 7]]), torch.tensor([], dtype=torch.int64))
    assert (nothing.num_sequences, nothing.max_seqlen, len(nothing.input_ids)) == (0, 0, 0)
    assert nothing.token_types is nothing.prompt_lengths is nothing.source is None
