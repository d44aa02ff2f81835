"""Pretraining: which spans, how a model grows, how it is trained, resumed and exported."""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from collections.abc import Mapping
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from support_engine import TINY_CONFIG, write_checkpoint
from torch import Tensor
from transformers import LlamaForCausalLM

from skippy.engine import BUILTIN_MODEL, ConfigError, Engine, EngineConfig
from skippy.engine.hub import find_model
from skippy.engine.reference import reference_logits
from skippy.engine.training import pretrain, pretrainer, repetition
from skippy.engine.training.causal_attention import ROWS, causal_attention
from skippy.engine.training.grow import grow, layer_origins, new_model
from skippy.engine.training.pretrain import main
from skippy.engine.training.pretrainer import Pretrainer, PretrainOptions, learning_rate_share
from skippy.engine.training.repetition import continued, ended_early, repeated, unlikelihood
from skippy.engine.training.spans import FimTokens, Spans, held_out_spans
from skippy.engine.weights import load_model, open_checkpoint

CPU = torch.device("cpu")
TEXT = [(7 * i * i + 3) % 97 for i in range(40)]
OPTIONS = PretrainOptions(steps=6, decay=3, batch_size=3, micro_batch_size=2, length=16, held_out=4)
STREAMS = {kind: torch.arange(start, start + 20_000) % 97 for kind, start in (("python", 0), ("stories", 50_000))}
FIM = FimTokens(90, 91, 92, 93)


def spans(share: float = 0.6, fim: FimTokens | None = None) -> Spans:
    return Spans(STREAMS, Fraction(share).limit_denominator(100), 16, seed=3, fim=fim)


class TestSpans:
    def test_a_step_depends_on_its_number_alone(self) -> None:
        one, other = spans(fim=FIM), spans(fim=FIM)
        later = one.batch(700, 4)
        for step in range(5):
            other.batch(step, 4)
        assert torch.equal(other.batch(700, 4), later)
        assert not torch.equal(other.batch(701, 4), later)

    @pytest.mark.parametrize("share", [0.0, 0.25, 0.6, 1.0])
    def test_the_kinds_have_their_shares(self, share: float) -> None:
        streams = {"python": torch.zeros(200), "stories": torch.ones(200)}
        batch = Spans(streams, Fraction(share).limit_denominator(100), 16, 0, None).batch(2, 20)
        assert (batch[:, 0] == 0).sum() == round(20 * share)

    def test_an_epoch_goes_once_over_the_stream(self) -> None:
        stream = torch.arange(1000)
        count = 999 // 16 - 1
        of_epoch = [Spans({"python": stream}, Fraction(1), 16, 0, None).batch(e, count) for e in (0, 1)]
        for batch in of_epoch:
            assert len(set(batch[:, :-1].flatten().tolist())) == count * 16, "no place is there twice"
            assert torch.equal(batch[:, 1:], batch[:, :-1] + 1)
        assert not torch.equal(*of_epoch)

    @given(st.integers(4, 40), st.integers())
    def test_fill_in_the_middle_reorders(self, length: int, seed: int) -> None:
        span = torch.arange(100, 100 + length + 1)
        found = FIM.reorder(span, random.Random(seed)).tolist()
        assert len(found) == len(span)
        assert found[0] == FIM.prefix
        assert found[-1] == FIM.end
        prefix, rest = found[1:-1][: found.index(91) - 1], found[found.index(91) + 1 : -1]
        suffix, middle = rest[: rest.index(92)], rest[rest.index(92) + 1 :]
        assert prefix + middle + suffix == span[:-4].tolist()

    def test_a_quarter_of_the_python_is_in_that_order(self) -> None:
        batch = spans(fim=FIM).batch(0, 1000)
        assert 110 < (batch[:, 0] == FIM.prefix).sum() - (spans().batch(0, 1000)[:, 0] == FIM.prefix).sum() < 190

    def test_held_out_spans_are_spread_over_the_stream(self) -> None:
        found = held_out_spans(torch.arange(1001), 10, 4)
        assert found[:, 0].tolist() == [0, 250, 500, 750]
        assert len(held_out_spans(torch.arange(1001), 10, 500)) == 100


