"""What a small model is worth: accuracy, features, speed, precision."""
