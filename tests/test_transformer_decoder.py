"""TransformerDecoderLayer and TransformerDecoder against torch.nn's."""

import copy
import inspect
import pickle

import pytest
import torch
from budget import DTYPES
from module_checks import assert_equals_torch, assert_module_within_budget
from torch.nn import functional as F

import fasttx
from fasttx import dispatch
from fasttx.nn.decoder import PackingTransformerDecoder

B, T, S, E, H = 4, 6, 5, 16, 4
CAUSAL = torch.ones(T, T, dtype=torch.bool).triu(1)
LAYER_OPTIONS = [
    {},
    {"batch_first": True},
    {"norm_first": True},
    {"norm_first": True, "batch_first": True, "activation": "gelu"},
    {"bias": False, "norm_first": True, "activation": F.gelu},
    {"layer_norm_eps": 1e-2, "activation": torch.nn.ReLU()},
    {"activation": torch.nn.GELU("tanh"), "batch_first": True},
    {"activation": lambda x: x * x, "batch_first": True},
]
LAYER_IDS = [
    ",".join(f"{k}={getattr(v, '__name__', v)}" for k, v in options.items())
    for options in LAYER_OPTIONS
]


def make_layer(**options):
    layer = torch.nn.TransformerDecoderLayer(E, H, 24, **{"dropout": 0.0, **options})
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return layer


def make_decoder(layers=2, norm=True, **options):
    layer = make_layer(**{"batch_first": True, **options})
    decoder = torch.nn.TransformerDecoder(layer, layers, torch.nn.LayerNorm(E) if norm else None)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return decoder


def inputs(batch_first=True):
    tgt, memory = torch.randn(B, T, E), torch.randn(B, S, E)
    if not batch_first:
        tgt, memory = tgt.transpose(0, 1).contiguous(), memory.transpose(0, 1).contiguous()
    return {"tgt": tgt, "memory": memory}


def paddings():
    """Of target and memory, True = padding; every sequence keeps its first token, for torch's sake."""
    tgt = torch.arange(T) >= torch.tensor([[T], [1], [3], [4]])
    memory = torch.rand(B, S) < 0.5
    memory[:, 0] = False
    return tgt, memory


def floating(padding):
    return torch.zeros(padding.shape).masked_fill_(padding, -torch.inf)


def masks():
    of_tgt, of_memory = paddings()
    mask, memory_mask = torch.rand(T, T) < 0.4, torch.rand(T, S) < 0.4
    mask[:, 0] = memory_mask[:, 0] = False
    return [
        {},
        {"tgt_mask": mask, "memory_mask": memory_mask},
        {"tgt_mask": torch.randn(B * H, T, T), "memory_mask": torch.randn(B * H, T, S)},
        {"tgt_key_padding_mask": of_tgt, "memory_key_padding_mask": of_memory},
        {"tgt_key_padding_mask": floating(of_tgt), "memory_key_padding_mask": floating(of_memory)},
        {"tgt_mask": CAUSAL, "memory_mask": memory_mask, "memory_key_padding_mask": of_memory},
        {"tgt_mask": CAUSAL, "tgt_is_causal": True},
        {"memory_mask": CAUSAL[:, :S], "memory_is_causal": True},
    ]