class TestGrowth:
    @given(st.integers(1, 30), st.integers(0, 30))
    def test_layers_are_added_evenly(self, old: int, more: int) -> None:
        if more > old:
            with pytest.raises(ConfigError, match="can grow"):
                layer_origins(old, old + more)
            return
        origins = layer_origins(old, old + more)
        assert [layer for layer, added in origins if not added] == list(range(old))
        places = [layer for layer, added in origins if added]
        assert len(places) == more
        gaps = {after - before for before, after in pairwise(places)}
        assert len(gaps) <= 2
        assert not gaps or max(gaps) - min(gaps) <= 1

    @pytest.mark.parametrize("tied", [True, False])
    def test_a_grown_model_computes_the_same(self, tmp_path: Path, tied: bool) -> None:
        folder = write_checkpoint(tmp_path, tie_word_embeddings=tied)
        config = json.loads((folder / "config.json").read_text())
        grown = new_model({**config, "num_hidden_layers": 5}, CPU)
        grow(grown, load_file(folder / "model.safetensors"), 3)
        assert grown.config.num_hidden_layers == 5
        expected = LlamaForCausalLM.from_pretrained(folder)
        with torch.no_grad():
            torch.testing.assert_close(grown(torch.tensor([TEXT])).logits, expected(torch.tensor([TEXT])).logits)

    def test_what_does_not_fit_is_refused(self, tmp_path: Path) -> None:
        folder = write_checkpoint(tmp_path)
        wider = new_model({**TINY_CONFIG, "intermediate_size": 128}, CPU)
        with pytest.raises(ConfigError, match="do not fit"):
            grow(wider, load_file(folder / "model.safetensors"), 3)


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 2 * ROWS + 20), st.sampled_from([(4, 2), (2, 2), (3, 1)]))
def test_attention_equals_pytorchs(length: int, heads: tuple[int, int]) -> None:
    torch.manual_seed(length)
    sizes = [(2, heads[0], length, 8), (2, heads[1], length, 8), (2, heads[1], length, 8)]
    ours = [torch.randn(size, requires_grad=True) for size in sizes]
    theirs = [x.detach().clone().requires_grad_() for x in ours]
    found = causal_attention(ours[0], ours[1], ours[2], 8**-0.5)
    expected = F.scaled_dot_product_attention(theirs[0], theirs[1], theirs[2], is_causal=True, enable_gqa=True)
    torch.testing.assert_close(found, expected)
    weights = torch.randn_like(found)
    torch.autograd.backward([(found * weights).sum(), (expected * weights).sum()])
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.grad, other.grad)


class TestSchedule:
    def test_it_warms_up_stays_and_falls(self) -> None:
        shares = [learning_rate_share(step, 1000, 300) for step in range(1000)]
        assert shares[:41] == sorted(shares[:41])
        assert shares[40:700] == [1.0] * 660
        assert shares[700:] == sorted(shares[700:], reverse=True)
        assert 0.02 < shares[-1] < 0.04

    @given(st.integers(1, 500), st.integers(0, 500))
    def test_more_steps_change_nothing_before_the_decay(self, steps: int, decay: int) -> None:
        for step in range(max(0, steps - decay)):
            assert learning_rate_share(step, steps, min(decay, steps)) == learning_rate_share(step, 2000, 0)


def trainer(**changes: float) -> Pretrainer:
    torch.manual_seed(0)
    options = PretrainOptions(**{**{n: getattr(OPTIONS, n) for n in OPTIONS.__dataclass_fields__}, **changes})
    return Pretrainer(new_model(TINY_CONFIG, CPU), spans(), options)


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


