"""Weights as other programs write them: layouts, sizes and kinds of file, read to our names."""
