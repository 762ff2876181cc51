"""One training run of the fashion-attribute model: a config goes in, epochs come out.

Nothing here knows of trials, databases or clusters. Importing the package loads no torch: the modules
that need it are imported by name (`from trainer.loop import train`).
"""
