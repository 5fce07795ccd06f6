"""CUDA graphs: the kernels of a step that comes again and again, recorded once a run and launched together.

    captured_step(policy, cache, mask, group, room)     one decoding step of a rollout
    captured_pass(policy, function, given, ...)         log-probs of given samples, with their gradient
    forget(policy)                                      drops the steps, where the weights move elsewhere

A model of this field runs thousands of small kernels for a token or a micro-batch, and Python takes longer to launch
them than a large GPU to run them. A graph replays fixed kernels on fixed memory: what changes from step to step is
copied there, and the adapters change in place. On the CPU nothing of this is used. Our choice; the paper has vLLM.

Shapes: N rows, B prompts of L positions, M samples of T tokens, D width, V vocabulary.
"""
import torch
from transformers import StaticCache

BUCKET = 64         # places: a captured step has a multiple of it, so that few have to be captured
KEPT = 1 / 8        # of the card's memory: what a model's captured steps may keep from one rollout to the next
PASSES = 1 / 16     # of the card's memory: what the captured passes of a policy may keep, all in one place
TOKENS = 2 ** 13    # samples x tokens: a pass over more keeps a GPU busy without a graph


# ---- a decoding step -----------------------------------------------------------------------------------------

class GraphedStep:
    """One decoding step of N rows as a CUDA graph: token (N,) -> logits (N, V), the same numbers as the plain step.

    A graph replays fixed kernels on fixed memory, so everything that changes lives in tensors that change in place: the
    token, its position and place, the keys and values, which of them may be seen, and the adapters. So one captured
    step serves every rollout of N rows whose prompts and new tokens fit into its `places`.
    """

    def __init__(self, policy, rows, places, dtype):
        self.policy, self.graph = policy, None
        self.cache = StaticCache(policy.config.get_text_config(decoder=True), max_cache_len=places)
        self.token = torch.zeros(rows, 1, dtype=torch.long, device=policy.device)
        self.position, self.column = self.token.clone(), self.token.new_zeros(1)
        self.hidden = self.token.new_zeros((rows, 1, 1, places), dtype=dtype)       # added to the scores

    def begin(self, cache, mask, group):
        """Puts the prompts in, from their `cache` (B rows), for the `group` rows of each; `mask` (N, L)."""
        self.mask = mask
        self.cache.reset()                                                          # in place
        for i, layer in enumerate(cache.layers):
            self.cache.update(*(x.repeat_interleave(group, dim=0) for x in (layer.keys, layer.values)), i)
        if self.graph is None:
            self.capture()
        self.rewind()

    def rewind(self):
        """Back to where the prompts end."""
        length = self.mask.shape[1]
        self.position.copy_(self.mask.sum(dim=1, keepdim=True))
        self.column.fill_(length)
        self.hidden.fill_(torch.finfo(self.hidden.dtype).min)
        self.hidden[..., :length].masked_fill_(self.mask[:, None, None].bool(), 0)
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(length)

    def step(self):
        """What is captured: self.token (N, 1) -> logits (N, V)."""
        self.hidden.index_fill_(3, self.column, 0)
        logits = self.policy(input_ids=self.token, attention_mask=self.hidden, past_key_values=self.cache,
                             use_cache=True, position_ids=self.position).logits[:, -1]
        self.column += 1
        self.position += 1
        return logits

    def capture(self):
        """Records the kernels of one step as self.graph, which leaves its result in self.logits."""
        self.graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):                            # warm-up: what is set up on first use can't be captured
                self.rewind()
                self.step()
            torch.cuda.synchronize()
            self.graph.capture_begin()
            self.logits = self.step()
            self.graph.capture_end()
        torch.cuda.current_stream().wait_stream(side)

    def __call__(self, token):
        self.token.copy_(token[:, None])
        self.graph.replay()
        return self.logits

    def nbytes(self):
        """What it keeps: keys and values, nearly all of it."""
        return sum(x.nbytes for layer in self.cache.layers for x in (layer.keys, layer.values))


