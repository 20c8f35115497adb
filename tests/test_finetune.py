"""LoRA and BitFit: the function that they say, on the kernels that are left, and nothing changed that is frozen."""

import copy
import functools
import pickle
from importlib import import_module

import pytest
import torch
from budget import assert_within_budget
from torch.func import functional_call

import fasttx
from fasttx import finetune, nn
from fasttx.models._model import ModelFileError
from fasttx.models.bert import Bert, BertConfig
from fasttx.models.bert_heads import BertForPretraining, BertForSequenceClassification
from fasttx.models.gpt import GPT, GPTConfig

pytest.importorskip("peft")
pytest.importorskip("safetensors")

E, H, F = 16, 2, 32


def encoder(**options):
    layer = torch.nn.TransformerEncoderLayer(E, H, F, 0.0, activation="gelu", batch_first=True, **options)
    return torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def decoder():
    layer = torch.nn.TransformerDecoderLayer(E, H, F, 0.0, activation="gelu", batch_first=True)
    return torch.nn.TransformerDecoder(layer, 2)


def hugging_face(family):
    pytest.importorskip("transformers", minversion="5.23")
    return import_module("hf_models").make(family)


# By name: the model, what it is called with, and the targets.
MODELS = {
    "post-norm": (encoder, lambda: {"src": torch.randn(3, 5, E)}, None),
    "pre-norm": (lambda: encoder(norm_first=True), lambda: {"src": torch.randn(3, 5, E)}, None),
    "decoder": (decoder, lambda: {"tgt": torch.randn(3, 5, E), "memory": torch.randn(3, 4, E)}, None),
    "linear1": (encoder, lambda: {"src": torch.randn(3, 5, E)}, ["linear1"]),
    "bert": (lambda: hugging_face("bert"), lambda: {"input_ids": torch.randint(50, (2, 6))}, None),
    "bert dense": (lambda: hugging_face("bert"), lambda: {"input_ids": torch.randint(50, (2, 6))}, ["dense"]),
    "gpt2": (lambda: hugging_face("gpt2"), lambda: {"input_ids": torch.randint(50, (2, 6))}, None),
}


@pytest.fixture(params=MODELS)
def case(request):
    make, inputs, targets = MODELS[request.param]
    return make().double(), {k: x.double() if x.is_floating_point() else x for k, x in inputs().items()}, targets


def adapt(model, targets=None, rank=4, **options):
    """With random adapters: B, too."""
    adapted = finetune.lora(model, rank=rank, targets=targets, **options)
    for name, values in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(values, std=0.3)
    return adapted.to(next(model.parameters()).dtype)


def output(model, inputs, weights=None):
    result = functional_call(model, weights or {}, (), inputs)
    return result if isinstance(result, torch.Tensor) else result[0]


def written_out(base, adapted, scale):
    """W + scale * B A for each adapter of `adapted`, by the weight's name in `base`."""
    adapters = {name: values for name, values in adapted.named_parameters() if "lora_" in name}
    changed = {}
    for name, down in adapters.items():
        if ".lora_A." not in name:
            continue
        up = adapters[name.replace("lora_A", "lora_B")]
        path = name.removeprefix("base_model.model.").partition(".lora_A")[0].replace("base_layer.", "")
        module = base.get_submodule(path)
        weight = "in_proj_weight" if isinstance(module, torch.nn.MultiheadAttention) else "weight"
        change = scale * up @ down
        own = getattr(module, weight)
        changed[f"{path}.{weight}"] = own + (change if own.shape == change.shape else change.mT)
    return changed


