"""Whether all that must hold of a study holds: the evidence, and the rules."""
