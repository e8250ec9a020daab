"""Draws the inspector's table as picture.svg, for the README: a terminal's look, with what stands out in colour.

    cargo build --release --example inspect && python3 examples/inspect/picture.py
"""

import html
import pathlib
import subprocess

ROOT = pathlib.Path(__file__).resolve().parents[2]
COMMAND = ["--device", "cpu", "tests/data/exploding-step3.safetensors"]
CHARACTER, LINE, MARGIN = 7.22, 17, 16

table = subprocess.run(
    [ROOT / "target/release/examples/inspect", *COMMAND], cwd=ROOT, check=True, capture_output=True, text=True
).stdout.splitlines()
# Up to the time of the read, which is another one each time.
end = next(index for index, line in enumerate(table) if line.startswith("read "))
lines = ["$ cargo run --release --example inspect -- " + COMMAND[-1], *table[1:end]]
width = round(2 * MARGIN + CHARACTER * max(map(len, lines)))
height = 2 * MARGIN + LINE * len(lines)


def colour(index, line):
    if "◄" in line:
        return "#ff9e8a" if "NaN" in line or "Inf" in line else "#f0c674"
    return "#8abeb7" if index <= 1 else "#ff9e8a" if index == len(lines) - 1 else "#c5c8c6"


rows = "\n".join(
    f'<text x="{MARGIN}" y="{MARGIN + LINE * (i + 0.8):.1f}" fill="{colour(i, line)}" '
    f'textLength="{CHARACTER * len(line):.1f}" lengthAdjust="spacingAndGlyphs" xml:space="preserve">{html.escape(line)}</text>'
    for i, line in enumerate(lines)
)
(ROOT / "examples/inspect/picture.svg").write_text(
    f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
    f'font-family="ui-monospace, SFMono-Regular, Menlo, Consolas, \'DejaVu Sans Mono\', monospace" font-size="12">\n'
    f'<rect width="100%" height="100%" rx="8" fill="#1d1f21"/>\n{rows}\n</svg>\n'
)
