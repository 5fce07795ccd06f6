"""What surrounds a loop: its folder and log, its clock, its optimiser, Ctrl-C, and what --resume needs.

    launch(train, args)          a chapter's main: a user's mistake or a full GPU is one line
    Run(name, args, policy)      one run: steps(), phase("rollout"), learn(), record(), evaluated(), finish()
    RunLog(folder)               log.jsonl, samples.jsonl, summary.json: never over an older run
    pick_device(name), quiet()   torch's devices; fewer words from the libraries
"""
import contextlib
import ctypes
import json
import pickle
import resource
import signal
import sys
import time
import warnings
from pathlib import Path

import safetensors
import safetensors.torch
import torch
import transformers
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from tqdm import tqdm

from data import DataError

CLIP_NORM = 0.5  # of the gradient, before the step; medians are 0.09 in chapter 1, 0.2 to 0.4 in chapters 2 and 3


def launch(train, args):
    """train(args), with one line for a user's mistake, a full GPU and Ctrl-C."""
    interrupt = signal.getsignal(signal.SIGINT)
    try:
        train(args)
    except DataError as error:
        sys.exit(f"error: {error}")
    except torch.cuda.OutOfMemoryError:
        offload = ", or add --offload" if "offload" in args else ", or where clips are long --batch"
        sys.exit(f"error: the GPU's memory is full; lower --micro (now {args.micro}) or --group (now {args.group})"
                 f"{offload} (batch now {args.batch})")
    except KeyboardInterrupt:
        sys.exit("stopped before the first step: nothing was trained")
    finally:
        signal.signal(signal.SIGINT, interrupt)


class Run:
    """One run of a chapter: optimiser, clock, folder and log; how far it is, and which adapter was best."""

    def __init__(self, name, args, policy):
        self.name, self.args, self.policy, self.stopped = name, args, policy, False
        self.weights = [p for p in policy.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.weights, lr=args.lr, weight_decay=0.0)
        self.phase, self.state = Phases(policy.device), {"step": 0}
        if args.adapter and not args.resume:
            start_from(policy, args)
        if args.resume:
            self.state = load_state(policy, self.optimizer, args.resume)
            self.phase.total = self.state.pop("seconds")
            self.optimizer.param_groups[0]["lr"] = args.lr
        self.folder = Path(args.resume or args.out or new_run_folder(name))
        self.log = RunLog(self.folder, run_header(args, policy), self.state["step"] if args.resume else None)

    def begin(self, wer, **row):
        """What is known before the first step of a new run: the WER of no step at all, for the log and the state."""
        self.state |= {"best": wer, "best_step": 0, "last": wer}
        self.policy.save_pretrained(self.folder / "adapter")
        self.log.write("log", {"step": -1, **row, "eval_wer": wer})
        self.save()

    def steps(self):
        """The steps still to do, under a bar. Ctrl-C ends after the one at hand, with all saved, a second at once."""
        self.phase.take()
        first = self.state["step"]
        signal.signal(signal.SIGINT, self.interrupt)                                # put back by `launch`
        self.bar = tqdm(range(first, self.args.steps), initial=first, total=self.args.steps, dynamic_ncols=True,
                        leave=False, disable=None)
        for step in self.bar:
            yield step
            if self.stopped:
                break
        self.bar.close()
        if self.stopped:
            print(f"stopped after {self.state['step']} of {self.args.steps} steps; python {self.name}.py --resume "
                  f"{self.folder} goes on")

    def interrupt(self, *_):
        if self.stopped:
            sys.exit("stopped at once")
        self.stopped = True

    def learn(self, step):
        """Clips the gradient at CLIP_NORM, takes one step of the optimiser and clears the gradient; returns the norm.

        A gradient that is not finite would end the adapter for good: that step is left out, and says so.
        """
        norm = torch.nn.utils.clip_grad_norm_(self.weights, CLIP_NORM)
        if norm.isfinite():
            self.optimizer.step()
        else:
            tqdm.write(f"step {step}: the gradient is not finite, step left out")
        self.optimizer.zero_grad()
        return float(norm)

    def record(self, step, row, told, sample=None):
        """The log's line of a step; every ten steps `told` on the screen and `sample` in samples.jsonl."""
        row = {"step": step, **row, "lr": self.args.lr, "seconds": self.phase.take(),
               "peak_memory_gib": self.phase.peak_gib(), "peak_by_phase_gib": dict(self.phase.peaks)}
        self.log.write("log", row)
        self.bar.set_postfix_str(told)
        if step % 10 == 0:
            if sample:
                self.log.write("samples", {"step": step, **sample})
            tqdm.write(f"step {step}: {told}, {sum(row['seconds'].values()):.2f} s")
        self.state["step"] = step + 1

    def due(self):
        """Whether an evaluation is due after the step just recorded."""
        done, every = self.state["step"], self.args.eval_every
        return bool(every and done % every == 0) or done == self.args.steps or self.stopped

    def evaluated(self, wer, told, **row):
        """Logs an evaluation after a step, keeps the adapter if it is the best so far, and saves the state."""
        step = self.state["step"]
        self.log.write("log", {"step": step - 1, **row, "eval_wer": wer, "seconds": self.phase.take()})
        tqdm.write(f"step {step}: {told}")
        self.state["last"] = wer
        if wer < self.state["best"]:
            self.state |= {"best": wer, "best_step": step}
            self.policy.save_pretrained(self.folder / "adapter")
        self.save()

    def save(self):
        """The latest adapter and optimiser state, for --resume; state.pt is moved into place, so never half there."""
        torch.save({**self.state, "seconds": self.phase.total, "adapter": get_peft_model_state_dict(self.policy),
                    "optimizer": self.optimizer.state_dict(), "start": getattr(self.policy, "start", None)},
                   self.folder / "state.tmp")
        (self.folder / "state.tmp").replace(self.folder / "state.pt")

    def finish(self, metric, before, after, test):
        """summary.json and the last line; `before` and `after` are WER, `test` the figures of every test set."""
        state, phase = self.state, self.phase
        self.log.summary({
            "metric": metric, "before": before, "after": after, "best": state["best"], "best_step": state["best_step"],
            "last": state["last"], "steps": state["step"], "seconds": sum(phase.total.values()),
            "phase_seconds": phase.total, "peak_memory_gib": phase.peak_gib(), "peak_by_phase_gib": phase.peaks,
            "test": test})
        percent = lambda share: f"{100 * share:.1f} %"  # noqa: E731
        change = f" ({100 * (after - before) / before:+.0f} %)" if before else ""
        print(f"{metric.split(',')[0]}: {percent(before)} -> {percent(after)}{change} in {state['step']} steps.  "
              f"Everything is in {self.folder}")


