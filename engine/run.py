"""What surrounds a loop: its folder and log, its clock, its optimiser, Ctrl-C, and what --resume needs.

    launch(train, args)          a chapter's main: a user's mistake, a full GPU or disk, a stop are one line
    Run(name, args, policy)      one run: steps(), phase("rollout"), learn(), record(), evaluated(), summary()
    pick_device(name), quiet()   torch's devices; fewer words from the libraries

The folder and its files are in log.py.
"""
import contextlib
import ctypes
import os
import pickle
import shutil
import signal
import sys
import time
import warnings
import zipfile
from pathlib import Path

import safetensors
import safetensors.torch
import torch
import transformers
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from tqdm import tqdm

from engine.audio import DataError, reason
from engine.log import RunLog, lock, logged_arguments, new_run_folder, run_header
from engine.parallel import WORLD, GoneError, alike, alone, any_of, gather, together

try:
    import resource
except ImportError:     # Windows: the peak of memory on the CPU is 0
    resource = None

CLIP_NORM = 0.5     # of the gradient, before the step; medians are 0.09 in chapter 1, 0.2 to 0.4 in chapters 2 and 3
SAVE_EVERY = 50     # steps, whether evaluated or not
STOPS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


@together()
def launch(train, args):
    """train(args), with one line for a user's mistake, full memory and a stop (Ctrl-C, SIGTERM, SIGHUP)."""
    Run.goes_on, before = "", {s: signal.getsignal(s) for s in STOPS}
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):       # of a test
            stream.reconfigure(errors="replace")        # a console that knows no Chinese ends no run
    stop_with(stop_now)
    more = ", or add --offload" if "offload" in args else ", or where clips are long --batch"
    less = f"lower --micro (now {args.micro}) or --group (now {args.group}){more} (batch now {args.batch})"
    try:
        train(args)
    except DataError as error:
        sys.exit(f"error: {error}")
    except GoneError:
        sys.exit(f"error: another process of this run has ended; {Run.goes_on or 'nothing was trained'}")
    except torch.cuda.OutOfMemoryError:
        sys.exit(f"error: the GPU's memory is full; {less}")
    except MemoryError:
        sys.exit(f"error: the memory is full; {less}")
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):
            raise
        sys.exit(f"error: the memory is full; {less}")
    except KeyboardInterrupt:
        sys.exit(f"stopped: {Run.goes_on or 'nothing was trained'}")
    finally:
        for s, handler in before.items():
            signal.signal(s, handler if WORLD == 1 else signal.SIG_IGN)
        if Run.lock:
            Run.lock = Run.lock.close()


def stop_now(*_):
    """Ends what is under way. torchrun hands a stop on to processes that may have it already: the next is left out."""
    if WORLD > 1:
        stop_with(signal.SIG_IGN)
    raise KeyboardInterrupt


def stop_with(handler):
    """Sends what stops a run to `handler`; what whoever started it has switched off, as nohup does, stays off."""
    for s in STOPS:
        if s == signal.SIGINT or signal.getsignal(s) != signal.SIG_IGN:
            signal.signal(s, handler)


