"""GGUF files, in: one becomes a checkpoint folder that everything else reads."""
