"""Chapter 3: DiffRO, a differentiable reward for text-to-speech, alone and beside GRPO (arXiv 2509.18569).

No waveform, no judge, no policy gradient: a Gumbel-softmax sample of the LLM's own distribution goes into a frozen
Token2Text model as embeddings, and the gradient of log P(text | speech) flows back through the softmax.

    Eq. 4   o~_t = GumbelSoftmax_hard(pi_theta(. | q, o_<t); tau)    one-hot, over the speech tokens           [paper]
            --soft: softmax((log pi_theta + g_t) / tau), g Gumbel noise                                      [DR, CV3]
    Eq. 5   R_i = log P(y | o~_i) / |y|                              the Token2Text model's reading            [paper]
    Eq. 6   KL_it = sum_v pi_theta(v) log(pi_theta(v) / pi_ref(v))   over the whole vocabulary                   [CV3]
    Eq. 7   L = -mean_i keep_i (R_i - beta mean_t KL_it)             keep_i: the sample filter                 [paper]
            L = L_GRPO + lambda L_DiffRO, keep_i = A_i > 0           GRPO + DiffRO with the filter             [paper]

The pass is teacher-forced: o are fixed tokens (a rollout, or a recording's), and only the reward model sees o~. [paper]
is arXiv 2509.18569, [DR] arXiv 2507.05911, [CV3] arXiv 2505.17589, [choice] ours: the 1/|y| of Eq. 5, lambda, and that
in the sum each loss keeps its own KL, so that the filter's samples feel it twice. DiffRO alone takes B 16 texts, one
sample each, as in the paper. Left out: the multi-task rewards of [DR] (emotion, quality, ...).

    python diffro_tts.py --steps 200
    python diffro_tts.py --steps 200 --method grpo+diffro --filter positive --rewards R1,R2

Last line: the WER of `plain` by the second judge, before and after, and where everything is: runs/diffro_tts-...
"""
import functools
from dataclasses import replace

from engine.settings import parse_speech

parse_args = functools.partial(parse_speech, about=__doc__, diffro=True)
if __name__ == "__main__":
    parse_args()  # --help and typing errors answer at once, before torch loads

import torch

from data import batch_indices
from engine.parallel import Shared, average, gather, share
from engine.report import group_figures, rollout_figures, speech_row
from engine.run import launch
from engine.sampling import (
    as_rollout,
    completion_logits,
    generator_for,
    micro_batches,
    reference,
    sample,
    token_logprobs,
)
from engine.speech import codes_of, evaluate_step, finish, length_figures, set_up, speech_figures
from grpo_asr import grpo_loss
from grpo_tts import judged_advantages
from rewards import Speech, tts_reward

# Shapes: B texts a step, G samples each, N = B G samples, T tokens of a sample, L of a prompt, V vocabulary,
# S tokens of a text, M samples of a micro-batch.


# ---- the equations ---------------------------------------------------------------------------------------------

def soft_tokens(logits, noise, tau=1.0, hard=True):
    """Eq. 4: Gumbel-softmax samples o~ of speech tokens, (N, T, V) -> (N, T, V), every row a distribution: one-hot with
    the softmax's gradient (straight-through) [paper]; the softmax itself where not `hard` [DR, CV3].

    `logits` are those of the speech tokens alone. The stop token and the text tokens have no row in the reward model,
    so they take no part: whatever mass the LLM gives them, o~ is a sample given that speech goes on, and no gradient
    of the reward reaches the probability of stopping. What holds that probability is the KL, and GRPO where it runs
    beside. `noise` is Exp(1), of their shape. tau -> 0 tends to one-hot samples.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    soft = torch.softmax((logits - noise.clamp(min=1e-30).log()) / tau, dim=-1)     # -log E is a Gumbel draw
    if not hard:
        return soft
    one_hot = torch.zeros_like(soft).scatter_(-1, soft.argmax(dim=-1, keepdim=True), 1.0)
    return one_hot + soft - soft.detach()


def text_logprob(model, soft, mask, text_ids, text_mask):
    """Eq. 5, the reward: mean over text tokens of log P(y_j | o~, y_<j), (N,), differentiable in `soft`.

    `soft` (N, T, V) goes in as soft @ embedding, so that one-hot rows are read like tokens; positions where `mask`
    (N, T) is false, those of text tokens and after the end of speech, are not read. `text_ids` (N, S) are the reward
    model's own tokens.
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


# ---- the loop --------------------------------------------------------------------------------------------------

