"""`python -m skippy.engine.training.pretrain -o DIR`: train a small language model of Python and stories.

It begins with the weights of a checkpoint, which may grow in depth, or at random. The learning rate warms up, stays
and, over the last steps, falls (arXiv 2405.18392): until then, a training can be prolonged at will. The folder holds
the text as tokens (tokens.safetensors), a checkpoint to go on from (checkpoint.safetensors), the last one of the
constant rate (constant.safetensors) and a line per evaluation (progress.jsonl); the model goes to DIR/model.

The same command goes on after an interruption, which loses two minutes at most, as if nothing had happened. The code
is written for CPUs and CUDA, and no GPU has run it yet.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from skippy.engine.build import choose_device
from skippy.engine.config import EngineConfig
from skippy.engine.errors import ConfigError, SkippyError, TrainingError
from skippy.engine.loading import weight_files
from skippy.engine.tokenizer import Tokenizer
from skippy.engine.training.corpus import KINDS, SEPARATOR, TOKENS, Sources, load_tokens
from skippy.engine.training.display import Display, duration
from skippy.engine.training.files import (
    CHECKPOINT,
    append_progress,
    check_recipe,
    load_tensors,
    read_progress,
    save_tensors,
)
from skippy.engine.training.grow import average, export, grow, new_model
from skippy.engine.training.pretrainer import Pretrainer, PretrainOptions
from skippy.engine.training.spans import FimTokens, Spans, held_out_spans
from skippy.engine.weights import open_checkpoint

CONSTANT = "constant.safetensors"
"""The last checkpoint before the learning rate falls."""
CHECKPOINT_SECONDS = 120.0


@dataclass(slots=True)
class _Run:
    """The loop around a trainer: it saves, evaluates and tells."""

    trainer: Pretrainer
    options: PretrainOptions
    folder: Path
    recipe: Mapping[str, Any]
    held_out: Mapping[str, Tensor]
    token_bytes: Tensor
    display: Display
    seconds: float = 0.0
    """Of training alone, summed over resumptions."""

    def resume(self) -> None:
        """Go on from the folder's checkpoint, if it has one."""
        path = self.folder / CHECKPOINT
        if path.exists():
            state, about = load_tensors(path)
            check_recipe(path, about.get("recipe"), self.recipe)
            try:
                self.trainer.resume(state)
                self.seconds = about["seconds"]
            except (KeyError, RuntimeError) as error:
                raise TrainingError(f"{path} cannot be used: {error}. Remove it to begin anew.") from error

    def to_the_end(self) -> None:
        trainer, options = self.trainer, self.options
        evaluated = read_progress(self.folder, trainer.step)
        saved = time.monotonic()
        losses: list[float] = []
        while True:
            if trainer.step not in evaluated and (
                trainer.step % options.evaluate_every == 0 or trainer.step == options.steps
            ):
                self._evaluate(losses)
                losses = []
            if trainer.step >= options.steps:
                break
            losses.append(self._step())
            if trainer.step == options.steps - options.decay:
                self._save(CONSTANT)
            if time.monotonic() - saved >= CHECKPOINT_SECONDS or trainer.step == options.steps:
                self._save(CHECKPOINT)
                saved = time.monotonic()

    def _save(self, name: str) -> None:
        save_tensors(self.folder / name, self.trainer.state(), {"recipe": self.recipe, "seconds": self.seconds})

    def _step(self) -> float:
        began = time.perf_counter()
        loss = self.trainer.run_step()
        self.seconds += time.perf_counter() - began
        step, steps = self.trainer.step, self.options.steps
        pace = self.seconds / step
        tokens = self.options.batch_size * self.options.length
        self.display.show(
            f"step {step} of {steps}: loss {loss:.3f}, {tokens / pace:.0f} tokens/s, "
            f"{duration((steps - step) * pace)} left"
        )
        return loss

    def _evaluate(self, losses: Sequence[float]) -> None:
        bits = {kind: self.trainer.bits_per_byte(spans, self.token_bytes) for kind, spans in self.held_out.items()}
        loss = sum(losses) / len(losses) if losses else None
        step = self.trainer.step
        tokens = step * self.options.batch_size * self.options.length
        line = {"step": step, "tokens": tokens, "seconds": round(self.seconds, 1), "loss": loss}
        append_progress(self.folder, {**line, "bits_per_byte": bits})
        told = ", ".join(f"{value:.4f} bits per byte of {kind}" for kind, value in bits.items())
        self.display.keep(f"step {step}, after {duration(self.seconds)} of training: held out {told}")


