"""Which drafters there are, how widely each may draft, and what they propose."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from collections.abc import Sequence as SequenceOf

from skippy.engine.adapter import DEFAULT_WIDTH, S3DAdapter
from skippy.engine.audience import Audience
from skippy.engine.build import Build
from skippy.engine.config import MAX_SPECULATIVE_TOKENS
from skippy.engine.controller import Controller, Prior
from skippy.engine.drafters import eagle3, recycling, suffix
from skippy.engine.drafters.base import Drafter, Keeper
from skippy.engine.drafters.eagle3 import Eagle3Drafter
from skippy.engine.drafters.hybrid import HybridDrafter
from skippy.engine.drafters.ngram import NgramDrafter
from skippy.engine.drafters.none import NoDrafter
from skippy.engine.drafters.recycling import RecyclingDrafter
from skippy.engine.drafters.s3d import S3DDrafter, S3DFusedDrafter
from skippy.engine.drafters.suffix import SharedOutputs, SuffixDrafter
from skippy.engine.eagle import EagleHead
from skippy.engine.errors import ConfigError
from skippy.engine.runner import Runner
from skippy.engine.sampling import SamplingState
from skippy.engine.scheduler import Schedule
from skippy.engine.sequence import Sequence
from skippy.engine.types import StepStats

OF_ADAPTER = (S3DDrafter.name, Eagle3Drafter.name)
DEFAULT_SPECULATIVE_TOKENS = 4
"""For drafters that do not know better."""


class _NotLearnt(NoDrafter):
    """In the place of an adapter's drafter until there is an adapter."""

    name = S3DDrafter.name


