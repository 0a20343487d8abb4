"""Counts FLOPs, bytes and collectives of a compiled program, with loop bodies as often as they run.

XLA's own cost analysis counts the body of a loop once, whatever its trip count; this module parses
the text of the optimised program (one device's share). Memory traffic is counted per instruction:
intermediate values of a fusion are free, of a buffer that it slices only the slice counts, and
buffers in on-chip memory are free.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute",
               "ragged-all-to-all", "collective-broadcast")
# These move nothing by themselves.
FREE = {"parameter", "tuple", "get-tuple-element", "bitcast", "constant", "while", "conditional",
        "call", "optimization-barrier", "after-all", "partition-id", "replica-id", "iota", "domain"}
INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*)$")
HEADER = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\) -> .* \{$")
ARRAY = re.compile(r"([a-z]+\d*\w*)\[([\d,]*)\](\{[^}]*\})?")
ON_CHIP = re.compile(r"S\([1-9]\d*\)")


@dataclass
class Instruction:
    """One line of a program."""

    root: str | None
    name: str
    type: str
    opcode: str
    rest: str  # operands and attributes

    @cached_property
    def operands(self) -> list[str]:
        """Names of what the instruction reads."""
        depth, end = 1, len(self.rest)
        for i, letter in enumerate(self.rest):
            depth += (letter in "({") - (letter in ")}")
            if depth == 0:
                end = i
                break
        return re.findall(r"%([\w.-]+)", self.rest[:end])

    def attribute(self, name: str) -> str | None:
        """The text of an attribute behind the operands; None if there is none."""
        found = re.search(rf"{name}=(\{{[^{{}}]*\}}|%?[\w.<>-]+)", self.rest)
        return found and found[1].lstrip("%")

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Of the first array of its type."""
        return _arrays(self.type)[0][0]

    @cached_property
    def bytes(self) -> float:
        """Of all its arrays in the device's memory."""
        return sum(math.prod(dims) * size for dims, size, on_chip in _arrays(self.type)
                   if not on_chip)


def _arrays(text: str) -> list[tuple[tuple[int, ...], float, bool]]:
    """Dimensions, bytes per element and whether it is on the chip, for every array in a type."""
    found = []
    for kind, dims, layout in ARRAY.findall(text):
        bits = re.search(r"\d+", kind)
        size = 1.0 if kind == "pred" else int(bits[0]) / 8 if bits else 0.0
        shape = tuple(int(x) for x in dims.split(",")) if dims else ()
        found.append((shape, size, bool(ON_CHIP.search(layout))))
    return found or [((), 0.0, False)]


@dataclass
class Cost:
    """The cost of one run of a program on one device.

    Attributes:
      flops: of matrix products and kernels that report theirs.
      bytes: moved to and from the device's memory.
      collectives: by kind, their number and the bytes that each device sends.
      unknown: loops with unknown trip count, counted once.
      silent: runs of kernels that do not report their FLOPs, which are missing.
    """

    flops: float = 0.0
    bytes: float = 0.0
    collectives: dict[str, tuple[float, float]] = field(default_factory=dict)
    unknown: int = 0
    silent: float = 0.0

    def add(self, other: "Cost", times: float = 1.0) -> None:
        """Adds the cost of a part, multiplied by its number of runs."""
        self.flops += times * other.flops
        self.bytes += times * other.bytes
        self.unknown += other.unknown
        self.silent += times * other.silent
        for kind, (count, size) in other.collectives.items():
            have = self.collectives.get(kind, (0.0, 0.0))
            self.collectives[kind] = (have[0] + times * count, have[1] + times * size)

    @property
    def sent(self) -> float:
        """Bytes that each device sends."""
        return sum(size for _, size in self.collectives.values())


def program_cost(text: str) -> Cost:
    """The cost of a compiled program's text (`compiled.as_text()`)."""
    return _Program(text).cost


