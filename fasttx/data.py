"""Batches for training: padding, targets, masks, pairs of sentences, buckets of like lengths, windows of a stream.

Targets are -100 where there is nothing to predict. Every random choice is the generator's: from the same state it
makes the same batches.
"""

import dataclasses
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Generator, Tensor

from fasttx import checks
from fasttx.models._layers import IGNORED, require_padding

Sentence = Sequence[int]


@dataclasses.dataclass(frozen=True)
class SentencePair:
    """Token ids of two texts; is_next: whether the second follows the first, or comes from another document."""

    first: list[int]
    second: list[int]
    is_next: bool


@dataclasses.dataclass(frozen=True)
class PretrainingBatch:
    """What BERT is trained on: (B, T) int64, padding bool; nsp_targets (B,) int64, 0 where the second text follows."""

    token_ids: Tensor
    segment_ids: Tensor
    padding: Tensor
    mlm_targets: Tensor
    nsp_targets: Tensor


def pad(sequences: Sequence[Sequence[int]], pad_id: int, side: str = "right") -> tuple[Tensor, Tensor]:
    """(ids (B, T) int64, padding (B, T) bool, True where a sequence has no token), T being the longest one's length.

    side: where the padding goes, "right" or "left". Raises ValueError where there is no token at all.
    """
    if side not in ("right", "left"):
        raise ValueError(f'side must be "right" or "left", got {side!r}')
    length = max(map(len, sequences), default=0)
    if length == 0:
        raise ValueError(f"there is nothing to pad: {len(sequences)} sequences, all of them empty")
    ids = torch.full((len(sequences), length), pad_id)
    padding = torch.ones(len(sequences), length, dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        place = slice(0, len(sequence)) if side == "right" else slice(length - len(sequence), length)
        ids[row, place] = torch.tensor(_integers(sequence), dtype=torch.int64)
        padding[row, place] = False
    return ids, padding


def shift(token_ids: Tensor, padding: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(inputs, targets), (B, T - 1) each: at every place the token that comes next is to be predicted.

    token_ids: (B, T). padding: (B, T) bool, True where there is no token; nothing is predicted there, nor from there.
    """
    if token_ids.dim() != 2 or token_ids.shape[0] == 0 or token_ids.shape[1] < 2:
        raise ValueError(f"token_ids must be (sequences, two tokens or more), got the shape {tuple(token_ids.shape)}")
    require_padding(padding, token_ids)
    inputs, targets = token_ids[:, :-1], token_ids[:, 1:]
    if padding is not None:
        targets = targets.masked_fill(padding[:, 1:] | padding[:, :-1], IGNORED)
    return inputs, targets


def mask_tokens(
    token_ids: Tensor, tokenizer: Any, *, generator: Generator, probability: float = 0.15
) -> tuple[Tensor, Tensor]:
    """(inputs, targets) of a masked language model, int64 of token_ids' shape: Devlin et al., BERT (2019), section 3.1.

    Each token is chosen with `probability`, and one at least; special tokens, padding among them, never are. Of those
    chosen 80 % become [MASK], 10 % any ordinary id, and 10 % stay. targets: the chosen tokens.
    tokenizer: a fasttx.text.Tokenizer, or what has its mask_id, special_ids and len. Raises TypeError for token_ids
    that are no integers, ValueError for those that are none of its ids, and where there is nothing to mask.
    """
    checks.require_integers("token_ids", token_ids)
    checks.require_below("token_ids", token_ids, len(tokenizer))
    if not 0 < probability <= 1:
        raise ValueError(f"probability must be above 0 and at most 1, got {probability}")
    if tokenizer.mask_id is None:
        raise ValueError("this tokenizer has no [MASK]")
    token_ids = token_ids.long()
    special = torch.tensor(tokenizer.special_ids, dtype=torch.int64)
    ordinary_ids = torch.ones(len(tokenizer), dtype=torch.bool).index_fill_(0, special, False).nonzero().flatten()
    ordinary = ~torch.isin(token_ids, special)
    if not ordinary.any():
        raise ValueError("token_ids has no ordinary token to mask")
    chance, kind = torch.rand(2, *token_ids.shape, generator=generator)
    chosen = ordinary & (chance <= chance[ordinary].min().clamp(min=probability))
    random = ordinary_ids[torch.randint(len(ordinary_ids), token_ids.shape, generator=generator)]
    replaced = torch.where(kind < 0.8, tokenizer.mask_id, torch.where(kind < 0.9, random, token_ids))
    return torch.where(chosen, replaced, token_ids), token_ids.masked_fill(~chosen, IGNORED)


def shorten_pair(first: Sentence, second: Sentence, room: int) -> tuple[list[int], list[int]]:
    """Two texts cut at their ends to `room` tokens together: the longer one first, the second of two as long."""
    kept = min(len(first), max(room - len(second), (room + 1) // 2))
    return list(first[:kept]), list(second[: room - kept])


def next_sentence_pairs(
    documents: Sequence[Sequence[Sentence]], *, max_length: int, generator: Generator
) -> list[SentencePair]:
    """Every document in pairs of successive passages; by a fair coin the second is one of another document instead.

    documents: two or more, each a list of sentences, which are lists of token ids. max_length: of a pair with its [CLS]
    and two [SEP]. As BERT's are made (Devlin et al., 2019, appendix A.2), but that a passage of one sentence, which has
    no next one, is no first text: so the coin is fair.
    """
    if len(documents) < 2 or not all(document and all(document) for document in documents):
        raise ValueError(f"got {len(documents)} documents: two or more are needed, none of them, nor a sentence, empty")
    room = max_length - 3
    if room < 2:
        raise ValueError(f"max_length must be at least 5: three special tokens and one of each text, got {max_length}")

    def draw(below: int) -> int:
        return int(torch.randint(below, (), generator=generator))

    pairs = []
    for number, document in enumerate(documents):
        start = 0
        while start + 1 < len(document):
            end = max(start + 2, _passage_end(document, start, room))
            middle = start + 1 + draw(end - start - 1)
            first = sum(map(list, document[start:middle]), [])
            is_next = bool(draw(2))
            if is_next:
                second = document[middle:end]
            else:
                other = documents[(number + 1 + draw(len(documents) - 1)) % len(documents)]
                begin = draw(len(other))
                second, end = other[begin : _passage_end(other, begin, room - len(first))], middle
            pairs.append(SentencePair(*shorten_pair(first, sum(map(list, second), []), room), is_next))
            start = end
    if not pairs:
        raise ValueError("no document has two sentences")
    return pairs


def pretraining_batch(
    pairs: Sequence[SentencePair], tokenizer: Any, *, generator: Generator, probability: float = 0.15
) -> PretrainingBatch:
    """Pairs as [CLS] first [SEP] second [SEP], masked by `mask_tokens`, padded on the right."""
    rows = [[tokenizer.cls_id, *pair.first, tokenizer.sep_id, *pair.second, tokenizer.sep_id] for pair in pairs]
    segments = [[0] * (len(pair.first) + 2) + [1] * (len(pair.second) + 1) for pair in pairs]
    token_ids, padding = pad(rows, tokenizer.pad_id)
    inputs, targets = mask_tokens(token_ids, tokenizer, generator=generator, probability=probability)
    nsp_targets = torch.tensor([int(not pair.is_next) for pair in pairs])
    return PretrainingBatch(inputs, pad(segments, 0)[0], padding, targets, nsp_targets)


def length_buckets(lengths: Sequence[int], *, tokens: int, generator: Generator) -> list[list[int]]:
    """Batches of like lengths, in random order: lists of indices, each index in one of them.

    tokens: the most of a batch when it is padded, sequences x the longest. Raises ValueError for a longer sequence.
    """
    lengths = _integers(lengths)
    if not lengths:
        raise ValueError("there are no lengths")
    if max(lengths) > tokens:
        raise ValueError(f"a sequence has {max(lengths)} tokens, and a batch at most {tokens}")
    shuffled = torch.randperm(len(lengths), generator=generator).tolist()
    batches: list[list[int]] = [[]]
    for index in sorted(shuffled, key=lengths.__getitem__):
        if (len(batches[-1]) + 1) * lengths[index] > tokens:
            batches.append([])
        batches[-1].append(index)
    return [batches[index] for index in torch.randperm(len(batches), generator=generator)]


def windows(stream: Tensor, length: int, batch: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """(inputs, targets), (batch, length) each: stretches of a stream (tokens,) from random places, and what follows.

    Raises ValueError for a stream that is not longer than `length`.
    """
    if stream.dim() != 1 or len(stream) <= length or length < 1 or batch < 1:
        raise ValueError(f"{batch} windows of {length} tokens and the next one: the stream is {tuple(stream.shape)}")
    starts = torch.randint(len(stream) - length, (batch, 1), generator=generator)
    taken = stream[starts + torch.arange(length + 1)]
    return taken[:, :-1], taken[:, 1:]


def _integers(values: Sequence[int] | Tensor) -> list[int]:
    """Raises TypeError for anything else."""
    return list(map(operator.index, values.tolist() if isinstance(values, Tensor) else values))


def _passage_end(document: Sequence[Sentence], start: int, room: int) -> int:
    """Behind the last sentence of those from `start` that fit in `room` tokens together; one sentence at least."""
    end, taken = start + 1, len(document[start])
    while end < len(document) and taken + len(document[end]) <= room:
        taken += len(document[end])
        end += 1
    return end
