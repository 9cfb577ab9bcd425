"""Loss against bytes: several nodes train small byte-level language models together, in several ways."""
