"""pooling.py by hand, and against sentence-transformers' Pooling on a padded batch: values and gradients."""

import itertools

import pytest
import torch

from embedft.encoders.packing import pack
from embedft.encoders.pooling import POOLINGS, Pooling

D = 5
# Those of sentence-transformers, without weights.
POOLING_MODES = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
LENGTHS = {"mixed": [4, 9, 4, 6, 12], "one": [5], "equal": [4, 4]}


def pool(hidden_TD, packed, names):
    return Pooling(names, hidden_TD.shape[1])(hidden_TD, packed)


def packed_batch(lengths, prompt_length=None):
    return pack([[0] * n for n in lengths], prompt_length=prompt_length)


def random_hidden(num_tokens: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(num_tokens)
    return torch.randn(num_tokens, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def reference(hidden_TD, lengths, modes, *, prompt_length=None):
    """sentence-transformers' Pooling, padded behind with numbers that would show if they counted."""
    modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
    pooling = modules.Pooling(D, pooling_mode=modes, include_prompt=prompt_length is None)
    parts = hidden_TD.split(lengths)
    padded = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=99.0)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones(n, dtype=torch.int64) for n in lengths], batch_first=True)
    features = {"token_embeddings": padded, "attention_mask": mask}
    if prompt_length is not None:
        features["prompt_length"] = prompt_length
    return pooling(features)["sentence_embedding"]


# Two sequences, of three tokens and of one, with two features; by hand.
HIDDEN = torch.tensor([[1.0, 8.0], [4.0, 2.0], [7.0, -1.0], [5.0, 6.0]])
BY_HAND = {
    "cls": [[1.0, 8.0], [5.0, 6.0]],
    "max": [[7.0, 8.0], [5.0, 6.0]],
    "mean": [[4.0, 3.0], [5.0, 6.0]],  # (1 + 4 + 7) / 3, (8 + 2 - 1) / 3
    "mean_sqrt_len_tokens": [[12 / 3**0.5, 9 / 3**0.5], [5.0, 6.0]],
    "weightedmean": [[5.0, 1.5], [5.0, 6.0]],  # (1*1 + 2*4 + 3*7) / 6, (1*8 + 2*2 - 3*1) / 6
    "lasttoken": [[7.0, -1.0], [5.0, 6.0]],
}
# The same with the first token a prompt, and two more tokens in the second sequence.
HIDDEN_PROMPT = torch.tensor([[1.0, 8.0], [4.0, 2.0], [7.0, -1.0], [5.0, 6.0], [2.0, 0.0]])
BY_HAND_PROMPT = {
    "cls": [[4.0, 2.0], [2.0, 0.0]],
    "max": [[7.0, 2.0], [2.0, 0.0]],
    "mean": [[5.5, 0.5], [2.0, 0.0]],
    "mean_sqrt_len_tokens": [[11 / 2**0.5, 1 / 2**0.5], [2.0, 0.0]],
    "weightedmean": [[5.8, 0.2], [2.0, 0.0]],  # positions stay 2 and 3: (2*4 + 3*7) / 5, (2*2 - 3*1) / 5
    "lasttoken": [[7.0, -1.0], [2.0, 0.0]],
}


def test_every_mode_has_its_example():
    assert [*BY_HAND, "attention"] == [*BY_HAND_PROMPT, "attention"] == list(POOLINGS)


@pytest.mark.parametrize("mode", POOLING_MODES)
def test_by_hand(mode):
    torch.testing.assert_close(pool(HIDDEN, packed_batch([3, 1]), (mode,)), torch.tensor(BY_HAND[mode]))
    found = pool(HIDDEN_PROMPT, packed_batch([3, 2], prompt_length=1), (mode,))
    torch.testing.assert_close(found, torch.tensor(BY_HAND_PROMPT[mode]))


@pytest.mark.parametrize("prompt_length", [None, 1, 3])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("mode", POOLING_MODES)
def test_value_and_gradient(mode, lengths, prompt_length):
    hidden = random_hidden(sum(lengths))
    found = pool(hidden, packed_batch(lengths, prompt_length), (mode,))
    expected = reference(hidden, lengths, mode, prompt_length=prompt_length)
    assert found.shape == (len(lengths), D)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)
    weight = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gradients = [torch.autograd.grad((out * weight).sum(), hidden)[0] for out in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-14)
    if prompt_length:
        starts = [0, *itertools.accumulate(lengths)][:-1]
        assert all(gradients[0][start : start + prompt_length].eq(0).all() for start in starts)


