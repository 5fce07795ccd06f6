"""The paper's experiments at reduced scale: runs what is missing in results/, then writes tables and figures from logs.

    python reproduce.py                      tables and figures from the logs in results/, no training
    python reproduce.py --table 1            ASR: rewards and data, three seeds a row
    python reproduce.py --table 2            TTS: GRPO, DiffRO and both, three seeds a row
    python reproduce.py --table 3            TTS: the defaults, then one flag changed a row; ours, not the paper's
    python reproduce.py --figure 2           seconds a step by phase, here; on a GPU at real size too
    python reproduce.py --figure 3           four methods over 1,500 steps
    python reproduce.py --table 1 --quick    two small steps of one seed in runs/quick, to see that everything works

A row is a script and its flags; a run is a row and a seed, and leaves log.jsonl and summary.json in results/.
A run that is there already is not repeated. --jobs runs go side by side: many small processes share a GPU well. Flags
that are not known here go to every script behind its own: `--table 2 --batch 4` on a machine without a GPU.
"""
import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

# of the paper: B 16, G 8, 1,500 steps; B 8 for the long runs, which would take twice as long
TABLE2 = "--batch 16 --micro 64 --eval-every 100 --eval-samples 8 --eval-batch 200"
TABLE3 = "--eval-every 25 --eval-samples 8 --eval-batch 200"
FIGURE3 = "--steps 1500 --batch 8 --micro 64 --eval-every 100 --eval-samples 4 --eval-batch 200"
ROWS = {  # {table or figure: {name of the row: (script, flags)}}
    "table1": {
        "supervised": ("grpo_asr.py", "--supervised"),
        "GRPO, R1": ("grpo_asr.py", ""),
        "GRPO, R1,2": ("grpo_asr.py", "--rewards R1,R2"),
        "GRPO, R1,2,3": ("grpo_asr.py", "--rewards R1,R2,R3"),
        "D1, hard cases": ("grpo_asr.py", "--rewards R1,R2,R3 --data data/d1"),
        "D2, short": ("grpo_asr.py", "--rewards R1,R2,R3 --data data/d2_short"),
        "D2, long": ("grpo_asr.py", "--rewards R1,R2,R3 --data data/d2_long"),
        "D3, keywords": ("grpo_asr.py", "--rewards R1,R2,R3 --data data/d3"),
        "D0 to D3": ("grpo_asr.py", "--rewards R1,R2,R3 --data data/d0 data/d1 data/d2_short data/d2_long data/d3"),
    },
    "table2": {
        "GRPO, R1": ("grpo_tts.py", TABLE2),
        "GRPO, R1,2": ("grpo_tts.py", f"{TABLE2} --rewards R1,R2"),
        "GRPO, R1,2,3": ("grpo_tts.py", f"{TABLE2} --rewards R1,R2,R3"),
        "DiffRO": ("diffro_tts.py", TABLE2),
        "GRPO + DiffRO, R1": ("diffro_tts.py", f"{TABLE2} --method grpo+diffro --filter none"),
        "GRPO + DiffRO, R1,2": ("diffro_tts.py", f"{TABLE2} --method grpo+diffro --filter none --rewards R1,R2"),
        "GRPO + DiffRO, R1,2,3": ("diffro_tts.py", f"{TABLE2} --method grpo+diffro --filter none --rewards R1,R2,R3"),
        "+ filter, R1": ("diffro_tts.py", f"{TABLE2} --method grpo+diffro"),
        "+ filter, R1,2": ("diffro_tts.py", f"{TABLE2} --method grpo+diffro --rewards R1,R2"),
        "+ filter, R1,2,3": ("diffro_tts.py", f"{TABLE2} --method grpo+diffro --rewards R1,R2,R3"),
    },
    "table3": {
        "GRPO": ("grpo_tts.py", TABLE3),
        "DiffRO": ("diffro_tts.py", TABLE3),
        "DiffRO, B 16, G 1": ("diffro_tts.py", f"{TABLE3} --batch 16 --group 1"),
        "DiffRO, B 32, G 1": ("diffro_tts.py", f"{TABLE3} --batch 32 --group 1 --micro 32"),
        "DiffRO, tau 0.5": ("diffro_tts.py", f"{TABLE3} --tau 0.5"),
        "DiffRO, tau 2": ("diffro_tts.py", f"{TABLE3} --tau 2"),
        "DiffRO, tau 2 to 0.5": ("diffro_tts.py", f"{TABLE3} --tau 2 --tau-end 0.5"),
        "DiffRO, hard": ("diffro_tts.py", f"{TABLE3} --hard"),
        "DiffRO, beta 0.01": ("diffro_tts.py", f"{TABLE3} --beta 0.01"),
        "DiffRO, lr 1e-4": ("diffro_tts.py", f"{TABLE3} --lr 1e-4"),
        "DiffRO, lr 1e-3": ("diffro_tts.py", f"{TABLE3} --lr 1e-3"),
        "DiffRO over recordings, B 16": ("diffro_tts.py", f"{TABLE2} --teach reference"),
        "GRPO + DiffRO + filter, lambda 0.3": ("diffro_tts.py", f"{TABLE3} --method grpo+diffro --weight 0.3"),
        "GRPO + DiffRO + filter, lambda 1": ("diffro_tts.py", f"{TABLE3} --method grpo+diffro"),
        "GRPO + DiffRO + filter, lambda 3": ("diffro_tts.py", f"{TABLE3} --method grpo+diffro --weight 3"),
    },
    "figure3": {
        "GRPO": ("grpo_tts.py", FIGURE3),
        "DiffRO": ("diffro_tts.py", FIGURE3),
        "GRPO + DiffRO": ("diffro_tts.py", f"{FIGURE3} --method grpo+diffro --filter none"),
        "GRPO + DiffRO + filter": ("diffro_tts.py", f"{FIGURE3} --method grpo+diffro"),
    },
}