class Run:
    """One run of a chapter: optimiser, clock, folder and log; how far it is, and which adapter was best."""

    goes_on, lock = "", None        # of the process's one run: how to go on from what is saved, and who is at work

    def __init__(self, name, args, policy):
        self.name, self.args, self.policy, self.stopped, self.endless = name, args, policy, False, False
        self.weights = [p for p in policy.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.weights, lr=args.lr, weight_decay=0.0)
        self.phase, self.state = Phases(policy.device), {"step": 0}
        if args.adapter and not args.resume:
            start_from(policy, args)
        self.folder = gather([Path(args.resume or args.out or new_run_folder(name))])[0]
        Run.lock = lock(self.folder)
        if args.resume:
            self.state = load_state(policy, self.optimizer, args.resume)
            self.phase.total = self.state.pop("seconds")
        header = run_header(name, args, policy)
        self.log = RunLog(self.folder, header, self.state["step"] if args.resume else None)
        if args.resume:
            self.is_saved()
        if not alike(self.weights):
            raise DataError("the processes begin with different adapters: other files, or another kind of GPU?")

    def is_saved(self):
        """Says from here on, wherever the run ends, how to go on."""
        self.saved = self.state["step"]
        Run.goes_on = self.log.goes_on = (f"saved after {self.saved} of {self.args.steps} steps; python {self.name}.py "
                                          f"--resume {self.folder} goes on")

    def begin(self, wer, **row):
        """What is known before the first step of a new run: the WER of no step at all, for the log and the state."""
        self.state |= {"best": wer, "best_step": 0, "last": wer}
        self.save_adapter()
        self.log.write("log", {"step": -1, **row, "eval_wer": wer})
        self.save()

    def steps(self):
        """The steps still to do, under a bar. A stop ends after the one at hand, with all saved, a second at once."""
        self.phase.take()
        first = self.state["step"]
        stop_with(self.interrupt)                                                   # put back by `launch`
        self.bar = tqdm(range(first, self.args.steps), initial=first, total=self.args.steps, dynamic_ncols=True,
                        leave=False, disable=None)
        for step in self.bar:
            yield step
            stop = any_of(self.stopped)
            if self.state["step"] > self.saved and (stop or self.state["step"] % SAVE_EVERY == 0):
                self.save()
            if stop:
                raise KeyboardInterrupt
        self.bar.close()
        any_of(False)                                   # what rank 0 has written is there for all
        stop_with(stop_now)

    def interrupt(self, *_):
        if self.stopped and WORLD == 1:
            raise KeyboardInterrupt
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
        if row.get("truncated") == 1 and not self.endless:
            self.endless = True
            tqdm.write(f"step {step}: no sample came to an end: is the longest that is allowed too short, or does this "
                       "model end with a token that its generation_config and tokenizer do not name?")
        self.state["step"] = step + 1

    def due(self):
        """Whether an evaluation is due after the step just recorded."""
        done, every = self.state["step"], self.args.eval_every
        return bool(every and done % every == 0) or done == self.args.steps

    def evaluated(self, wer, told, **row):
        """Logs an evaluation after a step, keeps the adapter if it is the best so far, and saves the state."""
        step = self.state["step"]
        self.log.write("log", {"step": step - 1, **row, "eval_wer": wer, "seconds": self.phase.take()})
        tqdm.write(f"step {step}: {told}")
        self.state["last"] = wer
        if wer < self.state["best"]:
            self.state |= {"best": wer, "best_step": step}
            self.save_adapter()
        self.save()

    @alone
    def save_adapter(self):
        """The adapter as it is now, as RUN/adapter, file by file: its settings never change, its weights are one."""
        with self.log.writing():
            beside = self.folder / "adapter.tmp"
            shutil.rmtree(beside, ignore_errors=True)
            self.policy.save_pretrained(beside)
            (self.folder / "adapter").mkdir(exist_ok=True)
            for file in sorted(beside.iterdir()):
                file.replace(self.folder / "adapter" / file.name)
            beside.rmdir()

    def save(self):
        """The latest adapter and optimiser state, for --resume."""
        self.log.replace("state.pt", lambda path: torch.save(
            {**self.state, "seconds": self.phase.total, "adapter": get_peft_model_state_dict(self.policy),
             "optimizer": self.optimizer.state_dict(), "start": getattr(self.policy, "start", None)}, path))
        self.is_saved()

    def summary(self, metric, before, after, test):
        """summary.json; returns the last line. `before` and `after` are WER, `test` the figures of every test set."""
        state, phase = self.state, self.phase
        self.log.summary({
            "metric": metric, "before": before, "after": after, "best": state["best"], "best_step": state["best_step"],
            "last": state["last"], "steps": state["step"], "seconds": sum(phase.total.values()),
            "phase_seconds": phase.total, "peak_memory_gib": phase.peak_gib(), "peak_by_phase_gib": phase.peaks,
            "test": test})
        percent = lambda share: f"{100 * share:.1f} %"  # noqa: E731
        change = f" ({100 * (after - before) / before:+.0f} %)" if before else ""
        return (f"{metric.split(',')[0]}: {percent(before)} -> {percent(after)}{change} in {state['step']} steps.  "
                f"Everything is in {self.folder}")


