"""The adapter that learns while serving: it gets better, disturbs nothing, keeps no text and survives a restart."""

from __future__ import annotations

import gc
import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from support_engine import run_dry, tokens_of, write_adapter, write_checkpoint
from support_families import PUBLISHED

from skippy.engine import ConfigError, Engine, EngineConfig, Request, SamplingParams, chain
from skippy.engine import learning as learning_module
from skippy.engine.adapter import AdapterConfig, S3DAdapter
from skippy.engine.drafters.s3d import S3DDrafter
from skippy.engine.errors import TrainingError
from skippy.engine.families import parse_config
from skippy.engine.learning import CHECKPOINT, FEWEST_TEXTS, LOCK, Learner, _Text
from skippy.engine.sequence import Sequence
from skippy.engine.weights import open_checkpoint

PARAMS = SamplingParams(max_tokens=32, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("bare"), num_hidden_layers=4)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("BATCH", 2), ("COMPARE_EVERY", 4), ("ANCHORS", 8), ("PERIOD", 40), ("TV_FROM", 10)):
        monkeypatch.setattr(learning_module, name, value)


def learning(model: Path, folder: Path, **changes: Any) -> Engine:
    config = {"model": str(model), "device": "cpu", "dtype": "float32", "num_threads": 1, "learn": str(folder)}
    return Engine(EngineConfig(**{**config, **changes}))


def serve(
    engine: Engine, count: int, first: int = 0, drafter: str = "s3d", num_drafted: int | None = None, **changes: Any
) -> dict[str, list[int]]:
    params = SamplingParams(**{"max_tokens": 32, "temperature": 0.0, "ignore_eos": True, "seed": 7, **changes})
    requests = [
        Request(
            str(i), (3 + i % 90, 5 + i % 7, 9, 40 + i % 50), params, drafter=drafter, num_speculative_tokens=num_drafted
        )
        for i in range(first, first + count)
    ]
    return {name: tokens for (name, _), tokens in tokens_of(run_dry(engine, requests)).items()}


def learner_of(engine: Engine) -> Learner:
    assert engine._learner is not None
    return engine._learner


def learn(engine: Engine, until: Callable[[], bool], most: int = 20_000) -> None:
    for _ in range(most):
        if until():
            return
        assert engine.learn()
    raise AssertionError("it never came to that")


def progress(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "learning.jsonl").read_text().splitlines()]


def test_it_gets_better_and_drafts_and_what_is_said_stays_the_same(bare: Path, tmp_path: Path) -> None:
    plain = serve(learning(bare, tmp_path / "none"), 40, drafter="none")
    engine = learning(bare, tmp_path / "a")
    assert {"s3d", "hybrid"} <= set(engine.info.drafters)
    assert serve(engine, 40) == plain
    learn(engine, lambda: isinstance(engine.drafting.drafters["s3d"], S3DDrafter))
    assert (tmp_path / "a" / "adapter.json").exists()
    learn(engine, lambda: learner_of(engine).step >= 60)
    last = [line for line in progress(tmp_path / "a") if line["adopted"]][-1]
    assert last["learning"] > max(1.05, last["serving"])
    assert serve(engine, 40) == plain
    counts = run_dry(engine, [Request("x", (3, 5, 9, 40), PARAMS, drafter="s3d", num_speculative_tokens=6)])
    assert counts["x", 0][-1].counts.accepted > 0


def test_an_adapter_taken_up_in_the_middle_of_a_text_changes_nothing_of_it(bare: Path, tmp_path: Path) -> None:
    engine = learning(bare, tmp_path)
    params = SamplingParams(max_tokens=40, temperature=1.0, seed=3, ignore_eos=True)
    expected = serve(learning(bare, tmp_path / "other"), 3, drafter="none", max_tokens=40, temperature=1.0, seed=3)
    serve(engine, 40)
    for i in range(3):
        prompt = (3 + i % 90, 5 + i % 7, 9, 40 + i % 50)
        engine.add(Request(str(i), prompt, params, drafter=("s3d", "hybrid", "s3d")[i], num_speculative_tokens=4))
    learner = learner_of(engine)
    found: dict[str, list[int]] = {str(i): [] for i in range(3)}
    while engine.has_work:
        for output in engine.step().outputs:
            found[output.request_id] += output.token_ids
        for _ in learner._hand_over():
            pass
    assert found == expected
    engine.check()


def test_nothing_is_learnt_before_there_are_texts_to_learn_from_and_to_judge_by(bare: Path, tmp_path: Path) -> None:
    engine = learning(bare, tmp_path)
    assert not engine.learn()
    serve(engine, FEWEST_TEXTS)
    assert not engine.learn()
    serve(engine, 16, first=FEWEST_TEXTS)
    assert engine.learn()


