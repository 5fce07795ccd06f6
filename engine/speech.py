"""What chapters 2 and 3 share: the LLM that speaks, its voices and prompts, set-up, evaluation, what a run leaves.

    set_up(args, name)               the run, and the Studio: all that speaks, hears and judges
    Studio.prompts, codes_of         sentences -> prompts; samples -> the codec's codes
    evaluate(studio)                 one sample of every test sentence, and their figures by the second judge
    speech_figures, length_figures   what the log says of a step's samples
    finish(run, studio)              tables, a page to listen to and the summary of the best adapter
"""
import functools
import re
from argparse import Namespace
from collections import Counter
from dataclasses import dataclass, replace

import torch
from peft import PeftModel
from rapidfuzz.distance import Levenshtein
from transformers import AutoModelForCausalLM, AutoTokenizer

from data import batch_indices, load_folder, split_texts
from engine.audio import DataError
from engine.judges import Codec, Judge, Speaker, Token2Text
from engine.listen import write_page
from engine.models import add_adapters, load_pretrained, precision, quantization
from engine.parallel import alone, gather, share
from engine.report import percent, print_start, print_times, print_transcripts, print_tts_table
from engine.run import Run, load_adapter, pick_device, quiet
from engine.sampling import Prompts, generator_for, reference, sample, self_check
from engine.text import language_code
from rewards import Speech, asr_metrics, change_interval, repeats, tts_metrics

START, END = "<|SPEECH_GENERATION_START|>", "<|SPEECH_GENERATION_END|>"
EVAL_BATCH = 50  # test sentences at once: it decides which draw goes where


@dataclass(eq=False)
class Studio:
    """What speaks, and what hears and judges it: all frozen but the policy's adapters."""

    args: Namespace
    tokenizer: AutoTokenizer
    policy: PeftModel
    codec: Codec
    judge: Judge | None             # rewards; None for DiffRO alone, and where token2text does
    second: Judge                   # evaluates
    speaker: Speaker
    token2text: Token2Text | None   # DiffRO's reward, and R1 with --judge token2text
    code: torch.Tensor              # (V,) the codec's code of every token of the LLM, -1 where it is not speech
    voices: list
    dev: list                       # sentences that choose the best adapter
    tests: dict                     # {name: sentences to test on}
    before: dict = None             # {name: what `evaluate` gave before any step}
    third: Judge | None = None      # evaluates too: an ear from outside

    @property
    def end(self):
        """The token that ends speech."""
        return self.tokenizer.convert_tokens_to_ids(END)

    @property
    def limit(self):
        """Tokens of the longest speech allowed."""
        return int(self.args.max_seconds * self.codec.tokens_per_s)

    def waves(self, codes):
        """The waveform of each sample; None where no reward needs one."""
        if self.judge or "R3" in self.args.rewards:
            return self.codec.decode(codes)
        return [None] * len(codes)

    def heard(self, codes, waves):
        """What the model that rewards makes of each sample: the judge of its sound, or Token2Text of its tokens."""
        return self.judge.transcribe(waves) if self.judge else self.token2text.read(codes)

    def prompts(self, sentences):
        """Each to be said in its voice: Prompts of B rows."""
        return make_prompts(self.policy, self.tokenizer, [s.text for s in sentences], [s.voice for s in sentences])


# ---- load --------------------------------------------------------------------------------------------------

def load(args, device):
    """The tokenizer and the policy: a frozen base, fp32 LoRA on its linear layers."""
    tokenizer = load_pretrained(AutoTokenizer, args.model)
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.pad_token or END
    vocabulary = tokenizer.get_vocab()
    llasa = "<|s_0|>" in vocabulary and tokenizer.chat_template
    if {START, END} - set(vocabulary) or not (llasa or reads_phonemes(tokenizer)):
        raise DataError(f"--model {args.model}: its tokenizer has no speech tokens as Llasa (<|s_0|>, a chat template) "
                        f"or NeuTTS (<|speech_0|>), with {START} and {END}")
    if reads_phonemes(tokenizer):
        if language_code(args.language) != "en":
            raise DataError(f"--language {args.language}: NeuTTS is driven in English alone")
        espeak()                                                    # where it is missing, that is said at once
    base = load_pretrained(AutoModelForCausalLM, args.model, dtype=precision(device), device_map=device,
                           quantization_config=quantization(args.quantize))
    return tokenizer, add_adapters(base, "", args.lora_rank, args.seed)


