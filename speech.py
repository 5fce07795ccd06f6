"""What chapters 2 and 3 share: the LLM that speaks, its voices and prompts, the evaluation, what a run leaves behind.

    load, load_judges, load_voices          the models, and the references to speak like
    make_prompts, codes_of                  text and voice -> prompts; samples -> the codec's codes
    judged_advantages                       Eq. 1 where the judge failed on some samples
    evaluate, self_check                    before, during and after training; what can go wrong in silence
    speech_row, finish                      samples of the log; tables, pages and summary of a run
"""
import functools
import re
from dataclasses import dataclass

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import quantize
from data import DataError, load_adapter, load_folder, load_pretrained
from grpo_asr import completion_logprobs, group_advantages, kl_k3
from judges import Codec, Judge, Speaker
from listen import write_page
from report import best_and_worst, percent, print_times, print_transcripts, print_tts_table
from rewards import Speech, asr_metrics, tts_metrics
from sampling import Prompts, generator_for, sample

START, END = "<|SPEECH_GENERATION_START|>", "<|SPEECH_GENERATION_END|>"


# ---- load --------------------------------------------------------------------------------------------------

def load(args, device):
    """The tokenizer and the policy: frozen base in eval mode (no dropout anywhere), fp32 LoRA on its linear layers."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    tokenizer = load_pretrained(AutoTokenizer, args.model)
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.pad_token or END
    vocabulary = tokenizer.get_vocab()
    llasa = "<|s_0|>" in vocabulary and tokenizer.chat_template
    if {START, END} - set(vocabulary) or not (llasa or reads_phonemes(tokenizer)):
        raise DataError(f"--model {args.model}: its tokenizer has no speech tokens as Llasa (<|s_0|>, a chat template) "
                        f"or NeuTTS (<|speech_0|>), with {START} and {END}")
    if reads_phonemes(tokenizer):
        if args.language != "en":
            raise DataError(f"--language {args.language}: NeuTTS is driven in English alone")
        espeak()                                                    # where it is missing, that is said at once
    base = load_pretrained(AutoModelForCausalLM, args.model, dtype=dtype, device_map=device,
                           quantization_config=quantize.config(args.quantize, device, dtype))
    torch.manual_seed(args.seed)
    policy = get_peft_model(quantize.weight_only(base), LoraConfig(
        r=args.lora_rank, lora_alpha=2 * args.lora_rank, lora_dropout=0.0,
        target_modules=r".*\.(q|k|v|o|gate|up|down)_proj"))
    return tokenizer, policy.eval()


def load_judges(args, device, first=True):
    """The codec, the judge that rewards (None unless `first`), the second judge and the speaker model, all frozen."""
    if args.judge == args.second_judge:
        raise DataError("--second-judge must not be --judge: what is reported would be what was trained on")
    codec = Codec(args.codec, device, args.offload)
    judge = Judge(args.judge, device, args.offload, args.language, "--judge") if first else None
    second = Judge(args.second_judge, device, args.offload, args.language, "--second-judge")
    speaker = Speaker(args.speaker, device, args.offload)
    for model, flag in ((judge, "--judge"), (second, "--second-judge"), (speaker, "--speaker")):
        if model and model.rate != codec.rate:
            raise DataError(f"{flag}: hears {model.rate} Hz, but the codec speaks {codec.rate} Hz")
    return codec, judge, second, speaker


@dataclass(eq=False)
class Voice:
    """A reference to go on from: what it says, as text, speech tokens and x-vector."""

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
    codec.decoder_only()
    return voices


def voices_of(sentences, voices):
    """The voice of each sentence: the one it names, else the next in turn."""
    named = {v.name: v for v in voices}
    return [named.get(s.voice, voices[i % len(voices)]) for i, s in enumerate(sentences)]


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


def judged_advantages(reward, judged):
    """Eq. 1 of rewards (B, G), where `judged` (B, G) is false for samples that the judge failed on: those stand at the
    mean of their group, which would shrink the spread of the others, so the root of the share judged puts it right."""
    return group_advantages(reward) * judged.float().mean(dim=1, keepdim=True).sqrt()


# ---- evaluate ----------------------------------------------------------------------------------------------

def evaluate(policy, tokenizer, tests, voices, models, code, args, device, due=None):
    """One sample at the training temperature of every test sentence: (Speech records, metrics).

    The seed is always the same, so that before and after, and all runs, differ in the weights alone. `due` (N,) are
    the lengths to compare with, in tokens; None = the samples' own.
    """
    codec, _, second, speaker, *token2text = models
    chosen, speech, limit = voices_of(tests, voices), [], int(args.max_seconds * codec.tokens_per_s)
    for start in range(0, len(tests), args.eval_batch):
        part = slice(start, start + args.eval_batch)
        prompts = make_prompts(policy, tokenizer, [s.text for s in tests[part]], chosen[part])
        rollout = sample(policy, prompts, 1, limit, tokenizer.convert_tokens_to_ids(END), args.temperature,
                         generator_for(0, start, device))
        codes = codes_of(rollout, code)
        waves = codec.decode(codes)
        speech += [Speech(*row) for row in zip([s.text for s in tests[part]], codes, waves, second.transcribe(waves),
                                               rollout.truncated.tolist())]
    similarity = (speaker.embed([s.wave for s in speech]) @ torch.stack([v.vector for v in voices]).T)[
        range(len(tests)), [voices.index(v) for v in chosen]]
    due = [len(s.codes) for s in speech] if due is None else due
    if all(s.transcript is None for s in speech):
        raise DataError(f"--second-judge {args.second_judge}: failed on every test sentence")
    metrics = tts_metrics(speech, similarity.tolist(), due, codec.tokens_per_s, codec.rate, args.language, device)
    for reader in token2text:  # DiffRO's reward reads the same samples: a gap to the second judge that opens is hacking
        own = asr_metrics([s.text for s in tests], reader.read([s.codes for s in speech]), (), args.language)
        metrics["token2text_wer"] = own["wer"]
    return speech, metrics


def self_check(policy, prompts, others, args, limit, stop, device):
    """The pitfalls that stay silent, tried on the first batch before anything is trained; one line says how it went.

    The trained log-probs are the sampler's (ratio 1), the reference is the untrained policy (KL 0), and the text
    reaches them: asked for another text in the same voice (`others`), the same samples must be less likely.
    """
    count, group = max(1, min(len(prompts.mask), args.micro // args.group)), min(args.group, args.micro)
    rollout = sample(policy, prompts[:count], group, limit, stop, args.temperature,
                     generator_for(args.seed, 0, device))
    with torch.no_grad():
        logps = [completion_logprobs(policy, p, rollout.ids, rollout.mask, group, args.temperature)
                 for p in (prompts[:count], others[:count])]
        with policy.disable_adapter():
            ref_logp = completion_logprobs(policy, prompts[:count], rollout.ids, rollout.mask, group, args.temperature)
    mean = lambda x: float(x[rollout.mask].mean())  # noqa: E731
    ratio, kl = mean((logps[0] - rollout.logp).exp().sub(1).abs()), mean(kl_k3(logps[0], ref_logp))
    text = mean(logps[0] - logps[1])
    tolerance = 1e-3 if prompts.embeds.dtype == torch.float32 else 0.1      # bf16 alone gives 0.04 at 1.4B
    line = f"|ratio - 1| {ratio:.1e}, KL {kl:.1e}, another text costs {text:.2f} nats a token"
    if not (ratio <= tolerance and (kl <= tolerance or args.resume) and text >= 1e-3):  # so written, NaN fails
        raise DataError(f"check failed: {line}. This model's sampling and training paths disagree, or it does not read")
    print(f"check: {line}")


# ---- what a run leaves behind ------------------------------------------------------------------------------

def speech_row(step, reward, parts, speech):
    """A line of samples.jsonl: the text of the group that differs most, its best and worst sample, every part."""
    ends = best_and_worst(reward)
    row = {"step": step, "reference": speech[ends["best"]].text}
    for name, i in ends.items():
        row[name] = {"text": speech[i].transcript, "total": float(reward.view(-1)[i]), "tokens": len(speech[i].codes),
                     **{part: float(values.view(-1)[i]) for part, values in parts.items()}}
    return row


def finish(policy, given, due, before, after, state, folder, log, phase, listened=10):
    """Table, transcripts, times, the page to listen to, summary.json. `after` is what evaluate gave for the best
    adapter; None, after --resume, where an earlier run found it: then it is loaded and evaluated again."""
    args, codec = given[5], given[3][0]
    if after is None:
        load_adapter(policy, folder / "adapter")
        with phase("evaluate"):
            after = evaluate(policy, *given, due)
    print_tts_table(before[1], after[1])
    heard = [[s.transcript or "" for s in found[0]] for found in (before, after)]
    print_transcripts([s.text for s in before[0]], *heard, args.language)
    print_times(phase, state["step"])
    rows = [{"text": b.text, "voice": v.name, "before": {"wave": b.wave, "transcript": b.transcript or ""},
             "after": {"wave": a.wave, "transcript": a.transcript or ""}}
            for v, b, a in list(zip(voices_of(given[1], given[2]), before[0], after[0]))[:listened]]
    title = f"Before and after {state['best_step']} steps"
    page = write_page(folder / "samples", rows, codec.rate, title, args.language)
    was, now = before[1]["wer"], after[1]["wer"]
    log.summary({
        "metric": "WER by the second judge, sampled, best adapter", "before": was, "after": now, "best": state["best"],
        "best_step": state["best_step"], "last": state.get("last", was), "steps": state["step"],
        "seconds": sum(phase.total.values()), "phase_seconds": phase.total, "peak_memory_gib": phase.peak_gib(),
        "peak_by_phase_gib": phase.peaks,
        "test": {"before": before[1], "after": after[1]}})
    change = f" ({100 * (now - was) / was:+.0f} %)" if was else ""
    print(f"to listen: {page}\nWER by the second judge: {percent(was)} -> {percent(now)}{change} in {state['step']} "
          f"steps.  Everything is in {folder}")
