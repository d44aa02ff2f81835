"""Quantised matrices: what they hold, what they multiply, what they weigh, and that nothing but the tokens changes."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support_engine import TINY_ADAPTER, TINY_CONFIG, write_adapter, write_checkpoint
from support_exactness import MODES, Answers, assert_exact, naive_model, plain_answers, requests
from torch import Tensor, nn

from skippy.engine import CheckpointError, Engine, EngineConfig, quant
from skippy.engine.build import build
from skippy.engine.config import Quantization
from skippy.engine.linear import RowLinear, Tiling, measure_tiling, plain
from skippy.engine.model import CausalLM, _Fused
from skippy.engine.quant import Int8Product, NF4Product, pack_as, quantise
from skippy.engine.reference import reference_choice, reference_logits
from skippy.engine.runner import Rows
from skippy.engine.sampling import SamplingState
from skippy.engine.shape import full_plan
from skippy.engine.weights import load_model, open_checkpoint

CPU = torch.device("cpu")
KINDS: tuple[Quantization, ...] = ("int8", "nf4")
SHAPES = [(64, 64), (224, 64), (64, 112), (97, 33), (8, 3), (33, 66), (130, 520)]
"""Outputs and inputs; most are no multiple of a block."""

# Table of the levels: arXiv 2305.14314, appendix E.
LEVELS = torch.tensor(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ]
)


def plain_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Integers of float64, and the step of each row."""
    step = weight.double().abs().amax(-1, keepdim=True) / 127
    return (weight.double() / step).round(), step


def plain_int8_product(x: Tensor, weight: Tensor) -> Tensor:
    rows, x_step = plain_int8(x)
    columns, step = plain_int8(weight)
    return (rows @ columns.T) * x_step * step.T


def plain_nf4(weight: Tensor) -> Tensor:
    """The weight again, every number the level nearest to it of its block's."""
    flat = weight.flatten()
    blocks = F.pad(flat, (0, -len(flat) % 64)).view(-1, 64)
    largest = blocks.abs().amax(-1, keepdim=True)
    nearest = (blocks[..., None] / largest.clamp(min=1e-30)[..., None] - LEVELS).abs().argmin(-1)
    return (LEVELS[nearest] * largest).flatten()[: len(flat)].view(weight.shape)


