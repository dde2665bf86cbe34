"""Images from anywhere, as batches."""
