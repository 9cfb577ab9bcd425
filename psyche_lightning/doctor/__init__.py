"""What ``psyche doctor`` looks at: machine, coordinator, peers, a link, a recipe; and what follows for a run."""
