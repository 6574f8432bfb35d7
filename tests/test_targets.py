"""targets.py: what is a positive, what a negative, and similarities, by hand."""

import pytest
import torch

from embedft import Targets
from embedft.losses.targets import scores


def rows(*lines: str) -> torch.Tensor:
    """A bool matrix from lines of 0 and 1."""
    return torch.tensor([[character == "1" for character in line] for line in lines])


def test_masks_by_hand():
    """Query 0 lists document 0 and hard negative 2, and is known to be answered by 3; query 2 lists nothing."""
    targets = Targets(group=torch.tensor([[0, 2], [1, 3], [-1, -1]]), known=torch.tensor([[0, 3]]))
    positive, negative = targets.masks()
    assert torch.equal(positive, rows("1001", "0100", "0000"))
    assert torch.equal(negative, rows("0110", "1011", "1111"))
    assert torch.equal(targets.listed_positive, rows("10", "10", "00"))


def test_relevance_says_which_of_the_listed_are_positives():
    group = torch.tensor([[0, 1, 2], [2, 1, -1]])
    targets = Targets(group, relevance=torch.tensor([[0, 2, 1], [0, 0, 1]]))
    assert torch.equal(targets.listed_positive, rows("011", "000"))  # a document that is not there has no relevance
    assert torch.equal(targets.masks()[0], rows("011", "000"))
    assert torch.equal(
        Targets(group, relevance=torch.tensor([[0.0, 0.5, 0.0]] * 2)).listed_positive, rows("010", "010")
    )


def test_a_known_positive_is_none_of_the_hard_negatives():
    targets = Targets(group=torch.tensor([[0, 1]]), known=torch.tensor([[0, 1]]))
    assert torch.equal(targets.masks()[0], rows("11"))
    assert torch.equal(targets.listed_positive, rows("10"))


def test_masks_reach_to_the_documents_that_nobody_lists():
    targets = Targets(group=torch.tensor([[0], [1]]), known=torch.zeros(0, 2, dtype=torch.int64))
    assert torch.equal(targets.masks()[0], rows("10", "01"))
    assert torch.equal(targets.masks(num_documents=4)[0], rows("1000", "0100"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"group": torch.tensor([0, 1])}, r"group has shape \(2,\), expected \[queries"),
        ({"relevance": torch.ones(2, 2)}, r"relevance has shape \(2, 2\), expected group's \(2, 1\)"),
        ({"known": torch.tensor([0, 1])}, r"known has shape \(2,\), expected \[pairs, 2\]"),
        ({"known": torch.zeros(1, 3, dtype=torch.int64)}, r"known has shape \(1, 3\), expected \[pairs, 2\]"),
    ],
)
def test_refuses_wrong_shapes(fields, message):
    with pytest.raises(ValueError, match=message):
        Targets(**({"group": torch.tensor([[0], [1]])} | fields))


def test_to_moves_every_tensor():
    moved = Targets(torch.tensor([[0]]), torch.tensor([[1]]), torch.tensor([[0, 0]])).to("meta")
    assert {moved.group.device.type, moved.relevance.device.type, moved.known.device.type} == {"meta"}
    assert Targets(torch.tensor([[0]])).to("meta").known is None


def test_cosine_and_dot_by_hand():
    Q, D = torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.tensor([[2.0, 0.0], [0.0, 5.0], [-3.0, -4.0]])
    torch.testing.assert_close(scores(Q, D), torch.tensor([[0.6, 0.8, -1.0], [0.0, 0.0, 0.0]]))
    assert scores(Q, D, similarity="dot").tolist() == [[6.0, 20.0, -25.0], [0.0, 0.0, 0.0]]
    with pytest.raises(ValueError, match="similarity is 'euclid', expected one of cosine, dot"):
        scores(Q, D, similarity="euclid")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_half_precision_becomes_float32(dtype):
    Q = torch.tensor([[300.0, 400.0]], dtype=dtype)  # its squared length is beyond float16
    result = scores(Q, Q)
    assert result.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
    torch.testing.assert_close(result, torch.ones_like(result))
