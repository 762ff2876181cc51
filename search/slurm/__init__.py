"""SLURM: the job that starts workers, what a job is, and what the queue knows of it.

The only package that calls SLURM's commands. Where SLURM does not answer, it is as if there were none.
An answer that is not understood is said in the log, and never taken for silence.
"""
