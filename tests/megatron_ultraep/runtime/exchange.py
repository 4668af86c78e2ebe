"""Ranks that place replicas and send gradients home, for the tests of every transport."""

import random
import time
import zlib

import numpy as np
import torch
import torch.distributed as dist

from megatron_ultraep.layout import ExpertLayout
from megatron_ultraep.plan.types import Plan
from megatron_ultraep.runtime import choose
from megatron_ultraep.runtime.planning import HostPlanned
from megatron_ultraep.runtime.slots import ExpertShape
from megatron_ultraep.runtime.transport import Homes

# Sizes that do and do not fill 16-byte words, and one of several pieces of work.
SHAPES = ((2, 3), (4,), (300, 1000))


def make(name, node_size=0, timeout_s=60.0):
    """This rank's transport."""
    group = tuple(range(dist.get_world_size()))
    return choose.make_transport([group], group, node_size, symmetric=name == "symmetric", timeout_s=timeout_s)


def shape(dtype=torch.float64):
    return ExpertShape(("a", "b", "c"), SHAPES, dtype, choose.device_of_rank())


def plan_of(layout, replicas):
    """A plan without tokens: ``replicas[rank][slot]`` is an expert or -1."""
    physical = layout.ranks * (layout.experts_per_rank + layout.slots)
    quota = np.zeros((layout.ranks, physical), dtype=np.int64)
    return HostPlanned(Plan(layout, np.array(replicas), quota, ()), choose.device_of_rank())


def random_replicas(layout, seed):
    """Any legal replicas."""
    pick = random.Random(seed)
    rows = []
    for rank in range(layout.ranks):
        first = rank // layout.node_size * layout.node_size
        node = [e for r in range(first, first + layout.node_size) for e in layout.experts_of(r)]
        others = [e for e in node if e not in layout.experts_of(rank)]
        filled = pick.randint(0, min(layout.slots, len(others)))
        rows.append(sorted(pick.sample(others, filled)) + [-1] * (layout.slots - filled))
    return rows


def value(*what):
    """A number that depends on everything it is given; exact in every dtype that is tested."""
    return float(zlib.crc32(repr(what).encode()) % 251 - 125)


class Rank:
    """A layer's exchange, without the layer: what it should find is known in closed form."""

    def __init__(self, name, layout, dtype=torch.float64, gradient_dtype=torch.float32, **more):
        self.transport = make(name, node_size=0 if layout.node_size == layout.ranks else layout.node_size, **more)
        self.layout = layout
        self.rank = self.transport.rank
        self.shape = shape(dtype)
        self.pool = self.transport.make_pool(self.shape, layout.slots)
        self.mine = layout.experts_of(self.rank)
        self.gradient_dtype = gradient_dtype
        device = self.shape.device
        self.weights = Homes([[torch.zeros(s, dtype=dtype, device=device) for s in SHAPES] for _ in self.mine])
        self.main = Homes([[torch.zeros(s, dtype=gradient_dtype, device=device) for s in SHAPES] for _ in self.mine])

    def call(self, number, replicas, *, accumulate):
        """Weights out and gradients home once; returns what is wrong."""
        planned = plan_of(self.layout, replicas)
        wrong = []
        for place, expert in enumerate(self.mine):
            for i, tensor in enumerate(self.weights.tensors[place]):
                tensor.fill_(value("weight", number, expert, i))
        loads = torch.tensor([1000 * self.rank + number] * self.layout.experts, device=self.shape.device)
        gathered = self.transport.gather_loads(loads, self.pool)
        self.transport.place(planned, self.pool, self.weights)
        self.transport.await_placed(planned, self.pool)
        found = [[t.clone() for t in self.pool.weights[s]] for s in range(self.layout.slots)]
        self.transport.weights_sent(self.pool)
        self.transport.before_gradients(planned, self.pool, self.gradient_dtype, accumulate=accumulate)
        slots = []
        for slot, expert in enumerate(replicas[self.rank]):
            for i, buffer in enumerate(self.pool.gradients(self.gradient_dtype)[slot]):
                gradient = value("gradient", number, expert, self.rank, i)
                if accumulate and expert >= 0:
                    buffer += gradient
                elif not accumulate:
                    slots.append(torch.full(SHAPES[i], gradient, dtype=self.shape.dtype, device=self.shape.device))
        before = [[t.clone() for t in tensors] for tensors in self.main.tensors]
        self.transport.send_home(planned, self.pool, self.main, None if accumulate else slots)
        self.transport.await_home(self.pool)
        after = [[t.clone() for t in tensors] for tensors in self.main.tensors]
        if gathered.tolist() != [[1000 * r + number] * self.layout.experts for r in range(self.layout.ranks)]:
            wrong.append(("loads", number, gathered.tolist()))
        for slot, expert in enumerate(replicas[self.rank]):
            for i, tensor in enumerate(found[slot] if expert >= 0 else []):
                if not bool((tensor == value("weight", number, expert, i)).all()):
                    wrong.append(("weight", number, expert, i))
        for place, expert in enumerate(self.mine):
            holders = [r for r, row in enumerate(replicas) if expert in row]
            for i in range(len(SHAPES)):
                expected = before[place][i]
                for holder in holders:
                    expected = expected + value("gradient", number, expert, holder, i)
                if not torch.equal(after[place][i], expected):
                    wrong.append(("gradient", number, expert, i))
        return wrong

    def close(self):
        self.transport.close()


