"""What caption_images.py consists of: the models, the journal of what is captioned, and where captions are written."""