def captured_step(policy, cache, mask, group, room):
    """The GraphedStep of these rows, at the end of their prompts: an earlier rollout's, or captured now. It is kept
    with the policy; those unused for longest go, and at last itself, until what is kept is within KEPT of the card."""
    bucket = len(mask), -(-(mask.shape[1] + room) // BUCKET) * BUCKET
    kept, size = policy.__dict__.setdefault("captured", {}), memory_limit(policy.device)
    step = kept.pop(bucket, None) or GraphedStep(policy, *bucket, cache.layers[0].keys.dtype)
    step.begin(cache, mask, group)
    kept[bucket] = step
    while kept and sum(each.nbytes() for each in kept.values()) > KEPT * size:
        del kept[next(iter(kept))]
        torch.cuda.empty_cache()              # a graph's memory is its own: nothing else can use what it leaves
    return step


# ---- a pass over samples ---------------------------------------------------------------------------------------

class GraphedPass:
    """`function(embeds, seen, ids, mask)` -> (M, T) log-probs as a CUDA graph, and their gradient as another.

    All of a policy's `passes` have their activations in the same memory and leave their gradients in the same tensors:
    between a forward pass and its backward pass no other of them may run.
    """

    def __init__(self, function, given, passes, grad):
        self.given, self.awaited = [one.clone() for one in given], False
        self.weights, self.slopes = (passes.weights, passes.slopes) if grad else ([], [])
        self.forward, self.backward, side = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph(), passes.stream
        # the masters' own nodes of the autograd graph may be alive, and then belong to another stream
        passes.leaves[:] = [weight.detach().requires_grad_() for weight in passes.weights]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):                     # warm-up: what is set up on first use can't be captured
            logp = function(*self.given)
            self.slope = torch.zeros_like(logp)
            if grad:
                torch.autograd.grad(logp, passes.leaves, self.slope)
            del logp
        with torch.cuda.graph(self.forward, pool=passes.pool, stream=side):
            logp = function(*self.given)
        if grad:
            with torch.cuda.graph(self.backward, pool=passes.pool, stream=side):
                torch._foreach_copy_(self.slopes, torch.autograd.grad(logp, passes.leaves, self.slope))
        self.logp, passes.leaves[:] = logp.detach(), passes.weights

    def __call__(self, given):
        for one, other in zip(self.given, given):
            one.copy_(other)
        return _Replayed.apply(self, *self.weights)


class _Replayed(torch.autograd.Function):
    """Replays the two graphs of a GraphedPass, each in its turn."""

    @staticmethod
    def forward(ctx, graphed, *weights):
        ctx.graphed = graphed
        graphed.forward.replay()
        graphed.awaited = bool(weights)                   # its activations are needed until the gradient is taken
        return graphed.logp.clone()

    @staticmethod
    def backward(ctx, slope):
        graphed = ctx.graphed
        graphed.slope.copy_(slope)
        graphed.backward.replay()
        graphed.awaited = False
        return None, *(each.clone() for each in graphed.slopes)


class Passes:
    """The captured passes of a policy, by size; `full` once they would take more than PASSES of the card."""

    def __init__(self, policy):
        self.weights, self.leaves = policy.masters, policy.leaves
        self.slopes = [torch.empty_like(weight) for weight in self.weights]
        # memory that one graph has done with serves another only within the same pool and stream
        self.pool, self.stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
        self.most, self.known, self.kept, self.full = PASSES * memory_limit(policy.device), {}, 0, False

    def capture(self, key, function, given):
        """Records the passes of this size, if there is memory for them."""
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        try:
            self.known[key] = GraphedPass(function, given, self, torch.is_grad_enabled())
            torch.cuda.empty_cache()
            self.kept += torch.cuda.memory_reserved() - before
            self.full = self.kept > self.most
        except torch.cuda.OutOfMemoryError:
            self.full, self.leaves[:] = True, self.weights
        if self.full:
            self.known, self.slopes, self.pool = {}, [], None
            torch.cuda.empty_cache()


def captured_pass(policy, function, given, *key):
    """What `function(*given)` gives, (M, T) log-probs: replayed where a pass of this size came before; as it is where
    none did, where it is large, and where memory is short.

    `given` are embeds (B, L, D), their mask (B, L), padded on the left, ids and mask (M, T), which are rounded up to
    the sizes of a graph; `key` is what else its kernels depend on.
    """
    passes = policy.__dict__.get("passes") or policy.__dict__.setdefault("passes", Passes(policy))
    embeds, seen, ids, mask = given
    if passes.full or ids.numel() > TOKENS or any(one and one.awaited for one in passes.known.values()):
        return function(*given)
    left, right = rounded_up(embeds.shape[1]) - embeds.shape[1], rounded_up(ids.shape[1]) - ids.shape[1]
    wide = [torch.nn.functional.pad(x, sides) for x, sides in (
        (embeds, (0, 0, left, 0)), (seen, (left, 0)), (ids, (0, right)), (mask, (0, right)))]
    key = *key, torch.is_grad_enabled(), *(x.shape for x in wide)
    if key not in passes.known:
        passes.known[key] = None
    elif not passes.known[key]:                           # captured when it comes a second time
        passes.capture(key, function, wide)
    graphed = passes.known.get(key)
    return graphed(wide)[:, :ids.shape[1]] if graphed else function(*given)


def rounded_up(size):
    """`size` rounded up to one of four sizes an octave: 48, 56, 64, 80, 96, 112, 128, ..."""
    unit = 2 ** max(0, (size - 1).bit_length() - 3)
    return -(-size // unit) * unit


# ---- what both need --------------------------------------------------------------------------------------------

def graphable(policy):
    """Whether a decoding step is captured: on a GPU."""
    return policy.device.type == "cuda"


def forget(policy):
    """Drops the captured steps of a model whose weights move, so that others can use their memory."""
    if policy.__dict__.pop("captured", None):
        torch.cuda.empty_cache()


def memory_limit(device):
    """Bytes that torch may take of a GPU."""
    return torch.cuda.get_device_properties(device).total_memory * torch.cuda.get_per_process_memory_fraction(device)
