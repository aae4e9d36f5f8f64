"""Figures of the page as SVG: each function takes plain figures and returns markup."""
