"""Commands, and what they keep of a run."""
