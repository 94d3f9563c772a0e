"""Halftone as a program: the command `halftone`, and in an installed copy the presets and templates it comes with."""
