"""Figures that another tool measured, on a phone for instance, in the form of our own."""
