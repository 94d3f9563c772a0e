"""The poster generator: draw a brief at random, lay it out, draw the poster and its maps, and write caption and row.

The modules in the order of their use: brief -> layout (motifs), finishing -> drawing (sheet, lettering, pictures,
photographs, textures) -> captions, grammar -> dataset (Parquet shards), contact_sheet.
"""
