"""Links and carriers between two real processes: what arrives, what is reused, and how a wait ends."""

import gc
from typing import Any

import pytest
import torch
import torch.multiprocessing
from link_cases import KINDS, POSTED_AHEAD, run_cases

from petractl.engine.carriers import BufferPool

IN_HAND = 2
"""The buffer that the receiver looks at, and the one that its link hands over."""

pytestmark = pytest.mark.alone  # the processes measure how long they wait


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict[str, Any]]:
    """Run all cases in one launch; return, by rank and case, what each process found."""
    folder = tmp_path_factory.mktemp("links")
    torch.multiprocessing.spawn(run_cases, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("messages", "count"), [("ragged", 4), ("layouts", 5), ("downwards", 4)])
def test_a_message_arrives_as_it_was_sent(results, messages, count, kind):
    assert results[1]["messages_arrive_as_sent"][f"{messages}, {kind}"] == [True] * count


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("number_format", ["bfloat16", "float16", "int8"])
def test_a_smaller_number_format_gives_the_bits_of_rounded(results, number_format, kind):
    assert results[1]["messages_are_rounded"][f"{number_format}, {kind}"] == [True] * 4


def test_links_with_tags_of_their_own_do_not_mix(results):
    assert results[1]["links_are_apart"]["same"] == [True] * 6


def test_buffers_come_back_when_nothing_uses_them(results):
    assert results[0]["buffers_are_reused"]["allocated"] <= 2
    assert results[1]["buffers_are_reused"]["unkept"] <= POSTED_AHEAD + IN_HAND


def test_a_message_of_which_a_view_is_kept_keeps_its_buffer(results):
    found = results[1]["buffers_are_reused"]
    assert found["intact"] == [True] * found["kept_count"]
    assert found["kept_count"] < found["kept"] <= POSTED_AHEAD + IN_HAND + found["kept_count"]


def test_a_send_does_not_wait_for_the_receiver(results):
    found = results[0]["sends_do_not_wait"]
    assert found["seconds"] < 5.0, "twenty messages, and nobody who takes them"
    assert found["bytes"] == 20 * found["nbytes"]
    assert results[1]["sends_do_not_wait"]["same"] == [True] * 24


def test_a_limit_makes_a_send_wait(results):
    found = results[0]["sends_do_not_wait"]
    says = "stage 0 (rank 0) has waited 0.3 s for stage 1 (rank 1) to take a message"
    assert found["blocked"] == ("Stalled", says, 1)
    assert found["flush"] == ("Stalled", says, 1)
    assert found["sent"] == 4, "a refused message is not counted as sent"


def test_a_message_that_does_not_come_is_named(results):
    found = results[1]["waits_are_bounded"]
    assert found["stalled"] == (
        "Stalled",
        "stage 1 (rank 1) has waited 0.3 s for F 7 from stage 0 (rank 0)",
        0,
    )
    assert 0.3 <= found["seconds"] < 5.0
    assert found["late"], "the message itself is not lost"


def test_waiting_is_counted(results):
    assert 0.1 < results[1]["waits_are_bounded"]["waited"] < 10.0


def test_another_microbatch_than_expected_is_our_bug(results):
    assert results[1]["waits_are_bounded"]["wrong"] == (
        "RunError",
        "stage 1 (rank 1) expected F 9, got microbatch 8",
        None,
    )


def test_a_link_serves_many_epochs_and_ends_when_it_is_closed(results):
    assert results[1]["epochs_follow_each_other"]["same"] == [True] * 6
    assert [found["epochs_follow_each_other"]["ended"] for found in results] == [True, True]


def test_a_neighbour_that_dies_is_named_wherever_it_is_missed(results):
    found = results[0]["the_other_dies"]
    for name in ("receive", "flush", "send"):
        kind, says, _ = found[name]
        assert kind == "PeerLost", name
        assert says.startswith("stage 0 (rank 0) lost the connection to stage 1 (rank 1) ("), name
        assert "/gloo/" not in says, "the place in the source of a library is no reason"
    assert found["seconds"] < 15.0


def test_a_pool_lends_a_buffer_until_its_last_view_is_gone():
    pool = BufferPool(64)
    first = pool.take()
    address = first.data_ptr()
    view = first[8:24].view(torch.float32).view(2, 2).t()
    del first
    gc.collect()
    assert pool.take().data_ptr() != address, "a view of a view still uses it"
    assert pool.allocated == 2
    del view
    gc.collect()
    again = [pool.take() for _ in range(2)]
    assert len({buffer.data_ptr() for buffer in again}) == pool.allocated == 2


def test_a_pool_counts_on_references_alone():
    pool = BufferPool(64)
    gc.disable()
    try:
        for _ in range(10):
            pool.take().view(torch.int64)[2:].fill_(1)
    finally:
        gc.enable()
    assert pool.allocated == 1


def test_buffers_that_are_lent_at_once_are_apart():
    pool = BufferPool(64)
    lent = [pool.take().fill_(n) for n in range(5)]
    assert [int(buffer[0]) for buffer in lent] == [0, 1, 2, 3, 4]
    assert len({buffer.data_ptr() for buffer in lent}) == pool.allocated == 5
