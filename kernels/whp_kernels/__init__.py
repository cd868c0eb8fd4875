"""Fused losses over large vocabularies for unlearning and distillation; usable without the trainer."""
