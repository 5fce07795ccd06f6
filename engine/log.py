"""A run's folder: its logs, who is at work in it, what was given, and how it is written.

    RunLog(folder, header)       log.jsonl, samples.jsonl, summary.json: never over an older run
    lock(folder)                 one process at a time
    logged_header(folder)        what a run was given, as it was last given
    saved_run(folder, script)    the same, to resume it

Every file but the two logs is written beside its place and moved there, and of a log that is cut off the last line
goes: a run that is killed anywhere goes on from its last save as if nothing had been.
"""
import contextlib
import json
import os
import time
from pathlib import Path

import safetensors
import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from engine.audio import DataError, reason
from engine.parallel import WORLD, alone

try:
    import fcntl
except ImportError:     # Windows: two processes in one folder are not noticed
    fcntl = None


class RunLog:
    """A run folder. `log.jsonl`: first a header (arguments, commit, versions, device, seed), then a line a step; where
    the run was resumed, a line that says at which step and with which other arguments."""

    def __init__(self, folder, header, resume_at=None):
        """A new folder, or with `resume_at` (a step) an old one whose lines from that step on are dropped.

        Raises DataError if a new run would write over an old one, or over anything else of these names.
        """
        self.folder, self.goes_on = Path(folder), ""
        with self.writing():
            if resume_at is None:
                self.begin(header)
            else:
                self.go_on(header, resume_at)

    @alone
    def begin(self, header):
        """The header of a new run, in a folder where at most the header of one was written before."""
        self.folder.mkdir(parents=True, exist_ok=True)
        log = self.folder / "log.jsonl"
        rows = read_rows(log)
        if any(row.get("step", -1) >= 0 for row in rows) or any(
                (self.folder / name).exists() for name in ("summary.json", "state.pt")):
            raise DataError(f"{self.folder}: holds a run already; continue it with --resume {self.folder}, or give "
                            "another --out")
        ours = rows and "arguments" in rows[0]
        if not ours and any((self.folder / name).exists() for name in ("log.jsonl", "samples.jsonl", "samples",
                                                                       "adapter", "metadata.jsonl")):
            raise DataError(f"{self.folder}: holds something else; give another --out")
        self.replace("log.jsonl", lambda path: path.write_text(as_line(header), encoding="utf-8"))

    @alone
    def go_on(self, header, resume_at):
        """The log and the samples up to the step `resume_at`, and what is other from here on."""
        given = logged_arguments(self.folder)
        changed = {name: value for name, value in header["arguments"].items() if given.get(name) != value
                   and name not in ("resume", "out")}
        for name in ("log", "samples"):
            rows = [row for row in read_rows(self.folder / f"{name}.jsonl")
                    if row.get("step", row.get("resumed", 0) - 1) < resume_at]
            if name == "log":
                rows.append({"resumed": resume_at, **header, "arguments": changed})
            if (self.folder / f"{name}.jsonl").exists():
                self.replace(f"{name}.jsonl", lambda path, rows=rows: path.write_text(
                    "".join(map(as_line, rows)), encoding="utf-8"))

    @contextlib.contextmanager
    def writing(self):
        """Around what writes: a full disk or one that is read-only is one line, which says how to go on."""
        try:
            yield
        except (OSError, RuntimeError, safetensors.SafetensorError) as error:
            raise DataError(f"{self.folder}: cannot be written ({reason(error)})"
                            + (self.goes_on and f"; when there is room: {self.goes_on}")) from None

    @alone
    def replace(self, name, write):
        """`write(path)` beside the file `name`, and the result moved into its place: whole or not at all."""
        with self.writing():
            replace_file(self.folder / name, write)

    @alone
    def write(self, name, row):
        """Appends `row` to NAME.jsonl, floats to 6 digits."""
        with self.writing(), open(self.folder / f"{name}.jsonl", "a", encoding="utf-8") as out:
            out.write(as_line(row))

    def summary(self, row):
        """Writes summary.json."""
        text = json.dumps(rounded(row), indent=1, ensure_ascii=False) + "\n"
        self.replace("summary.json", lambda path: path.write_text(text, encoding="utf-8"))


def replace_file(path, write):
    """`write(path)` beside `path`, and the result moved into its place."""
    beside = path.with_name(f"{path.name}.tmp")
    beside.unlink(missing_ok=True)
    try:
        write(beside)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def as_line(row):
    """A row of a log as its line."""
    return json.dumps(rounded(row), ensure_ascii=False) + "\n"


