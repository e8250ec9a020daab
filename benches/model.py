#!/usr/bin/env python3
"""What the kernels should take on GPUs nobody has run them on: a model, not a measurement.

    python benches/model.py            (needs nvcc, as `cargo test --test sass` does)

Instructions and loads in flight are counted in the machine code, by tests/sass.rs. All else is an assumption, named below with
its source, so that a run on a GPU says which of them was wrong: `benches/record.py` puts the measured times beside these.
A case takes as long as the slowest of what can go on at once (memory, issue, the units of f64), of that the busy part, and
what nothing hides (the launch, a wave that begins and ends, the fences and the folds behind the last load).
"""

import re
import subprocess
from dataclasses import dataclass

CHUNK, TILE, SECTION = 32_768, 2_048, 1_024


@dataclass
class Gpu:
    name: str
    sm: int
    multiprocessors: int
    clock: float  # Hz, the boost clock
    bandwidth: float  # bytes a second
    read: float  # the share of it that a plain sum gets
    l2: float  # bytes
    fp64: float  # instructions of lanes a cycle and multiprocessor


# Multiprocessors, clocks, bandwidths and L2 are NVIDIA's data sheets'; f64 is the Programming Guide's, of throughputs by compute
# capability. The share is CUB's of 2^28 floats: H200 4.31 TB/s (github.com/NVIDIA/cccl, issue 9722), B200 0.80 (5419, f32); a
# copy's on an H100, 3.0 TB/s (github.com/Dao-AILab/quack, its notes on memory-bound kernels). None is published of the other
# two: assumed.
GPUS = [
    Gpu("H100", 90, 132, 1.98e9, 3.35e12, 0.90, 50e6, 64),
    Gpu("H200", 90, 132, 1.98e9, 4.8e12, 0.897, 50e6, 64),
    Gpu("A100", 80, 108, 1.41e9, 2.039e12, 0.90, 40e6, 32),
    Gpu("RTX 4090", 89, 128, 2.52e9, 1.008e12, 0.90, 72e6, 2),
    Gpu("B200", 100, 148, 1.965e9, 8.0e12, 0.80, 126e6, 64),
]

# Blocks of 256 threads with 128 registers on a multiprocessor.
RESIDENT = 2
# L2 delivers so many times the memory's rate: assumed, the least of what microbenchmarks say of H100 and A100.
L2_RATE = 2.0
# What is between two events around a launch beside the work: CUB takes 5.0 us for 16 elements on an H200 (cccl 9722), of which a
# load and a fold are half a microsecond.
LAUNCH = 4.5e-6
# A load from L2 and one from memory, cycles: about 265 and 500 on A100, H100 and RTX 4090 (Luo et al., "Benchmarking and
# Dissecting the Nvidia Hopper GPU Architecture", arXiv:2402.13499); assumed of a B200.
L2_CYCLES, MEMORY_CYCLES = 265, 500
# A fence for the GPU: until the block's last writes are answered. Assumed, two ways to L2.
FENCE = 2 * L2_CYCLES
# The merge of a chunk by one of its block's eight warps, cycles in which that warp loads nothing: some 52 instructions of f64
# that wait for each other, 16 cycles each, and five shuffles of 7 words. Assumed.
MERGE = 52 * 16 + 5 * 7 * 6
# A step of a fold in shared memory with its barrier, and a merge of two records, cycles. Assumed.
FOLD = 60
RECORD_MERGE = 400


