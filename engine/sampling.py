"""Sampling from the policy, and its log-probs of what was sampled: the part of GRPO that takes the time.

    prompts  = Prompts(embeds, mask)                       what is asked, embedded once a step
    rollout  = sample(policy, prompts, group, ...)         G samples of each, from the untruncated distribution
    logp     = completion_logprobs(policy, prompts, ...)   the teacher-forced pass over the samples
    ref_logp = reference_logprobs(policy, prompts, ...)    the same under the reference
    self_check(policy, prompts, others, ...)               that sampler and trainer agree, tried before a run

A prompt is read once and its keys and values are copied to the G rows that share it, in the rollout, the policy pass
and the reference pass alike. On a GPU a decoding step is captured as a CUDA graph and replayed (engine/graphs.py).
Where the logits of all tokens are many, log-probs come from the hidden states a few rows at a time, and again in the
backward pass. All of this is our choice; the paper samples with vLLM.

Shapes: B prompts, G samples each, N = B G samples, T tokens of a sample, L of a prompt, D width, V vocabulary.
`group` is G; `each` is how many rows share a prompt in the pass at hand: G, or fewer in a small micro-batch.
"""
import contextlib
from dataclasses import dataclass

import torch
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from engine.audio import DataError
from engine.graphs import captured_step, forget, graphable
from engine.models import refresh_adapters
from engine.parallel import RANK, Shared

AT_ONCE = 2 ** 26   # logits that may exist at once in a pass over samples; 128 MiB in bf16


@dataclass
class Prompts:
    """What is asked, as embeddings: text, and audio that is already encoded."""

    embeds: torch.Tensor  # (B, L, D), padded on the left
    mask: torch.Tensor    # (B, L)

    def __getitem__(self, part):
        return Prompts(self.embeds[part], self.mask[part])


@dataclass
class Rollout:
    """What was sampled, and how likely it was to its sampler."""

    ids: torch.Tensor      # (N, T), anything after the end token
    mask: torch.Tensor     # (N, T), the end token included
    logp: torch.Tensor     # (N, T), log pi_old of Eq. 2
    entropy: torch.Tensor  # (N, T), of the whole distribution, nats
    truncated: torch.Tensor  # (N,), true where no end token came


def completion_mask(ids, eos_token_id):
    """(N, T) -> (N, T) bool: true up to and including the first end token, all true where there is none.

    The end token is an action like any other: without its gradient the model never learns when to stop.
    `eos_token_id` is an int or a list of them.
    """
    end = torch.isin(ids, torch.as_tensor(eos_token_id, device=ids.device))
    return end.cumsum(dim=1) - end.long() == 0


def as_rollout(rows, eos):
    """Given token rows (T,), an end token behind each, as if they had been sampled: a Rollout with log-probs of 0."""
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=eos if isinstance(eos, int) else eos[0])
    zeros = torch.zeros(ids.shape, device=ids.device)
    return Rollout(ids, completion_mask(ids, eos), zeros, zeros, torch.zeros_like(ids[:, 0], dtype=torch.bool))


# ---- decoding ------------------------------------------------------------------------------------------------

def prefill(policy, prompts, each, copy=True):
    """Reads each prompt once, then copies its keys and values to the `each` rows that share it.

    Returns the logits of the first token (N, V) and the cache, of the B prompts alone without `copy`. Differentiable:
    the update shares the prompt too.
    """
    refresh_adapters(policy)
    cache = DynamicCache()
    seen = visible(prompts.mask, prompts.mask.shape[1], prompts.embeds.dtype)
    out = policy(inputs_embeds=prompts.embeds, attention_mask=seen, past_key_values=cache, use_cache=True,
                 position_ids=(prompts.mask.cumsum(1) - 1).clamp(min=0), logits_to_keep=1)
    if copy:
        cache.batch_repeat_interleave(each)
    return out.logits[:, -1].repeat_interleave(each, dim=0), cache


def visible(seen, count, dtype):
    """What the last `count` of the places `seen`, (N, K), attend to: an attention mask. On the CPU `seen` itself, of
    which transformers makes the same as below; on a GPU it would wait for the numbers in it."""
    return causal(seen, count, dtype) if seen.is_cuda else seen


def causal(seen, count, dtype):
    """(N, K) -> (N, 1, count, K), added to the scores: 0 for what is seen and not behind the place that asks."""
    places = torch.arange(seen.shape[1], device=seen.device)
    hidden = ~seen.bool()[:, None, None] | (places > places[-count:, None])
    return torch.zeros(hidden.shape, dtype=dtype, device=seen.device).masked_fill(hidden, torch.finfo(dtype).min)


