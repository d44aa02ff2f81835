"""Sizes and times worked out by hand, of models whose configurations are published."""

from __future__ import annotations

from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skippy.engine.config import Quantization
from skippy.engine.roofline import (
    CARDS,
    Cost,
    ModelSizes,
    beta_eff,
    closed_form,
    kv_bytes_per_token,
    loaded_weights,
    matrices_bytes,
    tokens_per_step,
)

EIGHT_B = ModelSizes(
    vocab_size=128_256,
    hidden_size=4096,
    layers=32,
    matrices=((4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (14336, 4096), (4096, 14336)),
    vectors=65 * 4096,
    kv_width=2 * 8 * 128,
    query_width=4096,
    head_dim=128,
    tied=False,
)
"""Llama-3.1-8B."""

A10G = CARDS["a10g"]
RATES = st.floats(0.0, 1.0)


def cost_of(quantization: Quantization = "none", card: str = "a10g") -> Cost:
    weights = loaded_weights(EIGHT_B, 2, 2, quantization, 8192, on_cpu=False)
    return Cost.of(CARDS[card], EIGHT_B, weights, 2, quantization)


class TestBytes:
    def test_parameters_and_kv_of_an_8b_model(self) -> None:
        assert EIGHT_B.layer == 218_103_808
        assert EIGHT_B.parameters == 8_030_261_248
        assert kv_bytes_per_token(EIGHT_B, 2) == 131_072

    def test_a_gpu_holds_every_number_once_and_the_rotary_tables(self) -> None:
        weights = loaded_weights(EIGHT_B, 2, 2, "none", 8192, on_cpu=False)
        assert weights.embedding == weights.head == 1_050_673_152
        assert weights.total - weights.tables == 2 * 8_030_261_248
        assert weights.tables == 2 * 8192 * 128 * 2
        assert weights.read == 2 * (8_030_261_248 - 128_256 * 4096)

    def test_quantised_matrices_carry_their_scales(self) -> None:
        rows = 4096 + 1024 + 1024 + 4096 + 14336 + 14336 + 4096
        assert matrices_bytes(EIGHT_B, 2, "int8") == 218_103_808 + 4 * rows
        assert matrices_bytes(EIGHT_B, 2, "nf4") == 218_103_808 // 2 + 218_103_808 // 64 * 4
        assert loaded_weights(EIGHT_B, 2, 2, "nf4", 8192, on_cpu=False).head == 1_050_673_152

    def test_blocks_that_are_not_filled_count_whole(self) -> None:
        odd = ModelSizes(10, 5, 1, ((5, 5),), 0, 2, 5, 5, tied=True)
        assert matrices_bytes(odd, 2, "nf4") == 32 + 4

    def test_a_tied_head_is_there_once_on_a_gpu_and_packed_apart_on_a_cpu(self) -> None:
        tied = ModelSizes(100, 8, 2, ((8, 8),), 40, 8, 8, 8, tied=True)
        assert loaded_weights(tied, 2, 2, "none", 16, on_cpu=False).embedding == 0
        half, whole = (loaded_weights(tied, 4, stored, "none", 16, on_cpu=True) for stored in (2, 4))
        assert (half.embedding, half.head, half.layers) == (3200, 1600, 2 * 64 * 2)
        assert (whole.embedding, whole.head, whole.layers) == (3200, 3200, 2 * 64 * 4)
        assert half.vectors == 160
        assert half.tables == 2 * 16 * 8 * 4


class TestTime:
    def test_a_single_row_waits_for_the_weights(self) -> None:
        cost = cost_of()
        read = loaded_weights(EIGHT_B, 2, 2, "none", 8192, on_cpu=False).read + 1000 * 131_072
        assert cost.pass_seconds(1, 1, 1000) == pytest.approx(read / 600e9)

    def test_many_rows_wait_for_the_arithmetic(self) -> None:
        cost = cost_of()
        products = 2 * 1024 * (32 * 218_103_808 + 128_256 * 4096)
        attention = 4 * 1024 * 100 * 32 * 4096
        assert cost.pass_seconds(1, 1024, 100) == pytest.approx((products + attention) / 70e12)

    @pytest.mark.parametrize(("quantization", "rows"), [("none", 116), ("int8", 116), ("nf4", 38)])
    def test_rows_that_cost_nothing(self, quantization: Quantization, rows: int) -> None:
        cost = cost_of(quantization)
        assert cost.free_rows == rows
        assert cost.pass_seconds(1, rows, 0) == cost.pass_seconds(1, 1, 0)
        assert cost.pass_seconds(1, rows + 1, 0) > cost.pass_seconds(1, 1, 0)

    def test_a_draft_reads_its_share(self) -> None:
        weights = loaded_weights(EIGHT_B, 2, 2, "nf4", 8192, on_cpu=False)
        assert beta_eff(weights, 0.5, 1.0) == pytest.approx(0.605, abs=0.001)
        assert beta_eff(weights, 0.5, 32_768 / 128_256) == pytest.approx(0.448, abs=0.001)
        assert beta_eff(weights, 1.0, 1.0) == 1.0

    def test_a_step_is_a_draft_and_a_verification(self) -> None:
        cost = cost_of()
        assert cost.step_seconds(4, 0, 100, 0.5, 1.0) == cost.pass_seconds(4, 4, 100)
        both = cost.pass_seconds(4, 12, 100, 0.5, 0.25) + cost.pass_seconds(4, 16, 100)
        assert cost.step_seconds(4, 3, 100, 0.5, 0.25) == both

    @given(st.sampled_from(list(CARDS)), st.sampled_from(get_args(Quantization)), st.integers(1, 64), st.integers(0, 8))
    def test_more_never_takes_less(self, card: str, quantization: Quantization, batch: int, width: int) -> None:
        cost = cost_of(quantization, card)
        step = cost.step_seconds(batch, width, 500, 0.5, 0.5)
        assert step <= cost.step_seconds(batch + 1, width, 500, 0.5, 0.5)
        assert step <= cost.step_seconds(batch, width + 1, 500, 0.5, 0.5)
        assert step <= cost.step_seconds(batch, width, 501, 0.5, 0.5)
        assert step <= cost.step_seconds(batch, width, 500, 0.6, 0.5)

    @given(RATES, st.integers(0, 32))
    def test_tokens_per_step_is_the_geometric_sum(self, acceptance: float, width: int) -> None:
        tokens = tokens_per_step(acceptance, width)
        assert 1.0 <= tokens <= width + 1
        if acceptance < 0.999:
            assert tokens == pytest.approx((1 - acceptance ** (width + 1)) / (1 - acceptance))

    def test_the_closed_form(self) -> None:
        assert closed_form(0.8, 0, 0.5) == 1.0
        assert closed_form(0.8, 4, 0.5) == pytest.approx((1 - 0.8**5) / (0.2 * 1.5))


class TestCards:
    def test_each_names_its_source_and_is_plausible(self) -> None:
        for card in CARDS.values():
            assert card.source
            assert 8e9 <= card.memory_bytes <= 200e9
            assert card.single <= card.half <= card.int8

    def test_rows_are_free_on_an_a10g_as_long_as_its_datasheet_says(self) -> None:
        assert A10G.half / A10G.bandwidth == pytest.approx(117, abs=1)
