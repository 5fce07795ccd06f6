"""More than one process, as torchrun starts them: each takes a share of a step's clips, all make the same update.

    share(items)                 the share of this process
    generator_for(..., Shared)   noise that is the same for any number of processes
    average(grads)               the gradient of the whole step, one all-reduce
    gather(thing)                what all processes have, in their order

Without torchrun all of this is as if it were not there. What is written and printed is written and printed by rank 0.
"""
import contextlib
import hashlib
import os
import sys
import traceback
from dataclasses import is_dataclass, replace

import torch
import torch.distributed as dist
from torch.nn.utils import parameters_to_vector, vector_to_parameters

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


class GoneError(RuntimeError):
    """Another process has ended."""


@contextlib.contextmanager
def together():
    """Around a run: joins the processes. Whatever ends one ends all, and the first to be ended says it."""
    if WORLD == 1:
        yield
        return
    store, *_ = next(dist.rendezvous("env://"))                     # it lives with torchrun, whoever of us dies
    if RANK:
        sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", store=store, rank=RANK,
                                world_size=WORLD)
        yield
    except BaseException as error:
        if store.add("said", 1) == 1:
            said = f"{error.code}\n" if isinstance(error, SystemExit) else traceback.format_exc()
            sys.__stderr__.write(said)
        sys.__stdout__.flush()
        os._exit(1)                                                 # what would be tidied up may wait for the others
    dist.destroy_process_group()


def alone(function):
    """A function that is rank 0's alone; for the others it does nothing."""
    return (lambda *given, **named: None) if RANK else function


def meet(collective, *given):
    """A collective of torch.distributed; GoneError where another process has ended."""
    try:
        collective(*given)
    except RuntimeError as error:
        raise GoneError from error


def share(items):
    """This process's share of a list: the next of as many equal parts as there are processes."""
    return items[len(items) * RANK // WORLD:len(items) * (RANK + 1) // WORLD]


def any_of(flag):
    """Whether it is true for any process; all wait for each other here."""
    found = torch.tensor(float(flag))                               # on the CPU: it is seen at once if one is gone
    if WORLD > 1:
        meet(dist.all_reduce, found)
    return bool(found)


def average(grads):
    """Puts the mean over all processes in the place of gradients: shares are equal, so that is the whole step's."""
    if WORLD > 1:
        any_of(False)                                               # NCCL would wait for one that is gone
        flat = parameters_to_vector(grads)
        meet(dist.all_reduce, flat)
        vector_to_parameters(flat / WORLD, grads)


def alike(weights):
    """Whether these are the same on all processes."""
    weights = parameters_to_vector(weights).detach().cpu().numpy()
    return len({*gather([hashlib.sha1(weights.data).hexdigest()])}) == 1


def gather(thing):
    """Of a list or a tensor (rows first, padded behind) those of all processes joined in their order, on the CPU; of a
    record or a dict that of every part."""
    if WORLD == 1:
        return thing
    if isinstance(thing, dict):
        return {name: gather(part) for name, part in thing.items()}
    if is_dataclass(thing):
        return replace(thing, **gather(vars(thing)))
    parts = [None] * WORLD
    meet(dist.all_gather_object, parts, thing.cpu() if isinstance(thing, torch.Tensor) else thing)
    if isinstance(thing, list):
        return [member for part in parts for member in part]
    width = max(part.shape[-1] for part in parts)
    return torch.cat([torch.nn.functional.pad(part, (0, width - part.shape[-1])) for part in parts])


class Shared(torch.Generator):
    """The noise of a step: every process draws that of all rows, as one alone would, and keeps that of its own."""

    draws = 0

    def rows(self, rows, width):
        """Exp(1) noise (rows, width) for a token of a rollout."""
        self.draws, self.size = self.draws + 1, (rows, width)
        noise = torch.empty((WORLD * rows, width), device=self.device).exponential_(generator=self)
        return noise[RANK * rows:(RANK + 1) * rows]

    def micro_batches(self, lengths, micro, width):
        """Exp(1) noise (M, T, width) for each micro-batch of this process, drawn behind a rollout; `lengths` (N,) of
        the samples of all processes."""
        for _ in range(int(lengths.max()) - self.draws if self.draws else 0):
            self.rows(*self.size)                                   # others' samples were longer
        mine = share(range(len(lengths)))
        for start in range(0, len(lengths), micro):
            part = lengths[start:start + micro]
            noise = torch.empty((len(part), int(part.max()), width), device=self.device).exponential_(generator=self)
            noise = noise[max(0, mine.start - start):max(0, mine.stop - start)]
            if len(noise):
                yield noise
