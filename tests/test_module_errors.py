"""Bad input of drop-in modules: the argument is named, by an error that whoever catches torch's catches too."""

import copy
from functools import partial

import pytest
import torch
from budget import assert_within_budget
from torch import nn

import fasttx
from fasttx import functional

BATCH, LENGTH, WIDTH, HEADS = 2, 3, 8, 2
X = torch.randn(BATCH, LENGTH, WIDTH)
_LAYER = partial(nn.TransformerEncoderLayer, WIDTH, HEADS, 16, 0.0, batch_first=True)
_DECODER_LAYER = partial(nn.TransformerDecoderLayer, WIDTH, HEADS, 16, 0.0, batch_first=True)
_TGT_MASKS = ("tgt_mask", "memory_mask"), ("tgt_key_padding_mask", "memory_key_padding_mask")
# By name: how to make it, its tensors, its attention masks, and its key padding masks.
MODULES = {
    "norm": (lambda: nn.LayerNorm(WIDTH), ("input",), (), ()),
    "gelu": (nn.GELU, ("input",), (), ()),
    "attention": (
        lambda: nn.MultiheadAttention(WIDTH, HEADS, batch_first=True), ("query", "key", "value"), ("attn_mask",),
        ("key_padding_mask",),
    ),
    "encoder layer": (_LAYER, ("src",), ("src_mask",), ("src_key_padding_mask",)),
    "encoder": (lambda: nn.TransformerEncoder(_LAYER(), 2), ("src",), ("mask",), ("src_key_padding_mask",)),
    "decoder layer": (_DECODER_LAYER, ("tgt", "memory"), *_TGT_MASKS),
    "decoder": (lambda: nn.TransformerDecoder(_DECODER_LAYER(), 2), ("tgt", "memory"), *_TGT_MASKS),
}
_BAD = {
    "a list": [1.0],
    "None": None,
    "an array": X.numpy(),
    "integers": torch.ones(BATCH, LENGTH, WIDTH, dtype=torch.long),
    "bools": torch.ones(BATCH, LENGTH, WIDTH, dtype=torch.bool),
    "complex numbers": X.to(torch.complex64),
    "float8": X.to(torch.float8_e4m3fn),
    "another width": torch.randn(BATCH, LENGTH, WIDTH + 1),
    "another dtype": X.double(),
    "sparse": X.to_sparse(),
}
_BAD_MASKS = {
    "a list": [1.0],
    "another length": torch.zeros(LENGTH, LENGTH + 1),
    "one dimension": torch.zeros(LENGTH),
    "four dimensions": torch.zeros(1, 1, LENGTH, LENGTH),
    "another dtype": torch.zeros(LENGTH, LENGTH, dtype=torch.float64),
}
_BAD_PADDING = {
    "a list": [1.0],
    "integers": torch.zeros(BATCH, LENGTH, dtype=torch.long),
    "another length": torch.zeros(BATCH, LENGTH + 1),
    "one dimension": torch.zeros(LENGTH),
    "another dtype": torch.zeros(BATCH, LENGTH, dtype=torch.float64),
}


def _calls():
    for name, (make, tensors, masks, padding) in MODULES.items():
        for arguments, values in ((tensors, _BAD), (masks, _BAD_MASKS), (padding, _BAD_PADDING)):
            for argument in arguments:
                for kind, value in values.items():
                    yield pytest.param(make, tensors, {argument: value}, id=f"{name}, {argument}: {kind}")


def outcome_of(module, tensors, changes, x=X):
    """The output, or the error."""
    try:
        output = module(**dict.fromkeys(tensors, x) | changes)
    except Exception as error:
        return error
    return output[0] if isinstance(output, tuple) else output


def error_of(module, tensors, changes):
    outcome = outcome_of(module, tensors, changes)
    return outcome if isinstance(outcome, Exception) else None