def load_judges(args, device, first=True):
    """The codec, the judge that rewards (None unless `first`), the second judge and the speaker model, all frozen."""
    codec = Codec(args.codec, device, args.offload)
    judge = Judge(args.judge, device, args.offload, args.language, "--judge") if first else None
    second = Judge(args.second_judge, device, args.offload, args.language, "--second-judge")
    if judge and same_weights(judge.model, second.model):
        raise DataError("--second-judge must not be --judge: what is reported would be what was trained on")
    speaker = Speaker(args.speaker, device, args.offload)
    for model, flag in ((judge, "--judge"), (second, "--second-judge"), (speaker, "--speaker")):
        if model and model.rate != codec.rate:
            raise DataError(f"{flag}: hears {model.rate} Hz, but the codec speaks {codec.rate} Hz")
    return codec, judge, second, speaker


def load_third(args, device, rate, judges):
    """The judge of --third-judge, frozen; None without it."""
    if not args.third_judge:
        return None
    third = Judge(args.third_judge, device, args.offload, args.language, "--third-judge")
    if third.rate != rate:
        raise DataError(f"--third-judge: hears {third.rate} Hz, but the codec speaks {rate} Hz")
    if any(same_weights(third.model, judge.model) for judge in judges if isinstance(judge, Judge)):
        raise DataError("--third-judge is --judge or --second-judge: it would say the same once more")
    return third


def same_weights(one, other):
    """Whether two models are the same, under whatever names: a link, a copy, a folder and the hub id it came from."""
    weights, others = one.state_dict(), other.state_dict()
    return weights.keys() == others.keys() and all(
        w.shape == others[name].shape and torch.equal(w, others[name]) for name, w in weights.items())


@dataclass(eq=False)
class Voice:
    """A recording to go on from: what it says, as text, speech tokens and x-vector."""

    name: str
    text: str
    codes: list          # speech tokens
    vector: torch.Tensor  # (D,), unit length


def load_voices(args, codec, speaker):
    """The voices of --voices; after this the codec's encoder is not needed any more."""
    clips = load_folder(args.voices, codec.rate, 0, args.skip_bad)
    waves = [clip.waveform(codec.rate) for clip in clips]
    voices = [Voice(c.voice or c.path.stem, c.text, codes.tolist(), vector)
              for c, codes, vector in zip(clips, codec.encode(waves), speaker.embed(waves))]
    twice = [name for name, count in Counter(v.name for v in voices).items() if count > 1]
    if twice:
        raise DataError(f"--voices {args.voices}: has {twice[0]} twice; one recording a voice is what is gone on from")
    codec.decoder_only()
    return voices


def cast(sentences, voices):
    """Gives each sentence the voice that it names, else the next in turn by its place in the data. Raises DataError for
    a name that is not among the voices."""
    named = {v.name: v for v in voices}
    if unknown := next((s for s in sentences if s.voice and s.voice not in named), None):
        raise DataError(f'voice "{unknown.voice}" of "{unknown.text[:40]}" is not in --voices: {", ".join(named)}; '
                        'without "voice" they take turns')
    return [replace(s, voice=named.get(s.voice, voices[i % len(voices)])) for i, s in enumerate(sentences)]


def speech_tokens(tokenizer, codec, size):
    """(size,) the codec's code of every token of the LLM's vocabulary, -1 for those that are not speech."""
    vocabulary = tokenizer.get_vocab()
    code = torch.full((max(size, max(vocabulary.values()) + 1),), -1)
    for token, i in vocabulary.items():
        if found := re.fullmatch(r"<\|(?:s|speech)_(\d+)\|>", token):
            code[i] = int(found[1])
    if code[code >= 0].sort().values.tolist() != list(range(codec.count)):
        raise DataError(f"--model speaks {int((code >= 0).sum())} codes, up to {int(code.max())}, and --codec knows "
                        f"{codec.count}: not made for each other")
    return code