@pytest.mark.parametrize("order", ["plain", "optimized before", "optimized after"])
def test_is_the_function_of_the_changed_weights(case, order):
    """And has its gradients: by the base model of torch or transformers, called with W + alpha / rank * B A."""
    base, inputs, targets = case
    model = copy.deepcopy(base)
    if order == "optimized before":
        fasttx.optimize(model)
    adapted = adapt(model, targets, rank=4, alpha=6)
    if order == "optimized after":
        fasttx.optimize(adapted)
    for training in (True, False):
        base.train(training), adapted.train(training)
        weights = written_out(base, adapted, 6 / 4)
        assert weights
        torch.backends.mha.set_fastpath_enabled(False)
        expected = output(base, inputs, weights)
        torch.backends.mha.set_fastpath_enabled(True)
        actual = output(adapted, inputs)
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)
        with torch.no_grad():
            torch.testing.assert_close(output(adapted, inputs), expected, rtol=1e-9, atol=1e-10)
        trained = [values for values in adapted.parameters() if values.requires_grad]
        assert len(trained) == 2 * len(weights)
        slope = torch.randn_like(expected)
        gradients = [torch.autograd.grad(y, trained, slope, materialize_grads=True) for y in (actual, expected)]
        for ours, theirs in zip(*gradients, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-9)


def test_starts_as_the_model_that_it_was(case):
    base, inputs, targets = case
    adapted = finetune.lora(copy.deepcopy(base), targets=targets).eval()
    torch.testing.assert_close(output(adapted, inputs), output(base.eval(), inputs), rtol=1e-9, atol=1e-10)


def test_torchs_fast_path_leaves_no_adapter_out():
    """Nor does its nested tensors' path: both would read the weights alone."""
    layer = torch.nn.TransformerEncoderLayer(E, H, F, 0.0, activation="gelu", batch_first=True)
    adapted = adapt(torch.nn.TransformerEncoder(layer, 2))
    x, padding = torch.randn(2, 5, E), torch.arange(5) >= torch.tensor([[5], [3]])
    for options in ({}, {"src_key_padding_mask": padding}):
        eager = adapted.train()(x, **options)
        truth = copy.deepcopy(adapted).double()(x.double(), **options)
        with torch.no_grad():
            actual = adapted.eval()(x, **options)
        assert_within_budget(actual=actual[~padding], eager=eager[~padding], truth=truth[~padding])


@pytest.mark.parametrize("norm_first", [False, True])
def test_kernels_that_run(needs_extension, norm_first):
    """Attention, GELU and layer norm stay on their kernels; what leaves a fusion are the layers with adapters."""
    adapted = adapt(fasttx.optimize(encoder(norm_first=norm_first))).eval()
    explanation = fasttx.explain(adapted, src=torch.randn(2, 5, E))
    norms = {"layer_norm_fwd", "add_layer_norm_fwd"} if norm_first else {"add_layer_norm_fwd"}
    assert {row.kernel for row in explanation.rows if row.kernel} == norms | {"self_attention_fwd", "gelu_fwd"}
    for row in explanation.slow:
        assert "LoraMultiheadAttention" in row.reason or "peft.tuners.lora.layer.Linear" in row.reason
    finetune.merge(adapted)
    merged = fasttx.explain(adapted, src=torch.randn(2, 5, E))
    assert not merged.slow
    assert {row.kernel for row in merged.rows} == {"attention_block_fwd", "feed_forward_block_fwd"}


def test_padding_is_removed_again_once_merged(needs_extension):
    """Layers with adapters see padded tokens, and the result is that of each row alone, zeros where there is none."""
    layer = nn.TransformerEncoderLayer(E, H, F, 0.0, activation="gelu", batch_first=True)
    adapted = adapt(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False, remove_padding=True)).eval()
    x, padding = torch.randn(2, 5, E), torch.arange(5) >= torch.tensor([[5], [3]])
    with torch.no_grad():
        rows = torch.stack([adapted(x[:1])[0], torch.nn.functional.pad(adapted(x[1:, :3])[0], (0, 0, 0, 2))])
        torch.testing.assert_close(adapted(x, src_key_padding_mask=padding), rows)
        truth = copy.deepcopy(adapted).double()(x.double(), src_key_padding_mask=padding)
        finetune.merge(adapted)
        eager = torch.nn.TransformerEncoder(
            torch.nn.TransformerEncoderLayer(E, H, F, 0.0, activation="gelu", batch_first=True), 2,
            enable_nested_tensor=False,
        ).eval()  # fmt: skip
        eager.load_state_dict(adapted.base_model.model.state_dict())
        merged = adapted(x, src_key_padding_mask=padding)
        assert not merged[padding].any()
        expected = eager(x, src_key_padding_mask=padding)
        assert_within_budget(actual=merged[~padding], eager=expected[~padding], truth=truth[~padding])
    explanation = fasttx.explain(adapted, x, src_key_padding_mask=padding)
    assert "attention_block_varlen" in {row.op for row in explanation.rows} and not explanation.slow


