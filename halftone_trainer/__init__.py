"""The command `halftone`; in an installed copy, this folder also contains the presets and templates of Halftone."""
