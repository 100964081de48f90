"""The recipes from Python: a typed config, a trainer that runs them, and what comes out.

The public names are those of `torchtune_agent`, which loads them on first use. The config alone needs no torch.
"""
