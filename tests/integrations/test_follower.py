"""What the callbacks share: when the average is made, when it moves, what a model holds while it is judged."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastjepa.integrations.follower import Follower


class Pair(nn.Module):
    """A student and its teacher."""

    def __init__(self):
        super().__init__()
        self.encoder, self.target_encoder = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
        self.head = nn.Linear(2, 1)


def set_to(module: nn.Module, value: float) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(value)


def test_a_teacher_follows_with_the_decay_of_the_step():
    model = Pair()
    follower = Follower(lambda steps: 1 - 1 / (steps + 1), "encoder", "target_encoder")
    set_to(model.encoder, 1.0)
    set_to(model.target_encoder, 0.0)
    ema = follower.start(model)
    assert ema.module is model.target_encoder
    expected = 0.0
    for steps in (1, 1, 2, 3, 3):  # a batch without an optimizer step comes with the number of before
        before = follower.steps
        follower.follow(model, steps)
        if steps > before:
            expected = (1 - 1 / (steps + 1)) * expected + 1 / (steps + 1)
        assert model.target_encoder.weight[0, 0].item() == pytest.approx(expected)
    follower.show(model)
    assert (model.encoder.weight == 1.0).all()
    follower.hide()
    assert follower.state_dict() == {"steps": 3, "ema": None}


def test_a_copy_follows_and_is_shown():
    model = Pair()
    follower = Follower(0.5)
    set_to(model, 1.0)
    follower.start(model)
    follower.follow(model, 1)
    set_to(model, 3.0)
    follower.follow(model, 2)
    follower.show(model)
    assert (model.encoder.weight == 2.0).all()
    follower.show(model)  # twice changes nothing
    assert (model.encoder.weight == 2.0).all()
    follower.hide()
    assert (model.encoder.weight == 3.0).all()
    follower.hide()


def test_a_state_waits_for_the_model():
    model = Pair()
    first = Follower(0.5)
    set_to(model, 1.0)
    first.start(model)
    set_to(model, 3.0)
    first.follow(model, 5)
    first.follow(model, 6)
    second = Follower(0.5)
    second.load_state_dict(first.state_dict())
    second.start(model)
    assert second.steps == 6
    for name, tensor in first.ema.state_dict().items():
        assert torch.equal(second.ema.state_dict()[name], tensor)
    second.follow(model, 6)
    assert second.ema.n_averaged == 2
    second.start(model)  # a new training, of the model as it is now
    assert second.steps == second.ema.n_averaged == 0
    assert torch.equal(second.ema.module.head.weight, model.head.weight)


def test_bad_names():
    with pytest.raises(ValueError, match="give both, or neither"):
        Follower(0.5, student="encoder")
    with pytest.raises(ValueError, match="no submodule 'student'; it has encoder, target_encoder, head"):
        Follower(0.5, "student", "target_encoder").start(Pair())
    with pytest.raises(ValueError, match=r"weight is \[1, 2\] in the average and \[2, 2\] in the model"):
        Follower(0.5, "encoder", "head").start(Pair())
