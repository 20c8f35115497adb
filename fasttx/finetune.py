"""Fine-tuning a part of a model: LoRA adapters, which peft makes, and BitFit, which trains biases alone."""

import contextlib
import dataclasses
import json
import math
import re
from collections.abc import Iterable, Iterator
from os import PathLike
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.nn import Module

from fasttx import checks
from fasttx._heads import head_state, require_heads, train_heads
from fasttx._optional import import_optional
from fasttx.models._model import ModelFileError, read_safetensors, write_atomically

# The layers that adapters go around by default, by the names that torch.nn's and fasttx.nn's layers have for them.
TARGETS = ("self_attn", "multihead_attn", "linear1", "linear2")
_KIND = "fasttx LoRA adapter"
# What sends torch's encoders past their layers, and its value where it does not.
_FAST_PATH = {
    torch.nn.TransformerEncoder: ("use_nested_tensor", False),
    torch.nn.TransformerEncoderLayer: ("activation_relu_or_gelu", 0),  # as for any other activation
}
# Options of peft's that `lora` has too, or that change neither what adapters compute nor what they are around.
_KEPT = {
    "auto_mapping", "base_model_name_or_path", "fan_in_fan_out", "inference_mode", "init_lora_weights", "lora_alpha",
    "lora_dropout", "peft_type", "peft_version", "r", "revision", "runtime_config", "target_modules", "task_type",
}  # fmt: skip
_DRAWN = (True, False, "gaussian", "orthogonal")  # init_lora_weights that leave the base weights alone


@dataclasses.dataclass(frozen=True)
class Counts:
    """How many of a model's parameters are trained."""

    trainable: int
    total: int

    def __str__(self) -> str:
        share = self.trainable / max(self.total, 1)
        return f"{self.trainable:,} of {self.total:,} parameters are trained ({share:.2%})"


def trainable(model: Module) -> Counts:
    """Counts values; a tensor under several names counts once."""
    parameters = list(model.parameters())
    wanted = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    return Counts(wanted, sum(parameter.numel() for parameter in parameters))


def bitfit(model: Module, *, heads: str | Iterable[str] = ()) -> Counts:
    """From now on only biases are trained: Ben Zaken et al., BitFit (2022). Returns how many.

    heads: names of modules or parameters that are trained as a whole beside them. Raises ValueError for a name that the
    model does not have, and a model without biases.
    """
    heads = require_heads(model, heads)
    is_bias = re.compile(r".*bias|bias_.*")  # in_proj_bias, bias_k and bias_ih_l0 among them
    biases = [values for name, values in model.named_parameters() if is_bias.fullmatch(name.rpartition(".")[2])]
    if not biases:
        raise ValueError("the model has no parameter that is called a bias")
    model.requires_grad_(False)
    for parameter in biases:
        parameter.requires_grad_(True)
    train_heads(model, heads)
    return trainable(model)


def lora(
    model: Module, *, rank: int = 8, alpha: float = 16, dropout: float = 0.0, targets: Iterable[str] | None = None,
    heads: str | Iterable[str] = (),
) -> Module:  # fmt: skip
    """The model as a peft.PeftModel, in place: weights frozen, with low-rank changes to them that are trained.

    Hu et al., LoRA (2021): beside a weight W of the targets acts (alpha / rank) B A, with B zero at first. For models
    of torch.nn's, fasttx.nn's and Hugging Face's layers, before or after fasttx.optimize.
    dropout: of the adapters' inputs, but not of those around attention. targets: what names of modules end in; None for
    those of TARGETS that the model has, or what peft knows for Hugging Face's models. heads: as `bitfit`'s; they are
    saved with the adapters. Raises ValueError for targets and heads that the model does not have, and leaves the model
    as it is.
    """
    peft = import_optional("peft", "lora")
    from fasttx._lora_attention import LoraMultiheadAttention

    if isinstance(model, peft.PeftModel) or any(_adapter_layers(model)):
        raise TypeError("this model has adapters already: go on with them, or unload() them")
    checks.require_size("rank", rank)
    checks.require_probability("dropout", dropout)
    if not 0 < alpha < math.inf:
        raise ValueError(f"alpha must be positive and finite, got {alpha}")
    targets = _own_targets(model) if targets is None else _require_targets(model, targets)
    heads = require_heads(model, heads)
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets)
    config._register_custom_module({torch.nn.MultiheadAttention: LoraMultiheadAttention})
    with _as_it_was(model):
        try:
            adapted = peft.get_peft_model(model, config)
        except ValueError as error:
            if targets is not None:
                raise
            known = ", ".join(TARGETS)
            raise ValueError(f"this {type(model).__name__} has no {known}: say what the targets are") from error
    for _, _, layer in _adapter_layers(model):
        layer.train(layer.get_base_layer().training)
    adapted.training = adapted.base_model.training = model.training
    _leave_fast_path(model)
    train_heads(model, heads)
    adapted._trained_heads = heads
    return adapted


