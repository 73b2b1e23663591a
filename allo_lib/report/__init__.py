"""Figures, tables, the report, and what notebooks show."""