def check_lengths(policy, tokenizer, sentences, voices, limit, codec):
    """DataError where the longest prompt and the longest speech do not fit the LLM, or speech is bound to be cut."""
    if limit < codec.tokens_per_s:
        raise DataError(f"--max-seconds {limit / codec.tokens_per_s:g}: give a second of speech or more")
    longest = max(sentences, key=lambda s: len(s.text))
    ids = prompt_ids(tokenizer, [longest.text] * len(voices), voices).input_ids     # (voices, L)
    room = getattr(policy.config, "max_position_embeddings", None) or float("inf")
    if ids.shape[1] + limit > room:
        raise DataError(f"the longest prompt has {ids.shape[1]} tokens, with {limit} of speech more than the {room} "
                        "positions of the LLM: shorter recordings in --voices, or a lower --max-seconds")


# ---- prompts and codes --------------------------------------------------------------------------------------

def reads_phonemes(tokenizer):
    """Whether this is the tokenizer of a NeuTTS, which is given phonemes, and not of a Llasa, which is given text."""
    return tokenizer.convert_tokens_to_ids("<|speech_0|>") not in (None, tokenizer.unk_token_id)


@functools.cache
def espeak():
    """phonemizer's espeak-ng for English, set as NeuTTS's own code sets it; DataError where it is not installed."""
    try:
        from phonemizer.backend import EspeakBackend
        return EspeakBackend("en-us", preserve_punctuation=True, with_stress=True)
    except (ImportError, RuntimeError):
        raise DataError("NeuTTS reads phonemes: pip install phonemizer, and install espeak-ng") from None


def phonemes(text):
    """English text in IPA, with stress and punctuation."""
    return " ".join(espeak().phonemize([text])[0].split())


def prompt_ids(tokenizer, texts, voices):
    """The prompts of Llasa or NeuTTS, zero-shot: the voice's text and the new one; the voice's speech tokens, to be
    gone on."""
    if reads_phonemes(tokenizer):
        strings = [f"user: Convert the text to speech:<|TEXT_PROMPT_START|>{phonemes(voice.text)} {phonemes(text)}"
                   f"<|TEXT_PROMPT_END|>\nassistant:{START}" + "".join(f"<|speech_{c}|>" for c in voice.codes)
                   for text, voice in zip(texts, voices)]
        return tokenizer(strings, return_tensors="pt", padding=True, add_special_tokens=False)
    chats = [[{"role": "user", "content": "Convert the text to speech:<|TEXT_UNDERSTANDING_START|>"
               f"{voice.text} {text}<|TEXT_UNDERSTANDING_END|>"},
              {"role": "assistant", "content": START + "".join(f"<|s_{c}|>" for c in voice.codes)}]
             for text, voice in zip(texts, voices)]
    strings = tokenizer.apply_chat_template(chats, tokenize=False, continue_final_message=True,
                                            date_string="26 Jul 2024")  # Llama's template would write today's
    return tokenizer(strings, return_tensors="pt", padding=True, add_special_tokens=False)


def make_prompts(policy, tokenizer, texts, voices):
    """`texts` to be said in `voices`, a voice each: Prompts of B rows."""
    inputs = prompt_ids(tokenizer, texts, voices).to(policy.device)
    with torch.no_grad():
        return Prompts(policy.get_input_embeddings()(inputs.input_ids), inputs.attention_mask)


def codes_of(rollout, code):
    """The codec's codes of each sample: its speech tokens; the stop token and stray text tokens have no sound."""
    found = code.to(rollout.ids.device)[rollout.ids]                                # (N, T), -1 where not speech
    return [row[row >= 0].numpy() for row in found.masked_fill(~rollout.mask, -1).cpu()]


# ---- set up ----------------------------------------------------------------------------------------------------