def test_without_new_texts_it_rests(bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learning_module, "REST_AFTER", 3)
    engine = learning(bare, tmp_path)
    serve(engine, 40)
    while engine.learn():
        pass
    assert learner_of(engine).step == 3
    serve(engine, 1, first=50)
    assert engine.learn()


def test_no_text_is_written(bare: Path, tmp_path: Path) -> None:
    engine = learning(bare, tmp_path)
    serve(engine, 40)
    learn(engine, lambda: learner_of(engine).step >= 9)
    learner_of(engine)._save()
    files = {path.name for path in tmp_path.iterdir()}
    assert files <= {"adapter.json", "adapter.safetensors", CHECKPOINT, "learning.jsonl", LOCK}
    assert (tmp_path / LOCK).read_bytes() == b""
    with safe_open(tmp_path / CHECKPOINT, framework="pt") as file:
        kinds = {name.split(".")[0] for name in file.keys()}  # noqa: SIM118 (no mapping)
    assert kinds <= {"step", "adapter", "exp_avg", "exp_avg_sq"}


def test_it_goes_on_after_a_restart(bare: Path, tmp_path: Path) -> None:
    given = write_adapter(bare, tmp_path / "given", seed=3)
    folder = tmp_path / "learnt"
    engine = learning(bare, folder, adapter=str(given))
    serve(engine, 40)
    learner = learner_of(engine)
    for _ in learner._hand_over():
        pass
    for _ in learner._train_step():
        pass
    assert learner.work()  # a piece of the next step, which is lost
    engine.close()
    step, learnt = learner.step, learner._adapter.state_dict()
    del engine, learner
    gc.collect()
    again = learning(bare, folder, adapter=str(given))
    assert isinstance(again.drafting.drafters["s3d"], S3DDrafter), "what was learnt drafts from the start"
    assert learner_of(again).step == step
    for name, tensor in learnt.items():
        assert torch.equal(tensor, learner_of(again)._adapter.state_dict()[name]), name


@pytest.mark.parametrize("prompt", [1, 10, 50, 70])
def test_of_a_long_text_the_end_is_kept(monkeypatch: pytest.MonkeyPatch, prompt: int) -> None:
    monkeypatch.setattr(learning_module, "KEPT", 40)
    tokens = list(range(80))
    sequence = Sequence(
        Request("r", tuple(tokens[:prompt]), PARAMS), 2, 5, "s3d", 6, adaptive=True, end_ids=frozenset(), tokens=tokens
    )
    text = _Text.of(sequence)
    for kept, size in ((text, 40), (text.last(16), 16), (text.last(100), 40)):
        assert kept.tokens == tokens[kept.cut :]
        assert len(kept.tokens) == size
        assert kept.start == max(1, prompt - kept.cut), "what was chosen, but for a first token"
        assert (kept.params, kept.seed, kept.choice) == (PARAMS, 5, 2)


def test_only_a_better_adapter_is_taken(bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learning_module, "MARGIN", 100.0)
    engine = learning(bare, tmp_path)
    serve(engine, 40)
    learn(engine, lambda: learner_of(engine).step >= 8)
    assert [line["adopted"] for line in progress(tmp_path)] == [False]
    assert not isinstance(engine.drafting.drafters["s3d"], S3DDrafter)
    assert not (tmp_path / "adapter.json").exists()


def test_it_begins_with_the_adapter_that_there_is(bare: Path, tmp_path: Path) -> None:
    adapter = write_adapter(bare, tmp_path / "given", seed=3, num_speculative_tokens=4)
    engine = learning(bare, tmp_path / "learnt", adapter=str(adapter))
    drafting = engine.drafting.drafters["s3d"]
    assert isinstance(drafting, S3DDrafter)
    for name, tensor in learner_of(engine)._adapter.state_dict().items():
        assert torch.equal(tensor, drafting.adapter.state_dict()[name]), name
    assert learner_of(engine)._learning_rate() < 8e-3 * learning_module.LATER_PEAK
    heads = drafting.adapter.head, learner_of(engine)._adapter.head
    assert [head is not None and head.is_packed for head in heads] == [True, False]


@pytest.mark.parametrize("changes", [{"quantization": "nf4"}, {"dtype": "bfloat16"}, {"dtype": "auto"}])
def test_it_learns_for_every_kind_of_base(bare: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    engine = learning(bare, tmp_path, **changes)
    plain = serve(engine, 40, drafter="none")
    learn(engine, lambda: learner_of(engine).step >= 5)
    for _ in learner_of(engine)._hand_over():
        pass
    assert serve(engine, 40, drafter="hybrid") == plain


def test_it_learns_for_a_head_of_its_own_of_which_the_model_packs_the_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chain, "WHOLE_BELOW", 0)  # candidates are rescored with rows of the head
    monkeypatch.setattr(chain, "NUM_CANDIDATES", 2)  # so few that they are asked for in every batch
    model = write_checkpoint(tmp_path / "untied", num_hidden_layers=4, tie_word_embeddings=False)
    engine = learning(model, tmp_path / "learnt")
    plain = serve(engine, 40, drafter="none")
    learn(engine, lambda: learner_of(engine).step >= 5)
    for _ in learner_of(engine)._hand_over():
        pass
    drafter = engine.drafting.drafters["s3d"]
    assert isinstance(drafter, S3DDrafter)
    assert drafter.adapter.head is not None
    assert drafter.adapter.head.is_packed
    assert serve(engine, 40, num_drafted=4) == plain


