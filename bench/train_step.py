"""A whole training step of RetinaNet with three loss stages: ``ioubal bench train-step``.

Or ``python -m ioubal_kernels.bench.train_step --help``. The trainer's model, loader, optimiser and EMA, with our loss
stage, the README's eager form of it and torchvision's (another loss), in interleaved rounds on the same weights and
batches: ResNet-50 FPN at 800 x 1333 on a GPU, the tiny model on a CPU. Each round takes a whole step, which gives
images per second, and one that is divided into data, forward, matching, loss, backward and optimiser. Before anything
is timed, a stage's loss and gradients are compared with the float64 oracle: a wrong one gets no figure. Exit status 0,
1 when a stage was wrong, failed, or none fitted into memory, 2 for wrong options or without the device, 130 after
Ctrl-C, 3 when the rows could not be written.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ioubal_kernels.detection.errors import UsageError

from . import machine, memory, timing
from .gpu.arch import no_gpu_reason

if TYPE_CHECKING:
    from .train_step_case import Spec

PROGRAM = "ioubal bench train-step"
NEEDED = ("torchvision", "yaml", "PIL", "rich")  # nothing is evaluated, so no pycocotools
TINY, RESNET = "retinanet_tiny", "retinanet_r50_fpn"
MODELS = (TINY, "retinanet_r18_fpn", RESNET)
# Model -> size, batch, classes: the presets' sizes and batches, the classes of VOC and of COCO.
DEFAULTS = {TINY: ((192, 256), 8, 20)} | dict.fromkeys(MODELS[1:], ((800, 1333), 16, 80))
Row = dict[str, Any]


def parse_size(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)x(\d+)", text)
    if not found or not all(32 <= int(side) <= 8192 for side in found.groups()):
        raise argparse.ArgumentTypeError(f"expected HEIGHTxWIDTH with sides from 32 to 8192, got {text!r}")
    return int(found[1]), int(found[2])


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def worker_count(text: str) -> int | str:
    if text != "auto" and not (text.isdecimal() and int(text) <= 256):
        raise argparse.ArgumentTypeError(f"expected auto or a number from 0 to 256, got {text!r}")
    return text if text == "auto" else int(text)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=PROGRAM, description=__doc__.splitlines()[0])
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: the GPU if there is one"
    )
    parser.add_argument("--model", choices=MODELS, help=f"default {RESNET} on a GPU, {TINY} on a CPU")
    parser.add_argument("--size", type=parse_size, metavar="HxW", help="default 800x1333; tiny: 192x256")
    parser.add_argument("--batch", type=positive, help="images a step (default 16; tiny: 8)")
    parser.add_argument("--classes", type=positive, help="default 80; tiny: 20")
    parser.add_argument("--frozen", action="store_true", help="ResNets: the form that pretrained weights give")
    parser.add_argument("--amp", choices=("auto", "off", "bf16"), default="auto", help="auto: bf16 where it is native")
    parser.add_argument("--rounds", type=positive, default=15, help="interleaved rounds (default 15)")
    parser.add_argument("--threads", type=positive, help="of torch (default: torch's own choice)")
    parser.add_argument(
        "--workers", type=worker_count, default="auto", help="loader processes (default auto: the trainer's choice)"
    )
    parser.add_argument("--no-memory", action="store_true", help="leave the peak memory out")
    parser.add_argument("--save", action="store_true", help="append the rows to bench/results/<device>.jsonl")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="append them to <device>.jsonl in this folder")
    return parser


def spec_of(options: argparse.Namespace) -> Spec:
    from .train_step_case import Spec

    model = options.model or (RESNET if options.device == "cuda" else TINY)
    size, batch, classes = DEFAULTS[model]
    return Spec(
        model,
        options.size or size,
        options.batch or batch,
        options.classes or classes,
        options.device,
        options.amp,
        options.workers,
        options.frozen,
    )


def machine_facts(device: str) -> Row:
    """What the figures depend on, of either device."""
    host = machine.cpu_facts()
    facts: Row = {"format": timing.FORMAT, **host, "cpu": host["device"]}
    if device == "cuda":
        facts |= {k: v for k, v in machine.gpu_facts().items() if k not in machine.MOMENTARY}
        facts["allocator"] = machine.allocator()
        facts["tf32"] = {"cudnn": torch.backends.cudnn.allow_tf32, "matmul": torch.backends.cuda.matmul.allow_tf32}
    if importlib.util.find_spec("torchvision") is not None:
        import torchvision

        facts["torchvision"] = torchvision.__version__
    facts["gomp_spincount"] = os.environ.get("GOMP_SPINCOUNT", "default")
    if hasattr(os, "getloadavg"):
        facts["load_before"] = round(os.getloadavg()[0], 2)
    return facts


def backend_of(device: str) -> str:
    """The backend that automatic choice takes for the fused loss there."""
    from ioubal_kernels import backends

    module = backends.choose("iou_balanced_detection_loss", None, torch.device(device), False).__name__
    name = module.rsplit(".", 1)[-1]
    return {"ops": device, "with_triton": "triton"}.get(name, name)


def run(spec: Spec, rounds: int, peak: bool) -> tuple[list[Row], bool]:
    """The rows of every stage, and whether Ctrl-C came. What was measured until then is in the rows."""
    from .train_step_case import Case, make_data
    from .train_step_measure import FAILED, MEASURED, MEMORY, Result, measure
    from .train_step_stages import STAGES

    results = [Result(stage) for stage in STAGES]
    size = "x".join(str(side) for side in spec.size)
    facts: Row = {"case": "train step", "name": f"train-step/{spec.model}/{size}/b{spec.batch}"}
    began = time.monotonic()
    try:
        with tempfile.TemporaryDirectory(prefix="ioubal-train-step-") as folder:
            data = make_data(spec, folder)
            case = Case(spec, data)
            facts |= {**case.facts(), "backend": backend_of(case.device.type), "rounds_asked": rounds}
            print_case(facts)
            measure(case, results, rounds, peak)
    except KeyboardInterrupt:
        told = [r for r in results if r.state != MEASURED or r.rounds]
        complete = min((len(r.rounds) for r in results if r.state == MEASURED), default=0)
        reason = f"Ctrl-C after {time.monotonic() - began:.0f} s and {complete} of {rounds} rounds"
        return [{**facts, **r.row()} for r in told] + [{**facts, "result": "interrupted", "reason": reason}], True
    except UsageError:
        raise
    except Exception as error:  # the model or its data, before any stage
        state = MEMORY if memory.is_out_of_memory(error) else FAILED
        return [{**facts, "result": state, "reason": f"{type(error).__name__}: {error}"[:400]}], False
    return [{**facts, **result.row()} for result in results], False


def compared(rows: list[Row]) -> list[Row]:
    """The rows with what follows from the figures: images per second, the loss stage's share, ratios to ours."""
    ours = next((r for r in rows if r.get("stage") == "fused" and r["result"] == "measured"), None)
    for row in rows:
        if row["result"] != "measured":
            continue
        stage, whole = row["loss_stage"]["median_ms"], row["median_ms"]
        row["images_per_second"] = round(row["batch"] / whole * 1e3, 3)
        row["loss_stage_share"] = round(stage / whole, 4)
        row["loss_stage_share_fastest"] = round(row["loss_stage"]["min_ms"] / row["min_ms"], 4)
        row["divided_over_whole"] = round(row["divided_step"]["median_ms"] / whole, 4)
        if ours is not None:
            row["step_x_fused"] = round(whole / ours["median_ms"], 4)
            row["loss_stage_x_fused"] = round(stage / ours["loss_stage"]["median_ms"], 4)
    return rows