def test_adapters_of_bfloat16_weights():
    adapted = adapt(fasttx.optimize(encoder()).bfloat16())
    assert adapted(src=torch.randn(2, 5, E).bfloat16()).dtype == torch.bfloat16
    adapted = finetune.lora(fasttx.optimize(encoder()).bfloat16())  # peft keeps these in float32
    attention = adapted.base_model.model.layers[0].self_attn
    attention(*[torch.randn(2, 5, E).bfloat16()] * 3)[0].sum().backward()
    assert attention.lora_B["default"].weight.grad.dtype == torch.float32


@pytest.mark.parametrize("optimized", [False, True])
def test_merged_is_the_model_with_merged_weights(case, optimized):
    """Bit for bit, and no packed copy of a weight is an old one: not even where one row of it changes."""
    base, inputs, targets = case
    base, inputs = base.float().eval(), {k: x.float() if x.is_floating_point() else x for k, x in inputs.items()}
    model = fasttx.optimize(copy.deepcopy(base)) if optimized else copy.deepcopy(base)
    adapted = adapt(model, targets).eval()
    for name, values in adapted.named_parameters():
        if "lora_B" in name:
            values.data[1:] = 0
    before = {name: values.clone() for name, values in adapted.state_dict().items()}
    with torch.no_grad():
        with adapted.disable_adapter():
            output(adapted, inputs)  # packs the weights
        expected = output(adapted, inputs)
        wide = {k: x.double() if x.is_floating_point() else x for k, x in inputs.items()}
        truth = output(copy.deepcopy(adapted).double(), wide)
        assert finetune.merge(adapted) is adapted
        merged = output(adapted, inputs)
        fresh = copy.deepcopy(base)
        fresh.load_state_dict(adapted.base_model.model.state_dict())
        assert_within_budget(actual=merged, eager=output(fresh, inputs), truth=truth)
        fresh = fasttx.optimize(fresh) if optimized else fresh
        assert torch.equal(merged, output(fresh, inputs))
        finetune.unmerge(adapted)
        assert torch.equal(output(adapted, inputs), expected)
        after = adapted.state_dict()
        assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
        with adapted.disable_adapter():
            truth = output(copy.deepcopy(base).double(), wide)
            assert_within_budget(actual=output(adapted, inputs), eager=output(base, inputs), truth=truth)


def test_pefts_own_merge():
    """merge_adapter, unmerge_adapter and merge_and_unload of peft, on attention as well."""
    base, x = encoder().double().eval(), torch.randn(2, 5, E).double()
    adapted = adapt(fasttx.optimize(copy.deepcopy(base))).eval()
    with torch.no_grad(), pytest.warns(UserWarning, match="already"):  # peft visits an output projection twice
        expected = adapted(x)
        adapted.merge_adapter()
        torch.testing.assert_close(adapted(x), expected)
        adapted.unmerge_adapter()
        torch.testing.assert_close(adapted(x), expected)
        assert not any("lora_" in name for name, _ in adapted.merge_and_unload().named_parameters())
        torch.testing.assert_close(adapted.base_model.model(x), expected)


def test_training_changes_adapters_alone():
    base = fasttx.optimize(encoder())
    before = copy.deepcopy(base).state_dict()
    adapted = finetune.lora(base, rank=2, dropout=0.1)
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], 0.01)
    for _ in range(5):
        optimizer.zero_grad()
        adapted(torch.randn(2, 5, E)).square().mean().backward()
        optimizer.step()
    assert all(adapted.state_dict()[name].any() for name in adapted.state_dict() if "lora_B" in name)
    after = adapted.unload().state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


