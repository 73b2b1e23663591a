"""From outcomes to comparisons, claims and verdicts; imports no torch."""
