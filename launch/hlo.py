"""What a compiled step does, counted in the text of its optimised HLO module.

Everything is counted as often as a step runs it: what stands in the body of a loop, once for every
iteration of the loop. The number of iterations is known where XLA states it, or where the loop
counts from one constant to another; the body of any other loop is counted once, and the loop is
reported among `Counts.open_loops`. Of a conditional the last branch counts: what `lax.cond` does
where its condition holds.
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "reduce-scatter", "collective-permute",
               "collective-broadcast", "ragged-all-to-all")  # fmt: skip
# what moves data without computing anything
MOVES = {"copy", "slice", "dynamic-slice", "dynamic-update-slice", "concatenate", "transpose",
         "reshape", "reverse"}  # fmt: skip
# what no device spends time on
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all",
        "partition-id", "replica-id", "opt-barrier", "domain", "add-dependency"}  # fmt: skip
VIEWS = {"bitcast", "get-tuple-element"}  # other names for the same data
CONTROL = {"while", "conditional", "call", "async-start", "async-update", "async-done"}
# custom calls that only say where buffers lie
FREE_CALLS = {"AllocateBuffer", "ConcatBitcast", "SliceBitcast", "Sharding", "AssumeGatherIndices"}

_HEADER = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.-]+) = (.*)$")
_OPCODE = re.compile(r" ([a-z][a-z0-9-]*)\(")
_ARRAY = re.compile(r"\b(pred|token|opaque|[a-z]+\d+\w*)\[([\d,]*)\](\{[^}]*\})?")
_CALLED = re.compile(
    r"\b(calls|to_apply|body|condition|\w+_computations?)=\{?(%[\w.-]+(?:, ?%[\w.-]+)*)"
)


@dataclass(frozen=True)
class Array:
    """An array type.

    Attributes:
      shape: its axes.
      bytes: of its elements, without the padding of tiles.
      space: number of its memory; 0 is the device's large one (HBM).
    """

    shape: tuple[int, ...]
    bytes: int
    space: int


@dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      name, opcode: of the instruction.
      arrays: of its result; several where it is a tuple.
      operands: names of instructions of the same computation.
      called: names of computations by attribute (`body`, `condition`, `calls`, `to_apply`, ...).
      text: all that stands behind the opcode.
      root: whether it is the result of its computation.
    """

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    called: dict[str, tuple[str, ...]]
    text: str
    root: bool


@dataclass(frozen=True)
class Collective:
    """A collective of a step.

    Attributes:
      name: one of `COLLECTIVES`.
      shapes: of its results, on one device.
      bytes: of its results, on one device.
      times: how often a step runs it; 0 in a branch that does not count.
    """

    name: str
    shapes: tuple[tuple[int, ...], ...]
    bytes: int
    times: int


@dataclass(frozen=True)
class Counts:
    """What one device does in a step.

    Attributes:
      collectives: every collective, in no particular order.
      kernels: instructions that compute: fusions, and operations outside of them.
      copies: instructions that only move data from one place of the device's memory to another.
      copied: bytes that these move.
      packed: such instructions that only serve a collective, which are not among the copies: they
        lay several arrays side by side for it, or take its result apart.
      custom_calls: number of executions by target.
      loops: number of loops, nested ones as often as their surroundings run them.
      open_loops: those with an unknown number of iterations.
    """

    collectives: tuple[Collective, ...]
    kernels: int
    copies: int
    copied: int
    packed: int
    custom_calls: dict[str, int]
    loops: int
    open_loops: int

    def traffic(self) -> dict[str, tuple[int, int]]:
        """Executions and bytes of the results a step, by name of the collective."""
        found: dict[str, tuple[int, int]] = {}
        for c in (c for c in self.collectives if c.times):
            count, size = found.get(c.name, (0, 0))
            found[c.name] = count + c.times, size + c.bytes * c.times
        return found


