"""Curves of one run or of several: python plot.py runs/a runs/b ... [--out curves.png]

Reads log.jsonl alone. Runs that differ in nothing but the seed are drawn as their mean with the spread between the
lowest and the highest. Without --out the picture lies in the first run's folder as curves.png.
"""
import argparse
import json
import sys
from pathlib import Path

PANELS = {  # key of a log line: (title, unit); eval_ is of the test set, now and then
    "eval_wer": ("held-out WER", "%"), "eval_token2text_wer": ("the same, by the reward model", "%"),
    "eval_similarity": ("held-out similarity", ""), "reward": ("reward", ""), "wer": ("WER of the samples", "%"),
    "kl": ("KL to the reference", "nats a token"), "entropy": ("entropy", "nats a token"),
    "no_signal": ("groups without signal", "%"), "length_ratio": ("length ratio", ""),
    "grad_norm": ("gradient norm", ""),
}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders")
    parser.add_argument("--out", metavar="PNG", help="where to draw (default: curves.png in the first run)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    parse_args()

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np


def read_run(folder):
    """(header, rows) of a run's log.jsonl; SystemExit with one line if there is none."""
    try:
        lines = (Path(folder) / "log.jsonl").read_text().split("\n")[:-1]
        rows = [json.loads(line) for line in lines]
        spread = [row | {f"eval_{key}": value for key, value in row.get("eval", {}).items()} for row in rows[1:]]
        return rows[0]["arguments"], spread
    except (OSError, json.JSONDecodeError, KeyError, IndexError):
        sys.exit(f"error: {folder}: no readable log.jsonl of a run in it")


def label(arguments, runs):
    """What tells this run from the others: the arguments of every script among them that differ, but for seed, folders
    and what only changes the speed."""
    ours, *every = ({"method": "grpo", **a} for a in [arguments, *(a for a, _ in runs)])  # diffro_tts.py alone names it
    told = [k for k in ours if k not in ("seed", "out", "resume", "device", "micro", "eval_batch")
            and all(k in a for a in every) and len({json.dumps(a[k]) for a in every}) > 1]
    return ", ".join(f"{k} {ours[k]}" for k in told) or "run"


def smooth(values, width):
    """Running mean over `width` steps, shorter at the ends."""
    kernel = np.ones(width)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")


def draw(folders, out, names=None):
    """Draws every panel that at least one run has a figure for; returns the path. `names` {folder: name of its curve};
    without it, what tells the runs apart."""
    runs = [read_run(folder) for folder in folders]
    groups = {}
    for folder, (arguments, rows) in zip(folders, runs):
        groups.setdefault(names[folder] if names else label(arguments, runs), []).append(rows)
    panels = [key for key in PANELS if any(row.get(key) is not None for _, rows in runs for row in rows)]
    if not panels:
        sys.exit(f"error: {', '.join(map(str, folders))}: no step logged yet")
    columns = min(3 if len(panels) % 3 == 0 else 4, len(panels))
    figure, axes = plt.subplots(-(-len(panels) // columns), columns, squeeze=False, layout="constrained",
                                figsize=(3.6 * columns, 2.7 * -(-len(panels) // columns)))
    for axis, key in zip(axes.flat, panels):
        title, unit = PANELS[key]
        held_out = key.startswith("eval_")
        scale = 100 if unit == "%" else 1
        for colour, (name, members) in zip(plt.cm.tab10.colors * 9, groups.items()):
            curves = []
            for rows in members:
                at = {row["step"] + held_out: scale * row[key] for row in rows if row.get(key) is not None}
                curves.append(at)
            steps = sorted(set.intersection(*(set(c) for c in curves)))
            values = np.array([[c[s] for s in steps] for c in curves])              # (runs, steps)
            if not steps:
                continue
            if not held_out:
                axis.plot(steps, values.T, color=colour, alpha=0.15, linewidth=0.6)
                values = np.array([smooth(v, max(1, min(10, len(v)))) for v in values])
            count = f" ({len(members)} seeds)" if len(members) > 1 else ""
            axis.plot(steps, values.mean(axis=0), color=colour, linewidth=1.6, label=name + count,
                      marker="o" if held_out else None, markersize=3)
            if len(members) > 1:
                axis.fill_between(steps, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.2, linewidth=0)
        axis.set_title(title, fontsize=10)
        axis.set_ylabel(unit, fontsize=8)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3, linewidth=0.5)
        axis.spines[["top", "right"]].set_visible(False)
        if key in ("eval_wer", "eval_token2text_wer", "kl", "grad_norm", "entropy", "no_signal"):
            axis.set_ylim(bottom=0)
    for axis in axes.flat[len(panels):]:
        axis.axis("off")
    if len(groups) > 1 or len(runs) > 1:
        axes.flat[0].legend(fontsize=7, frameon=False).set_in_layout(False)        # a long label squeezes no panel
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
        axis.set_title(title, fontsize=10)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3, linewidth=0.5, axis="x")
        axis.spines[["top", "right"]].set_visible(False)
    axes.flat[0].set_yticks(range(len(names)), names)
    axes.flat[0].invert_yaxis()
    figure.savefig(out, dpi=130)
    plt.close(figure)
    return out


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
    figure.savefig(out, dpi=130)
    plt.close(figure)
    return out


def main(argv=None):
    args = parse_args(argv)
    print(draw(args.runs, args.out or Path(args.runs[0]) / "curves.png"))


if __name__ == "__main__":
    main()
