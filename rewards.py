"""Rewards and metrics: what a transcript or a spoken sentence is worth, as pure functions.

Recognition, pure functions of text:
    asr_accuracy        R1   1 - WER, in [0, 1]                                              [paper]
    hallucination       R2   the whole reward is -1 where something was not said             [paper; the rules are ours]
    keyword_score       R3   mean of keyword precision and recall                            [paper]
    asr_reward               one record with every part and the total
    asr_metrics              the same quantities over a test set: WER, errors by kind, F1, hallucination rate
Speech:
    asr_accuracy        R1   of what a judge (a recogniser) makes of the waveform            [paper]
    duration_reward     R2   distance to the median length of the group                      [paper]
    diversity_reward    R3   edit distance to the rest of the group + spread of F0           [paper; F0's norm ours]
    tts_reward               all of them over a step's samples, one record a sample
    tts_metrics              the figures of a test set
The models that hear and speak are in engine/judges.py, the normaliser of texts in engine/text.py.
Marks: [paper] arXiv 2509.18569, [FA] its sister report arXiv 2509.12508, [choice] ours.
"""
import functools
import itertools
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass

import jiwer
import numpy as np
import torch
import torchaudio
from rapidfuzz.distance import Levenshtein

from engine.text import by_character, normalize_text

# ---- words -------------------------------------------------------------------------------------------------

def edit_counts(text, hypothesis, language="en"):
    """(substitutions, deletions, insertions, length of the text) in tokens; defined for empty text."""
    text, hypothesis = normalize_text(text, language), normalize_text(hypothesis, language)
    if not text or not hypothesis:
        return 0, len(text.split()), len(hypothesis.split()), len(text.split())
    out = jiwer.process_words(text, hypothesis)
    return out.substitutions, out.deletions, out.insertions, len(text.split())


def repeats_itself(text):
    """Whether a word stands three times in a row, or a pair of words."""
    words = text.split()
    return any(words[i] == words[i + 1] == words[i + 2] for i in range(len(words) - 2)) or any(
        words[i:i + 2] == words[i + 2:i + 4] for i in range(len(words) - 3))


# ---- R1 ----------------------------------------------------------------------------------------------------

def asr_accuracy(text, hypothesis, language="en"):
    """R1 [paper]: 1 - WER; clipped to [0, 1] [choice]; CER in languages without spaces.

    An empty text (nothing was said) gives 1 for an empty hypothesis and 0 for any text [choice].
    """
    substitutions, deletions, insertions, length = edit_counts(text, hypothesis, language)
    if length == 0:
        return float(insertions == 0)
    return max(0.0, 1.0 - (substitutions + deletions + insertions) / length)


# ---- R2 ----------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Hallucination:
    """What was found: `kind` ("" when nothing), and which tokens of the normalised hypothesis, [start, end)."""

    kind: str = ""
    start: int = 0
    end: int = 0
    length: int = 0  # tokens of the whole hypothesis

    @property
    def found(self):
        return bool(self.kind)

    def reward(self, proportional=False):
        """-1 when found [paper], or minus the hallucinated share of the hypothesis, at least -1 [FA]; else 0."""
        if not self.found:
            return 0.0
        return -(self.end - self.start) / self.length if proportional else -1.0


