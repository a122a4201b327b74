"""The distribution that is sampled from, written out token by token."""

import math


def processed(logits, temperature=1.0, top_k=0, top_p=1.0):
    """Return the probabilities of one position as Python floats."""
    logits = [value / temperature for value in logits]
    kept = set(range(len(logits)))
    if top_k:
        kth = sorted(logits, reverse=True)[min(top_k, len(logits)) - 1]
        kept = {i for i in kept if logits[i] >= kth}

    def normalized():
        peak = max(logits[i] for i in kept)
        weights = [math.exp(logits[i] - peak) if i in kept else 0.0 for i in range(len(logits))]
        return [weight / math.fsum(weights) for weight in weights]

    if top_p < 1:
        probabilities, mass, nucleus = normalized(), 0.0, set()
        for i in sorted(kept, key=lambda i: -probabilities[i]):
            if mass >= top_p:
                break
            nucleus.add(i)
            mass += probabilities[i]
        kept = nucleus
    return normalized()
