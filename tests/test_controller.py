"""The controller on machines whose times are made up."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support_control import Trace

from skippy.engine.controller import PATIENCE, Controller, Prior

MOST = 6
SETTLED = 100
"""Steps after which every width is known that matters."""
LARGEST_REGRET = 0.03
some = settings(max_examples=10, deadline=None)

TRACES = [
    # (machine, text, clients; 0: they come and go)
    ("cpu", "greedy", 1),
    ("cpu", "greedy", 0),
    ("cpu", "sampled", 4),
    ("cpu", "never", 1),
    ("cpu", "always", 1),
    ("cpu", "greedy, lookups", 4),
    ("cpu", "sampled, lookups", 1),
    ("cpu, noisy", "sampled", 1),
    ("cpu, noisy", "mixed", 4),
    ("cpu, slowed", "drifting", 1),
    ("cpu, slowed", "greedy", 4),
    ("gpu", "alternating", 1),
    ("gpu", "sampled", 0),
    ("lookup", "easy", 1),
    ("tiles", "medium", 4),
    ("rows cost", "greedy", 1),
    ("rows cost", "hard", 0),
]


@pytest.mark.parametrize(("machine", "text", "clients"), TRACES)
def test_little_is_missed_against_the_best_fixed_width(machine: str, text: str, clients: int) -> None:
    """From the first step on: what the controller tries to learn counts."""
    trace = Trace(machine, text, clients, most=MOST)
    assert trace.regret(Controller(MOST)) <= LARGEST_REGRET


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
        controller.observe(batch, width, seconds(width), accepted)
        widths.append(width)
    return widths


def usual(widths: list[int]) -> int:
    return max(set(widths), key=widths.count)


@some
@given(st.integers(1, 32), st.integers(1, 8), st.floats(1e-6, 10.0), st.floats(0.0, 0.05))
def test_rows_that_cost_nothing_are_all_drafted_where_every_token_is_accepted(
    most: int, batch: int, second: float, per_row: float
) -> None:
    widths = drive(Controller(most), batch, lambda width: second * (1.0 + per_row * width), 1.0, 300)[SETTLED:]
    assert widths.count(most) >= 0.89 * len(widths)
    rate = sum(1 + width for width in widths) / sum(1 + per_row * width for width in widths)
    assert rate >= 0.92 * (1 + most) / (1 + per_row * most)


@some
@given(st.integers(1, 32), st.integers(1, 8), st.floats(1e-6, 10.0), st.floats(0.0, 1.0), st.floats(0.05, 2.0))
def test_nothing_is_drafted_where_every_draft_fails_but_for_looks_that_cost_little(
    most: int, batch: int, second: float, draft: float, per_row: float
) -> None:
    def seconds(width: int) -> float:
        return second * (1.0 + draft * (width > 0) + per_row * width)

    widths = drive(Controller(most), batch, seconds, 0.0, 1500)[SETTLED:]
    assert usual(widths) == 0
    assert sum(map(seconds, widths)) <= 1.04 * len(widths) * second


def test_hopeless_widths_are_hardly_ever_looked_at() -> None:
    widths = drive(Controller(MOST), 16, lambda width: 1.0 + 20.0 * width, 0.5, 2000)[SETTLED:]
    assert usual(widths) == 0
    assert len(widths) - widths.count(0) <= 3


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
    assert usual(drive(controller, 1, seconds, 0.95, 2000)[-500:]) == MOST


def test_it_follows_a_machine_whose_rows_become_expensive() -> None:
    controller = Controller(MOST)
    assert usual(drive(controller, 4, lambda width: 1.0 + 0.02 * width, 0.8, 400)[SETTLED:]) == MOST
    assert usual(drive(controller, 4, lambda width: 1.0 + 0.3 * width, 0.8, 1500)[-200:]) in (2, 3, 4)


@some
@given(st.sampled_from([0.0, 0.5, 0.8, 0.95]), st.floats(2.0, 1e6), st.integers(0, 40))
def test_one_slow_step_does_not_change_its_mind_for_long(acceptance: float, slowness: float, place: int) -> None:
    controller = Controller(MOST)

    def seconds(width: int) -> float:
        return 1.0 + 0.3 * width * width

    before = usual(drive(controller, 8, seconds, acceptance, 300 + place)[SETTLED:])
    width = controller.width(8)
    controller.observe(8, width, slowness * seconds(width), [round(acceptance * width)] * 8)
    assert usual(drive(controller, 8, seconds, acceptance, 60)) == before


def test_what_other_sequences_emit_counts() -> None:
    """A draft pass for one sequence holds up those that have drafts without it."""

    def settle(others: int) -> int:
        controller = Controller(MOST)
        widths = []
        for _ in range(400):
            width = controller.width(4)
            widths.append(width)
            controller.observe(4, width, 1.0 + 0.6 * (width > 0) + 0.01 * width, [min(width, 4)], others)
        return usual(widths[SETTLED:])

    assert settle(others=0) >= 4
    assert settle(others=30) == 0


@given(
    st.integers(1, 32),
    st.lists(st.tuples(st.integers(1, 64), st.floats(1e-6, 10.0), st.integers(0, 32), st.integers(0, 9)), max_size=80),
)
def test_widths_are_within_bounds_and_the_same_calls_get_the_same_ones(
    most: int, steps: list[tuple[int, float, int, int]]
) -> None:
    one, other = Controller(most), Controller(most)
    for batch, seconds, accepted, others in steps:
        width = one.width(batch)
        assert 0 <= width <= most
        assert other.width(batch) == width
        for controller in (one, other):
            controller.observe(batch, width, seconds, [min(accepted, width)] * batch, others)


def test_widths_that_are_never_granted_are_not_waited_for() -> None:
    """Rows may be short: then a step is narrower than it was asked to be."""
    controller = Controller(MOST)
    granted = []
    for _ in range(400):
        granted.append(min(2, controller.width(16)))
        controller.observe(16, granted[-1], 1.0 + granted[-1], [0] * 16)
    assert usual(granted[200:]) == 0


def test_nothing_is_looked_at_in_a_step_that_is_not_observed() -> None:
    controller, steps = Controller(MOST), 1000

    def seconds(width: int) -> float:
        return 1.0 + width

    assert {controller.best(4) for _ in range(steps)} == {2}, "nothing is known yet"
    drive(controller, 4, seconds, 0.3, SETTLED)
    assert {controller.best(4) for _ in range(steps)} == {0}
    asked = drive(controller, 4, seconds, 0.3, steps, seed=1)
    assert set(asked) > {0}, "else there was nothing to look at"


def test_a_look_that_takes_two_steps_goes_on_in_one_that_is_not_observed() -> None:
    controller = Controller(MOST)
    assert controller.best(4, rides=True) == 2
    assert controller.width(4) == MOST
    assert {controller.best(4, rides=True) for _ in range(2 * PATIENCE)} == {MOST}
    assert {controller.best(4) for _ in range(2 * PATIENCE)} == {2}
    assert controller.width(4) == MOST, "it was not timed yet"


def test_the_best_is_told_by_all_that_is_known() -> None:
    times = {width: 1.0 + 0.4 * width for width in range(MOST + 1)}
    prior = Prior(seconds={4: times, 8: times}, acceptance=[1.0] * MOST)
    controller = Controller(MOST, prior)
    assert controller.best(4) == controller.best(8) == MOST
    drive(controller, 4, lambda width: times[width], 0.0, SETTLED)
    assert controller.best(4) == controller.best(8) == 0, "drafts are rejected at any batch size"


def test_room_for_nearly_all_of_a_width_is_a_look_at_it() -> None:
    """Near their end, sequences draft less than they are granted."""
    controller = Controller(16)
    first = []
    for _ in range(12):
        first.append(controller.width(8))
        controller.observe(8, 0.92 * first[-1], 1.0, [0] * 8)
    assert first.count(16) == 2


def test_what_there_was_no_room_for_was_not_refused() -> None:
    controller = Controller(16)
    for _ in range(200):
        controller.width(8)
        controller.observe(8, 15.0, 1.0, [15] * 8)
    tokens = controller._acceptance.tokens()
    assert tokens[16] > 16.9


def test_without_any_measurement_drafts_are_short() -> None:
    controller = Controller(10)
    widths = [controller.width(4) for _ in range(400)]
    assert widths[4 * PATIENCE :] == [2] * (400 - 4 * PATIENCE)
    assert widths[-1] == 2


class TestPrior:
    """What is known before the first step."""

    def test_what_is_known_need_not_be_looked_at_first(self) -> None:
        times = {width: 1.0 + 0.1 * width for width in range(MOST + 1)}
        controller = Controller(MOST, Prior(seconds={1: times}, acceptance=[0.95] * MOST))
        widths = drive(controller, 1, lambda width: times[width], 0.95, 20)
        assert usual(widths) == widths[0] == MOST
        assert widths.count(MOST) >= 18

    def test_a_batch_size_of_which_nothing_is_known_is_learnt(self) -> None:
        controller = Controller(MOST, Prior(seconds={1: {0: 1.0}}, acceptance=[]))
        assert {0, 2, MOST} <= set(drive(controller, 4, lambda _: 1.0, 0.5, SETTLED))

    def test_it_is_corrected_while_serving(self) -> None:
        wrong = Prior(seconds={1: dict.fromkeys(range(MOST + 1), 1.0)}, acceptance=[1.0] * MOST)
        controller = Controller(MOST, wrong)
        assert controller.width(1) == MOST
        assert usual(drive(controller, 1, lambda width: 1.0 + width, 0.3, 1000)[500:]) == 0

    @pytest.mark.parametrize(
        ("known", "tokens"),
        [
            # (reached * share + 2 * chance of the depth before) / (reached + 2), of 16 drafts
            ([], [1.0, 1.5, 1.75]),
            ([0.75], [1.0, 1 + 13 / 18, 1 + 13 / 18 + (13 / 18) ** 2]),
            ([0.75, 0.5], [1.0, 1 + 13 / 18, 1 + 13 / 18 + 13 / 18 * (8 + 26 / 18) / 14]),
            ([0.75, 0.5, 0.25], [1.0, 1 + 13 / 18, 1 + 13 / 18 + 13 / 18 * (8 + 26 / 18) / 14]),
            ([0.0, 0.0], [1.0, 1 + 1 / 18, 1 + (1 / 18) + (1 / 18) ** 2]),
        ],
    )
    def test_acceptance_may_be_known_to_any_depth(self, known: list[float], tokens: list[float]) -> None:
        controller = Controller(2, Prior(seconds={}, acceptance=known))
        assert controller._acceptance.tokens() == pytest.approx(tokens)
