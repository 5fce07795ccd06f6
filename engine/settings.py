"""The flags of the three chapters, with no import of torch: --help and typing errors answer at once.

    parse_asr(argv)                    chapter 1
    parse_speech(argv)                 chapter 2
    parse_speech(argv, diffro=True)    chapter 3
What chapters share stands once. --resume DIR takes the settings of the run in DIR as defaults.
"""
import argparse
import os
import signal
import sys
import time
from pathlib import Path

LEAST = dict(steps=0, batch=1, group=2, micro=1, lora_rank=1, eval_every=0, max_tokens=0, eval_samples=1, hotwords=0)
MOST = 10 ** 9
POSITIVE = ("lr", "temperature", "tau", "weight")
NOT_NEGATIVE = ("clip", "beta", "max_seconds")
MAY_CHANGE = ("steps", "eval_every", "micro", "offload", "device")      # when a run is resumed
HOME = Path(__file__).resolve().parent.parent


def parse_asr(argv=None, about=None):
    """The settings of chapter 1."""
    p = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    g = p.add_argument_group("model")
    add_policy(g, "checkpoints/asr", "the recogniser")
    g = p.add_argument_group("data and rewards")
    g.add_argument("--data", nargs="+", default=["data/d0"], metavar="DIR", help="train on these (default: data/d0)")
    g.add_argument("--dev", metavar="DIR", help="chooses the best adapter and is not reported (default: data/dev; a "
                   "tenth of --data where that is given)")
    g.add_argument("--test", nargs="+", metavar="DIR", help="to test on (default: data/test/*; a tenth of --data where "
                   "that is given)")
    g.add_argument("--language", default="en", help="of the prompt, the normaliser and the rules (default: en)")
    g.add_argument("--rewards", default="R1", help="R1 accuracy, R2 hallucination, R3 keywords (default: R1)")
    g.add_argument("--hotwords", type=int, metavar="N", help="put a list into each prompt: the clip's own keywords and "
                   "N others of the data that are not said (default: no list)")
    g.add_argument("--max-seconds", type=float, default=30, help="longest clip allowed; 0 = any (default: 30)")
    g.add_argument("--skip-bad", action="store_true", help="leave out and count bad lines of the data")
    g = p.add_argument_group("GRPO")
    g.add_argument("--objective", choices=["grpo", "mwer", "supervised"], default="grpo", help="mwer: expected word "
                   "errors, what the paper names beside GRPO; supervised: the control, the transcripts themselves "
                   "(G = 1, A = 1, beta = 0) (default: grpo)")
    add_grpo(g, batch=(8, "clips a step (default: 8; paper: 32)"), group=(8, "samples a clip (default: 8; paper: 12)"),
             micro=64, lr="paper, all weights: 1e-5")
    g.add_argument("--max-tokens", type=int, default=0, help="longest transcript; 0 = 16 + 8 a second of audio")
    add_run(p)
    return read(p, argv)


