"""Checkpoints: folders in Hugging Face format with a manifest, at any address that fsspec opens or on the Hub.

``manifest`` describes a checkpoint, ``address`` reads and writes storage, ``folder`` finds, fetches and prunes
checkpoints, ``pretrained`` loads a model, ``dtypes`` casts it, ``building`` lets one thread at a time do so, ``model``
copies and saves it, and ``writer`` saves in the background.
"""
