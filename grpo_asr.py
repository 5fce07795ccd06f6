r"""Chapter 1: GRPO for LLM-based speech recognition, with rule rewards (arXiv 2509.18569).

A recogniser hears a clip and samples G transcripts; rules score them against what was said; the better than average
of each group become likelier, the worse less likely; a KL term holds the policy near the reference, where it began.

    Eq. 1   A_i = (R_i - mean_j R_j) / (std_j R_j + 1e-4)                    j over the G samples of one clip  [paper]
    Eq. 2   r_it = pi_theta(o_it | q, o_i,<t) / pi_old(o_it | q, o_i,<t)                                      [paper]
    Eq. 3   J = 1/G sum_i 1/|o_i| sum_t [ min(r_it A_i, clip(r_it, 1 - eps, 1 + eps) A_i) - beta KL_it ]      [paper]
            KL_it = d^2 / 2,  d = log pi_ref - log pi_theta    (k2; in the log, and with --kl k3, e^d - d - 1)  [choice]
    MWER    L = sum_i p_i (W_i - mean_j W_j) + 0.01 CE         what the paper names beside GRPO; --objective mwer

[paper] is arXiv 2509.18569, [choice] is ours: it gives neither eps nor the estimator of the KL nor the 1e-4. Its
learning rate, beta, B and G are flags; left out are its rollout engine and its multi-GPU rotation: here one model
samples, scores and learns in turn. The policy is LoRA on the LLM; the reference is the same weights with LoRA switched
off, or the adapter that the run starts from.

    python grpo_asr.py --steps 200                                       the embedded recogniser, minutes on a CPU
    python grpo_asr.py --model FunAudioLLM/Fun-ASR-Nano-2512-hf --data DIR \
        --quantize 8bit --micro 4 --max-tokens 144 --lr 1e-5             a published one, on a card of 8 GB

Last line:  short WER: 32.2 % -> 14.2 % (-56 %) in 200 steps.  Everything is in runs/grpo_asr-...
"""
import functools
import itertools

from engine.settings import parse_asr

parse_args = functools.partial(parse_asr, about=__doc__)
if __name__ == "__main__":
    parse_args()  # --help and typing errors answer at once, before torch loads

import torch

from data import batch_indices, split_clips
from engine.audio import DataError
from engine.models import add_adapters, load_recogniser, precision, quantization
from engine.parallel import RANK, WORLD, Shared, average, gather, share
from engine.recognisers import answers, collate, embed, rate
from engine.report import (
    group_figures,
    percent,
    print_start,
    print_table,
    print_times,
    print_transcripts,
    rollout_figures,
    transcripts_row,
)
from engine.run import Run, launch, load_adapter, pick_device, quiet
from engine.sampling import (
    Prompts,
    as_rollout,
    completion_logprobs,
    generator_for,
    micro_batches,
    reference_logprobs,
    sample,
    self_check,
)
from engine.text import normalize_text
from rewards import asr_metrics, asr_reward

# Shapes: B clips a step, G samples each, N = B G samples, T tokens of a transcript, L of a prompt, D width,
# M samples of a micro-batch.


# ---- the equations ---------------------------------------------------------------------------------------------

def group_advantages(reward):
    """Eq. 1: (B, G) -> (B, G). Zero mean in every group; a group of equal rewards gives exact zeros [choice]."""
    centred = reward - reward.mean(dim=1, keepdim=True)
    spread = reward.std(dim=1, keepdim=True, correction=0)
    equal = (reward == reward[:, :1]).all(dim=1, keepdim=True)       # its mean may differ from it by rounding
    return (centred / (spread + 1e-4)).masked_fill(equal, 0.0)


def kl_k2(logp, ref_logp):
    """KL_it of Eq. 3 in the loss, (N, T) -> (N, T): its gradient, (log pi - log pi_ref) grad log pi, is in expectation
    that of KL(pi | pi_ref), and a rare token moves it by no more than its log-ratio."""
    return (ref_logp - logp).square() / 2


def kl_k3(logp, ref_logp):
    """KL_it as it is logged, (N, T) -> (N, T): an unbiased value of KL(pi | pi_ref) over samples of pi, never < 0. Its
    gradient, (1 - e^d) grad log pi, is another's: in expectation that of KL(pi_ref | pi), and unbounded."""
    d = ref_logp - logp
    return torch.exp(d) - d - 1