def parse_speech(argv=None, about=None, diffro=False):
    """The settings of chapter 2, or of chapter 3 with `diffro`."""
    p = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    g = p.add_argument_group("models")
    add_policy(g, "checkpoints/tts", "the LLM")
    g.add_argument("--codec", default="checkpoints/codec", help="speech tokens to waveform (default: %(default)s)")
    g.add_argument("--judge", default="checkpoints/asr", help="recogniser that rewards; token2text = the model of "
                   "--token2text reads the speech tokens, no waveform is made (default: %(default)s)")
    g.add_argument("--second-judge", default="checkpoints/asr2", help="another, for evaluation (default: %(default)s)")
    g.add_argument("--third-judge", metavar="MODEL", help="one more ear for evaluation, best one that nobody here "
                   "trained, e.g. openai/whisper-base: if only the second hears a gain, the reward is hacked")
    g.add_argument("--token2text", default="checkpoints/token2text", help="reads speech tokens: DiffRO's reward, or "
                   "--judge token2text (default: %(default)s)")
    g.add_argument("--speaker", default="checkpoints/speaker", help="whose voice is it (default: %(default)s)")
    g.add_argument("--offload", action="store_true", help="codec, judges and speaker model wait in main memory")
    g = p.add_argument_group("data and rewards")
    g.add_argument("--data", nargs="+", default=["data/tts/train.jsonl"], metavar="FILE",
                   help="texts: a line each, or a metadata.jsonl or its folder (default: data/tts/train.jsonl)")
    g.add_argument("--dev", metavar="FILE", help="other texts, to choose the best adapter by; not reported (default: "
                   "data/tts/dev; a tenth of --data where that is given)")
    g.add_argument("--test", nargs="+", metavar="FILE", help="others to test on, with recordings where there are any "
                   "(default: data/tts/test/*; a tenth of --data where that is given)")
    g.add_argument("--voices", default="data/tts/voices", metavar="DIR",
                   help="recordings, with their texts, of the voices to speak in (default: data/tts/voices)")
    g.add_argument("--language", default="en", help="of the judges and the normaliser (default: en)")
    g.add_argument("--rewards", default="R1", help="R1 accuracy, R2 duration, R3 diversity (default: R1)")
    g.add_argument("--max-seconds", type=float, default=10, help="longest speech a sample may have (default: 10)")
    g.add_argument("--skip-bad", action="store_true", help="leave out and count bad lines of the data")
    if diffro:
        g = p.add_argument_group("DiffRO")
        g.add_argument("--method", choices=["diffro", "grpo+diffro"], default="diffro", help="(default: diffro)")
        g.add_argument("--weight", type=float, default=1.0, help="lambda, of DiffRO beside GRPO (default: 1)")
        g.add_argument("--filter", choices=["positive", "none"], help="DiffRO on samples with A > 0, or on all "
                       "(default: positive with GRPO, else none)")
        g.add_argument("--teach", choices=["rollout", "recording"], default="rollout",
                       help="the fixed tokens of the pass: sampled, or the recording's in --data (default: rollout)")
        g.add_argument("--tau", type=float, default=1.0, help="Gumbel-softmax temperature (authors: 1)")
        g.add_argument("--soft", action="store_true", help="the softmax itself, not one-hot forward with its gradient "
                       "(straight-through), which is the paper's")
    g = p.add_argument_group("GRPO")
    if diffro:                                                      # None: depends on --method
        add_grpo(g, batch=(None, "texts a step (default: 16, as in the paper; beside GRPO 2)"),
                 group=(None, "samples a text (default: 1, beside GRPO 8, both as in the paper)"), micro=4)
    else:
        add_grpo(g, batch=(2, "texts a step (default: 2; paper: 16)"),
                 group=(8, "samples a text (default: 8, as in the paper)"), micro=8)
    add_run(p)
    p.add_argument("--eval-samples", type=int, default=1, help="of each test text: the WER of one each scatters by 2.7 "
                   "points, of k by that over sqrt(k) (default: 1)")
    return read(p, argv)


# ---- what the chapters share ---------------------------------------------------------------------------------

def add_policy(g, model, what):
    """Flags of the model that is trained."""
    g.add_argument("--model", default=model, help=f"{what}, folder or hub id (default: {model})")
    g.add_argument("--quantize", choices=["none", "8bit"], default="none",
                   help="frozen LLM weights by bitsandbytes; none = bf16 on CUDA, fp32 on the CPU (default: none)")
    g.add_argument("--adapter", metavar="RUN", help="start from the best adapter of another run, which is then the "
                   "reference too (default: a new one, which does nothing)")
    g.add_argument("--lora-rank", type=int, default=16, help="rank of the fp32 adapters (default: 16)")
    g.add_argument("--device", default="auto", help="auto = cuda where there is one, else cpu")


def add_grpo(g, batch, group, micro, lr="DiffRO's authors: 1e-5"):
    """Flags of Eqs. 1 to 3; `batch` and `group` are a default and its help."""
    g.add_argument("--steps", type=int, default=200)
    g.add_argument("--batch", type=int, default=batch[0], help=f"B, {batch[1]}")
    g.add_argument("--group", type=int, default=group[0], help=f"G, {group[1]}")
    g.add_argument("--micro", type=int, default=micro, help="samples in one forward and backward: memory and speed, "
                   f"and which Gumbel draw of DiffRO goes where (default: {micro})")
    g.add_argument("--temperature", type=float, default=1.0, help="of sampling and of the log-probs (default: 1)")
    g.add_argument("--lr", type=float, default=3e-4, help=f"AdamW on LoRA (default: 3e-4; {lr})")
    g.add_argument("--clip", type=float, default=0.2, help="eps of Eq. 3")
    g.add_argument("--beta", type=float, default=0.1, help="weight of the KL in Eq. 3 (paper: 0.1)")
    g.add_argument("--kl", choices=["k2", "k3"], default="k2", help="its estimator in the loss: k2 has the gradient of "
                   "KL(policy | reference), k3 is what most code does (default: k2)")


