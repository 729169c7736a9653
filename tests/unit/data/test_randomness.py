import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from petractl.data.randomness import Purpose, random_order, random_words, stream_key


def test_words_are_splitmix64() -> None:
    # The first outputs of the published generator for the state 1234567.
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert random_words(1234567, np.arange(4)).tolist() == published


def test_a_word_depends_on_its_own_counter_only() -> None:
    words = random_words(99, np.arange(100))
    assert random_words(99, np.array([[7, 3], [50, 7]])).tolist() == words[[[7, 3], [50, 7]]].tolist()


def test_bits_are_fair_and_keys_differ() -> None:
    words = random_words(stream_key(Purpose.ORDER, 0, 0), np.arange(4096))
    ones = np.unpackbits(words.view(np.uint8)).mean()
    assert abs(ones - 0.5) < 0.01
    parts = [(0, 0), (0, 1), (1, 0), (1, 1), (-1, 0), (2**63, 0)]
    keys = {stream_key(purpose, *p) for purpose in (Purpose.ORDER, Purpose.SPLIT) for p in parts}
    assert len(keys) == 2 * len(parts)


@settings(deadline=None)
@given(seed=st.integers(), length=st.integers(1, 300))
def test_an_order_is_a_permutation(seed: int, length: int) -> None:
    order = random_order(stream_key(Purpose.ORDER, seed), length)
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(length))


def test_every_place_is_equally_likely() -> None:
    first = [int(random_order(stream_key(Purpose.ORDER, seed), 5)[0]) for seed in range(2000)]
    counts = np.bincount(first, minlength=5)
    assert counts.min() > 330, counts
