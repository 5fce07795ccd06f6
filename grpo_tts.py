"""Chapter 2: GRPO for LLM-based text-to-speech (arXiv 2509.18569).

An LLM reads a text and a voice (a reference sentence and its speech tokens) and goes on in speech tokens; a codec makes
them a waveform; a recogniser, the judge, says what it hears. The equations are those of chapter 1 and come from there:

    Eq. 1   A_i = (R_i - mean_j R_j) / (std_j R_j + 1e-4)                    j over the G samples of one text    [FA]
    Eq. 2   r_it = pi_theta(o_it | q, o_i,<t) / pi_old(o_it | q, o_i,<t)                                         [FA]
    Eq. 3   J = 1/G sum_i 1/|o_i| sum_t [ min(r_it A_i, clip(r_it, 1 - eps, 1 + eps) A_i) - beta KL_it ]         [FA]

What is new: the actions are speech tokens and one that ends the speech; the reward needs a waveform, R1 is the judge's
accuracy, R2 the distance to the group's median length, R3 diversity in tokens and pitch [paper]; what is reported comes
from a second judge that is never a reward. [paper] is arXiv 2509.18569, [FA] its sister report arXiv 2509.12508,
[choice] is ours. Left out: the paper's flow matching decoder (an Xcodec2 codec decodes in one pass) and its multi-GPU
rotation (--offload is the same idea on one card).

    python grpo_tts.py --steps 200                                              the embedded models, on a CPU
    python grpo_tts.py --model HKUSTAudio/Llasa-1B --codec HKUSTAudio/xcodec2-hf --judge HUB_ID --second-judge HUB_ID \
        --speaker microsoft/wavlm-base-plus-sv --data texts.txt --voices DIR --quantize 8bit --offload --lr 1e-5

Last line:  WER by the second judge: 26.3 % -> 18.9 % (-28 %) in 200 steps.  Everything is in runs/grpo_tts-...
"""
import argparse
import logging