def test_models_of_fasttx():
    """Their loss and generation: with a cache once merged, and until then refused."""
    gpt = GPT(GPTConfig(vocab_size=20, width=E, layers=2, heads=H, max_positions=16))
    adapted = adapt(gpt)
    ids = torch.randint(20, (2, 6))
    loss = adapted.loss(ids[:, :-1], ids[:, 1:])
    loss.backward()
    assert {name for name, p in gpt.named_parameters() if p.grad is not None} == {
        name for name, _ in gpt.named_parameters() if "lora_" in name
    }
    finetune.merge(adapted.eval())
    with torch.no_grad():
        torch.testing.assert_close(adapted.loss(ids[:, :-1], ids[:, 1:]), loss)
        cache = nn.KVCache()
        steps = torch.cat([gpt(ids[:, :4], cache=cache), gpt(ids[:, 4:], cache=cache)], 1)
        torch.testing.assert_close(steps, gpt(ids))


def test_saved_and_loaded(case, tmp_path):
    base, inputs, targets = case
    adapted, path = adapt(copy.deepcopy(base), targets, rank=3, alpha=5).eval(), tmp_path / "adapter.safetensors"
    finetune.save_adapter(adapted, path)
    adapters = sum(p.numel() * p.element_size() for name, p in adapted.named_parameters() if "lora_" in name)
    assert path.stat().st_size < adapters + 20_000
    expected = output(adapted, inputs)
    loaded = finetune.load_adapter(copy.deepcopy(base), path).eval()
    again = finetune.load_adapter(adapt(copy.deepcopy(base), targets, rank=3, alpha=5), path).eval()
    for same in (loaded, again, copy.deepcopy(loaded)):
        same.double()
        assert torch.equal(output(same, inputs), expected)
    assert finetune.trainable(loaded) == finetune.trainable(adapted)


@pytest.mark.parametrize("targets", [None, ["linear1", "pooler"]])
def test_heads_are_trained_saved_and_restored(targets, tmp_path):
    """A file of adapters and head makes any model of the same encoder the one that it was saved of."""
    bert, ids, path = Bert(BERT), torch.randint(40, (3, 6)), tmp_path / "adapter.safetensors"
    new = functools.partial(BertForSequenceClassification.from_encoder, bert, labels=3)
    model = new()
    options = {"rank": 2, "targets": targets, "heads": ["classifier", "bert.pooler"]}
    adapted = finetune.lora(model, **options)
    names = {name for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name}
    pooler = "bert.pooler.base_layer" if targets else "bert.pooler"
    assert names == {f"{head}.{kind}" for head in ("classifier", pooler) for kind in ("weight", "bias")}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.01)
    for _ in range(3):
        optimizer.zero_grad()
        adapted.loss(ids, targets=torch.arange(3)).backward()
        optimizer.step()
    finetune.save_adapter(adapted, path)
    logits, other = model.eval()(ids), new()
    assert not torch.allclose(other.eval()(ids), logits, rtol=1e-4)
    loaded = finetune.load_adapter(other, path)
    assert torch.equal(loaded.eval()(ids), logits)
    assert finetune.trainable(loaded) == finetune.trainable(adapted)
    again = finetune.load_adapter(finetune.lora(new(), **options), path)
    assert torch.equal(again.eval()(ids), logits)
    wide = copy.deepcopy(loaded).double()
    truth = wide(ids)
    finetune.merge(wide)
    torch.testing.assert_close(wide(ids), truth)
    finetune.merge(loaded)
    assert_within_budget(actual=loaded(ids), eager=logits, truth=truth)
    finetune.unmerge(loaded)
    assert torch.equal(loaded(ids), logits)
    four = BertForSequenceClassification.from_encoder(bert, labels=4)
    before = {name: values.clone() for name, values in four.state_dict().items()}
    for wrong, match in ((four, "classifier.* is .3.* in the file, and .4"), (Bert(BERT), "no parameters classifier")):
        with pytest.raises(ModelFileError, match=match):
            finetune.load_adapter(wrong, path)
        assert all(p.requires_grad for p in wrong.parameters()) and "lora" not in str(wrong.state_dict().keys())
    assert all(torch.equal(values, before[name]) for name, values in four.state_dict().items())