def hallucination(text, hypothesis, language="en"):
    """R2: text that was not said. The paper names the kinds, the rules and thresholds are ours [choice].

    The first that applies, on normalised tokens:
    - "silence"     the text is empty and the hypothesis is not
    - "language"    over 30 % of the tokens are of a script that the text does not use (translated, or another
                    language; a language of the same script passes this rule)
    - "repetition"  one to eight tokens said three times or more in a row, at least twice more than the text
                    says them, and the alignment finds those two inserted (a misspelt genuine repetition has none);
                    or two to four letters, or a digit but 0, six times in a row inside a token, twice more than in
                    the text
    - "beyond"      four tokens or more in a row (eight characters) for which the alignment finds nothing said
    - "replaced"    five tokens or more in a row (ten characters) that all differ from what was said in their place,
                    and do not look misheard: their spelling, spaces apart, is less than 0.3 like it
                    (1 - edit distance / length of the longer)
    """
    text, hypothesis = normalize_text(text, language), normalize_text(hypothesis, language)
    said, heard = text.split(), hypothesis.split()
    if not heard or heard == said:
        return Hallucination()
    if not said:
        return Hallucination("silence", 0, len(heard), len(heard))
    known = scripts(text)
    foreign = [bool(known and scripts(token) - known) for token in heard]
    if sum(foreign) > 0.3 * len(heard):
        return Hallucination("language", foreign.index(True), len(heard) - foreign[::-1].index(True), len(heard))
    alignment = jiwer.process_words(text, hypothesis).alignments[0]
    chunks = [c for c in alignment if c.type == "insert"]
    inserted = {i for c in chunks for i in range(c.hyp_start_idx, c.hyp_end_idx)}
    for found in re.finditer(r"(?<!\S)(\S+(?: \S+){0,7}?)(?: \1(?!\S))+", hypothesis):
        unit, times = found[1], (len(found[0]) + 1) // (len(found[1]) + 1)
        if times >= 3 and times >= longest_run(unit, text) + 2:
            start, width = len(hypothesis[:found.start()].split()), len(unit.split())
            surplus = times - max(1, longest_run(unit, text))
            end = start + times * width
            if len(inserted & set(range(start, end))) >= 2 * width:
                return Hallucination("repetition", end - surplus * width, end, len(heard))
    for i, token in enumerate(heard):
        stutter = re.search(r"(\D{2,4}?|[1-9])\1{5,}", token)
        if stutter and stutter[0][:-2 * len(stutter[1])] + stutter[1] not in text:
            return Hallucination("repetition", i, i + 1, len(heard))
    limit = 8 if by_character(language) else 4
    for chunk in chunks:
        if chunk.hyp_end_idx - chunk.hyp_start_idx >= limit:
            return Hallucination("beyond", chunk.hyp_start_idx, chunk.hyp_end_idx, len(heard))
    for wrong, run in itertools.groupby(alignment, key=lambda chunk: chunk.type != "equal"):
        first, *_, last = [*run] * 2
        start, end, place = first.hyp_start_idx, last.hyp_end_idx, said[first.ref_start_idx:last.ref_end_idx]
        if wrong and end - start >= limit * 5 // 4 and Levenshtein.normalized_similarity(
                "".join(place), "".join(heard[start:end])) < 0.3:
            return Hallucination("replaced", start, end, len(heard))
    return Hallucination()


