"""attention.py against one softmax per sequence and head: groups, windows, biases, and the packed kernel's stand-in."""

import functools
import itertools
import random
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from embedft import device as devices
from embedft import load_embedder
from embedft.device import has_packed_attention
from embedft.encoders import attention as attention_module
from embedft.encoders.attention import CAUSAL, FULL, Sequences, attention
from embedft.encoders.packing import pack

H, K = 4, 4

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


def naive_attention(q_THK, k_TGK, v_TGK, lengths, *, window=FULL, bias_HLL=None, scale=K**-0.5):
    """softmax(scale Q K^T + bias) V, sequence by sequence, head by head."""
    (_, heads, _), outputs = q_THK.shape, []
    for q_LHK, k_LGK, v_LGK in zip(*(x.split(lengths) for x in (q_THK, k_TGK, v_TGK)), strict=True):
        places = torch.arange(len(q_LHK))
        offsets_LL = places[None] - places[:, None]
        hidden_LL = torch.zeros_like(offsets_LL, dtype=torch.bool)
        for limit, side_LL in zip(window, (-offsets_LL, offsets_LL), strict=True):
            hidden_LL |= side_LL > (len(places) if limit is None else limit)
        attended = []
        for head in range(heads):
            of_group = head * k_LGK.shape[1] // heads
            score_LL = scale * q_LHK[:, head] @ k_LGK[:, of_group].T
            if bias_HLL is not None:
                score_LL = score_LL + bias_HLL[head, : len(places), : len(places)]
            attended.append(score_LL.masked_fill(hidden_LL, -torch.inf).softmax(dim=1) @ v_LGK[:, of_group])
        outputs.append(torch.cat(attended, dim=1))
    return torch.cat(outputs)


def random_qkv(
    num_tokens: int, *, groups: int = H, seed: int = 0, dtype: torch.dtype = torch.float64
) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(num_tokens, heads, K) for heads in (H, groups, groups)]
    return [(2 * torch.randn(shape, generator=generator, dtype=dtype)).requires_grad_() for shape in shapes]


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
    found, expected = attention(*qkv, sequences), naive_attention(*qkv, lengths)
    assert found.shape == (sum(lengths), H * K)
    assert_equal(found, expected, qkv)


def assert_equal(found, expected, inputs) -> None:
    """Values and gradients."""
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)
    weight = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ours, theirs = (torch.autograd.grad((out * weight).sum(), inputs) for out in (found, expected))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11)


WINDOWS = [FULL, CAUSAL, (2, 2), (3, 0), (0, 1), (None, 1), (1, None), (64, 64), (100, 0), (30, 50)]


