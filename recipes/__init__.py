"""The recipes that come with psyche, one YAML file each: the package ``psyche_lightning.recipes``."""