def exchange_many(name, layout, seeds, *, delays_ns=0, seed=0, **more):
    """Calls with random replicas, in turn accumulating and not; everything that is wrong."""
    rank = Rank(name, layout, **more)
    if delays_ns:
        pick = random.Random(1000 * seed + rank.rank)
        rank.transport.disturb = lambda kernel: pick.choice([0, 0, 0, pick.randrange(delays_ns)])
    wrong = []
    for number, each in enumerate(seeds):
        wrong += rank.call(number, random_replicas(layout, each), accumulate=each % 3 != 0)
    rank.close()
    return wrong


def given_up(name, layout):
    """A forward that ended between placing and waiting, then calls as usual; everything that is wrong in them."""
    rank = Rank(name, layout)
    pick = random.Random(rank.rank)
    rank.transport.disturb = lambda kernel: pick.randrange(3_000_000)
    wrong = []
    for number in range(6):
        loads = torch.zeros(layout.experts, dtype=torch.int64, device=rank.shape.device)
        rank.transport.gather_loads(loads, rank.pool)
        rank.transport.place(plan_of(layout, random_replicas(layout, 100 + number)), rank.pool, rank.weights)
        wrong += rank.call(number, random_replicas(layout, number), accumulate=True)
    rank.close()
    return wrong


def unordered_sums(name, layout, delays_ns, seed):
    """Bits of home gradients whose sum depends on its order."""
    rank = Rank(name, layout)
    pick = random.Random(seed + rank.rank)
    rank.transport.disturb = lambda kernel: pick.randrange(delays_ns)
    replicas = [[0] if r else [-1] for r in range(layout.ranks)]
    planned = plan_of(layout, replicas)
    rank.transport.before_gradients(planned, rank.pool, torch.float32, accumulate=True)
    generator = torch.Generator().manual_seed(rank.rank)
    for buffer in rank.pool.gradients(torch.float32)[0] if rank.rank else ():
        buffer += torch.randn(buffer.shape, generator=generator).to(buffer.device) * 10.0**rank.rank
    rank.transport.send_home(planned, rank.pool, rank.main, None)
    rank.transport.await_home(rank.pool)
    bits = [t.clone().view(torch.int32).cpu() for t in rank.main.tensors[0]]
    # Gradient slots are free again only after everybody's homes have taken them.
    rank.transport.before_gradients(planned, rank.pool, torch.float32, accumulate=True)
    zeros = [float(b.abs().sum()) for b in rank.pool.gradients(torch.float32)[0]]
    rank.close()
    return bits, zeros


def wait_in_vain(layout):
    """Rank 0 places; the others never free their slots."""
    rank = Rank("symmetric", layout, timeout_s=0.5)
    if rank.rank:
        dist.barrier()
        return ""
    planned = plan_of(layout, [[-1]] + [[0]] * (layout.ranks - 1))
    said = ""
    try:
        rank.transport.place(planned, rank.pool, rank.weights)
        rank.transport.check()
    except RuntimeError as error:
        said = str(error)
    dist.barrier()
    return said


def wait_in_vain_on_a_gpu(layout):
    """The same where the kernel traps: what torch raises, and what the transport says; nothing may run after it."""
    rank = Rank("symmetric", layout, timeout_s=2.0)
    if rank.rank:
        time.sleep(4)  # the other rank must find this process alive
        return "", ""
    planned = plan_of(layout, [[-1]] + [[0]] * (layout.ranks - 1))
    raised = ""
    try:
        rank.transport.place(planned, rank.pool, rank.weights)
        torch.cuda.synchronize()
    except RuntimeError as error:
        raised = str(error)
    try:
        rank.transport.check()
    except RuntimeError as error:
        return raised, str(error)
    return raised, ""


def layout_of(ranks, experts, slots, node_size=0, home_slot=()):
    return ExpertLayout(experts=experts, ranks=ranks, slots=slots, node_size=node_size, home_slot=home_slot)