def random_matrix(rows: int, columns: int, seed: int = 0) -> Tensor:
    """With rows of very different size."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) * torch.rand(rows, 1, generator=generator).exp()


class TestInt8:
    @pytest.mark.parametrize("bias", [False, True])
    @pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
    def test_it_is_the_product_of_the_rounded_matrices(self, outputs: int, inputs: int, bias: bool) -> None:
        weight, x = random_matrix(outputs, inputs), random_matrix(21, inputs, 1)
        offset = torch.linspace(-3, 3, outputs) if bias else None
        expected = plain_int8_product(x, weight) + (0 if offset is None else offset)
        found = Int8Product.of(weight, offset)(x).double()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))

    @settings(derandomize=True, deadline=None, max_examples=40)
    @given(rows=st.integers(1, 20), columns=st.integers(1, 200), seed=st.integers(0, 9))
    def test_a_weight_is_off_by_half_a_step_at_most(self, rows: int, columns: int, seed: int) -> None:
        weight = random_matrix(rows, columns, seed)
        product = Int8Product.of(weight, None)
        assert torch.equal(product.scale, weight.abs().amax(-1)), "one scale for each row"
        held = product.weight.double() * product.scale.double()[:, None] / 127
        assert ((held - weight).abs() <= product.scale[:, None] / 254 * (1 + 1e-5)).all()

    def test_sums_of_the_largest_integers_are_exact(self) -> None:
        """Beyond 2^24, where float32 has no room for all integers."""
        weight, x = torch.full((7, 5000), 1.0), torch.full((3, 5000), -1.0)
        weight[:, ::2], weight[0, 1] = -1.0, 3 / 127
        x[:, ::2] = 1.0
        product = Int8Product.of(weight, None)
        exact = product.weight.long() @ (x.long() * 127).T
        assert exact.abs().min() > 2**24
        assert torch.equal(product(x).T, exact.float() * torch.tensor(1 / 127**2))

    @pytest.mark.parametrize("rows", [1, 4])
    def test_a_row_of_zeros_stays_one(self, rows: int) -> None:
        weight = random_matrix(16, 32)
        weight[5] = 0
        x = random_matrix(rows, 32, 1)
        x[0] = 0
        y = Int8Product.of(weight, None)(x)
        assert not y[0].any()
        assert not y[:, 5].any()
        assert y.isfinite().all()


class TestNF4:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
    @pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
    def test_the_weight_is_the_nearest_levels(self, outputs: int, inputs: int, dtype: torch.dtype) -> None:
        weight = random_matrix(outputs, inputs).to(dtype)
        expected = plain_nf4(weight.float())
        assert torch.equal(NF4Product.of(weight, None).dequantised(dtype), expected.to(dtype))

    @pytest.mark.parametrize("bias", [False, True])
    @pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
    def test_it_is_the_product_with_that(self, outputs: int, inputs: int, bias: bool) -> None:
        weight, x = random_matrix(outputs, inputs), random_matrix(21, inputs, 1)
        offset = torch.linspace(-3, 3, outputs) if bias else None
        expected = x.double() @ plain_nf4(weight).double().T + (0 if offset is None else offset)
        found = NF4Product.of(weight, offset)(x).double()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))

    @settings(derandomize=True, deadline=None, max_examples=40)
    @given(rows=st.integers(1, 20), columns=st.integers(1, 200), seed=st.integers(0, 9))
    def test_a_weight_is_off_by_half_the_widest_gap_at_most(self, rows: int, columns: int, seed: int) -> None:
        weight = random_matrix(rows, columns, seed)
        product = NF4Product.of(weight, None)
        largest = product.scale.repeat_interleave(64)[: weight.numel()].view(weight.shape)
        widest = float(LEVELS.diff().max())
        assert ((product.dequantised(torch.float32) - weight).abs() <= largest * (widest / 2 + 1e-6)).all()

    def test_zeros_stay_zeros(self) -> None:
        weight = random_matrix(4, 64)
        weight[2] = 0
        assert not NF4Product.of(weight, None).dequantised(torch.float32)[2].any()


@pytest.mark.parametrize("kind", KINDS)
class TestBoth:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
    @pytest.mark.parametrize(("outputs", "inputs"), [(64, 64), (256, 704), (97, 33)])
    def test_a_row_is_the_same_to_the_bit_in_every_company(
        self, kind: Quantization, outputs: int, inputs: int, dtype: torch.dtype
    ) -> None:
        product = RowLinear(random_matrix(outputs, inputs).to(dtype), None, pack_as(kind))
        x, padded = random_matrix(128, inputs, 1).to(dtype), product.tiling.padded
        together = product(x)
        assert together.dtype == dtype
        for rows in range(1, 81):
            assert torch.equal(product(x[: padded(rows)])[:rows], together[:rows]), f"{rows} rows"
        for start in range(1, 81):
            assert torch.equal(product(x[start : start + padded(1)])[0], together[start]), f"from {start} on"

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
    def test_the_tiling_is_that_of_the_sums_it_makes(self, kind: Quantization, dtype: torch.dtype) -> None:
        weight, x = random_matrix(256, 704).to(dtype), random_matrix(256, 704, 1).to(dtype)
        measured = RowLinear(weight, None, pack_as(kind)).tiling
        if kind == "int8":
            assert measured == measure_tiling(Int8Product.of(weight, None), x) == Tiling(1, 256)
        else:
            assert measured == RowLinear(weight, None, lambda w, b: (plain(w, b), plain)).tiling

    @pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
    def test_it_holds_no_more_than_the_formula_says(self, kind: Quantization, outputs: int, inputs: int) -> None:
        product, _ = quantise(random_matrix(outputs, inputs), None, kind)
        weights = outputs * inputs
        blocks = math.ceil(weights / 64)
        assert isinstance(product, Int8Product | NF4Product)
        expected = weights + 4 * outputs if kind == "int8" else blocks * (32 + 4)
        assert sum(t.untyped_storage().nbytes() for t in (product.weight, product.scale)) == expected

    @pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
    def test_by_pieces_it_is_the_same(
        self, kind: Quantization, outputs: int, inputs: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        weight = random_matrix(outputs, inputs)
        whole, _ = quantise(weight, None, kind)
        monkeypatch.setattr(quant, "PIECE", 640)
        pieces, _ = quantise(weight, None, kind)
        assert isinstance(whole, Int8Product | NF4Product)
        assert isinstance(pieces, Int8Product | NF4Product)
        assert torch.equal(whole.weight, pieces.weight)
        assert torch.equal(whole.scale, pieces.scale)


def test_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="no quantisation 'int2'"):
        quantise(torch.ones(2, 2), None, "int2")  # type: ignore[arg-type]
    assert pack_as("none") is None


# --- models ------------------------------------------------------------------------------------------------------

TEXT = [1, 5, 9, 5, 9, 40, 41, 42, *range(50, 90)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With biases, and products that are no multiple of a block wide."""
    folder = write_checkpoint(tmp_path_factory.mktemp("tiny"), attention_bias=True, mlp_bias=True)
    write_adapter(folder)
    return folder


