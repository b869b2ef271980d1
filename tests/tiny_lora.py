"""Tiny models with LoRA adapters that PEFT has made, and what each makes of its model."""

import peft
import pytest
import torch
from families import rows
from tiny_hf import make

ROWS = {row.name: row for door_rows in rows().values() for row in door_rows}
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def adapted(row, folder, targets, seed=0, **config):
    """A tiny model in folder/model, an adapter that PEFT has saved in folder/adapter, and the model with it merged."""
    model = make(folder / "model", row)
    return model, another(row, folder, "adapter", targets, seed, **config)


def another(row, folder, name, targets, seed=0, **config):
    settings = {"r": 4, "lora_alpha": 10, "target_modules": targets, **config}
    torch.manual_seed(0)
    model = peft.get_peft_model(make(folder / "scratch", row), peft.LoraConfig(**settings))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    model.save_pretrained(folder / name)
    return model.merge_and_unload().eval()


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """A model with three adapters, and what each makes of it."""
    folder = tmp_path_factory.mktemp("three")
    base, merged = adapted(ROWS["llama"], folder, ALL)
    names = {"adapter": merged, "b": another(ROWS["llama"], folder, "b", ["q_proj", "down_proj"], 1, r=8),
             "c": another(ROWS["llama"], folder, "c", ALL, 2, r=2)}  # fmt: skip
    return folder, {None: base, **names}