def test_files_that_are_no_adapter_for_a_model(tmp_path):
    path = tmp_path / "adapter.safetensors"
    finetune.save_adapter(adapt(encoder(), ["linear1"]), path)
    whole = path.read_bytes()
    other = torch.nn.Sequential(encoder())
    wider = torch.nn.TransformerEncoderLayer(E, H, 2 * F, batch_first=True)
    with pytest.raises(ModelFileError, match="lora_B.weight is .32, 4. in the file, and .64, 4. in the model"):
        finetune.load_adapter(torch.nn.TransformerEncoder(wider, 2), path)
    assert all(p.requires_grad for p in wider.parameters())
    with pytest.raises(ModelFileError, match="missing"):
        finetune.load_adapter(other, path)
    assert not any("lora_" in name or not p.requires_grad for name, p in other.named_parameters())
    with pytest.raises(ModelFileError, match="missing"):
        finetune.load_adapter(adapt(encoder(), ["linear2"]), path)
    with pytest.raises(ModelFileError, match="no module linear1"):
        finetune.load_adapter(torch.nn.Linear(2, 2), path)
    path.write_bytes(whole[:-5])
    with pytest.raises(ModelFileError, match="no whole safetensors file"):
        finetune.load_adapter(encoder(), path)
    GPT(GPTConfig(vocab_size=20, width=E, layers=1, heads=H)).save(path)
    with pytest.raises(ModelFileError, match="holds no adapter"):
        finetune.load_adapter(encoder(), path)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: finetune.lora(encoder(), rank=0), ValueError, "rank must be at least 1"),
        (lambda: finetune.lora(encoder(), dropout=1.0), ValueError, "dropout must be in"),
        (lambda: finetune.lora(encoder(), rank=1.5), TypeError, "rank must be an integer"),
        (lambda: finetune.lora(encoder(), alpha=0), ValueError, "alpha must be positive"),
        (lambda: finetune.lora(encoder(), alpha=float("nan")), ValueError, "alpha must be positive"),
        (lambda: finetune.lora(encoder(), targets=[]), ValueError, "targets are none"),
        (lambda: finetune.lora(encoder(), targets=["query"]), ValueError, "no module query"),
        (lambda: finetune.lora(encoder(), targets=["out_proj"]), ValueError, "target the attention itself"),
        (lambda: finetune.lora(torch.nn.Linear(2, 2)), ValueError, "say what the targets are"),
        (lambda: finetune.lora(finetune.lora(encoder())), TypeError, "has adapters already"),
        (lambda: finetune.lora(finetune.lora(encoder()).base_model.model), TypeError, "has adapters already"),
        (lambda: finetune.lora(encoder(), heads=["classifier"]), ValueError, "no parameters classifier"),
        (lambda: finetune.merge(encoder()), TypeError, "has no adapters"),
        (lambda: finetune.merge(finetune.merge(finetune.lora(encoder()))), ValueError, "are merged"),
        (lambda: finetune.unmerge(finetune.lora(encoder())), ValueError, "no merged adapters"),
        (lambda: finetune.save_adapter(encoder(), "adapter"), TypeError, "has no adapters"),
        (lambda: finetune.save_adapter(finetune.merge(finetune.lora(encoder())), "a"), ValueError, "are merged"),
        (lambda: finetune.bitfit(encoder(), heads=["classifier"]), ValueError, "no parameters classifier"),
        (lambda: finetune.bitfit(encoder(), heads="classifier"), ValueError, "no parameters classifier"),
        (lambda: finetune.bitfit(torch.nn.Linear(2, 2, bias=False)), ValueError, "no parameter that is called a bias"),
    ],
)
def test_refuses(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_survives_pickle():
    adapted, x = adapt(fasttx.optimize(encoder())), torch.randn(2, 5, E)
    assert torch.equal(pickle.loads(pickle.dumps(adapted))(x), adapted(x))


def test_counts():
    model = torch.nn.Sequential(torch.nn.Linear(10, 10), torch.nn.Linear(10, 10, bias=False))
    model[1].weight = model[0].weight
    assert finetune.trainable(model) == finetune.Counts(110, 110)
    assert str(finetune.bitfit(model)) == "10 of 110 parameters are trained (9.09%)"


BERT = BertConfig(vocab_size=40, width=E, layers=2, heads=H, max_positions=16, dropout=0.0)


@pytest.mark.parametrize("heads", [(), ("pooler",)])
def test_bitfit_changes_biases_alone(heads):
    model = Bert(BERT)
    counts = finetune.bitfit(model, heads=heads)
    wanted = {name for name, _ in model.named_parameters() if name.endswith("bias") or name.startswith(heads or "-")}
    assert counts.trainable == sum(p.numel() for name, p in model.named_parameters() if name in wanted)
    before = {name: values.clone() for name, values in model.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.01, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model.pooled(model(torch.randint(40, (2, 6)))).square().sum().backward()
        optimizer.step()
    changed = {name for name, values in model.state_dict().items() if not torch.equal(values, before[name])}
    assert changed == wanted


def test_a_head_is_trained_as_a_whole_where_its_weight_is_tied():
    for adapt_ in (finetune.bitfit, finetune.lora):
        model = BertForPretraining(BERT)
        adapt_(model, heads=["decoder"])
        assert model.decoder.weight.requires_grad and model.decoder.bias.requires_grad
        assert not model.transform.weight.requires_grad


def test_bitfit_computes_no_gradient_of_a_weight(needs_extension, monkeypatch):
    """Every backward of an encoder, a decoder and a tied head: what they are asked for, by their schemas' names."""
    asked = {}

    class Recorder:
        def __init__(self, op):
            self.op = op
            self.names = [argument.name for argument in op.registered._schema.arguments]

        def __call__(self, *arguments):
            named = zip(self.names, arguments, strict=False)
            needs = {name for name, value in named if name.startswith("needs_") and value}
            asked.setdefault(self.op.name, set()).update(needs)
            return self.op(*arguments)

    places = {
        "attention_block": ["attention_block_bwd"],
        "feed_forward_block": ["feed_forward_block_bwd"],
        "feed_forward": ["feed_forward_bwd"],
        "self_attention": ["self_attention_bwd"],
        "cross_attention": ["linear_bwd"],
        "linear": ["linear_bwd"],
        "layer_norm": ["layer_norm_bwd", "add_layer_norm_bwd"],
        "embedding": ["embedding_bwd"],
        "cross_entropy": ["linear_cross_entropy_bwd"],
    }
    for stem, names in places.items():
        module = import_module(f"fasttx.ops.{stem}")
        for name in names:
            monkeypatch.setattr(module, name, Recorder(getattr(module, name)))
    embedding = nn.TransformerEmbedding(20, E, 8, 2)
    head = nn.LinearCrossEntropy(E, 20)
    head.weight = embedding.token_weight
    ids = torch.randint(20, (2, 6))
    for norm_first in (False, True):
        model = torch.nn.ModuleDict(
            {"embedding": embedding, "encoder": encoder(norm_first=norm_first), "decoder": decoder(), "head": head}
        )
        fasttx.optimize(model)
        finetune.bitfit(model)
        x = model["encoder"](embedding(ids))
        head(model["decoder"](x, x), ids).backward()
        assert all((p.grad is not None) == name.endswith("bias") for name, p in model.named_parameters())
    assert asked.keys() >= {
        "attention_block_bwd", "feed_forward_block_bwd", "feed_forward_bwd", "self_attention_bwd", "linear_bwd",
        "layer_norm_bwd", "add_layer_norm_bwd", "embedding_bwd", "linear_cross_entropy_bwd",
    }  # fmt: skip
    needs = set().union(*asked.values())
    assert any("bias" in name for name in needs)
    assert not any("weight" in name or name in ("needs_token", "needs_position", "needs_segment") for name in needs)
