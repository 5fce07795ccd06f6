"""The paper's experiments at reduced scale: runs what is missing in docs/runs, then draws tables and pictures from it.

    python -m tools.reproduce                      tables and pictures from docs/runs, no training
    python -m tools.reproduce --list               every row: whose it is, its script and flags
    python -m tools.reproduce --table 1            ASR: the paper's rows, rewards and data, three seeds a row
    python -m tools.reproduce --table 1-ours       ASR: rows that the paper has not: MWER, supervised, keyword lists
    python -m tools.reproduce --table 1-channel    ASR: learned on clean recordings, tested on other channels
    python -m tools.reproduce --table 2            TTS: the paper's rows, GRPO, DiffRO and both, three seeds a row
    python -m tools.reproduce --table 2-ours       TTS: rows that the paper has not: R1 by tokens, soft samples, groups
    python -m tools.reproduce --figure 2           seconds a step by phase, here; on a GPU at real size too
    python -m tools.reproduce --figure 3           four methods over 2,500 steps
    python -m tools.reproduce --table 1 --quick    two small steps of one seed into runs/quick, to see that all works

A row is a script and its flags; a run is a row and a seed. A finished run is one line of docs/runs/table1.jsonl: the
arguments that are not the script's defaults, commit, device, summary.json, and the curves of its log, those of training
thinned to 25 points, each the mean over a bin of steps. A run that has a line is not repeated; its whole log stays in
runs/reproduce, and where it was stopped it goes on from there (without its folder: anew). table1-cpu.jsonl, the same in
fp32 on two cores, is drawn alike. Tables go between <!-- table1 --> and <!-- end --> of README.md and docs/*.md,
pictures into docs/pictures; with --results DIR lines and pictures are DIR's and tables are printed. Flags that are not
known here go to every script behind its own: `--table 2 --batch 4 --results runs/mine`; with `--third-judge
openai/whisper-base` the tables of speech have that ear's figures, too.
"""
import argparse
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from multiprocessing.pool import ThreadPool
from pathlib import Path

from tools import plot

# of the paper: B 16, G 8 where GRPO is used, DiffRO alone G 1; B 8 for the long runs, which would take twice as long.
# With 3e-3 GRPO did not learn, with 1e-3 DiffRO alone made `plain` worse (a pilot of one seed each)
TABLE2 = "--batch 16 --micro 64 --steps 80 --eval-every 20 --eval-samples 4"
FAST = f"{TABLE2} --lr 1e-3"
FIGURE3 = "--steps 2500 --batch 8 --micro 64 --eval-every 250 --eval-samples 2"
BOTH = "--method grpo+diffro --group 8"
D2 = "data/d2_long"          # longer than 20 s, as in the paper
ALL = f"data/d0 data/d1 {D2} data/d3"
ASR, TTS, DIFFRO = "grpo_asr.py", "grpo_tts.py", "diffro_tts.py"