def merge(model: Module) -> Module:
    """Adds the adapters' changes to the weights, and takes the adapters out of the way: as fast as without them.

    What runs then is bit for bit the model with the merged weights. model: `lora`'s; it is changed in place, and
    returned. `unmerge` takes it back, and with it all that was done to these weights in between. Raises ValueError
    where an adapted weight is also another layer's, which it would change too.
    """
    _require_adapters(model)
    _require_mergeable(model)
    merged = []
    for parent, name, layer in list(_adapter_layers(model)):
        base = layer.get_base_layer()
        before = [(weight, weight.detach().clone()) for weight in base.parameters(recurse=False)]
        merged.append((parent, name, layer, before))
    for parent, name, layer, before in merged:
        if not layer.merged:  # attention's output projection was merged by the attention
            layer.merge()
        increment_version([weight for weight, _ in before])  # peft's edit is not one that packed copies see
        setattr(parent, name, layer.get_base_layer())
    _return_to_fast_path(model)
    model._merged_layers = merged
    return model


def unmerge(model: Module) -> Module:
    """Takes `merge` back, in place: the adapters act again, and the weights are bit for bit those of before."""
    merged = getattr(model, "_merged_layers", None)
    if not merged:
        raise ValueError("this model has no merged adapters")
    for parent, name, layer, _ in merged:
        setattr(parent, name, layer)
    for _, _, layer, before in merged:
        if layer.merged:
            layer.unmerge()
        with torch.no_grad():
            for weight, values in before:
                weight.copy_(values)
    model._merged_layers = []
    _leave_fast_path(model)
    return model


def save_adapter(model: Module, path: str | PathLike) -> None:
    """The adapters and heads alone, and the options that made them, as one safetensors file, put there whole.

    Of several adapters, the active one. Raises ValueError for options of peft's that `lora` has not.
    """
    peft = import_optional("peft", "lora")
    _require_adapters(model)
    options = _options(model)
    state = {name: values.clone(memory_format=torch.contiguous_format) for name, values in _state(peft, model).items()}
    metadata = {"kind": _KIND, "options": json.dumps(options)}
    write_atomically(path, import_optional("safetensors.torch", "models").save(state, metadata))


def load_adapter(model: Module, path: str | PathLike) -> Module:
    """The model with what `save_adapter` wrote: one without adapters, or of `lora` with the same options but dropout.

    Raises ModelFileError, and leaves the model as it is, for a file that holds no adapters or those of another
    architecture.
    """
    peft = import_optional("peft", "lora")
    state, metadata = read_safetensors(path)
    if metadata.get("kind") != _KIND:
        raise ModelFileError(f"{path} holds no adapter")
    is_new = not isinstance(model, peft.PeftModel)
    adapted = model
    with _as_it_was(model) if is_new else contextlib.nullcontext():
        try:
            options = json.loads(metadata["options"])
            if is_new:
                adapted = lora(model, **options)
            else:
                _require_adapters(model)
            alpha = _options(adapted)["alpha"]
            wrong = _difference(_state(peft, adapted), state)
            if options["alpha"] != alpha:
                wrong = f"alpha is {options['alpha']} in the file, and {alpha} in the model"
        except (KeyError, TypeError, ValueError) as error:
            raise ModelFileError(f"{path}: its adapters do not go around this model's layers: {error}") from error
        if wrong:
            raise ModelFileError(f"{path} is another architecture's adapter: {wrong}")
    with torch.no_grad():
        for name, values in head_state(adapted.base_model.model, _heads(adapted)).items():
            values.copy_(state.pop(name))
    peft.set_peft_model_state_dict(adapted, state, adapter_name=adapted.active_adapter)
    return adapted


