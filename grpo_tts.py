r"""Chapter 2: GRPO for LLM-based text-to-speech (arXiv 2509.18569).

An LLM reads a text and a voice (a recorded sentence and its speech tokens) and goes on in speech tokens; a codec makes
them a waveform; a recogniser, the judge, says what it hears. The equations are those of chapter 1 and come from there:

    Eq. 1   A_i = (R_i - mean_j R_j) / (std_j R_j + 1e-4)                    j over the G samples of one text  [paper]
    Eq. 2   r_it = pi_theta(o_it | q, o_i,<t) / pi_old(o_it | q, o_i,<t)                                      [paper]
    Eq. 3   J = 1/G sum_i 1/|o_i| sum_t [ min(r_it A_i, clip(r_it, 1 - eps, 1 + eps) A_i) - beta KL_it ]      [paper]

What is new: the actions are speech tokens and one that ends the speech, and the rewards are [paper]
    R1      accuracy of a judge that hears the waveform, or of a model that reads the tokens (--judge token2text)
    R2      -| |o_i| - T_m | / T_m,  T_m the median length of the group
    R3      1/G sum_j dist(o_i, o_j) / |o_i| + std(normalised F0)
What is reported comes from a second judge that is never a reward. [paper] is arXiv 2509.18569, [choice] is ours. Left
out: the paper's flow matching decoder (an Xcodec2 codec decodes in one pass) and its multi-GPU rotation (--offload is
the same idea on one card).

    python grpo_tts.py --steps 200                                              the embedded models, on a CPU
    python grpo_tts.py --model HKUSTAudio/Llasa-1B --codec HKUSTAudio/xcodec2-hf --judge HUB_ID --second-judge HUB_ID \
        --speaker microsoft/wavlm-base-plus-sv --data texts.txt --voices DIR --lr 1e-5 \
        --quantize 8bit --offload --group 4 --micro 2                           published ones, on a card of 8 GB

Last line: the WER of `plain` by the second judge, before and after, and where everything is: runs/grpo_tts-...
"""
import functools
from dataclasses import replace

from engine.settings import parse_speech

parse_args = functools.partial(parse_speech, about=__doc__)
if __name__ == "__main__":
    parse_args()  # --help and typing errors answer at once, before torch loads

import torch

from data import batch_indices
from engine.parallel import Shared, average, gather, share
from engine.report import group_figures, percent, rollout_figures, speech_row
from engine.run import launch
from engine.sampling import completion_logprobs, generator_for, micro_batches, reference_logprobs, sample
from engine.speech import codes_of, evaluate_step, finish, length_figures, set_up, speech_figures
from grpo_asr import group_advantages, grpo_loss, policy_figures
from rewards import Speech, tts_reward

# Shapes: B texts a step, G samples each, N = B G samples, T tokens of a sample, L of a prompt, M samples of a
# micro-batch.


# ---- the equations ---------------------------------------------------------------------------------------------

def judged_advantages(reward, judged):
    """Eq. 1 of rewards (B, G), where `judged` (B, G) is false for samples that the judge failed on: those stand at the
    mean of their group, which would shrink the spread of the others, so the root of the share judged puts it right."""
    return group_advantages(reward) * judged.float().mean(dim=1, keepdim=True).sqrt()


# ---- the loop --------------------------------------------------------------------------------------------------

def train(args):
    """The whole run: set up, the seven steps of the loop, what is left behind."""
    run, studio, texts = set_up(args, "grpo_tts")
    policy, codec, rewards, device = run.policy, studio.codec, args.rewards.split(","), run.policy.device
    for step in run.steps():
        # 1 prompts: texts, in a voice each
        batch = share([texts[i] for i in batch_indices(step, len(texts), args.batch, args.seed)])
        prompts = studio.prompts(batch)                                             # (B, L)
        # 2 sample
        with run.phase("rollout"):
            rollout = sample(policy, prompts, args.group, studio.limit, studio.end, args.temperature,
                             generator_for(args.seed, step, device, Shared))        # (N, T)
            codes = codes_of(rollout, studio.code)
        # 3 reward: one waveform a sample, which every reward shares
        with run.phase("decode"):
            waves = studio.waves(codes)
        with run.phase("reward"):
            text_of = [s.text for s in batch for _ in range(args.group)]            # N
            speech = [Speech(*row) for row in zip(text_of, codes, waves, studio.heard(codes, waves),
                                                  rollout.truncated.tolist())]
            reward, parts, judged = tts_reward(speech, args.group, rewards, args.language, codec.rate, device)  # (B, G)
        # 4 advantage
        advantage = judged_advantages(reward, judged).to(device)                    # (B, G)  Eq. 1
        mask = rollout.mask & judged.view(-1, 1).to(device)     # a sample that the judge failed on teaches nothing
        with run.phase("update"):
            # 5 log-probs, under the reference and now; a micro-batch has as many tokens as its longest sample
            ref_logp = reference_logprobs(policy, prompts, rollout, args.group, args.micro, args.temperature)  # (N, T)
            now_logp = torch.zeros_like(ref_logp)
            for asked, rows, each in micro_batches(len(batch), args.group, args.micro):
                span = rows, slice(int(rollout.mask[rows].sum(dim=1).max()))
                logp = completion_logprobs(policy, prompts[asked], rollout.ids[span], rollout.mask[span], each,
                                           args.temperature)                        # (M, T)
                # 6 loss and step: the micro-batches add up to the loss of the whole
                loss = grpo_loss(logp, rollout.logp[span], ref_logp[span], advantage.view(-1)[rows], mask[span],
                                 args.clip, args.beta, args.kl)                     # Eq. 2-3
                (loss * len(logp) / len(rollout.ids)).backward()
                now_logp[span] = logp.detach()
            average([w.grad for w in run.weights])
            norm = run.learn(step)
            speech = [replace(s, wave=None) for s in speech]
            reward, parts, judged, speech, codes, rollout, now_logp, ref_logp = map(
                gather, (reward, parts, judged, speech, codes, rollout, now_logp, ref_logp))
        # 7 log one row; now and then evaluate and save
        row = {**group_figures(reward), **speech_figures(speech, parts, judged, args.language),
               **rollout_figures(rollout, run.phase), **length_figures(codes, codec),
               **policy_figures(rollout, now_logp, ref_logp, args.clip), "grad_norm": norm}
        run.record(step, row, f"reward {row['reward']:.3f}, WER of the samples {percent(row['wer'])}, "
                   f"KL {row['kl']:.3f}", speech_row(reward, parts, speech))
        if run.due():
            evaluate_step(run, studio)
    finish(run, studio)


def main(argv=None):
    args = parse_args(argv)
    launch(train, args)


if __name__ == "__main__":
    main()
