"""The wire: every message comes out as it went in, however the pipe cuts it."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skippy.engine.config import EngineConfig
from skippy.engine.messages import (
    FRAME_HEADER_BYTES,
    Abort,
    Add,
    Command,
    Event,
    Fatal,
    FrameReader,
    Loading,
    Ready,
    Start,
    Stepped,
    encode,
)
from skippy.engine.types import (
    DraftCounts,
    EngineInfo,
    Request,
    SamplingParams,
    SequenceOutput,
    StepOutput,
    StepStats,
    TokenLogprobs,
)

PARAMS = SamplingParams(
    max_tokens=9,
    temperature=0.3,
    logit_bias={5: -1.5, 70_000: 100.0},
    stop_token_ids=(4, 5),
    seed=-(2**63),
    logprobs=2,
)
COMMANDS: list[Command] = [
    Start(EngineConfig(model="models/ünï", max_model_len=77, drafter="none")),
    Add(Request("r1", (1, 2, 2**31), PARAMS, n=3, drafter="ngram", num_speculative_tokens=0)),
    Add(Request("r2", (0,))),
    Abort("r1"),
]
INFO = EngineInfo(
    model="builtin",
    model_path="/models/builtin",
    device="cpu",
    dtype="float32",
    quantization="none",
    vocab_size=97,
    max_model_len=256,
    bos_token_id=None,
    eos_token_ids=[2, 3],
    drafter="ngram",
    drafters=["none", "ngram"],
    num_speculative_tokens=4,
    max_speculative_tokens=32,
    block_size=32,
    num_blocks=10,
    kv_bytes=12345678901,
    max_num_seqs=8,
)
OUTPUT = SequenceOutput(
    request_id="r1",
    index=2,
    token_ids=[5, 6],
    counts=DraftCounts(3, 8, 4),
    drafter="ngram",
    logprobs=[TokenLogprobs(5, -0.5, [(5, -0.5), (1, -3.25)]), TokenLogprobs(6, -1.0)],
    prompt_logprobs=[None, TokenLogprobs(2, -2.0)],
    cached_tokens=64,
    finish_reason="stop",
    stop_reason=6,
)
STATS = StepStats(verify_seconds=0.25, running=3, accepted_per_pos=[2, 1], accepted_per_step=[2, 1, 0])
EVENTS: list[Event] = [
    Loading(0, 2**40),
    Ready(INFO),
    Stepped(StepOutput([OUTPUT], STATS)),
    Stepped(StepOutput([], StepStats())),
    Fatal("no such model: 'ünï'"),
]


def reader(kind: object) -> FrameReader:
    return FrameReader(kind)  # type: ignore[arg-type]


@pytest.mark.parametrize("message", COMMANDS, ids=lambda message: type(message).__name__)
def test_commands_come_out_as_they_went_in(message: Command) -> None:
    assert reader(Command).feed(encode(message)) == [message]


@pytest.mark.parametrize("message", EVENTS, ids=lambda message: type(message).__name__)
def test_events_come_out_as_they_went_in(message: Event) -> None:
    assert reader(Event).feed(encode(message)) == [message]


def test_a_frame_is_a_length_and_so_many_bytes() -> None:
    frame = encode(Abort("r1"))
    assert int.from_bytes(frame[:FRAME_HEADER_BYTES], "little") == len(frame) - FRAME_HEADER_BYTES
    body = msgspec.msgpack.decode(frame[FRAME_HEADER_BYTES:])
    assert (body["type"], body["request_id"]) == ("Abort", "r1")


def test_byte_by_byte_a_message_is_whole_with_its_last_byte() -> None:
    frames = reader(Event)
    for event in EVENTS:
        *bytes_before, last = [bytes([byte]) for byte in encode(event)]
        for byte in bytes_before:
            assert frames.feed(byte) == []
        assert frames.feed(last) == [event]


@settings(derandomize=True, deadline=None, max_examples=100)
@given(st.lists(st.sampled_from(EVENTS), max_size=6), st.data())
def test_cuts_do_not_matter(events: list[Event], data: st.DataObject) -> None:
    stream = b"".join(map(encode, events))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    frames, received = reader(Event), list[object]()
    for start, stop in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        received += frames.feed(stream[start:stop])
    assert received == events


def test_a_command_is_no_event() -> None:
    with pytest.raises(msgspec.ValidationError):
        reader(Event).feed(encode(Abort("r1")))
