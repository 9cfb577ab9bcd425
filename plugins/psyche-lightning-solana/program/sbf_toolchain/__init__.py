"""From C to a deployable Solana program: a linker for stock clang's objects, and the reproducible build."""
