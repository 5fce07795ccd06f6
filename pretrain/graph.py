"""A training step as a CUDA graph: its thousands of small kernels are launched at once, not one by one from Python.

A step is a function of tensors that does everything, from the forward pass to `optimizer.step()`, without waiting for
the GPU, and returns tensors. Its optimiser is made with `capturable=True` and a tensor as learning rate.
"""
import torch


def graphed(step, inputs, warm=3, pool=None):
    """`step(*inputs)` as one graph: a function of inputs of the same shapes, whose outputs the next call overwrites.

    Takes `warm` steps as usual first: what is made once is made there. On the CPU it is the step itself.
    """
    if not inputs[0].is_cuda:
        return step
    fixed, graph, aside = [one.clone() for one in inputs], torch.cuda.CUDAGraph(), torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(warm):
            step(*fixed)
    torch.cuda.current_stream().wait_stream(aside)
    with torch.cuda.graph(graph, pool=pool):
        outputs = step(*fixed)

    def replay(*new):
        for one, other in zip(fixed, new):
            one.copy_(other)
        graph.replay()
        return outputs
    return replay


def graphed_by_shape(step):
    """The same for inputs of several shapes: a graph for each, in the same memory, since none keeps anything."""
    known, pool = {}, torch.cuda.graph_pool_handle() if torch.cuda.is_available() else None

    def run(*inputs):
        shapes = tuple(tuple(one.shape) for one in inputs)
        if shapes not in known:
            known[shapes] = graphed(step, inputs, 1 if known else 3, pool)
        return known[shapes](*inputs)
    return run


def up_to(size, multiple):
    """`size` rounded up: fewer shapes, fewer graphs."""
    return -(-size // multiple) * multiple
