"""What a run leaves to read: a table before -> after, transcripts with their errors marked, times, summary.json."""
import jiwer

from rewards import edit_counts, normalize_text

COLUMNS = ["wer", "insertions", "deletions", "substitutions", "keyword_f1", "hallucination_rate", "length_ratio"]


def percent(share):
    """"12.3 %", or "-" for None."""
    return "-" if share is None else f"{100 * share:.1f} %"


def print_table(before, after):
    """One line a test set, before -> after; both are {name: metrics}."""
    print(f"\n{'before -> after':10}" + "".join(f"{column.replace('_', ' '):>20}" for column in COLUMNS))
    for name in before:
        cells = [f"{percent(before[name][c])} -> {percent(after[name][c])}" for c in COLUMNS]
        print(f"{name:15}" + "".join(f"{'-' if c == '- -> -' else c:>20}" for c in cells))


def print_transcripts(references, before, after, language, count=5):
    """The `count` utterances that were worst before: reference, transcript before and after, drawn by jiwer."""
    def errors(i):
        *wrong, length = edit_counts(references[i], before[i], language)
        return sum(wrong) / max(1, length)

    print(f"\n{count} transcripts, the worst before training (S substituted, D deleted, I inserted)")
    for i in sorted(range(len(references)), key=errors, reverse=True)[:count]:
        for when, transcripts in (("before", before), ("after", after)):
            print(when)
            print(draw(references[i], transcripts[i], language))
        print()


def draw(reference, hypothesis, language):
    """Reference over hypothesis, aligned, with the errors marked below."""
    reference, hypothesis = normalize_text(reference, language), normalize_text(hypothesis, language)
    if not reference or not hypothesis:
        return f"REF: {reference}\nHYP: {hypothesis}"
    drawn = jiwer.visualize_alignment(jiwer.process_words(reference, hypothesis), show_measures=False,
                                      skip_correct=False)
    return "\n".join(line for line in drawn.splitlines()[1:] if line.strip())


def print_times(phase, steps):
    """Seconds a step by phase, of what was trained; evaluation apart."""
    training = {name: seconds / max(1, steps) for name, seconds in phase.total.items() if name != "evaluate"}
    parts = ", ".join(f"{name} {seconds:.2f}" for name, seconds in training.items())
    print(f"seconds a step: {sum(training.values()):.2f} ({parts}); evaluation {phase.total['evaluate']:.0f} s in all; "
          f"peak memory {phase.peak_gib():.1f} GiB")


def best_and_worst(step, reward, scored, said, texts):
    """Of the group whose rewards (B, G) differ most: the reference, the best and the worst sample, with every part."""
    group = int(reward.std(dim=1).argmax())
    first = group * reward.shape[1]
    row = {"step": step, "file": str(said[first].path), "reference": said[first].text}
    for name, j in (("best", int(reward[group].argmax())), ("worst", int(reward[group].argmin()))):
        score = scored[first + j]
        row[name] = {"text": texts[first + j], "total": score.total, "R1": score.accuracy,
                     "R2": score.hallucination.reward(), "kind": score.hallucination.kind, "R3": score.keywords}
    return row
