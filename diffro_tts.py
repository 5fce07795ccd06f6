"""Chapter 3: DiffRO, a differentiable reward for text-to-speech, alone and beside GRPO (arXiv 2509.18569).

No waveform, no judge, no policy gradient: a Gumbel-softmax sample of the LLM's own distribution goes into a frozen
Token2Text model as a mixture of embeddings, and the gradient of log P(text | speech) flows back through the mixture.

    Eq. 4   U~_t = softmax((log pi_theta(. | q, o_<t) + g_t) / tau),  g Gumbel noise, over the speech tokens     [DR]
    Eq. 5   R_i = 1/|y| sum_j log P(y_j | U~_i, y_<j)                the Token2Text model's reading of the text  [DR]
    Eq. 6   KL_it = sum_v pi_theta(v) log(pi_theta(v) / pi_ref(v))   over the whole vocabulary                   [CV3]
    Eq. 7   L = -mean_i keep_i (R_i - beta mean_t KL_it)             keep_i: the sample filter              [paper, DR]
            L = L_GRPO + lambda L_DiffRO, keep_i = A_i > 0           GRPO + DiffRO with the filter               [paper]

The pass is teacher-forced: o are fixed tokens (a rollout, or a recording's), and only the reward model sees U~. [paper]
is arXiv 2509.18569, [DR] arXiv 2507.05911, [CV3] arXiv 2505.17589, [choice] ours; lambda is published nowhere. Left
out: the multi-task rewards of [DR] (emotion, quality, ...).

    python diffro_tts.py --steps 200
    python diffro_tts.py --steps 200 --method grpo+diffro --filter positive --rewards R1,R2

Last line:  WER by the second judge: 21.4 % -> 13.0 % (-39 %) in 200 steps.  Everything is in runs/diffro_tts-...
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
    g.add_argument("--token2text", default="checkpoints/token2text", help="DiffRO's reward (default: %(default)s)")
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
    g = p.add_argument_group("DiffRO")
    g.add_argument("--method", choices=["diffro", "grpo+diffro"], default="diffro", help="(default: diffro)")
    g.add_argument("--weight", type=float, default=1.0, help="lambda, of DiffRO beside GRPO (default: 1)")
    g.add_argument("--filter", choices=["positive", "none", "abnormal"], help="DiffRO on samples with A > 0; on all; "
                   "on those that end and do not loop, GRPO too (default: positive with GRPO, else none)")
    g.add_argument("--teach", choices=["rollout", "reference"], default="rollout",
                   help="the fixed tokens of the pass: sampled, or the recording's in --data (default: rollout)")
    g.add_argument("--tau", type=float, default=1.0, help="Gumbel-softmax temperature (authors: 1)")
    g.add_argument("--tau-end", type=float, help="anneal --tau to this over the steps (default: stay)")
    g.add_argument("--hard", action="store_true", help="one-hot forward, soft backward (straight-through)")
    g = p.add_argument_group("GRPO")
    g.add_argument("--steps", type=int, default=200)
    g.add_argument("--batch", type=int, default=4, help="B, texts a step (paper: 16)")
    g.add_argument("--group", type=int, default=8, help="G, samples a text; for DiffRO alone 1 will do "
                   "(paper: 8)")
    g.add_argument("--micro", type=int, default=16, help="samples in one forward and backward; changes memory, "
                   "speed and which Gumbel draw goes where (default: 16, the best on a CPU)")
    g.add_argument("--temperature", type=float, default=1.0, help="of sampling and of the log-probs (paper: 1)")
    g.add_argument("--lr", type=float, default=3e-4, help="AdamW on LoRA (default: 3e-4; paper, all weights: 1e-5)")
    g.add_argument("--clip", type=float, default=0.2, help="eps of Eq. 3")
    g.add_argument("--beta", type=float, default=0.1, help="weight of the KL in Eq. 3 (paper: 0.1)")
    g = p.add_argument_group("run")
    g.add_argument("--seed", type=int, default=1)
    g.add_argument("--eval-every", type=int, default=50, help="steps; 0 = only before and after")
    g.add_argument("--eval-samples", type=int, default=1, help="of each test text: the WER of one each scatters by 2.7 "
                   "points, of k by that over sqrt(k) (default: 1)")
    g.add_argument("--eval-batch", type=int, default=50, help="test texts at once: memory, speed and which draw goes "
                   "where (default: 50)")
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
    for name, least in dict(steps=0, batch=1, group=1 + (args.method != "diffro"), micro=1, lora_rank=1, eval_every=0,
                            eval_samples=1, eval_batch=1).items():
        if getattr(args, name) < least:
            p.error(f"--{name.replace('_', '-')} must be {least} or more, not {getattr(args, name)}")
    if args.micro % args.group and args.group % args.micro:
        p.error(f"--micro {args.micro} must be a multiple or a divisor of --group {args.group}")
    if set(args.rewards.split(",")) - {"R1", "R2", "R3"}:
        p.error(f"--rewards takes some of R1,R2,R3, not {args.rewards}")
    args.filter = args.filter or ("positive" if args.method == "grpo+diffro" else "none")
    args.tau_end = args.tau_end or args.tau
    if args.method == "diffro" and args.filter == "positive":
        p.error("--filter positive needs the advantages of --method grpo+diffro")
    if args.method == "grpo+diffro" and args.teach == "reference":
        p.error("--method grpo+diffro needs --teach rollout: GRPO learns from what was sampled")
    for name in ("lr", "temperature", "max_seconds", "tau", "tau_end", "weight"):
        if not 0 < getattr(args, name) < float("inf"):
            p.error(f"--{name.replace('_', '-')} must be above 0, not {getattr(args, name)}")
    if not 0 <= args.seed < 2 ** 31:
        p.error(f"--seed must be from 0 to 2^31 - 1, not {args.seed}")
    return args


if __name__ == "__main__":
    parse_args()  # --help and typing errors answer at once, before torch loads
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it misses an optional kernel, aloud

import signal
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from data import (
    DataError,
    Phases,
    RunLog,
    batch_indices,
    clipped_step,
    load_state,
    new_run_folder,
    pick_device,
    quiet,
    run_header,
    save_state,
    split_sentences,
)
from grpo_asr import grpo_loss, token_logprobs
from judges import Token2Text
from report import percent
from rewards import Speech, repeats, tts_reward
from sampling import Rollout, completion_logits, completion_mask, generator_for, micro_batches, sample
from speech import (
    END,
    check_lengths,
    codes_of,
    evaluate,
    finish,
    judged_advantages,
    load,
    load_judges,
    load_voices,
    make_prompts,
    self_check,
    speech_row,
    speech_tokens,
    voices_of,
)

# Shapes: B texts a step, G samples each, N = B G samples, T tokens of a sample, L of a prompt, V vocabulary,
# S tokens of a text, M samples of a micro-batch.


# ---- equations ---------------------------------------------------------------------------------------------

def soft_tokens(logits, tau=1.0, hard=False, generator=None):
    """Eq. 4: Gumbel-softmax samples U~ of speech tokens, (N, T, V) -> (N, T, V), every row a distribution.

    `logits` are those of the speech tokens alone. The stop token and the text tokens have no row in the reward model,
    so they take no part: whatever mass the LLM gives them, U~ is a sample given that speech goes on, and no gradient
    of the reward reaches the probability of stopping. What holds that probability is the KL, and GRPO where it runs
    beside. tau -> 0 tends to one-hot samples; `hard` is one-hot forward, soft backward (straight-through).
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    noise = torch.empty_like(logits).exponential_(generator=generator).clamp(min=1e-30)
    soft = torch.softmax((logits - noise.log()) / tau, dim=-1)                      # -log E is a Gumbel draw
    if not hard:
        return soft
    one_hot = torch.zeros_like(soft).scatter_(-1, soft.argmax(dim=-1, keepdim=True), 1.0)
    return one_hot + soft - soft.detach()