def parse_args(argv=None):
    """The settings, all of them. --resume DIR takes those of DIR as defaults."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    g = p.add_argument_group("models")
    g.add_argument("--model", default="checkpoints/tts", help="the LLM, folder or hub id (default: %(default)s)")
    g.add_argument("--codec", default="checkpoints/codec", help="speech tokens to waveform (default: %(default)s)")
    g.add_argument("--judge", default="checkpoints/asr", help="recogniser that rewards (default: %(default)s)")
    g.add_argument("--second-judge", default="checkpoints/asr2", help="another, for evaluation (default: %(default)s)")
    g.add_argument("--speaker", default="checkpoints/speaker", help="whose voice is it (default: %(default)s)")
    g.add_argument("--quantize", choices=["none", "8bit", "4bit"], default="none",
                   help="frozen LLM weights by bitsandbytes; none = bf16 on CUDA, fp32 on the CPU (default: none)")
    g.add_argument("--lora-rank", type=int, default=16, help="rank of the fp32 adapters (default: 16)")
    g.add_argument("--device", default="auto", help="auto = cuda where there is one, else cpu")
    g.add_argument("--offload", action="store_true", help="codec, judges and speaker model wait in main memory")
    g = p.add_argument_group("data and rewards")
    g.add_argument("--data", nargs="+", default=["data/tts/train.jsonl"], metavar="FILE",
                   help="texts: a line each, or a metadata.jsonl or its folder (default: data/tts/train.jsonl)")
    g.add_argument("--test", metavar="FILE", help="other texts, to test on, with recordings where there are any "
                   "(default: data/tts/test; a tenth of --data where that is given)")
    g.add_argument("--voices", default="data/tts/voices", metavar="DIR",
                   help="reference recordings, with texts, of the voices to speak in (default: data/tts/voices)")
    g.add_argument("--language", default="en", help="of the judges and the normaliser (default: en)")
    g.add_argument("--rewards", default="R1", help="R1 accuracy, R2 duration, R3 diversity (default: R1)")
    g.add_argument("--max-seconds", type=float, default=6, help="longest speech a sample may have (default: 6)")
    g.add_argument("--skip-bad", action="store_true", help="leave out and count bad lines of the data")
    g = p.add_argument_group("GRPO")
    g.add_argument("--steps", type=int, default=200)
    g.add_argument("--batch", type=int, default=4, help="B, texts a step (paper: 16)")
    g.add_argument("--group", type=int, default=8, help="G, samples a text (paper: 8)")
    g.add_argument("--micro", type=int, default=16, help="samples in one forward and backward; changes memory and "
                   "speed alone (default: 16, the best on a CPU)")
    g.add_argument("--temperature", type=float, default=1.0, help="of sampling and of the log-probs (paper: 1)")
    g.add_argument("--lr", type=float, default=3e-4, help="AdamW on LoRA (default: 3e-4; paper, all weights: 1e-5)")
    g.add_argument("--clip", type=float, default=0.2, help="eps of Eq. 3")
    g.add_argument("--beta", type=float, default=0.1, help="weight of the KL in Eq. 3 (paper: 0.1)")
    g = p.add_argument_group("run")
    g.add_argument("--seed", type=int, default=1)
    g.add_argument("--eval-every", type=int, default=50, help="steps; 0 = only before and after")
    g.add_argument("--out", metavar="DIR", help="run folder (default: a new one under runs/)")
    g.add_argument("--resume", metavar="DIR", help="continue the run in DIR; --steps may be raised")
    args = p.parse_args(argv)
    if args.resume:
        from data import DataError, saved_arguments
        try:
            p.set_defaults(**saved_arguments(args.resume))
        except DataError as error:
            p.error(str(error))
        args = p.parse_args(argv)
    for name, least in dict(steps=0, batch=1, group=2, micro=1, lora_rank=1, eval_every=0).items():
        if getattr(args, name) < least:
            p.error(f"--{name.replace('_', '-')} must be {least} or more, not {getattr(args, name)}")
    if args.micro % args.group and args.group % args.micro:
        p.error(f"--micro {args.micro} must be a multiple or a divisor of --group {args.group}")
    if set(args.rewards.split(",")) - {"R1", "R2", "R3"}:
        p.error(f"--rewards takes some of R1,R2,R3, not {args.rewards}")
    for name in ("lr", "temperature", "max_seconds"):
        if not 0 < getattr(args, name) < float("inf"):
            p.error(f"--{name.replace('_', '-')} must be above 0, not {getattr(args, name)}")
    if not 0 <= args.seed < 2 ** 31:
        p.error(f"--seed must be from 0 to 2^31 - 1, not {args.seed}")
    return args


if __name__ == "__main__":
    parse_args()  # --help and typing errors answer at once, before torch loads
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it misses an optional kernel, aloud

import re
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, DynamicCache

from data import (
    DataError,
    Phases,
    RunLog,
    batch_indices,
    load_adapter,
    load_folder,
    load_pretrained,
    load_state,
    new_run_folder,
    pick_device,
    quiet,
    run_header,
    save_state,
    split_sentences,
)
from grpo_asr import completion_mask, group_advantages, grpo_loss, kl_k3, token_logprobs
from judges import Codec, Judge, Speaker
from listen import write_page
from report import percent, print_times, print_transcripts, print_tts_table
from rewards import Speech, repeats, tts_metrics, tts_reward

# Shapes: B texts a step, G samples each, N = B G samples, T tokens of a sample, L of a prompt, V vocabulary,
# M samples of a micro-batch.
START, END = "<|SPEECH_GENERATION_START|>", "<|SPEECH_GENERATION_END|>"


# ---- load --------------------------------------------------------------------------------------------------

def load(args, device):
    """The tokenizer and the policy: frozen base in eval mode (no dropout anywhere), fp32 LoRA on its linear layers."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    chosen = {"none": None, "8bit": dict(load_in_8bit=True), "4bit": dict(
        load_in_4bit=True, bnb_4bit_compute_dtype=dtype, bnb_4bit_quant_type="nf4")}[args.quantize]
    if args.quantize == "4bit" and device.type == "cpu":
        raise DataError("--quantize 4bit needs a GPU: on the CPU bitsandbytes has no gradient for it; 8bit has")
    tokenizer = load_pretrained(AutoTokenizer, args.model)
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.pad_token or END
    if {START, END, "<|s_0|>"} - set(tokenizer.get_vocab()) or not tokenizer.chat_template:
        raise DataError(f"--model {args.model}: its tokenizer has no speech tokens <|s_0|>, {START}, {END} and chat "
                        "template; this script drives Llasa and models of its form")
    base = load_pretrained(AutoModelForCausalLM, args.model, dtype=dtype, device_map=device,
                           quantization_config=BitsAndBytesConfig(**chosen) if chosen else None)
    torch.manual_seed(args.seed)
    policy = get_peft_model(base, LoraConfig(
        r=args.lora_rank, lora_alpha=2 * args.lora_rank, lora_dropout=0.0,
        target_modules=r".*\.(q|k|v|o|gate|up|down)_proj"))
    return tokenizer, policy.eval()