def load_state(policy, optimizer, folder):
    """Puts back the adapter and the optimiser that `Run.save` wrote, and returns the rest of it."""
    try:
        state = torch.load(Path(folder) / "state.pt", weights_only=True, map_location="cpu")
        set_peft_model_state_dict(policy, state.pop("adapter"))
        optimizer.load_state_dict(state.pop("optimizer"))
        policy.start = to_device(state.pop("start", None), policy.device)
    except (OSError, RuntimeError, KeyError, ValueError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DataError(f"--resume {folder}: its state.pt does not fit this model or is damaged ({reason})") from None
    return state


def start_from(policy, args):
    """Puts the best adapter of the run --adapter in the place of the new one, and keeps it as the reference."""
    folder, saved = Path(args.adapter), logged_arguments(args.adapter)
    if saved["model"] != args.model:
        raise DataError(f"--adapter {folder}: trained {saved['model']}, and --model is {args.model}")
    if saved["lora_rank"] != args.lora_rank:
        raise DataError(f"--adapter {folder}: has --lora-rank {saved['lora_rank']}, not {args.lora_rank}")
    try:
        load_adapter(policy, folder / "adapter")
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        raise DataError(f"--adapter {folder}: its adapter cannot be loaded ({str(error).splitlines()[0]})") from None
    policy.start = {name: weight.detach().clone() for name, weight in policy.named_parameters() if weight.requires_grad}


def to_device(weights, device):
    """{name: tensor} on `device`; None stays None."""
    return weights and {name: weight.to(device) for name, weight in weights.items()}


def load_adapter(policy, folder):
    """The adapter weights that `policy.save_pretrained(folder)` wrote."""
    set_peft_model_state_dict(policy, safetensors.torch.load_file(folder / "adapter_model.safetensors"))


# ---- folder and log ------------------------------------------------------------------------------------------

class RunLog:
    """A run folder. `log.jsonl`: first a header (arguments, commit, versions, device, seed), then a line a step."""

    def __init__(self, folder, header, resume_at=None):
        """A new folder, or with `resume_at` (a step) an old one whose lines from that step on are dropped.

        Raises DataError if a new run would write over an old one that has saved something.
        """
        self.folder = Path(folder)
        if resume_at is None:
            if (self.folder / "log.jsonl").exists() and (self.folder / "state.pt").exists():
                raise DataError(f"{self.folder}: holds a run already; continue it with --resume {self.folder}, "
                                "or give another --out")
            self.folder.mkdir(parents=True, exist_ok=True)
            for name in ("log", "samples"):             # of a run that ended before it had anything to save
                (self.folder / f"{name}.jsonl").unlink(missing_ok=True)
            self.write("log", header)
        else:
            for name in ("log", "samples"):
                path = self.folder / f"{name}.jsonl"
                lines = path.read_text().split("\n")[:-1] if path.exists() else []
                kept = [line for line in lines if json.loads(line).get("step", -1) < resume_at]
                if name == "log":
                    kept[0] = json.dumps(rounded(header), ensure_ascii=False)  # what the run is given from here on
                path.write_text("".join(line + "\n" for line in kept))

    def write(self, name, row):
        """Appends `row` to NAME.jsonl, floats to 6 digits."""
        with open(self.folder / f"{name}.jsonl", "a") as out:
            out.write(json.dumps(rounded(row), ensure_ascii=False) + "\n")

    def summary(self, row):
        """Writes summary.json."""
        (self.folder / "summary.json").write_text(json.dumps(rounded(row), indent=1, ensure_ascii=False) + "\n")


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


def run_header(args, policy):
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
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    return {"arguments": vars(args), "commit": git or "unknown",
            "versions": {"python": platform.python_version(), **{p: importlib.metadata.version(p) for p in packages}},
            "device": name, "dtype": str(policy.get_base_model().dtype), "seed": args.seed,
            "trained": sum(p.numel() for p in policy.parameters() if p.requires_grad)}


def logged_arguments(folder):
    """The arguments of the run in `folder`, from the first line of its log. Raises DataError where there are none."""
    try:
        with open(Path(folder) / "log.jsonl", encoding="utf-8") as log:
            return json.loads(log.readline())["arguments"]
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError(f"{folder}: no run there (a readable log.jsonl with its arguments)") from None


def saved_arguments(folder):
    """The arguments of the run in `folder`, to resume it."""
    try:
        saved = logged_arguments(folder)
    except DataError as error:
        raise DataError(f"--resume {error}") from None
    if not (Path(folder) / "state.pt").exists():
        raise DataError(f"--resume {folder}: no state.pt in it: the run ended before its first evaluation")
    return {**saved, "out": str(folder), "resume": str(folder)}


# ---- clock and device ----------------------------------------------------------------------------------------

class Phases:
    """Seconds per phase of a step, and the peak of memory in GiB by phase: on a GPU the tensors' own, else the
    process's so far."""

    def __init__(self, device):
        self.device, self.step, self.total, self.peaks = device, {}, {}, {}

    @contextlib.contextmanager
    def __call__(self, name):
        self.synchronize()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        started = time.perf_counter()
        yield
        self.synchronize()
        spent = time.perf_counter() - started
        self.peaks[name] = max(self.peaks.get(name, 0.0), self.memory_gib())
        for seconds in (self.step, self.total):
            seconds[name] = seconds.get(name, 0.0) + spent

    def synchronize(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def take(self):
        """The seconds since the last call, by phase."""
        taken, self.step = self.step, {}
        return taken

    def peak_gib(self):
        """The highest peak of any phase so far."""
        return max(self.peaks.values(), default=self.memory_gib())

    def memory_gib(self):
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2 ** 30
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2 ** 30 if sys.platform == "darwin" else 2 ** 20)


def pick_device(name):
    """torch.device for "auto", "cpu", "cuda" or "cuda:1"."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise DataError(f"--device {name}: no such device; auto, cpu, cuda or cuda:0") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise DataError(f"--device {name}: torch sees no GPU here; --device cpu, or a driver that fits torch "
                        f"{torch.__version__}")
    if device.type not in ("cpu", "cuda"):
        raise DataError(f"--device {name}: cpu and cuda are what this was tried on")
    if device.type == "cpu":
        keep_freed_memory()
    else:       # the CPU makes features of small clips: 32 threads took ten times as long for it as two
        torch.set_num_threads(min(2, torch.get_num_threads()))
        # cuDNN's attention, torch 2.11's first choice on an H100, gives NaN gradients where padded prompts are
        # 64, 192, 320, ... positions long (pytorch issue 196678); the others do not
        torch.backends.cuda.enable_cudnn_sdp(False)
    return device


def quiet():
    """Silences what the libraries say once per layer and call; errors still come through."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message="MatMul8bitLt|.*is_gradient_checkpointing|Support for mismatched")


def keep_freed_memory():
    """On Linux: freed tensors stay with the process. glibc hands large ones back to the system at every turn, and
    the page faults of getting them again took 15 % of a step on a CPU."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 2 ** 30)      # M_MMAP_THRESHOLD
        libc.mallopt(-1, 2 ** 31 - 1)  # M_TRIM_THRESHOLD
