"""`ioubal bench report`: the tables of the READMEs and the pictures, from the stored rows and nothing else.

A table stands between `<!-- bench NAME -->` and `<!-- end of bench NAME -->`; every file of FILES may hold any of them.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from . import machine, results
from .results import Stored
from .table import milliseconds
from .timing import Row
from .work import BOTH, COPY, INFERENCE

PROGRAM = "ioubal bench report"
FILES = ("README.md", "bench/README.md", "docs/performance.md")
NOT_MEASURED = "Not measured yet."
HEADS = "retinanet/b1"
ALONE = "(plain, classification alone)"
Line = tuple[str, Row | None]


def caption(stored: Stored, rows: Sequence[Row], what: str) -> str:
    """What the figures are of, and what they depend on."""
    first = rows[0]
    commits = ", ".join(dict.fromkeys(row["commit"] for row in rows))
    days = " to ".join(sorted({min(row["run"] for row in rows)[:10], max(row["run"] for row in rows)[:10]}))
    where = first["device"]
    if stored.gpu:
        where += f", driver {first.get('driver', 'unknown')}, replayed CUDA graphs"
    else:
        plural = "s" if first["threads"] > 1 else ""
        where += f" ({first['isa']}), {first['threads']} thread{plural}, {first['heap']} heap"
        if all("disturbed_rounds" in row for row in rows):
            where += ", calls that had to share the core repeated"
    return f"{where}, torch {first['torch']}, commit {commits}, {days}; {what}."


def small(value: float) -> str:
    """Two decimals, or two digits of what is smaller than 0.1."""
    return f"{value:.2f}" if value >= 0.1 else f"{value:.2g}"


def table(stored: Stored, lines: Sequence[Line], ours: Row | None, what: str, entries: str = "logit") -> str:
    """A Markdown table of the lines that have a row. `ours` is what the last column holds the others against."""
    found = [(name, row) for name, row in lines if row is not None]
    if not found or ours is None:
        return NOT_MEASURED
    out = [caption(stored, [row for _, row in found], what), ""]
    out += [f"| path | time | ns/{entries} | x copy | x fused | extra memory |", "|---|---|---|---|---|---|"]
    for name, row in found:
        extra = f"{row['extra_memory_x_logits']:.2f}x" if "extra_memory_x_logits" in row else ""
        out.append(
            f"| {name} | {milliseconds(row['median_ms'])} | {small(row[f'ns_per_{entries}'])} | {row['x_copy']:.2f}"
            f" | {row['median_ms'] / ours['median_ms']:.2f} | {extra} |"
        )
    return "\n".join(out)


def heads_table(stored: Stored) -> str:
    """The fused loss of one image on this device, its peers, its other layouts and options."""
    batch = 16 if stored.gpu else 1
    name = f"retinanet/b{batch}"
    flat, nchw, last, half = (
        partial(stored.find, f"{name}/{each}")
        for each in ("flat/float32", "nchw/float32", "channels_last/float32", "flat/bfloat16")
    )
    ours = flat("fused")
    lines: list[Line] = [
        ("copy of the logits, float32", flat(COPY)),
        ("**fused, flat**", ours),
        ("**fused, NCHW, five levels**", nchw("fused")),
        ("**fused, channels_last**", last("fused")),
        ("**fused, flat, `inplace=True`**", flat("fused, in place")),
        ("fused, flat, gamma 1.5", flat("fused, gamma 1.5")),
        ("fused, flat, forward without gradients", flat("fused", INFERENCE)),
    ]
    if stored.gpu:
        lines += [
            ("fused, flat, Triton", flat("fused", backend="triton")),
            ("fused, NCHW, Triton", nchw("fused", backend="triton")),
            ('eager PyTorch, `backend="reference"`', flat("reference backend")),
        ]
    lines += [
        ("torch.compile, the best form found", flat("torch.compile, static form")),
        (f"torchvision `sigmoid_focal_loss` {ALONE}", flat("torchvision sigmoid_focal_loss")),
        ("torchvision heads (plain losses)", flat("torchvision heads")),
        ("torchvision heads (plain losses), NCHW", nchw("torchvision heads")),
        ("eager PyTorch, the 30 lines above", flat("eager PyTorch (README)")),
        ("eager, authors' formulation (classification alone)", flat("eager, authors' style")),
        (f"apex `focal_loss` {ALONE}", flat("apex focal_loss")),
        (f"mmcv `sigmoid_focal_loss` {ALONE}", flat("mmcv sigmoid_focal_loss")),
        ("copy of the logits, bfloat16", half(COPY)),
        ("**fused, flat, bfloat16**", half("fused")),
    ]
    if stored.gpu:
        lines += [("fused, flat, Triton, bfloat16", half("fused", backend="triton"))]
    images = "one image" if batch == 1 else f"{batch} images"
    what = f"RetinaNet at 800 x 1333, {images}: 200,700 anchors x 80 classes each, forward + backward, medians"
    return table(stored, lines, ours, what)


def stage_table(stored: Stored) -> str:
    """Matching and the whole loss stage."""
    batch = 16 if stored.gpu else 1
    out = []
    for boxes in (10, 50):
        name = f"matching/b{batch}/g{boxes}"
        ours = stored.find(name, "fused", INFERENCE)
        lines: list[Line] = [
            ("**`match_anchors`**", ours),
            ("torchvision `box_iou` + `Matcher`", stored.find(name, "torchvision box_iou + Matcher", INFERENCE)),
        ]
        out.append(table(stored, lines, ours, f"matching 200,700 anchors with {boxes} boxes an image", "anchor"))
    name = f"stage/b{batch}/nchw/float32"
    ours = stored.find(name, "fused stage")
    lines = [
        ("copy of the logits", stored.find(name, COPY)),
        ("**`RetinaNetLoss`**", ours),
        ("torchvision's matcher, then the fused loss", stored.find(name, "torchvision's matcher, fused loss")),
        ("torchvision's matcher and heads (plain losses)", stored.find(name, "torchvision's matcher and heads")),
        ("torchvision's matcher, eager PyTorch", stored.find(name, "torchvision's matcher, eager PyTorch (README)")),
    ]
    out.append(table(stored, lines, ours, "the whole stage on raw NCHW heads: 20 boxes an image, losses, gradients"))
    return "\n\n".join(out)


def softmax_table(stored: Stored) -> str:
    name = "softmax/dense/200000x81/float32"
    ours = stored.find(name, "fused")
    lines: list[Line] = [
        ("copy of the logits", stored.find(name, COPY)),
        ("**fused**", ours),
        ("eager PyTorch", stored.find(name, "eager PyTorch")),
        ("torch.compile of eager", stored.find(name, "torch.compile of eager")),
        ("`F.cross_entropy` (plain)", stored.find(name, "F.cross_entropy")),
    ]
    return table(stored, lines, ours, "IoU-balanced softmax cross entropy, 200,000 x 81, float32, forward + backward")


def boxes_table(stored: Stored) -> str:
    """Smooth L1 and the box functions."""
    cases = [("smooth-l1/1048576/float32", "`iou_balanced_smooth_l1_loss`, forward + backward", BOTH)]
    cases += [
        (f"{name}/200700/float32", f"`{function}`", INFERENCE)
        for name, function in (("decode", "decode_boxes"), ("encode", "encode_boxes"), ("delta-iou", "delta_iou"))
    ]
    peers = ("torchvision BoxCoder", "F.smooth_l1_loss")
    shown, out = [], []
    for name, function, phase in cases:
        ours, eager = stored.find(name, "fused", phase), stored.find(name, "reference backend", phase)
        if ours is None or eager is None:
            continue
        others = [row for row in (stored.find(name, peer, phase) for peer in peers) if row is not None]
        plain = ", ".join(f"{milliseconds(row['median_ms'])} (`{row['path']}`)" for row in others)
        shown.append(ours)
        out.append(
            f"| {function}, {int(name.split('/')[1]):,} boxes | {milliseconds(ours['median_ms'])}"
            f" | {milliseconds(eager['median_ms'])} | {eager['median_ms'] / ours['median_ms']:.1f}x | {plain} |"
        )
    if not out:
        return NOT_MEASURED
    head = ["| function | fused | eager PyTorch, the same function | less by | plain peer |", "|---|---|---|---|---|"]
    return "\n".join([caption(stored, shown, "float32, medians"), "", *head, *out])


def small_table(stored: Stored) -> str:
    out = [
        f"| {name} | {milliseconds(row['eager_wall_ms'])} |"
        for name, row in (
            ("**fused, flat**", stored.find("small/flat", "fused")),
            ("**fused, NCHW**", stored.find("small/nchw", "fused")),
            ("eager PyTorch, flat", stored.find("small/flat", "eager PyTorch (README)")),
            ("`x.sum().backward()` of four numbers", stored.find("small/flat", "x.sum().backward()")),
        )
        if row is not None
    ]
    if not out:
        return NOT_MEASURED
    head = ["99 anchors x 80 classes, forward + backward, one thread:", "", "| path | time a call |", "|---|---|"]
    return "\n".join([*head, *out])


def step_table(stored: Stored) -> str:
    """A whole training step with each of the three loss stages."""
    steps = [row for row in stored.rows if row.get("case") == "train step"]
    last = max((row["run"] for row in steps), default="")
    rows = [row for row in steps if row["run"] == last]
    if not rows:
        return NOT_MEASURED
    first, (height, width) = rows[0], rows[0]["padded_size"]
    plural = "s" if first["threads"] > 1 else ""
    where = first["device"] if stored.gpu else f"{first['device']} ({first['isa']}), {first['threads']} thread{plural}"
    out = [
        f"{where}, torch {first['torch']}, commit {first['commit']}; {first['model']}, {first['batch']} images of"
        f" {height} x {width}, {first['classes']} classes, {first['dtype']}; medians in ms.",
        "",
        "| loss stage | whole step | images/s | matching | loss | its backward | loss stage's share |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        parts = [row["segments"][name]["median_ms"] for name in ("matching", "loss", "loss backward")]
        cells = " | ".join(f"{value:.2f}" for value in (row["median_ms"], row["images_per_second"], *parts))
        out.append(f"| {row['path']}: {row['computes']} | {cells} | {100 * row['loss_stage_share']:.1f} % |")
    return "\n".join(out)


def batch_table(stored: Stored) -> str:
    """The fused loss by batch, layout and dtype: copies of the logits of the same dtype."""
    rows = []
    for batch in (1, 2, 4, 8, 16):
        for layout in ("flat", "nchw", "channels_last"):
            case = f"retinanet/b{batch}/{layout}"
            found = [stored.find(f"{case}/{dtype}", "fused") for dtype in ("float32", "bfloat16", "float16")]
            if any(found):
                cells = [f"{r['x_copy']:.2f} ({milliseconds(r['median_ms'])})" if r else "" for r in found]
                rows.append(f"| {batch} | {layout} | {' | '.join(cells)} |")
    if not rows:
        return NOT_MEASURED
    return "\n".join(["| batch | layout | float32 | bfloat16 | float16 |", "|---|---|---|---|---|", *rows])


def others_table(stored: Stored) -> str:
    """What other devices of the kind do."""
    parts = [text for other in stored.others for text in (heads_table(other), batch_table(other))]
    return "\n\n".join(text for text in parts if text != NOT_MEASURED) or NOT_MEASURED


def threads_table(stored: Stored) -> str:
    """What a second thread, and a heap that gives memory back, make of it."""
    cases = (f"{HEADS}/flat/float32", f"{HEADS}/nchw/float32", f"{HEADS}/channels_last/float32")
    rows = []
    for name in cases:
        two = stored.find(name, "fused", threads=2)
        if two is None:
            continue
        find = partial(stored.find, name, run=two["run"])  # what is divided was measured side by side
        pairs = [(find(path, threads=1), find(path, threads=2)) for path in ("fused", COPY)]
        if all(map(all, pairs)):
            scaling, floor = (one["median_ms"] / other["median_ms"] for one, other in pairs)
            rows.append(f"| {name} | {scaling:.2f} | {floor:.2f} | {scaling / floor:.2f} |")
    out = []
    if rows:
        out += ["| case | fused, 1 to 2 threads | copy, 1 to 2 threads | share |", "|---|---|---|---|", *rows]
    cold = stored.find(cases[0], "fused", heap="default")
    if cold:
        text = "With the system's default heap, which takes fresh pages for every large tensor, flat in float32"
        out += ["", f"{text}: {cold['x_copy']:.2f} copies ({milliseconds(cold['median_ms'])})."]
    return "\n".join(out) or NOT_MEASURED


def sentence(stored: Stored) -> str:
    """The headline in words."""
    name = f"{HEADS}/flat/float32"
    ours, eager = stored.find(name, "fused"), stored.find(name, "eager PyTorch (README)")
    if ours is None or eager is None:
        return NOT_MEASURED
    times = f"{ours['median_ms']:.0f} ms instead of {eager['median_ms']:.0f} ms"
    less, more = ours["extra_memory_x_logits"], eager["extra_memory_x_logits"]
    return (
        "The second line does what the first 30 do, for float32 logits of one 800 x 1333 image in"
        f" {times}\nand with {less:.2f} instead of {more:.1f} times the logits' memory (one thread; the table below)."
    )


BLOCKS: dict[str, tuple[bool, Callable[[Stored], str]]] = {  # name: (of a GPU, the text)
    "sentence": (False, sentence),
    "cpu heads": (False, heads_table),
    "cpu softmax": (False, softmax_table),
    "cpu stage": (False, stage_table),
    "cpu boxes": (False, boxes_table),
    "cpu small": (False, small_table),
    "cpu step": (False, step_table),
    "cpu batches": (False, batch_table),
    "cpu threads": (False, threads_table),
    "cpu others": (False, others_table),
    "gpu heads": (True, heads_table),
    "gpu softmax": (True, softmax_table),
    "gpu stage": (True, stage_table),
    "gpu boxes": (True, boxes_table),
    "gpu step": (True, step_table),
    "gpu batches": (True, batch_table),
}


def filled(text: str, stored: dict[bool, Stored]) -> str:
    """The text with every block it holds written anew. Raises ValueError for a block without an end or of no name."""

    def block(match: re.Match[str]) -> str:
        name = match[1]
        if name not in BLOCKS:
            raise ValueError(f"no block {name!r}; there are: {', '.join(BLOCKS)}")
        gpu, make = BLOCKS[name]
        return f"<!-- bench {name} -->\n{make(stored[gpu])}\n<!-- end of bench {name} -->"

    opened = re.findall(r"<!-- bench ([a-z ]+) -->", text)
    pattern = r"<!-- bench ([a-z ]+) -->\n.*?<!-- end of bench \1 -->"
    if len(opened) != len(re.findall(pattern, text, re.DOTALL)):
        raise ValueError(f"a block has no end: {', '.join(opened)}")
    return re.sub(pattern, block, text, flags=re.DOTALL)


def main(arguments: Sequence[str] | None = None) -> int:
    made = argparse.ArgumentParser(prog=PROGRAM, description=__doc__.split(": ", 1)[1].split("\n")[0])
    made.add_argument("--results", type=Path, help="folder of the rows (default: the package's bench/results)")
    made.add_argument("--root", type=Path, default=machine.ROOT, help="the checkout whose READMEs and docs are written")
    made.add_argument("--check", action="store_true", help="write nothing; exit status 1 if a file would change")
    options = made.parse_args(arguments)
    try:
        stored = results.by_device(options.results)
        texts = {path: path.read_text(encoding="utf-8") for path in (options.root / f for f in FILES) if path.exists()}
        new = {path: filled(text, stored) for path, text in texts.items()}
    except ValueError as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 2
    if not texts:
        print(f"{PROGRAM}: none of {', '.join(FILES)} in {options.root.name}: not a checkout?", file=sys.stderr)
        return 2
    changed = [path for path, text in texts.items() if new[path] != text]
    if options.check:
        print("\n".join(f"{path.name} would change" for path in changed) or "up to date")
        return 1 if changed else 0
    for path in changed:
        path.write_text(new[path], encoding="utf-8")
    try:
        from .plots import draw
    except ImportError as error:
        print(f"{PROGRAM}: no pictures: {error}", file=sys.stderr)
        return 1
    pictures = [picture for each in stored.values() for picture in draw(each, options.root / "docs")]
    for path in (*changed, *pictures):
        print(path.relative_to(options.root))
    return 0


if __name__ == "__main__":
    sys.exit(main())