def load_judges(args, device):
    """The codec, the judge that rewards, the second judge and the speaker model, all frozen."""
    if args.judge == args.second_judge:
        raise DataError("--second-judge must not be --judge: what is reported would be what was trained on")
    codec = Codec(args.codec, device, args.offload)
    judges = [Judge(name, device, args.offload, args.language, flag)
              for name, flag in ((args.judge, "--judge"), (args.second_judge, "--second-judge"))]
    speaker = Speaker(args.speaker, device, args.offload)
    for model, flag in ((judges[0], "--judge"), (judges[1], "--second-judge"), (speaker, "--speaker")):
        if model.rate != codec.rate:
            raise DataError(f"{flag}: hears {model.rate} Hz, but the codec speaks {codec.rate} Hz")
    return codec, *judges, speaker


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
        if found := re.fullmatch(r"<\|s_(\d+)\|>", token):
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
    ids = make_prompts(tokenizer, [longest.text] * len(voices), voices, "cpu").ids   # (voices, L)
    room = getattr(policy.config, "max_position_embeddings", None) or float("inf")
    if ids.shape[1] + limit > room:
        raise DataError(f"the longest prompt has {ids.shape[1]} tokens, with {limit} of speech more than the {room} "
                        "positions of the LLM: shorter recordings in --voices, or a lower --max-seconds")


# ---- sample ------------------------------------------------------------------------------------------------

@dataclass
class Prompts:
    """What is to be said, and in which voice, as tokens."""

    ids: torch.Tensor   # (B, L), padded on the left
    mask: torch.Tensor  # (B, L)

    def __getitem__(self, part):
        return Prompts(self.ids[part], self.mask[part])


@dataclass
class Rollout:
    """What was sampled, and how likely it was to its sampler."""

    ids: torch.Tensor      # (N, T), anything after the stop token
    mask: torch.Tensor     # (N, T), the stop token included
    logp: torch.Tensor     # (N, T), log pi_old of Eq. 2
    entropy: torch.Tensor  # (N, T), of the whole distribution, nats
    truncated: torch.Tensor  # (N,), true where no stop token came


def make_prompts(tokenizer, texts, voices, device):
    """The prompts of Llasa, zero-shot: the voice's text and the new one; the voice's speech tokens, to be gone on."""
    chats = [[{"role": "user", "content": "Convert the text to speech:<|TEXT_UNDERSTANDING_START|>"
               f"{voice.text} {text}<|TEXT_UNDERSTANDING_END|>"},
              {"role": "assistant", "content": START + "".join(f"<|s_{c}|>" for c in voice.codes)}]
             for text, voice in zip(texts, voices)]
    strings = tokenizer.apply_chat_template(chats, tokenize=False, continue_final_message=True,
                                            date_string="26 Jul 2024")  # Llama's template would write today's
    inputs = tokenizer(strings, return_tensors="pt", padding=True, add_special_tokens=False).to(device)
    return Prompts(inputs.input_ids, inputs.attention_mask)