def run_pretraining(
    source: str,
    output: Path,
    sources: Sources,
    options: PretrainOptions,
    device: torch.device,
    export_to: Path | None = None,
    average_with: Path | None = None,
) -> None:
    """Train into the folder `output`, or go on with it; then, or with `export_to` at once, write the model.

    Args:
        source: model folder whose shape, tokenizer and, unless from scratch, weights it begins with.
        average_with: what is written to `export_to` is the mean of the model and the one in this folder.

    Raises:
        ConfigError, CheckpointError: the options do not suit the model, the text or what the folder holds.
        TrainingError: the loss is not finite, or a file of the folder cannot be used.
    """
    display = Display()
    checkpoint = open_checkpoint(source)
    layers = options.layers or checkpoint.config.num_hidden_layers
    raw = json.loads((checkpoint.path / "config.json").read_text(encoding="utf-8"))
    config = {**raw, "num_hidden_layers": layers}
    if options.length > checkpoint.config.max_position_embeddings:
        raise ConfigError(f"length {options.length} exceeds the positions of the model.")
    torch.manual_seed(options.seed)
    model = new_model(config, device)
    if not options.from_scratch:
        weights = {name: w for file in weight_files(checkpoint.path) for name, w in load_file(file).items()}
        grow(model, weights, checkpoint.config.num_hidden_layers)
    output.mkdir(parents=True, exist_ok=True)
    tokens = load_tokens(sources, checkpoint.path / "tokenizer.json", output / TOKENS, display)
    tokenizer = Tokenizer.load(checkpoint.path)
    share = Fraction(options.python_share).limit_denominator(1000)
    shares = {"python": share, "stories": 1 - share}
    wanted = [kind for kind in KINDS if shares[kind]]
    _check_enough(tokens, wanted, options.length)
    recipe = _recipe(options, tokens, checkpoint.path, layers)
    streams = {kind: tokens[f"{kind}.train"] for kind in KINDS}
    spans = Spans(streams, share, options.length, options.seed, _fim_tokens(tokenizer))
    run = _Run(
        Pretrainer(model, spans, options),
        options,
        output,
        recipe,
        {kind: held_out_spans(tokens[f"{kind}.held_out"], options.length, options.held_out) for kind in wanted},
        torch.tensor([len(tokenizer.token_bytes(i)) for i in range(checkpoint.vocab_size)]),
        display,
    )
    run.resume()
    if export_to is None:
        parameters = sum(p.numel() for p in model.parameters())
        sizes = ", ".join(f"{len(stream)} of {kind}" for kind, stream in streams.items())
        display.keep(f"{parameters} parameters, {sizes} tokens, from step {run.trainer.step} to {options.steps}")
        run.to_the_end()
    if average_with is not None:
        average(model, average_with)
    export(export_to or output / "model", checkpoint.path, config, model)
    display.keep(f"the model of step {run.trainer.step} is in {export_to or output / 'model'}")


def _check_enough(tokens: Mapping[str, Tensor], kinds: Sequence[str], length: int) -> None:
    """Raise ConfigError unless there is text of every kind, to train on and to hold out."""
    for kind in kinds:
        for part, least in (("train", 3 * length), ("held_out", length + 1)):
            if (found := len(tokens[f"{kind}.{part}"])) < least:
                raise ConfigError(
                    f"{found} tokens of {kind} are there for {part}, and sequences of {length} need {least} at least: "
                    "give more text (--stories), or a --python-share of 1 or 0 that does without."
                )