class Drafting:
    """The drafters of one engine.

    Args:
        states: how each live sequence chooses its tokens; for those that foresee it.
        priors: what the drafters' controllers begin with, by name.
        share: whether a sequence may be drafted for from what others were told.
        learns: whether an adapter may be adopted later; until then its drafter drafts nothing.

    Attributes:
        drafters: by the names that requests use.
        fused: the one whose masks ride in the verify pass, if there is one.
        audience: who learns from the verify pass.
    """

    def __init__(
        self,
        built: Build,
        states: Mapping[Sequence, SamplingState],
        priors: Mapping[str, Prior],
        *,
        share: bool,
        learns: bool,
    ) -> None:
        # Not the whole of `built`: its adapter may be replaced.
        self._runner, self._base, self._states = built.runner, built.checkpoint, states
        self.drafters: dict[str, Drafter] = {}
        self._shared = SharedOutputs() if share else None
        self._lookup = SuffixDrafter(self._shared)
        """Of whichever hybrid there is."""
        known: list[Drafter] = [NoDrafter(), NgramDrafter(), SuffixDrafter(self._shared)]
        if share:  # what is recycled has no owner
            known.append(RecyclingDrafter(built.checkpoint.vocab_size, states))
        if built.adapter is not None:
            known += self._of_adapter(built.adapter)
        elif built.eagle is not None and built.eagle_cache is not None:
            known += self._of_head(built.eagle, built.eagle_cache)
        elif learns:
            known += [_NotLearnt(), self._without_adapter()]
        elif share:
            known.append(self._without_adapter())
        self.fused = next((drafter for drafter in known if isinstance(drafter, S3DFusedDrafter)), None)
        self.audience = Audience(self.fused)
        for drafter in known:
            self.add(drafter)
        self._controllers = {
            name: Controller(most, priors.get(name)) for name, most in _widest(built).items() if name in self.drafters
        }
        self._granted: dict[str, int] = {}

    def add(self, drafter: Drafter) -> None:
        """Let requests name one more drafter, or another one by a name that there is."""
        self.drafters[drafter.name] = drafter
        self.audience.seat(drafter.name, drafter.parts if isinstance(drafter, HybridDrafter) else (drafter,))

    def adopt(self, adapter: S3DAdapter) -> None:
        """Draft with another adapter, of the separate kind, from the next step on."""
        is_first = isinstance(self.drafters[S3DDrafter.name], _NotLearnt)
        for drafter in self._of_adapter(adapter):
            self.add(drafter)
            # Drafts take as long as those of the adapter before, if there was one; more of them are accepted.
            known = self._controllers[drafter.name]
            self._controllers[drafter.name] = (
                Controller(adapter.config.num_speculative_tokens) if is_first else known.renewed()
            )

    def choose(self, wanted: str, model: str) -> str:
        """The drafter of requests that name none.

        Raises:
            ConfigError: there is no such drafter for this model.
        """
        if wanted == "auto":
            return HybridDrafter.name if HybridDrafter.name in self.drafters else SuffixDrafter.name
        if wanted in OF_ADAPTER and wanted not in self.drafters:
            raise ConfigError(
                f"The drafter {wanted} needs an adapter, and {model} has none: train one with `skippy train`, or name "
                "its folder with --adapter."
            )
        if wanted not in self.drafters:
            raise ConfigError(f"There is no drafter {wanted!r}; there are: auto, {', '.join(self.drafters)}.")
        return wanted

    def widest(self, name: str) -> int:
        """The most tokens that a drafter drafts in one step."""
        if name == NoDrafter.name:
            return 0
        if name not in self._controllers:
            return MAX_SPECULATIVE_TOKENS
        return max(self._controllers[name].most, self._free_width(name))

    def default_width(self, name: str) -> int:
        """The most tokens to draft for a request that does not say."""
        return self.widest(name) if self.is_adaptive(name) else min(DEFAULT_SPECULATIVE_TOKENS, self.widest(name))

    def control(self, name: str, controller: Controller) -> None:
        """Let another controller choose a drafter's width, for which there must be one."""
        assert name in self._controllers, f"{name} drafts as many tokens as it is told"
        self._controllers[name] = controller

    def is_adaptive(self, name: str) -> bool:
        """Whether a controller decides how many tokens pay."""
        return name in self._controllers

    def rides(self, name: str) -> bool:
        """Whether masks of this drafter ride in the verify pass."""
        return self.fused is not None and name in (S3DFusedDrafter.name, HybridDrafter.name)

    def grant(self, running: SequenceOf[Sequence], prefills: bool) -> Mapping[str, int]:
        """By drafter, how many tokens the next step is to make room for, for each sequence that leaves it to it.

        Args:
            prefills: whether the step is expected to carry prompts: it is not timed then.
        """
        decoding = [sequence for sequence in running if sequence.decoding]
        drafting = {sequence.drafter for sequence in decoding if sequence.adaptive}
        self._granted = {
            name: self._width(name, len(decoding), prefills) if name in drafting else controller.most
            for name, controller in self._controllers.items()
        }
        hybrid = self.drafters.get(HybridDrafter.name)
        if isinstance(hybrid, HybridDrafter):
            hybrid.begin(self._granted[hybrid.name])
        # Drafts that cost nothing may be wider than what the controller allows.
        return {name: max(width, self._free_width(name)) for name, width in self._granted.items()}

    def propose(self, schedule: Schedule) -> list[list[int]]:
        """The drafts of every piece of work, in order; empty where nothing is drafted."""
        drafts: list[list[int]] = [[] for _ in schedule.work]
        for name, drafter in self.drafters.items():
            places = [i for i, work in enumerate(schedule.work) if work.lookahead and work.sequence.drafter == name]
            if places:
                work = [schedule.work[i] for i in places]
                proposals = drafter.propose([w.sequence for w in work], [w.lookahead for w in work])
                for place, proposal in zip(places, proposals, strict=True):
                    assert len(proposal) <= schedule.work[place].lookahead
                    drafts[place] = proposal
        return drafts

    def time(self, schedule: Schedule, stats: StepStats) -> None:
        """Tell the controllers what a step without prompts took, and what became of the drafts they granted."""
        if stats.prefill_seconds or not stats.verify_seconds or any(w.num_known > 1 for w in schedule.work):
            return
        tokens = sum(1 + w.sequence.last_accepted for w in schedule.work)
        for name, controller in self._controllers.items():
            free = self._free(name)
            work = [
                w
                for w in schedule.work
                if w.sequence.drafter == name and w.sequence.adaptive and w.sequence not in free
            ]
            if not work or any(w.lookahead < w.riders for w in work):
                continue  # nobody asked, or the step before let fewer masks ride
            drafter = self.drafters[name]
            if isinstance(drafter, HybridDrafter) and self._granted[name]:
                drafter.time(stats.verify_seconds)
            width = sum(min(w.lookahead, self._granted[name]) for w in work) / len(work)
            accepted = [w.sequence.last_accepted for w in work]
            seconds = stats.draft_seconds + stats.verify_seconds
            controller.observe(len(schedule.work), width, seconds, accepted, tokens - sum(accepted) - len(work))

    def release(self, sequence: Sequence) -> None:
        """Forget a sequence that has ended."""
        drafter = self.drafters[sequence.drafter]
        if isinstance(drafter, Keeper):
            drafter.release(sequence)

    def forget(self) -> None:
        """Forget what was learnt of sequences that have ended, but for times: as if the engine had just begun."""
        for drafter in self.drafters.values():
            if isinstance(drafter, Keeper):
                drafter.forget()

    def _width(self, name: str, batch: int, prefills: bool) -> int:
        controller = self._controllers[name]
        return controller.best(batch, self.rides(name)) if prefills else controller.width(batch)

    # Those within a hybrid are its own: drafters learn from their own sequences.

    def _of_adapter(self, adapter: S3DAdapter) -> list[Drafter]:
        runner, lookup = self._runner, self._lookup
        if adapter.config.fused:
            fused = S3DFusedDrafter(runner, adapter, self._states)
            # Masks ride before anybody knows what a lookup will find.
            return [fused, HybridDrafter(lookup, fused)]
        separate, within = (S3DDrafter(runner, adapter, self._states) for _ in range(2))
        cost = len(adapter.kept) / self._base.config.num_hidden_layers
        return [separate, HybridDrafter(lookup, within, draft_cost=cost)]

    def _of_head(self, head: EagleHead, cache: Runner) -> list[Drafter]:
        model = self._runner.model
        alone, within = (Eagle3Drafter(head, model, cache, self._states) for _ in range(2))
        cost = eagle3.MAX_DRAFT / self._base.config.num_hidden_layers
        return [alone, HybridDrafter(self._lookup, within, draft_cost=cost)]

    def _without_adapter(self) -> HybridDrafter:
        return HybridDrafter(self._lookup, RecyclingDrafter(self._base.vocab_size, self._states))

    def _free_width(self, name: str) -> int:
        drafter = self.drafters[name]
        return drafter.free_width if isinstance(drafter, HybridDrafter) else 0

    def _free(self, name: str) -> Iterable[Sequence]:
        """Whose drafts of the last step cost nothing."""
        drafter = self.drafters[name]
        return drafter.free if isinstance(drafter, HybridDrafter) else ()


def _widest(built: Build) -> dict[str, int]:
    """The most tokens that controllers grant, by drafter, for all that can stop by themselves."""
    widest = {
        S3DDrafter.name: DEFAULT_WIDTH,  # of the adapter that may be learnt
        SuffixDrafter.name: suffix.MAX_DRAFT,
        RecyclingDrafter.name: recycling.MAX_DRAFT,
        Eagle3Drafter.name: eagle3.MAX_DRAFT,
        HybridDrafter.name: suffix.MAX_DRAFT,
    }
    if built.adapter is not None:
        widest[S3DDrafter.name] = widest[HybridDrafter.name] = built.adapter.config.num_speculative_tokens
    elif built.eagle is not None:
        widest[HybridDrafter.name] = eagle3.MAX_DRAFT
    return widest