PAPER = {  # rows of the paper's tables: {table: {row: (script, flags, the paper's own figures)}}
    "table1": {  # WER / Ins / Del, short and long
        "no RL": (ASR, "", "10.25 / 2.51 / 2.25", "6.35 / 2.72 / 0.87"),
        "R1 x D0": (ASR, "", "10.17 / 2.61 / 2.04", "6.63 / 3.05 / 0.87"),
        "R1,2 x D0": (ASR, "--rewards R1,R2", "10.14 / 2.63 / 1.96", "6.54 / 3.01 / 0.84"),
        "R1,2 x D0+D2": (ASR, f"--rewards R1,R2 --data data/d0 {D2}", "10.08 / 2.60 / 2.08", "6.35 / 2.86 / 0.69"),
        "R1,2 x D1+D2": (ASR, f"--rewards R1,R2 --data data/d1 {D2}", "10.01 / 2.67 / 1.87", "6.25 / 2.69 / 0.82"),
        "R1,2,3 x all": (ASR, f"--rewards R1,R2,R3 --data {ALL}", "9.71 / 2.61 / 1.68", "6.03 / 0.86 / 0.75")},
    "table2": {  # WER / SS, Chinese and English
        "no RL": (TTS, "", "4.280 / 77.64", "6.074 / 70.87"),
        "DiffRO, R1": (DIFFRO, TABLE2, "3.418 / 77.00", "5.690 / 70.01"),
        "GRPO, R1": (TTS, FAST, "3.710 / 77.26", "5.974 / 70.26"),
        "combined, R1": (DIFFRO, f"{FAST} {BOTH} --filter none", "3.782 / 77.04", "6.239 / 70.13"),
        "+ filter, R1": (DIFFRO, f"{FAST} {BOTH}", "3.381 / 76.73", "5.401 / 69.97"),
        "+ filter, R1,2": (DIFFRO, f"{FAST} {BOTH} --rewards R1,R2", "3.330 / 77.37", "5.279 / 70.41"),
        "+ filter, R1,2,3": (DIFFRO, f"{FAST} {BOTH} --rewards R1,R2,R3", "3.414 / 77.11", "5.579 / 70.05")},
    "figure3": {
        "GRPO": (TTS, FIGURE3), "DiffRO": (DIFFRO, f"{FIGURE3} --group 1"),
        "combined": (DIFFRO, f"{FIGURE3} {BOTH} --filter none"), "+ filter": (DIFFRO, f"{FIGURE3} {BOTH}")},
}
CHANNELS = ["clean", "telephone", "opus", "babble"]
CHANNEL = f"--data build/channel/d0 --dev build/channel/dev --test build/channel/{' build/channel/'.join(CHANNELS)}"
OURS = {  # rows that the paper has not [choice]
    "table1-ours": {
        "supervised": (ASR, "--objective supervised"),
        "MWER": (ASR, "--objective mwer"),
        "supervised, then R1": (ASR, "--adapter {supervised}"),
        "R1, k3": (ASR, "--kl k3"),
        "R1, lists of 10": (ASR, "--hotwords 10"),
        "R1,3, lists of 10": (ASR, "--hotwords 10 --rewards R1,R3")},
    "table1-channel": {
        "supervised": (ASR, f"--objective supervised {CHANNEL}"),
        "R1": (ASR, CHANNEL),
        "supervised, then R1": (ASR, f"--adapter {{supervised}} {CHANNEL}")},
    "table2-ours": {
        "GRPO, R1,2": (TTS, f"{FAST} --rewards R1,R2"),
        "GRPO, R1 by tokens": (TTS, f"{FAST} --judge token2text"),
        "DiffRO, soft": (DIFFRO, f"{TABLE2} --soft"),
        "DiffRO, G 8": (DIFFRO, f"{TABLE2} --group 8"),
        "DiffRO over recordings": (DIFFRO, f"{TABLE2} --teach recording")},
}
ROWS = {what: {name: row[:2] for name, row in rows.items() if name != "no RL"} for what, rows in (PAPER | OURS).items()}

RUNS, PICTURES = Path("docs/runs"), Path("docs/pictures")
PHASES = ("encode", "rollout", "decode", "reward", "update")
ASR_COLUMNS = {  # column: (test set, metric), %; those that a run has
    **{f"{test} {short}": (test, key) for test in ("short", "long", *CHANNELS)
       for short, key in (("WER", "wer"), ("ins", "insertions"), ("del", "deletions"))},
    "keywords P": ("keywords", "keyword_precision"), "keywords R": ("keywords", "keyword_recall"),
    "keywords F1": ("keywords", "keyword_f1"), "listed, not said": ("keywords", "listed_not_said"),
    "open WER": ("open", "wer"), "source WER": ("source", "wer"), "noise invented": ("noise", "hallucination_rate")}