def given(**masks):
    """Runs a module with these masks, floating ones in the input's dtype."""

    def run(module, tgt, memory):
        cast = {
            k: v.to(tgt.dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v
            for k, v in masks.items()
        }
        return module(tgt, memory, **cast)

    return run


@pytest.mark.parametrize("options", LAYER_OPTIONS, ids=LAYER_IDS)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("gradients", [False, True])
def test_layer_arguments_and_masks(options, training, gradients):
    layer = make_layer(**options).train(training)
    for some in masks():
        batch = inputs(options.get("batch_first", False))
        fast = assert_equals_torch(layer, batch, given(**some), gradients=gradients)
        assert type(fast) is fasttx.nn.TransformerDecoderLayer
    unbatched = {"tgt": torch.randn(T, E), "memory": torch.randn(S, E)}
    assert_equals_torch(layer, unbatched, given(tgt_mask=CAUSAL), gradients=gradients)


def test_in_inference_the_cross_attention_half_is_one_operation(needs_extension):
    def ops(layer, some):
        return sorted(row.op for row in fasttx.explain(layer, **some).rows)

    wanted = ["attention_block", "cached_attention_block", "feed_forward_block", "linear"]
    for options in ({}, {"norm_first": True}, {"batch_first": True}, {"bias": False}):
        layer = fasttx.optimize(make_layer(**options)).eval()
        some = inputs(options.get("batch_first", False)) | {"memory_mask": torch.randn(T, S)}
        assert ops(layer, some) == wanted
        layer.train()
        assert (ops(layer, some) == wanted) == ("norm_first" not in options)
        layer.dropout2.p = 0.5
        assert "cached_attention_block" not in ops(layer, some)
    for name in ("multihead_attn", "norm2"):
        for norm_first in (False, True):
            layer = fasttx.optimize(make_layer(norm_first=norm_first)).eval()
            getattr(layer, name).register_forward_hook(lambda *args: None)
            with torch.no_grad(), fasttx.strict(), pytest.raises(fasttx.FallbackError, match="it has hooks"):
                layer(**inputs(False))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("gradients", [False, True])
def test_layer_within_budget(dtype, norm_first, gradients):
    torch.manual_seed(5)
    layer = torch.nn.TransformerDecoderLayer(
        64, 4, 128, dropout=0.0, activation="gelu", batch_first=True, norm_first=norm_first
    )
    some = {"tgt": torch.randn(8, 24, 64), "memory": torch.randn(8, 19, 64)}
    causal = torch.ones(24, 24, dtype=torch.bool).triu(1)
    run = given(tgt_mask=causal, tgt_is_causal=True)
    assert_module_within_budget(layer.train(gradients), some, dtype, run, gradients=gradients)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("padded", ["tgt", "memory", "both"])
def test_decoder_without_padding_equals_torch_where_valid(batch_first, norm_first, training, padded):
    decoder = make_decoder(batch_first=batch_first, norm_first=norm_first).train(training)
    tgt_padding, memory_padding = paddings()
    valid = torch.ones(B, T, dtype=torch.bool) if padded == "memory" else ~tgt_padding
    of_tgt = {} if padded == "memory" else {"tgt_key_padding_mask": tgt_padding}
    of_memory = {} if padded == "tgt" else {"memory_key_padding_mask": memory_padding}

    def valid_part(**masks):
        whole = given(**masks)

        def run(module, tgt, memory):
            return whole(module, tgt, memory)[valid if batch_first else valid.T]

        return run

    tensors = inputs(batch_first)
    for causal in ({}, {"tgt_mask": CAUSAL}, {"tgt_mask": CAUSAL, "tgt_is_causal": True}):
        some = {**of_tgt, **of_memory, **causal}
        fast = assert_equals_torch(decoder, tensors, valid_part(**some))
        assert_equals_torch(decoder, tensors, valid_part(**some), padding="keep")
    some = {name: floating(mask) for name, mask in {**of_tgt, **of_memory}.items()}
    assert_equals_torch(decoder, tensors, valid_part(**some))
    with torch.no_grad():
        output = given(**some)(fast, *(t.double() for t in tensors.values()))
    assert (output[~valid if batch_first else ~valid.T] == 0).all()


def test_masks_that_cannot_be_packed_run_padded():
    decoder, (of_tgt, of_memory) = make_decoder(), paddings()
    padding = {"tgt_key_padding_mask": of_tgt, "memory_key_padding_mask": of_memory}
    mask, memory_mask = torch.rand(T, T) < 0.3, torch.rand(T, S) < 0.3
    mask[:, 0] = memory_mask[:, 0] = False
    assert_equals_torch(decoder, inputs(), given(**padding, tgt_mask=mask))
    assert_equals_torch(decoder, inputs(), given(**padding, memory_mask=memory_mask))
    bias = {"memory_key_padding_mask": of_memory * -2.0}
    assert_equals_torch(decoder, inputs(), given(tgt_key_padding_mask=of_tgt, **bias))


def test_packing_happens(needs_extension):
    decoder = fasttx.optimize(make_decoder().train())
    of_tgt, of_memory = paddings()
    heard = []
    dispatch.listeners.append(heard.append)
    try:
        decoder(**inputs(), tgt_key_padding_mask=of_tgt, memory_key_padding_mask=of_memory)
        packed = {"attention_block_varlen", "attention_varlen"}
        assert {d.op for d in heard if "attention" in d.op} == packed
        heard.clear()
        decoder(**inputs(), tgt_key_padding_mask=torch.zeros(B, T, dtype=torch.bool))
        assert {d.op for d in heard if "attention" in d.op} == {"attention_block", "attention"}
        assert {d.backend for d in heard} == {"cpu"}
    finally:
        dispatch.listeners.pop()


def test_memory_without_tokens():
    decoder = fasttx.optimize(make_decoder())
    tensors = {name: tensor.requires_grad_() for name, tensor in inputs().items()}
    of_memory = torch.zeros(B, S, dtype=torch.bool)
    of_memory[2] = True
    output = decoder(**tensors, memory_key_padding_mask=of_memory)
    output.square().sum().backward()
    assert output.isfinite().all() and all(t.grad.isfinite().all() for t in tensors.values())
    assert (tensors["memory"].grad[2] == 0).all()


def test_weights_that_change_are_the_ones_used():
    """The rows of in_proj_weight that the memory is projected by, after each way to change them."""
    theirs = make_layer(batch_first=True).double()
    ours = fasttx.optimize(copy.deepcopy(theirs))
    tensors = {name: tensor.double() for name, tensor in inputs().items()}

    def scale(parameter):
        parameter.mul_(1.5)

    def reassign(parameter):
        parameter.data = parameter.data * 0.5

    def assert_equal():
        with torch.no_grad():
            torch.testing.assert_close(ours(**tensors), theirs(**tensors))

    assert_equal()
    for change in (scale, reassign, scale):
        for layer in (ours, theirs):
            with torch.no_grad():
                change(layer.multihead_attn.in_proj_weight)
        assert_equal()


def hook_attention(layer):
    layer.multihead_attn.register_forward_hook(lambda m, args, output: (output[0] * 2, None))


def hook_norm(layer):
    layer.norm3.register_forward_pre_hook(lambda m, args: (args[0] + 1,))


def replace_linear(layer):
    layer.linear1 = torch.nn.Sequential(layer.linear1, torch.nn.Tanh())


CHANGES = {hook_attention: "multihead_attn", hook_norm: "norm3", replace_linear: "linear1"}


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_changed_children_are_honoured(change, norm_first):
    theirs = make_decoder(norm_first=norm_first).double()
    ours = fasttx.optimize(copy.deepcopy(theirs))
    change(theirs.layers[0])
    change(ours.layers[0])
    tensors = {name: tensor.double() for name, tensor in inputs().items()}
    _, of_memory = paddings()
    masks = {"tgt_mask": CAUSAL, "memory_key_padding_mask": of_memory}
    torch.testing.assert_close(ours(**tensors, **masks), theirs(**tensors, **masks))
    rows = {row.module: row for row in fasttx.explain(ours).rows}
    assert "outside the fusion" in rows[f"layers.0.{CHANGES[change]}"].reason
    assert "fused into layers.1" in rows["layers.1.multihead_attn"].reason


def test_drop_in_construction():
    torch.manual_seed(2)
    theirs = torch.nn.TransformerDecoder(torch.nn.TransformerDecoderLayer(E, H, batch_first=True), 2)
    torch.manual_seed(2)
    ours = fasttx.nn.TransformerDecoder(fasttx.nn.TransformerDecoderLayer(E, H, batch_first=True), 2)
    assert repr(ours) == repr(theirs)
    assert type(ours.layers[1].norm3) is fasttx.nn.LayerNorm
    assert type(ours.layers[1].multihead_attn) is fasttx.nn.MultiheadAttention
    state = theirs.state_dict()
    assert list(ours.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in ours.state_dict().items())
    from_theirs = fasttx.nn.TransformerDecoder(torch.nn.TransformerDecoderLayer(E, H), 1)
    assert type(from_theirs.layers[0]) is fasttx.nn.TransformerDecoderLayer
    of_layer, of_decoder = (
        inspect.signature(getattr(fasttx.nn, name)) for name in ("TransformerDecoderLayer", "TransformerDecoder")
    )
    assert of_layer == inspect.signature(torch.nn.TransformerDecoderLayer)
    *parameters, remove_padding = of_decoder.parameters.values()
    assert parameters == list(inspect.signature(torch.nn.TransformerDecoder).parameters.values())
    assert str(remove_padding) == "remove_padding: bool | None = None"
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert [type(m) for m in twin.modules()] == [type(m) for m in ours.modules()]


def test_optimize_and_restore_a_whole_transformer():
    model = torch.nn.Transformer(E, H, 1, 2, 24, dropout=0.0, batch_first=True).double().eval()
    tensors = {"src": torch.randn(B, S, E).double(), "tgt": torch.randn(B, T, E).double()}
    masks = {"tgt_mask": torch.nn.Transformer.generate_square_subsequent_mask(T).double()}
    classes = [type(m) for m in model.modules()]
    expected = model(**tensors, **masks)
    fasttx.optimize(model)
    assert type(model.decoder) is PackingTransformerDecoder
    assert {type(layer) for layer in model.decoder.layers} == {fasttx.nn.TransformerDecoderLayer}
    torch.testing.assert_close(model(**tensors, **masks), expected)
    fasttx.optimize(model, padding="keep")
    assert type(model.decoder) is fasttx.nn.TransformerDecoder
    assert [type(m) for m in fasttx.restore(model).modules()] == classes


@pytest.mark.parametrize("training", [False, True])
def test_dropout_is_drawn_in_training_alone_and_from_torchs_seed(training):
    layer = fasttx.optimize(make_layer(dropout=0.2, batch_first=True)).train(training)
    tensors = inputs()

    def run(seed):
        torch.manual_seed(seed)
        with torch.no_grad():
            return layer(**tensors)

    assert torch.equal(run(1), run(1))
    assert torch.equal(run(1), run(2)) == (not training)


def drop_in(decoder, **options):
    """fasttx.nn's TransformerDecoder with the parameters of torch's."""
    layers, norm = len(decoder.layers), copy.deepcopy(decoder.norm)
    ours = fasttx.nn.TransformerDecoder(copy.deepcopy(decoder.layers[0]), layers, norm, **options)
    ours.load_state_dict(decoder.state_dict())
    return ours.double().train(decoder.training)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("remove", [True, False, None])
def test_remove_padding_of_a_drop_in(remove, training):
    theirs = make_decoder().double().train(training)
    ours = drop_in(theirs, remove_padding=remove)
    tensors = {name: tensor.double() for name, tensor in inputs().items()}
    of_tgt, of_memory = paddings()
    masks = {"tgt_key_padding_mask": of_tgt, "memory_key_padding_mask": of_memory, "tgt_mask": CAUSAL}
    expected, output = (m(**tensors, **masks) for m in (theirs, ours))
    torch.testing.assert_close(output[~of_tgt], expected[~of_tgt])
    assert bool((output[of_tgt] == 0).all()) == bool(remove)
    if not remove:
        torch.testing.assert_close(output, expected)
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(twin(**tensors, **masks), output)
    packing = fasttx.optimize(ours)
    assert bool((packing(**tensors, **masks)[of_tgt] == 0).all()) == (remove is not False)


@pytest.mark.parametrize("changed", [(0,), (1,), (0, 2), (0, 1, 2)], ids=str)
def test_layers_that_cannot_pack_take_turns_with_those_that_can(changed):
    theirs = make_decoder(layers=3).double()
    for i in changed:
        replace_linear(theirs.layers[i])
    ours = fasttx.optimize(copy.deepcopy(theirs))
    tensors = {name: tensor.double() for name, tensor in inputs().items()}
    of_tgt, of_memory = paddings()
    masks = {"tgt_key_padding_mask": of_tgt, "memory_key_padding_mask": of_memory, "tgt_mask": CAUSAL}
    heard = []
    dispatch.listeners.append(heard.append)
    try:
        output = ours(**tensors, **masks)
    finally:
        dispatch.listeners.pop()
    torch.testing.assert_close(output[~of_tgt], theirs(**tensors, **masks)[~of_tgt])
    assert (output[of_tgt] == 0).all()
    # In a layer that runs packed, the attention to the memory is the one that is no block.
    packed = sum(d.op == "attention_varlen" for d in heard)
    assert packed == 3 - len(changed) or dispatch.extension is None


@pytest.mark.parametrize("batch_first", [False, True])
def test_compiled_padding_removal_equals_eager_everywhere(batch_first):
    ours = drop_in(make_decoder(batch_first=batch_first), remove_padding=True)
    # What was compiled for another module of the class is not checked for hooks.
    torch._dynamo.reset()
    compiled = torch.compile(ours, backend="aot_eager", dynamic=True)
    of_tgt, of_memory = paddings()
    bias = torch.randn(B, S).double()
    of_both = {"tgt_key_padding_mask": of_tgt, "memory_key_padding_mask": floating(of_memory).double()}
    all_masks = [
        of_both | {"tgt_mask": CAUSAL},
        {"tgt_key_padding_mask": of_tgt},
        {"memory_key_padding_mask": of_memory},
        {"tgt_key_padding_mask": of_tgt, "memory_key_padding_mask": bias},
        {"tgt_key_padding_mask": of_tgt, "tgt_mask": CAUSAL, "tgt_is_causal": True},
        {"tgt_key_padding_mask": of_tgt, "memory_mask": torch.zeros(T, S).double()},
    ]
    # Masks are the same in both layouts, and each is compiled anew.
    for masks in all_masks[:3] if batch_first else all_masks:
        tensors = [tensor.double() for tensor in inputs(batch_first).values()]
        torch.testing.assert_close(compiled(*tensors, **masks), ours(*tensors, **masks))


def test_an_activation_that_is_a_module_stays_it_in_copies():
    """torch's decoder layers, copied, pickled or cloned by a decoder, compute relu from then on."""
    layer = fasttx.nn.TransformerDecoderLayer(E, H, 24, 0.0, torch.nn.GELU("tanh"), batch_first=True)
    given = inputs().values()
    expected = layer(*given)
    for twin in (
        copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), fasttx.nn.TransformerDecoder(layer, 1),
        copy.deepcopy(fasttx.nn.TransformerDecoder(layer, 1)),
    ):  # fmt: skip
        assert torch.equal(twin(*given), expected)
