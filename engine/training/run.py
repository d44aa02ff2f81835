"""`skippy train`: text from the model, an adapter from the text, and everything on disk on the way.

A folder holds the text (data.safetensors), while it is trained a checkpoint
(checkpoint.safetensors), a line per evaluation (progress.jsonl), and in the end the adapter.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from skippy.engine.adapter import AdapterConfig, S3DAdapter
from skippy.engine.adapter_files import fingerprint, save_adapter
from skippy.engine.build import choose_device
from skippy.engine.config import EngineConfig
from skippy.engine.engine import Engine
from skippy.engine.errors import ConfigError, TrainingError
from skippy.engine.loading import weight_files
from skippy.engine.model import CausalLM
from skippy.engine.prompts import read_lines, read_prompts
from skippy.engine.quant import pack_as
from skippy.engine.tokenizer import Tokenizer
from skippy.engine.training.data import (
    Problem,
    Sample,
    generate_samples,
    most_frequent,
    temperature_of,
    without_overlap,
)
from skippy.engine.training.display import Display, duration
from skippy.engine.training.files import (
    CHECKPOINT,
    DATA,
    append_progress,
    check_recipe,
    load_samples,
    load_tensors,
    read_progress,
    save_samples,
    save_tensors,
)
from skippy.engine.training.here import cost_here, memory_of
from skippy.engine.training.options import AT_ONCE, TrainOptions
from skippy.engine.training.trainer import Trainer, hold_out
from skippy.engine.weights import Checkpoint, load_model, open_checkpoint

EVALUATIONS = 10
CHECKPOINT_SECONDS = 30.0
OF_DATA = ("model", "dtype", "quantization", "data", "exclude", "sequences", "length", "seed")
"""The parts of a recipe that the training text depends on."""


@dataclass(frozen=True, slots=True)
class _Job:
    """One training, as it was asked for and with everything left open decided."""

    config: EngineConfig
    options: TrainOptions
    folder: Path
    checkpoint: Checkpoint
    shape: AdapterConfig
    prompts: list[str]
    excluded: list[str]
    recipe: dict[str, Any]


def run_training(config: EngineConfig, options: TrainOptions, output: str) -> int:
    """Train an adapter into the folder `output`, or go on with it, and return 0.

    Raises:
        ConfigError: the options do not suit the model, its text or what the folder holds.
        CheckpointError: the model cannot be loaded.
        TrainingError: the loss is not finite, or a file of the folder cannot be used.
        KeyboardInterrupt: the user stopped it; the same call goes on from there.
    """
    display = Display()
    job = _prepare(config, options, Path(os.path.expanduser(output)))
    if _is_finished(job):
        display.keep(f"{job.folder} holds the finished adapter: there is nothing to do")
        return 0
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    samples, generation_seconds = _samples(job, display)
    trainer = _trainer(job, samples)
    run = _Run(job, trainer, display, generation_seconds)
    run.resume()
    display.keep(
        f"training {sum(p.numel() for p in trainer.adapter.parameters())} parameters on {len(trainer.training)} "
        f"sequences, from step {trainer.step} to {options.steps}"
    )
    try:
        run.to_the_end()
    except KeyboardInterrupt:
        if _is_finished(job):
            raise
        run.save()
        display.keep(f"interrupted at step {trainer.step}: the same command goes on from there")
        raise
    except (OSError, SafetensorError) as error:
        raise TrainingError(f"cannot write to {job.folder}: {error}; the last checkpoint is kept.") from error
    return 0


def load_base(checkpoint: Checkpoint, config: EngineConfig, length: int) -> CausalLM:
    """The model to train for, not packed unless it is quantised, in bfloat16 unless another type is asked for.

    Raises:
        ConfigError: there is no such device.
        CheckpointError: the model cannot be loaded.
    """
    dtype = torch.bfloat16 if config.dtype == "auto" else getattr(torch, config.dtype)
    pack_layers = pack_as(config.quantization)

    def quantise(model: CausalLM, layer: int) -> None:
        model.pack_layer(layer, pack_layers)

    finish_layer = None if pack_layers is None else quantise
    model = load_model(checkpoint, dtype, choose_device(config), length, finish_layer=finish_layer)
    # A padded row of the head must never be chosen, and so never be foreseen.
    model.lm_head.weight = nn.Parameter(model.lm_head.weight[: checkpoint.vocab_size], requires_grad=False)
    model.lm_head.out_features = checkpoint.vocab_size
    return model


# --- what is asked for -------------------------------------------------------------------------------------------


def _prepare(config: EngineConfig, options: TrainOptions, folder: Path) -> _Job:
    """Find out whatever could be wrong before anything is computed."""
    if config.dtype == "float16":
        raise ConfigError("float16 has too small a range to train in; use bfloat16 or float32.")
    checkpoint = open_checkpoint(config.model, config.revision)
    longest = checkpoint.config.max_position_embeddings
    if options.length > longest:
        raise ConfigError(f"length {options.length} exceeds the {longest} positions of the model.")
    shape = options.adapter_config(
        checkpoint.config, sum(file.stat().st_size for file in weight_files(checkpoint.path))
    )
    if shape.draft_vocab_size >= checkpoint.vocab_size:
        raise ConfigError(
            f"draft_vocab_size {shape.draft_vocab_size} must be below the {checkpoint.vocab_size} tokens of the model."
        )
    hold_out([Sample([], 0, temperature_of(place), 0) for place in range(options.sequences)], options.batch_size)
    prompts = [] if options.data is None else read_prompts(options.data)
    problems = () if options.exclude is None else read_lines(options.exclude, Problem)
    excluded = [text for problem in problems for text in problem.texts]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(f"cannot write to {folder}: {error.strerror}.") from error
    recipe = {
        **asdict(options),
        **asdict(shape),
        "model": fingerprint(checkpoint),
        "dtype": config.dtype,
        "quantization": config.quantization,
        "data": _digest(prompts),
        "exclude": _digest(excluded),
    }
    del recipe["gradient_checkpointing"]  # how it is computed, not what
    return _Job(config, options, folder, checkpoint, shape, prompts, excluded, recipe)


def _digest(texts: list[str]) -> str | None:
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest() if texts else None


def _is_finished(job: _Job) -> bool:
    """Whether the folder holds the adapter asked for; a checkpoint beside it means that it was being written."""
    file = job.folder / "adapter.json"
    if (job.folder / CHECKPOINT).exists() or not file.exists():
        return False
    try:
        training = json.loads(file.read_text(encoding="utf-8")).get("training")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{file} is not a usable description: use another folder.") from error
    check_recipe(file, training.get("recipe") if isinstance(training, dict) else None, job.recipe)
    return True


# --- the text ----------------------------------------------------------------------------------------------------


def _samples(job: _Job, display: Display) -> tuple[list[Sample], float]:
    """The training text, from the folder or written now, and the seconds that it took to write."""
    path = job.folder / DATA
    recipe = {name: job.recipe[name] for name in OF_DATA}
    if path.exists():
        samples, about = load_samples(path)
        check_recipe(path, about.get("recipe"), recipe)
        return samples, about["seconds"]
    began = time.perf_counter()
    try:
        samples = _generate(job, display)
    except KeyboardInterrupt:
        display.keep("interrupted before the training text was complete: nothing of it is kept")
        raise
    seconds = time.perf_counter() - began
    hold_out(samples, job.options.batch_size)
    save_samples(path, samples, {"recipe": recipe, "seconds": seconds})
    return samples, seconds


def _generate(job: _Job, display: Display) -> list[Sample]:
    options, config = job.options, job.config
    engine = Engine(
        replace(
            config,
            drafter="none",  # so that no adapter beside the model is read; the requests name theirs
            adapter=None,
            share_drafts=True,
            num_speculative_tokens=None,
            max_model_len=options.length,
            max_num_seqs=AT_ONCE,
            max_num_batched_tokens=8 * AT_ONCE,
            enable_prefix_caching=False,
        )
    )
    tokenizer = Tokenizer.load(engine.info.model_path) if job.prompts or job.excluded else None
    prompts = [ids for ids in (tokenizer.encode(text) for text in job.prompts) if ids] if tokenizer else []
    display.keep(f"writing {options.sequences} sequences of {options.length} tokens with the model itself")
    began = time.perf_counter()

    def show(done: int) -> None:
        left = (time.perf_counter() - began) * (options.sequences - done) / max(1, done)
        display.show(f"{done} of {options.sequences} sequences, {duration(left)} left")

    samples = generate_samples(engine, prompts, options.sequences, options.length, options.seed, show)
    if tokenizer is None or not job.excluded:
        return samples
    kept = without_overlap(samples, tokenizer.decode, job.excluded)
    display.keep(f"{len(samples) - len(kept)} sequences overlap with {options.exclude} and are dropped")
    return kept


# --- the training ------------------------------------------------------------------------------------------------


def _trainer(job: _Job, samples: list[Sample]) -> Trainer:
    model = load_base(job.checkpoint, job.config, job.options.length)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(job.options.seed)
        adapter = S3DAdapter(job.shape, job.checkpoint.config)
    if adapter.draft_ids is not None:
        adapter.draft_ids = most_frequent(samples, len(adapter.draft_ids), job.checkpoint.vocab_size)
    device = model.model.embed_tokens.weight.device
    adapter.to(device)
    dtype = model.model.embed_tokens.weight.dtype
    cost = cost_here(model.config, job.shape, job.options, dtype, job.config.quantization, memory_of(device))
    options = replace(job.options, gradient_checkpointing=cost.gradient_checkpointing)
    return Trainer(model, adapter, samples, options)


@dataclass(slots=True)
class _Run:
    """The loop around a trainer: it saves, evaluates and tells. Seconds are summed over resumptions."""

    job: _Job
    trainer: Trainer
    display: Display
    generation_seconds: float
    seconds: float = 0.0
    """Of training alone."""
    evaluation_seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    """Of the steps since the last evaluation."""
    _evaluated: set[int] = field(default_factory=set)
    _saved: float = field(default_factory=time.monotonic)

    def resume(self) -> None:
        """Go on from the folder's checkpoint, if it has one."""
        path = self.job.folder / CHECKPOINT
        if path.exists():
            state, about = load_tensors(path)
            check_recipe(path, about.get("recipe"), self.job.recipe)
            try:
                self.trainer.resume(state)
                for name in ("seconds", "evaluation_seconds", "losses"):
                    setattr(self, name, about[name])
            except (KeyError, RuntimeError) as error:
                raise TrainingError(f"{path} cannot be used: {error}. Remove it to begin anew.") from error
        self._evaluated = read_progress(self.job.folder, self.trainer.step)

    def save(self) -> None:
        about = {
            "recipe": self.job.recipe,
            "seconds": self.seconds,
            "evaluation_seconds": self.evaluation_seconds,
            "losses": self.losses,
        }
        with _uninterrupted():
            save_tensors(self.job.folder / CHECKPOINT, self.trainer.state(), about)
        self._saved = time.monotonic()

    def to_the_end(self) -> None:
        trainer, steps = self.trainer, self.job.options.steps
        every = max(1, steps // EVALUATIONS)
        while True:
            due = trainer.step and (trainer.step % every == 0 or trainer.step == steps)
            if due and trainer.step not in self._evaluated:
                self._evaluate()
                self.save()
            if trainer.step == steps:
                break
            self._step()
            if time.monotonic() - self._saved >= CHECKPOINT_SECONDS:
                self.save()
        with _uninterrupted():
            self._finish()

    def _step(self) -> None:
        began = time.perf_counter()
        with _uninterrupted():
            self.losses.append(self.trainer.run_step())
            self.seconds += time.perf_counter() - began
        step, steps = self.trainer.step, self.job.options.steps
        rate = step / self.seconds
        self.display.show(
            f"step {step} of {steps}: loss {self.losses[-1]:.3f}, {rate:.2f} steps/s, "
            f"{duration((steps - step) / rate)} left"
        )

    def _evaluate(self) -> None:
        began = time.perf_counter()
        walks = self.trainer.walk()
        self.evaluation_seconds += time.perf_counter() - began
        step, loss = self.trainer.step, sum(self.losses) / max(1, len(self.losses))
        append_progress(
            self.job.folder,
            {
                "step": step,
                "seconds": round(self.seconds, 3),
                "generation_seconds": round(self.generation_seconds, 3),
                "total_seconds": round(self.generation_seconds + self.seconds + self.evaluation_seconds, 3),
                "loss": loss,
                "greedy": asdict(walks.greedy),
                "sampled": asdict(walks.sampled),
            },
        )
        self._evaluated.add(step)
        self.losses = []
        self.display.keep(
            f"step {step} of {self.job.options.steps}, after {duration(self.seconds)} of training: loss {loss:.3f}, "
            f"tokens per step {walks.greedy.tokens_per_step:.2f} greedy, {walks.sampled.tokens_per_step:.2f} sampled"
        )

    def _finish(self) -> None:
        """Write the adapter; the checkpoint goes only when that is done."""
        folder = self.job.folder
        training = {"recipe": self.job.recipe, "seconds": round(self.seconds, 3)}
        save_adapter(folder, self.trainer.adapter, self.job.checkpoint, training)
        (folder / CHECKPOINT).unlink(missing_ok=True)
        self.display.keep(f"the adapter is in {folder}")


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Hold Ctrl-C back until the end of the block, so that a checkpoint is never of half a step."""
    usual = signal.default_int_handler
    # Only the main thread may change handlers; and where Ctrl-C is ignored or handled otherwise, so be it.
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is not usual:
        yield
        return
    pending: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _: pending.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)
    if pending:
        raise KeyboardInterrupt
