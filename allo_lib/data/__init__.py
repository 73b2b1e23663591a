"""Problems, answers and preference pairs: generated, or read."""
