"""A message as bytes: it comes back with its values and strides, or rounded by a known bound."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from petractl.engine import wire
from petractl.engine.messages import Activation, Gradient
from petractl.errors import RunError

INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)
FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
DTYPES = (*FLOATS, *INTEGERS, torch.bool)
FORMATS = ("bfloat16", "float16", "int8")
LABELS = torch.arange(3)
FINITE = st.floats(-1e4, 1e4, width=32)


def values(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return (100 * torch.randn(shape, generator=g, dtype=torch.float64)).to(dtype)


@st.composite
def laid_out(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = DTYPES) -> Tensor:
    """Draw a tensor as units make them: permuted, sliced, with gaps, expanded, a part of another, empty."""
    shape = draw(st.lists(st.integers(0, 4), max_size=5))
    x = values(tuple(shape), draw(st.sampled_from(dtypes)), draw(st.integers(0, 99)))
    for step in draw(
        st.lists(
            st.sampled_from(("permute", "slice", "chunk", "expand", "new", "select", "unfold")), max_size=4
        )
    ):
        if step == "expand" and x.dim() < 6:
            x = x.unsqueeze(draw(st.integers(0, x.dim())))
            x = x.expand([draw(st.integers(0, 3)) if n == 1 else n for n in x.shape])
        elif step == "new" and x.dim() < 6:
            x = x.unsqueeze(draw(st.integers(0, x.dim())))
        elif x.dim():
            d = draw(st.integers(0, x.dim() - 1))
            if step == "permute":
                x = x.permute(draw(st.permutations(range(x.dim()))))
            elif step == "slice":
                x = x[(slice(None),) * d + (slice(draw(st.integers(0, 2)), None, draw(st.integers(1, 3))),)]
            elif step == "chunk":
                x = x.chunk(2, dim=d)[-1]
            elif step == "unfold" and x.shape[d] > 1 and x.dim() < 6:
                x = x.unfold(d, 2, 1)  # windows overlap in memory
            elif step == "select" and x.shape[d]:
                x = x.select(d, draw(st.integers(0, x.shape[d] - 1)))
    return x


def over_the_wire(message: wire.Message, *, number_format: str, room: int | None = None) -> wire.Message:
    """Write a message and read it again; `room` is the size of the payload (None: what was agreed)."""
    tensors = wire.tensors_of(message)
    if room is None:
        room = wire.payload_bytes([(t.shape, t.dtype) for t in tensors], number_format=number_format)
    header = torch.full((wire.header_words(len(tensors)),), -7)
    payload = torch.full((room,), 0xAA, dtype=torch.uint8)
    parts = wire.parts_of(tensors, number_format=number_format)
    wire.write_header(message, parts, header)
    wire.write_payload(tensors, parts, payload)
    head, read = wire.read_header(header)
    assert read == parts
    upwards = isinstance(message, Activation)
    return wire.message_of(head, wire.read_payload(read, payload), upwards=upwards)


def sent(x: Tensor, number_format: str) -> Tensor:
    message = over_the_wire(Activation(5, (x,), LABELS), number_format=number_format)
    assert isinstance(message, Activation)
    assert torch.equal(message.labels, LABELS), "labels are never rounded"
    return message.streams[0]


def assert_same_layout(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert found.dtype is expected.dtype
    assert found.stride() == expected.stride()


def assert_same(found: Tensor, expected: Tensor) -> None:
    assert_same_layout(found, expected)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@settings(deadline=None)
@given(st.lists(laid_out(), min_size=1, max_size=4), st.integers(0, 2**40))
def test_every_tensor_comes_back_with_its_values_and_strides(streams, microbatch):
    message = over_the_wire(Activation(microbatch, tuple(streams), LABELS), number_format="float32")
    assert isinstance(message, Activation)
    assert message.microbatch == microbatch
    assert len(message.streams) == len(streams)
    for found, expected in zip((*message.streams, message.labels), (*streams, LABELS), strict=True):
        assert_same(found, expected)


@settings(deadline=None)
@given(st.none() | st.lists(laid_out(), max_size=2), st.lists(laid_out(), min_size=1, max_size=2))
def test_gradients_come_back_with_and_without_streams(streams, gradients):
    given_streams = None if streams is None else tuple(streams)
    message = over_the_wire(Gradient(7, given_streams, tuple(gradients)), number_format="float32")
    assert isinstance(message, Gradient)
    assert (message.streams is None) == (streams is None)
    assert len(message.gradients) == len(gradients)
    back = (*(message.streams or ()), *message.gradients)
    for found, expected in zip(back, (*(streams or ()), *gradients), strict=True):
        assert_same(found, expected)


@pytest.mark.parametrize("number_format", wire.FORMATS)
@settings(deadline=None)
@given(data=st.data())
def test_every_layout_survives_every_number_format(number_format, data):
    x = data.draw(laid_out())
    found = sent(x, number_format)
    assert_same_layout(found, x)
    if not x.is_floating_point():
        assert torch.equal(found, x)


@pytest.mark.parametrize("special", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("number_format", ["float32", "bfloat16", "float16"])
def test_what_is_not_finite_stays_as_it_is(number_format, special):
    x = torch.tensor([1.0, special, -2.0])
    assert_same(sent(x, number_format), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@settings(deadline=None)
@given(numbers=st.lists(FINITE, min_size=1, max_size=20))
def test_bfloat16_keeps_eight_bits(dtype, numbers):
    x = torch.tensor(numbers, dtype=dtype)
    error = (sent(x, "bfloat16") - x).abs()
    assert (error <= x.abs() * 2.0**-8 + 1e-37).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@settings(deadline=None)
@given(numbers=st.lists(FINITE, min_size=1, max_size=20))
def test_float16_keeps_eleven_bits(dtype, numbers):
    x = torch.tensor(numbers, dtype=dtype)
    error = (sent(x, "float16") - x).abs()
    assert (error <= x.abs() * 2.0**-11 + 2.0**-25).all(), "below 2^-14 it has a fixed step of 2^-24"


@pytest.mark.parametrize("dtype", FLOATS)
@settings(deadline=None)
@given(numbers=st.lists(FINITE, min_size=1, max_size=20))
def test_int8_is_off_by_half_a_step_of_the_largest(dtype, numbers):
    x = torch.tensor(numbers, dtype=dtype)
    step = float(x.abs().max()) / 127
    rounding = float(x.abs().max()) * torch.finfo(dtype).eps  # of the dtype in which it arrives
    error = (sent(x, "int8").double() - x.double()).abs()
    assert (error <= step / 2 * 1.0001 + rounding + 1e-37).all()


@pytest.mark.parametrize("dtype", FLOATS)
def test_int8_of_zeros_is_zeros(dtype):
    assert_same(sent(torch.zeros(3, 2, dtype=dtype), "int8"), torch.zeros(3, 2, dtype=dtype))


@pytest.mark.parametrize("special", [math.inf, -math.inf, math.nan])
def test_int8_shows_what_is_not_finite(special):
    x = torch.tensor([1.0, special, -2.0])
    assert not sent(x, "int8").isfinite().any(), "an overflow may not be turned into harmless numbers"


def test_int8_has_a_scale_for_each_tensor():
    streams = (torch.tensor([1e-3, -5e-4]), torch.tensor([1e3, 1.0]))
    found = over_the_wire(Gradient(0, None, streams), number_format="int8")
    assert isinstance(found, Gradient)
    torch.testing.assert_close(found.gradients[0], streams[0], rtol=0.01, atol=0)
    assert found.gradients[1].tolist() == pytest.approx([1e3, 0.0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("number_format", ["bfloat16", "float16", "float32"])
def test_a_tensor_that_is_small_already_is_not_rounded(dtype, number_format):
    x = values((4, 3), dtype, 1)
    assert_same(sent(x, number_format), x)


@pytest.mark.parametrize("number_format", FORMATS)
@settings(deadline=None)
@given(data=st.data())
def test_rounded_gives_the_bits_of_the_wire(number_format, data):
    streams = tuple(data.draw(st.lists(laid_out(), min_size=1, max_size=3)))
    messages = (
        Activation(3, streams, LABELS),
        Gradient(3, streams, streams),
        Gradient(3, None, streams),
    )
    for message in messages:
        here = wire.rounded(message, number_format=number_format)
        there = over_the_wire(message, number_format=number_format)
        assert type(here) is type(there)
        assert here.microbatch == 3
        pairs = zip(wire.tensors_of(here), wire.tensors_of(there), strict=True)
        for a, b in pairs:
            assert_same(a, b)


def test_rounded_to_float32_is_the_message_itself():
    message = Activation(0, (torch.randn(2),), LABELS)
    assert wire.rounded(message, number_format="float32") is message


@pytest.mark.parametrize(
    ("number_format", "factor"), [("float32", 4), ("bfloat16", 2), ("float16", 2), ("int8", 1)]
)
def test_bytes_of_a_payload(number_format, factor):
    scale = 64 if number_format == "int8" else 0
    room = wire.payload_bytes([((64, 64), torch.float32), ((64,), torch.int64)], number_format=number_format)
    assert room == factor * 64 * 64 + scale + 64 * 8


def test_an_expanded_tensor_travels_once():
    x = torch.randn(1, 8).expand(1000, 8)
    (part,) = wire.parts_of([x], number_format="float32")
    assert part.nbytes == 32
    assert_same(sent(x, "int8"), wire.rounded(Gradient(0, None, (x,)), number_format="int8").gradients[0])


@pytest.mark.parametrize("number_format", wire.FORMATS)
def test_a_smaller_message_fits_where_a_larger_was_agreed(number_format):
    room = wire.payload_bytes([((8, 3), torch.float32), ((8,), torch.int64)], number_format=number_format)
    ragged = Activation(0, (torch.ones(5, 3),), torch.arange(5))
    found = over_the_wire(ragged, number_format=number_format, room=room)
    assert isinstance(found, Activation)
    assert_same(found.streams[0], torch.ones(5, 3))
    assert_same(found.labels, torch.arange(5))


@pytest.mark.parametrize("number_format", wire.FORMATS)
def test_a_larger_message_than_agreed_is_refused(number_format):
    room = wire.payload_bytes([((8, 300), torch.float32), ((8,), torch.int64)], number_format=number_format)
    large = Activation(0, (torch.ones(8, 400),), torch.arange(8))
    with pytest.raises(RunError, match=r"larger than agreed .*\(8, 400\)") as caught:
        over_the_wire(large, number_format=number_format, room=room)
    assert "same shape per sample" in caught.value.hint


@pytest.mark.parametrize("x", [torch.zeros((1,) * 9), torch.zeros(2, dtype=torch.complex64)])
def test_what_cannot_be_described_is_refused(x):
    with pytest.raises(RunError, match="cannot be sent between stages"):
        wire.parts_of([x], number_format="float32")


def test_tensors_start_where_memory_is_aligned():
    parts = wire.parts_of([torch.zeros(3), torch.zeros(5), torch.zeros(1)], number_format="float32")
    assert [part.offset for part in parts] == [0, 64, 128]
    assert all(8 * wire.header_words(n) % 64 == 0 for n in range(10))


def test_a_parameter_gradient_chain_does_not_travel():
    x = torch.ones(3, requires_grad=True) * 2
    found = sent(x, "float32")
    assert not found.requires_grad