@pytest.mark.parametrize("prompt_length", [None, 2])
@pytest.mark.parametrize("modes", [("mean", "cls"), ("lasttoken", "max", "weightedmean"), POOLING_MODES[::-1]])
def test_several_modes_are_concatenated_in_the_order_given(modes, prompt_length):
    lengths = LENGTHS["mixed"]
    hidden, packed = random_hidden(sum(lengths)), packed_batch(lengths, prompt_length)
    expected = reference(hidden, lengths, modes, prompt_length=prompt_length)
    torch.testing.assert_close(pool(hidden, packed, modes), expected, rtol=0, atol=1e-14)


def test_prompts_of_unlike_lengths():
    """A batch of queries and documents: each sequence leaves out its own prompt, if it has one."""
    hidden, lengths = random_hidden(15), [6, 4, 5]
    packed = packed_batch(lengths)._replace(prompt_lengths=torch.tensor([3, 0, 1]))
    found = pool(hidden, packed, POOLING_MODES)
    for row, (part, prompt_length) in enumerate(zip(hidden.split(lengths), (3, None, 1), strict=True)):
        expected = reference(part, [len(part)], POOLING_MODES, prompt_length=prompt_length)
        torch.testing.assert_close(found[row : row + 1], expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_half_precision_accumulates_in_float32(dtype):
    lengths = [300, 2]
    hidden = random_hidden(302, dtype)
    found = pool(hidden, packed_batch(lengths), POOLING_MODES)
    wider = torch.float64 if dtype is torch.float64 else torch.float32
    assert found.dtype == wider
    torch.testing.assert_close(found, pool(hidden.to(wider), packed_batch(lengths), POOLING_MODES), rtol=0, atol=0)


@pytest.mark.parametrize("mode", POOLING_MODES)
def test_neighbours_do_not_matter(mode):
    hidden, lengths = random_hidden(35, torch.float32), LENGTHS["mixed"]
    together = pool(hidden, packed_batch(lengths), (mode,))
    alone = [pool(part, packed_batch([len(part)]), (mode,)) for part in hidden.split(lengths)]
    assert torch.equal(together, torch.cat(alone))


def test_gradient_of_pooling():
    packed = packed_batch([3, 1, 4])
    assert torch.autograd.gradcheck(lambda hidden: pool(hidden, packed, POOLING_MODES), random_hidden(8))


def test_the_maximum_shares_its_gradient_among_ties():
    """As amax does: half each. sentence-transformers' max gives all of it to one."""
    hidden = torch.tensor([[2.0], [2.0], [1.0]], requires_grad=True)
    pool(hidden, packed_batch([3]), ("max",)).sum().backward()
    assert hidden.grad.tolist() == [[0.5], [0.5], [0.0]]


# Attention pooling.


def attention(seed: int = 0) -> Pooling:
    pooling = Pooling(("attention",), D).double()
    generator = torch.Generator().manual_seed(seed)
    torch.nn.init.normal_(pooling.trained["attention"].query, generator=generator)
    return pooling


@pytest.mark.parametrize("prompt_length", [None, 2])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_attention_against_a_loop(lengths, prompt_length):
    pooling, hidden = attention(), random_hidden(sum(lengths))
    query = pooling.trained["attention"].query
    found = pooling(hidden, packed_batch(lengths, prompt_length))
    rows = []
    for part in hidden.split(lengths):
        tokens = part[prompt_length or 0 :]
        rows.append(((tokens @ query).softmax(0)[:, None] * tokens).sum(0))
    expected = torch.stack(rows)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    weight = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for ours, theirs in zip(
        *(torch.autograd.grad((out * weight).sum(), [hidden, query], retain_graph=True) for out in (found, expected)),
        strict=True,
    ):
        assert ours.abs().max() > 1e-3
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_attention_starts_as_the_mean_and_takes_any_score():
    hidden, packed = random_hidden(8), packed_batch([3, 5])
    pooling = Pooling(("attention",), D)
    torch.testing.assert_close(pooling(hidden, packed), pool(hidden, packed, ("mean",)))
    with torch.no_grad():
        pooling.trained["attention"].query.fill_(1e4)
    best = [part[part.sum(1).argmax()] for part in hidden.split([3, 5])]
    torch.testing.assert_close(pooling(hidden, packed), torch.stack(best))


def test_a_pooling_with_weights_beside_one_without():
    hidden, packed = random_hidden(8), packed_batch([3, 5])
    pooling = Pooling(("lasttoken", "attention", "cls"), D)
    assert [name for name, _ in pooling.named_parameters()] == ["trained.attention.query"]
    assert pooling.out_features == 3 * D
    expected = [pool(hidden, packed, (name,)) for name in pooling.names]
    torch.testing.assert_close(pooling(hidden, packed), torch.cat(expected, dim=1))
