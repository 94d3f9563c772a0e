"""The poster domain's generator: a brief is drawn, laid out, drawn as pixels and masks, described, and written down.

brief -> layout (motifs), finishing -> drawing (sheet, lettering, pictures, photographs, textures) -> captions, grammar
-> dataset (Parquet shards), contact_sheet.
"""