def read_rows(path):
    """The rows of a log, none where there is no file; what was cut off at its end goes. Raises DataError for damage
    anywhere else, and for a line that is no JSON object."""
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({reason(error)})") from None
    rows = []
    for number, line in enumerate(lines[:-1], 1):       # behind the last line's end: nothing, or half a line
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError
        except (ValueError, RecursionError):
            if any(map(is_json, lines[number:])):
                raise DataError(f"{path}:{number}: is damaged, and more follows") from None
            break
        rows.append(row)
    return rows


def is_json(line):
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


@alone
def lock(folder):
    """Makes the run folder, and holds it for this process: an open file. Raises DataError where another is at work in
    it, or where a link in it leads outside."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.rglob("*"):
            if path.is_symlink() and not path.resolve().is_relative_to(folder.resolve()):
                raise DataError(f"{folder}: its {path.relative_to(folder)} is a link that leads outside")
        held = open(folder / "lock", "a+", encoding="utf-8")  # noqa: SIM115     closed by `launch`
    except OSError as error:
        raise DataError(f"{folder}: cannot be written ({reason(error)})") from None
    try:
        if fcntl:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        held.seek(0)
        raise DataError(f"{folder}: {held.read(200).strip() or 'another process'} is at work in it") from None
    held.truncate(0)
    held.write(f"process {os.getpid()}\n")
    held.flush()
    return held


def rounded(value):
    """`value` with every float in it at 6 significant digits."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    return [rounded(v) for v in value] if isinstance(value, list | tuple) else value


def new_run_folder(name):
    """runs/NAME-YYYYMMDD-HHMMSS, with a number behind it if that exists."""
    stem = Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    return next(p for p in [stem, *(Path(f"{stem}-{i}") for i in range(2, 100))] if not p.exists())


def run_header(name, args, policy):
    """What a run was given, for the first line of its log."""
    import importlib.metadata
    import platform
    import subprocess

    device = policy.device
    try:
        git = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True,
                             cwd=Path(__file__).parent).stdout.strip()
    except OSError:  # no git on this machine
        git = ""
    packages = ("torch", "transformers", "peft", "bitsandbytes", "jiwer")
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    card = card if WORLD == 1 else f"{WORLD} x {card}"
    return {"script": name, "arguments": vars(args), "commit": git or "unknown",
            "versions": {"python": platform.python_version(), **{p: importlib.metadata.version(p) for p in packages}},
            "device": card, "dtype": str(policy.get_base_model().dtype), "seed": args.seed, **adapted(policy)}


def adapted(policy):
    """What is trained: {"layers": how many have an adapter, "trained": its weights, "weights": all of the model's}."""
    return {"layers": sum(isinstance(module, BaseTunerLayer) for module in policy.modules()),
            "trained": sum(p.numel() for p in policy.parameters() if p.requires_grad),
            "weights": sum(p.numel() for p in policy.parameters() if not p.requires_grad)}


def logged_header(folder):
    """The first line of a run's log, its arguments as they were last given. Raises DataError where there is none."""
    rows = read_rows(Path(folder) / "log.jsonl") if Path(folder).is_dir() else []
    try:
        header = rows[0]
        for row in rows[1:]:
            header["arguments"].update(row.get("arguments", {}))
        header["arguments"].keys()
        return header
    except (IndexError, KeyError, AttributeError, TypeError, ValueError):
        raise DataError(f"{folder}: no run there (a readable log.jsonl with its arguments)") from None


def logged_arguments(folder):
    """The arguments of the run in `folder`, as they were last given."""
    return logged_header(folder)["arguments"]


def saved_run(folder, script):
    """The arguments of the run of `script` in `folder`, to resume it. Raises DataError."""
    try:
        header = logged_header(folder)
    except DataError as error:
        raise DataError(f"--resume {error}") from None
    if header.get("script", script) != script:
        raise DataError(f"--resume {folder}: is a run of {header['script']}.py")
    if not (Path(folder) / "state.pt").is_file():
        raise DataError(f"--resume {folder}: no state.pt in it: the run ended before it had saved anything; the same "
                        f"command with --out {folder} begins it anew")
    return {**header["arguments"], "out": str(folder), "resume": str(folder)}
