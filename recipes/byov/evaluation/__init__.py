"""What a trained encoder is worth: classifiers on features, draws, pruning, OOD."""
