"""Diagnosed microbatches: what is compared is the end-to-end gradient, and training does not notice."""

from collections.abc import Sequence

import pytest
import torch
from small_nets import (
    ALL_METHODS,
    CUTS,
    inner,
    make_pipeline,
    make_stages,
    make_units,
    microbatches,
    sgd_updater,
    tensors,
)
from torch import Tensor, nn
from torch.nn import functional

from petractl.engine.agreement import Agreement, agreement, mean_agreement, relative_error
from petractl.engine.diagnosis import Diagnosis, StageDiagnosis, observe
from petractl.engine.end_to_end import end_to_end, snapshot_of
from petractl.methods.family import method_spec
from petractl.models.units import Network

METHODS = [(name, keep) for name, keep in ALL_METHODS if name not in ("local", "forward-gradient")]
COUNT = 9


def diagnose(
    units: Sequence[nn.Module],
    method: str,
    keep: str = "",
    *,
    every: int = 1,
    lr: float = 0.1,
    k: int = 1,
    schedule: str | list[int] | None = None,
    count: int = COUNT,
    **options,
) -> list[list[StageDiagnosis]]:
    """Train an epoch; return what was found at each diagnosed microbatch."""
    stages = make_stages(units, method, keep, make_updater=lambda named: sgd_updater(named, lr=lr), **options)
    locked = method_spec(method, keep=keep).locked
    pipeline = make_pipeline(stages, k=k, schedule=schedule or ("sequential" if locked else "tight"))
    found: list[list[StageDiagnosis]] = []
    observe(stages, every=every).report = found.append
    pipeline.train(iter(microbatches(count)), num_microbatches=count)
    return found


class TestAgreement:
    def test_of_vectors_spread_over_tensors(self):
        a = [torch.tensor([3.0]), None, torch.tensor([[0.0, 4.0]])]
        b = [torch.tensor([0.0]), torch.tensor([0.0, 0.0]), torch.tensor([[0.0, 2.0]])]
        found = agreement(a, b)
        assert found.cosine == pytest.approx(0.8)
        assert found.norm_ratio == pytest.approx(2.5)
        assert agreement(b, a).norm_ratio == pytest.approx(0.4)

    def test_what_has_no_direction_has_no_cosine(self):
        zero, one = [torch.zeros(2)], [torch.ones(2)]
        assert agreement(zero, one) == Agreement(None, 0.0)
        assert agreement(one, zero) == Agreement(None, None)
        assert agreement([], []) == agreement([None], [None]) == Agreement()

    def test_what_is_not_finite_is_not_hidden(self):
        found = agreement([torch.tensor([float("nan"), 1.0])], [torch.ones(2)])
        assert found.cosine != found.cosine
        assert found.norm_ratio != found.norm_ratio

    def test_means_of_what_is_defined(self):
        several = [Agreement(1.0, 2.0), Agreement(None, 0.0), Agreement(0.5, 1.0)]
        assert mean_agreement(several) == Agreement(0.75, 1.0)
        assert mean_agreement([Agreement()]) == Agreement()

    def test_relative_error_is_over_all_streams(self):
        truth = (torch.tensor([3.0, 0.0]), torch.tensor([4.0]))
        value = (torch.tensor([3.0, 0.3]), torch.tensor([4.4]))
        assert float(relative_error(value, truth)) == pytest.approx(0.1)


