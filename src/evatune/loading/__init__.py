"""Models, tokenizers, texts and images by hub id or path; checkpoints of our own; corpora."""
