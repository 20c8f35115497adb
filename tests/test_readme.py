"""README.md: its Python runs as it is printed, and its commands are there."""

import copy
import re
from pathlib import Path

import pytest
import torch
from budget import assert_within_budget

import fasttx
from fasttx.__main__ import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)
BATCH, LENGTH, WIDTH, HEADS = 2, 6, 16, 2


def run(code: str, **names: object) -> dict[str, object]:
    """The block's names after it ran, given those that README leaves to the reader."""
    exec(compile(code, "README.md", "exec"), names)
    return names


def block(marker: str) -> str:
    """The one block with this in it."""
    (found,) = [code for code in BLOCKS if marker in code]
    return found


def test_every_block_is_run_here():
    markers = "fasttx.optimize(", "KVCache(", "linear_cross_entropy(", "finetune.lora("
    assert len({block(marker) for marker in markers}) == len(BLOCKS)


def test_optimize_explain_restore(tmp_path, capsys):
    pytest.importorskip("transformers")
    import hf_models as models

    original = models.make("bert")
    original.save_pretrained(tmp_path)
    code = block("fasttx.optimize(")
    before, line = code.split("fasttx.restore(model)")
    inputs = models.batch("bert")
    names = run(before, path=tmp_path)
    optimized = names["model"]
    assert type(optimized).__module__.startswith("transformers") and type(optimized) is type(original)
    assert "fasttx" in {type(m).__module__.partition(".")[0] for m in optimized.modules()}
    assert "BertLayer" in capsys.readouterr().out
    with torch.no_grad():
        expected, actual = original(**inputs), optimized(**inputs)
        valid = inputs["attention_mask"].bool()
        truth = copy.deepcopy(original).double()(**inputs)
        assert_within_budget(actual=actual[0][valid], eager=expected[0][valid], truth=truth[0][valid])
        run("fasttx.restore(model)" + line, **names)
        assert [type(m) for m in optimized.modules()] == [type(m) for m in original.modules()]
        assert torch.equal(optimized(**inputs)[0], expected[0])


def test_decoding_step_by_step():
    """In the README's order, and once more after it: by the budget of torch's decoder over all tokens at once."""
    eager = torch.nn.TransformerDecoder(
        torch.nn.TransformerDecoderLayer(WIDTH, HEADS, 2 * WIDTH, batch_first=True), 2
    ).eval()
    decoder = fasttx.optimize(copy.deepcopy(eager))
    memory, x = torch.randn(BATCH, 3, WIDTH), torch.randn(BATCH, LENGTH, WIDTH)
    beams = torch.tensor([1, 0])

    def last_within_budget(found, x, memory):
        mask = torch.nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        truth = copy.deepcopy(eager).double()(x.double(), memory.double(), tgt_mask=mask.double())
        expected = eager(x, memory, tgt_mask=mask)
        assert_within_budget(actual=found, eager=expected[:, -1:], truth=truth[:, -1:])

    with torch.no_grad():
        found = run(
            block("KVCache("), fasttx=fasttx, decoder=decoder, memory=memory, tokens=x.split(1, 1), beams=beams
        )
        last_within_budget(found["out"], x, memory)
        # The cache goes on with the sequences in their new order.
        step = decoder(x[:, :1], memory[beams], cache=found["cache"])
        last_within_budget(step, torch.cat((x[beams], x[:, :1]), 1), memory[beams])


def test_operations():
    classes, kv_heads = 11, 1
    leaves = {
        "q": torch.randn(BATCH, HEADS, LENGTH, WIDTH), "k": torch.randn(BATCH, kv_heads, LENGTH, WIDTH),
        "v": torch.randn(BATCH, kv_heads, LENGTH, WIDTH), "bias": torch.randn(HEADS, LENGTH, LENGTH),
        "weight": torch.randn(classes, WIDTH),
    }  # fmt: skip
    for leaf in leaves.values():
        leaf.requires_grad_()
    targets = torch.randint(classes, (BATCH, HEADS, LENGTH))
    found = run(block("linear_cross_entropy("), lengths=torch.tensor([LENGTH, 2]), targets=targets, **leaves)
    assert found["out"].shape == leaves["q"].shape and found["loss"].dim() == 0
    found["loss"].backward()
    assert all(leaf.grad.isfinite().all() and leaf.grad.any() for leaf in leaves.values())
    imported = re.findall(r"import (.+)", block("linear_cross_entropy("))
    assert {name for line in imported for name in line.split(", ")} <= set(fasttx.functional.__all__)


def test_fine_tuning(tmp_path, capsys):
    pytest.importorskip("peft")
    import hf_models as models

    models.make("bert").save_pretrained(tmp_path)
    inputs = models.batch("bert")
    padding = inputs["attention_mask"] == 0
    labels = torch.arange(len(padding)) % 3
    names = {"token_ids": inputs["input_ids"], "padding": padding, "labels": labels, "path": tmp_path / "adapter"}
    found = run(block("finetune.lora("), folder=tmp_path, **names)
    assert "parameters are trained" in capsys.readouterr().out
    loaded = found["finetune"].load_adapter(
        found["BertForSequenceClassification"].from_encoder(found["bert"], labels=3), names["path"]
    )
    found["finetune"].unmerge(found["adapted"])
    saved, own = loaded.state_dict(), found["adapted"].state_dict()
    adapters = [name for name in own if "lora_" in name or "classifier." in name]
    assert len(adapters) > 2 and all(torch.equal(saved[name], own[name]) for name in adapters)
    assert all(values.grad is not None for name, values in found["adapted"].named_parameters() if "lora_" in name)


def test_every_system_is_told_of():
    from fasttx.systems import SYSTEMS

    told = set(re.findall(r"`train (\w+)", README))
    assert told == set(SYSTEMS) and "@" not in re.sub(r"`[^`]*`", "", README)


def test_commands_are_there():
    for command in set(re.findall(r"python -m fasttx (\w+)", README)):
        with pytest.raises(SystemExit) as stop:
            main([command, "--help"])
        assert stop.value.code == 0
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    named = set(re.findall(r"(?:^|`)make ([\w-]+)", README, flags=re.MULTILINE))
    assert named and named <= targets


def test_names_are_there():
    """Every fasttx.x and fasttx.x.y that the text speaks of."""
    for dotted in set(re.findall(r"`fasttx((?:\.[a-zA-Z]\w*)+)", README)):
        value = fasttx
        for name in dotted.strip(".").split("."):
            value = getattr(value, name)
