"""TransformerEncoder's remove_padding=: what torch.nn's has no argument for."""

import copy
import pickle

import pytest
import torch
from test_transformer import CAUSAL, B, E, T, batch, make_encoder, make_layer, nesting, paddings, wrap_linear
from torch.utils.checkpoint import checkpoint

import fasttx


def drop_in(encoder, **options):
    """fasttx.nn's TransformerEncoder with the parameters of torch's."""
    layers, norm = len(encoder.layers), copy.deepcopy(encoder.norm)
    ours = fasttx.nn.TransformerEncoder(
        copy.deepcopy(encoder.layers[0]), layers, norm, enable_nested_tensor=encoder.enable_nested_tensor, **options
    )
    ours.load_state_dict(encoder.state_dict())
    return ours.double().train(encoder.training)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("pattern", ["right", "left", "holes"])
@pytest.mark.parametrize("remove", [True, False, None])
def test_remove_padding_of_a_drop_in(remove, pattern, training):
    """Where torch would nest, and in training: True zeroes padded positions, False never, None as torch does."""
    theirs = make_encoder().double()
    theirs = theirs.train() if training else nesting(theirs)
    ours = drop_in(theirs, remove_padding=remove)
    src, padding = batch().double(), paddings()[pattern]
    with torch.no_grad():
        expected, output = (m(src, src_key_padding_mask=padding) for m in (theirs, ours))
        torch.testing.assert_close(output[~padding], expected[~padding])
        zeros = theirs.norm.bias if not training and pattern == "right" else torch.zeros(E).double()
        zeroed = remove or (remove is None and not training and pattern == "right")
        assert bool((output[padding] == zeros).all()) == zeroed
        if remove is None:
            torch.testing.assert_close(output, expected)


def test_remove_padding_lasts():
    src, padding = batch().double(), paddings()["left"]

    def zeroes(encoder):
        return bool((encoder(src, src_key_padding_mask=padding)[padding] == 0).all())

    removing, keeping, open_ = (drop_in(make_encoder(), remove_padding=remove) for remove in (True, False, None))
    assert "remove_padding" not in open_.__dict__ and removing.state_dict().keys() == open_.state_dict().keys()
    for twin in (copy.deepcopy(removing), pickle.loads(pickle.dumps(removing))):
        assert zeroes(twin)
    parameters = {name: parameter * 2 for name, parameter in removing.named_parameters()}
    output = torch.func.functional_call(removing, parameters, (src,), {"src_key_padding_mask": padding})
    other = copy.deepcopy(removing)
    other.load_state_dict(parameters)
    assert torch.equal(output, other(src, src_key_padding_mask=padding)) and (output[padding] == 0).all()
    # What was asked for goes before what optimize() brings; restore() takes all of it away.
    for encoder, expected in ((removing, True), (keeping, False), (open_, True)):
        assert zeroes(fasttx.optimize(encoder)) == expected
        assert zeroes(fasttx.optimize(encoder, padding="keep")) == (expected and encoder is removing)
        assert not zeroes(fasttx.restore(encoder))
    with pytest.raises(TypeError, match="remove_padding must be True, False or None, got 'yes'"):
        fasttx.nn.TransformerEncoder(make_layer(), 1, remove_padding="yes")


def double_norm(encoder):
    encoder.norm.register_forward_pre_hook(lambda m, args: (args[0] * 2,))


@pytest.mark.parametrize(
    ("change", "batch_first"), [(None, False), (None, True), (wrap_linear, True), (double_norm, False)]
)
def test_compiled_padding_removal_equals_eager_everywhere(change, batch_first):
    ours = drop_in(make_encoder(batch_first=batch_first), remove_padding=True)
    if change is not None:
        change(ours if change is double_norm else ours.layers[1])
    ours = ours.double()
    # What was compiled for another module of the class is not checked for hooks.
    torch._dynamo.reset()
    compiled = torch.compile(ours, backend="aot_eager", dynamic=True)
    padding = paddings()["right"]
    floating = torch.zeros(B, T).double().masked_fill_(padding, -torch.inf)
    for masks in (
        {"src_key_padding_mask": padding},
        {"src_key_padding_mask": floating},
        {"src_key_padding_mask": floating.clamp(min=-1.0)},
        {"src_key_padding_mask": padding, "mask": CAUSAL},
        {"src_key_padding_mask": padding, "mask": CAUSAL, "is_causal": True},
        {"src_key_padding_mask": padding, "mask": CAUSAL.roll(1, 1) & ~torch.eye(T, dtype=torch.bool)},
    ):
        src = batch(batch_first).double()
        torch.testing.assert_close(compiled(src, **masks), ours(src, **masks))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_padding_removal_is_the_same_bits(reentrant):
    ours = drop_in(make_encoder(dropout=0.3), remove_padding=True)
    padding, results = paddings()["holes"], []
    src = batch().double()
    for checkpointed in (False, True):
        torch.manual_seed(1)
        ours.zero_grad()
        x = src.clone().requires_grad_()
        if checkpointed:
            output = checkpoint(lambda x: ours(x, src_key_padding_mask=padding), x, use_reentrant=reentrant)
        else:
            output = ours(x, src_key_padding_mask=padding)
        output.square().sum().backward()
        results.append([output, x.grad, *(p.grad for p in ours.parameters())])
    assert all(map(torch.equal, *results))


def test_one_layer_twice():
    ours = drop_in(make_encoder(), remove_padding=True)
    ours.layers[1] = ours.layers[0]
    twin = copy.deepcopy(ours)
    twin.layers[1] = copy.deepcopy(twin.layers[0])
    src, padding = batch().double(), paddings()["holes"]
    assert torch.equal(*(m(src, src_key_padding_mask=padding) for m in (ours, twin)))
