"""What a study is asked to do: profiles, their keys, and methods as stages."""
