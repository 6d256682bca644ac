"""What `corral doctor` looks at: one machine, the nodes of a cluster, and the verdicts over both."""