class _Program:
    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry, current, last = "", None, None
        for line in text.splitlines():
            if header := HEADER.match(line):
                current = self.computations.setdefault(header[2], {})
                self.entry = header[2] if header[1] else self.entry
            elif line == "}":
                current = None
            elif current is not None and (found := INSTRUCTION.match(line)):
                last = current[found[2]] = Instruction(*found.groups())
            elif current is not None and last is not None:  # a kernel's own cost
                last.rest += line
        self.known: dict[tuple[str, bool], Cost] = {}
        sizes = [int(n) for n in re.findall(r"(?:num_partitions|replica_count)=(\d+)", text[:5000])]
        self.devices = math.prod(sizes)

    @property
    def cost(self) -> Cost:
        return self.of(self.entry)

    def of(self, name: str, fused: bool = False) -> Cost:
        """A computation's cost; within a fusion nothing reaches the memory."""
        if (name, fused) not in self.known:
            total = Cost()
            for x in self.computations.get(name, {}).values():
                self._count(x, self.computations[name], fused, total)
            self.known[name, fused] = total
        return self.known[name, fused]

    def _count(self, x: Instruction, around: dict[str, Instruction], fused: bool, total: Cost):
        kind = x.opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            sent = _sent(kind, x, around, _group_size(x, self.devices))
            total.add(Cost(collectives={kind: (1.0, sent)}))
        elif x.opcode == "while":
            times = self._trips(x, around)
            total.unknown += times is None
            total.add(self.of(x.attribute("body")), times or 1)
        elif x.opcode == "conditional":
            branches = re.findall(r"%([\w.-]+)", x.rest.split("branch_computations=")[-1]) if (
                "branch_computations" in x.rest) else [
                    x.attribute("true_computation"), x.attribute("false_computation")]
            total.add(max((self.of(b) for b in branches if b in self.computations),
                          key=lambda cost: cost.flops, default=Cost()))
        elif called := x.attribute("calls") or (x.opcode == "call" and x.attribute("to_apply")):
            inside = self.of(called, fused or x.opcode == "fusion")
            # So a TPU's compiler writes a reduce-scatter, which sends half of an all-reduce.
            total.add(_scattered(inside) if called.startswith("all-reduce-scatter") else inside)
        total.silent += x.opcode == "custom-call" and _is_silent(x)
        total.flops += FLOPS.get(x.opcode, lambda *_: 0.0)(x, around)
        if not fused and kind not in FREE and not x.opcode.endswith("-done"):
            total.bytes += self._traffic(x, around)

    def _trips(self, loop: Instruction, around: dict[str, Instruction]) -> int | None:
        """The trip count of a loop, from the compiler's annotation or from its counter."""
        if known := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.rest):
            return int(known[1])
        condition = self.computations.get(loop.attribute("condition"), {})
        limits = [n for x in condition.values() if (n := _integer(x)) is not None]
        counters = [re.search(r"index=(\d+)", x.rest) for x in condition.values()
                    if x.opcode == "get-tuple-element" and _is_integer(x)]
        if len(limits) != 1 or len(counters) != 1:
            return None
        place, body = int(counters[0][1]), self.computations[loop.attribute("body")]
        # An unrolled loop counts by more than one.
        root = next(x for x in body.values() if x.root)
        step = _increment(root.operands[place], body)
        start = around.get(loop.operands[0])
        start = around.get(start.operands[place]) if start and start.opcode == "tuple" else None
        while start is not None and start.opcode in ("copy", "bitcast"):
            start = around.get(start.operands[0])
        begin = start and _integer(start)
        below = any("direction=LT" in x.rest for x in self._with_called(condition))
        if step is None or begin is None or not below:
            return None
        return -(-(limits[0] - begin) // step)

    def _with_called(self, computation: dict[str, Instruction]) -> list[Instruction]:
        found = list(computation.values())
        for x in computation.values():
            found += self.computations.get(x.attribute("calls") or "", {}).values()
        return found

    def _traffic(self, x: Instruction, around: dict[str, Instruction]) -> float:
        """What an instruction reads and writes."""
        operands = [around[name] for name in x.operands if name in around]
        if x.opcode.endswith("-start"):  # its type has both inputs and outputs
            return x.bytes
        if x.opcode in ("dynamic-slice", "gather"):
            return 2 * x.bytes
        if x.opcode in ("dynamic-update-slice", "scatter"):
            return 2 * sum(operand.bytes for operand in operands[1:])
        inside = self.computations.get(x.attribute("calls") or "", {})
        if x.opcode != "fusion" or not inside:
            return x.bytes + sum(operand.bytes for operand in operands)
        read = sum(_read(i, operand, inside) for i, operand in enumerate(operands))
        updates = [y for y in inside.values() if y.opcode == "dynamic-update-slice"]
        written = x.bytes
        for y in updates:  # written in place: only the slice of the buffer
            if inside[y.operands[0]].opcode in ("parameter", "bitcast", "convert"):
                written += min(inside[y.operands[1]].bytes - y.bytes, 0.0)
        return read + max(written, 0.0)


def _is_integer(x: Instruction) -> bool:
    return bool(re.match(r"[su](32|64)\[\]", x.type))


def _integer(x: Instruction) -> int | None:
    """The value of an integer constant."""
    found = re.match(r"(-?\d+)\)", x.rest) if x.opcode == "constant" and _is_integer(x) else None
    return found and int(found[1])


def _increment(name: str, body: dict[str, Instruction]) -> int | None:
    """The increment of a loop's counter: the constants on its path back to the loop's tuple."""
    total, x = 0, body.get(name)
    while x is not None and x.opcode in ("add", "copy"):
        operands = [body[name] for name in x.operands]
        total += sum(_integer(operand) or 0 for operand in operands)
        x = next((operand for operand in operands if _integer(operand) is None), None)
    return total if total > 0 and x is not None and x.opcode == "get-tuple-element" else None


def _read(number: int, operand: Instruction, inside: dict[str, Instruction]) -> float:
    """The bytes of an operand that a fusion reads: only slices, if it uses nothing else."""
    name = next((y.name for y in inside.values()
                 if y.opcode == "parameter" and y.rest.startswith(f"{number})")), None)
    users = [y for y in inside.values() if name in y.operands]
    if operand.bytes and users and all(
        y.opcode in ("dynamic-slice", "gather", "dynamic-update-slice") and y.operands[0] == name
        for y in users
    ):
        return sum(0.0 if y.opcode == "dynamic-update-slice" else y.bytes or _size(y)
                   for y in users)
    return operand.bytes


def _size(x: Instruction) -> float:
    """Bytes of an instruction's arrays, on the chip or not."""
    return sum(math.prod(dims) * size for dims, size, _ in _arrays(x.type))


def _scattered(cost: Cost) -> Cost:
    """The cost of an all-reduce of which every device uses only its part."""
    count, sent = cost.collectives.get("all-reduce", (0.0, 0.0))
    others = {kind: x for kind, x in cost.collectives.items() if kind != "all-reduce"}
    return replace(cost, collectives={**others, "reduce-scatter": (count, sent / 2)})


def _sent(kind: str, x: Instruction, around: dict[str, Instruction], devices: int) -> float:
    """Bytes that each device of a ring sends in a collective."""
    given = sum(_size(around[name]) for name in x.operands if name in around)
    if kind == "all-gather":
        return given * (devices - 1)
    if kind == "all-reduce":
        return 2 * given * (devices - 1) / devices
    if kind in ("collective-permute", "collective-broadcast"):
        return given
    return given * (devices - 1) / devices


def _group_size(x: Instruction, devices: int) -> int:
    """The number of devices in a group; all of them if the text has no groups."""
    groups = x.rest.split("replica_groups=")[-1] if "replica_groups=" in x.rest else ""
    if found := re.match(r"\[\d+,(\d+)\]<=", groups):
        return int(found[1])
    if groups.startswith("mesh["):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", groups.split("]")[0]))
        chosen = re.search(r"\]\s*\{([^}]*)\}", groups)
        names = re.findall(r"'(\w+)'", chosen[1]) if chosen else list(sizes)
        return math.prod(int(sizes[name]) for name in names)
    if found := re.match(r"\{\{([\d,]+)\}", groups):
        return len(found[1].split(","))
    return devices


