"""From draft rows to tokens: what is drafted is what the verifier would choose of the same logits."""

from __future__ import annotations

from itertools import accumulate
from operator import mul
from pathlib import Path
from typing import Any

import pytest
import torch
from support_engine import TINY_CONFIG, random_adapter, write_checkpoint
from support_exactness import MODES
from torch import Tensor

from skippy.engine import SamplingParams, chain
from skippy.engine.adapter import S3DAdapter
from skippy.engine.chain import NUM_SAMPLED, Link, Prospect, draft_chain, level_of
from skippy.engine.model import CausalLM
from skippy.engine.sampling import RowGroup, SamplingState, choose
from skippy.engine.weights import load_model, open_checkpoint

CPU = torch.device("cpu")
VOCABULARY, HIDDEN = TINY_CONFIG["vocab_size"], TINY_CONFIG["hidden_size"]
PROMPT = (1, 5, 9, 5)
OUTPUT = (40, 41, 40)
WIDTH = 5

Chances = list[list[float]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module", params=[False, True], ids=["head of its own", "tied"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> CausalLM:
    checkpoint = open_checkpoint(str(write_checkpoint(tmp_path_factory.mktemp("m"), tie_word_embeddings=request.param)))
    model = load_model(checkpoint, torch.float32, CPU, 8)
    model.pack(checkpoint.vocab_size, keep_head_rows=True)
    return model


def without_head(folder: Path) -> S3DAdapter:
    return random_adapter(folder, head_size=0).requires_grad_(False)


def with_head(folder: Path, **changes: Any) -> S3DAdapter:
    """Whose corrections are large enough to change the order of candidates."""
    adapter = random_adapter(folder, scale=0.3, **changes).requires_grad_(False)
    assert adapter.head is not None
    adapter.head.out.mul_(3.0)
    return adapter


def hidden_rows(batch: int, width: int = WIDTH, seed: int = 0) -> Tensor:
    return torch.randn(batch, width, HIDDEN, generator=torch.Generator().manual_seed(seed))


def prospect(params: SamplingParams, choice: int = 0) -> Prospect:
    """Of a sequence that goes on behind PROMPT and OUTPUT."""
    assert params.seed is not None
    state = SamplingState(params, PROMPT, params.seed, choice, (2,), VOCABULARY, CPU)
    state.extend(OUTPUT)
    return Prospect(state, len(PROMPT) + len(OUTPUT))


def links(
    model: CausalLM,
    adapter: S3DAdapter,
    hidden: Tensor,
    prospects: list[Prospect],
    chances: Chances,
    reach: float = 0.0,
) -> list[list[Link]]:
    newest = torch.tensor([OUTPUT[-1] + i for i in range(len(hidden))])
    with torch.inference_mode():
        return draft_chain(model, adapter, list(hidden), newest, prospects, chances, reach)


def draft(model: CausalLM, adapter: S3DAdapter, hidden: Tensor, prospects: list[Prospect]) -> list[list[int]]:
    chains = links(model, adapter, hidden, prospects, [[1.0]] * len(hidden))
    return [[link.token for link in chain] for chain in chains]


def chosen(model: CausalLM, hidden: Tensor, one: Prospect) -> list[int]:
    """What the verifier makes of rows [G, hidden_size], each as if no token had been drafted before it."""
    logits = model.logits(hidden)
    rows = [RowGroup(one.state, one.index + row) for row in range(len(hidden))]
    return [token for (token,) in choose(logits, rows)]


class TestWithoutAHead:
    @pytest.mark.parametrize("mode", MODES)
    def test_every_row_is_chosen_as_the_verifier_chooses(
        self, model: CausalLM, folder: Path, mode: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(chain, "NUM_SAMPLED", VOCABULARY)
        hidden, one = hidden_rows(1, 32), prospect(MODES[mode])
        assert draft(model, without_head(folder), hidden, [one]) == [chosen(model, hidden[0], one)]

    @pytest.mark.parametrize("mode", ["greedy", "greedy penalised", "truncated"])
    def test_the_likeliest_are_enough_where_few_are_left(self, model: CausalLM, folder: Path, mode: str) -> None:
        assert MODES[mode].greedy or 0 < MODES[mode].top_k <= NUM_SAMPLED < VOCABULARY
        hidden, one = hidden_rows(1, 32), prospect(MODES[mode])
        assert draft(model, without_head(folder), hidden, [one]) == [chosen(model, hidden[0], one)]

    def test_of_many_tokens_one_of_the_likeliest_is_sampled(self, model: CausalLM, folder: Path) -> None:
        hidden = hidden_rows(3, 32)
        prospects = [prospect(SamplingParams(temperature=5.0, seed=seed)) for seed in range(3)]
        best = model.logits(hidden.flatten(0, 1)).topk(NUM_SAMPLED).indices.view(3, 32, -1).tolist()
        drafts = draft(model, without_head(folder), hidden, prospects)
        assert all(token in best[i][row] for i, tokens in enumerate(drafts) for row, token in enumerate(tokens))
        assert len({token for tokens in drafts for token in tokens}) > 40

    def test_min_tokens_bans_the_end_as_long_as_it_bans(self, model: CausalLM, folder: Path) -> None:
        hidden = model.head_rows(torch.tensor([2])).expand(1, WIDTH, -1) * 10  # the end is by far the likeliest
        drafts = draft(
            model, without_head(folder), hidden, [prospect(SamplingParams(temperature=0.0, seed=0, min_tokens=5))]
        )
        # Three tokens are there already, so two more must come.
        assert [token == 2 for token in drafts[0]] == [False, False, True, True, True]


class TestHead:
    @pytest.mark.parametrize("recurrent", [False, True])
    @pytest.mark.parametrize("mode", ["greedy", "greedy penalised"])
    @pytest.mark.parametrize("candidates", [None, 20], ids=["every token", "candidates"])
    def test_rows_are_scored_in_the_light_of_the_token_before(
        self,
        model: CausalLM,
        folder: Path,
        mode: str,
        recurrent: bool,
        candidates: int | None,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Row by row, with whole logits."""
        if candidates:
            monkeypatch.setattr(chain, "WHOLE_BELOW", 0)
            monkeypatch.setattr(chain, "NUM_CANDIDATES", candidates)
        adapter, hidden, one = with_head(folder, recurrent=recurrent), hidden_rows(1, 12), prospect(MODES[mode])
        head = adapter.head
        assert head is not None
        expected, token, state = [], torch.tensor([OUTPUT[-1]]), None
        for row in range(12):
            prepared = head.prepare(hidden[:, row])
            state = head.step(prepared, model.model.embed_tokens(token), model.embedding_scale, state)
            scores = model.logits(head.correct(hidden[:, row], state))
            outsiders = model.logits(hidden[:, row]).topk(VOCABULARY).indices[0, candidates or VOCABULARY :]
            scores[0, outsiders] = float("-inf")
            one.state.alter(scores, (), one.index + row)
            token = scores.argmax(-1)
            expected.append(int(token))
        assert draft(model, adapter, hidden, [one]) == [expected]
        assert expected != chosen(model, hidden[0], one), "the head has a say"

    def test_of_many_sequences_all_tokens_are_scored(
        self, model: CausalLM, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Rows of the head for each of them would be more than it has."""
        adapter, hidden, one = with_head(folder), hidden_rows(1, 12), prospect(MODES["greedy"])
        by_all = draft(model, adapter, hidden, [one])
        monkeypatch.setattr(chain, "WHOLE_BELOW", 0)
        monkeypatch.setattr(chain, "NUM_CANDIDATES", VOCABULARY // 2)
        by_half = draft(model, adapter, hidden, [one])
        assert by_half != by_all
        assert draft(model, adapter, hidden.expand(3, -1, -1), [one] * 3)[0] == by_all[0]

    @pytest.mark.parametrize("mode", MODES)
    def test_a_head_that_corrects_nothing_changes_nothing(self, model: CausalLM, folder: Path, mode: str) -> None:
        adapter, hidden, one = with_head(folder), hidden_rows(1, 16), prospect(MODES[mode])
        assert adapter.head is not None
        adapter.head.out.zero_()
        assert draft(model, adapter, hidden, [one]) == draft(model, without_head(folder), hidden, [one])

    def test_the_token_before_matters(self, model: CausalLM, folder: Path) -> None:
        adapter, hidden = with_head(folder), hidden_rows(1, 1).expand(50, -1, -1)
        drafts = draft(model, adapter, hidden, [prospect(MODES["greedy"])] * 50)
        assert len({tokens[0] for tokens in drafts}) > 1

    def test_embeddings_a_thousand_times_as_large_are_brought_to_size(self, folder: Path) -> None:
        def drafted(scale: float) -> list[list[int]]:
            model = load_model(open_checkpoint(str(folder)), torch.float32, CPU, 8)
            model.model.embed_tokens.weight.mul_(scale)
            return draft(model, with_head(folder), hidden_rows(1, 12), [prospect(MODES["greedy"])])

        assert drafted(1.0) == drafted(1024.0)


class TestReach:
    """How likely it is that a draft is accepted as far as each of its tokens."""

    LEVELS = 10

    def worth(self, count: int) -> Chances:
        """Confidences are squared, and those of every second sequence are worth half of that."""
        squares = [((level + 0.5) / self.LEVELS) ** 2 for level in range(self.LEVELS)]
        return [[square / (1 + i % 2) for square in squares] for i in range(count)]

    def test_confidence_is_the_share_of_the_token(self, model: CausalLM, folder: Path) -> None:
        hidden, one = hidden_rows(1, 6) * 20, prospect(MODES["greedy"])
        shares = model.logits(hidden[0]).softmax(-1).amax(-1).tolist()
        (chain,) = links(model, without_head(folder), hidden, [one], self.worth(1))
        assert [link.level for link in chain] == [min(int(share * self.LEVELS), self.LEVELS - 1) for share in shares]
        assert len({link.level for link in chain}) > 1

    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("make", [without_head, with_head])
    def test_reach_is_the_product_of_what_each_sequences_confidences_are_worth(
        self, model: CausalLM, folder: Path, make: Any, mode: str
    ) -> None:
        hidden = hidden_rows(6, 8) * 20  # unlike random states, sure of some tokens
        prospects = [prospect(MODES[mode], choice) for choice in range(6)]
        worth = self.worth(6)
        for i, drafted in enumerate(links(model, make(folder), hidden, prospects, worth)):
            chances = [worth[i][link.level] for link in drafted]
            assert [link.reach for link in drafted] == pytest.approx(list(accumulate(chances, mul)))

    @pytest.mark.parametrize("make", [without_head, with_head])
    def test_a_chain_ends_with_the_last_token_that_anybody_can_reach(
        self, model: CausalLM, folder: Path, make: Any
    ) -> None:
        hidden, prospects = hidden_rows(6, 8) * 20, [prospect(MODES["greedy"], choice) for choice in range(6)]
        whole = links(model, make(folder), hidden, prospects, self.worth(6))
        lengths = []
        for least in (1e-3, 0.1, 0.3, 0.9, 1.1):
            chains = links(model, make(folder), hidden, prospects, self.worth(6), least)
            length = max(sum(link.reach >= least for link in chain) for chain in whole)
            assert chains == [chain[: length + 1] for chain in whole]
            lengths.append(length)
        assert lengths == sorted(lengths, reverse=True)
        assert lengths[0] > lengths[-1] == 0

    def test_rows_that_a_sequence_has_not_keep_nobody_waiting(
        self, model: CausalLM, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        scored: list[int] = []
        score = chain._WholeHead.__call__

        def record(head: chain._WholeHead, row: int, hidden: Tensor) -> chain.Scored:
            scored.append(row)
            return score(head, row, hidden)

        monkeypatch.setattr(chain._WholeHead, "__call__", record)
        hidden = [hidden_rows(1, width, width)[0] * 20 for width in (6, 1, 3)] + [torch.empty(0, HIDDEN)]
        prospects = [prospect(MODES["greedy"], choice) for choice in range(4)]
        sure, hopeless = [1.0], [0.1]
        newest = torch.arange(4) + 40
        with torch.inference_mode():
            for chances, lengths in (
                ([sure] * 4, [6, 1, 3, 0]),
                ([hopeless, sure, sure, sure], [3, 1, 3, 0]),
                ([hopeless, sure, hopeless, sure], [1, 1, 1, 0]),
            ):
                scored.clear()
                chains = draft_chain(model, with_head(folder), hidden, newest, prospects, chances, 0.5)
                assert [len(one) for one in chains] == lengths
                assert scored == list(range(max(lengths)))

    @pytest.mark.parametrize(
        ("confidence", "level"),
        [(0.0, 0), (0.0999, 0), (0.1, 1), (0.95, 9), (1.0, 9), (1.0001, 9), (-0.0001, 0), (float("nan"), 0)],
    )
    def test_levels_are_equal_parts_and_take_what_rounding_makes_of_confidence(
        self, confidence: float, level: int
    ) -> None:
        assert level_of(confidence, self.LEVELS) == level

    def test_nonsense_is_as_unsure_as_can_be(self, model: CausalLM, folder: Path) -> None:
        hidden = torch.full((1, 4, HIDDEN), float("nan"))
        (chain,) = links(model, with_head(folder), hidden, [prospect(MODES["greedy"])], self.worth(1))
        assert [link.level for link in chain] == [0] * 4


class TestBatch:
    @pytest.mark.parametrize("make", [without_head, with_head])
    def test_sequences_do_not_disturb_each_other(self, model: CausalLM, folder: Path, make: Any) -> None:
        """Whatever their modes: greedy ones beside sampled ones, altered beside plain."""
        adapter, hidden = make(folder), hidden_rows(2 * len(MODES))
        prospects = [prospect(params, choice) for params in MODES.values() for choice in (0, 1)]
        together = draft(model, adapter, hidden, prospects)
        newest = torch.tensor([OUTPUT[-1] + i for i in range(len(hidden))])
        for i, one in enumerate(prospects):
            with torch.inference_mode():
                alone = draft_chain(model, adapter, [hidden[i]], newest[i : i + 1], [one], [[1.0]])
            assert together[i] == [link.token for link in alone[0]]
        assert len({tuple(tokens) for tokens in together}) == len(together)

    def test_choices_of_one_request_have_noise_of_their_own(self, model: CausalLM, folder: Path) -> None:
        prospects = [prospect(MODES["plain sampling"], choice) for choice in range(8)]
        drafts = draft(model, without_head(folder), hidden_rows(1).expand(8, -1, -1), prospects)
        assert len({tuple(tokens) for tokens in drafts}) == 8

    @pytest.mark.parametrize("make", [without_head, with_head])
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30, 0.0])
    @pytest.mark.parametrize("mode", MODES)
    def test_rows_of_nonsense_give_tokens_of_the_vocabulary(
        self, model: CausalLM, folder: Path, make: Any, value: float, mode: str
    ) -> None:
        hidden = hidden_rows(2)
        hidden[1] = value
        sane, mad = draft(model, make(folder), hidden, [prospect(MODES[mode])] * 2)
        assert sane == draft(model, make(folder), hidden[:1], [prospect(MODES[mode])])[0]
        assert all(0 <= token < VOCABULARY for token in mad)
