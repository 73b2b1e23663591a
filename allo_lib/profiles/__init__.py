"""What a study does: profiles, their keys, and methods as stages."""
