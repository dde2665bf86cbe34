"""The experiments of the paper (arXiv 2410.04941), on any model and data."""