def train(args):
    """The whole run: set up, the seven steps of the loop, what is left behind."""
    run, studio, texts = set_up(args, "diffro_tts")
    policy, codec, token2text, device = run.policy, studio.codec, studio.token2text, run.policy.device
    grpo, rewards, speech_ids = args.method == "grpo+diffro", args.rewards.split(","), ids_of_codes(studio)
    for step in run.steps():
        # 1 prompts: texts, in a voice each
        batch = share([texts[i] for i in batch_indices(step, len(texts), args.batch, args.seed)])
        prompts, noise = studio.prompts(batch), generator_for(args.seed, step, device, Shared) # (B, L)
        text_of = [s.text for s in batch for _ in range(args.group)]                # N
        # 2 the fixed tokens of the pass: sampled, or the recording's
        with run.phase("rollout"):
            if args.teach == "recording":
                rollout = recordings_as_rollout(batch, args.group, speech_ids, studio.end)
            else:
                rollout = sample(policy, prompts, args.group, studio.limit, studio.end, args.temperature, noise)
            codes = codes_of(rollout, studio.code)
        mask, keep = rollout.mask, torch.ones_like(rollout.truncated)               # (N, T), (N,)
        spoken = mask & (studio.code.to(device)[rollout.ids] >= 0)                  # (N, T), the end token not
        if grpo:
            # 3 reward: the waveforms and the judge, for GRPO alone
            with run.phase("decode"):
                waves = studio.waves(codes)
            with run.phase("reward"):
                speech = [Speech(*row) for row in zip(text_of, codes, waves, studio.heard(codes, waves),
                                                      rollout.truncated.tolist())]
                reward, parts, judged = tts_reward(speech, args.group, rewards, args.language, codec.rate,
                                                   device)                          # (B, G)
            # 4 advantage, as in chapter 2, and the filter
            advantage = judged_advantages(reward, judged).to(device).view(-1)       # (N,)  Eq. 1
            mask = mask & judged.view(-1, 1).to(device)
            if args.filter == "positive":
                keep = advantage > 0
        with run.phase("update"):
            text_ids, text_mask = token2text.text_ids(text_of)                      # (N, S)
            pulls, found = {}, []
            draws = noise.micro_batches(gather(rollout.mask.sum(dim=1)), args.micro, len(speech_ids))
            for asked, rows, each in micro_batches(len(batch), args.group, args.micro):
                # 5 logits of the fixed tokens, now and under the reference
                span = rows, slice(int(rollout.mask[rows].sum(dim=1).max()))
                given = prompts[asked], rollout.ids[span], rollout.mask[span], each
                logits = completion_logits(policy, *given)                          # (M, T, V)
                with torch.no_grad(), reference(policy):
                    ref_logits = completion_logits(policy, *given)
                # 6 losses and step; the micro-batches add up to those of the whole
                soft = soft_tokens(logits[..., speech_ids] / args.temperature, next(draws)[:, :span[1].stop],
                                   args.tau, not args.soft)                         # Eq. 4
                reading = text_logprob(token2text.model, soft, spoken[span], text_ids[rows], text_mask[rows])  # Eq. 5
                kl = categorical_kl(logits / args.temperature, ref_logits / args.temperature, rollout.mask[span])
                losses = {"diffro": diffro_loss(reading, kl, args.beta, keep[rows])}           # Eq. 7
                if grpo:
                    logp, ref_logp = (token_logprobs(x, rollout.ids[span], args.temperature)
                                      for x in (logits, ref_logits))
                    losses["grpo"] = grpo_loss(logp, rollout.logp[span], ref_logp, advantage[rows], mask[span],
                                               args.clip, args.beta, args.kl)       # Eq. 2-3 of chapter 1
                    losses["diffro"] = args.weight * losses["diffro"]
                add_gradients(pulls, losses, len(logits) / len(rollout.ids), run.weights)
                found.append((reading.detach(), kl.detach()))
            average([grad for grads in pulls.values() for grad in grads])
            for weight, *grads in zip(run.weights, *pulls.values()):
                weight.grad = sum(grads)
            norm = run.learn(step)
            reading, kl = map(torch.cat, zip(*found))                               # (N,), (N,)
            rollout, codes, keep, reading, kl = map(gather, (rollout, codes, keep, reading, kl))
            if grpo:
                reward, parts, judged, speech = map(
                    gather, (reward, parts, judged, [replace(s, wave=None) for s in speech]))
        # 7 log one row; now and then evaluate and save
        row = {"reading": float(reading.mean()), "kl": float(kl.mean()), "kept": float(keep.float().mean()),
               **(rollout_figures(rollout, run.phase) if args.teach == "rollout" else {}),
               **length_figures(codes, codec), "grad_norm": norm,
               **{f"grad_norm_{name}": float(torch.nn.utils.get_total_norm(grads)) for name, grads in pulls.items()}}
        if grpo:
            row |= {**group_figures(reward), **speech_figures(speech, parts, judged, args.language)}
        run.record(step, row, f"log P of the text {row['reading']:.3f} a token, KL {row['kl']:.3f}",
                   speech_row(reward, parts, speech) if grpo else None)
        if run.due():
            evaluate_step(run, studio)
    finish(run, studio)


# ---- beside the loop -------------------------------------------------------------------------------------------

def ids_of_codes(studio):
    """(codes,) the LLM's token of every code, in the codec's order."""
    return studio.code.argsort()[(studio.code < 0).sum():].to(studio.policy.device)


def recordings_as_rollout(batch, group, speech_ids, end):
    """The recordings' speech tokens as if they had been sampled, `group` times each, with the end token behind."""
    return as_rollout([torch.cat([speech_ids[list(s.codes)], speech_ids.new_tensor([end])])
                       for s in batch for _ in range(group)], end)


def add_gradients(pulls, losses, share, weights):
    """Adds the gradient of every loss, times `share`, to its own list in `pulls`: apart, so that the log can tell who
    pulls how hard."""
    for name, loss in losses.items():
        grads = torch.autograd.grad(loss * share, weights, retain_graph=name != list(losses)[-1])
        pulls[name] = [total + grad for total, grad in zip(pulls[name], grads)] if name in pulls else list(grads)


def main(argv=None):
    args = parse_args(argv)
    launch(train, args)


if __name__ == "__main__":
    main()
