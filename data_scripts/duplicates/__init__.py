"""Near-duplicates in a dataset: copies of an image in another size or compression, mirrored, or slightly cropped."""