def prefill(policy, prompts, group):
    """Reads each prompt once, then copies its keys and values to the `group` rows that share it.

    Returns the logits of the first token (N, V) and the cache. Differentiable: the update shares the prompt too.
    """
    cache = DynamicCache()
    out = policy(input_ids=prompts.ids, attention_mask=prompts.mask, past_key_values=cache, use_cache=True,
                 position_ids=(prompts.mask.cumsum(1) - 1).clamp(min=0), logits_to_keep=1)
    cache.batch_repeat_interleave(group)
    return out.logits[:, -1].repeat_interleave(group, dim=0), cache


@torch.no_grad()
def sample(policy, prompts, group, max_tokens, stop, temperature=1.0, generator=None):
    """G samples of every prompt, from the whole untruncated distribution, text tokens included: Rollout.

    No setting of the checkpoint's generation_config takes part. Rows that have ended leave the batch.
    """
    logits, cache = prefill(policy, prompts, group)                                 # (N, V)
    mask = prompts.mask.repeat_interleave(group, dim=0)                             # (N, L)
    position = mask.sum(dim=1)
    alive = torch.arange(len(mask), device=mask.device)                             # rows computed
    going = torch.ones_like(alive, dtype=torch.bool)                                # not yet ended
    ids = torch.full((len(mask), max_tokens), stop, device=mask.device)
    logp, entropy = torch.zeros((2, *ids.shape), device=mask.device)
    for t in range(max_tokens):
        scores = torch.log_softmax(logits.float() / temperature, dim=-1)            # (alive, V)
        # Gumbel-max: argmax(log p - log E), E ~ Exp(1), is an exact draw from p; noise for every row, alive or not,
        # so that a sample does not depend on when the others end
        noise = torch.empty((len(mask), scores.shape[1]), device=mask.device).exponential_(generator=generator)
        token = (scores - noise[alive].clamp(min=1e-30).log()).argmax(dim=-1)
        ids[alive, t] = token
        logp[alive, t] = scores.gather(1, token[:, None])[:, 0]
        entropy[alive, t] = -(scores.exp() * scores).sum(dim=-1)
        going &= token != stop
        left = int(going.sum())
        if left == 0 or t == max_tokens - 1:
            break
        if left <= 0.8 * len(alive):          # not at every end: dropping rows copies the cache
            keep = going.nonzero()[:, 0]
            alive, token, going = alive[keep], token[keep], going[keep]
            cache.batch_select_indices(keep)
        seen = torch.cat([mask[alive], mask.new_ones(len(alive), t + 1)], dim=1)
        logits = policy(input_ids=token[:, None], attention_mask=seen, past_key_values=cache, use_cache=True,
                        position_ids=position[alive, None] + t).logits[:, -1]
    ids, logp, entropy = ids[:, :t + 1], logp[:, :t + 1], entropy[:, :t + 1]
    return Rollout(ids, completion_mask(ids, stop), logp, entropy, ~(ids == stop).any(dim=1))


def completion_logprobs(policy, prompts, ids, mask, group, temperature):
    """log pi(o_it) of given samples, (N, T) -> (N, T); every prompt is read once for its `group` rows."""
    first, cache = prefill(policy, prompts, group)
    seen = torch.cat([prompts.mask.repeat_interleave(group, dim=0), mask[:, :-1].long()], dim=1)
    start = prompts.mask.sum(dim=1).repeat_interleave(group)[:, None]
    position = start + torch.arange(ids.shape[1] - 1, device=ids.device)            # (N, T - 1)
    logits = first[:, None]                                                         # (N, 1, V)
    if ids.shape[1] > 1:
        rest = policy(input_ids=ids[:, :-1], attention_mask=seen, position_ids=position, past_key_values=cache,
                      use_cache=True).logits
        logits = torch.cat([logits, rest], dim=1)                                   # (N, T, V)
    return token_logprobs(logits, ids, temperature)


