"""transformers' own adapters: `model.add_adapter`, EVA, a few steps, `save_pretrained`, and back
with `load_adapter`.

    pip install 'evatune[demo]'
    python examples/add_adapter.py

There is no `PeftModel` here: the adapter's layers are inside the transformers model.
"""

import argparse
from pathlib import Path

import torch
from peft import LoraConfig
from transformers import AutoModel, AutoTokenizer

import evatune
from evatune.loading.corpora import bbc
from evatune.loading.demo import demo_model

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("--out", type=Path, default=Path("adapter"), help="folder for the adapter")
out = parser.parse_args().out

texts, _ = bbc()
tokenizer = AutoTokenizer.from_pretrained(demo_model())
batches = [
    tokenizer(texts[i : i + 8], max_length=48, truncation=True, padding=True, return_tensors="pt")
    for i in range(0, 128, 8)
]

model = AutoModel.from_pretrained(demo_model())
model.add_adapter(LoraConfig(r=8, lora_alpha=8, target_modules=["query", "value"]))
calibration = evatune.initialize(model, batches)

# Something to learn without labels: texts side by side in the corpus are on one topic, and end up
# closer.
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
for batch in batches[:4]:
    first = model(**batch).last_hidden_state[:, 0]
    similarity = (
        torch.nn.functional.normalize(first, dim=1) @ torch.nn.functional.normalize(first, dim=1).T
    )
    (1 - similarity).mean().backward()
    optimizer.step()
    optimizer.zero_grad()
model.save_pretrained(out)

loaded = AutoModel.from_pretrained(demo_model())
loaded.load_adapter(str(out))
with torch.no_grad():
    ours, theirs = (each.eval()(**batches[0]).last_hidden_state for each in (model, loaded))
print(f"ranks {sorted(calibration.allocate().ranks.values())}")
print(f"loaded again, outputs differ by {(ours - theirs).abs().max():.1e}")
