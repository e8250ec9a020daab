"""Variants of the kernels that a GPU has to decide on: makes them, says what the compiler says of each.

    python3 benches/gpu/variants.py check               whether each still fits the kernels' source
    python3 benches/gpu/variants.py build DIR [sm_90]   DIR/<name>.cubin and DIR/variants.json, with build.rs's nvcc

`benches/gpu --variants DIR` then times them all in one run, in turns. A variant is the source in kernels/ with some of
its text replaced. What became of each belongs into kernels/TUNING.md.
"""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

KERNELS = pathlib.Path(__file__).resolve().parents[2] / "kernels"


def groups(count):
    return [("constexpr u32 GROUPS = 4;", f"constexpr u32 GROUPS = {count};")]


# For one or two of them: what adds four ends with the sum of the first two in the same place.
FEW_GROUPS = [
    ("Pairs<GROUPS> groups;\n    u32 group = 0;", "Pairs<4> groups;\n    u32 group = 0;"),
    ("Pairs<GROUPS> groups;\n#pragma", "Pairs<4> groups;\n#pragma"),
]


def blocks(measure):
    return [("KERNEL(4) gradprobe_measure", f"KERNEL({measure}) gradprobe_measure")]


def loads(hints):
    return [('asm("ld.global.nc.v4.u32 {', f'asm("ld.global.nc.{hints}v4.u32 {{')]


# In one launch, measure and clip; every block waits until the step is finished. It is launched so that all blocks run at
# the same time.
ONE_LAUNCH = [
    ("KERNEL(4) gradprobe_measure(StepArguments a) {", "DEVICE void measure(const StepArguments &a) {"),
    ("KERNEL(8) gradprobe_clip(ClipArguments a) {", "DEVICE void clip(const ClipArguments &a) {"),
    (
        "// ==== end",
        """
KERNEL(4) gradprobe_step(StepArguments a) {
    u64 step = *(volatile u64 *)&a.outputs->step;
    BARRIER();
    measure(a);
    if (threadIdx.x == 0) {
        while (*(volatile u64 *)&a.outputs->step == step) __nanosleep(100);
        acquire();
    }
    BARRIER();
    ClipArguments of_clip;
    (Common &)of_clip = a;
    of_clip.clip_state = a.clip_state;
    of_clip.coefficients = a.coefficients;
    clip(of_clip);
}
extern "C" __global__ void gradprobe_measure(StepArguments a) { measure(a); }
extern "C" __global__ void gradprobe_clip(ClipArguments a) { clip(a); }
""",
    ),
]