TTS_COLUMNS = {  # of the third judge where a run had one: --third-judge openai/whisper-base
    **{f"{test} {ear}": (test, key, 100) for test in ("plain", "hard")
       for ear, key in (("WER", "wer"), ("Whisper", "third_wer"))},
    "SS": ("plain", "similarity", 1), "length": ("plain", "length_ratio", 1), "F0 spread": ("plain", "f0_spread", 1),
    "hard loops": ("hard", "repetition", 100), "hard no end": ("hard", "truncated", 100)}
DIGITS = {"SS": 3, "length": 3, "F0 spread": 2}                  # behind the point; 1 in all other columns
DOTS = {"1": ["short WER", "long WER", "long ins", "keywords F1", "noise invented"],           # what is drawn, by table
        "2": ["plain WER", "plain Whisper", "hard WER", "hard Whisper", "SS", "length"]}
CURVES = {  # picture of curves: {what a curve is called: (where its runs are, row)}
    "asr_curves": {"GRPO, R1": ("table1", "R1 x D0")},
    "kl": {"k3 in the loss": ("table1-ours", "R1, k3"), "k2": ("table1", "R1 x D0")},
    "tts_curves": {row: ("table2", row) for row in ("GRPO, R1", "DiffRO, R1", "combined, R1")},
    "figure3": {row: ("figure3", row) for row in PAPER["figure3"]}}


def parse_args(argv=None):
    """What to run and where; what it does not know goes to every script."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--list", action="store_true", help="print the rows and stop")
    p.add_argument("--table", choices=["1", "1-ours", "1-channel", "2", "2-ours"], help="run what is missing of it")
    p.add_argument("--figure", choices=["2", "3"], help="measure 2 here, or run what is missing of 3")
    p.add_argument("--rows", nargs="+", metavar="NAME", help="only these rows of it")
    p.add_argument("--seeds", type=int, nargs="+", help="(default: 1 2 3 for a table, 1 for a figure)")
    p.add_argument("--jobs", type=int, default=1, help="runs side by side (default: 1; 8 to 12 on a large GPU)")
    p.add_argument("--quick", action="store_true", help="two small steps of one seed, into runs/quick")
    p.add_argument("--results", type=Path, default=RUNS, metavar="DIR", help="(default: %(default)s)")
    args, args.flags = p.parse_known_args(argv)   # what is left goes to every script: --device cpu, --batch 4
    args.what = f"table{args.table}" if args.table else f"figure{args.figure}" if args.figure else None
    if unknown := set(args.rows or ()) - set(ROWS.get(args.what, ())):
        p.error(f"no such row: {', '.join(unknown)}; one of {', '.join(map(repr, ROWS.get(args.what, ())))}")
    if args.flags and not args.what:
        p.error(f"{' '.join(args.flags)}: flags for the scripts need --table or --figure")
    args.seeds = args.seeds or ([1] if args.figure or args.quick else [1, 2, 3])
    args.results = Path("runs/quick") if args.quick else args.results
    return args


def read_lines(path):
    """What a JSON-lines file holds; a line that was cut off, the writer killed or the disk full, is named, not read."""
    lines = []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines() if path.exists() else [], start=1):
        try:
            lines.append(json.loads(text))
        except ValueError:
            print(f"{path}: line {number} was cut off and does not count; delete it")
    return lines


def append_line(path, line):
    """Adds a line to a JSON-lines file, below one that was cut off, not behind it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cut = path.exists() and not path.read_text(encoding="utf-8").endswith("\n")
    with open(path, "a", encoding="utf-8") as file:
        file.write("\n" * cut + json.dumps(line) + "\n")


def runs_of(results, what):
    """{row: lines of its runs, by seed} of a table or figure, those that are there; the last of several counts. A file
    without ROWS has those that stand in it."""
    lines = {(line["row"], line["seed"]): line for line in read_lines(results / f"{what}.jsonl")}
    for line in lines.values():
        line["curve"] = {key: {int(step): value for step, value in at.items()} for key, at in line["curve"].items()}
    names = ROWS.get(what) or dict.fromkeys(name for name, _ in lines)
    return {name: runs for name in names if (runs := [lines[run] for run in sorted(lines) if run[0] == name])}


