"""What a compiled program sends between devices in one step, read off its text."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from typing import NamedTuple

KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_COLLECTIVE = re.compile(rf"= (.*?) ({KINDS})(-start)?\(")
_ARRAY = re.compile(r"\b(pred|[a-z]+)(\d*)[a-z\d]*\[([\d,]*)\]")
_WHILE = re.compile(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_CALL = re.compile(r" (?:calls|to_apply)=%?([\w.\-]+)")
_NUMBER = re.compile(r"%?([\w.\-]+) = s32\[\]\S* constant\((\d+)\)")
_LESS = re.compile(r" compare\(%?([\w.\-]+), %?([\w.\-]+)\), direction=LT")
_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')


class Sent(NamedTuple):
    """How often a step calls a collective, and the bytes that each device sends by it."""

    count: int
    bytes: int


def sent_by_step(text: str) -> dict[str, Sent]:
    """By collective, what each device sends in a step of a compiled program, given as `Compiled.as_text`.

    A loop of known length, which is told or compared with by its condition, counts as often as it runs; the loop over
    steps, whose length is an argument, once, and of several such (an epoch's last batch has its own) the one that sends
    most. What stands in a branch, as evaluations do, does not count. Of n devices a ring sends ``(n − 1)/n`` of an
    array for an all-gather (of its result), a reduce-scatter (of its operand) and an all-to-all, and twice that for an
    all-reduce.

    >>> sent_by_step('''ENTRY %main (x: f32[8]) -> f32[8] {
    ...   %y = f32[8]{0} all-reduce(%x), replica_groups={{0,1,2,3}}
    ... }''')
    {'all-reduce': Sent(count=1, bytes=48)}
    """
    found = re.search(r"num_partitions=(\d+)", text)
    devices = int(found[1]) if found else 1
    bodies: dict[str, list[str]] = {}
    entry, lines = "", []
    for line in text.splitlines():
        if found := _COMPUTATION.match(line):
            lines = bodies[found[2]] = []
            entry = found[2] if found[1] else entry
        else:
            lines.append(line)
    open_ended: list[dict[str, list[int]]] = []

    def total(name: str) -> dict[str, list[int]]:
        sums: dict[str, list[int]] = defaultdict(lambda: [0, 0])
        for line in bodies[name]:
            inner, times = {}, 1
            if found := _COLLECTIVE.search(line):
                inner = {found[2]: [1, _sent(found[2], bool(found[3]), found[1], line, devices)]}
            elif found := _WHILE.search(line):
                inner, known = total(found[2]), _TRIPS.search(line)
                length = int(known[1]) if known else _length(bodies[found[1]])
                if length is None:
                    open_ended.append(inner)
                    continue
                times = length
            elif found := _CALL.search(line):
                inner = total(found[1])
                if found[1].startswith("all-reduce-scatter"):  # how TPUs write one, of which each sends half
                    (count, size), *_ = inner.values()
                    inner = {"reduce-scatter": [count, size // 2]}
            for kind, (count, size) in inner.items():
                sums[kind][0] += times * count
                sums[kind][1] += times * size
        return sums

    everything = total(entry)
    most = max([everything, *open_ended], key=lambda sums: sum(size for _, size in sums.values()))
    return {kind: Sent(*most[kind]) for kind in sorted(most)}


def _length(condition: list[str]) -> int | None:
    """How often a loop runs that counts from 0 to a number; None where it compares with something else."""
    numbers = {found[1]: int(found[2]) for line in condition if (found := _NUMBER.search(line))}
    compared = [name for line in condition if (found := _LESS.search(line)) for name in (found[1], found[2])]
    known = [numbers[name] for name in compared if name in numbers]
    return known[0] if len(known) == 1 else None


def _sent(kind: str, begins: bool, result: str, line: str, devices: int) -> int:
    """The bytes that each device sends by one collective."""
    sizes = [
        (1 if name == "pred" else int(bits or 8) // 8) * math.prod(int(n) for n in shape.split(",") if n)
        for name, bits, shape in _ARRAY.findall(result)
    ]
    if begins and kind != "all-reduce":  # of which the first half are the operands
        sizes = sizes[len(sizes) // 2 :]
    n, size = _devices(line, devices), sum(sizes)
    if kind == "collective-permute":
        return size
    factor = {"all-reduce": 2 * (n - 1), "reduce-scatter": n * (n - 1)}.get(kind, n - 1)
    return factor * size // n


def _devices(line: str, all_devices: int) -> int:
    """How many devices take part in a collective, by any of the forms in which a program writes their groups."""
    if found := re.search(r"replica_groups=mesh\[(.*?)\].*? \{('.*?)\}", line):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", found[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']+)'", found[2]))
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]", line):
        return int(found[2])
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return len(found[1].split(","))
    return all_devices  # no groups are told where all take part