def engine_logits(folder: Path, kind: Quantization) -> Tensor:
    built = build(EngineConfig(model=str(folder), device="cpu", dtype="float32", quantization=kind, max_num_seqs=1))
    return built.runner.run([Rows(TEXT, 0, list(range(5)), len(TEXT))], full_plan(built.checkpoint.config))


class PlainInt8(nn.Linear):
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features)
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return (plain_int8_product(x, self.weight) + self.bias).float()


def plain_model(folder: Path, kind: Quantization) -> CausalLM:
    """The model with the matrices of its layers quantised in plain PyTorch."""
    model = load_model(open_checkpoint(str(folder)), torch.float32, CPU, 256)
    for module in model.modules():
        for fused in [value for value in vars(module).values() if isinstance(value, _Fused)]:
            if kind == "int8":
                fused._linears = tuple(PlainInt8(linear) for linear in fused._linears)
            if kind == "nf4":
                sizes = [linear.out_features for linear in fused._linears]
                weights = torch.split(plain_nf4(fused.parameters()[0]), sizes)
                for linear, weight in zip(fused._linears, weights, strict=True):
                    linear.weight = nn.Parameter(weight, requires_grad=False)
    return model


class TestGradients:
    @pytest.mark.parametrize("product", [Int8Product, NF4Product])
    def test_the_gradient_by_the_input_is_that_of_the_weight_it_stands_for(
        self, product: type[Int8Product] | type[NF4Product]
    ) -> None:
        torch.manual_seed(0)
        packed = product.of(torch.randn(96, 64), torch.randn(96))
        x, into = torch.randn(5, 64, requires_grad=True), torch.randn(5, 96)
        (gradient,) = torch.autograd.grad(packed(x), x, into)
        torch.testing.assert_close(gradient, into @ packed.dequantised(torch.float32))
        assert torch.equal(packed(x), packed(x.detach()))


class TestModel:
    def test_the_logits_are_those_of_a_plain_implementation(self, folder: Path) -> None:
        found, expected = engine_logits(folder, "nf4"), reference_logits(plain_model(folder, "nf4"), TEXT)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)

    def test_those_of_int8_too_but_for_rows_at_the_edge_of_an_integer(self, folder: Path) -> None:
        """Where a sum in float32 lies just beside a half, the two may round it to different integers."""
        found, expected = engine_logits(folder, "int8"), reference_logits(plain_model(folder, "int8"), TEXT)
        off = (found - expected).abs().amax(-1)
        assert (off < 1e-4).float().mean() > 0.9
        assert off.max() < 0.2

    @pytest.mark.parametrize(("kind", "bound"), [("int8", 0.035), ("nf4", 0.3)])
    def test_the_error_is_bounded_and_there(self, folder: Path, kind: Quantization, bound: float) -> None:
        exact = engine_logits(folder, "none")
        error = float((engine_logits(folder, kind) - exact).norm() / exact.norm())
        assert bound / 10 < error < bound

    @pytest.mark.parametrize("kind", KINDS)
    def test_the_float_matrices_are_given_back(self, folder: Path, kind: Quantization) -> None:
        built = build(EngineConfig(model=str(folder), device="cpu", dtype="float32", quantization=kind))
        left = dict(built.runner.model.model.layers.named_parameters())
        assert {name.rpartition(".")[2] for name, p in left.items() if p.dim() == 2 and p.numel()} == set()
        for name in ("embed_tokens", "norm"):
            assert getattr(built.runner.model.model, name).weight.dtype == torch.float32

    @pytest.mark.parametrize("kind", KINDS)
    def test_a_layer_is_quantised_and_given_back_before_the_next(self, folder: Path, kind: Quantization) -> None:
        model = load_model(open_checkpoint(str(folder)), torch.float32, CPU, 8)
        floats: list[int] = []

        def spy(weight: Tensor, bias: Tensor | None) -> Any:
            floats.append(sum(p.numel() for p in model.model.layers.parameters() if p.dim() == 2))
            return quantise(weight, bias, kind)

        model.pack(97, pack_layers=spy)
        fused = [128 * 64, 64 * 64, 224 * 64, 64 * 112]
        assert floats == [3 * sum(fused) - sum((fused * 3)[: done + 1]) for done in range(12)]

    def test_the_engine_says_how_it_is_quantised(self, folder: Path) -> None:
        config = EngineConfig(model=str(folder), device="cpu", dtype="float32", quantization="nf4")
        assert Engine(config).info.quantization == "nf4"


