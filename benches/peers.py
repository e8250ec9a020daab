"""Times what else there is for the same work, on the data and cases of `benches/gpu`, and writes one JSON file.

    python3 benches/peers.py PEERS_JSON [--device cuda|cpu] [--limit SECONDS] [--scale FACTOR]

Peers: PyTorch (the norm alone, the same statistics in its operators, those compiled, `get_total_norm`,
`clip_grad_norm_`), CuPy with CUB, TransformerEngine and apex. What is not installed, fails or does not fit into the
time is listed under `left_out`, with the reason. The file is written anew after each peer, so that a run that is ended
from outside leaves what it had. `--device cpu --scale 0.001` tries the program where no GPU is; no figure comes from
that.

The data, which `benches/gpu` makes in the same way: element i of tensor t, counted from 0, is made from
h = splitmix64(t << 40 | i mod 2^20). The sum of the four 16-bit parts of h, less its mean of 131070, times 2^-25, is
exact in f32, with a standard deviation of 1.13e-3; it is then rounded to the tensor's type, to nearest even.
"""

import argparse
import collections
import json
import os
import pathlib
import platform
import time

os.environ["CUPY_ACCELERATORS"] = "cub"  # CuPy reads it when it is imported.

import torch

from record import summary

TILE = 1 << 20
WARM_UP_SECONDS, PEER_SECONDS = 0.1, 3.0
SAMPLES = range(5, 501)
CLIPS, DOES_NOT_CLIP = 0.5, 1e9  # The largest norm allowed, in the norms of the data.

# `sets` are copies of the data in other places, used in turn: 4 GiB in all where the data are to come from memory, one
# where they are to be found in the L2 cache, as a backward pass leaves them.
Case = collections.namedtuple("Case", "dtype lengths sets max_norm")


def transformer_lengths():
    """290 tensors, 2^30 elements: 48 blocks 1280 wide, embeddings of 2048 positions and of the tokens that remain."""
    d = 1280
    block = [d, 3 * d * d, d * d, d, 4 * d * d, 4 * d * d]
    lengths = [2048 * d] + 48 * block
    return [2**30 - sum(lengths)] + lengths


CASES = {
    "step/clips": Case(torch.bfloat16, transformer_lengths(), 2, CLIPS),
    "step/does-not-clip": Case(torch.bfloat16, transformer_lengths(), 2, DOES_NOT_CLIP),
    "small/device": Case(torch.float32, 1000 * [1024], 1, CLIPS),
    "small/graph": Case(torch.float32, 1000 * [1024], 1, CLIPS),
    "small/host": Case(torch.float32, 1000 * [1024], 1, CLIPS),
    "cached/step": Case(torch.bfloat16, 50 * [500_000], 1, CLIPS),
    "measure/f32": Case(torch.float32, [1 << 28], 4, None),
    "measure/bf16": Case(torch.bfloat16, [1 << 29], 4, None),
    "measure/f16": Case(torch.float16, [1 << 29], 4, None),
}


def signed(value):
    """The 64 bits of a number as torch has them: it has no unsigned arithmetic of that width."""
    return value - (1 << 64) if value >> 63 else value


def splitmix64(x):
    def shifted(z, bits):
        return (z >> bits) & ((1 << (64 - bits)) - 1)

    z = x + signed(0x9E3779B97F4A7C15)
    z = (z ^ shifted(z, 30)) * signed(0xBF58476D1CE4E5B9)
    z = (z ^ shifted(z, 27)) * signed(0x94D049BB133111EB)
    return z ^ shifted(z, 31)


def gradient(index, length, dtype, device):
    """Tensor `index` of the data, as the head of this file describes it."""
    h = splitmix64(torch.arange(min(length, TILE), device=device) | index << 40)
    total = sum((h >> bits) & 0xFFFF for bits in (0, 16, 32, 48))
    tile = ((total - 131070).to(torch.float32) * 2.0**-25).to(dtype)
    whole = length // len(tile)
    out = torch.empty(length, dtype=dtype, device=device)
    out[: whole * len(tile)].view(whole, len(tile)).copy_(tile.expand(whole, -1))
    out[whole * len(tile) :] = tile[: length % len(tile)]
    return out


def norm(tensors):
    """The norm of all tensors in f64, in pieces so that no large copy is made."""
    squares = [piece.double().square().sum() for tensor in tensors for piece in tensor.split(1 << 24)]
    return torch.stack(squares).sum().sqrt().item()