class TestTrainer:
    def test_it_learns(self) -> None:
        learner = trainer(steps=40)
        held_out = held_out_spans(STREAMS["stories"], 16, 4)
        token_bytes = torch.full((97,), 2)
        before = learner.bits_per_byte(held_out, token_bytes)
        losses = [learner.run_step() for _ in range(40)]
        assert losses[-1] < losses[0] - 1
        assert learner.bits_per_byte(held_out, token_bytes) < before - 0.5

    def test_bits_per_byte_count_what_tokens_stand_for(self) -> None:
        learner = trainer()
        held_out = held_out_spans(STREAMS["stories"], 16, 5)
        bits = learner.bits_per_byte(held_out, torch.full((97,), 1))
        assert learner.bits_per_byte(held_out, torch.full((97,), 4)) == pytest.approx(bits / 4)
        with torch.no_grad():
            logits = learner.model(held_out[:, :-1]).logits
        nats = F.cross_entropy(logits.flatten(0, 1), held_out[:, 1:].flatten()).item()
        assert bits == pytest.approx(nats / torch.tensor(2.0).log().item(), rel=0.01)

    def test_micro_batches_change_nothing_but_rounding(self) -> None:
        one, other = trainer(micro_batch_size=1), trainer(micro_batch_size=3)
        assert one.run_step() == pytest.approx(other.run_step(), rel=1e-4)

    def test_resumed_it_goes_on_as_if_it_had_not_stopped(self) -> None:
        whole, first, second = trainer(), trainer(), trainer()
        for _ in range(6):
            whole.run_step()
        for _ in range(2):
            first.run_step()
        second.resume({name: value.clone() for name, value in first.state().items()})
        assert same(first.state(), second.state())
        for _ in range(4):
            second.run_step()
        assert same(whole.state(), second.state())

    def test_matrices_of_layers_are_muons(self) -> None:
        learner = trainer()
        learner.run_step()
        kinds = Counter(name.split(".", 1)[0] for name in learner.state())
        assert kinds["momentum_buffer"] == 3 * 7
        assert kinds["exp_avg"] == 2 + 1 + 3 * 2

    def test_options_out_of_range(self) -> None:
        PretrainOptions(decay=6, steps=6)
        wrong: tuple[dict[str, Any], ...] = (
            {"steps": 0},
            {"decay": 7, "steps": 6},
            {"length": 4},
            {"python_share": 1.5},
            {"unlikelihood": -1.0},
            {"unlikelihood": 1.0, "python_share": 1.0},
            {"muon": 0.0},
            {"adam": float("nan")},
        )
        for values in wrong:
            with pytest.raises(ConfigError, match="must be"):
                PretrainOptions(**values)