def micro_batches(batch, group, micro):
    """Slices (prompts, rows, rows per prompt) that cover N = batch x group samples, `micro` of them at a time."""
    for start in range(0, batch * group, micro):
        stop = min(start + micro, batch * group)
        yield slice(start // group, -(-stop // group)), slice(start, stop), min(group, stop - start)


def codes_of(rollout, code):
    """The codec's codes of each sample: its speech tokens; the stop token and stray text tokens have no sound."""
    found = code.to(rollout.ids.device)[rollout.ids]                                # (N, T), -1 where not speech
    return [row[row >= 0].numpy() for row in found.masked_fill(~rollout.mask, -1).cpu()]


# ---- evaluate ----------------------------------------------------------------------------------------------

def evaluate(policy, tokenizer, tests, voices, models, code, args, device, due=None, batch=50):
    """One sample at the training temperature of every test sentence: (Speech records, metrics).

    The seed is always the same, so that before and after, and all runs, differ in the weights alone. `due` (N,) are
    the lengths to compare with, in tokens; None = the samples' own.
    """
    codec, _, second, speaker = models
    chosen, speech, limit = voices_of(tests, voices), [], int(args.max_seconds * codec.tokens_per_s)
    for start in range(0, len(tests), batch):
        part = slice(start, start + batch)
        prompts = make_prompts(tokenizer, [s.text for s in tests[part]], chosen[part], device)
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
    return speech, tts_metrics(speech, similarity.tolist(), due, codec.tokens_per_s, codec.rate, args.language)


def self_check(policy, prompts, others, args, limit, stop, device):
    """The pitfalls that stay silent, tried on the first batch before anything is trained; one line says how it went.

    The trained log-probs are the sampler's (ratio 1), the reference is the untrained policy (KL 0), and the text
    reaches them: asked for another text in the same voice (`others`), the same samples must be less likely.
    """
    count, group = max(1, min(len(prompts.ids), args.micro // args.group)), min(args.group, args.micro)
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
    exact = next(policy.parameters()).dtype == torch.float32 and args.quantize == "none"
    tolerance = 1e-3 if exact else 0.05
    line = f"|ratio - 1| {ratio:.1e}, KL {kl:.1e}, another text costs {text:.2f} nats a token"
    if not (ratio <= tolerance and (kl <= tolerance or args.resume) and text >= 1e-3):  # so written, NaN fails
        raise DataError(f"check failed: {line}. This model's sampling and training paths disagree, or it does not read")
    print(f"check: {line}")


def generator_for(seed, step, device):
    """The random source of one step's samples: a function of the seed and the step, whatever came before."""
    return torch.Generator(device).manual_seed(1_000_003 * seed + step)


# ---- the run -----------------------------------------------------------------------------------------------

def main(argv=None):
    args = parse_args(argv)
    try:
        train(args)
    except DataError as error:
        sys.exit(f"error: {error}")
    except torch.cuda.OutOfMemoryError:
        sys.exit(f"error: the GPU's memory is full; lower --micro (now {args.micro}) or --group (now {args.group}), "
                 "or add --offload")
    except KeyboardInterrupt:
        sys.exit("stopped before the first step: nothing was trained")


def train(args):
    """The whole run: load, check, evaluate, the seven steps of the loop, evaluate."""
    device = pick_device(args.device)
    quiet()
    tokenizer, policy = load(args, device)
    codec, judge, second, speaker = models = load_judges(args, device)
    code, stop = speech_tokens(tokenizer, codec, policy.config.vocab_size), tokenizer.convert_tokens_to_ids(END)
    texts, tests = split_sentences(args)
    voices = load_voices(args, codec, speaker)
    limit, rewards = int(args.max_seconds * codec.tokens_per_s), args.rewards.split(",")
    check_lengths(policy, tokenizer, texts + tests, voices, limit, codec)
    weights = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=args.lr, weight_decay=0.0)
    phase, first, state = Phases(device), 0, {}
    if args.resume:
        state = load_state(policy, optimizer, args.resume)
        first, phase.total = state["step"], state["seconds"]
        optimizer.param_groups[0]["lr"] = args.lr

    def prompts_of(step):
        """The texts of a step, and their prompts in a voice each: a function of the seed and the step."""
        batch = [texts[i] for i in batch_indices(step, len(texts), args.batch, args.seed)]
        said, chosen = [s.text for s in batch], voices_of(batch, voices)
        return said, make_prompts(tokenizer, said, chosen, device), chosen          # (B, L)

    said, prompts, chosen = prompts_of(0)
    other = next((t.text for t in texts if t.text not in said), said[-1] + " " + said[0])
    others = make_prompts(tokenizer, [other] * args.batch, chosen, device)
    self_check(policy, prompts, others, args, limit, stop, device)
    folder = Path(args.resume or args.out or new_run_folder("grpo_tts"))
    log = RunLog(folder, run_header(args, device, trained=sum(w.numel() for w in weights)),
                 first if args.resume else None)
    due = [s.seconds * codec.tokens_per_s for s in tests]
    given = (tokenizer, tests, voices, models, code, args, device)
    with phase("evaluate"), policy.disable_adapter():
        before = evaluate(policy, *given, due if all(due) else None)
        if not all(due):
            print("not every test text has a recording: lengths are compared with those before training")
            due = [len(s.codes) for s in before[0]]
    if not args.resume:
        state |= {"best": before[1]["wer"], "best_step": 0, "step": 0}
        policy.save_pretrained(folder / "adapter")
        log.write("log", {"step": -1, "eval": before[1], "eval_wer": state["best"]})   # after no step at all
        save_state(policy, optimizer, folder, {**state, "seconds": phase.total})
    print(f"step {first}: " if not args.resume else "before any step: ", end="")
    print(f"WER by the second judge {percent(before[1]['wer'])}, similarity {before[1]['similarity']:.3f}")
    phase.take()

    stopped = []
    previous = signal.signal(signal.SIGINT,
                             lambda *_: stopped.append(1) if not stopped else sys.exit("stopped at once"))
    bar = tqdm(range(first, args.steps), initial=first, total=args.steps, dynamic_ncols=True, leave=False, disable=None)
    for step in bar:
        # 1 prompts
        batch, prompts, _ = prompts_of(step)
        # 2 sample
        with phase("rollout"):
            rollout = sample(policy, prompts, args.group, limit, stop, args.temperature,
                             generator_for(args.seed, step, device))                # (N, T)
            codes = codes_of(rollout, code)
        # 3 reward: one waveform a sample, which every reward shares
        with phase("decode"):
            waves = codec.decode(codes)
        with phase("reward"):
            said = [text for text in batch for _ in range(args.group)]              # N
            speech = [Speech(*row) for row in zip(said, codes, waves, judge.transcribe(waves),
                                                  rollout.truncated.tolist())]
            reward, parts, judged = tts_reward(speech, args.group, rewards, args.language, codec.rate)   # (B, G)
        # 4 advantage; samples without a judgement stand at the mean, which would shrink the spread of the others
        advantage = group_advantages(reward) * judged.float().mean(dim=1, keepdim=True).sqrt()   # (B, G)  Eq. 1
        advantage = advantage.to(device)
        mask = rollout.mask & judged.view(-1, 1).to(device)     # a sample that the judge failed on teaches nothing
        with phase("update"):
            passes = []
            for part, rows, group in micro_batches(args.batch, args.group, args.micro):
                # 5 log-probs, now and under the reference, of as many tokens as the part's longest sample has
                span = rows, slice(int(rollout.mask[rows].sum(dim=1).max()))
                asked = (prompts[part], rollout.ids[span], rollout.mask[span], group, args.temperature)
                logp = completion_logprobs(policy, *asked)                          # (M, T)
                with torch.no_grad(), policy.disable_adapter():
                    ref_logp = completion_logprobs(policy, *asked)
                # 6 loss and step: the parts add up to the loss of the whole
                loss = grpo_loss(logp, rollout.logp[span], ref_logp, advantage.view(-1)[rows], mask[span],
                                 args.clip, args.beta)                              # Eq. 2-3
                (loss * len(logp) / len(rollout.ids)).backward()
                passes.append((logp.detach() - rollout.logp[span], kl_k3(logp.detach(), ref_logp), rollout.mask[span]))
            norm = torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        # 7 log one row; now and then evaluate and save
        drift, kl = (torch.cat([pair[i][pair[2]] for pair in passes]) for i in (0, 1))     # (tokens of the step,)
        row = describe(step, args, phase, rollout, speech, reward, parts, judged, codec, drift, kl, norm)
        log.write("log", row)
        bar.set_postfix_str(f"reward {row['reward']:.3f} WER {percent(row['wer'])} KL {row['kl']:.3f}")
        if step % 10 == 0:
            log.write("samples", best_and_worst(step, reward, parts, speech))
            tqdm.write(f"step {step}: reward {row['reward']:.3f}, WER of the samples {percent(row['wer'])}, "
                       f"KL {row['kl']:.3f}, {sum(row['seconds'].values()):.2f} s")
        state["step"] = step + 1
        if (args.eval_every and state["step"] % args.eval_every == 0) or state["step"] == args.steps or stopped:
            with phase("evaluate"):
                metrics = evaluate(policy, *given, due)[1]
            log.write("log", {"step": step, "eval": metrics, "eval_wer": metrics["wer"], "seconds": phase.take()})
            tqdm.write(f"step {step + 1}: WER by the second judge {percent(metrics['wer'])}, similarity "
                       f"{metrics['similarity']:.3f}, length {metrics['length_ratio']:.2f}")
            if metrics["wer"] < state["best"]:
                state |= {"best": metrics["wer"], "best_step": step + 1}
                policy.save_pretrained(folder / "adapter")
            save_state(policy, optimizer, folder, {**state, "last": metrics["wer"], "seconds": phase.total})
        if stopped:
            break
    bar.close()
    if stopped:
        print(f"stopped after {state['step']} of {args.steps} steps; python grpo_tts.py --resume {folder} goes on")
    finish(policy, given, due, before, state, folder, log, phase)
    signal.signal(signal.SIGINT, previous)


# ---- what a run leaves behind ------------------------------------------------------------------------------

def describe(step, args, phase, rollout, speech, reward, parts, judged, codec, drift, kl, norm):
    """One line of the log; the README says what each number means, and how it looks when something is sick."""
    share = lambda hits: sum(hits) / len(speech)  # noqa: E731
    heard = [s for s in speech if s.transcript is not None]
    lengths = torch.tensor([len(s.codes) for s in speech]).float()
    tokens, seconds = rollout.mask.sum().item(), phase.take()
    return {
        "step": step, "reward": float(reward.mean()), "reward_std": float(reward.std(dim=1, correction=0).mean()),
        **{name: float(part.nanmean()) for name, part in parts.items()},
        "no_signal": float((reward == reward[:, :1]).all(dim=1).float().mean()),
        "wer": 1 - sum(s.accuracy(args.language) for s in heard) / max(1, len(heard)),  # per sample, clipped at 1
        "judge_failed": int((~judged).sum()), "empty": share(s.transcript == "" for s in speech),
        "tokens": float(lengths.mean()), "speech_s": float(lengths.mean()) / codec.tokens_per_s,
        "truncated": float(rollout.truncated.float().mean()),
        "repetition": share(repeats(s.codes, round(codec.tokens_per_s)) for s in speech),
        "tokens_per_s": tokens / seconds["rollout"],
        "kl": float(kl.mean()), "entropy": float(rollout.entropy[rollout.mask].mean()),
        "clipped": float(((drift.exp() - 1).abs() > args.clip).float().mean()), "grad_norm": float(norm), "lr": args.lr,
        "seconds": seconds, "peak_memory_gib": phase.peak_gib(), "peak_by_phase_gib": dict(phase.peaks),
    }


def best_and_worst(step, reward, parts, speech):
    """Of the group whose rewards (B, G) differ most: the text, the best and the worst sample, with every part."""
    group = int(reward.std(dim=1).argmax())
    row = {"step": step, "reference": speech[group * reward.shape[1]].text}
    for name, j in (("best", int(reward[group].argmax())), ("worst", int(reward[group].argmin()))):
        heard = speech[group * reward.shape[1] + j]
        row[name] = {"text": heard.transcript, "total": float(reward[group, j]), "tokens": len(heard.codes),
                     **{part: float(values[group, j]) for part, values in parts.items()}}
    return row


def finish(policy, given, due, before, state, folder, log, phase, listened=10):
    """Evaluates the best adapter; table, transcripts, times, the page to listen to, summary.json."""
    args, codec = given[5], given[3][0]
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


if __name__ == "__main__":
    main()