# Every entry: what is expected of it, and why; the text to replace; and what the runner must know: the elements of a
# chunk, the threads of a block, how it is launched, whether its bits are the same.
VARIANTS = {
    "baseline": dict(why="the kernels as they are", edits=[]),
    "chunk-8k": dict(
        why="a quarter of the work between merges: expected slower for large tensors, the merge being 1 to 2 us of a "
        "chunk's 8 (bf16); finer shares for small ones",
        edits=groups(1) + FEW_GROUPS + [("return {groups.total(),", "return {groups.single,"), ("return groups.total();", "return groups.single;")],
        chunk=8192,
        same_bits=False,
    ),
    "chunk-16k": dict(
        why="as chunk-8k, half as much",
        edits=groups(2) + FEW_GROUPS,
        chunk=16384,
        same_bits=False,
    ),
    "chunk-64k": dict(
        why="half the merges: expected some percent faster for one large tensor, if the prefetch does not hide them already; "
        "a longer last wave",
        edits=groups(8),
        chunk=65536,
        same_bits=False,
    ),
    "threads-256": dict(
        why="half as many merges a multiprocessor, each of twice the lanes: expected the same. Two groups a lane",
        edits=groups(2)
        + FEW_GROUPS
        + [
            ("constexpr u32 LANES = 128;", "constexpr u32 LANES = 256;"),
            ("LANES == 4 * WARP", "LANES == 8 * WARP"),
            (
                "totals.sums = (wide(a.sums) + wide(c.sums)) + (wide(b.sums) + wide(d.sums));",
                "totals.sums = (wide(a.sums) + wide(c.sums)) + (wide(b.sums) + wide(d.sums));\n"
                "        const Lane &e = lanes[t + 128], &f = lanes[t + 160], &g = lanes[t + 192], &h = lanes[t + 224];\n"
                "        totals.sums = totals.sums + ((wide(e.sums) + wide(g.sums)) + (wide(f.sums) + wide(h.sums)));",
            ),
            (
                "totals.scan = (a.scan + b.scan) + (c.scan + d.scan);",
                "totals.scan = ((a.scan + b.scan) + (c.scan + d.scan)) + ((e.scan + f.scan) + (g.scan + h.scan));",
            ),
            ("KERNEL(8) gradprobe_clip", "KERNEL(4) gradprobe_clip"),
        ]
        + blocks(2),
        threads=256,
        same_bits=False,
    ),
    "no-prefetch": dict(
        why="expected slower by what the merge leaves the memory idle: up to 10 % (bf16)",
        edits=[("if (i + gridDim.x < chunks && threadIdx.x >= WARP) {", "if (false) {")],
    ),
    "prefetch-two-rows": dict(
        why="expected no faster: one row already covers the merge",
        edits=[("smaller(chunk.length, ROW) * size", "smaller(chunk.length, 2 * ROW) * size")],
    ),
    "prefetch-every-row": dict(
        why="the next row of the chunk on its way while one is summed: 48 to 64 KiB more in flight, for one instruction "
        "more a row. Expected faster if those in flight do not suffice",
        edits=[
            (
                "groups.add(group, group_sums<E, TOGETHER>(",
                """{
                u64 ahead = chunk.address + (group + 1) * ROW * sizeof(typename E::Bits) + threadIdx.x * 128;
                u64 end = chunk.address + chunk.length * sizeof(typename E::Bits);
                if (ahead < end) prefetch(ahead);
                if (sizeof(typename E::Bits) == 4 && ahead + LANES * 128 < end) prefetch(ahead + LANES * 128);
            }
            groups.add(group, group_sums<E, TOGETHER>(""",
            )
        ],
    ),
    "prefetch-in-bulk": dict(
        why="one instruction of one thread in place of up to three of 96; needs sm_90. Expected the same",
        edits=[
            (
                "#pragma unroll 1\n    for (u32 offset = (threadIdx.x - WARP) * LINE;",
                """if (chunk.address % 16 == 0 && bytes >= 16) {
        if (threadIdx.x == WARP)
            asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(chunk.address), "r"(bytes / 16 * 16));
        return;
    }
#pragma unroll 1
    for (u32 offset = (threadIdx.x - WARP) * LINE;""",
            )
        ],
    ),
    "f32-halves-together": dict(
        why="f32 with all 16 loads of a group in flight, in the registers of three blocks: 96 KiB for 64. Expected no "
        "faster: 48 suffice",
        edits=[("E::WORDS == PACKET ? 1 : 2;", "2;")] + blocks(3),
    ),
    "five-blocks": dict(
        why="96 registers, of which 14 spill: 20 KiB more in flight, and more blocks to read while one merges, if the "
        "spills cost less",
        edits=blocks(5),
    ),
    "f32-lines-in-one-load": dict(
        why="each load of a warp 512 bytes in one piece, where it is now every other 16 bytes of 1 KiB, the rest of which "
        "the next load takes from L1. Expected the same, or a few percent faster. Changes the lane of an f32 element",
        edits=[
            (
                "Words4 w = load_words4((const u32 *)packet + i);",
                "Words4 w = load_words4((const u32 *)packet + "
                "(E::WORDS == PACKET ? (int)(i / 4 * 128) - (int)(threadIdx.x % 32 * 4) : (int)i));",
            )
        ],
        same_bits=False,
    ),
    "no-allocate": dict(why="gradients are read once: no line of L1 for them", edits=loads("L1::no_allocate.")),
    "evict-first": dict(why="the same, for L1's order", edits=loads("L1::evict_first.")),
    "sectors-256": dict(why="each miss fetches 256 bytes to L2", edits=loads("L2::256B.")),
    "no-allocate-256": dict(why="both", edits=loads("L1::no_allocate.L2::256B.")),
    "clip-forward": dict(
        why="expected slower where the gradients fit L2: the last chunks measured are in it, the first no longer",
        edits=[("u32 index = a.chunk_count - 1 - from_end;", "u32 index = from_end;")],
    ),
    "clip-two-loads": dict(
        why="32 KiB in flight at 1024 threads: expected slower",
        edits=[("constexpr u32 TOGETHER = 4;", "constexpr u32 TOGETHER = 2;")],
    ),
    "clip-eight-loads": dict(
        why="128 KiB in flight at the registers of 8 blocks, or fewer: expected the same",
        edits=[("constexpr u32 TOGETHER = 4;", "constexpr u32 TOGETHER = 8;"), ("KERNEL(8) gradprobe_clip", "KERNEL(4) gradprobe_clip")],
    ),
    "clip-streams": dict(
        why="what is written is not read again soon: first to leave L2",
        edits=[('asm volatile("st.global.v4.u32', 'asm volatile("st.global.cs.v4.u32')],
    ),
    "programmatic": dict(
        why="the clip's blocks start while the last of measure's finish, and wait: 1 to 2 us less a step, sm_90",
        edits=[
            (
                "    bool finished = chunks == 0 && blockIdx.x == 0;",
                '    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");\n'
                "    bool finished = chunks == 0 && blockIdx.x == 0;",
            ),
            (
                "    u32 action = a.outputs->action;\n",
                '    asm volatile("griddepcontrol.wait;" ::: "memory");\n    u32 action = a.outputs->action;\n',
            ),
        ],
        launch="programmatic",
    ),
    "one-launch": dict(
        why="measure and clip in one cooperative launch: 2 to 3 us less a step for small models; the clip then runs in "
        "measure's registers, four blocks for eight",
        edits=ONE_LAUNCH,
        launch="cooperative",
    ),
}


