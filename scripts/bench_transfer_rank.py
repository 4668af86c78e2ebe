"""What one process of ``scripts/bench_transfer.py`` does: a source or a receiver of weights, on a device of its own."""

from __future__ import annotations

import gc
import os
import time
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch

from rl.transfer.links import Membership
from rl.transfer.plan import TensorSpec, TransferPlan
from rl.transfer.receiver import Receiver
from rl.transfer.sender import Sender

_WORDS = 1 << 24  # of a checksum at once, so that its 64-bit copies stay small


@dataclass(frozen=True)
class Timed:
    """One repeat as a member saw it; ``time.time()`` of one host, in seconds.

    Attributes:
        called: when it was told to begin.
        begun: sources: when all members were ready. Receivers: 0.
        ended: when its device was done, receivers' copies into place included.
    """

    called: float
    begun: float
    ended: float


def sizes_of(gib: float, *, tiny: bool = False) -> list[TensorSpec]:
    """A Qwen3-MoE-like model in Hugging Face names, cut off when it has ``gib``; bf16."""
    hidden, ffn, experts, vocab = (64, 48, 8, 512) if tiny else (2048, 768, 128, 32768)
    if not tiny:
        vocab = max(256, min(vocab, int(gib * 2**30 / 8 / (2 * hidden))))  # small models are mostly experts too
    specs = [TensorSpec("model.embed_tokens.weight", (vocab, hidden), "bfloat16")]
    left = gib * 2**30 - specs[0].nbytes
    layer = 0
    while left > 0:
        prefix = f"model.layers.{layer}."
        dense = {
            "input_layernorm": (hidden,),
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.o_proj": (hidden, hidden),
        }
        dense |= {"self_attn.k_proj": (hidden // 4, hidden), "self_attn.v_proj": (hidden // 4, hidden)}
        dense |= {"post_attention_layernorm": (hidden,), "mlp.gate": (experts, hidden)}
        added = [TensorSpec(f"{prefix}{name}.weight", shape, "bfloat16") for name, shape in dense.items()]
        for e in range(experts):
            if left <= sum(spec.nbytes for spec in added):
                break
            for name, shape in (("gate", (ffn, hidden)), ("up", (ffn, hidden)), ("down", (hidden, ffn))):
                added.append(TensorSpec(f"{prefix}mlp.experts.{e}.{name}_proj.weight", shape, "bfloat16"))
        specs += added
        left -= sum(spec.nbytes for spec in added)
        layer += 1
    return specs


def checksum(tensors: dict[str, torch.Tensor]) -> dict[str, int]:
    """By name, a sum of all 16-bit words, each weighted by its place: wrong bits or places change it."""
    sums = {}
    for name, tensor in tensors.items():
        words = tensor.contiguous().view(-1).view(torch.int16)
        total = 0
        for start in range(0, words.numel(), _WORDS):
            part = words[start : start + _WORDS].to(torch.int64)
            place = torch.arange(start, start + part.numel(), device=part.device).remainder_(65521).add_(1)
            total += int((part * place).sum())
        sums[name] = total
    return sums


class Member:
    """The process; each method is a command of the parent."""

    def __init__(self, rank: int, gpu: bool) -> None:
        self.device = torch.device("cuda", rank) if gpu else torch.device("cpu")
        if gpu:
            torch.cuda.set_device(rank)
        else:
            torch.set_num_threads(1)
        self.rank = rank
        self.end: Sender | Receiver | None = None
        self.sources = 0
        self.tensors: dict[str, torch.Tensor] = {}

    def ping(self) -> int:
        return os.getpid()

    def join(self, membership: Membership) -> None:
        """Source or receiver by its place in the membership, whose members are the processes in order."""
        self.leave()
        self.sources = len(membership.sources)
        kind = Sender if self.rank < self.sources else Receiver
        self.end = kind(membership.members[self.rank], self.device)
        self.end.join(membership)

    def leave(self) -> None:
        if self.end is not None:
            self.end.close()
        self.end = None

    def hold(self, specs: list[TensorSpec], values: bool) -> None:
        """Have these tensors: random bits, or, as a receiver, zeros."""
        self.tensors = {}
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        generator = torch.Generator(self.device).manual_seed(self.rank)
        for spec in specs:
            tensor = torch.zeros(spec.shape, dtype=torch.int16, device=self.device)
            if values:
                tensor.random_(-(2**15), 2**15, generator=generator)
                # No exponent of ones: CUDA's copy of many tensors at once turns every NaN into the same one.
                tensor.bitwise_and_(~0x80)
            self.tensors[spec.name] = tensor.view(torch.bfloat16)

    def checksums(self) -> dict[str, int]:
        return checksum(self.tensors)

    def transfer(self, plan: TransferPlan) -> Timed:
        """One transfer: pack and send, or receive and copy into place."""
        self._settle()
        called = time.time()
        if isinstance(self.end, Sender):
            pairs = [(name, self.tensors[name]) for name in plan.names(self.rank)]
            report = self.end.send(plan, self.rank, pairs)
            return Timed(called, report.started + report.ready_s, time.time())
        assert self.end is not None
        for pairs in self.end.receive_buckets(plan):
            torch._foreach_copy_([self.tensors[name] for name, _ in pairs], [tensor for _, tensor in pairs])
        self._settle()
        return Timed(called, 0.0, time.time())

    def bare(self, how: str, nbytes: int) -> Timed:
        """One large buffer from the first source: ``broadcast`` to all, or ``send`` to the first receiver."""
        assert self.end is not None
        link = self.end._link if isinstance(self.end, Sender) else self.end._links[0]
        if link is None or 0 < self.rank < self.sources:
            return Timed(0.0, 0.0, 0.0)
        buffer = torch.zeros(nbytes, dtype=torch.uint8, device=self.device)
        place = 0 if self.rank == 0 else 1 + self.rank - self.sources
        link.wait(link.broadcast(buffer[:1]), 60.0, "a barrier")
        self._settle()
        called = time.time()
        if how == "broadcast":
            link.wait(link.broadcast(buffer), 60.0, "the bare broadcast")
        elif place == 0:
            link.wait(link.group.send([buffer], 1, 0), 60.0, "the bare send")
        elif place == 1:
            link.wait(link.group.recv([buffer], 0, 0), 60.0, "the bare receive")
        self._settle()
        return Timed(called, called, time.time())

    def peer_copy(self, nbytes: int, repeats: int) -> float:
        """Bytes a second of ``Tensor.copy_`` from this process's device to the next one; 0 without a second device."""
        if self.device.type != "cuda" or torch.cuda.device_count() < 2:
            return 0.0
        source = torch.zeros(nbytes, dtype=torch.uint8, device="cuda:0")
        target = torch.zeros(nbytes, dtype=torch.uint8, device="cuda:1")
        best = float("inf")
        for _ in range(repeats):
            torch.cuda.synchronize(0)
            started = time.perf_counter()
            target.copy_(source)
            torch.cuda.synchronize(0)
            torch.cuda.synchronize(1)
            best = min(best, time.perf_counter() - started)
        return nbytes / best

    def _settle(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def serve(connection: Connection, rank: int, gpu: bool) -> None:
    """Take commands of the parent until it goes."""
    serve_member(connection, Member(rank, gpu))


def serve_member(connection: Connection, member: Member) -> None:
    """Take ``(method, arguments)`` until the parent goes; answer ``(good, value or traceback)``."""
    while True:
        try:
            name, arguments = connection.recv()
        except EOFError:
            return
        try:
            connection.send((True, getattr(member, name)(*arguments)))
        except Exception:
            connection.send((False, traceback.format_exc()))


class StoreActor:
    """The path through Ray's object store, executed as trainer and engines do it: one process on a device."""

    def __init__(self, rank: int, gpu: bool) -> None:
        # Ray shows an actor its own GPU only.
        self.member = Member(0 if gpu else rank, gpu)
        self.member.rank = rank

    def hold(self, specs: list[TensorSpec], values: bool) -> None:
        self.member.hold(specs, values)

    def export(self, bucket_bytes: int) -> list[Any]:
        """References to buckets ``{name: tensor on the CPU}``."""
        import ray

        references, bucket, used = [], {}, 0
        for name, tensor in self.member.tensors.items():
            bucket[name] = tensor.to("cpu", copy=True)
            used += tensor.nbytes
            if used >= bucket_bytes:
                references.append(ray.put(bucket))
                bucket, used = {}, 0
        return references + ([ray.put(bucket)] if bucket else [])

    def load(self, references: list[Any]) -> None:
        from rl.rollout.weights import fetch

        for name, tensor in fetch(references, 120.0):
            self.member.tensors[name].copy_(tensor)
        self.member._settle()

    def checksums(self) -> dict[str, int]:
        return self.member.checksums()