def set_up(args, name):
    """(the run of chapter `name`, the Studio, the sentences to train on), checked, evaluated before any step."""
    device = pick_device(args.device)
    quiet()
    tokenizer, policy = load(args, device)
    tokens = args.judge == "token2text"
    codec, *judges = load_judges(args, device, first=getattr(args, "method", "grpo") != "diffro" and not tokens)
    token2text = Token2Text(args.token2text, device, codec.count) if tokens or "method" in args else None
    third = load_third(args, device, codec.rate, judges)
    code = speech_tokens(tokenizer, codec, policy.config.vocab_size)
    voices = load_voices(args, codec, judges[-1])
    texts, dev, tests = split_texts(args)
    texts, dev = cast(texts, voices), cast(dev, voices) * args.eval_samples
    tests = {name: cast(test, voices) * args.eval_samples for name, test in tests.items()}
    if getattr(args, "teach", "rollout") == "recording":
        if not all(t.codes for t in texts):
            raise DataError('--teach recording needs the recordings as "tokens" in the metadata.jsonl of --data')
        if (most := max(max(t.codes) for t in texts)) >= codec.count:
            raise DataError(f'--teach recording: --data has token {most}, and --codec knows {codec.count}: not of this '
                            "codec")
    studio = Studio(args, tokenizer, policy, codec, *judges, token2text, code, voices, dev, tests,
                    third=third)
    everything = sum(tests.values(), texts + dev)
    check_lengths(policy, tokenizer, everything, voices, studio.limit, codec)
    print_start(policy, f"{len(texts)} texts in {len(voices)} voices", dev, tests)
    check(studio, texts)
    run = Run(name, args, policy)
    if not all(s.seconds for test in (dev, *tests.values()) for s in test):
        print("not every test text has a recording: lengths are compared with those before training")
    with run.phase("evaluate"), reference(policy):
        studio.before = {name: evaluate(studio, test) for name, test in {"dev": dev, **tests}.items()}
    figures = studio.before["dev"][1]
    if not args.resume:
        run.begin(figures["wer"], eval=figures)
    print(f"{'before any step' if args.resume else 'step 0'}: dev WER by the second judge {percent(figures['wer'])}, "
          f"similarity {figures['similarity']:.3f}")
    return run, studio, texts


def check(studio, texts):
    """self_check on the first texts: asked for another text in the same voice, the least like them, must move the
    log-probs."""
    batch = [texts[i] for i in batch_indices(0, len(texts), studio.args.batch, studio.args.seed)]
    pool = [t.text for t in texts[:100]] + [" ".join(t.text for t in batch)]
    other = [max(pool, key=lambda text, s=s: Levenshtein.distance(text, s.text)) for s in batch]
    others = studio.prompts([replace(s, text=text) for s, text in zip(batch, other)])
    self_check(studio.policy, studio.prompts(batch), others, studio.args, studio.limit, studio.end, "another text")


# ---- evaluation --------------------------------------------------------------------------------------------------

def evaluate(studio, tests, before=None):
    """One sample at the training temperature of every test sentence: (Speech records, figures).

    The seed is always the same, so that before and after, and all runs, differ in the weights alone. Lengths are
    compared with the recordings', or, where one is missing, with those of the records `before` training.
    """
    args, codec, speech = studio.args, studio.codec, []
    for start in share(range(0, len(tests), EVAL_BATCH)):
        batch = tests[start:start + EVAL_BATCH]
        rollout = sample(studio.policy, studio.prompts(batch), 1, studio.limit, studio.end, args.temperature,
                         generator_for(0, start, studio.policy.device))
        codes = codes_of(rollout, studio.code)
        waves = codec.decode(codes)
        third = studio.third.transcribe(waves) if studio.third else [None] * len(waves)
        speech += [Speech(*row) for row in zip([s.text for s in batch], codes, waves, studio.second.transcribe(waves),
                                               rollout.truncated.tolist(), third)]
    speech = gather(speech)
    if all(s.heard is None for s in speech):
        raise DataError(f"--second-judge {args.second_judge}: failed on every test sentence")
    alike = studio.speaker.embed([s.wave for s in speech]) @ torch.stack([v.vector for v in studio.voices]).T
    similarity = alike[range(len(tests)), [studio.voices.index(s.voice) for s in tests]]                   # (N,)
    due = [s.seconds * codec.tokens_per_s for s in tests]
    due = due if all(due) else [len(s.codes) for s in before or speech]
    figures = tts_metrics(speech, similarity.tolist(), due, codec.tokens_per_s, codec.rate, args.language,
                          studio.policy.device)
    if studio.third:
        if all(s.third is None for s in speech):
            raise DataError(f"--third-judge {args.third_judge}: failed on every test sentence")
        texts, heard = zip(*[(s.text, s.third) for s in speech if s.third is not None])
        figures["third_wer"] = asr_metrics(texts, heard, (), args.language)["wer"]
    if studio.token2text:  # DiffRO's reward reads the same samples: a gap to the second judge that opens is hacking
        own = asr_metrics([s.text for s in tests], studio.token2text.read([s.codes for s in speech]), (), args.language)
        figures["token2text_wer"] = own["wer"]
    return speech, figures


