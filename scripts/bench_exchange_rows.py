"""What ``bench_exchange.py`` is asked, the cases it measures, and the rows it prints."""

from __future__ import annotations

from dataclasses import dataclass, field

SLOTS = 3


@dataclass(frozen=True)
class Options:
    """Sizes and amounts.

    Attributes:
        shapes: of an expert's matrices.
        gemm, gemms: side of the square matrices multiplied beside an exchange, and how many times.
        repeats: timed.
        sweep: whether other numbers of blocks are timed too.
        experts: whose loads are gathered.
    """

    shapes: tuple[tuple[int, ...], ...]
    gemm: int
    gemms: int
    repeats: int
    sweep: bool
    experts: tuple[int, ...] = (32, 128, 256)


@dataclass
class Row:
    """One method at one case.

    Attributes:
        part: ``place``, ``reduce`` or ``control``.
        case: which replicas.
        method: ``kernel``, or the comparator's name.
        us: median time on the device, each the slowest rank's (us); on a CPU wall time.
        bytes: that the busiest rank sends or receives.
        equal: whether what came out is right bit for bit; None where that is not looked at.
    """

    part: str
    case: str
    method: str
    us: float
    dtype: str = ""
    blocks: int | None = None
    bytes: int = 0
    bound_us: float | None = None
    bar_us: float | None = None
    equal: bool | None = None

    @property
    def kept(self) -> bool | None:
        """Whether the bar is; None without one."""
        return None if self.bar_us is None else self.us <= self.bar_us


@dataclass
class Overlap:
    """An exchange and a loop of matrix products, each alone and side by side; medians of the slowest rank (us).

    Attributes:
        gemm_us: products alone.
        exchange_us: exchange alone.
        gemm_beside_us: until the products are done, begun behind the exchange.
        both_us: until both are.
    """

    part: str
    case: str
    dtype: str
    blocks: int
    gemm_us: float
    exchange_us: float
    gemm_beside_us: float
    both_us: float

    @property
    def slowdown(self) -> float:
        """Of the products."""
        return self.gemm_beside_us / self.gemm_us

    @property
    def efficiency(self) -> float:
        """1: the shorter of the two costs nothing; 0: as if one came after the other."""
        return (self.gemm_us + self.exchange_us - self.both_us) / min(self.gemm_us, self.exchange_us)


@dataclass
class Limits:
    """What single copies and launches take in this run.

    Attributes:
        push_gbs, pull_gbs: of a large copy by rank 0 into the memory of rank 1, and out of it (GB/s).
        launch_us: a kernel that does next to nothing.
    """

    push_gbs: float
    pull_gbs: float
    launch_us: float


@dataclass
class Results:
    """Of one run; the same on all ranks."""

    limits: Limits
    rows: list[Row] = field(default_factory=list)
    overlaps: list[Overlap] = field(default_factory=list)


@dataclass(frozen=True)
class Case:
    """Replicas: ``replicas[rank][slot]`` is an expert or -1."""

    name: str
    replicas: tuple[tuple[int, ...], ...]

    @property
    def moves(self) -> list[tuple[int, int, int, int]]:
        """Home rank, expert, rank, slot; by expert, then rank."""
        found = [
            (e // SLOTS, e, rank, slot)
            for rank, row in enumerate(self.replicas)
            for slot, e in enumerate(row)
            if e >= 0
        ]
        return sorted(found, key=lambda move: (move[1], move[2]))

    @property
    def busiest(self) -> int:
        """Replicas that the busiest rank sends or receives."""
        ends = [0], [0]
        for rank in range(len(self.replicas)):
            ends[0].append(sum(move[0] == rank for move in self.moves))
            ends[1].append(sum(move[2] == rank for move in self.moves))
        return max(*ends[0], *ends[1])


def case_of(name: str, ranks: int, held: dict[int, list[int]]) -> Case:
    rows = (held.get(rank, []) for rank in range(ranks))
    return Case(name, tuple(tuple(row + [-1] * (SLOTS - len(row))) for row in rows))


def cases(part: str, ranks: int) -> list[Case]:
    """Experts 0 to 2 are at home on rank 0, 3 to 5 on rank 1, and so on.

    Args:
        part: ``place`` or ``reduce``.
        ranks: 2 or more.
    """
    ring = {(rank + 1) % ranks: [SLOTS * rank] for rank in range(ranks)}
    one, two, three = {1: [0]}, {1: [0, 1]}, {1: [0, 1, 2]}
    if part == "place":
        if ranks >= 4:
            spread = case_of("3 experts, 0 -> 1, 2, 3", ranks, {1: [0], 2: [1], 3: [2]})
        else:
            spread = case_of("3 experts, 0 -> 1", ranks, three)
        first = [case_of("1 expert, 0 -> 1", ranks, one), case_of("2 experts, 0 -> 1", ranks, two), spread]
        return [*first, case_of("each rank sends 1, gets 1", ranks, ring)]
    first = [case_of("1 expert, 1 -> 0", ranks, one), case_of("2 experts, 1 -> 0", ranks, two)]
    if ranks >= 4:
        first.append(case_of("1 expert, 1, 2, 3 -> 0", ranks, {1: [0], 2: [0], 3: [0]}))
    return [*first, case_of("each rank sends 1, gets 1", ranks, ring)]


HEADER = (
    f"{'part':8} {'case':26} {'dtype':6} {'method':26} {'blocks':>6} {'us':>9} {'GB/s':>7} {'bound':>8} {'bar':>8} "
    f"{'':7} {'bits':>6}"
)
OVERLAP_HEADER = (
    f"beside GEMMs, us\n{'part':8} {'case':26} {'dtype':6} {'blocks':>6} {'GEMMs':>9} {'exchange':>9} "
    f"{'GEMMs then':>10} {'both':>9} {'slowdown':>8} {'efficiency':>10}"
)


def line(row: Row) -> str:
    """A row of the table."""

    def number(value: float | None, digits: int = 1) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    bits = "-" if row.equal is None else "equal" if row.equal else "DIFFER"
    kept = "" if row.kept is None else "kept" if row.kept else "MISSED"
    rate = row.bytes / row.us / 1e3 if row.part != "control" else None
    return (
        f"{row.part:8} {row.case:26} {row.dtype:6} {row.method:26} {row.blocks or '-':>6} {row.us:9.1f} "
        f"{number(rate):>7} {number(row.bound_us):>8} {number(row.bar_us):>8} {kept:7} {bits:>6}"
    )


def overlap_line(row: Overlap) -> str:
    """A row of the second table."""
    return (
        f"{row.part:8} {row.case:26} {row.dtype:6} {row.blocks:6} {row.gemm_us:9.1f} {row.exchange_us:9.1f} "
        f"{row.gemm_beside_us:10.1f} {row.both_us:9.1f} {row.slowdown:8.3f} {row.efficiency:10.2f}"
    )
