"""What a run will take, before it is started: memory of a rank, bytes over the wire, time of an outer step.

    counting.py   a recipe's real outer step on tensors without data: Facts    (needs torch)
    estimate.py   facts, hardware, backend and number of ranks: an Estimate    (pure arithmetic)
    advice.py     which setting would make fit what does not

docs/scaling.md has the formulas.
"""
