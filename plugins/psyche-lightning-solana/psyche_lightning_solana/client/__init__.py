"""The node's and the owner's side of a run on the chain: wallets, RPC, transactions, the ``Coordinator``."""
