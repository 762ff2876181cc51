"""Ways to look at a study."""
