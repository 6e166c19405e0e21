"""Images for training and evaluation: where they are, batches, views."""