STATE = {"step", "best", "best_step", "last", "seconds", "adapter", "optimizer", "start"}


def load_state(policy, optimizer, folder):
    """Puts back the adapter and the optimiser that `Run.save` wrote, and returns the rest of it. Raises DataError for
    anything that is not whole, its best adapter included, before anything runs."""
    folder = Path(folder)
    read_adapter(policy, folder / "adapter", f"--resume {folder}")
    try:
        with zipfile.ZipFile(folder / "state.pt") as parts:
            if damaged := parts.testzip():
                raise ValueError(f"the checksum of {damaged} is wrong")
        state = torch.load(folder / "state.pt", weights_only=True, map_location="cpu")
        if lacking := STATE - set(state):
            raise ValueError(f"without {', '.join(sorted(lacking))}")
        check_weights(policy, state["adapter"])
        set_peft_model_state_dict(policy, state.pop("adapter"))
        optimizer.load_state_dict(state.pop("optimizer"))
        policy.start = to_device(state.pop("start"), policy.device)
    except (OSError, RuntimeError, KeyError, ValueError, EOFError, TypeError, AttributeError, pickle.UnpicklingError,
            zipfile.BadZipFile) as error:
        raise DataError(f"--resume {folder}: its state.pt does not fit this model or is damaged ({reason(error)})"
                        ) from None
    return state


def start_from(policy, args):
    """Puts the best adapter of the run --adapter in the place of the new one, and keeps it as the reference."""
    folder, saved = Path(args.adapter), logged_arguments(args.adapter)
    if not same_model(saved["model"], args.model):
        raise DataError(f"--adapter {folder}: trained {saved['model']}, and --model is {args.model}")
    if saved["lora_rank"] != args.lora_rank:
        raise DataError(f"--adapter {folder}: has --lora-rank {saved['lora_rank']}, not {args.lora_rank}")
    set_peft_model_state_dict(policy, read_adapter(policy, folder / "adapter", f"--adapter {folder}"))
    policy.start = {name: weight.detach().clone() for name, weight in policy.named_parameters() if weight.requires_grad}


def to_device(weights, device):
    """{name: tensor} on `device`; None stays None."""
    return weights and {name: weight.to(device) for name, weight in weights.items()}


def same_model(one, other):
    """Whether two names are one folder, or one hub id: checkpoints/asr, checkpoints/asr/ and a link to it are."""
    return Path(one).resolve() == Path(other).resolve()


def load_adapter(policy, folder):
    """Puts the adapter weights that `policy.save_pretrained(folder)` wrote into the policy."""
    set_peft_model_state_dict(policy, read_adapter(policy, folder, f"{folder}"))


def read_adapter(policy, folder, flag):
    """Those weights, {name: tensor}. Raises DataError, which opens with `flag`, where they are not the policy's."""
    try:
        weights = safetensors.torch.load_file(folder / "adapter_model.safetensors")
        check_weights(policy, weights)
    except (OSError, RuntimeError, ValueError, safetensors.SafetensorError) as error:
        raise DataError(f"{flag}: its adapter cannot be loaded or is damaged ({reason(error)})") from None
    return weights


def check_weights(policy, weights):
    """ValueError unless `weights` are all of the policy's adapters, in their shapes, and finite."""
    own = get_peft_model_state_dict(policy)
    if wrong := sorted(own.keys() ^ weights.keys()):
        raise ValueError(f"{len(own.keys() & weights.keys())} of {len(own)} weights are there; not {wrong[0]}")
    for name, weight in weights.items():
        if weight.shape != own[name].shape:
            raise ValueError(f"{name} is {tuple(weight.shape)}, not {tuple(own[name].shape)}")
        if not weight.isfinite().all():
            raise ValueError(f"{name} is not finite")


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
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss if resource else 0
        return used / (2 ** 30 if sys.platform == "darwin" else 2 ** 20)


def pick_device(name):
    """torch.device for "auto", "cpu", "cuda" or "cuda:1"."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and WORLD > 1:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
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
        if WORLD > 1:
            if device.index >= torch.cuda.device_count():
                raise DataError(f"--nproc-per-node: torch sees {torch.cuda.device_count()} GPUs here")
            torch.cuda.set_device(device)
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
