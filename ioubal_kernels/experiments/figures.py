"""The paper's figures and some of our own, from the runs of a row (a detector on a data set)."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

import ioubal_kernels as ik

from ..detection.evaluate import THRESHOLDS
from .drawing import GREY, MARKERS, Plot, colors, label, legend, panels, smooth, svg_of
from .gradients import BETA, figure_2
from .localization import EDGES
from .paper import W_LOC
from .results import values_of
from .study import ArmRuns, RowStudy, Study

LAMBDA_COLORS = dict(zip(W_LOC, ("#1F2A33", "#0072B2", "#009E73", "#D55E00", "#CC79A7"), strict=True))


def curves(arm: ArmRuns, event: str, value_of: Any) -> tuple[np.ndarray, np.ndarray]:
    """A logged quantity over the steps: steps (S,), values (runs, S). Steps that a run lacks are left out."""
    series = []
    for run in arm.runs:
        points = [(record["step"], value_of(record)) for record in run.events(event)]
        series.append({step: value for step, value in points if value is not None})
    steps = sorted(set.intersection(*(set(s) for s in series))) if series else []
    return np.array(steps), np.array([[s[step] for step in steps] for s in series])


def _draw_curve(ax: Any, steps: np.ndarray, values: np.ndarray, color: str, name: str, marker: str = "") -> None:
    """The mean over runs, and the range that they cover."""
    if not len(steps):
        return
    marker = marker or ("o" if len(steps) == 1 else None)
    ax.plot(steps, values.mean(axis=0), color=color, linewidth=1.7, marker=marker, markersize=4, label=name)
    if len(values) > 1:
        ax.fill_between(steps, values.min(axis=0), values.max(axis=0), color=color, alpha=0.12, linewidth=0)


def _number_of_seeds(row: RowStudy) -> str:
    counts = sorted({len(arm.runs) for arm in row.arms})
    return f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"


def _seeds(row: RowStudy) -> str:
    runs = _number_of_seeds(row)
    if runs == "1":
        return "One run each." if len(row.arms) > 1 else "One run."
    return f"Means of {runs} seeds; shaded, from the lowest to the highest."


def plot_losses(row: RowStudy) -> Plot:
    """Both losses over the steps, running means."""
    figure, axes = panels(2)
    palette = colors([arm.name for arm in row.arms])
    titles = {"cls": "classification loss", "loc": "localisation loss, with w_loc"}
    for ax, (key, title) in zip(axes, titles.items(), strict=True):
        for arm in row.arms:
            steps, values = curves(arm, "step", lambda record, key=key: record.get(key))
            smoothed = np.array([smooth(series) for series in values])
            _draw_curve(ax, steps, smoothed, palette[arm.name], arm.label)
        ax.set_ylim(bottom=0)
        label(ax, title, "step", "")
    legend(axes[0])
    return Plot("training_losses", "Losses while training", f"Running means. {_seeds(row)}", svg_of(figure))


def plot_ap_curves(row: RowStudy) -> Plot:
    """AP, AP50, AP75 of the averaged weights over the steps."""
    figure, axes = panels(3, height=3.2)
    palette = colors([arm.name for arm in row.arms])
    for ax, name in zip(axes, ("AP", "AP50", "AP75"), strict=True):
        for arm in row.arms:
            steps, values = curves(arm, "eval", lambda r, name=name: _percent(r["metrics"].get(name)))
            _draw_curve(ax, steps, values, palette[arm.name], arm.label, marker="o")
        ax.set_ylim(0, 1.05 * max(ax.get_ylim()[1], 0.1))  # a single evaluation's markers would lie on the frame
        ax.set_xlim(left=0)
        label(ax, name, "step", "%")
    legend(axes[0], loc="lower right")
    images = row.first.metrics["images"]
    caption = f"Of the evaluated weights on {images} images. {_seeds(row)}"
    return Plot("training_ap", "Average precision while training", caption, svg_of(figure))


def _percent(value: float | None) -> float | None:
    return None if value is None else 100 * value


def _measured(row: RowStudy) -> bool:
    """Whether there is any AP: not on images without boxes."""
    return any(run.metrics["AP"] is not None for arm in row.arms for run in arm.runs)


def plot_ap_by_threshold(row: RowStudy) -> Plot | None:
    """AP at every IoU threshold, and the difference to the first arm."""
    if not _measured(row):
        return None
    figure, (left, *rest) = _panels_with_difference(len(row.arms))
    palette = colors([arm.name for arm in row.arms])
    rows = {
        arm.name: {
            run.seed: np.array([100 * (value or 0.0) for value in run.metrics["thresholds"].values()])
            for run in arm.runs
        }
        for arm in row.arms
    }
    base = rows[row.arms[0].name]
    others = row.arms[1:]
    width = 0.042 / max(1, len(others))
    for index, arm in enumerate(row.arms):
        values = np.array(list(rows[arm.name].values()))
        style = {"color": palette[arm.name], "linewidth": 1.6, "marker": "o", "markersize": 3.5, "label": arm.label}
        left.plot(THRESHOLDS, values.mean(axis=0), **style)
        shared = [seed for seed in rows[arm.name] if seed in base]
        if index and shared:
            (right,) = rest
            paired = np.array([rows[arm.name][seed] - base[seed] for seed in shared])
            place = np.array(THRESHOLDS) + (index - 1 - (len(others) - 1) / 2) * width
            right.bar(place, paired.mean(axis=0), width=0.9 * width, color=palette[arm.name], label=arm.label)
            if len(shared) > 1:
                error = paired.std(axis=0, ddof=1) / len(shared) ** 0.5
                right.errorbar(place, paired.mean(axis=0), yerr=error, fmt="none", ecolor=GREY, elinewidth=0.8)
    left.set_ylim(bottom=0)
    label(left, "AP by IoU threshold", "IoU threshold", "%")
    legend(left)
    caption = _seeds(row)
    for right in rest:
        right.axhline(0, color=GREY, linewidth=0.8)
        low, high = right.get_ylim()
        right.set_ylim(min(low, -1), max(high, 1))
        label(right, f"difference to the {row.arms[0].label}", "IoU threshold", "points")
        caption = "One training each: differences include the noise of single runs, one or two points."
        if len(row.arms[0].runs) > 1:
            caption = "Right: mean of the paired differences, with their standard error."
    return Plot("ap_by_threshold", "Average precision by IoU threshold", caption, svg_of(figure))


def _panels_with_difference(arms: int) -> tuple[Any, list[Any]]:
    """A panel for the arms, and where there are several one for what they differ from the first by."""
    return panels(2, height=3.6) if arms > 1 else panels(1, width=6.4, height=3.6)


def plot_speed(study: Study) -> Plot | None:
    """Figure 1: time per image against AP, an arrow from the baseline to the method for each detector."""
    rows = [row for row in study.rows if row.cost and row.cost["inference_ms"]]
    if not rows:
        return None
    figure, (ax,) = panels(1, width=6.4, height=4.0)
    for index, row in enumerate(rows):
        palette = colors([arm.name for arm in row.arms])
        times = row.cost["inference_ms"]
        points = {}
        for arm in row.arms:
            values = list(values_of(arm, "AP").values())
            if arm.name in times and values:
                points[arm.name] = times[arm.name], statistics.fmean(values)
                ax.plot(
                    *points[arm.name],
                    MARKERS[index % len(MARKERS)],
                    color=palette[arm.name],
                    markersize=8,
                    label=f"{row.label}: {arm.label}" if len(rows) > 1 else arm.label,
                )
        if "both" in points and row.arms[0].name in points:
            arrow = {"arrowstyle": "->", "color": GREY, "shrinkA": 6, "shrinkB": 6}
            ax.annotate("", points["both"], points[row.arms[0].name], arrowprops=arrow)
    ax.margins(0.2)
    ax.set_xlim(0, 1.1 * ax.get_xlim()[1])  # from elsewhere on, the noise of a clock would look like a difference
    label(ax, "", "ms per image", "AP, %")
    legend(ax, fontsize=8, loc="best")
    device = rows[0].cost["device"]
    caption = (
        f"Median time of network, post-processing and NMS for one prepared image ({device}, threads: "
        f"{rows[0].cost['threads']}); the models took turns. Only the training loss differs: what differs in time is "
        "noise, and the number of candidates that NMS gets."
    )
    return Plot("figure_1_speed", "Figure 1: time per image against AP", caption, svg_of(figure))


def plot_gradient_norms(targets: Tensor | None) -> Plot:
    """Figure 2: Eq. 13 and 14 as lines; where targets are given, the same measured through the kernels as points."""
    figure, axes = panels(2, height=3.8)
    measured = figure_2(targets) if targets is not None and len(targets) else {}
    d = torch.linspace(0, 1, 401, dtype=torch.float64)
    for ax, kind in zip(axes, ik.analysis.KINDS, strict=True):
        for lambda_, w_loc in W_LOC.items():
            color = LAMBDA_COLORS[lambda_]
            bound = ik.analysis.gradient_norm(d, kind, lambda_, w_loc, BETA)
            ax.plot(d, bound, color=color, linewidth=1.5, label=f"$\\lambda$ = {lambda_:g}, $w_{{loc}}$ = {w_loc:g}")
            if measured:
                own = measured[kind][lambda_]
                ax.plot(own.d[::2], own.median[::2], "o", color=color, markersize=3.2)
                ax.fill_between(own.d, own.low, own.high, color=color, alpha=0.10, linewidth=0)
        title = {"center": "centre: $d_{cx}$, $d_{cy}$", "size": "size: $d_w$, $d_h$"}[kind]
        label(ax, title, "|d|", "gradient norm")
        ax.set_xlim(0, 1)
        ax.set_ylim(bottom=0)
    legend(axes[1], fontsize=8)
    caption = f"Lines: Eq. 13 and 14, an anchor as large as its box, smooth L1 threshold {BETA}, Table 3's w_loc."
    if targets is not None and not measured:
        caption += " No points: the first batches of the training images have no positives."
    if measured:
        caption += (
            f" Points: median over {len(targets)} positives of the training images, as autograd gives the gradient of "
            "the fused loss; shaded, their 10 to 90 % range: boxes are wider or narrower than their anchors."
        )
    return Plot("figure_2_gradient_norms", "Figure 2: gradient norm of the localisation loss", caption, svg_of(figure))


def plot_score_by_iou(row: RowStudy) -> Plot | None:
    """Figure 3a: mean score of detections in bins of their IoU."""
    return _localization_plot(
        row,
        key="score_by_iou",
        x=[(a + b) / 2 for a, b in zip(EDGES, EDGES[1:])],
        name="figure_3a_score_by_iou",
        heading="Figure 3a: score by localisation",
        titles=("mean score of detections", "difference to the {}"),
        x_label="IoU with the best box of the class",
        caption="Detections after NMS with IoU from 0.5 on, in bins of 0.05.",
    )


def plot_share_above(row: RowStudy) -> Plot | None:
    """Figure 3b: share of detections above each IoU."""
    return _localization_plot(
        row,
        key="share_above",
        x=list(EDGES[:-1]),
        name="figure_3b_share_above",
        heading="Figure 3b: share of detections above each IoU",
        titles=("share of detections", "difference to the {}"),
        x_label="IoU threshold",
        caption="Of the detections after NMS whose IoU with the best box of their class is at least 0.5.",
    )


def _localization_plot(
    row: RowStudy,
    *,
    key: str,
    x: Sequence[float],
    name: str,
    heading: str,
    titles: tuple[str, str],
    x_label: str,
    caption: str,
) -> Plot | None:
    found = {arm.name: _localization_values(row, arm, key) for arm in row.arms}
    shown = [arm for arm in row.arms if found[arm.name]]
    if not shown or not _measured(row):
        return None
    figure, (left, *rest) = _panels_with_difference(len(shown))
    palette = colors([arm.name for arm in row.arms])
    base = found[shown[0].name]
    for arm in shown:
        style = {"color": palette[arm.name], "linewidth": 1.6, "marker": "o", "markersize": 3.5, "label": arm.label}
        left.plot(x, _mean_of_present(list(found[arm.name].values())), **style)
        paired = [own - base[seed] for seed, own in found[arm.name].items() if seed in base]
        if arm is not shown[0] and paired:
            rest[0].plot(x, _mean_of_present(paired), **style)
    left.set_ylim(bottom=0)
    label(left, titles[0], x_label, "%")
    for right in rest:
        right.axhline(0, color=GREY, linewidth=0.8)
        label(right, titles[1].format(shown[0].label), x_label, "points")
    legend(left)
    return Plot(name, heading, f"{caption} {_means_of(row)}", svg_of(figure))


def _localization_values(row: RowStudy, arm: ArmRuns, key: str) -> dict[int, np.ndarray]:
    """One of Figure 3's curves in per cent by seed; NaN where there is none of it."""
    found = row.localizations[arm.name]
    return {
        seed: np.array([np.nan if v is None else 100 * v for v in getattr(item, key)]) for seed, item in found.items()
    }


