"""strict() and warn_on_fallback(): what leaves the kernels, where and why, as an error and as a warning."""

import copy
import threading
import warnings

import pytest
import torch
from test_dispatch import python
from torch.utils._pytree import tree_map

import fasttx
from fasttx import functional
from fasttx.nn import _blocks
from fasttx.nn._plain import is_plain, why_not_plain

pytestmark = pytest.mark.usefixtures("needs_extension")

E, T = 16, 5


class Halved(torch.Tensor):
    """A weight that stores half of itself, and takes part in torch's operators alone: as quantized weights do."""

    @staticmethod
    def __new__(cls, weight):
        made = torch.Tensor._make_wrapper_subclass(cls, weight.shape, dtype=weight.dtype, requires_grad=False)
        made.half_of_it = weight.detach() / 2
        return made

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        assert op.namespace != "fasttx", "an operator that it does not know"
        if op is torch.ops.aten.detach.default:
            return cls(args[0].half_of_it * 2)

        def restored(value):
            return value.half_of_it * 2 if isinstance(value, cls) else value

        return op(*tree_map(restored, args), **tree_map(restored, kwargs or {}))


def layer(**options):
    options = {"dropout": 0.0, "batch_first": True} | options
    return fasttx.optimize(torch.nn.TransformerEncoderLayer(E, 4, 24, **options)).eval()


def quantize(module):
    module.weight = torch.nn.Parameter(Halved(module.weight), requires_grad=False)


@pytest.fixture
def x():
    return torch.randn(2, T, E)


def test_what_runs_on_kernels_passes(x):
    model = layer()
    padding = torch.arange(T) >= torch.tensor([[5], [3]])
    with fasttx.strict():
        model(x, src_key_padding_mask=padding).sum().backward()
        layer(norm_first=True)(x).sum().backward()
        torch.nn.Linear(E, E)(torch.nn.Tanh()(x))  # what fasttx does not know is no fallback


def hook_linear(model):
    model.linear1.register_forward_hook(lambda m, args, output: output * 2)


def hook_norm(model):
    model.norm1.register_forward_hook(lambda m, args, output: output * 2)


def hook_last_dropout(model):
    model.dropout2.register_forward_hook(lambda m, args, output: output * 2)


def replace_attention_forward(model):
    attend = model.self_attn.forward
    model.self_attn.forward = lambda *args, **kwargs: attend(*args, **kwargs)


def quantize_linear(model):
    quantize(model.linear1)


def quantize_attention(model):
    model.self_attn.in_proj_weight = torch.nn.Parameter(Halved(model.self_attn.in_proj_weight), requires_grad=False)


def normalize_weight(model):
    torch.nn.utils.parametrizations.weight_norm(model.linear2)


