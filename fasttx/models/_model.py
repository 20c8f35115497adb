"""What every architecture has: a config that makes it, and one safetensors file that holds both."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from fasttx import checks
from fasttx._optional import import_optional

from ._config import Config

_M = TypeVar("_M", bound="Model")

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class ModelFileError(ValueError):
    """A file that does not hold the model that was asked for: another architecture's, a truncated one, or none."""


class TokenizerMismatchError(ValueError):
    """A model met another tokenizer than the one that it was trained with."""


class Model(torch.nn.Module):
    """An architecture made by its config: Model(config).

    `tokenizers` maps the name of each of its texts ("text", or "source" and "target") to the fingerprint of the
    tokenizer that it was trained with; `bind` sets it, and `save` and `load` keep it.
    """

    Config: ClassVar[type[Config]]

    def __init__(self, config: Config) -> None:
        super().__init__()
        if not isinstance(config, self.Config):
            raise TypeError(f"{type(self).__name__} is made by a {self.Config.__name__}, got {type(config).__name__}")
        self.config = config
        self.tokenizers: dict[str, str] = {}

    def bind(self, **tokenizers: Any) -> None:
        """From now on these tokenizers, and no others, are the model's: bind(text=tokenizer)."""
        self.tokenizers |= {name: tokenizer.fingerprint for name, tokenizer in tokenizers.items()}

    def require_tokenizers(self, **tokenizers: Any) -> None:
        """Raises TokenizerMismatchError unless each is the one that the model was bound to."""
        for name, tokenizer in tokenizers.items():
            bound = self.tokenizers.get(name)
            if bound is None:
                raise TokenizerMismatchError(
                    f"this {type(self).__name__} was bound to no {name} tokenizer: model.bind({name}=tokenizer) with "
                    "the one that it was trained with"
                )
            if bound != tokenizer.fingerprint:
                raise TokenizerMismatchError(
                    f"this {type(self).__name__} was trained with the {name} tokenizer {bound}, and this is "
                    f"{tokenizer.fingerprint}: load the one that was saved beside the model"
                )

    def save(self, path: str | os.PathLike) -> None:
        """Weights, config and fingerprints as one safetensors file, which replaces `path` only once it is whole.

        Raises ValueError for a model that is no longer the one its config makes, whose file would not load: with
        adapters around its layers, which are to be merged before, or with weights of other shapes.
        """
        weights = self._weights_of_file()
        what = {"architecture": type(self).__name__, "config": self.config.to_dict(), "tokenizers": self.tokenizers}
        # One entry: safetensors writes several in any order, and equal models are to make equal files.
        metadata = {"fasttx": json.dumps(what)}
        data = import_optional("safetensors.torch", "models").save(weights, metadata)
        write_atomically(path, data)

    @classmethod
    def load(cls: type[_M], path: str | os.PathLike) -> _M:
        """The model that `save` wrote, on the CPU, in the dtypes that it had, in training mode as any new module.

        Raises FileNotFoundError, or ModelFileError for a file of another architecture, a truncated one, and one whose
        weights do not fit its config.
        """
        state, metadata = read_safetensors(path)
        if "fasttx" not in metadata:
            raise ModelFileError(f"{path} holds weights without their architecture: it is none of Model.save's")
        with making(cls, path):
            what = json.loads(metadata["fasttx"])
            made_by = what["architecture"]
            if made_by == cls.__name__:
                model = cls(cls.Config.from_dict(what["config"]))
                model.tokenizers = dict(what["tokenizers"])
        if made_by != cls.__name__:
            raise ModelFileError(f"{path} holds a {made_by}, not a {cls.__name__}")
        model.load_weights(state, str(path))
        return model

    def _weights_of_file(self) -> dict[str, Tensor]:
        """What `save` writes: each weight that the config makes, by its first name.

        Raises ValueError unless there are those alone, in their shapes, and one where the config makes one.
        """
        kind, own = type(self).__name__, self.state_dict()
        if any(".base_layer." in name for name in own):
            raise ValueError(f"this {kind} has adapters: fasttx.finetune.merge them before it is saved")
        made = self._made_anew()
        shapes, wanted = ({name: value.shape for name, value in state.items()} for state in (own, made.state_dict()))
        differ = [name for name in wanted | shapes if wanted.get(name) != shapes.get(name)]
        if differ:
            raise ValueError(f"this {kind} is not what its config makes, and its file would not load: {_few(differ)}")
        tied = {name: first for (first, *others), _ in _aliases(self) for name in others}
        weights = {}
        for (first, *others), _ in _aliases(made):
            for name in others:
                if tied.get(name, name) != tied.get(first, first) and not torch.equal(own[name], own[first]):
                    raise ValueError(f"{first} and {name} are one weight in a {kind}, and differ here: tie them again")
            values = own[first].detach().contiguous()
            weights[first] = values.clone() if first in tied else values  # in a file no two share their memory
        return weights

    def _made_anew(self: _M) -> _M:
        """What the config makes, on "meta" if it can be made without its values."""

        def made(device: str) -> _M:
            with torch.device(device), torch.random.fork_rng(devices=()):
                return type(self)(self.config)

        try:
            return made("meta")
        except TypeError as error:
            raise ValueError(f"a {type(self).__name__} is not made by its config alone: {error}") from error
        except RuntimeError:
            return made("cpu")

    def load_weights(self, state: dict[str, Tensor], source: str) -> None:
        """Takes every weight from `state`, in its dtype. All or nothing: raises ModelFileError where one does not fit.

        Of weights that are one tensor under several names, one name is enough, and several must be equal. source: what
        messages call it.
        """
        own = self.state_dict()
        names_of = {name: names for names, _ in _aliases(self) for name in names}
        missing = [name for name in own if not any(alias in state for alias in names_of[name])]
        unknown = sorted(state.keys() - own.keys())
        if missing or unknown:
            raise ModelFileError(
                f"{source} does not fit this {type(self).__name__}: it lacks {_few(missing)} and has {_few(unknown)} "
                "that the model has not"
            )
        for name, tensor in state.items():
            if tensor.shape != own[name].shape:
                raise ModelFileError(
                    f"{source}: {name} is {checks.shape(tensor)}, and this {type(self).__name__} has "
                    f"{checks.shape(own[name])}"
                )
            if tensor.dtype not in _DTYPES and tensor.dtype != own[name].dtype:
                raise ModelFileError(f"{source}: {name} is {tensor.dtype}, and no model calculates in that")
            first = next(alias for alias in names_of[name] if alias in state)
            if first != name and not torch.equal(tensor, state[first]):
                raise ModelFileError(f"{source}: {first} and {name} differ, and are one in this {type(self).__name__}")
        dtypes = {tensor.dtype for tensor in state.values() if tensor.is_floating_point()}
        if len(dtypes) == 1:
            self.to(dtypes.pop())
        else:
            for name, values in self.named_parameters(remove_duplicate=False):
                if name in state:
                    values.data = values.data.to(state[name].dtype)
        self.load_state_dict(state, strict=False)