def line_of(folder, name, seed, script):
    """The line of a finished run. What its script takes today only shortens it: other flags stay as they were."""
    header, rows = plot.read_log(folder)
    defaults = vars(importlib.import_module(script.removesuffix(".py")).parse_args([]))
    arguments = {key: value for key, value in header["arguments"].items()
                 if key not in ("seed", "out", "resume", "device", "third_judge")
                 and (key not in defaults or value != defaults[key])}
    if arguments.get("adapter"):
        arguments["adapter"] = "{supervised}"            # as ROWS has it: the folder is this machine's
    return {"row": name, "seed": seed, "script": script, "arguments": arguments,
            **{key: header[key] for key in ("commit", "versions", "device", "dtype")},
            "summary": json.loads((folder / "summary.json").read_text(encoding="utf-8")), "curve": plot.curves(rows)}


def send_through_channels():
    """The folders of table 1-channel that are missing: D0 and `dev`, clean, and `short` through every channel."""
    through = [(kind, kind, "test/short") for kind in CHANNELS]
    for name, kind, source in [("d0", "clean", "d0"), ("dev", "clean", "dev"), *through]:
        if not Path(f"build/channel/{name}/metadata.jsonl").exists():
            importlib.import_module("tools.channel").main([kind, f"data/{source}", "--out", f"build/channel/{name}"])


def small_tests(folder):
    """Flags of --quick, by script: two steps, and two clips or texts of every test set."""
    ours = Path("data")
    for source in [*ours.glob("test/*"), *ours.glob("tts/test/*"), ours / "dev", ours / "tts/dev"]:
        table = folder / source.relative_to("data") / "metadata.jsonl"
        table.unlink(missing_ok=True)
        for row in read_lines(source / "metadata.jsonl")[:2]:
            append_line(table, row | {"file_name": str((source / row["file_name"]).resolve())}
                        if "file_name" in row else row)
    steps = ["--steps", "2", "--batch", "2", "--group", "2", "--micro", "2"]

    def given(part):
        return ["--dev", str(part / "dev"), "--test", *map(str, sorted((part / "test").iterdir()))]

    speech = [*steps, *given(folder / "tts"), "--eval-samples", "1"]
    return {"grpo_asr.py": [*steps, *given(folder)], "grpo_tts.py": speech, "diffro_tts.py": speech}


