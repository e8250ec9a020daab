"""Makes one record of a run on a GPU, and the README's table and plot from the newest of them.

    record.py make GPU_JSON CRITERION_DIR PEERS_JSON BUILD_JSON PARTS_JSON COUNTERS_JSON OUT_DIR
    record.py readme [--check | --no-plot] [--root FOLDER]
    record.py gpu GPU_JSON
    record.py part PARTS_JSON NAME RESULT SECONDS [WHY]
    record.py counters NCU_OUTPUT COUNTERS_JSON
    record.py hash [--root FOLDER]

benches/records/README.md says what is in a record and how to make one; tests/gpu/run.sh calls `gpu`, `part`, `counters`
and `make`. A figure that was not measured is null here and "not measured" in a table, never a number.
"""

import argparse
import csv
import datetime
import hashlib
import json
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
START, END = "<!-- speed -->", "<!-- /speed -->"
NOT_MEASURED = "not measured"

# What a case or group is compared with besides the peers, by the names that `ratios` has.
CEILING, TIME, HBM = "its ceiling", "time", "second pass from HBM"
UPPER_LIMITS = {TIME, HBM}

CASES = [
    *("ceiling/sum", "ceiling/copy", "ceiling/scale"),
    *("measure/f32", "measure/bf16", "measure/f16", "measure/bf16-misaligned"),
    *("step/clips", "step/does-not-clip", "small/device", "small/graph", "small/host", "cached/step", "cached/measure"),
    *("tracked/f32", "tracked/bf16", "histogram/f32", "histogram/bf16"),
]

# A ratio: how many times faster, or which part of the ceiling. A time in ns. A part of the bytes.
GOALS = {
    case: {CEILING: 0.95, "torch norm": 1.5, "torch statistics": 30}
    for case in ("measure/f32", "measure/bf16", "measure/f16")
} | {
    "step/clips": {"clip_grad_norm_": 2},
    "step/does-not-clip": {"clip_grad_norm_": 4},
    "small/graph": {TIME: 12_000, "clip_grad_norm_": 10},
    "small/host": {TIME: 15_000},
    "cached/step": {HBM: 0.2},
    "tracked/f32": {CEILING: 0.9},
    "histogram/f32": {CEILING: 0.7},
    "histogram/bf16": {CEILING: 0.7},
}

# How often a case moves the bytes of its gradients through memory, and the ceiling that this can go no faster than.
READS = {"ceiling/sum": 1}
READS_THEN_SCALES = {"ceiling/sum": 1, "ceiling/scale": 2}
TRAFFIC = {case: READS for case in CASES if case.startswith("measure/")} | {
    "step/does-not-clip": READS,
    "step/clips": READS_THEN_SCALES,
    # The gradient twice, and mean and deviations of 8 bytes an element read and written.
    "tracked/f32": {"ceiling/sum": 2, "ceiling/scale": 4},
    "tracked/bf16": {"ceiling/sum": 2, "ceiling/scale": 8},
    "histogram/f32": READS,
    "histogram/bf16": READS,
}

# What the second pass of the case `cached` reads: 25 million elements of two bytes.
CACHED_BYTES = 50_000_000
READ_FROM_HBM = "dram__bytes_read.sum"

# Two norms of the same data, summed in another order.
SAME_NORM = 1e-5

