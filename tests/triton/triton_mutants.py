"""Seeded faults in the Triton kernels, each of which a test must notice. Runs in a process with TRITON_INTERPRET=1.

A mutant is one replaced piece of source text, in a copy of the kernels. `python triton_mutants.py` runs all.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
KERNELS = HERE.parents[1] / "triton_kernels"

# A file and the problem of triton_mutant_cases.py that notices its mutants soonest, then pairs of lines: text,
# replacement.
LIST = """
_math.py focal
    softplus = log1pe + tl.maximum(x, 0.0)
    softplus = log1pe + tl.maximum(x, 1e-4)
    slope = m * -5.83051238e-3 + 3.29733118e-2
    slope = m * -5.83051238e-3 + 3.39733118e-2
    p = tl.where(x >= 0.0, r, other)
    p = tl.where(x >= 0.0, r, r)
    return p2 * softplus, p2 * (r * softplus + p)
    return p2 * softplus, p2 * (softplus + p)
    p2 * ((capped - p * capped) * 2.0 + p)
    p2 * ((capped - p * capped) + p)
    return p * softplus, p * (p + (capped - p * capped))
    return p * softplus, p * (p + capped)
    one_minus_p = tl.where(x >= 0.0, other, r)
    one_minus_p = tl.where(x >= 0.0, r, other)
    modulator * softplus, -modulator * (p + gamma * tail)
    modulator * softplus, -modulator * p
    tl.where(exponent == 0.0, 1.0, tl.exp2
    tl.where(exponent == 9.0, 1.0, tl.exp2
    clamp(iou, 0.0, 1.0)
    clamp(iou, 0.0, 0.9)
    d = weighted + eps
    d = weighted
_math.py dense
    return words.to(tl.int16).to(T, bitcast=True)
    return (words >> 16).to(tl.int16).to(T, bitcast=True)
    return (words << 16).to(tl.float32, bitcast=True)
    return words.to(tl.float32, bitcast=True)
    words = tl.maximum(words, words << 16)
    words = words
_math.py smooth_l1
    size - 0.5 * beta
    size - beta
    tl.where(inner, d / safe, sign)
    tl.where(inner, d, sign)
_math.py boxes
    x - half_w, y - half_h, x + half_w, y + half_h
    x - half_w, y - half_h, x + half_w, y + half_w
    return x - left, y - top, x + right
    return x - left, y - top, x + left
_math.py detection
    w2 * tl.log((b2 - b0) / width)
    w2 * tl.log((b2 - b0) / height)
    weight * tl.log(clamp((reach + 0.5 * size)
    weight * tl.log(clamp((reach + size)
    united = p2 * p3 + t2 * t3 - inter
    united = p2 * p3 + t2 * t3
    (t0 + t2) * (t1 + t3) - inter
    (t0 + t2) * (t1 + t3)
    tl.where(narrow < reach, narrow, reach)
    narrow
_math.py boxes
    united = area_a + area_b - inter
    united = area_a + area_b
    (low + high) * size / w0
    (low - high) * size / w0
_math.py detection
    return (b2 - b0 <= 0.0) | (b3 - b1 <= 0.0)
    return (b2 - b0 < 0.0) | (b3 - b1 < 0.0)
_math.py matching
    rounded_product(b2 - b0, b3 - b1)
    rounded_product(b2 - b0, b3 - b0)
    union = box_area + anchor_area - overlap
    union = box_area + (anchor_area - overlap)
    tl.where(overlap == 0.0, rounded_product(overlap, quotient), quotient)
    tl.where(overlap == 0.0, overlap, quotient)
    ((iou <= best) == 0) & (is_nan(best) == 0)
    ((iou <= best) == 0)
    ((iou <= best) == 0) & (is_nan(best) == 0)
    (iou > best)
    ((iou <= best) == 0) & (is_nan(best) == 0)
    (iou >= best)
    tl.where(iou < low, UNMATCHED
    tl.where(iou <= low, UNMATCHED
    tl.where(iou < high, BETWEEN
    tl.where(iou <= high, BETWEEN
_math.py fovea
    (area >= smallest_squared) & (area <= largest_squared)
    (area >= smallest_squared) & (area < largest_squared)
    first = tl.ceil(low + rounded_product(from_, half) - 0.5)
    first = tl.ceil(low + rounded_product(to, half) - 0.5)
    return area <= current_area
    return area < current_area
_launch.py focal
    while value % width:
    while False:
coefficients.py detection
    tl.cast(piece - pick(zeros[2], which), tl.int64) * ZERO_WORDS
    tl.cast(piece - pick(zeros[2], which), tl.int64) * 4
    mask=at < left
    mask=at <= left
coefficients.py focal
    first, step, count = scope * images, 1, images
    first, step, count = scope, 1, images
    first, step, count = scope, images, levels
    first, step, count = scope, 1, levels
    tl.where(count > 1.0, count, 1.0)
    count
    loc = loc_norm * w_loc /
    loc = w_loc /
    first, count = pick(tile0, level) + (s - level * images)
    first, count = pick(tile0, level) + (s - images)
    return tl.load(tensor + image, mask=mask
    return tl.load(tensor + 0 * image, mask=mask
positives.py focal
    order = tl.cumsum(positive.to(tl.int32), 0) - 1
    order = tl.cumsum(positive.to(tl.int32), 0)
detection_kernels.py detection
    tl.where(value == -2, IGNORED, PLAIN)
    tl.where(value == -3, IGNORED, PLAIN)
    tl.where(planes != 0, a * locations + cell, row)
    row
    return 3 * positives <= 2 * anchors
    return True
    order = count + tl.cumsum
    order = 1 + count + tl.cumsum
    count += tl.sum(positive.to(tl.int32), 0)
    count = tl.sum(positive.to(tl.int32), 0)
    tl.load(list_end - item, mask=mask & listed, other=0).to(tl.int32), item)
    tl.load(list_end - 0 * item, mask=mask & listed, other=0).to(tl.int32), item)
    mask = mask & (match != -1) & (match != -2)
    mask = mask & (match != -1)
    (a * CLASSES + label).to(tl.int64) * locations + cell
    (a * CLASSES + label).to(tl.int64) * locations
    iou = tl.where(degenerate, 0.0, iou)
    iou = tl.where(degenerate, 0.5, iou)
    some = found & (degenerate == 0)
    some = found & True
    w0, w1, w2, w3, FOVEA), lambda_)
    w0, w1, w2, w3, FOVEA), 1.0)
    tl.where(some, s3.to
    tl.where(some, s2.to
    tl.where(listed, item, at), mask=found
    tl.where(listed, at, at), mask=found
    (location // width).to(tl.int64) * pick(strides[2]
    (location % width).to(tl.int64) * pick(strides[2]
    boxes = pointer(gt.boxes[0], BOX_T) + 4 * tl.cast(image
    boxes = pointer(gt.boxes[0], BOX_T) + 3 * tl.cast(image
    (a * CLASSES + seen).to(tl.int64) * locations + location
    (a * CLASSES + seen).to(tl.int64) * locations
    position.to(tl.int64) * CLASSES + seen
    position.to(tl.int64) * CLASSES
    loc_due = loc_wanted != there
    loc_due = cls_wanted != there
focal_dense.py dense
    short = is_usual(factor) & (entry >= 0) & (entry <= size - REACH)
    short = is_usual(factor) & (entry <= size - REACH)
    short = is_usual(factor) & (entry >= 0) & (entry <= size - REACH)
    short = is_usual(factor) & (entry >= 0)
    row <= (entry + count - 1) // K
    row <= entry // K
    return (seen == e - row * K) | (seen == IGNORED)
    return seen == e - row * K
    return (seen == e - row * K) | (seen == IGNORED)
    return seen == IGNORED
    off = (seen == e - row * K) | (seen == IGNORED)
    off = seen == e - row * K
    off = (seen == e - row * K) | (seen == IGNORED)
    off = seen == IGNORED
    words = group[u]
    words = group[0]
    twice += tl.sum(loss, 1)  # along
    twice = tl.sum(loss, 1)  # along
    loss, slope = focal_below(x, gamma, GAMMA)
    loss, slope = focal_negative(x, gamma, GAMMA)
    e += 1
    e += 0
    tl.where(first, 0xFFFF, 0) | tl.where(second, -0x10000, 0)
    tl.where(second, 0xFFFF, 0) | tl.where(first, -0x10000, 0)
    x += REACH
    x += STEP
    window = local - chunk * windows
    window = 0 * local
    periods = tl.minimum(K // classes - period, loop)
    periods = loop
    inside = (vector < end)[:, None]
    inside = (vector <= end)[:, None]
    over = location >= locations
    over = location > locations
    return plane[:, None] + over.to(tl.int32), tl.where
    return plane[:, None] + 0 * over.to(tl.int32), tl.where
    off = (own == (period + i) * classes)
    off = (own == i * classes)
    after = number_of - period
    after = number_of
    first_own = seen == of + (period + i) * classes
    first_own = seen == of + (period + i) * classes + 1
    second_own = seen == of + (period + i) * classes
    second_own = first_own
    mask_of(seen == IGNORED, second == IGNORED, T)
    mask_of(seen == IGNORED, seen == IGNORED, T)
    if wanted == number(nu.expected, expected, EXPECTED_GIVEN):
    if True:
focal_finish.py detection
    return tl.load(norm + image)
    return tl.load(norm)
    + tl.load(pointer(sc.positives_loss, tl.float32))
    + 0.0 * tl.load(pointer(sc.positives_loss, tl.float32))
focal_dense.py focal
    slope *= weight
    slope *= 1.0
focal_finish.py focal
    return slope * (positive * norm * scale)
    return slope * (positive * norm)
    tl.store(out + row * K + seen
    tl.store(out + row * K
    tile -= 1
    tile -= 0
focal_pass.py dense
    fewest = vector // math.gcd(locations, vector)
    fewest = 1
    entries = [level.rows * self.classes +
    entries = [level.rows * (self.classes - 1) +
focal.py focal
    mask = mask & (tl.load(scope_ids + at, mask=mask, other=-1).to(tl.int64) == slot)
    mask = mask & (slot == 0)
    loss_sum += tl.where(mask, positive_factor * own, 0.0)
    loss_sum += tl.where(mask, own, 0.0)
cross_entropy.py softmax
    certain = others <= own
    certain = own > 0.5
    positive = counted & (label != background)
    positive = counted
    value = tl.where(hit, -others[:, None]
    value = tl.where(hit, -own[:, None]
    mask = inside[:, None] & (k < K // VECTOR * VECTOR)[None, :]
    mask = inside[:, None] & (k <= K)[None, :]
    if (slot >= low) & (slot <= high):
    if (slot > low) & (slot <= high):
    tl.where(positive, scope, -1)
    tl.where(positive, scope - 1, -1)
smooth_l1.py smooth_l1
    factor *= w_loc * tl.load(grad_rows
    factor *= tl.load(grad_rows
    overlap = tl.load(iou + row
    overlap = 0.9 * tl.load(iou + row
matching_boxes.py matching
    valid = inside & (is_padding(b0, b1, b2, b3) == 0)
    valid = inside
    != NO_LABEL)
    != 7)
matching.py matching
    tl.store(pointer(sc.index, tl.int32) + start + order, at
    tl.store(pointer(sc.index, tl.int32) + start + order, order
    regular = is_regular_anchor(a0, a1, a2, a3) | (inside == 0)
    regular = inside == inside
    (apart & is_regular_box(area)) == 0
    apart == 0
    out + 2 * all_blocks, tl.where(whole, tl.max(tl.where(inside, a2
    out + 2 * all_blocks, tl.where(whole, tl.max(tl.where(inside, a0
    apart |= tl.load(corners + 2 * plane, mask=valid, other=0.0) <=
    apart |= tl.load(corners + 0 * plane, mask=valid, other=0.0) <=
    0xFFFFFFFF - anchor.to(tl.int64)
    anchor.to(tl.int64)
    first_row = tl.min(
    first_row = tl.max(
    tl.where(is_nan(iou), 0x7FC00000, iou.to
    tl.where(is_nan(iou), 0, iou.to
    order = tl.where(inside, ordered(iou), -1)
    order = ordered(iou)
    tl.atomic_max(
    tl.atomic_min(
    matched = tl.where(count > 0, matched_index
    matched = tl.where(count >= 0, matched_index
    nothing = valid & (iou_of(key, KEPT) == 0.0)
    nothing = valid & (iou_of(key, KEPT) == -1.0)
    wanted |= valid & (anchor_of(key) // BLOCK == local)
    wanted |= valid & (anchor_of(key) // BLOCK == 0)
    forced = tl.where(row == anchor_of(largest), place, forced)
    forced = tl.where((row == anchor_of(largest)) & (forced < 0), place, forced)
    restored |= (iou == iou_of(largest, KEPT)).to(tl.int32)
    restored |= (iou >= 0.5 * iou_of(largest, KEPT)).to(tl.int32)
    tl.load(box_index, mask=count > 0, other=UNMATCHED)
    tl.zeros((), tl.int32)
matching_fovea.py fovea
    (top <= last_row)
    (top < last_row)
    (bottom >= first_row)
    (bottom > first_row)
    (column <= right_)
    (column < right_)
    pick(lv.first, level) + cell
    cell
rescale.py focal
    value == 0.0, value, value * factor
    value == 0.0, value, value / factor
"""


class Mutant(NamedTuple):
    file: str
    first: str  # the problem that it meets first
    text: str
    replacement: str


def parse(text: str) -> tuple[Mutant, ...]:
    found, file, first, pending = [], "", "", None
    for line in text.strip().splitlines():
        if not line.startswith(" "):
            file, first = line.split()
        elif pending is None:
            pending = line.strip()
        else:
            found.append(Mutant(file, first, pending, line.strip()))
            pending = None
    return tuple(found)


MUTANTS = parse(LIST)


def changed(folder: Path, mutant: Mutant) -> Path:
    """A copy of the kernels with the mutant in it."""
    copy = folder / "triton_kernels"
    shutil.copytree(KERNELS, copy, ignore=shutil.ignore_patterns("__pycache__"))
    source = (copy / mutant.file).read_text(encoding="utf-8")
    if mutant.text not in source:
        raise LookupError(f"{mutant.file} no longer contains {mutant.text!r}")
    (copy / mutant.file).write_text(source.replace(mutant.text, mutant.replacement, 1), encoding="utf-8")
    return copy


def _alive(mutants: Sequence[Mutant | None]) -> list[bool]:
    """Whether the problems of triton_mutant_cases.py pass with each mutant; None: with the kernels as they are."""
    with tempfile.TemporaryDirectory() as folder:
        lines = []
        for number, mutant in enumerate(mutants):
            copy = KERNELS if mutant is None else changed(Path(folder, str(number)), mutant)
            lines.append(f"{copy}\t{'' if mutant is None else mutant.first}\n")
        environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "IOUBAL_CHECK": "0"}
        command = [sys.executable, "-W", "ignore", str(HERE / "triton_mutant_cases.py")]
        done = subprocess.run(command, input="".join(lines), stdout=subprocess.PIPE, text=True, env=environment)
    answers = done.stdout.split()
    if done.returncode or len(answers) != len(mutants) or not set(answers) <= {"alive", "dead"}:
        raise RuntimeError(f"triton_mutant_cases.py ended with {done.returncode} after {len(answers)} mutants")
    return [answer == "alive" for answer in answers]


def survives(mutant: Mutant | None) -> bool:
    """Whether nothing notices the mutant."""
    return _alive([mutant])[0]


def survivors(mutants: tuple[Mutant, ...] = MUTANTS, jobs: int = 1) -> list[Mutant]:
    shares = [mutants[job::jobs] for job in range(jobs)]
    with ThreadPoolExecutor(jobs) as pool:
        found = list(pool.map(_alive, shares))
    return [m for share, alive in zip(shares, found, strict=True) for m, is_alive in zip(share, alive) if is_alive]


if __name__ == "__main__":
    assert survives(None), "the unchanged kernels fail"
    alive = survivors(jobs=os.cpu_count() or 1)
    print(f"{len(MUTANTS) - len(alive)} of {len(MUTANTS)} mutants killed", *alive, sep="\n")
    sys.exit(bool(alive))