def plain(name):
    """A name for a folder."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def run(args, small, name, seed):
    """One run to its end, from where it was stopped if it was; returns its folder and exit status."""
    script, flags = ROWS[args.what][name]
    folder = Path("runs/reproduce", f"{plain(f'{args.results} {args.what} {name}')}-seed{seed}")
    flags = flags.format(supervised=f"runs/reproduce/{plain(f'{args.results} {args.what} supervised')}-seed{seed}")
    command = [sys.executable, script, *flags.split(), "--seed", str(seed), "--out", str(folder),
               *small.get(script, []), *args.flags]
    if (folder / "state.pt").exists() and not (folder / "summary.json").exists():
        command += ["--resume", str(folder)]                 # refuses where the run that was stopped has other settings
    else:
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
    threads = {"OMP_NUM_THREADS": str(max(1, os.cpu_count() // args.jobs)), **os.environ}          # a set one stays
    with open(f"{folder}.txt", "w", encoding="utf-8") as output:
        return folder, subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, env=threads).returncode


def run_missing(args):
    """Runs every (row, seed) that has no line, `jobs` at a time; SystemExit names those that failed."""
    failed, there = [], {(line["row"], line["seed"]) for line in read_lines(args.results / f"{args.what}.jsonl")}
    todo = [(name, seed) for seed in args.seeds for name in ROWS[args.what]
            if (name, seed) not in there and (not args.rows or name in args.rows)]
    small = small_tests(Path("runs/quick-tests")) if args.quick else {}
    if args.what == "table1-channel":
        send_through_channels()
    print(f"{len(todo)} runs, {args.jobs} at a time", flush=True)
    with ThreadPool(args.jobs) as pool:
        for (name, seed), (folder, status) in pool.imap_unordered(lambda each: (each, run(args, small, *each)), todo):
            if status:
                failed.append(f"{folder}.txt")
                continue
            line = line_of(folder, name, seed, ROWS[args.what][name][0])
            append_line(args.results / f"{args.what}.jsonl", line)
            print(f"{name}, seed {seed}: {line['summary']['seconds']:.0f} s, {folder}", flush=True)
    if failed:
        sys.exit(f"error: {len(failed)} runs failed; their last words are in {', '.join(failed)}")


def measure_all(args):
    """Figure 2: what docs/runs has of it, measured here too, one at a time: on a GPU all, else what a CPU did."""
    import torch

    failed = []
    commands = {(row["script"], row["size"], row["flags"], row["gib"]):
                f"{row['script']} --size {row['size']} --steps {row['steps']} {row['flags']}"
                + (f" --gib {row['gib']:g}" if row["gib"] else "") for row in read_lines(RUNS / "figure2.jsonl")
                if "seconds" in row and (torch.cuda.is_available() or row["device"].startswith("cpu"))}
    for command in commands.values():
        print(command, flush=True)
        if subprocess.run([sys.executable, "-m", "tools.measure", *command.split(), *args.flags,
                           "--log", f"{args.results}/figure2.jsonl"], stdout=subprocess.DEVNULL).returncode:
            failed.append(command)
    if failed:
        sys.exit(f"error: {len(failed)} measurements failed: {'; '.join(failed)}")


def metrics(line, when):
    """{column: value} of a run "before" or "after", of the adapter that did best on dev. Recognition: greedily; %.
    Speech: sampled at temperature 1."""
    test = line["summary"].get("test", {})
    columns = ({c: (*of, 100) for c, of in ASR_COLUMNS.items()} if line["script"] == "grpo_asr.py" else TTS_COLUMNS)
    return {c: scale * test[s][when][key] for c, (s, key, scale) in columns.items()
            if test.get(s, {}).get(when, {}).get(key) is not None}


def rows_of(runs):
    """A table as {row: [{column: value} of every seed]}; no RL, as each run that starts there saw it."""
    return {"no RL": [metrics(line, "before") for lines in runs.values() for line in lines
                      if "adapter" not in line["arguments"]],
            **{name: [metrics(line, "after") for line in lines] for name, lines in runs.items()}}


def mean_and_range(values, digits):
    """"12.3 (11.8 to 13.0)": the mean, and lowest and highest where they differ."""
    mean, low, high = (f"{v:.{digits}f}" for v in (sum(values) / len(values), min(values), max(values)))
    return mean if low == high else f"{mean} ({low} to {high})"


def as_table(head, rows):
    """Lists of cells as a Markdown table."""
    return "".join(f"| {' | '.join(cells)} |\n" for cells in [head, ["---"] * len(head), *rows])


def columns_of(rows):
    """The columns that every run of a table has."""
    return [c for c in rows["no RL"][0] if all(c in run for runs in rows.values() for run in runs)]


def markdown(rows, paper=None):
    """Rows as a Markdown table: the mean, and lowest and highest where there are several seeds; the paper's figures."""
    columns = columns_of(rows)
    titles = ["paper zh", "paper en"] if "SS" in columns else ["paper short", "paper long"]
    return as_table(["", "seeds", *columns, *(titles if paper else [])], [
        [name, "" if name == "no RL" else str(len(runs)),
         *(mean_and_range([run[c] for run in runs], DIGITS.get(c, 1)) for c in columns),
         *(paper[name][2:] if paper else [])]
        for name, runs in rows.items()])