class TestRepetition:
    @given(st.lists(st.integers(0, 2), max_size=30), st.integers(1, 5))
    def test_what_ends_a_run_that_was_there_before(self, text: list[int], gram: int) -> None:
        found = repeated(torch.tensor([text]).view(1, -1).long(), gram, None)[0].tolist()
        runs = [tuple(text[i - gram + 1 : i + 1]) for i in range(gram - 1, len(text))]
        assert found == [False] * min(gram - 1, len(text)) + [run in runs[:i] for i, run in enumerate(runs)]

    def test_nothing_counts_from_the_end_of_a_text_on(self) -> None:
        tokens = torch.tensor([[1, 2, 1, 2, 0, 1, 2], [1, 2, 3, 1, 2, 1, 2]])
        assert repeated(tokens, 2, 0).int().tolist() == [[0, 0, 0, 1, 0, 0, 0], [0, 0, 0, 0, 1, 0, 1]]

    def test_only_the_first_end_can_be_early(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(repetition, "SHORTEST", 3)
        tokens = torch.tensor([[5, 0, 0, 7], [0, 5, 7, 0], [5, 5, 5, 0]])
        assert ended_early(tokens, 0).int().tolist() == [[0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
        assert not ended_early(tokens, None).any()

    def test_a_continuation_is_the_greedy_one(self) -> None:
        model = trainer().model
        openings = torch.tensor([[3, 4, 5], [60, 2, 9]])
        tokens = continued(model, openings, 6)
        assert torch.equal(tokens[:, :3], openings)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            logits = model(tokens[:, :-1]).logits[:, 2:]
        chosen = logits.gather(-1, tokens[:, 3:, None]).squeeze(-1)
        assert (logits.max(-1).values - chosen).max() < 0.02, "but for rounding, which the cache changes"

    def test_the_loss_is_that_of_the_unwanted_tokens_alone(self) -> None:
        model = trainer().model
        tokens = torch.tensor([[3, 4, 5, 6], [60, 2, 9, 9]])
        unwanted = torch.tensor([[True, False], [False, True]])
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            chances = model(tokens[:, :-1]).logits.float().softmax(-1)
        expected = -((1 - chances[0, 1, 5]).log() + (1 - chances[1, 2, 9]).log()) / 4
        loss = unlikelihood(model, tokens, unwanted)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-3)
        assert unlikelihood(model, tokens, torch.zeros_like(unwanted)).item() == 0.0

    def test_it_unlearns_to_repeat_itself(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(pretrainer, "CONTINUED", 32)
        monkeypatch.setattr(pretrainer, "SEQUENCES", 8)
        learner = trainer(steps=40, decay=0, unlikelihood=20.0)
        openings = spans().openings("stories", 0, 8, 10)

        def share() -> float:
            written = continued(learner.model, openings, 48)[:, -48:]
            return repeated(written, 4, None).float().mean().item()

        before = share()
        for _ in range(40):
            learner.run_step()
        assert before > 0.4
        assert share() < before / 2


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A tiny model with the built-in one's tokenizer."""
    folder = write_checkpoint(tmp_path / "base", vocab_size=8192, hidden_size=16, intermediate_size=24)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(find_model(BUILTIN_MODEL) / name, folder / name)
    return folder


class TestCommand:
    @pytest.fixture(autouse=True)
    def few_documents(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for kind in ("lib", "packages"):
            (tmp_path / kind).mkdir()
        for i in range(400):
            (tmp_path / "lib" / f"m{i}.py").write_text(f"def function{i}(x):\n    return x + {i}\n" * 8)
        stories = "\n<|endoftext|>\n".join(f"The {i}th mouse found a nut. " * 8 for i in range(400))
        (tmp_path / "stories.txt").write_text(stories)
        paths = {"stdlib": str(tmp_path / "lib"), "purelib": str(tmp_path / "packages")}
        monkeypatch.setattr("sysconfig.get_paths", lambda: paths)
        monkeypatch.setattr(pretrain, "CHECKPOINT_SECONDS", 0.0)

    def run(self, base: Path, output: Path, *more: str) -> int:
        own = f"-o {output} --init {base} --stories {base.parent / 'stories.txt'} --layers 4 --device cpu"
        small = "--batch-size 3 --micro-batch-size 2 --length 16 --held-out 4 --evaluate-every 2"
        return main([*own.split(), *small.split(), *more])

    def test_killed_and_started_again_it_ends_the_same(
        self, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert self.run(base, tmp_path / "whole", "--steps", "5", "--decay", "2") == 0
        step = Pretrainer.run_step

        def dying(self: Pretrainer) -> float:
            if self.step == 3:
                self.model.model.norm.weight.data.zero_()
                raise KeyboardInterrupt
            return step(self)

        monkeypatch.setattr(Pretrainer, "run_step", dying)
        assert self.run(base, tmp_path / "killed", "--steps", "5", "--decay", "2") == 130
        monkeypatch.setattr(Pretrainer, "run_step", step)
        assert self.run(base, tmp_path / "killed", "--steps", "5", "--decay", "2") == 0
        for name in ("checkpoint.safetensors", "constant.safetensors", "model/model.safetensors"):
            assert same(load_file(tmp_path / "whole" / name), load_file(tmp_path / "killed" / name)), name
        lines = [json.loads(line) for line in (tmp_path / "killed" / "progress.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == [0, 2, 4, 5]
        assert lines[0]["bits_per_byte"].keys() == {"python", "stories"}

    def test_it_can_be_prolonged_and_goes_on_from_before_the_decay(self, base: Path, tmp_path: Path) -> None:
        output = tmp_path / "prolonged"
        assert self.run(base, tmp_path / "whole", "--steps", "6", "--decay", "0") == 0
        assert self.run(base, output, "--steps", "5", "--decay", "2") == 0
        shutil.copyfile(output / "constant.safetensors", output / "checkpoint.safetensors")
        assert self.run(base, output, "--steps", "6", "--decay", "0") == 0
        assert same(*(load_file(f / "checkpoint.safetensors") for f in (output, tmp_path / "whole")))

    def test_a_kind_without_text_is_refused_or_left_out(
        self, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        common = f"-o {tmp_path / 'out'} --init {base} --layers 4 --device cpu --batch-size 3 --length 16 --held-out 4"
        assert main([*common.split(), "--steps", "1", "--decay", "0"]) == 2
        assert "0 tokens of stories are there for train" in capsys.readouterr().err
        assert main([*common.split(), "--steps", "1", "--decay", "0", "--python-share", "1"]) == 0
        last = json.loads((tmp_path / "out" / "progress.jsonl").read_text().splitlines()[-1])
        assert last["bits_per_byte"].keys() == {"python"}

    def test_what_it_exports_is_the_trained_model(self, base: Path, tmp_path: Path) -> None:
        assert self.run(base, tmp_path / "out", "--steps", "2", "--decay", "0") == 0
        assert self.run(base, tmp_path / "out", "--steps", "2", "--decay", "0", "--export", f"{tmp_path}/asked") == 0
        folder = tmp_path / "asked"
        names = {
            "config.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
            "generation_config.json",
        }
        assert {file.name for file in folder.iterdir()} == names
        trained = new_model(json.loads((folder / "config.json").read_text()), CPU)
        state = load_file(tmp_path / "out" / "checkpoint.safetensors")
        for name, parameter in trained.named_parameters():
            parameter.data = state[f"model.{name}"].bfloat16().float()
        with torch.no_grad():
            expected = trained(torch.tensor([TEXT])).logits[0]
        loaded = load_model(open_checkpoint(str(folder)), torch.float32, CPU, 64)
        torch.testing.assert_close(reference_logits(loaded, TEXT), expected, rtol=0, atol=1e-4)
        assert Engine(EngineConfig(model=str(folder), device="cpu")).info.vocab_size == 8192

    def test_it_exports_the_mean_of_two_models(
        self, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folders = [tmp_path / name for name in ("early", "late", "mean")]
        steps = "--steps", "3", "--decay", "0"
        assert self.run(base, tmp_path / "out", "--steps", "1", "--decay", "0", "--export", str(folders[0])) == 0
        assert self.run(base, tmp_path / "out", *steps) == 0
        assert self.run(base, tmp_path / "out", *steps, "--export", str(folders[1])) == 0
        averaged = ("--export", str(folders[2]), "--average", str(folders[0]))
        assert self.run(base, tmp_path / "out", *steps, *averaged) == 0
        early, late, mean = (load_file(folder / "model.safetensors") for folder in folders)
        for name, weight in mean.items():
            expected = (early[name].float() + late[name].float()) / 2
            torch.testing.assert_close(weight.float(), expected, rtol=1e-2, atol=1e-5)
        assert any(not torch.equal(early[name], late[name]) for name in early)
        assert self.run(base, tmp_path / "out", *steps, "--export", str(folders[2]), "--average", str(base)) == 2
        assert "has no model.layers" in capsys.readouterr().err
        with pytest.raises(SystemExit):
            self.run(base, tmp_path / "out", *steps, "--average", str(folders[0]))

    def test_another_recipe_needs_another_folder(
        self, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert self.run(base, tmp_path / "out", "--steps", "1", "--decay", "0") == 0
        assert self.run(base, tmp_path / "out", "--steps", "2", "--decay", "0", "--seed", "1") == 2
        assert "another seed" in capsys.readouterr().err
