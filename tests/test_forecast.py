"""From steps to tokens per second, on made-up steps."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skippy.engine.forecast import FEWEST, Draft, Observations, accepted_along, predict

LENGTH = 40


def seen_with(
    times: dict[tuple[int, int], float], accepted: dict[int, int], width: int, prompts: int = 1
) -> Observations:
    """Steps that take times[batch, width], and at each place of every prompt a draft."""
    seen = Observations(prompts)
    for (batch, at_width), seconds in times.items():
        steps = seen.times[1 << (batch - 1).bit_length(), at_width]
        for _ in range(FEWEST):
            steps.draft.append(seconds / 4)
            steps.verify.append(seconds / 2)
            steps.host.append(seconds / 4)
            steps.batch.append(batch)
            steps.weight.append(1.0)
    for places in seen.drafts:
        for place, count in accepted.items():
            places[place].append(Draft(width, count))
    return seen


class TestWalk:
    def test_a_decode_goes_from_place_to_place(self) -> None:
        drafts = {place: [Draft(4, accepted)] for place, accepted in {1: 2, 4: 0, 5: 4, 10: 1}.items()}
        assert accepted_along(drafts, 4, 12) == [2, 0, 4, 1]
        assert sum(accepted_along(drafts, 4, 12)) + 4 == 11, "the first token is the prompt's"

    def test_a_narrower_draft_is_the_beginning_of_a_wider_one(self) -> None:
        drafts = {place: [Draft(4, 4)] for place in range(1, 20)}
        assert accepted_along(drafts, 2, 13) == [2, 2, 2, 2]
        assert accepted_along(drafts, 0, 5) == [0, 0, 0, 0]

    def test_the_nearest_place_stands_for_one_that_is_not_known(self) -> None:
        assert accepted_along({1: [Draft(3, 3)], 9: [Draft(3, 0)]}, 3, 14) == [3, 3, 0, 0, 0, 0, 0]

    def test_drafts_that_were_too_narrow_tell_nothing(self) -> None:
        drafts = {1: [Draft(1, 0), Draft(4, 3)], 2: [Draft(1, 0)]}
        assert accepted_along(drafts, 4, 9) == [3, 3]

    def test_nothing_is_accepted_where_nothing_is_known(self) -> None:
        assert accepted_along({}, 4, 4) == [0, 0, 0]

    @given(
        st.dictionaries(st.integers(1, LENGTH - 1), st.integers(0, 6)),
        st.integers(0, 6),
        st.integers(1, LENGTH),
    )
    def test_it_emits_exactly_the_text(self, accepted: dict[int, int], width: int, length: int) -> None:
        steps = accepted_along({place: [Draft(6, count)] for place, count in accepted.items()}, width, length)
        assert 1 + sum(steps) + len(steps) == length
        assert all(0 <= count <= width for count in steps)


class TestTimes:
    def test_batch_sizes_between_are_interpolated_and_beyond_are_not(self) -> None:
        seen = seen_with({(1, 2): 1.0, (4, 2): 4.0, (4, 3): 9.0}, {}, 2)
        assert [seen.step_seconds(batch, 2) for batch in (1, 2, 3, 4, 8)] == [1.0, 2.0, 3.0, 4.0, 4.0]
        assert seen.step_seconds(1, 3) == 9.0
        with pytest.raises(KeyError):
            seen.step_seconds(1, 5)

    def test_a_prior_is_per_sequence_and_without_the_host(self) -> None:
        prior = seen_with({(1, 0): 1.0, (3, 2): 6.0}, {1: 2, 2: 1, 3: 0, 4: 0}, 2).prior(3)
        assert prior["seconds"] == {1: {0: 0.75}, 4: {2: 1.5}}
        assert prior["acceptance"] == [0.5, 0.25]

    def test_a_prior_leaves_out_what_was_hardly_seen(self) -> None:
        seen = seen_with({(1, 0): 1.0}, {}, 2)
        seen.times[1, 0].verify.pop()  # the others are not looked at
        assert seen.prior(3) == {"seconds": {}, "acceptance": []}

    def test_steps_count_by_their_weights(self) -> None:
        seen = seen_with({(1, 2): 4.0}, {}, 2)
        seen.times[1, 2].host[0] += 8.0
        assert seen.step_seconds(1, 2) == pytest.approx(4.0 + 8.0 / 3)
        seen.times[1, 2].weight[0] = 0.0
        assert seen.step_seconds(1, 2) == pytest.approx(4.0)

    def test_narrow_drafts_stand_oftener_where_wide_ones_hold(self) -> None:
        seen = seen_with({}, {1: 4, 20: 0}, 4)
        weights = [seen.weight(0, 3, width, (0, 2, 4)) for width in (0, 2, 4)]
        assert weights == [3.0, 1.0, 0.6]
        assert seen.weight(0, 19, 4, (0, 2, 4)) == 1.0
        assert Observations(1).weight(0, 1, 4, (0, 2, 4)) == 1.0

    def test_one_chance_explains_all_drafts(self) -> None:
        seen = seen_with({}, {1: 2, 2: 1, 3: 0}, 2)
        assert seen.constant_acceptance() == 3 / 5
        assert Observations(1).constant_acceptance() == 0.0


class TestPrediction:
    def test_plain_decoding_alone(self) -> None:
        seen = seen_with({(1, 0): 0.5}, {}, 0)
        forecast = predict(seen, [7], 0, 1, 11)
        assert forecast.tokens_per_second == 11 / (10 * 0.5)
        assert forecast.tokens_per_step == 1.0

    def test_prompts_take_their_time(self) -> None:
        seen = seen_with({(1, 0): 0.5}, {}, 0, prompts=2)
        seen.prompt_seconds, seen.prompt_tokens = 3.0, 30
        assert predict(seen, [5, 15], 0, 1, 11).tokens_per_second == 22 / (20 * 0.5 + 2.0)

    def test_drafts_that_hold_save_steps(self) -> None:
        seen = seen_with({(1, 3): 2.0}, dict.fromkeys(range(1, LENGTH), 3), 3)
        forecast = predict(seen, [1], 3, 1, 21)
        assert forecast.tokens_per_second == 21 / (5 * 2.0)
        assert forecast.tokens_per_step == 21 / 6

    def test_a_batch_thins_out_at_the_end(self) -> None:
        seen = seen_with({(1, 0): 1.0, (2, 0): 1.5}, {}, 0, prompts=3)
        # Two run together for ten steps, then the third alone.
        assert predict(seen, [1, 1, 1], 0, 2, 11).tokens_per_second == 33 / (10 * 1.5 + 10 * 1.0)

    def test_outputs_of_one_token_need_no_step_but_the_prompts(self) -> None:
        seen = seen_with({(1, 0): 1.0}, {}, 0, prompts=2)
        seen.prompt_seconds, seen.prompt_tokens = 1.0, 1
        assert predict(seen, [1, 1], 4, 1, 1).tokens_per_second == 1.0
