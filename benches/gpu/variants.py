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


def loads(hints):
    return [('asm("ld.global.nc.v4.u32 {', f'asm("ld.global.nc.{hints}v4.u32 {{')]


# Every entry: what is expected of it, and why; the text to replace; and what the runner must know: how it is launched,
# whether its bits are the same.
VARIANTS = {
    "baseline": dict(why="the kernels as they are", edits=[]),
    "merge-waits": dict(
        why="one warp merges every chunk, so that it falls behind: expected slower by a part of a percent",
        edits=[("if (threadIdx.x / WARP != index % WARPS) continue;", "if (threadIdx.x / WARP != 0) continue;")],
    ),
    "f32-halves-together": dict(
        why="f32 with all 16 loads of a group in flight, in the registers of one block: 64 KiB as well, and only half "
        "of them while a chunk merges. Expected slower",
        edits=[("AT_ONCE = E::WORDS == PACKET ? PACKETS / 2 : PACKETS;", "AT_ONCE = PACKETS;"), ("KERNEL(STEP_THREADS, 2) gradprobe_measure", "KERNEL(STEP_THREADS, 1) gradprobe_measure")],
    ),
    "f32-lines-in-one-load": dict(
        why="each load of a warp 512 bytes in one piece, where it is now every other 16 bytes of 1 KiB, the rest of which "
        "the next load takes from L1. Expected the same, or a few percent faster. Changes the lane of an f32 element",
        edits=[
            (
                "Words4 w = load_words4((const u32 *)(packet + p * RUN) + i);",
                "Words4 w = load_words4((const u32 *)(packet + p * RUN) + "
                "(E::WORDS == PACKET ? (int)(i / 4 * 128) - (int)(threadIdx.x % 32 * 4) : (int)i));",
            )
        ],
        same_bits=False,
    ),
    "loads-as-they-come": dict(
        why="a group's loads where the compiler puts them, which before sm_90 is half of them behind the first use: expected "
        "the same where two blocks fill the memory's queue anyway, else slower",
        edits=[("#define LOADS_FIRST() __syncwarp()", "#define LOADS_FIRST()")],
    ),
    "no-allocate": dict(why="gradients are read once: no line of L1 for them", edits=loads("L1::no_allocate.")),
    "evict-first": dict(why="the same, for L1's order", edits=loads("L1::evict_first.")),
    "sectors-256": dict(why="each miss fetches 256 bytes to L2", edits=loads("L2::256B.")),
    "no-allocate-256": dict(why="both", edits=loads("L1::no_allocate.L2::256B.")),
    "clip-forward": dict(
        why="expected slower where the gradients fit L2: the last chunks measured are in it, the first no longer",
        edits=[("for (u32 index = run.end; index-- > run.begin;) {", "for (u32 index = run.begin; index < run.end; index++) {")],
    ),
    "clip-two-loads": dict(
        why="32 KiB in flight at 1024 threads: expected slower",
        edits=[("constexpr u32 TOGETHER = 4;", "constexpr u32 TOGETHER = 2;")],
    ),
    "clip-eight-loads": dict(
        why="128 KiB in flight at the registers of 8 blocks, or fewer: expected the same",
        edits=[("constexpr u32 TOGETHER = 4;", "constexpr u32 TOGETHER = 8;"), ("KERNEL(LANES, 8) gradprobe_clip", "KERNEL(LANES, 4) gradprobe_clip")],
    ),
    "clip-streams": dict(
        why="what is written is not read again soon: first to leave L2",
        edits=[('asm volatile("st.global.v4.u32', 'asm volatile("st.global.cs.v4.u32')],
    ),
    "programmatic": dict(
        why="the clip's blocks start while the last of measure's finish, and wait: 1 to 2 us less a step, sm_90",
        edits=[
            (
                "    SHARED(MeasureScratch, scratch);",
                "    SHARED(MeasureScratch, scratch);\n"
                '    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");',
            ),
            (
                "    u32 action = a.outputs->action;\n",
                '    asm volatile("griddepcontrol.wait;" ::: "memory");\n    u32 action = a.outputs->action;\n',
            ),
        ],
        launch="programmatic",
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
    text = "".join(flatten(KERNELS / kernel, seen) for kernel in ("measure.cu", "clip.cu"))
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
        defaults = dict(launch="two", same_bits=True)
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