def normalize_weight_by_hook(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.nn.utils.weight_norm(model.linear2)


def normalize_spectrum(model):
    torch.nn.utils.parametrizations.spectral_norm(model.linear1)


def parametrize_attention(model):
    torch.nn.utils.parametrize.register_parametrization(model.self_attn, "in_proj_weight", torch.nn.Hardtanh())


def another_activation(model):
    model.activation = torch.nn.SiLU()


CHANGES = {
    hook_linear: ("linear1", "linear1: it has hooks"),
    hook_norm: ("norm1", "norm: it has hooks"),
    hook_last_dropout: ("dropout2", "dropout: it has hooks"),
    replace_attention_forward: ("self_attn", "attention: its forward was replaced"),
    quantize_linear: ("linear1", "linear1: its weight is a Halved"),
    quantize_attention: ("self_attn", "attention: its in_proj_weight is a Halved"),
    normalize_weight: ("linear2", "linear2: it is a ParametrizedLinear, not a Linear"),
    normalize_weight_by_hook: ("linear2", "linear2: it has hooks"),
    normalize_spectrum: ("linear1", "linear1: it is a ParametrizedLinear, not a Linear"),
    parametrize_attention: ("self_attn", "attention: it is a ParametrizedMultiheadAttention, not a MultiheadAttention"),
    another_activation: ("activation", "activation: it is neither a plain relu nor a plain gelu"),
}


@pytest.mark.parametrize("norm_first", [False, True], ids=["", "norm first"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_called_child_is_honoured_told_and_an_error(change, norm_first, x):
    child, reason = CHANGES[change]
    ours = layer(norm_first=norm_first)
    theirs = fasttx.restore(copy.deepcopy(ours))
    for model in (ours, theirs):
        torch.manual_seed(1)
        change(model)
    theirs.train()  # out of torch's fast path, which calls no children
    with torch.no_grad():
        # Parametrizations that learn in training are left where they were.
        for model in (ours, theirs):
            for module in model.modules():
                if "Spectral" in type(module).__name__:
                    module.eval()
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)
        outer = torch.nn.Sequential(torch.nn.Identity(), ours)
        slow = fasttx.explain(outer, x).slow
        assert {row.module for row in slow} <= {"1", f"1.{child}"}
        assert any(row.module == "1" and row.reason == reason for row in slow)
        with pytest.raises(fasttx.FallbackError, match=f" of 1 would run in the module's own code: {reason}"):
            with fasttx.strict():
                outer(x)
    rows = {row.module: row for row in fasttx.explain(outer).rows}
    if f"1.{child}" in rows:
        assert rows[f"1.{child}"].status == "called"
        assert reason.split(": ")[1] in rows[f"1.{child}"].reason
        assert rows[f"1.{child}"] in fasttx.explain(outer).slow


def test_a_half_replaced_on_the_instance_runs_as_torchs(x):
    ours = layer().train()
    theirs = fasttx.restore(copy.deepcopy(ours))
    for model in (ours, theirs):
        model._ff_block = lambda hidden: hidden * 3
    torch.testing.assert_close(ours(x), theirs(x))
    with fasttx.strict(), pytest.raises(fasttx.FallbackError, match="its _ff_block was replaced"):
        ours(x)
    rows = {row.module: row for row in fasttx.explain(ours).rows}
    assert rows["(model)"].status == "called" and "_ff_block" in rows["linear1"].reason


def test_a_global_hook_is_a_reason(x):
    model = layer()
    handle = torch.nn.modules.module.register_module_forward_hook(lambda m, args, output: None)
    try:
        with fasttx.strict(), pytest.raises(fasttx.FallbackError, match="a global module hook is set"):
            model(x)
    finally:
        handle.remove()
    with fasttx.strict():
        model(x)


def test_ops_that_no_kernel_takes(x):
    norm = fasttx.nn.LayerNorm(E)
    nested = torch.nested.nested_tensor([torch.randn(3, E), torch.randn(5, E)])
    with fasttx.strict():
        with pytest.raises(fasttx.FallbackError, match="layer_norm of LayerNorm would run on the reference: .*dtypes"):
            norm(x.half())
        with pytest.raises(fasttx.FallbackError, match="layer_norm of LayerNorm would run in the .* input is nested"):
            norm(nested)
        with pytest.raises(fasttx.FallbackError, match="^gelu would run on the reference: .*sparse"):
            functional.gelu(x.to_sparse())
    assert issubclass(fasttx.FallbackError, fasttx.UnsupportedError)


def test_what_the_user_named_is_no_fallback(x):
    with fasttx.strict(), fasttx.backend("reference"):
        layer()(x)
        functional.gelu(x, backend="reference")
    with fasttx.backend("reference"):
        rows = fasttx.explain(layer(), x).rows
    assert {(row.backend, row.status, row.kernel) for row in rows} == {("reference", "ran", "")}
    assert "attention_block" not in {row.op for row in rows}  # a joined operation has no reference


def test_contexts_nest_and_belong_to_their_thread(x):
    norm, heard = fasttx.nn.LayerNorm(E), []

    def elsewhere():
        norm(x.half())
        heard.append("done")

    with fasttx.strict():
        with fasttx.strict(False):
            norm(x.half())
            with fasttx.strict(), pytest.raises(fasttx.FallbackError):
                norm(x.half())
        with pytest.raises(fasttx.FallbackError):
            norm(x.half())
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        assert fasttx.explain(norm, x.half()).slow  # which shows what strict refuses
    norm(x.half())
    assert heard == ["done"]


def test_warns_once_for_each_reason(x):
    model = layer()
    hook_linear(model)
    norm = fasttx.nn.LayerNorm(E)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                model(x)
                norm(x.half())
            assert not caught
            fasttx.warn_on_fallback()
            for _ in range(2):
                model(x)
                norm(x.half())
            assert [w.category for w in caught] == [fasttx.FallbackWarning] * 2
            assert "linear of TransformerEncoderLayer runs in the module's own code: linear1" in str(caught[0].message)
            assert "layer_norm of LayerNorm runs on the reference: not cpu: dtypes" in str(caught[1].message)
            fasttx.warn_on_fallback()
            norm(x.half())
            assert len(caught) == 3
            fasttx.warn_on_fallback(False)
            norm(x.half())
            assert len(caught) == 3
    finally:
        fasttx.warn_on_fallback(False)


FALLBACK = "import torch, fasttx; fasttx.nn.LayerNorm(4)(torch.ones(4).half()); print('ran')"


def test_environment():
    done = python(FALLBACK, FASTTX_STRICT="1")
    assert done.returncode != 0 and "FallbackError: layer_norm of LayerNorm" in done.stderr
    done = python(FALLBACK, FASTTX_WARN="1", FASTTX_STRICT="0")
    assert done.returncode == 0 and "FallbackWarning: layer_norm" in done.stderr
    done = python(FALLBACK, FASTTX_STRICT="yes")
    assert done.returncode != 0 and "FASTTX_STRICT must be 0 or 1, got 'yes'" in done.stderr


def test_strict_and_warnings_compile(x):
    model = layer()
    fasttx.warn_on_fallback()
    try:
        with fasttx.strict(), torch.no_grad():
            expected = model(x)
            torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected)
    finally:
        fasttx.warn_on_fallback(False)


def test_weights_that_know_torchs_operators_only(x):
    """Outside a layer: the reference computes with what the weight is in torch's operators."""
    norm = fasttx.nn.LayerNorm(E)
    expected = norm(x)
    quantize(norm)
    with torch.no_grad():
        torch.testing.assert_close(norm(x), expected)
    assert not is_plain(norm, fasttx.nn.LayerNorm)

    class Named(torch.Tensor):
        """Overrides nothing."""

    plain = torch.nn.Linear(E, E)
    plain.weight = torch.nn.Parameter(plain.weight.detach().as_subclass(Named))
    assert why_not_plain(plain, torch.nn.Linear) is None


def test_dropout_as_a_number(x):
    norm = torch.nn.LayerNorm(E)
    for p, training, plain in ((0.0, True, True), (0.5, True, True), (1.0, False, True), (1.0, True, False)):
        dropout = _blocks.Dropout(p, training)
        assert _blocks.is_plain_dropout(dropout) is plain
        assert _blocks.why_no_dropout(dropout) == (None if plain else "its probability is 1")
    module = torch.nn.Dropout(0.5)
    outputs = []
    for dropout in (module, _blocks.Dropout(0.5, True)):
        torch.manual_seed(2)
        outputs.append(_blocks.add_norm(norm, dropout, x, x))
    assert torch.equal(*outputs)
    torch.testing.assert_close(_blocks.add_norm(norm, _blocks.Dropout(1.0, True), x, x), norm(x))

    def traced(value):
        return _blocks.add_norm(norm, _blocks.Dropout(0.0, True), value, value)

    compiled = torch.compile(traced, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), traced(x))