def add_run(p):
    """Flags of the run itself."""
    g = p.add_argument_group("run")
    g.add_argument("--seed", type=int, default=1)
    g.add_argument("--eval-every", type=int, default=50, help="steps; 0 = only before and after (default: 50)")
    g.add_argument("--out", metavar="DIR", help="run folder (default: a new one under runs/)")
    g.add_argument("--resume", metavar="DIR", help="continue the run in DIR; --steps may be raised")


def read(p, argv):
    """The arguments, those of a run to resume as defaults, checked."""
    if argv is None:                                                # a command line: torch is not loaded yet
        for name in ("SIGINT", "SIGTERM"):
            signal.signal(getattr(signal, name), stop_at_once)
        if "RANK" not in os.environ and others_work():
            os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if Path.cwd() != HOME:                      # the embedded models and data lie beside the scripts, wherever one is
        beside = lambda name: str(HOME / name) if name.startswith(("checkpoints/", "data/")) else name  # noqa: E731
        for action in p._actions:
            if isinstance(action.default, list | str):
                one = isinstance(action.default, str)
                action.default = beside(action.default) if one else [*map(beside, action.default)]
    if os.environ.get("RANK", "0") != "0":      # rank 0 says what is wrong, and its end is that of all
        p.error = lambda message: time.sleep(20) or sys.exit(2)
    args = p.parse_args(argv)
    for name, value in vars(args).items():
        values = value if isinstance(value, list) else [value]
        if "" in values:
            p.error(f"--{name.replace('_', '-')} is empty")
        if any("\ud800" <= c <= "\udfff" for text in values if isinstance(text, str) for c in text):
            p.error(f"--{name.replace('_', '-')} holds bytes that are no UTF-8")
    if args.resume:
        args = resumed(p, argv, args)
    if getattr(args, "objective", "") == "supervised":
        args.group, args.beta = 1, 0.0
    if "filter" in args:
        alone = args.method == "diffro"
        args.batch = (16 if alone else 2) if args.batch is None else args.batch
        args.group = (1 if alone else 8) if args.group is None else args.group
        args.filter = args.filter or ("positive" if args.method == "grpo+diffro" else "none")
    check(p, args)
    return args


def others_work(seconds=0.2):
    """Whether another program keeps a third of one of our cores busy (Linux; False elsewhere).

    Threads that wait for each other spin, which is fastest on an idle machine. Where one of them has lost its core to
    another program, the others spin for nothing, and a step of chapter 1 takes many times as long. Whether they spin
    is decided once, when torch is loaded.
    """
    def idle():
        lines = Path("/proc/stat").read_text(encoding="utf-8").splitlines()
        times = {line.split()[0]: line.split()[1:] for line in lines if line.startswith("cpu")}
        return sum(int(times[f"cpu{core}"][at]) for core in os.sched_getaffinity(0) for at in (3, 4))

    try:
        before, started = idle(), time.monotonic()
        time.sleep(seconds)
        ticks = (time.monotonic() - started) * os.sysconf("SC_CLK_TCK")
        return idle() - before < ticks * (len(os.sched_getaffinity(0)) - 1 / 3)
    except (AttributeError, OSError, ValueError, KeyError, IndexError):
        return False


def stop_at_once(*_):
    """Ends the program with one line, in the seconds in which nothing is under way but the loading of libraries."""
    if os.environ.get("RANK", "0") == "0":
        os.write(2, b"stopped: nothing was trained\n")
    os._exit(1)