@pytest.mark.parametrize("groups", [H, 2, 1])
@pytest.mark.parametrize("slack", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_windows_heads_biases_and_scales(window, slack, groups):
    """Windows narrower and wider than a sequence, and than a block of queries (64 tokens at least)."""
    lengths = [200, 190, 190, 65, 64, 63, 4, 1]
    packed, qkv = pack([[0] * n for n in lengths]), random_qkv(sum(lengths), groups=groups)
    bias = torch.randn(H, 201, 201, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    for bias_HLL, scale in ((None, None), (None, 0.1), (bias, None)):
        sequences = Sequences(packed, bias_HLL=bias_HLL, slack=slack)
        found = attention(*qkv, sequences, window=window, scale=scale)
        options = {"window": window, "bias_HLL": bias_HLL, "scale": scale or K**-0.5}
        expected = naive_attention(*qkv, lengths, **options)
        assert_equal(found, expected, qkv if bias_HLL is None else [*qkv, bias])


def test_a_bias_is_masked_once_for_all_layers(monkeypatch):
    kernel, masks, qkv = torch.nn.functional.scaled_dot_product_attention, [], random_qkv(9)

    def watched(*tensors, attn_mask, **options):
        masks.append(attn_mask)
        return kernel(*tensors, attn_mask=attn_mask, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    sequences = Sequences(pack([[0] * 5, [0] * 4]), bias_HLL=torch.zeros(H, 5, 5), slack=1.0)
    for _ in range(2):
        attention(*qkv, sequences)
    assert masks[0] is masks[1]
    assert masks[0].isneginf().sum() == H * 4  # of the padded place, which four other tokens do not see


@pytest.mark.parametrize("groups", [H, 2, 1])
def test_keys_are_repeated_where_no_kernel_is_grouped(monkeypatch, groups):
    lengths, kernel, calls = [9, 9, 5, 1], torch.nn.functional.scaled_dot_product_attention, []

    def counted(q, k, v, **options):
        calls.append((q.shape[1], k.shape[1], options["enable_gqa"]))
        return kernel(q, k, v, **options)

    monkeypatch.setattr(devices, "has_grouped_attention", lambda device: False)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    qkv = random_qkv(sum(lengths), groups=groups)
    found = attention(*qkv, Sequences(pack([[0] * n for n in lengths])), window=(2, 0))
    assert_equal(found, naive_attention(*qkv, lengths, window=(2, 0)), qkv)
    assert calls == [(H, H, False)] * 3


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_text_leaves_its_neighbours_alone(window, dtype):
    """Bit for bit, whether padded or not."""
    lengths = [200, 190, 190, 4]
    qkv = random_qkv(sum(lengths), groups=2, dtype=dtype)
    changed = [x.detach().clone() for x in qkv]
    for x in changed:
        x[200:390] = 100
    for slack in (0.0, 1.0):
        sequences = Sequences(pack([[0] * n for n in lengths]), slack=slack)
        before, after = (attention(*x, sequences, window=window) for x in (qkv, changed))
        assert torch.equal(before[:200], after[:200])
        assert torch.equal(before[390:], after[390:])
        assert not torch.equal(before[200:390], after[200:390])


def test_a_window_costs_what_the_window_costs():
    """No operand of the kernel grows with the square of the length: tokens times the window, and no more."""
    sizes = []
    with TorchDispatchLog(sizes):
        for length in (2048, 4096):
            qkv = [x.detach() for x in random_qkv(length, dtype=torch.float32)]
            sizes.append([])
            attention(*qkv, Sequences(pack([[0] * length])), window=(64, 64))
    assert max(sizes[1]) <= 2.1 * max(sizes[0])


class TorchDispatchLog(TorchDispatchMode):
    """Appends the number of elements of every tensor that an operation returns to the last list of `sizes`."""

    def __init__(self, sizes: list[list[int]]):
        super().__init__()
        self.sizes = sizes

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if self.sizes:
            self.sizes[-1] += [x.numel() for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, torch.Tensor)]
        return out


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("case", ["full", "causal", "window", "bias"])
def test_bfloat16_on_the_cpu_is_one_softmax_a_sequence(monkeypatch, lengths, case):
    """By matrix products, padded or not; texts that are too long for them go to the fused kernel."""
    calls, kernel = [], torch.nn.functional.scaled_dot_product_attention
    spy = lambda *qkv, **options: (calls.append(len(qkv)), kernel(*qkv, **options))[1]  # noqa: E731
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    monkeypatch.setattr(devices, "_MULTIPLIES_BFLOAT16", True)
    window = {"causal": CAUSAL, "window": (2, 1)}.get(case, FULL)
    qkv = [x.detach().bfloat16().requires_grad_() for x in random_qkv(sum(lengths), groups=2, dtype=torch.float32)]
    exact = [x.detach().double().requires_grad_() for x in qkv]
    longest = max(lengths)
    bias = torch.randn(H, longest, longest, generator=torch.Generator().manual_seed(2)) if case == "bias" else None
    for slack, most in ((0.0, 512), (1.0, 512), (0.0, 0)):
        monkeypatch.setattr(attention_module, "MAX_MATRIX", most)
        sequences = Sequences(pack([[0] * n for n in lengths]), bias_HLL=bias, slack=slack)
        found = attention(*qkv, sequences, window=window, scale=0.3)
        assert bool(calls) == (most == 0)
        expected = naive_attention(*exact, lengths, window=window, bias_HLL=bias, scale=0.3)
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=0.06)
        weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
        gradients = torch.autograd.grad((found.float() * weight).sum(), qkv)
        for one, other in zip(gradients, torch.autograd.grad((expected * weight.double()).sum(), exact), strict=True):
            torch.testing.assert_close(one.double(), other, rtol=0, atol=0.4)


def test_without_a_gradient_only_texts_of_few_tokens_go_by_products(monkeypatch):
    lengths, calls, products = [3 * K, 3 * K + 1], [], attention_module._by_products
    monkeypatch.setattr(devices, "_MULTIPLIES_BFLOAT16", True)
    spy = lambda *qkv, **options: (calls.append(qkv[0].shape[2]), products(*qkv, **options))[1]  # noqa: E731
    monkeypatch.setattr(attention_module, "_by_products", spy)
    qkv = random_qkv(sum(lengths), dtype=torch.bfloat16)
    with torch.no_grad():
        found = attention(*qkv, Sequences(pack([[0] * n for n in lengths])))
    assert calls == [3 * K]
    expected = naive_attention(*(x.double() for x in qkv), lengths)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=0.06)
    attention(*qkv, Sequences(pack([[0] * n for n in lengths])))
    assert calls == [3 * K, *lengths]


