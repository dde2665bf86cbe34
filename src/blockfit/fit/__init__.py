"""The mathematics: plans, maps, sums and closed-form solves. Tensors in, tensors out."""
