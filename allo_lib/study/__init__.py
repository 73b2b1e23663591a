"""A study: what it makes and keeps, its methods, its results."""