KL = {"k2": kl_k2, "k3": kl_k3}


def grpo_loss(logp, old_logp, ref_logp, advantage, mask, clip=0.2, beta=0.1, kl="k2"):
    """-J of Eq. 3: (N, T) log-probs, (N,) or (B, G) advantages, (N, T) mask -> scalar.

    Every sample counts the same whatever its length (the paper's 1/|o_i|). For some of a step's samples multiply by
    their share of N: the sum over micro-batches is then the loss of the whole.

    Why a ratio and a clip, when every rollout is used for one step and the ratio is 1? Because its gradient is not 0:
    at r = 1 that of r A is A grad log pi, the policy gradient. The clip then never acts. It stands here because Eq. 3
    has it, because whoever takes several steps a rollout needs it, and because a ratio that the log shows outside
    1 +- eps (`clipped`) says that sampler and trainer disagree.
    """
    mask, advantage = mask.to(logp.dtype), advantage.reshape(-1, 1)                 # (N, T), (N, 1)
    ratio = torch.exp(logp - old_logp)                                              # Eq. 2
    surrogate = torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
    objective = surrogate - beta * KL[kl](logp, ref_logp)                           # Eq. 3
    return -((objective * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)).mean()


def mwer_loss(logp, mask, errors, transcript_logp, transcript_mask, weight=0.01):
    """MWER of Prabhavalkar et al. 2017 (arXiv 1712.01818), Eqs. 6 to 8 over samples: (N, T) log-probs and mask, (B, G)
    word errors W, the transcripts' own log-probs and mask (B, S) -> scalar, the mean over the B clips.

    p_i are the samples' probabilities renormalised over the group, the mean of W is a baseline, and the cross-entropy
    of the transcripts, summed over their tokens, is interpolated with the weight that they give it.
    """
    sequence = (logp * mask).sum(dim=1).view(errors.shape)                          # (B, G) log-probs
    expected = (torch.softmax(sequence, dim=1) * (errors - errors.mean(dim=1, keepdim=True))).sum(dim=1)
    return (expected - weight * (transcript_logp * transcript_mask).sum(dim=1)).mean()


# ---- the loop --------------------------------------------------------------------------------------------------

def train(args):
    """The whole run: set up, the seven steps of the loop, what is left behind."""
    run, processor, clips, dev, tests = set_up(args)
    policy, eos, rewards = run.policy, end_tokens(run.policy), args.rewards.split(",")
    keywords = frozenset(k for u in clips for k in u.keywords)    # R3 watches for every keyword of the domain
    supervised = args.objective == "supervised"
    for step in run.steps():
        # 1 prompts: the audio of the step, encoded once
        whole = [clips[i] for i in batch_indices(step, len(clips), args.batch, args.seed)]
        batch = share(whole)                      # all of it, or under torchrun this process's share
        with run.phase("encode"):
            prompts = encode(policy, collate(processor, batch, args.language))  # (B, L, D)
        # 2 sample
        with run.phase("rollout"):
            if supervised:
                with torch.no_grad():
                    rollout = transcripts_as_rollout(policy, processor, prompts, batch, args.temperature)
            else:
                rollout = sample(policy, prompts, args.group, token_limit(args, whole), eos, args.temperature,
                                 generator_for(args.seed, step, policy.device, Shared))        # (N, T)
            texts = decode(processor, rollout)
        # 3 reward
        with run.phase("reward"):
            clip_of = [u for u in batch for _ in range(args.group)]                 # N
            scored = [asr_reward(u.text, text, keywords, args.language, rewards) for u, text in zip(clip_of, texts)]
            reward = torch.tensor([s.total for s in scored], device=policy.device).view(-1, args.group)  # (B, G)
        # 4 advantage
        advantage = torch.ones_like(reward) if supervised else group_advantages(reward)        # (B, G)  Eq. 1
        with run.phase("update"):
            # 5 log-probs, under the reference and now
            ref_logp = reference_logprobs(policy, prompts, rollout, args.group, args.micro, args.temperature)  # (N, T)
            now_logp = torch.zeros_like(ref_logp)
            for asked, rows, each in micro_batches(len(batch), args.group, args.micro):
                logp = completion_logprobs(policy, prompts[asked], rollout.ids[rows], rollout.mask[rows], each,
                                           args.temperature)                        # (M, T)
                # 6 loss and step: the micro-batches add up to the loss of the whole
                if args.objective == "mwer":
                    errors = torch.tensor([float(s.errors) for s in scored[rows]], device=policy.device).view(-1, each)
                    told = transcripts_as_rollout(policy, processor, prompts[asked], batch[asked], args.temperature)
                    loss = mwer_loss(logp, rollout.mask[rows], errors, told.logp, told.mask)   # MWER
                else:
                    loss = grpo_loss(logp, rollout.logp[rows], ref_logp[rows], advantage.view(-1)[rows],
                                     rollout.mask[rows], args.clip, args.beta, args.kl)        # Eq. 2-3
                (loss * len(logp) / len(rollout.ids)).backward()
                now_logp[rows] = logp.detach()
            average([w.grad for w in run.weights])
            norm = run.learn(step)
            reward, scored, clip_of, texts, rollout, now_logp, ref_logp = map(
                gather, (reward, scored, clip_of, texts, rollout, now_logp, ref_logp))
        # 7 log one row; now and then evaluate and save
        row = {**group_figures(reward), **text_figures(scored, clip_of, texts, args.language),
               **rollout_figures(rollout, run.phase), **policy_figures(rollout, now_logp, ref_logp, args.clip),
               "grad_norm": norm}
        run.record(step, row, f"reward {row['reward']:.3f}, WER of the samples {percent(row['wer'])}, "
                   f"KL {row['kl']:.3f}", transcripts_row(reward, scored, clip_of, texts))
        if run.due():
            with run.phase("evaluate"):
                wer = evaluate(policy, processor, dev, args)[1]["wer"]
            run.evaluated(wer, f"dev WER {percent(wer)}")
    finish(run, processor, tests)


