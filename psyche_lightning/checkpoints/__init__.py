"""Checkpoints: folders in Hugging Face format with a manifest, at any address that fsspec opens or on the Hub.

``manifest`` says what is in one, ``address`` reads and writes places, ``folder`` finds and fetches checkpoints,
``prune`` says which may go, ``writer`` saves in the background, ``model`` copies and saves a model.
"""