class TestEndToEnd:
    def test_it_is_autograd_of_the_whole_net(self):
        units = make_units()
        stages = make_stages(units, "petra")
        (images, labels) = microbatches(1)[0]
        evaluators = [evaluator for stage in stages for evaluator in stage.evaluators]
        before = tensors(units)
        generator = torch.get_rng_state()
        found = end_to_end(
            evaluators,
            snapshot_of(evaluators),
            (images,),
            labels,
            loss=functional.cross_entropy,
            microbatch=0,
            outputs_of={2},
        )
        assert torch.equal(generator, torch.get_rng_state())
        assert all(torch.equal(value, before[name]) for name, value in tensors(units).items())
        assert all(p.grad is None for unit in units for p in unit.parameters())
        assert set(found.outputs) == {2}

        functional.cross_entropy(Network(units)(images), labels).backward()
        for unit, gradients in zip(units, found.parameters, strict=True):
            for p, g in zip(unit.parameters(), gradients, strict=True):
                torch.testing.assert_close(g, p.grad, rtol=1e-12, atol=1e-15)

    def test_it_is_taken_at_the_snapshot(self):
        units, others = make_units(seed=0), make_units(seed=3)
        (images, labels) = microbatches(1)[0]

        def gradient(of: Sequence[nn.Module], at: Sequence[nn.Module]) -> list[Tensor | None]:
            evaluators = [e for stage in make_stages(of, "backprop") for e in stage.evaluators]
            snapshot = [[p.detach().clone() for p in unit.parameters()] for unit in at]
            loss = functional.cross_entropy
            found = end_to_end(evaluators, snapshot, (images,), labels, loss=loss, microbatch=0)
            return [g for row in found.parameters for g in row]

        pairs = zip(gradient(units, others), gradient(others, others), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


class TestDiagnosis:
    @pytest.mark.parametrize(("method", "keep"), METHODS)
    @pytest.mark.parametrize("k", [1, 2])
    def test_training_does_not_notice(self, method, keep, k):
        """The same bits of parameters, running statistics and momentum, with dropout, over two epochs."""

        def train(every: int) -> tuple[dict[str, Tensor], list[Tensor]]:
            units = make_units(lambda: inner(dropout=0.3))
            stages = make_stages(units, method, keep)
            if every:
                observe(stages, every=every)
            schedule = "sequential" if method_spec(method, keep=keep).locked else "tight"
            pipeline = make_pipeline(stages, k=k, schedule=schedule)
            for epoch in range(2):
                pipeline.train(iter(microbatches(5)), num_microbatches=5, offset=5 * epoch)
            states = [s for stage in stages for s in stage.updater.optimizer.state.values()]
            return tensors(units), [state["momentum_buffer"] for state in states]

        plain, momenta = train(0)
        for every in (1, 3):
            values, others = train(every)
            assert all(torch.equal(value, plain[name]) for name, value in values.items())
            assert all(torch.equal(a, b) for a, b in zip(momenta, others, strict=True))

    @pytest.mark.parametrize(("method", "keep"), METHODS)
    def test_without_a_rate_every_method_agrees(self, method, keep):
        """Nothing is old where nothing moves; whatever is rebuilt is what it was."""
        for findings in diagnose(make_units(lambda: inner(dropout=0.3)), method, keep, lr=0.0):
            for found in findings:
                for one in (found.current, found.forward):
                    assert one.cosine == pytest.approx(1.0, abs=1e-12)
                    assert one.norm_ratio == pytest.approx(1.0, rel=1e-9)
                assert all(e is None or e < 1e-12 for e in found.reconstruction_errors)

    def test_locked_methods_are_exact_at_both_parameters(self):
        for method in ("backprop", "reversible"):
            for found in [f for findings in diagnose(make_units(), method) for f in findings]:
                assert found.delay == 0
                assert found.current == found.forward
                assert found.current.cosine == pytest.approx(1.0, abs=1e-12)

    def test_the_delay_is_the_lookahead_and_the_last_stage_has_none(self):
        findings = diagnose(make_units(), "petra")
        assert [found.delay for found in findings[-1]] == [3, 2, 1, 0]
        assert findings[-1][-1].forward.cosine == pytest.approx(1.0, abs=1e-12)
        assert findings[-1][-1].current.cosine < 1 - 1e-6

    def test_nothing_is_old_in_an_empty_pipeline(self):
        first = diagnose(make_units(), "petra")[0]
        assert [found.delay for found in first] == [0, 0, 0, 0]
        for found in first:
            assert found.current.cosine == pytest.approx(1.0, abs=1e-12)

    @pytest.mark.parametrize("keep", ["graph", "inputs+parameters", "parameters"])
    def test_kept_parameters_give_the_gradient_of_the_forwards_parameters(self, keep):
        findings = diagnose(make_units(), "delayed", keep)[-1]
        for found in findings:
            assert found.forward.cosine == pytest.approx(1.0, abs=1e-12)
            assert found.forward.norm_ratio == pytest.approx(1.0, rel=1e-9)
            assert found.current.cosine < 1 - 1e-6
            assert found.delayed.cosine == pytest.approx(found.current.cosine, abs=1e-9)
            assert found.delayed.norm_ratio == pytest.approx(found.current.norm_ratio, rel=1e-9)

    def test_current_parameters_give_the_gradient_of_neither(self):
        for found in diagnose(make_units(), "delayed", "inputs")[-1][:-1]:
            assert found.forward.cosine < 1 - 1e-7
            assert found.current.cosine < 1 - 1e-7

    def test_only_rebuilt_inputs_have_an_error_and_it_grows_from_unit_to_unit(self):
        findings = diagnose(make_units(), "petra", cuts=[1, 3])[-1]
        none, first, second = (found.reconstruction_errors for found in findings)
        assert none == (None,)
        assert all(e is not None and e > 1e-6 for e in first)
        assert first[0] > first[1]  # on the way down
        assert second[0] is None  # not reversible
        assert second[3] is None  # the head

    def test_every_how_many(self):
        places = [findings[0].microbatch for findings in diagnose(make_units(), "petra", every=4)]
        assert places == [3, 7]

    def test_the_microbatch_counts_from_the_start_of_training(self):
        units = make_units()
        stages = make_stages(units, "petra")
        places = []
        observe(stages, every=4).report = lambda findings: places.append(findings[0].microbatch)
        pipeline = make_pipeline(stages)
        pipeline.train(iter(microbatches(6)), num_microbatches=6, offset=6)
        assert places == [7, 11]

    def test_a_gradient_of_one_microbatch_is_compared_and_not_the_mean_of_k(self):
        for findings in diagnose(make_units(), "backprop", k=3):
            for found in findings:
                assert found.current.norm_ratio == pytest.approx(1.0, rel=1e-9)

    def test_updates_are_the_last_stages(self):
        found = [findings[0].updates for findings in diagnose(make_units(), "petra", k=2)]
        assert found == [i // 2 for i in range(COUNT)]

    def test_nothing_is_left(self):
        stages = make_stages(make_units(), "petra")
        diagnosis = observe(stages, every=2)
        make_pipeline(stages).train(iter(microbatches(6)), num_microbatches=6)
        assert diagnosis._cases == {}


class TestGuesses:
    def guessed(self, guess, target=None, *, space) -> list[StageDiagnosis]:
        units = make_units()
        stages = make_stages(units, "backprop")
        found: list[StageDiagnosis] = []
        diagnosis = Diagnosis(
            [stage.evaluators for stage in stages],
            loss=functional.cross_entropy,
            every=1,
            report=found.extend,
        )
        (images, labels) = microbatches(1)[0]
        for j in range(len(stages)):
            diagnosis.forward(j, 0, (images,), labels, updates=0)
            diagnosis.backward(j, 0, updates=0)
            if j == 1:
                diagnosis.guess(j, 0, guess(units, images, labels), target, space=space)
        for j in reversed(range(len(stages))):
            assert not found
            diagnosis.finished(j, 0)
        return found

    @staticmethod
    def at_the_outputs(units, images, labels) -> list[Tensor]:
        lower, upper = Network(units[: CUTS[1]]), units[CUTS[1] :]
        streams = (images,)
        for unit in lower.units:
            streams = unit(*streams)
            streams = streams if isinstance(streams, tuple) else (streams,)
        leaves = [x.detach().requires_grad_() for x in streams]
        value = tuple(leaves)
        for unit in upper:
            out = unit(*value)
            value = out if isinstance(out, tuple) else (out,)
        return list(torch.autograd.grad(functional.cross_entropy(value[0], labels), leaves))

    def test_a_guess_in_activations_is_compared_with_the_gradient_of_the_outputs(self):
        found = self.guessed(
            lambda *net: [-2 * g for g in self.at_the_outputs(*net)],
            space="activation",
        )
        assert found[1].guess is not None
        assert found[1].guess.cosine == pytest.approx(-1.0)
        assert found[1].guess.norm_ratio == pytest.approx(2.0)
        assert [f.guess is None for f in found] == [True, False, True, True]

    def test_a_guess_in_weights_is_compared_with_the_gradient_of_the_stage(self):
        def guess(units, images, labels):
            loss = functional.cross_entropy(Network(units)(images), labels)
            own = [p for unit in units[CUTS[0] : CUTS[1]] for p in unit.parameters()]
            return [3 * g for g in torch.autograd.grad(loss, own)]

        found = self.guessed(guess, space="weight")[1].guess
        assert found is not None
        assert found.cosine == pytest.approx(1.0)
        assert found.norm_ratio == pytest.approx(3.0)

    def test_a_target_of_its_own(self):
        target = [torch.tensor([0.0, 1.0])]
        found = self.guessed(lambda *_: [torch.tensor([1.0, 1.0])], target, space="activation")[1].guess
        assert found is not None
        assert found.cosine == pytest.approx(0.5**0.5)
        assert found.norm_ratio == pytest.approx(2**0.5)

    def test_a_stage_that_gave_no_gradients_has_an_estimate_of_zero(self):
        found = self.guessed(lambda *_: [torch.ones(2)], [torch.ones(2)], space="weight")
        assert {f.current for f in found} == {Agreement(None, 0.0)}