PAPER_B = "--batch 16 --micro 64 --eval-batch 200"
REAL_SIZE = {  # what fits under a cap: {script and length of clips or speech: [how]}
    "grpo_asr --size real --max-tokens 48": [
        "--group 12 --micro 96", "--group 12 --micro 96 --quantize 8bit",
        "--group 8 --micro 16 --gib 8 --quantize 8bit", "--group 8 --micro 16 --gib 8",
        "--group 8 --micro 8 --gib 8 --quantize 8bit", "--group 12 --micro 24 --gib 12",
        "--group 12 --micro 36 --gib 16", "--group 12 --micro 48 --gib 24"],
    "grpo_asr --size real --steps 6 --seconds 20 --max-tokens 96": [
        "--group 8 --micro 8 --gib 8 --quantize 8bit", "--group 8 --micro 4 --gib 8", "--group 12 --micro 12 --gib 12",
        "--group 12 --micro 24 --gib 16"],
    "grpo_asr --size real --steps 6 --seconds 30 --max-tokens 144": [
        "--group 8 --micro 4 --gib 8 --quantize 8bit", "--batch 4 --group 8 --micro 4 --gib 8",
        "--group 12 --micro 6 --gib 12", "--group 12 --micro 12 --gib 16", "--group 12 --micro 12 --gib 24",
        "--group 8 --micro 16 --gib 24"],
    "grpo_tts --size real --steps 6 --offload": [
        "--group 4 --micro 1 --gib 8 --quantize 8bit", "--group 4 --micro 2 --gib 8 --quantize 8bit",
        "--group 8 --micro 4 --gib 12", "--group 8 --micro 8 --gib 16", "--group 8 --micro 16 --gib 24"],
    "grpo_tts --size real --steps 6 --offload --max-seconds 12": [
        "--group 4 --micro 1 --gib 8 --quantize 8bit", "--group 8 --micro 2 --gib 12", "--group 8 --micro 4 --gib 16"],
}
MEASURED = {  # what figure 2 times with measure.py: {where: [script and flags]}
    "any": ["grpo_asr --test data/test/short", "grpo_asr --test data/test/short --quantize 8bit",
            "grpo_asr --test data/test/short --supervised", "grpo_tts", "diffro_tts", "diffro_tts --method grpo+diffro",
            "diffro_tts --teach reference"],
    "cuda": [f"grpo_tts {PAPER_B}", f"diffro_tts {PAPER_B}", f"diffro_tts --method grpo+diffro {PAPER_B}",
             *(f"{what} {how}" for what, rows in REAL_SIZE.items() for how in rows)],
}