class Module:
    """A parsed module: its computations, by name."""

    def __init__(self, text: str):
        """Parses the text of an optimised module.

        Raises:
          ValueError: it has no entry computation.
        """
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        current: dict[str, Instruction] = {}
        for line in text.splitlines():
            if found := _HEADER.match(line):
                current = self.computations.setdefault(found[2], {})
                self.entry = found[2] if found[1] else self.entry
            elif instruction := parse_instruction(line):
                current[instruction.name] = instruction
        if not self.computations.get(self.entry):
            raise ValueError(f"no HLO module with an entry computation: {text[:80]!r}")

    def executed(self) -> Iterator[tuple[dict[str, Instruction], Instruction, int]]:
        """Every instruction a device executes: its computation, itself, and how often.

        That is 0 in the branches that do not count. What decides whether a loop goes on is left
        out.
        """
        return self._executed(self.entry, 1)

    def _executed(self, name: str, times: int):
        computation = self.computations[name]
        for instruction in computation.values():
            yield computation, instruction, times
            called = instruction.called
            if instruction.opcode == "while":
                inner = times * (self.iterations(computation, instruction) or 1)
                yield from self._executed(called["body"][0], inner)
            elif instruction.opcode == "conditional":
                for branch in (*called.get("false_computation", ()), *_branches(called)[:-1]):
                    yield from self._executed(branch, 0)
                yield from self._executed(_branches(called)[-1], times)
            elif instruction.opcode in CONTROL | {"custom-call"}:
                for name in (name for group in called.values() for name in group):
                    yield from self._executed(name, times)

    def iterations(self, computation: dict[str, Instruction], loop: Instruction) -> int | None:
        """How often the body of a `while` runs; None where the text does not say."""
        if found := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.text):
            return int(found[1])
        condition = self.computations[loop.called["condition"][0]]
        root = next(x for x in condition.values() if x.root)
        if root.opcode != "compare" or "direction=LT" not in root.text:
            return None
        counter, bound = (condition.get(name) for name in root.operands)
        index = counter and re.search(r"index=(\d+)", counter.text)
        last = None if bound is None else _constant(condition, bound)
        start = computation.get(loop.operands[0])
        if not index or last is None or start is None or start.opcode != "tuple":
            return None
        first = _constant(computation, computation[start.operands[int(index[1])]])
        return None if first is None else last - first

    def inside(self, fusion: Instruction) -> Iterator[Instruction]:
        """The instructions of a fusion, and of fusions in it; nothing of anything else."""
        for name in fusion.called.get("calls", ()) if fusion.opcode == "fusion" else ():
            for instruction in self.computations[name].values():
                yield instruction
                yield from self.inside(instruction)

    def moved(self, computation: dict[str, Instruction], x: Instruction) -> int | None:
        """Bytes moved by an instruction that only moves data from and to the large memory.

        None for any other. What moves between that memory and a faster one (VMEM of a TPU) is a
        load or a store.
        """
        if x.opcode == "fusion":
            # scalars are places of slices
            work = {y.opcode for y in self.inside(x) if any(a.shape for a in y.arrays)}
            work -= FREE | {"fusion"}
            if not work or work - MOVES:
                return None
        elif x.opcode.removesuffix("-start") not in MOVES:
            return None
        # (destination, source, context) of copy-start; (sources, destination, context) of others
        place = -2 if x.opcode.endswith("-start") and x.opcode != "copy-start" else 0
        result = x.arrays[place]
        sources = [a for name in x.operands for a in computation[name].arrays]
        # what is updated in place is no source
        parts = [a for a in sources if a.shape and a.shape != result.shape] or sources
        if result.space or all(a.space for a in parts):
            return None
        return min(result.bytes, sum(a.bytes for a in parts))

    def packs(self, computation: dict[str, Instruction], x: Instruction) -> bool:
        """Whether it lays arrays side by side for a collective, or takes its result apart."""
        before = [computation[name] for name in x.operands]
        while any(y.opcode in VIEWS for y in before):
            before = [computation[y.operands[0]] if y.opcode in VIEWS else y for y in before]
        after, names = [], {x.name}
        for y in computation.values():  # users stand behind what they use
            if not names.isdisjoint(y.operands):
                after.append(y)
                names |= {y.name} if y.opcode in VIEWS else set()
        return any(re.sub("-(start|done)$", "", y.opcode) in COLLECTIVES for y in (*before, *after))


