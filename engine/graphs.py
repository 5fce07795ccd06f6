"""A decoding step as a CUDA graph: its kernels, recorded once a run and launched together.

    captured_step(policy, cache, mask, group, room)     one step of a rollout, for some number of rows
    forget(policy)                                      drops them, where the weights move elsewhere

A model of this field runs thousands of small kernels for a token, and Python takes longer to launch them than a large
GPU to run them. On the CPU nothing of this is used. Our choice; the paper has vLLM.

Shapes: N rows, B prompts of L positions, V vocabulary.
"""
import torch
from transformers import StaticCache

BUCKET = 64         # places: a captured step has a multiple of it, so that few have to be captured
KEPT = 1 / 8        # of the card's memory: what a model's captured steps may keep from one rollout to the next


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
