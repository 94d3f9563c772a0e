"""The poster domain's generator: a brief is drawn, laid out, drawn as pixels and masks, described, and written down.

brief -> layout (motifs) -> drawing (canvas, pictures) -> captions -> dataset (Parquet shards), contact_sheet.
"""
