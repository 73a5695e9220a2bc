"""The online tier: a scoring service over one Scorer, `python -m serve MODEL`."""