def text_logprob(model, soft, mask, text_ids, text_mask):
    """Eq. 5, the reward: mean over text tokens of log P(y_j | U~, y_<j), (N,), differentiable in `soft`.

    `soft` (N, T, V) goes in as soft @ embedding, so that one-hot rows are read like tokens; positions where `mask`
    (N, T) is false, those after the end of speech, are not read. `text_ids` (N, S) are the reward model's own tokens.
    """
    first = model.config.first_speech_token
    table = model.get_input_embeddings().weight[first:first + soft.shape[-1]]       # (V, D)
    labels = text_ids.masked_fill(~text_mask, -100)
    logits = model(inputs_embeds=soft.to(table.dtype) @ table, attention_mask=mask.long(), labels=labels).logits
    logp = token_logprobs(logits, text_ids) * text_mask                             # (N, S)
    return logp.sum(dim=1) / text_mask.sum(dim=1).clamp(min=1)


def categorical_kl(logits, ref_logits, mask):
    """Eq. 6 [CV3]: KL(pi | pi_ref) over the whole vocabulary at every position, its mean over a sample's positions.

    (N, T, V), (N, T, V), (N, T) -> (N,). No estimate: the sum runs over all tokens, the stop token among them.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    logp, ref_logp = (torch.log_softmax(x.to(wide), dim=-1) for x in (logits, ref_logits))
    kl = (logp.exp() * (logp - ref_logp)).sum(dim=-1)                               # (N, T)
    return (kl * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)


def diffro_loss(reward, kl, beta=0.1, keep=None):
    """Eq. 7: -mean_i keep_i (R_i - beta KL_i): (N,), (N,) -> scalar. `keep` (N,) is the sample filter, A_i > 0.

    Divided by N, not by the number kept: a sample weighs the same whatever the filter does to the others [choice].
    """
    value = reward - beta * kl
    return -(value if keep is None else torch.where(keep, value, 0.0)).mean()


def recorded(taught, speech_ids, stop):
    """Recordings' speech tokens as if they had been sampled, with the stop token behind each."""
    rows = [torch.cat([speech_ids[list(codes)], speech_ids.new_tensor([stop])]) for codes in taught]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=stop)
    zeros = torch.zeros(ids.shape, device=ids.device)
    return Rollout(ids, completion_mask(ids, stop), zeros, zeros, torch.zeros_like(ids[:, 0], dtype=torch.bool))


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
    codec, judge, second, speaker = models = load_judges(args, device, first=args.method == "grpo+diffro")
    token2text, grpo = Token2Text(args.token2text, device, codec.count), args.method == "grpo+diffro"
    models = *models, token2text
    code, stop = speech_tokens(tokenizer, codec, policy.config.vocab_size), tokenizer.convert_tokens_to_ids(END)
    speech_ids = code.argsort()[(code < 0).sum():].to(device)                       # (codes,), in the codec's order
    texts, tests = split_sentences(args)
    tests = tests * args.eval_samples
    if args.teach == "reference" and not all(t.codes for t in texts):
        raise DataError('--teach reference needs the recordings as "tokens" in the metadata.jsonl of --data')
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
        return batch, make_prompts(policy, tokenizer, said, chosen), chosen         # (B, L)

    batch, prompts, chosen = prompts_of(0)
    other = next((t.text for t in texts if t not in batch), batch[-1].text + " " + batch[0].text)
    others = make_prompts(policy, tokenizer, [other] * args.batch, chosen)
    self_check(policy, prompts, others, args, limit, stop, device)
    folder = Path(args.resume or args.out or new_run_folder("diffro_tts"))
    log = RunLog(folder, run_header(args, device, policy), first if args.resume else None)
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
    best = before if state["best_step"] == 0 else None
    phase.take()

    stopped = []
    previous = signal.signal(signal.SIGINT,
                             lambda *_: stopped.append(1) if not stopped else sys.exit("stopped at once"))
    bar = tqdm(range(first, args.steps), initial=first, total=args.steps, dynamic_ncols=True, leave=False, disable=None)
    for step in bar:
        # 1 prompts
        batch, prompts, _ = prompts_of(step)
        said = [s.text for s in batch for _ in range(args.group)]                   # N
        noise, tau = generator_for(args.seed, step, device), args.tau + (args.tau_end - args.tau) * step / args.steps
        # 2 the fixed tokens of the pass: sampled, or the recording's
        with phase("rollout"):
            if args.teach == "reference":
                rollout = recorded([s.codes for s in batch for _ in range(args.group)], speech_ids, stop)
            else:
                rollout = sample(policy, prompts, args.group, limit, stop, args.temperature, noise)    # (N, T)
            codes = codes_of(rollout, code)
        spoken = rollout.mask & (code.to(device)[rollout.ids] >= 0)                 # (N, T), the stop token not
        loops = torch.tensor([repeats(c, round(codec.tokens_per_s)) for c in codes], device=device)    # (N,)
        keep = ~(loops | rollout.truncated) if args.filter == "abnormal" else torch.ones_like(loops)
        mask, heard = rollout.mask, None
        if grpo:
            # 3 reward: the waveforms and the judge, for GRPO alone
            with phase("decode"):
                waves = codec.decode(codes)
            with phase("reward"):
                speech = [Speech(*row) for row in zip(said, codes, waves, judge.transcribe(waves),
                                                      rollout.truncated.tolist())]
                reward, parts, judged = tts_reward(speech, args.group, rewards, args.language, codec.rate,
                                                   device)                          # (B, G)
            # 4 advantage, as in chapter 2, and the filter
            advantage = judged_advantages(reward, judged).to(device).view(-1)       # (N,)  Eq. 1
            mask = mask & judged.view(-1, 1).to(device)
            if args.filter == "positive":
                keep = advantage > 0
            elif args.filter == "abnormal":
                mask = mask & keep[:, None]
            heard = speech, reward, parts, judged
        with phase("update"):
            text_ids, text_mask = token2text.text_ids(said)                         # (N, S)
            grads = {name: [torch.zeros_like(w) for w in weights] for name in ["diffro", "grpo"][:1 + grpo]}
            found = []
            for part, rows, group in micro_batches(args.batch, args.group, args.micro):
                # 5 logits of the fixed tokens, now and under the reference
                span = rows, slice(int(rollout.mask[rows].sum(dim=1).max()))
                asked = (prompts[part], rollout.ids[span], rollout.mask[span], group)
                logits = completion_logits(policy, *asked)                          # (M, T, V)
                with torch.no_grad(), policy.disable_adapter():
                    ref_logits = completion_logits(policy, *asked)
                # 6 losses; the parts add up to those of the whole
                soft = soft_tokens(logits[..., speech_ids], tau, args.hard, noise)  # Eq. 4  (M, T, codes)
                reading = text_logprob(token2text.model, soft, spoken[span], text_ids[rows], text_mask[rows])  # Eq. 5
                kl = categorical_kl(logits, ref_logits, rollout.mask[span])         # Eq. 6
                losses = {"diffro": diffro_loss(reading, kl, args.beta, keep[rows])}                           # Eq. 7
                if grpo:
                    logp, ref_logp = (token_logprobs(x, rollout.ids[span], args.temperature)
                                      for x in (logits, ref_logits))
                    losses["grpo"] = grpo_loss(logp, rollout.logp[span], ref_logp, advantage[rows], mask[span],
                                               args.clip, args.beta)                # Eq. 2-3 of chapter 1
                    losses["diffro"] = args.weight * losses["diffro"]
                for name, loss in losses.items():                # apart, so that the log can tell who pulls how hard
                    share = torch.autograd.grad(loss * len(logits) / len(rollout.ids), weights,
                                                retain_graph=name == "diffro" and grpo)
                    for total, grad in zip(grads[name], share):
                        total += grad
                found.append((reading.detach(), kl.detach()))
            norms = {name: float(torch.nn.utils.get_total_norm(g)) for name, g in grads.items()}
            for weight, *pulls in zip(weights, *grads.values()):
                weight.grad = sum(pulls)
            norm = clipped_step(optimizer, weights, step)
        # 7 log one row; now and then evaluate and save
        reading, kl = map(torch.cat, zip(*found))                                   # (N,), (N,)
        row = describe(step, args, phase, rollout, codes, loops, heard, reading, kl, keep, tau, norms, norm)
        log.write("log", row)
        bar.set_postfix_str(f"log P {row['reading']:.3f} KL {row['kl']:.3f}")
        if step % 10 == 0:
            if grpo:
                log.write("samples", speech_row(step, reward, parts, speech))
            tqdm.write(f"step {step}: log P of the text {row['reading']:.3f} a token, KL {row['kl']:.3f}, "
                       f"{sum(row['seconds'].values()):.2f} s")
        state["step"] = step + 1
        if (args.eval_every and state["step"] % args.eval_every == 0) or state["step"] == args.steps or stopped:
            with phase("evaluate"):
                now = evaluate(policy, *given, due)
            metrics = now[1]
            log.write("log", {"step": step, "eval": metrics, "eval_wer": metrics["wer"], "seconds": phase.take()})
            tqdm.write(f"step {step + 1}: WER by the second judge {percent(metrics['wer'])}, similarity "
                       f"{metrics['similarity']:.3f}, length {metrics['length_ratio']:.2f}")
            if metrics["wer"] < state["best"]:
                state |= {"best": metrics["wer"], "best_step": step + 1}
                best = now
                policy.save_pretrained(folder / "adapter")
            save_state(policy, optimizer, folder, {**state, "last": metrics["wer"], "seconds": phase.total})
        if stopped:
            break
    bar.close()
    if stopped:
        print(f"stopped after {state['step']} of {args.steps} steps; python diffro_tts.py --resume {folder} goes on")
    finish(policy, given, due, before, best, state, folder, log, phase)
    signal.signal(signal.SIGINT, previous)


