"""What every encoder family in FAMILIES must do, on tiny random weights; a new entry is tested here at once."""

import itertools

import pytest
import torch
from families import SEQUENCES, tiny_encoder

from embedft.encoders.folder import FAMILIES
from embedft.encoders.packing import pack
from embedft.encoders.weights import checkpoint_tensors, tensor_keys

every_family = pytest.mark.parametrize("model_type", FAMILIES)


def hidden_states(encoder, sequences) -> list[torch.Tensor]:
    """[L, D] for each sequence."""
    with torch.inference_mode():
        return list(encoder(pack(sequences)).split([len(ids) for ids in sequences]))


# A product of fewer rows may add in another order, and each layer adds to the difference: MKL's 8.7e-6 for Gemma 3.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-5)], ids=["64", "32"])
@every_family
def test_packed_is_one_at_a_time(model_type, dtype, tolerance):
    encoder = tiny_encoder(model_type).to(dtype)
    together = hidden_states(encoder, SEQUENCES)
    for sequence, found in zip(SEQUENCES, together, strict=True):
        (alone,) = hidden_states(encoder, [sequence])
        assert found.shape == (len(sequence), encoder.config.hidden_size)
        assert (found - alone).abs().max() <= tolerance * max(1.0, alone.abs().max().item())


@every_family
def test_a_text_leaves_its_neighbours_alone(model_type):
    """Bit for bit."""
    encoder, changed = tiny_encoder(model_type), [*SEQUENCES]
    changed[2] = [50, 51, 52, 53, 54, 55]
    before, after = hidden_states(encoder, SEQUENCES), hidden_states(encoder, changed)
    same = [torch.equal(one, other) for one, other in zip(before, after, strict=True)]
    assert same == [i != 2 for i in range(len(SEQUENCES))]


@every_family
def test_the_key_map_is_invertible(model_type):
    """Each tensor of a checkpoint goes to one place, and comes back from there with its bits."""
    encoder = tiny_encoder(model_type)
    state, keys = encoder.state_dict(), FAMILIES[model_type].key_map(encoder.config)
    stacks = tensor_keys(state, keys)
    names = list(itertools.chain.from_iterable(stacks.values()))
    assert len(names) == len(set(names))
    written = checkpoint_tensors(state, keys)
    assert written.keys() == set(names)
    for ours, stack in stacks.items():
        assert torch.equal(torch.cat([written[name] for name in stack]), state[ours])


@every_family
def test_every_parameter_learns(model_type):
    """Without a gradient of zero everywhere, except for biases that a softmax cancels."""
    encoder = tiny_encoder(model_type)
    hidden_TD = encoder(pack(SEQUENCES))
    (hidden_TD * torch.randn(hidden_TD.shape, generator=torch.Generator().manual_seed(0))).sum().backward()
    for name, parameter in encoder.named_parameters():
        assert torch.isfinite(parameter.grad).all()
        assert parameter.grad.abs().max() > 0, name


@every_family
def test_dropout_is_active_in_training_only(model_type):
    encoder = tiny_encoder(model_type)
    packed = pack(SEQUENCES)
    assert torch.equal(encoder(packed), encoder(packed))
    dropouts = [module for module in encoder.modules() if isinstance(module, torch.nn.Dropout) and module.p > 0]
    assert torch.equal(encoder.train()(packed), encoder(packed)) == (not dropouts)


@every_family
def test_autocast_is_close_to_float32(model_type):
    """bfloat16 has 8 bits: hidden states differ by about 1%."""
    encoder, packed = tiny_encoder(model_type), pack(SEQUENCES)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        found = encoder(packed).float()
    expected = encoder(packed).detach()
    assert (found - expected).norm() <= 0.05 * expected.norm()


@every_family
def test_the_longest_text_fits(model_type):
    encoder = tiny_encoder(model_type)
    (hidden,) = hidden_states(encoder, [[2 + i % 50 for i in range(encoder.config.max_length)]])
    assert torch.isfinite(hidden).all()
