"""Curves of one run or of several: python -m tools.plot runs/a runs/b ... [--out curves.png]

Reads log.jsonl alone; a curve of training has at most 25 points, each the mean over a few steps. Runs that differ in
nothing but the seed are drawn as their mean with the spread between the lowest and the highest. Without --out the
picture lies in the first run's folder as curves.png.
"""
import argparse
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

PANELS = {  # key of a log line: (title, unit); eval_ is of --dev, now and then
    "eval_wer": ("held-out WER", "%"), "eval_third_wer": ("the same, by the third judge", "%"),
    "eval_token2text_wer": ("the same, by the reward model", "%"),
    "eval_similarity": ("held-out similarity", ""), "reward": ("reward", ""), "wer": ("WER of the samples", "%"),
    "kl": ("KL to the reference", "nats a token"), "entropy": ("entropy", "nats a token"),
    "no_signal": ("groups without signal", "%"), "length_ratio": ("length ratio", ""),
    "grad_norm": ("gradient norm", ""),
}
FROM_ZERO = ("eval_wer", "eval_third_wer", "eval_token2text_wer", "kl", "grad_norm", "entropy", "no_signal")
POINTS = 25                                               # of a training curve, at most
SAME_RUN = ("seed", "out", "resume", "device", "micro")   # arguments that make no other curve


def parse_args(argv=None):
    """Which runs, and where to draw them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders")
    parser.add_argument("--out", metavar="PNG", help="where to draw (default: curves.png in the first run)")
    return parser.parse_args(argv)


def read_log(folder):
    """(header, rows) of a run's log.jsonl; SystemExit with one line if there is none."""
    from engine.audio import DataError  # loads torch, which --help and pictures of what is measured do without
    from engine.log import logged_header, read_rows
    try:
        return logged_header(folder), [row for row in read_rows(Path(folder) / "log.jsonl") if "step" in row]
    except DataError as error:
        sys.exit(f"error: {error}")


def curves(rows):
    """{key: {step: value}} of a log's rows: what PANELS names, and the evaluations, all of them, the first at step 0.

    Of more than POINTS steps a training curve is thinned: means over equal stretches, to 4 digits, at their middles."""
    width = -(-(1 + max((row["step"] for row in rows), default=0)) // POINTS)
    points = {}
    for row in rows:
        for key, value in (row | {f"eval_{key}": value for key, value in row.get("eval", {}).items()}).items():
            held_out = key.startswith("eval_")
            if value is not None and (held_out or key in PANELS):
                step = row["step"] + 1 if held_out else row["step"] // width * width + width // 2
                points.setdefault(key, {}).setdefault(step, []).append(value)
    return {key: {step: float(f"{sum(v) / len(v):.4g}") if len(v) > 1 else v[0] for step, v in at.items()}
            for key, at in points.items()}


def label(arguments, every):
    """What tells this run from the others: the arguments of every script among them that differ, but for SAME_RUN."""
    ours, *every = ({"method": "grpo", **a} for a in [arguments, *every])      # diffro_tts.py alone names it
    told = [k for k in ours if k not in SAME_RUN and all(k in a for a in every)
            and len({json.dumps(a[k]) for a in every}) > 1]
    return ", ".join(f"{k} {ours[k]}" for k in told) or "run"


def draw(groups, out):
    """Every panel that at least one run has a figure for; returns the path. `groups`: {name: [curves of each seed]}."""
    panels = [key for key in PANELS if any(key in run for runs in groups.values() for run in runs)]
    if not panels:
        sys.exit(f"error: {', '.join(groups)}: no step logged yet")
    columns = min(3 if len(panels) % 3 == 0 else 4, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(3.6 * columns, 2.7 * lines), squeeze=False,
                                layout="constrained")
    for axis, key in zip(axes.flat, panels):
        draw_panel(axis, key, groups)
    for axis in axes.flat[len(panels):]:
        axis.axis("off")
    if sum(map(len, groups.values())) > 1:
        axes.flat[0].legend(fontsize=7, frameon=False).set_in_layout(False)        # a long label squeezes no panel
    return save(figure, out)


def draw_panel(axis, key, groups):
    """One key of all runs: the mean of a group's seeds, and their spread."""
    title, unit = PANELS[key]
    for colour, (name, runs) in zip(plt.cm.tab10.colors * 9, groups.items()):
        points = [run.get(key, {}) for run in runs]
        steps = sorted(set.intersection(*map(set, points)))
        if not steps:
            continue
        values = (100 if unit == "%" else 1) * np.array([[p[step] for step in steps] for p in points])  # (runs, steps)
        axis.plot(steps, values.mean(axis=0), color=colour, linewidth=1.6, markersize=3,
                  marker="o" if key.startswith("eval_") else None,
                  label=f"{name} ({len(runs)} seeds)" if len(runs) > 1 else name)
        if len(runs) > 1:
            axis.fill_between(steps, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.2, linewidth=0)
    axis.set_ylabel(unit, fontsize=8)
    axis.set_xlabel("step", fontsize=8)
    axis.set_ylim(bottom=0 if key in FROM_ZERO else None)
    dress(axis, title, "both")


def dress(axis, title, grid):
    """What all panels have in common."""
    axis.set_title(title, fontsize=10)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.3, linewidth=0.5, axis=grid)
    axis.spines[["top", "right"]].set_visible(False)