class RoomyLayer(DynamicLayer):
    """The keys and values of one layer, (N, heads, length, D), with room behind them, where a new token is written.
    transformers' own layer copies all of them for each token: a fifth of chapter 2's rollout on the CPU.
    """

    def __init__(self, layer):
        super().__init__()
        self.lazy_initialization(layer.keys, layer.values)
        self.keys, self.values, self.room = layer.keys, layer.values, None

    def update(self, keys, values, *given, **options):
        held, length = self.keys.shape[-2], self.keys.shape[-2] + keys.shape[-2]
        if self.room is None or length > self.room[0].shape[-2]:
            self.room = [old.new_empty(*old.shape[:-2], length + 64, old.shape[-1]) for old in (self.keys, self.values)]
            for room, old in zip(self.room, (self.keys, self.values)):
                room[..., :held, :] = old
        for room, new in zip(self.room, (keys, values)):
            room[..., held:length, :] = new
        self.keys, self.values = (room[..., :length, :] for room in self.room)
        return self.keys, self.values

    def batch_select_indices(self, indices):
        super().batch_select_indices(indices)
        self.room = None


@torch.no_grad()
def sample(policy, prompts, group, max_tokens, eos, temperature=1.0, generator=None):
    """G samples of every prompt, from the whole untruncated distribution (temperature 0 = greedy): Rollout.

    No setting of the checkpoint's generation_config takes part. `eos` is an int or a list of them. Rows that have
    ended leave the batch, but not a CUDA graph's.
    """
    graph = graphable(policy) and max_tokens > 1
    logits, cache = prefill(policy, prompts, group, copy=not graph)                 # (N, V)
    mask = prompts.mask.repeat_interleave(group, dim=0)                             # (N, L)
    if graph:                                 # copies the cache itself: two copies for N rows could fill the card
        graphed, cache = captured_step(policy, cache, mask, group, max_tokens), None
    else:
        cache.layers = [RoomyLayer(layer) for layer in cache.layers]
    position = mask.sum(dim=1)
    alive = torch.arange(len(mask), device=mask.device)                             # rows computed
    going = torch.ones_like(alive, dtype=torch.bool)                                # not yet ended
    eos = torch.as_tensor(eos, device=mask.device)
    ids = eos.reshape(-1)[0].repeat(len(mask), max_tokens)
    logp, entropy = torch.zeros((2, *ids.shape), device=mask.device)
    for t in range(max_tokens):
        scores = torch.log_softmax(logits.float() / (temperature or 1.0), dim=-1)   # (alive, V)
        if temperature:
            # Gumbel-max: argmax(log p - log E), E ~ Exp(1), is an exact draw from p; noise for every row, alive or
            # not, so that a sample does not depend on when the others end
            shape = len(mask), scores.shape[1]
            noise = generator.rows(*shape) if isinstance(generator, Shared) else torch.empty(
                shape, device=mask.device).exponential_(generator=generator)
            token = (scores - noise[alive].clamp(min=1e-30).log()).argmax(dim=-1)
        else:
            token = scores.argmax(dim=-1)
        ids[alive, t] = token
        logp[alive, t] = scores.gather(1, token[:, None])[:, 0]
        entropy[alive, t] = -(scores.exp() * scores).sum(dim=-1)
        going &= ~torch.isin(token, eos)
        left = int(going.sum())
        if left == 0 or t == max_tokens - 1:
            break
        if graph:
            logits = graphed(token)
            continue
        if left <= 0.8 * len(alive):          # not at every end: dropping rows copies the cache
            keep = going.nonzero()[:, 0]
            alive, token, going = alive[keep], token[keep], going[keep]
            cache.batch_select_indices(keep)
        seen = torch.cat([mask[alive], mask.new_ones(len(alive), t + 1)], dim=1)
        logits = policy(input_ids=token[:, None], attention_mask=seen, past_key_values=cache, use_cache=True,
                        position_ids=position[alive, None] + t).logits[:, -1]
    if graph and graphed not in policy.captured.values():
        del graphed, logits
        torch.cuda.empty_cache()
    ids, logp, entropy = ids[:, :t + 1], logp[:, :t + 1], entropy[:, :t + 1]
    return Rollout(ids, completion_mask(ids, eos), logp, entropy, ~torch.isin(ids, eos).any(dim=1))


def generator_for(seed, step, device, kind=torch.Generator):
    """The random source of one step's samples: a function of the seed and the step, whatever came before."""
    return kind(device).manual_seed(1_000_003 * seed + step)


# ---- the teacher-forced pass ---------------------------------------------------------------------------------

def completion_logits(policy, prompts, ids, mask, each):
    """The policy's logits at every token of given samples, (N, T) -> (N, T, V); every prompt is read once for its
    `each` rows."""
    first, cache = prefill(policy, prompts, each)
    seen = torch.cat([prompts.mask.repeat_interleave(each, dim=0), mask[:, :-1].long()], dim=1)
    start = prompts.mask.sum(dim=1).repeat_interleave(each)[:, None]
    position = start + torch.arange(ids.shape[1] - 1, device=ids.device)            # (N, T - 1)
    logits = first[:, None]                                                         # (N, 1, V)
    if ids.shape[1] > 1:
        rest = policy(input_ids=ids[:, :-1], attention_mask=visible(seen, ids.shape[1] - 1, prompts.embeds.dtype),
                      position_ids=position, past_key_values=cache, use_cache=True).logits
        logits = torch.cat([logits, rest], dim=1)                                   # (N, T, V)
    return logits


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