def flatten(file, seen):
    """kernels/ as one file, as build.rs makes it."""
    if file in seen:
        return ""
    seen.add(file)
    lines = []
    for line in file.read_text().splitlines(keepends=True):
        include = re.match(r'#include "(.*)"', line)
        if include:
            lines.append(flatten(file.parent / include[1], seen))
        elif not line.startswith("#pragma once"):
            lines.append(line)
    return "".join(lines)


def source(variant):
    seen = set()
    text = "".join(flatten(KERNELS / kernel, seen) for kernel in ("measure.cu", "clip.cu")) + "// ==== end\n"
    for old, new in variant["edits"]:
        if text.count(old) != 1:
            raise SystemExit(f"{text.count(old)} times in kernels/, should be once: {old!r}")
        text = text.replace(old, new)
    return text


def nvcc():
    folders = [f"{os.environ[home]}/bin" for home in ("CUDA_HOME", "CUDA_PATH") if home in os.environ]
    path = os.pathsep.join(folders + [os.environ.get("PATH", ""), "/usr/local/cuda/bin"])
    return os.environ.get("NVCC") or shutil.which("nvcc", path=path) or sys.exit("no nvcc where build.rs looks for it")


def build(folder, architecture):
    folder.mkdir(parents=True, exist_ok=True)
    listing = []
    for name, variant in VARIANTS.items():
        file = folder / f"{name}.cu"
        file.write_text(source(variant))
        command = [nvcc(), "-cubin", "-o", folder / f"{name}.cubin", file, f"-arch={architecture}", "-std=c++17", "-O3"]
        command += ["-fmad=false", "-ftz=false", "-prec-div=true", "-prec-sqrt=true", "-Xptxas", "-v"]
        said = subprocess.run(command, capture_output=True, text=True)
        if said.returncode:
            raise SystemExit(f"{name}: {said.stderr}")
        file.unlink()
        facts = re.findall(
            r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores.*?Used (\d+) registers", said.stderr, re.DOTALL
        )
        facts = {kernel: dict(registers=int(registers), spilled=int(spilled)) for kernel, spilled, registers in facts}
        print(f"{name:22}", *(f"{k.removeprefix('gradprobe_')} {f['registers']} registers, {f['spilled']} spilled;" for k, f in sorted(facts.items())))
        defaults = dict(chunk=32768, threads=128, launch="two", same_bits=True)
        listing.append(dict(defaults, name=name, facts=facts, **{k: v for k, v in variant.items() if k != "edits"}))
    (folder / "variants.json").write_text(json.dumps(listing, indent=1))


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["check"]:
            for variant in VARIANTS.values():
                source(variant)
        case ["build", folder, *architecture]:
            build(pathlib.Path(folder), *(architecture or ["sm_90"]))
        case _:
            sys.exit(__doc__)