def save(figure, out):
    """Writes a picture and forgets it; returns its path."""
    figure.savefig(out, dpi=130)
    plt.close(figure)
    return out


def draw_rows(panels, out):
    """A table as a picture: {title: {row: [its value for every seed]}} -> a panel a column, a dot a seed, a bar at the
    mean; returns the path."""
    names = list(next(iter(panels.values())))
    figure, axes = plt.subplots(1, len(panels), squeeze=False, sharey=True, layout="constrained",
                                figsize=(1.6 + 2.4 * len(panels), 0.7 + 0.27 * len(names)))
    for axis, (title, rows) in zip(axes.flat, panels.items()):
        for at, values in enumerate(rows.values()):
            colour = "tab:gray" if at == 0 else "tab:blue"
            axis.plot(values, [at] * len(values), "o", color=colour, alpha=0.5, markersize=5, markeredgewidth=0)
            axis.plot([np.mean(values)] * 2, [at - 0.3, at + 0.3], color=colour, linewidth=2)
        axis.axvline(np.mean(rows[names[0]]), color="tab:gray", linewidth=0.6, linestyle=":")
        dress(axis, title, "x")
    axes.flat[0].set_yticks(range(len(names)), names)
    axes.flat[0].invert_yaxis()
    return save(figure, out)


def draw_phases(rows, phases, out):
    """Seconds a step: {what ran: {phase: seconds}} -> a bar a row, made of its phases; returns the path."""
    figure, axis = plt.subplots(layout="constrained", figsize=(11, 0.8 + 0.32 * len(rows)))
    for phase, colour in zip(phases, plt.cm.tab10.colors):
        start = [sum(row.get(p, 0) for p in phases[:phases.index(phase)]) for row in rows.values()]
        axis.barh(range(len(rows)), [row.get(phase, 0) for row in rows.values()], left=start, color=colour, label=phase)
    for at, row in enumerate(rows.values()):
        axis.text(sum(row.values()), at, f" {sum(row.values()):.2f}", va="center", fontsize=8)
    axis.set_yticks(range(len(rows)), list(rows), fontsize=8)
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.set_xlabel("seconds a step", fontsize=9)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=8, frameon=False)
    return save(figure, out)


def main(argv=None):
    """One picture of the runs that were named."""
    args = parse_args(argv)
    runs = [read_log(folder) for folder in args.runs]
    groups = {}
    for header, rows in runs:
        name = label(header["arguments"], [other["arguments"] for other, _ in runs])
        groups.setdefault(name, []).append(curves(rows))
    out = args.out or Path(args.runs[0]) / "curves.png"
    try:
        print(draw(groups, out))
    except (OSError, ValueError) as error:          # of a suffix that matplotlib does not write
        sys.exit(f"error: {out}: cannot be written ({error})")


if __name__ == "__main__":
    main()
