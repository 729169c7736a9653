"""How two other libraries cut a net, to compare with: each returns the slowest stage."""

from collections.abc import Sequence


def block_partition(costs: Sequence[float], stages: int) -> float:
    """Return what torchgpipe's rule gives (Barany and Grinberg, "Block partitions of sequences", 2013).

    From stages of equal numbers of units, single units move from the largest stage towards the smallest,
    until the two differ by no more than the spread of the units.
    """
    low, spread = min(costs), max(costs) - min(costs)
    weights = [(cost - low) / spread if spread else 0.0 for cost in costs]
    ends = [len(costs) // stages * (j + 1) for j in range(stages - 1)] + [len(costs)]

    def sizes(values: Sequence[float]) -> list[float]:
        return [sum(values[a:b]) for a, b in zip([0, *ends[:-1]], ends, strict=True)]

    largest = None
    while True:
        found = sizes(weights)
        if largest is None:
            largest = max(range(stages), key=lambda j: (found[j], j))
            limit = found[largest]
        smallest = min(range(stages), key=lambda j: (found[j], j))
        if limit <= found[smallest] + 1:
            return max(sizes(costs))
        if largest < smallest:
            giver = smallest - 1
            ends[giver] -= 1
        else:
            giver = smallest + 1
            ends[smallest] += 1
        if giver == largest:
            largest = None


def bisection(costs: Sequence[float], stages: int) -> float:
    """Return what DeepSpeed's rule gives: bisect the bottleneck, fill stage after stage up to it."""

    def greedy(limit: float) -> list[float]:
        sums = [0.0]
        for cost in costs:
            if sums[-1] and sums[-1] + cost > limit:
                sums.append(0.0)
            sums[-1] += cost
        return sums

    low, high = max(costs), sum(costs)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if len(greedy(middle)) <= stages else (middle, high)
    return max(greedy(high))