def print_case(facts: Row) -> None:
    height, width = facts["padded_size"]
    model = facts["model"] + (", frozen backbone" if facts["frozen"] else "")
    print(
        f"{model}, {facts['batch']} images of {height} x {width},"
        f" {facts['classes']} classes, {facts['anchors_per_image']:,} anchors and {facts['boxes_per_image']:g} boxes an"
        f" image, {facts['dtype']}, loss backend {facts['backend']}, {facts['workers']} loader processes"
    )
    print(
        f"data: {facts['data']}, {facts['load_ms_without_workers']:.1f} ms a batch without workers;"
        f" weights: {facts['weights']}",
        flush=True,
    )


def table(rows: list[Row]) -> list[str]:
    """Medians in ms, a column a stage."""
    from .train_step_measure import SEGMENTS

    shown = [row for row in rows if row["result"] == "measured"]
    lines = []
    if shown:

        def line(name: str, value: Any, form: str = "{:.2f}") -> str:
            found = [value(row) for row in shown]
            return f"{name:34s}" + "".join(f"{'-' if v is None else form.format(v):>14s}" for v in found)

        lines = [f"{'median ms':34s}" + "".join(f"{row['stage']:>14s}" for row in shown)]
        lines += [line(name, lambda r, n=name: r["segments"][n]["median_ms"]) for name in SEGMENTS]
        lines += [
            line("the divided step", lambda r: r["divided_step"]["median_ms"]),
            line("the whole step", lambda r: r["median_ms"]),
            line("  fastest", lambda r: r["min_ms"]),
            line("  80 % quantile", lambda r: r["q80_ms"]),
            line("images per second", lambda r: r.get("images_per_second")),
            line("loss stage: matching, loss, its bwd", lambda r: r["loss_stage"]["median_ms"]),
            line("  fastest", lambda r: r["loss_stage"]["min_ms"]),
            line("  share of the whole step, %", lambda r: 100 * r["loss_stage_share"]),
            line("  share of the fastest, %", lambda r: 100 * r["loss_stage_share_fastest"]),
            line("  x fused", lambda r: r.get("loss_stage_x_fused")),
            line("  saved for backward, MiB", lambda r: r["saved_mib"]),
            line("    besides the head maps", lambda r: r["saved_besides_maps_mib"]),
            line("  peak extra memory, MiB", lambda r: r.get("peak_mib")),
            line("    in units of the logits", lambda r: r.get("peak_x_logits")),
        ]
    lines += [f"{row['stage']}: {row['computes']}; parity: {row['parity']}" for row in shown]
    for row in rows:
        if row["result"] != "measured":
            name = f"{row['stage']}: " if "stage" in row else ""
            lines.append(f"{name}{row['result']}: {row['reason']}")
    return lines


