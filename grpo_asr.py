r"""Chapter 1: GRPO for LLM-based speech recognition, with rule rewards (arXiv 2509.18569).

A recogniser hears a clip and samples G transcripts; rules score them against the reference; the better than
average of each group become likelier, the worse less likely; a KL term holds the policy near where it began.

    Eq. 1   A_i = (R_i - mean_j R_j) / (std_j R_j + 1e-4)                    j over the G samples of one clip   [FA]
    Eq. 2   r_it = pi_theta(o_it | q, o_i,<t) / pi_old(o_it | q, o_i,<t)                                         [FA]
    Eq. 3   J = 1/G sum_i 1/|o_i| sum_t [ min(r_it A_i, clip(r_it, 1 - eps, 1 + eps) A_i) - beta KL_it ]         [FA]
            KL_it = exp(d) - d - 1,  d = log pi_ref - log pi_theta           (k3)                            [choice]

[paper] is arXiv 2509.18569, [FA] its sister report arXiv 2509.12508, [choice] is ours. The paper's temperature,
learning rate and beta are flags; left out are its rollout engine and its multi-GPU rotation: here one model samples,
scores and learns in turn. The policy is LoRA on the LLM; the reference is the same weights with LoRA switched off.

    python grpo_asr.py --steps 200                                       the embedded recogniser, minutes on a CPU
    python grpo_asr.py --model FunAudioLLM/Fun-ASR-Nano-2512-hf --data DIR \
        --quantize 8bit --micro 4 --max-tokens 144 --lr 1e-5             a published one, on a card of 8 GB

Last line:  short: WER 16.4 % -> 1.6 % (-90 %) in 200 steps.  Everything is in runs/grpo_asr-...
"""
import argparse
import logging


