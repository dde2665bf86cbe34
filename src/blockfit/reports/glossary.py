"""The words of a report, each in a sentence or two."""

from __future__ import annotations

GLOSSARY = (
    ("Block", "One layer of a transformer: attention and MLP, each added to what it reads."),
    ("Hidden state", "What a block reads: one vector per token. h[l] is the input of block l."),
    ("Span", "Neighbouring blocks that are replaced together; 3:5 is the blocks 3 and 4."),
    ("Map", "The small module in place of a span, solved in closed form; affine is W·h + b."),
    ("Identity", "No module at all: the span is dropped and its input passed on."),
    ("Narrowed", "A block that stays with fewer MLP channels, value or query-key directions."),
    ("Repaired", "A block that stays, with output weights solved again for what it now reads."),
    ("Prefix tokens", "Class and register tokens; all others are patch tokens."),
    ("Held-out images", "Calibration images that were not fitted on; they chose the plan."),
    ("Test images", "Images that decided nothing: only their figures say what a model is worth."),
    ("95% interval", "Where the figure of all such images lies, with 95% confidence."),
    ("KL", "Divergence of the small model's class probabilities from the original's, in nats."),
    ("Top-1", "Share of the images whose label the model names first."),
    ("Agreement", "Share of the images on which both models name the same class first."),
    ("Flip", "An image on which they do not. Its cost is the KL of this image."),
    ("Relative feature error", "Distance of the final features over the original's length."),
    ("R²", "Share of the variance of one state that an affine map of another explains."),
    ("FLOPs", "Multiplications and additions of one image, counted, not timed."),
    ("Latency", "Time of one forward pass, the two models in turn on the same machine."),
)

READING = {
    "r2": "How well an affine map turns the state of the row into that of the column, on the "
    "tokens of the analysis: 1 is perfectly. A bright square along the diagonal is a run of "
    "blocks that one map can stand for.",
    "cka": "How alike two states are up to a rotation and a scale: 1 is the same geometry. High "
    "values along the diagonal mean blocks that change little.",
    "cosine": "The mean cosine between the same token in two states: 1 is the same direction. "
    "Where it is near 1, dropping the blocks between (identity) costs little.",
    "angular": "The mean angle between the same token in two states, over π: 0 is the same "
    "direction. It is the score by which ShortGPT and its kin drop blocks.",
    "mse": "The mean squared difference of the same token in two states, on a log scale. It "
    "grows with the norm of the states, so compare within a row.",
}
"""How each heat map is read."""