def counts():
    """Instructions, by kernel, architecture and type, as tests/sass.rs prints them."""
    command = ["cargo", "test", "--features", "writers,nccl", "--test", "sass", "--", "--nocapture", "--test-threads=1"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {}
    kernel = None
    for line in text.splitlines():
        if test := re.match(r"test (?:\w+::)*(\w+) \.\.\. (.*)", line):
            kernel, line = test[1], test[2]
        if part := re.match(r"sm_(\d+), (\w+): ([\d.]+) instructions an element", line):
            found["measure", int(part[1]), part[2].lower()] = float(part[3])
        if part := re.match(r"sm_(\d+), (\w+): (\d+) instructions a group, (\d+) misaligned", line):
            found["misaligned", int(part[1]), part[2].lower()] = int(part[4]) / 64
        if part := re.match(r"sm_(\d+), (\w+): (\d+) f64 instructions a chunk", line):
            found["f64 a chunk", int(part[1]), part[2].lower()] = int(part[3])
        if part := re.match(r"sm_(\d+): \d+ KiB in flight, (\d+) instructions for 16 bytes", line):
            key = "clip", int(part[1])
            found[key] = max(found.get(key, 0), int(part[2]))
        if part := re.match(r"sm_(\d+): \d+ elements a turn, ([\d.]+) instructions each", line):
            key = "histogram", int(part[1])
            if kernel.startswith("histogram"):
                found[key] = max(found.get(key, 0), float(part[2]))
        if part := re.match(r"sm_(\d+): \d \+ 4 loads.* ([\d.]+) instructions an element", line):
            key = "update", int(part[1])
            found[key] = max(found.get(key, 0), float(part[2]))
    return found


SIZES = {"f32": 4, "f16": 2, "bf16": 2}


class Model:
    def __init__(self, gpu, found):
        self.gpu, self.found = gpu, found

    def issue(self, elements, instructions):
        """Four warp instructions a cycle and multiprocessor."""
        return elements * instructions / (4 * 32 * self.gpu.multiprocessors * self.gpu.clock)

    def memory(self, read, written=0, cached=False):
        """A rewrite in place is taken to move bytes as fast as a sum: on an H100 a copy does."""
        return (read + written) / (self.gpu.bandwidth * self.gpu.read * (L2_RATE if cached else 1))

    def latency(self, l2=0, memory=0):
        return (l2 * L2_CYCLES + memory * MEMORY_CYCLES) / self.gpu.clock

    def sum(self, size):
        """CUB's sum of as many bytes, as published: this share of the bandwidth."""
        return LAUNCH + self.latency(memory=1) + self.memory(size)

    def measure(self, lengths, dtype, kernel="measure"):
        """Seconds, and what they are."""
        gpu = self.gpu
        chunks = [-(-length // CHUNK) for length in lengths if length > TILE]
        small = [length for length in lengths if length <= TILE]
        blocks = RESIDENT * gpu.multiprocessors
        elements, size = sum(lengths), sum(lengths) * SIZES[dtype]
        streams = {
            "memory": self.memory(size, cached=size < 0.7 * gpu.l2),
            "issue": self.issue(elements, self.found[kernel, gpu.sm, dtype]),
            "f64": sum(chunks) * self.found["f64 a chunk", gpu.sm, dtype] * 32 / (gpu.fp64 * gpu.multiprocessors * gpu.clock),
        }
        limit = max(streams, key=streams.get)
        busy = 1.0
        merges = fences = 0.0
        if chunks:
            used = min(blocks, sum(chunks))
            longest = -(-sum(chunks) // used)
            busy = sum(chunks) / used / longest
            # One warp of eight, in each of two blocks, that merges instead of loading; and one of the two blocks that waits.
            merges = longest * MERGE / gpu.clock / 8
            runs = 1 + len(chunks) / used
            fences = runs * FENCE / gpu.clock / RESIDENT
        # Each warp takes a small tensor at a time: its tables, its elements, its record.
        rounds = -(-len(small) // (8 * blocks))
        latency = rounds * self.latency(l2=2, memory=1)
        largest = max(chunks, default=1)
        trips = 4 if largest <= SECTION else 6
        folds = (5 + len(lengths) / 128) * FOLD + (RECORD_MERGE * (3 + 7) if chunks else 0)
        tail = self.latency(l2=trips) + folds / gpu.clock
        stream = streams[limit] / busy
        total = LAUNCH + self.latency(memory=1) + stream + merges + fences + latency + tail
        return total, limit

    def clip(self, size):
        elements = size / 2
        streams = {"memory": self.memory(size, size), "issue": self.issue(elements / 8, self.found["clip", self.gpu.sm])}
        limit = max(streams, key=streams.get)
        return LAUNCH + self.latency(memory=1) + streams[limit], limit

    def both(self, first, second):
        """One launch behind the other, of which the second waits a microsecond for the first. Assumed."""
        return first[0] + second[0] - LAUNCH + 1e-6, f"{first[1]}, {second[1]}"

    def update(self, elements, dtype):
        size = elements * SIZES[dtype]
        streams = {
            "memory": self.memory(size + 8 * elements, 8 * elements),
            "issue": self.issue(elements, self.found["update", self.gpu.sm]),
        }
        limit = max(streams, key=streams.get)
        return LAUNCH + self.latency(memory=1) + streams[limit], limit

    def histogram(self, elements, dtype):
        # Shared memory counts 9.5 elements a cycle and multiprocessor of normal numbers, if lanes that meet go one by one.
        atomics = elements / (9.5 * self.gpu.multiprocessors * self.gpu.clock)
        streams = {
            "memory": self.memory(elements * SIZES[dtype]),
            "issue": self.issue(elements, self.found["histogram", self.gpu.sm]),
            "shared": atomics,
        }
        limit = max(streams, key=streams.get)
        return LAUNCH + self.latency(memory=1) + streams[limit], limit

    def cases(self):
        """Those of benches/gpu/main.rs: name, bytes of gradients, seconds and what limits."""
        gib = 1 << 30
        for dtype in SIZES:
            yield f"measure/{dtype}", gib, self.measure([gib // SIZES[dtype]], dtype)
        yield "measure/bf16-misaligned", gib, self.measure([gib // 2], "bf16", "misaligned")
        width = 1280
        block = [width, 3 * width**2, width**2, width, 4 * width**2, 4 * width**2]
        lengths = [2048 * width] + 48 * block
        lengths = [gib - sum(lengths)] + lengths
        step = self.measure(lengths, "bf16")
        yield "step/clips", 2 * gib, self.both(step, self.clip(2 * gib))
        yield "step/does-not-clip", 2 * gib, self.both(step, (LAUNCH + self.latency(l2=2), "launch"))
        for dtype in ("f32", "bf16"):
            elements = gib // SIZES[dtype]
            yield f"tracked/{dtype}", gib, self.both(self.measure([elements], dtype), self.update(elements, dtype))
            yield f"histogram/{dtype}", gib, self.histogram(elements, dtype)
        cached = [500_000] * 50
        yield "cached/measure", sum(cached) * 2, self.measure(cached, "bf16")
        small = [1024] * 1000
        yield "small/measure", sum(small) * 4, self.measure(small, "f32")


def main():
    found = counts()
    models = [Model(gpu, found) for gpu in GPUS]
    print("Predicted, in us; in brackets the share of CUB's sum of the same bytes by the same assumptions, and what limits.\n")
    print("| case | " + " | ".join(gpu.name for gpu in GPUS) + " |")
    print("|---|" + "---|" * len(GPUS))
    for row in zip(*(model.cases() for model in models)):
        cells = []
        for model, (name, size, (seconds, limit)) in zip(models, row):
            cells.append(f"{seconds * 1e6:.1f} ({model.sum(size) / seconds:.2f}, {limit})")
        print(f"| {row[0][0]} | " + " | ".join(cells) + " |")


main()