def parse_args(argv=None):
    """The settings, all of them. --resume DIR takes those of DIR as defaults."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    g = p.add_argument_group("model")
    g.add_argument("--model", default="checkpoints/asr", help="folder or hub id (default: %(default)s)")
    g.add_argument("--quantize", choices=["none", "8bit", "4bit"], default="none",
                   help="frozen LLM weights by bitsandbytes; none = bf16 on CUDA, fp32 on the CPU (default: none)")
    g.add_argument("--lora-rank", type=int, default=16, help="rank of the fp32 adapters (default: 16)")
    g.add_argument("--device", default="auto", help="auto = cuda where there is one, else cpu")
    g = p.add_argument_group("data and rewards")
    g.add_argument("--data", nargs="+", default=["data/d0"], metavar="DIR", help="train on these (default: data/d0)")
    g.add_argument("--test", nargs="+", metavar="DIR", help="folders to test on; the one named short, else the first, "
                   "chooses the best adapter (default: data/test/*; a tenth of --data where that is given)")
    g.add_argument("--language", default="en", help="of the prompt, the normaliser and the rules (default: en)")
    g.add_argument("--rewards", default="R1", help="R1 accuracy, R2 hallucination, R3 keywords (default: R1)")
    g.add_argument("--hotwords", action="store_true", help="put each utterance's keywords into its prompt")
    g.add_argument("--max-seconds", type=float, default=30, help="longest clip allowed; 0 = any (default: 30)")
    g.add_argument("--skip-bad", action="store_true", help="leave out and count bad lines of the data")
    g = p.add_argument_group("GRPO")
    g.add_argument("--steps", type=int, default=200)
    g.add_argument("--batch", type=int, default=8, help="B, clips a step (paper: 32)")
    g.add_argument("--group", type=int, default=8, help="G, samples a clip (paper: 12)")
    g.add_argument("--micro", type=int, default=64, help="samples in one pass; changes memory and speed alone")
    g.add_argument("--temperature", type=float, default=1.0, help="of sampling and of the log-probs (default: 1)")
    g.add_argument("--max-tokens", type=int, default=0, help="longest transcript; 0 = 16 + 8 a second of audio")
    g.add_argument("--lr", type=float, default=3e-4, help="AdamW on LoRA (default: 3e-4; paper, all weights: 1e-5)")
    g.add_argument("--clip", type=float, default=0.2, help="eps of Eq. 3")
    g.add_argument("--beta", type=float, default=0.1, help="weight of the KL in Eq. 3 (paper: 0.1)")
    g.add_argument("--supervised", action="store_true", help="the control: learn from the references, not from samples "
                   "(G = 1, A = 1, beta = 0)")
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
    if args.supervised:
        args.group, args.beta = 1, 0.0
    fewest = dict(steps=0, batch=1, group=1 if args.supervised else 2, micro=1, lora_rank=1, eval_every=0, max_tokens=0)
    for name, least in fewest.items():
        if getattr(args, name) < least:
            p.error(f"--{name.replace('_', '-')} must be {least} or more, not {getattr(args, name)}")
    if args.micro % args.group and args.group % args.micro:
        p.error(f"--micro {args.micro} must be a multiple or a divisor of --group {args.group}")
    if set(args.rewards.split(",")) - {"R1", "R2", "R3"}:
        p.error(f"--rewards takes some of R1,R2,R3, not {args.rewards}")
    if not 0 < args.lr < float("inf"):
        p.error(f"--lr must be above 0, not {args.lr}")
    if not 0 <= args.seed < 2 ** 31:
        p.error(f"--seed must be from 0 to 2^31 - 1, not {args.seed}")
    if not 0 < args.temperature < float("inf"):
        p.error("--temperature must be above 0: GRPO learns from different samples")
    return args


if __name__ == "__main__":
    parse_args()  # --help and typing errors answer at once, before torch loads
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it misses an optional kernel, aloud

import signal
import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from tqdm import tqdm

import quantize
from data import (
    DataError,
    Phases,
    RunLog,
    batch_indices,
    clipped_step,
    collate,
    load_adapter,
    load_recogniser,
    load_sets,
    load_state,
    new_run_folder,
    pick_device,
    quiet,
    run_header,
    save_state,
)
from recognisers import answers, embed, rate
from report import percent, print_table, print_times, print_transcripts, transcripts_row
from rewards import asr_metrics, asr_reward, normalize_text
from sampling import Prompts, Rollout, completion_logits, completion_mask, generator_for, micro_batches, sample

# Shapes: B clips a step, G samples each, N = B G samples, T tokens of a transcript, L of a prompt, D width,
# V vocabulary, M samples of a micro-batch.


# ---- equations ---------------------------------------------------------------------------------------------

def group_advantages(reward):
    """Eq. 1: (B, G) -> (B, G). Zero mean in every group; a group of equal rewards gives exact zeros [choice]."""
    centred = reward - reward.mean(dim=1, keepdim=True)
    spread = reward.std(dim=1, keepdim=True, correction=0)
    equal = (reward == reward[:, :1]).all(dim=1, keepdim=True)       # its mean may differ from it by rounding
    return (centred / (spread + 1e-4)).masked_fill(equal, 0.0)


class _TokenLogprobs(torch.autograd.Function):
    """log softmax(logits / T)[ids], fp32 inside, a few rows at a time: fp32 logits never exist all at once."""

    @staticmethod
    def rows(logits):
        return max(1, 2 ** 24 // max(1, logits[0].numel()))        # 64 MiB of fp32 a time

    @staticmethod
    def forward(ctx, logits, ids, temperature):
        norm = torch.cat([torch.logsumexp(part.to(torch.promote_types(part.dtype, torch.float32)) / temperature, -1)
                          for part in logits.split(_TokenLogprobs.rows(logits))])   # (N, T)
        ctx.save_for_backward(logits, ids, norm)
        ctx.temperature = temperature
        return logits.gather(-1, ids[..., None])[..., 0].to(norm.dtype) / temperature - norm

    @staticmethod
    def backward(ctx, grad):
        logits, ids, norm = ctx.saved_tensors
        out, n = torch.empty_like(logits), _TokenLogprobs.rows(logits)
        for o, part, i, z, g in zip(*(x.split(n) for x in (out, logits, ids, norm, grad / ctx.temperature))):
            slope = -torch.exp(part.to(z.dtype) / ctx.temperature - z[..., None])   # -softmax
            slope.scatter_add_(-1, i[..., None], torch.ones_like(z[..., None]))
            o.copy_(slope.mul_(g[..., None]))
        return out, None, None


def token_logprobs(logits, ids, temperature=1.0):
    """log pi(o_it): (N, T, V), (N, T) -> (N, T) in fp32 or better, under the temperature that sampled.

    Beside the logits themselves and, in the backward pass, their gradient in their own precision, it needs 64 MiB, or
    one row of logits in fp32 where that is more.
    """
    return _TokenLogprobs.apply(logits, ids, temperature)


def kl_k3(logp, ref_logp):
    """KL_it of Eq. 3, (N, T) -> (N, T): unbiased for KL(policy | reference) over samples of the policy, never < 0."""
    d = ref_logp - logp
    return torch.exp(d) - d - 1


def grpo_loss(logp, old_logp, ref_logp, advantage, mask, clip=0.2, beta=0.1):
    """-J of Eq. 3: (N, T) log-probs, (N,) or (B, G) advantages, (N, T) mask -> scalar.

    Every sample counts the same whatever its length (the paper's 1/|o_i|). For a part of a step's samples multiply
    by part / whole: the sum over parts is then the loss of the whole.
    """
    mask, advantage = mask.to(logp.dtype), advantage.reshape(-1, 1)                 # (N, T), (N, 1)
    ratio = torch.exp(logp - old_logp)                                              # Eq. 2
    surrogate = torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
    objective = surrogate - beta * kl_k3(logp, ref_logp)                            # Eq. 3
    return -((objective * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)).mean()


# ---- load --------------------------------------------------------------------------------------------------

def load(args, device):
    """The processor and the policy: frozen base in eval mode (no dropout anywhere), fp32 LoRA on its LLM."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    # the encoder is a small part, runs once a step and feeds everything else: it stays in `dtype`
    skip = [r"(?!.*language_model).*"]                                # all but the LLM, whatever the class
    processor, base = load_recogniser(args.model, dtype=dtype, device_map=device,
                                      quantization_config=quantize.config(args.quantize, device, dtype, skip))
    torch.manual_seed(args.seed)
    policy = get_peft_model(quantize.weight_only(base), LoraConfig(
        r=args.lora_rank, lora_alpha=2 * args.lora_rank, lora_dropout=0.0,
        target_modules=r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"))
    return processor, policy.eval()


# ---- audio to prompts, samples to log-probs -------------------------------------------------------------------

@torch.no_grad()
def encode(policy, inputs):
    """Runs the audio encoder, once per clip and step; rollout, policy and reference share what it gives."""
    return Prompts(embed(policy.get_base_model(), inputs), inputs["attention_mask"])        # (B, L, D), (B, L)


def completion_logprobs(policy, prompts, ids, mask, group, temperature):
    """log pi(o_it) of given samples, (N, T) -> (N, T); every prompt is read once for its `group` rows."""
    return token_logprobs(completion_logits(policy, prompts, ids, mask, group), ids, temperature)


@torch.no_grad()
def reference_logprobs(policy, prompts, rollout, args):
    """log pi_ref of a rollout, (N, T): the same weights with LoRA switched off, once a step (PEFT walks the whole model
    to do so). Without a gradient up to four times --micro samples need no more memory [choice]."""
    wide = args.group * (4 * args.micro // args.group) or args.micro                # whole groups, or --micro
    with policy.disable_adapter():
        return torch.cat([completion_logprobs(policy, prompts[part], rollout.ids[rows], rollout.mask[rows], group,
                                              args.temperature)
                          for part, rows, group in micro_batches(len(prompts.mask), args.group, wide)])


@torch.no_grad()
def references(policy, processor, prompts, utterances, eos, temperature):
    """The references as if they had been sampled, one a clip. With A = 1 the gradient of Eq. 3 is then that of
    supervised fine-tuning, the control that the paper lacks [choice]."""
    end = next((e for e in eos if e == processor.tokenizer.eos_token_id), eos[0])   # of the list, the one of an answer
    rows = [torch.tensor([*processor.tokenizer(u.text, add_special_tokens=False).input_ids, end]) for u in utterances]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=eos[0]).to(prompts.mask.device)
    mask = completion_mask(ids, eos)
    logp = completion_logprobs(policy, prompts, ids, mask, 1, temperature)
    return Rollout(ids, mask, logp, torch.zeros_like(logp), torch.zeros_like(mask[:, 0]))


def token_limit(args, utterances):
    """The longest transcript allowed for these clips, tokens: 16 + 8 for each second of the longest [choice]."""
    return args.max_tokens or 16 + int(8 * max(u.seconds for u in utterances))


# ---- evaluate ----------------------------------------------------------------------------------------------

def evaluate(policy, processor, utterances, args, device, batch=32):
    """Greedy transcripts of a test set, in its own order, and their metrics."""
    order = sorted(range(len(utterances)), key=lambda i: utterances[i].seconds)
    found = [""] * len(utterances)
    for start in range(0, len(order), batch):
        part = [utterances[i] for i in order[start:start + batch]]
        prompts = encode(policy, collate(processor, part, args.language, args.hotwords).to(device))
        rollout = sample(policy, prompts, 1, token_limit(args, part), end_tokens(policy), temperature=0)
        for i, text in zip(order[start:start + batch], decode(processor, rollout)):
            found[i] = text
    keywords = {k for u in utterances for k in u.keywords}
    return found, asr_metrics([u.text for u in utterances], found, keywords, args.language)


def decode(processor, rollout):
    """The texts of a rollout, without end tokens and padding."""
    return answers(processor, [row[keep].tolist() for row, keep in zip(rollout.ids.cpu(), rollout.mask.cpu())])


def end_tokens(policy):
    """The ids that end a transcript, as the checkpoint's generation_config lists them."""
    eos = policy.get_base_model().generation_config.eos_token_id
    return eos if isinstance(eos, list) else [eos]


def self_check(policy, processor, utterances, args, device):
    """The pitfalls that stay silent, tried on the first batch before anything is trained; one line says how it went.

    The trained log-probs are the sampler's (ratio 1), the reference is the untrained policy (KL 0), and the audio
    reaches them: the same clips played backwards (upside down where a class has time in its last axis) must move them.
    """
    utterances, group = utterances[:max(1, args.micro // args.group)], min(args.group, args.micro)
    inputs = collate(processor, utterances, args.language, args.hotwords).to(device)
    eos, limit = end_tokens(policy), token_limit(args, utterances)
    prompts = encode(policy, inputs)
    rollout = sample(policy, prompts, group, limit, eos, args.temperature, generator_for(args.seed, 0, device))
    backwards = encode(policy, {**inputs, "input_features": inputs["input_features"].flip(1)})
    with torch.no_grad():
        logps = [completion_logprobs(policy, p, rollout.ids, rollout.mask, group, args.temperature)
                 for p in (prompts, backwards)]
        with policy.disable_adapter():
            ref_logp = completion_logprobs(policy, prompts, rollout.ids, rollout.mask, group, args.temperature)
    mean = lambda x: float(x[rollout.mask].mean())  # noqa: E731
    ratio, kl = mean((logps[0] - rollout.logp).exp().sub(1).abs()), mean(kl_k3(logps[0], ref_logp))
    audio = mean((logps[0] - logps[1]).abs())
    tolerance = 1e-3 if prompts.embeds.dtype == torch.float32 else 0.1      # bf16 alone gives 0.04 at 1.4B
    line = f"|ratio - 1| {ratio:.1e}, KL {kl:.1e}, other audio moves log-probs by {audio:.2f} nats"
    if not (ratio <= tolerance and (kl <= tolerance or args.resume) and audio >= 1e-3):  # so written, NaN fails
        raise DataError(f"check failed: {line}. This model's sampling and training paths disagree, or it does not hear")
    print(f"check: {line}")


# ---- the run -----------------------------------------------------------------------------------------------

def main(argv=None):
    args = parse_args(argv)
    try:
        train(args)
    except DataError as error:
        sys.exit(f"error: {error}")
    except torch.cuda.OutOfMemoryError:
        sys.exit(f"error: the GPU's memory is full; lower --micro (now {args.micro}) or --group (now {args.group}), "
                 f"or where clips are long --batch (now {args.batch})")
    except KeyboardInterrupt:
        sys.exit("stopped before the first step: nothing was trained")


def main_of(tests, args):
    """The name of the test set that chooses the best adapter: `short`, else the first in which something is said."""
    spoken = [name for name in sorted(tests, key=lambda name: name != "short")
              if any(normalize_text(u.text, args.language) for u in tests[name])]
    if not spoken:
        raise DataError("no test set with words in it: the best adapter is chosen by WER, which needs some")
    return spoken[0]


def train(args):
    """The whole run: load, check, evaluate, the seven steps of the loop, evaluate."""
    device = pick_device(args.device)
    quiet()
    processor, policy = load(args, device)
    clips, tests = load_sets(args, rate(processor))
    main_set = main_of(tests, args)
    keywords = {k for u in clips for k in u.keywords}             # R3 watches for every keyword of the domain
    if "R3" in args.rewards and not keywords:
        raise DataError("--rewards R3 needs keywords, and --data has none in its metadata.jsonl")
    weights = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=args.lr, weight_decay=0.0)
    phase, eos, rewards, first, state = Phases(device), end_tokens(policy), args.rewards.split(","), 0, {}
    if args.resume:
        state = load_state(policy, optimizer, args.resume)
        first, phase.total = state["step"], state["seconds"]
        optimizer.param_groups[0]["lr"] = args.lr
    folder = Path(args.resume or args.out or new_run_folder("grpo_asr"))
    log = RunLog(folder, run_header(args, device, policy), first if args.resume else None)
    self_check(policy, processor, [clips[i] for i in batch_indices(0, len(clips), args.batch, args.seed)], args, device)
    if not args.resume:
        with phase("evaluate"):
            state["before"] = {name: evaluate(policy, processor, tests[name], args, device) for name in tests}
        state |= {"best": state["before"][main_set][1]["wer"], "best_step": 0, "step": 0}
        policy.save_pretrained(folder / "adapter")
        log.write("log", {"step": -1, "set": main_set, "eval_wer": state["best"]})  # after no step at all
        print(f"step 0: {main_set} WER {percent(state['best'])}")
        save_state(policy, optimizer, folder, {**state, "seconds": phase.total})
    phase.take()

    stop = []
    previous = signal.signal(signal.SIGINT, lambda *_: stop.append(1) if not stop else sys.exit("stopped at once"))
    bar = tqdm(range(first, args.steps), initial=first, total=args.steps, dynamic_ncols=True, leave=False, disable=None)
    for step in bar:
        # 1 prompts: the audio of the step, encoded once
        batch = [clips[i] for i in batch_indices(step, len(clips), args.batch, args.seed)]
        with phase("encode"):
            prompts = encode(policy, collate(processor, batch, args.language, args.hotwords).to(device))  # (B, L, D)
        # 2 sample
        with phase("rollout"):
            if args.supervised:
                rollout = references(policy, processor, prompts, batch, eos, args.temperature)
            else:
                rollout = sample(policy, prompts, args.group, token_limit(args, batch), eos, args.temperature,
                                 generator_for(args.seed, step, device))            # (N, T)
            texts = decode(processor, rollout)
        # 3 reward
        with phase("reward"):
            said = [u for u in batch for _ in range(args.group)]                    # N
            scored = [asr_reward(u.text, text, keywords, args.language, rewards) for u, text in zip(said, texts)]
            reward = torch.tensor([s.total for s in scored], device=device).view(-1, args.group)  # (B, G)
        # 4 advantage
        advantage = torch.ones_like(reward) if args.supervised else group_advantages(reward)   # (B, G)  Eq. 1
        with phase("update"):
            # 5 log-probs, under the reference and now
            ref_logp = reference_logprobs(policy, prompts, rollout, args)           # (N, T)
            parts = []
            for part, rows, group in micro_batches(args.batch, args.group, args.micro):
                logp = completion_logprobs(policy, prompts[part], rollout.ids[rows], rollout.mask[rows], group,
                                           args.temperature)                        # (M, T)
                # 6 loss and step: the parts add up to the loss of the whole
                loss = grpo_loss(logp, rollout.logp[rows], ref_logp[rows], advantage.view(-1)[rows],
                                 rollout.mask[rows], args.clip, args.beta)          # Eq. 2-3
                (loss * len(logp) / len(rollout.ids)).backward()
                parts.append(logp.detach())
            norm = clipped_step(optimizer, weights, step)
        # 7 log one row; now and then evaluate and save
        logp = torch.cat(parts)                                                     # (N, T)
        row = describe(step, args, phase, rollout, reward, scored, said, texts, logp, ref_logp, norm)
        log.write("log", row)
        bar.set_postfix_str(f"reward {row['reward']:.3f} WER {percent(row['wer'])} KL {row['kl']:.3f}")
        if step % 10 == 0:
            log.write("samples", transcripts_row(step, reward, scored, said, texts))
            tqdm.write(f"step {step}: reward {row['reward']:.3f}, WER of the samples {percent(row['wer'])}, "
                       f"KL {row['kl']:.3f}, {sum(row['seconds'].values()):.2f} s")
        state["step"] = step + 1
        if (args.eval_every and state["step"] % args.eval_every == 0) or state["step"] == args.steps or stop:
            with phase("evaluate"):
                wer = evaluate(policy, processor, tests[main_set], args, device)[1]["wer"]
            log.write("log", {"step": step, "set": main_set, "eval_wer": wer, "seconds": phase.take()})
            tqdm.write(f"step {step + 1}: {main_set} WER {percent(wer)}")
            if wer < state["best"]:
                state |= {"best": wer, "best_step": step + 1}
                policy.save_pretrained(folder / "adapter")
            save_state(policy, optimizer, folder, {**state, "last": wer, "seconds": phase.total})
        if stop:
            break
    bar.close()
    if stop:
        print(f"stopped after {state['step']} of {args.steps} steps; python grpo_asr.py --resume {folder} goes on")
    finish(policy, processor, tests, main_set, state, folder, log, phase, args, device)
    signal.signal(signal.SIGINT, previous)


# ---- what a run leaves behind ------------------------------------------------------------------------------

def describe(step, args, phase, rollout, reward, scored, said, texts, logp, ref_logp, norm):
    """One line of the log; the README says what each number means, and how it looks when something is sick."""
    mean = lambda x: float(x[rollout.mask].float().mean())  # noqa: E731
    share = lambda hits: sum(hits) / len(scored)  # noqa: E731
    metrics = asr_metrics([u.text for u in said], texts, (), args.language)
    tokens, seconds = rollout.mask.sum(dim=1).float(), phase.take()
    return {
        "step": step, "reward": float(reward.mean()), "reward_std": float(reward.std(dim=1, correction=0).mean()),
        "R1": share(s.accuracy for s in scored), "R2": share(s.hallucination.reward() for s in scored),
        "R3": share(s.keywords for s in scored),
        "no_signal": float((reward == reward[:, :1]).all(dim=1).float().mean()),
        "wer": metrics["wer"], "length_ratio": metrics["length_ratio"],
        "repetition": share(s.hallucination.kind == "repetition" for s in scored),
        "empty": share(not text for text in texts), "truncated": float(rollout.truncated.float().mean()),
        "tokens": float(tokens.mean()), "tokens_per_s": float(tokens.sum()) / seconds["rollout"],
        "kl": mean(kl_k3(logp, ref_logp)), "entropy": mean(rollout.entropy),
        "clipped": mean(((logp - rollout.logp).exp() - 1).abs() > args.clip), "grad_norm": float(norm), "lr": args.lr,
        "seconds": seconds, "peak_memory_gib": phase.peak_gib(), "peak_by_phase_gib": dict(phase.peaks),
    }


def finish(policy, processor, tests, main_set, state, folder, log, phase, args, device):
    """Evaluates the best adapter on every test set; table, transcripts, times, summary.json."""
    load_adapter(policy, folder / "adapter")
    with phase("evaluate"):
        after = {name: evaluate(policy, processor, tests[name], args, device) for name in tests}
    before = state["before"]
    metrics = [{name: found[name][1] for name in tests} for found in (before, after)]
    was, now = (m[main_set]["wer"] for m in metrics)
    print_table(*metrics)
    print_transcripts([u.text for u in tests[main_set]], before[main_set][0], after[main_set][0], args.language)
    print_times(phase, state["step"])
    log.summary({
        "metric": f"{main_set} WER, greedy, best adapter", "before": was, "after": now, "best": state["best"],
        "best_step": state["best_step"], "steps": state["step"], "seconds": sum(phase.total.values()),
        "phase_seconds": phase.total, "peak_memory_gib": phase.peak_gib(), "peak_by_phase_gib": phase.peaks,
        "test": {name: {"before": metrics[0][name], "after": metrics[1][name]} for name in tests}})
    change = f" ({100 * (now - was) / was:+.0f} %)" if was else ""
    print(f"{main_set}: WER {percent(was)} -> {percent(now)}{change} in {state['step']} steps.  "
          f"Everything is in {folder}")


if __name__ == "__main__":
    main()