@contextlib.contextmanager
def making(kind: type[Model], source: str | os.PathLike) -> Iterator[None]:
    """What goes wrong while a file's config is read becomes a ModelFileError.

    Torch's generator is afterwards as it was: the weights that are drawn are those of the file in the end.
    """
    try:
        with torch.device("cpu"), torch.random.fork_rng(devices=()):
            yield
    except (KeyError, TypeError, ValueError, RuntimeError) as error:  # RuntimeError: no memory for such sizes
        what = f"it lacks {error}" if isinstance(error, KeyError) else error
        raise ModelFileError(f"{source}: its config makes no {kind.__name__}: {what}") from error


def read_safetensors(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file; ModelFileError where it is none, or truncated."""
    safetensors = import_optional("safetensors", "models")
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with safetensors.safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except safetensors.SafetensorError as error:
        raise ModelFileError(f"{path} is no whole safetensors file: {error}") from error


def write_atomically(path: str | os.PathLike, data: bytes) -> None:
    """Puts `data` at `path`: at any moment there is the old file or the new one, whole and on the disk.

    Of a symbolic link, the file that it points to is replaced. What a write that was killed leaves behind has one name,
    and the next write takes its place; so a file has one writer at a time.
    """
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    temporary.unlink(missing_ok=True)
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def require_token_ids(name: str, token_ids: object) -> None:
    """Raises unless it is (sequences, tokens) in int64 or int32, with at least one of each."""
    checks.require_tensor(name, token_ids)
    if token_ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name} must be int64 or int32, got {token_ids.dtype}")
    if token_ids.dim() != 2:
        raise ValueError(f"{name} must be (sequences, tokens), got the shape {checks.shape(token_ids)}")
    if token_ids.numel() == 0:
        raise ValueError(f"{name} is an empty batch: {checks.shape(token_ids)}")


def require_length(name: str, length: int, positions: int) -> None:
    """Raises for a sequence longer than the positions that the model has."""
    if length > positions:
        raise ValueError(f"{name} has {length} tokens, and the model has positions for {positions}: shorten it")


def _aliases(model: torch.nn.Module) -> list[tuple[list[str], Tensor]]:
    """Each of its weights, with the names of its state_dict that it has."""
    found: dict[Any, tuple[list[str], Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        # One that lies nowhere, empty or on "meta", is only itself.
        place = (tensor.data_ptr(), tensor.shape, tensor.stride()) if tensor.data_ptr() else id(tensor)
        found.setdefault(place, ([], tensor))[0].append(name)
    return list(found.values())


def _few(names: list[str]) -> str:
    if not names:
        return "nothing"
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