def test_it_says_that_nothing_is_learnt_yet(bare: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        learning(bare, tmp_path, drafter="auto")
    assert f"until an adapter is learnt in {tmp_path}" in caplog.text
    assert "has an adapter" not in caplog.text


def test_a_failure_ends_the_learning_and_not_the_serving(
    bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = learning(bare, tmp_path)
    plain = serve(engine, 40)

    def fail(*_: object) -> None:
        raise TrainingError("the disk is full")

    monkeypatch.setattr(learning_module, "save_adapter", fail)
    with caplog.at_level(logging.ERROR):
        while engine.learn():
            pass
    assert "learning ends here; serving goes on" in caplog.text
    assert not isinstance(engine.drafting.drafters["s3d"], S3DDrafter), "what cannot be kept is not used"
    assert not engine.learn()
    assert serve(engine, 40) == plain


def test_all_texts_of_a_prompt_are_on_one_side(bare: Path, tmp_path: Path) -> None:
    engine = learning(bare, tmp_path)
    for seed in (1, 2):
        serve(engine, 40, temperature=1.0, seed=seed)
    learner = learner_of(engine)
    sides = [{tuple(text.tokens[: text.start]) for text in texts} for texts in (learner._texts, learner._held_out)]
    assert not sides[0] & sides[1]
    assert (len(learner._texts), len(learner._held_out)) == (70, 10)


def test_what_is_aborted_counts_as_a_text(bare: Path, tmp_path: Path) -> None:
    engine = learning(bare, tmp_path)
    engine.add(Request("r", (3, 4, 5), SamplingParams(max_tokens=100, temperature=0.0, ignore_eos=True)))
    for _ in range(40):
        engine.step()
    engine.abort("r")
    assert len(learner_of(engine)._texts) == 1


def test_what_it_reserves_follows_the_adapter(bare: Path) -> None:
    """Of a model of 8B, about a hundredth is trained."""
    tiny = open_checkpoint(str(bare))
    large = replace(tiny, config=parse_config(PUBLISHED["Llama-3.1-8B"]), dtype=torch.bfloat16)
    on_gpu, on_cpu = (learning_module.learning_bytes(large, None, torch.device(d)) for d in ("cuda", "cpu"))
    assert 1e9 < on_gpu < 2e9
    assert 16e9 < on_cpu - on_gpu < 32e9
    shape = AdapterConfig(1, 3, 2, lora_rank=2, head_size=4, bridge_rank=0, recurrent=False)
    adapter = S3DAdapter(shape, tiny.config)
    numbers = sum(p.numel() for p in adapter.parameters())
    assert learning_module.learning_bytes(tiny, adapter, torch.device("cuda")) == 24 * numbers


class TestMistakes:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"drafter": "suffix"}, "which the drafter suffix does not use"),
            ({"share_drafts": False}, "learn needs share_drafts"),
            ({"tuned_plan": "x.json"}, "leave one of them out"),
        ],
    )
    def test_settings_that_exclude_each_other(
        self, bare: Path, tmp_path: Path, changes: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(ConfigError, match=message):
            learning(bare, tmp_path, **changes)

    def test_a_folder_that_cannot_be_written(self, bare: Path) -> None:
        with pytest.raises(ConfigError, match=r"--learn cannot write to /dev/null/x"):
            learning(bare, Path("/dev/null/x"))

    def test_what_another_model_learnt(self, bare: Path, tmp_path: Path) -> None:
        engine = learning(bare, tmp_path)
        learner_of(engine)._save()
        del engine
        gc.collect()
        other = write_checkpoint(tmp_path / "model", num_hidden_layers=5)
        with pytest.raises(ConfigError, match="was made with another"):
            learning(other, tmp_path)

    def test_a_folder_that_another_server_learns_in(self, bare: Path, tmp_path: Path) -> None:
        engine = learning(bare, tmp_path)
        with pytest.raises(ConfigError, match="Another server learns in"):
            learning(bare, tmp_path)
        assert engine.learn() is False

    def test_a_fused_adapter(self, bare: Path, tmp_path: Path) -> None:
        fused = write_adapter(bare, tmp_path / "fused", fused=True, skip_start=0, skip_end=0, bridge_rank=0)
        with pytest.raises(ConfigError, match="fused adapter cannot learn"):
            learning(bare, tmp_path / "learnt", adapter=str(fused))
