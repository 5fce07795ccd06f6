r"""Chapter 2: GRPO for LLM-based text-to-speech (arXiv 2509.18569).

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
        --speaker microsoft/wavlm-base-plus-sv --data texts.txt --voices DIR --lr 1e-5 \
        --quantize 8bit --offload --group 4 --micro 2                           published ones, on a card of 8 GB

Last line:  WER by the second judge: 21.4 % -> 10.8 % (-49 %) in 200 steps.  Everything is in runs/grpo_tts-...
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
    for name, least in dict(steps=0, batch=1, group=2, micro=1, lora_rank=1, eval_every=0, eval_samples=1,
                            eval_batch=1).items():
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
from grpo_asr import completion_logprobs, grpo_loss, kl_k3, reference_logprobs
from report import percent
from rewards import Speech, repeats, tts_reward
from sampling import generator_for, micro_batches, sample
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
# M samples of a micro-batch.


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
    tests = tests * args.eval_samples
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
        return said, make_prompts(policy, tokenizer, said, chosen), chosen          # (B, L)

    said, prompts, chosen = prompts_of(0)
    other = next((t.text for t in texts if t.text not in said), said[-1] + " " + said[0])
    others = make_prompts(policy, tokenizer, [other] * args.batch, chosen)
    self_check(policy, prompts, others, args, limit, stop, device)
    folder = Path(args.resume or args.out or new_run_folder("grpo_tts"))
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
            reward, parts, judged = tts_reward(speech, args.group, rewards, args.language, codec.rate,
                                               device)                              # (B, G)
        # 4 advantage
        advantage = judged_advantages(reward, judged).to(device)                    # (B, G)  Eq. 1
        mask = rollout.mask & judged.view(-1, 1).to(device)     # a sample that the judge failed on teaches nothing
        with phase("update"):
            # 5 log-probs, under the reference and now; a part has as many tokens as its longest sample
            ref_logp = reference_logprobs(policy, prompts, rollout, args)           # (N, T)
            passes = []
            for part, rows, group in micro_batches(args.batch, args.group, args.micro):
                span = rows, slice(int(rollout.mask[rows].sum(dim=1).max()))
                logp = completion_logprobs(policy, prompts[part], rollout.ids[span], rollout.mask[span], group,
                                           args.temperature)                        # (M, T)
                # 6 loss and step: the parts add up to the loss of the whole
                loss = grpo_loss(logp, rollout.logp[span], ref_logp[span], advantage.view(-1)[rows], mask[span],
                                 args.clip, args.beta)                              # Eq. 2-3
                (loss * len(logp) / len(rollout.ids)).backward()
                logp = logp.detach()
                passes.append((logp - rollout.logp[span], kl_k3(logp, ref_logp[span]), rollout.mask[span]))
            norm = clipped_step(optimizer, weights, step)
        # 7 log one row; now and then evaluate and save
        drift, kl = (torch.cat([pair[i][pair[2]] for pair in passes]) for i in (0, 1))     # (tokens of the step,)
        row = describe(step, args, phase, rollout, speech, reward, parts, judged, codec, drift, kl, norm)
        log.write("log", row)
        bar.set_postfix_str(f"reward {row['reward']:.3f} WER {percent(row['wer'])} KL {row['kl']:.3f}")
        if step % 10 == 0:
            log.write("samples", speech_row(step, reward, parts, speech))
            tqdm.write(f"step {step}: reward {row['reward']:.3f}, WER of the samples {percent(row['wer'])}, "
                       f"KL {row['kl']:.3f}, {sum(row['seconds'].values()):.2f} s")
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
        print(f"stopped after {state['step']} of {args.steps} steps; python grpo_tts.py --resume {folder} goes on")
    finish(policy, given, due, before, best, state, folder, log, phase)
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


if __name__ == "__main__":
    main()
