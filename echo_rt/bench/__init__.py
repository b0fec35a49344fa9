"""How fast a whole block is: what ``echo-rt bench`` runs, and the tables that the benchmarks of a checkout share."""