def phase_rows(results):
    """Figure 2 as {what ran and where: its line of figure2.jsonl}; the last of several counts."""
    def label(row):
        flags = re.sub(r"--(test|max-tokens) \S+ ?", "", row["flags"]).strip()
        cap = f"under {row['gib']:g} GiB" if row["gib"] else ""
        device = re.sub(r"cpu, (\d+) threads", r"\1 CPU cores", row["device"]).removeprefix("NVIDIA ").split(" 80GB")[0]
        return " ".join(filter(None, [row["script"], row["size"], flags, cap, f"on {device}"]))

    rows = [row for row in read_lines(results / "figure2.jsonl") if "seconds" in row]
    rows.sort(key=lambda row: (row["size"], row["script"], row["device"], row["gib"] or 0))
    return {label(row): row for row in rows}


def phase_table(rows):
    """Figure 2 as Markdown: seconds by phase, their sum, peak GiB."""
    phases = [phase for phase in PHASES if any(phase in row["seconds"] for row in rows.values())]
    return as_table(["", *phases, "s a step", "peak GiB"], [
        [name, *(f"{row['seconds'][p]:.2f}" if p in row["seconds"] else "" for p in phases),
         f"{sum(row['seconds'].values()):.2f}", f"{row['peak_gib']:.1f}"] for name, row in rows.items()])


def make_tables(runs, phases):
    """{its mark: Markdown} of every table for which there are lines."""
    tables = {what: markdown(rows_of(rows), PAPER.get(what) if "table" in what else None)
              for what, rows in runs.items() if rows}
    return tables | ({"figure2": phase_table(phases)} if phases else {})


def draw_pictures(runs, phases, folder):
    """Every picture for which there are lines; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for what in runs:
        if runs[what] and re.fullmatch(r"table\d(-ours)?", what):
            rows = rows_of(runs[what])
            panels = {c: {name: [run[c] for run in each] for name, each in rows.items()}
                      for c in DOTS[what[5]] if c in columns_of(rows)}
            drawn.append(plot.draw_rows(panels, folder / f"{what}.png"))
    for picture, curves in CURVES.items():
        groups = {name: [line["curve"] for line in runs.get(what, {}).get(row, ())]
                  for name, (what, row) in curves.items()}
        if groups := {name: lines for name, lines in groups.items() if lines}:
            drawn.append(plot.draw(groups, folder / f"{picture}.png"))
    if phases:
        drawn.append(plot.draw_phases({n: row["seconds"] for n, row in phases.items()}, PHASES, folder / "figure2.png"))
    return drawn


def refresh(page, tables):
    """Puts the tables into a Markdown file: each between <!-- its mark --> and <!-- end -->."""
    old = page.read_text(encoding="utf-8")
    new = re.sub(rf"(<!-- ({'|'.join(tables)}) -->\n)[^<]*(?=<!-- end -->)", lambda m: m[1] + tables[m[2]], old)
    if new != old:
        page.write_text(new, encoding="utf-8")


def main(argv=None):
    """Runs what is asked for and missing, then writes all tables and pictures."""
    args = parse_args(argv)
    if args.list:
        for what, rows in ROWS.items():
            for name, (script, flags) in rows.items():
                whose = "[paper]" if what in PAPER else "[choice]"
                print(f"{what:12} {whose:9} {name:24} python {script} {flags}".rstrip())
        return
    if args.what == "figure2":
        measure_all(args)
    elif args.what:
        run_missing(args)
    there = sorted(path.stem for path in args.results.glob("*.jsonl") if path.stem != "figure2")
    runs, phases = {what: runs_of(args.results, what) for what in there}, phase_rows(args.results)
    tables = make_tables(runs, phases)
    if args.results == RUNS:
        for page in [Path("README.md"), *sorted(Path("docs").glob("*.md"))]:
            refresh(page, tables)
    else:
        print("\n".join(tables.values()))
    for path in draw_pictures(runs, phases, PICTURES if args.results == RUNS else args.results):
        print(path)


if __name__ == "__main__":
    main()
