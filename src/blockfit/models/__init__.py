"""Any nn.Module: load it, find its blocks and their parts, run it, cut it, count it."""