GPU_FIELDS = [
    *("name", "driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "clocks.max.mem", "power.limit"),
    *("temperature.gpu", "memory.total"),
]
SAME_GPU = ("name", "driver_version")
RECORD_KEYS = {
    *("date", "gpu", "build", "software", "parts", "ours", "peers", "left_out", "counters", "ratios", "remarks"),
}


class Refused(Exception):
    """Why there is no result, in a line for the user."""


def kernels_hash(root=ROOT):
    """SHA-256 of the names and contents of the kernels, in the order of their names."""
    folder = root / "kernels"
    files = sorted(path for path in folder.iterdir() if path.suffix in (".cu", ".cuh"))
    digest = hashlib.sha256()
    for path in files:
        content = path.read_bytes()
        digest.update(f"{path.name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def summary(times):
    """Median and quantiles of a list of times."""
    ordered = sorted(times)

    def quantile(part):
        place = part * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (place - low) * (ordered[high] - ordered[low])

    return {
        "median_ns": quantile(0.5),
        "p10_ns": quantile(0.1),
        "p90_ns": quantile(0.9),
        "samples": len(ordered),
    }


def read_json(path, absent=None):
    """What a file holds, or `absent` where there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return absent
    except ValueError as error:
        raise Refused(f"{path}: not whole: {error}") from None


def read_record(path):
    record = read_json(path)
    missing = sorted(RECORD_KEYS - record.keys()) if isinstance(record, dict) else ["an object"]
    if missing:
        raise Refused(f"{path}: not a whole record: without {', '.join(missing)}")
    return record


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False) + "\n", encoding="utf-8")


# Making a record.


def read_criterion(folder):
    """Our benches by their ids, from what criterion leaves behind."""
    ours = {}
    for path in sorted(folder.glob("**/new/benchmark.json")):
        bench, sample = read_json(path), read_json(path.with_name("sample.json"))
        if sample is None:
            raise Refused(f"{path.parent}: no sample.json")
        throughput = bench["throughput"] or {}
        ours[bench["full_id"]] = summary([t / n for t, n in zip(sample["times"], sample["iters"])]) | {
            "bytes": throughput.get("Bytes", throughput.get("BytesDecimal"))
        }
    return ours


def note_gpu(path):
    """Writes down the first GPU as nvidia-smi describes it, unless that was done before."""
    query = ["nvidia-smi", "--id=0", f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader"]
    try:
        line = subprocess.run(query, check=True, capture_output=True, text=True, timeout=10).stdout
        gpu = dict(zip(GPU_FIELDS, (value.strip() for value in line.split(",")), strict=True))
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        raise Refused(f"no GPU can be described: {error}") from None
    before = read_json(path)
    if before is None:
        write_json(path, gpu)
    elif any(before[field] != gpu[field] for field in SAME_GPU):
        raise Refused(f"{path} is of another GPU or driver: {before['name']}, {before['driver_version']}")


def share_of_ceiling(case, ours):
    """The time that the case's traffic takes at the speed of the ceilings, in parts of the time it took."""
    traffic = TRAFFIC[case]
    if any(not ours.get(name, {}).get("bytes") for name in [case, *traffic]):
        return None
    ns_per_byte = sum(times * ours[name]["median_ns"] / ours[name]["bytes"] for name, times in traffic.items())
    return ours[case]["bytes"] * ns_per_byte / ours[case]["median_ns"]


def terabytes_per_second(case, ours):
    """What went through memory; none where that is not known, since the cache holds a part."""
    times = 1 if case.startswith("ceiling/") else sum(TRAFFIC.get(case, {}).values())
    return times * ours["bytes"] / ours["median_ns"] / 1e3 if times and ours["bytes"] else None


def second_pass_from_hbm(counters):
    """The part of its bytes that the last clip read from HBM."""
    clips = [kernel for kernel in counters.get("kernels", []) if kernel["name"].startswith("gradprobe_clip")]
    read = clips[-1].get(READ_FROM_HBM) if clips else None
    return None if read is None else read / CACHED_BYTES


def compare(ours, peers, counters):
    """Every ratio, with its goal and whether it was met; null for what was not measured."""
    rows = []
    for case in dict.fromkeys([*CASES, *ours]):
        median = ours.get(case, {}).get("median_ns")
        theirs = peers.get(case, {}).get("peers", {})
        goals = GOALS.get(case, {})
        extra = [CEILING] * (case in TRAFFIC)
        for against in dict.fromkeys([*goals, *extra, *theirs]):
            if against == CEILING:
                value = share_of_ceiling(case, ours)
            elif against == TIME:
                value = median
            elif against == HBM:
                value = second_pass_from_hbm(counters)
            else:
                value = theirs[against]["median_ns"] / median if median and against in theirs else None
            goal, met = goals.get(against), None
            if goal is not None and value is not None:
                met = value <= goal if against in UPPER_LIMITS else value >= goal
            rows.append({"case": case, "against": against, "value": value, "goal": goal, "met": met})
    return rows


def other_data(peers, norms):
    """The cases in which ours and theirs did not measure the same data, and what can be said of that."""
    common = {case: (norms[case], peers[case]["norm"]) for case in peers if case in norms}
    other = {case: pair for case, pair in common.items() if not abs(pair[0] - pair[1]) <= SAME_NORM * pair[1]}
    remarks = [f"{case}: not compared, the norm is {a} in ours and {b} in the peers'" for case, (a, b) in other.items()]
    # What the calls cost the host does not depend on the data.
    unknown = [case for case in peers if case not in norms and case != "small/host"]
    if unknown:
        remarks.append(f"norms of ours that would show that the data are the same are missing: {', '.join(unknown)}")
    return other, remarks


def make(gpu, criterion, peers, build, parts, counters, out):
    found, built, ours = read_json(gpu), read_json(build), read_criterion(criterion)
    for path, facts in ((gpu, found), (build, built)):
        if facts is None:
            raise Refused(f"{path} is missing: there is no record without it")
    beside, counters = read_json(peers, {}), read_json(counters, {})
    cases = beside.get("cases", {})
    other, remarks = other_data(cases, read_json(criterion / "norms.json", {}))
    comparable = {case: entry for case, entry in cases.items() if case not in other}
    date = datetime.datetime.now(datetime.timezone.utc)
    record = {
        "date": date.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "gpu": found,
        "build": built,
        "software": beside.get("software", {}),
        "parts": read_json(parts, {}),
        "ours": ours,
        "peers": cases,
        "left_out": beside.get("left_out", []),
        "counters": counters,
        "ratios": compare(ours, comparable, counters),
        "remarks": remarks,
    }
    name = re.sub("[^a-z0-9]+", "-", found["name"].lower()).strip("-")
    path = out / name / f"{date:%Y-%m-%d}.json"
    write_json(path, record)
    print("\n".join(aligned(table(record))))
    for entry in record["left_out"]:
        print(f"left out: {entry['case']}, {entry['peer']}: {entry['why']}")
    for remark in remarks:
        print(remark)
    print(path)


def note_part(path, name, result, seconds, why):
    parts = read_json(path, {})
    parts[name] = {"result": result, "seconds": seconds} | ({"why": why} if why else {})
    write_json(path, parts)


def read_counters(ncu, out):
    """The kernels in the order they ran, with their counters, from the table that ncu prints."""
    lines = ncu.read_text(encoding="utf-8").splitlines()
    head = next((i for i, line in enumerate(lines) if line.startswith('"ID",')), len(lines))
    kernels = {}
    for row in csv.DictReader(lines[head:]):
        if (row["Metric Unit"] or "byte") not in ("byte", "sector"):
            raise Refused(f"{ncu}: {row['Metric Name']} in {row['Metric Unit']}: run ncu with --print-units base")
        kernel = kernels.setdefault(row["ID"], {"name": row["Kernel Name"]})
        value = row["Metric Value"].replace(",", "")
        kernel[row["Metric Name"]] = int(value) if value.isdecimal() else None  # "n/a" where it cannot be read.
    if not any(kernel.get(READ_FROM_HBM) is not None for kernel in kernels.values()):
        raise Refused(next((line for line in lines if "==ERROR==" in line), f"{ncu}: ncu counted nothing"))
    write_json(out, {"kernels": list(kernels.values())})


# Tables.


def time(ns):
    return f"{ns / 1e6:.2f} ms" if ns >= 1e6 else f"{ns / 1e3:.1f} µs"


def figure(against, value):
    """A value or a goal as a reader wants it."""
    if value is None:
        return NOT_MEASURED
    return {CEILING: f"{value:.3f}", TIME: time(value), HBM: f"{100 * value:.0f} %"}.get(against, f"{value:.3g} ×")


def table(record):
    """The table of a record, as rows of cells: a row for each ratio, and each case named once."""
    rows = [["case", "time", "TB/s", "compared with", "", "goal", ""]]
    for case in dict.fromkeys([*CASES, *record["ours"]]):
        ours = record["ours"].get(case)
        rate = terabytes_per_second(case, ours) if ours else None
        cells = [case, time(ours["median_ns"]) if ours else NOT_MEASURED, f"{rate:.2f}" if rate else ""]
        ratios = [row for row in record["ratios"] if row["case"] == case]
        for row in ratios:
            against, goal = row["against"], row["goal"]
            theirs = record["peers"].get(case, {}).get("peers", {}).get(against)
            name = f"{against}, {time(theirs['median_ns'])}" if theirs else against
            sign = "≤" if against in UPPER_LIMITS else "≥"
            wanted = f"{sign} {figure(against, goal)}" if goal is not None else ""
            outcome = {True: "met", False: "MISSED", None: ""}[row["met"]]
            rows.append([*cells, name, figure(against, row["value"]), wanted, outcome])
            cells = ["", "", ""]
        if not ratios:
            rows.append([*cells, "", "", "", ""])
    return rows


def aligned(rows):
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]


def markdown(rows):
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return [lines[0], "|---" * len(rows[0]) + "|", *lines[1:]]


# The README.


def newest_record(root):
    records = [read_record(path) for path in sorted(root.glob("benches/records/*/*.json"))]
    return max(records, key=lambda record: record["date"], default=None)


def block(record, root):
    """What the README says of speed on a GPU."""
    if record is None:
        return [
            "**No GPU has run these kernels yet**: there is no record, and no speed on a GPU is claimed.",
            "[benches/records](benches/records/README.md) says how to make one.",
        ]
    gpu, build, software = record["gpu"], record["build"], record["software"]
    dirty = " with changes that were not committed" if build["dirty"] else ""
    versions = [f"{name} {software[name]}" for name in ("torch", "cuda", "cupy") if software.get(name)]
    lines = [
        f"{gpu['name']}, driver {gpu['driver_version']}, {record['date'][:10]}, commit {build['commit'][:12]}{dirty}"
        f"{''.join(f', {version}' for version in versions)}. Medians of one run;",
        "[benches/records](benches/records/README.md) explains them and has the spread.",
        "",
    ]
    if build["kernels"] != kernels_hash(root):
        lines += ["**This record is older than the kernels**: they have changed and were not measured again.", ""]
    parts = [f"{name} {part['result']}" for name, part in record["parts"].items()]
    lines += [f"The suite in that run: {', '.join(parts) or NOT_MEASURED}.", "", *markdown(table(record)), ""]
    lines += [f"{remark}\n" for remark in record["remarks"]]
    return [*lines, "![The ratios of this table and their goals](benches/records/speed.svg)"]


def readme(root, check, plot):
    path = root / "README.md"
    text = path.read_text(encoding="utf-8")
    before, start, rest = text.partition(START + "\n")
    _, end, after = rest.partition(END)
    if not start or not end:
        raise Refused(f"{path}: no lines {START} and {END}")
    record = newest_record(root)
    wanted = before + start + "\n".join(block(record, root)) + "\n" + end + after
    if not check:
        path.write_text(wanted, encoding="utf-8")
        if record and plot:
            draw(record, root / "benches/records/speed.svg")
    elif wanted != text:
        raise Refused(f"{path}: not what the newest record and the kernels say of speed: run benches/record.py readme")


def draw(record, path):
    """The ratios as bars with their goals as lines: shares of the ceiling, and times faster than each peer."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "gradprobe"  # The same record gives the same file.
    from matplotlib import pyplot

    rows = [row for row in record["ratios"] if row["value"] is not None and row["against"] not in UPPER_LIMITS]
    shares = [row for row in rows if row["against"] == CEILING]
    faster = [row for row in rows if row["against"] != CEILING]
    sides, axes = [shares, faster], {"height_ratios": [max(len(side), 1) for side in (shares, faster)]}
    plot, places = pyplot.subplots(2, figsize=(9, 1.5 + 0.27 * len(rows)), gridspec_kw=axes, layout="constrained")
    for place, side in zip(places, sides):
        names = [row["case"] + (f" · {row['against']}" if side is faster else "") for row in side]
        origin = 1 if side is faster else 0
        bars = place.barh(names, [row["value"] - origin for row in side], left=origin, color="#4878a8")
        place.bar_label(bars, [figure(row["against"], row["value"]) for row in side], padding=3, fontsize=8)
        for height, row in enumerate(side):
            if row["goal"] is not None:
                place.plot([row["goal"]] * 2, [height - 0.45, height + 0.45], color="#c03020", linewidth=2)
        place.invert_yaxis()
        place.tick_params(labelsize=8)
        place.margins(x=0.12)
        place.spines[["top", "right"]].set_visible(False)
    places[0].set_xlabel("part of what the ceilings of this card allow (goal in red)", fontsize=8)
    places[1].set_xlabel("times faster (goal in red)", fontsize=8)
    places[1].set_xscale("log")
    places[1].xaxis.set_major_formatter("{x:g}")
    places[1].axvline(1, color="black", linewidth=0.8)
    plot.suptitle(f"{record['gpu']['name']}, {record['date'][:10]}", fontsize=10)
    plot.savefig(path, metadata={"Date": None})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("make")
    for name in ("gpu", "criterion", "peers", "build", "parts", "counters", "out"):
        making.add_argument(name, type=pathlib.Path)
    commands.add_parser("gpu").add_argument("path", type=pathlib.Path)
    part = commands.add_parser("part")
    part.add_argument("path", type=pathlib.Path)
    part.add_argument("name")
    part.add_argument("result", choices=["passed", "failed", NOT_MEASURED])
    part.add_argument("seconds", type=int)
    part.add_argument("why", nargs="?")
    counting = commands.add_parser("counters")
    counting.add_argument("ncu", type=pathlib.Path)
    counting.add_argument("out", type=pathlib.Path)
    writing, hashing = commands.add_parser("readme"), commands.add_parser("hash")
    either = writing.add_mutually_exclusive_group()
    either.add_argument("--check", action="store_true", help="only say whether the README is up to date")
    either.add_argument("--no-plot", action="store_false", dest="plot", help="leave the plot as it is")
    for command in (writing, hashing):
        command.add_argument("--root", type=pathlib.Path, default=ROOT)
    options = vars(parser.parse_args())
    command = options.pop("command")
    if command == "hash":
        print(kernels_hash(**options))
        return
    functions = {"make": make, "gpu": note_gpu, "part": note_part, "counters": read_counters, "readme": readme}
    try:
        functions[command](**options)
    except Refused as refused:
        sys.exit(str(refused))


if __name__ == "__main__":
    main()
