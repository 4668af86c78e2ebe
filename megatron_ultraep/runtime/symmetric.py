"""Replica weights and gradients through symmetric memory, by kernels, beside the computing stream.

Slots lie in symmetric memory; home weights and main gradients stay wherever Megatron put them. A home writes its
weights into the slots of other ranks, and reads their gradients out of them. Nothing is staged, no host waits, and no
order is taken from anybody's collectives: ranks tell each other by flags when slots may be written and read (the table
at the top of ``kernels/csrc/exchange.h``).

Invariants:

1. Calls on a pool are numbered alike on all ranks, because all ranks make them in one order. A flag is such a number.
2. Weight slots: FREE is told on the computing stream, behind the last kernel that read them.
3. Gradient slots: READY is told on the computing stream, behind the last kernel that wrote them; the computing stream
   writes them again only behind the event after TAKEN.
4. Device tensors that a side stream reads are kept until the computing stream has waited for that stream.
5. Gradients are summed home first, then by rank, in one kernel: the same bits on every run.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron_ultraep.kernels.build import Library, current_stream, library_of
from megatron_ultraep.layout import ExpertLayout
from megatron_ultraep.runtime.memory import AddressTable, Region, SymmetricMemory
from megatron_ultraep.runtime.planning import Planned
from megatron_ultraep.runtime.slots import Buffers, ExpertShape, SlotPool
from megatron_ultraep.runtime.transport import Homes, all_gather

log = logging.getLogger(__name__)

_FREE, _PLACED, _READY, _TAKEN, _LOADS = range(5)
_FLAGS = 4
_MOST_PARAMETERS = 8  # Parts::MOST
_WAITED_FOR = {
    _FREE: "to free its weight slots",
    _PLACED: "to place weights",
    _READY: "to make gradients of replicas",
    _TAKEN: "to take gradients home",
    _LOADS: "to send its loads",
}
_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
# Blocks of 512 threads: the share of the multiprocessors (132 on an H100) that a side kernel may take.
_PLACE_BLOCKS = 48
_REDUCE_BLOCKS = 16
_CLEAR_BLOCKS = 16
_STASH_BLOCKS = 264


class _SideStream:
    """Work beside the computing stream. On a CPU everything runs at once, and this is nothing.

    Raw handles, because a Python object for each stream and event costs the host more than the call.

    Args:
        device: of the stream.
        kernels: of the device.
    """

    def __init__(self, device: torch.device, kernels: Library) -> None:
        self._device, self._kernels = device, kernels
        self.raw = 0
        if device.type == "cuda":
            # High priority: its few blocks start although the computing stream has filled the device.
            self._stream = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
            self._events = [torch.cuda.Event() for _ in range(2)]  # type: ignore[no-untyped-call]
            for event in self._events:
                event.record(self._stream)  # makes the handle
            self.raw = int(self._stream.cuda_stream)
            self._fork, self._join = (int(event.cuda_event) for event in self._events)

    def follow(self) -> None:
        """Wait for what the current stream has queued so far."""
        if self.raw:
            self._kernels("follow", self._fork, current_stream(self._device), stream=self.raw)

    def join(self) -> None:
        """Make the current stream wait for what this one has queued so far."""
        if self.raw:
            self._kernels("follow", self._join, self.raw, stream=current_stream(self._device))


class SymmetricPool(SlotPool):
    """Slots in symmetric memory, with the flags and counts of what is done with them.

    Args:
        shape: of the experts.
        slots: slots of this rank.
        memory: of the node.
    """

    def __init__(self, shape: ExpertShape, slots: int, memory: SymmetricMemory) -> None:
        self._memory = memory
        self._regions: dict[int, Region] = {}
        super().__init__(shape, slots, staging=slots, allocate=self._symmetric)
        device = shape.device
        self.flags = memory.allocate(_FLAGS * memory.size * 8)
        self.counters = torch.zeros(2, dtype=torch.int32, device=device)
        kernels = library_of(device)
        self.placing, self.summing = _SideStream(device, kernels), _SideStream(device, kernels)
        self.place_call = self.reduce_call = 0
        self.freed = 0  # the call whose FREE has been told
        self.clear: Callable[[], None] | None = None  # what is left to do once gradients are taken home
        self.overwritten: set[torch.dtype] = set()  # gradient slots that hold what was not accumulated
        self.unawaited: Planned | None = None  # placed, but nobody has waited for it
        self.kept_for_placing: Any = None
        self.kept_for_summing: Any = None
        self._layouts: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def region(self, buffers: Buffers) -> Region:
        """Where each rank has these buffers."""
        return self._regions[buffers.flat.data_ptr()]

    def parts(self, buffers: Buffers) -> tuple[torch.Tensor, torch.Tensor]:
        """Offsets and sizes of parameters, int64 on the host, from where launches take them."""
        key = buffers.flat.data_ptr()
        if key not in self._layouts:
            self._layouts[key] = (torch.tensor(buffers.offsets), torch.tensor(buffers.sizes))
        return self._layouts[key]

    def _symmetric(self, size: int) -> torch.Tensor:
        region = self._memory.allocate(size)
        self._regions[region.local.data_ptr()] = region
        return region.local


class SymmetricTransport:
    """The transport of one rank whose node's memory it can address.

    Args:
        group: expert-parallel, between hosts (gloo), of this transport alone.
        node: the ranks of this rank's node, consecutive in ``group``; likewise.
        loads: the expert-parallel group on the device, for loads; None where the group is one node.
        device: GPU of this rank, or the CPU.
        timeout_s: limit of every wait on the device (s).

    Attributes:
        disturb: for tests: called with the name of each kernel before it is launched, returns how long its stream
            stands still first (ns).
    """

    def __init__(self, group: Any, node: Any, loads: Any | None, device: torch.device, timeout_s: float) -> None:
        self._group, self._node, self._loads = group, node, loads
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self._memory = SymmetricMemory(node, device)
        self._first = self.rank - self._memory.rank
        self._device = device
        self.overlaps = device.type == "cuda"
        self._kernels = library_of(device)
        self._limit_ns = int(timeout_s * 1e9)
        self._limit_s = timeout_s
        self._mail: dict[int, tuple[Region, list[int]]] = {}
        self._home_slots: dict[ExpertLayout, torch.Tensor] = {}
        self._report = torch.zeros(4, dtype=torch.int64, pin_memory=device.type == "cuda")
        self.disturb: Callable[[str], int] | None = None
        self._closed = threading.Event()
        if device.type == "cuda":
            _watch(self)

    def make_pool(self, shape: ExpertShape, slots: int) -> SlotPool:
        if len(shape.names) > _MOST_PARAMETERS:
            raise ValueError(
                f"expected at most {_MOST_PARAMETERS} parameters an expert, got {len(shape.names)}: use transport "
                "'collective'"
            )
        return SymmetricPool(shape, slots, self._memory)

    def gather_loads(self, loads: torch.Tensor, pool: SlotPool) -> torch.Tensor:
        assert isinstance(pool, SymmetricPool)
        self._settle(pool)
        pool.freed = pool.place_call + 1
        if self._loads is not None:
            self._announce(pool, _FREE, pool.freed)
            return all_gather(loads, self._loads)
        experts = loads.shape[0]
        if experts not in self._mail:
            self._mail[experts] = (self._memory.allocate(2 * self.size * experts * 8), [0])
        mail, calls = self._mail[experts]
        calls[0] += 1
        gathered = loads.new_empty(self.size, experts)
        self._launch("gather", pool, mail.addresses, loads, gathered, experts, calls[0], pool.freed, *self._patience)
        return gathered

    def largest(self, values: torch.Tensor) -> list[int]:
        return [int(v) for v in all_gather(values.cpu(), self._group).amax(0).tolist()]

    def place(self, planned: Planned, pool: SlotPool, homes: Homes) -> None:
        assert isinstance(pool, SymmetricPool)
        self._settle(pool)
        if pool.kept_for_placing is not None:
            self.weights_sent(pool)
        pool.place_call += 1
        pool.unawaited = planned
        if pool.freed != pool.place_call:
            pool.freed = pool.place_call
            self._announce(pool, _FREE, pool.place_call)
        addresses = self._addresses(homes)
        pool.placing.follow()
        pool.kept_for_placing = (planned, addresses)
        self._launch(
            "place",
            pool,
            *self._replicas(planned),
            *self._parts(pool, pool.weights),
            addresses,
            pool.region(pool.weights).addresses,
            pool.counters[0:],
            pool.place_call,
            *self._patience,
            _PLACE_BLOCKS,
            stream=pool.placing.raw,
        )

    def await_placed(self, planned: Planned, pool: SlotPool) -> None:
        assert isinstance(pool, SymmetricPool)
        pool.unawaited = None
        self._launch("await_placed", pool, *self._replicas(planned), pool.place_call, *self._patience)

    def _settle(self, pool: SymmetricPool) -> None:
        """Wait for weights that a forward which was given up has not waited for, before slots are free again."""
        if pool.unawaited is not None:
            self.await_placed(pool.unawaited, pool)

    def nothing_placed(self, pool: SlotPool) -> None:
        assert isinstance(pool, SymmetricPool)
        pool.unawaited = None

    def weights_sent(self, pool: SlotPool) -> None:
        assert isinstance(pool, SymmetricPool)
        pool.placing.join()
        pool.kept_for_placing = None

    def before_gradients(self, planned: Planned, pool: SlotPool, dtype: torch.dtype, *, accumulate: bool) -> None:
        assert isinstance(pool, SymmetricPool)
        gradients = pool.gradients(dtype)  # zeros at first, and again after what was accumulated has been taken
        self._clear(pool)
        pool.summing.join()
        if accumulate and dtype in pool.overwritten:
            gradients.flat.zero_()
            pool.overwritten.discard(dtype)
        pool.kept_for_summing = None

    def send_home(
        self, planned: Planned, pool: SlotPool, homes: Homes, slots: Sequence[torch.Tensor | None] | None
    ) -> None:
        assert isinstance(pool, SymmetricPool)
        dtype = homes.tensors[0][0].dtype
        gradients = pool.gradients(dtype)
        self._clear(pool)
        pool.reduce_call += 1
        replicas, parts = self._replicas(planned), self._parts(pool, gradients)
        if slots is not None:
            self._stash(pool, slots, gradients, replicas, parts)
        self._announce(pool, _READY, pool.reduce_call)
        addresses = self._addresses(homes)
        pool.summing.follow()
        pool.kept_for_summing = (planned, addresses, homes)
        self._launch(
            "reduce",
            pool,
            *replicas,
            *parts,
            addresses,
            pool.region(gradients).addresses,
            pool.counters[1:],
            _DTYPES[dtype],
            pool.reduce_call,
            *self._patience,
            _REDUCE_BLOCKS,
            stream=pool.summing.raw,
        )
        zero = int(slots is None)
        if slots is not None:
            pool.overwritten.add(dtype)

        def clear() -> None:
            self._launch(
                "clear",
                pool,
                *replicas,
                *parts,
                gradients.flat,
                zero,
                pool.reduce_call,
                *self._patience,
                _CLEAR_BLOCKS,
                stream=pool.summing.raw,
            )

        # Not now: with CUDA_DEVICE_MAX_CONNECTIONS=1 what is queued behind a kernel that waits for the sum (this one
        # does) waits too, and that is all the sum is to hide behind.
        pool.clear = clear

    def await_home(self, pool: SlotPool) -> None:
        assert isinstance(pool, SymmetricPool)
        if pool.clear is not None:
            pool.summing.join()
            self._clear(pool)

    def check(self) -> None:
        message = self._complaint()
        if message:
            raise RuntimeError(message)

    def close(self) -> None:
        self._closed.set()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._mail.clear()
        for group in (self._loads, self._node, self._group):
            if group is not None:
                dist.destroy_process_group(group)

    def _clear(self, pool: SymmetricPool) -> None:
        if pool.clear is not None:
            clear, pool.clear = pool.clear, None
            clear()

    def _stash(
        self,
        pool: SymmetricPool,
        slots: Sequence[torch.Tensor | None],
        gradients: Buffers,
        replicas: tuple[Any, ...],
        parts: tuple[Any, ...],
    ) -> None:
        made = [None if t is None else t.contiguous() for t in slots]
        dtype = next((t.dtype for t in made if t is not None), gradients.flat.dtype)
        table = AddressTable().of(made, self._device)
        kinds = (_DTYPES[dtype], _DTYPES[gradients.flat.dtype])
        self._launch("stash", pool, *replicas, *parts, table, gradients.flat, *kinds, _STASH_BLOCKS)

    def _announce(self, pool: SymmetricPool, flag: int, call: int) -> None:
        self._launch("announce", pool, flag, call)

    def _launch(self, name: str, pool: SymmetricPool, *arguments: Any, stream: int | None = None) -> None:
        """Launch a kernel that knows the ranks of the node; on the current stream by default."""
        if stream is None:
            stream = current_stream(self._device)
        if self.disturb is not None:
            self._kernels("delay", self.disturb(name), stream=stream)
        memory = self._memory
        try:
            self._kernels(name, memory.rank, memory.size, pool.flags.addresses, *arguments, stream=stream)
        except RuntimeError as error:  # the device has trapped
            raise RuntimeError(self._complaint() or str(error)) from error
        if self._device.type == "cpu":
            self.check()

    @property
    def _patience(self) -> tuple[Any, ...]:
        return self._limit_ns, self._report

    def _replicas(self, planned: Planned) -> tuple[Any, ...]:
        layout = planned.layout
        if layout not in self._home_slots:
            self._home_slots[layout] = torch.tensor(layout.home_slot, dtype=torch.int32, device=self._device)
        home_slot = self._home_slots[layout]
        return planned.replica_expert, home_slot, self._first, layout.slots, layout.experts_per_rank

    def _parts(self, pool: SymmetricPool, buffers: Buffers) -> tuple[Any, ...]:
        return *pool.parts(buffers), len(buffers.sizes), buffers.stride

    def _addresses(self, homes: Homes) -> torch.Tensor:
        table: AddressTable = homes.addresses.setdefault("table", AddressTable())
        return table.of([tensor for place in homes.tensors for tensor in place], self._device)

    def _complaint(self) -> str:
        gave_up, flag, rank, call = self._report.tolist()
        if not gave_up:
            return ""
        peer = dist.get_process_group_ranks(self._group)[self._first + rank]
        return (
            f"balancing: rank {dist.get_rank()} waited {self._limit_s:g} s for rank {peer} {_WAITED_FOR[flag]} (call "
            f"{call}); that rank is stuck or gone, or ranks disagree on the order of layers"
        )


def _watch(transport: SymmetricTransport) -> None:
    """Log what a trapped kernel waited for: the error that torch raises then does not say it."""
    reference, closed = weakref.ref(transport), transport._closed

    def watch() -> None:
        while not closed.wait(1.0):
            alive = reference()
            if alive is None:
                return
            complaint = alive._complaint()
            if complaint:
                log.error("%s", complaint)
                return

    threading.Thread(target=watch, name="ultraep-watch", daemon=True).start()