def longest_run(unit, text):
    """How many times in a row `unit` stands in `text`, at most; both are normalised tokens joined by spaces."""
    runs = re.finditer(rf"(?<!\S){re.escape(unit)}(?: {re.escape(unit)})*(?!\S)", text)
    return max(((len(run[0]) + 1) // (len(unit) + 1) for run in runs), default=0)


def scripts(text):
    """The scripts of the letters of `text`: {"LATIN", "CJK", ...}. Japanese counts as one script with Chinese."""
    names = {re.split("[ -]", unicodedata.name(c, "UNKNOWN"))[0]
             for c in text if c.isalpha() and unicodedata.category(c) != "Lm"}
    return {"CJK" if name in ("HIRAGANA", "KATAKANA", "IDEOGRAPHIC") else name for name in names}


# ---- R3 ----------------------------------------------------------------------------------------------------

@functools.lru_cache(maxsize=64)
def keyword_list(keywords, language):
    """(the frozenset `keywords` as normalised tokens, the widths that occur): once a run, not once a transcript."""
    keywords = frozenset(normalize_text(k, language) for k in keywords) - {""}
    return keywords, {len(k.split()) for k in keywords}


def keyword_counts(text, hypothesis, keywords, language="en"):
    """(hits, claimed, expected): keywords found in both, in the hypothesis, in the text; with multiplicity. A long list
    is fastest as one frozenset, kept from call to call."""
    keywords, widths = keyword_list(frozenset(keywords), language)

    def count(words):
        tokens = normalize_text(words, language).split()
        grams = (" ".join(tokens[i:i + n]) for n in widths for i in range(len(tokens) - n + 1))
        return Counter(g for g in grams if g in keywords)

    expected, claimed = count(text), count(hypothesis)
    return (expected & claimed).total(), claimed.total(), expected.total()


def keyword_score(text, hypothesis, keywords, language="en"):
    """R3 [paper]: mean of keyword precision and recall, in [0, 1].

    `keywords` is the list to watch for: the utterance's own, or a whole domain's (then a name put in the place of
    another costs precision). 1 when neither text holds one, 0 when only one of them does [choice].
    """
    hits, claimed, expected = keyword_counts(text, hypothesis, keywords, language)
    if not claimed or not expected:
        return float(claimed == expected)
    return (hits / claimed + hits / expected) / 2


# ---- the mix -----------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class AsrReward:
    """Every part of one transcript's reward, whether it counts or not, and the total that does."""

    errors: int                   # substituted, deleted and inserted tokens
    accuracy: float               # R1, in [0, 1]
    hallucination: Hallucination  # R2, its reward in [-1, 0]
    keywords: float               # R3, in [0, 1]
    total: float


def asr_reward(text, hypothesis, keywords=(), language="en", rewards=("R1",), proportional=False):
    """The reward of one transcript: the sum of R1 and R3, of those named in `rewards`; -1 in all where R2 is named and
    finds a hallucination [paper].

    So with R2 one invention costs more than saying nothing (0), however much of the rest is right. `proportional` is
    the milder form of the sister report: minus the hallucinated share of the transcript, added to the others; -1 in all
    for the wrong language alone [FA]. Raises ValueError for an unknown part.
    """
    unknown = set(rewards) - {"R1", "R2", "R3"}
    if unknown or not rewards:
        raise ValueError(f"rewards must be some of R1, R2, R3, not {sorted(rewards)}")
    accuracy = asr_accuracy(text, hypothesis, language)
    invented = hallucination(text, hypothesis, language)
    score = keyword_score(text, hypothesis, keywords, language)
    total = accuracy * ("R1" in rewards) + score * ("R3" in rewards)
    if "R2" in rewards and proportional and invented.kind != "language":
        total += invented.reward(proportional)
    elif "R2" in rewards and invented.found:
        total = -1.0
    return AsrReward(sum(edit_counts(text, hypothesis, language)[:3]), accuracy, invented, score, total)


def asr_metrics(texts, hypotheses, keywords=(), language="en", listed=()):
    """Corpus-level figures of one test set, as a dict of floats.

    `wer`, `insertions`, `deletions`, `substitutions`: per token said (None when nothing was said at all);
    `keyword_precision`, `keyword_recall`, `keyword_f1`: over all keywords of the set (None without any);
    `hallucination_rate`: share of utterances with one; `length_ratio`: tokens of the hypotheses over tokens of the
    texts (None likewise). With `listed`, the keyword list of every utterance's prompt: `listed_not_said`, the share of
    listed words that were not said and yet transcribed.
    """
    counts = [edit_counts(t, h, language) for t, h in zip(texts, hypotheses, strict=True)]
    sub, dele, ins, length = (sum(column) for column in zip(*counts))
    spoken = [keyword_counts(t, h, keywords, language) for t, h in zip(texts, hypotheses)]
    hits, claimed, expected = (sum(column) for column in zip(*spoken))
    invented = [hallucination(t, h, language).found for t, h in zip(texts, hypotheses)]
    share = lambda n, of: n / of if of else None  # noqa: E731
    distractors = [(w, h) for t, h, words in zip(texts, hypotheses, listed)
                   for w in words if not keyword_counts(t, "", [w], language)[2]]
    taken = sum(keyword_counts(h, "", [w], language)[2] > 0 for w, h in distractors)
    return {
        "wer": share(sub + dele + ins, length), "insertions": share(ins, length), "deletions": share(dele, length),
        "substitutions": share(sub, length), "keyword_precision": share(hits, claimed),
        "keyword_recall": share(hits, expected), "keyword_f1": share(2 * hits, expected and claimed + expected),
        "listed_not_said": share(taken, len(distractors)), "hallucination_rate": sum(invented) / len(invented),
        "length_ratio": share(length - dele + ins, length), "utterances": len(texts),
    }


# ---- speech: R2 and R3 -------------------------------------------------------------------------------------

def duration_reward(lengths):
    """R2 [paper]: -|o_i - T_m| / T_m, T_m the median length of the group: (B, G) tokens -> (B, G), at most 0.

    The median of an even group is the mean of its middle two; a group of empty samples gets 0 [choice].
    """
    lengths = lengths.float()
    median = lengths.quantile(0.5, dim=1, keepdim=True)
    return -(lengths - median).abs() / median.clamp(min=1)


def token_diversity(group):
    """First term of R3 [paper]: 1/G sum_j dist(o_i, o_j) / |o_i| of each of G token sequences, itself among the j, dist
    the edit distance in tokens: G numbers from 0 up. An empty sequence counts as one token long [choice]."""
    distance = np.array([[Levenshtein.distance(a, b) for b in group] for a in group])
    return distance.mean(axis=1) / [max(1, len(sequence)) for sequence in group]


def voiced_pitch(waves, rate, device="cpu", batch=16):
    """F0 in Hz of the voiced frames of each waveform, as N tensors.

    Pitch by torchaudio (cross-correlation, median-smoothed, frames of 20 ms, 60 to 400 Hz), `batch` rows at a time on
    `device`. A frame counts as voiced when it has over a tenth of the loudest frame's amplitude and its pitch lies
    inside that range [choice].
    """
    hop, smooth, voiced = 160, 15, [torch.zeros(0)] * len(waves)        # 20 ms at 8 kHz, where pitch needs no more
    long = [i for i, wave in enumerate(waves) if len(wave) >= rate / 2]          # others: too short for the smoothing
    long.sort(key=lambda i: len(waves[i]))
    for alike in (long[k:k + batch] for k in range(0, len(long), batch)):
        rows = [torch.as_tensor(waves[i], dtype=torch.float32, device=device) for i in alike]
        rows = [torchaudio.functional.resample(row, rate, 8000) for row in rows]
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        pitches = torchaudio.functional.detect_pitch_frequency(padded, 8000, 0.02, smooth, 60, 400)
        levels = torch.nn.functional.pad(padded, (0, hop)).unfold(1, hop, hop).square().mean(dim=2).sqrt()
        for i, row, pitch, level in zip(alike, rows, pitches.cpu(), levels.cpu()):
            frames = -(-len(row) // hop) - smooth // 2          # what the row alone would get: padding has no say
            pitch, level = pitch[:frames], level[:frames]
            voiced[i] = pitch[(level > 0.1 * level.max()) & (pitch > 60) & (pitch < 400)]
    return voiced


def f0_spread(waves, rate, device="cpu"):
    """Standard deviation of F0 over voiced frames, in semitones, of each waveform: (N,); 0 where nothing is voiced."""
    return torch.stack([(12 * torch.log2(f0)).std(correction=0) if len(f0) > 1 else torch.tensor(0.0)
                        for f0 in voiced_pitch(waves, rate, device)])


def diversity_reward(codes, waves, group, rate, device="cpu"):
    """R3 [paper]: token diversity + std(normalised F0), N = B G samples -> (B, G), from 0 up.

    How F0 is normalised is not published: here by its mean over the sample's own voiced frames, so the second term is
    a pure number, 0.1 to 0.2 for speech (semitones / 17) [choice].
    """
    tokens = np.concatenate([token_diversity(codes[i:i + group]) for i in range(0, len(codes), group)])
    pitch = [float((f0 / f0.mean()).std(correction=0)) if len(f0) > 1 else 0.0
             for f0 in voiced_pitch(waves, rate, device)]
    return torch.tensor(tokens + np.array(pitch), dtype=torch.float32).view(-1, group)


# ---- speech: the mix ---------------------------------------------------------------------------------------

@dataclass
class Speech:
    """One spoken sample, as all rewards see it."""

    text: str                # what was to be said
    codes: np.ndarray        # (T,) speech tokens, the stop token not among them
    wave: np.ndarray | None  # (samples,) float32; None where no reward needs it
    heard: str | None        # what the judge heard; None where it failed
    truncated: bool = False  # no stop token came
    third: str | None = None  # what the third judge heard, where there is one

    def accuracy(self, language="en"):
        """R1; silence and an empty transcript get the worst, 0, and NaN says that the judge failed."""
        return float("nan") if self.heard is None else asr_accuracy(self.text, self.heard, language)


def tts_reward(speech, group, rewards=("R1",), language="en", rate=16_000, device="cpu"):
    """The rewards of N = B G samples: (total (B, G), {part: (B, G)}, judged (B, G) bool).

    The total is the plain sum of the parts in `rewards` (of "R1", "R2", "R3"); the others are computed for the log,
    except R3, which costs a pitch tracker, on `device`. Where the judge failed `judged` is false and the total is the
    mean of the group's judged samples: its own advantage is 0. Raises ValueError for an unknown part.
    """
    unknown = set(rewards) - {"R1", "R2", "R3"}
    if unknown or not rewards:
        raise ValueError(f"rewards must be some of R1, R2, R3, not {sorted(rewards)}")
    accuracy = torch.tensor([s.accuracy(language) for s in speech]).view(-1, group)
    judged = ~accuracy.isnan()
    parts = {"R1": accuracy, "R2": duration_reward(torch.tensor([len(s.codes) for s in speech]).view(-1, group))}
    if "R3" in rewards:
        parts["R3"] = diversity_reward([s.codes for s in speech], [s.wave for s in speech], group, rate, device)
    total = sum(parts[name] for name in rewards).where(judged, torch.nan)   # a failed sample has no say in the mean
    mean = total.nanmean(dim=1, keepdim=True).nan_to_num(0.0)
    return torch.where(judged, total, mean), parts, judged


# ---- speech: metrics ---------------------------------------------------------------------------------------

def change_interval(texts, before, after, language="en", draws=10_000):
    """95 % interval of the change in WER of the same texts, heard as `before` and as `after`: [low, high], by a paired
    bootstrap over the texts; samples of one text stay together, pairs with a None (the judge failed) are left out
    [choice]."""
    place = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    counts = np.zeros((3, len(place)))                                              # errors, errors, words
    for text, *pair in zip(texts, before, after, strict=True):
        if None not in pair:
            (*wrong, length), (*still_wrong, _) = (edit_counts(text, heard, language) for heard in pair)
            counts[:, place[text]] += sum(wrong), sum(still_wrong), length
    drawn = np.random.default_rng(0).multinomial(len(place), np.full(len(place), 1 / len(place)), draws)
    was, now, length = counts @ drawn.T
    return np.percentile((now - was) / length.clip(min=1), [2.5, 97.5]).tolist()


def repeats(codes, least):
    """Whether `least` tokens or more in a row only repeat those 1 to 8 places before. With `least` a second of speech
    that is a loop, not a held sound [choice]."""
    for width in range(1, 9):
        same = np.concatenate([[0], codes[width:] == codes[:-width], [0]])
        changes = np.flatnonzero(np.diff(same))
        if len(changes) and (changes[1::2] - changes[::2]).max() >= least:
            return True
    return False


def tts_metrics(speech, similarity, due, tokens_per_s, rate, language="en", device="cpu"):
    """Figures of one test set of N samples, as a dict of floats.

    `wer` and its kinds by the judge that made the transcripts; `similarity` (N,) cosines to the voice asked for;
    `due` (N,) tokens that each sentence took in its recording; `f0_spread` in semitones; `words_per_s` of
    the text over the sound's length; shares of samples `truncated` and in a loop (`repetition`). Raises ValueError
    where the judge failed on all of them.
    """
    heard = [s for s in speech if s.heard is not None]
    if not heard:
        raise ValueError("the judge failed on every sample")
    spoken = np.array([len(s.codes) for s in speech])
    metrics = asr_metrics([s.text for s in heard], [s.heard for s in heard], (), language)
    words = sum(len(normalize_text(s.text, language).split()) for s in speech)
    return {
        **{name: metrics[name] for name in ("wer", "insertions", "deletions", "substitutions")},
        "similarity": float(np.mean(similarity)), "length_ratio": float(spoken.sum() / max(1, sum(due))),
        "words_per_s": words * tokens_per_s / max(1, int(spoken.sum())),
        "f0_spread": float(f0_spread([s.wave for s in speech], rate, device).mean()),
        "truncated": float(np.mean([s.truncated for s in speech])),
        "repetition": float(np.mean([repeats(s.codes, round(tokens_per_s)) for s in speech])),
        "judge_failed": 1 - len(heard) / len(speech), "utterances": len(speech),
    }