@pytest.mark.parametrize("slack", [0.0, 1.0])
def test_gradient_of_attention(slack):
    sequences = Sequences(pack([[0] * n for n in (3, 2, 2, 1)]), slack=slack)
    assert torch.autograd.gradcheck(lambda *qkv: attention(*qkv, sequences), random_qkv(8))


def test_on_the_cpu_sequences_have_no_slack():
    assert [group.rows for group in Sequences(pack([[0] * 8, [0] * 7])).groups] == [None, None]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_attention_dropout_drops_whole_weights(monkeypatch, dtype):
    """Values of one make each output the sum of its softmax weights: 1 without dropout, 1 on average with it."""
    monkeypatch.setattr(devices, "_MULTIPLIES_BFLOAT16", True)
    q, k, v = random_qkv(400, dtype=dtype)
    qkv = q.detach(), k.detach(), torch.ones_like(v)
    sequences = Sequences(pack([[0] * 8] * 50))
    torch.testing.assert_close(attention(*qkv, sequences), torch.ones(400, H * K, dtype=dtype))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        dropped = attention(*qkv, sequences, dropout=0.25)
    assert dropped.std() > 0.1
    assert dropped.double().mean().item() == pytest.approx(1, abs=0.05)


def stand_in(
    q_THK,
    k_TGK,
    v_TGK,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    *,
    calls,
    scale=None,
    window_size=(-1, -1),
    enable_gqa=False,
):
    """What `varlen_attn` computes and demands, on any device, sequence by sequence."""
    for x in (q_THK, k_TGK, v_TGK):
        assert x.dtype in (torch.float16, torch.bfloat16)
        assert x.shape == (int(cu_seq_q[-1]), x.shape[1], K)
        assert enable_gqa or x.shape[1] == q_THK.shape[1]
        assert x.device == cu_seq_q.device == cu_seq_k.device
        assert x.stride(-1) == 1
    for offsets, longest in ((cu_seq_q, max_q), (cu_seq_k, max_k)):
        assert offsets.dtype == torch.int32
        assert type(longest) is int
        assert longest == int(offsets.diff().max())
    calls.append(len(cu_seq_q) - 1)
    window = tuple(None if limit == -1 else limit for limit in window_size)
    scale, lengths = q_THK.shape[2] ** -0.5 if scale is None else scale, cu_seq_q.diff().tolist()
    return naive_attention(q_THK, k_TGK, v_TGK, lengths, window=window, scale=scale).unflatten(1, q_THK.shape[1:])


