"""Models, tokenizers, texts and checkpoints: by hub id, by path, or as they come with evatune."""