def _recipe(options: PretrainOptions, tokens: Mapping[str, Tensor], source: Path, layers: int) -> dict[str, Any]:
    """What must stay the same when a training goes on: not the rates, the steps or the loss against repetition."""
    fixed = ("from_scratch", "batch_size", "length", "python_share", "seed")
    digest = hashlib.sha256()
    for name in sorted(tokens):
        digest.update(tokens[name].numpy().data)
    begun = hashlib.sha256((source / "config.json").read_bytes())
    for file in weight_files(source):
        begun.update(file.read_bytes())
    values = asdict(options)
    return {
        **{name: values[name] for name in fixed},
        "layers": layers,
        "model": begun.hexdigest(),
        "data": digest.hexdigest(),
    }


def _fim_tokens(tokenizer: Tokenizer) -> FimTokens | None:
    names = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", SEPARATOR)
    ids = [token for token in map(tokenizer.token_to_id, names) if token is not None]
    return FimTokens(*ids) if len(ids) == len(names) else None


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m skippy.engine.training.pretrain",
        description="Train a small language model of Python and stories.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    default = PretrainOptions()
    add = parser.add_argument
    add("-o", "--output", required=True, help="folder; the same command goes on with what it finds there")
    add("--init", default="builtin", help="model folder to begin with: shape, tokenizer and weights")
    add("--from-scratch", action="store_true", help="begin with random weights")
    add("--layers", type=int, help="grow to so many layers, at most twice as many; left out: as many as there are")
    add("--stories", help="text file of stories between lines of " + SEPARATOR)
    add("--exclude", help="JSONL file of evaluation problems: no document may overlap with them or define them")
    add("--steps", type=int, default=default.steps, help="in all; more than before prolongs a training")
    add("--decay", type=int, default=default.decay, help="last steps, over which the learning rate falls")
    add("--batch-size", type=int, default=default.batch_size, help="sequences per step")
    add("--micro-batch-size", type=int, default=default.micro_batch_size, help="sequences computed together")
    add("--length", type=int, default=default.length, help="tokens of a sequence")
    add("--muon", type=float, default=default.muon, help="learning rate of the layers' matrices")
    add("--adam", type=float, default=default.adam, help="learning rate of everything else")
    add("--python-share", type=float, default=default.python_share, help="of the sequences")
    add(
        "--unlikelihood",
        type=float,
        default=default.unlikelihood,
        help="weight of the loss against loops in stories",
    )
    add("--evaluate-every", type=int, default=default.evaluate_every, help="steps")
    add("--held-out", type=int, default=default.held_out, help="spans of each kind to evaluate on")
    add("--seed", type=int, default=default.seed)
    add("--compile", action="store_true", help="torch.compile; needs a C++ compiler and minutes to start")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--num-threads", type=int, help="of the CPU")
    add("--export", metavar="DIR", help="write the model of the latest checkpoint there, and train no further")
    add("--average", metavar="MODEL", help="export the mean of the weights and those of the model in this folder")
    parsed = parser.parse_args(arguments)
    if parsed.average is not None and parsed.export is None:
        parser.error("--average needs --export")
    return parsed


def main(arguments: Sequence[str] | None = None) -> int:
    parsed = _parse(arguments)
    try:
        options = PretrainOptions(**{name: getattr(parsed, name) for name in PretrainOptions.__dataclass_fields__})
        if parsed.num_threads is not None:
            torch.set_num_threads(parsed.num_threads)
        run_pretraining(
            parsed.init,
            Path(parsed.output),
            Sources.of_this_interpreter(parsed.stories, parsed.exclude),
            options,
            choose_device(EngineConfig(device=parsed.device)),
            None if parsed.export is None else Path(parsed.export),
            None if parsed.average is None else Path(parsed.average),
        )
    except (SkippyError, OSError, SafetensorError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("interrupted: the same command goes on from the last checkpoint\n")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