def parse_args(argv=None):
    """What to run and where; what it does not know goes to every script."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--table", choices=["1", "2", "3"], help="run what is missing of this table")
    p.add_argument("--figure", choices=["2", "3"], help="measure figure 2 here, or run what is missing of figure 3")
    p.add_argument("--rows", nargs="+", metavar="NAME", help="only these rows of it")
    p.add_argument("--seeds", type=int, nargs="+", help="(default: 1 2 3 for a table, 1 for a figure)")
    p.add_argument("--jobs", type=int, default=1, help="runs side by side (default: 1; 8 to 12 on a large GPU)")
    p.add_argument("--quick", action="store_true", help="two small steps of one seed, in runs/quick")
    p.add_argument("--results", default="results", metavar="DIR", help="(default: results)")
    args, args.flags = p.parse_known_args(argv)   # what is left goes to every script: --device cpu, --quantize 8bit
    args.what = f"table{args.table}" if args.table else f"figure{args.figure}" if args.figure else None
    if args.what == "figure2" and (args.rows or args.seeds or args.quick):
        p.error("--figure 2 takes neither --rows nor --seeds nor --quick")
    if unknown := set(args.rows or ()) - set(ROWS.get(args.what, ())):
        p.error(f"no such row: {', '.join(unknown)}; one of {', '.join(map(repr, ROWS.get(args.what, ())))}")
    if args.flags and not args.what:
        p.error(f"{' '.join(args.flags)}: flags for the scripts need --table or --figure")
    args.seeds = args.seeds or ([1] if args.figure or args.quick else [1, 2, 3])
    args.results = "runs/quick" if args.quick else args.results
    return args


ASR_COLUMNS = [("short", "wer"), ("short", "insertions"), ("long", "wer"), ("long", "insertions"), ("keywords", "wer"),
               ("keywords", "keyword_f1"), ("source", "wer"), ("noise", "hallucination_rate")]
ASR_TITLES = {"wer": "WER", "insertions": "ins", "keyword_f1": "F1", "hallucination_rate": "invented"}
TTS_COLUMNS = {"wer": ("WER, %", 100), "similarity": ("SS", 1), "length_ratio": ("length", 1),
               "f0_spread": ("F0 spread", 1), "truncated": ("never stopped, %", 100)}
PHASES = ("encode", "rollout", "decode", "reward", "update")
DIGITS = {"SS": 3, "length": 3, "F0 spread": 2}                  # behind the point; 1 in all other columns
SHOWN = {"table1": ["short WER", "long WER", "long ins", "keywords F1", "noise invented"],
         **dict.fromkeys(("table2", "table3"), ["WER, %", "SS", "length", "F0 spread"])}      # columns that are drawn


def folder_of(results, what, name, seed):
    """results/table1/grpo-r1-seed1"""
    return Path(results) / what / f"{re.sub('[^a-z0-9]+', '-', name.lower()).strip('-')}-seed{seed}"


def small_tests(folder):
    """Flags of --quick: two clips of every test set of chapter 1, three sentences of chapter 2's; {script: flags}."""
    for source in sorted(Path("data/test").iterdir()):
        lines = (source / "metadata.jsonl").read_text().splitlines()[:2]
        (folder / source.name / "audio").mkdir(parents=True, exist_ok=True)
        (folder / source.name / "metadata.jsonl").write_text("\n".join(lines) + "\n")
        for line in lines:
            shutil.copy(source / json.loads(line)["file_name"], folder / source.name / "audio")
    lines = Path("data/tts/test/metadata.jsonl").read_text().splitlines()[:3]
    (folder / "texts.txt").write_text("".join(json.loads(line)["text"] + "\n" for line in lines))
    sets = [str(p) for p in sorted(folder.iterdir()) if p.is_dir()]
    speech = ["--test", f"{folder}/texts.txt", "--eval-samples", "1"]
    return {"grpo_asr.py": ["--test", *sets], "grpo_tts.py": speech, "diffro_tts.py": speech}