def store(rows: list[Row], folder: Path | None) -> tuple[str, bool]:
    """Appends the rows to the file of their device; says so, and whether Ctrl-C came meanwhile: it tears no line."""
    from ioubal_kernels.detection.signals import StopSignal

    if folder is None:
        return "", False
    with StopSignal() as stop:
        path = timing.append_rows(machine.slug(rows[0]["device"]), rows, folder)
    return f"{PROGRAM}: {len(rows)} rows appended to {path}", stop.number is not None


def warn_of_spinning(workers: int | str) -> None:
    """OpenMP threads that spin while they wait starve the loader's processes. `ioubal` sets this before torch loads."""
    if torch.get_num_threads() > 1 and workers != 0 and not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & set(os.environ):
        print(f"{PROGRAM}: GOMP_SPINCOUNT=1000 is not set, as `ioubal` sets it: steps may be slower", file=sys.stderr)


def main(arguments: list[str] | None = None) -> int:
    """Runs the program; returns the exit status."""
    try:
        return measured(arguments)
    except UsageError as error:  # an option that the trainer refuses
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # the folder of the rows
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 3
    except KeyboardInterrupt:  # before anything was begun, or while the rows are printed
        print(f"{PROGRAM}: interrupted", file=sys.stderr)
        return 130


def measured(arguments: list[str] | None) -> int:
    parser = make_parser()
    options = parser.parse_args(arguments)
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        print(f"{PROGRAM}: not installed: {', '.join(missing)}; pip install 'ioubal_kernels[train]'", file=sys.stderr)
        return 2
    folder = options.output or (timing.RESULTS if options.save else None)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)  # rather now than after minutes of work
    reason = no_gpu_reason()
    if options.device == "auto":
        options.device = "cpu" if reason else "cuda"
    if options.device == "cuda" and reason:
        print(f"{PROGRAM}: no usable GPU here ({reason}); nothing was run", file=sys.stderr)
        asked = {
            "case": "train step",
            "name": "train-step",
            "asked_device": "cuda",
            "result": "no device",
            "reason": reason,
        }
        store([{**machine_facts("cpu"), **asked}], folder)
        return 2
    spec = spec_of(options)
    if spec.frozen and spec.model == TINY:
        parser.error(f"--frozen: {TINY} has no backbone that could be frozen; choose a ResNet by --model")
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.device == "cpu":
        warn_of_spinning(spec.workers)
    facts = machine_facts(options.device)
    shown = ("device", "isa", "threads", "heap", "gomp_spincount", "torch", "torchvision", "commit")
    print(f"{PROGRAM}: " + ", ".join(f"{k} {facts[k]}" for k in shown if k in facts), flush=True)
    rows, interrupted = run(spec, options.rounds, not options.no_memory)
    rows = [{**facts, **row} for row in compared(rows)]
    stored, again = store(rows, folder)
    print("\n".join([*table(rows), *filter(None, [stored])]))
    if interrupted or again:
        return 130
    results = [row["result"] for row in rows]
    return 1 if {"wrong", "failed"} & set(results) or "measured" not in results else 0


if __name__ == "__main__":
    sys.exit(main())
