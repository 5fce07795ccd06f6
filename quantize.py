"""8-bit and 4-bit weights for the frozen base: loaded by bitsandbytes, and fast enough to sample with.

    config(name, device, dtype, skip)    what from_pretrained needs for --quantize
    weight_only(model)                   products on 8-bit weights without 8-bit activations

LLM.int8 quantises the activations too, looks for outliers among them, and waits for the CPU with each product, so that
a decoding step can't be captured: at the size of Fun-ASR-Nano a prototype took 166 ms a token on an H200, the product
below takes 25 on an H100 (96 rows). In RL the frozen weights are all that memory has to be saved on. So the int8 matrix
stays as bitsandbytes made it, and each product turns it into the activations' own precision on the fly: 8-bit memory,
kernels that a CUDA graph can hold, and no second rounding between the sampler and the trainer. Our choice; the paper
does not quantise.
"""
import functools

import bitsandbytes as bnb
import torch
from transformers import BitsAndBytesConfig

from data import DataError


def config(name, device, dtype, skip=()):
    """BitsAndBytesConfig for `name` ("none" gives None); modules that match a pattern in `skip` stay in `dtype`."""
    if name == "4bit" and device.type == "cpu":
        raise DataError("--quantize 4bit needs a GPU: on the CPU bitsandbytes has no gradient for it; 8bit has")
    chosen = {"none": None, "8bit": dict(load_in_8bit=True), "4bit": dict(
        load_in_4bit=True, bnb_4bit_compute_dtype=dtype, bnb_4bit_quant_type="nf4")}[name]
    return chosen and BitsAndBytesConfig(**chosen, llm_int8_skip_modules=list(skip) or None)


class _Int8Product(torch.autograd.Function):
    """x (..., I), codes (O, I) int8, scale (O,) -> (..., O): x @ (codes * scale[:, None]).T.

    Keeps the codes for the backward pass, not the matrix they stand for, which would be the whole model in `x.dtype`.
    Whole numbers up to 127 are exact in bf16.
    """

    @staticmethod
    def forward(ctx, x, codes, scale):
        ctx.save_for_backward(codes, scale)
        return (x @ codes.to(x.dtype).T).mul_(scale)

    @staticmethod
    def backward(ctx, grad):
        codes, scale = ctx.saved_tensors
        return (grad * scale) @ codes.to(grad.dtype), None, None


def weight_only(model):
    """Gives every 8-bit linear layer of `model` the product above, and returns the model."""
    def forward(layer, x):
        weight = layer.weight
        y = _Int8Product.apply(x, weight.data, (weight.SCB / 127).to(x.dtype))
        return y if layer.bias is None else y + layer.bias

    for layer in model.modules():
        if isinstance(layer, bnb.nn.Linear8bitLt):
            layer.forward = functools.partial(forward, layer)
    return model
