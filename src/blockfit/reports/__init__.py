"""What runs found, as one page."""