def _dot(x: Instruction, around: dict[str, Instruction]) -> float:
    left = around[x.operands[0]].shape
    axes = re.findall(r"\d+", x.attribute("lhs_contracting_dims") or "")
    return 2.0 * math.prod(x.shape) * math.prod(left[int(axis)] for axis in axes)


def _convolution(x: Instruction, around: dict[str, Instruction]) -> float:
    """TPU programs write matrix products as convolutions, batches as dilated windows."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", x.rest)
    left, right = (around[name].shape for name in x.operands[:2])
    into = right[labels[2].index("i")]
    total = 2.0 * into
    for size, label in zip(x.shape, labels[3], strict=True):
        if label in "bf":
            total *= size
    found = re.search(r"window=\{([^}]*)\}", x.rest)
    window = dict(re.findall(r"(\w+)=([\w-]+)", found[1] if found else ""))
    for d, label in enumerate(sorted(set(labels[2]) - {"i", "o"})):
        stride, dilate, spread = (int(window[name].split("x")[d]) if name in window else 1
                                  for name in ("stride", "lhs_dilate", "rhs_dilate"))
        low = int(window["pad"].split("x")[d].split("_")[0]) if "pad" in window else 0
        out = np.arange(x.shape[labels[3].index(label)])[:, None] * stride
        taps = np.arange(right[labels[2].index(label)])[None, :] * spread
        place = out + taps - low
        end = (left[labels[1].index(label)] - 1) * dilate
        total *= int(((place >= 0) & (place <= end) & (place % dilate == 0)).sum())
    return total


def _kernel(x: Instruction, around: dict[str, Instruction]) -> float:
    """The cost that a kernel reports: Pallas kernels their FLOPs, cuBLAS its dimensions."""
    if found := re.search(r'"flops":\s*"?(\d+)', x.rest):
        return float(found[1])
    if axes := re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', x.rest):
        left = around[x.operands[0]].shape
        axes = re.findall(r"\d+", axes[1])
        return 2.0 * math.prod(x.shape) * math.prod(left[int(axis)] for axis in axes)
    return 0.0


def _is_silent(x: Instruction) -> bool:
    """Whether a custom call computes without reporting its FLOPs."""
    names = r"tpu_custom_call|__cu\w+\$|__onednn|[^\"]*fmha"
    kernel = re.search(rf'custom_call_target="({names})', x.rest)
    return bool(kernel) and not re.search(r'"flops"|lhs_contracting_dimensions', x.rest)


FLOPS: dict[str, Callable[[Instruction, dict[str, Instruction]], float]] = {
    "dot": _dot, "convolution": _convolution, "custom-call": _kernel,
}
