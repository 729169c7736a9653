"""A mailbox hands over what it is given, in order, and never blocks the sender."""

import pytest
import torch

from petractl.engine.messages import Activation, Gradient
from petractl.engine.transport import Mailbox


def activation(i: int) -> Activation:
    return Activation(i, (torch.zeros(1),), torch.zeros(1, dtype=torch.int64))


def test_first_in_first_out():
    box: Mailbox[Activation] = Mailbox()
    messages = [activation(i) for i in range(3)]
    for message in messages:
        box.send(message)
    assert [box.receive(i) for i in range(3)] == messages


def test_ready_only_while_a_message_waits():
    box: Mailbox[Gradient] = Mailbox()
    assert not box.ready()
    box.send(Gradient(0, None, ()))
    assert box.ready()
    box.receive(0)
    assert not box.ready()


def test_tensors_are_handed_over_not_copied():
    box: Mailbox[Activation] = Mailbox()
    message = activation(0)
    box.send(message)
    assert box.receive(0).streams[0] is message.streams[0]


def test_another_microbatch_than_expected_is_our_bug():
    box: Mailbox[Activation] = Mailbox()
    box.send(activation(4))
    with pytest.raises(AssertionError, match="expected 3, got 4"):
        box.receive(3)
