"""Every form in which a small model is written and read back."""
