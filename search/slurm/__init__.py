"""SLURM: render and submit jobs, ask the queue, and know the job that this process runs in.

Only this package calls SLURM's commands and reads its variables. Where SLURM does not answer, Atelier
goes on as if there were none. An answer that is not understood goes into the log. It is never taken for
silence.
"""