# ---- set up ----------------------------------------------------------------------------------------------------

def load(args, device):
    """The processor and the policy: a frozen base, fp32 LoRA on its LLM."""
    # the encoder is a small part, runs once a step and feeds everything else: it is never quantised
    skip = [r"(?!.*language_model).*"]                                # all but the LLM, whatever the class
    processor, base = load_recogniser(args.model, dtype=precision(device), device_map=device,
                                      quantization_config=quantization(args.quantize, skip))
    return processor, add_adapters(base, "language_model", args.lora_rank, args.seed)


def set_up(args):
    """The run, with its state before any step or the one to resume from; processor; clips to train on, to choose by and
    to test on."""
    device = pick_device(args.device)
    quiet()
    processor, policy = load(args, device)
    clips, dev, tests = split_clips(args, rate(processor))
    if "R3" in args.rewards and not any(u.keywords for u in clips):
        raise DataError("--rewards R3 needs keywords, and --data has none in its metadata.jsonl")
    print_start(policy, f"{len(clips)} clips, {sum(u.seconds for u in clips):.0f} s", dev, tests)
    order = batch_indices(0, len(clips), len(clips), args.seed)
    check(policy, processor, [clips[i] for i in order], args)
    run = Run("grpo_asr", args, policy)
    if not args.resume:
        with run.phase("evaluate"):
            run.state["before"] = {name: evaluate(policy, processor, tests[name], args) for name in tests}
            wer = evaluate(policy, processor, dev, args)[1]["wer"]
        run.begin(wer)
        print(f"step 0: dev WER {percent(wer)}")
    return run, processor, clips, dev, tests