@pytest.mark.parametrize("make, tensors, changes", list(_calls()))
def test_who_catches_torchs_error_catches_ours(make, tensors, changes):
    """In training, where torch runs no fast path, whose errors are others."""
    module = make().train()
    theirs = error_of(copy.deepcopy(module), tensors, changes)
    ours = error_of(fasttx.optimize(module), tensors, changes)
    if theirs is None:  # in this, torch is lenient
        assert ours is None or next(iter(changes)) in str(ours)
    elif ours is not None:
        assert isinstance(ours, type(theirs)), (ours, theirs)
    else:  # layer norm of mixed dtypes, which the reference computes
        assert tensors == ("input",) and changes["input"].dtype == torch.float64


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("make, tensors, changes", [call for call in _calls() if call.values[1] != ("input",)])
def test_inference_takes_and_refuses_what_torchs_does(make, tensors, changes, grad):
    """Without gradients on torch's fast path, which takes other masks than its attention does, and has other errors."""
    torch.manual_seed(0)
    module = make().eval()
    in_float64 = copy.deepcopy(module).double()
    with torch.set_grad_enabled(grad):
        theirs = outcome_of(copy.deepcopy(module), tensors, changes)
        ours = outcome_of(fasttx.optimize(module), tensors, changes)
    if isinstance(theirs, Exception):
        assert isinstance(ours, type(theirs)), (ours, theirs)
    else:
        wide = {name: x.double() if torch.is_floating_point(x) else x for name, x in changes.items()}
        with torch.no_grad():
            truth = outcome_of(in_float64, tensors, wide, X.double())
        assert_within_budget(actual=ours.detach(), eager=theirs.detach(), truth=truth)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", [name for name, (*_, padding) in MODULES.items() if padding])
def test_masks_on_another_device_are_named(name, train):
    """Else the operator would be dispatched to that device, which leaves the results as they were allocated."""
    make, tensors, masks, padding = MODULES[name]
    module = fasttx.optimize(make().train(train))
    shapes = dict.fromkeys(masks, (LENGTH, LENGTH)) | dict.fromkeys(padding, (BATCH, LENGTH))
    for argument, shape in shapes.items():
        for dtype in (torch.bool, torch.float32):
            mask = torch.zeros(shape, dtype=dtype, device="meta")
            with pytest.raises(ValueError, match=f"^{argument} is on meta but {tensors[0]} is on cpu") as caught:
                module(**dict.fromkeys(tensors, X), **{argument: mask})
            assert isinstance(caught.value, RuntimeError)


@pytest.mark.parametrize("name", MODULES)
def test_inputs_on_another_device(name):
    make, tensors, *_ = MODULES[name]
    module = fasttx.optimize(make())
    if name == "gelu":
        assert module(X.to("meta")).is_meta
        return
    for argument in tensors:
        with pytest.raises(ValueError, match="is on (cpu|meta) but .* is on (cpu|meta)"):
            module(**dict.fromkeys(tensors, X) | {argument: X.to("meta")})
    with pytest.raises(ValueError, match="is on (cpu|meta) but .* is on (cpu|meta)"):
        module.to("meta")(**dict.fromkeys(tensors, X))


@pytest.mark.parametrize(
    "theirs, ours",
    [
        (
            lambda: nn.functional.embedding(torch.tensor([9]), X[0]),
            lambda: functional.embedding(torch.tensor([9]), X[0]),
        ),
        (
            lambda: nn.functional.cross_entropy(X[0] @ X[0].T, torch.tensor([0, 9, 1])),
            lambda: functional.linear_cross_entropy(X[0], X[0], torch.tensor([0, 9, 1])),
        ),
        (lambda: torch.softmax(X, 3), lambda: functional.softmax(X, dim=3)),
    ],
    ids=["embedding", "linear_cross_entropy", "softmax"],
)
def test_places_that_are_not_there(theirs, ours):
    with pytest.raises(IndexError):
        theirs()
    with pytest.raises(ValueError) as caught:
        ours()
    assert isinstance(caught.value, IndexError)


@pytest.mark.parametrize("train", [False, True])
def test_a_model_without_values_takes_every_mask(train):
    """On the meta device there is nothing to look at: padding stays, and no mask is known to be causal."""
    model = fasttx.optimize(nn.Transformer(WIDTH, HEADS, 1, 1, 16, batch_first=True)).train(train).to("meta")
    x, padding = X.to("meta"), torch.zeros(BATCH, LENGTH, dtype=torch.bool, device="meta")
    causal = torch.zeros(LENGTH, LENGTH, device="meta")
    paddings = dict.fromkeys(("src_key_padding_mask", "tgt_key_padding_mask", "memory_key_padding_mask"), padding)
    for masks in ({}, paddings, paddings | {"src_mask": causal, "tgt_mask": causal}):
        output = model(x, x, **masks)
        assert output.is_meta and output.shape == X.shape


@pytest.mark.parametrize("name", MODULES)
def test_scripting_is_refused_with_the_way_out(name):
    module = nn.Sequential(MODULES[name][0]().eval())
    fasttx.optimize(module)
    with pytest.raises(RuntimeError, match=r"fasttx\.restore\(model\)"):
        torch.jit.script(module)
