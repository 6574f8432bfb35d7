"""Helpers for testing losses: random vectors, gradients, and comparison with sentence-transformers.

Q, D = random_vectors(8, 16), random_vectors(8, 16, seed=1)
assert_equal_to_reference(loss_and_gradients(cosent, Q, D, targets), reference_gradients(reference, Q, D, labels))
"""

import torch
from torch import Tensor, nn

from embedft import Targets

# (dtype, relative to the largest entry of what is compared)
PRECISIONS = [(torch.float64, 1e-9), (torch.float32, 1e-6)]


def random_vectors(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Random float64 numbers, rounded to `dtype`, that require gradients."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def random_pair(
    num_queries: int, num_columns: int, *, dim: int = 12, duplicates: bool = False, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """Q, D and the group in sentence-transformers' order: all first columns, then all second ones."""
    Q, D = random_vectors(num_queries, dim, dtype=dtype), random_vectors(num_queries * num_columns, dim, seed=1)
    D = D.detach().to(dtype)
    if duplicates:
        Q, D = Q.detach().clone(), D.clone()
        Q[1], Q[4] = Q[0], Q[2]
        D[1], D[3], D[-1] = D[0], D[0], D[2]
    group = torch.arange(num_queries * num_columns).view(num_columns, num_queries).T
    return Q.detach().requires_grad_(), D.requires_grad_(), group


def loss_and_gradients(loss, Q: Tensor, D: Tensor, targets: Targets, **options) -> tuple[Tensor, ...]:
    """(value, gradient of Q, gradient of D), with zeros for a missing gradient."""
    value = loss(Q, D, targets, **options)
    return value.detach(), *torch.autograd.grad(value, (Q, D), allow_unused=True, materialize_grads=True)


def reference_gradients(reference: nn.Module, Q: Tensor, D: Tensor, num_columns: int, *labels) -> tuple[Tensor, ...]:
    """The same for a sentence-transformers loss, which takes a list of columns."""
    value = reference.compute_loss_from_embeddings([Q, *D.chunk(num_columns)], *labels)
    value = sum(value.values()) if isinstance(value, dict) else value
    return value.detach(), *torch.autograd.grad(value, (Q, D), allow_unused=True, materialize_grads=True)


def assert_equal(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...], tolerance: float) -> None:
    """Each within `tolerance` of the largest entry of the other's."""
    for our, their in zip(ours, theirs, strict=True):
        assert our.dtype is their.dtype
        assert torch.isfinite(their).all()
        assert (our - their).abs().max() <= tolerance * their.abs().max() + 1e-300, (our - their).abs().max()