def resumed(p, argv, args):
    """The arguments of the run to resume, with those typed anew that may change. Ends with one line for any other."""
    from engine.audio import DataError
    from engine.log import saved_run
    from engine.run import same_model

    optional = {action.dest for action in p._actions if action.default is None}
    for action in p._actions:
        action.default = argparse.SUPPRESS
    typed = vars(p.parse_args(argv))                                # without defaults: what was typed alone
    script = "grpo_asr" if "objective" in args else "diffro_tts" if "method" in args else "grpo_tts"
    try:
        saved = saved_run(args.resume, script)
    except DataError as error:
        p.error(str(error))
    where = f"--resume {args.resume}"
    if other := saved.keys() ^ vars(args).keys():
        p.error(f"{where}: was made by another script or version (--{sorted(other)[0].replace('_', '-')})")
    for action in p._actions:
        kind = {int: int, float: int | float}.get(action.type, bool if action.nargs == 0 else str)
        values = saved.get(action.dest)
        for value in values if action.nargs == "+" and isinstance(values, list) else [values]:
            if action.dest in saved and not (value is None and action.dest in optional) and (
                    not isinstance(value, kind) or isinstance(value, bool) != (kind is bool)
                    or action.choices and value not in action.choices):
                p.error(f"{where}: its log gives --{action.dest.replace('_', '-')} as {str(values)[:40]!r}")
    for name, value in typed.items():
        if name not in ("resume", *MAY_CHANGE) and value != saved[name] and not (
                name in ("out", "model") and same_model(value, saved[name])):
            p.error(f"{where}: has --{name.replace('_', '-')} {saved[name]}, not {value}; only "
                    + ", ".join(f"--{free.replace('_', '-')}" for free in MAY_CHANGE if free in args)
                    + f" can change. --adapter {args.resume} starts another run from its adapter")
    return argparse.Namespace(**{**saved, **{name: typed[name] for name in MAY_CHANGE if name in typed}})


def check_language(p, name):
    """Ends with one line where no language has this name."""
    if name not in (None, "en"):
        from engine.text import language_code
        try:
            language_code(name)
        except ValueError as error:
            p.error(f"--language: {error}")


def check(p, args):
    """Ends with one line where a value is out of range or two do not go together."""
    alone = getattr(args, "objective", "") == "supervised" or getattr(args, "method", "") == "diffro"
    flag = lambda name: f"--{name.replace('_', '-')}"  # noqa: E731
    for name, least in {**LEAST, "group": 1 if alone else 2}.items():
        value = getattr(args, name, None)
        if value is not None and not least <= value <= MOST:
            p.error(f"{flag(name)} must be from {least} to {MOST}, not {value}")
    for name in (*POSITIVE, *NOT_NEGATIVE):
        value, zero = getattr(args, name, 1.0), name in NOT_NEGATIVE and not (name == "max_seconds" and "codec" in args)
        if not (0 < value < float("inf") or zero and value == 0):
            p.error(f"{flag(name)} must be {'0 or more' if zero else 'above 0'}, and finite, not {value}")
    if args.micro % args.group and args.group % args.micro:
        p.error(f"--micro {args.micro} must be a multiple or a divisor of --group {args.group}")
    if args.batch % (processes := int(os.environ.get("WORLD_SIZE", 1))):
        p.error(f"--batch {args.batch} must be a multiple of the {processes} processes")
    rewards = args.rewards.split(",")
    if set(rewards) - {"R1", "R2", "R3"} or len(set(rewards)) < len(rewards):
        p.error(f"--rewards takes some of R1,R2,R3, each once, not {args.rewards}")
    if getattr(args, "objective", "") == "mwer" and (args.rewards != "R1" or args.micro % args.group):
        p.error("--objective mwer takes word errors, not --rewards, and compares a clip's samples in one pass: --micro "
                f"{args.micro} must be a multiple of --group {args.group}")
    if not 0 <= args.seed < 2 ** 31:
        p.error(f"--seed must be from 0 to 2^31 - 1, not {args.seed}")
    check_language(p, args.language)
    if "method" in args:
        if args.method == "diffro" and args.filter == "positive":
            p.error("--filter positive needs the advantages of --method grpo+diffro")
        if args.method == "grpo+diffro" and args.teach == "recording":
            p.error("--method grpo+diffro needs --teach rollout: GRPO learns from what was sampled")