@pytest.fixture
def packed_kernel(monkeypatch):
    """Sends attention through the packed branch, to the stand-in; the numbers of sequences of its calls."""
    from torch.nn.attention import varlen

    calls = []
    monkeypatch.setattr(varlen, "varlen_attn", functools.partial(stand_in, calls=calls))
    half = (torch.float16, torch.bfloat16)
    monkeypatch.setattr(devices, "has_packed_attention", lambda device, dtype: dtype in half)
    monkeypatch.setattr(attention_module, "PACKED_WIDTHS", (K, 8))  # those of the tests
    return calls


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("window", [FULL, CAUSAL, (2, 1)], ids=str)
def test_the_packed_branch_is_one_softmax_a_sequence(packed_kernel, lengths, dtype, window):
    groups, options = (H, {}) if window == FULL else (1, {"window": window, "scale": 0.3})
    qkv = [x.detach().to(dtype).requires_grad_() for x in random_qkv(sum(lengths), groups=groups, dtype=torch.float32)]
    found = attention(*qkv, Sequences(pack([[0] * n for n in lengths])), **options)
    assert packed_kernel == [len(lengths)]
    exact = [x.detach().double().requires_grad_() for x in qkv]
    expected = naive_attention(*exact, lengths, **options)
    tolerance = 0.02 if dtype is torch.bfloat16 else 0.003
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=3 * tolerance)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad((found.float() * weight).sum(), qkv)
    for one, other in zip(gradients, torch.autograd.grad((expected * weight.double()).sum(), exact), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=0, atol=20 * tolerance)


def test_older_packed_kernels_get_as_many_heads_of_keys_as_of_queries(packed_kernel, monkeypatch):
    """torch 2.11 has no `enable_gqa`."""
    from torch.nn.attention import varlen

    def older(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
        options = {"calls": packed_kernel, "scale": scale, "window_size": window_size}
        return stand_in(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, **options)

    qkv, lengths = [x.half() for x in random_qkv(8, groups=1)], [5, 3]
    expected = attention(*qkv, Sequences(pack([[0] * n for n in lengths])))
    monkeypatch.setattr(varlen, "varlen_attn", older)
    assert torch.equal(attention(*qkv, Sequences(pack([[0] * n for n in lengths]))), expected)
    assert packed_kernel == [2, 2]


def test_the_packed_branch_gives_way_to_dropout_and_biases(packed_kernel):
    qkv = [x.half() for x in random_qkv(8)]
    attention(*qkv, Sequences(pack([[0] * 8])), dropout=0.5)
    attention(*qkv, Sequences(pack([[0] * 8]), bias_HLL=torch.zeros(H, 8, 8)))
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


@pytest.mark.parametrize(("width", "is_taken"), [(8, True), (26, False), (256, True), (264, False)])
def test_the_packed_kernel_gets_heads_of_a_width_that_it_takes(monkeypatch, width, is_taken):
    calls = []
    monkeypatch.setattr(devices, "has_packed_attention", lambda device, dtype: True)
    monkeypatch.setattr(attention_module, "_packed_kernel", lambda q, *rest: calls.append(1) or q)
    qkv = [torch.zeros(3, 2, width) for _ in range(3)]
    assert attention(*qkv, Sequences(pack([[0] * 3]))).shape == (3, 2 * width)
    assert bool(calls) == is_taken


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_packed_kernel_agrees(dtype):
    if not has_packed_attention(torch.device("cuda"), dtype):
        pytest.skip("needs an Ampere GPU")
    generator, lengths = torch.Generator().manual_seed(0), [20, 9, 2, 1]
    qkv = [torch.randn(32, heads, 64, generator=generator).to("cuda", dtype) for heads in (4, 2, 2)]
    sequences = Sequences(pack([[0] * n for n in lengths]).to("cuda"))
    for window in (FULL, CAUSAL, (3, 2)):
        found = attention(*qkv, sequences, window=window, scale=0.1)
        expected = naive_attention(*(x.float().cpu() for x in qkv), lengths, window=window, scale=0.1)
        torch.testing.assert_close(found.float().cpu(), expected, rtol=0, atol=0.02)