# ---- what a run leaves behind ------------------------------------------------------------------------------

def describe(step, args, phase, rollout, codes, loops, heard, reading, kl, keep, tau, norms, norm):
    """One line of the log; the README says what each number means, and how it looks when something is sick."""
    lengths = torch.tensor([len(c) for c in codes]).float()
    tokens, seconds = rollout.mask.sum().item(), phase.take()
    row = {
        "step": step, "reading": float(reading.mean()), "kl": float(kl.mean()), "kept": float(keep.float().mean()),
        "tau": tau, "tokens": float(lengths.mean()), "truncated": float(rollout.truncated.float().mean()),
        "repetition": float(loops.float().mean()),
        "tokens_per_s": tokens / max(1e-9, seconds["rollout"]),
        "entropy": float(rollout.entropy[rollout.mask].mean()), "grad_norm": float(norm),
        **{f"grad_norm_{name}": value for name, value in norms.items()}, "lr": args.lr,
    }
    if heard:
        speech, reward, parts, judged = heard
        judgeable = [s for s in speech if s.transcript is not None]
        row |= {"reward": float(reward.mean()), "reward_std": float(reward.std(dim=1, correction=0).mean()),
                **{name: float(part.nanmean()) for name, part in parts.items()},
                "no_signal": float((reward == reward[:, :1]).all(dim=1).float().mean()),
                "wer": 1 - sum(s.accuracy(args.language) for s in judgeable) / max(1, len(judgeable)),
                "judge_failed": int((~judged).sum()), "empty": sum(s.transcript == "" for s in speech) / len(speech)}
    return {**row, "seconds": seconds, "peak_memory_gib": phase.peak_gib(), "peak_by_phase_gib": dict(phase.peaks)}


if __name__ == "__main__":
    main()