def _mean_of_present(values: Sequence[np.ndarray]) -> np.ndarray:
    """By place, over those that are no NaN; NaN where all are."""
    return np.ma.masked_invalid(values).mean(axis=0).filled(np.nan)


def _means_of(row: RowStudy) -> str:
    if _number_of_seeds(row) == "1":
        return _seeds(row)
    means = f"Means over {_number_of_seeds(row)} seeds"
    return f"{means}; differences are paired by seed." if len(row.arms) > 1 else f"{means}."


def plot_weight(study: Study) -> Plot:
    """The weight w_loc * iou^lambda against the IoU: Table 3's, and this study's own w_loc."""
    figure, (ax,) = panels(1, width=6.4, height=3.8)
    iou = np.linspace(0, 1, 201)
    for lambda_, w_loc in W_LOC.items():
        name = f"Table 3: $\\lambda$ = {lambda_:g}, $w_{{loc}}$ = {w_loc:g}"
        ax.plot(iou, w_loc * iou**lambda_, color=LAMBDA_COLORS[lambda_], linewidth=1.5, label=name)
    own: dict[tuple[float, str], list[float]] = {}
    for row in study.rows:
        for arm in row.arms:
            for run in arm.runs:
                if run.config.loss.lambda_ and run.config.loss.w_loc == "auto" and run.end.get("w_loc"):
                    own.setdefault((run.config.loss.lambda_, row.label), []).append(run.end["w_loc"])
    for (lambda_, row_label), values in sorted(own.items()):
        w_loc = statistics.fmean(values)
        name = f"{row_label}, calibrated: $\\lambda$ = {lambda_:g}, $w_{{loc}}$ = {w_loc:.3f}"
        ax.plot(
            iou, w_loc * iou**lambda_, color=LAMBDA_COLORS.get(lambda_, GREY), linewidth=1.3, linestyle="--", label=name
        )
    ax.set_ylim(bottom=0)
    ax.set_xlim(0, 1)
    label(ax, "", "IoU of the decoded box with its ground truth", r"$w_{loc} \cdot iou^{\lambda}$")
    legend(ax, fontsize=8)
    caption = "Above 1 a positive counts more than in plain smooth L1, below 1 less."
    return Plot("loc_weight", "The weight of the localisation loss", caption, svg_of(figure))


