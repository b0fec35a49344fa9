"""How fast a whole block is: what ``echo-rt bench`` runs, and what the benchmarks of a checkout share with it.

:func:`echo_rt.bench.run.run` measures; ``timing``, ``tables`` and ``environment`` are the one timer, the one writer of
results and the one header of all benchmarks. Others' code is in ``bench/`` of a checkout and is not installed.
"""
