"""Times `benches/cpu.rs` and PyTorch on the CPU, by turns, and prints one table for each instruction set.

    python3 benches/peers_cpu.py [--rounds COUNT] [--sets SET ...] [--tensors COUNT]

Tensors of 2^20 elements, 64 if not told otherwise, on all cores. Where the machine has AVX-512, both are also held to AVX2: ours by
GRADPROBE_CPU, PyTorch by ATEN_CPU_CAPABILITY. A figure is the median of a round, in the quietest of the rounds. Each
round times all of them, and its figures go to standard error: rounds that differ are of a busy machine, and PyTorch's
threads, which wait for each other by spinning, suffer most from one.

PyTorch's *norm* is the norm of all tensors and nothing else: the faster of one call for each tensor and
`_foreach_norm`. Its *clip* is `clip_grad_norm_`, which measures and clips; ours for that is `measure` and `clip`. The
*plain* loops move the same bytes and do nothing else. AdamW is of f32: ours by a measurement that is there, and with it; PyTorch's,
`fused` and `foreach`, neither measures nor clips. Without PyTorch in this Python, its columns are empty.
"""

import argparse
import json
import os
import pathlib
import platform
import re
import statistics
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
DTYPES = ["f32", "bf16", "f16"]
ELEMENTS, SAMPLES = 1 << 20, 15
SETS = {"avx512": "avx512", "avx2": "avx2", "portable": "default"}  # GRADPROBE_CPU, ATEN_CPU_CAPABILITY.


def torch_times(count):
    """Medians in ms, by dtype and name."""
    import torch

    times = {}
    for name, dtype in zip(DTYPES, (torch.float32, torch.bfloat16, torch.float16)):
        tensors = [(torch.randn(ELEMENTS) * 1e-3).to(dtype) for _ in range(count)]
        parameters = [torch.nn.Parameter(tensor.clone()) for tensor in tensors]
        for parameter, tensor in zip(parameters, tensors):
            parameter.grad = tensor.clone()
        calls = {
            "norm of each": lambda: torch.stack([torch.linalg.vector_norm(tensor) for tensor in tensors]).norm(),
            "foreach norm": lambda: torch.stack(torch._foreach_norm(tensors)).norm(),
            "clip": lambda: torch.nn.utils.clip_grad_norm_(parameters, 0.1),
        }
        samples = {call: [] for call in calls}
        for _ in range(SAMPLES):
            for call, function in calls.items():
                start = time.perf_counter()
                function()
                samples[call].append(1e3 * (time.perf_counter() - start))
        # The first calls start threads and allocate.
        median = {call: statistics.median(of_call[2:]) for call, of_call in samples.items()}
        times[name] = {
            "torch norm": min(median["norm of each"], median["foreach norm"]),
            "torch clip": median["clip"],
        }
        if name == "f32":
            for kind in ("fused", "foreach"):
                optimizer = torch.optim.AdamW(parameters, lr=1e-3, **{kind: True})
                times[name]["torch " + kind] = median_of(optimizer.step)
    return times


def median_of(function):
    samples = []
    for _ in range(SAMPLES):
        start = time.perf_counter()
        function()
        samples.append(1e3 * (time.perf_counter() - start))
    return statistics.median(samples[2:])


def run_torch(instruction_set, tensors):
    environment = os.environ | {"ATEN_CPU_CAPABILITY": SETS.get(instruction_set, "default")}
    command = [sys.executable, __file__, "--torch", "--tensors", str(tensors)]
    child = subprocess.run(command, env=environment, capture_output=True, text=True)
    return json.loads(child.stdout) if child.returncode == 0 else {dtype: {} for dtype in DTYPES}


def build():
    """The bench's executable."""
    command = ["cargo", "bench", "-p", "gradprobe", "--bench", "cpu", "--no-run", "--message-format=json"]
    messages = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
    made = [message for message in map(json.loads, messages) if message.get("executable")]
    return next(message["executable"] for message in made if message["target"]["name"] == "cpu")


