"""CLIPS AND SEEDS ON DISK: sidecars are the truth, the store is their index. Never imports torch."""