def _branches(called: dict[str, tuple[str, ...]]) -> tuple[str, ...]:
    return called.get("branch_computations") or called["true_computation"]


def parse_instruction(line: str) -> Instruction | None:
    """An instruction, or None where the line is something else."""
    found = _INSTRUCTION.match(line)
    opcode = found and _OPCODE.search(" " + found[3])
    if not found or not opcode:
        return None
    result, rest = (" " + found[3])[: opcode.start()], (" " + found[3])[opcode.end() :]
    inside, attributes = _closed(rest)
    return Instruction(
        name=found[2],
        opcode=opcode[1],
        arrays=arrays_of(result),
        operands=tuple(re.findall(r"%([\w.-]+)", inside)),
        called={k: tuple(re.findall(r"%([\w.-]+)", v)) for k, v in _CALLED.findall(attributes)},
        text=rest,
        root=bool(found[1]),
    )


def arrays_of(text: str) -> tuple[Array, ...]:
    """The arrays of a type: one, or those of a tuple in their order."""
    return tuple(
        Array(
            shape=(shape := tuple(int(n) for n in axes.split(",") if n)),
            bytes=prod(shape) * _bits(kind) // 8,
            space=int(space[1]) if (space := re.search(r"S\((\d+)\)", layout)) else 0,
        )
        for kind, axes, layout in _ARRAY.findall(text)
    )


def count(text: str) -> Counts:
    """What a step does on one device, from the text of its module (`compiled.as_text()`)."""
    module = Module(text)
    collectives: dict[str, Collective] = {}
    kernels = copies = copied = packed = loops = open_loops = 0
    calls: Counter[str] = Counter()
    for computation, x, times in module.executed():
        if collective := _collective(module, x, times):
            collectives.setdefault(*collective)
        elif x.opcode == "while":
            loops += times
            open_loops += times * (module.iterations(computation, x) is None)
        elif x.opcode == "custom-call":
            target = re.search(r'custom_call_target="([^"]+)"', x.text)
            if target and target[1] not in FREE_CALLS:
                calls[target[1]] += times
        elif (size := module.moved(computation, x)) is not None:
            packing = module.packs(computation, x)
            packed += times * packing
            copies += times * (not packing)
            copied += times * size * (not packing)
        elif not _is_free(x):
            kernels += times
    each = tuple(collectives.values())
    return Counts(each, kernels, copies, copied, packed, dict(calls), loops, open_loops)


def _collective(module: Module, x: Instruction, times: int) -> tuple[str, Collective] | None:
    """A collective, with a key that identifies it: TPUs spread one over several fusions."""
    for y in (x, *module.inside(x)):
        name = y.opcode.removesuffix("-done")  # its result alone; a start has its operands, too
        if name in COLLECTIVES:
            shapes = tuple(a.shape for a in y.arrays)
            # the parts of one have its channel and its place in the source; others may share one
            origin = re.findall(r"channel_id=\d+|metadata=\{[^}]*\}", y.text)
            key = f"{name} {shapes} {origin}" if x is not y and origin else x.name
            return key, Collective(name, shapes, sum(a.bytes for a in y.arrays), times)
    return None


def _is_free(x: Instruction) -> bool:
    return x.opcode in FREE | CONTROL or x.opcode.endswith(("-done", "-start", "-update"))


def _constant(computation: dict[str, Instruction], x: Instruction) -> int | None:
    while x.opcode in ("copy", "bitcast", "convert"):
        x = computation[x.operands[0]]
    found = re.match(r"(-?\d+)\)", x.text) if x.opcode == "constant" else None
    return int(found[1]) if found else None


def _closed(text: str) -> tuple[str, str]:
    """What stands before the parenthesis that closes, and after it."""
    depth = 1
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return text[:place], text[place + 1 :]
    return text, ""


def _bits(kind: str) -> int:
    if kind == "pred":
        return 8
    bits = re.match(r"[a-z]+(\d+)", kind)
    return int(bits[1]) if bits else 0  # a token, or opaque