def plot_normalizers(row: RowStudy) -> Plot | None:
    """What Eq. 4 and 7 multiply the weights by, over training."""
    if not any("cls_normalizer" in record for arm in row.arms for run in arm.runs for record in run.events("step")):
        return None
    figure, axes = panels(2)
    palette = colors([arm.name for arm in row.arms])
    titles = {"cls_normalizer": "Eq. 4, classification", "loc_normalizer": "Eq. 7, localisation"}
    for ax, (key, title) in zip(axes, titles.items(), strict=True):
        for arm in row.arms:
            _draw_curve(ax, *curves(arm, "step", lambda record, key=key: record.get(key)), palette[arm.name], arm.label)
        ax.set_ylim(bottom=1)
        ax.set_xlim(left=0)
        label(ax, title, "step", "normaliser")
    legend(axes[0])
    caption = (
        "Positives' plain loss over their loss weighted by iou^eta (left), iou^lambda (right); where an arm has no "
        "exponent, with 1.5. As boxes get better it falls towards 1: a constant w_loc ends as a larger loss than "
        f"Eq. 7. {_seeds(row)}"
    )
    return Plot("normalizers", "The normaliser over training", caption, svg_of(figure))


def plot_rank_correlation(row: RowStudy) -> Plot | None:
    """Spearman's correlation of score and IoU, a point for each seed."""
    found = {
        arm.name: [
            item.rank_correlation for item in row.localizations[arm.name].values() if item.rank_correlation is not None
        ]
        for arm in row.arms
    }
    shown = [arm for arm in row.arms if found[arm.name]]
    if not shown:
        return None
    figure, (ax,) = panels(1, width=6.4, height=0.9 + 0.42 * len(shown))
    palette = colors([arm.name for arm in row.arms])
    for place, arm in enumerate(reversed(shown)):
        values = found[arm.name]
        ax.plot(values, [place] * len(values), "o", color=palette[arm.name], alpha=0.55, markersize=6)
        ax.plot([statistics.fmean(values)] * 2, [place - 0.28, place + 0.28], color=palette[arm.name], linewidth=2.2)
    low, high = ax.get_xlim()
    ax.set_xlim(min(low, (low + high) / 2 - 0.05), max(high, (low + high) / 2 + 0.05))  # of one run it would be 0 wide
    ax.set_yticks(range(len(shown)), [arm.label for arm in reversed(shown)])
    ax.set_ylim(-0.6, len(shown) - 0.4)
    ax.grid(axis="x", color="#E3E7EA", linewidth=0.8)
    ax.grid(axis="y", visible=False)
    label(ax, "", "Spearman's rank correlation of score and IoU", "")
    caption = "Of the detections after NMS with IoU from 0.5 on. A point is a run, the bar the mean."
    return Plot("rank_correlation", "Rank correlation of score and IoU", caption, svg_of(figure))
