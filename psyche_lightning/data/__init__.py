"""Data providers: token files on disk and over HTTP, weighted mixes, Hugging Face datasets, preprocessed parquet."""
