"""Seeds of in-unit randomness: a function of where an evaluation stands, and of nothing else."""

import itertools

import torch

from petractl.methods.randomness import derive_seed, seed_device

CPU = torch.device("cpu")


def test_seeds_are_the_same_on_every_machine_and_version():
    assert derive_seed(0, 0, 0) == 4808561972376111626
    assert derive_seed(7, 3, 12) == derive_seed(7, 3, 12)


def test_seeds_fit_torch():
    assert all(0 <= derive_seed(0, 0, i) < 2**63 for i in range(100))


def test_no_two_places_share_a_seed():
    places = list(itertools.product(range(5), range(12), range(50)))
    assert len({derive_seed(*place) for place in places}) == len(places)


def test_the_order_of_the_parts_matters():
    assert derive_seed(1, 2) != derive_seed(2, 1)
    assert derive_seed(1, 23) != derive_seed(12, 3)


def test_seeding_sets_the_default_generator():
    draws = []
    for seed in (5, 6, 5):
        seed_device(seed, device=CPU)
        draws.append(torch.rand(3))
    assert torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[0], draws[1])
