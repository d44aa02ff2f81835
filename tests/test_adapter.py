"""The parts of an adapter, each against its formula; a fresh one changes nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support_engine import TINY_ADAPTER, TINY_CONFIG, random_adapter, write_checkpoint
from torch import Tensor, nn

from skippy.engine.adapter import (
    PARTS,
    AdapterConfig,
    Bridge,
    LowRank,
    S3DAdapter,
    SequentialHead,
    part_shapes,
    part_sizes,
)
from skippy.engine.families import parse_config
from skippy.engine.model import CausalLM
from skippy.engine.shape import ModelConfig
from skippy.engine.weights import load_model, open_checkpoint

BASE = parse_config(TINY_CONFIG)
HIDDEN = BASE.hidden_size


def fresh(**changes: Any) -> S3DAdapter:
    torch.manual_seed(0)
    return S3DAdapter(AdapterConfig(**{**TINY_ADAPTER, **changes}), BASE)


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def adapter(folder: Path) -> S3DAdapter:
    """None of its parameters is zero, and it takes no gradients."""
    return random_adapter(folder, scale=0.3).requires_grad_(False)


class TestConfig:
    @pytest.mark.parametrize(
        "band", [(0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (1, 3), (2, 3), (3, 3)], ids=lambda band: f"{band}"
    )
    def test_every_band_that_leaves_a_layer_fits(self, band: tuple[int, int]) -> None:
        config = AdapterConfig(**{**TINY_ADAPTER, "skip_start": band[0], "skip_end": band[1]})
        config.check(BASE)
        assert S3DAdapter(config, BASE).kept == [i for i in range(3) if i not in range(*band)]

    @pytest.mark.parametrize(
        "changes",
        [
            {"skip_start": 0, "skip_end": 3},
            {"skip_start": 2, "skip_end": 1},
            {"skip_start": -1},
            {"skip_end": 4},
            {"num_speculative_tokens": 0},
            {"num_speculative_tokens": 33},
            {"lora_rank": -1},
            {"lora_rank": 2**40},
            {"head_size": 1.0},
            {"bridge_rank": True},
            {"recurrent": None},
        ],
    )
    def test_what_fits_no_model_of_three_layers(self, changes: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match=next(iter(changes)) if len(changes) == 1 else "skip band"):
            AdapterConfig(**{**TINY_ADAPTER, **changes}).check(BASE)


class TestShapes:
    @pytest.mark.parametrize("changes", [{}, {"head_dim": 32}, {"num_key_value_heads": 4}])
    def test_parts_have_the_shapes_of_the_fused_products(self, changes: dict[str, Any]) -> None:
        config: ModelConfig = parse_config({**TINY_CONFIG, **changes})
        model = CausalLM(config, 8)
        model.pack(config.vocab_size)
        layer = model.model.layers[0]
        fused = {
            "qkv": layer.self_attn.qkv,  # type: ignore[union-attr]
            "o": layer.self_attn.out,  # type: ignore[union-attr]
            "gate_up": layer.mlp.gate_up,  # type: ignore[union-attr]
            "down": layer.mlp.down,  # type: ignore[union-attr]
        }
        packed = {part: (p.packed.in_features, p.packed.out_features) for part, p in fused.items()}  # type: ignore[union-attr]
        assert part_shapes(config) == packed
        assert tuple(packed) == PARTS

    def test_lora_is_on_every_product_of_every_kept_layer(self) -> None:
        adapter = fresh(skip_start=1, skip_end=2)
        assert set(adapter.lora) == {f"{layer}_{part}" for layer in (0, 2) for part in PARTS}

    def test_a_size_of_nought_leaves_a_part_out(self) -> None:
        adapter = fresh(lora_rank=0, head_size=0, bridge_rank=0, num_speculative_tokens=1)
        assert not list(adapter.lora)
        assert adapter.bridge is None
        assert adapter.head is None
        assert adapter.masks.shape == (0, HIDDEN)
        assert sum(part_sizes(adapter.config, BASE).values()) == 0

    @pytest.mark.parametrize("changes", [{}, {"recurrent": False}, {"bridge_rank": 0}, {"lora_rank": 0}])
    def test_the_sizes_of_the_parts_sum_up(self, changes: dict[str, Any]) -> None:
        adapter = fresh(**changes)
        assert sum(part_sizes(adapter.config, BASE).values()) == sum(p.numel() for p in adapter.parameters())

    def test_masks_come_behind_the_vocabulary(self) -> None:
        assert fresh().mask_ids(3) == [97, 98, 99]
        assert fresh().mask_ids(0) == []


def always(y: Tensor) -> Callable[[Tensor], Tensor]:
    """A product that comes to `y` whatever it is of."""
    return lambda _: y.clone()


class TestFresh:
    """Before training, draft rows are computed as the model computes them, but for the masks and what is skipped."""

    def test_lora_adds_nothing(self) -> None:
        bound = fresh().bind(None)
        with torch.inference_mode():
            for part, (size_in, size_out) in part_shapes(BASE).items():
                y = noise(4, size_out)
                assert torch.equal(bound.product(0, part, always(y), noise(4, size_in)), y)

    def test_the_bridge_adds_nothing(self) -> None:
        x = noise(4, HIDDEN)
        assert torch.equal(fresh().bind(noise(4, 2, HIDDEN)).enter(2, x), x)

    def test_the_head_corrects_nothing(self) -> None:
        head, hidden = fresh().head, noise(4, HIDDEN)
        assert head is not None
        state = head.step(head.prepare(hidden), noise(4, HIDDEN), 1.0, None)
        assert state.any()
        assert torch.equal(head.correct(hidden, state), hidden)


class TestLowRank:
    def test_formula(self) -> None:
        module = LowRank(5, 7, 2)
        nn.init.normal_(module.b)
        x, y = noise(3, 5), noise(3, 7)
        expected = y + x @ module.a @ module.b
        torch.testing.assert_close(module.add_to(y.clone(), x), expected)
        with torch.inference_mode():
            changed = y.clone()
            assert module.add_to(changed, x) is changed
            torch.testing.assert_close(changed, expected.detach())

    def test_with_gradients_nothing_changes_in_place(self) -> None:
        module = LowRank(5, 7, 2)
        nn.init.normal_(module.b)
        x, y = noise(3, 5).requires_grad_(), noise(3, 7).requires_grad_()
        before = y.detach().clone()
        module.add_to(y, x).sum().backward()  # type: ignore[no-untyped-call]
        assert torch.equal(y, before)
        assert all(t.grad is not None and t.grad.any() for t in (x, y, module.a, module.b))


class TestBridge:
    def test_formula(self) -> None:
        bridge = Bridge(6, 2)
        for parameter in bridge.parameters():
            nn.init.normal_(parameter)
        context = noise(3, 2, 6)
        unit = torch.cat([F.rms_norm(context[:, i], (6,)) for i in (0, 1)], 1)
        expected = context[:, 0] * bridge.gain + unit @ bridge.low_rank.a @ bridge.low_rank.b
        torch.testing.assert_close(bridge(context), expected)


class TestHead:
    @pytest.mark.parametrize("recurrent", [True, False])
    def test_formula(self, recurrent: bool) -> None:
        head = SequentialHead(6, 4, recurrent=recurrent)
        for parameter in head.parameters():
            nn.init.normal_(parameter)
        hidden, token, before = noise(3, 6), noise(3, 6) * 2, noise(3, 4)
        z = F.rms_norm(hidden, (6,)) @ head.from_hidden + head.bias + token @ head.from_token * 0.5
        torch.testing.assert_close(head.step(head.prepare(hidden), token, 0.5, None), F.silu(z))
        if head.from_state is not None:
            z = z + before @ head.from_state
        state = head.step(head.prepare(hidden), token, 0.5, before)
        torch.testing.assert_close(state, F.silu(z))
        torch.testing.assert_close(head.correct(hidden, state), hidden + F.silu(z) @ head.out)
        assert (head.from_state is not None) == recurrent

    @pytest.mark.parametrize("recurrent", [True, False])
    def test_packing_changes_it_by_no_more_than_rounding(self, recurrent: bool) -> None:
        head = SequentialHead(64, 96, recurrent=recurrent)
        for parameter in head.parameters():
            nn.init.normal_(parameter, std=0.1)
        packed = copy.deepcopy(head)
        packed.pack()
        assert packed.is_packed
        assert not head.is_packed
        with torch.inference_mode():
            hidden, token = noise(2, 3, 64), noise(2, 64) * 2
            into = head.prepare(hidden)
            torch.testing.assert_close(packed.prepare(hidden), into, atol=2e-2, rtol=2e-2)
            for state in (None, noise(2, 96)):
                after = head.step(into[:, 1], token, 0.5, state)
                assert not torch.allclose(after, F.silu(into[:, 1]), atol=2e-2)
                torch.testing.assert_close(packed.step(into[:, 1], token, 0.5, state), after, atol=2e-2, rtol=2e-2)
                corrected = head.correct(hidden[:, 1], after)
                torch.testing.assert_close(packed.correct(hidden[:, 1], after), corrected, atol=2e-2, rtol=2e-2)

    def test_rows_of_several_sequences_are_prepared_at_once(self) -> None:
        head, hidden = SequentialHead(6, 4, recurrent=True), noise(2, 3, 6)
        torch.testing.assert_close(head.prepare(hidden)[1, 2], head.prepare(hidden[1, 2:])[0])


class TestBound:
    """What the model's passes see."""

    def test_masks_have_embeddings_of_their_own_and_tokens_keep_theirs(self, adapter: S3DAdapter) -> None:
        embedding = nn.Embedding(BASE.vocab_size, HIDDEN)
        ids = torch.tensor([5, *adapter.mask_ids(5), 96, 97])
        x = adapter.bind(None).embed(ids, embedding)
        expected = torch.cat((embedding.weight[[5]], adapter.masks, embedding.weight[[96]], adapter.masks[:1]))
        assert torch.equal(x, expected)

    def test_without_masks_tokens_are_embedded_all_the_same(self) -> None:
        embedding, ids = nn.Embedding(BASE.vocab_size, HIDDEN), torch.tensor([5, 96])
        assert torch.equal(fresh(num_speculative_tokens=1).bind(None).embed(ids, embedding), embedding(ids))

    def test_the_bridge_is_crossed_at_the_end_of_the_band_alone(self, adapter: S3DAdapter) -> None:
        context, x = noise(3, 2, HIDDEN), noise(3, HIDDEN)
        bound = adapter.bind(context)
        assert adapter.bridge is not None
        for layer in (0, 1, 3):
            assert torch.equal(bound.enter(layer, x.clone()), x)
        torch.testing.assert_close(bound.enter(2, x.clone()), x + adapter.bridge(context))

    def test_padding_rows_get_nothing_of_the_bridge(self, adapter: S3DAdapter) -> None:
        context, x = noise(3, 2, HIDDEN), noise(8, HIDDEN)
        crossed = adapter.bind(context).enter(2, x.clone())
        assert (crossed[:3] != x[:3]).any(1).all()
        assert torch.equal(crossed[3:], x[3:])

    def test_rows_before_the_first_of_the_drafter_are_left_alone(self, adapter: S3DAdapter) -> None:
        bound = adapter.bind(noise(2, 2, HIDDEN), first_row=3)
        x = noise(6, HIDDEN)
        crossed = bound.enter(2, x.clone())
        assert (crossed != x).any(1).tolist() == [False] * 3 + [True] * 2 + [False]
        with torch.inference_mode():
            for part, (size_in, size_out) in part_shapes(BASE).items():
                y, x = noise(6, size_out), noise(6, size_in)
                added = bound.product(0, part, always(y), x)
                assert (added != y).any(1).tolist() == [False] * 3 + [True] * 3
                whole = adapter.bind(None).product(0, part, always(y), x)
                torch.testing.assert_close(added[3:], whole[3:])

    def test_skipped_layers_are_not_adapted(self, adapter: S3DAdapter) -> None:
        y = noise(2, HIDDEN)
        assert torch.equal(adapter.bind(None).product(1, "o", always(y), noise(2, HIDDEN)), y)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_the_passes_type_is_kept(self, adapter: S3DAdapter, dtype: torch.dtype) -> None:
        bound, embedding = adapter.bind(noise(2, 2, HIDDEN).to(dtype)), nn.Embedding(97, HIDDEN, dtype=dtype)
        x = bound.embed(torch.tensor([5, 97]), embedding)
        assert x.dtype == bound.enter(2, x).dtype == bound.product(0, "o", torch.clone, x).dtype == dtype


def test_folding_changes_a_draft_by_no_more_than_rounding(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path)
    checkpoint = open_checkpoint(str(base))
    model = load_model(checkpoint, torch.float32, torch.device("cpu"), 8)
    adapter = random_adapter(base, scale=0.2).requires_grad_(False)
    for layer in range(checkpoint.config.num_hidden_layers):
        adapter.fold(model, layer)
    assert adapter.folded
    for (layer, part), product in adapter.folded.items():
        weight, bias = model.product_parameters(layer, part)
        linear = partial(F.linear, weight=weight, bias=bias)
        x = noise(4, weight.shape[1])
        changed = adapter.low_ranks[layer, part].add_to(linear(x), x)
        torch.testing.assert_close(product(x), changed, atol=2e-2, rtol=2e-2)
        assert not torch.allclose(changed, linear(x), atol=2e-2)
        assert torch.equal(adapter.bind(None).product(layer, part, linear, x), product(x))
        beside = adapter.bind(None, first_row=2).product(layer, part, linear, x)
        assert torch.equal(beside[:2], linear(x)[:2]), "riders share a pass with verified rows"
