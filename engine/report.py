"""What a run leaves to read: figures for its log, tables before -> after, transcripts with errors marked, times."""
import os

import jiwer

from engine.log import adapted
from engine.text import normalize_text
from rewards import edit_counts

COLUMNS = {"wer": "WER", "insertions": "ins", "deletions": "del", "substitutions": "sub", "keyword_f1": "keyword F1",
           "hallucination_rate": "invented", "length_ratio": "length"}

TTS_ROWS = {"wer": ("WER by the second judge, %", 100), "insertions": ("  insertions, %", 100),
            "deletions": ("  deletions, %", 100), "substitutions": ("  substitutions, %", 100),
            "third_wer": ("WER by the third judge, %", 100), "token2text_wer": ("WER by the reward model, %", 100),
            "similarity": ("similarity to the voice", 1),
            "length_ratio": ("length / the recording's", 1), "words_per_s": ("words a second", 1),
            "f0_spread": ("F0 spread, semitones", 1), "truncated": ("never stopped, %", 100),
            "repetition": ("in a loop, %", 100)}


def percent(share):
    """"12.3 %", or "-" for None."""
    return "-" if share is None else f"{100 * share:.1f} %"


def group_figures(reward):
    """What the log says of rewards (B, G): their mean, the spread inside a group, the share of groups with none."""
    return {"reward": float(reward.mean()), "reward_std": float(reward.std(dim=1, correction=0).mean()),
            "no_signal": float((reward == reward[:, :1]).all(dim=1).float().mean())}


def rollout_figures(rollout, phase):
    """What the log says of a rollout: how long, how fast, how many without an end, how sure of itself (nats)."""
    tokens = rollout.mask.sum(dim=1).float()
    return {"tokens": float(tokens.mean()), "tokens_per_s": float(tokens.sum()) / max(1e-9, phase.step["rollout"]),
            "truncated": float(rollout.truncated.float().mean()),
            "entropy": float(rollout.entropy[rollout.mask].mean())}


def print_start(policy, trained, dev, tests):
    """One line on what is about to happen: what is trained on, as `trained` says, how many items choose the best
    adapter, what is tested, what is adapted."""
    what, sets = adapted(policy), ", ".join(f"{name} ({len(test)})" for name, test in tests.items())
    print(f"trains on {trained}; chooses by {len(dev)}, tests on {sets}; adapts {what['layers']} layers "
          f"({what['trained'] / 1e6:.2f} of {what['weights'] / 1e6:.1f} M weights)")


def print_table(metrics):
    """One line a test set, before -> after in percent: {name: {"before": metrics, "after": metrics}}."""
    print(f"\n{'%':10}" + "".join(f"{title:>15}" for title in COLUMNS.values()))
    for name, row in metrics.items():
        pairs = [(row["before"][column], row["after"][column]) for column in COLUMNS]
        cells = ["-" if b is None else f"{100 * b:.1f} -> {100 * a:.1f}" for b, a in pairs]
        print(f"{name:10}" + "".join(f"{cell:>15}" for cell in cells))


def print_tts_table(metrics):
    """{test set: figures before and after} of a speaking model, side by side; percent where the title says so."""
    print(f"\n{'':28}" + "".join(f"{name:>11}{'':9}" for name in metrics))
    print(f"{'':28}" + "".join(f"{'before':>8}{'after':>9}   " for _ in metrics))
    for column, (title, scale) in TTS_ROWS.items():
        if any(column not in m["after"] for m in metrics.values()):     # only chapter 3 has a reward model that reads
            continue
        cells = [[f"{scale * m[when][column]:.{1 if scale > 1 else 3}f}" for when in ("before", "after")]
                 for m in metrics.values()]
        print(f"{title:28}" + "".join(f"{was:>8} ->{now:>6}   " for was, now in cells))
        if column in ("wer", "third_wer"):
            spans = [[100 * edge for edge in m["change"][column]] for m in metrics.values()]
            print(f"{'  change, 95 % interval':28}" + "".join(f"{low:+8.1f} to{high:+6.1f}   " for low, high in spans))


def print_transcripts(texts, before, after, language, count=5):
    """The `count` utterances that were worst before: text, transcript before and after, drawn by jiwer."""
    def errors(i):
        *wrong, length = edit_counts(texts[i], before[i], language)
        return sum(wrong) / max(1, length)

    print(f"\n{count} transcripts, the worst before training (S substituted, D deleted, I inserted)")
    for i in sorted(range(len(texts)), key=errors, reverse=True)[:count]:
        for when, transcripts in (("before", before), ("after", after)):
            print(when)
            print(draw(texts[i], transcripts[i], language))
        print()


def draw(text, hypothesis, language):
    """Text over hypothesis, aligned, with the errors marked below."""
    text, hypothesis = normalize_text(text, language), normalize_text(hypothesis, language)
    if not text or not hypothesis:
        return f"REF: {text}\nHYP: {hypothesis}"
    drawn = jiwer.visualize_alignment(jiwer.process_words(text, hypothesis), show_measures=False, skip_correct=False)
    return "\n".join(line for line in drawn.splitlines()[1:] if line.strip())


def print_times(phase, steps):
    """Seconds a step by phase, of what was trained; evaluation apart."""
    training = {name: seconds / max(1, steps) for name, seconds in phase.total.items() if name != "evaluate"}
    parts = ", ".join(f"{name} {seconds:.2f}" for name, seconds in training.items())
    shared = "; threads wait passively: other programs were at work" * (os.environ.get("OMP_WAIT_POLICY") == "PASSIVE")
    print(f"seconds a step: {sum(training.values()):.2f} ({parts}); evaluation {phase.total['evaluate']:.0f} s in all; "
          f"peak memory {phase.peak_gib():.1f} GiB{shared}")


def best_and_worst(reward):
    """Of the group whose rewards (B, G) differ most: {"best": which of the B G samples, "worst": which}."""
    group = int(reward.std(dim=1, correction=0).argmax())
    first = group * reward.shape[1]
    return {"best": first + int(reward[group].argmax()), "worst": first + int(reward[group].argmin())}


def transcripts_row(reward, scored, clip_of, texts):
    """A line of samples.jsonl: what was said in the group that differs most, its best and worst sample, every part."""
    ends = best_and_worst(reward)
    row = {"file": str(clip_of[ends["best"]].path), "said": clip_of[ends["best"]].text}
    for name, i in ends.items():
        score = scored[i]
        row[name] = {"text": texts[i], "total": score.total, "R1": score.accuracy, "R2": score.hallucination.reward(),
                     "kind": score.hallucination.kind, "R3": score.keywords}
    return row


def speech_row(reward, parts, speech):
    """The same for speech; "text" is what the judge heard."""
    ends = best_and_worst(reward)
    row = {"said": speech[ends["best"]].text}
    for name, i in ends.items():
        row[name] = {"text": speech[i].heard, "total": float(reward.view(-1)[i]), "tokens": len(speech[i].codes),
                     **{part: float(values.view(-1)[i]) for part, values in parts.items()}}
    return row