@contextlib.contextmanager
def headless(policy):
    """Gives the policy's output layer; within, the policy's logits are the hidden states that this layer would read."""
    model = policy.get_base_model()
    head = model.get_output_embeddings()
    model.set_output_embeddings(torch.nn.Identity())
    try:
        yield head
    finally:
        model.set_output_embeddings(head)


def completion_logprobs(policy, prompts, ids, mask, each, temperature):
    """log pi(o_it) of given samples, (N, T) -> (N, T); every prompt is read once for its `each` rows.

    With more than AT_ONCE logits the output layer takes a few rows at a time, again in the backward pass.
    """
    rows = AT_ONCE // (ids.shape[1] * policy.get_base_model().get_output_embeddings().weight.shape[0])
    if rows >= len(ids):
        return token_logprobs(completion_logits(policy, prompts, ids, mask, each), ids, temperature)
    with headless(policy) as head:
        hidden = completion_logits(policy, prompts, ids, mask, each)                # (N, T, D)
    return torch.cat([checkpoint(lambda h, i: token_logprobs(head(h), i, temperature), *part, use_reentrant=False)
                      for part in zip(hidden.split(max(1, rows)), ids.split(max(1, rows)))])


@contextlib.contextmanager
def reference(policy):
    """The policy as the reference: its adapters switched off; or, where a run starts from another's adapter
    (`policy.start`, name -> weights), with those in their places: pointers swapped, nothing copied."""
    start, captured = getattr(policy, "start", None) or {}, policy.__dict__.pop("captured", {})
    swap = [(weight, start[name]) for name, weight in policy.named_parameters() if name in start]
    exchange(policy, swap)
    try:
        with contextlib.nullcontext() if start else policy.disable_adapter():
            yield
    finally:
        exchange(policy, swap)
        forget(policy)                        # what was captured in between is not the policy's
        policy.captured = captured


def exchange(policy, pairs):
    """Swaps what the two tensors of every pair point to."""
    for weight, other in pairs:
        weight.data, other.data = other.data, weight.data
    refresh_adapters(policy)


@torch.no_grad()
def reference_logprobs(policy, prompts, rollout, group, micro, temperature):
    """log pi_ref of a rollout, (N, T), once a step (PEFT walks the whole model to switch adapters). Without a gradient
    up to four times `micro` samples need no more memory [choice]."""
    wide = group * (4 * micro // group) or micro                                    # whole groups, or `micro`
    with reference(policy):
        return torch.cat([completion_logprobs(policy, prompts[asked], rollout.ids[rows], rollout.mask[rows], each,
                                              temperature)
                          for asked, rows, each in micro_batches(len(prompts.mask), group, wide)])


def micro_batches(batch, group, micro):
    """Slices (prompts, rows, rows per prompt) that cover N = batch x group samples, `micro` of them at a time; under
    torchrun each lies in one of those of the whole step."""
    stop, before = 0, RANK * batch * group
    while stop < batch * group:
        start, stop = stop, min(stop + micro - (before + stop) % micro, batch * group)
        yield slice(start // group, -(-stop // group)), slice(start, stop), min(group, stop - start)


def self_check(policy, prompts, others, args, max_tokens, eos, other):
    """The pitfalls that stay silent, tried on the first prompts before anything is trained; one line says how it went.

    The trained log-probs are the sampler's (ratio 1), the untrained policy is the reference, and what is asked reaches
    them: `others`, prompts with `other` ("other audio", "another text"), must move the log-probs of the same samples by
    1e-3 nats a token; where another text does less, that is said and no more. Raises DataError.
    """
    count, each = max(1, min(len(prompts.mask), args.micro // args.group)), min(args.group, args.micro)
    prompts, others = prompts[:count], others[:count]
    rollout = sample(policy, prompts, each, max_tokens, eos, args.temperature,
                     generator_for(args.seed, 0, policy.device))
    with torch.no_grad():
        logp, moved = (completion_logprobs(policy, p, rollout.ids, rollout.mask, each, args.temperature)
                       for p in (prompts, others))
        with reference(policy):
            ref_logp = completion_logprobs(policy, prompts, rollout.ids, rollout.mask, each, args.temperature)
    mean = lambda x: float(x.abs()[rollout.mask].mean())  # noqa: E731
    ratio, drift, effect = mean((logp - rollout.logp).exp() - 1), mean(logp - ref_logp), mean(logp - moved)
    tolerance = 1e-3 if prompts.embeds.dtype == torch.float32 else 0.1      # bf16 alone gives 0.04 at 1.4B
    line = f"|ratio - 1| {ratio:.1e}, |log pi - log pi_ref| {drift:.1e}, {other} moves log-probs by {effect:.2f} nats"
    if not (ratio <= tolerance and drift <= tolerance):     # so written, NaN fails
        raise DataError(f"check failed: {line}. This model's sampling and training paths disagree")
    if not effect >= (1e-6 if other == "another text" else 1e-3):
        raise DataError(f"check failed: {line}. What is asked does not reach this model")
    print(f"check: {line}")
    if effect < 1e-3:
        print("check: the model hardly tells these texts apart: of another language or script than it was trained on, "
              "or words that its tokenizer does not know?")
