"""Team of ranks that several processes make: how they meet, agree, share what they know, and part."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist

from lowvram.devices import is_out_of_memory
from lowvram.encode.conditions import Conditions
from lowvram.encode.voice import SeveralVoices, Voice, VoiceInWindows, WholeVoice
from lowvram.offload.layers import Shared
from lowvram.parallel.comm import Comm, Sent, StageExchange
from lowvram.parallel.heartbeat import Heartbeat, Peer
from lowvram.parallel.rank_env import RankEnv
from lowvram.parallel.rendezvous import RENDEZVOUS_S, Rendezvous
from lowvram.parallel.shared_weights import SharedSlabs
from lowvram.parallel.stage_pipeline import StageChain, arriving
from lowvram.parallel.team import Chain, LatentSize
from lowvram.parallel.ulysses import Sequence, Ulysses, Whole
from lowvram.parallel.voice_windows import SentPieces, VoiceExtent, send_windows
from lowvram.planning.library_memory import CudaTaken, measuring_group
from lowvram.planning.measure import CudaRunner
from lowvram.planning.rank_layout import ParallelLayout
from lowvram.schedule import Block
from lowvram_kernels.errors import ConfigError, DistributedError, LowvramError

Tensor = torch.Tensor
log = logging.getLogger(__name__)

# Exchanges wait for as long as the slowest rank takes; the heartbeat ends what waits in vain.
_PATIENCE = datetime.timedelta(days=7)
_HANDSHAKE_S = 25.0
_CAUSE_S = 14.0
# A starter that ends this rank because another one failed does so about when the heartbeat finds it.
_TOLD_S = 1.0


class EndedFromOutside(DistributedError):
    """Whoever started this rank has ended it."""


class RankTeam:
    """This process among the ranks of ``layout``, met and watched: a ``Team`` once it is connected."""

    def __init__(self, env: RankEnv, layout: ParallelLayout):
        self.env, self.layout, self.role = env, layout, layout.role(env.rank)
        self.sent = Sent()
        self._rendezvous = Rendezvous(env)
        me = dataclasses.asdict(Peer.me(self.role.name))
        peers = self._rendezvous.tell("peers", me, cause=self._rendezvous.gone, within_s=RENDEZVOUS_S)
        self.peers = [Peer(**peer) for peer in peers]
        self._heartbeat = Heartbeat(self._rendezvous.another_connection(), env.rank, self.peers)
        self._heartbeat.begin()
        self._told = False  # that this rank fails
        self.host_weights: Shared | None = None

    def settle(self, layout: ParallelLayout) -> None:
        """Take another layout than the one that was met with; before ``connect``."""
        self.layout, self.role = layout, layout.role(self.env.rank)
        # In place: the heartbeat has the same list.
        self.peers[:] = [dataclasses.replace(peer, name=layout.role(rank).name) for rank, peer in enumerate(self.peers)]

    def connect(self, device: torch.device) -> None:
        """Make the ways that tensors go, and try them.

        Raises:
            DistributedError: what arrives is not what was sent.
        """
        self._comm, self._stage_group, self.sequence = self._groups(device)

    def _groups(self, device: torch.device) -> tuple[Comm, Any, Sequence]:
        """Make the groups, which every rank does for all of them in the same order; and try them."""
        env, layout = self.env, self.layout
        with self._heartbeat.doing("meeting the other ranks", "meet", limit_s=RENDEZVOUS_S):
            store = dist.distributed_c10d.PrefixStore("groups", self._rendezvous.store)
            dist.init_process_group("gloo", store=store, rank=env.rank, world_size=env.world_size, timeout=_PATIENCE)
        comm = Comm(_group(range(env.world_size), "gloo"), self.sent)
        mine: Any = None
        agreeing: Any = None
        if layout.ulysses_size > 1:
            for stage in range(layout.stages):
                members = layout.members(stage)
                exchange = _group(members, "nccl" if device.type == "cuda" else "gloo")
                control = _group(members, "gloo")
                if stage == self.role.stage:
                    mine, agreeing = exchange, control
        if mine is None or self.role.index is None:
            return comm, None, Whole()
        sequence = Ulysses(self.role.index, layout.ulysses_size, StageExchange(mine, self.role.index, self.sent))
        card = CudaTaken(device, CudaRunner(device).key) if device.type == "cuda" else None
        with (
            self._heartbeat.doing("trying the exchange with its stage", "handshake", limit_s=_HANDSHAKE_S),
            measuring_group(card, layout.ulysses_size),
        ):
            _try_exchange(sequence, device)
        return comm, agreeing, sequence

    def share(self, what: str, value: Any) -> list[Any]:
        """Every rank tells ``value``; all ranks' values.

        Raises:
            DistributedError: a rank is gone.
        """
        with self._heartbeat.waiting(f"the others' {what.replace('_', ' ')}"):
            return self._rendezvous.tell(what, value, cause=lambda: self._heartbeat.cause)

    def agree(self, facts: Mapping[str, Any]) -> None:
        """Let no rank go on with another artifact, other settings or another version than the rest.

        Raises:
            ConfigError: what differs, where, and its values.
        """
        told = self.share("settings", dict(facts))
        for rank, other in enumerate(told):
            if differing := [name for name in facts if other.get(name) != told[0].get(name)]:
                name = differing[0]
                raise ConfigError(
                    f"{self.peers[rank].words} has {name} {other.get(name)!r}, rank 0 has {told[0].get(name)!r}; "
                    "expected the same on all ranks: start them with one command, and with copies of one artifact"
                )

    def keep_weights_once(self, sizes: list[int]) -> None:
        """Let the ranks of each machine share one host copy of the layers, of so many bytes each, that they stream."""
        machines = [peer.machine for peer in self.peers]
        mine = machines[self.env.rank]
        first = machines.index(mine)
        own = _shared_slabs(sizes) if first == self.env.rank else None
        paths = self.share("weights", own.path if own else None)
        if own is None and paths[first] is not None and machines.count(mine) > 1:
            try:
                own = SharedSlabs.open(paths[first], sizes)
            except OSError as error:
                log.warning("rank %d keeps its own host copy of the weights: %s", self.env.rank, error)
        self.host_weights = own

    def share_conditions(self, conditions: Conditions | None) -> Conditions:
        own: dict[str, Tensor] | None = None
        if conditions is not None:
            _check_voices(conditions)
            names = [name for name in ("context", "reference", "motion", "masks", "pose") if _there(conditions, name)]
            own = {name: getattr(conditions, name).cpu() for name in names}
            if isinstance(conditions.audio, WholeVoice):
                own["audio"] = conditions.audio.features.cpu()
        facts = None
        if own is not None and conditions is not None:
            shapes = {name: [list(t.shape), str(t.dtype).removeprefix("torch.")] for name, t in own.items()}
            facts = {"tensors": shapes, "voice": dataclasses.asdict(VoiceExtent.of(conditions.audio))}
        told = self.share("conditions", facts)[self.layout.media_rank]
        with self._heartbeat.waiting("the conditions"):
            tensors = own or {
                name: torch.empty(shape, dtype=getattr(torch, kind)) for name, (shape, kind) in told["tensors"].items()
            }
            for name in tensors:
                tensors[name] = tensors[name].contiguous()
                self._comm.broadcast(tensors[name], self.layout.media_rank)
        audio = tensors.pop("audio", None)
        here = conditions.audio if conditions is not None else None
        voice = self._share_windows(VoiceExtent(**told["voice"]), here) if audio is None else WholeVoice(audio)
        return conditions or Conditions(**tensors, audio=voice)

    def _share_windows(self, facts: VoiceExtent, here: Voice | None) -> Voice:
        """A long voice, which the media rank has ``here``; the others take from it what they need, when they do."""
        # A group of its own: windows are sent in a thread of their own.
        with self._heartbeat.waiting("the others' way for the voice"):
            group = _group(range(self.env.world_size), "gloo")
        comm, media = Comm(group, self.sent, "voice"), self.layout.media_rank
        if isinstance(here, VoiceInWindows):
            others = [rank for rank in range(self.env.world_size) if rank != media]
            send_windows(here, comm, others, self._failing, taken_here=self.role.denoises)
            return here
        return VoiceInWindows(facts.ends, SentPieces(facts, comm, media, self._heartbeat.waiting))

    def _failing(self, error: BaseException) -> None:
        """Tell the others, from another thread than the one that waits for them and will fail too."""
        self._told = True
        self._heartbeat.failed(_words(error))

    def chain(self, blocks: Iterable[Block], latent_size: LatentSize, *, clips: int) -> Chain:
        return StageChain(
            self._comm, self.layout, self.role, blocks, latent_size, clips=clips, waiting=self._heartbeat.waiting
        )

    def arriving(self, blocks: Iterable[Block], latent_size: LatentSize) -> Iterator[tuple[Block, Tensor]]:
        return arriving(self._comm, self.layout, blocks, latent_size, self._heartbeat.waiting)

    def doing(self, what: str, kind: str) -> contextlib.AbstractContextManager[None]:
        """Say what this rank does, for the others and for those who look for what went wrong."""
        return self._heartbeat.doing(what, kind)

    def sent_bytes(self) -> dict[str, int]:
        return dataclasses.asdict(self.sent)

    def meet(self) -> None:
        """Wait for the ranks of this stage: work they do together is not held up by what one did before it."""
        if self._stage_group is not None:
            with self._heartbeat.waiting("the other ranks of its stage"):
                dist.barrier(group=self._stage_group)

    def any_ran_out(self, here: bool) -> bool:
        if self._stage_group is None:
            return here
        told = torch.tensor([int(here)])
        with self._heartbeat.waiting("the other ranks of its stage"):
            dist.all_reduce(told, op=dist.ReduceOp.MAX, group=self._stage_group)
        return bool(told.item())

    def leave(self) -> None:
        """Wait until all that was sent is received and all ranks are done; no rank is missed from here on."""
        with self._heartbeat.waiting("the others to finish"):
            self._comm.settle()
            self._rendezvous.tell("leave", True, cause=lambda: self._heartbeat.cause)
        self._heartbeat.done()
        dist.destroy_process_group()

    def explain(self, error: BaseException) -> LowvramError | None:
        """Which rank is at fault: another one, whose failure comes back, or this one, and all are told."""
        if self._told:
            return None
        if isinstance(error, EndedFromOutside):
            self._heartbeat.wait_for_cause(_TOLD_S)
        elif isinstance(error, DistributedError) or (isinstance(error, RuntimeError) and not _own(error)):
            self._heartbeat.wait_for_cause(_CAUSE_S)
        # What has to change before a run can succeed is no other rank's doing, whoever found it first.
        to_change = isinstance(error, LowvramError) and error.exit_code == 2
        if (cause := self._heartbeat.cause) is not None and not to_change:
            return DistributedError(f"the run ended: {cause}")
        self._heartbeat.failed(_words(error))
        return None


def _shared_slabs(sizes: list[int]) -> SharedSlabs | None:
    try:
        return SharedSlabs.create(sizes)
    except OSError as error:
        log.warning("every rank keeps its own host copy of the weights: %s", error)
        return None


def _words(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:500]


def _own(error: RuntimeError) -> bool:
    """Whether an error cannot come from an exchange that broke off."""
    return is_out_of_memory(error)


def _group(ranks: Iterable[int], backend: str) -> Any:
    return dist.new_group(list(ranks), backend=backend, timeout=_PATIENCE)


def _try_exchange(sequence: Ulysses, device: torch.device) -> None:
    """Cards without peer access that claim it hang here, where somebody watches, or deliver wrong bytes.

    Raises:
        DistributedError: what arrived is not what was sent.
    """
    size, width = sequence.size, 1 << 16
    x = torch.arange(size * size * width, dtype=torch.float32, device=device).remainder(8191).view(size, size, width)
    mine = x[sequence.index].view(1, size, width)
    seen = sequence.begin_to_heads(mine, [1] * size).wait()
    if not torch.equal(seen[:, 0], x[:, sequence.index]):
        raise DistributedError(
            "ranks received other bytes than were sent; export NCCL_P2P_DISABLE=1 and try again (`lowvram doctor` "
            "says more)"
        )


def _there(conditions: Conditions, name: str) -> bool:
    return getattr(conditions, name) is not None


def _check_voices(conditions: Conditions) -> None:
    """Raises: ConfigError: several long voices, of which windows would have to be sent."""
    if isinstance(conditions.audio, SeveralVoices):
        raise ConfigError(
            "several voices of more than a minute are for one GPU, and several ranks share the work; give shorter "
            "ones, or leave --gpus out"
        )