def run_missing(args):
    """Runs every (row, seed) whose summary is missing, `jobs` at a time; SystemExit names those that failed."""
    rows = {name: row for name, row in ROWS[args.what].items() if not args.rows or name in args.rows}
    todo = [(folder_of(args.results, args.what, name, seed), *row, seed)
            for seed in args.seeds for name, row in rows.items()]
    todo = [job for job in todo if not (job[0] / "summary.json").exists()]
    running, failed, cores = {}, [], os.cpu_count()
    environment = {"OMP_NUM_THREADS": str(max(1, cores // min(args.jobs, cores))), **os.environ}   # a set one stays
    more = {}
    if args.quick:
        more = {script: ["--steps", "2", "--batch", "2", "--group", "2", "--micro", "2", *tests]
                for script, tests in small_tests(Path("runs/quick-tests")).items()}
    print(f"{len(todo)} runs, {args.jobs} at a time", flush=True)
    while todo or running:
        while todo and len(running) < args.jobs:
            folder, script, flags, seed = todo.pop(0)
            work = Path("runs/reproduce", re.sub(r"\W+", "-", str(folder)).strip("-"))
            shutil.rmtree(work, ignore_errors=True)
            work.parent.mkdir(parents=True, exist_ok=True)
            command = [sys.executable, script, *flags.split(), "--seed", str(seed), "--out", str(work),
                       *more.get(script, []), *args.flags]
            output = open(work.parent / f"{work.name}.txt", "w")
            running[subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)] = folder, work
        for process in [p for p in running if p.poll() is not None]:
            folder, work = running.pop(process)
            if process.returncode or not (work / "summary.json").exists():
                failed.append(f"{work.parent / work.name}.txt")
                continue
            folder.mkdir(parents=True, exist_ok=True)
            for name in ("log.jsonl", "summary.json"):
                shutil.copy(work / name, folder / name)
            print(f"{folder}: {json.loads((folder / 'summary.json').read_text())['seconds']:.0f} s", flush=True)
        time.sleep(1)
    if failed:
        sys.exit(f"error: {len(failed)} runs failed; their last words are in {', '.join(failed)}")


def measure_all(args):
    """Figure 2: every line of MEASURED that this machine can run, one at a time; SystemExit names those that failed."""
    import torch

    failed = []
    for line in MEASURED["any"] + MEASURED["cuda"] * torch.cuda.is_available():
        print(line, flush=True)
        command = [sys.executable, "measure.py", *line.split(), *args.flags, "--log", f"{args.results}/figure2.jsonl"]
        if subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
            failed.append(line)
    if failed:
        sys.exit(f"error: {len(failed)} measurements failed: {'; '.join(failed)}")


def phase_rows(results):
    """Figure 2 as {what ran and where: its line of figure2.jsonl}; the last of several counts."""
    def label(row):
        flags = re.sub(r"--(test|max-tokens|eval-batch) \S+ ?", "", row["flags"]).strip()
        cap = f"under {row['gib']:g} GiB" if row["gib"] else ""
        device = re.sub(r"cpu, (\d+) threads", r"\1 CPU cores", row["device"]).removeprefix("NVIDIA ").split(" 80GB")[0]
        return " ".join(filter(None, [row["script"], row["size"], flags, cap, f"on {device}"]))

    rows = [json.loads(line) for line in (Path(results) / "figure2.jsonl").read_text().splitlines()]
    rows.sort(key=lambda row: (row["size"], row["script"], row["device"], row["gib"] or 0))
    return {label(row): row for row in rows if "seconds" in row}


def phase_table(rows):
    """Figure 2 as Markdown: seconds by phase, their sum, peak GiB."""
    phases = sorted({phase for row in rows.values() for phase in row["seconds"]}, key=PHASES.index)
    lines = [["", *phases, "s a step", "peak GiB"], ["---"] * (3 + len(phases))]
    for name, row in rows.items():
        seconds = [row["seconds"].get(phase) for phase in phases]
        lines.append([name, *("" if s is None else f"{s:.2f}" for s in seconds), f"{sum(filter(None, seconds)):.2f}",
                      f"{row['peak_gib']:.1f}"])
    return as_table(lines)


def as_table(lines):
    """Lists of cells as a Markdown table; the second of them is the rule below the head."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def found(results, what):
    """{row: [folders of its runs]}, of those that are there."""
    every = {name: sorted(Path(results, what).glob(folder_of("", what, name, "*").name)) for name in ROWS[what]}
    return {name: folders for name, folders in every.items() if folders}


def mean_and_range(values, digits):
    """"12.3 (11.8 to 13.0)": the mean, and lowest and highest where they differ."""
    mean, low, high = (f"{v:.{digits}f}" for v in (sum(values) / len(values), min(values), max(values)))
    return mean if low == high else f"{mean} ({low} to {high})"


def asr_rows(results, what="table1"):
    """Table 1 as {row: {column: [its value for every seed]}}: the best adapter by `short`, greedily; % throughout. No
    RL, as each run saw it: one model, but for rounding."""
    runs = {name: [json.loads((f / "summary.json").read_text())["test"] for f in folders]
            for name, folders in found(results, what).items()}
    tests = {"no RL": [{s: t["before"] for s, t in test.items()} for each in runs.values() for test in each],
             **{name: [{s: t["after"] for s, t in test.items()} for test in each] for name, each in runs.items()}}
    return {name: {f"{s} {ASR_TITLES[c]}": [100 * t[s][c] for t in each] for s, c in ASR_COLUMNS}
            for name, each in tests.items()}


def tts_rows(results, what="table2"):
    """Tables 2 and 3 in the same form: sampled at temperature 1 after the last step; no RL, as each run saw it before
    its first."""
    runs = {name: [evaluations(f) for f in folders] for name, folders in found(results, what).items()}
    tests = {"no RL": [each[0] for rows in runs.values() for each in rows],
             **{name: [each[-1] for each in rows] for name, rows in runs.items()}}
    return {name: {title: [scale * t[key] for t in each] for key, (title, scale) in TTS_COLUMNS.items()}
            for name, each in tests.items()}


def evaluations(folder):
    """The metrics before the first step, on the way and after the last, from the log: no best adapter is chosen."""
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()[1:]]
    return [row["eval"] for row in rows if "eval" in row]


def markdown(rows):
    """Rows as a Markdown table: the mean, and lowest and highest where there are several seeds."""
    columns = list(next(iter(rows.values())))
    lines = [["", "seeds", *columns], ["---"] * (2 + len(columns))]
    for name, row in rows.items():
        seeds = "" if name == "no RL" else str(len(row[columns[0]]))
        lines.append([name, seeds, *(mean_and_range(row[c], DIGITS.get(c, 1)) for c in columns)])
    return as_table(lines)


def write_all(results):
    """Every table and figure for which there are logs; returns their paths."""
    import plot  # draws, which takes a second to load

    written = []
    for what, rows_of in (("table1", asr_rows), ("table2", tts_rows), ("table3", tts_rows)):
        if found(results, what):
            rows, path = rows_of(results, what), Path(results) / what
            path.with_suffix(".md").write_text(markdown(rows))
            panels = {column: {name: row[column] for name, row in rows.items()} for column in SHOWN[what]}
            written += [path.with_suffix(".md"), plot.draw_rows(panels, path.with_suffix(".png"))]
    named = {folder: name for name, folders in found(results, "figure3").items() for folder in folders}
    if named:
        written.append(plot.draw(named, Path(results) / "figure3.png", named))
    if (Path(results) / "figure2.jsonl").exists():
        rows, path = phase_rows(results), Path(results) / "figure2"
        path.with_suffix(".md").write_text(phase_table(rows))
        written += [path.with_suffix(".md"), plot.draw_phases({n: r["seconds"] for n, r in rows.items()}, PHASES,
                                                              path.with_suffix(".png"))]
    return written


def refresh(page):
    """Puts the tables into a Markdown file: each between <!-- its path --> and <!-- end -->."""
    text = re.sub(r"(?<=<!-- )(results/\S+\.md) -->\n.*?(?=<!-- end -->)",
                  lambda m: f"{m[1]} -->\n{Path(m[1]).read_text()}", Path(page).read_text(), flags=re.DOTALL)
    Path(page).write_text(text)


def main(argv=None):
    args = parse_args(argv)
    if args.what == "figure2":
        measure_all(args)
    elif args.what:
        run_missing(args)
    for path in write_all(args.results):
        print(path)
    if Path(args.results).parts[0] == "results":
        for page in ("README.md", "docs/results.md"):
            refresh(page)


if __name__ == "__main__":
    main()
