"""The corpus comes in parts, and every stage takes those that are there.

    build/seed1/corpus/000.pt     features and texts: what recognisers learn from            by the stage `speech`
    build/seed1/speech/000.pt     samples of what the models of chapters 2 and 3 learn from               `speech`
    build/seed1/tokens/000/       the same as speech tokens: metadata.jsonl                               `tokens`
    build/seed1/decoded/000.pt    features of some of them as the codec says them                         `tokens`

Another --seed is other speech. So a build that broke off goes on where it was, and stages can run side by side
(`python -m pretrain together`): while voices speak the next part, recognisers and LLM learn from those before it. The
last HELD rows of the first part are for checking; what they say no training hears from another voice either.
"""
import json
import sys
import time
from pathlib import Path

import torch

BUILD, STARTED = Path("build"), time.time()     # main makes it build/seed1, and STARTED that of each stage
HELD = 256


def path(kind, part):
    """Where a part of this kind is."""
    return BUILD / kind / (f"{part:03}" if kind == "tokens" else f"{part:03}.pt")


def numbers(args):
    """Of all parts that this process makes: every `nth[1]`-th from `nth[0]` on."""
    return range(args.nth[0], -(-args.count // args.part), args.nth[1])


def save(data, kind, part):
    """A part, there for others only when it is whole."""
    file = path(kind, part)
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(data, file.with_suffix(".half"))
    file.with_suffix(".half").rename(file)


def wait_for(args, kind, part):
    """Whether a part is there; with --minutes, for as long, it waits for it: another process makes it."""
    while not path(kind, part).exists():
        if time.time() - STARTED > 60 * (args.minutes or 0):
            return False
        time.sleep(0.5)
    return True


def wait_for_first(args, kind):
    """The same for the first part, without which nothing can be trained."""
    if not wait_for(args, kind, 0):
        stage = "tokens" if kind == "tokens" else "speech"
        sys.exit(f"error: {path(kind, 0)}: not there; python -m pretrain {stage} --seed {args.seed} makes it")


def come(kind, seen):
    """What has come and was not in `seen`, which it is added to: [(number, part)]."""
    new = sorted({int(file.name[:3]) for file in (BUILD / kind).glob("[0-9]*") if file.suffix != ".half"} - seen)
    seen.update(new)
    return [(part, load(kind, part)) for part in new]


def load(kind, part):
    """A part: what was saved, or rows of tokens."""
    if kind == "tokens":
        return read_tokens(path(kind, part))
    return torch.load(path(kind, part), weights_only=True, mmap=True)


def read_tokens(folder):
    """metadata.jsonl of a folder with "text" and "tokens" (and "voice"): its rows."""
    with open(Path(folder) / "metadata.jsonl", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def size(args, part):
    """Utterances of a part: the last may be smaller."""
    return min(args.part, args.count - part * args.part)


def write_tokens(rows, part):
    """Rows of "text", "voice" and "tokens" as a part of build/tokens, there for others only when it is whole."""
    if path("tokens", part).exists():                               # of a build that broke off
        return
    half = path("tokens", part).with_suffix(".half")
    half.mkdir(parents=True, exist_ok=True)
    (half / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    half.rename(path("tokens", part))


def all_speech():
    """Samples of all parts, {"samples", "lengths", "text", "voice"}; the first part is the last, HELD rows its end."""
    found = [data for _, data in come("speech", set())[::-1]]
    return {**{key: torch.cat([data[key] for data in found]) for key in ("samples", "lengths")},
            **{key: sum((data[key] for data in found), []) for key in ("text", "voice")}}


def pace(args, steps):
    """(step, how far the training is, over 0 to 1) until it is over: by `steps`, or by the clock with --minutes, which
    count from the stage's start, whenever its first part came."""
    step, done, began = 0, 0.0, time.time()
    ends = STARTED + 60 * (args.minutes or 0)
    while done < 1:
        step += 1
        done = min(1.0, (time.time() - began) / max(1e-9, ends - began)) if args.minutes else step / steps
        yield step, done
