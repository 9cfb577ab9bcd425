"""The coordinator as a server: its store and page, the node's client, and the owner's side."""
