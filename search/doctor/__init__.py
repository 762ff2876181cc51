"""`atelier doctor`: what a search needs of this machine, its database and its SLURM, check by check."""