class Data:
    """The tensors of a case, in all their places, and what they were before a clip."""

    def __init__(self, case, scale, device):
        lengths = [max(8, int(length * scale) // 8 * 8) for length in case.lengths]
        first = [gradient(t, length, case.dtype, device) for t, length in enumerate(lengths)]
        self.sets = [first] + [[tensor.clone() for tensor in first] for _ in range(case.sets - 1)]
        self.norm = norm(first)
        self.bytes = sum(tensor.nbytes for tensor in first)
        self.max_norm = case.max_norm and case.max_norm * self.norm
        # Gradients that are not clipped stay as they are, but for the multiplication by 1 that torch does.
        self.kept = [tensor.clone() for tensor in first] if case.max_norm == CLIPS else None
        self.parameters = [[parameter_with(tensor) for tensor in tensors] for tensors in self.sets]

    def restore(self, index):
        """Undoes the clip of the set after this one: what was restored last is in the cache, and used only in the next
        iteration, unless there is but one set."""
        if self.kept:
            torch._foreach_copy_(self.sets[(index + 1) % len(self.sets)], self.kept)


def parameter_with(gradient):
    """A parameter with this gradient. Clipping never reads its value, which may lie in the same memory."""
    parameter = torch.nn.Parameter(gradient.detach())
    parameter.grad = gradient
    return parameter


def statistics(x):
    """All statistics of one tensor in torch's operators, on the device; see src/statistics.md."""
    x = x.float()
    magnitude, finite, nonzero = x.abs(), x.isfinite(), x != 0
    nan_count, inf_count = x.isnan().sum(), x.isinf().sum()
    zero_count, dead_count = x.numel() - nonzero.sum(), (magnitude < 1e-10).sum()
    count = finite.sum()
    value, size = torch.where(finite, x, 0), torch.where(finite, magnitude, 0)
    finite_l2_norm = torch.linalg.vector_norm(value)
    l2_norm = torch.where(nan_count > 0, torch.nan, torch.where(inf_count > 0, torch.inf, finite_l2_norm))
    max_abs = size.amax()
    min_nonzero_abs = torch.where(finite & nonzero, magnitude, torch.inf).amin()
    mean, mean_abs = value.sum() / count, size.sum() / count
    variance = torch.where(finite, (x - mean).square(), 0).sum() / count
    first_nonfinite = torch.where(count < x.numel(), (~finite).byte().argmax(), -1)
    return (
        nan_count, inf_count, zero_count, dead_count, finite_l2_norm, l2_norm, max_abs, min_nonzero_abs, mean,
        mean_abs, variance, first_nonfinite,
    )  # fmt: skip


# The peers. Each takes the data and gives a function of the index of a set; what it needs is imported there, and what
# goes wrong is the reason why it is left out.


def torch_norm(data):
    return lambda i: torch.linalg.vector_norm(data.sets[i][0])


def torch_statistics(data):
    return lambda i: statistics(data.sets[i][0])


def torch_statistics_compiled(data):
    compiled = torch.compile(statistics, dynamic=False, fullgraph=True)
    return lambda i: compiled(data.sets[i][0])


def on_cupy(reduction, data):
    import cupy

    function = {"sum": cupy.sum, "norm": cupy.linalg.norm}[reduction]
    arrays = [cupy.from_dlpack(tensors[0]) for tensors in data.sets]
    return lambda i: function(arrays[i])


def cupy_sum(data):
    return on_cupy("sum", data)


def cupy_norm(data):
    return on_cupy("norm", data)


def clip_grad_norm(data):
    clip = torch.nn.utils.clip_grad_norm_
    return lambda i: clip(data.parameters[i], data.max_norm, foreach=True)


def get_total_norm(data):
    return lambda i: torch.nn.utils.get_total_norm(data.sets[i], foreach=True)


def clip_grad_norm_in_graph(data):
    clip = clip_grad_norm(data)
    if not data.sets[0][0].is_cuda:
        raise RuntimeError("CUDA graphs need a GPU")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        clip(0)  # What is set up at first use cannot be captured.
    torch.cuda.current_stream().wait_stream(stream)
    graphs = [torch.cuda.CUDAGraph() for _ in data.sets]
    for i, graph in enumerate(graphs):
        with torch.cuda.graph(graph):
            clip(i)
    return lambda i: graphs[i].replay()


def transformer_engine(data):
    from transformer_engine.pytorch.optimizers import multi_tensor_applier, multi_tensor_l2norm, multi_tensor_scale

    overflow = torch.zeros(1, dtype=torch.int32, device=data.sets[0][0].device)

    def clip(i):
        gradients = data.sets[i]
        total, _ = multi_tensor_applier(multi_tensor_l2norm, overflow, [gradients], False)
        coefficient = data.max_norm / (total.item() + 1e-6)
        if coefficient < 1:
            multi_tensor_applier(multi_tensor_scale, overflow, [gradients, gradients], coefficient)

    return clip


def apex(data):
    from apex.contrib.clip_grad import clip_grad_norm_

    return lambda i: clip_grad_norm_(data.parameters[i], data.max_norm)


MEASURES = {
    "torch norm": torch_norm,
    "torch statistics": torch_statistics,
    "cupy sum": cupy_sum,
    "cupy norm": cupy_norm,
}
# Compiled last of all: how long it takes to compile is not known, and nothing else shall be left out for it.
COMPILED = {"torch statistics compiled": torch_statistics_compiled}
STEPS = {
    "clip_grad_norm_": clip_grad_norm,
    "get_total_norm": get_total_norm,
    "transformer engine": transformer_engine,
    "apex": apex,
}
CLIP = {"clip_grad_norm_": clip_grad_norm}
PEERS = {"step": STEPS, "small": CLIP, "cached": CLIP, "measure": MEASURES}
ROUNDS = [
    {name: PEERS[name.split("/")[0]] for name in CASES} | {"small/graph": {"clip_grad_norm_": clip_grad_norm_in_graph}},
    {name: COMPILED for name in CASES if name.startswith("measure/")},
]


def times_on_gpu(call, data, count):
    """Nanoseconds between two events around each iteration; the host waits once, at the end."""
    data.restore(-1)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    for i, (start, end) in enumerate(events):
        data.restore(i)
        start.record()
        call(i % len(data.sets))
        end.record()
    torch.cuda.synchronize()
    return [1e6 * start.elapsed_time(end) for start, end in events]


def times_on_host(call, data, count):
    """Nanoseconds that the host is in the call, with nothing before it in the queue."""
    data.restore(-1)
    times = []
    for i in range(count):
        data.restore(i)
        synchronize(data)
        start = time.perf_counter_ns()
        call(i % len(data.sets))
        times.append(time.perf_counter_ns() - start)
    synchronize(data)
    return times


def synchronize(data):
    if data.sets[0][0].is_cuda:
        torch.cuda.synchronize()


def measured(case, peer, data):
    """The summary of as many iterations as fit into the time for one peer."""
    call = peer(data)
    on_gpu = data.sets[0][0].is_cuda and case != "small/host"
    timer = times_on_gpu if on_gpu else times_on_host
    timer(call, data, 3)  # Compiles and loads what is made at first use.
    start, warm_up = time.perf_counter(), 0
    while warm_up < 3 or time.perf_counter() - start < WARM_UP_SECONDS:
        timer(call, data, 1)
        warm_up += 1
    iteration = (time.perf_counter() - start) / warm_up
    count = min(int(PEER_SECONDS / iteration), SAMPLES[-1])
    if count not in SAMPLES:
        raise TimeoutError(f"an iteration takes {iteration:.2g} s: {SAMPLES[0]} do not fit into {PEER_SECONDS:g} s")
    return summary(timer(call, data, count))


def software(device):
    versions = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
    for name in ("triton", "cupy", "transformer_engine", "apex"):
        try:
            versions[name] = getattr(__import__(name), "__version__", None)
        except Exception:  # It is then among those left out, with the reason.
            versions[name] = None
    return versions | {"device": torch.cuda.get_device_name() if device == "cuda" else "cpu"}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=pathlib.Path, metavar="PEERS_JSON")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--limit", type=float, default=150, help="seconds for all peers together")
    parser.add_argument("--scale", type=float, default=1, help="of the lengths of all tensors")
    options = parser.parse_args()

    start = time.perf_counter()
    result = {"software": software(options.device), "cases": {}, "left_out": []}

    def left_out(case, peer, why):
        result["left_out"].append({"case": case, "peer": peer, "why": why})
        print(f"{case:20} {peer:26} left out: {why}", flush=True)

    def write():
        partial = options.out.with_suffix(".partial")
        partial.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
        partial.replace(options.out)

    for cases in ROUNDS:
        for case, peers in cases.items():
            data = None
            for name, peer in peers.items():
                if time.perf_counter() - start > options.limit - PEER_SECONDS:
                    left_out(case, name, f"no time left of {options.limit:g} s")
                    continue
                try:
                    data = data or Data(CASES[case], options.scale, options.device)
                    entry = result["cases"].setdefault(
                        case, {"bytes": data.bytes, "norm": data.norm, "max_norm": data.max_norm, "peers": {}}
                    )
                    entry["peers"][name] = measured(case, peer, data)
                    print(f"{case:20} {name:26} {entry['peers'][name]['median_ns'] / 1e3:12.1f} us", flush=True)
                except Exception as error:
                    left_out(case, name, f"{type(error).__name__}: {error}".splitlines()[0])
                write()
    write()


if __name__ == "__main__":
    main()