@contextlib.contextmanager
def _as_it_was(model: Module) -> Iterator[None]:
    """Where what goes on within fails, takes out what adapters the model has got."""
    needed_grad = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    config = vars(model).get("peft_config")
    try:
        yield
    except Exception:
        for parent, name, layer in list(_adapter_layers(model)):
            setattr(parent, name, layer.get_base_layer())
        vars(model).pop("peft_config", None)
        if config is not None:
            model.peft_config = config
        _return_to_fast_path(model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(needed_grad[name])
        raise


def _leave_fast_path(model: Module) -> None:
    """Torch's encoders, in inference, read their layers' weights past the adapters: from now on they do not.

    Subclasses too: a user's goes that way as well, and fasttx's become torch's again by fasttx.restore.
    """
    for module in model.modules():
        for kind, (name, value) in _FAST_PATH.items():
            if isinstance(module, kind):
                vars(module).setdefault("_before_lora", getattr(module, name, value))
                setattr(module, name, value)


def _return_to_fast_path(model: Module) -> None:
    for module in model.modules():
        for kind, (name, _) in _FAST_PATH.items():
            if isinstance(module, kind) and "_before_lora" in vars(module):
                setattr(module, name, vars(module).pop("_before_lora"))


def _own_targets(model: Module) -> list[str] | None:
    kinds = (torch.nn.MultiheadAttention, torch.nn.Linear)
    names = {path.rpartition(".")[2] for path, module in model.named_modules() if isinstance(module, kinds)}
    return [name for name in TARGETS if name in names] or None


def _require_targets(model: Module, targets: Iterable[str]) -> list[str]:
    """The targets, if each is a module's name or the end of one."""
    targets = [targets] if isinstance(targets, str) else list(targets)
    modules = dict(model.named_modules())
    for target in targets:
        found = [path for path in modules if path == target or path.endswith(f".{target}")]
        if not found:
            raise ValueError(f"the model has no module {target}")
        for path in found:
            parent = modules[path.rpartition(".")[0]]
            if isinstance(parent, torch.nn.MultiheadAttention):
                raise ValueError(f"{path} is read by its attention, and never called: target the attention itself")
    if not targets:
        raise ValueError("targets are none")
    return targets


def _heads(model: Module) -> list[str]:
    return getattr(model, "_trained_heads", [])  # peft's own models have none


def _require_adapters(model: Module) -> None:
    if not isinstance(model, import_optional("peft", "lora").PeftModel):
        raise TypeError(f"this {type(model).__name__} has no adapters: make it by fasttx.finetune.lora")
    if getattr(model, "_merged_layers", None):
        raise ValueError("the adapters are merged: unmerge(model) first")


def _require_mergeable(model: Module) -> None:
    layers = list(_adapter_layers(model))
    if not layers:
        raise ValueError(f"this {type(model).__name__} has no LoRA adapters")
    if any(config.use_dora for config in model.peft_config.values()):
        raise ValueError("adapters with use_dora change more than is merged here: use peft's merge_and_unload")
    if any(layer.merged for _, _, layer in layers):
        raise ValueError("peft's merge_adapter has merged the adapters: unmerge_adapter() first")
    # By weight, its name in each layer that has it: one with adapters, or at a path without them.
    owners: dict[int, dict[object, str]] = {}
    for _, _, layer in layers:
        owners |= {id(weight): {} for weight in layer.get_base_layer().parameters(recurse=False)}
    for path, module in model.named_modules(remove_duplicate=False):
        own = path.removeprefix("base_model.model.").replace(".base_layer", "")
        for name, weight in module._parameters.items():
            if id(weight) in owners:
                owners[id(weight)][module if path.endswith(".base_layer") else path] = f"{own}.{name}"
    for names in owners.values():
        if len(names) > 1:
            raise ValueError(f"{' and '.join(sorted(names.values()))} are one weight: merging would change both")


def _options(model: Module) -> dict[str, Any]:
    """Those of `lora` that made the active adapter; ValueError where it has others of peft's."""
    peft, config = import_optional("peft", "lora"), model.peft_config[model.active_adapter]
    if not isinstance(config, peft.LoraConfig):
        raise ValueError(f"adapters of a {type(config).__name__} are not LoRA's: use peft's save_pretrained")
    usual, given = peft.LoraConfig().to_dict(), config.to_dict()
    others = sorted(name for name in given.keys() - _KEPT if given[name] != usual.get(name))
    if config.init_lora_weights not in _DRAWN:
        others.append(f"init_lora_weights {config.init_lora_weights}")
    if isinstance(config.target_modules, str):
        others.append("target_modules as a pattern")
    if others:
        raise ValueError(f"adapters with {', '.join(others)} are for peft's own save_pretrained and from_pretrained")
    paths = [f".{path}" for path, _ in model.named_modules()]
    found = sorted(name for name in config.target_modules if any(path.endswith(f".{name}") for path in paths))
    return {
        "rank": config.r, "alpha": config.lora_alpha, "dropout": config.lora_dropout, "targets": found,
        "heads": _heads(model),
    }  # fmt: skip


def _adapter_layers(model: Module) -> Iterator[tuple[Module, str, Any]]:
    """Parent, name and module of each layer with adapters, outer ones first."""
    layers = import_optional("peft.tuners.lora.layer", "lora")
    modules = dict(model.named_modules())
    for path, module in modules.items():
        if isinstance(module, layers.LoraLayer):
            parent, _, name = path.rpartition(".")
            yield modules[parent], name, module


def _state(peft: Any, model: Module) -> dict[str, Tensor]:
    """What a file of the model's adapters has."""
    name = model.active_adapter
    adapters = peft.get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    heads = head_state(model.base_model.model, _heads(model))
    return adapters | {name: values.detach() for name, values in heads.items()}


def _difference(own: dict[str, Tensor], theirs: dict[str, Tensor]) -> str | None:
    """What first tells two sets of named tensors apart in name or shape, in words."""
    for name in sorted(own.keys() | theirs.keys()):
        of_theirs, of_own = (checks.shape(tensors[name]) if name in tensors else "missing" for tensors in (theirs, own))
        if of_theirs != of_own:
            return f"{name} is {of_theirs} in the file, and {of_own} in the model"
    return None
