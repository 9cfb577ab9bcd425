"""Built-in transports: in-process, and TCP with TLS bound to the nodes' keys."""