class TestAdapters:
    @pytest.mark.parametrize("kind", KINDS)
    def test_one_for_the_unquantised_model_fits_and_is_not_folded(
        self, folder: Path, kind: Quantization, caplog: pytest.LogCaptureFixture
    ) -> None:
        with caplog.at_level(logging.WARNING):
            built = build(EngineConfig(model=str(folder), device="cpu", dtype="float32", quantization=kind))
        assert built.adapter is not None
        assert not built.adapter.folded, "matrices of its own would take the memory that was saved"
        assert caplog.text == "", "it is the same checkpoint"


FUSED = {**TINY_ADAPTER, "fused": True, "skip_start": 0, "skip_end": 0, "bridge_rank": 0}
SOME_MODES = ("greedy", "everything")


def reference_margins(folder: Path, kind: Quantization, answers: Answers) -> list[float]:
    """For every answered token 0 if the naive reference chooses it too, else by how much it prefers another."""
    checkpoint = open_checkpoint(str(folder))
    naive, ends = naive_model(checkpoint, kind), set(checkpoint.eos_token_ids)
    margins = []
    for mode in SOME_MODES:
        params = MODES[mode]
        assert params.seed is not None
        for request in requests(params, "none"):
            prompt = request.prompt_token_ids
            for index in range(request.n):
                state = SamplingState(params, prompt, params.seed, index, (), checkpoint.vocab_size, CPU)
                tokens = [*prompt, *answers[mode][request.request_id, index]]
                logits = reference_logits(naive, tokens)
                for place in range(len(prompt), len(tokens)):
                    before = tokens[:place]
                    token, margin = reference_choice(
                        logits[place - 1],
                        params,
                        len(prompt),
                        before,
                        ends | {*params.stop_token_ids},
                        state.key(place),
                    )
                    margins.append(0.0 if token == tokens[place] else margin)
    return margins


@pytest.mark.parametrize("kind", KINDS)
class TestExactness:
    def test_every_drafter_and_mode_emits_what_plain_decoding_does(self, folder: Path, kind: Quantization) -> None:
        tallies = assert_exact(folder, plain_answers(folder, SOME_MODES, kind), modes=SOME_MODES, quantization=kind)
        for name in ("oracle", "identity"):
            assert tallies[name].accepted == tallies[name].drafted > 100
        for name in ("ngram", "s3d", "hybrid", "random", "off-by-one"):
            assert 0 < tallies[name].accepted < tallies[name].drafted

    @pytest.mark.parametrize(
        "config",
        [{"max_num_batched_tokens": 9, "max_num_seqs": 3}, {"kv_cache_memory_bytes": 12 * 16 * 3 * 2 * 32 * 4}],
        ids=["chunked prompts", "preemption"],
    )
    def test_a_fused_adapter_too_in_chunks_and_with_preemption(
        self, tmp_path: Path, kind: Quantization, config: dict[str, Any]
    ) -> None:
        folder = write_checkpoint(tmp_path)
        write_adapter(folder, scale=0.1, **FUSED)
        tallies = assert_exact(
            folder, plain_answers(folder, SOME_MODES, kind), ("none", "s3d"), SOME_MODES, quantization=kind, **config
        )
        assert 0 < tallies["s3d"].accepted < tallies["s3d"].drafted

    def test_plain_decoding_emits_what_the_naive_reference_does(self, folder: Path, kind: Quantization) -> None:
        """With int8, where sums differ by 1e-7 beside a half, a whole step of rounding may part the two."""
        margins = reference_margins(folder, kind, plain_answers(folder, SOME_MODES, kind))
        assert len(margins) > 150
        differing = [margin for margin in margins if margin]
        if kind == "int8":
            assert len(differing) <= 2
            assert max(differing, default=0.0) < 0.1
        else:
            assert not differing


class TestRefusals:
    @pytest.mark.parametrize(
        ("described", "method"),
        [
            ({"quant_method": "gptq", "bits": 4}, "gptq"),
            ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
            ({"load_in_8bit": True}, "an unnamed method"),
            ("awq", "an unnamed method"),
        ],
    )
    def test_a_checkpoint_that_is_quantised_already(self, tmp_path: Path, described: Any, method: str) -> None:
        folder = write_checkpoint(tmp_path, quantization_config=described)
        with pytest.raises(CheckpointError, match=f"quantised by {method}.* --quantization int8 or nf4"):
            open_checkpoint(str(folder))

    def test_an_empty_description_is_none(self, tmp_path: Path) -> None:
        folder = write_checkpoint(tmp_path, quantization_config={})
        assert open_checkpoint(str(folder)).config.hidden_size == TINY_CONFIG["hidden_size"]