def check(policy, processor, clips, args):
    """self_check on the first clips that have sound and words: played backwards (upside down where a class has time in
    its last axis) they must move the log-probs."""
    count = max(1, min(args.batch, args.micro // args.group))
    heard = (u for u in clips if normalize_text(u.text, args.language) and u.waveform(rate(processor)).std() > 1e-3)
    batch = list(itertools.islice(heard, count)) or clips[:count]
    inputs = collate(processor, batch, args.language)
    prompts = encode(policy, inputs)
    backwards = encode(policy, {**inputs, "input_features": inputs["input_features"].flip(1)})
    self_check(policy, prompts, backwards, args, token_limit(args, batch), end_tokens(policy), "other audio")


# ---- audio to prompts, samples to texts ------------------------------------------------------------------------

@torch.no_grad()
def encode(policy, inputs):
    """Runs the audio encoder, once per clip and step; rollout, policy and reference share what it gives."""
    inputs = {name: value.to(policy.device) for name, value in inputs.items()}
    return Prompts(embed(policy.get_base_model(), inputs), inputs["attention_mask"])        # (B, L, D), (B, L)


def transcripts_as_rollout(policy, processor, prompts, batch, temperature):
    """The transcripts as if they had been sampled, one a clip, with their log-probs. With A = 1 the gradient of Eq. 3
    is then that of supervised fine-tuning, the control that the paper lacks [choice]."""
    eos = end_tokens(policy)
    rows = [torch.tensor([*processor.tokenizer(u.text, add_special_tokens=False).input_ids, eos[0]],
                         device=policy.device) for u in batch]
    rollout = as_rollout(rows, eos)
    rollout.logp = completion_logprobs(policy, prompts, rollout.ids, rollout.mask, 1, temperature)
    return rollout


def token_limit(args, utterances):
    """The longest transcript allowed for these clips, tokens: 16 + 8 for each second of the longest [choice]."""
    return args.max_tokens or 16 + int(8 * max(u.seconds for u in utterances))


def decode(processor, rollout):
    """The texts of a rollout, without end tokens and padding."""
    return answers(processor, [row[keep].tolist() for row, keep in zip(rollout.ids.cpu(), rollout.mask.cpu())])


def end_tokens(policy):
    """The ids that end a transcript, the usual one first."""
    return policy.get_base_model().generation_config.eos_token_id


# ---- evaluation, and what a run leaves behind ------------------------------------------------------------------

def evaluate(policy, processor, utterances, args, batch=32):
    """Greedy transcripts of a test set, in its own order, and their metrics."""
    order = sorted(range(len(utterances)), key=lambda i: utterances[i].seconds)
    found = []
    for start in range(0, len(order), batch)[RANK::WORLD]:
        alike = [utterances[i] for i in order[start:start + batch]]
        prompts = encode(policy, collate(processor, alike, args.language))
        rollout = sample(policy, prompts, 1, token_limit(args, alike), end_tokens(policy), temperature=0)
        found += zip(order[start:start + batch], decode(processor, rollout))
    found = [text for _, text in sorted(gather(found))]
    keywords, listed = frozenset(k for u in utterances for k in u.keywords), [u.listed or () for u in utterances]
    return found, asr_metrics([u.text for u in utterances], found, keywords, args.language, listed)


def text_figures(scored, clip_of, texts, language):
    """What the log says of N transcripts: every part of the reward, and how the texts look."""
    share = lambda hits: sum(hits) / len(scored)  # noqa: E731
    metrics = asr_metrics([u.text for u in clip_of], texts, (), language)
    return {"R1": share(s.accuracy for s in scored), "R2": share(s.hallucination.reward() for s in scored),
            "R3": share(s.keywords for s in scored), "wer": metrics["wer"], "length_ratio": metrics["length_ratio"],
            "repetition": share(s.hallucination.kind == "repetition" for s in scored),
            "empty": share(not text for text in texts)}


def policy_figures(rollout, logp, ref_logp, clip):
    """What the log says of the policy on its own samples: KL to the reference (k3), its largest d, nats, and the share
    of tokens clipped."""
    mean = lambda x: float(x[rollout.mask].float().mean())  # noqa: E731
    return {"kl": mean(kl_k3(logp, ref_logp)), "max_d": float((ref_logp - logp)[rollout.mask].max()),
            "clipped": mean(((logp - rollout.logp).exp() - 1).abs() > clip)}


def finish(run, processor, tests):
    """Evaluates the best adapter on every test set; table, transcripts, times, summary.json."""
    load_adapter(run.policy, run.folder / "adapter")
    with run.phase("evaluate"):
        before, main_test, better = run.state["before"], next(iter(tests)), run.state["best_step"]
        after = {name: evaluate(run.policy, processor, tests[name], run.args) if better else before[name]
                 for name in tests}
    metrics = {name: {"before": before[name][1], "after": after[name][1]} for name in tests}
    was, now = (metrics[main_test][when]["wer"] for when in ("before", "after"))
    told = run.summary(f"{main_test} WER, greedy, best adapter", was, now, metrics)
    print_table(metrics)
    print_transcripts([u.text for u in tests[main_test]], before[main_test][0], after[main_test][0], run.args.language)
    print_times(run.phase, run.state["step"])
    print(told)


def main(argv=None):
    args = parse_args(argv)
    launch(train, args)


if __name__ == "__main__":
    main()
