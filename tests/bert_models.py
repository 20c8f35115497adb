"""Small BERTs, their heads, and the batches that the tests give them."""

import torch

from fasttx.models import (
    BertConfig,
    BertForPretraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertHeadConfig,
)

TINY = BertConfig(vocab_size=40, width=16, layers=2, heads=2, max_positions=12, dropout=0.0)
LABELS = BertHeadConfig(TINY, labels=3)
LENGTHS = (9, 5, 1, 7)
HEADS = range(4)


def batch():
    """Token ids and segment ids of four texts, and their padding."""
    token_ids = torch.randint(1, TINY.vocab_size, (4, 9))
    padding = torch.arange(9) >= torch.tensor(LENGTHS)[:, None]
    segment_ids = (torch.arange(9) >= 3).long().expand(4, 9)
    return token_ids.masked_fill(padding, 0), segment_ids, padding


def heads():
    """Each head with what its loss wants beside the batch."""
    mlm = torch.full((4, 9), -100)
    mlm[0, 2], mlm[0, 8], mlm[1, 4], mlm[3, 0] = 5, 17, 39, 1
    return [
        (BertForPretraining(TINY), {"mlm_targets": mlm, "nsp_targets": torch.tensor([0, 1, 1, 0])}),
        (BertForSequenceClassification(LABELS), {"targets": torch.tensor([0, 2, 1, 2])}),
        (BertForTokenClassification(LABELS), {"targets": torch.randint(3, (4, 9))}),
        (BertForQuestionAnswering(TINY), {"starts": torch.tensor([2, 0, 0, 3]), "ends": torch.tensor([8, 4, 0, -100])}),
    ]


def flat(logits):
    return torch.cat([x.flatten() for x in (logits if isinstance(logits, tuple) else (logits,))])


class Tokenizer:
    def __init__(self, fingerprint):
        self.fingerprint = fingerprint


def hugging_face(transformers, kind="BertModel", **options):
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=12, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        attn_implementation="eager", **options,
    )  # fmt: skip
    model = getattr(transformers, kind)(config).eval()
    with torch.no_grad():  # its biases are 0 and its norms 1, which would hide one that is left out
        for values in model.parameters():
            values.add_(0.1 * torch.randn_like(values))
    return model


def copied(theirs, ours, names):
    """Copies each of their modules to ours, by their names."""
    with torch.no_grad():
        for their_name, our_name in names.items():
            for name, values in theirs.get_submodule(their_name).named_parameters():
                ours.get_submodule(our_name).get_parameter(name).copy_(values)


def flat_valid(logits, padding):
    """What is not at padding, of one or several logits."""
    per_token = [x.shape[:2] == padding.shape for x in logits]
    return torch.cat([(x[~padding] if of else x).flatten() for x, of in zip(logits, per_token, strict=True)])