def evaluate_step(run, studio):
    """The evaluation after a step, into the log; the best adapter by the second judge's WER is kept."""
    with run.phase("evaluate"):
        figures = evaluate(studio, studio.dev, studio.before["dev"][0])[1]
    run.evaluated(figures["wer"], f"dev WER by the second judge {percent(figures['wer'])}, similarity "
                  f"{figures['similarity']:.3f}, length {figures['length_ratio']:.2f}", eval=figures)


# ---- what a run leaves behind ------------------------------------------------------------------------------------

def speech_figures(speech, parts, judged, language):
    """What the log says of N judged samples: every part of the reward, and how they are heard."""
    heard = [s for s in speech if s.heard is not None]
    return {**{name: float(part.nanmean()) for name, part in parts.items()},
            "wer": 1 - sum(s.accuracy(language) for s in heard) / max(1, len(heard)),  # per sample, clipped at 1
            "judge_failed": int((~judged).sum()), "empty": sum(s.heard == "" for s in speech) / len(speech)}


def length_figures(codes, codec):
    """What the log says of the speech tokens of N samples: how many, how long, how many in a loop."""
    mean = float(torch.tensor([len(c) for c in codes]).float().mean())
    return {"tokens": mean, "speech_s": mean / codec.tokens_per_s,
            "repetition": sum(repeats(c, round(codec.tokens_per_s)) for c in codes) / len(codes)}


def finish(run, studio, listened=10):
    """Evaluates the best adapter; table, transcripts, times, the page to listen to, summary.json."""
    load_adapter(run.policy, run.folder / "adapter")
    with run.phase("evaluate"):
        after = {name: evaluate(studio, test, studio.before[name][0]) if run.state["best_step"] else studio.before[name]
                 for name, test in studio.tests.items()}                    # no step was better: the same adapter
    before, language = studio.before, studio.args.language
    metrics = {name: {"before": before[name][1], "after": after[name][1]} for name in after}
    for name, found in metrics.items():
        ears = {"wer": "heard", **({"third_wer": "third"} if studio.third else {})}
        was, now = before[name][0], after[name][0]
        found["change"] = {key: change_interval([s.text for s in now], [getattr(s, ear) for s in was],
                                                [getattr(s, ear) for s in now], language) for key, ear in ears.items()}
    first = next(iter(after))
    was, now = (metrics[first][when]["wer"] for when in ("before", "after"))
    told = run.summary(f"{first} WER by the second judge, sampled, best adapter", was, now, metrics)
    print_tts_table(metrics)
    heard = [[s.heard or "" for s in found[first][0]] for found in (before, after)]
    print_transcripts([s.text for s in before[first][0]], *heard, language)
    print_times(run.phase, run.state["step"])
    rows = [{"text": b.text, "voice": s.voice.name, "before": {"wave": b.wave, "heard": b.heard or ""},
             "after": {"wave": a.wave, "heard": a.heard or ""}}
            for name in after for s, b, a in list(zip(
                studio.tests[name], before[name][0], after[name][0]))[:listened // len(after)]]
    title = f"Before and after {run.state['best_step']} steps"
    with run.log.writing():
        page = alone(write_page)(run.folder / "samples", rows, studio.codec.rate, title, language)
    print(f"to listen: {page}\n{told}")
