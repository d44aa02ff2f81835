"""The controller on machines whose times are made up."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skippy.engine.controller import PROBE_EVERY, Controller

MOST = 6
SETTLED = 100
"""Steps after which every width was measured."""


def drive(
    controller: Controller,
    batch: int,
    seconds: Callable[[int], float],
    acceptance: float,
    steps: int,
    seed: int = 0,
) -> list[int]:
    """The widths of some steps on a machine where every drafted token is accepted with the same probability."""
    chance = random.Random(seed)
    widths = []
    for _ in range(steps):
        width = controller.width(batch)
        accepted = [next((d for d in range(width) if chance.random() >= acceptance), width) for _ in range(batch)]
        controller.observe(batch, width, seconds(width), accepted if width else [])
        widths.append(width)
    return widths


def usual(widths: list[int]) -> int:
    return max(set(widths), key=widths.count)


def test_rows_that_cost_nothing_are_all_drafted() -> None:
    assert usual(drive(Controller(MOST), 1, lambda _: 1.0, 0.8, 400)[SETTLED:]) == MOST


def test_nothing_is_drafted_where_drafts_cost_more_than_they_bring() -> None:
    widths = drive(Controller(MOST), 16, lambda width: 1.0 + 1.0 * width, 0.5, 400)[SETTLED:]
    assert usual(widths) == 0
    assert len(widths) - widths.count(0) <= 3 * len(widths) / PROBE_EVERY


def test_a_batch_size_that_does_not_pay_does_not_keep_another_from_drafting() -> None:
    controller = Controller(MOST)
    drive(controller, 16, lambda width: 1.0 + width, 0.8, 200)
    assert usual(drive(controller, 1, lambda width: 1.0 + 0.05 * width, 0.8, 200)[SETTLED:]) == MOST
    assert usual(drive(controller, 16, lambda width: 1.0 + width, 0.8, 200)) == 0


def test_it_follows_a_text_that_becomes_hard_to_foresee_and_easy_again() -> None:
    controller = Controller(MOST)
    seconds = [1.0, 1.9, 2.0, 2.1, 2.2, 2.3, 2.4].__getitem__
    assert usual(drive(controller, 1, seconds, 0.95, 300)[SETTLED:]) == MOST
    assert usual(drive(controller, 1, seconds, 0.05, 600)[SETTLED:]) == 0
    # Only a look at another width now and then tells that drafts are accepted again.
    assert usual(drive(controller, 1, seconds, 0.95, 4000)[-500:]) == MOST


def test_one_slow_step_does_not_change_its_mind() -> None:
    controller = Controller(MOST)
    before = usual(drive(controller, 1, lambda _: 1.0, 0.8, 200)[SETTLED:])
    controller.observe(1, before, 1000.0, [before])
    assert usual(drive(controller, 1, lambda _: 1.0, 0.8, 20)) == before


def test_acceptance_is_a_half_until_something_is_known() -> None:
    controller = Controller(MOST)
    assert [controller.acceptance(depth) for depth in range(MOST)] == [0.5] * MOST
    for _ in range(200):
        controller.observe(1, 2, 1.0, [1])
    assert controller.acceptance(0) > 0.98
    assert controller.acceptance(1) < 0.02
    assert controller.acceptance(2) == 0.5


@given(
    st.integers(1, 32),
    st.lists(st.tuples(st.integers(1, 64), st.floats(1e-6, 10.0), st.integers(0, 32)), max_size=80),
)
def test_widths_are_within_bounds_whatever_happens(most: int, steps: list[tuple[int, float, int]]) -> None:
    controller = Controller(most)
    for batch, seconds, accepted in steps:
        width = controller.width(batch)
        assert 0 <= width <= most
        controller.observe(batch, width, seconds, [min(accepted, width)] * batch if width else [])


@pytest.mark.parametrize("seed", range(5))
def test_the_same_times_give_the_same_widths(seed: int) -> None:
    def once() -> list[int]:
        return drive(Controller(MOST), 4, lambda width: 1.0 + 0.2 * width, 0.6, 200, seed)

    assert once() == once()


def test_widths_that_are_never_granted_are_given_up() -> None:
    """Rows may be short: then a step is narrower than it was asked to be."""
    controller = Controller(MOST)
    widths = []
    for _ in range(400):
        width = min(2, controller.width(16))
        controller.observe(16, width, 1.0 + 0.1 * width, [width] * 16)
        widths.append(controller.width(16))
    assert usual(widths[200:]) == 2


def test_without_any_measurement_drafts_are_short() -> None:
    controller = Controller(10)
    widths = [controller.width(4) for _ in range(400)]
    assert widths[-1] == 2


class TestPrior:
    """What is known before the first step."""

    def test_what_is_known_need_not_be_measured(self) -> None:
        times = {0: 1.0, 1: 1.1, 2: 1.2, 3: 1.3, 4: 1.4, 5: 1.5, 6: 1.6}
        controller = Controller(MOST, {"seconds": {1: times}, "acceptance": [0.9] * MOST})
        widths = drive(controller, 1, lambda width: 1.0 + 0.1 * width, 0.9, PROBE_EVERY - 1)
        assert set(widths) == {MOST}

    def test_a_batch_size_of_which_nothing_is_known_is_measured(self) -> None:
        controller = Controller(MOST, {"seconds": {1: {0: 1.0}}, "acceptance": []})
        assert set(drive(controller, 4, lambda _: 1.0, 0.5, SETTLED)) == set(range(MOST + 1))

    def test_a_width_of_which_nothing_is_known_is_measured(self) -> None:
        times = dict.fromkeys(range(MOST), 1.0)
        controller = Controller(MOST, {"seconds": {1: times}, "acceptance": [0.5] * MOST})
        assert drive(controller, 1, lambda _: 1.0, 0.5, 2) == [MOST, MOST]

    def test_it_is_corrected_while_serving(self) -> None:
        controller = Controller(MOST, {"seconds": {1: dict.fromkeys(range(MOST + 1), 1.0)}, "acceptance": [1.0] * MOST})
        assert controller.width(1) == MOST
        assert usual(drive(controller, 1, lambda width: 1.0 + width, 0.3, 1000)[500:]) == 0

    def test_acceptance_beyond_its_widest_is_left_out(self) -> None:
        controller = Controller(2, {"seconds": {}, "acceptance": [0.75, 0.5, 0.25]})
        assert controller.acceptance(0) == pytest.approx((16 * 0.75 + 0.5) / 17)