def run_bench(executable, instruction_set, tensors):
    """The instruction set that it used, and medians in ms, by dtype and name."""
    command = [executable, "--bench", "--noplot", "--warm-up-time", "0.3", "--measurement-time", "0.8"]
    groups = "^(ceiling|measure|clip|histogram|optimizer)/"
    environment = os.environ | {"GRADPROBE_CPU": instruction_set, "GRADPROBE_BENCH_TENSORS": str(tensors)}
    out = subprocess.run([*command, groups], env=environment, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    unit = {"ns": 1e-6, "µs": 1e-3, "us": 1e-3, "ms": 1.0, "s": 1e3}
    times = {dtype: {} for dtype in DTYPES}
    pattern = r"^(\w+)/cpu/(\w+)(/\w+)?/\d+\s+time:\s+\[\S+ \S+ (\S+) (\S+) "
    for group, dtype, variant, value, suffix in re.findall(pattern, out, re.MULTILINE):
        times[dtype][group + variant] = float(value) * unit[suffix]
    return re.search(r"instruction set: (\w+)", out)[1], times


def quietest(times, more):
    return {dtype: {n: min(more[dtype][n], times[dtype].get(n, 1e9)) for n in more[dtype]} for dtype in DTYPES}


def machine():
    name = platform.processor() or platform.machine()
    try:
        information = pathlib.Path("/proc/cpuinfo").read_text()
        name = re.search(r"model name\s*: (.*)", information)[1]
        name += ", family " + re.search(r"cpu family\s*: (.*)", information)[1]
        name += ", model " + re.search(r"model\s*: (.*)", information)[1]
    except (OSError, TypeError):
        pass
    try:
        name += ", last cache " + pathlib.Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text().strip()
    except OSError:
        pass
    return f"{name}, {os.cpu_count()} cores"


def table(times):
    columns = ["plain read", "measure", "of read", "torch norm", "plain rewrite", "clip", "× rewrite"]
    columns += ["measure, clip", "torch clip", "histogram", "× measure"]
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for dtype in DTYPES:
        t = times[dtype]
        read, measure, rewrite, clip, histogram = (
            t[name] for name in ("ceiling", "measure", "clip/plain", "clip/clip", "histogram")
        )
        torch = [f"{t[name]:.1f}" if name in t else "" for name in ("torch norm", "torch clip")]
        cells = [f"{read:.1f}", f"{measure:.1f}", f"{read / measure:.2f}", torch[0], f"{rewrite:.1f}", f"{clip:.1f}"]
        cells += [f"{clip / rewrite:.2f}", f"{measure + clip:.1f}", torch[1], f"{histogram:.1f}"]
        lines.append(f"| {dtype} | " + " | ".join(cells + [f"{histogram / measure:.2f}"]) + " |")
    return "\n".join(lines)


def optimizer_table(t):
    """AdamW of f32."""
    plain, step, update = (t["optimizer/" + name] for name in ("plain", "step", "update"))
    torch = [f"{t[name]:.1f}" if name in t else "" for name in ("torch fused", "torch foreach")]
    columns = ["plain traffic", "AdamW", "of traffic", "measure, AdamW", "torch fused", "torch foreach"]
    cells = [f"{plain:.1f}", f"{step:.1f}", f"{plain / step:.2f}", f"{update:.1f}", *torch]
    return "\n".join("| " + " | ".join(row) + " |" for row in (columns, ["---"] * len(columns), cells))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=["avx512", "avx2"])
    parser.add_argument("--tensors", type=int, default=64)
    parser.add_argument("--torch", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.torch:
        print(json.dumps(torch_times(options.tensors)))
        return
    executable, all_times = build(), {}
    for _ in range(options.rounds):
        for asked in options.sets:
            used, times = run_bench(executable, asked, options.tensors)
            if used != asked and used in options.sets:
                continue  # The machine has not the set that was asked for, and this one has its own turn.
            more = run_torch(used, options.tensors)
            times = {dtype: times[dtype] | more[dtype] for dtype in DTYPES}
            print(f"{used}: {json.dumps(times)}", file=sys.stderr, flush=True)
            all_times[used] = quietest(all_times.get(used, {dtype: {} for dtype in DTYPES}), times)
    try:
        import torch

        version = f"PyTorch {torch.__version__}"
    except ImportError:
        version = "no PyTorch in this Python"
    print(f"{machine()}; {version}; {options.tensors} tensors; ms, the quietest of {options.rounds} rounds\n")
    for used, times in all_times.items():
        print(f"**{used}**\n\n{table(times)}\n\n{optimizer_table(times['f32'])}\n")


if __name__ == "__main__":
    main()
